# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""How an operator says in JSON what records are coded with: the same words in every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvzip.backends.registry import get_codec
from kvzip.bounds import BoundPolicy, differs_within_pages
from kvzip.calibration import parse_bounds
from kvzip.errors import ConfigError
from kvzip.types import ErrorBound


class Coding:
    """What the settings of every adapter have: the fields that these need, and what follows from them."""

    codec: str
    bound: ErrorBound | BoundPolicy | None
    layer_bounds: Mapping[int, tuple[ErrorBound, ErrorBound]]
    mode: str | None

    @property
    def bounds(self) -> ErrorBound | BoundPolicy:
        """`bound`, or the default; with the pairs (K, V) of `layer_bounds` in its place for these layers."""
        return self.with_layers(self.default_bound if self.bound is None else self.bound)

    @property
    def default_bound(self) -> ErrorBound | BoundPolicy:
        """What holds without `bound`."""
        return get_codec(self.codec).default_bound()

    def with_layers(self, bound: ErrorBound | BoundPolicy) -> ErrorBound | BoundPolicy:
        """Some bound, with the pairs (K, V) of `layer_bounds` in its place for these layers."""
        if not self.layer_bounds:
            return bound
        policy = bound if isinstance(bound, BoundPolicy) else BoundPolicy(bound, bound)
        return replace(policy, layers={**policy.layers, **self.layer_bounds})

    @property
    def steps(self) -> tuple[ErrorBound | BoundPolicy, ...]:
        """`bounds`, and what takes their place later, if anything does."""
        return (self.bounds,)

    @property
    def within_pages(self) -> bool:
        """Whether there are bounds that differ within a page."""
        return any(map(differs_within_pages, self.steps))

    @property
    def coding_mode(self) -> str:
        """`mode`; without one that of the codec for the bounds, of which those that differ within pages come first."""
        if self.mode is not None:
            return self.mode
        return get_codec(self.codec).default_mode(max(self.steps, key=differs_within_pages))


def parse_bound(value: Any) -> ErrorBound | BoundPolicy:
    """Error bounds as they stand in JSON: a number is a fraction of each page's range.

    Raises:
        ConfigError: they are no bounds.
        FormatError: a calibration table is none.
    """
    if isinstance(value, (ErrorBound, BoundPolicy)):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ErrorBound.relative(float(value))
    if isinstance(value, str):
        try:
            return parse_bounds(value)
        except OSError as error:
            raise ConfigError(f"bound {value!r}: the calibration table cannot be read: {error}") from error
    raise ConfigError(f"bound {value!r}: give a number such as 1e-3, or a text such as 'abs:1e-2' or 'lossless'")


def parse_layer_bounds(value: Any) -> dict[int, tuple[ErrorBound, ErrorBound]]:
    """Bounds by number of a layer, as pairs (K, V).

    Raises:
        ConfigError: they are none.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f'layer_bounds {value!r}: give bounds by layer, such as {{"0": "lossless"}}')
    found = {}
    for layer, bound in value.items():
        number = parse_integer("layer", layer, 0)
        parsed = parse_bound(bound)
        if isinstance(parsed, BoundPolicy):
            if parsed.layers:
                raise ConfigError(f"bound {bound!r} of layer {number}: a table is for all layers; put it into bound")
            found[number] = (parsed.key, parsed.value)
        else:
            found[number] = (parsed, parsed)
    return found


def parse_name(what: str, value: Any) -> str:
    """A name, as text."""
    if not isinstance(value, str):
        raise ConfigError(f"{what} {value!r}: give a name")
    return value


def parse_integer(name: str, value: Any, least: int) -> int:
    """A whole number, at least `least`; also as text or as a float without fraction."""
    number = value
    if (isinstance(value, str) and value.strip().isdigit()) or (isinstance(value, float) and value.is_integer()):
        number = int(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ConfigError(f"{name} {value!r}: give a whole number, at least {least}")
    return number


def parse_fraction(name: str, value: Any) -> float:
    """A part from 0 to 1; false and true are 0 and 1."""
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{name} {value!r}: give a part from 0 (none) to 1 (all), or false or true")
    return float(value)
