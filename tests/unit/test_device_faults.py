# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Faults of a GPU, of its threads and of the process, injected at every step of stores and loads (fake_cuda.py)."""

from __future__ import annotations

import contextlib
import ctypes
import dis
import gc
import linecache
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fake_cuda
import numpy as np
import pytest
from fake_cuda import FakeDriver, cuda_error
from test_device import BLOCKS, Rig, Zlib, given_away

import kvzip
from kvzip import (
    BlockView,
    ConfigError,
    CorruptRecordError,
    CudaError,
    ErrorBound,
    KvzipError,
    PoolExhaustedError,
    Transfer,
    TransferError,
)
from kvzip.errors import NativeError
from kvzip.policy import LRU
from kvzip.small import TICKETS, Ticket
from kvzip.staging import Staging
from kvzip.transfer import TransferResult
from kvzip.worker import Job, in_one_step

WAYS = pytest.mark.parametrize("small", [False, True], ids=["worker", "small"])
FATAL = ("cudaErrorIllegalAddress", 700)
LAST = 300  # more calls than the scenario makes


def exact_rig(small: bool, **settings: Any) -> Rig:
    return Rig(**{"bound": ErrorBound.lossless(), "small": small, "reaper_seconds": 0.001, **settings})


def count_calls(rig: Rig, fault: Callable[[str, int], BaseException | None]) -> list[str]:
    """Have every call of the device, and of the memory for its tables, ask `fault` first; returns their names."""
    names: list[str] = []
    real, allocate, lock = rig.driver._called, rig.swap._transport.resource.allocate, threading.Lock()

    def called(name: str, *, held: bool = True) -> None:
        if threading.current_thread().name.startswith("kvzip-small"):  # comes when it likes
            real(name, held=held)
            return
        with lock:
            names.append(name)
            number = len(names)
        error = fault(name, number)
        if error is not None:
            raise error
        real(name, held=held)

    def allocated(nbytes: int) -> Any:
        called("allocate", held=False)
        return allocate(nbytes)

    rig.driver._called = called  # type: ignore[method-assign]
    rig.swap._transport.resource.allocate = allocated  # type: ignore[method-assign]
    return names


def check_whole(rig: Rig) -> None:
    """Nothing is promised, nothing is protected, and the sums are those of the records."""
    stats, entries = rig.engine.stats(), rig.engine._index._entries.values()
    assert stats.pool.reserved_bytes == 0
    assert stats.pool.allocations == stats.records == len(entries)
    assert stats.pool.payload_bytes == stats.record_bytes == sum(e.allocation.nbytes for e in entries)
    assert rig.engine._index._leavable == stats.pool.extent_bytes_used
    assert rig.engine._index._loads == 0
    assert not any(entry.loads for entry in entries)
    rig.pool.check()


def run_scenario(rig: Rig) -> list[str]:
    """A store, one that replaces half of it and needs room, and two loads; what each of them ended with."""
    ended = []
    for name, work in (
        ("store", lambda: rig.engine.store(rig.keys[:6], rig.view[range(6)])),
        ("replace", lambda: rig.engine.store(rig.keys[3:9], rig.view[range(3, 9)])),
        ("load", lambda: rig.engine.load(rig.keys[6:9], rig.view[range(6, 9)])),
        ("again", lambda: rig.engine.load(rig.keys[6:9], rig.view[range(6, 9)])),  # begins before it is checked
    ):
        try:
            transfer = work()
            try:
                transfer.wait(20)
            except ZeroDivisionError:  # of this thread, as it was waiting: the transfer goes on
                transfer.wait(20)
            ended.append(name)
        except (KvzipError, ZeroDivisionError) as error:  # the latter in the caller's own thread
            ended.append(type(error).__name__)
    return ended


