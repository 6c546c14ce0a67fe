"""The contribution log: what each round's aggregation was given, so that it can be done again without somebody.

A round is one file, ``contributions/round-0007.zip``: the adapter and the strategy's state it began with, what clients
were sent, and what they sent back, as safetensors. ``contributions/manifest.json`` holds the SHA-256 of every file.
Both are written before the round is committed, and a round that is played again writes them again: wherever a crash
falls, every committed round has the log that belongs to it.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.adapter.wire import decode_adapter, decode_update, encode_adapter, encode_update
from fedlora.aggregation.base import Contribution, RoundContext, State
from fedlora.aggregation.cohort import Cohort, Pending
from fedlora.aggregation.combine import apply_delta
from fedlora.config import ContributionsConfig
from fedlora.errors import FedLoRAError, UnlearningError
from fedlora.protocol import ClientInfo
from orchestrator.failpoints import reach
from orchestrator.inbox import Used
from orchestrator.state import RunState, pack_tree, unpack_tree
from orchestrator.stores.files import file_sha256, read_json, replacing, write_json

FOLDER, _MANIFEST = "contributions", "manifest.json"
_NOTE, _START, _STRATEGY = "note.json", "start.safetensors", "strategy.safetensors"
SCHEMA = 1


@dataclass(frozen=True, eq=False)
class LoggedRound:
    """What the aggregation of a round was given.

    Attributes:
        round: 1-based.
        rank: of the global adapter.
        adapter: the global one at the start of the round, before dead pairs were revived.
        strategy: state of the strategy then.
        ledger: id of the last entry of the base ledger then; ``""`` for an empty one.
        extras: whether clients sent extra tensors of the strategy.
        dtype: of the changes as they were kept.
        updates: in member order, with the weights they came with; each is read when it is looked at.
    """

    round: int
    rank: int
    adapter: AdapterState
    strategy: State
    ledger: str
    extras: bool
    dtype: str
    updates: Cohort


@dataclass(frozen=True)
class ContributionLog:
    """The log of a run folder; ``entries`` has ``sha256`` and ``bytes`` of every round that is there."""

    folder: Path
    entries: Mapping[int, Mapping[str, Any]]

    @property
    def num_bytes(self) -> int:
        """On the disk."""
        return sum(entry["bytes"] for entry in self.entries.values())

    def open(self, number: int) -> LoggedRound:
        """One round.

        Raises:
            UnlearningError: if it is not there, or is not what was written.
        """
        path = log_file(self.folder, number)
        if number not in self.entries or not path.is_file():
            raise UnlearningError(f"{path} is missing; the contribution log has no round {number}")
        if file_sha256(path) != self.entries[number]["sha256"]:
            raise UnlearningError(
                f"{path} is truncated or altered (its SHA-256 differs from the manifest); restore it, or use rollback"
            )
        try:
            return _opened(path)
        except (FedLoRAError, zipfile.BadZipFile, ValueError, KeyError, TypeError) as error:
            raise UnlearningError(f"{path} is of another version of fedlora ({error}); use rollback") from error


def would_take(rows: Sequence[Mapping[str, Any]], state: RunState) -> int:
    """About how many bytes the log of these rounds has, or would have had, in float32.

    Args:
        rows: of the metrics.
    """
    adapter = sum(tensor.nbytes for tensor in state.adapter.tensors().values())
    sent = {row["round"]: row.get("bytes_up_fp32", row["bytes_up"]) for row in rows if row["admitted"]}
    return sum(sent[row["round"]] + adapter * (1 + len(row["ranks"])) for row in rows if row["admitted"])


def read_log(folder: Path) -> ContributionLog:
    """The contribution log of a run folder; one without rounds where there is none.

    Raises:
        UnlearningError: if its manifest is malformed.
    """
    path = folder / FOLDER / _MANIFEST
    if not path.exists():
        return ContributionLog(folder, {})
    try:
        rounds = read_json(path)["rounds"]
        entries = {int(n): {"sha256": str(e["sha256"]), "bytes": int(e["bytes"])} for n, e in rounds.items()}
    except (FedLoRAError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnlearningError(
            f"{path} is altered or incomplete ({error}); restore it, or delete {folder / FOLDER} and lose the log"
        ) from error
    return ContributionLog(folder, entries)


def keep_round(
    folder: Path,
    settings: ContributionsConfig,
    check: Callable[[], None],
    ctx: RoundContext,
    state: RunState,
    used: Sequence[Used],
) -> None:
    """Log a round that is about to be committed, and delete what is older than the log goes back.

    Args:
        check: raises where this process must not write any more.
        state: before the round.
        used: what was aggregated; of a round that brought nothing there is nothing to log.

    Raises:
        RunFolderError: if the disk refuses.
        UnlearningError: if the manifest is malformed.
    """
    check()
    number = ctx.round
    known = read_log(folder).entries
    # of this round and later ones only an attempt that was never committed can have left something
    entries = {n: entry for n, entry in known.items() if n < number}
    if used and number % settings.every == 0:
        path = log_file(folder, number)
        _write(path, settings.dtype, ctx, state, used)
        reach("contributions.written", number)
        entries[number] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    if settings.keep_rounds is not None:
        entries = {n: entry for n, entry in entries.items() if n > number - settings.keep_rounds}
    if entries != known:
        _write_manifest(folder, entries)
        reach("contributions.listed", number)
        _remove_others(folder, entries)


def copy_log(folder: Path, target: Path, last: int) -> None:
    """Give another run folder the log of the rounds up to ``last``, as it is; nothing of one that cannot be read."""
    try:
        log = read_log(folder)
    except UnlearningError:
        return
    entries = {n: entry for n, entry in log.entries.items() if n <= last and log_file(folder, n).is_file()}
    for number in entries:
        with replacing(log_file(target, number)) as file:
            file.write(log_file(folder, number).read_bytes())
    if entries:
        _write_manifest(target, entries)


def log_file(folder: Path, number: int) -> Path:
    """Where the log of a round is, if it is there."""
    return folder / FOLDER / f"round-{number:04d}.zip"


def _write_manifest(folder: Path, entries: Mapping[int, Mapping[str, Any]]) -> None:
    rounds = {str(number): entries[number] for number in sorted(entries)}
    write_json(folder / FOLDER / _MANIFEST, {"schema": SCHEMA, "rounds": rounds})


def _remove_others(folder: Path, entries: Collection[int]) -> None:
    kept = {log_file(folder, number).name for number in entries}
    for path in (folder / FOLDER).glob("round-*.zip"):
        if path.name not in kept:
            path.unlink()


def _write(path: Path, dtype: str, ctx: RoundContext, state: RunState, used: Sequence[Used]) -> None:
    """One file, update by update: a round need not fit into memory."""
    tensors: dict[str, Tensor] = {}
    note: dict[str, Any] = {"schema": SCHEMA, "round": ctx.round, "rank": ctx.rank, "ledger": state.ledger.head}
    note |= {"dtype": dtype, "strategy": pack_tree(state.strategy, tensors), "updates": []}
    sent: dict[str, int] = {}  # place of what was received, by its SHA-256
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, _START, encode_adapter(state.adapter))
        _add(
            archive, _STRATEGY, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        )
        for place, one in enumerate(used):
            assert one.update.change is not None  # the inbox always says
            update, (received, delta) = one.update.load(), one.update.change()
            if one.flight.received not in sent:
                # kept, though it follows from the start: the same factors come out of an SVD on this machine only
                sent[one.flight.received] = len(sent)
                _add(archive, _received(len(sent) - 1), encode_adapter(received))
            if dtype == "float16":
                delta = {name: _halved(tensor) for name, tensor in delta.items()}
            which = update.client.id, one.flight.round, one.flight.received
            message = encode_update(*which, delta, update.client.num_examples, update.metrics, update.extras)
            _add(archive, _update(place), message)
            note["updates"].append(
                {
                    "client": asdict(update.client),
                    "weight": one.update.weight,
                    "staleness": update.staleness,
                    "received": sent[one.flight.received],
                    "extras": len(update.extras),
                }
            )
        _add(archive, _NOTE, json.dumps(note).encode())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980, so that equal rounds have equal bytes
    info.external_attr = 0o600 << 16
    archive.writestr(info, content)


def _halved(tensor: Tensor) -> Tensor:
    half = tensor.to(torch.float16)
    return half if half.isfinite().all() else tensor  # a change beyond 65504 stays as it is


def _received(place: int) -> str:
    return f"received-{place}.safetensors"


def _update(place: int) -> str:
    return f"update-{place}.safetensors"


def _opened(path: Path) -> LoggedRound:
    def read(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)

    @functools.cache
    def received(place: int) -> AdapterState:
        return decode_adapter(read(_received(place)))

    def change(place: int, sent: int) -> tuple[AdapterState, Mapping[str, Tensor]]:
        return received(sent), decode_update(read(_update(place))).delta

    def load(place: int, told: Mapping[str, Any]) -> Contribution:
        update, start = decode_update(read(_update(place))), received(told["received"])
        trained = apply_delta(start, update.delta)
        who = _client(told["client"]), told["weight"]
        return Contribution(*who, trained, start, update.metrics, update.extras, told["staleness"])

    note = json.loads(read(_NOTE))
    if note["schema"] != SCHEMA:
        raise UnlearningError(f"it has schema {note['schema']!r}")
    pending = [
        Pending(
            _client(told["client"]),
            told["weight"],
            functools.partial(load, place, told),
            functools.partial(change, place, told["received"]),
        )
        for place, told in enumerate(note["updates"])
    ]
    return LoggedRound(
        note["round"],
        note["rank"],
        decode_adapter(read(_START)),
        unpack_tree(note["strategy"], safetensors.torch.load(read(_STRATEGY))),
        note["ledger"],
        any(told["extras"] for told in note["updates"]),
        note["dtype"],
        Cohort(pending),
    )


def _client(told: Mapping[str, Any]) -> ClientInfo:
    return ClientInfo(**{**told, "stages": tuple(map(tuple, told["stages"]))})
