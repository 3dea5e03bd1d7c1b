# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Bound pressure: coarser bounds for new records while the pool is filling, from a list that the caller gives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kvzip.bounds import BoundPolicy
from kvzip.errors import ConfigError
from kvzip.types import BoundKind, ErrorBound

__all__ = ["BoundPressure"]

Bound = ErrorBound | BoundPolicy


@dataclass(frozen=True)
class BoundPressure:
    """Bounds that new records step through as the pool fills.

    Below the first threshold the engine's own bound holds; from ``thresholds[i]`` on ``bounds[i]`` does, until the pool
    is emptier than that threshold less `hysteresis`. Records that are held keep what they were coded with. Blocks that
    are marked as the first of their sequence, and stores that are given one bound of their own, are left alone.

    A pool that serves as a cache is full nearly always: then the last bound is what new records get.

    Attributes:
        bounds: the steps, each at least as coarse as the one before.
        thresholds: part of the pool that is in use, for each step; by default evenly spaced from 0.8 to 0.95.
        hysteresis: how far the pool must fall below a threshold for the step to end.
        floor: the coarsest bound that the caller accepts; no step may be coarser, or of a kind that cannot be compared.

    Raises:
        ConfigError: bounds or thresholds are out of order or out of range, or a bound is coarser than the floor.
    """

    bounds: Sequence[Bound]
    thresholds: Sequence[float] = ()
    hysteresis: float = 0.05
    floor: Bound | None = None

    def __post_init__(self) -> None:
        bounds = tuple(self.bounds)
        if not bounds or not all(isinstance(bound, (ErrorBound, BoundPolicy)) for bound in bounds):
            raise ConfigError(f"pressure bounds {self.bounds!r}: give a list of one ErrorBound or BoundPolicy or more")
        given = tuple(float(part) for part in self.thresholds)
        thresholds = given or tuple(np.linspace(0.8, 0.95, len(bounds)).tolist())
        if len(thresholds) != len(bounds):
            raise ConfigError(f"{len(thresholds)} pressure thresholds for {len(bounds)} bounds: give one a bound")
        if not all(0 < part <= 1 for part in thresholds) or any(a >= b for a, b in pairwise(thresholds)):
            raise ConfigError(f"pressure thresholds {thresholds}: give rising parts of the pool, above 0 and up to 1")
        if not 0 <= self.hysteresis < 1:
            raise ConfigError(f"pressure hysteresis={self.hysteresis!r}: give a part of the pool from 0 to below 1")
        object.__setattr__(self, "bounds", bounds)
        object.__setattr__(self, "thresholds", thresholds)
        for before, after in pairwise(bounds):
            if _is_finer(after, before) and after != before:
                raise ConfigError(f"pressure bound {after} is finer than {before} before it: order them fine to coarse")
        for bound in bounds if self.floor is not None else ():
            if not _is_finer(bound, self.floor):
                raise ConfigError(
                    f"pressure bound {bound} is not known to be as fine as the floor {self.floor}: drop it"
                )


class PressureGauge:
    """The step that holds now. Thread-safe.

    Args:
        pressure: the thresholds.
    """

    def __init__(self, pressure: BoundPressure) -> None:
        self._rise = tuple(pressure.thresholds)
        self._fall = tuple(part - pressure.hysteresis for part in self._rise)
        self._lock = threading.Lock()
        self._step = 0

    def step(self, fill: float) -> int:
        """The step for a pool of which this part is in use: 0 = none, i = the i-th bound."""
        with self._lock:
            while self._step < len(self._rise) and fill >= self._rise[self._step]:
                self._step += 1
            while self._step and fill < self._fall[self._step - 1]:
                self._step -= 1
            return self._step


def _is_finer(bound: Bound, other: Bound | None) -> bool:
    """Whether a bound is certain to allow no larger an error than another one."""
    if isinstance(bound, ErrorBound) and isinstance(other, ErrorBound):
        if bound.kind is BoundKind.LOSSLESS:
            return True
        if bound.kind is not other.kind:
            return False
        if bound.channels is not None and other.channels is not None:
            mine, others = bound.channels.values, other.channels.values
            return mine.shape == others.shape and bool((mine <= others).all())
        return bound.value <= other.value
    pairs = _pairs(bound, other)
    return all(_is_finer(mine, others) for mine, others in pairs)


def _pairs(bound: Bound, other: Bound | None) -> list[tuple[ErrorBound, ErrorBound]]:
    """What two bounds say of each kind of page."""
    policies = [
        b if isinstance(b, BoundPolicy) else BoundPolicy(b, b, other=b) for b in (bound, other) if b is not None
    ]
    mine, others = policies
    numbers = sorted({*mine.layers, *others.layers})
    pairs = [(mine.key, others.key), (mine.value, others.value), (mine.other, others.other)]
    for number in numbers:
        pair, against = (policy.pair_of(number) for policy in policies)
        pairs += list(zip(pair, against, strict=True))
    return pairs
