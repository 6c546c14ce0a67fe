"""The control plane: rounds, pools, what a run leaves behind, and the command line."""

from collections.abc import Callable
from typing import Any

from fedlora.registry import Registry


def _flower_rule(name: str) -> Callable[..., Any]:
    from orchestrator.flower.rules import flower_rule

    return flower_rule(name)


Registry.families["strategy", "flwr."] = _flower_rule  # Flower is imported where one of its strategies is asked for
