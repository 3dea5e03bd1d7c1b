# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Moves encoded blocks between one GPU and host memory: a staged pipeline in each direction.

Out: encode kernel -> staging arena in device memory -> exact-size copies by the copy engine. In: copy engine ->
staging arena -> decode kernel. The work is cut into chunks, and each direction has streams of its own for kernels and
for copies, so that the kernel of one chunk runs while the copy engine moves another (`kvzip.staging`).

Tables go to mapped host memory, and block numbers come from there, by small kernels: a copy would queue behind the
chunk before, or behind what the other direction moves.

The pipelines are generators: they yield what must be waited for (`Wait`), and never block between two yields, so that
the thread that took one step need not take the next. They touch no state of the caller's streams: ordering against them
is by events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.bounds import PageBounds
from kvzip.driver import RECORD_ALIGNMENT, DecodeArgs, Driver, EncodeArgs, OutgoingChunks
from kvzip.errors import NativeError
from kvzip.memory import MemoryResource, PinnedMemory
from kvzip.record import ENTRY_DTYPE, Coding, header_nbytes
from kvzip.staging import (
    BLOCKS,
    HAND_OVER,
    MOST_KNOWN,
    SPIN_US,
    Arena,
    Fields,
    Pipeline,
    Slot,
    Staging,
    Steps,
    Wait,
    chunk_bounds,
    tapered_bounds,
)
from kvzip.types import BlockView

_EDGE_SPIN_US = 400  # at a transfer's ends, where the link is idle until the wait is over
_FIRST_US = 40  # that the first step waits for an encoder that has nothing to wait for itself
_NOTE_BYTES = 8 << 20  # queued copies that take the link longer than the host takes to note what it knows of a chunk
_END_SPIN_US = 1500  # for the last chunk's copy, which takes no longer

Words = npt.NDArray[np.uint64]
Run = tuple[int, int, int]  # (place in the arena, host address, bytes)


@dataclass(frozen=True)
class EncodedChunk:
    """What an encoder said about a chunk of blocks, in host memory that is used again when the chunk has landed.

    Attributes:
        first: position of the chunk's first block in the batch.
        offsets: where each record begins in the arena, one behind the other at multiples of `RECORD_ALIGNMENT`.
        tables: segment tables, shape ``[blocks, pages]``.
        payload_bytes: sizes of the payloads, shape ``[blocks]``.
        payload_crc32c: their checksums, shape ``[blocks]``.
        header_bytes: bytes of the arena before each payload.
        most_bytes: that a payload can have.
    """

    first: int
    offsets: Words
    tables: npt.NDArray[Any]
    payload_bytes: Words
    payload_crc32c: npt.NDArray[np.uint32]
    header_bytes: int
    most_bytes: int

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena that the records take.

        Raises:
            NativeError: that cannot be.
        """
        nbytes = _aligned(int(self.offsets[-1]) + self.header_bytes + int(self.payload_bytes[-1]))
        if nbytes > len(self.offsets) * _aligned(self.header_bytes + self.most_bytes):
            raise self._contradicts_itself()
        return nbytes

    def check_copied(self, nbytes: int) -> None:
        """So many bytes of the arena were copied.

        Raises:
            NativeError: the records do not take that many.
        """
        if nbytes != self.arena_bytes:
            raise self._contradicts_itself()

    def kept(self) -> EncodedChunk:
        """A copy in memory of its own."""
        return EncodedChunk(
            self.first,
            self.offsets.copy(),
            self.tables.copy(),
            self.payload_bytes.copy(),
            self.payload_crc32c.copy(),
            self.header_bytes,
            self.most_bytes,
        )

    def verify(self) -> None:
        """Copies are made by these numbers, so they must not lead out of the arena, or records into one another.

        Raises:
            NativeError: they do.
        """
        offsets, sizes = self.offsets, self.payload_bytes
        wrong = bool((sizes > self.most_bytes).any()) or bool(offsets[0])
        if not wrong and len(sizes) > 1:
            rounded = (sizes[:-1] + (self.header_bytes + RECORD_ALIGNMENT - 1)) // RECORD_ALIGNMENT * RECORD_ALIGNMENT
            wrong = bool((offsets[1:] - offsets[:-1] != rounded).any())
        if wrong:
            raise self._contradicts_itself()

    def _contradicts_itself(self) -> NativeError:
        return NativeError(f"the table of sizes of {len(self.offsets)} blocks encoded on the GPU contradicts itself")


class Ahead(Protocol):
    """Host memory for the first chunks of a store, whatever they become.

    Attributes:
        address: where it begins.
        nbytes: its bytes; copies may go to all of them.
    """

    address: int
    nbytes: int

    def keep(self, chunk: EncodedChunk) -> None:
        """The next `EncodedChunk.arena_bytes` of it are a chunk's records. The chunk is not verified yet."""
        ...

    def close(self) -> None:
        """Give back what no chunk has."""
        ...


