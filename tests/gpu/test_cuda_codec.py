# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The CUDA codec against the CPU codec: the same bytes both ways, hostile bytes, graphs, asynchrony, limits."""

from __future__ import annotations

import itertools
import time
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
    FIXED,
    FP16,
    FP32,
    LOSSLESS,
    LOSSLESS_RICE,
    OPAQUE,
    OUTLIER,
    PLAIN,
    RAW,
    RICE,
    Batch,
    Encoded,
    GpuDecode,
    GpuEncode,
    Spec,
    check_both_ways,
)

from kvzip.errors import KvzipError, NativeError

pytestmark = pytest.mark.gpu

DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32, "opaque": OPAQUE}
CODINGS = {"fixed": FIXED, "plain": PLAIN, "outlier": OUTLIER, "lossless": LOSSLESS, "raw": RAW}


#: tokens, heads, head_dim: what the fast path takes, at its edges
FAST = [(16, 8, 128), (16, 3, 64), (16, 1, 256), (16, 2, 8), (32, 5, 24), (48, 1, 72), (16, 16, 128), (64, 4, 128)]
#: and what it does not
GENERAL = [(16, 2, 20), (17, 3, 40), (1, 1, 4097), (5, 3, 7), (1, 1, 1), (33, 1, 96)]


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", FAST, ids=str)
def test_fast_path(cuda: tuple[Any, Any], shape: tuple[int, int, int], dtype: str, coding: str) -> None:
    tokens, heads, head_dim = shape
    specs = [
        Spec(DTYPES[dtype], tokens, heads, head_dim, coding=CODINGS[coding], bound=bound, bound_kind=kind,
             heads_first=heads_first, pad=pad, kind=1 + heads_first)
        for (bound, kind), heads_first, pad in [
            ((1e-2, BOUND_RELATIVE), False, 0),
            ((1e-3, BOUND_RELATIVE), True, 8),
            ((2e-5, BOUND_RELATIVE), False, 16),
            ((0.05, BOUND_ABSOLUTE), True, 0),
        ]
    ]  # fmt: skip
    check_both_ways(Batch.random(*cuda, specs, 36, seed=tokens * heads + head_dim))


#: bounds by token and by channel: some that make it small, some that a page is too fine for, an exact channel or none
WITHIN = [
    {"bound": 0.17, "bound_kind": BOUND_TOKEN_RMS},
    {"bound": 0.01, "bound_kind": BOUND_TOKEN_RMS},
    {"bound": 1.5, "bound_kind": BOUND_TOKEN_RMS},
    {"bound": 0.5, "bound_kind": BOUND_CHANNEL_TABLE, "exact_channels": 0},
    {"bound": 0.02, "bound_kind": BOUND_CHANNEL_TABLE, "exact_channels": 0},
    {"bound": 0.5, "bound_kind": BOUND_CHANNEL_TABLE},
]


