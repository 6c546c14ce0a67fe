"""Everything a run needs to go on: one frozen value, replaced at every commit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter.ledger import BaseLedger, restored
from fedlora.adapter.state import AdapterState
from fedlora.aggregation.base import State
from fedlora.errors import AdapterError, CheckpointError
from orchestrator.flights import Flight
from orchestrator.progress import Progress
from orchestrator.selection import Record

SCHEMA = 6
_PAYLOAD = "payload/"


@dataclass(frozen=True)
class Totals:
    """Sums over all committed rounds; seconds by phase and of the whole run."""

    bytes_up: int = 0
    bytes_down: int = 0
    train_tokens: int = 0
    wall_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)

    def plus(self, row: Mapping[str, Any]) -> "Totals":
        """The sums after one more round, whose metrics row is given. ``wall_s`` is set at the commit."""
        phases = {name: self.seconds.get(name, 0.0) + value for name, value in row["seconds"].items()}
        return Totals(
            self.bytes_up + row["bytes_up"],
            self.bytes_down + row["bytes_down"],
            self.train_tokens + row["train_tokens"],
            self.wall_s,
            phases,
        )


@dataclass(frozen=True, eq=False)
class RunState:
    """A run after ``round`` committed rounds.

    Attributes:
        round: 0 before the first.
        adapter: the global adapter, in effective units.
        strategy: whatever the strategy keeps.
        config_sha256, base_fingerprint: what this state belongs to.
        totals: sums over rounds.
        initial, last, best: scores of the start, the latest and the best evaluated round.
        row: the metrics row of the latest round, so that a crash after the commit loses no line.
        empty_rounds: committed rounds in a row without a usable update.
        participation: rounds each client's update was used in.
        ledger: patches of the base so far.
        caught_up: the ledger's head each client was last sent.
        accepted: round of each client's last update that was used.
        records: what selection may know of each client that was asked.
        flights: work that is out and will count in a later round, by round and client.
        payloads: what those clients were sent, by SHA-256.
        clock_s: seconds of training so far; virtual ones where a fleet is simulated.
        stream: how far a stream of tasks has come; None without one.
    """

    round: int
    adapter: AdapterState
    strategy: State
    config_sha256: str
    base_fingerprint: str
    totals: Totals = Totals()
    initial: Mapping[str, float] | None = None
    last: Mapping[str, float] | None = None
    best: Mapping[str, float] | None = None
    row: Mapping[str, Any] | None = None
    empty_rounds: int = 0
    participation: Mapping[str, int] = field(default_factory=dict)
    ledger: BaseLedger = field(default_factory=BaseLedger)
    caught_up: Mapping[str, str] = field(default_factory=dict)
    accepted: Mapping[str, int] = field(default_factory=dict)
    records: Mapping[str, Record] = field(default_factory=dict)
    flights: tuple[Flight, ...] = ()
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    clock_s: float = 0.0
    stream: Progress | None = None

    @property
    def freezes(self) -> int:
        """How often the adapter has gone into the base."""
        return len(self.stream.freezes) if self.stream else 0


def pack(state: RunState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Split a state into plain JSON data and named tensors. The ledger's payloads are kept beside, by their hash."""
    tensors = {f"adapter/{name}": tensor for name, tensor in state.adapter.tensors().items()}
    for key, payload in state.payloads.items():
        tensors[_PAYLOAD + key] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    note = {
        "schema": SCHEMA,
        "round": state.round,
        "strategy": pack_tree(state.strategy, tensors),
        "config_sha256": state.config_sha256,
        "base_fingerprint": state.base_fingerprint,
        "totals": asdict(state.totals),
        "initial": state.initial,
        "last": state.last,
        "best": state.best,
        "row": state.row,
        "empty_rounds": state.empty_rounds,
        "participation": dict(state.participation),
        "ledger": [entry.note() for entry in state.ledger.entries],
        "caught_up": dict(state.caught_up),
        "accepted": dict(state.accepted),
        "records": {client: asdict(record) for client, record in state.records.items()},
        "flights": [flight.note() for flight in state.flights],
        "clock_s": state.clock_s,
        "stream": state.stream and state.stream.note(),
    }
    return note, tensors


def unpack(note: Mapping[str, Any], tensors: Mapping[str, Tensor], patches: Mapping[str, bytes]) -> RunState:
    """Inverse of ``pack``.

    Args:
        patches: payload of every ledger entry by its SHA-256.

    Raises:
        CheckpointError: for another schema, or parts that are missing.
    """
    if note.get("schema") != SCHEMA:
        raise CheckpointError(
            f"the checkpoint has schema {note.get('schema')!r}, this version of fedlora reads {SCHEMA};"
            " resume it with the version that wrote it"
        )
    prefix = "adapter/"
    adapter = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    try:
        return RunState(
            round=note["round"],
            adapter=AdapterState.from_tensors(adapter),
            strategy=unpack_tree(note["strategy"], tensors),
            config_sha256=note["config_sha256"],
            base_fingerprint=note["base_fingerprint"],
            totals=Totals(**note["totals"]),
            initial=note["initial"],
            last=note["last"],
            best=note["best"],
            row=note["row"],
            empty_rounds=note["empty_rounds"],
            participation=note["participation"],
            ledger=restored([(entry, patches[entry["payload"]]) for entry in note["ledger"]]),
            caught_up=note["caught_up"],
            accepted=note["accepted"],
            records={client: Record(**record) for client, record in note["records"].items()},
            flights=tuple(Flight.of(flight) for flight in note["flights"]),
            payloads={
                n.removeprefix(_PAYLOAD): t.numpy().tobytes() for n, t in tensors.items() if n.startswith(_PAYLOAD)
            },
            clock_s=note["clock_s"],
            stream=note["stream"] and Progress.of(note["stream"]),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint lacks {error}") from error
    except AdapterError as error:
        raise CheckpointError(str(error)) from error


def pack_tree(tree: State, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A strategy's state as plain JSON data; its tensors are added to ``tensors``, each under a name of its own."""
    packed: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            # numbered, not named after keys that may contain anything; cloned, since a strategy may keep a
            # tensor that is also part of the adapter and safetensors refuses shared memory
            place = f"strategy/{len(tensors)}"
            tensors[place] = value.detach().clone()
            packed[key] = {"$tensor": place}
        elif isinstance(value, Mapping):
            packed[key] = pack_tree(value, tensors)
        else:
            packed[key] = value
    return packed


def unpack_tree(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inverse of ``pack_tree``."""
    tree: dict[str, Any] = {}
    for key, value in packed.items():
        if isinstance(value, Mapping) and set(value) == {"$tensor"}:
            tree[key] = tensors[value["$tensor"]]
        else:
            tree[key] = unpack_tree(value, tensors) if isinstance(value, Mapping) else value
    return tree
