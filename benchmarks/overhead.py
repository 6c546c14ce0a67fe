"""What a round costs when clients train nothing: beside Flower's simulation, in memory, and per registered client.

    .venv/bin/python benchmarks/overhead.py            everything, to standard output
    .venv/bin/python benchmarks/overhead.py --write    and into benchmarks/README.md
    .venv/bin/python benchmarks/overhead.py --quick    small numbers, in a minute or two

Every arm runs in a process of its own with a Ray of its own of two cores and two actors, the two in turn. Both send
the same float32 arrays to every client, get a thousandth of them back, and average. A round is timed from its start to
the start of the next; the first ones, in which actors import and buffers grow, are left out in both arms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(FLWR_TELEMETRY_ENABLED="0", HF_HUB_OFFLINE="1")
os.environ.update(RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
from sections import replace_section

HEADING = "## Overhead"
ACTORS, RANK, WARM = 2, 16, 2
MB = 1e6


@dataclass(frozen=True)
class Payload:
    """Square modules of this side; both factors at rank 16 travel."""

    side: int
    modules: int

    @property
    def bytes(self) -> int:
        return 4 * 2 * self.side * RANK * self.modules

    def __str__(self) -> str:
        return f"{self.bytes / MB:.0f} MB" if self.bytes >= MB else f"{self.bytes / 1e3:.0f} kB"


SMALL, LARGE, HUGE = Payload(80, 1), Payload(1024, 80), Payload(1024, 252)


# Arms, each in a process of its own ------------------------------------------------------------------------------


def ours(payload: Payload, clients: int, rounds: int) -> dict[str, Any]:
    """``play_round`` on the Ray pool: admission, spool and FedIT's average are part of it."""
    with _played(payload, clients, clients) as play, _Memory() as memory:
        seconds = [next(play) for _ in range(WARM + rounds)][WARM:]
    return {"seconds": seconds, "peak_mb": memory.peak_mb}


def registered(few: int, many: int, selected: int, rounds: int) -> dict[str, Any]:
    """Rounds of the same number of clients out of few and out of many, in turn on the same pool."""
    with _played(SMALL, many, selected) as of_many, _played(SMALL, few, selected) as of_few:
        pairs = [(next(of_few), next(of_many)) for _ in range(WARM + rounds)][WARM:]
    return {"few": [pair[0] for pair in pairs], "many": [pair[1] for pair in pairs]}


@contextmanager
def _played(payload: Payload, clients: int, selected: int) -> Iterator[Iterator[float]]:
    """Seconds of one round after the other."""
    from clients.noop import NoopRuntime
    from fedlora.config import parse_config
    from orchestrator.opening import open_federation
    from orchestrator.pools.ray import RayPool
    from orchestrator.rounds import play_round
    from orchestrator.state import RunState

    config = parse_config(
        {
            "model": {"name": "noop"},
            "data": {"name": "noop"},
            "clients": {"count": clients, "per_round": selected},
            "lora": {"r": RANK, "init_lora_weights": "gaussian"},
            "evaluation": {"every": 10**9, "per_client": False},
            "strategy": "fedit",
            "rounds": 10**9,
            "threads": 1,
            "pool": "ray",
            # two pools side by side share the cores, and use them in turn
            "ray": {"workers": ACTORS, "num_cpus": 0.5},
        }
    )
    with closing(RayPool(config, partial(NoopRuntime, side=payload.side, modules=payload.modules))) as pool:
        fed, base = open_federation(config, pool, lambda event, fields: None)

        def play() -> Iterator[float]:
            state = RunState(0, fed.fresh, {}, config.sha256(), base.fingerprint)
            while True:
                began = time.perf_counter()
                state = play_round(fed, state)
                yield time.perf_counter() - began
                assert state.row is not None
                assert len(state.row["admitted"]) == selected, state.row

        yield play()


