"""A Ray worker: the shared runtime behind an actor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray import cloudpickle


@ray.remote
class RayWorker:
    """Loads the base once and executes tasks of any client, several in one call where they are short."""

    def __init__(self, config: dict[str, Any], threads: int, plugins: Any, open_runtime: bytes):
        # plug-ins come as what the driver read; the configuration's paths are the driver's
        self._config, self._threads, self._plugins = {**config, "plugins": []}, threads, plugins
        # pickled: unpickling imports torch, and an actor only counts as placed once it has its arguments
        self._open_runtime, self._opened = open_runtime, None
        self._ledger: dict[str, Any] = {}

    @property
    def _runtime(self) -> Any:
        # opened by the first call, not the constructor: an error of ours then reaches the driver as itself
        if self._opened is None:
            from fedlora.config import parse_config
            from fedlora.plugins import import_plugins

            import_plugins(self._plugins)
            open_runtime = cloudpickle.loads(self._open_runtime)
            self._opened = open_runtime(parse_config(self._config), self._threads)
        return self._opened

    def ready(self) -> tuple[str, Any]:
        """The node this worker is on and its stats, once it has loaded the base."""
        self._runtime.base()
        return ray.get_runtime_context().get_node_id(), self._runtime.stats()

    def members(self) -> list[Any]:
        return self._runtime.members()

    def base(self) -> Any:
        return self._runtime.base()

    def stats(self) -> Any:
        return self._runtime.stats()

    def train(
        self, cohorts: Sequence[int], tasks: Sequence[tuple[Any, int]], patches: Any, *adapters: bytes
    ) -> list[tuple[Any, Any]]:
        """A reply per task, its payload beside it.

        Args:
            cohorts: how many of the tasks, one after another, share each pass.
            tasks: each with the position of its adapter.
            patches: the ledger of all of these tasks: (id, reference).
            adapters: Ray fetches arguments of a call itself, and each distinct one once.

        Returns:
            (reply without payload, payload as uint8 [n] or None): arrays are written to the object store as they are
            and read in place, where bytes inside a list would be copied through the pickler.
        """
        from dataclasses import replace

        import numpy as np

        from clients.attempt import attempt_together

        done = []
        ledger = self._patches(patches)
        whole = iter([replace(task, adapter=adapters[index], ledger=ledger) for task, index in tasks])
        for size in cohorts:
            for reply in attempt_together(self._runtime, [next(whole) for _ in range(size)]):
                payload = None if reply.payload is None else np.frombuffer(reply.payload, np.uint8)
                done.append((replace(reply, payload=None), payload))
        return done

    def exchange(self, messages: dict[str, bytes]) -> dict[str, Any]:
        """A reply per client."""
        from clients.attempt import answer

        return {client: answer(self._runtime, client, message) for client, message in messages.items()}

    def evaluate(self, tasks: Sequence[tuple[Any, int]], patches: Any, *adapters: bytes) -> list[tuple[Any, float]]:
        """A result per task and the seconds it took; arguments as for ``train``."""
        import time
        from dataclasses import replace

        from fedlora.protocol import EvalResult

        done = []
        ledger = self._patches(patches)
        for task, index in tasks:
            start = time.perf_counter()
            try:
                result = self._runtime.evaluate(replace(task, adapter=adapters[index], ledger=ledger))
            except Exception as error:  # noqa: BLE001 - one score that cannot be had costs that score
                result = EvalResult(task.subject, 0.0, 0, 0, 0, error=f"{type(error).__name__}: {error}")
            done.append((result, time.perf_counter() - start))
        return done

    def _patches(self, patches: Any) -> Any:
        """The ledger as the driver has it. Patches are fetched once per worker and kept."""
        from fedlora.protocol import Patch

        wanted = {identity for identity, _ in patches}
        self._ledger = {identity: patch for identity, patch in self._ledger.items() if identity in wanted}
        for identity, reference in patches:
            if identity not in self._ledger:
                self._ledger[identity] = Patch(identity, ray.get(reference))
        return tuple(self._ledger[identity] for identity, _ in patches)
