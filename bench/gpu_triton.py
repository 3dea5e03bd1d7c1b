# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
# ruff: noqa: D102 - the methods of ways: encode, ready (before decodes that follow an encode), decode, check, result
"""Speed of the Triton codec beside the CUDA codec, on the same pages of real KV data in GPU memory.

Run ``python bench/gpu_triton.py --out FOLDER`` on a machine with a GPU (a minute or two); it writes
``triton_codec.json``. Pages are 16 tokens x 32 heads x head_dim 64 of bfloat16 (64 KiB), 16 pages a block, cut from a
KV cache (uint16 bit patterns, shape [layers, 2 (K, V), tokens, kv_heads, head_dim]) and repeated until the batch is
full; 4,096 pages are 256 MiB, more than the L2 cache holds. Times are between CUDA events around a call: they include
the gaps between its launches; ``host_us`` is what the caller waits for. GB/s count raw bytes; ``ceiling_fraction``
compares raw plus encoded bytes with what a copy in device memory reads plus writes in the same run. Every case is
checked: the bytes against the CUDA codec (without it against the CPU codec), and the decoded pages of both codecs
against each other.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvzip import _native
from kvzip.backends import triton as triton_codec
from kvzip.errors import BackendUnavailableError
from kvzip.record import ENTRY_DTYPE, Coding
from kvzip.types import BlockLayout, BlockView, BoundKind, ErrorBound

TOKENS, HEADS, HEAD_DIM = 16, 32, 64
PAGES_PER_BLOCK = 16
PAGE_BYTES = TOKENS * HEADS * HEAD_DIM * 2
SAMPLE = Path(__file__).resolve().parent.parent / "kvzip" / "data" / "smollm2_sample.npy"

LINE = (
    "{codec:7} {op} {bound:8} {axis:7} {pages:6} pages {us:10.1f} us {gb_per_s:8.1f} GB/s ratio {ratio:.3f} "
    "ceiling {ceiling_fraction:.3f} host {host_us:.0f} us"
)

Row = dict[str, Any]


def blocks_of(torch: Any, cache: Any, blocks: int) -> Any:
    """bfloat16 ``[blocks, 2, 8, 16, 32, 64]``: K and V of 8 layers a block; windows of the cache, repeated."""
    layers, two, tokens, heads, dim = cache.shape
    flat = torch.from_numpy(np.ascontiguousarray(cache).view(np.int16)).cuda()
    flat = flat.permute(1, 2, 0, 3, 4).reshape(two, tokens, layers * heads * dim // HEAD_DIM, HEAD_DIM)
    out = torch.empty((blocks, 2, PAGES_PER_BLOCK // 2, TOKENS, HEADS, HEAD_DIM), dtype=torch.int16, device="cuda")
    token = torch.arange(TOKENS, device="cuda")
    head = torch.arange(HEADS, device="cuda")
    for block in range(blocks):
        for layer in range(PAGES_PER_BLOCK // 2):
            number = block * (PAGES_PER_BLOCK // 2) + layer
            rows = (number * TOKENS // 4 + token) % tokens
            columns = (number * 5 + head) % flat.shape[2]
            out[block, :, layer] = flat[:, rows[:, None], columns[None, :]]
    return out.view(torch.bfloat16)


def views(torch: Any, pages: Any, axis: str) -> tuple[BlockView, BlockView]:
    """The pages as a view, and a view of empty pages of the same shape."""
    empty = torch.empty_like(pages)
    parts: list[list[Any]] = []
    for tensor in (pages, empty):
        split = [tensor[:, k, layer] for layer in range(tensor.shape[2]) for k in range(2)]
        parts.append(split)
    if axis == "tokens":
        return BlockView(parts[0], "NHD"), BlockView(parts[1], "NHD")
    layout = BlockLayout.opaque(parts[0])
    return BlockView(parts[0], layout), BlockView(parts[1], layout)


# ---- codecs


class TritonWay:
    """The Triton codec: output and workspace come from torch's caching allocator in every call."""

    name = "triton"

    def __init__(self, torch: Any, view: BlockView, target: BlockView, bound: ErrorBound) -> None:
        self.torch, self.view, self.target, self.bound = torch, view, target, bound
        nbytes = len(view) * triton_codec.max_payload_bytes(view.layout)
        self.out = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self.encode()

    def encode(self) -> None:
        self.encoded = triton_codec.encode_blocks(self.view, self.bound, out=self.out)

    def ready(self) -> None:
        pass

    def decode(self) -> None:
        self.status = triton_codec.decode_blocks(self.target, *self.encoded)

    def check(self) -> None:
        triton_codec.check_status(self.status)

    def result(self) -> tuple[list[Any], Any]:
        payload = self.encoded.payload.cpu().numpy()
        starts, sizes = self.encoded.offsets.tolist(), self.encoded.payload_bytes.tolist()
        table = self.encoded.table.cpu().numpy().view(ENTRY_DTYPE)[..., 0]
        return [payload[a : a + n] for a, n in zip(starts, sizes, strict=True)], table


