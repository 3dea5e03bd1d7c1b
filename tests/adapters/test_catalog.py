# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`RecordCatalog`: order, protection, lost records, capacity by reported bytes, generations. No vLLM needed."""

from __future__ import annotations

import pytest

from kvzip.adapters.vllm.catalog import RecordCatalog, State
from kvzip.errors import ConfigError

WORST = 100


def k(*numbers: int) -> list[bytes]:
    return [b"hash%d" % n + bytes(4) for n in numbers]


def catalog(capacity: int = 10 * WORST, workers: int = 1) -> RecordCatalog:
    return RecordCatalog(capacity, workers, {0: WORST, 1: 2 * WORST}, lambda key: key[-1])


def stored(c: RecordCatalog, keys: list[bytes], nbytes: int = WORST, workers: int = 1) -> tuple[bytes, ...]:
    """Store keys, and return what left for them."""
    plan = c.begin_store(keys)
    assert plan is not None
    for number in plan.numbers:
        for worker in range(workers):
            c.report(number, worker, nbytes)
    c.finish_store(plan.keys)
    c.check()
    return plan.evicted


def test_a_record_can_be_loaded_once_all_workers_are_done() -> None:
    c = catalog()
    assert c.state(k(1)[0]) is State.MISSING
    plan = c.begin_store(k(1, 2))
    assert plan is not None
    assert (plan.keys, plan.numbers, plan.evicted) == (tuple(k(1, 2)), (0, 1), ())
    assert c.state(k(1)[0]) is State.STORING
    again = c.begin_store(k(1, 2))  # another request, the same prompt
    assert again is not None
    assert again.keys == ()
    assert c.begin_load(k(1)) == (2,), "a number that no worker has"
    assert sorted(c.finish_store(set(plan.keys))) == sorted(k(1, 2))
    c.end_load(k(1))
    assert c.begin_load(k(2, 1)) == (1, 0)
    c.check()


def test_records_count_for_what_the_workers_report() -> None:
    c = catalog(10 * WORST)
    assert stored(c, k(*range(10)), nbytes=50) == ()
    assert c.used_bytes == (500,)
    assert stored(c, k(*range(10, 15)), nbytes=50) == ()  # at the worst case they would not have fitted
    assert len(c) == 15


def test_the_fullest_worker_decides() -> None:
    c = catalog(10 * WORST, workers=2)
    plan = c.begin_store(k(*range(8)))
    assert plan is not None
    for number in plan.numbers:
        c.report(number, 0, 20)
        c.report(number, 1, 90)
    c.finish_store(plan.keys)
    assert c.used_bytes == (160, 720)
    assert len(stored(c, k(20, 21, 22), workers=2)) == 1
    c.check()


def test_the_end_of_a_prompt_leaves_before_its_beginning() -> None:
    c = catalog()
    stored(c, k(*range(10)))
    assert stored(c, k(20, 21)) == tuple(k(9, 8))


def test_what_is_loaded_or_asked_for_stays() -> None:
    c = catalog(3 * WORST)
    stored(c, k(1, 2, 3))
    c.begin_load(k(3))
    c.touch(k(2))
    assert stored(c, k(4)) == tuple(k(1))
    plan = c.begin_store(k(4, 5, 6))  # 4 is held and asked for, 3 is being loaded: only 2 may leave
    assert plan is None
    assert c.counts.refused == 1
    assert [c.state(key) for key in k(2, 3, 4)] == [State.READY] * 3, "eviction is all or nothing"
    c.end_load(k(3))
    assert stored(c, k(4, 5, 6)) == tuple(k(3, 2))


def test_a_store_larger_than_the_budget_keeps_its_beginning() -> None:
    c = catalog(3 * WORST)
    plan = c.begin_store(k(*range(7)))
    assert plan is not None
    assert plan.keys == tuple(k(0, 1, 2))
    assert catalog(WORST - 1).begin_store(k(1)) is None


def test_a_lost_record_is_dropped_everywhere() -> None:
    c = catalog(workers=2)
    plan = c.begin_store(k(1, 2))
    assert plan is not None
    for number in plan.numbers:
        c.report(number, 0, 50)
    c.report(plan.numbers[0], 1, 0)  # no room there
    c.report(plan.numbers[1], 1, 50)
    assert c.state(k(1)[0]) is State.MISSING
    assert c.finish_store(plan.keys) == k(2)
    assert c.take_discards() == (plan.numbers[0],)
    assert c.take_discards() == ()
    assert c.used_bytes == (50, 50)
    assert c.counts.lost == 1
    c.check()


def test_a_damaged_record_is_stored_anew_while_it_is_still_being_loaded() -> None:
    c = catalog()
    stored(c, k(1))
    (old,) = c.begin_load(k(1))
    c.report(old, 0, 0)
    assert c.state(k(1)[0]) is State.MISSING
    stored(c, k(1))
    (new,) = c.begin_load(k(1))
    assert new != old
    c.end_load(k(1))  # the old one: the new one stays protected
    assert c.begin_store(k(*range(2, 12))) is None
    c.end_load(k(1))
    assert stored(c, k(*range(2, 12))) == tuple(k(1))


def test_reset_forgets_and_late_reports_do_no_harm() -> None:
    c = catalog()
    stored(c, k(1))
    late = c.begin_store(k(2))
    assert late is not None
    c.reset()
    c.check()
    assert c.first_number == 2
    assert (len(c), c.used_bytes, c.take_discards()) == (0, (0,), ())
    c.report(late.numbers[0], 0, 50)
    assert c.finish_store(late.keys) == []
    stored(c, k(2))
    assert c.begin_load(k(2)) == (2,)


def test_estimates_follow_the_records_and_never_exceed_the_worst_case() -> None:
    c = catalog(1000 * WORST)
    assert c.expected_bytes(0) == WORST
    stored(c, k(*range(20)), nbytes=40)
    stored(c, k(*range(20, 40)), nbytes=30)
    assert 35 <= c.expected_bytes(0) <= 36
    assert c.expected_bytes(1) == 2 * WORST
    stored(c, k(*range(40, 400)), nbytes=3 * WORST)
    assert c.expected_bytes(0) == WORST


def test_the_estimate_is_that_of_the_worker_with_the_largest_records() -> None:
    c = catalog(1000 * WORST, workers=2)
    plan = c.begin_store(k(*range(20)))
    assert plan is not None
    for number in plan.numbers:
        c.report(number, 0, 20)
        assert c.expected_bytes(0) == WORST, "the other worker's are not known"
    for number in plan.numbers:
        c.report(number, 1, 60)
    assert c.expected_bytes(0) == 60


def test_a_store_that_is_refused_does_not_walk_through_all_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the pool is full of what is loading or being stored, it comes again at every step of the scheduler."""
    c = catalog(1000 * WORST)
    stored(c, k(*range(995)))
    c.begin_load(k(*range(990)))
    c.begin_store(k(*range(995, 1000)))
    walks = []
    victims = c._policy.victims
    monkeypatch.setattr(c._policy, "victims", lambda: walks.append(1) or victims())
    assert c.begin_store(k(*range(2000, 2006))) is None  # 500 bytes may leave, it needs 600
    assert c.begin_store(k(990, *range(2000, 2005))) is None  # and one of these is asked for
    assert not walks
    plan = c.begin_store(k(*range(2000, 2005)))
    assert plan is not None
    assert len(plan.evicted) == 5
    assert walks
    c.check()


def test_arguments_are_checked() -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        catalog(0)
    with pytest.raises(ConfigError, match="unknown eviction policy"):
        RecordCatalog(1, 1, {}, len, "mru")
