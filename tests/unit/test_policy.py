# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Eviction policies: the order of LRU, and the registry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvzip.errors import ConfigError
from kvzip.policy import ARC, LRU, S3FIFO, EvictionPolicy, make_policy


class MostRecent:
    """A policy of a third party."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []

    def insert(self, key: bytes, nbytes: int) -> None:
        self.keys.append(key)

    def touch(self, key: bytes) -> None:
        pass

    def remove(self, key: bytes, *, evicted: bool) -> None:
        self.keys.remove(key)

    def victims(self) -> Iterator[bytes]:
        return reversed(self.keys)


def test_lru_yields_the_coldest_first() -> None:
    policy = LRU()
    assert list(policy.victims()) == []
    for key in (b"a", b"b", b"c", b"d"):
        policy.insert(key, 100)
    policy.touch(b"b")
    assert list(policy.victims()) == [b"a", b"c", b"d", b"b"]
    policy.remove(b"c", evicted=True)
    policy.remove(b"a", evicted=False)
    assert list(policy.victims()) == [b"d", b"b"]
    policy.insert(b"a", 100)
    assert list(policy.victims()) == [b"d", b"b", b"a"]
    assert repr(policy) == "LRU(3 keys)"


@pytest.mark.parametrize("kind", [LRU, ARC, S3FIFO])
def test_skipping_and_stopping_changes_nothing(kind: type[LRU]) -> None:
    policy = kind()
    for key in (b"a", b"b", b"c"):
        policy.insert(key, 1)
    victims = policy.victims()
    assert next(victims) == b"a"  # protected: the caller goes on
    assert next(victims) == b"b"
    del victims
    assert list(policy.victims()) == [b"a", b"b", b"c"]


@pytest.mark.parametrize("kind", [LRU, ARC, S3FIFO])
def test_a_key_that_is_not_resident_is_an_error(kind: type[LRU]) -> None:
    policy = kind()
    with pytest.raises(KeyError):
        policy.touch(b"a")
    with pytest.raises(KeyError):
        policy.remove(b"a", evicted=False)


def test_policies_come_by_name_or_as_they_are() -> None:
    assert isinstance(make_policy("lru"), LRU)
    assert isinstance(make_policy("LRU"), EvictionPolicy)
    assert make_policy("lru") is not make_policy("lru")
    policy = MostRecent()
    assert make_policy(policy) is policy
    assert isinstance(make_policy("arc"), ARC)
    assert isinstance(make_policy("s3fifo"), S3FIFO)
    with pytest.raises(ConfigError, match=r"'lfu'.*arc, lru, s3fifo"):
        make_policy("lfu")
    for bad in (None, 3, object(), LRU):
        with pytest.raises(ConfigError, match="insert, touch, remove and victims"):
            make_policy(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "kept"), [(LRU, 0), (ARC, 8), (S3FIFO, 8)])
def test_what_is_used_again_survives_a_scan(kind: type[LRU], kept: int) -> None:
    """Eight keys that are used again and again, then a thousand that are used once, in a pool of 100."""
    policy = kind()
    resident: set[bytes] = set()

    def store(key: bytes) -> None:
        if len(resident) == 100:
            victim = next(policy.victims())
            policy.remove(victim, evicted=True)
            resident.remove(victim)
        policy.insert(key, 10)
        resident.add(key)

    hot = [b"hot-%d" % i for i in range(8)]
    for key in hot:
        store(key)
    for _ in range(3):
        for key in hot:
            policy.touch(key)
    for i in range(1000):
        store(b"once-%d" % i)
    assert len(resident & set(hot)) == kept


def test_ghosts_bring_a_key_back_warmer() -> None:
    arc, s3fifo = ARC(), S3FIFO()
    for policy in (arc, s3fifo):
        for key in (b"a", b"b", b"c"):
            policy.insert(key, 1)
        policy.remove(b"a", evicted=True)
        policy.remove(b"b", evicted=False)
        for key in (b"a", b"b", b"d"):
            policy.insert(key, 1)
    assert repr(arc) == "ARC(3 keys used once, 1 used again)"
    assert repr(s3fifo) == "S3FIFO(3 keys in the small queue, 1 in the main queue)"
