# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Stores and loads of blocks that lie on a GPU: one worker thread for each direction drives the staged pipelines.

The caller's thread records an event on its stream and goes on. Codecs that the pipelines do not know (a third party's)
work too, by way of host memory: slower, and counted as what they are.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip._log import log_once
from kvzip.backends.base import Codec, EncodeRequest
from kvzip.backends.cuszp import coding_of
from kvzip.bounds import PageBounds, summary, table_id
from kvzip.coding import Part, check_geometry, max_record_bytes, measure_errors
from kvzip.errors import CorruptRecordError, CudaError, KvzipError, NativeError, TransferError
from kvzip.index import Contents, Entry, RecordIndex, contents_of
from kvzip.interop.torch import stream_handle
from kvzip.pool import HostPool
from kvzip.record import (
    ENTRY_DTYPE,
    Coding,
    Reason,
    crc32c,
    fallback_reasons,
    header_nbytes,
    pack_headers,
)
from kvzip.transfer import Transfer, TransferResult
from kvzip.transport import RECORD_ALIGNMENT, CudaTransport, EncodedChunk, Runs, Sources, Staging
from kvzip.types import BlockLayout, BlockView, BoundKind, ErrorBound, empty_view

_log = logging.getLogger("kvzip")

_LOSSLESS = ErrorBound.lossless()
# What the CUDA codec has.
_GPU_MODES = ("fixed", "plain", "outlier")
_GPU_BOUND_KINDS = (BoundKind.LOSSLESS, BoundKind.ABSOLUTE, BoundKind.RELATIVE)
_GPU_LAST_CODING = Coding.LOSSLESS


class HostPaths(Protocol):
    """What the engine does with blocks in host memory; a device falls back on it, and reports to it."""

    def store_blocks(self, parts: Sequence[Part], codec: Codec, measure_error: bool) -> TransferResult:
        """Encode with the codec's own functions, keep the records, count them."""
        ...

    def load_blocks(self, entries: Sequence[Entry], out: BlockView) -> None:
        """Decode with the codecs' own functions; the payloads' checksums are verified here."""
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
class _Job:
    run: Callable[[], TransferResult]
    transfer: Transfer
    what: str


