# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Which extents of a pool are free: runs of them, found by size and merged by address.

Free runs are kept in segregated lists, one per size class (a class per size below 64 extents, 32 classes per power of
two above), with a bitmap of the lists that are not empty, after TLSF: M. Masmano, I. Ripoll, A. Crespo and J. Real,
"TLSF: a new dynamic memory allocator for real-time systems", ECRTS 2004. Unlike TLSF each list is sorted, so the search
is an exact best fit (lowest address among equals): one bitmap scan and one bisection, independent of the pool's size.
Runs that become free merge with free neighbours at once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

_START_BITS = 48  # a free run is kept as (length << 48 | start), so that integer order is (length, address)
START_MASK = (1 << _START_BITS) - 1  # the most extents of a pool


class FreeRuns:
    """The free runs of a pool, in extents: found by size, merged by address. Not thread-safe.

    Args:
        extents: size of the pool, all of it free.
        piece: runs never cross a multiple of this; 0 where they may.
    """

    def __init__(self, extents: int, piece: int = 0) -> None:
        self.extents = 0
        self.piece = piece
        self._length_at: dict[int, int] = {}  # start -> length
        self._start_of: dict[int, int] = {}  # end -> start
        self._classes: list[list[int]] = [[] for _ in range(_size_class(min(extents, piece or extents)) + 1)]
        self._occupied = 0  # bit c: class c is not empty
        for start in range(0, extents, piece or extents):
            self._add(start, min(piece or extents, extents - start))

    def __len__(self) -> int:
        return len(self._length_at)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._length_at.items())

    def largest(self) -> int:
        """Length of the longest run; 0 if there is none."""
        return self._classes[self._occupied.bit_length() - 1][-1] >> _START_BITS if self._occupied else 0

    def take(self, extents: int) -> list[tuple[int, int]]:
        """Take ``extents`` extents, not more than there are, as the fewest (start, length) runs, the longest first."""
        taken = []
        while True:
            key = self._best_fit(extents)
            if key is None:  # no run is long enough: use the longest up
                key = self._classes[self._occupied.bit_length() - 1][-1]
            start, length = key & START_MASK, key >> _START_BITS
            if length > extents:
                self._change(start, length, start + extents, length - extents)
                taken.append((start, extents))
                return taken
            self._remove(start, length)
            taken.append((start, length))
            if length == extents:
                return taken
            extents -= length

    def take_run(self, extents: int, wanted: int) -> tuple[int, int]:
        """Take a run of ``wanted`` extents, if ``extents`` are not more; (0, 0) where no run is so long."""
        key = self._best_fit(wanted) if extents <= wanted else None
        if key is None:
            return 0, 0
        start, length = key & START_MASK, key >> _START_BITS
        if length > wanted:
            self._change(start, length, start + wanted, length - wanted)
        else:
            self._remove(start, length)
        return start, wanted

    def release(self, start: int, length: int) -> None:
        """Give a run back, and merge it with its free neighbours."""
        end, piece = start + length, self.piece
        before = None if piece and start % piece == 0 else self._start_of.get(start)
        after = None if piece and end % piece == 0 else self._length_at.get(end)
        if after is not None:
            if before is None:
                self._change(end, after, start, length + after)
                return
            self._remove(end, after)
            length += after
        if before is not None:
            self._change(before, start - before, before, start - before + length)
        else:
            self._add(start, length)

    def check(self) -> None:
        """Verify the index against itself (`HostPool.check`)."""
        keys = [key for keys in self._classes for key in keys]
        require(keys == sorted(keys), "the size classes are not sorted")
        require(
            sorted(keys) == sorted(length << _START_BITS | start for start, length in self), "the classes miss a run"
        )
        require(self._start_of == {start + length: start for start, length in self}, "the ends disagree")
        require(self.extents == sum(length for _, length in self), "the number of free extents is wrong")
        for number, members in enumerate(self._classes):
            require(bool(members) == bool(self._occupied >> number & 1), f"the bitmap is wrong for class {number}")
            require(all(_size_class(key >> _START_BITS) == number for key in members), f"class {number} is wrong")
        for start, length in self:
            end = start + length
            at_boundary = self.piece and end % self.piece == 0
            require(at_boundary or end not in self._length_at, f"free runs at {start} and {end} are not merged")
            require(
                not self.piece or start // self.piece == (end - 1) // self.piece,
                f"the run at {start} crosses a piece",
            )

    def _best_fit(self, extents: int) -> int | None:
        number = _size_class(extents)
        if number >= len(self._classes):
            return None
        members = self._classes[number]
        if members:
            at = bisect_left(members, extents << _START_BITS)
            if at < len(members):
                return members[at]
        larger = self._occupied >> (number + 1)
        if not larger:
            return None
        return self._classes[number + (larger & -larger).bit_length()][0]

    def _add(self, start: int, length: int) -> None:
        self._length_at[start] = length
        self._start_of[start + length] = start
        number = _size_class(length)
        insort(self._classes[number], length << _START_BITS | start)
        self._occupied |= 1 << number
        self.extents += length

    def _change(self, start: int, length: int, new_start: int, new_length: int) -> None:
        """Move a bound of a free run: cheap as long as the run stays alone in its size class."""
        number = _size_class(length)
        members = self._classes[number]
        if len(members) != 1 or number != _size_class(new_length):
            self._remove(start, length)
            self._add(new_start, new_length)
            return
        members[0] = new_length << _START_BITS | new_start
        del self._length_at[start]
        del self._start_of[start + length]
        self._length_at[new_start] = new_length
        self._start_of[new_start + new_length] = new_start
        self.extents += new_length - length

    def _remove(self, start: int, length: int) -> None:
        del self._length_at[start]
        del self._start_of[start + length]
        number = _size_class(length)
        members = self._classes[number]
        del members[bisect_left(members, length << _START_BITS | start)]
        if not members:
            self._occupied ^= 1 << number
        self.extents -= length


def _size_class(length: int) -> int:
    """One class per length below 64, 32 per power of two from there on; monotonous in ``length``."""
    if length < 64:
        return length
    shift = length.bit_length() - 6
    return (shift << 5) + (length >> shift)


def require(holds: object, message: str) -> None:
    """Raise an AssertionError with a message unless an invariant holds; not left out by ``python -O``."""
    if not holds:
        raise AssertionError(message)
