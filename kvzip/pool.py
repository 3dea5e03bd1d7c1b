# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`HostPool`: compressed records of any size in host memory, under one budget of real bytes.

Design
    The pool's memory is cut into *extents* (256 bytes by default). An allocation is a list of *runs* of adjacent
    extents. It is one run whenever a free run is large enough; otherwise it takes the largest free runs first, which
    gives the fewest runs there can be. So what fits by bytes is accepted, however fragmented the pool is: eviction,
    capacity and metrics can all count bytes and nothing else. Nothing is ever moved, because a device may be copying.

    `kvzip.extents` finds the runs: a best fit at a cost that does not grow with the pool.

Fragmentation
    Evicting in the order of storing merges neighbours by itself. Evicting at random does not: a pool of 256 MiB that is
    kept at 99.8 % payload then needs 5 to 11 runs per record. `HostPool.headroom_bytes`, 2 % of the capacity by
    default, is what an evictor should leave free to bring that down to 1.4 to 1.7 at 97.8 % payload, and to nearly 1 in
    pools of a GiB and more (figures: ``bench/results/pool.json``). It is advice, through `HostPool.shortfall_bytes`;
    the pool itself refuses nothing that fits.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from kvzip._process import watch
from kvzip.errors import ConfigError, PoolExhaustedError
from kvzip.extents import START_MASK, FreeRuns, require
from kvzip.memory import MemoryResource, PageableMemory

__all__ = ["Allocation", "HostPool", "PoolStats", "Reservation", "Room"]

Bytes = npt.NDArray[np.uint8]

_MIN_EXTENT_BYTES = 16  # records are aligned to this (docs/reference/format.md)
_MAX_EXTENT_BYTES = 2 << 20  # divides every Region.piece_bytes
_TOP_BYTES = (16 << 20, 4 << 20)  # small rooms are cut from a run of one of these sizes, one behind the other


@dataclass(slots=True, eq=False)
class Allocation:
    """Where the bytes of one record lie in a pool. Made by the pool only, and never changed; two are never equal.

    Attributes:
        runs: ``((offset_bytes, nbytes), ...)`` within the pool, in the order of the record's bytes. Their bytes add up
            to `nbytes`; every offset is a multiple of the pool's extent.
        nbytes: payload bytes, as asked for.
        extent_nbytes: bytes of the budget that it takes: `nbytes` rounded up to extents.
    """

    runs: tuple[tuple[int, int], ...]
    nbytes: int
    extent_nbytes: int
    _pool: object = field(repr=False)


@dataclass(frozen=True)
class PoolStats:
    """Counters of a pool at one moment: current, peak and total.

    Attributes:
        capacity_bytes: the budget, a whole number of extents.
        extent_bytes: bytes of one extent.
        payload_bytes: bytes that the live allocations asked for.
        extent_bytes_used: bytes that they take, rounding to extents included.
        reserved_bytes: bytes promised to reservations and not yet committed, and those of rooms not yet divided.
        free_bytes: what can still be reserved: capacity less used less reserved.
        allocations: live allocations.
        runs: their runs.
        free_runs: runs of free extents (those behind reservations included).
        largest_free_run_bytes: the longest of them.
        peak_payload_bytes: highest `payload_bytes` so far.
        peak_extent_bytes_used: highest `extent_bytes_used` so far.
        peak_occupied_bytes: highest sum of used and reserved bytes so far.
        peak_allocations: highest `allocations` so far.
        total_allocations: allocations ever made.
        total_frees: allocations ever freed.
        total_payload_bytes: payload bytes ever allocated.
        total_runs: runs ever allocated; over `total_allocations` it is the mean number of runs.
        total_refusals: times that the pool was exhausted.
    """

    capacity_bytes: int
    extent_bytes: int
    payload_bytes: int
    extent_bytes_used: int
    reserved_bytes: int
    free_bytes: int
    allocations: int
    runs: int
    free_runs: int
    largest_free_run_bytes: int
    peak_payload_bytes: int
    peak_extent_bytes_used: int
    peak_occupied_bytes: int
    peak_allocations: int
    total_allocations: int
    total_frees: int
    total_payload_bytes: int
    total_runs: int
    total_refusals: int

    @property
    def payload_fraction(self) -> float:
        """Payload bytes over capacity."""
        return self.payload_bytes / self.capacity_bytes


