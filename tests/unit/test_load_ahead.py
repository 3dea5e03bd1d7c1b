# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A large load's first copy begins before the load is checked: what is refused then leaves no trace."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_cuda import cuda_error
from test_device import BLOCKS, Rig

from kvzip import BlockNotFoundError, BlockView, ConfigError, CudaError, ErrorBound, LayoutError
from kvzip.device import BegunLoad


@pytest.fixture(params=[1, 3])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Records of all blocks, and staging memory that has seen them."""
    made = Rig(bound=ErrorBound.lossless(), chunk_blocks=8, slots=request.param)
    made.engine.store(made.keys, made.view).wait(10)
    made.engine.load(made.keys, made.view).wait(10)
    made.driver.calls.clear()
    yield made
    check_idle(made)
    made.poison()
    assert made.engine.load(made.keys, made.view).result(10).blocks == BLOCKS
    check_values(made)
    made.close()


def check_idle(rig: Rig) -> None:
    index = rig.engine._index
    assert index._loads == 0
    assert not any(entry.loads for entry in index._entries.values())
    assert index._leavable == rig.pool.stats().extent_bytes_used
    assert not rig.swap._turn.locked()
    assert not any(slot.busy for slot in rig.swap._transport.into._slots)


def check_values(rig: Rig, want: list[np.ndarray] | None = None) -> None:
    for array, original in zip(rig.arrays, want or rig.original, strict=True):
        assert np.array_equal(array, original)


def test_the_first_copy_comes_before_the_look_up_of_all_keys(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, copies = rig.engine._index.begin_load, []

    def note(keys: Any) -> Any:
        copies.append(rig.driver.calls.count("copy_between"))
        return begin(keys)

    monkeypatch.setattr(rig.engine._index, "begin_load", note)
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert copies == [1]


def test_an_unknown_key_at_the_end(rig: Rig) -> None:
    rig.poison()
    with pytest.raises(BlockNotFoundError) as caught:
        rig.engine.load([*rig.keys[:-1], b"nobody's"], rig.view)
    assert caught.value.keys == (b"nobody's",)
    assert rig.driver.calls.count("copy_between") == 1  # it had begun
    assert "decode_call" not in rig.driver.calls
    assert all((array == 0xA5A5).all() for array in rig.arrays)
    assert rig.engine.stats().missing_blocks == 1


def test_an_unknown_key_at_the_beginning(rig: Rig) -> None:
    with pytest.raises(BlockNotFoundError):
        rig.engine.load([b"nobody's", *rig.keys[1:]], rig.view)
    assert "copy_between" not in rig.driver.calls


def test_blocks_that_may_not_be_written(rig: Rig) -> None:
    with pytest.raises(LayoutError, match="repeats"):
        rig.engine.load(rig.keys, rig.view[[0] * BLOCKS])
    check_idle(rig)
    twice = BlockView([rig.tensors[0], rig.tensors[0]], "2NHD")
    with pytest.raises(LayoutError, match="share memory"):
        rig.engine.load(rig.keys, twice)


def test_blocks_of_another_layout(rig: Rig) -> None:
    other = BlockView(rig.tensors[:1], "2NHD")
    with pytest.raises(LayoutError, match="pages"):
        rig.engine.load(rig.keys, other).wait(10)


def test_a_record_that_is_replaced_meanwhile(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of the old one is under way: the new one is what the load brings."""
    begin = rig.engine._begin_load

    def replaced(names: Any, out: Any) -> Any:
        monkeypatch.undo()
        rig.engine.store(rig.keys[:1], rig.view[[1]]).wait(10)
        return begin(names, out)

    monkeypatch.setattr(rig.engine, "_begin_load", replaced)
    transfer = rig.engine.load(rig.keys, rig.view)
    assert transfer.result(10).blocks == BLOCKS
    want = [original.copy() for original in rig.original]
    for array in want:
        array[0] = array[1]
    check_values(rig, want)
    for array, original in zip(rig.arrays, rig.original, strict=True):
        array[:] = original
    rig.engine.store(rig.keys, rig.view).wait(10)


def test_records_of_several_kinds(rig: Rig) -> None:
    """The first records are alike, later ones are not: the load goes on without the copy that has begun."""
    rig.engine.store(rig.keys[-1:], rig.view[[BLOCKS - 1]], coding="raw").wait(10)
    rig.poison()
    assert rig.engine.load(rig.keys, rig.view).result(10).blocks == BLOCKS
    check_values(rig)


@pytest.mark.parametrize("error", [cuda_error(), ZeroDivisionError("unforeseen")])
def test_a_first_copy_that_fails(rig: Rig, error: Exception) -> None:
    rig.poison()
    rig.driver.fail["copy_between"] = error
    transfer = rig.engine.load(rig.keys, rig.view)
    with pytest.raises(CudaError if isinstance(error, CudaError) else Exception, match="failed"):
        transfer.wait(10)
    assert all((array == 0xA5A5).all() for array in rig.arrays)


def test_an_interrupt_at_the_first_copy(rig: Rig) -> None:
    rig.driver.fail["copy_between"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        rig.engine.load(rig.keys, rig.view)


def test_records_are_let_go_as_soon_as_they_have_moved(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, held = rig.driver.event_wait, []

    def note(event: int, spin_us: int, timeout_us: int) -> bool:
        if timeout_us == 0:  # nothing has ended before it is waited for
            return False
        while rig.swap._turn.locked():  # the worker may be here before the caller has let go of what it looked up first
            time.sleep(0)
        held.append(sum(entry.loads for entry in rig.engine._index._entries.values()))
        return wait(event, spin_us, timeout_us)

    monkeypatch.setattr(rig.driver, "event_wait", note)
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert held[0] == BLOCKS
    assert held[-1] == 0  # while the last decoder is waited for
    assert held == sorted(held, reverse=True)


def test_an_engine_that_is_closed_while_a_load_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(bound=ErrorBound.lossless(), chunk_blocks=8)
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.engine.load(rig.keys, rig.view).wait(10)
    begin, closing = rig.engine._begin_load, threading.Thread(target=rig.engine.close)

    def close_first(names: Any, out: Any) -> Any:
        closing.start()
        while not rig.engine._closing:
            pass
        return begin(names, out)

    monkeypatch.setattr(rig.engine, "_begin_load", close_first)
    with contextlib.suppress(ConfigError):  # who comes first
        rig.engine.load(rig.keys, rig.view).wait(10)
    closing.join(20)
    assert not closing.is_alive()
    rig.close()


def test_loads_of_several_threads(rig: Rig) -> None:
    parts = [rig.view[range(first, first + 4)] for first in range(0, BLOCKS, 4)]
    rig.poison()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                keys = rig.keys[4 * number : 4 * number + 4]
                if turn % 5 == number:
                    with pytest.raises(BlockNotFoundError):
                        rig.engine.load([*keys[:3], b"nobody's"], parts[number])
                rig.engine.load(keys, parts[number]).wait(20)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    check_values(rig)


def test_what_was_dropped_may_be_dropped_again(rig: Rig) -> None:
    begun = rig.swap.begin_load(rig.keys, rig.view)
    assert isinstance(begun, BegunLoad)
    assert rig.swap.begin_load(rig.keys, rig.view) is None  # one at a time
    begun.drop()
    begun.drop()
