# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""HostPool: exact accounting, runs, reservations, refusals that change nothing, and churn."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from kvzip.errors import ConfigError, PoolExhaustedError
from kvzip.memory import PageableMemory, Region
from kvzip.pool import Allocation, HostPool, Room

MIB = 1 << 20


class Pieces:
    """Memory that was registered in small pieces."""

    def __init__(self, piece_bytes: int, short: int = 0) -> None:
        self.piece_bytes = piece_bytes
        self.short = short
        self.closed = 0

    def allocate(self, nbytes: int) -> Region:
        def release() -> None:
            self.closed += 1

        array = np.zeros(nbytes - self.short, np.uint8)
        return Region(array, pinned=True, piece_bytes=self.piece_bytes, release=release)


def fill(pool: HostPool, extents: int = 1) -> list[Allocation]:
    """Allocations of ``extents`` extents until the pool is full."""
    return [pool.allocate(extents * pool.extent_bytes) for _ in range(pool.free_bytes // (extents * pool.extent_bytes))]


def used(pool: HostPool) -> dict[str, int]:
    """The counters that a refused operation must not change."""
    stats = dataclasses.asdict(pool.stats())
    del stats["total_refusals"]
    return stats


def test_capacity_is_whole_extents_and_is_what_is_allocated() -> None:
    asked: list[int] = []

    class Resource:
        def allocate(self, nbytes: int) -> Region:
            asked.append(nbytes)
            return PageableMemory().allocate(nbytes)

    with HostPool(1000, resource=Resource()) as pool:
        assert pool.capacity_bytes == 768
        assert asked == [768]
        assert pool.free_bytes == 768
        assert pool.extent_bytes == 256
        assert not pool.pinned
        assert pool.address % 4096 == 0
    assert HostPool(np.int64(256)).capacity_bytes == 256


@pytest.mark.parametrize(
    ("capacity", "options"),
    [
        (0, {}),
        (-1, {}),
        (255, {}),
        (1 << 70, {}),
        (1 << 60, {}),
        (1024, {"extent_bytes": 0}),
        (1024, {"extent_bytes": 8}),
        (1024, {"extent_bytes": 48}),
        (1 << 30, {"extent_bytes": 4 << 20}),
        (1024, {"headroom": 1.0}),
        (1024, {"headroom": -0.1}),
        (1024, {"headroom": float("nan")}),
    ],
)
def test_bad_arguments_are_refused(capacity: int, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        HostPool(capacity, **options)  # type: ignore[arg-type]


def test_a_fractional_capacity_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        HostPool(1e9)  # type: ignore[arg-type]


@pytest.mark.parametrize("resource", [Pieces(0, short=1), Pieces(300)])
def test_a_resource_that_breaks_its_contract_is_refused(resource: Pieces) -> None:
    with pytest.raises(ConfigError, match="MemoryResource"):
        HostPool(1024, resource=resource)
    assert resource.closed == 1


def test_an_allocation_is_one_run_where_one_fits() -> None:
    with HostPool(16 * 256) as pool:
        a = pool.allocate(1)
        assert a.runs == ((0, 1),)
        assert (a.nbytes, a.extent_nbytes) == (1, 256)
        b = pool.allocate(257)
        assert b.runs == ((256, 257),)
        assert b.extent_nbytes == 512
        assert pool.round_up(257) == 512
        assert pool.free_bytes == 13 * 256
        pool.check()


def test_the_best_fit_is_taken() -> None:
    with HostPool(100 * 16, extent_bytes=16) as pool:
        units = fill(pool)
        for first, count in ((10, 5), (30, 3), (50, 7), (80, 3)):
            for unit in units[first : first + count]:
                pool.free(unit)
        assert pool.stats().free_runs == 4
        assert pool.stats().largest_free_run_bytes == 7 * 16
        assert pool.allocate(3 * 16).runs == ((30 * 16, 48),)  # exact, and the lower of two
        assert pool.allocate(4 * 16).runs == ((10 * 16, 64),)
        assert pool.allocate(6 * 16).runs == ((50 * 16, 96),)
        pool.check()


def test_the_best_fit_is_found_within_a_size_class() -> None:
    # 2,048 to 2,111 extents are one class: a search by class alone would miss runs that fit, or take the wrong one.
    with HostPool(16_000 * 16, extent_bytes=16) as pool:
        holes = []
        for length in (2060, 2100, 2050, 2080):
            holes.append(pool.allocate(length * 16))
            pool.allocate(16)
        pool.allocate(pool.stats().largest_free_run_bytes)
        for hole in holes:
            pool.free(hole)
        assert pool.allocate(2070 * 16).runs == ((holes[3].runs[0][0], 2070 * 16),)
        assert len(pool.allocate(2100 * 16).runs) == 1
        assert pool.allocate(2050 * 16).runs == holes[2].runs
        pool.check()


def test_fragments_never_refuse_what_fits_and_runs_are_as_few_as_can_be() -> None:
    with HostPool(64 * 16, extent_bytes=16) as pool:
        units = fill(pool)
        for first, count in ((0, 1), (10, 4), (20, 2), (30, 4), (40, 3)):
            for unit in units[first : first + count]:
                pool.free(unit)
        assert pool.free_bytes == 14 * 16
        allocation = pool.allocate(9 * 16 - 3)
        assert allocation.runs == ((480, 64), (160, 64), (0, 13))  # 4 + 4 + 1 exactly, the shortest trimmed
        rest = pool.allocate(5 * 16)
        assert rest.runs == ((640, 48), (320, 32))
        assert pool.free_bytes == 0
        pool.check()
        for held in (allocation, rest):
            data = np.random.default_rng(1).integers(0, 256, held.nbytes, np.uint8)
            pool.write(held, data)
            assert bytes(pool.read(held)) == data.tobytes()


@pytest.mark.parametrize("order", ["forwards", "backwards", "odd then even"])
def test_freed_neighbours_merge(order: str) -> None:
    with HostPool(32 * 256) as pool:
        units = fill(pool)
        if order == "backwards":
            units.reverse()
        elif order == "odd then even":
            units = units[1::2] + units[::2]
        for unit in units:
            pool.free(unit)
            pool.check()
        assert pool.stats().free_runs == 1
        assert len(pool.allocate(32 * 256).runs) == 1


def test_exhaustion_is_reported_before_anything_changes() -> None:
    with HostPool(4 * 256) as pool:
        pool.allocate(300)
        before = used(pool)
        for ask in (pool.allocate, pool.reserve):
            with pytest.raises(PoolExhaustedError, match="make the pool larger") as caught:
                ask(513)
            assert caught.value.requested == 513
            assert caught.value.free == 512
            assert isinstance(caught.value, MemoryError)
        assert used(pool) == before
        assert pool.stats().total_refusals == 2
        pool.allocate(512)
        pool.check()


def test_a_reservation_guarantees_its_commit() -> None:
    with HostPool(8 * 256) as pool:
        units = fill(pool)
        for unit in units[::2]:
            pool.free(unit)
        reservation = pool.reserve(1000)
        assert reservation.remaining_bytes == 1024
        assert pool.free_bytes == 0
        assert pool.stats().reserved_bytes == 1024
        with pytest.raises(PoolExhaustedError):
            pool.allocate(1)
        allocation = reservation.commit(600, close=True)
        assert len(allocation.runs) == 3
        assert reservation.closed
        assert pool.free_bytes == 256
        pool.check()


def test_a_reservation_is_committed_in_parts() -> None:
    with HostPool(8 * 256) as pool:
        with pool.reserve(pool.round_up(300) + pool.round_up(100)) as reservation:
            a = reservation.commit(100)
            b = reservation.commit(300)
            assert reservation.remaining_bytes == 0
            before = used(pool)
            with pytest.raises(ConfigError, match="round_up"):
                reservation.commit(1)
            assert used(pool) == before
        assert pool.stats().reserved_bytes == 0
        assert pool.stats().allocations == 2
        pool.free(a)
        pool.free(b)
        pool.check()


def test_a_reservation_returns_what_is_left() -> None:
    with HostPool(8 * 256) as pool:
        reservation = pool.reserve(2048)
        reservation.commit(256)
        reservation.close()
        reservation.cancel()
        assert pool.free_bytes == 7 * 256
        with pytest.raises(ConfigError, match="closed"):
            reservation.commit(1)
        with pytest.raises(RuntimeError), pool.reserve(512):
            raise RuntimeError
        assert pool.free_bytes == 7 * 256
        pool.reserve(0).cancel()
        with pytest.raises(ConfigError):
            pool.reserve(-1)
        pool.check()


@pytest.mark.parametrize("nbytes", [0, -5])
def test_empty_allocations_are_refused(nbytes: int) -> None:
    with HostPool(1024) as pool, pool.reserve(512) as reservation:
        with pytest.raises(ConfigError, match="at least 1"):
            pool.allocate(nbytes)
        with pytest.raises(ConfigError, match="at least 1"):
            reservation.commit(nbytes)


def test_double_frees_and_foreign_allocations_are_refused() -> None:
    with HostPool(1024) as pool, HostPool(1024) as other:
        allocation = pool.allocate(100)
        uses: list[Callable[[HostPool], object]] = [
            lambda p: p.free(allocation),
            lambda p: p.read(allocation),
            lambda p: p.views(allocation),
            lambda p: p.write(allocation, b"x"),
        ]
        for use in uses:
            with pytest.raises(ConfigError, match="another pool"):
                use(other)
        pool.free(allocation)
        again = pool.allocate(100)  # the same place: the old handle must not reach it
        assert again.runs == allocation.runs
        for use in uses:
            with pytest.raises(ConfigError, match="freed before"):
                use(pool)
        copied = dataclasses.replace(again)
        with pytest.raises(ConfigError):
            pool.free(copied)
        assert pool.stats().allocations == 1
        pool.check()


def test_write_takes_any_bytes_at_any_offset() -> None:
    with HostPool(64 * 16, extent_bytes=16) as pool:
        units = fill(pool)
        for unit in units[::3]:
            pool.free(unit)
        allocation = pool.allocate(150)
        assert len(allocation.runs) == 10
        model = bytearray(150)
        pool.write(allocation, bytes(150))
        rng = np.random.default_rng(0)
        sources = [
            rng.bytes(150),
            bytearray(rng.bytes(17)),
            memoryview(rng.bytes(33)),
            memoryview(bytes(range(8))).cast("H"),
            rng.integers(0, 2**16, (3, 5), np.uint16),
            rng.integers(0, 2**16, (4, 6), np.uint16)[::2, ::3],
            np.float32(1.5).reshape(()),
            b"",
            np.zeros(0, np.float32),
        ]
        for source in sources:
            raw = source.tobytes() if isinstance(source, np.ndarray | memoryview) else bytes(source)
            for offset in {0, 1, 15, 16, 40, 150 - len(raw)}:
                if offset + len(raw) <= 150:
                    pool.write(allocation, source, offset_bytes=offset)
                    model[offset : offset + len(raw)] = raw
                    assert bytes(pool.read(allocation)) == bytes(model)
        for data, offset in ((bytes(151), 0), (b"x", 150), (b"x", -1)):
            with pytest.raises(ConfigError, match="do not fit"):
                pool.write(allocation, data, offset)
        for bad in ("text", 5, None, memoryview(bytes(8))[::2]):
            with pytest.raises(ConfigError, match="contiguous bytes"):
                pool.write(allocation, bad)
        assert bytes(pool.read(allocation)) == bytes(model)


def test_read_is_a_view_of_one_run_and_a_copy_of_several() -> None:
    with HostPool(8 * 16, extent_bytes=16) as pool:
        units = fill(pool)
        single = pool.read(units[0])
        assert single.ctypes.data == pool.address
        assert np.shares_memory(single, pool.views(units[0])[0])
        for unit in units[1::2]:
            pool.free(unit)
        several = pool.allocate(40)
        gathered = pool.read(several)
        assert gathered.shape == (40,)
        for array in (single, gathered):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
        views = pool.views(several)
        assert [view.nbytes for view in views] == [nbytes for _, nbytes in several.runs]
        views[1][:] = 9
        assert bytes(pool.read(several)) == bytes(16) + bytes([9] * 16) + bytes(8)
        for view, (offset, _) in zip(views, several.runs, strict=True):
            assert view.ctypes.data == pool.address + offset


def test_runs_never_cross_a_piece() -> None:
    resource = Pieces(1024)
    with HostPool(3 * 1024 + 512, resource=resource) as pool:
        assert pool.pinned
        assert pool.piece_bytes == 1024
        assert pool.stats().free_runs == 4
        whole = pool.allocate(pool.free_bytes)
        assert whole.runs == ((2048, 1024), (1024, 1024), (0, 1024), (3072, 512))
        pool.check()
        pool.free(whole)
        assert pool.stats().free_runs == 4
        units = fill(pool)
        for unit in units:
            pool.free(unit)
            pool.check()
        assert pool.stats().free_runs == 4
        assert pool.stats().largest_free_run_bytes == 1024
    assert resource.closed == 1


def test_statistics_are_current_peak_and_total() -> None:
    with HostPool(1024) as pool:
        a = pool.allocate(300)
        reservation = pool.reserve(200)
        stats = pool.stats()
        assert stats.capacity_bytes == 1024
        assert stats.payload_bytes == 300
        assert stats.extent_bytes_used == 512
        assert stats.reserved_bytes == 256
        assert stats.free_bytes == 256
        assert stats.allocations == stats.runs == 1
        assert stats.free_runs == 1
        assert stats.largest_free_run_bytes == 512
        assert stats.payload_fraction == 300 / 1024
        pool.free(a)
        reservation.close()
        stats = pool.stats()
        assert stats.payload_bytes == stats.extent_bytes_used == stats.reserved_bytes == stats.runs == 0
        assert stats.free_bytes == stats.largest_free_run_bytes == 1024
        assert stats.peak_payload_bytes == 300
        assert stats.peak_extent_bytes_used == 512
        assert stats.peak_occupied_bytes == 768
        assert stats.peak_allocations == 1
        assert (stats.total_allocations, stats.total_frees, stats.total_runs) == (1, 1, 1)
        assert stats.total_payload_bytes == 300
        pool.allocate(1024)
        assert pool.stats().largest_free_run_bytes == 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.runs = 5  # type: ignore[misc]


def test_the_shortfall_counts_the_headroom() -> None:
    with HostPool(100 * 256, headroom=0.1) as pool:
        assert pool.headroom_bytes == 10 * 256
        assert pool.shortfall_bytes(90 * 256) == 0
        assert pool.shortfall_bytes(91 * 256) == 0  # the pool is empty: the headroom gives way
        pool.allocate(50 * 256)
        assert pool.shortfall_bytes(40 * 256) == 0
        assert pool.shortfall_bytes(45 * 256) == 5 * 256
        pool.allocate(50 * 256)
        assert pool.shortfall_bytes(1) == 11 * 256
        assert pool.shortfall_bytes(99 * 256) == 100 * 256
        assert pool.shortfall_bytes(101 * 256) == 101 * 256
    with HostPool(1000 * 256, headroom=0) as pool:
        pool.allocate(1000 * 256)
        assert pool.shortfall_bytes(300) == 512


def test_a_closed_pool_refuses_use() -> None:
    resource = Pieces(0)
    pool = HostPool(1024, resource=resource)
    allocation = pool.allocate(100)
    pool.write(allocation, b"kept")
    view = pool.read(allocation)
    reservation = pool.reserve(100)
    pool.close()
    pool.close()
    assert pool.closed
    assert resource.closed == 1
    uses: list[Callable[[], object]] = [
        lambda: pool.allocate(1),
        lambda: pool.reserve(1),
        lambda: reservation.commit(1),
        lambda: pool.free(allocation),
        lambda: pool.read(allocation),
        lambda: pool.views(allocation),
        lambda: pool.write(allocation, b"x"),
        lambda: pool.stats(),
        lambda: pool.check(),
        lambda: pool.address,
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="closed"):
            use()
    reservation.close()  # so that leaving its context does not hide another error
    assert bytes(view[:4]) == b"kept"
    assert pool.capacity_bytes == 1024
    assert "closed" in repr(pool)
    assert "closed" in repr(reservation)


def test_a_forgotten_pool_releases_its_memory_at_once() -> None:
    resource = Pieces(0)
    pool = HostPool(1024, resource=resource)
    held = pool.allocate(10)
    gone = weakref.ref(pool)
    gc.disable()
    try:
        del pool
        assert gone() is None  # no reference cycle keeps gigabytes until the next collection
        assert resource.closed == 1
    finally:
        gc.enable()
    assert held.nbytes == 10


def test_check_notices_damage() -> None:
    def damaged(damage: Callable[[HostPool, Allocation], object], message: str) -> None:
        with HostPool(1024) as pool:
            allocation = pool.allocate(300)
            pool.check()
            damage(pool, allocation)
            with pytest.raises(AssertionError, match=message):
                pool.check()

    damaged(lambda pool, a: pool._live.remove(a), "neither free nor allocated")
    damaged(lambda pool, a: pool._free._add(0, 1), "overlaps")
    damaged(lambda pool, a: setattr(pool, "_payload", 0), "payload_bytes")
    damaged(lambda pool, a: setattr(pool, "_used", 0), "extent_bytes_used")
    damaged(lambda pool, a: setattr(pool, "_runs", 0), "runs is wrong")
    damaged(lambda pool, a: setattr(pool, "_reserved", 3), "reserved")
    damaged(lambda pool, a: setattr(pool._free, "_occupied", 0), "bitmap")

    def split(pool: HostPool, allocation: Allocation) -> None:
        pool._free._remove(2, 2)
        pool._free._add(2, 1)
        pool._free._add(3, 1)

    damaged(split, "not merged")


def test_threads_share_a_pool() -> None:
    failures: list[str] = []
    with HostPool(256 * 1024) as pool:

        def work(seed: int) -> None:
            rng = random.Random(seed)
            held: list[tuple[Allocation, bytes]] = []
            for _ in range(600):
                try:
                    with pool.reserve(3000) as reservation:
                        allocation = reservation.commit(rng.randint(1, 3000))
                except PoolExhaustedError:
                    allocation = None
                if allocation is not None:
                    data = rng.randbytes(allocation.nbytes)
                    pool.write(allocation, data)
                    held.append((allocation, data))
                if held and (allocation is None or rng.random() < 0.4):
                    victim, data = held.pop(rng.randrange(len(held)))
                    if bytes(pool.read(victim)) != data:
                        failures.append(f"thread {seed}: contents differ")
                    pool.free(victim)
            for victim, data in held:
                if bytes(pool.read(victim)) != data:
                    failures.append(f"thread {seed}: contents differ")
                pool.free(victim)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        pool.check()
        assert pool.free_bytes == pool.capacity_bytes
        assert pool.stats().free_runs == 1


def record_bytes(rng: random.Random, kind: str) -> int:
    if kind == "mixed" and rng.random() < 0.1:
        return rng.randint(600_000, 800_000)
    return rng.randint(10_000, 120_000)


@pytest.mark.parametrize("kind", ["small", "mixed"])
@pytest.mark.parametrize(("headroom", "most_runs"), [(0.02, 2.5), (0.0, 30.0)])
def test_a_pool_stays_full_of_payload_under_random_churn(kind: str, headroom: float, most_runs: float) -> None:
    rng = random.Random(7)
    with HostPool(96 * MIB, headroom=headroom) as pool:
        held: list[Allocation] = []
        fractions: list[float] = []
        warm = 0
        for step in range(12_000):
            nbytes = record_bytes(rng, kind)
            while pool.shortfall_bytes(nbytes):
                at = rng.randrange(len(held))
                held[at], held[-1] = held[-1], held[at]
                pool.free(held.pop())
            held.append(pool.allocate(nbytes))  # whatever fits by bytes is accepted: this never raises
            if step == 6_000:
                warm = pool.stats().total_runs
            if step > 6_000:
                fractions.append(pool.stats().payload_fraction)
        pool.check()
        assert min(fractions) >= 0.96
        assert sum(fractions) / len(fractions) >= 0.97
        assert (pool.stats().total_runs - warm) / 6_000 <= most_runs


def test_everything_that_fits_is_accepted_down_to_the_last_extent() -> None:
    rng = random.Random(3)
    with HostPool(4 * MIB) as pool:
        held: list[Allocation] = []
        refused = 0
        for _ in range(8_000):
            nbytes = rng.randint(1, 120_000)
            fits = pool.round_up(nbytes) <= pool.free_bytes
            try:
                held.append(pool.allocate(nbytes))
                assert fits
            except PoolExhaustedError:
                assert not fits
                refused += 1
                pool.free(held.pop(rng.randrange(len(held))))
        assert refused > 1_000
        pool.allocate(pool.free_bytes)
        pool.check()
        assert pool.free_bytes == 0


def test_many_allocations_stand_side_by_side() -> None:
    with HostPool(64 * 1024) as pool:
        made = pool.allocate_many([1000, 256, 5, 300])
        assert [a.nbytes for a in made] == [1000, 256, 5, 300]
        assert [a.runs for a in made] == [((0, 1000),), ((1024, 256),), ((1280, 5),), ((1536, 300),)]
        pool.check()
        assert pool.allocate_many([]) == []
        with pytest.raises(PoolExhaustedError):
            pool.allocate_many([60_000, 60_000])
        with pytest.raises(ConfigError):
            pool.allocate_many([5, 0])
        pool.check()
        for allocation in made:
            pool.free(allocation)


def test_many_allocations_in_a_fragmented_pool() -> None:
    with HostPool(64 * 256) as pool:
        single = [pool.allocate(256) for _ in range(64)]
        for allocation in single[::2]:
            pool.free(allocation)
        made = pool.allocate_many([600, 256, 1000])
        pool.check()
        for n, allocation in enumerate(made, 1):
            pool.write(allocation, np.full(allocation.nbytes, n, np.uint8))
        for n, allocation in enumerate(made, 1):
            assert (pool.read(allocation) == n).all()
        for allocation in made:
            pool.free(allocation)
        pool.check()


def test_a_room_is_tried_for() -> None:
    with HostPool(16 * 256) as pool:
        room = pool.try_take(10 * 256 + 1)
        assert room is not None
        assert room.nbytes == 11 * 256
        refusals = pool.stats().total_refusals
        assert pool.try_take(6 * 256) is None
        assert pool.stats().total_refusals == refusals  # nothing was asked of it that it could not give
        rest = pool.try_take(5 * 256)
        assert rest is not None
        assert pool.free_bytes == 0
        with pytest.raises(ConfigError, match="nbytes=0"):
            pool.try_take(0)
        room.close()
        rest.close()
        pool.check()
    with pytest.raises(ConfigError, match="closed"):
        pool.try_take(256)


def test_a_room_is_divided_when_sizes_are_known() -> None:
    with HostPool(64 * 1024) as pool:
        room = pool.take(10_000)
        assert room.nbytes == 10_240
        assert sum(nbytes for _, nbytes in room.runs) == room.nbytes
        assert pool.stats().reserved_bytes == room.nbytes
        assert pool.free_bytes == 64 * 1024 - room.nbytes
        pool.check()
        made = room.divide([1000, 256, 5])
        start = room.runs[0][0]
        assert [a.runs for a in made] == [((start, 1000),), ((start + 1024, 256),), ((start + 1280, 5),)]
        assert pool.stats().reserved_bytes == 0
        assert pool.free_bytes == 64 * 1024 - 6 * 256
        pool.check()
        with pytest.raises(ConfigError, match="divided or closed before"):
            room.divide([1])
        room.close()  # no effect
        for allocation in made:
            pool.free(allocation)
        assert pool.stats().largest_free_run_bytes == 64 * 1024
        pool.check()


def test_a_room_is_split_where_its_parts_are_filled_one_by_one() -> None:
    with HostPool(64 * 1024) as pool:
        room = pool.take(40 * 256)
        start = room.runs[0][0]
        first, second = room.split(1000), room.split(256)
        assert [r.runs for r in (first, second, room)] == [
            ((start, 1024),),
            ((start + 1024, 256),),
            ((start + 1280, 35 * 256),),
        ]
        assert [r.nbytes for r in (first, second, room)] == [1024, 256, 35 * 256]
        assert pool.stats().reserved_bytes == 40 * 256
        pool.check()
        with pytest.raises(ConfigError, match="9216 bytes cannot be split from a room of 8960 bytes in 1 runs"):
            room.split(36 * 256)
        with pytest.raises(ConfigError, match="at least 1"):
            room.split(0)
        made = first.divide([500, 400])
        with pytest.raises(ConfigError, match="divided or closed before"):
            first.split(1)
        last = room.split(35 * 256)
        assert (room.runs, room.nbytes) == ((), 0)
        pool.check()
        for part in (room, second, last):
            part.close()
        assert pool.stats().reserved_bytes == 0
        for allocation in made:
            pool.free(allocation)
        assert pool.stats().largest_free_run_bytes == 64 * 1024
        pool.check()


def test_a_room_that_is_too_small_stays_as_it_is() -> None:
    with HostPool(64 * 1024) as pool:
        with pytest.raises(PoolExhaustedError):
            pool.take(64 * 1024 + 1)
        with pytest.raises(ConfigError, match="at least 1"):
            pool.take(0)
        room = pool.take(1024)
        with pytest.raises(ConfigError, match="1280 bytes do not fit into a room of 1024 bytes"):
            room.divide([1000, 10])
        with pytest.raises(ConfigError, match="at least 1"):
            room.divide([10, 0])
        assert pool.stats().reserved_bytes == 1024
        room.close()
        room.close()
        assert pool.free_bytes == 64 * 1024
        pool.check()
    pool_closed = HostPool(4096)
    room = pool_closed.take(1024)
    pool_closed.close()
    room.close()


def test_rooms_that_return_out_of_order_stay_within_their_pieces() -> None:
    with HostPool(16 * MIB, resource=Pieces(4 * MIB)) as pool:
        rooms = [pool.take(2 * MIB) for _ in range(3)]
        for room in reversed(rooms):  # the last one began a piece, where the one before it ends
            room.close()
        pool.check()
        whole = pool.take(8 * MIB)
        assert len(whole.runs) == 2
        assert all(offset % (4 * MIB) + nbytes <= 4 * MIB for offset, nbytes in whole.runs)
        whole.close()


@pytest.mark.parametrize("piece", [0, 1 << 20, 4 << 20])
def test_rooms_beside_allocations(piece: int) -> None:
    """Rooms in any order, of small and large sizes, in a pool that gets full: exact accounting, no overlap."""

    class Pieces(PageableMemory):
        def allocate(self, nbytes: int) -> Region:
            return Region(np.zeros(nbytes, np.uint8), piece_bytes=piece)

    rng = random.Random(7)
    with HostPool(12 << 20, resource=Pieces()) as pool:
        rooms: list[Room] = []
        held: list[Allocation] = []
        for step in range(3000):
            choice = rng.random()
            try:
                if choice < 0.3:
                    rooms.append(pool.take(rng.choice([300, 5000, 70_000, 2 << 20])))
                elif choice < 0.5 and rooms:
                    room, sizes = rooms.pop(rng.randrange(len(rooms))), []
                    while sum(map(pool.round_up, sizes)) + 40_000 < room.nbytes * rng.random():
                        sizes.append(rng.randint(1, 39_000))
                    held += room.divide(sizes)
                elif choice < 0.55 and rooms:
                    rooms.pop(rng.randrange(len(rooms))).close()
                elif choice < 0.75:
                    held.append(pool.allocate(rng.randint(1, 60_000)))
                elif held:
                    pool.free(held.pop(rng.randrange(len(held))))
            except PoolExhaustedError:
                for allocation in held[::2]:
                    pool.free(allocation)
                del held[::2]
            if step % 50 == 0:
                pool.check()
                stats = pool.stats()
                assert stats.reserved_bytes == sum(room.nbytes for room in rooms)
                assert stats.payload_bytes == sum(a.nbytes for a in held)
                assert stats.free_bytes == pool.capacity_bytes - stats.reserved_bytes - stats.extent_bytes_used
        for room in rooms:
            room.close()
        for allocation in held:
            pool.free(allocation)
        pool.check()
        assert pool.free_bytes == pool.capacity_bytes


def test_small_rooms_lie_side_by_side_and_give_back_what_they_do_not_need() -> None:
    with HostPool(64 << 20) as pool:
        made = []
        for _ in range(50):
            made += pool.take(65_536).divide([20_000])
        places = [a.runs[0][0] for a in made]
        assert places == [places[0] + i * pool.round_up(20_000) for i in range(50)]
        assert pool.allocate(pool.free_bytes).nbytes == (64 << 20) - 50 * pool.round_up(20_000)
        assert pool.free_bytes == 0
        pool.check()