class _EncodeArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("segments", "device_segments", "block_ids", "arena")),
        ("arena_bytes", ctypes.c_uint64),
        ("record_stride", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("table", "payload_bytes", "record_offsets", "status", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
        *(
            (name, ctypes.c_uint32)
            for name in ("num_segments", "num_blocks", "header_bytes", "max_ctas", "strips_per_warp", "reserved")
        ),
    )


class _DecodeArgs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("segments", "device_segments", "block_ids", "payloads")),
        *((name, ctypes.c_void_p) for name in ("payload_bytes", "table", "block_status", "workspace")),
        ("workspace_bytes", ctypes.c_uint64),
        *(
            (name, ctypes.c_uint32)
            for name in ("num_segments", "num_blocks", "all_or_nothing", "max_ctas", "strips_per_warp", "reserved")
        ),
    )


class CudaWay:
    """The CUDA codec through its C interface, everything allocated beforehand."""

    name = "cuda"

    def __init__(self, torch: Any, view: BlockView, target: BlockView, bound: ErrorBound) -> None:
        self.torch, self.library = torch, _native.library()
        pointer, u32 = ctypes.c_void_p, ctypes.c_uint32
        try:
            self._encode, self._decode = self.library.kvz_cuda_encode, self.library.kvz_cuda_decode
            workspace_bytes, arena_bytes = self.library.kvz_cuda_workspace_bytes, self.library.kvz_cuda_arena_bytes
            available = self.library.kvz_cuda_available
        except AttributeError:
            raise BackendUnavailableError("this native library has no CUDA functions: rebuild it") from None
        if available(None):
            raise BackendUnavailableError("the native library was built without CUDA, or finds no device")
        workspace_bytes.restype = arena_bytes.restype = ctypes.c_uint64
        workspace_bytes.argtypes, arena_bytes.argtypes = [u32, u32], [pointer, u32, u32, u32]
        self._encode.argtypes = self._decode.argtypes = [pointer, pointer]

        blocks, pages = len(view), len(view.layout.segments)
        coding = Coding.LOSSLESS if bound.kind is BoundKind.LOSSLESS else Coding.FIXED
        self.segments = [_native.segments_array(v, bound, coding) for v in (view, target)]
        self.device_segments = [torch.from_numpy(s.view(np.uint8).copy()).cuda() for s in self.segments]
        self.ids = torch.from_numpy(view.block_ids.copy()).cuda()
        size = int(arena_bytes(self.segments[0].ctypes.data, pages, blocks, 0))
        self.arena = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.table = torch.empty((blocks, pages, 16), dtype=torch.uint8, device="cuda")
        self.sizes = torch.empty(blocks, dtype=torch.int64, device="cuda")
        self.offsets = torch.empty(blocks, dtype=torch.int64, device="cuda")
        self.status = torch.zeros(2, dtype=torch.int32, device="cuda")
        self.workspace = torch.zeros(int(workspace_bytes(pages, blocks)), dtype=torch.uint8, device="cuda")
        self.block_status = torch.zeros(blocks, dtype=torch.int32, device="cuda")
        self.encode_args = _EncodeArgs(
            self.segments[0].ctypes.data, self.device_segments[0].data_ptr(), self.ids.data_ptr(),
            self.arena.data_ptr(), size, 0,
            self.table.data_ptr(), self.sizes.data_ptr(), self.offsets.data_ptr(), self.status.data_ptr(),
            self.workspace.data_ptr(), self.workspace.numel(), pages, blocks, 0, 0, 0, 0,
        )  # fmt: skip
        self.encode()
        self.payloads = self.offsets + self.arena.data_ptr()
        self.decode_args = _DecodeArgs(
            self.segments[1].ctypes.data, self.device_segments[1].data_ptr(), self.ids.data_ptr(),
            self.payloads.data_ptr(), self.sizes.data_ptr(), self.table.data_ptr(), self.block_status.data_ptr(),
            self.workspace.data_ptr(), self.workspace.numel(), pages, blocks, 1, 0, 0, 0,
        )  # fmt: skip

    def encode(self) -> None:
        status = self._encode(ctypes.byref(self.encode_args), self.torch.cuda.current_stream().cuda_stream)
        _native.check(status, "encoding on the GPU")

    def ready(self) -> None:
        # Records are packed in any order: where they lie may change from one encode to the next.
        self.torch.add(self.offsets, self.arena.data_ptr(), out=self.payloads)

    def decode(self) -> None:
        status = self._decode(ctypes.byref(self.decode_args), self.torch.cuda.current_stream().cuda_stream)
        _native.check(status, "decoding on the GPU")

    def check(self) -> None:
        if self.status[0].item() or self.block_status.any().item():
            raise RuntimeError(f"the CUDA codec gave status {self.status.tolist()}")

    def result(self) -> tuple[list[Any], Any]:
        arena = self.arena.cpu().numpy()
        starts, sizes = self.offsets.tolist(), self.sizes.tolist()
        return [arena[a : a + n] for a, n in zip(starts, sizes, strict=True)], self.table.cpu().numpy().view(
            ENTRY_DTYPE
        )[..., 0]


