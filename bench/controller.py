# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The break-even controller beside raw and encoded: the same stores and loads, in turn, in one run.

Run ``python bench/controller.py --data CACHE.npy --out FOLDER`` on a machine with a GPU (about two minutes; with
``--quick`` a smoke run, with ``--device cpu`` host memory alone). Data and pages are those of ``gpu_peers.py``, at
several bounds, and pages of random bits, which nothing makes smaller. The file in FOLDER is named after the GPU, such
as ``h100_controller.json``.

* ``rows``: 1 to 16,384 pages of 64 KiB; kvzip's blocks have min(64, pages) pages. Every round stores and loads other
  blocks by each way: ``raw`` and ``encoded`` as a caller can ask for (``store(coding=)``), and the three objectives,
  each with one controller from the beginning of the run to its end, which also goes from the idle GPU to one that
  computes. Ways take turns in being the first of a round. A controller has had some transfers of a size before they
  are timed. Times are a caller's, from the call until ``wait`` returns; what came back is compared. ``raw_part`` is
  the part of the timed stores that were kept raw.
* ``load``: what the GPU does beside it: nothing, a product of matrices of 8192 x 8192, or the CUDA graph like a
  decoding step of ``gpu_transport.py``, without a pause.
* ``host_rows``: the same for an engine on host memory, where a raw block is copied.
* ``checksum_rows``: loads with their checksums verified and not, in turn.
* ``controllers``: what each had learned in the end.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_peers as peers
import numpy as np
import numpy.typing as npt
from gpu_peers import MIB, PAGE_BYTES, Ints, Row
from gpu_transport import DecodeStep, Gemm, TransportBench, check_pages, environment

from kvzip import BlockView, ErrorBound, HostPool
from kvzip.benchmark import Results, finish, gpu_name, host_environment, quantiles
from kvzip.controller import OBJECTIVES, Controller
from kvzip.integrity import Integrity

PAGES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
HOST_PAGES = (1, 16, 256, 2048)
WAYS = ("raw", "encoded", *OBJECTIVES)


@dataclass(frozen=True)
class Profile:
    """Pages at a bound.

    Attributes:
        name: for the results.
        relative: bound as a part of each page's range; 0 = lossless.
        noise: pages of random bits, instead of real ones.
    """

    name: str
    relative: float
    noise: bool = False

    @property
    def bound(self) -> ErrorBound:
        """The same for the engine."""
        return ErrorBound.relative(self.relative) if self.relative else ErrorBound.lossless()


PROFILES = (
    Profile("noise", 0.0, noise=True),
    Profile("lossless", 0.0),
    Profile("1e-3", 1e-3),
    Profile("1e-2", 1e-2),
    Profile("3e-2", 3e-2),
)
LOADED_PROFILES = ("noise", "1e-3", "1e-2")


