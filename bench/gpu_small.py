# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Where the time of a small transfer goes: section ``small`` of gpu_transport.py.

A caller's time is split where the caller can: the view of the blocks is made, ``store`` or ``load`` returns, ``result``
returns. Beside it the same native call and the wait for its end, again and again with nothing between: what is left of
the time when the host's bookkeeping takes none.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from gpu_peers import PAGE_BYTES, Ints, Row
from gpu_ways import Kvzip, Kvzip1e3, KvzipLossless, TransportBench

from kvzip.benchmark import PATIENCE_SECONDS, Results, quantiles
from kvzip.small import Ticket

PAGES = (1, 8, 64)
SPIN_US = 1000
PARTS = ("view", "queue", "result", "whole")


def steps(way: Kvzip, chosen: Sequence[Ints], direction: str, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each part of transfers, one after the other."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    clock = time.perf_counter
    source, target = way._views()
    for number in range(-len(chosen), repetitions):
        slot = number % len(chosen)
        if direction == "out":
            way.renew(chosen[slot], slot)
        keys = way._keys[slot]
        began = clock()
        blocks = (source if direction == "out" else target)[chosen[slot]]
        viewed = clock()
        call = way.engine.store if direction == "out" else way.engine.load
        transfer = call(keys, blocks, stream=way._stream)
        queued = clock()
        transfer.result(PATIENCE_SECONDS)
        ended = clock()
        if number >= 0:
            for part, seconds in zip(
                PARTS, (viewed - began, queued - viewed, ended - queued, ended - began), strict=True
            ):
                found[part].append(seconds)
    return found


@contextmanager
def watched(way: Kvzip, direction: str) -> Iterator[list[tuple[Ticket, tuple[Any, ...]]]]:
    """The tickets that transfers take meanwhile, and what their calls are given."""
    seen: list[tuple[Ticket, tuple[Any, ...]]] = []
    swap: Any = way.engine._devices["cuda:0"]
    plans = (swap._stores if direction == "out" else swap._loads)._plans.values()
    tickets = [ticket for plan in plans for ticket in plan.tickets.values()]
    calls = [ticket.call for ticket in tickets]

    def recorder(ticket: Ticket, call: Any) -> Callable[..., None]:
        def record(*args: Any) -> None:
            seen.append((ticket, args))
            call(*args)

        return record

    for ticket, call in zip(tickets, calls, strict=True):
        ticket.call = recorder(ticket, call)
    try:
        yield seen
    finally:
        for ticket, call in zip(tickets, calls, strict=True):
            ticket.call = call


def native(way: Kvzip, blocks: Ints, direction: str, repetitions: int) -> tuple[list[float], list[float]]:
    """Seconds of the native call of a transfer, and then until its end is seen."""
    source, target = way._views()
    with watched(way, direction) as seen:
        if direction == "out":
            way.renew(blocks, 0)
            way.engine.store(way._keys[0], source[blocks], stream=way._stream).result(PATIENCE_SECONDS)
        else:
            way.engine.load(way._keys[0], target[blocks], stream=way._stream).result(PATIENCE_SECONDS)
    ((ticket, args),) = seen
    call, wait, clock = ticket.call, ticket.wait, time.perf_counter
    calls, waits = [], []
    for _ in range(repetitions):
        began = clock()
        call(*args)
        queued = clock()
        assert wait(SPIN_US, int(PATIENCE_SECONDS * 1e6))
        ended = clock()
        calls.append(queued - began)
        waits.append(ended - queued)
    return calls, waits


LINE = (
    "{pages:4d} pages {direction:3s} {way:14s} {us:7.1f} us [{us_p10:.1f}, {us_p90:.1f}]: view {view_us:.1f}, queue "
    "{queue_us:.1f}, result {result_us:.1f}; native alone {native_us:.1f}: call {native_call_us:.1f}, then "
    "{native_wait_us:.1f}"
)


def section_small(bench: TransportBench, results: Results, options: argparse.Namespace) -> None:
    """Write the section's rows."""
    repetitions = 20 if options.quick else 300
    for kind in (Kvzip1e3, KvzipLossless):
        way = kind(bench)
        for pages in PAGES:
            way.pages = pages
            chosen = bench.selections(pages, 64)
            for direction in ("out", "in"):
                parts = steps(way, chosen, direction, repetitions)
                calls, waits = native(way, chosen[0], direction, repetitions)
                row: Row = {"way": way.name, "direction": direction, "pages": pages, "raw_bytes": pages * PAGE_BYTES}
                row |= quantiles(parts["whole"])
                row |= {f"{part}_us": float(np.median(parts[part])) * 1e6 for part in PARTS[:-1]}
                row |= {
                    "native_us": float(np.median(np.add(calls, waits))) * 1e6,
                    "native_call_us": float(np.median(calls)) * 1e6,
                    "native_wait_us": float(np.median(waits)) * 1e6,
                    "repetitions": repetitions,
                }
                print(LINE.format(**row), flush=True)
                results.add("small", [row])
            way.forget()
        way.close()
