"""Clients that hang, fail or kill their worker, by name; imported by the workers, so it imports little."""

import os
import signal
import threading
from pathlib import Path

from clients.noop import NoopRuntime
from fedlora.config import RunConfig
from fedlora.protocol import TrainTask


class Unruly(NoopRuntime):
    """In round 1, ``hangs`` never answers, ``waits`` answers once the gate is a file, ``kills`` takes its worker down.

    ``fails`` raises in every round; those called ``client`` and something have WORK_S of work.
    """

    WORK_S = 0.02

    def __init__(self, config: RunConfig, threads: int):
        super().__init__(config, threads)
        self._gate = Path(config.output_dir) / "gate"

    def train(self, task: TrainTask) -> bytes:
        if task.client == "fails":
            raise RuntimeError("out of luck")
        if task.round == 1:
            while task.client == "hangs" or (task.client == "waits" and not self._gate.exists()):
                threading.Event().wait(0.01)
            if task.client == "kills":
                os.kill(os.getpid(), signal.SIGKILL)
        if task.client.startswith("client"):
            threading.Event().wait(self.WORK_S)
        return super().train(task)


class Seated:
    """An actor of somebody else."""

    def here(self) -> None:
        """Answers once it has its place."""
