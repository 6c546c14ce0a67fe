"""A strategy of Flower as the rule: ``strategy: flwr.FedYogi``, with its options as Flower names them.

Flower's strategies are objects that remember; ours are pure functions over a state. Every round makes the object anew,
gives it what the last round left in it, shows it the clients' whole adapters as replies, and keeps what it remembers
then. Which clients are asked, and when, stays with the run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora.adapter.state import AdapterState
from fedlora.aggregation.averaging import require_equal_ranks
from fedlora.aggregation.base import Aggregate, Contribution, RoundContext, State, Strategy, Traits
from fedlora.errors import ConfigError, QuorumError, nearest

PREFIX = "flwr."
_OURS = {  # what Flower's strategies say and a run says elsewhere
    "fraction_train": "clients.per_round",
    "fraction_evaluate": "evaluation",
    "min_train_nodes": "schedule.quorum",
    "min_evaluate_nodes": "evaluation",
    "min_available_nodes": "schedule.quorum",
}
_MEASURED = ("loss", "steps", "tokens", "rows")  # what every client of ours says; more than that not all would
_INSTEAD = {  # strategies that ask for more than an average of arrays
    "FedProx": "put the wrapper fedprox over a rule",
    "DifferentialPrivacyServerSideFixedClipping": "put the wrapper dp over fedit",
    "DifferentialPrivacyClientSideFixedClipping": "put the wrapper dp over fedit",
    "DifferentialPrivacyServerSideAdaptiveClipping": "put the wrapper dp over fedit",
    "DifferentialPrivacyClientSideAdaptiveClipping": "put the wrapper dp over fedit",
    "FedXgbBagging": "it is for trees",
    "FedXgbCyclic": "it is for trees",
}


class FlowerRule(Strategy):
    """A ``flwr.serverapp.strategy.Strategy`` over adapters of one rank.

    Args:
        make: the class, or whatever makes an object of it.
        options: for ``make``; what sets how many nodes it asks for is left to the run.

    Raises:
        ConfigError: for options that it does not take, or that the run sets elsewhere.
    """

    equation = "as Flower computes it, from every client's whole adapter and its share of the rows"
    source = "Flower (Beutel et al., 2020, arXiv 2007.14390), flwr.serverapp.strategy"
    traits = Traits(fixed_gauge=True, mixed_ranks=False, idempotent=False, weighted=False)

    def __init__(self, make: Any, **options: Any):
        self.name = f"{PREFIX}{getattr(make, '__name__', type(make).__name__)}"
        if taken := next((option for option in options if option in _OURS), None):
            raise ConfigError(f"strategy: {self.name}.{taken} is set by {_OURS[taken]} here; leave it out")
        ours = {"train_loss_key": "loss"} if "train_loss_key" in inspect.signature(make).parameters else {}
        self._make, self._options = make, ours | options
        try:
            self._made()
        except (TypeError, ValueError) as error:
            raise ConfigError(f"strategy: {self.name} does not take these options: {error}") from error

    def aggregate(self, updates: Sequence[Contribution], ctx: RoundContext, state: State) -> Aggregate:
        from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

        require_equal_ranks(self.name, updates, ctx)
        updates = [update for update in updates if update.weight > 0]  # Flower's median would count the others
        with _quiet(), _seeded(ctx.seed), in_a_task():
            rule = self._made()
            untouched = copy.deepcopy(_remembered(rule))
            for name, value in state.items():
                setattr(rule, name, _arrays(value))
            sent = ArrayRecord(dict(ctx.adapter.tensors())), ConfigRecord(), Nodes(len(updates))
            asked = sorted(rule.configure_train(ctx.round, *sent), key=lambda message: message.metadata.dst_node_id)
            if len(asked) != len(updates):
                raise ConfigError(
                    f"strategy: {self.name} asks {len(asked)} of {len(updates)} clients; it has to ask all"
                )
            replies = []
            for message, update in zip(asked, updates, strict=True):
                told = RecordDict()
                told["arrays"] = ArrayRecord(dict(update.trained.tensors()))
                measured = {name: update.metrics[name] for name in _MEASURED if name in update.metrics}
                told["metrics"] = MetricRecord({**measured, "num-examples": update.weight})
                replies.append(Message(content=told, reply_to=message))
            try:
                arrays, metrics = rule.aggregate_train(ctx.round, replies)
            except Exception as error:
                raise QuorumError(f"{self.name} could not use the round: {error}") from error
        if arrays is None:
            raise QuorumError(f"{self.name} gave no arrays for the round")
        found = {name: tensor.float() for name, tensor in arrays.to_torch_state_dict().items()}
        adapter = AdapterState.from_tensors({name: found[name].clone() for name in ctx.adapter.tensors()})
        moved = {name: v for name, v in _remembered(rule).items() if name in state or not _same(v, untouched.get(name))}
        kept = {name: _stored(f"{self.name}.{name}", value) for name, value in moved.items()}
        shown = {name: float(value) for name, value in (metrics or {}).items() if isinstance(value, int | float)}
        return Aggregate(adapter, {**state, **kept}, shown)

    def _made(self) -> Any:
        with _quiet():
            rule = self._make(**self._options)
        for name in ("min_train_nodes", "min_available_nodes"):  # a class of one's own may hide them in its keywords
            if isinstance(getattr(rule, name, None), int):
                setattr(rule, name, 1)
        return rule


def flower_rule(name: str) -> Callable[..., FlowerRule]:
    """Makes the rule that ``flwr.NAME`` means, from options.

    Raises:
        ConfigError: if Flower is not installed, has no strategy of this name, or it cannot be a rule here.
    """
    try:
        strategies = importlib.import_module("flwr.serverapp.strategy")
    except ImportError as error:
        raise ConfigError(f"strategy: {name} needs Flower: pip install 'fedlora[flower]'") from error
    wanted = name.removeprefix(PREFIX)
    known = [one for one in strategies.__all__ if one not in (*_INSTEAD, "Result", "Strategy")]
    if wanted in _INSTEAD:
        raise ConfigError(f"strategy: {name} is not a rule over adapters; {_INSTEAD[wanted]}")
    if wanted not in known:
        raise ConfigError(f"strategy: Flower has no {wanted}{nearest(wanted, known)} (it has: {', '.join(known)})")
    made = functools.partial(FlowerRule, getattr(strategies, wanted))
    made.__doc__ = FlowerRule.__doc__
    return made


class Nodes:
    """What a strategy sees of a Grid when it decides whom to ask: one node for every update, numbered from 1."""

    def __init__(self, count: int):
        self._count = count

    def get_node_ids(self) -> Sequence[int]:
        return range(1, self._count + 1)


def _remembered(rule: Any) -> dict[str, Any]:
    """What an object holds. The arrays that clients were sent are told it every round and need not be kept."""
    return {name: value for name, value in vars(rule).items() if name != "current_arrays"}


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return bool(one is other or one == other)


def _stored(what: str, value: Any) -> Any:
    """A value as a checkpoint can hold it."""
    if isinstance(value, bool | int | float | str | Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, list):
        return {"is": "list"} | {f"{place:06}": _stored(what, one) for place, one in enumerate(value)}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"is": "dict"} | {f" {name}": _stored(what, one) for name, one in value.items()}
    raise ConfigError(f"strategy: {what} is a {type(value).__name__}, which no checkpoint can hold")


def _arrays(value: Any) -> Any:
    """A stored value as the object had it."""
    if isinstance(value, Tensor):
        return value.numpy()
    if not isinstance(value, Mapping):
        return value
    held = {name: _arrays(one) for name, one in value.items() if name != "is"}
    if value["is"] == "list":
        return [held[name] for name in sorted(held)]
    return {name[1:]: one for name, one in held.items()}


@contextlib.contextmanager
def in_a_task() -> Iterator[None]:
    """Flower makes messages only inside a task of its own. Where there is none, these go nowhere: any numbers do."""
    from flwr.supercore.task_identity import TaskIdentity

    fields = ("_task_id", "_run_id", "_node_id")
    missing = [name for name in fields if getattr(TaskIdentity, name) is None]
    for name in missing:
        setattr(TaskIdentity, name, 1)
    try:
        yield
    finally:
        for name in missing:
            setattr(TaskIdentity, name, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Flower's strategies report every round; the run does that itself."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws of a strategy are those of the round, and nobody else's."""
    python, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
