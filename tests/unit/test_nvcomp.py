# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The nvCOMP backend without nvCOMP and without a GPU.

What a missing package or device does; and everything around nvCOMP's two calls (gathering, prefixes, packing, checks,
scattering) with a stand-in for its library that works on host memory through zlib.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib
import sys
import types
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvzip.backends import nvcomp
from kvzip.backends.base import EncodeRequest
from kvzip.backends.nvcomp import CHUNK_BYTES, ENCODED, CudaDevice, NvcompCodec, NvcompLibrary
from kvzip.errors import BackendUnavailableError, CorruptRecordError, CudaError, NativeError
from kvzip.record import Reason, crc32c
from kvzip.testing import check_codec
from kvzip.types import BlockView, ErrorBound

torch = pytest.importorskip("torch", reason="torch is not installed: the nvCOMP backend needs it")

LOSSLESS = EncodeRequest(ErrorBound.lossless(), "none")


# ---- a stand-in for nvCOMP


def _u64(address: int, count: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer((ctypes.c_uint64 * count).from_address(address), np.uint64)


class ZlibLibrary:
    """The interface of `NvcompLibrary` on host memory; a chunk is a zlib stream behind its data type."""

    version = "6.0.0"

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []  # (which, chunks, data type)
        self.fail: set[int] = set()  # chunks of the next call that fail

    def compress_temp_bytes(self, chunks: int, chunk_bytes: int, data_type: int, stream: int) -> int:
        return 0

    def decompress_temp_bytes(self, chunks: int, chunk_bytes: int, data_type: int, stream: int) -> int:
        return 64

    def compressed_bytes(self, chunk_bytes: int, data_type: int) -> int:
        return chunk_bytes + chunk_bytes // 100 + 64

    def compress(
        self,
        *,
        sources: int,
        source_bytes: int,
        chunk_bytes: int,
        chunks: int,
        temp: int,
        temp_bytes: int,
        targets: int,
        target_bytes: int,
        data_type: int,
        statuses: int,
        stream: int,
    ) -> None:
        self.calls.append(("compress", chunks, data_type))
        status = np.frombuffer((ctypes.c_int32 * chunks).from_address(statuses), np.int32)
        made = _u64(target_bytes, chunks)
        for i, (source, size, target) in enumerate(
            zip(_u64(sources, chunks), _u64(source_bytes, chunks), _u64(targets, chunks), strict=True)
        ):
            assert int(source) % 16 == int(target) % 16 == 0
            assert 0 < int(size) <= chunk_bytes
            data = bytes([data_type]) + zlib.compress(ctypes.string_at(int(source), int(size)), 1)
            ctypes.memmove(int(target), data, len(data))
            made[i], status[i] = len(data), 12 if i in self.fail else 0
        self.fail = set()

    def decompress(
        self,
        *,
        sources: int,
        source_bytes: int,
        target_capacity: int,
        target_bytes: int,
        chunks: int,
        temp: int,
        temp_bytes: int,
        targets: int,
        data_type: int,
        statuses: int,
        stream: int,
    ) -> None:
        self.calls.append(("decompress", chunks, data_type))
        status = np.frombuffer((ctypes.c_int32 * chunks).from_address(statuses), np.int32)
        made, capacity = _u64(target_bytes, chunks), _u64(target_capacity, chunks)
        for i, (source, size, target) in enumerate(
            zip(_u64(sources, chunks), _u64(source_bytes, chunks), _u64(targets, chunks), strict=True)
        ):
            assert int(source) % 16 == int(target) % 16 == 0
            data = ctypes.string_at(int(source), int(size))
            try:
                values = zlib.decompress(data[1:]) if data_type in (0xFF, data[0]) else b""
            except zlib.error:
                values = b""
            status[i], made[i] = (0 if 0 < len(values) <= capacity[i] else 12), len(values)
            if status[i] == 0:
                ctypes.memmove(int(target), values, len(values))


class HostDevice(CudaDevice):
    """Host memory in the place of a device's, filled with rubbish so that nothing can rely on zeros."""

    def __init__(self) -> None:
        self.torch, self.device = torch, torch.device("cpu")

    def __enter__(self) -> HostDevice:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    @property
    def stream(self) -> int:
        return 0

    def empty(self, nbytes: int) -> Any:
        size = -(-nbytes // 16) * 16
        whole = torch.full((size + 16,), 0xCD, dtype=torch.uint8)
        first = -whole.data_ptr() % 16
        return whole[first : first + size]

    staging = empty

    def synchronize(self) -> None:
        pass


class HostNvcomp(NvcompCodec):
    """The codec with both stand-ins."""

    devices = ("cpu",)

    def __init__(self) -> None:
        self._torch, self.library = torch, ZlibLibrary()
        self._library = self.library  # type: ignore[assignment]

    def _open(self, device: str | None) -> CudaDevice:
        return HostDevice()


class HostCodec(HostNvcomp):
    """Takes NumPy arrays too, as `check_codec` gives them."""

    def encode_blocks(self, blocks: BlockView, request: EncodeRequest, out: Any) -> Any:
        return super().encode_blocks(_as_torch(blocks), request, out)

    def decode_blocks(self, blocks: BlockView, payloads: Any, tables: Any, *, threads: int = 0) -> None:
        super().decode_blocks(_as_torch(blocks), payloads, tables, threads=threads)


def _as_torch(blocks: BlockView) -> BlockView:
    signed = {1: np.uint8, 2: np.int16, 4: np.int32}
    tensors = [torch.from_numpy(t.view(signed[t.itemsize])) for t in blocks.tensors]
    return BlockView(tensors, blocks.layout, blocks.block_ids)


@pytest.fixture
def codec() -> HostNvcomp:
    return HostNvcomp()


def _encode(codec: NvcompCodec, view: BlockView) -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[Any]]:
    out = np.full((len(view), codec.max_payload_bytes(view.layout)), 0xA5, np.uint8)
    tables, sizes = codec.encode_blocks(view, LOSSLESS, out)
    return [out[i, : int(n)].copy() for i, n in enumerate(sizes)], tables


def _kv(blocks: int, tokens: int = 64, heads: int = 4, head_dim: int = 128, seed: int = 0) -> Any:
    """bfloat16 pages that compress, of tokens x heads x head_dim."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((blocks, tokens, heads, head_dim), generator=generator)
    return (values * 4).round().to(torch.bfloat16)


# ---- missing parts


@pytest.fixture
def no_nvcomp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nvCOMP were not installed."""
    for name in [n for n in sys.modules if n.startswith(("nvidia.libnvcomp", "nvidia.nvcomp"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.libnvcomp", None)


def _install(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    """As if nvCOMP's package were installed and gave this library."""

    def load_library() -> Any:
        if isinstance(library, Exception):
            raise library
        return library

    package = types.ModuleType("nvidia.libnvcomp")
    package.load_library = load_library  # type: ignore[attr-defined]
    parent = types.ModuleType("nvidia")
    parent.__path__ = []
    monkeypatch.setitem(sys.modules, "nvidia", parent)
    monkeypatch.setitem(sys.modules, "nvidia.libnvcomp", package)


class _Entry:
    """A C function that answers with a status, and reports a version where it is asked for one."""

    def __init__(self, version: int = 6000, status: int = 0) -> None:
        self.version, self.status = version, status

    def __call__(self, *args: Any) -> int:
        if len(args) == 1:
            args[0]._obj.version = self.version
        return self.status


def _library(version: int = 6000, status: int = 0) -> Any:
    names = ("GetProperties", "BatchedANSCompressGetTempSize", "BatchedANSCompressGetMaxOutputChunkSize")
    names += ("BatchedANSCompressAsync", "BatchedANSDecompressGetTempSize", "BatchedANSDecompressAsync")
    return types.SimpleNamespace(**{f"nvcomp{name}": _Entry(version, status) for name in names})


@pytest.mark.usefixtures("no_nvcomp")
def test_missing_package_says_what_to_install() -> None:
    with pytest.raises(BackendUnavailableError, match=r"pip install 'kvzip\[nvcomp\]'.*nvidia-nvcomp-cu13.*cuszp"):
        NvcompCodec()


def test_import_needs_neither_torch_nor_nvcomp(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("torch", "nvidia"):
            raise AssertionError(f"{name} was imported")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    monkeypatch.delitem(sys.modules, "kvzip.backends.nvcomp")
    importlib.import_module("kvzip.backends.nvcomp")
    sys.modules["kvzip.backends.nvcomp"] = nvcomp


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, "cannot be loaded"),
        (OSError("libnvcomp.so.6: no such file"), "no such file"),
        (_library(version=5100), "nvCOMP 5.1.0 is installed, version 6 is needed"),
        (types.SimpleNamespace(), "lacks an entry point"),
    ],
)
def test_broken_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch, library: Any, message: str) -> None:
    _install(monkeypatch, library)
    with pytest.raises(BackendUnavailableError, match=message):
        NvcompCodec()


def test_missing_gpu_and_missing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _library())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="nvidia-smi"):
        NvcompCodec()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert NvcompCodec().version == "6.0.0"
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendUnavailableError, match="pip install torch"):
        NvcompCodec()


