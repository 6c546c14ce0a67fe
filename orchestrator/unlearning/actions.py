"""What can be done about a request. An action makes, beside the run, the run folder that takes its place.

@ACTIONS.register("mine")
class Mine(UnlearningAction):
    kinds = frozenset({"client"})
    ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedlora.errors import UnlearningError
from fedlora.registry import Registry
from fedlora.unlearning.request import Request
from orchestrator.stores.files import read_config
from orchestrator.unlearning.job import Job
from orchestrator.unlearning.rollback import Rollback

Facts = Mapping[str, Any]


class UnlearningAction(ABC):
    """One way to take a target out. Options of a request are arguments of its constructor.

    Each method may be called again after a crash in its middle, and then ends the same. Nothing outside ``job.space``
    is changed: what was made is published once it is verified.
    """

    name: str
    kinds: ClassVar[frozenset[str]]  # of targets, see ``request.KINDS``
    planned_level = "A"  # at most; what was reached is said by ``make``
    of_shards = False  # whether it is for runs of shards, and for no others

    def check(self, folder: Path, plan: Rollback) -> None:  # noqa: B027 - most have nothing to look at
        """Look whether it can be done to this run.

        Raises:
            UnlearningError: why it cannot; the request is refused with these words.
        """

    @abstractmethod
    def cost(self, folder: Path, plan: Rollback) -> float:
        """Rounds it plays, as a share of those that a run without the target plays."""

    @abstractmethod
    def make(self, job: Job, plan: Rollback) -> Facts:
        """Make ``job.work``: a run folder without the target, whole.

        Returns:
            Plain JSON data for the request log: ``level`` that was reached, ``adapter_sha256``, ``rounds_played`` and
            whatever ``verify`` needs.

        Raises:
            ConfigError, RoundError: a run without the target cannot be played; the request is refused.
            FedLoRAError: otherwise; the request stays where it is, and the same command goes on.
        """

    @abstractmethod
    def verify(self, job: Job, plan: Rollback) -> Facts:
        """Look at what was made before it is published.

        Returns:
            The verdict as it goes into the certificate, plain JSON data.

        Raises:
            VerificationError: it shows the target, or nothing can be told; the request is refused with these words.
            UnlearningError: it is not what was noted.
        """


ACTIONS: Registry[UnlearningAction] = Registry("unlearning action")


def check_action(action: UnlearningAction, folder: Path, plan: Rollback) -> None:
    """Look whether an action can be done to a run.

    Raises:
        UnlearningError: why it cannot.
    """
    sharded = read_config(folder).federation.shards > 1
    if sharded and not action.of_shards:
        raise UnlearningError(f"{folder} is a run of shards, which {action.name} does not know; use shard_retrain")
    if action.of_shards and not sharded:
        raise UnlearningError(f"{folder} has no shards (federation.shards), which {action.name} is for; use rollback")
    action.check(folder, plan)


def action_of(request: Request) -> UnlearningAction:
    """The action a request asks for.

    Raises:
        ConfigError: for an unknown action, or options it does not take.
        UnlearningError: if it is none for such a target.
    """
    action = ACTIONS.create(request.action or "rollback", **request.options)
    if request.kind not in action.kinds:
        fitting = [name for name in ACTIONS if request.kind in getattr(ACTIONS[name], "kinds", ())]
        instead = f"; these do: {', '.join(fitting)}" if fitting else ""
        raise UnlearningError(f"{action.name} cannot take out a target of kind {request.kind}{instead}")
    return action
