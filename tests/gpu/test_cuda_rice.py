# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The CUDA codec's Rice codings and bounds within a page against the CPU codec, and a policy on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cuda_bridge as bridge
import numpy as np
import numpy.typing as npt
import pytest
from cuda_bridge import (
    BF16,
    BOUND_ABSOLUTE,
    BOUND_CHANNEL_TABLE,
    BOUND_LOSSLESS,
    BOUND_RELATIVE,
    BOUND_TOKEN_RMS,
    FP16,
    FP32,
    LOSSLESS_RICE,
    RAW,
    RICE,
    Batch,
    Encoded,
    GpuDecode,
    Spec,
    check_both_ways,
)

from kvzip import BlockView, CalibrationTable, HostPool, SwapEngine
from kvzip.memory import PinnedMemory

pytestmark = pytest.mark.gpu

DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}
BOUNDS = [
    (1e-2, BOUND_RELATIVE),
    (0.05, BOUND_ABSOLUTE),
    (0.17, BOUND_TOKEN_RMS),
    (0.01, BOUND_TOKEN_RMS),
    (0.5, BOUND_CHANNEL_TABLE),
    (0.01, BOUND_CHANNEL_TABLE),
    (1e-12, BOUND_RELATIVE),
    (1.0, BOUND_LOSSLESS),
]
SHAPES = [
    (16, 8, 128),
    (16, 3, 64),
    (16, 1, 8),
    (48, 5, 24),
    (16, 32, 128),
    (17, 3, 40),
    (5, 3, 7),
    (1, 1, 4097),
    (1, 1, 1),
    (16, 16, 128),
    (32, 4, 256),
    (48, 2, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bytes(cuda: tuple[Any, Any], shape: tuple[int, int, int], dtype: str) -> None:
    specs = [
        Spec(DTYPES[dtype], *shape, coding=RICE, bound=bound, bound_kind=kind, heads_first=bool(i % 2), pad=8 * (i % 3))
        for i, (bound, kind) in enumerate(BOUNDS)
    ]
    specs.append(replace(specs[0], coding=LOSSLESS_RICE))
    specs.append(replace(specs[0], coding=RAW))
    check_both_ways(Batch.random(*cuda, specs, 24, seed=sum(shape)), packed=True, header=96)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(16, 1, 2), (16, 3, 24), (32, 5, 26), (48, 3, 80), (16, 2, 512)], ids=str)
def test_pages_that_strips_do_not_fill(cuda: tuple[Any, Any], shape: tuple[int, int, int], dtype: str) -> None:
    """Bounds by token aside, which heads of whole strips alone keep on the fast path."""
    specs = [
        Spec(DTYPES[dtype], *shape, coding=RICE, bound=bound, bound_kind=kind, heads_first=bool(i % 2), pad=2 * (i % 3))
        for i, (bound, kind) in enumerate(BOUNDS)
        if kind != BOUND_TOKEN_RMS
    ]
    specs.append(replace(specs[0], coding=LOSSLESS_RICE))
    check_both_ways(Batch.random(*cuda, specs, 24, seed=shape[2]), packed=True)


@pytest.mark.parametrize("strips_per_warp", [1, 2])
@pytest.mark.parametrize("shape", [(16, 3, 64), (16, 8, 128), (32, 2, 128)], ids=str)
def test_any_number_of_strips_a_warp(cuda: tuple[Any, Any], shape: tuple[int, int, int], strips_per_warp: int) -> None:
    specs = [Spec(BF16, *shape, coding=RICE, bound=bound, bound_kind=kind) for bound, kind in BOUNDS]
    check_both_ways(Batch.random(*cuda, specs, 36, seed=9), strips_per_warp=strips_per_warp)


@pytest.mark.parametrize("group_tokens", [8, 4, 2, 1])
def test_other_groups(cuda: tuple[Any, Any], group_tokens: int) -> None:
    specs = [
        Spec(dtype, *shape, group_tokens=group_tokens, coding=RICE, bound=bound, bound_kind=kind)
        for dtype in DTYPES.values()
        for shape, (bound, kind) in zip(SHAPES, BOUNDS, strict=False)
    ]
    check_both_ways(Batch.random(*cuda, specs, 12, seed=group_tokens))


