# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`RecordCatalog`: which chunks the workers hold as records, counted in the bytes that the records really take.

The scheduler's side of the adapter, without vLLM: keys and sizes, no memory. Every worker has a pool of its own and
holds every record, in its own size; the fullest pool decides.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvzip.errors import ConfigError
from kvzip.policy import EvictionPolicy, make_policy

_RECENT = 256  # records that an estimate looks back on
_ENOUGH = 16  # and how many it needs
_MARGIN = 1.01  # means of many records vary less than this


class State(enum.Enum):
    """What a catalogue knows of a key."""

    MISSING = enum.auto()
    STORING = enum.auto()  # the workers were told to store it, and have not all said that they have
    READY = enum.auto()


@dataclass(eq=False, slots=True)
class Record:
    """One chunk's record, on all workers.

    Attributes:
        number: its name in messages to the workers; never used again.
        group: KV cache group of the chunk.
        charges: bytes of each worker's pool that it counts for: an estimate while it is being stored, then what the
            worker reported.
        ready: whether all workers hold it.
        lost: a worker could not store it.
        loads: loads of it that have not ended.
    """

    number: int
    group: int
    charges: list[int]
    ready: bool = False
    lost: bool = False
    loads: int = 0

    @property
    def protected(self) -> bool:
        """Whether eviction must pass it over."""
        return not self.ready or self.loads > 0


@dataclass(frozen=True)
class StorePlan:
    """What a store shall do.

    Attributes:
        keys: keys that need storing, in the order that was asked.
        numbers: the numbers of their records.
        evicted: keys whose records leave for it.
    """

    keys: tuple[bytes, ...]
    numbers: tuple[int, ...]
    evicted: tuple[bytes, ...]


@dataclass
class CatalogCounts:
    """Totals since the catalogue was made.

    Attributes:
        stored: records that all workers hold, or held.
        evicted: records that left for others.
        lost: records that a worker could not store, or found damaged or missing.
        refused: stores that found no room.
    """

    stored: int = 0
    evicted: int = 0
    lost: int = 0
    refused: int = 0


