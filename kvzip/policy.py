# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Which record leaves the pool first: the contract of an eviction policy, and `LRU`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from kvzip.errors import ConfigError

__all__ = ["LRU", "EvictionPolicy", "make_policy"]


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
        self._order.move_to_end(key)

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


_POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU}


def make_policy(policy: str | EvictionPolicy) -> EvictionPolicy:
    """A policy by name, or the given object itself.

    Args:
        policy: a name (``"lru"``), or an object that keeps the contract of `EvictionPolicy`.

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