class Reservation:
    """Bytes of a pool's budget that are promised: a later `commit` cannot fail for want of space.

    It reserves bytes, not places, so that holding one does not fragment the pool. A context manager that calls
    `close`. Thread-safe.
    """

    def __init__(self, pool: HostPool, extents: int) -> None:
        self._pool = pool
        self._extents = extents  # guarded by the pool's lock, as is _closed
        self._closed = False

    @property
    def remaining_bytes(self) -> int:
        """Bytes that can still be committed, a whole number of extents."""
        return self._extents * self._pool.extent_bytes

    @property
    def closed(self) -> bool:
        """Whether what was left went back to the pool."""
        return self._closed

    def commit(self, nbytes: SupportsIndex, *, close: bool = False) -> Allocation:
        """Turn reserved bytes into an allocation.

        May be called until the reservation is used up. Each allocation takes whole extents, so a reservation for
        several is the sum of `HostPool.round_up` of each.

        Args:
            nbytes: payload bytes, at least 1; rounded up to extents, not more than `remaining_bytes`.
            close: return what is left to the pool in the same step.

        Raises:
            ConfigError: ``nbytes`` is out of range, or the reservation or the pool is closed. Nothing was changed.
        """
        return self._pool._commit(self, _positive(nbytes, "nbytes"), close)

    def close(self) -> None:
        """Return what was not committed. Calling it again, or after the pool was closed, has no effect."""
        self._pool._close_reservation(self)

    def cancel(self) -> None:
        """The same as `close`: what was committed stays."""
        self.close()

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Reservation({self.remaining_bytes} bytes left{', closed' if self._closed else ''})"


class Room:
    """Extents of a pool with their places, to be divided among records when their sizes are known.

    Bytes can be copied there before. A `Reservation` has no places; an `Allocation` has its size. Made by
    `HostPool.take`; ends with `divide` or `close`. Thread-safe.

    Attributes:
        runs: ``((offset_bytes, nbytes), ...)`` within the pool, whole extents, the longest first.
        nbytes: their bytes.
    """

    __slots__ = ("_pool", "_taken", "nbytes", "runs")

    def __init__(self, pool: HostPool, taken: list[tuple[int, int]], extents: int) -> None:
        extent = pool._extent
        self._pool = pool
        self._taken: list[tuple[int, int]] | None = taken  # guarded by the pool's lock
        self.nbytes = nbytes = extents * extent
        if len(taken) == 1:  # as a rule
            self.runs: tuple[tuple[int, int], ...] = ((taken[0][0] * extent, nbytes),)
        else:
            self.runs = tuple([(start * extent, length * extent) for start, length in taken])

    def split(self, nbytes: int) -> Room:
        """Make a room of the first bytes of this one, which is left with the others.

        Args:
            nbytes: at least 1; rounded up to extents.

        Raises:
            ConfigError: it has fewer bytes or several runs, or was divided or closed before. Nothing was changed.
        """
        return self._pool._split_room(self, _positive(nbytes, "nbytes"))

    def divide(self, sizes: Sequence[int]) -> list[Allocation]:
        """Make allocations of it, one behind the other in the order of `runs`; what is left returns to the pool.

        Args:
            sizes: payload bytes of each, at least 1. Each takes whole extents.

        Raises:
            ConfigError: they do not fit, or the room was divided or closed before. Nothing was changed.
        """
        return self._pool._divide_room(self, sizes)

    def cut(self, nbytes: int) -> Allocation:
        """`divide` for one record, which takes less time."""
        return self._pool._cut_room(self, nbytes)

    def close(self) -> None:
        """Return it to the pool undivided. Has no effect after `divide`, or when the pool is closed."""
        self._pool._close_room(self)


