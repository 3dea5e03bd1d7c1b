# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
# ruff: noqa: D102 - the methods of ways are described in `gpu_peers.Way`
"""Swaps between GPU and host: kvzip beside its peers, on the same pages of real KV data in one run.

Run ``python bench/gpu_transport.py --data CACHE.npy --out FOLDER`` on a machine with a GPU (about four minutes; with
``--quick`` a smoke run). Data, pages and peers are those of ``gpu_peers.py``. Sections, each with a file in FOLDER
that is named after the GPU, such as ``h200_transport.json``, and written as the rows come; what fails leaves a note:

* ``transport``: 1 to 16,384 pages of 64 KiB out and in, by every way (those at the settings of a fidelity, see
  gpu_ways.py, from a block of 64 pages on). kvzip's blocks have min(64, pages) pages. The
  time is a caller's: from the call of ``store`` or ``load`` until ``wait`` returns. Loads are compared with what they
  have to give. ``link_gb_per_s`` is what one plain copy of as many bytes reached in this run, ``efficiency`` the rate
  over ratio x link; ``cpu_s_per_gib`` is the time that all threads of the process computed.
* ``small``: where the time of 1 to 64 pages goes, on the host and natively (gpu_small.py).
* ``timeline``: where the time of a large transfer goes, by CUDA events around the copies of its chunks: before the
  first begins, while they move, between them, and after the last until the caller has the result.
* ``both``: 1 GiB out and 1 GiB in at the same time, again and again.
* ``codec``: the kernels alone, between CUDA events; ``ceiling_fraction`` compares raw plus encoded bytes with what a
  copy in device memory reads plus writes in this run. ``max_ctas_rows`` limits the thread blocks.
* ``interference``: how much longer a matrix product and a CUDA graph like a decoding step take beside a swap that
  never pauses. ``compute_priority`` is that of their stream (-1 goes before the swap's 0). ``traffic`` reads, writes
  and copies what such a swap at a ratio of 4 does, without any codec: less than that no codec costs.
* ``pool``: the time to make pinned memory, and the memory that an engine takes beside its pool.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_peers as peers
import numpy as np
from gpu_peers import MIB, PAGE_BYTES, TO_DEVICE, TO_HOST, Ints, Row, Unavailable, Way
from gpu_small import section_small
from gpu_ways import (
    MOST_PAGES_OF_BLOCK,
    WAYS,
    Kvzip,
    Kvzip1e2,
    Kvzip1e3,
    KvzipLossless,
    TransportBench,
    check_pages,
)

from kvzip import ErrorBound, _native
from kvzip.backends.base import EncodeRequest
from kvzip.backends.cuszp import coding_of
from kvzip.benchmark import (
    GIB,
    PATIENCE_SECONDS,
    Results,
    add_link,
    finish,
    gpu_name,
    host_environment,
    link_environment,
    quantiles,
    repeat,
    transfer_row,
)
from kvzip.driver import CrcArgs, DecodeArgs, EncodeArgs
from kvzip.errors import KvzipError
from kvzip.memory import PinnedMemory, Region
from kvzip.record import header_nbytes
from kvzip.staging import Staging

SECTIONS = ("pool", "transport", "small", "timeline", "both", "codec", "interference")
MAX_CTAS = (0, 16, 24, 32, 48, 64, 96)
GEMM_MAX_CTAS = (0, 32, 64)  # of these, beside the matrix product, which takes longer to measure
TRAFFIC_PAUSES = (0.0, 0.15e-3, 0.3e-3)  # seconds after a copy, beside compute
CLOCK_HZ = 1.7e9  # about, of the GPU


def environment(torch: Any, data: str, commit: str) -> Row:
    """What the figures depend on."""
    found = peers.environment(torch)
    found |= host_environment() | {
        "commit": commit,
        "data": data,
        "page": f"{peers.TOKENS} tokens x {peers.HEADS} heads x {peers.HEAD_DIM}, bfloat16",
    }
    return found | link_environment()


# ---- section transport


def measure(bench: TransportBench, way: Way, pages: int, *, quick: bool, limit_seconds: float = 0.7) -> list[Row]:
    """Store and load so many pages again and again, other pages every time, and check what came back."""
    torch = bench.torch
    case = peers.Case.of(pages, quick)
    warm = (max(3, min(20, 64 // pages)) if pages < 4096 else 2) if not quick else 1
    if isinstance(way, Kvzip):
        way.pages = pages
        chosen = bench.selections(pages, case.reps)
    else:
        slots = min(bench.count // pages, case.reps)
        chosen = [bench.order[k * pages : (k + 1) * pages] for k in range(slots)]
    rows: list[Row] = []
    for direction, call in (("out", way.store), ("in", way.load)):
        if direction == "in":
            bench.targets.zero_()
        torch.cuda.synchronize()
        gc.collect()

        def prepare(k: int, direction: str = direction, ids: list[Ints] = chosen) -> None:
            if direction == "out" and isinstance(way, Kvzip):
                way.renew(ids[k], k * pages)

        def move(k: int, call: Callable[[Ints, int], int] = call, ids: list[Ints] = chosen) -> int:
            return call(ids[k], k * pages)

        timing = repeat(
            move, len(chosen), repetitions=case.reps, warm=warm, limit_seconds=limit_seconds, prepare=prepare
        )
        chosen = chosen[: timing.used]  # what was stored, then what was loaded
        rows.append(transfer_row(way.name, direction, pages * PAGE_BYTES, timing, pages=pages))
    torch.cuda.synchronize()
    way.check(np.concatenate(chosen))
    if isinstance(way, Kvzip):
        way.forget()
    return rows


LINE = (
    "{pages:6d} pages {direction:3s} {way:14s} {us:10.1f} us [{us_p10:.1f}, {us_p90:.1f}] {gb_per_s:6.1f} GB/s "
    "ratio {ratio:.3f} cpu {cpu_s_per_gib:.4f} s/GiB"
)


def section_transport(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    ways: list[Way] = []
    for kind in WAYS:
        if options.ways and kind.name not in options.ways:
            continue
        with results.attempt("transport", kind.name):
            try:
                ways.append(kind(bench))
            except Unavailable as reason:
                results.note("transport", f"{kind.name} skipped: {reason}")
    results.note("transport", "a page has neighbouring heads of several layers: see real_pages of gpu_peers.py")
    for pages in options.pages:
        for way in [w for w in ways if pages >= getattr(w, "least_pages", 1)]:
            with results.attempt("transport", f"{way.name}, {pages} pages"):
                rows = measure(bench, way, pages, quick=options.quick)
                for row in rows:
                    print(LINE.format(**row), flush=True)
                results.rows("transport").extend(rows)
        add_link(results.rows("transport"))
        results.save("transport")
    for way in ways:
        with results.attempt("transport", f"{way.name}, its note"):
            if way.note():
                results.note("transport", f"{way.name}: {way.note()}")
            if isinstance(way, Kvzip):
                way.close()


# ---- section timeline


class Timeline:
    """Has a driver record events around the copies of each chunk. A context manager, from before the first transfer on.

    Args:
        driver: what the transfers use.
        stream: idle when `begin` is called.
    """

    MOST_COPIES = 64  # of a transfer, for which events are made before it begins

    def __init__(self, driver: Any, stream: int) -> None:
        self._driver, self._stream = driver, stream
        self._copy, self._outgoing = driver.copy_between, driver.outgoing
        self._start = driver.event_create(timing=True)
        self._idle: list[tuple[int, int]] = []
        self._pairs: list[tuple[int, int]] = []
        self._marked: list[Any] = []  # launches whose copies are marked by events of `_pairs`

    def __enter__(self) -> Timeline:
        self._driver.copy_between, self._driver.outgoing = self._watched, self._watched_outgoing
        return self

    def __exit__(self, *_: object) -> None:
        del self._driver.copy_between, self._driver.outgoing  # the methods of the class are back
        self._recycle()
        for event in (self._start, *(event for pair in self._idle for event in pair)):
            self._driver.event_destroy(event)

    def begin(self) -> None:
        """A transfer begins now."""
        self._recycle()
        while len(self._idle) < self.MOST_COPIES:
            self._idle.append((self._driver.event_create(timing=True), self._driver.event_create(timing=True)))
        self._driver.event_record(self._start, self._stream)

    def _pair(self) -> tuple[int, int]:
        self._pairs.append(self._idle.pop())
        return self._pairs[-1]

    def _watched(self, pieces: Any, after: int, done: int, stream: int) -> None:
        if not self._idle:  # no transfer that is measured
            self._copy(pieces, after, done, stream)
            return
        pair = self._pair()
        if after:
            self._driver.stream_wait_event(stream, after)
        self._driver.event_record(pair[0], stream)
        self._copy(pieces, after, done, stream)
        self._driver.event_record(pair[1], stream)

    def _watched_outgoing(self, calls: Sequence[Any], stream: int) -> Any:
        made = self._outgoing(calls, stream)
        begin = made.begin

        def marked(to: int, room_bytes: int) -> None:
            for call in calls if self._idle else ():
                call.mark(*self._pair())
                self._marked.append(call)
            begin(to, room_bytes)

        made.begin = marked
        return made

    def _recycle(self) -> None:
        for call in self._marked:
            call.mark(0, 0)
        self._idle += self._pairs
        self._marked.clear()
        self._pairs.clear()

    def read(self) -> list[tuple[float, float]]:
        """Begin and end of each chunk's copies, seconds since `begin`, of a transfer that has ended."""
        elapsed = self._driver.event_elapsed_seconds
        return [(elapsed(self._start, first), elapsed(self._start, last)) for first, last in self._pairs]


