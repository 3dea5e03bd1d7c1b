# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Eviction policies: the contract for any sequence of calls; ARC and S3-FIFO against plain models of their papers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.policy import ARC, LRU, S3FIFO, EvictionPolicy

POLICIES = [LRU, ARC, S3FIFO]
KEYS = [b"%d" % i for i in range(12)]

#: what happens to a key: used (stored when it is not held), discarded, evicted out of turn, or the first victim leaves
CALLS = st.lists(
    st.tuples(st.sampled_from(["use", "use", "use", "evict", "discard", "skip"]), st.sampled_from(KEYS)), max_size=120
)


@pytest.mark.parametrize("kind", POLICIES)
@settings(max_examples=150)
@given(calls=CALLS, sizes=st.lists(st.integers(1, 9), min_size=len(KEYS), max_size=len(KEYS)))
def test_contract(kind: type[EvictionPolicy], calls: list[tuple[str, bytes]], sizes: list[int]) -> None:
    """`victims` names every resident once, changes nothing, and is the order in which evictions go on."""
    policy = kind()
    residents: set[bytes] = set()
    for what, key in calls:
        if what == "use" and key in residents:
            policy.touch(key)
        elif what == "use":
            policy.insert(key, sizes[KEYS.index(key)])
            residents.add(key)
        elif what == "evict" and residents:
            victim = next(policy.victims())
            policy.remove(victim, evicted=True)
            residents.remove(victim)
        elif what == "skip" and residents:  # all but the last are protected
            *_, victim = policy.victims()
            policy.remove(victim, evicted=True)
            residents.remove(victim)
        elif what == "discard" and key in residents:
            policy.remove(key, evicted=False)
            residents.remove(key)
        order = list(policy.victims())
        assert sorted(order) == sorted(residents)
        assert order == list(policy.victims())
    for expected in list(policy.victims()):
        assert next(policy.victims()) == expected
        policy.remove(expected, evicted=True)
    assert list(policy.victims()) == []


class PlainArc:
    """ARC in the words of the paper, for pages of one size: lists, the oldest first."""

    def __init__(self, c: int) -> None:
        self.c, self.p = c, 0.0
        self.t1, self.t2, self.b1, self.b2 = ([] for _ in range(4))  # type: tuple[list[bytes], ...]

    def request(self, x: bytes) -> bool:
        for cached in (self.t1, self.t2):
            if x in cached:
                cached.remove(x)
                self.t2.append(x)
                return True
        if len(self.t1) + len(self.t2) == self.c:
            if self.t1 and (len(self.t1) > self.p or not self.t2):
                self.b1.append(self.t1.pop(0))
            else:
                self.b2.append(self.t2.pop(0))
            self.forget()
        if x in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self.b1.remove(x)
            self.t2.append(x)
        elif x in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.b2.remove(x)
            self.t2.append(x)
        else:
            self.t1.append(x)
        self.forget()
        return False

    def forget(self) -> None:
        while self.b1 and len(self.t1) + len(self.b1) > self.c:
            self.b1.pop(0)
        while self.b2 and sum(map(len, (self.t1, self.t2, self.b1, self.b2))) > 2 * self.c:
            self.b2.pop(0)


class PlainS3Fifo:
    """S3-FIFO in the words of the paper, for objects of one size: lists, the oldest first."""

    def __init__(self, c: int) -> None:
        self.c = c
        self.s, self.m, self.g = ([] for _ in range(3))  # type: tuple[list[bytes], ...]
        self.freq: dict[bytes, int] = {}

    def request(self, x: bytes) -> bool:
        if x in self.s or x in self.m:
            self.freq[x] = min(self.freq[x] + 1, 3)
            return True
        while len(self.s) + len(self.m) >= self.c:
            if len(self.s) >= 0.1 * self.c or not self.m:
                self.evict_s()
            else:
                self.evict_m()
        self.freq[x] = 0
        if x in self.g:
            self.g.remove(x)
            self.m.append(x)
        else:
            self.s.append(x)
        return False

    def evict_s(self) -> None:
        t = self.s.pop(0)
        if self.freq[t] > 1:
            self.freq[t] = 0
            self.m.append(t)
        else:
            self.g.append(t)
            self.g = self.g[max(0, len(self.g) - int(0.9 * self.c)) :]

    def evict_m(self) -> None:
        t = self.m.pop(0)
        if self.freq[t] > 0:
            self.freq[t] -= 1
            self.m.append(t)


@pytest.mark.parametrize(("kind", "model"), [(ARC, PlainArc), (S3FIFO, PlainS3Fifo)])
@settings(max_examples=300)
@given(
    capacity=st.integers(1, 12),
    requests=st.lists(st.integers(0, 19) | st.integers(0, 5), max_size=300),
)
def test_hits_are_those_of_the_paper(
    kind: type[EvictionPolicy], model: type[PlainArc], capacity: int, requests: list[int]
) -> None:
    policy, plain = kind(), model(capacity)
    # The policy learns its capacity when the pool is full for the first time: fill it with what is not used again.
    warm = [-1 - i for i in range(capacity)]
    held: set[bytes] = set()
    for number in warm + requests:
        key = b"%d" % number
        hit = key in held
        if hit:
            policy.touch(key)
        else:
            if len(held) == capacity:
                victim = next(policy.victims())
                policy.remove(victim, evicted=True)
                held.remove(victim)
            policy.insert(key, 1)
            held.add(key)
        assert plain.request(key) == hit
