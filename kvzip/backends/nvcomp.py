# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Lossless coding on the GPU with nvCOMP's ANS: an optional backend for tensors in CUDA memory.

Nothing of nvCOMP is part of kvzip: its shared library comes with the package ``nvidia-nvcomp-cu13`` (extra
``kvzip[nvcomp]``), is found at the first use and called through its C entry points. A batch of pages is one call for
each data type that it holds, on torch's current stream, in nvCOMP's bare ("raw") bitstreams, one for each 64 KiB.

Segments of this codec have coding 0 (raw, when ANS is not smaller) or 128::

    segment := prefix | chunk 0 | zero padding to 16 | chunk 1 | zero padding to 16 | ... | last chunk
    prefix  := u32 number of chunks | u32 65,536 | u32 checksum | u32 bytes of each chunk ... | zero padding to 16

A chunk is the ANS bitstream of 65,536 bytes of the page (the last chunk: of what is left), values in the order tokens,
heads, head_dim. The checksum is the CRC32C of all bytes of the segment after it: nvCOMP gets no damaged bitstream to
read. Integers are little-endian. The contents of a chunk are nvCOMP's affair: any nvCOMP 6 reads them.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kvzip.backends.base import Bytes, Codec, EncodeRequest, Table
from kvzip.errors import BackendUnavailableError, CorruptRecordError, CudaError, KvzipError, NativeError
from kvzip.interop.torch import page_view
from kvzip.record import ALIGNMENT, ENTRY_DTYPE, KINDS, Coding, Reason, align, crc32c
from kvzip.types import BlockLayout, BlockView, DType, SegmentLayout

CHUNK_BYTES = 65_536  # of a page, one ANS bitstream; the ratio no longer grows above it
ENCODED = 128  # value of the table's `coding`
STEP_BYTES = 256 << 20  # device memory that one step of a large batch may take
CHECKED_FROM = 12  # bytes at the start of a segment that its checksum does not cover

_SUPPORTED_MAJOR = 6  # the option structures below are those of this version
_SUCCESS = 0
_UCHAR, _FLOAT16, _FLOAT32, _ANY = 1, 10, 11, 0xFF
_DATA_TYPES = {
    DType.BFLOAT16: _FLOAT16,
    DType.FLOAT16: _FLOAT16,
    DType.FLOAT32: _FLOAT32,
    DType.OPAQUE: _UCHAR,
}
_INSTEAD = "use codec 'cuszp' with ErrorBound.lossless() instead"

Ints = npt.NDArray[np.int64]


class _CompressOptions(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("max_sub_chunk_count", ctypes.c_uint8),
        ("states_per_lane", ctypes.c_uint8),
        ("histogram_reduction_log2", ctypes.c_uint8),
        ("reserved", ctypes.c_char * 53),
    )


class _DecompressOptions(ctypes.Structure):
    _fields_ = (
        ("backend", ctypes.c_int),
        ("data_type", ctypes.c_int),
        ("max_sub_chunk_count", ctypes.c_uint8),
        ("states_per_lane", ctypes.c_uint8),
        ("skip_validate", ctypes.c_uint8),
        ("reserved", ctypes.c_char * 53),
    )


class _Properties(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32))


assert ctypes.sizeof(_CompressOptions) == ctypes.sizeof(_DecompressOptions) == 64


