# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The break-even controller beside raw and encoded: the same stores and loads, in turn, in one run.

Run ``python bench/controller.py --data CACHE.npy --out FOLDER`` on a machine with a GPU (under two minutes; with
``--quick`` a smoke run, with ``--device cpu`` host memory alone). Data and pages are those of ``gpu_peers.py``, at
several bounds, and pages of random bits, which nothing makes smaller. The file in FOLDER is named after the GPU, such
as ``h100_controller.json``.

* ``rows``: 1 to 16,384 pages of 64 KiB; kvzip's blocks have min(64, pages) pages. Every round stores and loads other
  blocks by each way, in an order drawn anew: ``raw`` and ``encoded`` as a caller can ask for (``store(coding=)``),
  ``latency``, an engine with one controller from the beginning of the run to its end, which also goes from the idle GPU
  to one that computes, and ``again``, which is the faster of the first two a second time. A controller has had some
  transfers of a size before they are timed. Times are a caller's, from the call until ``wait`` returns; what came back
  is compared. ``raw_part`` is the part of the timed stores that were kept raw.
* ``cases``: what `latency` took over the better road. As a load takes the road of its store, a store and a load
  together count: ``over`` is the median of these pairs over the smaller median of raw and encoded, with its 90 %
  interval from 1,000 resamples of the rounds; ``again`` the same of the way ``again``, which is what the method shows
  where nothing differs; ``total_over`` the mean of all pairs in place of the median, with the transfers that measure
  the other road; ``first_over`` the mean of the first ten pairs after the bound, the size or the load has changed.
  ``verdict``: ``within`` 5 %; ``unsure`` where the interval is not all above that; else ``choice`` where the stores
  that took the slower road explain most of it, and ``bookkeeping`` where they do not.
* ``objective_rows``: some cases with all three objectives.
* ``overhead_rows``: transfers of 1 and of 16 pages: encoded without a controller (``none``) and with one that looks and
  never chooses otherwise (``always``); raw as a caller asks for (``raw``) and with one that always says so.
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
from kvzip.controller import OBJECTIVES, Controller, Prior
from kvzip.integrity import Integrity

PAGES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
HOST_PAGES = (1, 16, 256, 1024)
LOADS = "idle,gemm-8192,decode-b8,host"
OBJECTIVE_PAGES = (1, 256, 4096)
ROADS = ("raw", "encoded")
AGAIN = "again"
WAYS = (*ROADS, "latency", AGAIN)
FIRST = 10  # pairs that count as the first ones
RESAMPLES = 1000
WITHIN = 1.05  # of the better road


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

    @property
    def pairs(self) -> npt.NDArray[np.float64]:
        """Seconds of a store and the load of it."""
        return np.add(self.out, self.into)


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
        self.controllers["always"] = Controller("capacity", exploration=0.0)
        slow = Prior(1e15, 1e15, 1.0, 1.0, 0.0, overlapped=True)
        kinds = {"cuda": slow, "cpu": slow}
        self.controllers["always-raw"] = Controller("latency", exploration=0.0, dwell=1 << 30, priors=kinds)
        self.again = ""  # the road that is the faster one
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
        road = self.again if way == AGAIN else way
        coding = road if road in ROADS else None
        begin = time.perf_counter()
        stored = self.engine.store(keys, source, coding=coding, stream=self.stream)  # type: ignore[arg-type]
        samples.record_bytes = finish(stored)
        samples.out.append(time.perf_counter() - begin)
        samples.raw += road == "raw" or "break_even" in stored.result().fallbacks
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


def in_turn(swaps: Swaps, ways: Sequence[str], pages: int, least: int, most: int, seconds: float) -> dict[str, Samples]:
    """Rounds of all ways, each in an order of its own."""
    chosen = swaps.bench.selections(pages, 8)
    turns = itertools.cycle(range(len(chosen)))
    found = {way: Samples() for way in ways}
    rng = np.random.default_rng(pages)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for number in range(most):
            for way in rng.permutation(ways).tolist():
                swaps.move(way, pages, chosen[next(turns)], found[way])
            if number + 1 >= least and time.perf_counter() - begin > seconds:
                break
    finally:
        gc.enable()
    return found


