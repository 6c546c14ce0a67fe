"""The control plane: rounds, pools, what a run leaves behind, and the command line."""

import os
from collections.abc import Callable
from typing import Any

from fedlora.registry import Registry

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read when Flower is imported: nothing leaves this machine
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


def _flower_rule(name: str) -> Callable[..., Any]:
    from orchestrator.flower.rules import flower_rule

    return flower_rule(name)


Registry.families["strategy", "flwr."] = _flower_rule  # Flower is imported where one of its strategies is asked for