class HostBench(TransportBench):
    """The same pages in host memory, and a pool there."""

    def __init__(self, torch: Any, cache: npt.NDArray[Any], count: int) -> None:
        self.torch, self.count, self.device = torch, count, torch.device("cpu")
        self.pages = peers.real_pages(torch, cache, count, "cpu")
        self.targets = torch.zeros_like(self.pages)
        self._pool: HostPool | None = None
        self._views: dict[tuple[int, bool], BlockView] = {}

    @property
    def pool(self) -> HostPool:
        """Room for two and a half times the pages, not page-locked."""
        if self._pool is None:
            self._pool = HostPool(self.count * PAGE_BYTES * 5 // 2 + 64 * MIB)
        return self._pool


@dataclass
class Samples:
    """What one way took.

    Attributes:
        out, into: seconds of stores and loads.
        record_bytes: of the last store.
        raw: stores that were kept raw.
    """

    out: list[float] = field(default_factory=list)
    into: list[float] = field(default_factory=list)
    record_bytes: int = 0
    raw: int = 0


class Swaps:
    """Stores and loads of blocks by an engine whose controller is exchanged between calls.

    Args:
        bench: the pages.
        stream: CUDA stream of the transfers; None in host memory.
    """

    def __init__(self, bench: TransportBench, stream: int | None) -> None:
        self.bench, self.stream = bench, stream
        self.engine = bench.engine(ErrorBound.lossless())
        self.controllers = {objective: Controller(objective) for objective in OBJECTIVES}
        real = bench.pages
        bits = bench.torch.randint(-(1 << 15), 1 << 15, real.shape, dtype=bench.torch.int16, device=real.device)
        self._pages = {False: real, True: bits.view(real.dtype)}
        self._fresh = itertools.count()

    def choose(self, profile: Profile) -> None:
        """Take a profile's pages and bound from now on."""
        self.bench.pages = self._pages[profile.noise]
        self.bench._views.clear()
        self.engine.configure(bound=profile.bound)

    def move(self, way: str, pages: int, blocks: Ints, samples: Samples) -> None:
        """Store blocks, load them, and forget them."""
        source, target = (self.bench.view(pages, targets=targets)[blocks] for targets in (False, True))
        number = next(self._fresh)
        keys = [b"%d-%d" % (number, i) for i in range(len(blocks))]
        self.engine.controller = self.controllers.get(way)
        coding = way if way in ("raw", "encoded") else None
        begin = time.perf_counter()
        stored = self.engine.store(keys, source, coding=coding, stream=self.stream)  # type: ignore[arg-type]
        samples.record_bytes = finish(stored)
        samples.out.append(time.perf_counter() - begin)
        samples.raw += way == "raw" or "break_even" in stored.result().fallbacks
        begin = time.perf_counter()
        finish(self.engine.load(keys, target, stream=self.stream))
        samples.into.append(time.perf_counter() - begin)
        self.engine.discard(keys)


@contextmanager
def computing(torch: Any, launch: Callable[[], None] | None, stream: Any) -> Iterator[None]:
    """Work on the GPU that goes on without a pause, a few launches ahead."""
    if launch is None:
        yield
        return
    halt = threading.Event()

    def run() -> None:
        ends: list[Any] = []
        with torch.cuda.stream(stream):
            while not halt.is_set():
                launch()
                end = torch.cuda.Event(blocking=True)
                end.record(stream)
                ends.append(end)
                if len(ends) > 3:
                    ends.pop(0).synchronize()
        stream.synchronize()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(0.05)
    try:
        yield
    finally:
        halt.set()
        thread.join(30)


def measure(swaps: Swaps, profile: Profile, pages: int, *, quick: bool) -> list[Row]:
    """All ways in turn, after the controllers have seen some transfers; then what came back is compared."""
    swaps.choose(profile)
    bench = swaps.bench
    chosen = bench.selections(pages, 8)
    turns = itertools.cycle(range(len(chosen)))
    for way in WAYS:
        warm, begin = Samples(), time.perf_counter()
        most = (2 if way in ("raw", "encoded") else 40) if not quick else 2
        while len(warm.out) < most and (time.perf_counter() - begin < 0.15 or len(warm.out) < min(most, 14)):
            swaps.move(way, pages, chosen[next(turns)], warm)
    found = {way: Samples() for way in WAYS}
    begin = time.perf_counter()
    least, most, seconds = (2, 2, 0.0) if quick else (7, 150, 0.3)
    gc.collect()
    gc.disable()
    try:
        for number in range(most):
            for way in np.roll(WAYS, number).tolist():
                swaps.move(way, pages, chosen[next(turns)], found[way])
            if number + 1 >= least and time.perf_counter() - begin > seconds:
                break
    finally:
        gc.enable()
    for way in WAYS:
        bench.targets.zero_()
        blocks = chosen[next(turns)]
        swaps.move(way, pages, blocks, Samples())
        check_pages(bench, bench.page_numbers(pages, blocks), profile.relative, f"{way} at {profile.name}")
    raw_bytes = pages * PAGE_BYTES
    return [
        {
            "profile": profile.name,
            "pages": pages,
            "raw_bytes": raw_bytes,
            "way": way,
            "direction": direction,
            **quantiles(seconds),
            "n": len(seconds),
            "ratio": raw_bytes / found[way].record_bytes,
            "raw_part": found[way].raw / len(found[way].out),
        }
        for way in WAYS
        for direction, seconds in (("out", found[way].out), ("in", found[way].into))
    ]


def show(load: str, rows: Sequence[Row]) -> None:
    """Print a case: for each direction the medians, and `latency` over the better of raw and encoded."""
    first = rows[0]
    for direction in ("out", "in"):
        us = {row["way"]: row["us"] for row in rows if row["direction"] == direction}
        part = {row["way"]: row["raw_part"] for row in rows}
        over = us["latency"] / min(us["raw"], us["encoded"])
        times = " ".join(f"{way} {us[way]:.0f}" for way in WAYS)
        kept = " ".join(f"{part[way]:.2f}" for way in OBJECTIVES)
        print(
            f"{load:9s} {first['profile']:8s} {first['pages']:6d} {direction:3s} us: {times}; x {over:.3f}, raw {kept}",
            flush=True,
        )


def run_device(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    """All cases on the GPU, idle and not, and what checksums cost."""
    torch = bench.torch
    swaps = Swaps(bench, int(bench.kernels.cuda_stream))
    stream = torch.cuda.Stream()
    for load in options.loads:
        with results.attempt("controller", load):
            work: Gemm | DecodeStep | None = None
            if load != "idle":
                work = Gemm(torch, 8192) if load == "gemm-8192" else DecodeStep(torch, 32, 8, 2048)
            launch = None if work is None else work.prepare(stream)
            with computing(torch, launch, stream):
                for profile in PROFILES:
                    if load != "idle" and profile.name not in LOADED_PROFILES:
                        continue
                    for pages in options.pages if load == "idle" else options.pages[::2] + options.pages[-1:]:
                        with results.attempt("controller", f"{load}, {profile.name}, {pages} pages"):
                            rows = measure(swaps, profile, pages, quick=options.quick)
                            show(load, rows)
                            results.add("controller", [{"load": load, **row} for row in rows])
                for pages in options.pages[-1:] if load != "idle" else options.pages[-4::3]:
                    with results.attempt("controller", f"{load}, checksums of {pages} pages"):
                        checksums(swaps, results, load, pages)
            del launch, work
            torch.cuda.empty_cache()
    for objective, controller in swaps.controllers.items():
        remember(results, objective, controller)
    swaps.engine.close()


def checksums(swaps: Swaps, results: Results, load: str, pages: int) -> None:
    """Loads whose checksums are verified, and not, in turn; raw and encoded."""
    swaps.choose(Profile("1e-2", 1e-2))
    bench = swaps.bench
    blocks = bench.selections(pages, 1)[0]
    source, target = (bench.view(pages, targets=targets)[blocks] for targets in (False, True))
    bound = ErrorBound.relative(1e-2)
    stream = swaps.stream
    with (
        bench.engine(bound) as always,
        bench.engine(bound, integrity=Integrity(checksum=0.0)) as never,
    ):
        keys = [b"%d" % i for i in range(len(blocks))]
        for coding in ("raw", "encoded"):
            times: dict[bool, list[float]] = {True: [], False: []}
            for engine in (always, never):
                engine.store(keys, source, coding=coding, stream=stream).wait()
            for number in range(26):
                for checked, engine in ((True, always), (False, never)):
                    begin = time.perf_counter()
                    finish(engine.load(keys, target, stream=stream))
                    if number >= 5:
                        times[checked].append(time.perf_counter() - begin)
            rows = [
                {"load": load, "pages": pages, "coding": coding, "checked": checked, **quantiles(seconds)}
                for checked, seconds in times.items()
            ]
            print(f"{load} checksum {pages} {coding}: " + " ".join(f"{r['us']:.0f}" for r in rows), flush=True)
            results.add("controller", rows, "checksum_rows")


def run_host(torch: Any, results: Results, cache: npt.NDArray[Any], options: argparse.Namespace) -> None:
    """The cases in host memory."""
    counts = [pages for pages in HOST_PAGES if pages <= max(options.pages)]
    bench = HostBench(torch, cache, max(counts))
    swaps = Swaps(bench, None)
    for profile in PROFILES:
        if profile.name not in ("noise", "lossless", "1e-3", "1e-2"):
            continue
        for pages in counts:
            with results.attempt("controller", f"host, {profile.name}, {pages} pages"):
                rows = measure(swaps, profile, pages, quick=options.quick)
                show("host", rows)
                results.add("controller", [{"load": "host", **row} for row in rows], "host_rows")
    for objective, controller in swaps.controllers.items():
        remember(results, f"{objective}, host", controller)
    swaps.engine.close()


def remember(results: Results, name: str, controller: Controller) -> None:
    """Put what a controller has learned into the results."""
    seen = controller.snapshot()
    row = {
        "controller": name,
        "decisions": {f"{choice} {cause}": n for (choice, cause), n in seen.decisions.items()},
        "switches": sum(crossing.switches for crossing in seen.crossings),
        "transfer_seconds": seen.transfer_seconds,
        "exploration_seconds": seen.exploration_seconds,
        "link_bytes_per_second": {" ".join(key): rate for key, rate in seen.link_bytes_per_second.items()},
    }
    print(row, flush=True)
    results.add("controller", [row], "controllers")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="KV cache, uint16 [layers, 2, tokens, heads, dim]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--quick", action="store_true", help="few repetitions, few pages: a smoke run")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the pages are")
    parser.add_argument("--loads", default="idle,gemm-8192,decode-b8", help="of idle,gemm-8192,decode-b8")
    parser.add_argument("--commit", default="", help="what the results say of the source")
    options = parser.parse_args(argv)
    options.loads = options.loads.split(",")
    options.pages = list(PAGES) if not options.quick else [1, 16, 64]
    try:
        import torch
    except ImportError:
        print("torch is not installed: this benchmark needs it", file=sys.stderr)
        return 1
    cache = np.load(options.data)
    if options.device == "cpu":
        found = host_environment() | {"commit": options.commit, "data": options.data.name}
        results = Results(options.out, "cpu", found)
    else:
        found = environment(torch, options.data.name, options.commit)
        results = Results(options.out, gpu_name(found["gpu"]), found)
        run_device(TransportBench(torch, cache, max(512, *options.pages)), results, options)
    run_host(torch, results, cache, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
