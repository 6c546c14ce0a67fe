"""Where clients run."""

import os
from collections.abc import Collection, Sequence

from fedlora.config import RunConfig
from fedlora.protocol import ClientPool, TrainTask


def open_pool(config: RunConfig) -> ClientPool:
    """The pool a configuration asks for, with its workers ready."""
    if config.privacy.secure_sum:
        from orchestrator.pools.secure import SecurePool

        inner = _open(config)
        try:
            return SecurePool(inner, config)
        except BaseException:
            inner.close()
            raise
    return _open(config)


def _open(config: RunConfig) -> ClientPool:
    if config.pool == "ray":
        from orchestrator.pools.ray import RayPool  # only a run on Ray pays for importing it

        return RayPool(config)
    if config.pool == "flower":
        from orchestrator.flower.app import check_installed

        check_installed()
        from orchestrator.pools.flower import GRID, FlowerPool

        return FlowerPool(config, GRID.get())
    from orchestrator.pools.local import LocalPool

    return LocalPool(config)


def cores() -> int:
    """Cores this process may use, as the scheduler or container allows."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_one_each(tasks: Sequence[TrainTask], out: Collection[str]) -> None:
    """Raise ``ValueError`` if a client would have two tasks at a time; its answers could not be told apart.

    Args:
        out: clients whose tasks have not been answered.
    """
    seen = set(out)
    for task in tasks:
        if task.client in seen:
            raise ValueError(f"{task.client} already has a task out; abandon it before giving it another")
        seen.add(task.client)
