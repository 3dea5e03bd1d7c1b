# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Blocks on GPUs without the CUDA part of the native library: Triton or the host codec, by way of torch.

Triton runs in its interpreter here, on CPU tensors. `TorchSwap` runs on CPU tensors that a view says lie on a GPU.
tests/gpu/test_gpu_portable.py has both on a GPU.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import triton_bridge as bridge
from fake_cuda import FakeTensor
from triton_bridge import torch

from kvzip import (
    BackendUnavailableError,
    BlockLayout,
    BlockView,
    CorruptRecordError,
    ErrorBound,
    HostPool,
    SwapEngine,
    TransferError,
    _cuda,
    get_codec,
)
from kvzip.backends import portable, triton
from kvzip.backends.base import EncodeRequest
from kvzip.backends.cuszp import CuszpCodec
from kvzip.backends.portable import PortableCodec, codec_for, device_codec
from kvzip.cuda_codec import CudaCodec
from kvzip.interop.torch import to_device, to_host
from kvzip.staging import Staging
from kvzip.torch_swap import TorchSwap
from kvzip.types import empty_view

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes what a mask then drops
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
]

BLOCKS = 6
KEYS = [b"key-%d" % i for i in range(BLOCKS)]


def tensors(dtype: str = "bfloat16") -> list[Any]:
    values = torch.from_numpy(np.random.default_rng(3).normal(size=(2, BLOCKS, 2, 16, 2, 8)))
    values[:, 3, 0, 2, 1, 5] = torch.nan
    return [layer.to(getattr(torch, dtype)).contiguous() for layer in values]


def bits(layers: list[Any]) -> list[Any]:
    return [layer.view(torch.uint8).numpy() for layer in layers]


# ---- the codec -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> PortableCodec:
    """The codec of an engine, with Triton on CPU tensors."""
    if bridge.device() != "cpu":
        pytest.skip("tests/gpu has this")
    bridge.shorten_interpreter(monkeypatch)
    return PortableCodec(get_codec("cuszp"), use_triton=True, kind="cpu")


@pytest.mark.parametrize(
    ("dtype", "mode", "bound", "coder"),
    [
        ("bfloat16", "fixed", "1e-3", "triton"),
        ("float16", "fixed", "abs:1e-2", "triton"),
        ("bfloat16", "plain", "lossless", "triton"),
        ("bfloat16", "plain", "1e-3", "host"),
        ("float16", "outlier", "1e-2", "host"),
        ("float32", "fixed", "1e-3", "host"),
    ],
)
def test_an_engine_keeps_the_records_of_the_host_codec(
    on_triton: PortableCodec, dtype: str, mode: str, bound: str, coder: str
) -> None:
    layers = tensors(dtype)
    view = BlockView(layers, "2NHD")
    settings = {"bound": ErrorBound.parse(bound), "mode": mode}
    with SwapEngine(1 << 20, codec=on_triton, **settings) as engine, SwapEngine(1 << 20, **settings) as expected:
        result = engine.store(KEYS, view, measure_error=True).result()
        assert result.violations == 0
        expected.store(KEYS, view, measure_error=True)
        for key in KEYS:
            assert engine.read_record(key) == expected.read_record(key)
        loaded, wanted = (BlockView([torch.zeros_like(t) for t in layers], view.layout) for _ in range(2))
        engine.load(KEYS[::-1], loaded)
        expected.load(KEYS[::-1], wanted)
        for a, b in zip(bits(loaded.tensors), bits(wanted.tensors), strict=True):
            assert np.array_equal(a, b)
    assert on_triton.blocks == {coder: 3 * BLOCKS}  # stored, measured, loaded


def test_records_of_other_modes_are_decoded_on_the_host(on_triton: PortableCodec) -> None:
    layers = tensors()
    view = BlockView(layers, "2NHD")
    with SwapEngine(1 << 20, bound=ErrorBound.relative(1e-3), mode="plain") as engine:
        engine.store(KEYS[:3], view[range(3)])
        engine.configure(codec=on_triton, mode="fixed")
        engine.store(KEYS[3:], view[range(3, 6)])
        out = BlockView([torch.zeros_like(t) for t in layers], view.layout)
        engine.load(KEYS[3:], out[range(3)])
        engine.load(KEYS[:3], out[range(3)])
    assert on_triton.blocks == {"triton": 6, "host": 3}


def test_triton_refuses_damaged_records(on_triton: PortableCodec) -> None:
    view = BlockView(tensors(), "2NHD")
    out = np.empty((BLOCKS, on_triton.max_payload_bytes(view.layout)), np.uint8)
    table, sizes = on_triton.encode_blocks(view, EncodeRequest(ErrorBound.relative(1e-3)), out)
    payloads = [row[: int(n)] for row, n in zip(out, sizes, strict=True)]
    target = BlockView([torch.full_like(t, 7) for t in view.tensors], view.layout)
    for damage in (lambda t, p: t["size"].__setitem__((1, 0), 17), lambda t, p: p.__setitem__(1, p[1][:-16])):
        bad_table, bad_payloads = table.copy(), list(payloads)
        damage(bad_table, bad_payloads)
        with pytest.raises(CorruptRecordError):
            on_triton.decode_blocks(target, bad_payloads, list(bad_table))
    assert all((t == 7).all() for t in target.tensors)


