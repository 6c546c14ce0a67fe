"""An organisation's side of a run: its settings, its policy, its disk, and the runtime that every pool shares."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from clients.attempt import OpenRuntime, Runtime, answer, attempt, open_runtime
from clients.deadline import OutOfTimeError, stopped_after
from clients.policy import check_base, check_letter, check_rank, check_run, check_score, check_task, load_policy
from clients.recipe import RecipeRefused, config_on_node, read_recipe
from clients.records import Parcel, is_sha256, read_task, sha256, write
from fedlora.adapter.wire import decode_adapter
from fedlora.config.sections import Section
from fedlora.errors import ConfigError, FedLoRAError, SecureSumError, WireError
from fedlora.protocol import EvalResult, EvalTask, Patch, Reply, TrainTask

_LOG = logging.getLogger(__name__)  # the node's own
MAX_SCORES = 16  # asked for in one message


class SiloSettings(Section):
    """What ``--node-config`` says: where this node's things are, and who it is."""

    client: str = Field(min_length=1, max_length=100, description="its name in the federation")
    data: str = Field(description="a JSONL, CSV or Parquet file of its own rows")
    model: str = Field(description="its copy of the base model: a folder, a hub name, or builtin:...")
    rank: int = Field(ge=1, description="LoRA rank it trains at")
    state: str = Field(description="a folder for what it keeps to itself")
    policy: str = Field(description="its client_policy.yaml")
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$")
    threads: int | None = Field(None, ge=1, description="torch threads; default all cores")
    text_column: str | None = None
    label_column: str | None = None
    id_column: str | None = None


def read_settings(node_config: Mapping[str, Any]) -> SiloSettings:
    """Settings from Flower's node configuration, whose keys may have dashes.

    Raises:
        ConfigError: with every key that is missing or unknown.
    """
    try:
        return SiloSettings.model_validate({key.replace("-", "_"): value for key, value in node_config.items()})
    except ValidationError as error:
        told = [f"node-config: {'.'.join(map(str, item['loc']))}: {item['msg'].lower()}" for item in error.errors()]
        raise ConfigError(*told) from error


_SAYABLE = (RecipeRefused, WireError, SecureSumError)  # about what the server sent, not about what is here