def warm_up(swaps: Swaps, ways: Sequence[str], pages: int, *, quick: bool) -> dict[str, Samples]:
    """Let the controllers see some transfers, and find out which road is the faster one."""
    found = in_turn(swaps, ROADS, pages, 2 if quick else 3, 2 if quick else 20, 0.1)
    swaps.again = min(ROADS, key=lambda road: float(np.median(found[road].pairs)))
    chosen = swaps.bench.selections(pages, 8)
    for way in ways:
        if way not in (*ROADS, AGAIN):
            warm, begin = found.setdefault(way, Samples()), time.perf_counter()
            most = 40 if not quick else 2
            while len(warm.out) < most and (time.perf_counter() - begin < 0.15 or len(warm.out) < min(most, 14)):
                swaps.move(way, pages, chosen[len(warm.out) % len(chosen)], warm)
    return found


def quotient(found: dict[str, Samples], way: str) -> Row:
    """A way's median pair over that of the better road, and the interval that 90 % of the resamples are in."""
    pairs = np.stack([found[each].pairs for each in (way, *ROADS)])

    def over(sample: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        own, *roads = np.median(sample, axis=-1)
        return np.asarray(own / np.minimum(*roads))

    rounds = np.random.default_rng(1).integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    low, high = np.quantile(over(pairs[:, rounds]), (0.05, 0.95))
    return {"over": float(over(pairs)), "low": float(low), "high": float(high)}


def verdict(case: Row) -> str:
    """Whether a case is within 5 % of the better road, and if it surely is not, what most of it comes from."""
    if case["over"] <= WITHIN:
        return "within"
    if case["low"] <= WITHIN:
        return "unsure"
    raw, encoded = case["raw_us"], case["encoded_us"]
    wrong = case["raw_part"] if encoded < raw else 1 - case["raw_part"]
    return "choice" if wrong * (max(raw, encoded) / min(raw, encoded) - 1) > (case["over"] - 1) / 2 else "bookkeeping"


def measure(
    swaps: Swaps, profile: Profile, pages: int, ways: Sequence[str] = WAYS, *, quick: bool
) -> tuple[list[Row], Row]:
    """All ways in turn, after the controllers have seen some transfers; then what came back is compared.

    Returns:
        A row for each way and direction, and the case's.
    """
    swaps.choose(profile)
    bench = swaps.bench
    first = warm_up(swaps, ways, pages, quick=quick)
    least, most, seconds = (2, 2, 0.0) if quick else (15 if bench.device.type == "cuda" else 9, 200, 0.4)
    found = in_turn(swaps, ways, pages, least, most, seconds)
    chosen = bench.selections(pages, 8)
    for number, way in enumerate(ways):
        bench.targets.zero_()
        blocks = chosen[number % len(chosen)]
        swaps.move(way, pages, blocks, Samples())
        check_pages(bench, bench.page_numbers(pages, blocks), profile.relative, f"{way} at {profile.name}")
    raw_bytes = pages * PAGE_BYTES
    case: Row = {"profile": profile.name, "pages": pages, "raw_bytes": raw_bytes}
    rows = [
        {
            **case,
            "way": way,
            "direction": direction,
            **quantiles(seconds),
            "n": len(seconds),
            "ratio": raw_bytes / found[way].record_bytes,
            "raw_part": found[way].raw / len(found[way].out),
        }
        for way in ways
        for direction, seconds in (("out", found[way].out), ("in", found[way].into))
    ]
    best = min(float(np.median(found[road].pairs)) for road in ROADS)
    least_mean = min(float(np.mean(found[road].pairs)) for road in ROADS)
    case |= {
        "n": len(found["raw"].out),
        "ratio": raw_bytes / found["encoded"].record_bytes,
        "raw_us": float(np.median(found["raw"].pairs)) * 1e6,
        "encoded_us": float(np.median(found["encoded"].pairs)) * 1e6,
        **quotient(found, "latency"),
        "total_over": float(np.mean(found["latency"].pairs)) / least_mean,
        "first_over": float(np.mean(first["latency"].pairs[:FIRST])) / best,
        "raw_part": found["latency"].raw / len(found["latency"].out),
    }
    case["verdict"] = verdict(case)
    if AGAIN in found:
        case["again"] = quotient(found, AGAIN)
    return rows, case


def overhead(swaps: Swaps, pages: int, *, quick: bool) -> list[Row]:
    """What a controller costs that never chooses otherwise."""
    swaps.choose(Profile("1e-2", 1e-2))
    ways = ("none", "always", "raw", "always-raw")
    in_turn(swaps, ways, pages, 4, 4 if quick else 60, 0.1)
    found = in_turn(swaps, ways, pages, 4, 4 if quick else 1500, 0.6)
    return [
        {"pages": pages, "way": way, "direction": direction, **quantiles(seconds), "n": len(seconds)}
        for way in ways
        for direction, seconds in (("out", found[way].out), ("in", found[way].into))
    ]


def show(load: str, rows: Sequence[Row], case: Row) -> None:
    """Print a case."""
    times = []
    for direction in ("out", "in"):
        own = [row for row in rows if row["direction"] == direction]
        times.append(f"{direction} " + " ".join(f"{row['way']} {row['us']:.0f}" for row in own))
    again = case.get("again", {})
    print(
        f"{load:9s} {case['profile']:8s} {case['pages']:6d} x {case['over']:.3f} [{case['low']:.3f} {case['high']:.3f}]"
        f" again {again.get('over', 0):.3f} total {case['total_over']:.3f} first {case['first_over']:.3f}"
        f" {case['verdict']} raw {case['raw_part']:.2f} n {case['n']} us: {'; '.join(times)}",
        flush=True,
    )


def keep(results: Results, load: str, prefix: str, rows: Sequence[Row], case: Row) -> None:
    """Put a case into the results."""
    show(load, rows, case)
    results.add("controller", [{"load": load, **row} for row in rows], prefix + "rows")
    results.add("controller", [{"load": load, **case}], prefix + "cases")


def run_device(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    """All cases on the GPU, idle and not, and what checksums cost."""
    torch = bench.torch
    swaps = Swaps(bench, int(bench.kernels.cuda_stream))
    stream = torch.cuda.Stream()
    for load in [load for load in options.loads if load != "host"]:
        with results.attempt("controller", load):
            work: Gemm | DecodeStep | None = None
            if load != "idle":
                work = Gemm(torch, 8192) if load == "gemm-8192" else DecodeStep(torch, 32, 8, 2048)
            launch = None if work is None else work.prepare(stream)
            with computing(torch, launch, stream):
                idle = load == "idle"
                counts = options.pages if idle else dict.fromkeys(options.pages[::2] + options.pages[-1:])
                bounds = options.profiles or ([profile.name for profile in PROFILES] if idle else LOADED_PROFILES)
                for profile in [profile for profile in PROFILES if profile.name in bounds]:
                    for pages in counts:
                        with results.attempt("controller", f"{load}, {profile.name}, {pages} pages"):
                            keep(results, load, "", *measure(swaps, profile, pages, quick=options.quick))
                for pages in options.pages[-4::3] if idle else options.pages[-1:]:
                    with results.attempt("controller", f"{load}, checksums of {pages} pages"):
                        checksums(swaps, results, load, pages)
            del launch, work
            torch.cuda.empty_cache()
    for pages in [pages for pages in OBJECTIVE_PAGES if pages in options.pages]:
        for profile in [profile for profile in PROFILES if profile.name in ("noise", "1e-2")]:
            with results.attempt("controller", f"objectives, {profile.name}, {pages} pages"):
                rows, case = measure(swaps, profile, pages, (*ROADS, *OBJECTIVES), quick=options.quick)
                show("idle", rows, case)
                results.add("controller", [{"load": "idle", **row} for row in rows], "objective_rows")
    for pages in (1, 16):
        with results.attempt("controller", f"overhead, {pages} pages"):
            rows = overhead(swaps, pages, quick=options.quick)
            print(pages, " ".join(f"{row['way']} {row['direction']} {row['us']:.1f}" for row in rows), flush=True)
            results.add("controller", rows, "overhead_rows")
    remember(results, "latency", swaps.controllers["latency"])
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
            for number in range(16):
                for checked, engine in ((True, always), (False, never)):
                    begin = time.perf_counter()
                    finish(engine.load(keys, target, stream=stream))
                    if number >= 4:
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
    bounds = options.profiles or ("noise", "lossless", "1e-3", "1e-2")
    for profile in [profile for profile in PROFILES if profile.name in bounds]:
        for pages in counts:
            with results.attempt("controller", f"host, {profile.name}, {pages} pages"):
                keep(results, "host", "host_", *measure(swaps, profile, pages, quick=options.quick))
    remember(results, "latency, host", swaps.controllers["latency"])
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
    parser.add_argument("--loads", default=LOADS, help=f"of {LOADS}")
    parser.add_argument("--pages", type=int, nargs="+", help="how many, in place of all")
    parser.add_argument("--profiles", nargs="+", help="bounds, in place of all", choices=[p.name for p in PROFILES])
    parser.add_argument("--commit", default="", help="what the results say of the source")
    options = parser.parse_args(argv)
    options.loads = options.loads.split(",")
    options.pages = options.pages or (list(PAGES) if not options.quick else [1, 16, 64])
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
    if "host" in options.loads:
        run_host(torch, results, cache, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