class NvcompLibrary:
    """nvCOMP's batched ANS by its C entry points. Addresses are of device memory; nothing here blocks the host.

    Args:
        library: the loaded shared library.

    Raises:
        BackendUnavailableError: it is not version 6.
    """

    def __init__(self, library: Any) -> None:
        pointer, size, status = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        signatures = {
            "nvcompGetProperties": [ctypes.POINTER(_Properties)],
            "nvcompBatchedANSCompressGetTempSize": [size, size, _CompressOptions, pointer, size, pointer],
            "nvcompBatchedANSCompressGetMaxOutputChunkSize": [size, _CompressOptions, pointer],
            "nvcompBatchedANSCompressAsync": [
                *(pointer, pointer, size, size, pointer, size, pointer, pointer),
                *(_CompressOptions, pointer, pointer),
            ],
            "nvcompBatchedANSDecompressGetTempSize": [size, size, _DecompressOptions, pointer, size, pointer],
            "nvcompBatchedANSDecompressAsync": [
                *(pointer, pointer, pointer, pointer, size, pointer, size, pointer),
                *(_DecompressOptions, pointer, pointer),
            ],
        }
        try:
            functions = {name: getattr(library, name) for name in signatures}
        except AttributeError as error:
            raise BackendUnavailableError(
                f"the nvCOMP found here lacks an entry point ({error}): install nvidia-nvcomp-cu13 6, or {_INSTEAD}"
            ) from error
        for name, function in functions.items():
            function.argtypes, function.restype = signatures[name], status
        self._functions = functions
        properties = _Properties()
        self._call("nvcompGetProperties", ctypes.byref(properties))
        number = int(properties.version)
        self.version = f"{number // 1000}.{number % 1000 // 100}.{number % 100}"
        if number // 1000 != _SUPPORTED_MAJOR:
            raise BackendUnavailableError(
                f"nvCOMP {self.version} is installed, version {_SUPPORTED_MAJOR} is needed: "
                f"pip install 'kvzip[nvcomp]', or {_INSTEAD}"
            )

    @classmethod
    def load(cls) -> NvcompLibrary:
        """Load the library of the installed package.

        Raises:
            BackendUnavailableError: it is not installed, cannot be loaded, or is not version 6.
        """
        try:
            package = importlib.import_module("nvidia.libnvcomp")
        except ImportError as error:
            raise BackendUnavailableError(
                "codec 'nvcomp' needs nvCOMP 6, which is not installed: "
                f"pip install 'kvzip[nvcomp]' (package nvidia-nvcomp-cu13), or {_INSTEAD}"
            ) from error
        try:
            library = package.load_library()
        except OSError as error:
            raise BackendUnavailableError(
                f"nvCOMP's library cannot be loaded ({error}): install nvidia-nvcomp-cu13 again, or {_INSTEAD}"
            ) from error
        if library is None:
            raise BackendUnavailableError(
                f"nvCOMP's library cannot be loaded: install nvidia-nvcomp-cu13 again, or {_INSTEAD}"
            )
        return cls(library)

    def _call(self, name: str, *args: Any) -> None:
        status = self._functions[name](*args)
        if status != _SUCCESS:
            raise NativeError(f"{name} failed with nvCOMP status {status}", status=status)

    def compress_temp_bytes(self, chunks: int, chunk_bytes: int, data_type: int, stream: int) -> int:
        """Bytes of device memory that `compress` needs for `chunks` chunks of up to `chunk_bytes`."""
        result = ctypes.c_size_t()
        options, total = _CompressOptions(data_type=data_type), chunks * chunk_bytes
        self._call(
            "nvcompBatchedANSCompressGetTempSize",
            *(chunks, chunk_bytes, options, ctypes.byref(result), total, stream),
        )
        return int(result.value)

    def compressed_bytes(self, chunk_bytes: int, data_type: int) -> int:
        """Most bytes that a chunk of `chunk_bytes` can compress to."""
        result = ctypes.c_size_t()
        self._call(
            "nvcompBatchedANSCompressGetMaxOutputChunkSize",
            *(chunk_bytes, _CompressOptions(data_type=data_type), ctypes.byref(result)),
        )
        return int(result.value)

    def compress(
        self,
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
        """Start compressing chunks on a stream.

        Args:
            sources: address of an array of their addresses, each a multiple of 16.
            source_bytes: address of an array of their sizes, u64.
            chunk_bytes: largest of the sizes.
            chunks: how many.
            temp: address of scratch memory.
            temp_bytes: its size, from `compress_temp_bytes`.
            targets: address of an array of the outputs' addresses, multiples of 16, `compressed_bytes` each.
            target_bytes: address of an array that receives the compressed sizes, u64.
            data_type: nvCOMP's number of the data type.
            statuses: address of an array that receives a status a chunk, i32.
            stream: CUDA stream.

        Raises:
            NativeError: the work could not be started.
        """
        options = _CompressOptions(data_type=data_type)
        self._call(
            "nvcompBatchedANSCompressAsync",
            *(sources, source_bytes, chunk_bytes, chunks, temp, temp_bytes, targets, target_bytes),
            *(options, statuses, stream),
        )

    def decompress_temp_bytes(self, chunks: int, chunk_bytes: int, data_type: int, stream: int) -> int:
        """Bytes of device memory that `decompress` needs for `chunks` chunks of up to `chunk_bytes`."""
        result = ctypes.c_size_t()
        options, total = _DecompressOptions(data_type=data_type), chunks * chunk_bytes
        self._call(
            "nvcompBatchedANSDecompressGetTempSize",
            *(chunks, chunk_bytes, options, ctypes.byref(result), total, stream),
        )
        return int(result.value)

    def decompress(
        self,
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
        """Start decompressing chunks on a stream.

        Args:
            sources: address of an array of their addresses, each a multiple of 16.
            source_bytes: address of an array of their sizes, u64.
            target_capacity: address of an array of the most bytes that each output may take, u64.
            target_bytes: address of an array that receives the sizes of the outputs, u64.
            chunks: how many.
            temp: address of scratch memory.
            temp_bytes: its size, from `decompress_temp_bytes`.
            targets: address of an array of the outputs' addresses, multiples of 16.
            data_type: what every chunk has to be, or 0xFF to take it from the bitstreams.
            statuses: address of an array that receives a status a chunk, i32.
            stream: CUDA stream.

        Raises:
            NativeError: the work could not be started.
        """
        options = _DecompressOptions(data_type=data_type)
        self._call(
            "nvcompBatchedANSDecompressAsync",
            *(sources, source_bytes, target_capacity, target_bytes, chunks, temp, temp_bytes, targets),
            *(options, statuses, stream),
        )


class CudaDevice:
    """The device that a batch runs on, and torch's current stream there; use it as a context manager."""

    def __init__(self, torch: Any, device: Any) -> None:
        self.torch = torch
        self.device = torch.device(device)
        self._guard = torch.cuda.device(self.device)

    def __enter__(self) -> CudaDevice:
        self._guard.__enter__()
        self._stream = self.torch.cuda.current_stream()
        return self

    def __exit__(self, *exception: object) -> None:
        self._guard.__exit__(*exception)

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.cuda_stream)

    def empty(self, nbytes: int) -> Any:
        """Device memory, uint8, its size rounded up to 16."""
        return self.torch.empty(align(nbytes), dtype=self.torch.uint8, device=self.device)

    def staging(self, nbytes: int) -> Any:
        """Pinned host memory, uint8, its size rounded up to 16."""
        return self.torch.empty(align(nbytes), dtype=self.torch.uint8, pin_memory=True)

    def upload(self, host: Any) -> Any:
        """Copy staging memory to new device memory, in the order of the stream."""
        return self.empty(host.numel()).copy_(host, non_blocking=True)

    def download(self, tensor: Any) -> npt.NDArray[np.uint8]:
        """Copy device memory to new staging memory. Blocks the host."""
        host = self.staging(tensor.numel())
        host.copy_(tensor, non_blocking=True)
        self.synchronize()
        array: npt.NDArray[np.uint8] = host.numpy()
        return array

    def synchronize(self) -> None:
        """Wait for the stream. Blocks the host."""
        self._stream.synchronize()


class _Columns:
    """Where the pages and chunks of a block are; arrays have one entry a page (S) or one a chunk of a block (C)."""

    def __init__(self, layout: BlockLayout) -> None:
        segments = layout.segments
        self.page_bytes = np.array([s.nbytes for s in segments], np.int64)  # S
        self.page_types = np.array([_DATA_TYPES[s.dtype] for s in segments], np.int64)  # S
        self.kinds = np.array([KINDS.index(s.kind) for s in segments], np.uint8)  # S
        self.row_bytes = _align(self.page_bytes)  # S
        self.chunks = -(-self.page_bytes // CHUNK_BYTES)  # S
        self.prefix_bytes = _align(CHECKED_FROM + 4 * self.chunks)  # S
        self.first = _starts(self.chunks)  # S: column of a page's first chunk
        self.page = np.repeat(np.arange(len(segments)), self.chunks)  # C
        self.number = np.arange(self.page.size) - self.first[self.page]  # C: of the chunk within its page
        self.raw_bytes = np.minimum(self.page_bytes[self.page] - self.number * CHUNK_BYTES, CHUNK_BYTES)  # C
        self.last = self.number == self.chunks[self.page] - 1  # C
        self.types = self.page_types[self.page]  # C
        self.kind_of_types = sorted({int(t) for t in self.page_types})

    def page_addresses(self, base: int, blocks: int) -> tuple[Ints, Ints, int]:
        """Pages of a batch one after the other, all blocks of page 0 first.

        Returns:
            Addresses of page s of block 0 (S), of every chunk (blocks x C), and the bytes of all.
        """
        starts = base + _starts(self.row_bytes * blocks)
        block = np.arange(blocks, dtype=np.int64)[:, None]
        chunks = starts[self.page] + block * self.row_bytes[self.page] + self.number * CHUNK_BYTES
        return starts, chunks, int(self.row_bytes.sum()) * blocks

    def per_page(self, chunks: Ints) -> Ints:
        """Sum over the chunks of each page: blocks x C to blocks x S."""
        sums: Ints = np.add.reduceat(chunks, self.first, axis=1)
        return sums


def _align(values: Ints) -> Ints:
    result: Ints = -(-values // ALIGNMENT) * ALIGNMENT
    return result


def _starts(sizes: Ints) -> Ints:
    """Where things of these sizes start when they stand one after the other (along the last axis)."""
    result: Ints = np.cumsum(sizes, axis=-1) - sizes
    return result


class NvcompCodec(Codec):
    """Lossless coding with nvCOMP's ANS of pages in CUDA memory; tensors in host memory are refused.

    Calls block the host and run on torch's current stream of the tensors' device: what that stream has before them is
    seen, what it gets after them sees their result. A batch takes up to `STEP_BYTES` of device memory from torch's
    allocator (more only if a single block needs it), and about half of it in pinned staging memory.

    The same pages give the same bytes with the same nvCOMP; other versions of it may write others, and read these.

    Raises:
        BackendUnavailableError: nvCOMP, torch or a GPU is missing; the message says what to do.
    """

    name: ClassVar[str] = "nvcomp"
    lossless_only: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self) -> None:
        self._library = NvcompLibrary.load()
        try:
            self._torch = importlib.import_module("torch")
        except ImportError as error:
            raise BackendUnavailableError(
                f"codec 'nvcomp' needs torch for device memory: pip install torch, or {_INSTEAD}"
            ) from error
        if not self._torch.cuda.is_available():
            raise BackendUnavailableError(
                "codec 'nvcomp' runs on NVIDIA GPUs alone and torch finds none: check the driver (nvidia-smi) and that "
                f"torch is a CUDA build, or {_INSTEAD}"
            )

    @property
    def version(self) -> str:
        """Version of nvCOMP."""
        return self._library.version

    def max_payload_bytes(self, layout: BlockLayout) -> int:
        """Most bytes of one block's payload: a page never takes more than its raw values."""
        return sum(align(s.nbytes) for s in layout.segments)

    def _open(self, device: str | None) -> CudaDevice:
        """The device of tensors, or torch's current one."""
        if device is None:
            device = f"cuda:{self._torch.cuda.current_device()}"
        if not device.startswith("cuda"):
            raise BackendUnavailableError(
                f"codec 'nvcomp' takes tensors in CUDA memory, these are on {device}: move them to a GPU, or {_INSTEAD}"
            )
        return CudaDevice(self._torch, device)

    # ---- encode

    def encode_blocks(
        self, blocks: BlockView, request: EncodeRequest, out: Bytes
    ) -> tuple[Table, npt.NDArray[np.uint64]]:
        """Encode a batch of blocks in CUDA memory; see `Codec.encode_blocks`. Blocks the host.

        Raises:
            BackendUnavailableError: the tensors are not in CUDA memory.
            NativeError: nvCOMP or CUDA reported a failure.
        """
        tables = np.zeros((len(blocks), len(blocks.layout.segments)), ENTRY_DTYPE)
        sizes = np.zeros(len(blocks), np.uint64)
        with _cuda_errors(), self._open(blocks.device) as device:
            columns = _Columns(blocks.layout)
            slot_bytes = self._slot_bytes(columns)
            per_block = int(columns.row_bytes.sum() * 4 + slot_bytes.sum() + columns.prefix_bytes.sum())
            for first, last in _steps(len(blocks), per_block):
                part = blocks[blocks.block_ids[first:last]]
                tables[first:last], sizes[first:last] = self._encode_step(
                    device, columns, slot_bytes, part, out[first:last]
                )
        return tables, sizes

    def _slot_bytes(self, columns: _Columns) -> Ints:
        """Room for each compressed chunk of a block (C)."""
        made: dict[tuple[int, int], int] = {}
        for key in set(zip(columns.raw_bytes.tolist(), columns.types.tolist(), strict=True)):
            made[key] = align(self._library.compressed_bytes(*key))
        keys = zip(columns.raw_bytes.tolist(), columns.types.tolist(), strict=True)
        return np.array([made[key] for key in keys], np.int64)

    def _encode_step(
        self, device: CudaDevice, columns: _Columns, slot_bytes: Ints, blocks: BlockView, out: Bytes
    ) -> tuple[Table, Ints]:
        count = len(blocks)
        # One piece of device memory: all pages, then a slot for each chunk; the first slot of a page has room for the
        # prefix before it. So a segment is a few runs of 16-byte units wherever it comes from.
        page_starts, page_chunks, pages_bytes = columns.page_addresses(0, count)
        room = slot_bytes + np.where(columns.number == 0, columns.prefix_bytes[columns.page], 0)
        slots_block = int(room.sum())
        first_slots = pages_bytes + _starts(room) + room - slot_bytes
        slots = np.arange(count, dtype=np.int64)[:, None] * slots_block + first_slots
        work = device.empty(pages_bytes + count * slots_block)
        work[pages_bytes:].zero_()  # so that bytes which nvCOMP leaves out are the same every time
        base = int(work.data_ptr())
        total = count * columns.page.size
        groups = [np.flatnonzero(columns.types == t) for t in columns.kind_of_types]
        control = np.concatenate(
            [
                blocks.block_ids,
                *((base + page_chunks[:, g]).ravel() for g in groups),
                *(np.tile(columns.raw_bytes[g], count) for g in groups),
                *((base + slots[:, g]).ravel() for g in groups),
            ]
        )
        control_device = self._upload(device, control)
        ids = control_device[:count]
        self._gather(device, blocks, ids, work, page_starts)

        results = device.empty(8 * total + 4 * total)
        sizes_at, statuses_at = int(results.data_ptr()), int(results.data_ptr()) + 8 * total
        arrays_at = int(control_device.data_ptr()) + 8 * count
        done = 0
        for data_type, g in zip(columns.kind_of_types, groups, strict=True):
            chunks, largest = count * g.size, int(columns.raw_bytes[g].max())
            temp_bytes = self._library.compress_temp_bytes(chunks, largest, data_type, device.stream)
            temp = device.empty(max(temp_bytes, 1))
            self._library.compress(
                sources=arrays_at + 8 * done,
                source_bytes=arrays_at + 8 * (total + done),
                chunk_bytes=largest,
                chunks=chunks,
                temp=int(temp.data_ptr()),
                temp_bytes=temp_bytes,
                targets=arrays_at + 8 * (2 * total + done),
                target_bytes=sizes_at + 8 * done,
                data_type=data_type,
                statuses=statuses_at + 4 * done,
                stream=device.stream,
            )
            done += chunks
        found = device.download(results)
        encoded = np.empty((count, columns.page.size), np.int64)
        failed = np.empty((count, columns.page.size), np.int64)
        done = 0
        for g in groups:
            chunks = count * g.size
            encoded[:, g] = found[8 * done : 8 * (done + chunks)].view("<i8").reshape(count, -1)
            statuses = found[8 * total + 4 * done : 8 * total + 4 * (done + chunks)].view("<i4").reshape(count, -1)
            failed[:, g] = statuses != _SUCCESS
            done += chunks
        failed |= (encoded <= 0) | (encoded > slot_bytes)

        # What each segment is, where it stands, and which units it is made of.
        broken = columns.per_page(failed) > 0
        tail = np.where(columns.last, encoded, _align(encoded))
        size = columns.prefix_bytes + columns.per_page(np.where(failed, 0, tail))
        kept = ~broken & (size < columns.page_bytes)
        size = np.where(kept, size, columns.page_bytes)
        offset = _starts(_align(size))
        payload = offset[:, -1] + _align(size[:, -1])
        kept_chunk = kept[:, columns.page]
        prefix = np.where(kept_chunk & (columns.number == 0), columns.prefix_bytes[columns.page], 0)
        exact = np.where(kept_chunk, encoded, columns.raw_bytes)
        run_bytes = (prefix + _align(exact)).ravel()
        run_from = np.where(kept_chunk, slots - prefix, page_chunks).ravel()
        arena = self._copy_runs(device, work, run_from, run_bytes)
        host = device.download(arena)

        # Prefixes, and zeros in what the device left undefined.
        run_ends = np.cumsum(run_bytes)
        _zero(host, run_ends - _align(exact).ravel() + exact.ravel(), run_ends)
        block_starts = _starts(payload)
        starts = block_starts[:, None] + offset
        words = host.view("<u4")
        at = (starts[kept] // 4).astype(np.int64)
        chunks_kept = np.broadcast_to(columns.chunks, kept.shape)[kept]
        prefix_words = np.broadcast_to(columns.prefix_bytes // 4, kept.shape)[kept]
        words[at] = chunks_kept
        words[at + 1] = CHUNK_BYTES
        words[(starts[:, columns.page] // 4 + 3 + columns.number)[kept_chunk]] = encoded[kept_chunk]
        for word in range(3):
            inside = 3 + chunks_kept + word < prefix_words
            words[(at + 3 + chunks_kept + word)[inside]] = 0
        for start, length in zip(starts[kept].tolist(), size[kept].tolist(), strict=True):
            words[start // 4 + 2] = crc32c(host[start + CHECKED_FROM : start + length])
        for b in range(count):
            n = int(payload[b])
            out[b, :n] = host[block_starts[b] : block_starts[b] + n]

        table = np.zeros((count, columns.page_bytes.size), ENTRY_DTYPE)
        table["offset"], table["size"] = offset // ALIGNMENT, size
        table["coding"] = np.where(kept, ENCODED, int(Coding.RAW))
        table["kind"] = columns.kinds
        reasons = np.where(broken, int(Reason.ENCODER_FAILED), int(Reason.INCOMPRESSIBLE))
        table["reason"] = np.where(kept, int(Reason.AS_ASKED), reasons)
        return table, payload

    def _upload(self, device: CudaDevice, control: Ints) -> Any:
        """Copy small integers to the device, as int64."""
        host = device.staging(control.nbytes)
        host.numpy()[: control.nbytes] = control.view(np.uint8)
        return device.upload(host)[: control.nbytes].view(self._torch.int64)

    def _copy_runs(self, device: CudaDevice, source: Any, run_from: Ints, run_bytes: Ints) -> Any:
        """Copy runs of bytes, all multiples of 16, to new memory one after the other."""
        index = self._units(device, run_from, run_bytes)
        units = source.view(self._torch.int64).view(-1, 2)
        return units.index_select(0, index).view(-1).view(self._torch.uint8)

    def _units(self, device: CudaDevice, run_from: Ints, run_bytes: Ints) -> Any:
        """Numbers of the 16-byte units that runs are made of."""
        torch = self._torch
        lengths = run_bytes // ALIGNMENT
        shift = run_from // ALIGNMENT - _starts(lengths)
        both = self._upload(device, np.concatenate([shift, lengths]))
        total = int(lengths.sum())
        index = torch.repeat_interleave(both[: shift.size], both[shift.size :], output_size=total)
        return index.add_(torch.arange(total, dtype=torch.int64, device=device.device))

    def _gather(self, device: CudaDevice, blocks: BlockView, ids: Any, work: Any, page_starts: Ints) -> None:
        """Copy the pages of blocks to their places in `work`."""
        for s, segment in enumerate(blocks.layout.segments):
            view = page_view(blocks, segment)
            rows = _rows(work, view, segment, int(page_starts[s]), len(blocks))
            if rows.is_contiguous():
                self._torch.index_select(view, 0, ids, out=rows)
            else:
                rows.copy_(view.index_select(0, ids))

    # ---- decode

    def validate_blocks(self, layout: BlockLayout, payloads: Sequence[Bytes], tables: Sequence[Table]) -> None:
        """Check prefixes, sizes and padding, and decode on the current CUDA device, dropping the values.

        Blocks the host.
        """
        self._decode(layout, None, payloads, tables)

    def decode_blocks(
        self, blocks: BlockView, payloads: Sequence[Bytes], tables: Sequence[Table], *, threads: int = 0
    ) -> None:
        """Decode into blocks in CUDA memory; see `Codec.decode_blocks`. Blocks the host.

        Raises:
            BackendUnavailableError: the tensors are not in CUDA memory.
            CorruptRecordError: a payload contradicts the format, or nvCOMP refuses a bitstream; nothing was written.
            NativeError: nvCOMP or CUDA reported a failure.
        """
        self._decode(blocks.layout, blocks, payloads, tables)

    def _decode(
        self, layout: BlockLayout, blocks: BlockView | None, payloads: Sequence[Bytes], tables: Sequence[Table]
    ) -> None:
        with _cuda_errors(), self._open(None if blocks is None else blocks.device) as device:
            if not len(payloads):
                return
            columns = _Columns(layout)
            table = np.stack([np.asarray(t) for t in tables])
            if table.shape != (len(payloads), len(layout.segments)):
                raise CorruptRecordError(
                    f"segment tables of shape {table.shape}: {len(payloads)} payloads of {len(layout.segments)} pages"
                )
            steps = list(_steps(len(payloads), int(columns.row_bytes.sum() * 4)))
            # Nothing may be written before everything is known to be sound: more steps than one go twice.
            for write in (False, True) if len(steps) > 1 and blocks is not None else (blocks is not None,):
                for first, last in steps:
                    part = blocks[blocks.block_ids[first:last]] if write and blocks is not None else None
                    self._decode_step(device, columns, part, payloads[first:last], table[first:last], first)

    def _decode_step(
        self,
        device: CudaDevice,
        columns: _Columns,
        blocks: BlockView | None,
        payloads: Sequence[Bytes],
        table: Table,
        number: int,
    ) -> None:
        torch, count = self._torch, len(payloads)
        lengths = np.array([p.size for p in payloads], np.int64)
        starts = _starts(_align(lengths))
        payload_bytes = int(_align(lengths).sum())
        host_tensor = device.staging(payload_bytes + ALIGNMENT)
        host = host_tensor.numpy()
        for start, length, payload in zip(starts.tolist(), lengths.tolist(), payloads, strict=True):
            host[start : start + length] = payload
            host[start + length : start + align(length)] = 0
        kept, encoded, sources = _check_payloads(columns, host, starts, lengths, table, number)
        arena = device.upload(host_tensor)

        page_starts, page_chunks, pages_bytes = columns.page_addresses(0, count)
        pages = device.empty(pages_bytes)
        chosen = kept[:, columns.page]
        raw_from, raw_to = sources[~chosen], page_chunks[~chosen]
        raw_bytes = np.broadcast_to(_align(columns.raw_bytes), chosen.shape)[~chosen]
        if raw_bytes.size:
            index = self._units(device, raw_to, raw_bytes)
            moved = self._copy_runs(device, arena, raw_from, raw_bytes)
            pages.view(torch.int64).view(-1, 2).index_copy_(0, index, moved.view(torch.int64).view(-1, 2))
        chunks = int(chosen.sum())
        capacity = np.broadcast_to(columns.raw_bytes, chosen.shape)[chosen]
        control = np.concatenate(
            [
                np.zeros(count, np.int64) if blocks is None else blocks.block_ids,
                int(arena.data_ptr()) + sources[chosen],
                encoded[chosen],
                capacity,
                int(pages.data_ptr()) + page_chunks[chosen],
            ]
        )
        control_device = self._upload(device, control)
        if chunks:
            types = set(np.broadcast_to(columns.types, chosen.shape)[chosen].tolist())
            data_type = types.pop() if len(types) == 1 else _ANY
            largest = int(capacity.max())
            temp_bytes = self._library.decompress_temp_bytes(chunks, largest, data_type, device.stream)
            temp = device.empty(max(temp_bytes, 1))
            results = device.empty(12 * chunks)
            arrays_at = int(control_device.data_ptr()) + 8 * count
            self._library.decompress(
                sources=arrays_at,
                source_bytes=arrays_at + 8 * chunks,
                target_capacity=arrays_at + 16 * chunks,
                target_bytes=int(results.data_ptr()),
                chunks=chunks,
                temp=int(temp.data_ptr()),
                temp_bytes=temp_bytes,
                targets=arrays_at + 24 * chunks,
                data_type=data_type,
                statuses=int(results.data_ptr()) + 8 * chunks,
                stream=device.stream,
            )
            found = device.download(results)
            wrong = found[: 8 * chunks].view("<i8") != capacity
            statuses = found[8 * chunks : 12 * chunks].view("<i4")
            wrong |= statuses != _SUCCESS
            if wrong.any():
                where = np.argwhere(chosen)[int(wrong.argmax())]
                raise CorruptRecordError(
                    f"nvCOMP cannot decode chunk {columns.number[where[1]]} of page {columns.page[where[1]]} of block "
                    f"{number + int(where[0])} (status {statuses[int(wrong.argmax())]}): the record is damaged"
                )
        if blocks is not None:
            ids = control_device[:count]
            for s, segment in enumerate(blocks.layout.segments):
                view = page_view(blocks, segment)
                view.index_copy_(0, ids, _rows(pages, view, segment, int(page_starts[s]), count))
        device.synchronize()


def _check_payloads(
    columns: _Columns, host: npt.NDArray[np.uint8], starts: Ints, lengths: Ints, table: Table, number: int
) -> tuple[npt.NDArray[np.bool_], Ints, Ints]:
    """Check tables and prefixes against the format; nothing is used before its length is checked.

    Args:
        columns: geometry of the blocks.
        host: payloads one after the other, from multiples of 16.
        starts: where each begins.
        lengths: bytes of each.
        table: segment tables, blocks x S.
        number: of the first block, for messages.

    Returns:
        Which pages are compressed (blocks x S), bytes of their chunks (blocks x C), and where each chunk, compressed or
        raw, stands in `host` (blocks x C).
    """

    def require(good: npt.NDArray[np.bool_], what: str) -> None:
        if not good.all():
            block, column = np.argwhere(~good)[0]
            page = column if good.shape[1] == columns.page_bytes.size else columns.page[column]
            raise CorruptRecordError(f"page {page} of block {number + int(block)}: {what}: the record is damaged")

    offset, size = table["offset"].astype(np.int64) * ALIGNMENT, table["size"].astype(np.int64)
    coding = table["coding"]
    kept = coding == ENCODED
    require(kept | (coding == Coding.RAW), f"its coding is neither 0 nor {ENCODED}")
    require(offset + size <= lengths[:, None], "it leaves its payload")
    require(kept | (size == columns.page_bytes), "its raw values are more or fewer than the page has")
    require(~kept | (size > columns.prefix_bytes), "its compressed bytes end within their prefix")
    require(~kept | (size < columns.page_bytes), "its compressed bytes are more than its raw values")
    begin = starts[:, None] + offset
    words = host.view("<u4")
    # Words of pages that are not compressed are read too, from a place that is there, and not used.
    at = np.where(kept, begin // 4, 0)
    count, chunk = words[at], words[np.minimum(at + 1, words.size - 1)]
    require(~kept | ((count == columns.chunks) & (chunk == CHUNK_BYTES)), "its prefix does not fit the page")
    chosen = kept[:, columns.page]
    where = np.where(chosen, begin[:, columns.page] // 4 + 3 + columns.number, 0)
    encoded = np.where(chosen, words[where].astype(np.int64), columns.raw_bytes)
    require(encoded > 0, "it has a chunk of no bytes")
    padded = _align(encoded)
    held = columns.prefix_bytes + columns.per_page(np.where(columns.last, encoded, padded))
    require(~kept | (held == size), "its chunks are more or fewer bytes than the segment")
    for word in range(3):
        behind = 3 + columns.chunks + word
        inside = kept & (behind < columns.prefix_bytes // 4)
        require(~inside | (words[np.where(inside, begin // 4 + behind, 0)] == 0), "the padding of its prefix is not 0")
    sums = np.fromiter(
        (
            crc32c(host[b + CHECKED_FROM : b + n])
            for b, n in zip(begin[kept].tolist(), size[kept].tolist(), strict=True)
        ),
        np.uint32,
    )
    right = np.ones(kept.shape, np.bool_)
    right[kept] = words[begin[kept] // 4 + 2] == sums
    require(right, "its checksum does not match")
    before = _starts(padded)
    within = before - before[:, columns.first][:, columns.page]
    prefix = np.where(kept, columns.prefix_bytes, 0)[:, columns.page]
    sources = begin[:, columns.page] + prefix + np.where(chosen, within, columns.number * CHUNK_BYTES)
    ends = sources + encoded
    for byte in range(ALIGNMENT - 1):
        at_byte = ends + byte
        inside = chosen & ~columns.last & (at_byte < sources + padded)
        require(~inside | (host[np.where(inside, at_byte, 0)] == 0), "the padding between its chunks is not 0")
    return kept, encoded, sources


def _rows(work: Any, view: Any, segment: SegmentLayout, start: int, count: int) -> Any:
    """Where the pages of `count` blocks stand in `work`, in the shape and type of `view`."""
    rows = work[start : start + count * align(segment.nbytes)].view(count, -1)[:, : segment.nbytes]
    return rows.view(view.dtype).unflatten(1, view.shape[1:])


def _zero(host: npt.NDArray[np.uint8], begins: Ints, ends: Ints) -> None:
    """Set less than 16 bytes at each of many places to zero."""
    for byte in range(ALIGNMENT - 1):
        at = begins + byte
        host[at[at < ends]] = 0


def _steps(count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """Ranges of blocks that keep within `STEP_BYTES`."""
    step = max(1, STEP_BYTES // max(1, bytes_each))
    for first in range(0, count, step):
        yield first, min(first + step, count)


@contextmanager
def _cuda_errors() -> Iterator[None]:
    """Turn torch's CUDA errors into kvzip's."""
    try:
        yield
    except KvzipError:
        raise
    except RuntimeError as error:
        kind = type(error).__name__
        if kind == "OutOfMemoryError":
            raise NativeError(f"not enough GPU memory for nvCOMP: {error}") from error
        if kind == "AcceleratorError" or "CUDA error" in str(error):
            text, code = str(error).partition("\n")[0], int(getattr(error, "error_code", None) or 0)
            raise CudaError(f"CUDA failed under nvCOMP: {text}", code=code, name=text) from error
        raise
