# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The Triton codec on a GPU: the bytes of the native CPU codec on many pages, asynchrony, streams, hostile bytes.

tests/unit/test_triton_codec.py has the small cases; it runs on the GPU too where there is one.
"""

from __future__ import annotations

import adversarial
import numpy as np
import pytest
import reference_codec as ref
import triton_bridge as bridge
from bridge import layout_of
from triton_bridge import check_batch, check_hostile, codec, torch

from kvzip.types import BlockLayout, BlockView, BoundKind, ErrorBound

pytestmark = pytest.mark.gpu

RELATIVE = ErrorBound.relative(1e-3)


@pytest.fixture(autouse=True)
def _skip_without_gpu() -> None:
    if bridge.device() == "cpu":
        pytest.skip("Triton runs with its interpreter here: tests/unit has that")


#: tokens, heads, head_dim, group_tokens; few pairs of group shape and head division, because each is compiled anew
GEOMETRIES = [
    (16, 2, 32, 16),
    (16, 3, 21, 16),
    (16, 1, 700, 16),
    (33, 1, 8, 16),
    (1, 1, 4096, 1),
    (1, 1, 1, 1),
    (1, 1, 5000, 1),
    (5, 3, 7, 1),
    (19, 2, 9, 4),
]


@pytest.mark.parametrize("dtype", [ref.BF16, ref.FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", GEOMETRIES, ids=str)
def test_many_pages(shape: tuple[int, int, int, int], dtype: int) -> None:
    """Pages of every flavour, each bound kind, bounds over the whole range: 3,000 pages a case."""
    tokens, heads, head_dim, group_tokens = shape
    geometry = ref.Geometry(tokens, heads, head_dim, dtype, group_tokens)
    flavours = sorted(adversarial.FLAVOURS)
    rng = np.random.default_rng(sum(shape) + dtype)
    layout = layout_of([geometry] * 3)
    for _ in range(5):
        bases = [
            np.stack(
                [
                    adversarial.page_bits(flavours[i % len(flavours)], int(rng.integers(2**32)), geometry)
                    for i in range(100)
                ]
            ).reshape(100, tokens, heads, head_dim)
            for _ in range(3)
        ]
        absolute = ErrorBound(BoundKind.ABSOLUTE, 2.0 ** float(rng.uniform(-30, 8)))
        extreme = ErrorBound(BoundKind.ABSOLUTE, 2.0 ** float(rng.uniform(-100, 125)))
        relative = ErrorBound.relative(10.0 ** float(rng.uniform(-6, 0)))
        for bounds in ([relative, absolute, ErrorBound.lossless()], [absolute, extreme, relative]):
            check_batch(bases, layout, bounds, list(rng.permutation(100)))


@pytest.mark.parametrize("bound", ["1e-2", "1e-3", "1e-4", "lossless"])
@pytest.mark.parametrize("dims", ["2NHD", "2HND"])
def test_real_kv_data(kv_cache: bridge.Bits, bound: str, dims: str) -> None:
    layers, _, tokens, heads, head_dim = kv_cache.shape
    count = tokens // 16
    blocks = kv_cache[:, :, : count * 16].reshape(layers, 2, count, 16, heads, head_dim).transpose(0, 2, 1, 3, 4, 5)
    if dims == "2HND":
        blocks = blocks.swapaxes(3, 4)
    check_batch([np.ascontiguousarray(layer) for layer in blocks], dims, ErrorBound.parse(bound))


@pytest.mark.parametrize("group_tokens", [16, 1])
@pytest.mark.parametrize("bound", [RELATIVE, ErrorBound.lossless(), ErrorBound.absolute(1e-30)], ids=str)
def test_large_pages(group_tokens: int, bound: ErrorBound) -> None:
    """Tens of thousands of tiles in one page."""
    tokens, channels = (4096, 4096) if group_tokens == 16 else (1, 1 << 24)
    values = np.random.default_rng(3).standard_normal(tokens * channels, np.float32)
    base = adversarial.from_float(values, ref.BF16).reshape(1, tokens, 1, channels)
    geometry = ref.Geometry(tokens, 1, channels, ref.BF16, group_tokens)
    check_batch([base], layout_of([geometry]), bound)


def _view(blocks: int, seed: int = 0) -> tuple[BlockView, bridge.Bits]:
    values = np.random.default_rng(seed).standard_normal((blocks, 2, 16, 8, 64))
    base = adversarial.from_float(values, ref.BF16)
    layout = BlockLayout.from_tensors([base], "2NHD", dtype="bfloat16")
    return BlockView([bridge.on_device(base)], layout), base


def test_calls_return_before_the_work_is_done_and_never_synchronise() -> None:
    view, base = _view(64)
    target = BlockView([torch.zeros_like(view.tensors[0])], view.layout)
    codec.check_status(codec.decode_blocks(target, *codec.encode_blocks(view, RELATIVE)))  # compiles
    target.tensors[0].zero_()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # a second or so
        encoded = codec.encode_blocks(view, RELATIVE)
        status = codec.decode_blocks(target, *encoded)
        done.record()
        assert not done.query(), "a call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    codec.check_status(status)
    payloads, table = bridge.fetch(encoded)
    expected, expected_table = bridge.native_encode(BlockView([base], view.layout), [RELATIVE, RELATIVE])
    assert table.tolist() == expected_table.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(payloads, expected, strict=True))


def test_streams() -> None:
    """Work goes to the stream that is given, and only there: what another stream wrote is seen after its event."""
    view, base = _view(32, seed=1)
    source = view.tensors[0]
    late = torch.zeros_like(source)
    late_view = BlockView([late], view.layout)
    codec.encode_blocks(late_view, RELATIVE)
    producer, worker = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    written = torch.cuda.Event()
    with torch.cuda.stream(producer):
        torch.cuda._sleep(500_000_000)
        late.copy_(source)
        written.record()
    worker.wait_event(written)
    encoded = codec.encode_blocks(late_view, RELATIVE, stream=worker)
    target = torch.zeros_like(source)
    torch.cuda.synchronize()
    status = codec.decode_blocks(BlockView([target], view.layout), *encoded, stream=worker)
    worker.synchronize()
    codec.check_status(status)
    payloads, _ = bridge.fetch(encoded)
    expected, _ = bridge.native_encode(BlockView([base], view.layout), [RELATIVE, RELATIVE])
    assert all(np.array_equal(a, b) for a, b in zip(payloads, expected, strict=True))


def test_plans_follow_the_tensors() -> None:
    """A plan is kept for tensors in their place; other tensors of the same shape get one of their own."""
    for seed in range(3):
        view, base = _view(4, seed)
        payloads, _ = bridge.fetch(codec.encode_blocks(view, RELATIVE))
        expected, _ = bridge.native_encode(BlockView([base], view.layout), [RELATIVE, RELATIVE])
        assert all(np.array_equal(a, b) for a, b in zip(payloads, expected, strict=True))


def test_hostile_records() -> None:
    """Damaged anywhere: the verdict and the pages are those of the CPU codec, and nothing beside the pages changes."""
    rng = np.random.default_rng(4)
    geometries = [ref.Geometry(16, 1, 37, ref.BF16, 16), ref.Geometry(7, 2, 9, ref.FP16, 1)]
    bases = [
        adversarial.page_bits("normal", 5 + i, g).reshape(1, g.tokens, g.heads, -1) for i, g in enumerate(geometries)
    ]
    layout = layout_of(geometries)
    refused = 0
    for bounds in ([RELATIVE, ErrorBound.lossless()], [ErrorBound.lossless(), RELATIVE]):
        payloads, table = bridge.native_encode(BlockView(bases, layout), bounds)
        for _ in range(400):
            payload, entries = payloads[0].copy(), table.copy()
            if rng.random() < 0.5:
                payload[rng.integers(payload.size)] ^= 1 << int(rng.integers(8))
            elif rng.random() < 0.5:
                payload[: payload.size // 2] = rng.integers(0, 256, payload.size // 2)
            else:
                raw = entries.view(np.uint8).reshape(-1)
                at = int(rng.integers(raw.size))
                if at % 16 in (12, 13, 15):  # coding, kind, reason: the other modes are not known here
                    continue
                raw[at] ^= 1 << int(rng.integers(8))
            refused += not check_hostile(layout, [payload], entries)
    assert 100 < refused < 800