class _Worker:
    """A thread that runs jobs in order; started with the first one."""

    def __init__(self, name: str, start: Callable[[], None]) -> None:
        self._name = name
        self._start = start
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: _Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _loop(self) -> None:
        self._start()
        while (job := self._jobs.get()) is not None:
            try:
                job.transfer._finish(job.run())
            except BaseException as error:
                _log.warning("a %s failed: %s", job.what, str(error))
                if not isinstance(error, KvzipError):
                    wrapped = TransferError(f"a {job.what} failed: {type(error).__name__}: {error}")
                    wrapped.__cause__ = error
                    error = wrapped
                job.transfer._fail(error)
                del error
            del job  # a transfer must not live on until the next one comes

    def close(self) -> None:
        """Let the jobs that were submitted end, then the thread. Blocks the host."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


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

        def start() -> None:
            self._driver.set_device(device)

        self._out = _Worker(f"kvzip-out-{device}", start)
        self._into = _Worker(f"kvzip-in-{device}", start)

    # ---- what the engine calls, in the caller's thread

    coded_blocks: ClassVar[Mapping[str, int]] = {}  # of a codec that stands in for the kernels; see `TorchSwap`

    def codec_for(self, codec: Codec) -> Codec:
        """The codec for blocks on this GPU: itself, the pipelines bring the pages to it."""
        return codec

    def store(self, parts: Sequence[Part], codec: Codec, measure_error: bool, stream: object) -> Transfer:
        """Queue a store. The pages must stay as they are until the transfer is done."""
        started = time.perf_counter()
        after = self._mark(stream)
        transfer = Transfer(self._driver, self._device)

        def run() -> TransferResult:
            try:
                with self._store_lock:
                    self._index.check_open()
                    native = codec.name in ("cuszp", "raw")
                    if not native or not all(encodes_on_gpu(codec, part.request) for part in parts):
                        self._driver.event_synchronize(after)
                        if native:
                            self._count_host_coding(parts)
                        if "cuda" not in codec.devices:
                            here = [replace(part, blocks=self._to_host(part.blocks, after)) for part in parts]
                            return self._host.store_blocks(here, codec, measure_error)
                        return self._host.store_blocks(parts, codec, measure_error)
                    result = self._store(parts, codec, measure_error, after, transfer)
            finally:
                self._driver.event_destroy(after)
            result = replace(result, seconds=time.perf_counter() - started)
            self._host.count_store(result)
            return result

        self._out.submit(_Job(run, transfer, "store"))
        return transfer

    def load(self, keys: Sequence[bytes], entries: Sequence[Entry], out: BlockView, stream: object) -> Transfer:
        """Queue a load of records that `RecordIndex.begin_load` protects; they are released when it has ended."""
        started = time.perf_counter()
        transfer = Transfer(self._driver, self._device)
        try:
            after = self._mark(stream)
        except BaseException:
            self._index.end_load(entries)
            raise

        def run() -> TransferResult:
            try:
                self._load(keys, entries, out, after, transfer)
            finally:
                self._index.end_load(entries)
                self._driver.event_destroy(after)
            result = TransferResult(
                len(keys), out.nbytes, sum(e.allocation.nbytes for e in entries), time.perf_counter() - started
            )
            self._host.count_load(result)
            return result

        self._into.submit(_Job(run, transfer, "load"))
        return transfer

    def close(self) -> None:
        """Let everything that was queued end, and free the device's memory. Blocks the host."""
        self._out.close()
        self._into.close()
        self._transport.close()

    def _mark(self, stream: object) -> int:
        """An event at the end of the caller's stream."""
        self._driver.set_device(self._device)
        handle = stream_handle(stream, self._device)
        event = self._driver.event_create()
        self._driver.event_record(event, handle)
        return event

    # ---- stores, in the worker

    def _count_host_coding(self, parts: Sequence[Part]) -> None:
        bound = parts[0].request.bound
        log_once(
            "the GPU codec lacks a mode or a kind of bound, blocks are coded on the host, which is slower",
            f"mode {parts[0].request.mode}, bound {summary(bound)}",
        )
        pages = sum(len(part.keys) * len(part.blocks.layout.segments) for part in parts)
        self._host.count_fallback("coded_on_host", pages)

    def _store(
        self, parts: Sequence[Part], codec: Codec, measure_error: bool, after: int, transfer: Transfer
    ) -> TransferResult:
        codings = [coding_of(part.request) if codec.name == "cuszp" else Coding.RAW for part in parts]
        reason = parts[0].request.reason
        try:
            return self._encode(parts, codings, codec, reason, measure_error, after, transfer)
        except CudaError:
            raise  # the device is at fault: another encoder would fail as well
        except NativeError as error:
            _log.warning("encoding on the GPU failed, blocks are stored raw: %s", str(error))
            raw = [Coding.RAW] * len(parts)
            return self._encode(parts, raw, codec, Reason.ENCODER_FAILED, measure_error, after, transfer)

    def _encode(
        self,
        parts: Sequence[Part],
        codings: Sequence[Coding | list[Coding]],
        codec: Codec,
        reason: Reason,
        measure_error: bool,
        after: int,
        transfer: Transfer,
    ) -> TransferResult:
        layout, index, pool = parts[0].blocks.layout, self._index, self._pool
        keys = [key for part in parts for key in part.keys]
        header = header_nbytes(layout)
        worst = len(keys) * pool.round_up(max_record_bytes(codec, layout))
        if not index.can_hold(worst, keys):
            # The real sizes decide, before anything leaves the pool: encoding is much faster than the link.
            needed = 0
            for part, coding in zip(parts, codings, strict=True):
                sizes = self._transport.out.sizes(part.blocks, part.request.bound, coding, after)
                needed += sum(pool.round_up(int(n)) for n in sizes)
            if needed > index.room(keys):
                raise index.refuse(needed, len(keys), keys)
        fresh: list[Entry] = []
        tables = []
        record_bytes = violations = 0
        max_error = 0.0
        evicted_before = index.evicted

        def admit(contents: Contents, chunk: EncodedChunk) -> list[Runs]:
            entries = index.admit(
                chunk.payload_bytes.tolist(),
                chunk.payload_crc32c.tolist(),
                [table.tobytes() for table in chunk.tables],
                [contents] * len(chunk.tables),
                keys,
            )
            fresh.extend(entries)
            return self._runs(entries)

        def landed(part: Part, original: BlockView | None, before: int, chunk: EncodedChunk) -> None:
            nonlocal record_bytes, violations, max_error
            first = before + chunk.first
            entries = fresh[first : first + len(chunk.tables)]
            request = part.request
            mode = request.mode if request.mode in codec.modes else "none"
            header_of = partial(_header_of, layout, mode=mode, bound=request.bound, reason=reason)
            if original is None:
                for entry in entries:
                    entry.header = header_of
            else:
                measured = measure_errors(
                    original[original.block_ids[chunk.first : chunk.first + len(entries)]],
                    codec,
                    request.bound,
                    [pool.read(e.allocation)[header:] for e in entries],
                    list(chunk.tables),
                )
                max_error = max(max_error, *(error for error, _ in measured))
                violations += sum(bad for _, bad in measured)
                for entry, (error, _) in zip(entries, measured, strict=True):
                    entry.header = partial(header_of, max_errors=np.array([error]))
            record_bytes += sum(entry.allocation.nbytes for entry in entries)
            tables.append(chunk.tables)

        try:
            for number, (part, coding) in enumerate(zip(parts, codings, strict=True)):
                original = self._to_host(part.blocks, after) if measure_error else None
                bound = part.request.bound
                contents = contents_of(layout, codec.name, table_id(bound, len(layout.segments)))
                self._transport.out.run(
                    part.blocks,
                    bound,
                    coding,
                    after,
                    partial(admit, contents),
                    partial(landed, part, original, len(fresh)),
                    self._joins,
                    transfer._mark_queued if number == len(parts) - 1 else (lambda stream: None),
                )
            index.publish(dict(zip(keys, fresh, strict=True)))
        except BaseException:
            index.cancel(fresh, keys)
            raise
        fallbacks = fallback_reasons(tables)
        if reason is not Reason.AS_ASKED:
            fallbacks = {reason.name.lower(): sum(t.size for t in tables)}
        return TransferResult(
            blocks=len(keys),
            raw_bytes=sum(part.blocks.nbytes for part in parts),
            record_bytes=record_bytes,
            seconds=0.0,
            evicted=index.evicted - evicted_before,
            fallbacks=fallbacks,
            max_error=max_error if measure_error else None,
            violations=violations if measure_error else None,
        )

    def _runs(self, entries: Sequence[Entry]) -> list[Runs]:
        """Host addresses of records. Whole extents where they match the arena's: then neighbours are one copy."""
        base, extent = self._pool.address, self._pool.extent_bytes
        if extent != RECORD_ALIGNMENT:
            return [[(base + offset, nbytes) for offset, nbytes in e.allocation.runs] for e in entries]
        return [
            [(base + offset, -(-nbytes // extent) * extent) for offset, nbytes in e.allocation.runs] for e in entries
        ]

    def _joins(self, address: int) -> bool:
        piece = self._pool.piece_bytes
        return piece == 0 or (address - self._pool.address) % piece != 0

    def _to_host(self, blocks: BlockView, after: int) -> BlockView:
        """A copy of blocks in host memory, through the same pipeline."""
        copy = empty_view(blocks.layout, len(blocks))
        header = header_nbytes(blocks.layout)
        buffers: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

        def admit(chunk: EncodedChunk) -> list[Runs]:
            fresh = [np.empty(header + int(n), np.uint8) for n in chunk.payload_bytes]
            buffers.extend(fresh)
            return [[(_address(b), b.size)] for b in fresh]

        def landed(chunk: EncodedChunk) -> None:
            last = chunk.first + len(chunk.tables)
            _native.cpu_decode(
                _native.segments_array(copy),
                copy.block_ids[chunk.first : last],
                [b[header:] for b in buffers[chunk.first : last]],
                chunk.tables,
            )

        self._transport.out.run(blocks, _LOSSLESS, Coding.RAW, after, admit, landed)
        return copy

    # ---- loads, in the worker

    def _load(
        self, keys: Sequence[bytes], entries: Sequence[Entry], out: BlockView, after: int, transfer: Transfer
    ) -> None:
        groups: dict[tuple[str, BlockLayout], list[int]] = {}
        alike: dict[tuple[int, bool], list[int]] = {}
        for i, (entry, gpu) in enumerate(zip(entries, decodes_on_gpu(entries), strict=True)):
            alike.setdefault((id(entry.contents), gpu), []).append(i)
        for (_, gpu), members in alike.items():
            known = entries[members[0]].contents
            codec = "" if known.codec in ("cuszp", "raw") and gpu else known.codec
            groups.setdefault((codec, check_geometry(known.geometry, out.layout)), []).extend(members)
        others = [(name, layout, members) for (name, layout), members in groups.items() if name]
        native = [(layout, members) for (name, layout), members in groups.items() if not name]
        for name, layout, members in others:
            self._driver.event_synchronize(after)
            view = out[out.block_ids[members]].with_groups(layout)
            records = [entries[i] for i in members]
            if "cuda" in self._host.codec_of(name).devices:
                self._host.load_blocks(records, view)
            else:
                pages = empty_view(layout, len(members))
                self._host.load_blocks(records, pages)
                self._from_host(pages, view, after)
        bad: list[int] = []
        for number, (layout, members) in enumerate(native):
            view = out[out.block_ids[members]].with_groups(layout)
            statuses = self._transport.into.run(
                view,
                partial(self._sources, [entries[i] for i in members]),
                after,
                transfer._mark_queued if number == len(native) - 1 else (lambda stream: None),
                self._joins,
            )
            bad += [members[i] for i in np.flatnonzero(statuses)]
        if bad:
            self._host.count_corrupt(len(bad))
            raise CorruptRecordError(
                f"{len(bad)} of {len(keys)} records are damaged (the first under key {keys[min(bad)]!r}); their pages "
                "are as they were, the other blocks were loaded: discard these records",
                blocks=tuple(sorted(bad)),
            )

    def _sources(self, entries: Sequence[Entry], first: int, last: int) -> Sources:
        """Records of blocks first to last - 1."""
        chunk = entries[first:last]
        record_bytes = np.array([entry.allocation.nbytes for entry in chunk], np.int64)
        header = chunk[0].contents.header_bytes
        return Sources(
            self._runs(chunk),
            record_bytes,
            header,
            (record_bytes - header).astype(np.uint64),
            np.array([entry.payload_crc32c for entry in chunk], np.uint32),
            np.frombuffer(b"".join([entry.table for entry in chunk]), ENTRY_DTYPE).reshape(len(chunk), -1),
        )

    def _from_host(self, pages: BlockView, out: BlockView, after: int) -> None:
        """Copy host blocks into device blocks, through the same pipeline."""
        segments = _native.segments_array(pages, _LOSSLESS, Coding.RAW)
        payloads = np.empty((len(pages), _native.max_payload_bytes(segments)), np.uint8)
        tables, sizes = _native.cpu_encode(segments, pages.block_ids, payloads)
        rows = [payloads[i, : int(n)] for i, n in enumerate(sizes)]
        crcs = np.array([crc32c(row) for row in rows], np.uint32)

        def sources(first: int, last: int) -> Sources:
            part = slice(first, last)
            runs = [[(_address(row), row.size)] for row in rows[part]]
            return Sources(runs, sizes[part].astype(np.int64), 0, sizes[part], crcs[part], tables[part])

        self._transport.into.run(out, sources, after, lambda stream: None)


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


def encodes_on_gpu(codec: Codec, request: EncodeRequest) -> bool:
    """Whether the CUDA codec has what a request asks for."""
    if codec.name == "raw":
        return True
    bounds = (request.bound,) if isinstance(request.bound, ErrorBound) else request.bound
    return request.mode in _GPU_MODES and all(bound.kind in _GPU_BOUND_KINDS for bound in bounds)


def decodes_on_gpu(entries: Sequence[Entry]) -> list[bool]:
    """For each record whether the CUDA codec has all its codings; of any other codec's records it says nothing."""
    codings = [np.frombuffer(entry.table, ENTRY_DTYPE)["coding"].max() for entry in entries]
    return [bool(coding <= _GPU_LAST_CODING) for coding in codings]


def _address(array: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> int:
    return int(array.__array_interface__["data"][0])
