# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The kernels for few pages, through the engine: the records and the pages that the CPU makes, whatever the values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvzip import BlockView, CorruptRecordError, ErrorBound, HostPool, SwapEngine
from kvzip.memory import PinnedMemory

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs an NVIDIA GPU with thread block clusters",
    ),
]
BLOCKS = 40


@pytest.fixture(scope="module")
def pool() -> Iterator[HostPool]:
    made = HostPool(128 << 20, resource=PinnedMemory())
    yield made
    made.close()


def page(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    """Values of one of many kinds: smooth, wide, not finite, all alike, random bits."""
    kind = int(rng.integers(8))
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-8, 8))
    if kind in (1, 2):
        x *= np.exp2(rng.integers(-6, 6, (shape[-2], shape[-1])))
    if kind == 3:
        x[rng.random(shape) < 1e-3] = rng.choice([np.nan, np.inf, -np.inf])
    if kind == 4:
        x[:] = 1.5
    if kind == 5:
        x[rng.random(shape) < 0.9] = 0
    if kind == 6:
        x[1:] = x[:1] * (1 + 1e-2 * rng.standard_normal(x[1:].shape))
    if kind == 7:
        bits = torch.from_numpy(rng.integers(-32768, 32768, shape).astype(np.int16))
        return bits.view(dtype)
    return torch.from_numpy(x).to(dtype)


def layers(seed: int, count: int, heads: int, dim: int, dtype: Any, tokens: int = 16) -> list[Any]:
    rng = np.random.default_rng(seed)
    shape = (tokens, heads, dim)
    return [torch.stack([page(rng, shape, dtype) for _ in range(BLOCKS)]) for _ in range(count)]


def launches(engine: SwapEngine) -> list[int]:
    """Which kernels did it, of all calls that were bound: 0 where it was not these."""
    swap: Any = engine._devices["cuda:0"]
    calls = [
        ticket.call._native.few.launch
        for d in (swap._stores, swap._loads)
        for plan in d._plans.values()
        for ticket in plan.tickets.values()
    ]
    return [int(n) for n in calls]


GEOMETRIES = [  # layers, heads, channels of a head
    (1, 32, 64),
    (8, 32, 64),
    (64, 32, 64),
    (3, 8, 128),
    (2, 1, 64),
    (1, 3, 64),
    (4, 5, 128),
    (2, 2, 256),
    (1, 16, 16),
    (2, 24, 128),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bound", ["1e-3", "1e-2", "abs:0.02", "lossless"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: "x".join(map(str, g)))
def test_few_pages_are_those_of_the_cpu(pool: HostPool, geometry: tuple[int, int, int], bound: str, dtype: str) -> None:
    cpu = layers(hash((geometry, bound)) & 0xFFFF, *geometry, getattr(torch, dtype))
    gpu = [t.cuda() for t in cpu]
    out = [torch.full_like(t, 7) for t in gpu]
    settings: dict[str, Any] = {"bound": ErrorBound.parse(bound)}
    with SwapEngine(pool, **settings) as engine, SwapEngine(256 << 20, **settings) as on_cpu:
        source, target = BlockView(gpu, "NHD"), BlockView(out, "NHD")
        back = [torch.full_like(t, 7) for t in cpu]
        rng = np.random.default_rng(1)
        for first, last in ((0, 1), (1, 2), (2, 4), (4, 12), (12, 40)):
            keys = [b"%d" % i for i in range(first, last)]
            engine.store(keys, source[range(first, last)]).wait()
            on_cpu.store(keys, BlockView(cpu, "NHD")[range(first, last)])
            for key in keys:
                assert engine.read_record(key) == on_cpu.read_record(key)
            order = rng.permutation(np.arange(first, last))
            engine.load([b"%d" % i for i in order], target[order]).wait()
            on_cpu.load([b"%d" % i for i in order], BlockView(back, "NHD")[order])
            for g, c in zip(out, back, strict=True):
                assert torch.equal(g.cpu().view(torch.int16), c.view(torch.int16))
        assert max(launches(engine)) > 0


def test_a_record_that_changed_in_memory_is_not_loaded(pool: HostPool) -> None:
    gpu = [t.cuda() for t in layers(5, 8, 32, 64, torch.bfloat16)]
    out = [torch.full_like(t, 7) for t in gpu]
    with SwapEngine(pool, bound=ErrorBound.relative(1e-3)) as engine:
        keys = [b"%d" % i for i in range(4)]
        engine.store(keys, BlockView(gpu, "NHD")[range(4)]).wait()
        entry = engine._index.find([keys[2]])[0]
        engine.pool.write(entry.allocation, bytes([1, 2, 3]), entry.allocation.nbytes - 100)
        with pytest.raises(CorruptRecordError) as caught:
            engine.load(keys, BlockView(out, "NHD")[range(4)]).wait()
        assert tuple(caught.value.blocks) == (2,)
        assert all(bool((t[2] == 7).all()) and not bool((t[1] == 7).all()) for t in out)
        assert min(n for n in launches(engine)) >= 0


def test_many_transfers_of_few_pages_at_a_time(pool: HostPool) -> None:
    """Queued one behind the other, waited for in another order."""
    cpu = layers(9, 2, 32, 64, torch.bfloat16)
    gpu = [t.cuda() for t in cpu]
    out = [torch.full_like(t, 7) for t in gpu]
    with SwapEngine(pool, bound=ErrorBound.lossless()) as engine:
        for turn in range(20):
            stores = [engine.store([b"%d-%d" % (turn, i)], BlockView(gpu, "NHD")[[i]]) for i in range(12)]
            for transfer in reversed(stores):
                transfer.wait()
            loads = [engine.load([b"%d-%d" % (turn, i)], BlockView(out, "NHD")[[i]]) for i in range(12)]
            for transfer in loads[::2] + loads[1::2]:
                assert transfer.result().blocks == 1
            for g, c in zip(out, cpu, strict=True):
                assert torch.equal(g[:12].cpu().view(torch.int16), c[:12].view(torch.int16))