def parts_of(seconds: float, copies: Sequence[tuple[float, float]]) -> Row:
    """A transfer's time by what the link does meanwhile, in microseconds. Copies of two streams may overlap."""
    first = last = min(begin for begin, _ in copies)
    link = 0.0
    for begin, end in sorted(copies):
        link += max(0.0, end - max(begin, last))
        last = max(last, end)
    parts = {"us": seconds, "before_us": first, "link_us": link, "idle_us": last - first - link}
    return {k: v * 1e6 for k, v in {**parts, "after_us": seconds - last}.items()} | {"chunks": len(copies)}


def timeline_rows(bench: TransportBench, way: Kvzip, timeline: Timeline, pages: int, repetitions: int) -> list[Row]:
    """Medians of `repetitions` transfers of so many pages each way."""
    way.pages = pages
    chosen = bench.selections(pages, repetitions)
    rows: list[Row] = []
    for direction, call in (("out", way.store), ("in", way.load)):
        parts: list[Row] = []
        for number in range(-2, repetitions):
            slot = number % len(chosen)
            if direction == "out":
                way.renew(chosen[slot], slot)
            timeline.begin()
            start = time.perf_counter()
            call(chosen[slot], slot)
            seconds = time.perf_counter() - start
            copies = timeline.read()
            if number >= 0 and copies:
                parts.append(parts_of(seconds, copies))
        row: Row = {"way": way.name, "direction": direction, "pages": pages, "raw_bytes": pages * PAGE_BYTES}
        rows.append(row | {k: float(np.median([p[k] for p in parts])) for k in parts[0]} | {"repetitions": len(parts)})
    way.forget()
    return rows