def test_real_pages(cuda: tuple[Any, Any], kv_cache: npt.NDArray[Any]) -> None:
    torch, driver = cuda
    layers, _, tokens, heads, dim = kv_cache.shape
    blocks = tokens // 16
    pages = kv_cache[:, :, : blocks * 16].reshape(layers * 2, blocks, 16 * heads * dim)
    for kinds in ((0.3, BOUND_CHANNEL_TABLE), (0.17, BOUND_TOKEN_RMS), (1.0, BOUND_LOSSLESS)):
        spec = Spec(BF16, 16, heads, dim, coding=RICE, bound=kinds[0], bound_kind=kinds[1])
        memories = [torch.from_numpy(np.ascontiguousarray(p).reshape(-1).view(np.uint8)).cuda() for p in pages]
        encoded = check_both_ways(
            Batch(torch, driver, [spec] * len(memories), memories, np.arange(blocks)), packed=True
        )
        assert encoded.payload_bytes.sum() < blocks * layers * 2 * spec.raw_bytes


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_hostile_records(cuda: tuple[Any, Any], all_or_nothing: bool) -> None:
    """Both validators agree on damaged segments, both decoders on what they accept, and nothing else is written."""
    torch, _ = cuda
    specs = [
        Spec(BF16, 16, 3, 64, coding=RICE, bound=bound, bound_kind=kind)
        for bound, kind in ((0.1, BOUND_TOKEN_RMS), (0.3, BOUND_CHANNEL_TABLE), (1e-2, BOUND_RELATIVE))
    ]
    specs.append(replace(specs[0], coding=LOSSLESS_RICE, dtype=FP16))
    batch = Batch.random(*cuda, specs, 48, seed=3)
    encoded = bridge.encode_cpu(batch)
    payloads = encoded.payloads.cpu().numpy().copy()
    table = encoded.table.copy()
    rng = np.random.default_rng(5)
    for b in range(0, 48, 2):
        start, size = int(encoded.starts[b]), int(encoded.payload_bytes[b])
        for _ in range(1 + b % 3):
            payloads[start + int(rng.integers(size))] = rng.integers(256)
        if b % 8 == 0:
            field = ("coding", "param", "bound", "size")[b // 8 % 4]
            table[field][b, int(rng.integers(len(specs)))] = rng.integers(256)
    damaged = Encoded(torch.from_numpy(payloads).cuda(), encoded.starts, encoded.payload_bytes, table)
    verdicts = bridge.verdicts_cpu(batch, damaged)
    assert 0 < (verdicts != 0).sum() < 48
    into = batch.like()
    before = into.host_memories()
    job = GpuDecode(into, damaged, all_or_nothing=all_or_nothing)
    job.launch()
    np.testing.assert_array_equal(job.statuses() != 0, verdicts != 0)
    good = [] if all_or_nothing else [b for b in range(48) if verdicts[b] == 0]
    bridge.decode_cpu(into, damaged, good, before)
    for found, expected in zip(into.host_memories(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("mode", ["fixed", "plain", "rice"])
def test_the_engine_with_a_policy(cuda: tuple[Any, Any], mode: str, small: bool) -> None:
    """The CPU's records and values, by the pipelines and, without sinks and measured errors, as small transfers."""
    torch, _ = cuda
    blocks, layers, heads, dim = 40, 3, 2, 64
    generator = torch.Generator(device="cuda").manual_seed(1)
    pages = [
        torch.randn(blocks, 2, 16, heads, dim, generator=generator, device="cuda").to(torch.bfloat16)
        for _ in range(layers)
    ]
    original = [p.clone() for p in pages]
    moments = np.random.default_rng(1).lognormal(0, 1, (layers, heads, dim))
    policy = CalibrationTable(moments).policy()
    keys = [b"%d" % i for i in range(blocks)]
    marks = None if small else [i % 10 == 0 for i in range(blocks)]
    with (
        HostPool(64 << 20, resource=PinnedMemory()) as pool,
        SwapEngine(pool, bound=policy, mode=mode) as engine,
        SwapEngine(64 << 20, bound=policy, mode=mode) as on_cpu,
    ):
        result = engine.store(keys, BlockView(pages, "2NHD"), sink=marks, measure_error=not small).result()
        assert result.violations == (None if small else 0)
        assert "coded_on_host" not in engine.stats().fallbacks
        host = [p.cpu() for p in original]
        on_cpu.store(keys, BlockView(host, "2NHD"), sink=marks, measure_error=not small)
        for key in keys:
            assert engine.read_record(key) == on_cpu.read_record(key)
        for p in pages:
            p.fill_(7)
        engine.load(keys, BlockView(pages, "2NHD")).wait()
        on_cpu.load(keys, BlockView(host, "2NHD"))
    for page, expected, before in zip(pages, host, original, strict=True):
        assert torch.equal(page.cpu().view(torch.int16), expected.view(torch.int16))
        assert small or torch.equal(page[::10].view(torch.int16), before[::10].view(torch.int16))
