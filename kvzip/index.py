# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The records of an engine by key: which are held, which may leave, what is promised to a store under way.

Bytes are counted as the pool counts them. All methods are thread-safe; `RecordIndex.lock` may be held around several.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvzip.bounds import NamedTables
from kvzip.errors import BlockNotFoundError, ConfigError, PoolExhaustedError
from kvzip.policy import EvictionPolicy
from kvzip.pool import Allocation, HostPool, Room
from kvzip.record import Geometry, geometry_of, header_nbytes
from kvzip.types import BlockLayout

_LOADS_TIMEOUT_SECONDS = 60.0  # how long a store waits for loads that hold the bytes it needs


@dataclass(eq=False, slots=True)
class Pins:
    """Pins of a key: they stay with the key when a store replaces its record.

    Attributes:
        count: pins that have not ended.
        entry: the record that they hold now; None when it was discarded.
    """

    count: int = 0
    entry: Entry | None = None


@dataclass(frozen=True)
class Contents:
    """What an engine remembers of a record's header, so that a load on a GPU need not read it.

    Attributes:
        raw_bytes: bytes of the block's values.
        codec: name of the codec.
        geometry: shapes of the pages.
        header_bytes: bytes before the payload.
        tables: channel tables that it was encoded with; they live as long as the record, which cannot be read without.
        extended: what its pages may have that kernels of their own decode (`kvzip.backends.cuszp.Extended`).
    """

    raw_bytes: int
    codec: str
    geometry: tuple[Geometry, ...]
    header_bytes: int
    tables: NamedTables | None = None
    extended: int = 0


@lru_cache(maxsize=256)
def contents_of(layout: BlockLayout, codec: str, tables: NamedTables | None = None, extended: int = 0) -> Contents:
    """What records of this layout hold; the same object for the same arguments."""
    return Contents(layout.nbytes, codec, geometry_of(layout), header_nbytes(layout), tables, extended)


@dataclass(eq=False, slots=True)
class Entry:
    """A record in the pool.

    Attributes:
        allocation: where it lies.
        contents: what it holds.
        table: its segment table, as it stands in the record.
        payload_crc32c: checksum of its payload.
        header: makes the record's header while that is not in the pool yet: a load on a GPU does not need it, and
            making it at every store would cost more than the link takes for the record.
    """

    allocation: Allocation
    contents: Contents
    table: bytes
    payload_crc32c: int
    loads: int = 0  # loads in flight
    pins: Pins = field(default_factory=Pins)
    dropped: bool = False  # out of the index, or about to be; freed when the last load ends
    freed: bool = False
    header: Callable[[Entry], npt.NDArray[np.uint8]] | None = None

    @property
    def protected(self) -> bool:
        """Whether eviction must pass it over."""
        return self.loads > 0 or self.pins.count > 0


class Fresh(NamedTuple):
    """New records of a store and what they add up to: made before the last ones have landed, as it takes a while.

    Attributes:
        entries: the records by key.
        sizes: bytes of each in the pool.
        raw_bytes: of all of them.
        record_bytes: the sum of `sizes`.
        extent_bytes: the same in whole extents.
    """

    entries: dict[bytes, Entry]
    sizes: list[int]
    raw_bytes: int
    record_bytes: int
    extent_bytes: int

    @classmethod
    def of(cls, entries: dict[bytes, Entry]) -> Fresh:
        """With the sums."""
        allocations = [entry.allocation for entry in entries.values()]
        sizes = [allocation.nbytes for allocation in allocations]
        raw_bytes = sum([entry.contents.raw_bytes for entry in entries.values()])
        return cls(entries, sizes, raw_bytes, sum(sizes), sum([allocation.extent_nbytes for allocation in allocations]))


@dataclass(frozen=True)
class Held:
    """What an index holds: records, their raw bytes, their bytes in the pool, how many are pinned."""

    records: int
    raw_bytes: int
    record_bytes: int
    pinned: int


