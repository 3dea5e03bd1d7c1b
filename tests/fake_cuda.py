# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A GPU made of host memory: the device functions of `kvzip.driver.Driver`, with the CPU codec behind them.

Streams run at once, in order; events and the use of freed memory are checked. With it the pipelines, the workers and
the engine's GPU side run where there is no GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import crc32c
import numpy as np

from kvzip import _native
from kvzip.backends.cuszp import Extended
from kvzip.errors import CorruptRecordError, CudaError
from kvzip.memory import Region
from kvzip.record import ENTRY_DTYPE, Coding


def at(address: int, dtype: Any, count: int) -> np.ndarray:
    dtype = np.dtype(dtype)
    buffer = (ctypes.c_uint8 * (dtype.itemsize * count)).from_address(address)
    return np.frombuffer(buffer, dtype, count)


class FakeTensor:
    """A NumPy array that says it lies on a GPU."""

    def __init__(self, array: np.ndarray, dtype: str = "bfloat16", index: int = 0) -> None:
        self.array = array
        self.dtype = f"torch.{dtype}"
        self.device = SimpleNamespace(type="cuda", index=index)
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def element_size(self) -> int:
        return self.array.itemsize

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)


class Mapped:
    """Pageable memory that says it is pinned: the fake GPU can address it."""

    def allocate(self, nbytes: int) -> Region:
        return Region(np.zeros(nbytes, np.uint8), pinned=True)