@WAYS
@pytest.mark.parametrize("error", ["transient", "fatal", "other"])
def test_a_fault_at_any_call_of_the_device(small: bool, error: str) -> None:
    """Each call in turn fails: with an error that passes, with one that stays, or with one that nobody foresaw."""
    failed_calls: set[str] = set()
    for at_call in range(1, LAST):
        rig = exact_rig(small, capacity=60_000, chunk_blocks=1, slots=2)
        original = [a.copy() for a in rig.original]

        def fault(name: str, number: int, at_call: int = at_call) -> BaseException | None:
            if error == "fatal" and number >= at_call:
                return cuda_error(*FATAL)
            if number != at_call:
                return None
            failed_calls.add(name)
            return cuda_error() if error == "transient" else ZeroDivisionError("injected")

        real = rig.driver._called, rig.swap._transport.resource.allocate
        calls = count_calls(rig, fault)
        ended = run_scenario(rig)
        errors = {"CudaError", "TransferError", "BlockNotFoundError"} | (
            {"ZeroDivisionError"} if error == "other" else set()
        )
        assert set(ended) <= {"store", "replace", "load", "again", *errors}
        assert error != "other" or "CudaError" not in ended
        check_whole(rig)
        hit = len(calls) >= at_call
        rig.driver._called, rig.swap._transport.resource.allocate = real  # type: ignore[method-assign]
        assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, original, strict=True))  # all loads were identical
        assert rig.engine.usable == (error != "fatal" or rig.swap.lost is None)
        if rig.engine.usable:
            rig.engine.discard(rig.keys)
            rig.engine.store(rig.keys[:9], rig.view[range(9)]).wait(20)
            rig.poison()
            rig.engine.load(rig.keys[:9], rig.view[range(9)]).wait(20)
            assert all(np.array_equal(a[:9], o[:9]) for a, o in zip(rig.arrays, original, strict=True))
        else:
            with pytest.raises(CudaError, match=r"GPU 0 is lost to this process.*start a new process"):
                rig.engine.store(rig.keys[:1], rig.view[[0]])
        del ended
        rig.close()  # everything was given back: device memory, events, streams
        if not hit:
            assert at_call > 15
            break
    else:
        raise AssertionError("the scenario makes more calls than were tried")
    if error == "transient":
        wanted = {"store_call"} if small else {"encode_call", "decode_call", "outgoing", "copy_between", "event_wait"}
        assert {"malloc", "event_create", "allocate", *wanted} <= failed_calls


@WAYS
def test_a_lost_gpu_is_said_and_the_engine_can_be_closed(small: bool, caplog: pytest.LogCaptureFixture) -> None:
    rig = exact_rig(small)
    rig.engine.store(rig.keys, rig.view).wait()
    assert rig.engine.usable
    fails = False
    count_calls(rig, lambda name, number: cuda_error(*FATAL) if fails else None)
    fails = True
    with pytest.raises(CudaError, match="IllegalAddress"):
        rig.engine.load(rig.keys, rig.view).wait(10)
    assert not rig.engine.usable
    for use in (rig.engine.store, rig.engine.load):
        with pytest.raises(CudaError, match="GPU 0 is lost to this process") as caught:
            use(rig.keys, rig.view)
        assert caught.value.fatal
    check_whole(rig)
    on_host = BlockView([a.copy() for a in rig.original], "2NHD", dtype="bfloat16")
    for tensor in on_host.tensors:
        tensor[:] = 0
    rig.engine.load(rig.keys, on_host)  # what is in host memory is there as before
    assert all(np.array_equal(a, o) for a, o in zip(on_host.tensors, rig.original, strict=True))
    assert caplog.text.count("GPU 0 is lost to this process") == 1
    rig.engine.close()
    assert "failed while its memory was given back" in caplog.text
    assert not rig.engine.usable
    rig.close()


def test_an_error_that_passes_is_no_loss() -> None:
    rig = exact_rig(False)
    rig.driver.fail["encode_call"] = cuda_error()
    with pytest.raises(CudaError) as caught:
        rig.engine.store(rig.keys, rig.view).wait(10)
    assert not caught.value.fatal
    assert rig.engine.usable
    del caught
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.close()


