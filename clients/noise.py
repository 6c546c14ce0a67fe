"""A client's own noise: put on its change before it is sent. Nothing else that its rows decide goes with it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from clients.lesson import Learned
from clients.private_state import folder_of, write_private
from fedlora.config import LocalPrivacyConfig, RunConfig
from fedlora.errors import FedLoRAError
from fedlora.privacy.local import protected
from fedlora.protocol import TrainTask

_BYTES = 32


class LocalNoise:
    """The clients of one runtime, each with a secret of its own.

    Args:
        root: where the folders go that secrets lie in.
        seed: of the run, which noise follows from where ``settings.noise`` is seeded.
    """

    def __init__(self, root: Path, settings: LocalPrivacyConfig, seed: int):
        self._root, self._settings, self._seed = root, settings, seed

    @staticmethod
    def of(config: RunConfig, private: Path) -> LocalNoise | None:
        """The clients of a configuration; None where changes go without noise of theirs.

        Args:
            private: folder of what clients keep to themselves.
        """
        settings = config.privacy.local
        return LocalNoise(private / "noise", settings, config.seed) if settings else None

    def protect(self, task: TrainTask, learned: Learned) -> Learned:
        """What may leave a client: its change under noise, and neither how many rows it has nor what it measured."""
        if learned.extras:
            raise FedLoRAError("noise of its own covers a client's change only, and it is asked for more than that")
        settings = self._settings
        how = settings.clip, settings.noise_multiplier
        if settings.noise == "seeded":
            # by task, not by change: what differs by rounding, on another pool, has the same noise
            about = f"{self._seed}\x1f{task.round}\x1f{task.client}".encode()
            delta = protected(learned.delta, *how, bytes(_BYTES), about)
        else:
            delta = protected(learned.delta, *how, self._secret(task.client))
        return replace(learned, delta=delta, rows=1, metrics={})

    def _secret(self, client: str) -> bytes:
        path = folder_of(self._root, client) / "secret"
        if not path.exists():
            write_private(path, os.urandom(_BYTES))
        return path.read_bytes()
