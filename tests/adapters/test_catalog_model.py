# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`RecordCatalog` against workers that obey it: it offers no record that they do not hold, whatever they report."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvzip.adapters.vllm.catalog import RecordCatalog, State

WORST = 10
CAPACITY = 8 * WORST
KEYS = [b"%02d" % n + bytes([0, 0, 0, n % 2]) for n in range(24)]


class CatalogModel(RuleBasedStateMachine):
    """Workers' pools as sets of record numbers with sizes; messages arrive in the order in which they were made."""

    @initialize(workers=st.integers(1, 3))
    def start(self, workers: int) -> None:
        self.catalog = RecordCatalog(CAPACITY, workers, {0: WORST, 1: WORST}, lambda key: key[-1])
        self.pools: list[dict[int, int]] = [{} for _ in range(workers)]
        self.stores: list[tuple[Any, list[set[int]], bool]] = []  # plan, numbers still due from each worker, stale
        self.loads: list[tuple[list[bytes], tuple[int, ...]]] = []
        self.numbers: set[int] = set()  # all that were given out

    def obey(self) -> None:
        discards, first = self.catalog.take_discards(), self.catalog.first_number
        for pool in self.pools:
            for number in list(pool):
                if number in discards or number < first:
                    del pool[number]

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6))
    def begin_store(self, keys: list[bytes]) -> None:
        before = {key for key in KEYS if self.catalog.state(key) is State.READY}
        numbers_before = {key: self.catalog._records[key].number for key in before}
        plan = self.catalog.begin_store(keys)
        after = {key for key in KEYS if self.catalog.state(key) is State.READY}
        if plan is None:
            assert after == before, "eviction is all or nothing"
            return
        assert before - after == set(plan.evicted)
        assert not set(plan.evicted) & set(keys), "what is asked for stays"
        loading = {number for _, numbers in self.loads for number in numbers}
        assert not loading & {numbers_before[key] for key in plan.evicted}, "a record that is being loaded stays"
        if plan.keys:
            self.obey()
            assert not self.numbers & set(plan.numbers), "a number is never used again"
            self.numbers.update(plan.numbers)
            self.stores.append((plan, [set(plan.numbers) for _ in self.pools], False))

    @precondition(lambda self: self.stores)
    @rule(data=st.data())
    def worker_stores(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.stores) - 1))
        plan, due, stale = self.stores[at]
        worker = data.draw(st.sampled_from([w for w, numbers in enumerate(due) if numbers]))
        for number in sorted(due[worker]):
            size = data.draw(st.integers(0, WORST))  # 0: an encoder or pool failed
            if not stale:
                if size:
                    self.pools[worker][number] = size
                self.catalog.report(number, worker, size)
                self.overflow(worker)
        due[worker] = set()
        if not any(due):
            del self.stores[at]
            if not stale:
                held = self.catalog.finish_store(set(plan.keys))
                assert set(held) <= set(plan.keys)

    def overflow(self, worker: int) -> None:
        """Records were larger than expected: the worker lets others go, and says so."""
        pool = self.pools[worker]
        loading = {number for _, numbers in self.loads for number in numbers}
        while sum(pool.values()) > CAPACITY:
            victim = next((number for number in pool if number not in loading), max(pool))
            del pool[victim]
            self.catalog.report(victim, worker, 0)

    @precondition(lambda self: any(not stale for _, _, stale in self.stores))
    @rule(data=st.data())
    def abandon_store(self, data: st.DataObject) -> None:
        plan, due, _ = at = data.draw(st.sampled_from([store for store in self.stores if not store[2]]))
        self.stores[self.stores.index(at)] = (plan, due, True)
        self.catalog.abandon_store(set(plan.keys))
        assert all(self.catalog.state(key) is State.MISSING for key in plan.keys)

    @rule(data=st.data())
    def report_late_or_twice(self, data: st.DataObject) -> None:
        worker = data.draw(st.integers(0, len(self.pools) - 1))
        pool = self.pools[worker]
        gone = sorted(self.numbers - set(self.catalog._keys))
        if gone:
            self.catalog.report(data.draw(st.sampled_from(gone)), worker, data.draw(st.integers(0, WORST)))
        if pool:
            number = data.draw(st.sampled_from(sorted(pool)))
            self.catalog.report(number, worker, pool[number])

    @rule(key=st.sampled_from(KEYS))
    def load_what_is_not_ready(self, key: bytes) -> None:
        if self.catalog.state(key) is not State.READY:
            numbers = self.catalog.begin_load([key])
            assert not any(numbers[0] in pool for pool in self.pools)
            self.numbers.update(numbers)
            self.loads.append(([key], numbers))

    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        ready = [key for key in KEYS if self.catalog.state(key) is State.READY]
        if ready:
            keys = data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=4, unique=True))
            numbers = self.catalog.begin_load(keys)
            self.obey()
            assert all(number in pool for number in numbers for pool in self.pools)
            self.loads.append((keys, numbers))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), damaged=st.booleans())
    def end_load(self, data: st.DataObject, damaged: bool) -> None:
        keys, numbers = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        if damaged:
            worker = data.draw(st.integers(0, len(self.pools) - 1))
            self.pools[worker].pop(numbers[0], None)
            self.catalog.report(numbers[0], worker, 0)
        self.catalog.end_load(set(keys))

    @rule()
    def reset(self) -> None:
        self.catalog.reset()
        self.loads.clear()  # vLLM forgets its jobs
        self.stores = [(plan, due, True) for plan, due, _ in self.stores]

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def touch(self, keys: list[bytes]) -> None:
        self.catalog.touch(keys)

    @invariant()
    def sums_are_right_and_pools_hold_what_is_ready(self) -> None:
        if not hasattr(self, "catalog"):
            return
        self.catalog.check()
        assert all(sum(pool.values()) <= CAPACITY for pool in self.pools)
        for key in KEYS:
            if self.catalog.state(key) is State.READY:
                number = self.catalog._records[key].number
                assert all(number in pool for pool in self.pools)
            record = self.catalog._records.get(key)
            protected = (0 if record is None else record.loads) + self.catalog._loads_of_gone.get(key, 0)
            assert protected == sum(key in keys for keys, _ in self.loads), "no record is protected for ever"


TestCatalogModel = CatalogModel.TestCase
TestCatalogModel.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
