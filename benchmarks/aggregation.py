"""Best rank-r approximation of a weighted sum of clients: dense SVD and ``truncate_sum`` side by side.

    .venv/bin/python benchmarks/aggregation.py            the whole grid, to standard output
    .venv/bin/python benchmarks/aggregation.py --write    and into benchmarks/README.md
    .venv/bin/python benchmarks/aggregation.py --quick    a corner of it, in seconds

Both arms start from the same list of clients in memory. The dense arm forms ``S = sum_k w_k B_k A_k`` in float32 and
calls ``torch.linalg.svd(S, full_matrices=False)``; its singular values are the yardstick for the error.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from sections import replace_section
from torch import Tensor

from fedlora.adapter.recompress import truncate_sum
from fedlora.adapter.state import LowRank

MiB = 2**20
Terms = list[tuple[float, LowRank]]
T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """One row: a square layer of side ``d``, ``clients`` of rank ``rank``, recompressed to that rank."""

    d: int
    clients: int
    rank: int


GRID = [Point(d, clients, rank) for d in (384, 1024, 2048, 4096) for clients in (5, 20, 100) for rank in (4, 16, 64)]
GRID.insert(GRID.index(Point(2048, 20, 4)), Point(2048, 10, 16))
MEMORY = [(rank, clients) for rank in (16, 64) for clients in (20, 50, 100, 200)]
QUICK_GRID = [Point(384, clients, rank) for clients in (5, 20) for rank in (4, 16)]
QUICK_MEMORY = [(16, clients) for clients in (20, 60)]


def independent(d: int, rank: int, clients: int) -> Iterator[tuple[float, LowRank]]:
    """Clients with nothing in common: a flat spectrum, the worst case."""
    for k in range(clients):
        generator = torch.Generator().manual_seed(k)
        B = torch.randn(d, rank, generator=generator)
        yield 1 / clients, LowRank(B, torch.randn(rank, d, generator=generator))


def agreeing(d: int, rank: int, clients: int) -> Iterator[tuple[float, LowRank]]:
    """Clients that share an update whose components fall by 0.8 each, plus 30 % noise in every factor."""
    _, shared = next(independent(d, rank, 1))
    for weight, own in independent(d, rank, clients):
        yield weight, LowRank((shared.B + 0.3 * own.B) * 0.8 ** torch.arange(rank), shared.A + 0.3 * own.A)


def formed(terms: Terms) -> Tensor:
    """``sum_k w_k B_k A_k`` in float32, one fused multiply-add per client."""
    S = torch.zeros(terms[0][1].shape)
    for weight, update in terms:
        S.addmm_(update.B, update.A, alpha=weight)
    return S


def excess(S: Tensor, values: Tensor, came: LowRank) -> float:
    """Distance of ``came`` from S over the smallest possible, the norm of the singular values that are cut."""
    apart = (S - came.B @ came.A).double()  # float32 adds up 16 million squares to three digits
    return float(torch.linalg.norm(apart) / torch.linalg.norm(values[came.rank :].double()))


class Grid:
    """Times and errors, point by point."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.rows: list[str] = []
        self.slowest = float("inf")
        self.worst = 0.0

    def measure(self, point: Point) -> None:
        terms = list(independent(point.d, point.rank, point.clients))
        form_s = svd_s = ours_s = float("inf")
        for _ in range(7 if point.d < 1000 else 3 if point.d < 2000 else 1):  # in turn: other load meets both arms
            S, form_s = self._timed(partial(formed, terms), form_s)
            (_, values, _), svd_s = self._timed(partial(torch.linalg.svd, S, full_matrices=False), svd_s)
            for _ in range(2):
                came, ours_s = self._timed(partial(truncate_sum, terms, point.rank), ours_s)
        flat = excess(S, values, came)
        terms = list(agreeing(point.d, point.rank, point.clients))
        S = formed(terms)
        shared = excess(S, torch.linalg.svdvals(S), truncate_sum(terms, point.rank))
        faster = (form_s + svd_s) / ours_s
        self.slowest, self.worst = min(self.slowest, faster), max(self.worst, flat, shared)
        self.rows.append(
            f"| {point.d} | {point.clients} | {point.rank} | {point.clients * point.rank} | {short(form_s * 1e3)} "
            f"| {short(svd_s * 1e3)} | {short(ours_s * 1e3)} | {short(faster)} | {flat:.4f} | {shared:.4f} |"
        )

    def _timed(self, function: Callable[[], T], best_s: float) -> tuple[T, float]:
        begin = self._clock()
        result = function()
        return result, min(best_s, self._clock() - begin)

    def table(self) -> str:
        head = (
            "| d | clients | rank | total rank | forming S, ms | dense SVD, ms | truncate_sum, ms | times faster "
            "| error, independent | error, agreeing |\n" + "| ---: " * 10 + "|"
        )
        summary = f"Smallest ratio of the times {short(self.slowest)}, largest error {self.worst:.4f}."
        return "\n".join([head, *self.rows, "", summary])