class FakeDriver:
    """`fail` maps the name of a function to an exception that its next call raises."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.events: set[int] = set()
        self.streams: set[int] = set()
        self.calls: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.hold = threading.Event()
        self.hold.set()
        self._later: deque[Callable[[], object]] = deque()  # work of held streams, in order
        self._working = threading.Lock()
        self.peak_bytes = 0
        self._handles = itertools.count(2)  # several threads make them

    def _called(self, name: str, *, held: bool = True) -> None:
        self.calls.append(name)
        if held:
            self.hold.wait(30)
        error = self.fail.pop(name, None)
        if error is not None:
            raise error

    def get_device(self) -> int:
        self._called("get_device", held=False)
        return 0

    def set_device(self, device: int) -> None:
        self._called("set_device", held=False)
        assert device >= 0

    def malloc(self, nbytes: int) -> int:
        self._called("malloc")
        array = np.full(nbytes + 256, 0xEE, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.memory[address] = array
        self.peak_bytes = max(self.peak_bytes, sum(a.size for a in self.memory.values()))
        return address

    def free(self, address: int) -> None:
        if address:
            del self.memory[address]

    def memset(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        self._called("memset", held=False)
        ctypes.memset(address, byte, nbytes)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._called("copy")
        assert stream in self.streams
        ctypes.memmove(to, source, nbytes)

    def copy_between(self, pieces: Any, after: int, done: int, stream: int) -> None:
        self._called("copy_between", held=False)
        assert stream in self.streams
        assert {after or done, done} <= self.events
        moved = list(pieces)

        def work() -> None:
            for to, source, nbytes in moved:
                ctypes.memmove(to, source, nbytes)

        self._do(work)

    def mapped_copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._called("mapped_copy", held=False)
        assert stream in self.streams
        assert to % 16 == source % 16 == nbytes % 16 == 0
        self._do(lambda: ctypes.memmove(to, source, nbytes))

    def stream_synchronize(self, stream: int) -> None:
        assert stream in self.streams
        self._called("stream_synchronize")
        self._work()

    def stream_create(self, priority: int = 0) -> int:
        self._called("stream_create", held=False)
        stream = next(self._handles)
        self.streams.add(stream)
        return stream

    def stream_destroy(self, stream: int) -> None:
        self.streams.remove(stream)

    def stream_wait_event(self, stream: int, event: int) -> None:
        self._called("stream_wait_event", held=False)
        assert event in self.events

    def event_create(self, *, timing: bool = False) -> int:
        self._called("event_create", held=False)
        event = next(self._handles)
        self.events.add(event)
        return event

    def event_destroy(self, event: int) -> None:
        self.events.remove(event)

    def event_record(self, event: int, stream: int) -> None:
        self._called("event_record", held=False)
        assert event in self.events

    def event_synchronize(self, event: int) -> None:
        assert event in self.events
        self._called("event_synchronize")

    def event_wait(self, event: int, spin_us: int, timeout_us: int) -> bool:
        assert event in self.events
        if not self.hold.wait(min(timeout_us / 1e6, 30)):
            return False
        self._work()
        self._called("event_wait")
        return True

    def _work(self) -> None:
        """Do what held streams have waiting."""
        with self._working:
            while self._later:
                self._later.popleft()()

    def workspace_bytes(self, num_segments: int, num_blocks: int) -> int:
        return 64 + num_blocks * 4

    def encode(self, a: Any, stream: int) -> None:
        self._called("encode")
        segments = at(a.device_segments, _native.SEGMENT_DTYPE, len(a.segments))
        ids = at(a.block_ids, np.int64, a.num_blocks).copy()
        worst = _native.max_payload_bytes(segments)
        out = np.empty((a.num_blocks, worst), np.uint8)
        table, sizes = _native.cpu_encode(segments.copy(), ids, out, threads=1)
        at(a.table, ENTRY_DTYPE, table.size)[:] = table.ravel()
        at(a.payload_bytes, np.uint64, a.num_blocks)[:] = sizes
        at(a.status, np.uint32, 1)[0] = 0
        where = 0
        for b, size in enumerate(sizes.tolist()):
            at(a.record_offsets, np.uint64, a.num_blocks)[b] = where
            assert where + a.header_bytes + size <= a.arena_bytes
            at(a.arena + where + a.header_bytes, np.uint8, size)[:] = out[b, :size]
            if a.crc32c:
                at(a.crc32c, np.uint32, a.num_blocks)[b] = crc32c.crc32c(out[b, :size])
            where += -(-(a.header_bytes + size) // 256) * 256

    def crc32c(self, a: Any, stream: int) -> None:
        self._called("crc32c")
        scratch = at(a.scratch, np.uint32, 2 * a.count)
        assert not scratch.any()
        offsets, sizes = at(a.offsets, np.uint64, a.count), at(a.payload_bytes, np.uint64, a.count)
        crcs = at(a.crc32c, np.uint32, a.count)
        for b in range(a.count):
            assert sizes[b] <= a.max_payload_bytes
            crc = crc32c.crc32c(bytes(at(a.base + int(offsets[b]) + a.skip, np.uint8, int(sizes[b]))))
            if not a.check:
                crcs[b] = crc
            elif crcs[b] != crc:
                sizes[b] = 0

    def encode_call(
        self, encode: Any, inputs: Any, results: Any, done: int, stream: int, copied: int, copies: int
    ) -> Any:
        return FakeEncodeCall(self, encode, inputs, results, done, stream, copied, copies)

    def outgoing(self, calls: Any, stream: int) -> Any:
        assert stream in self.streams
        return FakeOutgoingChunks(self, calls)

    def decode_call(self, decode: Any, inputs: Any, copied: int, done: int, stream: int) -> Any:
        def call() -> None:
            self._called("decode_call", held=False)
            assert {copied, done} <= self.events
            assert stream in self.streams

            def work() -> None:
                ctypes.memmove(*inputs)
                self.decode(decode, stream)

            self._do(work)

        return call

    def few_bytes(self) -> int:
        return 64

    def store_call(self, encode: Any, move: Any, few: Any, order: int, device: int, stream: int) -> Any:
        assert order in self.events

        def call(after: int, done: int, num_runs: int, address: int, nbytes: int) -> None:
            assert done in self.events
            assert stream in self.streams
            self._called("store_call", held=False)

            def work() -> None:
                self.encode(encode, stream)
                assert not at(move.scratch, np.uint32, 2 * move.num_blocks).any()
                offsets = at(move.record_offsets, np.uint64, move.num_blocks).tolist()
                sizes = at(move.payload_bytes, np.uint64, move.num_blocks).tolist()
                for b, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    payload = at(move.arena + offset + move.header_bytes, np.uint8, size)
                    at(move.crc32c, np.uint32, move.num_blocks)[b] = crc32c.crc32c(payload)
                    for host, start, length in self._places(move, num_runs, address, nbytes, offset, size):
                        at(host, np.uint8, length)[:] = payload[start : start + length]
                ctypes.memmove(move.beside_to, move.beside_from, move.beside_bytes)

            self._do(work)

        return FakeSwapCall(self, call)

    def load_call(self, decode: Any, move: Any, few: Any, order: int, device: int, stream: int) -> Any:
        assert order in self.events

        def call(after: int, done: int, num_runs: int, address: int, nbytes: int) -> None:
            assert done in self.events
            assert stream in self.streams
            self._called("load_call", held=False)

            def work() -> None:
                ctypes.memmove(move.beside_to, move.beside_from, move.beside_bytes)
                offsets = at(move.record_offsets, np.uint64, move.num_blocks).tolist()
                sizes = at(move.payload_bytes, np.uint64, move.num_blocks).tolist()
                for b, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    payload = at(move.arena + offset + move.header_bytes, np.uint8, size)
                    for host, start, length in self._places(move, num_runs, address, nbytes, offset, size):
                        payload[start : start + length] = at(host, np.uint8, length)
                    right = at(move.crc32c, np.uint32, move.num_blocks)[b] == crc32c.crc32c(payload)
                    at(move.checked_bytes, np.uint64, move.num_blocks)[b] = size if right else 0
                self.decode(decode, stream)

            self._do(work)

        return FakeSwapCall(self, call)

    @staticmethod
    def _places(move: Any, num_runs: int, address: int, nbytes: int, offset: int, size: int) -> Iterator[Any]:
        """Host address, start in the payload and length of the parts of a record's payload."""
        runs = [(0, address, nbytes)]
        if num_runs > 1:
            runs = [tuple(r) for r in at(move.runs, np.uint64, 3 * num_runs).reshape(-1, 3).tolist()]
        begin, done = offset + move.header_bytes, 0
        for start, host, length in runs:
            first, last = max(begin, start), min(begin + size, start + length)
            if first < last:
                yield host + first - start, first - begin, last - first
                done += last - first
        assert done == size

    @property
    def late(self) -> bool:
        """Whether work that is queued now has not ended when the call returns."""
        return not self.hold.is_set()

    def _do(self, work: Callable[[], object]) -> None:
        """At once, or when somebody waits for an event and the device is not held."""
        with self._working:
            if self.hold.is_set() and not self._later:
                work()
            else:
                self._later.append(work)

    def decode(self, a: Any, stream: int) -> None:
        self._called("decode")
        segments = at(a.device_segments, _native.SEGMENT_DTYPE, len(a.segments)).copy()
        ids = at(a.block_ids, np.int64, a.num_blocks).copy()
        payloads, sizes = at(a.payloads, np.uint64, a.num_blocks), at(a.payload_bytes, np.uint64, a.num_blocks)
        table = at(a.table, ENTRY_DTYPE, a.num_blocks * len(segments)).reshape(a.num_blocks, -1)
        coding = table["coding"] & 0x0F
        assert a.extended & Extended.RICE or (coding <= Coding.LOSSLESS).all()
        assert a.extended or (table["coding"] == coding).all()
        for b in range(a.num_blocks):
            status = 0
            try:
                payload = at(int(payloads[b]), np.uint8, int(sizes[b]))
                if a.crc32c and at(a.crc32c, np.uint32, a.num_blocks)[b] != crc32c.crc32c(payload):
                    raise CorruptRecordError("the payload's checksum differs")
                _native.cpu_decode(segments, ids[b : b + 1], [payload], table[b : b + 1], threads=1)
            except CorruptRecordError:
                status = 2
            at(a.block_status, np.uint32, a.num_blocks)[b] = status


