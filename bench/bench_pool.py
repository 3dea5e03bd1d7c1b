# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""How full a pool stays, in how many runs its records lie, and what an allocation costs.

Run ``python bench/bench_pool.py`` (about four minutes, 3 GiB of memory), or with ``--quick`` for a smoke run. It writes
``bench/results/pool.json``:

* ``churn``: records are stored for ever into a full pool, evicting until `HostPool.shortfall_bytes` is 0. The first
  half only ages the pool; the figures are of the second half.
* ``scale``: the same for pools of more and more records, each stored about twice over (memory that is never touched).
* ``copy``: bytes into and out of records of one run and of many.
* ``fill``: milliseconds per GiB to map and touch pinned memory (registration replaced by a function that does nothing).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvzip.memory import PinnedMemory, Region
from kvzip.pool import Allocation, HostPool

MIB = 1 << 20
GIB = 1 << 30

SIZES: dict[str, Callable[[random.Random], int]] = {
    "10-120 KB": lambda rng: rng.randint(10_000, 120_000),
    "65 KB +- 4 KB": lambda rng: max(1, round(rng.gauss(65_000, 4_000))),
    "700 KB +- 60 KB": lambda rng: max(1, round(rng.gauss(700_000, 60_000))),
    "90 % 10-120 KB, 10 % 600-800 KB": lambda rng: (
        rng.randint(10_000, 120_000) if rng.random() < 0.9 else rng.randint(600_000, 800_000)
    ),
}


class Untouched:
    """Address space without memory behind it, for pools larger than the machine."""

    def allocate(self, nbytes: int) -> Region:
        """Map without a claim on memory."""
        no_reserve = 0x4000  # MAP_NORESERVE of Linux
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
        return Region(np.frombuffer(mapping, np.uint8))


class Evictor:
    """Live allocations, of which one can be taken in a given order."""

    def __init__(self, order: str, rng: random.Random) -> None:
        self.order = order
        self.rng = rng
        self.live: OrderedDict[int, Allocation] = OrderedDict()
        self.keys: list[int] = []
        self.place: dict[int, int] = {}
        self.count = 0

    def add(self, allocation: Allocation) -> None:
        """Make an allocation live."""
        self.count += 1
        self.live[self.count] = allocation
        self.place[self.count] = len(self.keys)
        self.keys.append(self.count)
        if self.order == "LRU, two random hits per store":
            for _ in range(2):
                self.live.move_to_end(self.rng.choice(self.keys))

    def take(self) -> Allocation:
        """Remove the one that is evicted next."""
        key = self.rng.choice(self.keys) if self.order == "random" else next(iter(self.live))
        last = self.keys.pop()
        at = self.place.pop(key)
        if last != key:
            self.keys[at] = last
            self.place[last] = at
        return self.live.pop(key)


