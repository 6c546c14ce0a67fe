"""How far each request has come: a fold over the records of the log, and nothing else.

Whoever was killed in the middle of a phase finds the request in the phase before, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.errors import UnlearningError
from fedlora.unlearning.levels import ERASES, LEVELS
from fedlora.unlearning.request import Request, SignedRequest

PHASES = ("received", "planned", "contained", "executed", "verified", "purged", "certified")
REFUSED = "refused"
_OPTIONAL = "contained"


@dataclass(frozen=True)
class Standing:
    """One request.

    Attributes:
        id: R1, R2, ...
        signed: as it came.
        phase: the last one reached.
        times: UTC time of every phase reached, in ISO format.
        facts: what was noted of every phase.
    """

    id: str
    signed: SignedRequest
    phase: str
    times: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def request(self) -> Request:
        """What is asked."""
        return self.signed.request

    @property
    def number(self) -> int:
        """Of the request, from 1."""
        return int(self.id[1:])

    @property
    def is_open(self) -> bool:
        """Whether there is something left to do."""
        return self.phase not in (PHASES[-1], REFUSED)

    @property
    def level(self) -> str | None:
        """What was reached; None before the request was executed, and where it was refused."""
        return None if self.phase == REFUSED else self.facts.get("executed", {}).get("level")

    @property
    def reason(self) -> str | None:
        """Why it was refused; None if it was not."""
        return self.facts.get(REFUSED, {}).get("reason")

    @property
    def erased(self) -> bool:
        """Whether its target is gone, at a level that may be called erasure."""
        return self.level in ERASES


def fold(records: Iterable[Mapping[str, Any]]) -> dict[str, Standing]:
    """Every request by its id, in the order in which they came.

    Raises:
        UnlearningError: for records that no log of ours holds.
    """
    known: dict[str, Standing] = {}
    for number, record in enumerate(records, 1):
        try:
            name, phase, facts = record["request"], record["phase"], record["facts"]
            if name not in known:
                known[name] = Standing(name, SignedRequest.of(facts), phase)
            before = known[name]
            times, noted = {**before.times, phase: record["time"]}, {**before.facts, phase: facts}
        except (KeyError, TypeError) as error:
            raise UnlearningError(
                f"record {number} of the request log is of another version (it lacks {error})"
            ) from error
        known[name] = replace(before, phase=phase, times=times, facts=noted)
    return known


def check_step(standing: Standing, phase: str, facts: Mapping[str, Any]) -> bool:
    """Whether a phase is news; False where this very step was noted before.

    Raises:
        UnlearningError: if the phase is not the next one of this request, or its facts do not say what they must.
    """
    if phase in standing.facts and dict(standing.facts[phase]) == dict(facts):
        return False
    if not standing.is_open:
        raise UnlearningError(f"{standing.id} is {standing.phase}; nothing can follow, ask again")
    if phase == "executed" and facts.get("level") not in LEVELS:
        levels = ", ".join(LEVELS)
        raise UnlearningError(
            f"{standing.id}: the phase executed notes its level, one of {levels}; {dict(facts)} has none"
        )
    if phase == REFUSED:
        return True
    place = PHASES.index(standing.phase)
    following = list(PHASES[place + 1 : place + 3])
    allowed = following if following[0] == _OPTIONAL else following[:1]
    if phase not in allowed:
        raise UnlearningError(f"{standing.id} is {standing.phase}; next is {' or '.join(allowed)}, not {phase}")
    return True