def test_half_queued_copies_end_before_their_place_is_given_away() -> None:
    """The device has some copies of a chunk when the call for them fails: the pool waits for these."""
    rig = exact_rig(False)
    rig.engine.store([b"before"], rig.view[[0]]).wait()
    real = rig.driver.copy_between

    def half(pieces: Any, after: int, done: int, stream: int) -> None:
        real(pieces[: len(pieces) // 2 + 1], after, done, stream)
        raise cuda_error()

    rig.driver.copy_between = half  # type: ignore[method-assign]
    synchronized = rig.driver.calls.count("stream_synchronize")
    with pytest.raises(CudaError):
        rig.engine.store(rig.keys, rig.view).wait(10)
    assert rig.driver.calls.count("stream_synchronize") == synchronized + 4  # all streams, before the bytes are free
    check_whole(rig)
    rig.driver.copy_between = real  # type: ignore[method-assign]
    rig.close()


def test_first_copies_end_before_their_place_is_given_away() -> None:
    """The device has the copy of the first chunk when the second one's fails."""
    rig = exact_rig(False, chunk_blocks=4)
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.engine.discard(rig.keys)
    called, copies = rig.driver._called, []

    def second_fails(name: str, *, held: bool = True) -> None:
        called(name, held=held)
        if name == "outgoing":
            copies.append(name)
            if len(copies) == 2:
                raise cuda_error()

    rig.driver._called = second_fails  # type: ignore[method-assign]
    synchronized = rig.driver.calls.count("stream_synchronize")
    with pytest.raises(CudaError):
        rig.engine.store(rig.keys, rig.view).wait(10)
    assert len(copies) == 2
    assert rig.driver.calls.count("stream_synchronize") == synchronized + 4
    check_whole(rig)
    assert rig.pool.stats().free_bytes == rig.pool.capacity_bytes
    rig.driver._called = called  # type: ignore[method-assign]
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.close()


@pytest.mark.parametrize("waits", [True, False])
def test_the_thread_that_stops_waiting_hands_the_transfer_on(waits: bool) -> None:
    """Whoever takes a transfer's steps wakes the worker when it leaves before the end, as at a timeout."""
    rig = exact_rig(False)
    for _ in range(4):  # somebody waited for the last one: the worker's thread leaves the next one to it
        rig.engine.store(rig.keys, rig.view).wait(10)
    rig.driver.hold.clear()
    transfer = rig.engine.store(rig.keys, rig.view)
    if waits:
        assert not transfer.wait(0.05)
    rig.driver.hold.set()
    deadline = time.monotonic() + 10
    while not transfer.done() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert transfer.done()
    del transfer
    rig.close()


SIZES = {
    "too large": lambda sizes, offsets: sizes.__setitem__(-1, 1 << 40),
    "next to nothing": lambda sizes, offsets: sizes.__setitem__(0, 16),
    "beside each other": lambda sizes, offsets: offsets.__setitem__(-1, int(offsets[-1]) + 256),
    "out of the arena": lambda sizes, offsets: offsets.__setitem__(-1, 1 << 50),
    "not at the beginning": lambda sizes, offsets: offsets.__iadd__(np.uint64(256)),
}


@pytest.mark.parametrize("extent_bytes", [64, 256])
@pytest.mark.parametrize("always", [False, True], ids=["once", "always"])
@pytest.mark.parametrize("damage", SIZES)
def test_a_damaged_table_of_sizes(
    damage: str, always: bool, extent_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are made by these numbers: no byte moves by wrong ones. The blocks are kept raw, or the store fails."""
    rig = exact_rig(False, chunk_blocks=4, extent_bytes=extent_bytes)
    rig.engine.store([b"before"], rig.view[[0]]).wait()
    encode, hits = FakeDriver.encode, []

    def damaged(driver: FakeDriver, a: Any, stream: int) -> None:
        encode(driver, a, stream)
        if a.num_blocks > 1 and (always or not hits):
            hits.append(1)
            words = (fake_cuda.at(at, np.uint64, a.num_blocks) for at in (a.payload_bytes, a.record_offsets))
            SIZES[damage](*words)

    monkeypatch.setattr(FakeDriver, "encode", damaged)
    transfer = rig.engine.store(rig.keys, rig.view)
    if always:
        with pytest.raises(NativeError, match=r"table of sizes of \d+ blocks .* contradicts itself"):
            transfer.result(10)
    else:
        assert transfer.result(10).fallbacks == {"encoder_failed": 4 * BLOCKS}
    assert hits
    check_whole(rig)
    assert rig.engine.contains(b"before")
    monkeypatch.undo()
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    del transfer
    rig.close()


@pytest.mark.parametrize("damage", ["too large", "next to nothing"])
def test_a_damaged_table_of_sizes_of_a_small_store(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be fails the store; what could be is found by the checksum when it is loaded."""
    rig = exact_rig(True, reaper_seconds=5)
    rig.engine.store([b"before"], rig.view[[0]]).wait()
    transfer = rig.engine.store(rig.keys, rig.view)
    (ticket,) = [a for a in rig.swap._small_out._pending[-1][1].args if isinstance(a, Ticket)]  # type: ignore[attr-defined]
    SIZES[damage](ticket.arrays[1], None)
    if damage == "too large":
        with pytest.raises(NativeError, match=r"table of sizes of 12 blocks .* contradicts itself"):
            transfer.result(10)
        check_whole(rig)
    else:
        transfer.result(10)
        with pytest.raises(CorruptRecordError) as caught:
            rig.engine.load(rig.keys, rig.view).wait(10)
        assert 0 in caught.value.blocks
        del caught
    rig.engine.discard(rig.keys)
    rig.engine.store(rig.keys, rig.view).wait(10)
    del transfer, ticket
    rig.close()


def test_damaged_records_that_the_host_decodes() -> None:
    """Those of a third party's codec, among others: the good ones are loaded all the same."""
    rig = exact_rig(False, codec=Zlib())
    rig.engine.store(rig.keys[:8], rig.view[range(8)]).wait(10)
    rig.engine.configure(codec="raw")
    rig.engine.store(rig.keys[8:], rig.view[range(8, BLOCKS)]).wait(10)
    rig.engine.load(rig.keys, rig.view).wait(10)
    decoded = [a.copy() for a in rig.arrays]
    for place in (2, 5, 9):
        entry = rig.engine._index.find([rig.keys[place]])[0]
        rig.pool.views(entry.allocation)[0][-1] ^= 4
    rig.poison()
    with pytest.raises(CorruptRecordError, match="3 of 12 records are damaged") as caught:
        rig.engine.load(rig.keys, rig.view).wait(10)
    assert caught.value.blocks == (2, 5, 9)
    good = [i for i in range(BLOCKS) if i not in (2, 5, 9)]
    for array, wanted in zip(rig.arrays, decoded, strict=True):
        assert np.array_equal(array[good], wanted[good])
        assert (array[[2, 5, 9]] == 0xA5A5).all()
    assert rig.engine.stats().corrupt_blocks == 3
    del caught
    rig.close()


# ---- dropped


def released(rig: Rig) -> bool:
    """Whether the GPU's memory and the threads are given back, within a while."""
    names, deadline = ("kvzip-out-0", "kvzip-in-0", "kvzip-small-0"), time.monotonic() + 10
    while time.monotonic() < deadline:
        threads = [t.name for t in threading.enumerate() if t.name in names]
        if not (rig.driver.memory or rig.driver.events or rig.driver.streams or threads):
            return True
        time.sleep(0.002)
    return False


def drop(rig: Rig) -> None:
    del rig.engine, rig.swap
    gc.collect()


@WAYS
def test_an_engine_that_is_dropped_gives_back_threads_and_memory(small: bool) -> None:
    rig = exact_rig(small)
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert rig.driver.memory
    with pytest.warns(ResourceWarning, match="an engine that used a GPU was not closed"):
        drop(rig)
    assert released(rig)
    assert rig.pool.stats().allocations > 0  # the pool is its owner's
    rig.pool.close()


@WAYS
@pytest.mark.parametrize("held", [False, True], ids=["let go", "kept"])
def test_a_transfer_under_way_keeps_its_engine(small: bool, held: bool) -> None:
    rig = exact_rig(small)
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.engine.load(rig.keys, rig.view).wait(10)
    rig.driver.hold.clear()
    loading = rig.engine.load(rig.keys[:4], rig.view[range(4)])
    alive, free = weakref.ref(rig.engine), rig.pool.free_bytes
    storing = rig.engine.store([b"more", b"and more"], rig.view[[4, 5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        drop(rig)
        assert alive() is not None
    if not held:
        del loading, storing
    rig.driver.hold.set()
    if held:
        assert loading.result(10).blocks == 4
        assert storing.result(10).blocks == 2
        assert rig.pool.free_bytes < free
        del loading, storing

    def collect() -> None:
        deadline = time.monotonic() + 10
        while alive() is not None and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.002)

    with pytest.warns(ResourceWarning):
        collect()
    assert alive() is None
    assert released(rig)
    rig.pool.close()


def test_an_engine_may_be_collected_in_its_own_thread() -> None:
    rig = exact_rig(False)
    rig.engine.store(rig.keys, rig.view).wait(10)
    worker, alive, collected = rig.swap._out, weakref.ref(rig.engine), Transfer()

    def collect() -> TransferResult:
        gc.collect()
        return TransferResult(0, 0, 0, 0.0)

    gc.disable()
    try:
        del rig.engine, rig.swap
        worker.submit(Job(in_one_step(collect), lambda: None, collected, "store"))
        with pytest.warns(ResourceWarning):
            collected.result(10)
    finally:
        gc.enable()
    assert alive() is None
    assert released(rig)
    rig.pool.close()


# ---- interrupted


class Alarm(Exception):
    """What a program's own signal handler raises."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@WAYS
def test_a_wait_that_a_signal_ends_leaves_the_transfer_alone(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device still writes: its bytes and pages must not be given away, and the program's exception is its own."""
    monkeypatch.setattr("kvzip.transfer._PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr("kvzip.transfer._PATIENCE_US", 10_000)
    monkeypatch.setattr("kvzip.worker._PATIENCE_SECONDS", 0.01)
    rig = exact_rig(small, reaper_seconds=5e-3)
    rig.engine.store(rig.keys, rig.view).wait(10)
    rig.engine.load(rig.keys, rig.view).wait(10)
    rig.driver.hold.clear()
    storing = rig.engine.store([b"more"], rig.view[[0]])
    with pytest.raises(Alarm), alarm(0.05):
        storing.wait()
    assert not storing.done()
    rig.driver.hold.set()
    assert storing.result(10).blocks == 1
    rig.poison()
    rig.driver.hold.clear()
    loading = rig.engine.load([b"more"], rig.view[[0]])
    with pytest.raises(Alarm), alarm(0.05):
        loading.wait(20)
    rig.driver.hold.set()
    loading.wait(10)
    assert all(np.array_equal(a[0], o[0]) for a, o in zip(rig.arrays, rig.original, strict=True))
    check_whole(rig)
    del storing, loading
    rig.close()


@WAYS
@pytest.mark.parametrize("timeout", ["1", "soon", [], object()])
def test_a_timeout_that_is_no_number(small: bool, timeout: Any) -> None:
    rig = exact_rig(small)
    rig.driver.hold.set()
    transfer = rig.engine.store(rig.keys, rig.view)
    if timeout == "1":
        assert transfer.wait(timeout)
    else:
        with pytest.raises(ConfigError, match="give seconds, or None"):
            transfer.wait(timeout)
    assert transfer.result(float("inf")).blocks == BLOCKS
    del transfer
    rig.close()


FILES = {str(Path(kvzip.__file__).with_name(f"{name}.py")) for name in ("device", "small", "transfer", "worker")}


def interrupt(number: int, work: Callable[[], object]) -> bool:
    """Do it with a KeyboardInterrupt where Python may raise one in these files, the n-th time; whether it came so far.

    Python looks for signals behind calls of what is not Python, where loops begin anew, and where functions begin.
    Before its first `try` a function can do nothing about one, nor between a lock's `acquire` or a list's `pop` and the
    `try` behind it, nor where a `with` has let a lock go.
    """
    seen, came, looks = 0, False, False

    def local(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal seen, came, looks
        if event == "opcode":
            code, line = frame.f_code, linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)
            name = dis.opname[code.co_code[frame.f_lasti]]
            seen += looks
            if seen == number and not came:
                came = True
                raise KeyboardInterrupt
            safe = "acquire(" in line or ".pop()" in line or line.lstrip().startswith("with ")
            looks = name.startswith(("CALL", "JUMP_BACKWARD")) and not safe
        return local

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal looks
        looks = False  # not where a function of Python's returns to
        frame.f_trace_opcodes = frame.f_code.co_filename in FILES
        return local if frame.f_trace_opcodes else None

    gc.disable()  # or it interrupts a finalizer of another test
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt, TransferError):  # the latter of one whose end was interrupted
            work()
    finally:
        sys.settrace(None)
        gc.enable()
    return came


@WAYS
@pytest.mark.parametrize("waits", [False, True], ids=["queued", "waited for"])
@pytest.mark.parametrize("what", ["store", "load"])
def test_ctrl_c_at_any_step_of_a_transfer(what: str, waits: bool, small: bool) -> None:
    """No byte is given away that the device still uses, and nothing is left behind."""
    rig = exact_rig(small, capacity=200_000, reaper_seconds=0.001)
    rig.engine.store(rig.keys[:4], rig.view[range(4)]).wait(10)
    rig.engine.load(rig.keys[:4], rig.view[range(4)]).wait(10)
    synchronize = rig.driver.stream_synchronize

    def finish(stream: int) -> None:
        rig.driver.hold.set()
        synchronize(stream)

    rig.driver.stream_synchronize = finish  # type: ignore[method-assign]
    begun: list[Transfer] = []

    def work() -> None:
        use = rig.engine.store if what == "store" else rig.engine.load
        begun.append(use([b"new"] if what == "store" else rig.keys[:1], rig.view[[5 if what == "store" else 0]]))
        if waits:
            begun[0].wait(10)

    for number in range(1, 2000):
        begun.clear()
        if not waits:
            rig.driver.hold.clear()  # the device has not come to it yet
        came = interrupt(number, work)
        with given_away(rig.pool) if small else contextlib.nullcontext([]) as parts:
            rig.driver.hold.set()
            rig.driver._work()
            assert all((part == 0x77).all() for part in parts), f"step {number}: written to what was given away"
        rig.swap._small_out.drain()
        rig.swap._small_into.drain()
        for worker in (rig.swap._out, rig.swap._into):
            deadline = time.monotonic() + 5
            while worker.busy:
                assert time.monotonic() < deadline, f"step {number}: a job that never ends"
                time.sleep(0.0001)
        with contextlib.suppress(TransferError):
            assert all(transfer.wait(10) for transfer in begun), f"step {number}: a transfer that never ends"
        assert not rig.engine._store_lock.locked()
        assert not rig.swap._turn.locked()
        assert rig.engine._index._loads == 0
        for direction in filter(None, (rig.swap._stores, rig.swap._loads)):
            assert len(direction._free) == TICKETS
        rig.engine.discard([b"new"])
        check_whole(rig)
        if not came:
            break
    else:
        raise AssertionError("a small transfer has more steps than were tried")
    assert number > 10
    begun.clear()
    rig.poison()
    rig.engine.load(rig.keys[:4], rig.view[range(4)]).wait(10)
    assert all(np.array_equal(a[:4], o[:4]) for a, o in zip(rig.arrays, rig.original, strict=True))
    rig.close()


# ---- cancelled, closed


def test_a_transfer_that_waits_can_be_cancelled() -> None:
    rig = exact_rig(False)
    rig.engine.store(rig.keys, rig.view).wait()
    rig.driver.hold.clear()
    running = rig.engine.store([b"running"], rig.view[[0]])
    store = rig.engine.store([b"other", rig.keys[0]], rig.view[[1, 2]])
    rig.poison()  # of no matter to what is cancelled; the one that runs has queued nothing before
    loading = rig.engine.load(rig.keys[:2], rig.view[[4, 5]])
    load = rig.engine.load(rig.keys[2:4], rig.view[[6, 7]])
    deadline = time.monotonic() + 10
    while not (running._begun and loading._begun) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert store.cancel()
    assert load.cancel()
    assert [t.cancel() for t in (store, load)] == [False, False]  # they have ended
    assert not running.cancel()
    assert not loading.cancel()
    assert [t.done() for t in (running, loading, store, load)] == [False, False, True, True]
    for given_up in (store, load):
        with pytest.raises(TransferError, match="cancelled before it began: nothing was changed"):
            given_up.result()
        with pytest.raises(TransferError, match="cancelled"):
            given_up.wait_stream(7)
    assert [e.loads for e in rig.engine._index.find(rig.keys[:4])] == [1, 1, 0, 0]  # free to leave at once
    failures = rig.engine.metrics()
    rig.driver.hold.set()
    assert running.wait(10)
    assert loading.wait(10)
    assert not rig.engine.contains(b"other")
    assert all((a[[6, 7]] == 0xA5A5).all() for a in rig.arrays)
    assert not any(k.startswith("kvzip_failed_transfers_total") for k in failures.as_dict())  # no fault of anybody's
    rig.engine.store([b"later"], rig.view[[0]]).wait(10)  # the worker passed them over
    del running, loading, store, load, given_up
    rig.close()


def test_what_cannot_be_cancelled() -> None:
    rig = exact_rig(True)
    rig.engine.store(rig.keys[:1], rig.view[[0]]).wait()
    rig.driver.hold.clear()
    small = rig.engine.store(rig.keys[1:2], rig.view[[1]])
    assert not small.cancel()  # the device has it
    rig.driver.hold.set()
    assert small.wait(10)
    on_host = BlockView([a.copy() for a in rig.original], "2NHD", dtype="bfloat16")
    assert not rig.engine.store([b"host"], on_host[[0]]).cancel()
    del small
    rig.close()


@WAYS
def test_closing_beside_everything(small: bool) -> None:
    """Threads use the engine in every way while it is closed: each call ends, well or with an error of ours."""
    for turn in range(6):
        rig = exact_rig(small, capacity=90_000)
        rig.engine.store(rig.keys, rig.view).wait()
        failures: list[BaseException] = []
        begun, stop = threading.Barrier(6), threading.Event()

        def use(work: Callable[[int], object], begun: Any = begun, stop: Any = stop, failures: Any = failures) -> None:
            begun.wait()
            i = 0
            while not stop.is_set():
                i += 1
                try:
                    work(i)
                except KvzipError:
                    pass
                except BaseException as error:
                    failures.append(error)
                    return

        def pin(i: int, rig: Rig = rig) -> None:
            with rig.engine.pin(rig.keys[i % BLOCKS : i % BLOCKS + 1]):
                rig.engine.record_sizes(rig.keys)

        def store(i: int, rig: Rig = rig) -> None:
            rig.engine.store([b"%d" % i], rig.view[[i % 6]]).wait(10)

        def load(i: int, rig: Rig = rig) -> None:
            rig.engine.load([rig.keys[i % BLOCKS]], rig.view[[6 + i % 6]]).wait(10)

        def look(i: int, rig: Rig = rig) -> None:
            assert len(rig.engine.metrics().families) > 10
            rig.engine.list_keys()
            rig.engine.contains(b"1")
            rig.engine.read_record(rig.keys[i % BLOCKS])

        def discard(i: int, rig: Rig = rig) -> None:
            rig.engine.discard([b"%d" % i])

        threads = [threading.Thread(target=use, args=(w,)) for w in (pin, store, load, look, discard)]
        for thread in threads:
            thread.start()
        begun.wait()
        time.sleep(0.01 * turn)
        rig.engine.close()
        with pytest.raises(ConfigError, match="closed"):
            rig.engine.store(rig.keys, rig.view)
        stop.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert not failures, failures[0]
        assert rig.engine.stats().records == 0
        rig.close()


def test_metrics_of_a_closed_engine() -> None:
    """A scrape that comes after the end gets the last counters: it must not fail for all others in the process."""
    from kvzip import SwapEngine

    engine = SwapEngine(1 << 20, bound=ErrorBound.lossless())
    pages = np.random.default_rng(0).normal(size=(3, 2, 16, 2, 8)).astype(np.float16)
    engine.store([b"a", b"b", b"c"], BlockView([pages], "2NHD"))
    engine.close()
    assert engine.metrics().value("kvzip_store_blocks_total") == 3
    assert engine.metrics().value("kvzip_pool_capacity_bytes") == 1 << 20
    assert engine.stats().records == 0


# ---- threads


@pytest.mark.parametrize("busy", [False, True], ids=["between jobs", "within a job"])
def test_a_worker_outlives_what_is_raised_into_it(busy: bool) -> None:
    rig = exact_rig(False)
    rig.engine.store(rig.keys, rig.view).wait()
    thread = rig.swap._out._thread
    assert thread is not None
    if busy:
        rig.driver.hold.clear()
    transfer = rig.engine.store([b"struck"], rig.view[[0]]) if busy else None
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    rig.driver.hold.set()
    if transfer is not None:
        with contextlib.suppress(TransferError):
            transfer.wait(20)
        assert transfer.done()
    for i in range(3):  # the first wakes the thread, and with it what was raised
        later = rig.engine.store([b"later-%d" % i], rig.view[[i]])
        with contextlib.suppress(TransferError):
            later.wait(20)
        assert later.done()
    assert rig.engine.contains(b"later-2")
    assert thread.is_alive()
    check_whole(rig)
    del transfer, later
    rig.close()


def test_a_worker_that_is_gone_is_replaced() -> None:
    rig = exact_rig(False)
    rig.engine.store(rig.keys, rig.view).wait()
    worker = rig.swap._into
    rig.engine.load(rig.keys, rig.view).wait()
    first = worker._thread
    assert first is not None
    worker._closed = True
    worker._wake.put(None)
    first.join(10)
    worker._closed = False
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert worker._thread is not first
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    rig.close()


def test_the_reaper_outlives_errors(caplog: pytest.LogCaptureFixture) -> None:
    rig = exact_rig(True)
    rig.driver.fail["set_device"] = ZeroDivisionError("injected")
    rig.swap._reaper.IDLE_LOOKS = 1
    poll, calls = rig.swap._small_out.poll, []

    def failing() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("injected")
        poll()

    rig.swap._small_out.poll = failing  # type: ignore[method-assign]
    rig.swap._device = 0
    rig.driver.fail.clear()
    rig.engine.store(rig.keys, rig.view)  # nobody asks for its end
    deadline = time.monotonic() + 10
    while not rig.engine.contains(rig.keys[0]) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert rig.engine.contains(rig.keys[0])
    assert "kvzip-small-0 goes on after ZeroDivisionError: injected" in caplog.text
    rig.close()


# ---- what leaves for a store


@WAYS
def test_what_left_for_a_store_that_fails_stays_away(small: bool) -> None:
    rig = exact_rig(small, capacity=40_000)
    rig.engine.store(rig.keys[:6], rig.view[range(6)]).wait()
    before = rig.engine.stats()
    with pytest.raises(PoolExhaustedError):  # what does not fit at all makes nothing leave
        rig.engine.store([b"n%d" % i for i in range(BLOCKS)], rig.view).wait()
    after = rig.engine.stats()
    assert (after.records, after.evicted_blocks) == (before.records, before.evicted_blocks) == (6, 0)
    rig.swap._transport.out._staging = Staging(chunk_bytes=rig.view.layout.nbytes, slots=1)
    for call in ("copy_between", "store_call"):
        rig.driver.fail[call] = cuda_error()
    with contextlib.suppress(CudaError):
        rig.engine.store([b"n%d" % i for i in range(6)], rig.view[range(6)]).wait(10)
    rig.driver.fail.clear()
    stats = rig.engine.stats()
    assert stats.evicted_blocks > 0
    check_whole(rig)
    rig.close()


class Failing(LRU):
    """Fails at one of its insertions, as Ctrl-C does it."""

    fails_at = 0

    def insert(self, key: bytes, nbytes: int) -> None:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise KeyboardInterrupt
        super().insert(key, nbytes)


@pytest.mark.parametrize("way", ["host", "worker", "small"])
@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_a_store_that_is_interrupted_while_its_records_are_published(way: str, fails_at: int) -> None:
    policy = Failing()
    rig = exact_rig(way == "small", policy=policy)
    view = BlockView(rig.original, "2NHD", dtype="bfloat16") if way == "host" else rig.view
    rig.engine.store(rig.keys[:3], view[range(3)]).wait()
    with rig.engine.pin(rig.keys[:2]):
        policy.fails_at = fails_at
        with pytest.raises((KeyboardInterrupt, TransferError)):  # the first in the caller's thread
            rig.engine.store(rig.keys[1:6], view[range(1, 6)]).wait(10)
        assert rig.engine.list_keys() == rig.keys[:1]  # what was replaced is gone, what replaced it did not come
        assert rig.engine.stats().pinned == 1
    check_whole(rig)
    rig.engine.store(rig.keys, view).wait(10)
    rig.poison()
    rig.engine.load(rig.keys, rig.view).wait(10)
    assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original, strict=True))
    rig.close()


@WAYS
def test_a_pool_that_is_closed_before_its_engine(small: bool) -> None:
    rig = exact_rig(small)
    rig.engine.store(rig.keys, rig.view).wait()
    rig.pool.close()
    for use in (rig.engine.store, rig.engine.load):
        with pytest.raises(ConfigError, match="closed"):
            use(rig.keys, rig.view).wait(10)
    rig.engine.close()
    assert not rig.driver.memory
    assert not rig.driver.streams


def test_transfers_of_no_blocks() -> None:
    for small in (False, True):
        rig = exact_rig(small)
        assert rig.engine.store([], rig.view[[]]).result(10).blocks == 0
        assert rig.engine.load([], rig.view[[]]).result(10).blocks == 0
        check_whole(rig)
        rig.close()


def test_eviction_walks_the_policy_once_however_much_is_pinned() -> None:
    rig = exact_rig(False, capacity=2_000_000)
    view = BlockView([np.zeros((1, 2, 16, 1, 8), np.float16)], "2NHD")
    count = rig.pool.free_bytes // 512 + 1
    engine, steps = rig.engine, []
    engine.configure(codec="raw")
    for i in range(4000):
        engine.store([b"%d" % i], view)
    held = engine.list_keys()
    victims = engine._index._policy.victims

    def counted() -> Any:
        for key in victims():
            steps.append(key)
            yield key

    engine._index._policy.victims = counted  # type: ignore[method-assign]
    filler = rig.pool.reserve(rig.pool.free_bytes)
    with engine.pin(held[:1000]):
        engine.store([b"n%d" % i for i in range(10)], BlockView([np.zeros((10, 2, 16, 1, 8), np.float16)], "2NHD"))
    assert engine.stats().evicted_blocks >= 10
    assert len(steps) <= 1000 + 2 * engine.stats().evicted_blocks
    filler.close()
    assert count
    rig.close()


# ---- fork, and the interpreter's end

PRELUDE = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import os, threading, time, warnings
warnings.simplefilter("ignore")
import numpy as np
from test_device import Rig
from kvzip import BlockView, ConfigError, ErrorBound, SwapEngine, TransferError
def rig_of(small):
    return Rig(bound=ErrorBound.lossless(), small=small, reaper_seconds=0.001)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@WAYS
def test_a_forked_child_says_that_the_gpu_is_the_parents(small: bool) -> None:
    """While transfers are under way and another thread holds the engine's locks."""
    code = f"""
rig = rig_of({small})
engine = rig.engine
engine.store(rig.keys, rig.view).wait()
engine.load(rig.keys, rig.view).wait()
rig.driver.hold.clear()
store = engine.store([b"new"], rig.view[[0]])
load = engine.load(rig.keys[:2], rig.view[[4, 5]])
locked, leave = threading.Event(), threading.Event()
def hold():
    with engine._lock, rig.pool._lock:
        locked.set()
        leave.wait()
thread = threading.Thread(target=hold)
thread.start()
locked.wait()
calls = len(rig.driver.calls)
child = os.fork()
if child == 0:
    import signal
    signal.alarm(30)
    assert not engine.usable
    for transfer in (store, load):
        try:
            transfer.result(5)
        except TransferError as error:
            assert "belongs to another process" in str(error), error
        else:
            raise AssertionError
    for use in (lambda: engine.store([b"x"], rig.view[[0]]), lambda: engine.load([b"new"], rig.view[[0]])):
        try:
            use()
        except ConfigError as error:
            assert "forked" in str(error) and "spawn" in str(error), error
        else:
            raise AssertionError
    assert engine.list_keys() == [] and not engine.contains(rig.keys[0])
    try:
        engine.stats()
    except ConfigError as error:
        assert "forked" in str(error), error
    engine.close()
    with SwapEngine(1 << 20, bound=ErrorBound.lossless()) as fresh:  # what the message says to do
        pages = np.ones((1, 2, 16, 1, 8), np.float16)
        fresh.store([b"a"], BlockView([pages], "2NHD"))
    del transfer, store, load
    assert len(rig.driver.calls) == calls, rig.driver.calls[calls:]
    os.write(1, b"child ")
    os._exit(0)
leave.set()
thread.join()
assert os.waitpid(child, 0)[1] == 0
rig.driver.hold.set()
assert store.result(10).blocks == 1 and load.result(10).blocks == 2 and engine.usable
rig.poison()
engine.load(rig.keys, rig.view).wait(10)
assert all(np.array_equal(a, o) for a, o in zip(rig.arrays, rig.original))
del store, load
rig.close()
print("parent")
"""
    assert run(code) == "child parent\n"


@WAYS
@pytest.mark.parametrize("ends", ["at the end", "by sys.exit", "by an exception", "hung"])
def test_a_process_may_end_with_transfers_under_way(small: bool, ends: str) -> None:
    code = f"""
import kvzip.engine
kvzip.engine._EXIT_SECONDS = 0.5 if {ends == "hung"} else 20.0
rig = rig_of({small})
rig.engine.store(rig.keys, rig.view).wait()
rig.engine.load(rig.keys, rig.view).wait()
rig.driver.hold.clear()
store = rig.engine.store([b"new"], rig.view[[0]])
load = rig.engine.load(rig.keys[:2], rig.view[[4, 5]])
if {ends != "hung"}:
    timer = threading.Timer(0.2, rig.driver.hold.set)
    timer.daemon = True
    timer.start()
print("end", flush=True)
if {ends == "by sys.exit"}:
    sys.exit(0)
if {ends == "by an exception"}:
    sys.excepthook = lambda *error: None
    raise ValueError
"""
    started = time.monotonic()
    if ends == "by an exception":
        done = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (1, "end\n", "")
    else:
        assert run(code) == "end\n"
    assert time.monotonic() - started < 60
