# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""HostPool as a state machine against a plain dictionary: contents, accounting and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from kvzip.errors import ConfigError, PoolExhaustedError
from kvzip.memory import Region
from kvzip.pool import Allocation, HostPool, Reservation


class Pieces:
    """Memory in pieces that no run may cross (0: one piece)."""

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes

    def allocate(self, nbytes: int) -> Region:
        return Region(np.zeros(nbytes, np.uint8), piece_bytes=self.piece_bytes)


SIZES = st.one_of(st.integers(1, 80), st.integers(1, 1500), st.integers(1, 5000))


class PoolModel(RuleBasedStateMachine):
    allocations = Bundle("allocations")
    reservations = Bundle("reservations")

    @initialize(
        capacity=st.integers(600, 4400), extent=st.sampled_from([16, 64, 256]), piece=st.sampled_from([0, 512, 1024])
    )
    def create(self, capacity: int, extent: int, piece: int) -> None:
        self.pool = HostPool(capacity, extent_bytes=extent, resource=Pieces(piece))
        self.capacity = capacity // extent * extent
        self.extent = extent
        self.piece = piece
        self.contents: dict[Allocation, bytes] = {}
        self.promised: dict[Reservation, int] = {}
        self.refusals = 0

    def up(self, nbytes: int) -> int:
        return (nbytes + self.extent - 1) // self.extent * self.extent

    @property
    def free_bytes(self) -> int:
        return self.capacity - sum(map(self.up, map(len, self.contents.values()))) - sum(self.promised.values())

    def fewest_runs(self, nbytes: int) -> int:
        """How few runs can hold that many bytes, from the gaps between the allocations."""
        taken = sorted(
            (offset, offset + self.up(size)) for allocation in self.contents for offset, size in allocation.runs
        )
        cuts = range(self.piece, self.capacity, self.piece) if self.piece else ()
        gaps = []
        position = 0
        for start, end in sorted([*taken, *((cut, cut) for cut in cuts), (self.capacity, self.capacity)]):
            gaps.append(start - position)
            position = end
        wanted = self.up(nbytes)
        for count, gap in enumerate(sorted(gaps, reverse=True), 1):
            wanted -= gap
            if wanted <= 0:
                return count
        raise AssertionError("the model has no room for what the pool accepted")

    def hold(self, allocation: Allocation, nbytes: int, fewest: int) -> Allocation:
        assert allocation.nbytes == nbytes
        assert len(allocation.runs) == fewest
        data = np.random.default_rng(len(self.contents) + nbytes).bytes(nbytes)
        self.pool.write(allocation, data)
        self.contents[allocation] = data
        return allocation

    @rule(target=allocations, nbytes=SIZES)
    def allocate(self, nbytes: int) -> object:
        if self.up(nbytes) > self.free_bytes:
            with pytest.raises(PoolExhaustedError) as caught:
                self.pool.allocate(nbytes)
            assert (caught.value.requested, caught.value.free) == (nbytes, self.free_bytes)
            self.refusals += 1
            return multiple()
        fewest = self.fewest_runs(nbytes)
        return self.hold(self.pool.allocate(nbytes), nbytes, fewest)

    @rule(target=reservations, nbytes=st.integers(0, 3000))
    def reserve(self, nbytes: int) -> object:
        if self.up(nbytes) > self.free_bytes:
            with pytest.raises(PoolExhaustedError):
                self.pool.reserve(nbytes)
            self.refusals += 1
            return multiple()
        reservation = self.pool.reserve(nbytes)
        self.promised[reservation] = self.up(nbytes)
        return reservation

    @rule(target=allocations, reservation=reservations, nbytes=SIZES, close=st.booleans())
    def commit(self, reservation: Reservation, nbytes: int, close: bool) -> object:
        if self.up(nbytes) > self.promised.get(reservation, 0):
            with pytest.raises(ConfigError):
                reservation.commit(nbytes, close=close)
            return multiple()
        fewest = self.fewest_runs(nbytes)
        allocation = reservation.commit(nbytes, close=close)
        self.promised[reservation] -= self.up(nbytes)
        if close:
            del self.promised[reservation]
        return self.hold(allocation, nbytes, fewest)

    @rule(reservation=reservations)
    def close_reservation(self, reservation: Reservation) -> None:
        reservation.close()
        self.promised.pop(reservation, None)

    @rule(allocation=consumes(allocations))
    def free(self, allocation: Allocation) -> None:
        self.pool.free(allocation)
        del self.contents[allocation]
        with pytest.raises(ConfigError, match="freed before"):
            self.pool.free(allocation)

    @rule(allocation=allocations, data=st.binary(max_size=600), at=st.floats(0, 1))
    def write(self, allocation: Allocation, data: bytes, at: float) -> None:
        offset = int(at * allocation.nbytes)
        if offset + len(data) > allocation.nbytes:
            with pytest.raises(ConfigError):
                self.pool.write(allocation, data, offset)
            return
        self.pool.write(allocation, data, offset)
        old = self.contents[allocation]
        self.contents[allocation] = old[:offset] + data + old[offset + len(data) :]

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        for allocation, data in self.contents.items():
            assert self.pool.read(allocation).tobytes() == data
            assert b"".join(view.tobytes() for view in self.pool.views(allocation)) == data
            for offset, nbytes in allocation.runs:
                assert offset % self.extent == 0
                assert not self.piece or offset // self.piece == (offset + nbytes - 1) // self.piece

    @invariant()
    def accounting_is_exact(self) -> None:
        if not hasattr(self, "pool"):
            return
        stats = self.pool.stats()
        assert stats.capacity_bytes == self.capacity
        assert stats.payload_bytes == sum(map(len, self.contents.values()))
        assert stats.extent_bytes_used == sum(map(self.up, map(len, self.contents.values())))
        assert stats.reserved_bytes == sum(self.promised.values())
        assert stats.free_bytes == self.pool.free_bytes == self.free_bytes
        assert stats.allocations == len(self.contents)
        assert stats.total_allocations - stats.total_frees == len(self.contents)
        assert stats.runs == sum(len(allocation.runs) for allocation in self.contents)
        assert stats.total_refusals == self.refusals
        assert stats.peak_occupied_bytes >= stats.extent_bytes_used + stats.reserved_bytes

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for allocation in list(self.contents):
                self.pool.free(allocation)
            for reservation in self.promised:
                reservation.close()
            self.pool.check()
            assert self.pool.free_bytes == self.capacity
            self.pool.close()


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
