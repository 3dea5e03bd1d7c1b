# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`SwapEngine`: KV blocks stored compressed in a `HostPool`, found by key, evicted by the bytes they really take."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import numpy.typing as npt

from kvzip.backends.base import Codec, EncodeRequest
from kvzip.backends.registry import get_codec
from kvzip.coding import EncodedRecord, check_device, check_geometry, encode_records, max_record_bytes
from kvzip.errors import (
    BlockNotFoundError,
    ConfigError,
    CorruptRecordError,
    FormatVersionError,
    LayoutError,
)
from kvzip.index import Entry, RecordIndex
from kvzip.policy import EvictionPolicy, make_policy
from kvzip.pool import HostPool, PoolStats
from kvzip.record import RecordHeader, read_record
from kvzip.transfer import Transfer, TransferResult
from kvzip.types import BlockLayout, BlockView, ErrorBound

_log = logging.getLogger("kvzip")

#: Raw bytes that are encoded or decoded in one step; bounds the scratch memory of a transfer.
CHUNK_BYTES = 32 << 20


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
        missing_blocks: keys that a load asked for in vain.
        corrupt_blocks: records that failed their checks at a load.
        violations: values found outside the bound by stores with ``measure_error``.
        fallbacks: pages not coded as asked, by reason.
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
    missing_blocks: int
    corrupt_blocks: int
    violations: int
    fallbacks: Mapping[str, int]
    pool: PoolStats


@dataclass(frozen=True)
class Settings:
    """What new records are coded with; records that are held keep what they were coded with."""

    codec: Codec
    bound: ErrorBound
    mode: str


