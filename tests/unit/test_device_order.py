# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Stores and loads on a GPU that does everything as late, and as out of order, as streams allow (ordered_cuda.py).

Two streams of the caller fill pages, store them, overwrite them behind the store, load them back and read them behind
the load, without a wait on the host. An event that is missing anywhere, or waits for the wrong use of an arena, ends in
other values.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeTensor, cuda_error
from ordered_cuda import OrderedDriver
from test_device import Mapped, given_away

from kvzip import BlockView, CudaError, ErrorBound, HostPool, SwapEngine, Transfer
from kvzip.device import DeviceSwap
from kvzip.memory import PageableMemory
from kvzip.staging import Staging
from kvzip.transport import CudaTransport

BLOCKS = 48
STREAMS = (0, 1)  # of the caller
POISON = 0x5A5A


class Program:
    """An engine on such a GPU, and what its blocks must hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rng = np.random.default_rng(seed)
        self.driver = OrderedDriver(seed)
        small = self.random.random() < 0.5
        self.pages = [np.zeros((BLOCKS, 2, 16, 1, 16), np.uint16) for _ in range(2)]
        self.view = BlockView([FakeTensor(a) for a in self.pages], "2NHD")
        block_bytes = self.view.layout.nbytes
        self.pool = HostPool(1 << 22, resource=Mapped() if small else None)
        self.engine = SwapEngine(self.pool, bound=ErrorBound.lossless())
        staging = Staging(
            chunk_bytes=self.random.choice((1, 2, 5, 40)) * block_bytes,
            slots=self.random.choice((1, 2, 3)),
            small_bytes=self.random.choice((4, BLOCKS)) * block_bytes,
        )
        transport = CudaTransport(0, driver=self.driver, staging=staging, resource=PageableMemory())
        self.swap = DeviceSwap(
            0, self.engine._index, self.pool, self.engine._store_lock, self.engine, staging, transport
        )
        self.engine._devices["cuda:0"] = self.swap
        self.held: dict[bytes, list[np.ndarray]] = {}  # what stores gave
        self.checks: list[Callable[[], None]] = []

    def blocks(self) -> list[int]:
        """Some, in any order; those of a stream of the caller are its own."""
        count = self.random.choice((1, 2, 3, 5, 12, 24))
        return self.random.sample(range(BLOCKS // 2), count)

    def values(self, count: int) -> list[np.ndarray]:
        """Bits of small numbers of float: they get smaller."""
        values = self.rng.normal(size=(2, count, *self.pages[0].shape[1:])).astype(np.float32)
        return list((values.view(np.uint32) >> 16).astype(np.uint16))

    def write(self, stream: int, where: list[int], values: list[np.ndarray] | int) -> None:
        def work() -> None:
            for page, value in zip(self.pages, values if isinstance(values, list) else [values] * 2, strict=True):
                page[where] = value

        self.driver.queue(stream, work)

    def store(self, stream: int, number: int) -> Transfer:
        where = [b + stream * BLOCKS // 2 for b in self.blocks()]
        values = self.values(len(where))
        keys = [b"%d-%d" % (number, i) for i in range(len(where))]
        self.write(stream, where, values)
        transfer = self.engine.store(keys, self.view[where], stream=stream)
        transfer.wait_stream(stream)
        self.write(stream, where, POISON)
        for i, key in enumerate(keys):
            self.held[key] = [v[i] for v in values]
        return transfer

    def load(self, stream: int, keys: list[bytes]) -> Transfer:
        where = [b + stream * BLOCKS // 2 for b in self.random.sample(range(BLOCKS // 2), len(keys))]
        self.write(stream, where, POISON)
        before: list[np.ndarray] = []
        self.driver.queue(stream, lambda: before.extend(page[where].copy() for page in self.pages))
        transfer = self.engine.load(keys, self.view[where], stream=stream)
        transfer.wait_stream(stream)
        seen: list[np.ndarray] = []
        self.driver.queue(stream, lambda: seen.extend(page[where].copy() for page in self.pages))
        self.write(stream, where, POISON)

        def check() -> None:
            assert all((page == POISON).all() for page in before), "a load did not wait for who reads its pages"
            for layer in range(2):
                for i, key in enumerate(keys):
                    assert np.array_equal(seen[layer][i], self.held[key][layer]), "other values behind a load"

        self.checks.append(check)
        return transfer

    def close(self) -> None:
        self.driver.finish()
        for check in self.checks:
            check()
        self.engine.close()
        self.pool.check()
        self.pool.close()


@pytest.mark.parametrize("seed", range(40))
def test_transfers_in_the_least_convenient_order(seed: int) -> None:
    program = Program(seed)
    under_way: list[Transfer] = []
    for number in range(12):
        stream = program.random.choice(STREAMS)
        keys = list(program.held)
        if keys and program.random.random() < 0.5:
            for transfer in under_way:  # or a key may not be held yet
                transfer.result(30)
            under_way = []
            for _ in range(program.random.randint(1, 3)):
                count = min(len(keys), program.random.choice((1, 2, 5, 24)))
                under_way.append(program.load(program.random.choice(STREAMS), program.random.sample(keys, count)))
        else:
            under_way.append(program.store(stream, number))
    for transfer in under_way:
        transfer.result(30)
    program.close()
    assert not any(isinstance(t, Exception) for t in under_way)


FAILING = ("copy_between", "mapped_copy", "encode_call", "decode_call", "swap_call", "event_record", "malloc")


@pytest.mark.parametrize("seed", range(40))
def test_calls_that_fail_in_the_least_convenient_order(seed: int) -> None:
    """What a call had queued before it failed may still come: no byte is given away before that."""
    program = Program(seed)
    keep: dict[bytes, list[np.ndarray]] = {}
    for number in range(16):
        stream = program.random.choice(STREAMS)
        program.driver.fail = {}
        if program.random.random() < 0.5:
            program.driver.fail[program.random.choice(FAILING)] = cuda_error()
        keys, checks = list(keep), len(program.checks)
        try:
            if keys and number % 2:
                program.load(stream, program.random.sample(keys, min(len(keys), 5))).result(30)
            else:
                program.store(stream, number).result(30)
        except CudaError:
            del program.checks[checks:]  # of a load that failed
            with given_away(program.pool) as parts:
                program.driver.finish()
                assert all((part == 0x77).all() for part in parts), "written to what was given away"
            keep = {key: keep[key] for key in keep if program.engine.contains(key)}
        else:
            keep.update(program.held)
        program.held = dict(keep)
    program.driver.fail = {}
    for key in keep:
        program.load(0, [key]).result(30)
    program.close()


def test_a_missing_wait_is_found() -> None:
    """What such a GPU is for: without the event that a store waits for, the values are others."""

    def stored(waits: bool) -> list[Any]:
        found = []
        for seed in range(8):
            program = Program(seed)
            if not waits:
                program.driver.stream_wait_event = lambda stream, event: None  # type: ignore[method-assign]
            program.store(0, 0).result(30)
            program.driver.finish()
            keys = list(program.held)
            host = BlockView(
                [np.zeros((len(keys), 2, 16, 1, 16), np.uint16) for _ in range(2)], "2NHD", dtype="bfloat16"
            )
            program.engine.load(keys, host)
            found.append(
                all(np.array_equal(host.tensors[n][i], program.held[k][n]) for n in (0, 1) for i, k in enumerate(keys))
            )
            program.engine.close()
        return found

    assert all(stored(waits=True))
    assert not all(stored(waits=False))