def test_tensors_in_host_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _library())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    codec = NvcompCodec()
    view = BlockView([_kv(2)])
    out = np.empty((2, codec.max_payload_bytes(view.layout)), np.uint8)
    with pytest.raises(BackendUnavailableError, match=r"CUDA memory.*cpu.*move them to a GPU"):
        codec.encode_blocks(view, LOSSLESS, out)
    with pytest.raises(BackendUnavailableError, match="CUDA memory"):
        codec.decode_blocks(view, [out[0]], [])


def test_status_of_a_call_becomes_a_native_error() -> None:
    library = NvcompLibrary(_library())
    library._functions["nvcompBatchedANSCompressGetTempSize"] = _Entry(status=20)
    with pytest.raises(NativeError, match="status 20") as raised:
        library.compress_temp_bytes(1, 64, 10, 0)
    assert raised.value.status == 20


def test_errors_of_torch_become_errors_of_kvzip() -> None:
    memory = type("OutOfMemoryError", (RuntimeError,), {})
    device = type("AcceleratorError", (RuntimeError,), {"error_code": 700})
    with pytest.raises(NativeError, match="GPU memory"), nvcomp._cuda_errors():
        raise memory("tried to allocate")
    with pytest.raises(CudaError, match="illegal") as raised, nvcomp._cuda_errors():
        raise device("CUDA error: an illegal memory access\nmore")
    assert raised.value.code == 700
    with pytest.raises(RuntimeError, match="other"), nvcomp._cuda_errors():
        raise RuntimeError("other")


