"""What crosses between the control plane, the clients and the algorithms."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

PARTS = frozenset({"A", "B", "dense"})  # what trains and travels by default; "C" is the core of Fed-SB


@dataclass(frozen=True)
class ClientInfo:
    """A registered client: what the server may know about it.

    Attributes:
        id: unique name.
        rank: LoRA rank it trains at.
        num_examples: rows it trains on; also the most it may claim as a weight.
        num_heldout: rows it keeps for evaluation.
        label_counts: rows per label for the partition summary; empty where clients keep it private.
        stages: (num_examples, num_heldout) of every task of a stream; empty without one.
    """

    id: str
    rank: int
    num_examples: int
    num_heldout: int = 0
    label_counts: Mapping[str, int] = field(default_factory=dict)
    stages: tuple[tuple[int, int], ...] = ()

    def at(self, stage: int | None) -> ClientInfo:
        """The client as one task of the stream finds it; as it is for None."""
        if stage is None:
            return self
        return replace(self, num_examples=self.stages[stage][0], num_heldout=self.stages[stage][1])


@dataclass(frozen=True, eq=False)
class BaseInfo:
    """The frozen base model as the server needs to know it.

    Attributes:
        task: ``sequence-classification`` or ``causal-lm``.
        labels: the label set of a classifier in index order.
        fingerprint: hash of architecture, precision and weights.
        sites: (out, in) of every adapted module by path.
        dense: initial values of the tensors trained in full.
        num_parameters: of the base alone.
        merges: whether patches go into the weights; otherwise they stay beside them.
        cohort: clients that may train in one pass.
        alone: why no two can; empty where they can.
    """

    task: str
    labels: tuple[str, ...]
    fingerprint: str
    sites: Mapping[str, tuple[int, int]]
    dense: Mapping[str, Tensor]
    num_parameters: int
    merges: bool = True
    cohort: int = 1
    alone: str = ""


@dataclass(frozen=True)
class Method:
    """A local training method by name with its numbers, such as ``Method.of("fedprox", mu=0.01)``."""

    name: str
    options: tuple[tuple[str, float], ...] = ()

    @staticmethod
    def of(name: str, **options: float) -> Method:
        """Options in a fixed order, so that equal plans compare equal."""
        return Method(name, tuple(sorted(options.items())))


@dataclass(frozen=True)
class TrainPlan:
    """What a strategy asks of one client in one round.

    Attributes:
        rank: rank of the adapter it receives.
        train: parts that get gradients, of ``{"A", "B", "C", "dense"}``.
        send: parts whose delta travels back.
        keep: personal parts: the client goes on from its own, and they never leave it. Disjoint from ``send``.
        methods: local methods, see ``training.methods``.
    """

    rank: int
    train: frozenset[str] = PARTS
    send: frozenset[str] = PARTS
    keep: frozenset[str] = frozenset()
    methods: tuple[Method, ...] = ()

    def adding(self, name: str, **options: float) -> TrainPlan:
        """The plan with one more local method, after those it has."""
        return replace(self, methods=(*self.methods, Method.of(name, **options)))


@dataclass(frozen=True)
class Patch:
    """An entry of the base ledger, as it travels.

    Attributes:
        id: hash over the entry, its content and all entries before it.
        payload: wire bytes of an adapter whose modules are added to the base.
    """

    id: str
    payload: bytes


@dataclass(frozen=True)
class TrainTask:
    """One piece of work, complete: any runtime can execute it and any log can replay it.

    Attributes:
        round: 1-based number of the round.
        client: who trains.
        plan: what is trained and sent.
        adapter: wire bytes of the adapter as this client receives it, with extra tensors of the strategy.
        received: SHA-256 of ``adapter``; the answer quotes it.
        seed: of batch order and dropout.
        ledger: every patch of the base, in order; a worker applies those it lacks.
        accepted: round of the client's last update that counted, 0 before the first; what it keeps to itself goes on
            from there.
        stage: the task of the stream whose rows it trains on; None for all its rows.
        ended: the rounds with which tasks of the stream have ended so far, where a rule may end them early.
        seen: SHA-256 of the rows of a live stream up to this round; empty without one.
        forget: the entry of the configuration's ``forgetting`` that is carried out in place of training; None for none.
        mask: JSON that a client needs to hide its answer in a secure sum; empty where it travels as it is.
    """

    round: int
    client: str
    plan: TrainPlan
    adapter: bytes
    received: str
    seed: int
    ledger: tuple[Patch, ...] = ()
    accepted: int = 0
    stage: int | None = None
    ended: tuple[int, ...] = ()
    seen: str = ""
    forget: int | None = None
    mask: str = ""


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """A client's answer.

    Attributes:
        client, round, received: quoted from the task.
        delta: trained minus received, by tensor name (see ``AdapterState.tensors``); only the parts
            that travel are present.
        extras: the client's answer to the strategy's extra tensors, with the same names and shapes.
        num_examples: rows of the client that can be learned from, the aggregation weight.
        metrics: finite numbers, such as ``loss``, ``steps``, ``tokens``.
        wire_bytes: size of the message as it travelled.
        norm: Frobenius norm of all its tensors together, summed in float32: infinite from about 1e19 on.
    """

    client: str
    round: int
    received: str
    delta: Mapping[str, Tensor]
    num_examples: int
    metrics: Mapping[str, float]
    wire_bytes: int
    norm: float
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a pool yields for one task: a message, or why there is none.

    Attributes:
        payload: wire bytes of a ``ClientUpdate``, unchecked; a pool may give a view of memory it shares.
        error: one sentence when the client failed; ``traceback`` for the journal.
        alone: why a client that belongs to a cohort was trained alone; its bytes are not those of the cohort.
        sent_bytes: what travelled where the payload was made on the way; 0 where the payload did.
    """

    client: str
    payload: bytes | memoryview | None = None
    error: str | None = None
    traceback: str | None = None
    seconds: float = 0.0
    alone: str = ""
    sent_bytes: int = 0