def flower(payload: Payload, clients: int, rounds: int) -> dict[str, Any]:
    """Flower's simulation with FedAvg over as many messages; its grid looks for replies every 0.1 s."""
    import logging

    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    starts: list[float] = []

    class Timed(FedAvg):
        def configure_train(self, *arguments: Any, **options: Any) -> Any:
            starts.append(time.perf_counter())
            return super().configure_train(*arguments, **options)

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        sent = message.content["arrays"].to_numpy_ndarrays()
        answer = {
            "arrays": ArrayRecord([np.float32(1e-3) * array for array in sent]),
            "metrics": MetricRecord({"num-examples": 16, "loss": 1.0}),
        }
        return Message(RecordDict(answer), reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        draw = np.random.default_rng(0)
        shapes = [(payload.side, RANK), (RANK, payload.side)] * payload.modules
        arrays = ArrayRecord([draw.standard_normal(shape, np.float32) for shape in shapes])
        Timed(fraction_evaluate=0.0).start(grid, arrays, WARM + rounds + 1)  # the last one only marks an end

    with _Memory() as memory:
        run_simulation(
            server_app,
            client_app,
            num_supernodes=clients,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
        )
    return {"seconds": [end - start for start, end in itertools.pairwise(starts)][WARM:], "peak_mb": memory.peak_mb}


class _Memory:
    """Largest proportional set size of this process while the block runs, looked at every 50 ms."""

    def __enter__(self) -> _Memory:
        self.peak_mb, self._over = 0.0, threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            self.peak_mb = max(self.peak_mb, kilobytes * 1024 / MB)


ARMS = {"ours": ours, "flower": flower, "registered": registered}


def run_arm(name: str, arguments: Sequence[Any]) -> None:
    """What a child process does: an arm on a fresh Ray, its result as the last line of the output."""
    import ray

    numbers = [Payload(*argument) if isinstance(argument, list) else argument for argument in arguments]
    # local: never somebody else's cluster that happens to run here
    ray.init("local", num_cpus=ACTORS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        result = ARMS[name](*numbers)
    finally:
        ray.shutdown()
    sys.stdout.write(f"\n{json.dumps(result)}\n")


def measure(name: str, *arguments: Any) -> dict[str, Any]:
    """An arm in a process of its own."""
    plain = [[a.side, a.modules] if isinstance(a, Payload) else a for a in arguments]
    command = [sys.executable, __file__, "--arm", name, json.dumps(plain)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the arm {name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    sys.stderr.write(f"{name} {arguments}: {json.dumps(result)[:200]}\n")
    return result


# The report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How much is measured: rounds after the warm-up, times every arm is started, clients."""

    small_rounds: int = 15
    large_rounds: int = 3
    turns: int = 2
    clients: int = 100
    memory_clients: int = 50
    many: int = 10_000
    registered_rounds: int = 40


QUICK = Sizes(4, 1, 1, 20, 4, 1000, 10)


_TABLE = (
    "| payload | ours, ms per client | Flower, ms per client | times less | goal | ours, driver MB "
    "| Flower, driver MB |\n" + "| ---: " * 7 + "|"
)


def report(sizes: Sizes) -> str:
    load, begin = os.getloadavg()[0], time.perf_counter()
    rows = [
        _compare(SMALL, sizes.clients, sizes.small_rounds, sizes.turns, 10),
        _compare(LARGE, sizes.clients, sizes.large_rounds, sizes.turns, 5),
    ]
    memory = measure("ours", HUGE, sizes.memory_clients, 1)
    turns = measure("registered", sizes.clients, sizes.many, sizes.clients // 2, sizes.registered_rounds)
    few, many = (statistics.median(turns[which]) for which in ("few", "many"))
    # neighbours meet the same load: the median of their differences is steadier than the difference of medians
    apart = statistics.median(b - a for a, b in zip(turns["few"], turns["many"], strict=True)) / few
    took = time.perf_counter() - begin
    selected = sizes.clients // 2
    parts = [
        HEADING,
        "`.venv/bin/python benchmarks/overhead.py --write`: a round of clients that train nothing, ours (`play_round` "
        "on the Ray pool with FedIT: wire format, admission, spool, average) and Flower's simulation "
        f"(`run_simulation` with FedAvg, evaluation off). {sizes.clients} clients, {ACTORS} Ray actors, "
        "one process and one Ray per measurement, "
        f"the arms in turn, {sizes.turns} times each. Steady state: a round lasts from its start to the "
        f"next one's, the first {WARM} of every process are left out, and the median over the others is shown. Flower "
        "looks for tasks and for replies every 0.1 s; that is part of its rounds.",
        f"{_machine()}. Load average {load:.1f} before and {os.getloadavg()[0]:.1f} after; {took / 60:.1f} minutes.",
        "\n".join([_TABLE, *rows]),
        f"Driver memory with {sizes.memory_clients} clients of {HUGE}: at most {memory['peak_mb']:.0f} MB "
        "(proportional set size, looked at every 50 ms; goal below 1500 MB).",
        f"Cost per selected client with {selected} selected of {sizes.clients} registered "
        f"{1e3 * few / selected:.2f} ms, of {sizes.many} {1e3 * many / selected:.2f} ms: {100 * apart:+.1f} % "
        f"(goal below 5 %), in turn over {len(turns['few'])} pairs of rounds.",
    ]
    return "\n\n".join(parts) + "\n"


def _compare(payload: Payload, clients: int, rounds: int, turns: int, goal: int) -> str:
    found: Mapping[str, list[dict[str, Any]]] = {"ours": [], "flower": []}
    for _ in range(turns):
        for arm in found:
            found[arm].append(measure(arm, payload, clients, rounds))
    cost = {
        arm: 1e3 * statistics.median(s for run in runs for s in run["seconds"]) / clients for arm, runs in found.items()
    }
    peak = {arm: max(run["peak_mb"] for run in runs) for arm, runs in found.items()}
    return (
        f"| {payload} | {cost['ours']:.2f} | {cost['flower']:.2f} | {cost['flower'] / cost['ours']:.1f} | {goal} "
        f"| {peak['ours']:.0f} | {peak['flower']:.0f} |"
    )


def _machine() -> str:
    from importlib.metadata import version

    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = ", ".join(f"{name} {version(name)}" for name in ("ray", "flwr", "torch"))
    return f"{found.group(1) if found else 'unknown processor'}, {os.cpu_count()} cores, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--write", action="store_true", help="replace the section of benchmarks/README.md")
    parser.add_argument("--arm", nargs=2, metavar=("NAME", "ARGUMENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        run_arm(options.arm[0], json.loads(options.arm[1]))
        return
    section = report(QUICK if options.quick else Sizes())
    sys.stdout.write(section)
    if options.write:
        replace_section(HEADING, section)


if __name__ == "__main__":
    main()
