# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Which record leaves the pool first: the contract of an eviction policy, and `LRU`, `ARC` and `S3FIFO`.

`ARC` and `S3FIFO` keep their sizes in bytes, because records differ in size. A policy is not told the pool's capacity:
it takes the most bytes that were resident at a time, which is the capacity once the pool has been full.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from kvzip.errors import ConfigError

__all__ = ["ARC", "LRU", "S3FIFO", "EvictionPolicy", "make_policy"]


@runtime_checkable
class EvictionPolicy(Protocol):
    """Orders the keys of the records in a pool from coldest to hottest.

    The engine tells the policy what happens; the policy only keeps an order. It holds no bytes and frees nothing. The
    contract, for those who write one:

    * **Residents.** `insert` makes a key resident, `remove` ends that. The other calls are made with resident keys
      only, `insert` with keys that are not resident only.
    * **Evicted or discarded.** ``remove(key, evicted=True)`` says that the record left because this policy named it a
      victim: a policy may remember such keys (the ghost lists of ARC and S3-FIFO) and admit them warmer when they
      come back. ``evicted=False`` says that the owner took the record away, or replaced it: forget it.
    * **Sizes.** ``nbytes`` is what the record takes in the pool. A policy may ignore it.
    * **Victims.** `victims` yields every resident key once, the coldest first. It changes nothing: whoever iterates
      may skip a key (it is pinned, or in flight), stop early, or throw the plan away and ask again. An iterator is not
      used any more once `insert`, `touch` or `remove` was called.
    * **Cost.** `insert`, `touch`, `remove` and each step of `victims` should take constant time.
    * **Threads.** None: the engine calls under its own lock. One policy object serves one engine.
    """

    def insert(self, key: bytes, nbytes: int) -> None:
        """A record of ``nbytes`` bytes was stored under ``key``."""
        ...

    def touch(self, key: bytes) -> None:
        """The record under ``key`` was used."""
        ...

    def remove(self, key: bytes, *, evicted: bool) -> None:
        """The record under ``key`` is gone: evicted as a victim, or discarded by its owner."""
        ...

    def victims(self) -> Iterator[bytes]:
        """All resident keys, the coldest first."""
        ...


class LRU:
    """Least recently used first: the order of the last `insert` or `touch`."""

    def __init__(self) -> None:
        self._order: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes, nbytes: int) -> None:
        """Make ``key`` the hottest."""
        self._order[key] = None

    def touch(self, key: bytes) -> None:
        """Make ``key`` the hottest."""
        self._order.move_to_end(key)

    def remove(self, key: bytes, *, evicted: bool) -> None:
        """Forget ``key``."""
        del self._order[key]

    def victims(self) -> Iterator[bytes]:
        """All keys, the one used longest ago first."""
        return iter(self._order)

    def __repr__(self) -> str:
        return f"LRU({len(self._order)} keys)"


