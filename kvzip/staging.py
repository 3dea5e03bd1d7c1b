# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What the pipelines of both directions are made of (`kvzip.transport`): staging memory, chunks, and steps.

A chunk of a batch needs an arena, for its records, and a *slot*, which has its tables and events. A pipeline owns a few
of each; one that is still in use holds the next chunk back: staging memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.bounds import PageBounds
from kvzip.driver import Driver
from kvzip.memory import MemoryResource, Region
from kvzip.types import BlockLayout, BlockView, ChannelBounds, ErrorBound

MOST_KNOWN = 64  # descriptors of pages that a pipeline keeps
MOST_TABLES = 1024  # channel tables of a direction on a device, unless one request has more
SPIN_US = 50
MOST_BEGUN = 64  # blocks whose records a load looks up before the first copy

T = TypeVar("T")


class Wait(NamedTuple):
    """What a step waits for.

    Attributes:
        event: an event; 0 = for nothing.
        spin_us: how long a wait for the event spins, before it only looks now and then.
        blocks: the next step may block for long, as for memory: it is not for a thread of the caller.
        until: waits, as `Driver.event_wait` does for an event, for something else that can be called again.
    """

    event: int = 0
    spin_us: int = 0
    blocks: bool = False
    until: Callable[[int, int], bool] | None = None


Steps: TypeAlias = Generator[Wait, None, T]
HAND_OVER = Wait()  # the device has work: whoever comes first goes on
BLOCKS = Wait(blocks=True)


@dataclass(frozen=True)
class Staging:
    """Bounds of a transfer's memory and of its use of the GPU.

    Attributes:
        chunk_bytes: raw bytes of one chunk. A block that is larger is a chunk by itself.
        slots: chunks in device memory at a time, for each direction.
        max_ctas: most thread blocks of a codec kernel at a time; 0 = as many as fit. Fewer leave more of the GPU to the
            model.
        small_bytes: most raw bytes of a transfer that is queued whole in the caller's thread, without a worker and
            without the copy engine; 0 = none.
    """

    chunk_bytes: int = 64 << 20
    slots: int = 3
    max_ctas: int = 0
    small_bytes: int = 8 << 20


