# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Stores and loads of blocks that lie on a GPU.

Small ones are queued whole by the caller's thread (`kvzip.small`) and completed by whoever asks for their end, or by a
thread that looks after those that nobody asks for. For the others one worker thread for each direction drives the
staged pipelines (`kvzip.transport`); the caller's thread records an event on its stream and goes on. Codecs that the
pipelines do not know (a third party's) work too, by way of host memory: slower, and counted as what they are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip._log import log_once
from kvzip._process import when_dropped
from kvzip.backends.base import Codec, EncodeRequest
from kvzip.backends.cuszp import Extended, coding_of, encodes_on_gpu, extended_by
from kvzip.bounds import NamedTables, PageBounds, named_tables, summary
from kvzip.coding import Part, check_geometry, max_record_bytes, measure_errors
from kvzip.driver import RECORD_ALIGNMENT, Driver
from kvzip.errors import CorruptRecordError, CudaError, KvzipError, NativeError
from kvzip.index import Contents, Entry, Fresh, RecordIndex, contents_of
from kvzip.interop.torch import stream_handle
from kvzip.pool import HostPool, Room
from kvzip.record import (
    ENTRY_DTYPE,
    Coding,
    Reason,
    crc32c,
    fallback_reasons,
    header_nbytes,
    pack_headers,
)
from kvzip.small import Plan, SmallLoads, SmallStores, Ticket, arena_runs
from kvzip.staging import BLOCKS, MOST_KNOWN, Staging, Steps
from kvzip.transfer import OnDevice, QueuedTransfer, Transfer, TransferQueue, TransferResult
from kvzip.transport import CudaTransport, DecodePipeline, EncodedChunk, Records, Run
from kvzip.types import BlockLayout, BlockView, ErrorBound, empty_view
from kvzip.worker import Job, Reaper, Worker

_log = logging.getLogger("kvzip")

_LOSSLESS = ErrorBound.lossless()
_MOST_PLANS = 64  # of stores, that are kept
_NATIVE = ("cuszp", "raw")  # codecs whose pages the pipelines encode
_REASON_AT = 15  # in an entry of a segment table (docs/reference/format.md)


class HostPaths(Protocol):
    """What the engine does with blocks in host memory; a device falls back on it, and reports to it."""

    def store_blocks(self, parts: Sequence[Part], codec: Codec, measure_error: bool) -> TransferResult:
        """Encode with the codec's own functions, keep the records, count them."""
        ...

    def load_blocks(self, entries: Sequence[Entry], out: BlockView) -> None:
        """Decode with the codecs' own functions; the payloads' checksums are verified here."""
        ...

    def checks_load(self, blocks: int) -> bool:
        """Whether the checksums of these blocks are verified by the load that comes now; counted where they are not."""
        ...

    def codec_of(self, name: str) -> Codec:
        """The codec that records of this name were made with."""
        ...

    def count_store(self, result: TransferResult) -> None:
        """Add a finished store to the counters."""
        ...

    def count_load(self, result: TransferResult) -> None:
        """Add a finished load to the counters."""
        ...

    def count_fallback(self, reason: str, pages: int) -> None:
        """Count pages that were not coded as asked."""
        ...

    def count_corrupt(self, blocks: int) -> None:
        """Count records that were found damaged."""
        ...

    def counting_failures(self, operation: str) -> AbstractContextManager[None]:
        """A context that counts what a ``"store"`` or a ``"load"`` fails with."""
        ...


@dataclass(frozen=True)
class _StorePlan:
    """What stores of one layout under one request share.

    Attributes:
        keep: objects that the plan was made for; their addresses are its key.
        on_gpu: whether the CUDA codec has what is asked for.
        coding: coding wanted, or one a page.
        contents: what is known of the records.
        header_of: makes their headers.
        most_bytes: of a record.
        reason: why the pages are not coded as asked.
    """

    keep: tuple[object, ...]
    on_gpu: bool
    coding: Coding | list[Coding]
    contents: Contents
    header_of: partial[npt.NDArray[np.uint8]]
    most_bytes: int
    reason: Reason


class BegunLoad:
    """The first records of a load that nobody has checked yet, on their way to a GPU; its thread has the turn.

    Args:
        entries: protected by `RecordIndex.begin_first`.
        records: how they lie in the arena.
        index: has them.
        pipeline: moves them.
        turn: a lock that is held.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        records: Records,
        index: RecordIndex,
        pipeline: DecodePipeline,
        turn: threading.Lock,
    ) -> None:
        self.records = records
        self.error: Exception | None = None  # what it failed with
        self._entries, self._index, self._pipeline, self._turn = entries, index, pipeline, turn
        self._taken = self._dropped = False

    def take(self, entries: Sequence[Entry]) -> Records | None:
        """Go on with it: whoever does drains the pipeline where it fails. None: other records are meant by now.

        Raises:
            Exception: what it failed with.
        """
        self._taken = True
        if self.error is not None:
            raise self.error
        return self.records if all(map(is_, self._entries, entries)) else None

    def drop(self) -> None:
        """End its turn, and what nobody has taken. May be called twice."""
        if self._dropped:
            return
        self._dropped = True
        try:
            if not self._taken:
                with suppress(CudaError):  # the next transfer finds out
                    self._pipeline.drain()
        finally:
            self._index.end_load(self._entries)
            self._turn.release()


class _RoomAhead:
    """`kvzip.transport.Ahead` in a pool.

    Args:
        pool: the pool.
        room: from `RecordIndex.take_ahead`.
        rooms: get the rooms of the chunks, to be divided among their records.
    """

    def __init__(self, pool: HostPool, room: Room, rooms: deque[Room]) -> None:
        self.address, self.nbytes = pool.address + room.runs[0][0], room.nbytes
        self._room = room
        self._rooms = rooms

    def keep(self, chunk: EncodedChunk) -> None:
        self._rooms.append(self._room.split(chunk.arena_bytes))

    def close(self) -> None:
        self._room.close()


class DeviceSwap:
    """The GPU side of an engine.

    Args:
        device: index of the GPU.
        index: the engine's records.
        pool: where they lie; pinned memory is what makes it fast.
        store_lock: held by one store at a time.
        host: the engine's own paths.
        staging: bounds of the pipelines.
        transport: pipelines of another make, for tests.

    Raises:
        BackendUnavailableError: there is no usable GPU, or the native library was built without CUDA.
    """

    def __init__(
        self,
        device: int,
        index: RecordIndex,
        pool: HostPool,
        store_lock: threading.Lock,
        host: HostPaths,
        staging: Staging,
        transport: CudaTransport | None = None,
    ) -> None:
        self._transport = CudaTransport(device, staging=staging) if transport is None else transport
        self._driver = self._transport.driver
        self._device = device
        self._index = index
        self._pool = pool
        self._store_lock = store_lock
        self._host = host
        self._closed = False
        self.lost: CudaError | None = None  # the error after which this GPU does nothing any more
        self._out = Worker(f"kvzip-out-{device}", self._driver, device)
        self._into = Worker(f"kvzip-in-{device}", self._driver, device)
        # Small transfers need a pool that kernels can address, in extents that match the arena's.
        #: most raw bytes of a transfer that is queued whole
        self.small_bytes = self._transport.staging.small_bytes if pool.pinned else 0
        self._packed = pool.extent_bytes == RECORD_ALIGNMENT
        self._plans: dict[tuple[object, ...], _StorePlan] = {}
        self._marks: list[int] = []  # events that no transfer uses
        self._turn = threading.Lock()  # held while a load begins
        self._fitted: dict[tuple[int, ...], tuple[object, BlockLayout, tuple[ErrorBound, ...]]] = {}
        self._small_out = TransferQueue(self._driver, "store")
        self._small_into = TransferQueue(self._driver, "load")
        self._stores: SmallStores | None = None  # made at their first use, under the lock of their queue
        self._loads: SmallLoads | None = None
        use = partial(self._driver.set_device, device)
        self._reaper = Reaper(f"kvzip-small-{device}", use, (self._small_out, self._small_into))
        # What a transfer under way needs it holds, and with it all of this: what is left when nobody does is idle.
        self._memory: list[CudaTransport | SmallStores | SmallLoads] = [self._transport]
        threads = self._out, self._into, self._reaper
        self._release = partial(_release, device, self._driver, threads, self._memory, self._marks)
        self._dropped = when_dropped(self, self._release)

    @property
    def driver(self) -> Driver:
        """The device functions that it uses."""
        return self._driver

    # ---- what the engine calls, in the caller's thread

    coded_blocks: ClassVar[Mapping[str, int]] = {}  # of a codec that stands in for the kernels; see `TorchSwap`

    def codec_for(self, codec: Codec) -> Codec:
        """The codec for blocks on this GPU: itself, the pipelines bring the pages to it."""
        return codec

    def store(self, parts: Sequence[Part], codec: Codec, measure_error: bool, stream: object) -> Transfer:
        """Queue a store. The pages must stay as they are until the transfer is done."""
        started = time.perf_counter()
        if self.lost is not None:
            self._check_lost()
        try:
            if len(parts) == 1 and not measure_error:
                small = self._store_small(parts[0], codec, stream, started)
                if small is not None:
                    return small
            return self._queue_store(parts, codec, measure_error, stream, started)
        except CudaError as error:
            self._notice(error)
            raise

    def _queue_store(
        self, parts: Sequence[Part], codec: Codec, measure_error: bool, stream: object, started: float
    ) -> Transfer:
        transfer, after, job = Transfer(self._driver, self._device), 0, None
        try:
            with OnDevice(self._driver, self._device):
                after = self._mark(stream)
                steps = self._store_steps(parts, codec, measure_error, after, transfer, started)
                job = Job(steps, partial(self._give_mark, after), transfer, "store")
                self._out.submit(job)
        except BaseException:
            self._give_up(job, after)
            raise
        return transfer

    def _give_up(self, job: Job | None, after: int) -> None:
        """A transfer could not be queued behind an event: see `Job.give_up`; `job` None if it was not made yet."""
        if job is not None:
            job.give_up()
        elif after:
            self._give_mark(after)

    def _store_steps(
        self,
        parts: Sequence[Part],
        codec: Codec,
        measure_error: bool,
        after: int,
        transfer: Transfer,
        started: float,
    ) -> Steps[TransferResult]:
        lock = self._store_lock
        try:
            self._driver.set_device(self._device)
            if not lock.acquire(blocking=False):
                yield BLOCKS
                lock.acquire()
            try:
                if len(self._small_out):
                    yield BLOCKS
                    self._small_out.drain()
                self._index.check_open()
                native = codec.name in _NATIVE
                plans = [self._plan(part, codec) for part in parts] if native else []
                if not native or not all(plan.on_gpu for plan in plans):
                    return (yield from self._store_by_host(parts, codec, measure_error, after))
                result = yield from self._store(parts, plans, codec, measure_error, after, transfer)
            finally:
                lock.release()
        except BaseException:
            with self._failures("store"):
                raise
        result = result._replace(seconds=time.perf_counter() - started)
        self._host.count_store(result)
        return result

    def _store_by_host(
        self, parts: Sequence[Part], codec: Codec, measure_error: bool, after: int
    ) -> Steps[TransferResult]:
        """Store by the codec's own functions."""
        yield BLOCKS
        self._driver.event_synchronize(after)
        if codec.name in _NATIVE:
            self._count_host_coding(parts)
        if "cuda" not in codec.devices:
            here = []
            for part in parts:
                copy = yield from self._to_host(part.blocks, after)
                here.append(part._replace(blocks=copy))
            parts = here
        return self._host.store_blocks(parts, codec, measure_error)

    def begin_load(self, keys: Sequence[bytes], out: BlockView) -> BegunLoad | None:
        """Begin to move the first records of a large load that is not checked yet: only staging memory changes.

        What comes back goes on to `load`, or is dropped; until then no other load of this GPU begins. None where this
        one cannot begin at once: `load` does without.
        """
        if not keys or not self._turn.acquire(blocking=False):
            return None
        begun: BegunLoad | None = None
        entries: list[Entry] = []
        try:
            if self._closed or self.lost is not None or self._into.busy:
                return None
            found = self._index.begin_first(keys[: self._transport.into.first_chunk(out)])
            if found is None:
                return None
            entries, contents = found, found[0].contents
            if contents.codec in _NATIVE and all(entry.contents is contents for entry in entries):
                pipeline = self._transport.into
                begun = BegunLoad(entries, self._records(entries), self._index, pipeline, self._turn)
                with OnDevice(self._driver, self._device):
                    if not pipeline.begin(begun.records):
                        begun = None
        except Exception as error:  # the load reports it
            if begun is None:
                raise
            begun.error = error
        except BaseException:
            if begun is not None:
                begun.drop()
            raise
        finally:
            if begun is None:
                if entries:
                    self._index.end_load(entries)
                self._turn.release()
        return begun

    def load(
        self,
        keys: Sequence[bytes],
        entries: Sequence[Entry],
        out: BlockView,
        stream: object,
        begun: BegunLoad | None = None,
    ) -> Transfer:
        """Queue a load of records that `RecordIndex.begin_load` protects; they are released when it has ended."""
        job: Job | None = None
        after = 0
        try:
            started = time.perf_counter()
            if self.lost is not None:
                self._check_lost()
            if (
                begun is None
                and out.nbytes <= self.small_bytes
                and (small := self._load_small(keys, entries, out, stream, started))
            ):
                return small
            transfer = Transfer(self._driver, self._device)
            with OnDevice(self._driver, self._device):
                after = self._mark(stream)
                gone = 0  # of the records: no longer needed

                def let_go(first: int, last: int) -> None:
                    nonlocal gone
                    try:
                        self._index.end_load(entries[gone:last], ended=False)
                    finally:
                        gone = last

                def clean_up() -> None:
                    self._index.end_load(entries[gone:])
                    self._give_mark(after)

                steps = self._load_steps(keys, entries, let_go, out, after, transfer, started, begun)
                job = Job(steps, clean_up, transfer, "load")
                if begun is not None:
                    self._into.submit(job)
                else:
                    with self._turn:
                        self._into.submit(job)
        except BaseException as error:
            if job is None:
                self._index.end_load(entries)
            self._give_up(job, after)
            self._notice(error)
            raise
        finally:
            if begun is not None:
                begun.drop()
        return transfer

    def _load_steps(
        self,
        keys: Sequence[bytes],
        entries: Sequence[Entry],
        let_go: Callable[[int, int], None],
        out: BlockView,
        after: int,
        transfer: Transfer,
        started: float,
        begun: BegunLoad | None,
    ) -> Steps[TransferResult]:
        record_bytes = 0

        def queued(stream: int) -> None:
            nonlocal record_bytes
            transfer._mark_queued(stream)
            record_bytes = sum([entry.allocation.nbytes for entry in entries])  # while the last ones move

        try:
            ahead = None if begun is None else begun.take(entries)
            self._driver.set_device(self._device)
            if len(self._small_into):
                yield BLOCKS
                self._small_into.drain()
            yield from self._load(keys, entries, out, after, queued, let_go, ahead)
        except BaseException:
            with self._failures("load"):
                if begun is not None:
                    self._transport.into.drain()
                raise
        record_bytes = record_bytes or sum([entry.allocation.nbytes for entry in entries])
        result = TransferResult(len(keys), out.nbytes, record_bytes, time.perf_counter() - started, 0, {})
        self._host.count_load(result)
        return result

    def close(self) -> None:
        """Let everything that was queued end, and free the device's memory. Blocks the host. May be called twice.

        A GPU that fails now is logged: all that can be released is.
        """
        with self._turn:  # whoever is beginning a load
            if self._closed:
                return
            self._closed = True
        self._out.close()
        self._into.close()
        for pending in (self._small_out, self._small_into):
            with pending.lock:  # whoever is queueing one; later ones find the swap closed
                pass
            pending.drain()
        self._dropped.detach()
        self._release()
        self._stores = self._loads = None

    def settle(self, timeout_seconds: float) -> None:
        """At the end of the process: take nothing more, and let what is under way end, at most for so long."""
        end = time.monotonic() + timeout_seconds
        for ending in (self._out, self._into, self._reaper):
            ending.close(max(0.0, end - time.monotonic()))

    def abandon(self, error: KvzipError) -> None:
        """In a forked child: the GPU, and what goes on there, are the parent's."""
        self._closed = True
        self._turn = threading.Lock()
        self._dropped.detach()
        for part in (self._out, self._into, self._small_out, self._small_into):
            part.abandon(error)
        self._reaper.abandon()

    def _check_lost(self) -> None:
        """Raise what made the GPU unusable, where something did."""
        if self.lost is not None:
            raise CudaError(
                f"GPU {self._device} is lost to this process since an earlier error ({self.lost}): start a new process",
                code=self.lost.code,
                name=self.lost.name,
                status=self.lost.status,
            )

    @contextmanager
    def _failures(self, operation: str) -> Iterator[None]:
        """Count what a ``"store"`` or a ``"load"`` fails with, and notice where it was the end of the GPU."""
        try:
            with self._host.counting_failures(operation):
                yield
        except CudaError as error:
            self._notice(error)
            raise

    def _notice(self, error: BaseException) -> None:
        if isinstance(error, CudaError) and error.fatal and self.lost is None:
            self.lost = CudaError(str(error), code=error.code, name=error.name, status=error.status)
            _log.error("GPU %d is lost to this process: %s", self._device, str(error))

    def _mark(self, stream: object) -> int:
        """An event at the end of the caller's stream; the GPU is the thread's current one."""
        handle = stream_handle(stream, self._device)
        try:
            event = self._marks.pop()
        except IndexError:
            event = self._driver.event_create()
        try:
            self._driver.event_record(event, handle)
        except BaseException:
            self._driver.event_destroy(event)
            raise
        return event

    def _give_mark(self, event: int) -> None:
        """Keep an event of `_mark` for the next transfer."""
        if self._closed:
            self._driver.event_destroy(event)
        else:
            self._marks.append(event)

    # ---- small transfers, in the caller's thread

    def _small_stores(self) -> SmallStores:
        if self._stores is None:
            made = self._transport
            self._stores = SmallStores(self._device, self._driver, made.staging, made.resource)
            self._memory.append(self._stores)
        return self._stores

    def _small_loads(self) -> SmallLoads:
        if self._loads is None:
            made = self._transport
            self._loads = SmallLoads(self._device, self._driver, made.staging, made.resource)
            self._memory.append(self._loads)
        return self._loads

    def _store_small(self, part: Part, codec: Codec, stream: object, started: float) -> Transfer | None:
        """Queue a small store; None where a worker must do it: to wait, to keep the order, or to find out sizes."""
        keys, blocks, request = part
        count, raw_bytes = len(keys), blocks.nbytes
        if not 0 < raw_bytes <= self.small_bytes or not self._packed or self._out.busy or codec.name not in _NATIVE:
            return None
        queue, index = self._small_out, self._index
        after = stream if type(stream) is int else stream_handle(stream, self._device)
        if not self._store_lock.acquire(blocking=False):
            return None
        room: Room | None = None
        try:
            with queue.lock:
                if self._closed:
                    return None
                small = self._stores or self._small_stores()
                plan = small.plan_for(blocks, codec, request)
                if plan is None:
                    plan = self._new_plan(part, codec)
                if plan is None:
                    return None
                room = index.take_ahead(count * plan.record_bytes, keys)
                if room is None:
                    return None
                ticket: Ticket | None = None
                try:
                    ticket = small.store(plan, blocks.block_ids, room.runs, self._pool.address, after)
                    if ticket is None:
                        return None
                    transfer = QueuedTransfer(queue, self._driver, self._device, ticket)
                    evicted = index.report_evicted()
                    land = partial(self._land_store, keys, raw_bytes, plan, room, ticket, evicted, started)
                    queue.add(transfer, land)
                    self._reaper.notice()
                except BaseException:
                    _forget(ticket, queue, small)
                    raise
                room = None
                return transfer
        except NativeError as error:  # the long way stores raw what cannot be encoded, and reports what is broken
            _log.info("a small store goes the long way: %s", str(error))
        finally:
            try:
                if room is not None:
                    room.close()
            finally:
                self._store_lock.release()
        return None

    def _new_plan(self, part: Part, codec: Codec) -> Plan | None:
        common = self._plan(part, codec)
        if not common.on_gpu:
            return None
        plan = self._small_stores().new_plan(part.blocks, codec, part.request, common.coding)
        if plan is not None:
            plan.context = (common.contents, common.header_of, common.reason)
        return plan

    def _land_store(
        self,
        keys: Sequence[bytes],
        raw_bytes: int,
        plan: Plan,
        room: Room,
        ticket: Ticket,
        evicted: int,
        started: float,
        error: Exception | None,
    ) -> TransferResult:
        assert self._stores is not None
        try:
            count = len(keys)
            if error is not None:
                raise error
            status, sizes, crcs, rows = ticket.arrays
            if status[0]:
                _native.check(status[0], "encoding on the GPU")
            contents, header_of, reason = plan.context
            payload_bytes, joined = sizes.tolist(), rows.tobytes()
            if max(payload_bytes) > plan.record_bytes - contents.header_bytes:
                raise NativeError(f"the table of sizes of {count} blocks encoded on the GPU contradicts itself")
            if count == 1:
                tables, record_bytes = [joined], payload_bytes[0] + contents.header_bytes
            else:
                size = len(joined) // count
                tables = [joined[at : at + size] for at in range(0, len(joined), size)]
                record_bytes = sum(payload_bytes) + count * contents.header_bytes
            self._index.land(room, keys, payload_bytes, crcs.tolist(), tables, contents, header_of)
        except BaseException:
            room.close()
            self._index.withdraw_report(evicted)
            with self._failures("store"):
                raise
        finally:
            self._stores.end(ticket)
        fallbacks: Mapping[str, int] = {}
        if reason or joined[_REASON_AT :: ENTRY_DTYPE.itemsize].strip(b"\0"):
            fallbacks = fallback_reasons(joined, reason)
        result = TransferResult(count, raw_bytes, record_bytes, time.perf_counter() - started, evicted, fallbacks)
        self._host.count_store(result)
        return result

    def _load_small(
        self, keys: Sequence[bytes], entries: Sequence[Entry], out: BlockView, stream: object, started: float
    ) -> Transfer | None:
        """Queue a small load; None where a worker must do it."""
        queue, count = self._small_into, len(keys)
        if self._into.busy or not count:
            return None
        contents = entries[0].contents
        if contents.codec not in _NATIVE or (count > 1 and any(entry.contents is not contents for entry in entries)):
            return None
        after = stream if type(stream) is int else stream_handle(stream, self._device)
        alone = entries[0] if count == 1 and self._packed and len(entries[0].allocation.runs) == 1 else None
        records = self._records(entries) if alone is None else None
        try:
            with queue.lock:
                if self._closed:
                    return None
                small = self._loads or self._small_loads()
                plan = small.plan_for(out, contents)
                if plan is None:
                    view = out.with_groups(check_geometry(contents.geometry, out.layout))
                    plan = small.new_plan(out, contents, _with_tables(view, contents.tables), contents.extended)
                if plan is None:
                    return None
                ticket: Ticket | None = None
                try:
                    if alone is not None:
                        place = alone.allocation
                        ticket = small.load_one(
                            plan,
                            out.block_ids,
                            self._pool.address + place.runs[0][0],
                            place.extent_nbytes,
                            place.nbytes - contents.header_bytes,
                            alone.payload_crc32c,
                            alone.table,
                            after,
                        )
                    else:
                        assert records is not None
                        ticket = small.load(plan, out.block_ids, records, after)
                    if ticket is None:
                        return None
                    transfer = QueuedTransfer(queue, self._driver, self._device, ticket)
                    queue.add(transfer, partial(self._land_load, keys, entries, out.nbytes, ticket, started))
                    self._reaper.notice()
                except BaseException:
                    _forget(ticket, queue, small)
                    raise
                return transfer
        except NativeError as error:
            _log.info("a small load goes the long way: %s", str(error))
        return None

    def _records(self, entries: Sequence[Entry], first: int = 0, last: int | None = None) -> Records:
        """Records of blocks first to last - 1: where they lie and where they go in an arena."""
        chunk = entries[first:last]
        base, piece, packed, at = self._pool.address, self._pool.piece_bytes, self._packed, 0
        header = chunk[0].contents.header_bytes
        runs: list[Run] = []
        offsets, payload_bytes = [], []
        start, run_offset, length = 0, 0, 0  # of a run that may still grow
        end, end_offset = 0, -1  # of it
        for entry in chunk:
            allocation = entry.allocation
            record_bytes = allocation.nbytes
            offsets.append(at)
            payload_bytes.append(record_bytes - header)
            place = at
            for offset, nbytes in allocation.runs:
                if packed:  # whole extents, so that neighbours are one run
                    nbytes = -(-nbytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
                if offset == end_offset and place == end and not (piece and offset % piece == 0):
                    length += nbytes  # no copy may cross a registration
                else:
                    if length:
                        runs.append((start, base + run_offset, length))
                    start, run_offset, length = place, offset, nbytes
                place += nbytes
                end, end_offset = place, offset + nbytes
            at += -(-record_bytes // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        runs.append((start, base + run_offset, length))
        crcs = [entry.payload_crc32c for entry in chunk]
        return Records(runs, at, header, offsets, payload_bytes, crcs, b"".join([entry.table for entry in chunk]))

    def _land_load(
        self,
        keys: Sequence[bytes],
        entries: Sequence[Entry],
        raw_bytes: int,
        ticket: Ticket,
        started: float,
        error: Exception | None,
    ) -> TransferResult:
        assert self._loads is not None
        try:
            if error is not None:
                raise error
            statuses = ticket.arrays[0].tobytes()
            if any(statuses):
                raise self._damaged(keys, np.flatnonzero(np.frombuffer(statuses, np.uint32)).tolist())
        except BaseException:
            with self._failures("load"):
                raise
        finally:
            self._index.end_load(entries)
            self._loads.end(ticket)
        record_bytes = sum([entry.allocation.nbytes for entry in entries])
        result = TransferResult(len(keys), raw_bytes, record_bytes, time.perf_counter() - started, 0, {})
        self._host.count_load(result)
        return result

    def _damaged(self, keys: Sequence[bytes], bad: Sequence[int]) -> CorruptRecordError:
        """Count damaged records and make the error that names them."""
        self._host.count_corrupt(len(bad))
        return CorruptRecordError(
            f"{len(bad)} of {len(keys)} records are damaged (the first under key {keys[min(bad)]!r}); their pages "
            "are as they were, the other blocks were loaded: discard these records",
            blocks=tuple(sorted(bad)),
        )

    # ---- stores, in the worker

    def _count_host_coding(self, parts: Sequence[Part]) -> None:
        request = parts[0].request
        log_once(
            "pages have too many tokens x heads for the GPU codec, blocks are coded on the host, which is slower",
            f"mode {request.mode}, bound {summary(request.bound)}",
        )
        pages = sum(len(part.keys) * len(part.blocks.layout.segments) for part in parts)
        self._host.count_fallback("coded_on_host", pages)

    def _plan(self, part: Part, codec: Codec, *, raw: bool = False) -> _StorePlan:
        """The plan of a part of a store; `raw`: of what the encoder could not do."""
        request, layout = part.request, part.blocks.layout
        keep = (layout, codec, request)
        key = (*map(id, keep), raw)
        plan = self._plans.get(key)
        if plan is None:
            reason = Reason.ENCODER_FAILED if raw else request.reason
            extended = extended_by(request) if codec.name == "cuszp" else Extended.NONE
            tables = named_tables(request.bound, len(layout.segments))
            plan = _StorePlan(
                keep=keep,
                on_gpu=codec.name == "raw" or (codec.name == "cuszp" and encodes_on_gpu(request, layout)),
                coding=Coding.RAW if raw or codec.name != "cuszp" else coding_of(request),
                contents=contents_of(layout, codec.name, tables, int(extended)),
                header_of=_header_maker(layout, codec, request, reason),
                most_bytes=max_record_bytes(codec, layout),
                reason=reason,
            )
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _store(
        self,
        parts: Sequence[Part],
        plans: Sequence[_StorePlan],
        codec: Codec,
        measure_error: bool,
        after: int,
        transfer: Transfer,
    ) -> Steps[TransferResult]:
        try:
            return (yield from self._encode(parts, plans, codec, measure_error, after, transfer))
        except CudaError:
            raise  # the device is at fault: another encoder would fail as well
        except NativeError as error:
            if not transfer._recall():
                raise  # the caller's stream was let go: the pages may hold other values by now
            _log.warning("encoding on the GPU failed, blocks are stored raw: %s", str(error))
            raw = [self._plan(part, codec, raw=True) for part in parts]
            return (yield from self._encode(parts, raw, codec, measure_error, after, transfer))

    def _encode(
        self,
        parts: Sequence[Part],
        plans: Sequence[_StorePlan],
        codec: Codec,
        measure_error: bool,
        after: int,
        transfer: Transfer,
    ) -> Steps[TransferResult]:
        index, pool = self._index, self._pool
        keys = parts[0].keys if len(parts) == 1 else [key for part in parts for key in part.keys]
        header = plans[0].contents.header_bytes
        most_bytes = pool.round_up(plans[0].most_bytes)
        if not index.can_hold(len(keys) * most_bytes, keys):
            # The real sizes decide, before anything leaves the pool: encoding is much faster than the link.
            needed = 0
            for part, plan in zip(parts, plans, strict=True):
                sizes = yield from self._transport.out.sizes(part.blocks, part.request.bound, plan.coding, after)
                needed += sum(pool.round_up(int(n)) for n in sizes)
            if needed > index.room(keys):
                raise index.refuse(needed, len(keys), keys, replacing=False)
        fresh: list[Entry] = []
        ready = Fresh.of({})  # all of them, before the last ones have landed
        raw_bytes = sum([part.blocks.nbytes for part in parts])
        fallbacks: Counter[str] = Counter()
        record_bytes = violations = 0
        max_error = 0.0

        rooms: deque[Room] = deque()  # of chunks that were not entered yet
        opened: list[Room | None] = []  # rooms of first chunks, whatever they become

        def ahead_of(blocks: int) -> _RoomAhead | None:
            if not self._packed:
                return None
            opened.append(index.take_ahead(blocks * most_bytes, keys))  # in one step, or Ctrl-C leaves it taken
            room = opened[-1]
            if room is not None and len(room.runs) > 1:
                room.close()
            elif room is not None:
                return _RoomAhead(pool, room, rooms)
            return None

        def enter(plan: _StorePlan, chunk: EncodedChunk) -> list[Entry]:
            count, joined = len(chunk.tables), chunk.tables.tobytes()
            size = len(joined) // count
            entries = index.enter(
                rooms[0],
                chunk.payload_bytes.tolist(),
                chunk.payload_crc32c.tolist(),
                [joined[at : at + size] for at in range(0, len(joined), size)],
                [plan.contents] * count,
                plan.header_of,
            )
            fresh.extend(entries)
            rooms.popleft()  # only now: until it is divided it is what gives its bytes back
            return entries

        def place(plan: _StorePlan, chunk: EncodedChunk) -> list[Run]:
            if self._packed:  # as the arena: the records are copied before anything is known of them
                rooms.append(index.take(chunk.arena_bytes, keys))
                return arena_runs(rooms[-1].runs, pool.address)
            chunk.verify()
            extent = pool.extent_bytes
            extents = (chunk.payload_bytes.astype(np.int64) + (header + extent - 1)) // extent
            rooms.append(index.take(int(extents.sum()) * extent, keys))
            return self._entry_runs(enter(plan, chunk), chunk.offsets.tolist())

        def copying(plan: _StorePlan, chunk: EncodedChunk) -> None:
            nonlocal record_bytes, ready
            if rooms:
                enter(plan, chunk)
            if plan.reason or chunk.tables.tobytes()[_REASON_AT :: ENTRY_DTYPE.itemsize].strip(b"\0"):
                fallbacks.update(fallback_reasons(chunk.tables, plan.reason))
            record_bytes += int(chunk.payload_bytes.sum()) + len(chunk.tables) * header
            if len(fresh) == len(keys):
                ready = Fresh.of(dict(zip(keys, fresh, strict=True)))

        def landed(part: Part, plan: _StorePlan, original: BlockView | None, before: int, chunk: EncodedChunk) -> None:
            nonlocal violations, max_error
            if original is None:
                return
            first = before + chunk.first
            entries = fresh[first : first + len(chunk.tables)]
            measured = measure_errors(
                original[original.block_ids[chunk.first : chunk.first + len(entries)]],
                codec,
                part.request.bound,
                [pool.read(e.allocation)[header:] for e in entries],
                list(chunk.tables),
            )
            max_error = max(max_error, *(error for error, _ in measured))
            violations += sum(bad for _, bad in measured)
            for entry, (error, _) in zip(entries, measured, strict=True):
                entry.header = partial(plan.header_of, max_errors=np.array([error]))

        try:
            for number, (part, plan) in enumerate(zip(parts, plans, strict=True)):
                original = (yield from self._to_host(part.blocks, after)) if measure_error else None
                yield from self._transport.out.run(
                    part.blocks,
                    part.request.bound,
                    plan.coding,
                    after,
                    partial(place, plan),
                    partial(landed, part, plan, original, len(fresh)),
                    partial(copying, plan),
                    transfer._mark_queued if number == len(parts) - 1 else (lambda stream: None),
                    ahead_of,
                )
            index.publish(ready)
        except BaseException:
            for room in (*rooms, *opened):
                if room is not None:
                    room.close()
            index.cancel(fresh, keys)
            raise
        return TransferResult(
            blocks=len(keys),
            raw_bytes=raw_bytes,
            record_bytes=record_bytes,
            seconds=0.0,
            evicted=index.report_evicted(),
            fallbacks=dict(fallbacks),
            max_error=max_error if measure_error else None,
            violations=violations if measure_error else None,
        )

    def _entry_runs(self, entries: Sequence[Entry], offsets: Sequence[int]) -> list[Run]:
        """Host memory of records that begin at these offsets of an arena."""
        runs = []
        for entry, at in zip(entries, offsets, strict=True):
            for offset, nbytes in entry.allocation.runs:
                runs.append((at, self._pool.address + offset, nbytes))
                at += nbytes
        return runs

    def _to_host(self, blocks: BlockView, after: int) -> Steps[BlockView]:
        """A copy of blocks in host memory, through the same pipeline."""
        copy = empty_view(blocks.layout, len(blocks))
        header = header_nbytes(blocks.layout)
        buffers: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

        def place(chunk: EncodedChunk) -> list[Run]:
            fresh = [np.empty(header + int(n), np.uint8) for n in chunk.payload_bytes]
            buffers.extend(fresh)
            return [(at, _address(b), b.size) for b, at in zip(fresh, chunk.offsets.tolist(), strict=True)]

        def landed(chunk: EncodedChunk) -> None:
            last = chunk.first + len(chunk.tables)
            _native.cpu_decode(
                _native.segments_array(copy),
                copy.block_ids[chunk.first : last],
                [b[header:] for b in buffers[chunk.first : last]],
                chunk.tables,
            )

        yield from self._transport.out.run(blocks, _LOSSLESS, Coding.RAW, after, place, landed)
        return copy

    # ---- loads, in the worker

    def _load(
        self,
        keys: Sequence[bytes],
        entries: Sequence[Entry],
        out: BlockView,
        after: int,
        queued: Callable[[int], None],
        let_go: Callable[[int, int], None],
        ahead: Records | None,
    ) -> Steps[None]:
        first = entries[0].contents if entries else None
        if first is not None and first.codec in _NATIVE and all(entry.contents is first for entry in entries):
            bad = yield from self._transport.into.run(
                self._fit(out, first),
                partial(self._records, entries),
                after,
                queued,
                extended=first.extended,
                checked=self._host.checks_load(len(keys)),
                begun=ahead,
                moved=let_go,
            )
            if bad:
                raise self._damaged(keys, bad)
            return
        if ahead is not None:
            yield BLOCKS
            self._transport.into.drain()
        groups: dict[tuple[str, BlockLayout, NamedTables | None, int], list[int]] = {}
        alike: dict[int, list[int]] = {}
        for i, entry in enumerate(entries):
            alike.setdefault(id(entry.contents), []).append(i)
        for members in alike.values():
            known = entries[members[0]].contents
            codec = "" if known.codec in _NATIVE else known.codec
            layout = check_geometry(known.geometry, out.layout)
            groups.setdefault((codec, layout, known.tables, known.extended), []).extend(members)
        others = [(name, layout, members) for (name, layout, _, _), members in groups.items() if name]
        native = [(how, members) for how, members in groups.items() if not how[0]]
        bad = []
        for name, layout, members in others:
            try:
                yield from self._load_by_host(name, layout, entries, members, out, after)
            except CorruptRecordError:  # nothing of them was written: load the good ones
                for i in members:
                    try:
                        yield from self._load_by_host(name, layout, entries, [i], out, after)
                    except CorruptRecordError:
                        bad.append(i)
        for number, ((_, layout, tables, extended), members) in enumerate(native):
            view = _with_tables(out[out.block_ids[members]].with_groups(layout), tables)
            damaged = yield from self._transport.into.run(
                view,
                partial(self._records, [entries[i] for i in members]),
                after,
                queued if number == len(native) - 1 else (lambda stream: None),
                extended=extended,
                checked=self._host.checks_load(len(members)),
            )
            bad += [members[i] for i in damaged]
        if bad:
            raise self._damaged(keys, bad)

    def _fit(self, out: BlockView, contents: Contents) -> BlockView:
        """The blocks, with the groups and the bounds that records of such contents were coded with.

        Raises:
            LayoutError: they do not fit.
        """
        keep = (contents, out.layout, out.bounds)
        key = tuple(map(id, keep))
        known = self._fitted.get(key)
        if known is None:
            view = _with_tables(out.with_groups(check_geometry(contents.geometry, out.layout)), contents.tables)
            if len(self._fitted) >= MOST_KNOWN:
                self._fitted.clear()
            known = self._fitted[key] = (keep, view.layout, view.bounds)
        view = out.with_groups(known[1])
        view.bounds = known[2]
        return view

    def _load_by_host(
        self,
        codec: str,
        layout: BlockLayout,
        entries: Sequence[Entry],
        members: Sequence[int],
        out: BlockView,
        after: int,
    ) -> Steps[None]:
        """Load records that the kernels cannot decode; of several, all or none."""
        yield BLOCKS
        self._driver.event_synchronize(after)
        view = out[out.block_ids[list(members)]].with_groups(layout)
        records = [entries[i] for i in members]
        if "cuda" in self._host.codec_of(codec).devices:
            self._host.load_blocks(records, view)
        else:
            pages = empty_view(layout, len(members))
            self._host.load_blocks(records, pages)
            yield from self._from_host(pages, view, after)

    def _from_host(self, pages: BlockView, out: BlockView, after: int) -> Steps[None]:
        """Copy host blocks into device blocks, through the same pipeline."""
        segments = _native.segments_array(pages, _LOSSLESS, Coding.RAW)
        payloads = np.empty((len(pages), _native.max_payload_bytes(segments)), np.uint8)
        tables, sizes = _native.cpu_encode(segments, pages.block_ids, payloads)
        rows = [payloads[i, : int(n)] for i, n in enumerate(sizes)]
        crcs = [crc32c(row) for row in rows]

        def records(first: int, last: int) -> Records:
            chunk, runs, at = rows[first:last], [], 0
            for row in chunk:
                runs.append((at, _address(row), row.size))
                at += -(-row.size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
            lengths = [row.size for row in chunk]
            return Records(
                runs, at, 0, [run[0] for run in runs], lengths, crcs[first:last], tables[first:last].tobytes()
            )

        yield from self._transport.into.run(out, records, after, lambda stream: None)


def _forget(ticket: Ticket | None, queue: TransferQueue, small: SmallStores | SmallLoads) -> None:
    """Nobody will ask for what the device has begun, as after Ctrl-C: wait for it, before its memory is given away.

    The queue's lock is held. Blocks the host.
    """
    if ticket is not None:
        queue.withdraw(ticket)
        small.give_up(ticket)


def _release(
    device: int,
    driver: Driver,
    threads: Sequence[Worker | Reaper],
    memory: list[CudaTransport | SmallStores | SmallLoads],
    marks: list[int],
) -> None:
    """End the threads of a swap that has nothing under way, and free what it has on its GPU. Blocks the host."""
    for thread in threads:
        thread.close()
    try:
        with ExitStack() as each:
            for owned in memory:
                each.callback(owned.close)
            while marks:
                each.callback(driver.event_destroy, marks.pop())
            driver.set_device(device)
    except KvzipError as error:
        _log.warning("GPU %d failed while its memory was given back: %s", device, str(error))
    memory.clear()


def _with_tables(view: BlockView, tables: NamedTables | None) -> BlockView:
    """The view with the bounds that records of these tables were encoded with."""
    return view if tables is None else view.with_bounds(tables.bounds)


def _header_maker(
    layout: BlockLayout, codec: Codec, request: EncodeRequest, reason: Reason
) -> partial[npt.NDArray[np.uint8]]:
    mode = request.mode if request.mode in codec.modes else "none"
    return partial(_header_of, layout, mode=mode, bound=request.bound, reason=reason)


def _header_of(
    layout: BlockLayout,
    entry: Entry,
    *,
    mode: str,
    bound: PageBounds,
    reason: Reason,
    max_errors: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.uint8]:
    """The header of a record that the GPU wrote the payload of."""
    payload_bytes = entry.allocation.nbytes - entry.contents.header_bytes
    headers = pack_headers(
        layout,
        np.frombuffer(entry.table, ENTRY_DTYPE)[None],
        np.array([payload_bytes], np.uint64),
        np.array([entry.payload_crc32c], np.uint32),
        codec=entry.contents.codec,
        mode=mode,
        bound=bound,
        reason=reason,
        max_errors=max_errors,
    )
    row: npt.NDArray[np.uint8] = headers[0]
    return row


def _address(array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> int:
    return int(array.__array_interface__["data"][0])