class FakeEncodeCall:
    """A launch, and what it says when it is done."""

    def __init__(
        self,
        driver: FakeDriver,
        encode: Any,
        inputs: Any,
        results: Any,
        done: int,
        stream: int,
        copied: int,
        copies: int,
    ) -> None:
        self.driver, self.encode, self.inputs, self.results = driver, encode, inputs, results
        self.stream, self.copies, self.done, self.copied = stream, copies, done, copied
        self._marks = (0, 0)

    def mark(self, begins: int, ends: int) -> None:
        self._marks = (begins, ends)

    def __call__(self) -> None:
        self.driver._called("encode_call", held=False)
        assert {self.done, self.copied} <= self.driver.events
        assert {self.stream, self.copies} <= self.driver.streams

        def work() -> None:
            ctypes.memmove(*self.inputs)
            self.driver.encode(self.encode, self.stream)
            ctypes.memmove(*self.results)

        self.driver._do(work)

    def copy(self, to: int, room_bytes: int) -> int:
        """As kvz_cuda_encode_and_copy, for one chunk that is encoded; 0 where it cannot be."""
        a, to_host = self.encode, self.results[0] - self.results[1]
        offset, size = (
            int(at(address + to_host, np.uint64, a.num_blocks)[-1]) for address in (a.record_offsets, a.payload_bytes)
        )
        nbytes = -(-(offset + a.header_bytes + size) // 256) * 256
        if at(a.status + to_host, np.uint32, 1)[0] or nbytes > min(room_bytes, a.arena_bytes):
            return 0
        self._copy(to, nbytes)
        return nbytes

    def _copy(self, to: int, nbytes: int) -> None:
        for event in filter(None, self._marks):
            self.driver.event_record(event, self.stream)
        self.driver._do(lambda: ctypes.memmove(to, self.encode.arena, nbytes))


class FakeOutgoingChunks:
    """As kvz_cuda_encode_and_copy: an encoder is launched before the one in front of it is waited for."""

    def __init__(self, driver: FakeDriver, calls: Any) -> None:
        self._driver, self._calls = driver, list(calls)

    def begin(self, to: int, room_bytes: int) -> None:
        self._to, self._room_bytes, self._launched = to, room_bytes, 1
        self.copied = [0] * len(self._calls)

    def _launch(self, last: int) -> None:
        while self._launched < len(self._calls) and self._launched <= last:
            self._calls[self._launched]()
            self._launched += 1

    def wait(self, spin_us: int, timeout_us: int) -> bool:
        for i, call in enumerate(self._calls):
            if self.copied[i]:
                continue
            self._launch(i)
            if self._driver.late:
                self._launch(i + 1)
            if not self._driver.event_wait(call.done, spin_us, timeout_us):
                return False
            self._driver._called("outgoing", held=False)
            self.copied[i] = nbytes = call.copy(self._to, self._room_bytes)
            if not nbytes:
                break
            self._to, self._room_bytes = self._to + nbytes, self._room_bytes - nbytes
        return True


class FakeSwapCall:
    """A call that remembers the event behind it."""

    def __init__(self, driver: FakeDriver, call: Callable[[int, int, int, int, int], None]) -> None:
        self._driver = driver
        self._call = call
        self._done = 0

    def __call__(self, after: int, done: int, num_runs: int, address: int, nbytes: int) -> None:
        self._done = done
        self._call(after, done, num_runs, address, nbytes)

    def wait(self, spin_us: int, timeout_us: int) -> bool:
        return self._driver.event_wait(self._done, spin_us, timeout_us)


def cuda_error(name: str = "cudaErrorMemoryAllocation", code: int = 2) -> CudaError:
    return CudaError(f"a copy failed: {name}", code=code, name=name, status=6)
