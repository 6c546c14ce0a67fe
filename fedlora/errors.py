"""Errors a user can act on. Each carries the exit code the command line ends with.

Anything that is not a ``FedLoRAError`` is a bug of ours and may show a traceback.
"""

import difflib
from collections.abc import Iterable


class FedLoRAError(Exception):
    """A problem we can name. The message says what was expected, what came, and what to do."""

    exit_code = 1


class ConfigError(FedLoRAError):
    """The configuration cannot be run. ``problems`` lists every one that was found."""

    exit_code = 2

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(problems))


class DataError(FedLoRAError):
    """A dataset is missing, malformed or cannot be divided as asked."""

    exit_code = 3


class ModelError(FedLoRAError):
    """A base model is missing or does not fit the adapter that was asked for."""

    exit_code = 4


class RunFolderError(FedLoRAError):
    """A run folder cannot be written, or holds something else."""

    exit_code = 5


class CheckpointError(RunFolderError):
    """A checkpoint is truncated, altered or from a newer version."""


class RoundError(FedLoRAError):
    """A round ended without a single usable update."""

    exit_code = 6


class QuorumError(RoundError):
    """A rule cannot work with the updates a round delivered. Costs the round, not the run."""


class LeaseHeld(FedLoRAError):
    """Another process plays the run."""

    exit_code = 7


class LeaseLost(FedLoRAError):
    """This process no longer owns the run, and must not write to its folder."""

    exit_code = 7


class UnlearningError(FedLoRAError):
    """A removal that cannot be asked for, carried on or certified like this."""

    exit_code = 8


class RunInterrupted(FedLoRAError):
    """The user stopped the run; it can be resumed."""

    exit_code = 130


class AdapterError(FedLoRAError):
    """Adapter states that do not belong together."""


class RankError(AdapterError):
    """A rank outside what the module or the strategy allows."""


class VerificationError(FedLoRAError):
    """Measurements that cannot tell whether something was forgotten, or do not belong together."""


class WireError(FedLoRAError):
    """Bytes that are not a valid message. Raised for one client, never for the run."""


class SecureSumError(FedLoRAError):
    """A step of a secure sum that a client refuses, or that cannot be done. Costs a client or the round."""


class UpdateRefused(FedLoRAError):
    """An update that failed admission. Raised for one client, never for the run."""


def nearest(name: str, known: Iterable[str], count: int = 1) -> str:
    """Return ``'; did you mean a, b?'`` for the known names closest to ``name``, or ``''``."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