def short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


class Generated:
    """Clients that are made when they are read, and forgotten after."""

    def __init__(self, d: int, rank: int, clients: int):
        self._arguments = d, rank, clients

    def __iter__(self) -> Iterator[tuple[float, LowRank]]:
        return independent(*self._arguments)


def peak_bytes(d: int, rank: int, clients: int) -> int:
    """Largest resident set during ``truncate_sum`` over what was resident before. For a process of its own."""
    truncate_sum(Generated(64, 4, 100), 4)  # libraries set up their own buffers on the first call
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _peak()
    truncate_sum(Generated(d, rank, clients), rank)
    return _peak() - before


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def memory_table(d: int, points: Iterable[tuple[int, int]], threads: int) -> str:
    rows = []
    for rank, clients in points:
        command = [sys.executable, __file__, "--threads", str(threads), "--peak", str(d), str(rank), str(clients)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process at once
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        peak = int(done.stdout)
        factors = clients * rank * 2 * d * 4
        rows.append(f"| {d} | {rank} | {clients} | {factors / MiB:.0f} | {peak / MiB:.1f} |")
    head = "| d | rank | clients | factors of all clients, MiB | peak, MiB |\n" + "| ---: " * 5 + "|"
    return "\n".join([head, *rows])


def machine(threads: int) -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found.group(1) if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__} with {threads} threads"


def report(quick: bool, threads: int, cpu_time: bool) -> str:
    load, begin = os.getloadavg()[0], time.perf_counter()
    clock = time.process_time if cpu_time else time.perf_counter
    grid = Grid(clock)
    for point in QUICK_GRID if quick else GRID:
        grid.measure(point)
        sys.stderr.write(f"{grid.rows[-1]}\n")  # as it comes: the last rows take half a minute each
    memory = memory_table(512 if quick else 2048, QUICK_MEMORY if quick else MEMORY, threads)
    took = time.perf_counter() - begin
    parts = [
        "## Aggregation",
        "`.venv/bin/python benchmarks/aggregation.py --write`: the updates of all clients to the best one of a "
        "client's rank, for a square layer of side d. Dense: form S in float32, one fused multiply-add per client, and "
        "`torch.linalg.svd(S, full_matrices=False)`. Times are for independent clients: the best of 7, 3 or, from "
        "d = 2048 on, one run of the dense arm, in turn with twice as many of ours. Errors are the distance from S "
        "over the smallest possible by the dense singular values: for independent clients (a flat spectrum, the worst "
        "case), and for clients that share a decaying update and have 30 % noise of their own.",
        f"{'Processor time' if cpu_time else 'Wall time'} on {machine(threads)}. "
        f"Load average {load:.1f} before and {os.getloadavg()[0]:.1f} after; {took / 60:.1f} minutes.",
        grid.table(),
    ]
    parts += [
        "Memory of `truncate_sum` over clients that are made as they are read: the peak of the resident set over "
        "what was resident before the call, each in a process of its own whose allocator returns memory at once.",
        memory,
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four small points")
    parser.add_argument("--write", action="store_true", help="replace the section of benchmarks/README.md")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor time: for a busy machine, with --threads 1")
    parser.add_argument("--peak", type=int, nargs=3, metavar=("D", "RANK", "CLIENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        sys.stdout.write(f"{peak_bytes(*options.peak)}\n")
        return
    section = report(options.quick, options.threads, options.cpu_time)
    sys.stdout.write(section)
    if options.write:
        replace_section("## Aggregation", section)


if __name__ == "__main__":
    main()