class CpuWay:
    """The CPU codec, as what the bytes are checked against where there is no CUDA codec."""

    def __init__(self, torch: Any, view: BlockView, bound: ErrorBound) -> None:
        tensors = [t.cpu().view(torch.int16) for t in view.tensors]
        arrays = [t.contiguous().numpy().view(np.uint16) for t in tensors]
        if view.layout.dims:
            host = BlockView(arrays, view.layout.dims, dtype="bfloat16")
        else:
            host = BlockView(arrays, BlockLayout.opaque(arrays, dtype="bfloat16"))
        coding = Coding.LOSSLESS if bound.kind is BoundKind.LOSSLESS else Coding.FIXED
        segments = _native.segments_array(host, bound, coding)
        out = np.empty((len(host), triton_codec.max_payload_bytes(host.layout)), np.uint8)
        table, sizes = _native.cpu_encode(segments, host.block_ids, out)
        self._result = [out[i, : int(n)] for i, n in enumerate(sizes)], table

    def result(self) -> tuple[list[Any], Any]:
        return self._result


# ---- measuring


def timed(torch: Any, call: Callable[[], None], repeats: int) -> tuple[list[float], float]:
    """Microseconds between events around each call, sorted, and the median that the host waited."""
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    host = []
    torch.cuda.synchronize()
    for start, stop in events:
        start.record()
        before = time.perf_counter()
        call()
        host.append((time.perf_counter() - before) * 1e6)
        stop.record()
        torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) * 1e3 for a, b in events), float(np.median(host))