def section_timeline(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    chosen = [way for way in WAYS if issubclass(way, Kvzip) and way.name in options.ways]
    for kind in chosen or [Kvzip1e3, Kvzip1e2, KvzipLossless]:
        try:
            way = kind(bench)
        except Unavailable as reason:
            results.note("timeline", f"{kind.name} skipped: {reason}")
            continue
        pages_of = [n for n in options.pages if n * PAGE_BYTES > Staging().small_bytes]
        try:
            with Timeline(way.engine._device("cuda:0").driver, bench.kernels.cuda_stream) as timeline:
                for pages in pages_of:
                    with results.attempt("timeline", f"{way.name}, {pages} pages"):
                        rows = timeline_rows(bench, way, timeline, pages, 3 if options.quick else 15)
                        results.add("timeline", rows)
                        for row in rows:
                            print(
                                "{pages:6d} pages {direction:3s} {way:14s} {us:8.0f} us: before {before_us:.0f}, link "
                                "{link_us:.0f}, idle {idle_us:.0f}, after {after_us:.0f}".format(**row),
                                flush=True,
                            )
        finally:
            way.close()


# ---- swaps that go on

Start = Callable[[], Callable[[], None]]  # starts a swap, returns what waits for it


class Background(threading.Thread):
    """Starts swaps again and again, two under way, until `stop`.

    Args:
        start: starts one and returns a function that waits for it.
        raw_bytes: raw bytes of one.
    """

    def __init__(self, start: Start, raw_bytes: int) -> None:
        super().__init__(daemon=True)
        self._begin, self._raw_bytes = start, raw_bytes
        self._halt = threading.Event()
        self.ended: list[float] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        pending: deque[Callable[[], None]] = deque()
        try:
            while not self._halt.is_set():
                pending.append(self._begin())
                if len(pending) > 1:
                    pending.popleft()()
                    self.ended.append(time.perf_counter())
            while pending:
                pending.popleft()()
        except BaseException as error:
            self.error = error

    def settle(self, swaps: int = 3) -> None:
        """Return when so many swaps have ended."""
        deadline = time.perf_counter() + PATIENCE_SECONDS
        while len(self.ended) < swaps:
            if self.error is not None or time.perf_counter() > deadline:
                raise RuntimeError("the swap in the background does not run") from self.error
            time.sleep(0.001)

    def gb_per_s(self, begin: float, end: float) -> float:
        """Raw bytes a second between two times, by the swaps that ended there."""
        times = [t for t in list(self.ended) if begin <= t <= end]
        if len(times) < 2:
            raise RuntimeError(f"{len(times)} swaps ended in {end - begin:.2f} s: give it more time")
        return (len(times) - 1) * self._raw_bytes / (times[-1] - times[0]) / 1e9

    def stop(self) -> None:
        self._halt.set()
        self.join(PATIENCE_SECONDS)
        if self.error is not None or self.is_alive():
            raise RuntimeError("the swap in the background failed") from self.error


def raw_swap(bench: TransportBench, pages: int, direction: str, stream: Any) -> Start:
    """One plain copy; the way in reads other host memory than the way out writes."""
    nbytes = pages * PAGE_BYTES
    into = bench.pool.address  # one piece of its registration is 1 GiB: no copy crosses it

    def start() -> Callable[[], None]:
        step = min(nbytes, GIB)
        for at in range(0, nbytes, step):
            if direction == "out":
                page, host = int(bench.pages.data_ptr()) + at, bench.host_address + at
                bench.cudart.copy(host, page, min(step, nbytes - at), TO_HOST, stream.cuda_stream)
            else:
                page, host = int(bench.targets.data_ptr()) + at, into + at
                bench.cudart.copy(page, host, min(step, nbytes - at), TO_DEVICE, stream.cuda_stream)
        event = bench.torch.cuda.Event(blocking=True)
        event.record(stream)
        wait: Callable[[], None] = event.synchronize
        return wait

    return start


class Traffic:
    """The device memory's part of a swap at a ratio of 4, and nothing else: what a codec without any work would cost.

    Out, a kernel reads a chunk of pages and writes a quarter of that to an arena, which the copy engine reads; in, the
    copy engine writes the quarter, and a kernel reads it and writes the chunk. `pause` seconds after each copy make the
    link slower. Pages are read, targets are written; the values mean nothing.
    """

    RATIO = 4
    CHUNK_BYTES = Staging.chunk_bytes
    SLOTS = Staging.slots

    def __init__(self, bench: TransportBench, pages: int, pause: float = 0.0) -> None:
        torch = bench.torch
        self._bench, self._pause = bench, pause
        self._chunk = min(pages * PAGE_BYTES, self.CHUNK_BYTES)
        self._chunks = pages * PAGE_BYTES // self._chunk
        shape = (-1, self.RATIO, self._chunk // self.RATIO // 4)
        self._pages, self._targets = (t.view(torch.float32).view(shape) for t in (bench.pages, bench.targets))
        self._arenas = [torch.zeros_like(self._pages[0, 0]) for _ in range(self.SLOTS)]

    def start_of(self, direction: str) -> Start:
        """Starts a swap of all pages."""
        torch, cudart = self._bench.torch, self._bench.cudart
        kernels, copies = torch.cuda.Stream(), torch.cuda.Stream()
        moved, used = ([torch.cuda.Event() for _ in self._arenas] for _ in range(2))  # by the copy, by the kernel
        nbytes, host = self._chunk // self.RATIO, self._bench.host_address

        def copy(slot: int, chunk: int) -> None:
            arena, there = int(self._arenas[slot].data_ptr()), host + chunk * nbytes
            to, source, kind = (there, arena, TO_HOST) if direction == "out" else (arena, there, TO_DEVICE)
            copies.wait_event(used[slot])
            cudart.copy(to, source, nbytes, kind, copies.cuda_stream)
            moved[slot].record(copies)
            if self._pause:
                with torch.cuda.stream(copies):
                    torch.cuda._sleep(round(self._pause * CLOCK_HZ))

        def work(slot: int, chunk: int) -> None:
            kernels.wait_event(moved[slot])
            with torch.cuda.stream(kernels):
                if direction == "out":
                    torch.sum(self._pages[chunk], 0, out=self._arenas[slot])
                else:
                    self._targets[chunk].copy_(self._arenas[slot])
            used[slot].record(kernels)

        def start() -> Callable[[], None]:
            for chunk in range(self._chunks):
                steps = (work, copy) if direction == "out" else (copy, work)
                for step in steps:
                    step(chunk % self.SLOTS, chunk)
            event = torch.cuda.Event(blocking=True)
            event.record(copies if direction == "out" else kernels)
            wait: Callable[[], None] = event.synchronize
            return wait

        return start


def kvzip_out(way: Kvzip, blocks: Ints) -> Start:
    """Store under fresh keys, discard when it has ended."""

    def start() -> Callable[[], None]:
        keys = way.fresh_keys(len(blocks))
        transfer = way.start_store(keys, blocks)

        def wait() -> None:
            finish(transfer)
            way.engine.discard(keys)

        return wait

    return start


@contextmanager
def kvzip_in(way: Kvzip, blocks: Ints) -> Iterator[Start]:
    """Load what is stored at first."""
    keys = way.fresh_keys(len(blocks))
    finish(way.start_store(keys, blocks))

    def start() -> Callable[[], None]:
        transfer = way.start_load(keys, blocks)

        def wait() -> None:
            finish(transfer)

        return wait

    try:
        with way.engine.pin(keys):
            yield start
    finally:
        way.engine.discard(keys)


def swap_of(bench: TransportBench, way: Kvzip | Traffic | None, pages: int, direction: str, stack: list[Any]) -> Start:
    """What a background runs: `way`, or the plain copy. Contexts that must be left afterwards go to the stack."""
    if isinstance(way, Traffic):
        return way.start_of(direction)
    if way is None:
        return raw_swap(bench, pages, direction, bench.copies if direction == "out" else bench.torch.cuda.Stream())
    way.pages = pages
    blocks = bench.selections(pages, 1)[0]
    if direction == "out":
        return kvzip_out(way, blocks)
    context = kvzip_in(way, blocks)
    stack.append(context)
    return context.__enter__()


@contextmanager
def swapping(
    bench: TransportBench, way: Kvzip | Traffic | None, pages: int, directions: Sequence[str]
) -> Iterator[Any]:
    """Swaps in the background, one thread a direction, that have settled."""
    stack: list[Any] = []
    running: list[Background] = []
    try:
        starts = [swap_of(bench, way, pages, direction, stack) for direction in directions]
        for start in starts:
            swap = Background(start, pages * PAGE_BYTES)
            swap.start()
            running.append(swap)
        for swap in running:
            swap.settle()
        yield running
    finally:
        try:
            for swap in running:
                swap.stop()
        finally:
            for context in reversed(stack):
                context.__exit__(None, None, None)


# ---- section both


def section_both(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    pages, seconds = max(options.pages), 0.3 if options.quick else 1.5
    for name in ("raw-link", "kvzip-1e-2"):
        with results.attempt("both", name):
            way = Kvzip1e2(bench) if name == "kvzip-1e-2" else None
            try:
                rates: dict[str, dict[str, float]] = {}
                for directions in (("out",), ("in",), ("out", "in")):
                    with swapping(bench, way, pages, directions) as running:
                        begin = time.perf_counter()
                        time.sleep(seconds)
                        end = time.perf_counter()
                        for direction, swap in zip(directions, running, strict=True):
                            kind = "both" if len(directions) > 1 else "alone"
                            rates.setdefault(direction, {})[kind] = swap.gb_per_s(begin, end)
                rows = [
                    {
                        "way": name,
                        "direction": direction,
                        "raw_bytes": pages * PAGE_BYTES,
                        "gb_per_s": found["both"],
                        "alone_gb_per_s": found["alone"],
                    }
                    for direction, found in rates.items()
                ]
                results.add("both", rows)
                for row in rows:
                    print(f"both ways at once: {row}", flush=True)
            finally:
                if way is not None:
                    way.close()


# ---- section codec


def on_device(bench: peers.Bench, call: Callable[[], object], repetitions: int) -> list[float]:
    """Seconds between events around calls that queue behind each other on the stream of the kernels."""
    torch = bench.torch
    with torch.cuda.stream(bench.kernels):
        for _ in range(3):
            call()
        torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host gets ahead
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


class KernelBench:
    """Memory and arguments of kvzip's kernels for one batch.

    Args:
        bench: pages and targets.
        pages: pages of the batch.
        bound: error bound.
        mode: encoding mode.
        max_ctas: limit of thread blocks.
    """

    def __init__(self, bench: TransportBench, pages: int, bound: ErrorBound, mode: str, max_ctas: int) -> None:
        from kvzip import _cuda

        self.bench, self.pages = bench, pages
        self.driver = _cuda.driver()
        torch = bench.torch
        view, target = bench.view(pages), bench.view(pages, targets=True)
        self.selections = bench.selections(pages, 3)
        blocks, per_block = len(self.selections[0]), len(view.layout.segments)
        coding = coding_of(EncodeRequest(bound, mode))
        segments = [_native.segments_array(v, bound, coding) for v in (view, target)]
        header = header_nbytes(view.layout)
        self.skip = -(-header // 16) * 16
        arena_bytes = self.driver.arena_bytes(segments[0], blocks, header)
        workspace_bytes = self.driver.workspace_bytes(per_block, blocks)

        def made(nbytes: int) -> Any:
            return torch.zeros(max(16, nbytes), dtype=torch.uint8, device=bench.device)

        self.device_segments = [torch.from_numpy(s.view(np.uint8).copy()).to(bench.device) for s in segments]
        self.ids = [torch.from_numpy(s.copy()).to(bench.device) for s in self.selections]
        self.arena, self.table, self.workspace = made(arena_bytes), made(16 * blocks * per_block), made(workspace_bytes)
        self.status, self.block_status = made(16), made(4 * blocks).view(torch.int32)
        self.sizes, self.offsets = made(8 * blocks).view(torch.int64), made(8 * blocks).view(torch.int64)
        self.crcs, self.crc_scratch = made(4 * blocks), made(8 * blocks)
        self.payloads = made(8 * blocks).view(torch.int64)
        self._turn = 0
        common: Row = {
            "num_blocks": blocks,
            "workspace": int(self.workspace.data_ptr()),
            "workspace_bytes": workspace_bytes,
            "table": int(self.table.data_ptr()),
            "payload_bytes": int(self.sizes.data_ptr()),
            "max_ctas": max_ctas,
        }
        self.encodes = [
            EncodeArgs(
                segments=segments[0],
                device_segments=int(self.device_segments[0].data_ptr()),
                block_ids=int(ids.data_ptr()),
                arena=int(self.arena.data_ptr()),
                arena_bytes=arena_bytes,
                header_bytes=header,
                record_offsets=int(self.offsets.data_ptr()),
                status=int(self.status.data_ptr()),
                **common,
            )
            for ids in self.ids
        ]
        self.decode_args = DecodeArgs(
            segments=segments[1],
            device_segments=int(self.device_segments[1].data_ptr()),
            block_ids=int(self.ids[0].data_ptr()),
            payloads=int(self.payloads.data_ptr()),
            block_status=int(self.block_status.data_ptr()),
            **common,
        )
        self.crc_args = CrcArgs(
            base=int(self.arena.data_ptr()),
            offsets=int(self.offsets.data_ptr()),
            skip=self.skip,
            payload_bytes=int(self.sizes.data_ptr()),
            crc32c=int(self.crcs.data_ptr()),
            scratch=int(self.crc_scratch.data_ptr()),
            max_payload_bytes=_native.max_payload_bytes(segments[0]),
            count=blocks,
            check=False,
            max_ctas=max_ctas,
        )
        torch.cuda.synchronize()

    def encode(self, which: int | None = None) -> None:
        """Encode one selection of blocks, by default each in its turn."""
        if which is None:
            self._turn = (self._turn + 1) % len(self.encodes)
            which = self._turn
        self.driver.encode(self.encodes[which], self.bench.kernels.cuda_stream)

    def decode(self) -> None:
        self.driver.decode(self.decode_args, self.bench.kernels.cuda_stream)

    def crc32c(self) -> None:
        self.driver.crc32c(self.crc_args, self.bench.kernels.cuda_stream)

    def run(self, repetitions: int, relative: float, name: str, ops: Sequence[str]) -> dict[str, Row]:
        """Time the kernels, and check what the decoder gives."""
        torch = self.bench.torch
        found: dict[str, Row] = {}
        if "encode" in ops:
            found["encode"] = quantiles(on_device(self.bench, self.encode, repetitions))
        self.encode(0)
        torch.cuda.synchronize()
        assert self.status.view(torch.int32)[0].item() == 0, f"{name}: the encoder's status is not 0"
        torch.add(self.offsets, int(self.arena.data_ptr()) + self.skip, out=self.payloads)
        self.bench.targets.zero_()
        torch.cuda.synchronize()
        if "decode" in ops:
            found["decode"] = quantiles(on_device(self.bench, self.decode, repetitions))
        if "crc32c" in ops:
            found["crc32c"] = quantiles(on_device(self.bench, self.crc32c, repetitions))
        if "decode" in ops:
            assert not self.block_status.any().item(), f"{name}: the decoder refused a block"
            numbers = self.bench.page_numbers(self.pages, self.selections[0])
            check_pages(self.bench, numbers, relative, name)
        return found

    @property
    def encoded_bytes(self) -> int:
        return int(self.sizes.sum().item())


def codec_row(
    name: str, op: str, pages: int, encoded: int, ceiling: float, times: Row, touched: int, **more: Any
) -> Row:
    """One row; `touched` is what the kernel has to read plus write."""
    raw = pages * PAGE_BYTES
    row: Row = {"codec": name, "op": op, "pages": pages, "raw_bytes": raw, "ratio": raw / encoded}
    row |= {"gb_per_s": raw / times["us"] / 1e3, "ceiling_gb_per_s": ceiling / 1e9}
    return row | {"ceiling_fraction": touched / (times["us"] * 1e-6) / ceiling} | times | more


CODECS = (
    ("kvzip-1e-3", 1e-3, "fixed"),
    ("kvzip-1e-2", 1e-2, "fixed"),
    ("kvzip-lossless", 0.0, "fixed"),
    ("kvzip-plain-1e-2", 1e-2, "plain"),
)


def kvzip_codec_rows(
    bench: TransportBench,
    codec: tuple[str, float, str],
    pages: int,
    ceiling: float,
    repetitions: int,
    *,
    max_ctas: int = 0,
    ops: Sequence[str] = ("encode", "decode", "crc32c"),
) -> list[Row]:
    name, relative, mode = codec
    bound = ErrorBound.relative(relative) if relative else ErrorBound.lossless()
    kernels = KernelBench(bench, pages, bound, mode, max_ctas)
    found = kernels.run(repetitions, relative, name, ops)
    encoded = kernels.encoded_bytes
    return [
        codec_row(
            name, op, pages, encoded, ceiling, times, encoded if op == "crc32c" else encoded + pages * PAGE_BYTES,
            max_ctas=max_ctas,
        )
        for op, times in found.items()
    ]  # fmt: skip


def triton_rows(bench: TransportBench, pages: int, relative: float, ceiling: float, repetitions: int) -> list[Row]:
    from kvzip.backends import triton as codec

    usable, reason = codec.available()
    if not usable:
        raise Unavailable(reason)
    torch, bound = bench.torch, ErrorBound.relative(relative)
    chosen = bench.selections(pages, 1)[0]
    view, target = bench.view(pages)[chosen], bench.view(pages, targets=True)[chosen]
    out = torch.empty(len(chosen) * codec.max_payload_bytes(view.layout), dtype=torch.uint8, device=bench.device)
    made: list[Any] = []

    def encode() -> None:
        made[:] = [codec.encode_blocks(view, bound, out=out)]

    def decode() -> None:
        made[1:] = [codec.decode_blocks(target, *made[0])]

    bench.targets.zero_()
    torch.cuda.synchronize()
    found = {
        op: quantiles(on_device(bench, call, repetitions)) for op, call in (("encode", encode), ("decode", decode))
    }
    codec.check_status(made[1])
    name = f"triton-{relative:g}".replace("-0.001", "-1e-3").replace("-0.01", "-1e-2")
    check_pages(bench, bench.page_numbers(pages, chosen), relative, name)
    encoded = int(made[0].payload_bytes.sum().item())
    return [
        codec_row(name, op, pages, encoded, ceiling, times, encoded + pages * PAGE_BYTES) for op, times in found.items()
    ]


def section_codec(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    repetitions = 5 if options.quick else 25
    seconds = on_device(bench, lambda: bench.targets.copy_(bench.pages), 15)
    ceiling = 2 * bench.count * PAGE_BYTES / float(np.median(seconds))
    results.note("codec", f"a copy in device memory reads plus writes {ceiling / 1e9:.0f} GB/s")

    def show(rows: Iterable[Row]) -> None:
        for row in rows:
            print(
                f"{row['codec']:17s} {row['op']:7s} {row['raw_bytes'] // MIB:5d} MiB {row['gb_per_s']:7.0f} GB/s, "
                f"ceiling x {row['ceiling_fraction']:.3f}, ratio {row['ratio']:.3f}, CTAs {row.get('max_ctas', 0)}",
                flush=True,
            )

    sizes = sorted({n for n in options.pages if n >= 4096}) or [max(options.pages)]
    for pages in sizes:
        for codec in CODECS:
            with results.attempt("codec", f"{codec[0]}, {pages} pages"):
                rows = kvzip_codec_rows(bench, codec, pages, ceiling, repetitions)
                results.add("codec", rows)
                show(rows)
    for codec in CODECS[:2]:
        for limit in (0, 8, 16, 32, 64, 132):
            with results.attempt("codec", f"{codec[0]}, at most {limit} CTAs"):
                rows = kvzip_codec_rows(
                    bench, codec, sizes[0], ceiling, min(10, repetitions), max_ctas=limit
                )  # fmt: skip
                results.add("codec", rows, "max_ctas_rows")
                show(rows)
    with results.attempt("codec", "nvcomp-ans"):
        try:
            rows = peers.NvcompAns(bench).codec_rows(5 if options.quick else 15)
            results.add("codec", rows)
            show(rows)
        except Unavailable as reason:
            results.note("codec", f"nvcomp-ans skipped: {reason}")
    for relative in (1e-3, 1e-2):
        with results.attempt("codec", "triton"):
            try:
                rows = triton_rows(bench, sizes[0], relative, ceiling, min(10, repetitions))
                results.add("codec", rows)
                show(rows)
            except Unavailable as reason:
                results.note("codec", f"triton skipped: {reason}")


# ---- section interference


class Gemm:
    """A product of random 8192 x 8192 matrices of bfloat16."""

    def __init__(self, torch: Any, size: int) -> None:
        self.torch, self.name = torch, f"gemm-{size}"
        self._a, self._b = (torch.randn(size, size, device="cuda").to(torch.bfloat16) for _ in range(2))
        self._out = torch.empty_like(self._a)

    def prepare(self, stream: Any) -> Callable[[], None]:
        """What runs it once on the current stream."""

        def launch() -> None:
            self.torch.mm(self._a, self._b, out=self._out)

        return launch


class DecodeStep:
    """A decoding step of a model of 8 billion parameters, as a CUDA graph: every byte is read once, little is computed.

    A layer: RMS norm, product with 4096 x 6144, attention over `context` tokens of 8 KV heads of 128, 4096 x 4096,
    RMS norm, 4096 x 28672, gate, 14336 x 4096. All weights and caches are memory of their own.
    """

    def __init__(self, torch: Any, layers: int, batch: int, context: int) -> None:
        self.torch, self.batch, self.name = torch, batch, f"decode-b{batch}"
        self.description = f"{layers} layers, batch {batch}, {context} tokens of context"

        def made(*shape: int) -> Any:
            return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)

        shapes = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
        self._weights = [[made(*shape) for shape in shapes] for _ in range(layers)]
        self._caches = [made(2, batch * 8, context, 128) for _ in range(layers)]
        self._gain = made(4096) + 1
        self._x = made(batch, 4096)
        self._kept: list[Any] = []

    def _step(self) -> Any:
        torch, norm = self.torch, self.torch.nn.functional.rms_norm
        x = self._x
        for (qkv, projection, up, down), cache in zip(self._weights, self._caches, strict=True):
            query = (norm(x, (4096,), self._gain) @ qkv)[:, :4096].reshape(self.batch * 8, 4, 128)
            weights = (torch.bmm(query, cache[0].transpose(1, 2)) * 128**-0.5).softmax(-1)
            x = x + torch.bmm(weights, cache[1]).reshape(self.batch, 4096) @ projection
            gate, value = (norm(x, (4096,), self._gain) @ up).chunk(2, -1)
            x = x + (torch.nn.functional.silu(gate) * value) @ down
        return x

    def prepare(self, stream: Any) -> Callable[[], None]:
        torch = self.torch
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):  # kernels keep the priority of the stream they are captured on
            self._kept.append(self._step())
        torch.cuda.synchronize()
        launch: Callable[[], None] = graph.replay
        return launch


class Compute:
    """Times a model's work on a stream of its own, in stretches that the host queues ahead."""

    def __init__(self, torch: Any, work: Gemm | DecodeStep, priority: int, stretch_seconds: float) -> None:
        self.torch, self.name, self.priority = torch, work.name, priority
        self._stream = torch.cuda.Stream(priority=priority)
        self._launch = work.prepare(self._stream)
        self._times = 3
        for _ in range(3):
            once = self.stretch()
        self._times = max(2, round(stretch_seconds / once))

    def stretch(self) -> float:
        """Seconds that the work takes once, over a stretch without a gap."""
        torch = self.torch
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            # Whatever the swap's threads do to this one, the stretch is queued when it begins.
            torch.cuda._sleep(6_000_000)
            begin.record()
            for _ in range(self._times):
                self._launch()
            end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / self._times


def beside(
    bench: TransportBench, compute: Compute, way: Kvzip | Traffic | None, direction: str, rounds: int, quick: bool
) -> Row:
    """The time of the compute beside a swap over that alone, in turn, `rounds` times.

    A matrix product draws so much power that clocks fall while it runs and rise in every pause: stretches count from
    the third on, beside a swap and alone.
    """
    pause, few, many = (0, 1, 3) if quick else (2, 3, 5)
    alone, loaded, rates = [], [], []

    def stretches(count: int) -> list[float]:
        return [compute.stretch() for _ in range(pause + count)][pause:]

    for _ in range(rounds):
        alone += stretches(few)
        with swapping(bench, way, bench.count, (direction,)) as (swap,):
            stretches(1)
            begin = time.perf_counter()
            loaded += [compute.stretch() for _ in range(many)]
            while len([t for t in list(swap.ended) if t >= begin]) < 4 and time.perf_counter() < begin + 5:
                loaded.append(compute.stretch())
            rates.append(swap.gb_per_s(begin, time.perf_counter()))
    alone += stretches(few)
    return {
        "direction": direction,
        "compute": compute.name,
        "slowdown": float(np.median(loaded) / np.median(alone)),
        "gb_per_s": float(np.median(rates)),
        "compute_priority": compute.priority,
        "compute_us": float(np.median(loaded)) * 1e6,
        "alone_us": float(np.median(alone)) * 1e6,
        "alone_spread": float((max(alone) - min(alone)) / np.median(alone)),
    }


def section_interference(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    torch = bench.torch
    ways: list[tuple[str, int, Kvzip | Traffic | None]] = [("raw-link", 0, None)]
    for pause in TRAFFIC_PAUSES[: 1 if options.quick else None]:
        ways.append(("traffic", 0, Traffic(bench, bench.count, pause)))
    for limit in options.max_ctas:
        with results.attempt("interference", f"kvzip-1e-2, at most {limit} CTAs"):
            ways.append(("kvzip-1e-2", limit, Kvzip1e2(bench, Staging(max_ctas=limit))))
    try:
        for kind in ("gemm", "decode"):
            with results.attempt("interference", kind):
                work: Gemm | DecodeStep
                if kind == "gemm":
                    work = Gemm(torch, 8192)
                else:
                    work = DecodeStep(torch, 4 if options.quick else 32, options.batch, options.context)
                    results.note("interference", f"{work.name}: {work.description}")
                rounds = 3 if kind == "gemm" and not options.quick else 1
                for priority in options.priorities:
                    compute = Compute(torch, work, priority, 0.02 if options.quick else 0.05)
                    for name, limit, way in ways:
                        if priority != options.priorities[0] and limit not in (0, 32):
                            continue
                        if kind == "gemm" and (isinstance(way, Traffic) or limit not in GEMM_MAX_CTAS):
                            continue
                        for direction in ("out", "in"):
                            with results.attempt("interference", f"{name} {direction} beside {work.name}"):
                                row = beside(bench, compute, way, direction, rounds, options.quick)
                                row = {"way": name, **row, "max_ctas": limit}
                                results.add("interference", [row])
                                print(
                                    f"{row['compute']:10s} priority {priority:2d} {name:10s} {direction:3s} "
                                    f"CTAs {limit:3d}: x {row['slowdown']:.3f} at "
                                    f"{row['gb_per_s']:.0f} GB/s "
                                    f"(alone {row['alone_us']:.0f} us, spread {row['alone_spread']:.3f})",
                                    flush=True,
                                )
                del work
                torch.cuda.empty_cache()
    finally:
        for _, _, way in ways:
            if isinstance(way, Kvzip):
                way.close()


# ---- section pool


@contextmanager
def counting(driver: Any, device: dict[int, int], host: list[int]) -> Iterator[None]:
    """Note what is allocated on the device and pinned on the host meanwhile."""
    malloc, free, allocate = driver.malloc, driver.free, PinnedMemory.allocate

    def counted_malloc(nbytes: int) -> int:
        address = int(malloc(nbytes))
        device[address] = nbytes
        return address

    def counted_free(address: int) -> None:
        device.pop(address, None)
        free(address)

    def counted_allocate(self: PinnedMemory, nbytes: int) -> Region:
        host.append(nbytes)
        return allocate(self, nbytes)

    driver.malloc, driver.free = counted_malloc, counted_free
    PinnedMemory.allocate = counted_allocate  # type: ignore[method-assign]
    try:
        yield
    finally:
        del driver.malloc, driver.free  # the methods of the class are back
        PinnedMemory.allocate = allocate  # type: ignore[method-assign]


def hidden_memory(bench: TransportBench) -> list[Row]:
    """Device memory that an engine takes; the first thing that a run does, or kernels are loaded already."""
    from kvzip import _cuda

    torch, driver = bench.torch, _cuda.driver()
    _ = bench.pool
    rows: list[Row] = []
    device: dict[int, int] = {}
    host: list[int] = []
    torch.cuda.synchronize()
    start = driver.memory()[0]

    def state(what: str) -> None:
        torch.cuda.synchronize()
        taken, asked = start - driver.memory()[0], sum(device.values())
        row: Row = {"what": what, "device_bytes": taken, "allocated_bytes": asked, "other_bytes": taken - asked}
        row["largest_allocations"] = sorted(device.values(), reverse=True)[:8]
        rows.append(row | {"pinned_host_bytes_so_far": sum(host)})

    with counting(driver, device, host):
        way = Kvzip1e2(bench)
        state("engine made")
        for pages in (1, bench.count):
            way.pages = pages
            blocks = bench.selections(pages, 1)[0]
            way.renew(blocks, 0)
            way.store(blocks, 0)
            state(f"{pages} pages stored")
            way.load(blocks, 0)
            state(f"{pages} pages loaded")
        way.close()
        state("engine closed")
    return rows


def pinned_row(gib: int, cold: bool) -> Row:
    """Seconds to make and to give back pinned memory; registration apart."""
    from kvzip import _cuda

    driver = _cuda.driver()
    register = 0.0

    def counted(address: int, nbytes: int) -> int:
        nonlocal register
        before = time.perf_counter()
        driver.host_register(address, nbytes)
        register += time.perf_counter() - before
        return 0

    def unregister(address: int) -> int:
        driver.host_unregister(address)
        return 0

    begin, processor = time.perf_counter(), time.process_time()
    region = PinnedMemory(register=counted, unregister=unregister).allocate(gib * GIB)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    begin = time.perf_counter()
    region.close()
    del region
    gc.collect()
    row: Row = {"way": "PinnedMemory", "bytes": gib * GIB, "seconds": seconds, "ms_per_gib": seconds / gib * 1e3}
    row |= {"register_seconds": register, "cpu_seconds": processor, "close_seconds": time.perf_counter() - begin}
    return row | {"first_in_process": cold}


def host_alloc_row(torch: Any, gib: int) -> Row:
    """cudaHostAlloc, which is what torch's pin_memory calls."""
    library = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
    library.cudaHostAlloc.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint]
    library.cudaFreeHost.argtypes = [ctypes.c_void_p]
    address = ctypes.c_void_p()
    begin = time.perf_counter()
    status = library.cudaHostAlloc(ctypes.byref(address), gib * GIB, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise RuntimeError(f"cudaHostAlloc failed with CUDA error {status}")
    library.cudaFreeHost(address)
    return {"way": "cudaHostAlloc", "bytes": gib * GIB, "seconds": seconds, "ms_per_gib": seconds / gib * 1e3}


def section_pool(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    with results.attempt("pool", "hidden memory"):
        rows = hidden_memory(bench)
        results.add("pool", rows, "memory_rows")
        for row in rows:
            print(f"memory: {row}", flush=True)
    made: list[Row] = []
    gib = 1 if options.quick else options.pool_gib
    while gib:
        try:
            # Twice: a virtual machine may get its memory from its host at the first touch only.
            for cold in (True, False):
                made.append(pinned_row(gib, cold))
            break
        except KvzipError as error:
            results.note("pool", f"{gib} GiB: {error}")
            gib //= 2
    with results.attempt("pool", "cudaHostAlloc"):
        made += [host_alloc_row(bench.torch, 1 if options.quick else 2) for _ in range(2)]
    results.add("pool", made)
    for row in made:
        print(f"pool: {row}", flush=True)


# ---- the table at the end


def table(parts: dict[str, Row]) -> list[str]:
    """The rows of all sections, compact."""
    lines: list[str] = []
    rows = parts.get("transport", {}).get("rows", [])
    sizes = sorted({r["pages"] for r in rows})
    for direction in ("out", "in"):
        found = {(r["way"], r["pages"]): r for r in rows if r["direction"] == direction}
        if found:
            lines += ["", f"{direction + ': GB/s (us)':16s}" + "".join(f"{n:>17d}" for n in sizes)]
        for way in dict.fromkeys(w for w, _ in found):
            own_rows = (found.get((way, n)) for n in sizes)
            text = (f"{r['gb_per_s']:.1f} ({r['us']:.0f})" if r else "-" for r in own_rows)
            lines.append(f"{way:16s}" + "".join(f"{t:>17s}" for t in text))
        for way in [w for w in dict.fromkeys(w for w, _ in found) if w.startswith("kvzip")]:
            parts_of_line = []
            for n in sizes:
                own = found.get((way, n))
                raw = [r["us"] for (w, m), r in found.items() if m == n and w.startswith("raw-") and w != "raw-link"]
                if own is None:
                    parts_of_line.append("-")
                elif n <= 512 and raw:
                    parts_of_line.append(f"{own['us'] / min(raw):.2f}x raw")
                else:
                    parts_of_line.append(f"eff {own['efficiency'] or 0:.3f}")
            ratio = found[way, max(n for w, n in found if w == way)]
            lines.append(
                f"  {way[6:]:14s}" + "".join(f"{t:>17s}" for t in parts_of_line)
                + f"  ratio {ratio['ratio']:.3f} cpu {ratio['cpu_s_per_gib']:.4f} s/GiB"
            )  # fmt: skip
    for row in parts.get("both", {}).get("rows", []):
        lines.append(
            f"both ways: {row['way']} {row['direction']} {row['gb_per_s']:.1f} (alone {row['alone_gb_per_s']:.1f}) GB/s"
        )
    codec = parts.get("codec", {})
    for row in codec.get("rows", []):
        lines.append(
            f"codec: {row['codec']:17s} {row['op']:7s} {row['raw_bytes'] // MIB:5d} MiB {row['gb_per_s']:6.0f} GB/s "
            f"ceiling x {row['ceiling_fraction']:.3f} ratio {row['ratio']:.3f}"
        )
    limited = codec.get("max_ctas_rows", [])
    for name, op in dict.fromkeys((r["codec"], r["op"]) for r in limited):
        cells = [f"{r['max_ctas']}: {r['gb_per_s']:.0f}" for r in limited if (r["codec"], r["op"]) == (name, op)]
        lines.append(f"codec: {name} {op}, GB/s by CTAs  " + "  ".join(cells))
    for row in parts.get("interference", {}).get("rows", []):
        lines.append(
            f"beside {row['compute']:10s} priority {row['compute_priority']:2d}: "
            f"{row['way']:10s} {row['direction']:3s} CTAs {row['max_ctas']:3d} "
            f"x {row['slowdown']:.3f} at {row['gb_per_s']:.0f} GB/s"
        )
    for row in parts.get("pool", {}).get("rows", []):
        lines.append(f"pool: {row['way']} {row['bytes'] // GIB} GiB {row['seconds']:.2f} s")
    for row in parts.get("pool", {}).get("memory_rows", []):
        lines.append(
            f"memory: {row['what']:20s} device {row['device_bytes'] / MIB:.1f} MiB = allocated "
            f"{row['allocated_bytes'] / MIB:.1f} + other {row['other_bytes'] / MIB:.1f}"
        )
    for part, content in parts.items():
        lines += [f"{part}: {note}" for note in content["notes"] if "failed" in note or "skipped" in note]
    return lines


def page_counts(text: str) -> list[int]:
    """Numbers of pages from an option."""
    try:
        found = sorted({int(n) for n in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers, separated by commas") from None
    for n in found:
        if n < 1 or (n > MOST_PAGES_OF_BLOCK and n % MOST_PAGES_OF_BLOCK):
            raise argparse.ArgumentTypeError(f"{n} pages: up to {MOST_PAGES_OF_BLOCK}, or a multiple of it")
    return found


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Names from an option, in the known order."""

    def parse(text: str) -> list[str]:
        names = [n for n in text.split(",") if n]
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: use {', '.join(known)}")
        return [n for n in known if n in names]

    return parse


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="KV cache, uint16 [layers, 2, tokens, heads, dim]")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--quick", action="store_true", help="few repetitions, less memory: a smoke run")
    parser.add_argument("--sections", type=names_of(SECTIONS), default=list(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--pages", type=page_counts, help="numbers of pages (default: 1 to 16384, quick: to 1024)")
    parser.add_argument(
        "--ways",
        type=names_of([w.name for w in WAYS]),
        default=[],
        help="of sections transport (default: all) and timeline",
    )
    parser.add_argument("--moments", type=Path, help="query moments of the cache's model, [layers, kv_heads, head_dim]")
    parser.add_argument("--plain", action="store_true", help="do not compile the torch functions of fp8 and int8")
    parser.add_argument("--batch", type=int, default=8, help="sequences of the decode-like graph (default: 8)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each (default: 2048)")
    parser.add_argument(
        "--priorities", type=lambda t: [int(p) for p in t.split(",")], default=[0],
        help="of the compute's stream, beside swaps of priority 0 (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--max-ctas", type=lambda t: [int(p) for p in t.split(",")], help="thread blocks of swaps beside compute"
    )
    parser.add_argument("--pool-gib", type=int, default=16, help="size of the pool in section pool (default: 16)")
    parser.add_argument("--commit", default="", help="what the results say of the source")
    parser.add_argument("--limit", type=float, default=570, help="seconds after which the run ends itself")
    options = parser.parse_args(argv)
    options.max_ctas = options.max_ctas or ([0, 32] if options.quick else list(MAX_CTAS))
    options.pages = options.pages or ([1, 8, 64, 1024] if options.quick else list(peers.PAGES))
    return options


SECTION: dict[str, Callable[[TransportBench, Results, argparse.Namespace], None]] = {
    "pool": section_pool,
    "transport": section_transport,
    "small": section_small,
    "timeline": section_timeline,
    "both": section_both,
    "codec": section_codec,
    "interference": section_interference,
}


def run(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    """All sections that are asked for; one that fails leaves a note."""
    for name in options.sections:
        begin = time.perf_counter()
        print(f"---- {name}", flush=True)
        with results.attempt(name, "the section"):
            SECTION[name](bench, results, options)
        print(f"---- {name}: {time.perf_counter() - begin:.1f} s", flush=True)
    print("\n".join(table(results.parts)), flush=True)


def give_up(results: Results, seconds: float) -> None:
    """End a run that takes too long, and show what it has."""
    faulthandler.dump_traceback()
    print("\n".join(table(dict(results.parts))), flush=True)
    print(f"not finished within {seconds:.0f} s", flush=True)
    os._exit(124)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = arguments(argv)
    try:
        import torch
    except ImportError:
        print("torch is not installed: this benchmark needs it, and a GPU", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("torch finds no GPU: this benchmark needs one", file=sys.stderr)
        return 1
    peers.Compiled.plain = options.plain
    found = environment(torch, options.data.name, options.commit)
    found["quick"] = options.quick
    results = Results(options.out, gpu_name(found["gpu"]), found)
    watchdog = threading.Timer(options.limit, give_up, (results, options.limit))
    watchdog.daemon = True
    watchdog.start()
    faulthandler.dump_traceback_later(options.limit + 15, exit=True)
    bench = TransportBench(torch, np.load(options.data), max(512, *options.pages), options.moments)
    run(bench, results, options)
    watchdog.cancel()
    faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main())
