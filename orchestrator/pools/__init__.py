"""Where clients run."""

import os

from fedlora.config import RunConfig
from fedlora.protocol import ClientPool


def open_pool(config: RunConfig) -> ClientPool:
    """The pool a configuration asks for, with its workers ready."""
    if config.pool == "ray":
        from orchestrator.pools.ray import RayPool  # only a run on Ray pays for importing it

        return RayPool(config)
    from orchestrator.pools.local import LocalPool

    return LocalPool(config)


def cores() -> int:
    """Cores this process may use, as the scheduler or container allows."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