def ceiling(torch: Any) -> float:
    """GB/s that a copy in device memory reads plus writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times, _ = timed(torch, lambda: target.copy_(source), 20)
    return float(2 * source.numel() / (np.median(times) * 1e3))


def compare(a: tuple[list[Any], Any], b: tuple[list[Any], Any]) -> None:
    if a[1].tolist() != b[1].tolist():
        raise RuntimeError("the segment tables of two codecs differ")
    if not all(np.array_equal(x, y) for x, y in zip(a[0], b[0], strict=True)):
        raise RuntimeError("the payloads of two codecs differ")


def measure(torch: Any, cache: Any, counts: list[int], bounds: list[str], repeats: int) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    notes: list[str] = []
    peak = ceiling(torch)
    for count in counts:
        blocks = max(1, count // PAGES_PER_BLOCK)
        pages = blocks_of(torch, cache, blocks)
        raw_bytes = pages.numel() * 2
        for axis in ("tokens", "memory"):
            view, target = views(torch, pages, axis)
            for text in bounds:
                bound = ErrorBound.parse(text)
                results, decoded = [], []
                for way_type in (TritonWay, CudaWay):
                    try:
                        way: Any = way_type(torch, view, target, bound)
                    except BackendUnavailableError as error:
                        notes.append(f"{way_type.name}: {error}")
                        continue
                    payloads, table = way.result()
                    encoded_bytes = sum(p.size for p in payloads)
                    for op in ("encode", "decode"):
                        way.ready()
                        times, host_us = timed(torch, getattr(way, op), repeats)
                        median = float(np.median(times))
                        rows.append(
                            {
                                "codec": way.name,
                                "op": op,
                                "bound": text,
                                "axis": axis,
                                "pages": blocks * PAGES_PER_BLOCK,
                                "raw_bytes": raw_bytes,
                                "ratio": round(raw_bytes / encoded_bytes, 4),
                                "us": round(median, 2),
                                "us_p10": round(times[len(times) // 10], 2),
                                "us_p90": round(times[len(times) * 9 // 10], 2),
                                "host_us": round(host_us, 2),
                                "gb_per_s": round(raw_bytes / median / 1e3, 2),
                                "ceiling_fraction": round((raw_bytes + encoded_bytes) / median / 1e3 / peak, 4),
                            }
                        )
                        print(LINE.format(**rows[-1]), flush=True)
                    way.check()
                    results.append((payloads, table))
                    decoded.append([t.clone() for t in target.tensors])
                if len(results) == 1:
                    results.append(CpuWay(torch, view, bound).result())
                compare(*results)
                for a, b in zip(decoded[0], decoded[-1], strict=True):
                    if not torch.equal(a.view(torch.int16), b.view(torch.int16)):
                        raise RuntimeError("the decoded pages of two codecs differ")
    return rows, [*sorted(set(notes)), f"device memory, read plus written: {peak:.0f} GB/s"]


def environment(torch: Any) -> dict[str, Any]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "native": _native.describe()["build"],
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for triton_codec.json")
    parser.add_argument("--data", type=Path, default=SAMPLE, help="a KV cache (*.npy); default: the sample of kvzip")
    parser.add_argument("--quick", action="store_true", help="few pages, few repetitions")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU: run this on a machine with one")
    cache = np.load(args.data, mmap_mode="r")
    counts, bounds, repeats = ([16, 256], ["1e-3"], 5) if args.quick else (
        [16, 64, 512, 4096], ["1e-2", "1e-3", "lossless"], 30)  # fmt: skip
    rows, notes = measure(torch, cache, counts, bounds, repeats)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "triton_codec.json"
    path.write_text(json.dumps({"environment": environment(torch), "notes": notes, "rows": rows}, indent=1) + "\n")
    print("\n".join(notes))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