@lru_cache(maxsize=64)
def chunk_bounds(blocks: int, largest: int) -> list[tuple[int, int]]:
    """Cut a batch that is stored into chunks: a short one first, so that the link need not wait, then twice as long.

    Args:
        blocks: blocks of the batch.
        largest: most blocks of a chunk.
    """
    eighth, quarter, half = (max(1, largest // n) for n in (8, 4, 2))
    up = [quarter, quarter, half]
    left = blocks - sum(up)
    rest = left % largest
    if half + rest <= largest:  # no chunk for what is left over
        up, rest = [quarter, quarter, half + rest], 0
    sizes = [*up, *[largest] * (left // largest), *[rest] * (rest > 0)]
    if left < 0:  # few: halves of what is left
        sizes, left = [], blocks
        while left > eighth:
            sizes.append(max(1, min(largest, left // 2)))
            left -= sizes[-1]
        sizes += [left] * (left > 0)
        sizes.reverse()
    return _bounds(sizes)


@lru_cache(maxsize=64)
def tapered_bounds(blocks: int, largest: int) -> list[tuple[int, int]]:
    """Cut a batch that is loaded into chunks which get shorter towards the end.

    What follows the last copy is hidden behind no other: it should be short. Each chunk is about two thirds of the one
    before, so that its copy takes as long as a slow decoder does for that one; a decoder is not faster for less than an
    eighth of the largest. The first one waits for nothing but the look-up of its records: of these it has few.

    Args:
        blocks: blocks of the batch.
        largest: most blocks of a chunk.
    """
    least, left = max(1, largest // 8), blocks
    sizes: list[int] = []
    while left > 0:
        size = min(largest if sizes else min(largest, MOST_BEGUN), max(least, -(-left * 35 // 100)))
        sizes.append(left if left < size + least and left <= largest else size)
        left -= sizes[-1]
    return _bounds(sizes)


def _bounds(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends = list(accumulate(sizes))
    return list(zip([0, *ends], ends, strict=False))


class DeviceMemory:
    """Named pieces of device memory: they grow, never shrink.

    Args:
        driver: device functions.
        stream: stream whose order the first use of new memory follows.
    """

    ZEROED = ("workspace", "crc_scratch", "few")

    def __init__(self, driver: Driver, stream: int) -> None:
        self._driver = driver
        self._stream = stream
        self._taken: dict[str, tuple[int, int]] = {}

    def fits(self, **nbytes: int) -> bool:
        """Whether every piece is large enough."""
        return all(wanted <= self.size(name) for name, wanted in nbytes.items())

    def fit(self, **nbytes: int) -> None:
        """Grow the pieces that are too small. They must not be in use."""
        for name, wanted in nbytes.items():
            if wanted <= self.size(name):
                continue
            self._driver.free(self.address(name))
            self._taken[name] = (0, 0)
            self._taken[name] = (self._driver.malloc(wanted), wanted)
            if name in self.ZEROED:
                self._driver.memset(self.address(name), 0, wanted, self._stream)

    def address(self, name: str) -> int:
        """Address of a piece; 0 before it was needed."""
        return self._taken.get(name, (0, 0))[0]

    def size(self, name: str) -> int:
        """Bytes of it."""
        return self._taken.get(name, (0, 0))[1]

    def close(self) -> None:
        """Free everything; it must not be in use."""
        with ExitStack() as each:
            for address, _ in self._taken.values():
                each.callback(self._driver.free, address)
            self._taken.clear()


class Slot:
    """Staging of one chunk: device memory, tables in pinned host memory, two events."""

    def __init__(self, driver: Driver, resource: MemoryResource, stream: int) -> None:
        self._driver = driver
        self._resource = resource
        self.stream = stream  # of its kernels
        self.memory = DeviceMemory(driver, stream)
        self._region: Region | None = None
        self.kernel_done = driver.event_create()
        try:
            self.copy_done = driver.event_create()
        except BaseException:
            driver.event_destroy(self.kernel_done)
            raise
        self.busy = False
        self.bound: dict[tuple[int, ...], Any] = {}  # calls that know the slot's addresses
        self._segments: object = None  # what stands in front of the tables

    def fits(self, arena_bytes: int, meta_bytes: int, pages: int, blocks: int) -> bool:
        """Whether there is room for a chunk."""
        workspace = self._driver.workspace_bytes(pages, blocks)
        return (
            self._region is not None
            and meta_bytes <= self._region.nbytes
            and self.memory.fits(arena=arena_bytes, workspace=workspace, meta=meta_bytes)
        )

    def fit(self, arena_bytes: int, meta_bytes: int, pages: int, blocks: int) -> None:
        """Grow what is too small for a chunk. The slot must not be in use."""
        needed = {"arena": arena_bytes, "workspace": self._driver.workspace_bytes(pages, blocks), "meta": meta_bytes}
        if not self.memory.fits(**needed):
            self.bound.clear()
            self.memory.fit(**needed)
        if self._region is None or meta_bytes > self._region.nbytes:
            self.bound.clear()
            if self._region is not None:
                self._region.close()
                self._region = None
            self._region = self._resource.allocate(meta_bytes)
            self._segments = None

    def give_segments(self, table: npt.NDArray[Any], segments: npt.NDArray[Any]) -> None:
        """Put descriptors of the pages in front of the tables, where they are not there already."""
        if self._segments is not segments:
            table[:] = segments
            self._segments = segments

    @property
    def arena(self) -> int:
        """Address of the arena."""
        return self.memory.address("arena")

    @property
    def device_meta(self) -> int:
        """Address of the tables in device memory."""
        return self.memory.address("meta")

    @property
    def host_meta(self) -> npt.NDArray[np.uint8]:
        """The pinned tables, uint8."""
        assert self._region is not None
        return self._region.array

    @property
    def host_meta_address(self) -> int:
        """Their address; mapped, so that kernels can read and write there."""
        assert self._region is not None
        return self._region.address

    def close(self) -> None:
        """Free everything; it must not be in use."""
        with ExitStack() as each:
            if self._region is not None:
                each.callback(self._region.close)
            each.callback(self.memory.close)
            for event in (self.kernel_done, self.copy_done):
                each.callback(self._driver.event_destroy, event)


class Arena:
    """Device memory that the records of one chunk pass through on the way in."""

    def __init__(self, driver: Driver, stream: int) -> None:
        self._memory = DeviceMemory(driver, stream)
        self.user: Slot | None = None  # whose kernels read it last

    @property
    def address(self) -> int:
        """Its address; 0 before it was needed."""
        return self._memory.address("arena")

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._memory.size("arena")

    def fit(self, nbytes: int) -> None:
        """Grow it where it is too small. It must not be in use."""
        self._memory.fit(arena=nbytes)

    def close(self) -> None:
        """Free it; it must not be in use."""
        self._memory.close()


class Fields:
    """Lays arrays out one after another in a slot's tables, each at a multiple of 16 bytes."""

    def __init__(self, **fields: tuple[np.dtype[Any], int]) -> None:
        self.nbytes = 0
        self._at: dict[str, tuple[int, np.dtype[Any], int]] = {}
        for name, (dtype, count) in fields.items():
            self._at[name] = (self.nbytes, dtype, count)
            self.nbytes += -(-dtype.itemsize * count // 16) * 16

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._at)

    def array(self, memory: npt.NDArray[np.uint8], name: str) -> npt.NDArray[Any]:
        """A view of one array in the memory that holds them all."""
        at, dtype, count = self._at[name]
        return memory[at : at + dtype.itemsize * count].view(dtype)

    def address(self, base: int, name: str) -> int:
        """Its address, when they begin at `base`."""
        return base + self.offset(name)

    def offset(self, name: str) -> int:
        """Bytes before it."""
        return self._at[name][0]


class ChannelTables:
    """Channel tables on a device, each once.

    They stay until there are `MOST_TABLES`; then whoever uses them lets the device finish and forgets all of them.
    """

    def __init__(self, driver: Driver, stream: int) -> None:
        self._driver = driver
        self._stream = stream
        self._tables: dict[bytes, tuple[int, ChannelBounds]] = {}  # address and what is there, by its digest

    def fit(self, bounds: PageBounds) -> bool:
        """Whether there is room for the tables of these bounds beside those that are here."""
        missing = {table.digest for table in _channel_tables(bounds)} - self._tables.keys()
        return not self._tables or not missing or len(self._tables) + len(missing) <= MOST_TABLES

    def place(self, bounds: PageBounds, segments: npt.NDArray[Any]) -> None:
        """Set the addresses of the tables of descriptors; copies in stream order those that are not here."""
        for page, bound in enumerate((bounds,) * len(segments) if isinstance(bounds, ErrorBound) else bounds):
            if (table := bound.channels) is not None:
                if table.digest not in self._tables:
                    address = self._driver.malloc(table.values.nbytes)
                    try:
                        self._driver.copy(address, table.values.ctypes.data, table.values.nbytes, self._stream)
                    except BaseException:
                        self._driver.free(address)
                        raise
                    self._tables[table.digest] = (address, table)
                segments["channel_bounds"][page] = self._tables[table.digest][0]

    def clear(self) -> None:
        """Free all of them. The device must be done with them."""
        with ExitStack() as each:
            while self._tables:
                each.callback(self._driver.free, self._tables.popitem()[1][0])


def _channel_tables(bounds: PageBounds) -> list[ChannelBounds]:
    each = (bounds,) if isinstance(bounds, ErrorBound) else bounds
    return [bound.channels for bound in each if bound.channels is not None]


class Pipeline:
    """What both directions share: slots in turn, streams of kernels and of copies."""

    KERNEL_STREAMS: ClassVar[int] = 1
    COPY_STREAMS: ClassVar[int] = 1

    def __init__(self, driver: Driver, staging: Staging, resource: MemoryResource, slots: int = 0) -> None:
        self._driver = driver
        self._staging = staging
        self._slots: list[Slot] = []
        with ExitStack() as undo:  # a GPU that is full must not get fuller at every try
            streams: list[int] = []
            kernel_streams = 1 if staging.max_ctas else self.KERNEL_STREAMS  # which bounds one kernel, of one at a time
            for _ in range(kernel_streams + self.COPY_STREAMS):
                streams.append(driver.stream_create())
                undo.callback(driver.stream_destroy, streams[-1])
            self._kernel_streams, self._copies = streams[:kernel_streams], streams[kernel_streams:]
            self._kernels = streams[0]
            for number in range(slots or staging.slots):
                self._slots.append(Slot(driver, resource, streams[number % kernel_streams]))
                undo.callback(self._slots[-1].close)
            undo.pop_all()
        self._turn = 0
        self._known: dict[tuple[Any, ...], tuple[tuple[object, ...], npt.NDArray[Any]]] = {}
        self._tables = ChannelTables(driver, self._kernels)

    def _segments(self, blocks: BlockView, bound: PageBounds | None, coding: int | Sequence[int]) -> npt.NDArray[Any]:
        """Descriptors of the pages; kept, as a swap asks for the same ones again and again."""
        keep, key = self._key(blocks, bound, coding)
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            segments = _native.segments_array(blocks, bound, coding)
            bounds = blocks.bounds if bound is None else bound
            if not self._tables.fit(bounds):
                self.drain()
                self._known.clear()  # which has their addresses
                self._tables.clear()
            self._tables.place(bounds, segments)
            self._known[key] = (keep, segments)
        return self._known[key][1]

    @staticmethod
    def _key(
        blocks: BlockView, bound: PageBounds | None, coding: int | Sequence[int]
    ) -> tuple[tuple[object, ...], tuple[int, ...]]:
        """What descriptors of pages are kept by: objects, and their identities."""
        keep = (blocks.addresses, blocks.layout, blocks.bounds, bound, coding)
        return keep, tuple(map(id, keep))

    def _most_blocks(self, layout: BlockLayout) -> int:
        """Most blocks of a chunk."""
        return max(1, self._staging.chunk_bytes // layout.nbytes)

    def _next_slot(self) -> Slot:
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        return slot

    def drain(self) -> None:
        """Wait until every slot is free: for the streams, as a call that failed may have queued half of its work.

        Blocks the host.
        """
        if not any(slot.busy for slot in self._slots):
            return
        for slot in self._slots:  # even where the device fails: the next transfer asks it anew
            slot.busy = False
        with ExitStack() as each:
            for stream in (*self._copies, *self._kernel_streams):
                each.callback(self._driver.stream_synchronize, stream)

    def close(self) -> None:
        """Wait for the device and free everything, also where the device fails meanwhile. Blocks the host."""
        with ExitStack() as each:
            for stream in (*self._copies, *self._kernel_streams):
                each.callback(self._driver.stream_destroy, stream)
            each.callback(self._tables.clear)
            for slot in self._slots:
                each.callback(slot.close)
            self.drain()
