"""Which clients a round asks."""

from orchestrator.selection.base import SELECTORS, Draw, Record, Selector, build_selector, how_many
from orchestrator.selection.oort import Oort
from orchestrator.selection.rules import Poisson, PowerOfChoice, RoundRobin, Uniform, Weighted

__all__ = [
    "SELECTORS",
    "Draw",
    "Oort",
    "Poisson",
    "PowerOfChoice",
    "Record",
    "RoundRobin",
    "Selector",
    "Uniform",
    "Weighted",
    "build_selector",
    "how_many",
]