# ---- what is around nvCOMP


def test_conformance_of_what_is_around_nvcomp() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small: torch's threads would only wait for each other
    try:
        check_codec(HostCodec())
    finally:
        torch.set_num_threads(threads)


def test_one_call_a_data_type_for_all_pages() -> None:
    codec = HostNvcomp()
    tensors = [_kv(5), _kv(5, seed=1), _kv(5).to(torch.float32)]
    view = BlockView(tensors, block_ids=[4, 0, 2])
    payloads, tables = _encode(codec, view)
    assert codec.library.calls == [("compress", 6, 10), ("compress", 6, 11)]
    assert (tables["coding"] == ENCODED).all()
    codec.library.calls.clear()
    targets = [torch.zeros_like(t) for t in tensors]
    codec.decode_blocks(BlockView(targets, block_ids=[1, 3, 0]), payloads, list(tables))
    assert codec.library.calls == [("decompress", 12, 0xFF)]
    for target, tensor in zip(targets, tensors, strict=True):
        assert torch.equal(target[[1, 3, 0]], tensor[[4, 0, 2]])
        assert not target[[2, 4]].any()


@pytest.mark.parametrize("tokens", [64, 65, 257])
def test_segment_of_several_chunks(codec: HostNvcomp, tokens: int) -> None:
    tensor = _kv(3, tokens=tokens)
    payloads, tables = _encode(codec, BlockView([tensor]))
    chunks = -(-tokens * 1024 // CHUNK_BYTES)
    for payload, table in zip(payloads, tables, strict=True):
        words = payload.view("<u4")
        sizes = words[3 : 3 + chunks].astype(int)
        assert words[:2].tolist() == [chunks, CHUNK_BYTES]
        assert words[2] == crc32c(payload[12 : int(table["size"][0])])
        prefix = -(-(12 + 4 * chunks) // 16) * 16
        assert sum(-(-n // 16) * 16 for n in sizes[:-1]) + sizes[-1] + prefix == table["size"][0]
        assert (table["coding"][0], table["reason"][0]) == (ENCODED, Reason.AS_ASKED)
    target = torch.empty_like(tensor)
    codec.decode_blocks(BlockView([target]), payloads, list(tables))
    assert torch.equal(target, tensor)


def test_large_batches_go_in_steps_and_are_all_or_nothing(codec: HostNvcomp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcomp, "STEP_BYTES", 1 << 20)
    tensor = _kv(9)
    payloads, tables = _encode(codec, BlockView([tensor]))
    assert len([c for c in codec.library.calls if c[0] == "compress"]) > 1
    target = torch.zeros_like(tensor)
    codec.decode_blocks(BlockView([target]), payloads, list(tables))
    assert torch.equal(target, tensor)
    damaged = [p.copy() for p in payloads]
    damaged[8][40] ^= 1
    target.zero_()
    with pytest.raises(CorruptRecordError, match="block 8"):
        codec.decode_blocks(BlockView([target]), damaged, list(tables))
    assert not target.any()


def test_bitstream_that_nvcomp_refuses(codec: HostNvcomp) -> None:
    tensor = _kv(3)
    payloads, tables = _encode(codec, BlockView([tensor]))
    size = int(tables["size"][1, 0])
    payloads[1][16 + 9] ^= 0xFF
    payloads[1].view("<u4")[2] = crc32c(payloads[1][12:size])  # a forger's checksum is right
    target = torch.zeros_like(tensor)
    with pytest.raises(CorruptRecordError, match=r"chunk 0 of page 0 of block 1 \(status 12\)"):
        codec.decode_blocks(BlockView([target]), payloads, list(tables))
    assert not target.any()


def test_page_whose_compression_fails_is_stored_raw(codec: HostNvcomp) -> None:
    tensor = _kv(3)
    codec.library.fail = {1}
    payloads, tables = _encode(codec, BlockView([tensor]))
    assert tables["coding"][:, 0].tolist() == [ENCODED, 0, ENCODED]
    assert tables["reason"][1, 0] == Reason.ENCODER_FAILED
    target = torch.zeros_like(tensor)
    codec.decode_blocks(BlockView([target]), payloads, list(tables))
    assert torch.equal(target, tensor)


def test_no_blocks(codec: HostNvcomp) -> None:
    view = BlockView([_kv(2)], block_ids=[])
    payloads, tables = _encode(codec, view)
    assert payloads == []
    assert tables.shape == (0, 1)
    codec.decode_blocks(view, [], [])
    codec.validate_blocks(view.layout, [], [])