class Silo:
    """Answers a server. One run at a time has its runtime loaded; another one takes its place."""

    def __init__(self, settings: SiloSettings, open_runtime: OpenRuntime = open_runtime):
        self.settings = settings
        self._policy = load_policy(Path(settings.policy))  # read once: a running node's rules do not move
        self._open = open_runtime
        self._patches = PatchStore(Path(settings.state) / "patches")
        self._loaded: tuple[str, Runtime] = ("", None)  # type: ignore[assignment]

    def describe(self, parcel: Parcel) -> Parcel:
        """Who this is, and a fingerprint of its base: what a server has to know before it can ask for anything."""

        def told(runtime: Runtime) -> dict[str, Any]:
            (member,) = runtime.members()
            if not self._policy.tell_labels:
                member = replace(member, label_counts={})
            return {"member": write(member), "base": runtime.base().fingerprint}

        return self._answer(parcel, lambda runtime, _: told(runtime))

    def train(self, parcel: Parcel) -> Parcel:
        """One task of training, if the policy allows it."""
        payloads: dict[str, bytes] = {}

        def trained(runtime: Runtime, patches: tuple[Patch, ...]) -> dict[str, Any]:
            note, recipe = parcel.note, read_recipe(str(parcel.note.get("recipe")))
            task = read_task(TrainTask, note.get("task"), parcel.payload(note["task"]["adapter"]), patches)
            if task.received != sha256(task.adapter):
                raise WireError("the task is about another adapter than the one it came with")
            if task.client != self.settings.client:
                raise RecipeRefused(f"refused: this node is {self.settings.client}, not {task.client:.60}")
            (member,) = runtime.members()
            check_task(self._policy, recipe, task, _count(note.get("cohort")), member.num_examples)
            check_rank(self._policy, decode_adapter(task.adapter).rank)
            check_base(self._policy, runtime.base().fingerprint, str(note.get("base", "")))
            limit = note.get("seconds")
            try:
                with stopped_after(limit if isinstance(limit, int | float) and limit > 0 else None):
                    reply = attempt(runtime, task)
            except OutOfTimeError:
                reply = Reply(task.client, error=f"had not answered at the deadline of {limit:g} s and was stopped")
            return self._told(reply, payloads)

        return replace(self._answer(parcel, trained), payloads=payloads)

    def exchange(self, parcel: Parcel) -> Parcel:
        """One message of a secure sum."""
        payloads: dict[str, bytes] = {}

        def answered(runtime: Runtime, _: tuple[Patch, ...]) -> dict[str, Any]:
            client, letter = parcel.note.get("client"), parcel.payload(str(parcel.note.get("letter")))
            if client != self.settings.client:
                raise RecipeRefused(f"refused: this node is {self.settings.client}, not {client!s:.60}")
            if read_recipe(str(parcel.note.get("recipe"))).privacy.secure_sum:
                check_letter(self._policy, letter)
            return self._told(answer(runtime, self.settings.client, letter), payloads)

        return replace(self._answer(parcel, answered), payloads=payloads)

    def evaluate(self, parcel: Parcel) -> Parcel:
        """Scores on the node's held-out rows, or on those it holds out for the server."""

        def scored(runtime: Runtime, patches: tuple[Patch, ...]) -> dict[str, Any]:
            notes = parcel.note.get("tasks")
            if not isinstance(notes, list) or not 0 < len(notes) <= MAX_SCORES:
                raise WireError(f"a message asks for 1 to {MAX_SCORES} scores")
            check_base(self._policy, runtime.base().fingerprint, str(parcel.note.get("base", "")))
            return {"results": [write(self._score(runtime, parcel, note, patches)) for note in notes]}

        return self._answer(parcel, scored)

    def _score(self, runtime: Runtime, parcel: Parcel, note: Any, patches: tuple[Patch, ...]) -> EvalResult:
        if not isinstance(note, dict):
            raise WireError("a task is not an object")
        task = read_task(EvalTask, note, parcel.payload(str(note.get("adapter"))), patches)
        check_score(self._policy, self.settings.client, task)
        check_rank(self._policy, decode_adapter(task.adapter).rank)
        result = runtime.evaluate(task)
        if not result.error and result.num_examples < self._policy.min_score_rows:
            return EvalResult(task.subject, 0.0, 0, 0, 0, error="it has too few rows for a score (min_score_rows)")
        return result

    def _answer(self, parcel: Parcel, work: Callable[[Runtime, tuple[Patch, ...]], dict[str, Any]]) -> Parcel:
        """What the work comes to, or why there is none. What it lacks of the ledger it asks for."""
        start = time.perf_counter()
        try:
            note = parcel.note
            patches, lacks = self._patches.take(note.get("ledger", []), parcel.payloads)
            if lacks:
                return Parcel({"lacks": lacks})
            runtime = self._runtime(str(note.get("recipe")))
            answer = work(runtime, patches)
            return Parcel({**answer, "stats": write(runtime.stats())})
        except FedLoRAError as error:
            return Parcel({"error": self._sayable(error), "seconds": time.perf_counter() - start})
        except Exception as error:  # noqa: BLE001 - a node outlives whatever a server sends it
            _LOG.exception("a message of the server could not be carried out")
            told = f"{type(error).__name__}: {error}" if self._policy.tell_errors else type(error).__name__
            return Parcel({"error": told, "seconds": time.perf_counter() - start})

    def _sayable(self, error: FedLoRAError) -> str:
        """An error as the server may know it: one about rows or files may quote them."""
        if isinstance(error, _SAYABLE) or self._policy.tell_errors:
            return str(error)
        _LOG.error("%s", error)
        return f"{type(error).__name__}; the node's own log says more (policy: tell_errors)"

    def _told(self, reply: Reply, payloads: dict[str, bytes]) -> dict[str, Any]:
        """A reply as far as the server may know it: an error that is not one of ours may quote a row."""
        note: dict[str, Any] = {"seconds": reply.seconds}
        if reply.payload is not None:
            note["payload"] = sha256(reply.payload)
            payloads[note["payload"]] = bytes(reply.payload)
        elif reply.traceback is None or self._policy.tell_errors:
            note |= {"error": reply.error, "traceback": reply.traceback}
        else:
            _LOG.error(reply.traceback)
            note["error"] = f"{str(reply.error).split(':')[0]}; the node's own log says more (policy: tell_errors)"
        return note

    def _runtime(self, text: str) -> Runtime:
        """The runtime of a run, loaded once for as long as the server asks for the same."""
        recipe = read_recipe(text)
        check_run(self._policy, recipe)
        digest = recipe.digest()
        if self._loaded[0] != digest:
            own = self.settings.model_dump()
            folder = Path(own["state"]).absolute() / "runs" / digest[:16]
            for name in ("noise", "secure"):  # its secret, and what it has helped to open, are the same in all runs
                shared, place = Path(own["state"]).absolute() / name, folder / "private" / name
                shared.mkdir(parents=True, exist_ok=True)
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    place.symlink_to(shared, target_is_directory=True)
            config = config_on_node(recipe, {**own, "output_dir": str(folder)})
            self._loaded = ("", None)  # type: ignore[assignment] # the old base is freed before the new one is loaded
            self._loaded = digest, self._open(config, config.threads or 0)
        return self._loaded[1]


class PatchStore:
    """Patches of the base on the node's disk, under the hash of their content: a node that was away asks for less."""

    def __init__(self, folder: Path):
        self._folder = folder

    def take(self, ledger: Any, came: Mapping[str, bytes]) -> tuple[tuple[Patch, ...], list[str]]:
        """Every patch of a ledger, in order.

        Args:
            ledger: (id, hash) of each.
            came: payloads by hash, which are kept.

        Returns:
            The patches, and the hashes of those that are neither here nor among what came.

        Raises:
            WireError: if the ledger is not a list of such pairs.
        """
        pairs: list[Any] = ledger if isinstance(ledger, list) else [None]
        if any(not (isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and is_sha256(p[1])) for p in pairs):
            raise WireError("the ledger is not a list of ids and hashes")
        wanted = dict.fromkeys(key for _, key in pairs)
        found = {key: came[key] if key in came else self._read(key) for key in wanted}
        if lacks := [key for key, payload in found.items() if payload is None]:
            return (), lacks
        for key in wanted:
            if key in came:
                self._write(key, came[key])
        for path in self._folder.glob("*") if wanted else ():
            if path.name not in wanted:
                path.unlink()  # compacted since, or of another run, which asks for it again
        return tuple(Patch(identity, found[key] or b"") for identity, key in pairs), []

    def _read(self, key: str) -> bytes | None:
        path = self._folder / key
        payload = path.read_bytes() if path.is_file() else None
        return payload if payload is not None and sha256(payload) == key else None

    def _write(self, key: str, payload: bytes) -> None:
        path = self._folder / key
        self._folder.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{key}")
        scratch.write_bytes(payload)
        scratch.replace(path)  # a torn file has another hash and is asked for again


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
