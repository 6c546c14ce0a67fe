"""Everything that can die, killed on purpose: the table of docs/reliability.md.

    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/reliability.py            to standard output
    HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/reliability.py --write    and into docs/reliability.md

Every fault is drawn from a seed. A run counts as identical when the SHA-256 of its adapter is that of the run nobody
disturbed. The tests repeat a sample of this; see ``tests/orchestrator/test_resume.py`` and those beside it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import typer
from sections import fill

from fedlora.errors import FedLoRAError
from orchestrator import launch
from orchestrator.checkpoint import load_latest
from orchestrator.failpoints import FAILPOINTS
from orchestrator.stores.files import read_json, read_lines
from tests.conftest import quiet, toy_config

DOC = Path(__file__).parent.parent / "docs" / "reliability.md"
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["orchestrator.launch", "clients.runtime", "tests.conftest"])
SETTINGS: dict[str, Any] = {"clients__per_round": 4, "rounds": 3}


def play(folder: str, failpoint: str = "", **changes: Any) -> None:
    """A run, in a process of its own."""
    os.environ["FEDLORA_FAILPOINT"] = failpoint
    launch.run(toy_config(folder, **{**SETTINGS, **changes}), quiet)


def enter(folder: str, results: Any) -> None:
    """A run that says how it went: its exit code and message."""
    try:
        play(folder)
        results.put((0, ""))
    except FedLoRAError as error:
        results.put((error.exit_code, str(error)))


def ended(function: Callable[..., None], *arguments: Any, **options: Any) -> int | None:
    """The exit code of a function in a process of its own."""
    process = SPAWN.Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join(300)
    return process.exitcode


def adapter(folder: Path) -> str:
    return str(read_json(folder / "summary.json")["adapter_sha256"])


class Suite:
    """Faults on toy runs; every method returns a row of the table: what, times, outcome."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._random = folder, random.Random(seed)
        self._count = 0
        assert ended(play, str(self.fresh())) == 0
        self.expected = adapter(self._last)

    def fresh(self) -> Path:
        self._count += 1
        self._last = self._folder / f"run-{self._count}"
        return self._last

    def driver_killed(self) -> tuple[str, int, str]:
        points = [f"{name}:{number}" for number in (1, 2, 3) for name in FAILPOINTS]
        same = 0
        for point in points:
            folder = self.fresh()
            killed = ended(play, str(folder), point) == -signal.SIGKILL
            same += killed and ended(play, str(folder)) == 0 and adapter(folder) == self.expected
        what = f"orchestrator killed with SIGKILL at {len(FAILPOINTS)} places x 3 rounds, started again"
        return what, len(points), f"{same} identical"

    def checkpoint_damaged(self, times: int = 50) -> tuple[str, int, str]:
        right = 0
        for turn in range(times):
            folder = self.fresh()
            ended(play, str(folder), "round.started:3")  # two checkpoints are there, of rounds 1 and 2
            kind = ("truncated", "bit-flipped", "swapped")[turn % 3]
            self._damage(folder / "checkpoints", kind)
            heard: list[str] = []
            launch.run(
                toy_config(str(folder), **SETTINGS),
                lambda event, fields, heard=heard: heard.append(event),  # type: ignore[misc]
            )
            right += "checkpoint_damaged" in heard and adapter(folder) == self.expected
        what = "newest checkpoint truncated, one bit flipped, or swapped with the one before"
        return what, times, f"{right} detected, said so, went on from the one before, identical"

    def _damage(self, checkpoints: Path, kind: str) -> None:
        newest, before = checkpoints / "round-0002", checkpoints / "round-0001"
        if kind == "swapped":
            shutil.rmtree(newest)
            shutil.copytree(before, newest)
            return
        path = self._random.choice(sorted(newest.iterdir()))
        content = bytearray(path.read_bytes())
        if kind == "truncated":
            path.write_bytes(content[: self._random.randrange(len(content))])
            return
        place = self._random.randrange(len(content))
        content[place] ^= 1 << self._random.randrange(8)
        path.write_bytes(content)

    def two_orchestrators(self, times: int = 20) -> tuple[str, int, str]:
        right = 0
        for _ in range(times):
            folder, results = self.fresh(), SPAWN.Queue()
            both = [SPAWN.Process(target=enter, args=(str(folder), results)) for _ in range(2)]
            for process in both:
                process.start()
                time.sleep(self._random.random() * 0.2)
            came = sorted(results.get(timeout=300) for _ in both)
            for process in both:
                process.join(60)
            codes = [code for code, _ in came]
            # whoever comes after the end finds a finished run, which is no conflict
            right += adapter(folder) == self.expected and codes in ([0, 7], [0, 0])
            right -= codes == [0, 0] and _sessions(folder) != 1
        return "two orchestrators started on one run", times, f"{right} with one winner, identical"

    def stopped(self, times: int = 5) -> tuple[str, int, str]:
        right, slowest = 0, 0.0
        for _ in range(times):
            folder = self.fresh()
            config = folder.parent / f"{folder.name}.yaml"
            config.write_text(toy_config(str(folder), **{**SETTINGS, "rounds": 500}).to_yaml())
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "run", str(config)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            while not read_lines(folder / "metrics.jsonl"):
                time.sleep(0.05)
            time.sleep(self._random.random())
            begun = time.monotonic()
            process.terminate()
            _, errors = process.communicate(timeout=120)
            slowest = max(slowest, time.monotonic() - begun)
            right += process.returncode == 130 and "Go on with: fedlora resume" in errors
            right -= load_latest(folder)[0] is None
        return "SIGTERM", times, f"{right} with exit code 130, resumable, slowest {slowest:.1f} s"

    def worker_killed(self, times: int = 20) -> tuple[str, int, str]:
        """On Ray, whose workers are processes; the run to compare with is one on Ray too."""
        import ray

        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        settings = {**SETTINGS, "pool": "ray", "ray__workers": 2, "training__max_steps": 20}
        updates = SETTINGS["clients__per_round"] * SETTINGS["rounds"]
        try:
            folder = self.fresh()
            launch.run(toy_config(str(folder), **settings), quiet)
            expected, same = adapter(folder), 0
            for turn in range(times):
                share = (0.1, 0.5, 0.9)[turn % 3]
                folder, workers, came = self.fresh(), [], []

                def listen(
                    event: str, fields: Any, workers: Any = workers, came: Any = came, share: float = share
                ) -> None:
                    if event == "worker_ready":
                        workers.append(fields["pid"])
                    if event == "update_admitted":
                        came.append(fields["client"])
                        if len(came) == max(1, round(share * updates)):
                            os.kill(self._random.choice(workers), signal.SIGKILL)

                launch.run(toy_config(str(folder), **settings), listen)
                rows = read_lines(folder / "metrics.jsonl")
                whole = all(len(row["admitted"]) == SETTINGS["clients__per_round"] for row in rows)
                same += whole and adapter(folder) == expected
        finally:
            ray.shutdown()
        what = "a Ray worker killed with SIGKILL at 10, 50 or 90 % of the work"
        return what, times, f"{same} without the loss of an update, identical"

    def disk_full(self) -> tuple[str, int, str]:
        folder = self._folder / "small-disk"
        folder.mkdir()
        right, said = 0, ""
        with _mounted(folder, "size=200k") as mounted:
            if mounted:
                try:
                    launch.run(toy_config(str(folder / "run"), **{**SETTINGS, "rounds": 500}), quiet)
                except FedLoRAError as error:
                    said = str(error)
                state, _ = load_latest(folder / "run")
                right = int(state is not None and "No space left" in said and "Committed rounds are safe" in said)
        return "disk full", 1, f"{right} with a clear message and a checkpoint that loads" if mounted else "not run"

    def disk_read_only(self) -> tuple[str, int, str]:
        folder = self._folder / "read-only"
        folder.mkdir()
        right = 0
        with _mounted(folder, "size=64m") as mounted:
            if mounted:
                run = folder / "run"
                ended(play, str(run), "round.started:3")
                subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
                try:
                    launch.resume(run, quiet)
                except FedLoRAError as error:
                    right = int("Read-only file system" in str(error) and load_latest(run)[0] is not None)
        return (
            "disk read-only",
            1,
            f"{right} with a clear message and a checkpoint that loads" if mounted else "not run",
        )


def _sessions(folder: Path) -> int:
    return sum(line["event"] == "run_started" for line in read_lines(folder / "journal.jsonl"))


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[bool]:
    """A small file system in memory, where this user may mount one."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def main(
    write: Annotated[bool, typer.Option("--write", help="put the table into docs/reliability.md")] = False,
    seed: int = 0,
    only: Annotated[str, typer.Option(help="one fault, such as disk_full")] = "",
) -> None:
    """Play every fault and print the table."""
    names = (
        "driver_killed",
        "worker_killed",
        "checkpoint_damaged",
        "two_orchestrators",
        "stopped",
        "disk_full",
        "disk_read_only",
    )
    lines = ["| what happens | times | outcome |", "|---|---:|---|"]
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), seed)
        for name in names:
            if only in name:
                what, times, outcome = getattr(suite, name)()
                lines.append(f"| {what} | {times} | {outcome} |")
                typer.echo(lines[-1])
    if write and not only:
        fill(DOC, "faults", "\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