def spread(values: Iterable[float], digits: int = 2) -> dict[str, float]:
    """Median, p10, p90 and mean."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), digits),
        "p10": round(ordered[len(ordered) // 10], digits),
        "p90": round(ordered[len(ordered) * 9 // 10], digits),
        "mean": round(statistics.fmean(ordered), digits),
    }


def churn(pool: HostPool, sizes: str, order: str, stores: int, seed: int = 1) -> dict[str, Any]:
    """Store records into a pool that is kept full; figures of the second half."""
    rng = random.Random(seed)
    evictor = Evictor(order, rng)
    allocate_us: list[float] = []
    free_us: list[float] = []
    fractions: list[float] = []
    runs: list[int] = []
    aged = False
    while pool.shortfall_bytes(MIB) == 0:  # fill it first
        evictor.add(pool.allocate(SIZES[sizes](rng)))
    for store in range(stores):
        aged = store >= stores // 2
        nbytes = SIZES[sizes](rng)
        while pool.shortfall_bytes(nbytes):
            victim = evictor.take()
            start = time.perf_counter_ns()
            pool.free(victim)
            if aged:
                free_us.append((time.perf_counter_ns() - start) / 1e3)
        start = time.perf_counter_ns()
        allocation = pool.allocate(nbytes)
        if aged:
            allocate_us.append((time.perf_counter_ns() - start) / 1e3)
            runs.append(len(allocation.runs))
            fractions.append(pool.stats().payload_fraction)
        evictor.add(allocation)
    pool.check()
    return {
        "record_bytes": sizes,
        "eviction": order,
        "pool_bytes": pool.capacity_bytes,
        "headroom": round(pool.headroom_bytes / pool.capacity_bytes, 4),
        "records": pool.stats().allocations,
        "stores": stores,
        "payload_fraction": spread(fractions, 4),
        "runs_per_record": {**spread(runs), "max": max(runs)},
        "one_run_fraction": round(sum(count == 1 for count in runs) / len(runs), 3),
        "free_runs": pool.stats().free_runs,
        "allocate_us": spread(allocate_us),
        "free_us": spread(free_us),
    }


def copies(seconds: float) -> list[dict[str, Any]]:
    """GB/s of `HostPool.write` and `HostPool.read` for a record of one run and of many."""
    rows = []
    for runs in (1, 2, 8):
        with HostPool(64 * MIB) as pool:
            nbytes = 65_536
            part = nbytes // runs
            units = [pool.allocate(part) for _ in range(pool.capacity_bytes // part)]
            if runs > 1:
                for unit in units[::2]:
                    pool.free(unit)
                records = [pool.allocate(nbytes) for _ in range(pool.free_bytes // nbytes)]
            else:
                records = units
            assert all(len(record.runs) == runs for record in records)
            data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
            rates: dict[str, list[float]] = {"write": [], "read": []}
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                start = time.perf_counter()
                for record in records:
                    pool.write(record, data)
                rates["write"].append(len(records) * nbytes / (time.perf_counter() - start) / 1e9)
                start = time.perf_counter()
                for record in records:
                    np.copyto(data, pool.read(record))
                rates["read"].append(len(records) * nbytes / (time.perf_counter() - start) / 1e9)
            rows += [
                {"operation": op, "record_bytes": nbytes, "runs": runs, "gb_per_s": spread(values)}
                for op, values in rates.items()
            ]
    return rows


def fills(nbytes: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per GiB that `PinnedMemory` takes before registration."""
    rows = []
    cores = len(os.sched_getaffinity(0))
    for huge_pages in (False, True):
        for threads in sorted({1, cores}):
            resource = PinnedMemory(
                threads=threads, huge_pages=huge_pages, register=lambda address, size: 0, unregister=lambda address: 0
            )
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                region = resource.allocate(nbytes)
                times.append((time.perf_counter() - start) * 1e3 * GIB / nbytes)
                region.close()
            rows.append({"huge_pages": huge_pages, "threads": threads, "bytes": nbytes, "ms_per_gib": spread(times, 1)})
    return rows


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "transparent_huge_pages": huge.read_text().strip() if huge.exists() else "unknown",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description="Measure the host pool.")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pool.json")
    options = parser.parse_args(arguments)
    quick: bool = options.quick
    around = environment()  # before this run adds to the load

    rows = []
    print(
        f"{'records':34}{'eviction':32}{'headroom':>9}{'payload':>9}{'runs':>7}{'max':>5}{'alloc us':>9}{'free us':>9}"
    )
    for sizes in SIZES:
        for order in ("in order of storing", "LRU, two random hits per store", "random"):
            for headroom in (0.02,) if quick else (0.0, 0.01, 0.02, 0.025):
                with HostPool((64 if quick else 256) * MIB, headroom=headroom, resource=Untouched()) as pool:
                    row = churn(pool, sizes, order, 2_000 if quick else 40_000 if sizes[0] != "7" else 10_000)
                rows.append(row)
                print(
                    f"{sizes:34}{order:32}{headroom:9.3f}{row['payload_fraction']['mean']:9.4f}"
                    f"{row['runs_per_record']['mean']:7.2f}{row['runs_per_record']['max']:5}"
                    f"{row['allocate_us']['median']:9.2f}{row['free_us']['median']:9.2f}",
                    flush=True,
                )
    scale = []
    for gib in (1,) if quick else (1, 4, 16, 32):
        with HostPool(gib * GIB, resource=Untouched()) as pool:
            row = churn(pool, "10-120 KB", "random", 2_000 if quick else 34_000 * gib)
        scale.append(row)
        print(
            f"{gib} GiB, {row['records']} records: allocate {row['allocate_us']['median']} us, "
            f"free {row['free_us']['median']} us, {row['runs_per_record']['mean']} runs",
            flush=True,
        )
    copy = copies(0.1 if quick else 2.0)
    fill = fills(256 * MIB if quick else 2 * GIB, 1 if quick else 5)
    for row in (*copy, *fill):
        print(json.dumps(row))
    around["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    result = {"environment": around, "churn": rows, "scale": scale, "copy": copy, "fill": fill}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
