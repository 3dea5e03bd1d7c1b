# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A GPU made of host memory that does nothing before it must, in the least convenient order that streams allow.

Work is queued on streams and done when the host waits for something, one piece at a time, each from a stream chosen at
random among those whose next piece need not wait. What depends on an order that no event stands for comes out wrong.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from fake_cuda import FakeDriver, FakeEncodeCall


class OrderedDriver(FakeDriver):
    """The device functions, late.

    Args:
        seed: of the order.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.lock = threading.RLock()
        self._random = random.Random(seed)
        self._queues: dict[int, deque[tuple[int, int, Callable[[], object] | None]]] = {}
        self._recorded: dict[int, int] = {}  # how often an event was
        self._passed: set[tuple[int, int]] = set()  # those of these that have passed

    # ---- what is queued: (event, count to wait for, work)

    def queue(self, stream: int, work: Callable[[], object]) -> None:
        """Queue work of the caller's own on a stream."""
        with self.lock:
            self._queues.setdefault(stream, deque()).append((0, 0, work))

    def stream_wait_event(self, stream: int, event: int) -> None:
        with self.lock:
            super().stream_wait_event(stream, event)
            self._queues.setdefault(stream, deque()).append((event, self._recorded.get(event, 0), None))

    def event_record(self, event: int, stream: int) -> None:
        with self.lock:
            super().event_record(event, stream)
            count = self._recorded[event] = self._recorded.get(event, 0) + 1
            self.queue(stream, lambda: self._passed.add((event, count)))

    def event_destroy(self, event: int) -> None:
        with self.lock:
            super().event_destroy(event)

    # ---- doing it

    def _ready(self) -> list[int]:
        return [stream for stream, queue in self._queues.items() if queue and self._has_passed(*queue[0][:2])]

    def _advance(self, until: Callable[[], bool]) -> None:
        while not until():
            ready = self._ready()
            assert ready, "the device waits for ever"
            _, _, work = self._queues[self._random.choice(ready)].popleft()
            if work is not None:
                work()

    def _has_passed(self, event: int, count: int) -> bool:
        return count == 0 or (event, count) in self._passed

    def event_wait(self, event: int, spin_us: int, timeout_us: int) -> bool:
        with self.lock:
            assert event in self.events
            count = self._recorded.get(event, 0)
            if timeout_us:
                self._advance(lambda: self._has_passed(event, count))
            elif (ready := self._ready()) and self._random.random() < 0.5:  # time passes
                _, _, work = self._queues[self._random.choice(ready)].popleft()
                if work is not None:
                    work()
            return self._has_passed(event, count)

    def event_synchronize(self, event: int) -> None:
        self.event_wait(event, 0, 1)

    def stream_synchronize(self, stream: int) -> None:
        with self.lock:
            assert stream in self.streams
            self._advance(lambda: not self._queues.get(stream))

    def finish(self) -> None:
        """Do everything that was queued."""
        with self.lock:
            self._advance(lambda: not any(self._queues.values()))

    def free(self, address: int) -> None:
        with self.lock:
            if address:
                self.finish()  # as cudaFree does
            super().free(address)

    # ---- work

    def memset(self, address: int, byte: int, nbytes: int, stream: int) -> None:
        self.queue(stream, lambda: ctypes.memset(address, byte, nbytes))

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self.queue(stream, lambda: ctypes.memmove(to, source, nbytes))

    def mapped_copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._called("mapped_copy", held=False)
        self.queue(stream, lambda: ctypes.memmove(to, source, nbytes))

    def copy_between(self, pieces: Any, after: int, done: int, stream: int) -> None:
        with self.lock:
            if after:
                self.stream_wait_event(stream, after)
            for piece in list(pieces):
                self.queue(stream, lambda piece=piece: ctypes.memmove(*piece))
                self._called("copy_between", held=False)  # may fail half-way
            self.event_record(done, stream)

    def encode_call(
        self, encode: Any, inputs: Any, results: Any, done: int, stream: int, copied: int, copies: int
    ) -> Any:
        return OrderedEncodeCall(self, encode, inputs, results, done, stream, copied, copies)

    def decode_call(self, decode: Any, inputs: Any, copied: int, done: int, stream: int) -> Any:
        def call() -> None:
            with self.lock:
                self.queue(stream, lambda: ctypes.memmove(*inputs))
                self._called("decode_call", held=False)
                self.stream_wait_event(stream, copied)
                self.queue(stream, lambda: self.decode(decode, stream))
                self.event_record(done, stream)

        return call

    def store_call(self, encode: Any, move: Any, few: Any, order: int, device: int, stream: int) -> Any:
        return OrderedSwapCall(self, super().store_call(encode, move, few, order, device, stream), order, stream)

    def load_call(self, decode: Any, move: Any, few: Any, order: int, device: int, stream: int) -> Any:
        return OrderedSwapCall(self, super().load_call(decode, move, few, order, device, stream), order, stream)

    @property
    def late(self) -> bool:
        return True

    def _do(self, work: Callable[[], object]) -> None:
        work()


class OrderedEncodeCall(FakeEncodeCall):
    """A chunk's launch, and its copy, in the streams that they were made for."""

    driver: OrderedDriver

    def __call__(self) -> None:
        driver, stream = self.driver, self.stream
        with driver.lock:
            driver.queue(stream, lambda: ctypes.memmove(*self.inputs))
            driver.queue(stream, lambda: driver.encode(self.encode, stream))
            driver._called("encode_call", held=False)
            driver.queue(stream, lambda: ctypes.memmove(*self.results))
            driver.event_record(self.done, stream)

    def _copy(self, to: int, nbytes: int) -> None:
        self.driver.copy_between([(to, self.encode.arena, nbytes)], 0, self.copied, self.copies)


class OrderedSwapCall:
    """A small transfer: queued whole, behind the work of another stream."""

    def __init__(self, driver: OrderedDriver, call: Any, order: int, stream: int) -> None:
        self._driver, self._call, self._order, self._stream = driver, call, order, stream
        self._done = 0

    def __call__(self, after: int, done: int, num_runs: int, address: int, nbytes: int) -> None:
        driver, self._done = self._driver, done
        with driver.lock:
            driver.event_record(self._order, after)
            driver.stream_wait_event(self._stream, self._order)
            driver.queue(self._stream, lambda: self._call(after, done, num_runs, address, nbytes))
            driver._called("swap_call", held=False)  # with its work queued
            driver.event_record(done, self._stream)

    def wait(self, spin_us: int, timeout_us: int) -> bool:
        return self._driver.event_wait(self._done, spin_us, timeout_us)