class HostPool:
    """Holds records of any size in one region of host memory; see the module's text for the design.

    All methods are thread-safe; one lock guards the accounting, and bytes are copied outside it. Whoever frees an
    allocation sees to it that nobody still reads or writes it. In the child of a fork a pool of pageable memory goes on
    as a copy; one of pinned memory, or one that another thread was using at that moment, is closed there.

    Args:
        capacity_bytes: the budget. Rounded down to whole extents; that is what is allocated, and what the property
            `capacity_bytes` says. At least one extent.
        extent_bytes: the granule, a power of two from 16 to 2,097,152. Half of it is lost per record on average.
        resource: where the memory comes from; `PageableMemory` where it is None.
        headroom: the fraction of the capacity that `shortfall_bytes` counts as needed besides, to keep records in few
            runs. From 0 to less than 1.

    Raises:
        ConfigError: an argument is out of range, or the resource cannot give that much memory.
    """

    def __init__(
        self,
        capacity_bytes: SupportsIndex,
        *,
        extent_bytes: SupportsIndex = 256,
        resource: MemoryResource | None = None,
        headroom: float = 0.02,
    ) -> None:
        extent = _positive(extent_bytes, "extent_bytes")
        if extent & (extent - 1) or not _MIN_EXTENT_BYTES <= extent <= _MAX_EXTENT_BYTES:
            raise ConfigError(
                f"extent_bytes={extent} must be a power of two from {_MIN_EXTENT_BYTES} to {_MAX_EXTENT_BYTES}"
            )
        extents = _positive(capacity_bytes, "capacity_bytes") // extent
        if not 1 <= extents <= START_MASK:
            raise ConfigError(
                f"capacity_bytes={operator.index(capacity_bytes)} must be from one to {START_MASK} extents of "
                f"{extent} bytes: give a larger capacity or smaller extents"
            )
        if not 0 <= headroom < 1:
            raise ConfigError(f"headroom={headroom} must be a fraction of the capacity, from 0 to less than 1")
        self._extent = extent
        self._extents = extents
        self._headroom = int(extents * headroom)
        self._region = (PageableMemory() if resource is None else resource).allocate(extents * extent)
        if self._region.nbytes != extents * extent or self._region.piece_bytes % extent:
            self._region.close()
            raise ConfigError(
                f"{resource!r} gave {self._region.nbytes} bytes in pieces of {self._region.piece_bytes}, not "
                f"{extents * extent} bytes in pieces of a multiple of {extent}: see MemoryResource for the contract"
            )
        self._bytes: Bytes | None = self._region.array
        self._address = self._region.address
        self._lock = threading.Lock()
        self._free = FreeRuns(extents, self._region.piece_bytes // extent)
        self._live: set[Allocation] = set()
        self._token = object()  # says whose an allocation is, without a reference cycle
        self._rooms: set[Room] = set()
        self._top = (0, 0)  # start and length of a free run that small rooms are cut from; outside of _free
        self._reserved = 0  # extents, rooms included, as _used and _peak_occupied
        self._used = 0
        self._payload = 0
        self._runs = 0
        self._peak_payload = self._peak_used = self._peak_occupied = self._peak_allocations = 0
        self._total_allocations = self._total_payload = self._total_runs = self._total_refusals = 0
        watch(self)

    @property
    def capacity_bytes(self) -> int:
        """The budget: bytes of memory that the pool has, a whole number of extents."""
        return self._extents * self._extent

    @property
    def extent_bytes(self) -> int:
        """Bytes of one extent."""
        return self._extent

    @property
    def free_bytes(self) -> int:
        """Bytes that can still be reserved or allocated, at this moment."""
        with self._lock:
            return self._free_bytes()

    @property
    def headroom_bytes(self) -> int:
        """Bytes that an evictor should leave free, to keep records in few runs."""
        return self._headroom * self._extent

    @property
    def address(self) -> int:
        """Address of the pool's first byte; a run lies at this plus its offset.

        Raises:
            ConfigError: the pool is closed.
        """
        if self._bytes is None:
            self._memory()
        return self._address

    @property
    def pinned(self) -> bool:
        """Whether devices can copy from and to the pool directly and asynchronously."""
        return self._region.pinned

    @property
    def piece_bytes(self) -> int:
        """Bytes that are registered with CUDA at a time: no copy may cross a multiple of it, counted from `address`."""
        return self._region.piece_bytes

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._bytes is None

    def round_up(self, nbytes: SupportsIndex) -> int:
        """Bytes of the budget that an allocation of ``nbytes`` bytes takes."""
        return -(-operator.index(nbytes) // self._extent) * self._extent

    def shortfall_bytes(self, nbytes: SupportsIndex) -> int:
        """Bytes that an evictor should free before ``nbytes`` bytes are reserved, the headroom included.

        The headroom gives way where the capacity cannot hold both. More than 0 does not mean that a reservation would
        fail: compare with `free_bytes` for that.
        """
        wanted = min(self.round_up(nbytes) + self.headroom_bytes, max(self.round_up(nbytes), self.capacity_bytes))
        return max(0, wanted - self.free_bytes)

    def reserve(self, nbytes: SupportsIndex) -> Reservation:
        """Promise ``nbytes`` bytes, rounded up to extents.

        Args:
            nbytes: 0 or more. For several allocations: the sum of `round_up` of each.

        Raises:
            PoolExhaustedError: fewer bytes are free. Nothing was changed.
            ConfigError: ``nbytes`` is negative, or the pool is closed.
        """
        wanted = operator.index(nbytes)
        if wanted < 0:
            raise ConfigError(f"nbytes={wanted} must not be negative")
        with self._lock:
            self._memory()
            return Reservation(self, self._reserve(wanted))

    def allocate(self, nbytes: SupportsIndex) -> Allocation:
        """Allocate ``nbytes`` bytes. Their contents are whatever was there before.

        Args:
            nbytes: payload bytes, at least 1.

        Raises:
            PoolExhaustedError: fewer bytes are free. Nothing was changed.
            ConfigError: ``nbytes`` is not positive, or the pool is closed.
        """
        wanted = _positive(nbytes, "nbytes")
        with self._lock:
            self._memory()
            extents = self._reserve(wanted)
            return self._place(wanted, extents)

    def allocate_many(self, sizes: Sequence[int]) -> list[Allocation]:
        """Allocate several at once: next to one another when a free run is long enough, at a fraction of the cost.

        Args:
            sizes: payload bytes of each, at least 1.

        Raises:
            PoolExhaustedError: fewer bytes are free. Nothing was changed.
            ConfigError: a size is not positive, or the pool is closed.
        """
        if not sizes:
            return []
        _positive(min(sizes), "nbytes")
        extent = self._extent
        extents = sum(-(-nbytes // extent) for nbytes in sizes)
        with self._lock:
            self._memory()
            self._reserve(extents * extent)
            self._settle()
            made, _ = self._cut(self._free.take(extents), sizes)
            self._enter(made)
            return made

    def take(self, nbytes: SupportsIndex) -> Room:
        """Take ``nbytes`` bytes with their places, rounded up to extents; counted as reserved until it is divided.

        Args:
            nbytes: at least 1. For several records: the sum of `round_up` of each.

        Raises:
            PoolExhaustedError: fewer bytes are free. Nothing was changed.
            ConfigError: ``nbytes`` is not positive, or the pool is closed.
        """
        wanted = _positive(nbytes, "nbytes")
        with self._lock:
            self._memory()
            return self._take(self._reserve(wanted))

    def try_take(self, nbytes: int) -> Room | None:
        """`take`; None where fewer bytes are free.

        Raises:
            ConfigError: ``nbytes`` is not positive, or the pool is closed.
        """
        if nbytes < 1:
            _positive(nbytes, "nbytes")
        extents = -(-nbytes // self._extent)
        with self._lock:
            if self._bytes is None:
                self._memory()
            occupied = self._used + self._reserved + extents
            if occupied > self._extents:
                return None
            self._reserved += extents
            if occupied > self._peak_occupied:
                self._peak_occupied = occupied
            start, length = self._top
            if length < extents:
                return self._take(extents)
            self._top = (start + extents, length - extents)  # as a rule
            room = Room(self, [(start, extents)], extents)
            self._rooms.add(room)
            return room

    def free(self, allocation: Allocation) -> None:
        """Return an allocation's extents to the pool. The caller sees to it that no copy of it is under way.

        Raises:
            ConfigError: it was freed before or belongs to another pool, or the pool is closed. Nothing was changed.
        """
        extent = self._extent
        with self._lock:
            self._check_live(allocation)
            self._live.remove(allocation)
            for offset, nbytes in allocation.runs:
                self._free.release(offset // extent, -(-nbytes // extent))
            self._used -= allocation.extent_nbytes // extent
            self._payload -= allocation.nbytes
            self._runs -= len(allocation.runs)

    def write(self, allocation: Allocation, data: Any, offset_bytes: SupportsIndex = 0) -> None:
        """Copy bytes into an allocation.

        Args:
            allocation: where to.
            data: bytes-like, or a NumPy array of any dtype (its bytes in C order). All of it is written.
            offset_bytes: the first byte of the allocation that is written.

        Raises:
            ConfigError: ``data`` does not fit, or is no buffer; or the allocation is not live in this pool. Nothing
                was written.
        """
        source = _as_bytes(data)
        at = operator.index(offset_bytes)
        if at < 0 or at + source.nbytes > allocation.nbytes:
            raise ConfigError(
                f"{source.nbytes} bytes at offset {at} do not fit into an allocation of {allocation.nbytes} bytes"
            )
        done = 0
        for view in self.views(allocation):
            if at < view.nbytes:
                part = min(view.nbytes - at, source.nbytes - done)
                view[at : at + part] = source[done : done + part]
                done += part
                at = 0
                if done == source.nbytes:
                    break
            else:
                at -= view.nbytes

    def read(self, allocation: Allocation) -> Bytes:
        """The allocation's bytes as a read-only uint8 array of `Allocation.nbytes` values.

        It is a view of the pool, without a copy, if the allocation is one run: valid until the allocation is freed.
        Otherwise the runs are gathered into a copy.

        Raises:
            ConfigError: the allocation is not live in this pool, or the pool is closed.
        """
        views = self.views(allocation)
        array = views[0] if len(views) == 1 else np.concatenate(views)
        array.flags.writeable = False
        return array

    def views(self, allocation: Allocation) -> list[Bytes]:
        """The allocation's runs as writable uint8 views of the pool, in order, for scatter and gather.

        They are valid until the allocation is freed. None crosses a multiple of `Region.piece_bytes`.

        Raises:
            ConfigError: the allocation is not live in this pool, or the pool is closed.
        """
        with self._lock:
            self._check_live(allocation)
            memory = self._memory()
        return [memory[offset : offset + nbytes] for offset, nbytes in allocation.runs]

    def stats(self) -> PoolStats:
        """The counters at this moment.

        Raises:
            ConfigError: the pool is closed.
        """
        with self._lock:
            self._memory()
            self._settle()
            return PoolStats(
                capacity_bytes=self.capacity_bytes,
                extent_bytes=self._extent,
                payload_bytes=self._payload,
                extent_bytes_used=self._used * self._extent,
                reserved_bytes=self._reserved * self._extent,
                free_bytes=self._free_bytes(),
                allocations=len(self._live),
                runs=self._runs,
                free_runs=len(self._free),
                largest_free_run_bytes=self._free.largest() * self._extent,
                peak_payload_bytes=self._peak_payload,
                peak_extent_bytes_used=self._peak_used * self._extent,
                peak_occupied_bytes=self._peak_occupied * self._extent,
                peak_allocations=self._peak_allocations,
                total_allocations=self._total_allocations,
                total_frees=self._total_allocations - len(self._live),
                total_payload_bytes=self._total_payload,
                total_runs=self._total_runs,
                total_refusals=self._total_refusals,
            )

    def check(self) -> None:
        """Verify every invariant, for tests and for debugging. Takes time proportional to the number of runs.

        Free and allocated runs tile the pool without gap or overlap, free neighbours are merged, the index of free
        runs agrees with itself, and every counter agrees with the runs.

        Raises:
            AssertionError: an invariant is broken; the message says which.
            ConfigError: the pool is closed.
        """
        with self._lock:
            self._memory()
            self._settle()
            free = sorted(self._free)
            taken = [
                (offset // self._extent, -(-nbytes // self._extent)) for a in self._live for offset, nbytes in a.runs
            ]
            rooms = [run for room in self._rooms for run in room._taken or ()]
            position = 0
            for start, length in sorted(free + taken + rooms):
                require(length > 0, f"the run at extent {start} is empty")
                require(start >= position, f"the run at extent {start} overlaps the one before it")
                require(start == position, f"extents {position} to {start} are neither free nor allocated")
                position = start + length
            require(position == self._extents, f"the runs end at extent {position} of {self._extents}")
            self._free.check()
            for allocation in self._live:
                sizes = [nbytes for _, nbytes in allocation.runs]
                require(sum(sizes) == allocation.nbytes, f"the runs of {allocation} do not add up")
                require(all(n % self._extent == 0 for n in sizes[:-1]), f"a run of {allocation} ends within an extent")
                require(self.round_up(allocation.nbytes) == allocation.extent_nbytes, f"{allocation} is not rounded up")
            require(self._payload == sum(a.nbytes for a in self._live), "payload_bytes is wrong")
            require(self._used == sum(length for _, length in taken), "extent_bytes_used is wrong")
            require(self._runs == len(taken), "runs is wrong")
            in_rooms = sum(length for _, length in rooms)
            require(in_rooms <= self._reserved <= self._extents - self._used, "more is reserved than there is")
            require(self._free.extents == self._extents - self._used - in_rooms, "the free extents do not add up")

    def close(self) -> None:
        """Give the memory back, whatever is still allocated. Any further use is an error.

        Views that are still alive stay readable. The caller sees to it that no device copy is under way. Calling it
        again has no effect.
        """
        with self._lock:
            self._bytes = None
            self._live.clear()
            self._rooms.clear()
        self._region.close()

    def _after_fork(self) -> None:
        """The child of a fork has no pinned memory, and nothing certain where a call was under way."""
        if self.pinned or not self._lock.acquire(blocking=False):
            self._lock = threading.Lock()
            self._bytes = None
        else:
            self._lock.release()

    def _at_exit(self) -> None:
        """Nothing: the system takes the memory back."""

    def __enter__(self) -> HostPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.free_bytes} free"
        return f"HostPool({self.capacity_bytes} bytes, {state}, {'pinned' if self.pinned else 'pageable'})"

    # Everything below expects the lock to be held, but _commit, _close_reservation, _divide_room, _cut_room,
    # _split_room and _close_room, which take it.

    def _free_bytes(self) -> int:
        return (self._extents - self._used - self._reserved) * self._extent

    def _memory(self) -> Bytes:
        memory = self._bytes
        if memory is None:
            raise ConfigError(f"this pool of {self.capacity_bytes} bytes is closed: make a new one")
        return memory

    def _check_live(self, allocation: Allocation) -> None:
        self._memory()
        if allocation not in self._live:
            if allocation._pool is not self._token:
                raise ConfigError(f"the allocation of {allocation.nbytes} bytes belongs to another pool: use that one")
            raise ConfigError(f"the allocation of {allocation.nbytes} bytes was freed before: drop it when freeing it")

    def _reserve(self, nbytes: int) -> int:
        extents = -(-nbytes // self._extent)
        occupied = self._used + self._reserved + extents
        if occupied > self._extents:
            self._total_refusals += 1
            free = self._free_bytes()
            raise PoolExhaustedError(
                f"{nbytes} bytes do not fit: {free} of the pool's {self.capacity_bytes} bytes are free; free or evict "
                "records, or make the pool larger",
                requested=nbytes,
                free=free,
            )
        self._reserved += extents
        if occupied > self._peak_occupied:
            self._peak_occupied = occupied
        return extents

    def _take(self, extents: int) -> Room:
        """A room of extents that are reserved."""
        start, length = self._top
        if length < extents:
            self._settle()
            for nbytes in _TOP_BYTES:
                start, length = self._free.take_run(extents, nbytes // self._extent)
                if length:
                    break
        if length:
            self._top = (start + extents, length - extents)
        room = Room(self, [(start, extents)] if length else self._free.take(extents), extents)
        self._rooms.add(room)
        return room

    def _place(self, nbytes: int, extents: int) -> Allocation:
        """Allocate extents that are reserved, which cannot fail: free runs hold all that is reserved, and more."""
        self._settle()
        allocation = self._allocation(nbytes, self._free.take(extents))
        self._enter([allocation])
        return allocation

    def _allocation(self, nbytes: int, taken: list[tuple[int, int]]) -> Allocation:
        """Extents as runs of bytes, the last one cut to the payload."""
        extent = self._extent
        *whole, (start, _) = taken
        runs = [(first * extent, length * extent) for first, length in whole]
        before = sum(length for _, length in runs)
        runs.append((start * extent, nbytes - before))
        return Allocation(tuple(runs), nbytes, -(-nbytes // extent) * extent, self._token)

    def _cut(
        self, taken: list[tuple[int, int]], sizes: Sequence[int]
    ) -> tuple[list[Allocation], list[tuple[int, int]]]:
        """Allocations one behind the other in runs of extents, which hold them; and what is left of the runs."""
        extent, token, made = self._extent, self._token, []
        if len(taken) == 1:  # as a rule
            start, length = taken[0]
            end = start + length
            for nbytes in sizes:
                needed = -(-nbytes // extent)
                made.append(Allocation(((start * extent, nbytes),), nbytes, needed * extent, token))
                start += needed
            return made, [(start, end - start)] if start < end else []
        taken = taken[::-1]
        start, length = taken.pop()
        for nbytes in sizes:
            needed = -(-nbytes // extent)
            if needed <= length:
                made.append(Allocation(((start * extent, nbytes),), nbytes, needed * extent, token))
            else:
                parts = []
                while needed > length:
                    if length:
                        parts.append((start, length))
                        needed -= length
                    start, length = taken.pop()
                parts.append((start, needed))
                made.append(self._allocation(nbytes, parts))
            start, length = start + needed, length - needed
        if length:
            taken.append((start, length))
        return made, taken

    def _divide_room(self, room: Room, sizes: Sequence[int]) -> list[Allocation]:
        extent, extents, payload = self._extent, 0, 0
        for nbytes in sizes:
            if nbytes < 1:
                _positive(nbytes, "nbytes")
            extents -= -nbytes // extent
            payload += nbytes
        with self._lock:
            if self._bytes is None:
                self._memory()
            taken = room._taken
            if taken is None:
                raise ConfigError("this room was divided or closed before: take another")
            if extents * extent > room.nbytes:
                raise ConfigError(f"{extents * extent} bytes do not fit into a room of {room.nbytes} bytes: take more")
            made, left = self._cut(taken, sizes)
            runs = len(made) if len(taken) == 1 else sum([len(a.runs) for a in made])
            self._account(made, extents, payload, runs)
            self._return_room(room, left)
            return made

    def _cut_room(self, room: Room, nbytes: int) -> Allocation:
        extent = self._extent
        extents = -(-nbytes // extent)
        with self._lock:
            taken = room._taken
            if taken is not None and len(taken) == 1 and 0 < nbytes <= room.nbytes and self._bytes is not None:
                start, length = taken[0]
                made = Allocation(((start * extent, nbytes),), nbytes, extents * extent, self._token)
                self._account((made,), extents, nbytes, 1)
                room._taken = None
                self._rooms.remove(room)
                if extents < length:
                    self._return_run(start + extents, length - extents)
                return made
        return self._divide_room(room, [nbytes])[0]  # in several runs; or it says what is wrong

    def _split_room(self, room: Room, nbytes: int) -> Room:
        extents = -(-nbytes // self._extent)
        with self._lock:
            self._memory()
            if room._taken is None:
                raise ConfigError("this room was divided or closed before: take another")
            if len(room._taken) != 1 or room._taken[0][1] < extents:
                raise ConfigError(
                    f"{extents * self._extent} bytes cannot be split from a room of {room.nbytes} bytes in "
                    f"{len(room._taken)} runs: split fewer from one run"
                )
            start, length = room._taken[0]
            made = Room(self, [(start, extents)], extents)
            self._rooms.add(made)
            left = length - extents
            room._taken = [(start + extents, left)] if left else []
            room.runs = tuple([(first * self._extent, count * self._extent) for first, count in room._taken])
            room.nbytes = left * self._extent
            return made

    def _close_room(self, room: Room) -> None:
        if room._taken is None:  # as a rule it was divided
            return
        with self._lock:
            if room._taken is not None and self._bytes is not None:
                self._return_room(room, room._taken)

    def _return_room(self, room: Room, left: list[tuple[int, int]]) -> None:
        room._taken = None
        self._rooms.remove(room)
        for start, length in left:
            self._return_run(start, length)

    def _return_run(self, start: int, length: int) -> None:
        """Give back extents of a room."""
        self._reserved -= length
        top, rest = self._top
        piece = self._free.piece
        if rest and start + length == top and not (piece and top % piece == 0):
            self._top = (start, length + rest)
        else:
            self._free.release(start, length)

    def _settle(self) -> None:
        """Put the run that small rooms are cut from back among the others."""
        start, length = self._top
        if length:
            self._top = (0, 0)
            self._free.release(start, length)

    def _enter(self, made: list[Allocation]) -> None:
        """Account for allocations of reserved extents."""
        extent_bytes = nbytes = runs = 0
        for allocation in made:
            extent_bytes += allocation.extent_nbytes
            nbytes += allocation.nbytes
            runs += len(allocation.runs)
        self._account(made, extent_bytes // self._extent, nbytes, runs)

    def _account(self, made: Sequence[Allocation], extents: int, nbytes: int, runs: int) -> None:
        """The same, where the sums are known."""
        live = self._live
        live.update(made)
        self._reserved -= extents
        self._used = used = self._used + extents
        self._payload = payload = self._payload + nbytes
        self._runs += runs
        if payload > self._peak_payload:
            self._peak_payload = payload
        if used > self._peak_used:
            self._peak_used = used
        if len(live) > self._peak_allocations:
            self._peak_allocations = len(live)
        self._total_allocations += len(made)
        self._total_payload += nbytes
        self._total_runs += runs

    def _commit(self, reservation: Reservation, nbytes: int, close: bool) -> Allocation:
        with self._lock:
            self._memory()
            if reservation._closed:
                raise ConfigError("this reservation is closed: reserve again")
            extents = -(-nbytes // self._extent)
            if extents > reservation._extents:
                raise ConfigError(
                    f"{nbytes} bytes are more than the {reservation.remaining_bytes} bytes that are left of this "
                    "reservation: reserve the sum of round_up() of all that is to be committed"
                )
            reservation._extents -= extents
            allocation = self._place(nbytes, extents)
            if close:
                self._return(reservation)
            return allocation

    def _close_reservation(self, reservation: Reservation) -> None:
        with self._lock:
            self._return(reservation)

    def _return(self, reservation: Reservation) -> None:
        self._reserved -= reservation._extents
        reservation._extents = 0
        reservation._closed = True


def _positive(value: SupportsIndex, name: str) -> int:
    number = operator.index(value)
    if number < 1:
        raise ConfigError(f"{name}={number} must be at least 1")
    return number


def _as_bytes(data: Any) -> Bytes:
    """The bytes of a buffer or an array, without a copy where it is contiguous."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    try:
        view = memoryview(data)
        return np.frombuffer(view if view.nbytes else b"", dtype=np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ConfigError(
            f"cannot copy from {type(data).__name__} ({error}): give contiguous bytes or an array"
        ) from None