@dataclass(frozen=True)
class EvalTask:
    """Score an adapter on held-out rows.

    Attributes:
        subject: a client id for its own held-out rows, or ``""`` for the server's test set.
        adapter: wire bytes.
        shard, num_shards: every ``num_shards``-th row from ``shard``.
        ledger: every patch of the base, in order.
        keep: parts for which a client uses its own, as they were after ``accepted``.
        accepted: round of the client's last update that counted.
        stage: the task of the stream whose rows are scored; None for all.
        met: tasks that have been met so far; their labels compete where the stream is class-incremental.
        prototypes, route: only rows whose features are nearest to the prototype at this place; all without prototypes.
        features: asks for the sum of the features of the client's training rows in the place of a score.
        probe: asks for the score on the rows of general ability.
    """

    subject: str
    adapter: bytes
    shard: int = 0
    num_shards: int = 1
    ledger: tuple[Patch, ...] = ()
    keep: frozenset[str] = frozenset()
    accepted: int = 0
    stage: int | None = None
    met: frozenset[int] = frozenset()
    prototypes: tuple[tuple[float, ...], ...] = ()
    route: int = 0
    features: bool = False
    probe: bool = False


@dataclass(frozen=True)
class EvalResult:
    """Sums, so that shards add up.

    Attributes:
        loss_sum: summed over ``num_targets``.
        num_targets: labels scored: rows for a classifier, answer tokens for a language model.
        num_correct: rows right: the label, or every answer token under greedy decoding.
        num_examples: rows.
        features: summed over rows, where they were asked for; not part of what adds up.
    """

    subject: str
    loss_sum: float
    num_targets: int
    num_correct: int
    num_examples: int
    error: str | None = None
    features: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Mean loss per target in nats."""
        return self.loss_sum / max(self.num_targets, 1)

    @property
    def accuracy(self) -> float:
        """Share of rows right: accuracy of a classifier, exact match of a language model."""
        return self.num_correct / max(self.num_examples, 1)

    def __add__(self, other: EvalResult) -> EvalResult:
        return EvalResult(
            self.subject,
            self.loss_sum + other.loss_sum,
            self.num_targets + other.num_targets,
            self.num_correct + other.num_correct,
            self.num_examples + other.num_examples,
            self.error or other.error,
        )


@dataclass(frozen=True)
class WorkerStats:
    """One worker process: for the journal and the summary.

    Attributes:
        seconds: spent so far by kind of work: load, tokenise, train, evaluate, and adapters, which are brought into
            the model and out of it, decoded and encoded.
    """

    pid: int
    base_loads: int
    threads: int
    peak_rss_mb: float
    seconds: Mapping[str, float] = field(default_factory=dict)


class ClientPool(Protocol):
    """Where clients run: this process, Ray, or elsewhere. All implementations pass one suite."""

    @property
    def workers(self) -> int:
        """How many tasks are executed at the same time."""
        ...

    def members(self) -> Sequence[ClientInfo]:
        """Every registered client, in a fixed order."""
        ...

    def base(self) -> BaseInfo:
        """The base model that all members share."""
        ...

    def train(self, tasks: Sequence[TrainTask], timeout_s: float | None = None) -> Iterator[Reply]:
        """Give out tasks; yields one reply per task, in order of arrival.

        Replies to tasks of earlier calls that are still out are among them. Ends when nothing is out any more, or
        after ``timeout_s`` seconds; whoever stops reading before that leaves the rest out as well. A client has one
        task at a time.
        """
        ...

    def exchange(self, messages: Mapping[str, bytes], timeout_s: float | None = None) -> Mapping[str, Reply]:
        """Carry one small message to each client, on whatever worker, and bring its answer or error back.

        Whoever has not answered after ``timeout_s`` seconds is missing. A client that fails costs nobody else.
        """
        ...

    def abandon(self, clients: Collection[str]) -> None:
        """Give up what these clients still have out: no reply to it will come, and its worker is free again."""
        ...

    def evaluate(self, tasks: Sequence[EvalTask]) -> list[EvalResult]:
        """Score adapters; one result per task, in the order of the tasks."""
        ...

    def stats(self) -> Sequence[WorkerStats]:
        """What the workers report of themselves."""
        ...

    def close(self) -> None:
        """Release every process and model. Safe to call twice."""
        ...
