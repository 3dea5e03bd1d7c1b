# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`SwapEngine`: KV blocks stored compressed in a `HostPool`, found by key, evicted by the bytes they really take."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt

from kvzip._log import log_once
from kvzip._process import watch
from kvzip.backends.base import Codec, EncodeRequest
from kvzip.backends.cuszp import extended_by
from kvzip.backends.portable import device_codec
from kvzip.backends.registry import LOSSLESS_STAND_INS, get_codec
from kvzip.bounds import BoundPolicy, NamedTables, named_tables, resolve
from kvzip.coding import EncodedRecord, Part, check_device, check_geometry, encode_records, max_record_bytes
from kvzip.controller import (
    CHOICES,
    RAW,
    SKIP,
    Choice,
    Controller,
    Decision,
    Profile,
    make_controller,
)
from kvzip.errors import (
    BackendUnavailableError,
    BlockNotFoundError,
    ConfigError,
    CorruptRecordError,
    LayoutError,
    TransferError,
)
from kvzip.index import Entry, Fresh, RecordIndex, contents_of
from kvzip.integrity import Integrity, Sampler
from kvzip.metrics import Meter, MetricsSnapshot, snapshot
from kvzip.policy import EvictionPolicy, make_policy
from kvzip.pool import HostPool, PoolStats
from kvzip.pressure import BoundPressure, PressureGauge
from kvzip.record import ENTRY_DTYPE, Reason, crc32c, header_is_intact
from kvzip.staging import Staging
from kvzip.transfer import Transfer, TransferResult
from kvzip.types import BlockLayout, BlockView, DType, ErrorBound

if TYPE_CHECKING:
    from kvzip.device import DeviceSwap
    from kvzip.torch_swap import TorchSwap

_log = logging.getLogger("kvzip")

_MOST_REQUESTS = 64  # that an engine keeps
_MOST_THREADS = 65_536  # as the native library
_EXIT_SECONDS = 5.0  # that the end of the process waits for transfers under way
_MOST_ENDED = 1024  # transfers that it has not counted yet

#: Raw bytes that are encoded or decoded in one step; bounds the scratch memory of a transfer.
CHUNK_BYTES = 32 << 20

_LOSSLESS = ErrorBound.lossless()


@dataclass(frozen=True)
class EngineStats:
    """Counters of an engine; totals since it was made.

    Attributes:
        records: records held now.
        raw_bytes: raw bytes of these.
        record_bytes: bytes of these in the pool, without the rounding to extents.
        ratio: raw_bytes / record_bytes of what is held (1.0 when nothing is).
        pinned: records under a pin now.
        stored_blocks, loaded_blocks, discarded_blocks, evicted_blocks: totals.
        stored_raw_bytes, stored_record_bytes, loaded_raw_bytes: totals.
        store_seconds, load_seconds: host time spent in them.
        verified_blocks: blocks that a store decoded again and compared.
        unchecked_blocks: blocks loaded without a look at their checksums.
        missing_blocks: keys that a load asked for in vain.
        corrupt_blocks: records that failed their checks at a load.
        violations: values found outside the bound by stores that were verified.
        fallbacks: pages not coded as asked, by reason.
        portable_blocks: blocks stored and loaded on GPUs without the CUDA part of the native library, by what coded
            them: ``"triton"`` or ``"host"``.
        pool: the pool's own counters.
    """

    records: int
    raw_bytes: int
    record_bytes: int
    ratio: float
    pinned: int
    stored_blocks: int
    loaded_blocks: int
    discarded_blocks: int
    evicted_blocks: int
    stored_raw_bytes: int
    stored_record_bytes: int
    loaded_raw_bytes: int
    store_seconds: float
    load_seconds: float
    verified_blocks: int
    unchecked_blocks: int
    missing_blocks: int
    corrupt_blocks: int
    violations: int
    fallbacks: Mapping[str, int]
    portable_blocks: Mapping[str, int]
    pool: PoolStats


@dataclass(frozen=True)
class Settings:
    """What new records are coded with; records that are held keep what they were coded with."""

    codec: Codec
    bound: ErrorBound | BoundPolicy
    mode: str
    reason: Reason = Reason.AS_ASKED


