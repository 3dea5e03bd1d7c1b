# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What checksums cost the host: CRC32C of records, and loads that verify all of them, one in ten, or none.

    python bench/checksums.py --out bench/results/checksums_host.json

CPU time of one thread, so that what else runs on the machine weighs little. The GPU's side of it is in
``bench/controller.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvzip import BlockView, ErrorBound, SwapEngine
from kvzip.benchmark import host_environment
from kvzip.demo import paged, read_input
from kvzip.integrity import Integrity
from kvzip.record import crc32c

PARTS = (1.0, 0.1, 0.0)
TURNS = 40


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this thread."""
    before = time.thread_time()
    work()
    return time.thread_time() - before


def spread(times: list[float], nbytes: int) -> dict[str, float]:
    """GB/s of raw bytes: the median and the deciles."""
    low, middle, high = (nbytes / float(t) / 1e9 for t in np.quantile(times, (0.9, 0.5, 0.1)))
    return {"gb_per_s": round(middle, 3), "p10": round(low, 3), "p90": round(high, 3)}


def measure(bound: ErrorBound) -> list[dict[str, Any]]:
    """Rows of one bound: engines in turn, and CRC32C alone."""
    cache, dtype = read_input(None)
    pages = paged(cache, 16)
    view = BlockView(pages, "2NHD", dtype=dtype)
    out = BlockView([np.zeros_like(page) for page in pages], "2NHD", dtype=dtype)
    keys = [b"%d" % i for i in range(len(view))]
    engines = [
        SwapEngine(2 * view.nbytes, bound=bound, threads=1, integrity=Integrity(checksum=part)) for part in PARTS
    ]
    for engine in engines:
        engine.store(keys, view)
        engine.load(keys, out)
    records = [np.frombuffer(engines[0].read_record(key), np.uint8) for key in keys]
    times: dict[Any, list[float]] = {part: [] for part in (*PARTS, "crc32c")}
    for _ in range(TURNS):
        for part, engine in zip(PARTS, engines, strict=True):
            times[part].append(cpu_seconds(lambda engine=engine: engine.load(keys, out)))
        times["crc32c"].append(cpu_seconds(lambda: [crc32c(record) for record in records]))
    encoded = sum(record.size for record in records)
    for engine in engines:
        engine.close()
    rows: list[dict[str, Any]] = [
        {"bound": str(bound), "what": "load", "checked": part, **spread(times[part], view.nbytes)} for part in PARTS
    ]
    return [*rows, {"bound": str(bound), "what": "crc32c of records", **spread(times["crc32c"], encoded)}]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="what checksums cost the host")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args()
    rows = [row for bound in ("1e-3", "1e-2", "lossless") for row in measure(ErrorBound.parse(bound))]
    found = {"what": "GB/s of one thread, by its CPU time", "environment": host_environment(), "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