class RecordIndex:
    """Keys, records and the eviction policy of one engine.

    One store at a time may use `room`, `admit` and `publish`: the engine sees to that.

    Args:
        pool: where the records lie; others may use it too.
        policy: order in which records leave.
    """

    def __init__(self, pool: HostPool, policy: EvictionPolicy) -> None:
        self.pool = pool
        self.lock = threading.RLock()
        self.evicted = 0
        self._reported = 0  # of these
        self._policy = policy
        self._entries: dict[bytes, Entry] = {}
        # Running sums over the entries, so that no store and no statistics walk through all of them.
        self._raw_bytes = self._record_bytes = self._pinned = 0
        self._leavable = 0  # bytes of extents of entries that are not protected
        self._freed = threading.Condition(self.lock)
        self._waiting = 0  # for that; loads end often, and to tell nobody takes time too
        self._loads = 0  # begun and not ended
        self._why_closed = ""

    # ---- stores

    def can_hold(self, nbytes: int, keys: Sequence[bytes]) -> bool:
        """Whether a store of `keys` is certain to find this many bytes, without the records that it replaces."""
        return nbytes <= self.pool.free_bytes or nbytes <= self.room(keys)

    def room(self, keys: Sequence[bytes], *, replacing: bool = False) -> int:
        """Bytes of extents that a store of `keys` may use: free ones, and those of records that may leave.

        With `replacing`, the records that the store replaces count too: they leave in the same step.
        """
        with self.lock:
            room = self.pool.free_bytes + self._leavable
            for key in set(keys):
                entry = self._entries.get(key)
                if entry is not None and not entry.protected:
                    room -= 0 if replacing and not entry.dropped else entry.allocation.extent_nbytes
                elif entry is not None and replacing and entry.loads == 0:
                    room += entry.allocation.extent_nbytes
            return room

    def refuse(self, needed: int, encoded: int, keys: Sequence[bytes], *, replacing: bool) -> PoolExhaustedError:
        """The error for a store that does not fit; `replacing` as in `room`."""
        room = self.room(keys, replacing=replacing)
        return PoolExhaustedError(
            f"{encoded} of {len(keys)} blocks need {needed} bytes already, "
            f"the pool can give {room} of {self.pool.capacity_bytes}: "
            "store fewer blocks at once, release pins, or make the pool larger",
            requested=needed,
            free=room,
        )

    def take(self, nbytes: int, keys: Sequence[bytes], *, replacing: bool = False) -> Room:
        """Take this many bytes of the pool for a store of `keys`, evicting as needed.

        Waits for loads that hold bytes which may leave.

        Args:
            nbytes: the sum of `HostPool.round_up` of the records.
            keys: all keys of the store; their records are not evicted.
            replacing: the records that the store replaces may be freed now: `publish` follows under the same lock.

        Raises:
            PoolExhaustedError: they do not fit, however much may leave; nothing has left.
        """
        with self.lock:
            room = self.pool.try_take(nbytes)
            while room is None:
                if nbytes > self.pool.free_bytes:
                    # Nothing leaves before it is certain that enough may. Loads that end give bytes back; what others
                    # on this pool hold, nobody says.
                    self._wait(
                        lambda: nbytes <= self.room(keys, replacing=replacing) or self._loads == 0,
                        _LOADS_TIMEOUT_SECONDS,
                    )
                    if nbytes > self.room(keys, replacing=replacing):
                        raise self.refuse(nbytes, len(keys), keys, replacing=replacing)
                    self._make_room(nbytes, keys, replacing)
                try:
                    room = self.pool.take(nbytes)
                except PoolExhaustedError:  # another engine on this pool was faster: look again
                    if nbytes > self.room(keys, replacing=replacing):
                        raise
            return room

    def take_ahead(self, nbytes: int, keys: Sequence[bytes]) -> Room | None:
        """Take the worst case of a small store of `keys`, whose sizes are not known yet; None if that asks too much.

        What leaves for it leaves at most the pool's headroom free: the bytes that are left over stay free, and the next
        store needs to evict so much less.
        """
        room = self.pool.try_take(nbytes)
        if room is None and nbytes <= self.pool.headroom_bytes:
            with self.lock:
                if nbytes <= self.room(keys):
                    self._make_room(nbytes, keys, replacing=False)
                    room = self.pool.try_take(nbytes)  # None: another engine on this pool was faster
        return room

    def enter(
        self,
        room: Room,
        payload_bytes: Sequence[int],
        payload_crc32c: Sequence[int],
        tables: Sequence[bytes],
        contents: Sequence[Contents],
        header: Callable[[Entry], npt.NDArray[np.uint8]] | None = None,
    ) -> list[Entry]:
        """Divide a room among records. They are not visible before `publish`.

        Args:
            room: from `take`; what is left of it returns to the pool.
            payload_bytes: size of each record's payload.
            payload_crc32c: its checksum.
            tables: its segment table, as it stands in the record.
            contents: what else is known of it.
            header: what makes the headers of records that a GPU made; None when they are written at once.
        """
        allocations = room.divide([c.header_bytes + n for c, n in zip(contents, payload_bytes, strict=True)])
        entries = list(map(Entry, allocations, contents, tables, payload_crc32c))
        for entry in entries:
            entry.pins.entry = entry
            if header is not None:
                entry.header = header
        return entries

    def land(
        self,
        room: Room,
        keys: Sequence[bytes],
        payload_bytes: Sequence[int],
        payload_crc32c: Sequence[int],
        tables: Sequence[bytes],
        contents: Contents,
        header: Callable[[Entry], npt.NDArray[np.uint8]],
    ) -> None:
        """`enter` and `publish` in one step, for the records of a small store that a GPU made, all of one kind."""
        before = contents.header_bytes
        with self.lock:
            if len(keys) == 1 and keys[0] not in self._entries:  # where blocks come one by one, as a rule
                key, pins = keys[0], Pins()
                allocation = room.cut(before + payload_bytes[0])
                entry = Entry(allocation, contents, tables[0], payload_crc32c[0], 0, pins, False, False, header)
                try:
                    self._policy.insert(key, allocation.nbytes)
                except BaseException:
                    self.pool.free(allocation)
                    raise
                pins.entry = self._entries[key] = entry
                self._raw_bytes += contents.raw_bytes
                self._record_bytes += allocation.nbytes
                self._leavable += allocation.extent_nbytes
                return
            allocations = room.divide([before + n for n in payload_bytes])
            fresh = {}
            for key, allocation, table, crc in zip(keys, allocations, tables, payload_crc32c, strict=True):
                pins = Pins()
                pins.entry = fresh[key] = Entry(allocation, contents, table, crc, 0, pins, False, False, header)
            try:
                self.publish(Fresh.of(fresh))
            except BaseException:
                self.cancel(fresh.values())
                raise

    def admit(
        self,
        payload_bytes: Sequence[int],
        payload_crc32c: Sequence[int],
        tables: Sequence[bytes],
        contents: Sequence[Contents],
        keys: Sequence[bytes],
        *,
        replacing: bool = False,
    ) -> list[Entry]:
        """`take` and `enter` in one step.

        Raises:
            PoolExhaustedError: they do not fit, however much may leave; nothing has left.
        """
        if not payload_bytes:
            return []
        round_up = self.pool.round_up
        needed = sum(round_up(c.header_bytes + n) for c, n in zip(contents, payload_bytes, strict=True))
        room = self.take(needed, keys, replacing=replacing)
        return self.enter(room, payload_bytes, payload_crc32c, tables, contents)

    def _make_room(self, needed: int, keys: Sequence[bytes], replacing: bool) -> None:
        """Free bytes for a store of `keys`: what it replaces first, then the coldest."""
        if replacing:
            for key in keys:
                entry = self._entries.get(key)
                if entry is not None and entry.loads == 0 and needed > self.pool.free_bytes:
                    self._drop(entry)  # still in the index: `publish` takes it out
        free = self.pool.free_bytes
        if needed <= free:
            return
        own, leaving = set(keys), []
        for key in self._policy.victims():  # one walk, however many are protected at its beginning
            entry = self._entries[key]
            if key not in own and not entry.protected:
                leaving.append(key)
                free += entry.allocation.extent_nbytes
                if needed <= free:
                    break
        for key in leaving:  # too few only when others take from the same pool; `take` says it
            self._evict(key)

    def publish(self, fresh: Fresh) -> None:
        """Make new records visible, in place of those that they replace."""
        entries = fresh.entries
        with self.lock:
            held, insert = self._entries, self._policy.insert
            if not held.keys().isdisjoint(entries):
                for key, entry in entries.items():
                    if key in held:
                        pins = entry.pins = held[key].pins
                        self._remove(key, evicted=False)
                        pins.entry = entry
                        if pins.count:
                            self._pinned += 1
                            self._leavable -= entry.allocation.extent_nbytes
            held.update(entries)
            key = b""
            try:
                for key, nbytes in zip(entries, fresh.sizes, strict=True):
                    insert(key, nbytes)
            except BaseException:  # a policy that fails, or Ctrl-C: whoever asked frees what it brought
                self._retract(entries, key)
                raise
            self._raw_bytes += fresh.raw_bytes
            self._record_bytes += fresh.record_bytes
            self._leavable += fresh.extent_bytes

    def _retract(self, fresh: Mapping[bytes, Entry], failed: bytes) -> None:
        """Undo a `publish` whose policy refused a key, those before it accepted."""
        for key in fresh:
            if key == failed:
                break
            self._policy.remove(key, evicted=False)
        for key, entry in fresh.items():
            del self._entries[key]
            if entry.pins.count:
                self._pinned -= 1
                self._leavable += entry.allocation.extent_nbytes

    def cancel(self, entries: Iterable[Entry], keys: Sequence[bytes] = ()) -> None:
        """Take back what `admit` gave to a store of `keys` that failed."""
        with self.lock:
            for entry in entries:
                entry.pins.entry = None
                self.pool.free(entry.allocation)
            for key in keys:  # only when others took from the same pool in the meantime
                old = self._entries.get(key)
                if old is not None and old.dropped:
                    self._evict(key)

    def report_evicted(self) -> int:
        """Records that were evicted and not reported yet: by the store under way, or by one before it that failed."""
        if self._reported == self.evicted:  # as a rule
            return 0
        with self.lock:
            found, self._reported = self.evicted - self._reported, self.evicted
            return found

    def withdraw_report(self, evicted: int) -> None:
        """Nobody has read that so many were evicted: the next report counts them."""
        with self.lock:
            self._reported -= evicted

    # ---- loads

    def begin_load(self, keys: Sequence[bytes]) -> list[Entry]:
        """Protect the records of `keys` until `end_load`.

        Raises:
            BlockNotFoundError: a key is not held; nothing was changed.
            ConfigError: the index is closed.
        """
        with self.lock:
            self.check_open()
            held, touch = self._entries, self._policy.touch
            try:
                entries = [held[key] for key in keys]
            except KeyError:
                entries = self.find(keys)  # says which are missing
            self._protect(entries)
            for key in keys:
                touch(key)
            return entries

    def begin_first(self, keys: Sequence[bytes]) -> list[Entry] | None:
        """Protect records as `begin_load` does, ahead of it: None where that will raise."""
        with self.lock:
            held = self._entries
            try:
                entries = [held[key] for key in keys]
            except KeyError:
                return None
            if self._why_closed:
                return None
            self._protect(entries)
            return entries

    def _protect(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            if entry.loads == 0 and entry.pins.count == 0:
                self._leavable -= entry.allocation.extent_nbytes
            entry.loads += 1
        self._loads += 1

    def end_load(self, entries: Iterable[Entry], *, ended: bool = True) -> None:
        """Undo `begin_load`; a load that has not ended lets go of some of its records, and of the others later."""
        with self.lock:
            for entry in entries:
                entry.loads -= 1
                if entry.loads == 0:
                    if entry.dropped:
                        self._release(entry)
                    elif entry.pins.count == 0:
                        self._leavable += entry.allocation.extent_nbytes
            self._loads -= ended
            if self._waiting:
                self._freed.notify_all()

    # ---- the rest

    def find(self, keys: Sequence[bytes]) -> list[Entry]:
        """Entries of keys.

        Raises:
            BlockNotFoundError: a key is not held.
        """
        with self.lock:
            try:
                return [self._entries[key] for key in keys]
            except KeyError:
                missing = tuple(key for key in keys if key not in self._entries)
                raise BlockNotFoundError(
                    f"{len(missing)} of {len(keys)} keys are not held (the first is {missing[0]!r}): "
                    "check with contains()",
                    keys=missing,
                ) from None

    def __contains__(self, key: bytes) -> bool:
        with self.lock:
            return key in self._entries

    def list_keys(self) -> list[bytes]:
        """Keys of all records, at this moment."""
        with self.lock:
            return list(self._entries)

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of extents that each key's record takes; 0 where none is held."""
        with self.lock:
            entries = map(self._entries.get, keys)
            return [0 if entry is None else entry.allocation.extent_nbytes for entry in entries]

    def discard(self, keys: Iterable[bytes]) -> int:
        """Forget records; returns how many were held. One that is being loaded is freed when the load ends."""
        found = 0
        with self.lock:
            for key in keys:
                if key in self._entries:
                    self._remove(key, evicted=False)
                    found += 1
            self._freed.notify_all()  # a store that waits for room looks again
        return found

    def pin(self, keys: Sequence[bytes]) -> list[Pins]:
        """Pin records against eviction.

        Raises:
            BlockNotFoundError: a key is not held; nothing was pinned.
        """
        with self.lock:
            entries = self.find(keys)
            for entry in entries:
                self._pin(entry, 1)
            return [entry.pins for entry in entries]

    def unpin(self, held: Iterable[Pins]) -> None:
        """Undo `pin`."""
        with self.lock:
            for pins in held:
                if pins.entry is not None:
                    self._pin(pins.entry, -1)
                else:
                    pins.count -= 1
            self._freed.notify_all()

    def held(self) -> Held:
        """What is held now."""
        with self.lock:
            return Held(len(self._entries), self._raw_bytes, self._record_bytes, self._pinned)

    def check_open(self) -> None:
        """Raise `ConfigError` when the index is closed."""
        if self._why_closed:
            raise ConfigError(self._why_closed)

    @property
    def closed(self) -> bool:
        """Whether it takes no more stores and loads."""
        return bool(self._why_closed)

    def close(self) -> bool:
        """Forget all records, once the loads under way have ended. False when it was closed before."""
        with self.lock:
            if self._why_closed:
                return False
            self._why_closed = "the engine is closed: make a new one"  # no load begins from here on
            self._wait(lambda: self._loads == 0)
            for key in list(self._entries):
                self._remove(key, evicted=False)
            return True

    def idle_after_fork(self) -> bool:
        """In a forked child: whether no other thread was using the records when the process forked."""
        if not self.lock.acquire(blocking=False):
            return False
        self.lock.release()
        return self._loads == 0

    def abandon(self, why: str) -> None:
        """In a forked child: hold nothing any more, and touch neither the pool nor a lock of the parent's threads."""
        self.lock = threading.RLock()
        self._freed = threading.Condition(self.lock)
        self._waiting = 0
        self._why_closed = why
        for entry in self._entries.values():
            entry.pins.entry = None
        self._entries = {}
        self._raw_bytes = self._record_bytes = self._pinned = self._leavable = self._loads = 0

    def _wait(self, until: Callable[[], bool], timeout_seconds: float | None = None) -> None:
        """Wait for records that are freed, or at most for so long; the lock is held."""
        self._waiting += 1
        try:
            self._freed.wait_for(until, timeout_seconds)
        finally:
            self._waiting -= 1

    def _count(self, entry: Entry, sign: int) -> None:
        """Add an entry to the sums, or take it out."""
        self._raw_bytes += sign * entry.contents.raw_bytes
        self._record_bytes += sign * entry.allocation.nbytes
        self._pinned += sign * (entry.pins.count > 0)
        self._leavable += sign * (0 if entry.protected else entry.allocation.extent_nbytes)

    def _pin(self, entry: Entry, change: int) -> None:
        """Change the pins of an entry, which may have left the index."""
        was_protected, was_pinned = entry.protected, entry.pins.count > 0
        entry.pins.count += change
        if entry.pins.entry is entry:
            self._pinned += (entry.pins.count > 0) - was_pinned
            if entry.protected != was_protected:
                self._leavable += entry.allocation.extent_nbytes if was_protected else -entry.allocation.extent_nbytes

    def _evict(self, key: bytes) -> None:
        self._remove(key, evicted=True)
        self.evicted += 1

    def _remove(self, key: bytes, *, evicted: bool) -> None:
        """Take a record out of the index."""
        entry = self._entries.pop(key)
        self._count(entry, -1)
        entry.pins.entry = None
        self._policy.remove(key, evicted=evicted)
        self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        """Free a record that leaves the index, now or when its last load ends."""
        entry.dropped = True
        self._release(entry)

    def _release(self, entry: Entry) -> None:
        if entry.dropped and not entry.freed and entry.loads == 0:
            entry.freed = True
            if not self.pool.closed:  # by its owner, before the engine was
                self.pool.free(entry.allocation)