@pytest.mark.parametrize("coding", ["fixed", "plain", "outlier"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", FAST, ids=str)
def test_bounds_within_pages(cuda: tuple[Any, Any], shape: tuple[int, int, int], dtype: str, coding: str) -> None:
    """On the fast path; pages with one bound, lossless and raw ones are among them."""
    specs = [
        Spec(DTYPES[dtype], *shape, coding=CODINGS[coding], heads_first=bool(i % 2), pad=8 * (i % 3), **how)
        for i, how in enumerate(WITHIN)
    ]
    specs += [Spec(DTYPES[dtype], *shape), Spec(DTYPES[dtype], *shape, coding=LOSSLESS)]
    specs += [Spec(DTYPES[dtype], *shape, coding=RAW, bound_kind=BOUND_TOKEN_RMS)]
    for strips_per_warp in (0, 1, 3):
        batch = Batch.random(*cuda, specs, 24, seed=sum(shape) + strips_per_warp)
        check_both_ways(batch, packed=True, header=96, strips_per_warp=strips_per_warp)


@pytest.mark.parametrize("coding", ["fixed", "plain", "outlier"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("group_tokens", [16, 8, 4, 2, 1])
def test_bounds_within_other_pages(cuda: tuple[Any, Any], group_tokens: int, dtype: str, coding: str) -> None:
    specs = [
        Spec(DTYPES[dtype], *shape, group_tokens=group_tokens, coding=CODINGS[coding], pad=i % 3, **how)
        for i, (shape, how) in enumerate(zip(GENERAL, WITHIN, strict=True))
    ]
    check_both_ways(Batch.random(*cuda, specs, 24, seed=group_tokens))


def test_very_many_vectors(cuda: tuple[Any, Any]) -> None:
    """Bounds by token of pages that the fast path has no room for, and of pages that no path takes."""
    torch, driver = cuda
    how = {"bound": 0.17, "bound_kind": BOUND_TOKEN_RMS}
    check_both_ways(Batch.random(torch, driver, [Spec(BF16, 512, 32, 8, **how), Spec(BF16, 16, 1, 64)], 12, seed=31))
    check_both_ways(Batch.random(torch, driver, [Spec(FP16, 128, 16, 64, **how)], 12, seed=32))
    with pytest.raises(NativeError, match="contract"):
        GpuEncode(Batch.random(torch, driver, [Spec(BF16, 1024, 32, 8, **how)], 2, seed=33)).launch()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_tokens", [16, 8, 4, 2, 1])
def test_general_path(cuda: tuple[Any, Any], group_tokens: int, dtype: str, coding: str) -> None:
    specs = [
        Spec(DTYPES[dtype], *shape, group_tokens=group_tokens, coding=CODINGS[coding], bound=bound, bound_kind=kind,
             heads_first=heads_first, pad=pad)
        for shape, (bound, kind), (heads_first, pad) in zip(
            GENERAL,
            [(1e-2, BOUND_RELATIVE), (1e-3, BOUND_RELATIVE), (1e-4, BOUND_RELATIVE), (0.1, BOUND_ABSOLUTE),
             (1.0, BOUND_LOSSLESS), (1e-38, BOUND_ABSOLUTE)],
            itertools.cycle([(False, 0), (True, 1), (False, 3)]),
            strict=False,
        )
    ]  # fmt: skip
    check_both_ways(Batch.random(*cuda, specs, 24, seed=group_tokens))


def test_mixed_segments(cuda: tuple[Any, Any]) -> None:
    """Dtypes, geometries and codings of one batch may differ."""
    specs = [
        Spec(dtype, tokens, heads, head_dim, coding=coding, bound_kind=kind, bound=10.0**-exponent)
        for (dtype, coding), (tokens, heads, head_dim), kind, exponent in zip(
            itertools.product(DTYPES.values(), CODINGS.values()),
            itertools.cycle(FAST[:4] + GENERAL),
            itertools.cycle([BOUND_RELATIVE, BOUND_ABSOLUTE, BOUND_RELATIVE, BOUND_LOSSLESS]),
            itertools.cycle([1, 2, 3, 4, 5]),
            strict=False,
        )
    ]
    check_both_ways(Batch.random(*cuda, specs, 24, seed=5), packed=True, header=100)


def test_pages_larger_than_shared_memory(cuda: tuple[Any, Any]) -> None:
    specs = [
        Spec(BF16, 16, 64, 256),
        Spec(BF16, 1024, 8, 128, bound=1e-2),
        Spec(OPAQUE, 1, 1, (1 << 20) + 3),
        Spec(FP32, 1, 1, 300_001, group_tokens=1),
    ]
    check_both_ways(Batch.random(*cuda, specs, 12, seed=6))


@pytest.mark.parametrize("strips_per_warp", [1, 2, 3, 4, 8, 128])
@pytest.mark.parametrize("max_ctas", [1, 7, 0])
@pytest.mark.parametrize(("packed", "header"), [(True, 0), (True, 2048), (False, 96)])
def test_launch_shapes(cuda: tuple[Any, Any], strips_per_warp: int, max_ctas: int, packed: bool, header: int) -> None:
    """The bytes do not depend on how the work is spread."""
    specs = [Spec(BF16, 16, 9, 64), Spec(BF16, 32, 3, 64, bound=1e-2), Spec(BF16, 16, 3, 64, coding=OUTLIER)]
    batch = Batch.random(*cuda, specs, 40, seed=8)
    check_both_ways(batch, strips_per_warp=strips_per_warp, max_ctas=max_ctas, packed=packed, header=header)


def test_many_small_blocks(cuda: tuple[Any, Any]) -> None:
    """Look-back over tens of thousands of pages and records; states are cleared behind the kernel."""
    for specs in ([Spec(BF16, 16, 1, 64)], [Spec(FP16, 16, 1, 8)] * 3, [Spec(BF16, 8, 1, 16, group_tokens=8)]):
        batch = Batch.random(*cuda, specs, 20_000, seed=9)
        check_both_ways(batch, packed=True, header=176)
        check_both_ways(batch, packed=True)


#: of the million pages
BOUND_KINDS = [BOUND_RELATIVE, BOUND_RELATIVE, BOUND_ABSOLUTE, BOUND_TOKEN_RMS, BOUND_CHANNEL_TABLE]


@pytest.mark.slow
def test_a_million_pages(cuda: tuple[Any, Any]) -> None:
    """At least 1,000,000 pages of mixed dtypes, geometries, codings and bounds, of the Rice codings every fourth."""
    rng = np.random.default_rng(1)
    pages = seed = 0
    while pages < 1_000_000:
        seed += 1
        fast = seed % 3 != 0
        codings = [RICE, RICE, LOSSLESS_RICE, RAW] if seed % 4 == 0 else [FIXED, FIXED, FIXED, PLAIN, OUTLIER, LOSSLESS]
        dtype = int(rng.integers(2)) if fast else int(rng.integers(4))
        specs = []
        for _ in range(8):
            group = 16 if fast else int(rng.choice([16, 8, 4, 2, 1]))
            specs.append(
                Spec(
                    dtype if fast else int(rng.integers(4)),
                    int(rng.choice([16, 16, 32])) if fast else int(rng.integers(1, 40)),
                    int(rng.integers(1, 5)),
                    int(rng.choice([8, 32, 64, 64, 128])) if fast else int(rng.integers(1, 48)),
                    group_tokens=group,
                    coding=int(rng.choice(codings)),
                    bound_kind=int(rng.choice(BOUND_KINDS)),
                    bound=10.0 ** -rng.uniform(0, 4),
                    exact_channels=int(rng.choice([0, 0, 37])),
                    heads_first=bool(rng.integers(2)),
                    pad=int(rng.integers(2)) * (8 if fast else 1),
                )
            )
        batch = Batch.random(*cuda, specs, 2500, seed=100 + seed)
        check_both_ways(batch, packed=bool(rng.integers(2)), header=int(rng.integers(3)) * 96)
        pages += batch.pages


def test_real_kv_data(cuda: tuple[Any, Any], kv_cache: npt.NDArray[Any]) -> None:
    torch, driver = cuda
    layers, _, tokens, heads, head_dim = kv_cache.shape
    blocks = tokens // 16
    cut = kv_cache[:, :, : blocks * 16].reshape(layers * 2, blocks, -1)
    memories = [torch.from_numpy(np.ascontiguousarray(page).view(np.uint8).reshape(-1)).cuda() for page in cut]
    for coding, bound in [(FIXED, 1e-2), (FIXED, 1e-3), (PLAIN, 1e-2), (OUTLIER, 1e-2), (LOSSLESS, 1.0), (FIXED, 1e-5)]:
        specs = [Spec(BF16, 16, heads, head_dim, coding=coding, bound=bound)] * len(memories)
        check_both_ways(Batch(torch, driver, specs, memories, np.arange(blocks)[::-1]), packed=True, header=4096)


def hostile(encoded: Encoded, rng: np.random.Generator) -> Encoded:
    """A copy with damage in about half of the blocks: bytes, classes, table entries."""
    payloads = encoded.payloads.cpu().numpy().copy()
    table = encoded.table.copy()
    for b in range(len(table)):
        if rng.integers(2):
            continue
        start, size = int(encoded.starts[b]), int(encoded.payload_bytes[b])
        for _ in range(int(rng.integers(1, 4))):
            s = int(rng.integers(table.shape[1]))
            entry = table[b, s]
            at = start + int(encoded.table[b, s]["offset"]) * 16
            damage = int(rng.integers(8))
            if damage == 0:
                entry["offset"] = rng.choice([0, int(entry["offset"]) + 1, 2**32 - 1, rng.integers(2**32)])
            elif damage == 1:
                entry["size"] = rng.choice(
                    [0, int(entry["size"]) ^ 1, int(entry["size"]) + 16, 2**32 - 1, rng.integers(2**32)]
                )
            elif damage == 2:
                entry["coding"] = rng.integers(256) if rng.integers(2) else rng.integers(8) | rng.integers(4) << 4
            elif damage == 3:
                entry["bound"] = rng.choice([0, np.nan, np.inf, -1, 1e-30, 2.0**-96, 2.0**120, 3.0])
            elif damage == 4:
                entry["param"] = rng.integers(256)
            elif damage == 5:
                payloads[start + rng.integers(size)] = rng.integers(256)
            elif damage == 6:  # classes change places: the size that they imply stays
                i, j = at + int(rng.integers(4)), at + int(rng.integers(64))
                if j < start + size:
                    payloads[[i, j]] = payloads[[j, i]]
            else:
                first = start + int(rng.integers(size))
                payloads[first : start + size] = rng.integers(0, 256, start + size - first)
    import torch

    return Encoded(torch.from_numpy(payloads).to(encoded.payloads.device), encoded.starts, encoded.payload_bytes, table)


HOSTILE = {
    "bfloat16": [
        Spec(BF16, 16, 3, 64),
        Spec(BF16, 16, 2, 24, coding=OUTLIER, bound=1e-2),
        Spec(BF16, 32, 1, 64, coding=LOSSLESS),
        Spec(BF16, 16, 2, 64, **WITHIN[0]),
        Spec(BF16, 16, 1, 72, **WITHIN[3]),
    ],
    "float16": [
        Spec(FP16, 16, 3, 64, coding=PLAIN),
        Spec(FP16, 16, 2, 24, **WITHIN[0]),
        Spec(FP16, 16, 1, 64, coding=OUTLIER),
        Spec(FP16, 32, 1, 64, **WITHIN[5]),
    ],
    "general": [
        Spec(FP32, 7, 3, 9, group_tokens=4, coding=OUTLIER),
        Spec(BF16, 5, 1, 30, group_tokens=2, coding=PLAIN),
        Spec(FP16, 3, 2, 11, group_tokens=1, coding=LOSSLESS),
        Spec(OPAQUE, 3, 1, 77, group_tokens=1),
        Spec(FP32, 7, 3, 9, group_tokens=8, **WITHIN[0]),
        Spec(BF16, 5, 2, 9, group_tokens=4, coding=PLAIN, **WITHIN[3]),
    ],
}


@pytest.mark.parametrize("all_or_nothing", [False, True])
@pytest.mark.parametrize("extended", [0, 2, 3])
@pytest.mark.parametrize("specs", HOSTILE)
def test_hostile_records(cuda: tuple[Any, Any], specs: str, extended: int, all_or_nothing: bool) -> None:
    """The CPU's verdicts; what is refused leaves every byte of memory alone, what is taken decodes equally.

    What was not asked for is refused as well: Rice codings, and bounds within pages.
    """
    rng = np.random.default_rng(3)
    chosen = [spec for spec in HOSTILE[specs] if spec.extended & ~extended == 0]
    batch = Batch.random(*cuda, chosen, 300, seed=12)
    batch.give_tables()
    good = bridge.encode_cpu(batch)
    refused = 0
    for round_ in range(6):
        bad = hostile(good, rng)
        if all_or_nothing and round_ == 5:
            bad = good
        coding, steps = bad.table["coding"] & 0x0F, bad.table["coding"] & 0x30
        unasked = (coding >= bridge.RICE if not extended & 1 else coding > 15) | ((steps != 0) & (extended == 0))
        verdicts = np.where(unasked.any(axis=1), 2, bridge.verdicts_cpu(batch, bad))
        out = batch.like()
        out.give_tables()
        expected = out.host_memories()
        job = GpuDecode(out, bad, all_or_nothing=all_or_nothing, extended=extended)
        job.launch()
        assert np.array_equal(job.statuses(), verdicts)
        taken = [] if all_or_nothing and verdicts.any() else np.flatnonzero(verdicts == 0).tolist()
        bridge.decode_cpu(out, bad, taken, expected)
        for found, wanted in zip(out.host_memories(), expected, strict=True):
            assert np.array_equal(found, wanted)
        refused += int((verdicts != 0).sum())
    assert refused > 100


@pytest.mark.parametrize("all_or_nothing", [False, True])
def test_wrong_checksums(cuda: tuple[Any, Any], all_or_nothing: bool) -> None:
    """A block whose payload is not what its checksum says is refused, also where the codes are valid."""
    specs = [Spec(BF16, 16, 8, 128), Spec(BF16, 16, 3, 64, coding=LOSSLESS), Spec(BF16, 16, 3, 64, coding=RAW)]
    batch = Batch.random(*cuda, specs, 200, seed=22)
    good = bridge.encode_cpu(batch)
    crcs = bridge.checksums(good)
    rng = np.random.default_rng(4)
    payloads = good.payloads.cpu().numpy().copy()
    wrong = np.sort(rng.choice(200, 50, replace=False))
    for b in wrong:  # one bit of the raw page at the end
        at = int(good.starts[b]) + int(good.table[b, 2]["offset"]) * 16 + int(rng.integers(16 * 3 * 64 * 2))
        payloads[at] ^= 1 << int(rng.integers(8))
    import torch

    bad = Encoded(torch.from_numpy(payloads), good.starts, good.payload_bytes, good.table)
    bad.payloads = bad.payloads.to(batch.memories[0].device)
    assert not bridge.verdicts_cpu(batch, bad).any()
    out = batch.like()
    expected = out.host_memories()
    job = GpuDecode(out, bad, all_or_nothing=all_or_nothing, crc32c=crcs)
    for _ in range(2):  # the second finds the workspace as the first did
        job.launch()
        assert np.array_equal(np.flatnonzero(job.statuses()), wrong)
    bridge.decode_cpu(out, bad, [] if all_or_nothing else sorted(set(range(200)) - set(wrong.tolist())), expected)
    for found, wanted in zip(out.host_memories(), expected, strict=True):
        assert np.array_equal(found, wanted)
    assert not bool(out.workspace.any())


def test_arena_too_small(cuda: tuple[Any, Any]) -> None:
    """The status says so, the table is complete, and nothing is written behind the arena."""
    specs = [Spec(BF16, 16, 3, 64), Spec(BF16, 16, 3, 64, coding=RAW)]
    batch = Batch.random(*cuda, specs, 60, seed=13)
    cpu = bridge.encode_cpu(batch)
    for packed in (True, False):
        for arena_bytes in (0, 16, 100 * 256, 150 * 256):
            job = GpuEncode(batch, packed=packed, arena_bytes=arena_bytes, guard=1 << 20)
            job.launch()
            gpu = job.result()
            assert job.status.tolist() == [3, 1]
            assert np.array_equal(gpu.table, cpu.table)
            assert bool((job.arena[arena_bytes:] == 0xEE).all())
    assert not bool(batch.workspace.any())


def test_graph(cuda: tuple[Any, Any]) -> None:
    """Encode and decode, with checksums, are captured once and replayed on other values."""
    torch, driver = cuda
    specs = [Spec(BF16, 16, 3, 64), Spec(BF16, 16, 3, 64, bound=1e-2)]
    batch = Batch.random(torch, driver, specs, 50, seed=14)
    out = batch.like()
    encode = GpuEncode(batch, checksums=True)
    encode.launch()
    decode = GpuDecode(out, encode.result(), crc32c=np.zeros(50, np.uint32))
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        encode.launch()
        decode.payload_bytes.copy_(encode.payload_bytes.view(torch.uint8))
        decode.table.copy_(encode.table)
        decode.crc32c.copy_(encode.crc32c.view(torch.uint8))
        decode.launch()
    for seed in (15, 16, 17):
        for memory, spec in zip(batch.memories, specs, strict=True):
            memory.copy_(bridge.random_pages(torch, spec, memory.numel() // spec.strides()[0], seed))
        graph.replay()
        cpu = bridge.encode_cpu(batch)
        assert not bridge.differences(batch, cpu, encode.result())
        assert not decode.statuses().any()
        expected = out.host_memories()
        bridge.decode_cpu(out, cpu, range(len(batch.block_ids)), expected)
        for found, wanted in zip(out.host_memories(), expected, strict=True):
            assert np.array_equal(found, wanted)


def test_calls_do_not_wait(cuda: tuple[Any, Any]) -> None:
    """Behind a kernel that spins for a second, both calls return at once and nothing has happened yet."""
    torch, driver = cuda
    batch = Batch.random(torch, driver, [Spec(BF16, 16, 8, 128)], 12, seed=18)
    encode = GpuEncode(batch)
    encode.launch()
    good = encode.result()
    out = batch.like()
    decode = GpuDecode(out, good)
    decode.launch()  # the first launch of a kernel loads it
    decode.statuses()
    encode.status.fill_(99)
    decode.status.fill_(99)
    torch.cuda.synchronize()
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)
        start = time.perf_counter()
        encode.launch()
        decode.launch()
        event.record()
        took = time.perf_counter() - start
        assert not event.query(), "the latch ended too early to show anything"
    assert took < 0.1
    event.synchronize()
    assert encode.status.tolist() == [0, 1]
    assert not decode.statuses().any()


def test_streams_are_independent(cuda: tuple[Any, Any]) -> None:
    """Work on one stream goes on while another is held; an event makes a consumer see the result."""
    torch, driver = cuda
    batch = Batch.random(torch, driver, [Spec(BF16, 16, 8, 128)], 12, seed=19)
    encode = GpuEncode(batch)
    encode.launch()
    good = encode.result()
    out = batch.like()
    decode = GpuDecode(out, good)
    held, free, consumer = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(held):
        torch.cuda._sleep(1_000_000_000)
        latch = torch.cuda.Event()
        latch.record()
    decode.launch(free.cuda_stream)
    done = torch.cuda.Event()
    done.record(free)
    consumer.wait_event(done)
    with torch.cuda.stream(consumer):
        seen = out.memories[0].clone()
    consumer.synchronize()
    assert not latch.query(), "the latch ended too early to show anything"
    assert bool((seen == out.memories[0]).all())
    assert not decode.statuses().any()


def test_outputs_in_mapped_host_memory(cuda: tuple[Any, Any]) -> None:
    """Table, sizes and status can be written straight to pinned host memory, and read there without a copy."""
    import dataclasses

    torch, driver = cuda
    batch = Batch.random(torch, driver, [Spec(BF16, 16, 3, 64), Spec(BF16, 16, 3, 64, coding=PLAIN)], 500, seed=20)
    cpu = bridge.encode_cpu(batch)
    job = GpuEncode(batch, packed=True, header=96)
    table = torch.zeros(batch.pages * 16, dtype=torch.uint8).pin_memory()
    sizes, offsets = (torch.zeros(500, dtype=torch.int64).pin_memory() for _ in range(2))
    status = torch.zeros(4, dtype=torch.int32).pin_memory()
    job.args = dataclasses.replace(
        job.args,
        table=table.data_ptr(),
        payload_bytes=sizes.data_ptr(),
        record_offsets=offsets.data_ptr(),
        status=status.data_ptr(),
    )
    job.launch()
    torch.cuda.synchronize()
    assert status.tolist() == [0, 1, 0, 0]
    assert np.array_equal(table.numpy().view(cpu.table.dtype).reshape(cpu.table.shape), cpu.table)
    assert np.array_equal(sizes.numpy().astype(np.uint64), cpu.payload_bytes)
    starts = offsets.numpy().astype(np.uint64) + np.uint64(96)
    gpu = Encoded(job.arena, starts, cpu.payload_bytes, cpu.table)
    assert not bridge.differences(batch, cpu, gpu)


def test_refused_arguments(cuda: tuple[Any, Any]) -> None:
    import dataclasses

    torch, driver = cuda
    batch = Batch.random(torch, driver, [Spec(BF16, 16, 3, 64)], 4, seed=21)
    job = GpuEncode(batch)
    stream = torch.cuda.current_stream().cuda_stream
    for change in (
        {"arena": job.args.arena + 8},
        {"table": job.args.table + 4},
        {"block_ids": 0},
        {"workspace": 0},
        {"workspace_bytes": 8},
    ):
        with pytest.raises(NativeError):
            driver.encode(dataclasses.replace(job.args, **change), stream)
    odd = batch.segments.copy()
    odd["base"] += 1
    with pytest.raises(NativeError):
        driver.encode(dataclasses.replace(job.args, segments=odd), stream)
    with pytest.raises(KvzipError):
        driver.copy(0, 0, 16, stream)
    driver.encode(job.args, stream)  # errors do not stick
    torch.cuda.synchronize()


def test_batched_copies(cuda: tuple[Any, Any]) -> None:
    torch, driver = cuda
    source = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8).pin_memory()
    device = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    back = torch.zeros(1 << 20, dtype=torch.uint8).pin_memory()
    rng = np.random.default_rng(0)
    cuts = np.unique(np.concatenate([[0, 1 << 20], rng.integers(1, 1 << 20, 300)])).astype(np.uint64)
    starts, sizes = cuts[:-1], np.diff(cuts)
    order = rng.permutation(len(starts))
    starts, sizes = starts[order], sizes[order]
    stream = driver.stream_create()
    event = driver.event_create()
    driver.copy_batch(starts + np.uint64(device.data_ptr()), starts + np.uint64(source.data_ptr()), sizes, stream)
    driver.copy_batch(starts + np.uint64(back.data_ptr()), starts + np.uint64(device.data_ptr()), sizes, stream)
    driver.event_record(event, stream)
    driver.event_synchronize(event)
    assert driver.event_query(event)
    assert bool((back == source).all())
    driver.event_destroy(event)
    driver.stream_destroy(stream)


def test_device_report(cuda: tuple[Any, Any]) -> None:
    import dataclasses

    from kvzip import _cuda

    _, driver = cuda
    info = driver.device_info(0)
    assert info.name
    assert info.multiprocessors > 0
    assert info.capability >= (8, 0)
    report = _cuda.describe()
    assert report["devices"][0] == dataclasses.asdict(info)
    assert _cuda.unavailable() == ""