def _aligned(nbytes: int) -> int:
    return -(-nbytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT


class Records(NamedTuple):
    """Records in host memory, as they come to lie in an arena: one behind the other, aligned.

    Attributes:
        runs: host memory that holds them, by its place in the arena.
        arena_bytes: bytes of the arena that they take.
        header_bytes: bytes before each payload.
        offsets: where each begins in the arena, multiples of `RECORD_ALIGNMENT`.
        payload_bytes: size of each payload.
        payload_crc32c: its checksum.
        tables: all segment tables, joined.
    """

    runs: list[Run]
    arena_bytes: int
    header_bytes: int
    offsets: list[int]
    payload_bytes: list[int]
    payload_crc32c: list[int]
    tables: bytes


_U32, _U64, _I64 = (np.dtype(t) for t in (np.uint32, np.uint64, np.int64))


@lru_cache(maxsize=64)
def _encode_fields(pages: int, blocks: int) -> Fields:
    """What the host gives to an encoder (up to the status), and what comes back (from the status on)."""
    return Fields(
        segments=(_native.SEGMENT_DTYPE, pages),
        block_ids=(_I64, blocks),
        status=(_U32, 4),
        table=(ENTRY_DTYPE, blocks * pages),
        payload_bytes=(_U64, blocks),
        record_offsets=(_U64, blocks),
        payload_crc32c=(_U32, blocks),
    )


@lru_cache(maxsize=64)
def _decode_fields(pages: int, blocks: int) -> Fields:
    """What the host gives to a decoder (up to the tables), and what comes back.

    The words are numbers of the blocks, addresses of the payloads, and their sizes.
    """
    return Fields(
        segments=(_native.SEGMENT_DTYPE, pages),
        words=(_U64, 3 * blocks),
        payload_crc32c=(_U32, blocks),
        table=(ENTRY_DTYPE, blocks * pages),
        block_status=(_U32, blocks),
    )


@dataclass(frozen=True)
class _EncodeCall:
    """A chunk's launch, bound to a slot, and the slot's tables."""

    launch: Callable[[], None]
    segments: npt.NDArray[Any]
    block_ids: npt.NDArray[np.int64]
    status: npt.NDArray[np.uint32]
    table: npt.NDArray[Any]
    payload_bytes: Words
    record_offsets: Words
    payload_crc32c: npt.NDArray[np.uint32]
    header_bytes: int
    most_bytes: int  # of a payload

    def chunk(self, first: int) -> EncodedChunk:
        """What the encoder said.

        Raises:
            NativeError: it failed.
        """
        if self.status[0]:
            _native.check(int(self.status[0]), "encoding on the GPU")
        return EncodedChunk(
            first,
            self.record_offsets,
            self.table,
            self.payload_bytes,
            self.payload_crc32c,
            self.header_bytes,
            self.most_bytes,
        )


@dataclass(frozen=True)
class _DecodeCall:
    """As `_EncodeCall`."""

    launch: Callable[[], None]
    segments: npt.NDArray[Any]
    words: npt.NDArray[np.uint64]
    payload_crc32c: npt.NDArray[np.uint32]
    table: npt.NDArray[np.uint8]
    block_status: npt.NDArray[np.uint32]


class EncodePipeline(Pipeline):
    """The way out. One transfer at a time."""

    COPY_STREAMS = 3  # one a slot, as a rule: the copy engine has the next chunk when one ends

    def __init__(self, driver: Driver, staging: Staging, resource: MemoryResource) -> None:
        super().__init__(driver, staging, resource)
        self._bound: dict[tuple[int, ...], tuple[list[Any], OutgoingChunks]] = {}

    def sizes(self, blocks: BlockView, bound: PageBounds, coding: int | Sequence[int], after: int) -> Steps[Words]:
        """Steps that find the bytes of every block's record; nothing leaves the device.

        Args:
            blocks: what would be stored.
            bound: error bound, or a tuple of one a page.
            coding: coding wanted, or one a page.
            after: event that the pages are ready at.
        """
        header = np.uint64(header_nbytes(blocks.layout))
        ahead: deque[tuple[Slot, _EncodeCall]] = deque()
        found = [np.zeros(0, np.uint64)]

        def collect() -> Steps[None]:
            slot, call = ahead.popleft()
            yield Wait(slot.kernel_done, SPIN_US)
            slot.busy = False
            found.append(call.payload_bytes + header)

        yield BLOCKS
        try:
            prepare = self._preparer(blocks, bound, coding, after)
            for first, last in chunk_bounds(len(blocks), self._most_blocks(blocks.layout)):
                slot = self._next_slot()
                while slot.busy:
                    yield from collect()
                call = prepare(slot, first, last)
                call.launch()
                ahead.append((slot, call))
            while ahead:
                yield from collect()
        finally:
            self.drain()
        return np.concatenate(found)

    def run(
        self,
        blocks: BlockView,
        bound: PageBounds,
        coding: int | Sequence[int],
        after: int,
        place: Callable[[EncodedChunk], Sequence[Run]],
        landed: Callable[[EncodedChunk], None],
        copying: Callable[[EncodedChunk], None] = lambda chunk: None,
        queued: Callable[[int], None] = lambda stream: None,
        ahead_of: Callable[[int], Ahead | None] = lambda blocks: None,
    ) -> Steps[None]:
        """Steps that encode blocks and copy their records to host memory; the first one launches the first encoder.

        Args:
            blocks: what to store.
            bound: error bound, or a tuple of one a page.
            coding: coding wanted, or one a page.
            after: event that the pages are ready at.
            place: called once a chunk is encoded; says which bytes of the arena go where. The link may be idle until it
                returns. The chunk is not verified yet. The header of a record is undefined there.
            landed: called after `copying`, once a chunk's records are in host memory, in the order of the chunks.
            copying: called when a chunk's copy was queued, and the link has enough to do for a while.
            queued: called with the stream of the kernels once all of them are queued: what is recorded there now comes
                after the last page was read.
            ahead_of: called with the number of blocks of the first chunks, whose copies begin soonest where it gives
                host memory for them, in place of `place`.

        Raises:
            NativeError: what the encoder said cannot be.
            CudaError: the device failed; chunks that had landed did.
            Exception: what the callbacks raise; the device is idle then.
        """
        ahead: deque[tuple[Slot, _EncodeCall, int]] = deque()  # launched
        moving: deque[tuple[Slot, EncodedChunk]] = deque()  # their copies are queued
        noted: deque[EncodedChunk] = deque()  # of these, what `copying` was not called with yet

        def first_chunks() -> Steps[None]:
            """The first chunks, whose slots are all free: copied by one call where there is room."""
            least = [(self._next_slot(), *chunk) for chunk in chunks[: len(self._slots)]]
            fit = (self._fits(slot, pages, last - first, header, worst) for slot, first, last in least)
            if not next(fit):
                yield BLOCKS
            call = prepare(*least[0])
            call.launch()
            ahead.append((least[0][0], call, 0))
            if len(chunks) == 1:
                queued(self._kernels)
            if not all(fit):
                yield BLOCKS
            ahead.extend([(slot, prepare(slot, first, last), first) for slot, first, last in least[1:]])
            launches, end = [call.launch for _, call, _ in ahead], least[-1][2]
            memory = ahead_of(end)
            if memory is None:
                yield HAND_OVER
                for launch in launches[1:]:
                    launch()
            else:
                outgoing = self._outgoing(launches)
                outgoing.begin(memory.address, memory.nbytes)
                done = outgoing.wait(_FIRST_US, _FIRST_US)
                yield HAND_OVER if done else Wait(spin_us=_EDGE_SPIN_US, until=outgoing.wait)
            if end == len(blocks) and len(chunks) > 1:
                queued(self._kernels)
            if memory is None:
                while ahead:
                    yield from copy()
                return
            for nbytes in outgoing.copied:
                slot, call, first = ahead.popleft()
                chunk = call.chunk(first)
                chunk.check_copied(nbytes)
                memory.keep(chunk)
                moving.append((slot, chunk))
                noted.append(chunk)
            memory.close()

        def copy() -> Steps[None]:
            slot, call, first = ahead.popleft()
            yield Wait(slot.kernel_done, SPIN_US if len(moving) > 1 else _EDGE_SPIN_US)
            chunk, arena = call.chunk(first), slot.arena
            pieces = [(address, arena + at, nbytes) for at, address, nbytes in place(chunk)]
            self._driver.copy_between(pieces, slot.kernel_done, slot.copy_done, self._copies_of(slot))
            moving.append((slot, chunk))
            noted.append(chunk)

        def note() -> None:
            has_landed = len(noted) > len(moving)
            chunk = noted.popleft()
            chunk.verify()
            copying(chunk)
            if has_landed:
                landed(chunk)

        def link_has_enough() -> bool:
            """Whether it moves for longer than a note takes, even if the first copy has ended."""
            return sum([chunk.arena_bytes for _, chunk in list(moving)[1:]]) > _NOTE_BYTES

        def land() -> Steps[None]:
            slot, chunk = moving[0]
            if not self._driver.event_wait(slot.copy_done, 0, 0):
                if noted and link_has_enough():
                    note()
                yield Wait(slot.copy_done, SPIN_US if len(moving) > 1 else _END_SPIN_US)
            moving.popleft()
            slot.busy = False
            if len(noted) <= len(moving):
                landed(chunk)
            else:
                noted[len(noted) - len(moving) - 1] = chunk.kept()  # its tables are used again

        def next_is_free() -> bool:
            slot = self._slots[self._turn]
            moved = bool(moving) and moving[0][0] is slot and self._driver.event_wait(slot.copy_done, 0, 0)
            return moved or not slot.busy

        chunks = chunk_bounds(len(blocks), self._most_blocks(blocks.layout))
        pages, header, worst = len(blocks.layout.segments), header_nbytes(blocks.layout), blocks.layout.padded_nbytes
        if self._key(blocks, bound, coding)[1] not in self._known:
            yield BLOCKS
        try:
            prepare = self._preparer(blocks, bound, coding, after)
            if chunks:
                yield from first_chunks()
            for first, last in chunks[len(self._slots) :]:
                slot = self._next_slot()
                while slot.busy:
                    yield from land() if moving and moving[0][0] is slot else copy()
                if not self._fits(slot, pages, last - first, header, worst):
                    yield BLOCKS
                call = prepare(slot, first, last)
                call.launch()
                ahead.append((slot, call, first))
                if last == len(blocks):
                    queued(self._kernels)
                # Where the encoder is slower than the link, beside a busy model, it has the next chunk at once; but the
                # link has two. What the host notes of a chunk has time while later ones move.
                while ahead and (len(moving) < 2 or len(ahead) > next_is_free()):
                    yield from copy()
                if len(noted) > 1 and link_has_enough():
                    note()
            while ahead:
                yield from copy()
            while noted:
                note()
            while moving:
                yield from land()
        finally:
            self.drain()

    def _preparer(
        self, blocks: BlockView, bound: PageBounds, coding: int | Sequence[int], after: int
    ) -> Callable[[Slot, int, int], _EncodeCall]:
        """What prepares the encoder of blocks first to last - 1 in a slot, which is in use from then on."""
        segments = self._segments(blocks, bound, coding)
        pages, worst, header = len(segments), blocks.layout.padded_nbytes, header_nbytes(blocks.layout)
        block_ids = blocks.block_ids
        self._driver.stream_wait_event(self._kernels, after)

        def prepare(slot: Slot, first: int, last: int) -> _EncodeCall:
            call = self._call(slot, pages, last - first, header, worst)
            slot.give_segments(call.segments, segments)
            call.block_ids[:] = block_ids[first:last]
            slot.busy = True
            return call

        return prepare

    def _outgoing(self, launches: list[Any]) -> OutgoingChunks:
        """The same launches as one call; kept, as a swap asks for the same ones again and again."""
        key = tuple(map(id, launches))
        found = self._bound.get(key)
        if found is None:
            if len(self._bound) >= MOST_KNOWN:
                self._bound.clear()
            found = self._bound[key] = launches, self._driver.outgoing(launches, self._kernels)
        return found[1]

    def _copies_of(self, slot: Slot) -> int:
        """The stream of a slot's copies."""
        return self._copies[self._slots.index(slot) % len(self._copies)]

    @staticmethod
    def _fits(slot: Slot, pages: int, count: int, header: int, worst: int) -> bool:
        """Whether a slot needs no memory for a chunk."""
        if (pages, count, header, worst) in slot.bound:
            return True
        return slot.fits(count * _aligned(header + worst), _encode_fields(pages, count).nbytes, pages, count)

    def _call(self, slot: Slot, pages: int, count: int, header: int, worst: int) -> _EncodeCall:
        key = (pages, count, header, worst)
        found: _EncodeCall | None = slot.bound.get(key)
        if found is not None:
            return found
        fields = _encode_fields(pages, count)
        slot.fit(count * _aligned(header + worst), fields.nbytes, pages, count)
        host, host_at, device_at, memory = slot.host_meta, slot.host_meta_address, slot.device_meta, slot.memory
        arrays = {name: fields.array(host, name) for name in fields.names}
        arrays["table"] = arrays["table"].reshape(count, pages)
        arrays["status"][:] = 0
        results = fields.offset("status")
        launch = self._driver.encode_call(
            EncodeArgs(
                segments=arrays["segments"],
                device_segments=fields.address(device_at, "segments"),
                block_ids=fields.address(device_at, "block_ids"),
                num_blocks=count,
                arena=slot.arena,
                arena_bytes=memory.size("arena"),
                header_bytes=header,
                table=fields.address(device_at, "table"),
                payload_bytes=fields.address(device_at, "payload_bytes"),
                record_offsets=fields.address(device_at, "record_offsets"),
                status=fields.address(device_at, "status"),
                workspace=memory.address("workspace"),
                workspace_bytes=memory.size("workspace"),
                max_ctas=self._staging.max_ctas,
                crc32c=fields.address(device_at, "payload_crc32c"),
            ),
            (device_at, host_at, results),
            (host_at + results, device_at + results, fields.nbytes - results),
            slot.kernel_done,
            self._kernels,
            slot.copy_done,
            self._copies_of(slot),
        )
        made = slot.bound[key] = _EncodeCall(launch=launch, header_bytes=header, most_bytes=worst, **arrays)
        return made


class DecodePipeline(Pipeline):
    """The way in. One transfer at a time.

    The host queues copies and kernels well ahead of the link: a chunk's tables have a slot of their own, of which there
    are more than arenas, and a copy into an arena waits on the device for the kernels that read it before.
    """

    KERNEL_STREAMS = 2  # in turn: a decoder of few pages leaves room for the next
    COPY_STREAMS = 2  # in turn: the copy engine has the next chunk when one ends
    AHEAD = 8  # chunks whose tables are under way

    def __init__(self, driver: Driver, staging: Staging, resource: MemoryResource) -> None:
        super().__init__(driver, staging, resource, max(self.AHEAD, staging.slots))
        self._arenas = [Arena(driver, self._kernels) for _ in range(staging.slots)]
        try:
            self._ended = driver.event_create()
        except BaseException:
            super().close()
            raise

    def first_chunk(self, blocks: BlockView) -> int:
        """Blocks of the first chunk of a transfer of some."""
        return tapered_bounds(len(blocks), self._most_blocks(blocks.layout))[0][1]

    def begin(self, records: Records) -> bool:
        """Copy the records of a transfer's first chunk to the device, ahead of the `run` that comes next.

        What the pages hold does not change, and nothing of the transfer need be known yet. `drain` ends it where no
        `run` comes.

        Returns:
            Whether there was room for it.

        Raises:
            CudaError: the device failed.
        """
        if records.arena_bytes > self._arenas[0].nbytes:
            return False
        self._copy(self._slots[0], self._arenas[0], records, self._copies[0])
        return True

    def _copy(self, slot: Slot, arena: Arena, records: Records, stream: int) -> None:
        """Queue the copies of a chunk behind the kernels that read the arena last."""
        after = arena.user.kernel_done if arena.user is not None and arena.user.busy else 0
        slot.busy, arena.user = True, slot
        base = arena.address
        pieces = [(base + at, address, nbytes) for at, address, nbytes in records.runs]
        self._driver.copy_between(pieces, after, slot.copy_done, stream)

    def run(
        self,
        blocks: BlockView,
        records: Callable[[int, int], Records],
        after: int,
        queued: Callable[[int], None],
        *,
        extended: int = 0,
        checked: bool = True,
        begun: Records | None = None,
        moved: Callable[[int, int], None] = lambda first, last: None,
    ) -> Steps[list[int]]:
        """Steps that copy records to the device and decode them into blocks; the first one queues what fits.

        Args:
            blocks: where the values go.
            records: the records of blocks first to last - 1; called chunk by chunk, while the chunk before is moving.
            after: event after which the pages may be written.
            queued: called with the stream of the kernels once all of them are queued: what is recorded there now comes
                after the last value was written.
            extended: what pages may have; see `DecodeArgs`.
            checked: payloads' checksums are verified.
            begun: the records of the first chunk, if `begin` has begun to copy them.
            moved: called for blocks first to last - 1 when their records are no longer needed.

        Returns:
            Positions of the blocks whose records are damaged: their pages were not written.

        Raises:
            CudaError: the device failed.
        """
        damaged: list[int] = []
        copying: deque[tuple[Slot, int, Records, int, int]] = deque()  # their kernels are not queued yet
        pending: deque[tuple[Slot, _DecodeCall, int, int]] = deque()
        started: list[int] = []  # streams of kernels that are behind `after`

        def note() -> None:
            slot, call, first, _ = pending.popleft()
            slot.busy = False
            if call.block_status.tobytes().strip(b"\0"):
                damaged.extend((first + np.flatnonzero(call.block_status)).tolist())

        def collect(spin_us: int = SPIN_US) -> Steps[None]:
            slot, _, first, last = pending[0]
            yield Wait(slot.kernel_done, spin_us)
            note()
            moved(first, last)

        def launch() -> Steps[None]:
            slot, base, chunk, first, last = copying.popleft()
            count = last - first
            call = slot.bound.get((pages, count, extended, checked))
            if call is None:
                if not self._has_room(slot, pages, most):
                    yield BLOCKS
                call = self._bind(slot, pages, count, most, extended, checked)
            if len(started) < len(self._kernel_streams):
                started.append(slot.stream)
                self._driver.stream_wait_event(slot.stream, after)
            slot.give_segments(call.segments, segments)
            words = call.words
            words[:count] = blocks.block_ids[first:last]
            words[count:] = [*[base + offset for offset in chunk.offsets], *chunk.payload_bytes]
            call.payload_crc32c[:] = chunk.payload_crc32c
            call.table.data[:] = chunk.tables
            call.launch()
            pending.append((slot, call, first, last))

        most = self._most_blocks(blocks.layout)
        lead = min(1, len(self._arenas) - 1)  # the link has the next copy before the host sees to the tables of one
        try:
            known = self._key(blocks, None, Coding.RAW)[1] in self._known
            if not known:
                yield BLOCKS
            segments = self._segments(blocks, None, Coding.RAW)
            if not known and len(self._kernel_streams) > 1:  # channel tables are copied in the order of one of them
                self._driver.stream_synchronize(self._kernels)
            pages = len(segments)
            self._turn = 0  # transfers alike find the same calls
            for arena in self._arenas[begun is not None :]:
                arena.user = None  # of the transfer before
            for number, (first, last) in enumerate(tapered_bounds(len(blocks), most)):
                slot, arena = self._next_slot(), self._arenas[number % len(self._arenas)]
                while slot.busy and pending:
                    yield from collect()
                if first == 0 and begun is not None:
                    chunk = begun
                else:
                    chunk = records(first, last)
                    if chunk.arena_bytes > arena.nbytes:
                        while copying:
                            yield from launch()
                        while arena.user is not None and arena.user.busy and pending:
                            yield from collect()
                        yield BLOCKS
                        arena.fit(chunk.arena_bytes)
                    self._copy(slot, arena, chunk, self._copies[number % len(self._copies)])
                copying.append((slot, arena.address + chunk.header_bytes, chunk, first, last))
                while len(copying) > lead:
                    yield from launch()
            while copying:
                yield from launch()
            for stream, slot in {slot.stream: slot for slot, *_ in pending}.items():  # the last ones
                if stream != self._kernels:
                    self._driver.stream_wait_event(self._kernels, slot.kernel_done)
            queued(self._kernels)
            self._driver.event_record(self._ended, self._kernels)
            ended = False
            while not ended and len(pending) > len(self._copies):
                yield from collect(_EDGE_SPIN_US)
                ended = self._driver.event_wait(self._ended, 0, 0)
            if pending and not ended:  # the records are let go while their last decoders are at work
                for slot, *_ in [*pending][-len(self._copies) :]:
                    yield Wait(slot.copy_done, _EDGE_SPIN_US)
                moved(pending[0][2], pending[-1][3])
                yield Wait(self._ended, _EDGE_SPIN_US)
            while pending:
                note()
        except BaseException:
            self.drain()
            raise
        return damaged

    def _has_room(self, slot: Slot, pages: int, most: int) -> bool:
        """Whether a chunk of so many blocks fits into a slot's tables."""
        return slot.fits(0, _decode_fields(pages, most).nbytes, pages, most)

    def _bind(self, slot: Slot, pages: int, count: int, most: int, extended: int, checked: bool) -> _DecodeCall:
        """The launch for a chunk of so many blocks; the slot gets room for the most of a chunk."""
        fields = _decode_fields(pages, count)
        slot.fit(0, _decode_fields(pages, most).nbytes, pages, most)
        host, host_at, device_at = slot.host_meta, slot.host_meta_address, slot.device_meta
        arrays = {name: fields.array(host, name) for name in fields.names}
        arrays["table"] = arrays["table"].view(np.uint8)
        words = fields.address(device_at, "words")
        launch = self._driver.decode_call(
            DecodeArgs(
                segments=arrays["segments"],
                device_segments=fields.address(device_at, "segments"),
                block_ids=words,
                num_blocks=count,
                payloads=words + 8 * count,
                payload_bytes=words + 16 * count,
                table=fields.address(device_at, "table"),
                block_status=fields.address(host_at, "block_status"),
                workspace=slot.memory.address("workspace"),
                workspace_bytes=slot.memory.size("workspace"),
                max_ctas=self._staging.max_ctas,
                crc32c=fields.address(device_at, "payload_crc32c") if checked else 0,
                extended=extended,
            ),
            (device_at, host_at, fields.offset("block_status")),
            slot.copy_done,
            slot.kernel_done,
            slot.stream,
        )
        made = slot.bound[pages, count, extended, checked] = _DecodeCall(launch=launch, **arrays)
        return made

    def close(self) -> None:
        """Wait for the device and free everything, also where the device fails meanwhile. Blocks the host."""
        with ExitStack() as each:
            each.callback(self._driver.event_destroy, self._ended)
            for arena in self._arenas:
                each.callback(arena.close)
            each.callback(super().close)


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
        self.staging = staging or Staging()
        self.resource: MemoryResource = PinnedMemory() if resource is None else resource
        self.out = EncodePipeline(driver, self.staging, self.resource)
        try:
            self.into = DecodePipeline(driver, self.staging, self.resource)
        except BaseException:
            self.out.close()
            raise

    def close(self) -> None:
        """Wait for the device and free everything. Blocks the host."""
        with ExitStack() as both:
            both.callback(self.into.close)
            both.callback(self.out.close)
            self.driver.set_device(self.device)