class SwapEngine:
    """Moves KV blocks between page memory and a pool of compressed records. All methods are thread-safe.

    A store either keeps all of its blocks or none, and then those that it was to replace stay; a load writes all of its
    pages or none (on a GPU: each block by itself). A block that the codec cannot make smaller is stored lossless or
    raw, with the reason in its record and in the statistics.

    When the pool is full, the records that the policy calls coldest leave it, counted in the bytes that they really
    take; records that are pinned or being loaded stay. That a store fits is certain before the first one leaves; what
    left for a store that the device fails afterwards does not come back.

    Args:
        pool: a `HostPool` (shared with others, if you like), or the bytes of a new one that the engine closes with
            itself.
        codec: name of a codec, or a codec.
        bound: how far a loaded value may be from the stored one: an `ErrorBound` for every page, or a `BoundPolicy`. By
            default `BoundPolicy.uncalibrated`, which keeps pages that are not known to be K or V exact.
        mode: encoding mode; by default ``"rice"`` where bounds differ within pages, as the default bounds and those of
            a calibration table do, else ``"fixed"`` (`Codec.default_mode`).
        policy: name of an eviction policy (``"lru"``, ``"arc"`` or ``"s3fifo"``), or a policy object of its own.
        threads: most host threads for coding; 0 = all cores that the process may use.
        staging: bounds of the memory and of the thread blocks that transfers use on a GPU.
        integrity: how much is checked; by default every checksum, and no bound.
        controller: chooses for each store whether the blocks are encoded or kept raw, by what is faster or smaller: a
            `Controller`, or the name of its objective (``"latency"``, ``"balanced"``, ``"capacity"``). None = all are
            encoded.
        pressure: coarser bounds for new records while the pool is filling.

    Raises:
        ConfigError: a setting is out of range.
        CodecNotFoundError: no such codec.
        BackendUnavailableError: the codec cannot run here.
    """

    def __init__(
        self,
        pool: HostPool | int,
        *,
        codec: str | Codec = "cuszp",
        bound: ErrorBound | BoundPolicy | None = None,
        mode: str | None = None,
        policy: str | EvictionPolicy = "lru",
        threads: int = 0,
        staging: Staging | None = None,
        integrity: Integrity | None = None,
        controller: str | Controller | None = None,
        pressure: BoundPressure | None = None,
    ) -> None:
        if not isinstance(threads, (int, np.integer)) or not 0 <= threads <= _MOST_THREADS:
            raise ConfigError(
                f"threads {threads!r} is negative or no integer: use 0 for all cores, or how many, "
                f"{_MOST_THREADS} at most"
            )
        for name, given, kind in (
            ("staging", staging, Staging),
            ("integrity", integrity, Integrity),
            ("pressure", pressure, BoundPressure),
        ):
            if given is not None and not isinstance(given, kind):
                raise ConfigError(f"{name} {given!r}: give {kind.__name__}(...), or None")
        self._settings = _settings(codec, bound, mode)
        self._bound_given, self._mode_given = bound is not None, mode
        self.controller = make_controller(controller)
        self._pressure = pressure
        for step in pressure.bounds if pressure is not None else ():
            _check_bound(step, self._settings.codec)
        self._gauge = None if pressure is None else PressureGauge(pressure)
        self._raw = get_codec(RAW)
        self._raw_settings = {reason: Settings(self._raw, _LOSSLESS, self._raw.modes[0], reason) for reason in Reason}
        # On a GPU, with a controller: the next one may have to wait for it.
        self._last_store: ReferenceType[Transfer] | None = None
        self._last_load: ReferenceType[Transfer] | None = None
        self._profiles: dict[tuple[str, int, str], Profile] = {}  # by the identity of the bound, which they keep
        self._threads = threads
        self._owns_pool = not isinstance(pool, HostPool)
        self.pool = pool if isinstance(pool, HostPool) else HostPool(pool)
        self._index = RecordIndex(self.pool, make_policy(policy))
        self._lock = self._index.lock
        self._store_lock = threading.Lock()  # one store at a time: what it was promised cannot be taken by another
        self._totals: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._meter = Meter()
        self._ended: deque[tuple[str, TransferResult]] = deque()  # not counted yet
        self._seconds = {"store": 0.0, "load": 0.0}
        self._requests: dict[tuple[Any, ...], tuple[ErrorBound | BoundPolicy, BlockLayout, EncodeRequest]] = {}
        self._last_request: tuple[Settings, BlockLayout, bool, EncodeRequest] | None = None
        self._staging = staging or Staging()
        integrity = integrity or Integrity()
        self._verify_store, self._check_load = Sampler(integrity.bound), Sampler(integrity.checksum)
        self._closing = False
        self._close_lock = threading.Lock()  # who closes second returns when the first has
        self._devices: dict[str, DeviceSwap | TorchSwap] = {}
        self._codecs: dict[str, Codec] = {}  # what records were made with here: a codec object need not be registered
        self._last_pool_stats: PoolStats | None = None  # of a pool that was closed with the engine
        watch(self)

    # ---- settings

    @property
    def settings(self) -> Settings:
        """Codec, bound and mode of the next store."""
        return self._settings

    def configure(
        self,
        *,
        codec: str | Codec | None = None,
        bound: ErrorBound | BoundPolicy | None = None,
        mode: str | None = None,
    ) -> Settings:
        """Change what the next stores are coded with; what is None stays. Records that are held still load.

        A mode that nobody gave is that of the new bound (`Codec.default_mode`).

        Raises:
            ConfigError: the codec does not know the mode or the kind of bound; nothing was changed.
            CodecNotFoundError: no such codec; nothing was changed.
        """
        with self._lock:
            now = self._settings
            if bound is None and (self._bound_given or now.reason is not Reason.AS_ASKED):
                bound = now.bound
            chosen = _settings(now.codec if codec is None else codec, bound, mode)
            kept = self._mode_given if mode is None else mode
            if kept in chosen.codec.modes:
                chosen = replace(chosen, mode=kept)
            for step in self._pressure.bounds if self._pressure is not None else ():
                _check_bound(step, chosen.codec)
            self._settings = chosen
            self._bound_given, self._mode_given = bound is not None, kept
            return chosen

    # ---- store

    def store(
        self,
        keys: Iterable[bytes],
        blocks: BlockView,
        *,
        bound: ErrorBound | BoundPolicy | Sequence[ErrorBound | BoundPolicy] | None = None,
        sink: Sequence[bool] | npt.NDArray[np.bool_] | None = None,
        coding: Choice | None = None,
        measure_error: bool = False,
        stream: object = None,
    ) -> Transfer:
        """Encode blocks and keep their records. A key that is held gets the new record.

        Blocks the host when the blocks lie in host memory. On a GPU it returns at once; the pages must stay as they are
        until the transfer is done (`Transfer.wait_stream` orders a stream behind it), and the keys are held from then
        on.

        Args:
            keys: one opaque name a block.
            blocks: the blocks, in the same order.
            bound: in place of the engine's, for blocks whose layers are not those of the others; `BoundPressure` leaves
                it alone. Or a sequence, in place of the engine's and of those of all steps of its pressure.
            sink: for each block, whether it holds position 0 of a sequence: such blocks get `BoundPolicy.sink`; under a
                bound that is no policy they are stored lossless.
            coding: ``"encoded"`` or ``"raw"``, in place of what the controller chooses.
            measure_error: decode and compare as well; slower. See `TransferResult`.
            stream: CUDA stream that makes the pages: they are read behind the work that is queued on it now. A handle,
                a torch stream, or None for torch's current stream.

        Returns:
            The transfer; done, when the blocks lie in host memory.

        Raises:
            ConfigError: keys are not bytes, repeat, or are more or fewer than the blocks; or the sink marks are; or the
                codec does not know the kind of bound; or `coding` is neither.
            LayoutError: the codec does not work where the blocks lie, or the bounds do not fit them.
            PoolExhaustedError: the pool cannot hold them, even after evicting all it may; nothing was changed. For
                blocks on a GPU it comes from the transfer.
        """
        names = _check_keys(keys, blocks)
        settings = calm = self._settings
        step: int | None = None
        if bound is not None or self._gauge is not None:
            settings, calm, step = self._under_pressure(bound)
        decision = None if self.controller is None and coding is None else self._decide(blocks, settings, coding)
        if coding == RAW or (decision is not None and decision.choice == RAW):
            reason = Reason.BREAK_EVEN if coding is None and settings.codec is not self._raw else settings.reason
            settings = calm = self._raw_settings[reason]
        if sink is None:
            parts = [Part(names, blocks, self._request(settings, blocks.layout, False))]
        else:
            parts = self._parts(names, blocks, sink, settings, calm)
        measure_error = self._verify_store() or measure_error
        self._codecs[settings.codec.name] = settings.codec
        if blocks.device != "cpu":
            self._index.check_open()
            watched = decision is not None and decision.watch != SKIP
            started = time.perf_counter() if watched else 0.0
            swap = self._devices.get(blocks.device) or self._device(blocks.device)
            transfer = swap.store(parts, settings.codec, measure_error, stream)
            if decision is not None:
                self._last_store = ref(transfer)
            if step is not None:
                transfer._observe(partial(self._count_step, step))
            if watched:
                assert decision is not None
                self._watch_store(decision, blocks, transfer, started)
            return transfer
        with self.counting_failures("store"), self._store_lock:
            self._index.check_open()
            result = self.store_blocks(parts, settings.codec, measure_error)
        transfer = Transfer()
        transfer._finish(result)
        if step is not None:
            self._count_step(step, result)
        if decision is not None and decision.watch != SKIP:
            self._watch_store(decision, blocks, transfer, time.perf_counter() - result.seconds)
        return transfer

    def _under_pressure(
        self, bound: ErrorBound | BoundPolicy | Sequence[ErrorBound | BoundPolicy] | None
    ) -> tuple[Settings, Settings, int | None]:
        """What to code with; the same without pressure; and the step of the pressure, if it applies."""
        settings, gauge = self._settings, self._gauge
        steps = self._pressure.bounds if self._pressure else ()
        given: list[ErrorBound | BoundPolicy] = []
        if isinstance(bound, (list, tuple)):
            given = list(bound)
            if len(given) != 1 + len(steps):
                raise ConfigError(
                    f"{len(given)} bounds for an engine with {len(steps)} steps of pressure: give {1 + len(steps)}"
                )
        elif bound is not None:
            given, gauge = [bound], None  # type: ignore[list-item]  # checked below
        for one in given:
            _check_bound(one, settings.codec)
        if settings.reason is not Reason.AS_ASKED:  # a stand-in stays lossless
            return settings, settings, None
        calm = replace(settings, bound=given[0]) if given else settings
        if gauge is None:
            return calm, calm, None
        step = gauge.step(1 - self.pool.free_bytes / self.pool.capacity_bytes)
        chosen = [calm.bound, *(given[1:] or steps)][step]
        return calm if chosen == calm.bound else replace(calm, bound=chosen, reason=Reason.BOUND_PRESSURE), calm, step

    def _decide(self, blocks: BlockView, settings: Settings, coding: str | None) -> Decision | None:
        if coding is not None and coding not in CHOICES:
            raise ConfigError(f"coding {coding!r}: use one of {', '.join(CHOICES)}, or None")
        controller = self.controller
        if controller is None or settings.codec is self._raw:
            return None
        layout, count, device = blocks.layout, blocks.block_ids.size, blocks.device
        last = controller.last_store
        # The price of most stores with a controller: few objects are touched, and no lock.
        if (
            last is not None
            and last[0] is settings
            and last[1] is layout
            and last[2] == count
            and last[3] == device
            and coding is None
        ):
            lane = last[4]
            if lane.left > 0:
                lane.left -= 1
                return lane.passing
        codec, bound, mode = settings.codec.name, settings.bound, settings.mode
        key = (codec, id(bound), mode, id(layout), count, device)
        known = controller.lanes.get(key)
        if known is not None:
            lane = known[0]
            controller.last_store = (settings, layout, count, device, lane)
            if lane.left > 0 and coding is None:
                lane.left -= 1
                return lane.passing
        nbytes = blocks.nbytes
        if not nbytes:
            return None
        profile = self._profiles.get((codec, id(bound), mode))
        if profile is None:
            if len(self._profiles) >= _MOST_REQUESTS:
                self._profiles.clear()
            kinds = bound.kinds if isinstance(bound, BoundPolicy) else {bound.kind}
            family = ",".join(sorted(kind.name for kind in kinds))
            profile = self._profiles[codec, id(bound), mode] = Profile(codec, mode, bound, family)
        waits = _is_under_way(self._last_store)
        decision = controller.decide(device, profile, nbytes, coding, waits=waits)
        if known is None:
            controller.lane(key, device, profile, nbytes, bound, layout)
        return decision

    def _count_step(self, step: int, result: TransferResult) -> None:
        """Count what was stored under a step of pressure."""
        with self._lock:
            self._meter.pressure_blocks[step] += result.blocks

    def _watch_store(self, decision: Decision, blocks: BlockView, transfer: Transfer, started: float) -> None:
        """Let the controller watch a store that was queued, and think while the device is at work."""
        if self.controller is not None:
            self.controller.store_begun(decision, transfer, started)
            self.controller.catch_up(decision, blocks.nbytes)

    def _watch_load(self, out: BlockView, entries: Sequence[Entry]) -> int:
        controller = self.controller
        if controller is None or not entries:
            return SKIP
        layout, count, device, codec = out.layout, out.block_ids.size, out.device, entries[0].contents.codec
        last = controller.last_load
        if last is not None and last[0] is layout and last[1] == count and last[2] == device:
            lane = last[3]
        else:
            key = (id(layout), count, device)
            lane = controller.loads.get(key) or controller.load_lane(key, layout)
            controller.last_load = (layout, count, device, lane)
        if lane.left > 0 and lane.codec == codec:  # as a rule
            lane.left -= 1
            return SKIP
        waits = _is_under_way(self._last_load)
        return lane.watch(codec, out.nbytes, waits=waits)

    def _load_begun(
        self, device: str, entries: Sequence[Entry], watch: int, transfer: Transfer, started: float
    ) -> None:
        """Let the controller watch a load that was queued; one of records of several kinds says nothing."""
        first = entries[0].contents
        if self.controller is not None and all(entry.contents is first for entry in entries):
            profile = None if first.codec == RAW else Profile(first.codec, "rice" if first.extended else "", None)
            self.controller.load_begun(device, profile, transfer, started, watch)

    def _parts(
        self, names: Sequence[bytes], blocks: BlockView, sink: object, settings: Settings, calm: Settings
    ) -> list[Part]:
        """The blocks of a store, those that begin a sequence apart: pressure does not reach them."""
        marks = np.asarray(sink)
        if marks.shape != (len(names),) or marks.dtype != np.bool_:
            raise ConfigError(
                f"sink marks of shape {marks.shape}, type {marks.dtype}: give one bool for each of {len(names)} blocks"
            )
        parts = []
        if settings.codec is self._raw:
            marks = np.zeros_like(marks)  # all are exact
        for mark in sorted(set(marks.tolist())) or [False]:
            chosen = np.flatnonzero(marks == mark)
            request = self._request(calm if mark else settings, blocks.layout, mark)
            parts.append(Part([names[int(i)] for i in chosen], blocks[blocks.block_ids[chosen]], request))
        return parts

    def _request(self, settings: Settings, layout: BlockLayout, sink: bool) -> EncodeRequest:
        # A swap asks for the same again and again; the objects that the key names are kept with what was made of them.
        last = self._last_request
        if last is not None and last[0] is settings and last[1] is layout and last[2] is sink:
            return last[3]
        key = (id(settings.bound), id(layout), sink, settings.mode, settings.reason)
        known = self._requests.get(key)
        if known is not None:
            self._last_request = (settings, layout, sink, known[2])
            return known[2]
        bounds = resolve(settings.bound, layout, sink)
        if not self._bound_given and isinstance(settings.bound, BoundPolicy):
            unknown = sum(s.kind == "" and s.dtype is not DType.OPAQUE for s in layout.segments)
            if unknown:
                log_once(
                    "pages that are not known to be K or V are stored exactly by default",
                    f"{unknown} of {len(layout.segments)} of a block; say what they are (kinds= of "
                    "BlockLayout.from_tensors), or give a bound for all pages",
                )
        request = EncodeRequest(bounds, settings.mode, self._threads, settings.reason)
        with self._lock:
            if len(self._requests) >= _MOST_REQUESTS:
                self._requests.clear()
            self._requests[key] = (settings.bound, layout, request)
        return request

    def store_blocks(self, parts: Sequence[Part], codec: Codec, measure_error: bool) -> TransferResult:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        started = time.perf_counter()
        layout = parts[0].blocks.layout
        keys = [key for part in parts for key in part.keys]
        # If even the worst case fits, records go to the pool chunk by chunk. If it does not, the real sizes decide:
        # everything is encoded first, so that a refusal comes before anything was changed.
        worst = len(keys) * self.pool.round_up(max_record_bytes(codec, layout))
        # So it is for keys that are held: their records make room for the new ones, and nothing else need leave.
        streaming = worst <= self.pool.free_bytes or (
            self._index.can_hold(worst, keys) and not any(key in self._index for key in keys)
        )
        fresh: dict[bytes, Entry] = {}
        pending: list[tuple[bytes, EncodedRecord, tuple[NamedTables | None, int]]] = []
        pending_bytes = record_bytes = 0
        fallbacks: Counter[str] = Counter()
        max_error = 0.0
        violations = 0
        try:
            for part, first, last in _chunks(parts, layout):
                chunk = part.blocks[part.blocks.block_ids[first:last]]
                batch = encode_records(chunk, codec, part.request, measure_error=measure_error)
                fallbacks.update(batch.fallbacks)
                extended = extended_by(part.request) if codec.name == "cuszp" else 0
                tables = named_tables(part.request.bound, len(layout.segments)), int(extended)
                for key, record in zip(part.keys[first:last], batch.records, strict=True):
                    max_error = max(max_error, record.max_error or 0.0)
                    violations += record.violations or 0
                    record_bytes += record.nbytes
                    pending_bytes += self.pool.round_up(record.nbytes)
                    if not streaming:  # the scratch is used again; keep just the encoded bytes
                        record = replace(record, payload=record.payload.copy())
                    pending.append((key, record, tables))
                if streaming:
                    self._keep(pending, fresh, layout, keys)
                    pending = []
                elif pending_bytes > self._index.room(keys, replacing=True):
                    raise self._index.refuse(pending_bytes, len(pending), keys, replacing=True)
            with self._lock:  # one step, so that nobody finds a key without a record that is only being replaced
                self._keep(pending, fresh, layout, keys, replacing=True)
                self._index.publish(Fresh.of(fresh))
        except BaseException:
            self._index.cancel(fresh.values(), keys)
            raise
        result = TransferResult(
            blocks=len(keys),
            raw_bytes=sum(part.blocks.nbytes for part in parts),
            record_bytes=record_bytes,
            seconds=time.perf_counter() - started,
            evicted=self._index.report_evicted(),
            fallbacks=dict(fallbacks),
            max_error=max_error if measure_error else None,
            violations=violations if measure_error else None,
        )
        self.count_store(result)
        return result

    def _keep(
        self,
        records: Sequence[tuple[bytes, EncodedRecord, tuple[NamedTables | None, int]]],
        fresh: dict[bytes, Entry],
        layout: BlockLayout,
        keys: Sequence[bytes],
        *,
        replacing: bool = False,
    ) -> None:
        """Put encoded records into the pool, evicting as needed; they are not visible yet."""
        entries = self._index.admit(
            [record.payload.size for _, record, _ in records],
            [record.payload_crc32c for _, record, _ in records],
            [record.table.tobytes() for _, record, _ in records],
            [contents_of(layout, record.codec, *tables) for _, record, tables in records],
            keys,
            replacing=replacing,
        )
        fresh.update(zip((key for key, _, _ in records), entries, strict=True))
        for (_, record, _), entry in zip(records, entries, strict=True):
            self.pool.write(entry.allocation, record.header)
            self.pool.write(entry.allocation, record.payload, offset_bytes=record.header.size)

    # ---- load

    def load(self, keys: Iterable[bytes], out: BlockView, *, stream: object = None) -> Transfer:
        """Decode records into blocks.

        Blocks the host when the blocks lie in host memory. On a GPU it returns at once, and what reads the pages must
        wait: the host with `Transfer.wait`, a stream with `Transfer.wait_stream`.

        Every record is verified (lengths, checksum, codes) before its pages are written: in host memory all records
        before the first page, on a GPU each block by itself.

        Args:
            keys: names of the records.
            out: where they go, in the same order; the page geometry must be the one that was stored, memory strides
                and block numbers may differ.
            stream: CUDA stream whose queued work may still use the pages: they are written behind it. As in `store`.

        Returns:
            The transfer; done, when the blocks lie in host memory.

        Raises:
            BlockNotFoundError: a key is not held; nothing was changed.
            LayoutError: a record does not fit the blocks; nothing was changed.
            CorruptRecordError: a record is damaged. In host memory no page was written; on a GPU it comes from the
                transfer, names the damaged ones in `blocks`, and the others were loaded. The record stays until it is
                discarded.
        """
        started = time.perf_counter()
        names = _check_keys(keys, out, repeats=True)
        if out.device == "cpu":
            return self._load_on_host(names, out, started)
        made = self._devices.get(out.device)
        begun = None
        if made is not None and len(names) * out.layout.nbytes > made.small_bytes:
            begun = made.begin_load(names, out)  # the link has work while the load is checked
        try:
            entries = self._begin_load(names, out)
            try:
                swap = made or self._device(out.device)
                watch = SKIP if self.controller is None else self._watch_load(out, entries)
            except BaseException:
                self._index.end_load(entries)
                raise
        except BaseException:
            if begun is not None:
                begun.drop()
            raise
        transfer = swap.load(names, entries, out, stream, begun)
        if self.controller is not None:
            self._last_load = ref(transfer)
            if watch != SKIP:
                self._load_begun(out.device, entries, watch, transfer, started)
        return transfer

    def _begin_load(self, names: Sequence[bytes], out: BlockView) -> list[Entry]:
        """Check that a load may begin, and protect its records."""
        if not out.writable:
            raise LayoutError(
                "the blocks to load into are read-only, or share memory among themselves: pass writable tensors whose "
                "values do not overlap"
            )
        if len(names) > 1 and len(set(out.block_ids.tolist())) != len(names):
            raise LayoutError("a block number repeats in the blocks to load into: give each block once")
        try:
            return self._index.begin_load(names)
        except BlockNotFoundError as error:
            with self._lock:
                self._totals["missing_blocks"] += len(error.keys)
                self._meter.failed("load", error)
            raise

    def _load_on_host(self, names: Sequence[bytes], out: BlockView, started: float) -> Transfer:
        entries = self._begin_load(names, out)
        try:
            with self.counting_failures("load"):
                self.load_blocks(entries, out)
        except CorruptRecordError:
            self.count_corrupt(1)
            raise
        finally:
            self._index.end_load(entries)
        record_bytes = sum(entry.allocation.nbytes for entry in entries)
        result = TransferResult(len(names), out.nbytes, record_bytes, time.perf_counter() - started, 0, {})
        self.count_load(result)
        transfer = Transfer()
        transfer._finish(result)
        watch = self._watch_load(out, entries)
        if watch != SKIP:
            self._load_begun(out.device, entries, watch, transfer, started)
        return transfer

    def load_blocks(self, entries: Sequence[Entry], out: BlockView) -> None:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        # Sizes, tables and checksums are the engine's own. To parse the headers would take longer than to decode.
        alike: dict[int, list[int]] = {}  # by the identity of what is known of them
        payloads: list[npt.NDArray[np.uint8]] = []
        checked = self.checks_load(len(entries))
        for i, entry in enumerate(entries):
            record, header_bytes = self.pool.read(entry.allocation), entry.contents.header_bytes
            payload = record[header_bytes:]
            header_intact = entry.header is not None or header_is_intact(record[:header_bytes])
            if not header_intact or (checked and crc32c(payload) != entry.payload_crc32c):
                part = "payload" if header_intact else "header"
                raise CorruptRecordError(
                    f"record {i} of {len(entries)} is damaged: its {part}'s checksum does not match; discard it"
                )
            payloads.append(payload)
            alike.setdefault(id(entry.contents), []).append(i)
        tables = [np.frombuffer(entry.table, ENTRY_DTYPE) for entry in entries]
        groups: dict[tuple[str, BlockLayout, NamedTables | None], list[int]] = {}
        for members in alike.values():
            known = entries[members[0]].contents
            layout = check_geometry(known.geometry, out.layout)
            groups.setdefault((known.codec, layout, known.tables), []).extend(members)
        codecs = {name: self._codec_for(name, out.device) for name, _, _ in groups}
        for codec in codecs.values():
            check_device(codec, out)
        # A codec validates its own batch before it writes; with several, all must be valid before the first writes.
        if len(groups) > 1:
            for (name, layout, _), members in groups.items():
                codecs[name].validate_blocks(layout, [payloads[i] for i in members], [tables[i] for i in members])
        for (name, layout, tables_of), members in groups.items():
            view = out[out.block_ids[members]].with_groups(layout)
            if tables_of is not None:
                view = view.with_bounds(tables_of.bounds)
            codecs[name].decode_blocks(
                view, [payloads[i] for i in members], [tables[i] for i in members], threads=self._threads
            )

    # ---- what the paths share

    def _record(self, entry: Entry) -> npt.NDArray[np.uint8]:
        """The bytes of a record, its header in place."""
        with self._lock:
            if entry.header is not None:
                self.pool.write(entry.allocation, entry.header(entry))
                entry.header = None
        return self.pool.read(entry.allocation)

    def checks_load(self, blocks: int) -> bool:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        checked = self._check_load()
        if not checked:
            with self._lock:
                self._totals["unchecked_blocks"] += blocks
        return checked

    def codec_of(self, name: str) -> Codec:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        return self._codecs.get(name) or get_codec(name)

    def _codec_for(self, name: str, device: str) -> Codec:
        """The codec that reads records of this name into blocks on a device."""
        swap = self._devices.get(device)
        codec = self.codec_of(name)
        return codec if swap is None else swap.codec_for(codec)

    def count_store(self, result: TransferResult) -> None:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        self._ended.append(("store", result))
        if len(self._ended) > _MOST_ENDED:
            self._count_ended()
        if result.violations:
            _log.error(
                "%d values of a store of %d blocks are outside their bound: the codec is at fault",
                result.violations,
                result.blocks,
            )

    def count_load(self, result: TransferResult) -> None:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        self._ended.append(("load", result))
        if len(self._ended) > _MOST_ENDED:
            self._count_ended()

    def _count_ended(self) -> None:
        """Bring the counters up to date: at every transfer it would take as long as a small copy."""
        with self._lock:
            totals = self._totals
            while self._ended:
                operation, result = self._ended.popleft()
                what = "stored" if operation == "store" else "loaded"
                totals[what + "_blocks"] += result.blocks
                totals[what + "_raw_bytes"] += result.raw_bytes
                if operation == "store":
                    totals["stored_record_bytes"] += result.record_bytes
                    self._fallbacks.update(result.fallbacks)
                if result.violations is not None:
                    totals["verified_blocks"] += result.blocks
                    totals["violations"] += result.violations
                self._seconds[operation] += result.seconds
                self._meter.finished(operation, result.raw_bytes, result.record_bytes, result.seconds)

    def count_fallback(self, reason: str, pages: int) -> None:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        with self._lock:
            self._fallbacks[reason] += pages

    def count_corrupt(self, blocks: int) -> None:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        with self._lock:
            self._totals["corrupt_blocks"] += blocks

    @contextmanager
    def counting_failures(self, operation: str) -> Iterator[None]:
        """See `kvzip.device.HostPaths`; for the engine's own use."""
        try:
            yield
        except BaseException as error:
            with self._lock:
                self._meter.failed(operation, error)
            raise

    def _device(self, name: str) -> DeviceSwap | TorchSwap:
        """The GPU side for ``"cuda:N"``, made at its first use."""
        made = self._devices.get(name)
        if made is not None:  # it says itself when it is closed
            return made
        with self._lock:
            if name not in self._devices:
                if self._closing:
                    self._index.check_open()
                    raise ConfigError("the engine is being closed: make a new one")
                kind, _, number = name.partition(":")
                if kind != "cuda":
                    raise LayoutError(f"blocks on {name}: kvzip works on host memory and CUDA GPUs; copy them there")
                self._devices[name] = self._make_device(int(number or 0))
            return self._devices[name]

    def _make_device(self, number: int) -> DeviceSwap | TorchSwap:
        from kvzip.device import DeviceSwap  # needs the native library, which a store of raw pages does not

        choice = device_codec()
        if choice.name == "cuda":
            return DeviceSwap(number, self._index, self.pool, self._store_lock, self, self._staging)
        if choice.name == "none":
            raise BackendUnavailableError(f"blocks on a GPU cannot be moved: {choice.reason}")
        from kvzip.torch_swap import TorchSwap

        log_once(f"blocks on GPUs are coded by {choice.name}", choice.reason)
        return TorchSwap(number, self._index, self._store_lock, self, self._staging, use_triton=choice.name == "triton")

    # ---- the rest

    def contains(self, key: bytes) -> bool:
        """Whether a record is held under this key. Does not count as a use."""
        return key in self._index

    def list_keys(self) -> list[bytes]:
        """The keys of all records that are held, at this moment, in no certain order."""
        return self._index.list_keys()

    def record_sizes(self, keys: Iterable[bytes]) -> list[int]:
        """Bytes of the pool that each key's record takes, rounded up to extents; 0 where none is held.

        Does not count as a use.
        """
        return self._index.sizes(_key_list(keys))

    def discard(self, keys: Iterable[bytes]) -> int:
        """Forget records; keys that are not held are passed over.

        A record that is being loaded is forgotten at once and freed when the load ends. A pin does not stop a discard.

        Returns:
            How many were held.
        """
        found = self._index.discard(_key_list(keys))
        with self._lock:
            self._totals["discarded_blocks"] += found
        return found

    @contextmanager
    def pin(self, keys: Iterable[bytes]) -> Iterator[None]:
        """Keep records from being evicted while the ``with`` block runs. Waits for a store that is under way.

        Raises:
            BlockNotFoundError: a key is not held; nothing was pinned.
        """
        names = _key_list(keys)
        with self._store_lock:
            held = self._index.pin(names)
        try:
            yield
        finally:
            self._index.unpin(held)

    def read_record(self, key: bytes) -> bytes:
        """A copy of the record under a key: what `kvzip.decode`, `kvzip.read_header` and ``kvzip inspect`` take.

        Raises:
            BlockNotFoundError: the key is not held.
        """
        with self._lock:
            return self._record(self._index.find([key])[0]).tobytes()

    def stats(self) -> EngineStats:
        """Counters at this moment; of a closed engine the last ones."""
        with self._lock:
            self._count_ended()
            pool = self._last_pool_stats
            if pool is None:
                if self.pool.closed:
                    self._index.check_open()  # says more than the pool does
                pool = self.pool.stats()
            held = self._index.held()
            totals = self._totals
            return EngineStats(
                records=held.records,
                raw_bytes=held.raw_bytes,
                record_bytes=held.record_bytes,
                ratio=held.raw_bytes / held.record_bytes if held.records else 1.0,
                pinned=held.pinned,
                stored_blocks=totals["stored_blocks"],
                loaded_blocks=totals["loaded_blocks"],
                discarded_blocks=totals["discarded_blocks"],
                evicted_blocks=self._index.evicted,
                stored_raw_bytes=totals["stored_raw_bytes"],
                stored_record_bytes=totals["stored_record_bytes"],
                loaded_raw_bytes=totals["loaded_raw_bytes"],
                store_seconds=self._seconds["store"],
                load_seconds=self._seconds["load"],
                verified_blocks=totals["verified_blocks"],
                unchecked_blocks=totals["unchecked_blocks"],
                missing_blocks=totals["missing_blocks"],
                corrupt_blocks=totals["corrupt_blocks"],
                violations=totals["violations"],
                fallbacks=dict(self._fallbacks),
                portable_blocks=dict(sum((Counter(swap.coded_blocks) for swap in self._devices.values()), Counter())),
                pool=pool,
            )

    def metrics(self) -> MetricsSnapshot:
        """The same and more, as families of counters, gauges and histograms: docs/reference/metrics.md."""
        with self._lock:
            decisions = {} if self.controller is None else self.controller.decisions
            return snapshot(asdict(self.stats()), self._meter, decisions)

    @property
    def usable(self) -> bool:
        """Whether stores and loads can still succeed.

        False for good once the engine is closed; in the child of a fork, unless the engine was idle and has neither
        used a GPU nor pinned memory; and when a GPU that it used is lost to the process (`CudaError.fatal`): blocks in
        host memory can then still be moved. What is tried nevertheless raises an error that says why.
        """
        with self._lock:
            lost = any(swap.lost is not None for swap in self._devices.values())
            return not (self._closing or self._index.closed or lost)

    def close(self) -> None:
        """Forget all records, and close the pool if the engine made it.

        Waits for transfers under way; may be called twice. A GPU that fails meanwhile is logged.
        """
        with self._close_lock:
            with self._lock:
                swaps, self._closing = ([] if self._closing else list(self._devices.values())), True
            for swap in swaps:
                swap.close()
            if self.controller is not None:
                self.controller.take_in()  # it lets go of their transfers
            with self._store_lock, self._lock:
                if self._index.close() and self._owns_pool:
                    self._last_pool_stats = self.pool.stats()
                    self.pool.close()

    def _after_fork(self) -> None:
        """In the child of a fork."""
        self.pool._after_fork()
        for part in (self._verify_store, self._check_load, self.controller, self._gauge):
            if part is not None:
                part._lock = threading.Lock()  # a thread of the parent may hold the old one for ever
        self._close_lock = threading.Lock()
        # Not locked(): a thread that was given the lock while another had the interpreter is not in there yet.
        idle = self._store_lock.acquire(blocking=False) and self._index.idle_after_fork()
        if idle and not self._devices and not self.pool.closed:
            self._store_lock.release()
            return
        why = (
            "this process was forked from one whose engine had a GPU, pinned memory or a transfer under way: make a "
            "new engine here, and start processes that use a GPU with the method spawn"
        )
        self._index.abandon(why)
        self._lock, self._store_lock = self._index.lock, threading.Lock()
        self._closing = True
        for swap in self._devices.values():
            swap.abandon(TransferError(f"the transfer belongs to another process: {why}"))
        self._devices = {}

    def _at_exit(self) -> None:
        """At the interpreter's end: what is under way may end."""
        for swap in list(self._devices.values()):
            swap.settle(_EXIT_SECONDS)

    def __enter__(self) -> SwapEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_under_way(transfer: ReferenceType[Transfer] | None) -> bool:
    known = None if transfer is None else transfer()
    return known is not None and not known._ended