@pytest.mark.parametrize("coding", [1, 4, 6, 0x12, 255])
def test_a_raw_record_of_another_coding_is_refused_before_a_gpu_sees_it(coding: int) -> None:
    """The kernels read all codings of `cuszp`: what the format forbids in `raw` must not depend on the device."""
    codec = CudaCodec(get_codec("raw"))
    values = np.zeros((1, 2, 16, 2, 64), np.uint16)
    view = BlockView([values], "2NHD", dtype="bfloat16")
    out = np.empty((1, codec.max_payload_bytes(view.layout)), np.uint8)
    table, sizes = codec.encode_blocks(view, EncodeRequest(ErrorBound.lossless(), "none"), out)
    table["coding"][0, 1], table["bound"][0, 1] = coding, 1.0
    target = BlockView([FakeTensor(np.full_like(values, 7))], view.layout)
    for blocks in (view, target):
        with pytest.raises(CorruptRecordError, match=f"coding {coding} is not known to codec 'raw'"):
            codec.decode_blocks(blocks, [out[0, : int(sizes[0])]], list(table))
    assert (target.tensors[0].array == 7).all()


# ---- which one -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "gpu", "usable", "interpreted", "name", "words"),
    [
        ("", "", (True, ""), False, "cuda", "built with CUDA"),
        ("built without CUDA", "", (True, "triton 3"), False, "triton", "triton 3; built without CUDA"),
        ("built without CUDA", "", (True, "interpreter"), True, "host", "interpreter"),
        ("built without CUDA", "", (False, "pip install triton"), False, "host", "pip install triton"),
        ("built without CUDA", "no torch", (True, ""), False, "none", "built without CUDA; no torch"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    cuda: str,
    gpu: str,
    usable: tuple[bool, str],
    interpreted: bool,
    name: str,
    words: str,
) -> None:
    monkeypatch.setattr(_cuda, "unavailable", lambda: cuda)
    monkeypatch.setattr(portable, "gpu_problem", lambda: gpu)
    monkeypatch.setattr(triton, "available", lambda: usable)
    monkeypatch.setattr(triton, "interpreted", lambda: interpreted)
    choice = device_codec()
    assert choice.name == name
    assert words in choice.reason
    codec = get_codec("cuszp")
    assert codec_for(codec, "cpu") is codec
    if name == "none":
        with pytest.raises(BackendUnavailableError, match="built without CUDA; no torch"):
            codec_for(codec, "cuda:1")
    else:
        assert codec_for(codec, "cuda:1").devices == ("cpu", "cuda")


# ---- the engine's side -----------------------------------------------------------------------------------------------


class Here:
    """Streams that run at once."""

    def __init__(self, device: int) -> None:
        self.waits = 0

    @contextlib.contextmanager
    def behind(self, event: object) -> Iterator[None]:
        assert event == "event"
        yield
        self.waits += 1


class Rig:
    """An engine, and blocks that say that they lie on a GPU."""

    def __init__(self, **settings: Any) -> None:
        self.layers = tensors()
        self.original = [a.copy() for a in bits(self.layers)]
        self.view = self.on_gpu(self.layers)
        self.pool = HostPool(1 << 20)
        self.engine = SwapEngine(self.pool, **settings)
        self.swap = TorchSwap(
            0,
            self.engine._index,
            self.engine._store_lock,
            self.engine,
            Staging(chunk_bytes=2 * self.view.layout.nbytes),
            use_triton=False,
            lanes=Here,
            mark=lambda stream, device: "event",
        )
        self.engine._devices["cuda:0"] = self.swap

    @staticmethod
    def on_gpu(layers: list[Any]) -> BlockView:
        view = BlockView(layers, "2NHD")
        view.device = "cuda:0"
        return view

    def check(self, layers: list[Any], good: list[int]) -> None:
        for got, want in zip(bits(layers), self.original, strict=True):
            assert np.array_equal(got[good], want[good])

    def close(self) -> None:
        self.engine.close()
        self.pool.check()
        self.pool.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(bound=ErrorBound.lossless())
    yield made
    made.close()


def test_store_and_load(rig: Rig) -> None:
    stored = rig.engine.store(KEYS, rig.view, measure_error=True)
    assert stored.result(10).violations == 0
    stored.wait_stream()
    with SwapEngine(1 << 20, bound=ErrorBound.lossless()) as expected:
        expected.store(KEYS, BlockView(rig.layers, "2NHD"), measure_error=True)
        assert [rig.engine.read_record(k) for k in KEYS] == [expected.read_record(k) for k in KEYS]
    order = [4, 0, 5, 2, 1, 3]
    out = [torch.zeros_like(t) for t in rig.layers]
    loaded = rig.engine.load([KEYS[i] for i in order], rig.on_gpu(out)[order])
    assert loaded.result(10).raw_bytes == rig.view.nbytes
    rig.check(out, list(range(BLOCKS)))
    stats = rig.engine.stats()
    assert stats.portable_blocks == {"host": 2 * BLOCKS}
    assert (stats.stored_blocks, stats.loaded_blocks) == (BLOCKS, BLOCKS)
    assert [lane.waits for lane in rig.swap._lanes] == [1, 1]


def test_a_load_names_the_damaged_records_and_loads_the_others(rig: Rig) -> None:
    rig.engine.store(KEYS, rig.view).wait()
    for i in (1, 4):
        allocation = rig.engine._index.find([KEYS[i]])[0].allocation
        rig.pool.views(allocation)[0][-20] ^= 1
    out = [torch.full_like(t, 7) for t in rig.layers]
    with pytest.raises(CorruptRecordError, match="2 of 6 records are damaged") as caught:
        rig.engine.load(KEYS, rig.on_gpu(out)).wait(10)
    assert caught.value.blocks == (1, 4)
    rig.check(out, [0, 2, 3, 5])
    assert all((t[[1, 4]] == 7).all() for t in out)
    assert rig.engine.stats().corrupt_blocks == 2


def test_a_codec_that_fails_is_replaced_by_raw(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> None:
    def fail(*arguments: object) -> None:
        raise MemoryError("no scratch")

    monkeypatch.setattr(CuszpCodec, "encode_blocks", fail)
    assert rig.engine.store(KEYS, rig.view).result(10).fallbacks == {"encoder_failed": 4 * BLOCKS}
    out = [torch.zeros_like(t) for t in rig.layers]
    rig.engine.load(KEYS, rig.on_gpu(out)).wait(10)
    rig.check(out, list(range(BLOCKS)))


def test_an_engine_that_is_dropped_ends_its_threads() -> None:
    rig = Rig(bound=ErrorBound.lossless())
    rig.engine.store(KEYS, rig.view).wait(10)
    rig.engine.load(KEYS, rig.view).wait(10)
    threads = [rig.swap._out._thread, rig.swap._into._thread]

    def drop() -> None:
        del rig.engine, rig.swap
        gc.collect()

    with pytest.warns(ResourceWarning, match="was not closed"):
        drop()
    for thread in threads:
        assert thread is not None
        thread.join(10)
        assert not thread.is_alive()
    rig.pool.close()


def test_errors_reach_the_transfer(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> None:
    rig.engine.store(KEYS, rig.view).wait()

    def fail(*arguments: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(portable, "to_device", fail)
    with pytest.raises(TransferError, match="a load failed: RuntimeError: CUDA error"):
        rig.engine.load(KEYS, rig.view).wait(10)
    monkeypatch.undo()
    monkeypatch.setattr(portable, "to_host", fail)
    monkeypatch.setattr("kvzip.coding.to_host", fail)
    with pytest.raises(TransferError, match="a store failed"):
        rig.engine.store(KEYS, rig.view).wait(10)
    assert rig.engine.stats().records == BLOCKS


def test_an_engine_says_what_codes_for_a_gpu_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvzip._log._logged", set())
    choice = portable.DeviceCodec("triton", "the native library was built without CUDA")
    monkeypatch.setattr("kvzip.engine.device_codec", lambda: choice)
    monkeypatch.setattr(TorchSwap.__init__, "__kwdefaults__", {"lanes": Here, "mark": lambda stream, device: "event"})
    with SwapEngine(1 << 20) as engine:
        assert isinstance(engine._device("cuda:0"), TorchSwap)
        engine._device("cuda:1")
    assert caplog.text.count("blocks on GPUs are coded by triton: the native library was built without CUDA") == 1
    monkeypatch.setattr("kvzip.engine.device_codec", lambda: portable.DeviceCodec("none", "install a driver"))
    with SwapEngine(1 << 20) as engine, pytest.raises(BackendUnavailableError, match="install a driver"):
        engine._device("cuda:0")


# ---- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dims", ["2NHD", "HN2D", "opaque", "bytes"])
def test_copies_of_strided_pages(dims: str, dtype: str) -> None:
    shape = (9, 5, 3, 2, 8) if dims == "HN2D" else (9, 2, 3, 5, 8)
    tensor = torch.randn(shape).to(getattr(torch, dtype))[::2]
    if dims in ("opaque", "bytes"):
        layout = BlockLayout.opaque([tensor], dtype="opaque" if dims == "bytes" else None)
    else:
        layout = BlockLayout.from_tensors([tensor], dims)
    view = BlockView([tensor], layout, [3, 0, 4])
    copy = to_host(view)
    expected = empty_view(layout, 3)
    for b in range(3):
        for s in range(len(layout.segments)):
            assert np.array_equal(copy.page(b, s), view.page(b, s))
            expected.page(b, s)[...] = view.page(b, s)
    before = tensor.clone()
    tensor[[3, 0, 4]] = 0
    to_device(expected, view)
    assert torch.equal(tensor, before)