class _Queue:
    """Keys with their sizes, the oldest first; every step takes constant time."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def items(self) -> Iterator[tuple[bytes, int]]:
        return iter(self._sizes.items())

    def oldest(self) -> bytes:
        return next(iter(self._sizes))

    def push(self, key: bytes, nbytes: int) -> None:
        self._sizes[key] = nbytes
        self.nbytes += nbytes

    def remove(self, key: bytes) -> int:
        nbytes = self._sizes.pop(key)
        self.nbytes -= nbytes
        return nbytes

    def renew(self, key: bytes) -> None:
        """Make a key the newest."""
        self._sizes.move_to_end(key)

    def trim(self, most_bytes: float) -> None:
        """Drop the oldest until no more than so many bytes are left."""
        while self._sizes and self.nbytes > most_bytes:
            self.remove(self.oldest())


class ARC:
    """Adaptive replacement cache: the balance of recency and frequency follows what was evicted too early.

    Two lists of residents, used once and used again, and the ghosts (keys without records) of what left each. A ghost
    that comes back says that its list was too short, and moves the target between them.

    Source: N. Megiddo and D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003. It differs in
    that a victim is chosen before the key is known that needs the room, so the target moves after the eviction. Memory:
    ghosts of as many bytes of records as the pool holds.
    """

    def __init__(self) -> None:
        self._once, self._again = _Queue(), _Queue()  # T1 and T2 of the paper
        self._once_ghosts, self._again_ghosts = _Queue(), _Queue()  # B1 and B2
        self._target = 0.0  # bytes for `_once`; p of the paper
        self._capacity = 0

    def insert(self, key: bytes, nbytes: int) -> None:
        """Make ``key`` resident: used once, or used again when it is a ghost, which also moves the target."""
        once, again = self._once_ghosts.nbytes, self._again_ghosts.nbytes
        if key in self._once_ghosts:
            self._target += nbytes * max(1.0, again / max(1, once))
            self._once_ghosts.remove(key)
            self._again.push(key, nbytes)
        elif key in self._again_ghosts:
            self._target -= nbytes * max(1.0, once / max(1, again))
            self._again_ghosts.remove(key)
            self._again.push(key, nbytes)
        else:
            self._once.push(key, nbytes)
        self._capacity = max(self._capacity, self._once.nbytes + self._again.nbytes)
        self._target = min(max(self._target, 0.0), float(self._capacity))
        self._trim()

    def touch(self, key: bytes) -> None:
        """Make ``key`` the newest of those used again."""
        if key in self._once:
            self._again.push(key, self._once.remove(key))
        else:
            self._again.renew(key)

    def remove(self, key: bytes, *, evicted: bool) -> None:
        """Forget ``key``, or keep its ghost when it was evicted."""
        residents, ghosts = (self._once, self._once_ghosts) if key in self._once else (self._again, self._again_ghosts)
        nbytes = residents.remove(key)
        if evicted:
            ghosts.push(key, nbytes)
            self._trim()

    def victims(self) -> Iterator[bytes]:
        """The oldest of the list that is above its target, again and again."""
        once, again = self._once.items(), self._again.items()
        left = self._once.nbytes
        first, second = next(once, None), next(again, None)
        while first is not None or second is not None:
            if first is not None and (left > self._target or second is None):
                left -= first[1]
                yield first[0]
                first = next(once, None)
            elif second is not None:
                yield second[0]
                second = next(again, None)

    def _trim(self) -> None:
        self._once_ghosts.trim(self._capacity - self._once.nbytes)
        known = self._once.nbytes + self._again.nbytes + self._once_ghosts.nbytes
        self._again_ghosts.trim(2 * self._capacity - known)

    def __repr__(self) -> str:
        return f"ARC({len(self._once)} keys used once, {len(self._again)} used again)"


class S3FIFO:
    """Three queues: records that are not used again soon leave early and make room for those that are.

    New keys enter a small queue of a tenth of the bytes. At its end they leave, unless they were used twice since: then
    they enter the main queue. There a key that was used goes round again, up to three times. Keys that left the small
    queue are remembered, and enter the main queue when they come back.

    Source: J. Yang, Y. Zhang, Z. Qiu, Y. Yue and K. V. Rashmi, "FIFO Queues Are All You Need for Cache Eviction", SOSP
    2023. Memory: ghosts of nine tenths of the bytes of records that the pool holds.
    """

    SMALL = 0.1  # part of the bytes
    MOST_USES = 3

    def __init__(self) -> None:
        self._small, self._main, self._ghosts = _Queue(), _Queue(), _Queue()
        self._uses: dict[bytes, int] = {}
        self._capacity = 0

    def insert(self, key: bytes, nbytes: int) -> None:
        """Make ``key`` the newest of the small queue, or of the main queue when it is a ghost."""
        if key in self._ghosts:
            self._ghosts.remove(key)
            self._main.push(key, nbytes)
        else:
            self._small.push(key, nbytes)
        self._uses[key] = 0
        self._capacity = max(self._capacity, self._small.nbytes + self._main.nbytes)

    def touch(self, key: bytes) -> None:
        """Count a use."""
        self._uses[key] = min(self._uses[key] + 1, self.MOST_USES)

    def remove(self, key: bytes, *, evicted: bool) -> None:
        """Forget ``key``, or remember it when it was evicted from the small queue."""
        if evicted:
            self._settle()
        del self._uses[key]
        if key in self._main:
            self._main.remove(key)
            return
        nbytes = self._small.remove(key)
        if evicted:
            self._ghosts.push(key, nbytes)
            self._ghosts.trim(self._capacity * (1 - self.SMALL))

    def victims(self) -> Iterator[bytes]:
        """The keys in the order in which they would leave, without a further use."""
        small, main = self._small.items(), self._main.items()
        left = self._small.nbytes
        moved: deque[tuple[bytes, int]] = deque()  # behind the main queue: key and uses
        first = next(small, None)
        other = self._next_of_main(main, moved)
        while first is not None or other is not None:
            if first is not None and (other is None or self._is_full(left)):
                key, nbytes = first
                left -= nbytes
                if self._uses[key] > 1:
                    moved.append((key, 0))
                else:
                    yield key
                first = next(small, None)
                other = other or self._next_of_main(main, moved)
            elif other is not None:
                key, uses = other
                if uses > 0:
                    moved.append((key, uses - 1))
                else:
                    yield key
                other = self._next_of_main(main, moved)

    def _next_of_main(
        self, main: Iterator[tuple[bytes, int]], moved: deque[tuple[bytes, int]]
    ) -> tuple[bytes, int] | None:
        found = next(main, None)
        if found is not None:
            return found[0], self._uses[found[0]]
        return moved.popleft() if moved else None

    def _is_full(self, small_bytes: int) -> bool:
        return small_bytes >= self.SMALL * self._capacity

    def _settle(self) -> None:
        """Do what comes before the first victim: used keys move to the main queue, or go round in it."""
        while True:
            if len(self._small) and (not len(self._main) or self._is_full(self._small.nbytes)):
                key = self._small.oldest()
                if self._uses[key] <= 1:
                    return
                self._main.push(key, self._small.remove(key))
                self._uses[key] = 0
            elif len(self._main):
                key = self._main.oldest()
                if self._uses[key] == 0:
                    return
                self._main.renew(key)
                self._uses[key] -= 1
            else:
                return

    def __repr__(self) -> str:
        return f"S3FIFO({len(self._small)} keys in the small queue, {len(self._main)} in the main queue)"


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"arc": ARC, "lru": LRU, "s3fifo": S3FIFO}


def make_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """A policy by name, or the given object itself.

    Args:
        policy: a name (``"lru"``, ``"arc"``, ``"s3fifo"``), or an object that keeps the contract of `EvictionPolicy`.

    Raises:
        ConfigError: the name is unknown, or the object has not all methods.
    """
    if isinstance(policy, str):
        factory = _POLICIES.get(policy.lower())
        if factory is None:
            raise ConfigError(f"unknown eviction policy {policy!r}: use one of {', '.join(sorted(_POLICIES))}")
        return factory()
    if isinstance(policy, type) or not isinstance(policy, EvictionPolicy):
        raise ConfigError(
            f"{policy!r} is no eviction policy: give an object with insert, touch, remove and victims, or one of the "
            f"names {', '.join(sorted(_POLICIES))}"
        )
    return policy
