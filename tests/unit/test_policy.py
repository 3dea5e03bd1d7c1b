# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Eviction policies: the order of LRU, and the registry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvzip.errors import ConfigError
from kvzip.policy import LRU, EvictionPolicy, make_policy


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


def test_skipping_and_stopping_changes_nothing() -> None:
    policy = LRU()
    for key in (b"a", b"b", b"c"):
        policy.insert(key, 1)
    victims = policy.victims()
    assert next(victims) == b"a"  # protected: the caller goes on
    assert next(victims) == b"b"
    del victims
    assert list(policy.victims()) == [b"a", b"b", b"c"]


def test_a_key_that_is_not_resident_is_an_error() -> None:
    policy = LRU()
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
    with pytest.raises(ConfigError, match=r"'arc'.*lru"):
        make_policy("arc")
    for bad in (None, 3, object(), LRU):
        with pytest.raises(ConfigError, match="insert, touch, remove and victims"):
            make_policy(bad)  # type: ignore[arg-type]