class SwapEngine:
    """Moves KV blocks between page memory and a pool of compressed records. All methods are thread-safe.

    A store either keeps all of its blocks or changes nothing; so does a load. A block that the codec cannot make
    smaller is stored lossless or raw, with the reason in its record and in the statistics. When the pool is full, the
    records that the policy calls coldest leave it, counted in the bytes that they really take; records that are pinned
    or being loaded stay.

    Args:
        pool: a `HostPool` (shared with others, if you like), or the bytes of a new one that the engine closes with
            itself.
        codec: name of a codec, or a codec.
        bound: how far a loaded value may be from the stored one.
        mode: encoding mode; by default the codec's first.
        policy: name of an eviction policy (``"lru"``), or a policy object of its own.
        threads: most host threads for coding; 0 = all cores that the process may use.

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
        bound: ErrorBound | None = None,
        mode: str | None = None,
        policy: str | EvictionPolicy = "lru",
        threads: int = 0,
    ) -> None:
        if threads < 0:
            raise ConfigError(f"threads {threads} is negative: use 0 for all cores, or a number of threads")
        self._settings = _settings(get_codec(codec), ErrorBound.relative(1e-3) if bound is None else bound, mode)
        self._threads = threads
        self._owns_pool = not isinstance(pool, HostPool)
        self.pool = pool if isinstance(pool, HostPool) else HostPool(pool)
        self._index = RecordIndex(self.pool, make_policy(policy))
        self._lock = self._index.lock
        self._store_lock = threading.Lock()  # one store at a time: what it was promised cannot be taken by another
        self._totals: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._seconds = {"store": 0.0, "load": 0.0}
        self._codecs: dict[str, Codec] = {}  # what records were made with here: a codec object need not be registered

    # ---- settings

    @property
    def settings(self) -> Settings:
        """Codec, bound and mode of the next store."""
        return self._settings

    def configure(
        self, *, codec: str | Codec | None = None, bound: ErrorBound | None = None, mode: str | None = None
    ) -> Settings:
        """Change what the next stores are coded with; what is None stays. Records that are held still load.

        Raises:
            ConfigError: the codec does not know the mode; nothing was changed.
            CodecNotFoundError: no such codec; nothing was changed.
        """
        with self._lock:
            now = self._settings
            chosen = now.codec if codec is None else get_codec(codec)
            if mode is None and now.mode in chosen.modes:
                mode = now.mode
            self._settings = _settings(chosen, now.bound if bound is None else bound, mode)
            return self._settings

    # ---- store

    def store(self, keys: Iterable[bytes], blocks: BlockView, *, measure_error: bool = False) -> Transfer:
        """Encode blocks and keep their records. A key that is held gets the new record. Blocks the host on the CPU.

        Args:
            keys: one opaque name a block.
            blocks: the blocks, in the same order.
            measure_error: decode and compare as well; slower. See `TransferResult`.

        Returns:
            A transfer that is done.

        Raises:
            ConfigError: keys are not bytes, repeat, or are more or fewer than the blocks.
            LayoutError: the codec does not work where the blocks lie.
            PoolExhaustedError: the pool cannot hold them, even after evicting all it may; nothing was changed.
        """
        start = time.perf_counter()
        names = _check_keys(keys, blocks)
        settings = self._settings
        with self._store_lock:
            self._index.check_open()
            result = self._store(names, blocks, settings, measure_error)
        seconds = time.perf_counter() - start
        with self._lock:
            self._seconds["store"] += seconds
        transfer = Transfer()
        transfer._finish(replace(result, seconds=seconds))
        return transfer

    def _store(
        self, keys: Sequence[bytes], blocks: BlockView, settings: Settings, measure_error: bool
    ) -> TransferResult:
        layout = blocks.layout
        request = EncodeRequest(settings.bound, settings.mode, self._threads)
        self._codecs[settings.codec.name] = settings.codec
        # If even the worst case fits, records go to the pool chunk by chunk. If it does not, the real sizes decide:
        # everything is encoded first, so that a refusal comes before anything was changed.
        worst = len(keys) * self.pool.round_up(max_record_bytes(settings.codec, layout))
        streaming = self._index.can_hold(worst, keys)
        fresh: dict[bytes, Entry] = {}
        pending: list[tuple[bytes, EncodedRecord]] = []
        pending_bytes = record_bytes = 0
        fallbacks: Counter[str] = Counter()
        max_error = 0.0
        violations = 0
        evicted_before = self._index.evicted
        try:
            for first, last in _chunks(len(keys), layout):
                batch = encode_records(
                    blocks[blocks.block_ids[first:last]], settings.codec, request, measure_error=measure_error
                )
                fallbacks.update(batch.fallbacks)
                for key, record in zip(keys[first:last], batch.records, strict=True):
                    max_error = max(max_error, record.max_error or 0.0)
                    violations += record.violations or 0
                    record_bytes += record.nbytes
                    pending_bytes += self.pool.round_up(record.nbytes)
                    if not streaming:  # the scratch is used again; keep just the encoded bytes
                        record = replace(record, payload=record.payload.copy())
                    pending.append((key, record))
                if streaming:
                    self._keep(pending, fresh, layout.nbytes, keys)
                    pending = []
                elif pending_bytes > self._index.room(keys, replacing=True):
                    raise self._index.refuse(pending_bytes, len(pending), keys)
            with self._lock:  # one step, so that nobody finds a key without a record that is only being replaced
                self._keep(pending, fresh, layout.nbytes, keys, replacing=True)
                self._index.publish(fresh)
        except BaseException:
            self._index.cancel(fresh.values(), keys)
            raise
        with self._lock:
            self._totals["stored_blocks"] += len(keys)
            self._totals["stored_raw_bytes"] += blocks.nbytes
            self._totals["stored_record_bytes"] += record_bytes
            self._totals["violations"] += violations
            self._fallbacks.update(fallbacks)
        return TransferResult(
            blocks=len(keys),
            raw_bytes=blocks.nbytes,
            record_bytes=record_bytes,
            seconds=0.0,
            evicted=self._index.evicted - evicted_before,
            fallbacks=dict(fallbacks),
            max_error=max_error if measure_error else None,
            violations=violations if measure_error else None,
        )

    def _keep(
        self,
        records: Sequence[tuple[bytes, EncodedRecord]],
        fresh: dict[bytes, Entry],
        raw_bytes: int,
        keys: Sequence[bytes],
        *,
        replacing: bool = False,
    ) -> None:
        """Put encoded records into the pool, evicting as needed; they are not visible yet."""
        entries = self._index.admit([r.nbytes for _, r in records], raw_bytes, keys, replacing=replacing)
        for (key, record), entry in zip(records, entries, strict=True):
            fresh[key] = entry
            self.pool.write(entry.allocation, record.header)
            self.pool.write(entry.allocation, record.payload, offset_bytes=record.header.size)

    # ---- load

    def load(self, keys: Iterable[bytes], out: BlockView) -> Transfer:
        """Decode records into blocks. Blocks the host on the CPU.

        Every record is verified (lengths, checksum, codes) before the first page is written.

        Args:
            keys: names of the records.
            out: where they go, in the same order; the page geometry must be the one that was stored, memory strides
                and block numbers may differ.

        Returns:
            A transfer that is done.

        Raises:
            BlockNotFoundError: a key is not held; nothing was changed.
            LayoutError: a record does not fit the blocks; nothing was changed.
            CorruptRecordError: a record is damaged; no page was written. The record stays until it is discarded.
        """
        start = time.perf_counter()
        names = _check_keys(keys, out, repeats=True)
        if not out.writable:
            raise LayoutError("the blocks to load into are read-only: pass writable tensors")
        if len(np.unique(out.block_ids)) != len(out):
            raise LayoutError("a block number repeats in the blocks to load into: give each block once")
        try:
            entries = self._index.begin_load(names)
        except BlockNotFoundError as error:
            with self._lock:
                self._totals["missing_blocks"] += len(error.keys)
            raise
        try:
            self._decode(entries, out)
        except CorruptRecordError:
            with self._lock:
                self._totals["corrupt_blocks"] += 1
            raise
        finally:
            self._index.end_load(entries)
        seconds = time.perf_counter() - start
        with self._lock:
            self._totals["loaded_blocks"] += len(names)
            self._totals["loaded_raw_bytes"] += out.nbytes
            self._seconds["load"] += seconds
        transfer = Transfer()
        record_bytes = sum(entry.allocation.nbytes for entry in entries)
        transfer._finish(TransferResult(len(names), out.nbytes, record_bytes, seconds))
        return transfer

    def _decode(self, entries: Sequence[Entry], out: BlockView) -> None:
        groups: dict[tuple[str, BlockLayout], list[int]] = {}
        headers: list[RecordHeader] = []
        payloads: list[npt.NDArray[np.uint8]] = []
        for i, entry in enumerate(entries):
            header, payload = _read_own(self.pool.read(entry.allocation))
            layout = check_geometry(header.geometry, out.layout)
            headers.append(header)
            payloads.append(np.frombuffer(payload, np.uint8))
            groups.setdefault((header.codec, layout), []).append(i)
        for name, _ in groups:
            check_device(self._codec(name), out)
        # A codec validates its own batch before it writes; with several, all must be valid before the first writes.
        if len(groups) > 1:
            for (name, layout), members in groups.items():
                self._codec(name).validate_blocks(
                    layout, [payloads[i] for i in members], [headers[i].table for i in members]
                )
        for (name, layout), members in groups.items():
            view = out[out.block_ids[members]].with_groups(layout)
            self._codec(name).decode_blocks(
                view,
                [payloads[i] for i in members],
                [headers[i].table for i in members],
                threads=self._threads,
            )

    def _codec(self, name: str) -> Codec:
        return self._codecs.get(name) or get_codec(name)

    # ---- the rest

    def contains(self, key: bytes) -> bool:
        """Whether a record is held under this key. Does not count as a use."""
        return key in self._index

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
            return self.pool.read(self._index.find([key])[0].allocation).tobytes()

    def stats(self) -> EngineStats:
        """Counters at this moment."""
        with self._lock:
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
                missing_blocks=totals["missing_blocks"],
                corrupt_blocks=totals["corrupt_blocks"],
                violations=totals["violations"],
                fallbacks=dict(self._fallbacks),
                pool=self.pool.stats(),
            )

    def close(self) -> None:
        """Forget all records, and close the pool if the engine made it.

        Waits for transfers under way; may be called twice.
        """
        with self._store_lock:
            if self._index.close() and self._owns_pool:
                self.pool.close()

    def __enter__(self) -> SwapEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_own(record: npt.NDArray[np.uint8]) -> tuple[RecordHeader, memoryview]:
    """Read a record that this process wrote: another version is damage here."""
    try:
        return read_record(record)
    except FormatVersionError as error:
        raise CorruptRecordError(f"a record in the pool is damaged: {error}") from error


def _settings(codec: Codec, bound: ErrorBound, mode: str | None) -> Settings:
    if not isinstance(bound, ErrorBound):
        raise ConfigError(f"bound {bound!r} is no ErrorBound: use ErrorBound.relative(1e-3) or another kind")
    return Settings(codec, bound, codec.modes[0] if mode is None else codec.check_mode(mode))


def _key_list(keys: object) -> list[bytes]:
    if isinstance(keys, (bytes, str)) or not isinstance(keys, Iterable):
        raise ConfigError(f"keys is the single key {keys!r}: give a list of keys")
    names: list[bytes] = list(keys)
    for name in names:
        if not isinstance(name, bytes):
            raise ConfigError(f"key {name!r} is of type {type(name).__name__}: keys are bytes")
    return names


def _check_keys(keys: object, blocks: BlockView, *, repeats: bool = False) -> list[bytes]:
    names = _key_list(keys)
    if len(names) != len(blocks):
        raise ConfigError(f"{len(names)} keys for {len(blocks)} blocks: give one key a block")
    if not repeats and len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ConfigError(f"key {twice!r} is given twice: each block needs its own key")
    return names


def _chunks(blocks: int, layout: BlockLayout) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK_BYTES // layout.nbytes)
    return ((first, min(first + step, blocks)) for first in range(0, blocks, step))
