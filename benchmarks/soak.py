"""A thousand rounds, and a federation of ten thousand: does anything grow?

    .venv/bin/python benchmarks/soak.py            to standard output
    .venv/bin/python benchmarks/soak.py --write    and into benchmarks/README.md

Whole runs with run folder, journal and commits, on the Ray pool, by clients that train nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", RAY_USAGE_STATS_ENABLED="0")

import ray
from sections import replace_section

from clients.noop import NoopRuntime
from fedlora.config import parse_config
from orchestrator import launch
from orchestrator.pools.ray import RayPool

HEADING = "## Soak"
WARM = 100  # rounds


def play(rounds: int, clients: int, per_round: int) -> list[tuple[float, float]]:
    """Seconds of each round and resident MB of this process after it."""
    seen: list[tuple[float, float]] = []
    last = time.perf_counter()

    def listen(event: str, fields: Mapping[str, Any]) -> None:
        nonlocal last
        if event == "round_committed":
            assert len(fields["admitted"]) == per_round, fields
            now = time.perf_counter()
            seen.append((now - last, _resident_mb()))
            last = now

    with tempfile.TemporaryDirectory() as folder:
        config = parse_config(
            {
                "model": {"name": "noop"},
                "data": {"name": "noop"},
                "clients": {"count": clients, "per_round": per_round},
                "lora": {"r": 8, "init_lora_weights": "gaussian"},
                "evaluation": {"every": 100, "per_client": False},
                "strategy": "flexlora",
                "rounds": rounds,
                "threads": 1,
                "pool": "ray",
                "ray": {"workers": 2},
                "output_dir": str(Path(folder) / "run"),
            }
        )
        launch.run(config, listen)
    return seen


def _resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def report(rounds: int, clients: int, per_round: int) -> str:
    # the pool a run opens, with clients that train nothing behind it
    launch.open_pool = lambda config: RayPool(config, NoopRuntime)  # type: ignore[assignment]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        many = play(5, clients, per_round)
        soak = play(rounds, 20, 10)
    finally:
        ray.shutdown()
    after = soak[WARM:]
    growth = (after[-1][1] - after[0][1]) / (len(after) / 100)
    early, late = (sorted(s for s, _ in part)[50] for part in (soak[WARM : WARM + 100], soak[-100:]))
    lines = "\n".join(f"| {i} | {soak[i - 1][1]:.1f} |" for i in range(WARM, rounds + 1, max(rounds // 10, 1)))
    one = sorted(s for s, _ in many[1:])[2]
    parts = [
        HEADING,
        f"`.venv/bin/python benchmarks/soak.py --write`: {rounds} rounds of 10 of 20 clients that train nothing, with "
        "run folder, journal and commits, on two Ray workers. Resident memory of the driver:",
        f"| round | MB |\n| ---: | ---: |\n{lines}",
        f"Growth after round {WARM}: {growth:.2f} MB per 100 rounds (goal below 1). A round takes {1e3 * early:.0f} ms "
        f"at first and {1e3 * late:.0f} ms in the end (medians of 100).",
        f"{per_round} of {clients} registered clients: {one:.2f} s a round (median of 4),"
        f" {max(mb for _, mb in many):.0f} MB resident.",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--write", action="store_true", help="replace the section of benchmarks/README.md")
    options = parser.parse_args()
    section = report(200, 1000, 100) if options.quick else report(1000, 10_000, 1000)
    sys.stdout.write(section)
    if options.write:
        replace_section(HEADING, section)


if __name__ == "__main__":
    main()
