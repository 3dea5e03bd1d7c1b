# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
# ruff: noqa: D102 - the methods of ways are described in `Way` and `Staged`
"""What else can move KV pages between GPU and pinned host memory, timed on the same pages in one run.

Run ``python bench/gpu_peers.py --data CACHE.npy --out peers.json`` on a machine with a GPU (one to two minutes; with
``--quick`` a smoke run). The data is a real KV cache: uint16 bit patterns of bfloat16, shape [layers, 2 (K, V), tokens,
kv_heads, head_dim]. Pages are 16 tokens x 32 heads x head_dim 64 (64 KiB) cut from it at positions that all differ,
scattered in a 1 GiB pool; every repetition takes other pages, so that no cache helps. A store's bytes end in pinned
host memory and a load's in scattered pages; the time is what a caller sees, from the call until the data is there.
Loads read what the same repetition stored, into pages that were wiped, and are compared with what they have to give.

Ways (`WAYS`; add your own with a subclass of `Way` and `measure`):

* ``raw-link``: one copy of contiguous bytes, the limit of the link; ``raw-loop``: a copy a page; ``raw-batch``:
  cudaMemcpyBatchAsync; ``raw-gather``: pages gathered to a staging buffer, then one copy.
* ``nvcomp-ans``: nvCOMP's ANS (lossless, 16-bit floats, one bitstream a page), then exactly the encoded bytes.
* ``fp8``: cast to float8 e4m3, then one copy; ``int8``: int8 for each token and head with a bfloat16 scale.

All but the first three work in chunks, kernels on one stream and copies on another, when there are many pages.
"""

from __future__ import annotations

import abc
import argparse
import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

MIB = 1 << 20
TOKENS, HEADS, HEAD_DIM = 16, 32, 64
PAGE_BYTES = TOKENS * HEADS * HEAD_DIM * 2
PAGES = (1, 8, 64, 512, 1024, 4096, 16384)  # the last three are 64 MiB, 256 MiB and 1 GiB
TO_HOST, TO_DEVICE = 2, 1  # numbers of cudaMemcpyKind

Ints = npt.NDArray[np.int64]
Row = dict[str, Any]


class Unavailable(Exception):
    """A way cannot run here; the text says why."""


# ---- data