def _check_bound(bound: object, codec: Codec | None = None) -> None:
    if not isinstance(bound, (ErrorBound, BoundPolicy)):
        raise ConfigError(f"bound {bound!r} is no ErrorBound: use ErrorBound.relative(1e-3) or another kind")
    if codec is not None:
        codec.check_bound(bound)


def _settings(codec: str | Codec, bound: ErrorBound | BoundPolicy | None, mode: str | None) -> Settings:
    if bound is not None:
        _check_bound(bound)
    try:
        chosen, reason = get_codec(codec), Reason.AS_ASKED
        chosen.check_available()
    except BackendUnavailableError as error:
        if codec not in LOSSLESS_STAND_INS:
            raise
        log_once(f"codec {codec!r} is not available, cuszp takes its place, lossless", str(error))
        chosen, bound, reason = get_codec("cuszp"), ErrorBound.lossless(), Reason.CODEC_UNAVAILABLE
        mode = None
    bound = chosen.default_bound() if bound is None else bound
    _check_bound(bound, chosen)
    return Settings(chosen, bound, chosen.default_mode(bound) if mode is None else chosen.check_mode(mode), reason)


def _key_list(keys: object) -> list[bytes]:
    if type(keys) is not list and (isinstance(keys, (bytes, str)) or not isinstance(keys, Iterable)):
        raise ConfigError(f"keys is the single key {keys!r}: give a list of keys")
    names: list[bytes] = list(keys)
    for name in names if set(map(type, names)) != {bytes} else ():
        if not isinstance(name, bytes):
            raise ConfigError(f"key {name!r} is of type {type(name).__name__}: keys are bytes")
    return names


def _check_keys(keys: object, blocks: BlockView, *, repeats: bool = False) -> list[bytes]:
    if type(keys) is list and len(keys) == 1 == len(blocks.block_ids) and type(keys[0]) is bytes:
        return keys[:]  # where blocks come one by one, as a rule
    names = _key_list(keys)
    if len(names) != len(blocks):
        raise ConfigError(f"{len(names)} keys for {len(blocks)} blocks: give one key a block")
    if not repeats and len(names) > 1 and len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ConfigError(f"key {twice!r} is given twice: each block needs its own key")
    return names


def _chunks(parts: Sequence[Part], layout: BlockLayout) -> Iterator[tuple[Part, int, int]]:
    step = max(1, CHUNK_BYTES // layout.nbytes)
    for part in parts:
        for first in range(0, len(part.keys), step):
            yield part, first, min(first + step, len(part.keys))
