# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Every record that left to make room is counted by exactly one store, also where stores fail or wait behind others."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest
from fake_cuda import cuda_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_device import BLOCKS, Rig

from kvzip import BlockView, ErrorBound, KvzipError, SwapEngine, Transfer
from kvzip.errors import NativeError

FAULTS: dict[str, list[Callable[[], Exception]]] = {  # made anew: an exception keeps frames, and they keep transfers
    "store_call": [cuda_error, lambda: NativeError("injected"), lambda: ZeroDivisionError("injected")],
    "event_wait": [cuda_error],
    "encode_call": [cuda_error, lambda: NativeError("injected")],
    "copy_between": [cuda_error],
}

Step = tuple[int, bool, tuple[str, int] | None]


@pytest.mark.parametrize("small", [False, True], ids=["worker", "small"])
@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(1, BLOCKS),  # blocks of the store
            st.booleans(),  # whether the next one waits for it
            st.none() | st.sampled_from([(name, i) for name, errors in FAULTS.items() for i in range(len(errors))]),
        ),
        min_size=1,
        max_size=12,
    ),
    capacity=st.integers(30_000, 120_000),
)
def test_every_eviction_counts_once(small: bool, steps: list[Step], capacity: int) -> None:
    rig = Rig(bound=ErrorBound.lossless(), small=small, capacity=capacity, reaper_seconds=0.02)
    numbers, stored, reported = itertools.count(), 0, 0
    waiting: list[tuple[int, Transfer]] = []

    def end() -> None:
        nonlocal stored, reported
        for count, transfer in waiting:
            with contextlib.suppress(KvzipError, ZeroDivisionError):
                reported += transfer.result(10).evicted
                stored += count
        waiting.clear()

    for count, waits, fault in [*steps, (1, True, None)]:
        if fault is not None:
            rig.driver.fail[fault[0]] = FAULTS[fault[0]][fault[1]]()
        keys = [b"%d" % next(numbers) for _ in range(count)]
        with contextlib.suppress(KvzipError, ZeroDivisionError):
            waiting.append((count, rig.engine.store(keys, rig.view[range(count)])))
        if waits:
            end()
            rig.driver.fail.clear()
    rig.driver.fail.clear()
    end()
    last = rig.engine.store([b"last"], rig.view[[0]]).result(10)  # what stores that failed have made leave
    vanished = stored + 1 - len(rig.engine.list_keys())
    assert reported + last.evicted == vanished == rig.engine.stats().evicted_blocks
    waiting = []
    rig.close()


def test_a_failed_store_in_host_memory_hands_its_evictions_on() -> None:
    """A copy into the pool fails after room was made for it."""
    rig = Rig()
    view = BlockView(rig.original, "2NHD", dtype="bfloat16")
    with SwapEngine(40_000, bound=ErrorBound.lossless()) as engine:
        while not engine.stats().evicted_blocks:
            engine.store([b"%d" % engine.stats().stored_blocks], view[[0]])
        before, write = engine.stats().evicted_blocks, engine.pool.write

        def broken(*args: object, **more: object) -> None:
            raise ZeroDivisionError("injected")

        engine.pool.write = broken  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            engine.store([b"lost", b"lost too"], view[[0, 1]])
        engine.pool.write = write  # type: ignore[method-assign]
        gone = engine.stats().evicted_blocks - before
        assert gone > 0
        result = engine.store([b"next"], view[[0]]).result()
        assert result.evicted == engine.stats().evicted_blocks - before >= gone
    rig.close()
