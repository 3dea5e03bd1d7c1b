# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Blocks on a GPU where the native library has no CUDA, or acts as if: Triton by way of torch, chosen by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvzip import BlockView, CorruptRecordError, ErrorBound, HostPool, SwapEngine, _cuda, decode, encode  # noqa: E402
from kvzip.backends.portable import device_codec  # noqa: E402
from kvzip.memory import PinnedMemory  # noqa: E402
from kvzip.staging import Staging  # noqa: E402
from kvzip.torch_swap import TorchSwap  # noqa: E402

pytestmark = pytest.mark.gpu

KEYS = [b"key-%d" % i for i in range(32)]


@pytest.fixture(autouse=True)
def _no_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    if not _cuda.unavailable():
        monkeypatch.setattr(_cuda, "unavailable", lambda: "the native library was built without CUDA (as if)")
    assert device_codec().name == "triton"


def paged(kv_cache: Any) -> list[Any]:
    layers, _, tokens, heads, head_dim = kv_cache.shape
    count = min(tokens // 16, len(KEYS))
    blocks = kv_cache[:, :, : count * 16].reshape(layers, 2, count, 16, heads, head_dim).swapaxes(1, 2)
    return [torch.from_numpy(np.ascontiguousarray(b).view(np.int16)).view(torch.bfloat16).cuda() for b in blocks]


@pytest.mark.parametrize(
    ("mode", "bound", "coder"),
    [
        ("fixed", "1e-3", "triton"),
        ("fixed", "1e-2", "triton"),
        ("fixed", "lossless", "triton"),
        ("plain", "1e-2", "host"),
    ],
)
def test_engine_by_way_of_triton(kv_cache: Any, mode: str, bound: str, coder: str) -> None:
    layers = paged(kv_cache)
    view = BlockView(layers, "2NHD")
    keys = KEYS[: len(view)]
    settings: dict[str, Any] = {"bound": ErrorBound.parse(bound), "mode": mode}
    with (
        HostPool(64 << 20, resource=PinnedMemory()) as pool,
        SwapEngine(pool, staging=Staging(chunk_bytes=4 << 20), **settings) as engine,
        SwapEngine(64 << 20, **settings) as expected,
    ):
        assert pool.pinned
        stored = engine.store(keys, view)
        assert (
            stored.result(60).fallbacks
            == expected.store(keys, BlockView([t.cpu() for t in layers], "2NHD")).result().fallbacks
        )
        assert isinstance(engine._devices["cuda:0"], TorchSwap)
        assert [engine.read_record(k) for k in keys] == [expected.read_record(k) for k in keys]
        out = BlockView([torch.zeros_like(t) for t in layers], view.layout)
        on_host = BlockView([torch.zeros_like(t, device="cpu") for t in layers], view.layout)
        engine.load(keys[::-1], out).wait_stream()
        expected.load(keys[::-1], on_host)
        for got, want in zip(out.tensors, on_host.tensors, strict=True):
            assert torch.equal(got.cpu().view(torch.int16), want.view(torch.int16))
        assert engine.stats().portable_blocks == {coder: 2 * len(keys)}


def test_order_against_the_callers_stream() -> None:
    layers = [torch.zeros((32, 2, 16, 2, 64), dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    view = BlockView(layers, "2NHD")
    stream = torch.cuda.Stream()
    with SwapEngine(64 << 20, bound=ErrorBound.lossless()) as engine, torch.cuda.stream(stream):
        engine.store(KEYS[:1], view[[0]]).wait()  # compiles the kernels
        torch.cuda._sleep(200_000_000)
        for layer in layers:
            layer.normal_()
        transfer = engine.store(KEYS, view)
        assert not transfer.done()
        transfer.wait_stream()
        original = [layer.clone() for layer in layers]
        for layer in layers:
            layer.zero_()
        engine.load(KEYS, view).wait_stream()
        assert all(torch.equal(a, b) for a, b in zip(layers, original, strict=True))
        assert original[0].any()


def test_damaged_records_leave_their_pages_alone() -> None:
    layers = [torch.randn((32, 2, 16, 2, 64), device="cuda").bfloat16()]
    view = BlockView(layers, "2NHD")
    with SwapEngine(64 << 20, bound=ErrorBound.lossless()) as engine:
        engine.store(KEYS, view).wait()
        engine.pool.views(engine._index.find([KEYS[3]])[0].allocation)[0][-20] ^= 1
        out = torch.full_like(layers[0], 7)
        with pytest.raises(CorruptRecordError) as caught:
            engine.load(KEYS, BlockView([out], "2NHD")).wait()
    assert caught.value.blocks == (3,)
    assert (out[3] == 7).all()
    assert torch.equal(out[4:], layers[0][4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bound", ["1e-3", "lossless"])
def test_encode_and_decode_of_a_tensor(dtype: Any, bound: str) -> None:
    x = torch.randn((16, 4, 64), device="cuda").to(dtype)
    record = encode(x, bound=ErrorBound.parse(bound), layout="NHD", measure_error=True)
    assert record == encode(x.cpu(), bound=ErrorBound.parse(bound), layout="NHD", measure_error=True)
    out, on_host = torch.zeros_like(x), torch.zeros_like(x, device="cpu")
    assert decode(record, out=out) is out
    decode(record, out=on_host)
    assert torch.equal(out.cpu(), on_host)
