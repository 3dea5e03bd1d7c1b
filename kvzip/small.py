# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Small transfers between one GPU and host memory: each is queued whole by one native call, in the caller's thread.

No worker takes part, no copy engine, and no host step between the kernels: a kernel of few thread blocks carries the
records between the arena and mapped host memory. All transfers of a direction run in one stream and share its device
memory; each has a ticket with tables of its own in host memory until its results were read.

What depends on the layout alone is kept in plans, so that a call costs microseconds.
"""

from __future__ import annotations

import abc
import contextlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip import _native
from kvzip.backends.base import EncodeRequest
from kvzip.bounds import PageBounds
from kvzip.driver import RECORD_ALIGNMENT, DecodeArgs, Driver, EncodeArgs, FewArgs, MoveArgs, SwapCall
from kvzip.errors import KvzipError
from kvzip.memory import MemoryResource
from kvzip.record import ENTRY_DTYPE, header_nbytes
from kvzip.staging import ChannelTables, DeviceMemory, Fields, Staging
from kvzip.transport import Records, Run
from kvzip.types import BlockView

TICKETS = 16  # transfers of a direction under way
TICKET_BYTES = 64 << 10  # host memory of each, for block numbers, sizes and segment tables
MOST_RUNS = 512  # of host memory, for one transfer (csrc/cuszp/kvz.h)
MOST_BLOCKS = 512  # of one transfer
MOST_PLANS = 256
PLANS_BYTES = 1 << 20  # device memory of their descriptors
RUN_DTYPE = np.dtype([("start", "<u8"), ("address", "<u8"), ("bytes", "<u8")])

_U32, _U64 = np.dtype(np.uint32), np.dtype(np.uint64)


@lru_cache(maxsize=256)
def _store_fields(pages: int, blocks: int) -> Fields:
    """What the host gives to a store (up to the status), and what comes back (from the status on)."""
    return Fields(
        words=(_U64, blocks),  # numbers of the blocks
        runs=(RUN_DTYPE, MOST_RUNS),
        ends=(_U32, blocks),
        status=(_U32, 4),
        payload_bytes=(_U64, blocks),
        record_offsets=(_U64, blocks),
        table=(ENTRY_DTYPE, blocks * pages),
        payload_crc32c=(_U32, blocks),
    )


@lru_cache(maxsize=256)
def _load_fields(pages: int, blocks: int) -> Fields:
    """What the host gives to a load, and what comes back (the status).

    The words are numbers of the blocks, addresses of the payloads, their sizes, and the records' places in the arena.
    Tables, numbers and addresses are carried along to the device; the rest is for the kernel that does it.
    """
    return Fields(
        table=(ENTRY_DTYPE, blocks * pages),
        words=(_U64, 4 * blocks),
        payload_crc32c=(_U32, blocks),
        runs=(RUN_DTYPE, MOST_RUNS),
        ends=(_U32, blocks),
        block_status=(_U32, blocks),
    )


@dataclass(eq=False)
class Plan:
    """What transfers of one layout in the same tensors share.

    Attributes:
        keep: objects that the plan was made for; their addresses are its key.
        segments: descriptors of the pages.
        device_segments: the same in device memory.
        header_bytes: bytes of a record before its payload.
        record_bytes: most bytes of a record in the arena.
        extended: what pages may have, to decode them (`kvzip.driver.DecodeArgs`).
        tickets: calls with their memory, by its number and the number of blocks.
        context: what the engine keeps with it.
    """

    keep: tuple[Any, ...]
    segments: npt.NDArray[Any]
    device_segments: int
    header_bytes: int
    record_bytes: int
    extended: int = 0
    tickets: dict[tuple[int, int], Ticket] = field(default_factory=dict)
    context: Any = None


def arena_runs(runs: Sequence[tuple[int, int]], base: int) -> list[Run]:
    """Runs of host memory, by offset from an address and by size, that follow each other in an arena."""
    at, made = 0, []
    for offset, nbytes in runs:
        made.append((at, base + offset, nbytes))
        at += nbytes
    return made


def _set_words(words: memoryview, values: Sequence[int]) -> None:
    """Write numbers into a whole table: faster than an array's assignment where they are few."""
    if len(values) == 1:
        words[0] = values[0]
    else:
        words[:] = array(words.format, values)


