# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Moves encoded blocks between one GPU and host memory: a staged pipeline in each direction.

Out: encode kernel -> staging arena in device memory -> exact-size copies by the copy engine. In: copy engine ->
staging arena -> decode kernel. The work is cut into chunks; each direction owns a few *slots* (arena, tables, events)
and a pair of streams, so that the kernel of one chunk runs while the copy engine moves another. A slot that is still
in use holds the next chunk back: staging memory is bounded.

Sizes and statuses are written by the kernels to mapped host memory: a copy would queue behind the chunk before.

Everything here runs in the thread that calls it, blocks that thread where the docstring says so, and touches no state
of the caller's streams: ordering against them is by events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.bounds import PageBounds
from kvzip.memory import MemoryResource, PinnedMemory, Region
from kvzip.record import ENTRY_DTYPE, header_nbytes
from kvzip.types import BlockLayout, BlockView

RECORD_ALIGNMENT = 256  # bytes: records begin at multiples of it in the arena (csrc/cuszp/kvz.h)

Words = npt.NDArray[np.uint64]
Runs = Sequence[tuple[int, int]]  # (host address, bytes), in the order of a record's bytes
Joins = Callable[[int], bool]


class Driver(Protocol):
    """The device functions that the pipeline needs; `kvzip._cuda` has the real ones.

    Handles and addresses are integers. Freeing address 0 does nothing.
    """

    def set_device(self, device: int) -> None: ...  # noqa: D102
    def malloc(self, nbytes: int) -> int: ...  # noqa: D102
    def free(self, address: int) -> None: ...  # noqa: D102
    def memset(self, address: int, byte: int, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None: ...  # noqa: D102
    def copy_batch(self, to: Words, source: Words, nbytes: Words, stream: int) -> None: ...  # noqa: D102
    def stream_create(self, priority: int = 0) -> int: ...  # noqa: D102
    def stream_destroy(self, stream: int) -> None: ...  # noqa: D102
    def stream_wait_event(self, stream: int, event: int) -> None: ...  # noqa: D102
    def event_create(self, *, timing: bool = False) -> int: ...  # noqa: D102
    def event_destroy(self, event: int) -> None: ...  # noqa: D102
    def event_record(self, event: int, stream: int) -> None: ...  # noqa: D102
    def event_synchronize(self, event: int) -> None: ...  # noqa: D102
    def workspace_bytes(self, num_segments: int, num_blocks: int) -> int: ...  # noqa: D102
    def encode(self, args: EncodeArgs, stream: int) -> None: ...  # noqa: D102
    def decode(self, args: DecodeArgs, stream: int) -> None: ...  # noqa: D102
    def crc32c(self, args: CrcArgs, stream: int) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class EncodeArgs:
    """Arguments of one encode launch: device-addressable addresses, sizes in bytes (see ``kvz_cuda_encode_args``).

    With `crc32c`, the checksums of the payloads are written there.
    """

    segments: npt.NDArray[Any]
    device_segments: int
    block_ids: int
    num_blocks: int
    arena: int
    arena_bytes: int
    header_bytes: int
    table: int
    payload_bytes: int
    record_offsets: int
    status: int
    workspace: int
    workspace_bytes: int
    max_ctas: int
    crc32c: int = 0


@dataclass(frozen=True)
class DecodeArgs:
    """Arguments of one decode launch (see ``kvz_cuda_decode_args``).

    With `crc32c`, payloads that have other checksums than those there are refused.
    """

    segments: npt.NDArray[Any]
    device_segments: int
    block_ids: int
    num_blocks: int
    payloads: int
    payload_bytes: int
    table: int
    block_status: int
    workspace: int
    workspace_bytes: int
    max_ctas: int
    crc32c: int = 0


@dataclass(frozen=True)
class CrcArgs:
    """Arguments of one checksum launch (see ``kvz_cuda_crc_args``)."""

    base: int
    offsets: int
    skip: int
    payload_bytes: int
    crc32c: int
    scratch: int
    max_payload_bytes: int
    count: int
    check: bool
    max_ctas: int


@dataclass(frozen=True)
class EncodedChunk:
    """What an encoder said about a chunk of blocks, in host memory.

    Attributes:
        first: position of the chunk's first block in the batch.
        tables: segment tables, shape ``[blocks, pages]``.
        payload_bytes: sizes of the payloads, shape ``[blocks]``.
        payload_crc32c: their checksums, shape ``[blocks]``.
    """

    first: int
    tables: npt.NDArray[Any]
    payload_bytes: Words
    payload_crc32c: npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Sources:
    """Records of a chunk of blocks in host memory, and what their headers say.

    Attributes:
        runs: where each record lies.
        record_bytes: bytes of each, header included, shape ``[blocks]``.
        header_bytes: bytes before each payload.
        payload_bytes: sizes of the payloads, shape ``[blocks]``; 0 makes the decoder refuse a block.
        payload_crc32c: their checksums, shape ``[blocks]``.
        tables: segment tables, shape ``[blocks, pages]``.
    """

    runs: Sequence[Runs]
    record_bytes: npt.NDArray[np.int64]
    header_bytes: int
    payload_bytes: Words
    payload_crc32c: npt.NDArray[np.uint32]
    tables: npt.NDArray[Any]


class _Slot:
    """Staging of one chunk: arena and workspace in device memory, tables in pinned host memory, two events."""

    def __init__(self, driver: Driver, resource: MemoryResource, stream: int) -> None:
        self._driver = driver
        self._resource = resource
        self._stream = stream
        self.arena = self.arena_bytes = 0
        self.workspace = self.workspace_bytes = 0
        self.crc_scratch = self._crc_bytes = 0
        self.device_meta = self._meta_bytes = 0
        self._region: Region | None = None
        self.kernel_done = driver.event_create()
        self.copy_done = driver.event_create()
        self.busy = False

    def fit(self, arena_bytes: int, meta_bytes: int, pages: int, blocks: int) -> None:
        """Grow what is too small for a chunk. The slot must not be in use."""
        driver = self._driver
        workspace_bytes, crc_bytes = driver.workspace_bytes(pages, blocks), 8 * blocks
        if arena_bytes > self.arena_bytes:
            driver.free(self.arena)
            self.arena, self.arena_bytes = 0, 0
            self.arena, self.arena_bytes = driver.malloc(arena_bytes), arena_bytes
        if workspace_bytes > self.workspace_bytes:
            driver.free(self.workspace)
            self.workspace, self.workspace_bytes = 0, 0
            self.workspace, self.workspace_bytes = driver.malloc(workspace_bytes), workspace_bytes
            driver.memset(self.workspace, 0, workspace_bytes, self._stream)
        if crc_bytes > self._crc_bytes:
            driver.free(self.crc_scratch)
            self.crc_scratch, self._crc_bytes = 0, 0
            self.crc_scratch, self._crc_bytes = driver.malloc(crc_bytes), crc_bytes
            driver.memset(self.crc_scratch, 0, crc_bytes, self._stream)
        if meta_bytes > self._meta_bytes:
            driver.free(self.device_meta)
            self.device_meta, self._meta_bytes = 0, 0
            if self._region is not None:
                self._region.close()
            self._region = self._resource.allocate(meta_bytes)
            self.device_meta, self._meta_bytes = driver.malloc(meta_bytes), meta_bytes

    @property
    def host_meta(self) -> npt.NDArray[np.uint8]:
        """The pinned tables, uint8."""
        assert self._region is not None
        return self._region.array

    @property
    def host_meta_address(self) -> int:
        """Their address; mapped, so that kernels can write to it."""
        assert self._region is not None
        return self._region.address

    def close(self) -> None:
        for event in (self.kernel_done, self.copy_done):
            self._driver.event_destroy(event)
        for address in (self.arena, self.workspace, self.crc_scratch, self.device_meta):
            self._driver.free(address)
        if self._region is not None:
            self._region.close()


class _Fields:
    """Lays arrays out one after another in a slot's tables, each at a multiple of 16 bytes."""

    def __init__(self, **fields: tuple[np.dtype[Any], int]) -> None:
        self.nbytes = 0
        self._at: dict[str, tuple[int, np.dtype[Any], int]] = {}
        for name, (dtype, count) in fields.items():
            self._at[name] = (self.nbytes, dtype, count)
            self.nbytes += -(-dtype.itemsize * count // 16) * 16

    def array(self, memory: npt.NDArray[np.uint8], name: str) -> npt.NDArray[Any]:
        at, dtype, count = self._at[name]
        return memory[at : at + dtype.itemsize * count].view(dtype)

    def address(self, base: int, name: str) -> int:
        return base + self._at[name][0]


_U8, _U32, _U64, _I64 = (np.dtype(t) for t in (np.uint8, np.uint32, np.uint64, np.int64))


@lru_cache(maxsize=64)
def _encode_fields(pages: int, blocks: int) -> _Fields:
    """What the host gives to an encoder (up to the block ids), and what comes back."""
    return _Fields(
        segments=(_native.SEGMENT_DTYPE, pages),
        block_ids=(_I64, blocks),
        table=(ENTRY_DTYPE, blocks * pages),
        payload_bytes=(_U64, blocks),
        record_offsets=(_U64, blocks),
        payload_crc32c=(_U32, blocks),
        status=(_U32, 4),
    )


@lru_cache(maxsize=64)
def _decode_fields(pages: int, blocks: int) -> _Fields:
    """What the host gives to a decoder (up to the tables), and what comes back."""
    return _Fields(
        segments=(_native.SEGMENT_DTYPE, pages),
        block_ids=(_I64, blocks),
        payloads=(_U64, blocks),
        payload_bytes=(_U64, blocks),
        payload_crc32c=(_U32, blocks),
        table=(ENTRY_DTYPE, blocks * pages),
        block_status=(_U32, blocks),
    )


@dataclass(frozen=True)
class Staging:
    """Bounds of a pipeline's memory and of its use of the GPU.

    Attributes:
        chunk_bytes: raw bytes of one chunk. A block that is larger is a chunk by itself.
        slots: chunks in flight, for each direction.
        max_ctas: most thread blocks of a codec kernel at a time; 0 = as many as fit. Fewer leave more of the GPU to the
            model.
    """

    chunk_bytes: int = 64 << 20
    slots: int = 3
    max_ctas: int = 0


class _Pipeline:
    """What both directions share: slots in turn, two streams, chunks."""

    def __init__(self, driver: Driver, staging: Staging, resource: MemoryResource) -> None:
        self._driver = driver
        self._staging = staging
        self._kernels = driver.stream_create()
        self._copies = driver.stream_create()
        self._slots = [_Slot(driver, resource, self._kernels) for _ in range(staging.slots)]
        self._turn = 0

    def _chunks(self, blocks: int, layout: BlockLayout) -> Iterator[tuple[int, int]]:
        step = max(1, self._staging.chunk_bytes // layout.nbytes)
        return ((first, min(first + step, blocks)) for first in range(0, blocks, step))

    def _next_slot(self) -> _Slot:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        return slot

    def drain(self) -> None:
        """Wait until every slot is free. Blocks the host."""
        for slot in self._slots:
            if slot.busy:
                self._driver.event_synchronize(slot.kernel_done)
                self._driver.event_synchronize(slot.copy_done)
                slot.busy = False

    def close(self) -> None:
        """Wait for the device and free everything. Blocks the host."""
        self.drain()
        for slot in self._slots:
            slot.close()
        self._driver.stream_destroy(self._kernels)
        self._driver.stream_destroy(self._copies)


class EncodePipeline(_Pipeline):
    """The way out. One thread at a time."""

    def sizes(self, blocks: BlockView, bound: PageBounds, coding: int | Sequence[int], after: int) -> Words:
        """Bytes of every block's record; nothing leaves the device. Blocks the host.

        Args:
            blocks: what would be stored.
            bound: error bound, or a tuple of one a page.
            coding: coding wanted, or one a page.
            after: event that the pages are ready at.
        """
        header = header_nbytes(blocks.layout)
        chunks = [np.zeros(0, np.uint64)]
        for slot, fields, first, last in self._encode(blocks, bound, coding, after):
            self._driver.event_synchronize(slot.kernel_done)
            slot.busy = False
            chunks.append(fields.array(slot.host_meta, "payload_bytes")[: last - first] + np.uint64(header))
        return np.concatenate(chunks)

    def run(
        self,
        blocks: BlockView,
        bound: PageBounds,
        coding: int | Sequence[int],
        after: int,
        admit: Callable[[EncodedChunk], Sequence[Runs]],
        landed: Callable[[EncodedChunk], None],
        joins: Joins = lambda address: True,
        queued: Callable[[int], None] = lambda stream: None,
    ) -> None:
        """Encode blocks and copy their records to host memory. Blocks the host.

        Args:
            blocks: what to store.
            bound: error bound, or a tuple of one a page.
            coding: coding wanted, or one a page.
            after: event that the pages are ready at.
            admit: called once a chunk is encoded; says where each record goes (room for header and payload). What is
                copied there has an undefined header.
            landed: called once a chunk's records are in host memory, in the order of the chunks; writes the headers.
            joins: whether one copy may cross this host address (see `kvzip.memory.Region.piece_bytes`).
            queued: called with the stream of the kernels once all of them are queued: what is recorded there now comes
                after the last page was read.

        Raises:
            CudaError: the device failed; chunks that had landed did.
            Exception: what `admit` and `landed` raise; the device is idle then.
        """
        waiting: list[tuple[_Slot, EncodedChunk]] = []
        try:
            for slot, fields, first, last in self._encode(blocks, bound, coding, after, waiting, landed, queued):
                self._driver.event_synchronize(slot.kernel_done)
                chunk = _read_chunk(slot, fields, first, last, len(blocks.layout.segments))
                offsets = fields.array(slot.host_meta, "record_offsets")[: last - first]
                targets = admit(chunk)
                self._copy_out(slot, offsets, targets, joins)
                waiting.append((slot, chunk))
            while waiting:
                self._land(waiting, landed)
        finally:
            self.drain()

    def _land(self, waiting: list[tuple[_Slot, EncodedChunk]], landed: Callable[[EncodedChunk], None]) -> None:
        slot, chunk = waiting.pop(0)
        self._driver.event_synchronize(slot.copy_done)
        slot.busy = False
        landed(chunk)

    def _encode(
        self,
        blocks: BlockView,
        bound: PageBounds,
        coding: int | Sequence[int],
        after: int,
        waiting: list[tuple[_Slot, EncodedChunk]] | None = None,
        landed: Callable[[EncodedChunk], None] = lambda chunk: None,
        queued: Callable[[int], None] = lambda stream: None,
    ) -> Iterator[tuple[_Slot, _Fields, int, int]]:
        """Launch the chunks, one ahead of the one that is handed out."""
        segments = _native.segments_array(blocks, bound, coding)
        worst = blocks.layout.padded_nbytes
        self._driver.stream_wait_event(self._kernels, after)
        ahead: list[tuple[_Slot, _Fields, int, int]] = []
        for first, last in self._chunks(len(blocks), blocks.layout):
            slot = self._next_slot()
            while slot.busy:
                if waiting:
                    self._land(waiting, landed)
                else:
                    yield ahead.pop(0)
            ahead.append((slot, self._launch(slot, segments, worst, blocks, first, last), first, last))
            if len(ahead) > 1:
                yield ahead.pop(0)
        queued(self._kernels)
        yield from ahead

    def _launch(
        self, slot: _Slot, segments: npt.NDArray[Any], worst: int, blocks: BlockView, first: int, last: int
    ) -> _Fields:
        driver, count, pages = self._driver, last - first, len(segments)
        header = header_nbytes(blocks.layout)
        fields = _encode_fields(pages, count)
        arena = count * (-(-(header + worst) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT)
        slot.fit(arena, fields.nbytes, pages, count)
        host = slot.host_meta
        fields.array(host, "segments")[:] = segments
        fields.array(host, "block_ids")[:] = blocks.block_ids[first:last]
        fields.array(host, "status")[:] = 0
        inputs = fields.address(0, "table")
        driver.copy(slot.device_meta, slot.host_meta_address, inputs, self._kernels)
        driver.encode(
            EncodeArgs(
                segments=segments,
                device_segments=fields.address(slot.device_meta, "segments"),
                block_ids=fields.address(slot.device_meta, "block_ids"),
                num_blocks=count,
                arena=slot.arena,
                arena_bytes=slot.arena_bytes,
                header_bytes=header,
                table=fields.address(slot.host_meta_address, "table"),
                payload_bytes=fields.address(slot.host_meta_address, "payload_bytes"),
                record_offsets=fields.address(slot.host_meta_address, "record_offsets"),
                status=fields.address(slot.host_meta_address, "status"),
                workspace=slot.workspace,
                workspace_bytes=slot.workspace_bytes,
                max_ctas=self._staging.max_ctas,
            ),
            self._kernels,
        )
        driver.crc32c(
            CrcArgs(
                base=slot.arena,
                offsets=fields.address(slot.host_meta_address, "record_offsets"),
                skip=header,
                payload_bytes=fields.address(slot.host_meta_address, "payload_bytes"),
                crc32c=fields.address(slot.host_meta_address, "payload_crc32c"),
                scratch=slot.crc_scratch,
                max_payload_bytes=worst,
                count=count,
                check=False,
                max_ctas=self._staging.max_ctas,
            ),
            self._kernels,
        )
        driver.event_record(slot.kernel_done, self._kernels)
        driver.event_record(slot.copy_done, self._kernels)
        slot.busy = True
        return fields

    def _copy_out(self, slot: _Slot, offsets: Words, targets: Sequence[Runs], joins: Joins) -> None:
        to: list[int] = []
        source: list[int] = []
        nbytes: list[int] = []
        for offset, runs in zip(offsets.tolist(), targets, strict=True):
            at = slot.arena + offset
            for address, length in runs:
                if nbytes and to[-1] + nbytes[-1] == address and source[-1] + nbytes[-1] == at and joins(address):
                    nbytes[-1] += length
                else:
                    to.append(address)
                    source.append(at)
                    nbytes.append(length)
                at += length
        self._driver.stream_wait_event(self._copies, slot.kernel_done)
        _copy(self._driver, to, source, nbytes, self._copies)
        self._driver.event_record(slot.copy_done, self._copies)


def _copy(driver: Driver, to: list[int], source: list[int], nbytes: list[int], stream: int) -> None:
    if len(to) == 1:
        driver.copy(to[0], source[0], nbytes[0], stream)
    elif to:
        driver.copy_batch(np.array(to, np.uint64), np.array(source, np.uint64), np.array(nbytes, np.uint64), stream)


def _read_chunk(slot: _Slot, fields: _Fields, first: int, last: int, pages: int) -> EncodedChunk:
    host = slot.host_meta
    _native.check(int(fields.array(host, "status")[0]), "encoding on the GPU")
    return EncodedChunk(
        first=first,
        tables=fields.array(host, "table").reshape(last - first, pages).copy(),
        payload_bytes=fields.array(host, "payload_bytes").copy(),
        payload_crc32c=fields.array(host, "payload_crc32c").copy(),
    )


class DecodePipeline(_Pipeline):
    """The way in. One thread at a time."""

    def run(
        self,
        blocks: BlockView,
        sources: Callable[[int, int], Sources],
        after: int,
        queued: Callable[[int], None],
        joins: Joins = lambda address: True,
    ) -> npt.NDArray[np.uint32]:
        """Copy records to the device and decode them into blocks. Blocks the host until the device has finished.

        Args:
            blocks: where the values go.
            sources: the records of blocks first to last - 1; called chunk by chunk, while the chunk before is moving.
            after: event after which the pages may be written.
            queued: called with the stream of the kernels once all of them are queued: what is recorded there now comes
                after the last value was written.
            joins: whether one copy may cross this host address.

        Returns:
            A native status a block, shape ``[blocks]``: 0, or that a record is damaged (its pages were not written).

        Raises:
            CudaError: the device failed.
        """
        driver = self._driver
        statuses = np.zeros(len(blocks), np.uint32)
        pending: list[tuple[_Slot, _Fields, int, int]] = []

        def collect() -> None:
            slot, fields, first, last = pending.pop(0)
            driver.event_synchronize(slot.kernel_done)
            slot.busy = False
            statuses[first:last] = fields.array(slot.host_meta, "block_status")

        try:
            segments = _native.segments_array(blocks)
            driver.stream_wait_event(self._kernels, after)
            for first, last in self._chunks(len(blocks), blocks.layout):
                slot = self._next_slot()
                while slot.busy and pending:
                    collect()
                chunk = sources(first, last)
                pending.append((slot, self._launch(slot, segments, blocks, chunk, first, last, joins), first, last))
            queued(self._kernels)
            while pending:
                collect()
        finally:
            self.drain()
        return statuses

    def _launch(
        self,
        slot: _Slot,
        segments: npt.NDArray[Any],
        blocks: BlockView,
        chunk: Sources,
        first: int,
        last: int,
        joins: Joins,
    ) -> _Fields:
        driver, count, pages = self._driver, last - first, len(segments)
        fields = _decode_fields(pages, count)
        spans = -(-chunk.record_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        starts = (np.cumsum(spans) - spans).astype(np.uint64)
        slot.fit(int(spans.sum()), fields.nbytes, pages, count)
        host = slot.host_meta
        fields.array(host, "segments")[:] = segments
        fields.array(host, "block_ids")[:] = blocks.block_ids[first:last]
        fields.array(host, "payloads")[:] = starts + np.uint64(slot.arena + chunk.header_bytes)
        fields.array(host, "payload_bytes")[:] = chunk.payload_bytes
        fields.array(host, "payload_crc32c")[:] = chunk.payload_crc32c
        fields.array(host, "table")[:] = chunk.tables.ravel()
        inputs = fields.address(0, "block_status")
        driver.copy(slot.device_meta, slot.host_meta_address, inputs, self._copies)
        self._copy_in(slot, starts, chunk, joins)
        driver.event_record(slot.copy_done, self._copies)
        driver.stream_wait_event(self._kernels, slot.copy_done)
        driver.crc32c(  # a payload that is damaged gets the size 0, which the decoder refuses
            CrcArgs(
                base=0,
                offsets=fields.address(slot.device_meta, "payloads"),
                skip=0,
                payload_bytes=fields.address(slot.device_meta, "payload_bytes"),
                crc32c=fields.address(slot.device_meta, "payload_crc32c"),
                scratch=slot.crc_scratch,
                max_payload_bytes=int(chunk.payload_bytes.max()),
                count=count,
                check=True,
                max_ctas=self._staging.max_ctas,
            ),
            self._kernels,
        )
        driver.decode(
            DecodeArgs(
                segments=segments,
                device_segments=fields.address(slot.device_meta, "segments"),
                block_ids=fields.address(slot.device_meta, "block_ids"),
                num_blocks=count,
                payloads=fields.address(slot.device_meta, "payloads"),
                payload_bytes=fields.address(slot.device_meta, "payload_bytes"),
                table=fields.address(slot.device_meta, "table"),
                block_status=fields.address(slot.host_meta_address, "block_status"),
                workspace=slot.workspace,
                workspace_bytes=slot.workspace_bytes,
                max_ctas=self._staging.max_ctas,
            ),
            self._kernels,
        )
        driver.event_record(slot.kernel_done, self._kernels)
        slot.busy = True
        return fields

    def _copy_in(self, slot: _Slot, starts: Words, chunk: Sources, joins: Joins) -> None:
        to: list[int] = []
        origin: list[int] = []
        nbytes: list[int] = []
        for start, runs in zip(starts.tolist(), chunk.runs, strict=True):
            at = slot.arena + start
            for address, length in runs:
                if nbytes and origin[-1] + nbytes[-1] == address and to[-1] + nbytes[-1] == at and joins(address):
                    nbytes[-1] += length
                else:
                    to.append(at)
                    origin.append(address)
                    nbytes.append(length)
                at += length
        _copy(self._driver, to, origin, nbytes, self._copies)


class CudaTransport:
    """Both pipelines of one GPU.

    Args:
        device: index of the GPU.
        driver: device functions; `kvzip._cuda` when None.
        staging: bounds of memory and of GPU use.
        resource: where the tables' host memory comes from; pinned when None.

    Raises:
        BackendUnavailableError: there is no usable GPU, or the native library was built without CUDA.
    """

    def __init__(
        self,
        device: int,
        *,
        staging: Staging | None = None,
        driver: Driver | None = None,
        resource: MemoryResource | None = None,
    ) -> None:
        if driver is None:
            from kvzip import _cuda

            driver = _cuda.driver()
        self.device = device
        self.driver: Driver = driver
        driver.set_device(device)
        memory: MemoryResource = PinnedMemory() if resource is None else resource
        self.out = EncodePipeline(driver, staging or Staging(), memory)
        self.into = DecodePipeline(driver, staging or Staging(), memory)

    def close(self) -> None:
        """Wait for the device and free everything. Blocks the host."""
        self.driver.set_device(self.device)
        self.out.close()
        self.into.close()