class RecordCatalog:
    """Counts, admits and evicts records by the bytes that the workers report. Not thread-safe.

    A store in flight is charged with the worst case until the group has some records, and from then on with what it is
    expected to take, the mean of the recent ones and a little more: at the worst case, records that all fit would push
    each other out. A worker's pool has the last word: a record that does not fit there, or that had to leave for one
    that was larger than expected, is reported with size 0 and leaves the catalogue.

    Args:
        capacity_bytes: bytes of one worker's pool.
        workers: number of workers.
        worst_bytes: for each KV cache group, the most bytes of a pool that one record can take.
        group_of: KV cache group of a key.
        policy: name of an eviction policy (``"lru"``), or a policy object.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        capacity_bytes: int,
        workers: int,
        worst_bytes: Mapping[int, int],
        group_of: Callable[[bytes], int],
        policy: str | EvictionPolicy = "lru",
    ) -> None:
        if capacity_bytes < 1 or workers < 1:
            raise ConfigError(f"capacity of {capacity_bytes} bytes for {workers} workers: both must be at least 1")
        self.capacity_bytes = capacity_bytes
        self.counts = CatalogCounts()
        self._worst = dict(worst_bytes)
        self._group_of = group_of
        self._policy = make_policy(policy)
        self._records: dict[bytes, Record] = {}
        self._keys: dict[int, bytes] = {}  # number -> key
        self._used = [0] * workers
        self._protected = [0] * workers  # of `_used`, what may not leave now
        self._recent: dict[int, list[deque[int]]] = {}  # group -> sizes of its records, for each worker
        self._loads_of_gone: Counter[bytes] = Counter()  # loads under way of records that have left
        self._next = 0
        self._first = 0
        self._discards: list[int] = []

    # ---- what is held

    def state(self, key: bytes) -> State:
        """What is known of a key."""
        record = self._records.get(key)
        if record is None or record.lost:
            return State.MISSING
        return State.READY if record.ready else State.STORING

    def __len__(self) -> int:
        return len(self._records)

    @property
    def used_bytes(self) -> tuple[int, ...]:
        """Bytes of each worker's pool that the records count for."""
        return tuple(self._used)

    @property
    def first_number(self) -> int:
        """Records with a smaller number were forgotten by `reset`."""
        return self._first

    def expected_bytes(self, group: int) -> int:
        """Bytes of a pool that the next record of a group is charged with."""
        worst = self._worst[group]
        recent = self._recent.get(group)
        if recent is None or min(map(len, recent)) < _ENOUGH:
            return worst
        return min(worst, int(max(sum(sizes) / len(sizes) for sizes in recent) * _MARGIN))

    def take_discards(self) -> tuple[int, ...]:
        """Numbers of records that the workers have to forget, once."""
        taken, self._discards = tuple(self._discards), []
        return taken

    # ---- stores

    def begin_store(self, keys: Iterable[bytes]) -> StorePlan | None:
        """Make room for the records of these keys; those that are known already need no storing.

        Args:
            keys: in the order of the prompt. What is worth keeping most comes first: where the budget cannot hold
                them all whatever leaves, the first ones are taken.

        Returns:
            The plan, or None when there is no room now; nothing has left then.
        """
        asked = list(keys)
        fresh = [key for key in dict.fromkeys(asked) if key not in self._records]
        expected = {group: self.expected_bytes(group) for group in self._worst}
        costs = [expected[self._group_of(key)] for key in fresh]
        if fresh:
            fresh, costs = _prefix(fresh, costs, self.capacity_bytes)
        victims = self._victims(sum(costs), set(asked)) if fresh else ()
        if victims is None or (asked and not fresh and any(key not in self._records for key in asked)):
            self.counts.refused += 1
            return None
        for key in victims:
            self._remove(key, evicted=True)
            self.counts.evicted += 1
        numbers = []
        for key, cost in zip(fresh, costs, strict=True):
            record = Record(self._next, self._group_of(key), [cost] * len(self._used))
            self._next += 1
            self._records[key] = record
            self._keys[record.number] = key
            numbers.append(record.number)
            self._charge(record, 1)
        return StorePlan(tuple(fresh), tuple(numbers), tuple(victims))

    def report(self, number: int, worker: int, nbytes: int) -> bytes | None:
        """A worker says what a record takes there; 0 = it has none (any more).

        Args:
            number: of the record; unknown ones are passed over.
            worker: index of the worker.
            nbytes: bytes of its pool.

        Returns:
            The key, where it could be loaded until now; else None.
        """
        key = self._keys.get(number)
        if key is None:
            return None
        record = self._records[key]
        if nbytes == 0:
            self.counts.lost += not record.lost
            if record.ready:
                self._remove(key, evicted=False)
                return key
            record.lost = True  # the store is under way elsewhere, and `finish_store` knows it by its key alone
            return None
        change = nbytes - record.charges[worker]
        self._used[worker] += change
        self._protected[worker] += change if record.protected else 0
        record.charges[worker] = nbytes
        if record.group not in self._recent:
            self._recent[record.group] = [deque(maxlen=_RECENT) for _ in self._used]
        self._recent[record.group][worker].append(nbytes)
        return None

    def finish_store(self, keys: Iterable[bytes]) -> list[bytes]:
        """All workers are done with a store; returns the keys that can be loaded now."""
        done = [(key, record) for key in keys if (record := self._records.get(key)) is not None and not record.ready]
        held = []
        # The start of a prompt is what its other chunks need: it gets to be the hottest.
        for key, record in sorted(done, key=lambda item: -item[1].number):
            if record.lost:
                self._remove(key, evicted=False)
                continue
            self._change(record, ready=True)
            self._policy.insert(key, max(record.charges))
            self.counts.stored += 1
            held.append(key)
        return held

    def abandon_store(self, keys: Iterable[bytes]) -> None:
        """A store will not be finished: forget what it was to bring."""
        for key in keys:
            record = self._records.get(key)
            if record is not None and not record.ready:
                self._remove(key, evicted=False)

    # ---- loads

    def begin_load(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """Protect records until `end_load`; returns their numbers.

        A key that is not ready, which a caller that looks first does not ask for, gets a number that no worker holds:
        the load of that chunk fails there, and vLLM computes it.
        """
        asked = list(keys)
        numbers = []
        for key in asked:
            record = self._records.get(key)
            if record is not None and record.ready:
                self._change(record, loads=record.loads + 1)
                numbers.append(record.number)
            else:
                self._loads_of_gone[key] += 1
                numbers.append(self._next)
                self._next += 1
                self.counts.lost += 1
        self.touch(asked)
        return tuple(numbers)

    def end_load(self, keys: Iterable[bytes]) -> None:
        """Undo `begin_load`; the records may have left meanwhile."""
        for key in keys:
            if self._loads_of_gone[key] > 0:
                self._loads_of_gone[key] -= 1
                if not self._loads_of_gone[key]:
                    del self._loads_of_gone[key]
            elif (record := self._records.get(key)) is not None and record.loads > 0:
                self._change(record, loads=record.loads - 1)

    def touch(self, keys: Collection[bytes]) -> None:
        """Records were used; the first of the keys gets to be the hottest."""
        for key in reversed(list(keys)):
            record = self._records.get(key)
            if record is not None and record.ready:
                self._policy.touch(key)

    # ---- all of them

    def reset(self) -> None:
        """Forget everything. The workers learn it from `first_number`."""
        for key, record in self._records.items():
            if record.ready:
                self._policy.remove(key, evicted=False)
        self._records.clear()
        self._keys.clear()
        self._loads_of_gone.clear()
        self._discards.clear()
        self._used = [0] * len(self._used)
        self._protected = [0] * len(self._used)
        self._first = self._next

    def check(self) -> None:
        """Assert that the sums agree with the records; for tests."""
        for worker, used in enumerate(self._used):
            assert used == sum(record.charges[worker] for record in self._records.values())
            protected = [record.charges[worker] for record in self._records.values() if record.protected]
            assert self._protected[worker] == sum(protected)
        assert {record.number: key for key, record in self._records.items()} == self._keys
        assert sorted(self._policy.victims()) == sorted(k for k, r in self._records.items() if r.ready)

    # ---- inner

    def _victims(self, needed: int, keep: Collection[bytes]) -> Sequence[bytes] | None:
        """Keys that have to leave so that every pool has `needed` bytes; None when that cannot be."""
        used = list(self._used)
        victims: list[bytes] = []
        limit = self.capacity_bytes - needed
        if max(used) <= limit:
            return victims
        # A store that is refused costs no walk: that comes again and again while the pool is full of what is loading.
        staying = list(self._protected)
        for key in keep:
            kept = self._records.get(key)
            if kept is not None and not kept.protected:
                staying = [s + c for s, c in zip(staying, kept.charges, strict=True)]
        if max(staying) > limit:
            return None
        for key in self._policy.victims():
            record = self._records[key]
            if record.loads or key in keep:
                continue
            victims.append(key)
            used = [u - c for u, c in zip(used, record.charges, strict=True)]
            if max(used) <= limit:
                return victims
        return None

    def _charge(self, record: Record, sign: int) -> None:
        for worker, nbytes in enumerate(record.charges):
            self._used[worker] += sign * nbytes
            self._protected[worker] += sign * nbytes if record.protected else 0

    def _change(self, record: Record, *, ready: bool = True, loads: int = 0) -> None:
        """Change what protects a record from eviction."""
        self._charge(record, -1)
        record.ready, record.loads = ready, loads
        self._charge(record, 1)

    def _remove(self, key: bytes, *, evicted: bool) -> None:
        record = self._records.pop(key)
        del self._keys[record.number]
        self._charge(record, -1)
        if record.ready:
            self._policy.remove(key, evicted=evicted)
        if record.loads:
            self._loads_of_gone[key] += record.loads
        self._discards.append(record.number)


def _prefix(keys: list[bytes], costs: list[int], capacity: int) -> tuple[list[bytes], list[int]]:
    """As many of the first keys as a pool can hold at all."""
    total = 0
    for count, cost in enumerate(costs):
        total += cost
        if total > capacity:
            return keys[:count], costs[:count]
    return keys, costs