@dataclass(eq=False, slots=True)
class Ticket:
    """Host memory of a transfer under way, and the call that is bound to it; the same for many, one at a time.

    Attributes:
        number: of the memory.
        call: queues the work.
        wait: waits for its end, as `kvzip.driver.SwapCall.wait`.
        words: numbers for the kernels. Views are quicker to the touch than arrays where they are short.
        runs: for more than one run of host memory.
        arrays: the results, to be read when `wait` has said so: see `SmallStores` and `SmallLoads`.
        event: recorded behind the work; 0 where a transfer has taken it, or when the work has ended.
    """

    number: int
    call: SwapCall
    wait: Callable[[int, int], bool]
    words: memoryview
    runs: npt.NDArray[Any]
    arrays: tuple[memoryview, ...]
    event: int = 0


class _Direction(abc.ABC):
    """Stream, memory, tickets and plans of one direction. The caller's lock guards it.

    All memory is taken when it is made, so that no call waits for an allocation.
    """

    def __init__(self, device: int, driver: Driver, staging: Staging, resource: MemoryResource) -> None:
        self._device = device
        self._driver = driver
        self._staging = staging
        self._free = list(range(TICKETS - 1, -1, -1))
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._last: Plan | None = None  # that was asked for
        self._plans_end = 0
        self._events: list[int] = []
        with contextlib.ExitStack() as undo:  # a GPU that is full must not get fuller at every try
            self._stream = driver.stream_create()
            undo.callback(driver.stream_destroy, self._stream)
            self._order = driver.event_create()
            undo.callback(driver.event_destroy, self._order)
            self._tables = ChannelTables(driver, self._stream)
            self._memory = DeviceMemory(driver, self._stream)
            undo.callback(self._memory.close)
            self._memory.fit(
                # Records have headers, and begin at multiples of 256: their number is bounded by what a ticket holds.
                arena=staging.small_bytes + TICKET_BYTES + MOST_BLOCKS * 3 * RECORD_ALIGNMENT,
                workspace=driver.workspace_bytes(TICKET_BYTES // ENTRY_DTYPE.itemsize // MOST_BLOCKS, MOST_BLOCKS),
                crc_scratch=8 * MOST_BLOCKS,
                few=driver.few_bytes(),
                meta=TICKET_BYTES,
                segments=PLANS_BYTES,
            )
            self._region = resource.allocate(TICKETS * TICKET_BYTES + PLANS_BYTES)
            self._arena = self._memory.address("arena")
            undo.pop_all()

    def _find(self, *keep: object) -> Plan | None:
        """The plan that was made for these objects."""
        self._last = found = self._plans.get(tuple(map(id, keep)))
        return found

    def _new_plan(
        self,
        key: tuple[int, ...],
        keep: tuple[Any, ...],
        blocks: BlockView,
        bounds: PageBounds,
        segments: npt.NDArray[Any],
        extended: int = 0,
    ) -> Plan | None:
        """A new plan; None while there is no room for one and transfers are under way."""
        size = -(-segments.nbytes // 16) * 16
        if size > PLANS_BYTES:
            return None
        full = len(self._plans) >= MOST_PLANS or self._plans_end + size > PLANS_BYTES
        if full or not self._tables.fit(bounds):
            if len(self._free) < TICKETS:
                return None
            self._plans.clear()
            self._last = None
            self._tables.clear()
            self._plans_end = 0
        self._tables.place(bounds, segments)
        at, host = self._plans_end, TICKETS * TICKET_BYTES + self._plans_end
        self._plans_end += size
        self._region.array[host : host + segments.nbytes] = segments.view(np.uint8)
        address = self._memory.address("segments") + at
        self._driver.mapped_copy(address, self._region.address + host, size, self._stream)
        header = header_nbytes(blocks.layout)
        record = -(-(header + blocks.layout.padded_nbytes) // RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        made = Plan(keep, segments, address, header, record, extended)
        self._plans[key] = made
        return made

    @staticmethod
    @abc.abstractmethod
    def fits(pages: int, blocks: int) -> bool:
        """Whether a ticket has room for the tables."""

    @abc.abstractmethod
    def _bind(self, plan: Plan, number: int, blocks: int) -> Ticket:
        """The ticket for so many blocks, with the memory of this number."""

    def _ticket_memory(self, number: int) -> tuple[npt.NDArray[np.uint8], int]:
        at = number * TICKET_BYTES
        return self._region.array[at : at + TICKET_BYTES], self._region.address + at

    def _begin(self, plan: Plan, blocks: int, runs: int) -> Ticket | None:
        """A free ticket, for `_queue` to take; None if there is none, or the transfer is too large."""
        if not self._free or runs > MOST_RUNS:
            return None
        return plan.tickets.get((self._free[-1], blocks)) or self._new_ticket(plan, self._free[-1], blocks)

    def _new_ticket(self, plan: Plan, number: int, blocks: int) -> Ticket | None:
        if not self.fits(len(plan.segments), blocks):
            return None
        memory, workspace = self._memory, self._driver.workspace_bytes(len(plan.segments), blocks)
        if blocks * plan.record_bytes > memory.size("arena") or workspace > memory.size("workspace"):
            return None
        ticket = plan.tickets[number, blocks] = self._bind(plan, number, blocks)
        return ticket

    def _queue(self, ticket: Ticket, runs: int, address: int, nbytes: int, after: int) -> None:
        """Queue the work; `ticket.runs` says where more than one run lies, else it is this one."""
        try:
            ticket.event = event = self._events.pop() if self._events else self._driver.event_create()
            ticket.call(after, event, runs, address, nbytes)
            self._free.pop()
        except BaseException:
            self.give_up(ticket)
            raise

    def give_up(self, ticket: Ticket) -> None:
        """Give a ticket back whose work the device may have: wait for it. Blocks the host."""
        with contextlib.suppress(KvzipError):
            self._driver.stream_synchronize(self._stream)
        if ticket.number in self._free:  # it was not taken yet
            self._free.remove(ticket.number)
        self.end(ticket)

    def end(self, ticket: Ticket) -> None:
        """Give a ticket back, once its work has ended and its arrays were read."""
        try:
            self._free.append(ticket.number)
        finally:
            if ticket.event:
                self._events.append(ticket.event)
                ticket.event = 0

    def close(self) -> None:
        """Wait for the device and free everything, also where the device fails meanwhile. Blocks the host."""
        self._plans.clear()
        self._last = None
        with contextlib.ExitStack() as each:
            each.callback(self._driver.stream_destroy, self._stream)
            each.callback(self._region.close)
            each.callback(self._memory.close)
            each.callback(self._tables.clear)
            for event in (self._order, *self._events):
                each.callback(self._driver.event_destroy, event)
            self._events.clear()
            self._driver.stream_synchronize(self._stream)


class SmallStores(_Direction):
    """The way out. A ticket's arrays: status, payload_bytes, payload_crc32c, and all tables as bytes."""

    def plan_for(self, blocks: BlockView, codec: object, request: EncodeRequest) -> Plan | None:
        """The plan for views that share their tensors and layout with `blocks`, if there is one."""
        last = self._last
        if last is not None:  # a swap asks for the same again and again
            addresses, layout, known, asked = last.keep
            if addresses is blocks.addresses and layout is blocks.layout and codec is known and request is asked:
                return last
        return self._find(blocks.addresses, blocks.layout, codec, request)

    def new_plan(
        self, blocks: BlockView, codec: object, request: EncodeRequest, coding: int | Sequence[int]
    ) -> Plan | None:
        """Make it; None while there is no room for one and transfers are under way."""
        keep = (blocks.addresses, blocks.layout, codec, request)
        segments = _native.segments_array(blocks, request.bound, coding)
        return self._new_plan(tuple(map(id, keep)), keep, blocks, request.bound, segments)

    @staticmethod
    def fits(pages: int, blocks: int) -> bool:
        """Whether a ticket has room for the tables."""
        return blocks <= MOST_BLOCKS and _store_fields(pages, blocks).nbytes <= TICKET_BYTES

    def store(
        self, plan: Plan, block_ids: npt.NDArray[np.int64], runs: Sequence[tuple[int, int]], base: int, after: int
    ) -> Ticket | None:
        """Queue a store; None if too many are under way, or it is too large in one way or another.

        Args:
            plan: from `plan_for`.
            block_ids: the blocks.
            runs: offset and size of host memory for the records, in the order of the arena; worst case.
            base: the address that the offsets are from.
            after: stream whose queued work comes before.
        """
        numbers = block_ids.tolist()
        ticket = self._begin(plan, len(numbers), len(runs))
        if ticket is not None:
            _set_words(ticket.words, numbers)
            if len(runs) > 1:
                ticket.runs[: len(runs)] = arena_runs(runs, base)
            offset, nbytes = runs[0]
            self._queue(ticket, len(runs), base + offset, nbytes, after)
        return ticket

    def _bind(self, plan: Plan, number: int, blocks: int) -> Ticket:
        fields = _store_fields(len(plan.segments), blocks)
        host, host_at = self._ticket_memory(number)
        memory, device_at = self._memory, self._memory.address("meta")
        first, last = fields.offset("status"), fields.offset("payload_crc32c")
        encode = EncodeArgs(
            segments=plan.segments,
            device_segments=plan.device_segments,
            block_ids=fields.address(host_at, "words"),
            num_blocks=blocks,
            arena=memory.address("arena"),
            arena_bytes=memory.size("arena"),
            header_bytes=plan.header_bytes,
            table=fields.address(device_at, "table"),
            payload_bytes=fields.address(device_at, "payload_bytes"),
            record_offsets=fields.address(device_at, "record_offsets"),
            status=fields.address(device_at, "status"),
            workspace=memory.address("workspace"),
            workspace_bytes=memory.size("workspace"),
            max_ctas=self._staging.max_ctas,
        )
        move = MoveArgs(
            arena=memory.address("arena"),
            record_offsets=fields.address(device_at, "record_offsets"),
            payload_bytes=fields.address(device_at, "payload_bytes"),
            checked_bytes=0,
            crc32c=fields.address(host_at, "payload_crc32c"),
            scratch=memory.address("crc_scratch"),
            runs=fields.address(host_at, "runs"),
            beside_to=host_at + first,
            beside_from=device_at + first,
            beside_bytes=last - first,
            max_payload_bytes=plan.record_bytes - plan.header_bytes,
            num_blocks=blocks,
            header_bytes=plan.header_bytes,
        )
        few = FewArgs(
            memory=memory.address("few"),
            ends=fields.address(host_at, "ends"),
            table=fields.address(host_at, "table"),
            block_ids=fields.address(host_at, "words"),
            payload_bytes=fields.address(host_at, "payload_bytes"),
            status=fields.address(host_at, "status"),
        )
        names = ("status", "payload_bytes", "payload_crc32c")
        table = fields.array(host, "table").view(np.uint8)
        call = self._driver.store_call(encode, move, few, self._order, self._device, self._stream)
        return Ticket(
            number,
            call,
            call.wait,
            fields.array(host, "words").data,
            fields.array(host, "runs"),
            (*(fields.array(host, name).data for name in names), table.data),
        )


class SmallLoads(_Direction):
    """The way in. A ticket's arrays: block_status as bytes, four a block; what follows is its own."""

    def plan_for(self, blocks: BlockView, contents: object) -> Plan | None:
        """The plan for views that share their tensors and layout with `blocks`, and records of these contents."""
        last = self._last
        if last is not None:
            addresses, layout, known, _ = last.keep
            if addresses is blocks.addresses and layout is blocks.layout and contents is known:
                return last
        return self._find(blocks.addresses, blocks.layout, contents)

    def new_plan(self, blocks: BlockView, contents: object, view: BlockView, extended: int) -> Plan | None:
        """Make it; None while there is no room for one and transfers are under way.

        Args:
            blocks: what `plan_for` is asked for.
            contents: the same.
            view: `blocks` with the groups and the bounds that the records were encoded with.
            extended: what their pages may have (`kvzip.driver.DecodeArgs`).
        """
        keep = (blocks.addresses, blocks.layout, contents, view.bounds)
        segments = _native.segments_array(view)
        return self._new_plan(tuple(map(id, keep[:3])), keep, view, view.bounds, segments, extended)

    @staticmethod
    def fits(pages: int, blocks: int) -> bool:
        """Whether a ticket has room for the tables."""
        return blocks <= MOST_BLOCKS and _load_fields(pages, blocks).nbytes <= TICKET_BYTES

    def load(self, plan: Plan, block_ids: npt.NDArray[np.int64], records: Records, after: int) -> Ticket | None:
        """Queue a load; None if too many are under way, or it is too large in one way or another.

        Args:
            plan: from `plan_for`.
            block_ids: the blocks.
            records: where they lie and what is known of them.
            after: stream whose queued work comes before.
        """
        numbers = block_ids.tolist()
        runs = records.runs
        ticket = self._begin(plan, len(numbers), len(runs))
        if ticket is not None:
            base, offsets = self._arena + plan.header_bytes, records.offsets
            payloads = [base + offset for offset in offsets]
            _set_words(ticket.words, [*numbers, *payloads, *records.payload_bytes, *offsets])
            _, crcs, table = ticket.arrays
            _set_words(crcs, records.payload_crc32c)
            table[:] = records.tables
            if len(runs) > 1:
                ticket.runs[: len(runs)] = runs
            self._queue(ticket, len(runs), *runs[0][1:], after)
        return ticket

    def load_one(
        self,
        plan: Plan,
        block_ids: npt.NDArray[np.int64],
        address: int,
        nbytes: int,
        payload_bytes: int,
        payload_crc32c: int,
        table: bytes,
        after: int,
    ) -> Ticket | None:
        """`load` of one record that lies in one run: what most of them are where blocks come one by one."""
        ticket = self._begin(plan, 1, 1)
        if ticket is not None:
            _, crcs, entries = ticket.arrays
            _set_words(ticket.words, (*block_ids.tolist(), self._arena + plan.header_bytes, payload_bytes, 0))
            crcs[0] = payload_crc32c
            entries[:] = table
            self._queue(ticket, 1, address, nbytes, after)
        return ticket

    def _bind(self, plan: Plan, number: int, blocks: int) -> Ticket:
        fields = _load_fields(len(plan.segments), blocks)
        host, host_at = self._ticket_memory(number)
        memory, device_at = self._memory, self._memory.address("meta")
        part = 8 * blocks  # bytes of a quarter of the words
        words, device_words = fields.address(host_at, "words"), fields.address(device_at, "words")
        decode = DecodeArgs(
            segments=plan.segments,
            device_segments=plan.device_segments,
            block_ids=device_words,
            num_blocks=blocks,
            payloads=device_words + part,
            payload_bytes=device_words + 2 * part,
            table=fields.address(device_at, "table"),
            block_status=fields.address(host_at, "block_status"),
            workspace=memory.address("workspace"),
            workspace_bytes=memory.size("workspace"),
            max_ctas=self._staging.max_ctas,
            extended=plan.extended,
        )
        move = MoveArgs(
            arena=memory.address("arena"),
            record_offsets=words + 3 * part,
            payload_bytes=words + 2 * part,
            checked_bytes=device_words + 2 * part,
            crc32c=fields.address(host_at, "payload_crc32c"),
            scratch=memory.address("crc_scratch"),
            runs=fields.address(host_at, "runs"),
            beside_to=device_at,
            beside_from=host_at,
            beside_bytes=fields.offset("words") + 2 * part,
            max_payload_bytes=plan.record_bytes - plan.header_bytes,
            num_blocks=blocks,
            header_bytes=plan.header_bytes,
        )
        few = FewArgs(
            memory=memory.address("few"),
            ends=fields.address(host_at, "ends"),
            table=fields.address(host_at, "table"),
            block_ids=words,
        )
        status = fields.array(host, "block_status").view(np.uint8)
        call = self._driver.load_call(decode, move, few, self._order, self._device, self._stream)
        return Ticket(
            number,
            call,
            call.wait,
            fields.array(host, "words").data,
            fields.array(host, "runs"),
            (status.data, fields.array(host, "payload_crc32c").data, fields.array(host, "table").view(np.uint8).data),
        )