def real_pages(torch: Any, cache: npt.NDArray[Any], count: int, device: str) -> Any:
    """Cut `count` different pages from a KV cache.

    Args:
        torch: the module.
        cache: bit patterns of bfloat16, [layers, 2, tokens, kv_heads, head_dim].
        count: number of pages.
        device: where they go.

    Returns:
        bfloat16 ``[count, 16, 32, 64]``; K and V in turn. Heads of all layers stand side by side; a page is a window of
        16 tokens x 32 neighbouring heads, and no two pages are the same window.
    """
    layers, two, tokens, heads, dim = cache.shape
    flat = torch.from_numpy(np.ascontiguousarray(cache).view(np.int16)).to(device)
    flat = flat.permute(1, 2, 0, 3, 4).reshape(two, tokens, layers * heads * dim // HEAD_DIM, HEAD_DIM)
    columns = flat.shape[2]
    if columns < HEADS or tokens < TOKENS:
        raise SystemExit(f"the cache has {tokens} tokens x {columns} heads: {TOKENS} x {HEADS} are needed")
    windows = 2 * (tokens - TOKENS + 1) * columns
    if windows < count:
        raise SystemExit(f"the cache gives {windows} different pages, {count} are asked for: use a longer one")
    pages = torch.empty((count, TOKENS, HEADS, HEAD_DIM), dtype=torch.int16, device=device)
    step = windows // 2 // max(1, -(-count // 2))
    for first in range(0, count, 2048):
        number = torch.arange(first, min(first + 2048, count), device=device)
        window = number // 2 * step
        token = (window % (tokens - TOKENS + 1))[:, None] + torch.arange(TOKENS, device=device)
        head = ((window // (tokens - TOKENS + 1))[:, None] + torch.arange(HEADS, device=device)) % columns
        pages[number] = flat[(number % 2)[:, None, None], token[:, :, None], head[:, None, :]]
    return pages.view(torch.bfloat16)


# ---- CUDA


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _CopyAttributes(ctypes.Structure):
    _fields_ = (
        ("source_order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


class Cudart:
    """The CUDA runtime that torch has loaded, without torch's cost of a call."""

    def __init__(self, torch: Any) -> None:
        self.major = int(torch.version.cuda.partition(".")[0])
        library = ctypes.CDLL(f"libcudart.so.{self.major}")
        self._copy = library.cudaMemcpyAsync
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._batch = getattr(library, "cudaMemcpyBatchAsync", None) if self.major >= 13 else None
        if self._batch is not None:
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            self._batch.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer]
        self._attributes = _CopyAttributes(source_order=1)  # sources are read in the order of the stream
        self._first = ctypes.c_size_t(0)

    @property
    def has_batch(self) -> bool:
        return self._batch is not None

    def copy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        """Start one copy."""
        status = self._copy(target, source, nbytes, kind, stream)
        if status:
            raise RuntimeError(f"cudaMemcpyAsync failed with CUDA error {status}")

    def copy_batch(self, targets: Ints, sources: Ints, sizes: Ints, stream: int) -> None:
        """Start many copies."""
        assert self._batch is not None
        status = self._batch(
            targets.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(sizes),
            ctypes.byref(self._attributes),
            ctypes.byref(self._first),
            1,
            stream,
        )
        if status:
            raise RuntimeError(f"cudaMemcpyBatchAsync failed with CUDA error {status}")


class Bench:
    """What all ways share: pages and targets on the GPU, pinned host memory of the same size, two streams.

    Args:
        torch: the module.
        cache: see `real_pages`.
        count: pages in the pool; at least those of the largest case.
    """

    def __init__(self, torch: Any, cache: npt.NDArray[Any], count: int) -> None:
        self.torch, self.count = torch, count
        self.cudart = Cudart(torch)
        self.device = torch.device("cuda")
        self.pages = real_pages(torch, cache, count, "cuda")
        self.targets = torch.empty_like(self.pages)
        self.host = torch.empty(count * PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.host.zero_()
        self.order: Ints = np.random.default_rng(0).permutation(count)
        self.kernels, self.copies = torch.cuda.Stream(), torch.cuda.Stream()
        self._control = torch.empty(8 * count, dtype=torch.int64, pin_memory=True)
        self._control_array: Ints = self._control.numpy()
        self._control_used = 0
        torch.cuda.synchronize()

    @property
    def host_address(self) -> int:
        return int(self.host.data_ptr())

    def page_addresses(self, ids: Ints, tensor: Any) -> Ints:
        return int(tensor.data_ptr()) + ids * PAGE_BYTES

    def control(self, *arrays: Ints) -> Any:
        """Copy integers to the device on the stream of the kernels; valid until the call of the way ends."""
        size = sum(a.size for a in arrays)
        if self._control_used + size > self._control_array.size:
            self._control_used = 0
        at = self._control_used
        self._control_used += size
        np.concatenate(arrays, out=self._control_array[at : at + size])
        with self.torch.cuda.stream(self.kernels):
            return self._control[at : at + size].to(self.device, non_blocking=True)


# ---- ways


class Way(abc.ABC):
    """One way to move pages: a subclass sets `name` and gives `store` and `load`, which return when data is there."""

    name: ClassVar[str]

    def __init__(self, bench: Bench) -> None:
        self.bench, self.torch, self.cudart = bench, bench.torch, bench.cudart

    def note(self) -> str:
        """How it is done, for the results."""
        return ""

    @abc.abstractmethod
    def store(self, ids: Ints, slot: int) -> int:
        """Move pages `ids` of `bench.pages` to the host, to page number `slot` of `bench.host` and after it.

        Returns:
            Bytes that crossed the link.
        """

    @abc.abstractmethod
    def load(self, ids: Ints, slot: int) -> int:
        """Move back what `store` left at `slot`, to pages `ids` of `bench.targets`; returns bytes on the link."""

    def check(self, ids: Ints) -> None:
        """Assert that pages `ids` of `bench.targets` are what this way has to give."""
        torch, bench = self.torch, self.bench
        for first in range(0, len(ids), 1024):
            part = torch.from_numpy(ids[first : first + 1024]).to(bench.device)
            want, got = bench.pages[part], bench.targets[part]
            self.check_values(want, got)

    def check_values(self, want: Any, got: Any) -> None:
        """Assert that values are as close as this way promises: here, bit for bit."""
        same = self.torch.equal(want.view(self.torch.int16), got.view(self.torch.int16))
        assert same, f"{self.name}: other bits came back"


class RawLink(Way):
    """Contiguous bytes, one copy: not a swap of pages, but the limit of all raw ones."""

    name = "raw-link"

    def store(self, ids: Ints, slot: int) -> int:
        return self._copy(len(ids), slot, True)

    def load(self, ids: Ints, slot: int) -> int:
        return self._copy(len(ids), slot, False)

    def _copy(self, count: int, slot: int, out: bool) -> int:
        nbytes, at = count * PAGE_BYTES, slot * PAGE_BYTES
        host, stream = self.bench.host_address + at, self.bench.copies
        if out:
            self.cudart.copy(host, int(self.bench.pages.data_ptr()) + at, nbytes, TO_HOST, stream.cuda_stream)
        else:
            self.cudart.copy(int(self.bench.targets.data_ptr()) + at, host, nbytes, TO_DEVICE, stream.cuda_stream)
        stream.synchronize()
        return nbytes

    def check(self, ids: Ints) -> None:
        """Its pages are those from the slot on, which the numbers do not name: compare all that was written."""
        written = self.bench.targets.view(self.torch.int16).ne(0).flatten(1).any(1).nonzero().flatten()
        assert len(written) >= len(ids)
        super().check(written.cpu().numpy())


class RawLoop(Way):
    """A call of cudaMemcpyAsync for each page."""

    name = "raw-loop"

    def store(self, ids: Ints, slot: int) -> int:
        host = self.bench.host_address + slot * PAGE_BYTES
        stream, copy = self.bench.copies.cuda_stream, self.cudart.copy
        for i, page in enumerate(self.bench.page_addresses(ids, self.bench.pages).tolist()):
            copy(host + i * PAGE_BYTES, page, PAGE_BYTES, TO_HOST, stream)
        self.bench.copies.synchronize()
        return len(ids) * PAGE_BYTES

    def load(self, ids: Ints, slot: int) -> int:
        host = self.bench.host_address + slot * PAGE_BYTES
        stream, copy = self.bench.copies.cuda_stream, self.cudart.copy
        for i, page in enumerate(self.bench.page_addresses(ids, self.bench.targets).tolist()):
            copy(page, host + i * PAGE_BYTES, PAGE_BYTES, TO_DEVICE, stream)
        self.bench.copies.synchronize()
        return len(ids) * PAGE_BYTES


class RawBatch(Way):
    """One call of cudaMemcpyBatchAsync."""

    name = "raw-batch"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        if not self.cudart.has_batch:
            raise Unavailable(f"the CUDA runtime of torch is version {self.cudart.major}, the call of 13 is needed")

    def _copy(self, ids: Ints, slot: int, tensor: Any, out: bool) -> int:
        pages = self.bench.page_addresses(ids, tensor)
        host = self.bench.host_address + (slot + np.arange(len(ids), dtype=np.int64)) * PAGE_BYTES
        sizes = np.full(len(ids), PAGE_BYTES, np.int64)
        stream = self.bench.copies
        self.cudart.copy_batch(host if out else pages, pages if out else host, sizes, stream.cuda_stream)
        stream.synchronize()
        return len(ids) * PAGE_BYTES

    def store(self, ids: Ints, slot: int) -> int:
        return self._copy(ids, slot, self.bench.pages, True)

    def load(self, ids: Ints, slot: int) -> int:
        return self._copy(ids, slot, self.bench.targets, False)


def chunks_of(count: int) -> list[tuple[int, int]]:
    """Ranges of pages that are worked on one after the other: at most 32 MiB, at least 4 MiB or everything."""
    step = count if count <= 64 else min(512, max(64, count // 4))
    return [(first, min(first + step, count)) for first in range(0, count, step)]


class Staged(Way):
    """Kernels turn pages into a fixed number of bytes in a staging buffer; one copy a chunk moves it.

    A subclass gives `page_bytes` and `encode` and `decode`.
    """

    page_bytes: ClassVar[int]

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        largest = 512 * self.page_bytes
        self._staging = [self.torch.empty(largest, dtype=self.torch.uint8, device=bench.device) for _ in range(2)]

    @abc.abstractmethod
    def encode(self, pages: Any, ids: Any, staging: Any) -> None:
        """Fill `staging` (uint8, page_bytes for each id) from pages ``[*, 16, 32, 64]``."""

    @abc.abstractmethod
    def decode(self, staging: Any, ids: Any, targets: Any) -> None:
        """The reverse of `encode`."""

    def store(self, ids: Ints, slot: int) -> int:
        torch, bench = self.torch, self.bench
        on_device = bench.control(ids)
        parts = chunks_of(len(ids))
        copies = bench.copies if len(parts) > 1 else bench.kernels
        host, copied = bench.host_address + slot * PAGE_BYTES, [None, None]
        for c, (first, last) in enumerate(parts):
            staging = self._staging[c % 2][: (last - first) * self.page_bytes]
            with torch.cuda.stream(bench.kernels):
                _wait(bench.kernels, copied[c % 2])
                self.encode(bench.pages, on_device[first:last], staging)
            if copies is not bench.kernels:
                copies.wait_stream(bench.kernels)
            at = host + first * self.page_bytes
            self.cudart.copy(at, int(staging.data_ptr()), staging.numel(), TO_HOST, copies.cuda_stream)
            copied[c % 2] = copies.record_event() if len(parts) > 1 else None
        copies.synchronize()
        return len(ids) * self.page_bytes

    def load(self, ids: Ints, slot: int) -> int:
        torch, bench = self.torch, self.bench
        on_device = bench.control(ids)
        parts = chunks_of(len(ids))
        copies = bench.copies if len(parts) > 1 else bench.kernels
        host, decoded = bench.host_address + slot * PAGE_BYTES, [None, None]
        for c, (first, last) in enumerate(parts):
            staging = self._staging[c % 2][: (last - first) * self.page_bytes]
            _wait(copies, decoded[c % 2])
            at = host + first * self.page_bytes
            self.cudart.copy(int(staging.data_ptr()), at, staging.numel(), TO_DEVICE, copies.cuda_stream)
            if copies is not bench.kernels:
                bench.kernels.wait_stream(copies)
            with torch.cuda.stream(bench.kernels):
                self.decode(staging, on_device[first:last], bench.targets)
            decoded[c % 2] = bench.kernels.record_event() if len(parts) > 1 else None
        bench.kernels.synchronize()
        return len(ids) * self.page_bytes


def _wait(stream: Any, event: Any) -> None:
    if event is not None:
        stream.wait_event(event)


class RawGather(Staged):
    """Gather (scatter) of whole pages and one copy."""

    name = "raw-gather"
    page_bytes = PAGE_BYTES

    def note(self) -> str:
        return "torch.index_select, index_copy_"

    def _rows(self, tensor: Any) -> Any:
        return tensor.view(self.torch.int64).view(-1, PAGE_BYTES // 8)

    def encode(self, pages: Any, ids: Any, staging: Any) -> None:
        self.torch.index_select(self._rows(pages.flatten()), 0, ids, out=self._rows(staging))

    def decode(self, staging: Any, ids: Any, targets: Any) -> None:
        self._rows(targets.flatten()).index_copy_(0, ids, self._rows(staging))


class Compiled(Staged):
    """A pair of torch functions, compiled when torch.compile works here (and `plain` is not asked for)."""

    plain: ClassVar[bool] = False

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        torch = self.torch
        self._functions: tuple[Callable[..., None], Callable[..., None]] = (self._encode, self._decode)
        self._how = "plain torch"
        if self.plain:
            return
        try:
            made = tuple(torch.compile(f, dynamic=True) for f in self._functions)
            with torch.cuda.stream(bench.kernels):
                for count in (8, 1):  # compiles for any number of pages, and for one
                    ids = torch.arange(count, device=bench.device)
                    made[0](bench.pages, ids, self._staging[0][: count * self.page_bytes])
                    made[1](self._staging[0][: count * self.page_bytes], ids, bench.targets)
            torch.cuda.synchronize()
            self._functions, self._how = (made[0], made[1]), "torch.compile"
        except Exception as error:  # whatever the compiler raises: the plain functions do the same
            self._how = f"plain torch (torch.compile failed: {type(error).__name__})"

    def note(self) -> str:
        return self._how

    def encode(self, pages: Any, ids: Any, staging: Any) -> None:
        self._functions[0](pages, ids, staging)

    def decode(self, staging: Any, ids: Any, targets: Any) -> None:
        self._functions[1](staging, ids, targets)

    @abc.abstractmethod
    def _encode(self, pages: Any, ids: Any, staging: Any) -> None:
        """`encode`, of torch functions."""

    @abc.abstractmethod
    def _decode(self, staging: Any, ids: Any, targets: Any) -> None:
        """`decode`, of torch functions."""


class Fp8(Compiled):
    """Cast to float8 e4m3."""

    name = "fp8"
    page_bytes = PAGE_BYTES // 2

    def _encode(self, pages: Any, ids: Any, staging: Any) -> None:
        torch = self.torch
        staging.view(-1, TOKENS, HEADS, HEAD_DIM).copy_(pages[ids].to(torch.float8_e4m3fn).view(torch.uint8))

    def _decode(self, staging: Any, ids: Any, targets: Any) -> None:
        torch = self.torch
        values = staging.view(torch.float8_e4m3fn).view(-1, TOKENS, HEADS, HEAD_DIM)
        targets[ids] = values.to(torch.bfloat16)

    def check_values(self, want: Any, got: Any) -> None:
        torch = self.torch
        cast = want.to(torch.float8_e4m3fn).to(torch.bfloat16)
        assert torch.equal(cast.view(torch.int16), got.view(torch.int16)), "fp8: not the value that a cast gives"


class Int8(Compiled):
    """int8 for each token and head: 64 codes and a bfloat16 scale."""

    name = "int8"
    page_bytes = PAGE_BYTES // 2 + TOKENS * HEADS * 2

    def _parts(self, staging: Any) -> tuple[Any, Any]:
        codes = staging.numel() // self.page_bytes * (PAGE_BYTES // 2)
        scales = staging[codes:].view(self.torch.bfloat16).view(-1, TOKENS, HEADS, 1)
        return staging[:codes].view(self.torch.int8).view(-1, TOKENS, HEADS, HEAD_DIM), scales

    def _encode(self, pages: Any, ids: Any, staging: Any) -> None:
        torch = self.torch
        codes, scales = self._parts(staging)
        values = pages[ids].float()
        scale = (values.abs().amax(-1, keepdim=True) * (1.0 / 126.0)).clamp_min(1e-30).to(torch.bfloat16)
        scales.copy_(scale)
        codes.copy_((values / scale.float()).round().to(torch.int8))

    def _decode(self, staging: Any, ids: Any, targets: Any) -> None:
        codes, scales = self._parts(staging)
        targets[ids] = (codes.float() * scales.float()).to(self.torch.bfloat16)

    def check_values(self, want: Any, got: Any) -> None:
        # Half a step, and the rounding of the scale and of the result to bfloat16.
        largest = want.float().abs().amax(-1, keepdim=True)
        error = (want.float() - got.float()).abs()
        assert bool((error <= largest * (0.5 / 126 * 1.01 + 2.0**-8)).all()), "int8: further off than half a step"


class NvcompAns(Way):
    """nvCOMP's ANS on every page, by the same calls as the backend; encoded bytes stand one after the other."""

    name = "nvcomp-ans"
    _FLOAT16 = 10

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        from kvzip.backends.nvcomp import NvcompLibrary
        from kvzip.errors import KvzipError

        try:
            self.library = NvcompLibrary.load()
        except KvzipError as error:
            raise Unavailable(str(error)) from error
        torch, most = self.torch, 512
        self.slot_bytes = -(-self.library.compressed_bytes(PAGE_BYTES, self._FLOAT16) // 16) * 16
        temp = max(
            self.library.compress_temp_bytes(most, PAGE_BYTES, self._FLOAT16, 0),
            self.library.decompress_temp_bytes(most, PAGE_BYTES, self._FLOAT16, 0),
        )

        def empty(nbytes: int) -> Any:
            return torch.empty(nbytes, dtype=torch.uint8, device=bench.device)

        self.slots = [empty(most * self.slot_bytes) for _ in range(2)]
        self.arena = [empty(most * self.slot_bytes) for _ in range(2)]
        self.temp = empty(max(16, temp))
        self.temp_bytes = temp
        self.page_sizes = torch.full((most,), PAGE_BYTES, dtype=torch.int64, device=bench.device)
        self.slot_addresses = [
            int(s.data_ptr()) + self.slot_bytes * torch.arange(most, device=bench.device) for s in self.slots
        ]
        words = bench.count + most * (bench.count // most + 8)  # sizes of all pages, then statuses of each chunk
        self.results = torch.empty(words, dtype=torch.int64, device=bench.device)
        self.seen = torch.empty(words, dtype=torch.int64, pin_memory=True)
        self.sizes = torch.cuda.Stream()  # of their own, so that packing never waits for a copy of pages
        self.kept: dict[tuple[int, int], tuple[Ints, list[Ints]]] = {}  # by pages and slot: sizes, offsets of chunks
        torch.cuda.synchronize()

    def note(self) -> str:
        return f"nvCOMP {self.library.version}"

    def _statuses(self, chunk: int, count: int) -> npt.NDArray[np.int32]:
        at = self.bench.count + chunk * 512
        found: npt.NDArray[np.int32] = self.seen.numpy()[at : at + 512].view(np.int32)[:count]
        return found

    def store(self, ids: Ints, slot: int) -> int:
        torch, bench = self.torch, self.bench
        parts = chunks_of(len(ids))
        sources = bench.control(bench.page_addresses(ids, bench.pages))
        ready: list[Any] = []
        copied: list[Any] = [None, None]
        offset, sizes, offsets = 0, np.empty(len(ids), np.int64), []
        host = bench.host_address + slot * PAGE_BYTES
        self._compress(parts, 0, sources, ready)
        for c, (first, last) in enumerate(parts):
            if c + 1 < len(parts):
                self._compress(parts, c + 1, sources, ready)
            ready[c].synchronize()
            made: Ints = self.seen.numpy()[first:last].copy()
            assert not self._statuses(c, last - first).any(), "nvcomp-ans: a page could not be compressed"
            padded = -(-made // 16) * 16
            starts = np.cumsum(padded) - padded
            sizes[first:last] = made
            offsets.append(offset + starts)
            slots = int(self.slots[c % 2].data_ptr())
            if last - first <= 8:  # a copy a page is faster than packing
                for i in range(last - first):
                    target, source = host + offset + int(starts[i]), slots + i * self.slot_bytes
                    self.cudart.copy(target, source, int(made[i]), TO_HOST, bench.kernels.cuda_stream)
                bench.kernels.synchronize()
            else:
                total = int(padded.sum())
                shift = np.arange(last - first, dtype=np.int64) * (self.slot_bytes // 16) - starts // 16
                control = bench.control(shift, padded // 16)
                with torch.cuda.stream(bench.kernels):
                    _wait(bench.kernels, copied[c % 2])
                    index = torch.repeat_interleave(
                        control[: last - first].int(), control[last - first :], output_size=total // 16
                    )
                    index += torch.arange(total // 16, dtype=torch.int32, device=bench.device)
                    packed = self.arena[c % 2][:total].view(torch.int64).view(-1, 2)
                    torch.index_select(self.slots[c % 2].view(torch.int64).view(-1, 2), 0, index, out=packed)
                bench.copies.wait_stream(bench.kernels)
                self.cudart.copy(
                    host + offset, int(self.arena[c % 2].data_ptr()), total, TO_HOST, bench.copies.cuda_stream
                )
                copied[c % 2] = bench.copies.record_event()
            offset += int(padded.sum())
            assert offset <= len(ids) * PAGE_BYTES, "nvcomp-ans: larger than the raw pages"
        bench.copies.synchronize()
        self.kept[len(ids), slot] = sizes, offsets
        return offset

    def _compress(self, parts: Sequence[tuple[int, int]], c: int, sources: Any, ready: list[Any]) -> None:
        """Start chunk c; its event in `ready` comes when the host can read the sizes."""
        bench = self.bench
        first, last = parts[c]
        statuses = bench.count + c * 512
        self.library.compress(
            sources=int(sources.data_ptr()) + 8 * first,
            source_bytes=int(self.page_sizes.data_ptr()),
            chunk_bytes=PAGE_BYTES,
            chunks=last - first,
            temp=int(self.temp.data_ptr()),
            temp_bytes=self.temp_bytes,
            targets=int(self.slot_addresses[c % 2].data_ptr()),
            target_bytes=int(self.results.data_ptr()) + 8 * first,
            data_type=self._FLOAT16,
            statuses=int(self.results.data_ptr()) + 8 * statuses,
            stream=bench.kernels.cuda_stream,
        )
        stream = bench.kernels
        if len(parts) > 1:
            stream = self.sizes
            stream.wait_stream(bench.kernels)
        with self.torch.cuda.stream(stream):
            words = -(-(last - first) // 2)
            self.seen[first:last].copy_(self.results[first:last], non_blocking=True)
            self.seen[statuses : statuses + words].copy_(self.results[statuses : statuses + words], non_blocking=True)
        ready.append(stream.record_event())

    def load(self, ids: Ints, slot: int) -> int:
        torch, bench = self.torch, self.bench
        parts = chunks_of(len(ids))
        sizes, offsets = self.kept[len(ids), slot]
        sources = [
            int(self.arena[c % 2].data_ptr()) + starts - starts[0] for c, starts in enumerate(offsets)
        ]  # where each page's bytes stand in its chunk's arena
        control = bench.control(np.concatenate(sources), sizes, bench.page_addresses(ids, bench.targets))
        at, count = int(control.data_ptr()), len(ids)
        copies = bench.copies if len(parts) > 1 else bench.kernels
        host, decoded = bench.host_address + slot * PAGE_BYTES, [None, None]
        moved = 0
        for c, (first, last) in enumerate(parts):
            nbytes = int(offsets[c][-1] - offsets[c][0]) + -(-int(sizes[last - 1]) // 16) * 16
            _wait(copies, decoded[c % 2])
            self.cudart.copy(
                int(self.arena[c % 2].data_ptr()), host + int(offsets[c][0]), nbytes, TO_DEVICE, copies.cuda_stream
            )
            if copies is not bench.kernels:
                bench.kernels.wait_stream(copies)
            statuses = bench.count + c * 512
            with torch.cuda.stream(bench.kernels):
                self.library.decompress(
                    sources=at + 8 * first,
                    source_bytes=at + 8 * (count + first),
                    target_capacity=int(self.page_sizes.data_ptr()),
                    target_bytes=int(self.results.data_ptr()) + 8 * first,
                    chunks=last - first,
                    temp=int(self.temp.data_ptr()),
                    temp_bytes=self.temp_bytes,
                    targets=at + 8 * (2 * count + first),
                    data_type=self._FLOAT16,
                    statuses=int(self.results.data_ptr()) + 8 * statuses,
                    stream=bench.kernels.cuda_stream,
                )
                decoded[c % 2] = bench.kernels.record_event() if len(parts) > 1 else None
            moved += nbytes
        with torch.cuda.stream(bench.kernels):
            end = bench.count + len(parts) * 512
            self.seen[bench.count : end].copy_(self.results[bench.count : end], non_blocking=True)
        bench.kernels.synchronize()
        for c, (first, last) in enumerate(parts):
            assert not self._statuses(c, last - first).any(), "nvcomp-ans: a page could not be decompressed"
        return moved

    def codec_rows(self, reps: int) -> list[Row]:
        """The two kernels alone on up to 256 MiB, without copies, against a copy within the GPU in the same run."""
        torch, bench = self.torch, self.bench
        count = min(4096, bench.count)
        raw = count * PAGE_BYTES
        slots = torch.empty(count * self.slot_bytes, dtype=torch.uint8, device=bench.device)
        places = int(slots.data_ptr()) + self.slot_bytes * torch.arange(count, device=bench.device)
        capacity = torch.full((count,), PAGE_BYTES, dtype=torch.int64, device=bench.device)
        made, decoded, statuses = (torch.empty(count, dtype=torch.int64, device=bench.device) for _ in range(3))
        temp_bytes = max(
            self.library.compress_temp_bytes(count, PAGE_BYTES, self._FLOAT16, 0),
            self.library.decompress_temp_bytes(count, PAGE_BYTES, self._FLOAT16, 0),
        )
        temp = torch.empty(max(16, temp_bytes), dtype=torch.uint8, device=bench.device)
        sources = targets = capacity

        def encode() -> None:
            self.library.compress(
                sources=int(sources.data_ptr()),
                source_bytes=int(capacity.data_ptr()),
                chunk_bytes=PAGE_BYTES,
                chunks=count,
                temp=int(temp.data_ptr()),
                temp_bytes=temp_bytes,
                targets=int(places.data_ptr()),
                target_bytes=int(made.data_ptr()),
                data_type=self._FLOAT16,
                statuses=int(statuses.data_ptr()),
                stream=bench.kernels.cuda_stream,
            )

        def decode() -> None:
            self.library.decompress(
                sources=int(places.data_ptr()),
                source_bytes=int(made.data_ptr()),
                target_capacity=int(capacity.data_ptr()),
                target_bytes=int(decoded.data_ptr()),
                chunks=count,
                temp=int(temp.data_ptr()),
                temp_bytes=temp_bytes,
                targets=int(targets.data_ptr()),
                data_type=self._FLOAT16,
                statuses=int(statuses.data_ptr()),
                stream=bench.kernels.cuda_stream,
            )

        def copy() -> None:
            bench.targets.copy_(bench.pages)

        times: dict[str, list[float]] = {"encode": [], "decode": [], "copy": []}
        packed = 0
        for rep in range(-3, reps):
            ids = np.roll(bench.order, rep * count)[:count]
            sources = bench.control(bench.page_addresses(ids, bench.pages))
            targets = bench.control(bench.page_addresses(ids, bench.targets))
            for op, work in (("copy", copy), ("encode", encode), ("decode", decode)):
                if op == "decode":
                    bench.targets.zero_()  # the copy has filled them
                torch.cuda.synchronize()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                with torch.cuda.stream(bench.kernels):
                    begin.record()
                    work()
                    end.record()
                end.synchronize()
                if rep >= 0:
                    times[op].append(begin.elapsed_time(end) * 1e-3)
            assert not statuses.view(torch.int32)[:count].any(), "nvcomp-ans: a status is not success"
            packed = int(made.sum())
        self.check(ids)
        ceiling = 2 * bench.count * PAGE_BYTES / float(np.median(times["copy"]))
        return [
            {
                "codec": self.name,
                "op": op,
                "raw_bytes": raw,
                "ratio": raw / packed,
                "gb_per_s": raw / float(np.median(times[op])) / 1e9,
                "ceiling_gb_per_s": ceiling / 1e9,
                "ceiling_fraction": (raw + packed) / float(np.median(times[op])) / ceiling,
            }
            for op in ("encode", "decode")
        ]


WAYS: tuple[type[Way], ...] = (RawLink, RawLoop, RawBatch, RawGather, NvcompAns, Fp8, Int8)


# ---- measuring


@dataclass(frozen=True)
class Case:
    """How many pages at once, and how often."""

    pages: int
    reps: int

    @classmethod
    def of(cls, pages: int, quick: bool) -> Case:
        """Repetitions that give a stable median in a second or less."""
        reps = 200 if pages <= 64 else 60 if pages <= 512 else 20 if pages <= 4096 else 10
        return cls(pages, 5 if quick else reps)


def measure(bench: Bench, way: Way, case: Case) -> list[Row]:
    """Store and load the pages of a case again and again, other pages every time, and check what came back."""
    torch, n = bench.torch, case.pages
    slots = bench.count // n
    seconds: dict[str, list[float]] = {"out": [], "in": []}
    link = {"out": 0, "in": 0}
    ids = [bench.order[k * n : (k + 1) * n] for k in range(min(slots, case.reps))]
    warm = max(3, min(20, 64 // n)) if n < 4096 else 2
    for direction, call in (("out", way.store), ("in", way.load)):
        if direction == "in":
            bench.targets.zero_()
        torch.cuda.synchronize()
        for r in range(-min(warm, len(ids)), case.reps):
            k = r % len(ids)
            begin = time.perf_counter()
            link[direction] = call(ids[k], k * n)
            end = time.perf_counter()
            if r >= 0:
                seconds[direction].append(end - begin)
    torch.cuda.synchronize()
    way.check(np.concatenate(ids[: case.reps]))
    rows = []
    for direction, times in seconds.items():
        low, middle, high = (float(q) for q in np.percentile(times, (10, 50, 90)))
        rows.append(
            {
                "way": way.name,
                "direction": direction,
                "raw_bytes": n * PAGE_BYTES,
                "pages": n,
                "ratio": n * PAGE_BYTES / link[direction],
                "gb_per_s": n * PAGE_BYTES / middle / 1e9,
                "link_gb_per_s": link[direction] / middle / 1e9,
                "us": middle * 1e6,
                "us_p10": low * 1e6,
                "us_p90": high * 1e6,
            }
        )
    return rows


def run(bench: Bench, kinds: Iterable[type[Way]], pages: Iterable[int], *, quick: bool = False) -> dict[str, Any]:
    """Measure every way for every number of pages.

    Returns:
        ``{"environment": {...}, "rows": [...], "codec_rows": [...], "skipped": [{"way", "reason"}], "notes": {...}}``.
    """
    ways: list[Way] = []
    skipped: list[Row] = []
    for kind in kinds:
        try:
            ways.append(kind(bench))
        except Unavailable as reason:
            skipped.append({"way": kind.name, "reason": str(reason)})
            print(f"{kind.name}: skipped: {reason}", flush=True)
    rows: list[Row] = []
    for n in pages:
        for way in ways:
            for row in measure(bench, way, Case.of(n, quick)):
                rows.append(row)
                print(
                    f"{row['pages']:6d} pages {row['direction']:3s} {row['way']:12s} {row['us']:10.1f} us "
                    f"[{row['us_p10']:.1f}, {row['us_p90']:.1f}] {row['gb_per_s']:6.1f} GB/s, "
                    f"link {row['link_gb_per_s']:5.1f}, ratio {row['ratio']:.3f}",
                    flush=True,
                )
    codec_rows = [row for way in ways if isinstance(way, NvcompAns) for row in way.codec_rows(5 if quick else 30)]
    for row in codec_rows:
        print(row, flush=True)
    return {
        "environment": environment(bench.torch),
        "rows": rows,
        "codec_rows": codec_rows,
        "skipped": skipped,
        "notes": {way.name: way.note() for way in ways if way.note()},
    }


def environment(torch: Any) -> Row:
    """What the figures depend on."""
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": device.name,
        "gpu_memory_bytes": device.total_memory,
        "multiprocessors": device.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "method": "host clock from the call until the data is there; medians with p10 and p90",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="KV cache, uint16 [layers, 2, tokens, heads, dim]")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--pages", default=",".join(map(str, PAGES)), help="numbers of pages, separated by commas")
    parser.add_argument("--ways", default="", help="names of ways, separated by commas; all by default")
    parser.add_argument("--plain", action="store_true", help="do not compile the torch functions of fp8 and int8")
    parser.add_argument("--quick", action="store_true", help="few repetitions: a smoke run")
    options = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("torch is not installed: this benchmark needs it, and a GPU", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("torch finds no GPU: this benchmark needs one", file=sys.stderr)
        return 1
    Compiled.plain = options.plain
    pages = [int(n) for n in options.pages.split(",")]
    names = [n for n in options.ways.split(",") if n]
    unknown = set(names) - {w.name for w in WAYS}
    if unknown:
        print(f"unknown ways {sorted(unknown)}: use {[w.name for w in WAYS]}", file=sys.stderr)
        return 1
    bench = Bench(torch, np.load(options.data), max(512, *pages))
    result = run(bench, [w for w in WAYS if not names or w.name in names], pages, quick=options.quick)
    result["environment"]["data"] = options.data.name
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
