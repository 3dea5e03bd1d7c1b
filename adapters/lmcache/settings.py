# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The serde's settings, read from the ``"serde"`` object of LMCache's ``--l2-adapter``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kvzip.adapters.settings import (
    Coding,
    parse_bound,
    parse_fraction,
    parse_integer,
    parse_layer_bounds,
    parse_name,
)
from kvzip.backends.registry import get_codec
from kvzip.bounds import BoundPolicy
from kvzip.errors import ConfigError
from kvzip.types import ErrorBound


@dataclass(frozen=True)
class SerdeSettings(Coding):
    """What an operator may set.

    Attributes:
        codec: name of the codec; one that works in host memory.
        bound: error bound of the values, in any form of `kvzip.calibration.parse_bounds`: a number or ``rel:1e-3`` (of
            each page's range), ``abs:1e-2``, ``rms:0.17``, ``lossless``, ``k=BOUND,v=BOUND``, ``table:FILE``. None =
            the default of the codec, `BoundPolicy.uncalibrated`; without `head_dim` its bound of K for V too.
        layer_bounds: bounds of single layers, by the layer's place in the object.
        mode: encoding mode of the codec; None = see `coding_mode`.
        verify: part of the stores, from 0 to 1, that are decoded again before they are written; slower.
        threads: most host threads for one object; 0 = all usable cores.
        max_workers: objects that are coded at a time.
        head_dim: values of one head of one token; 0 = not known. Bounds by token and by channel need it.
        packed: objects of one plane, ``[1, layers, tokens, heads * 2 * head_dim]`` or the same without the first axis,
            have K and V of each head side by side, and are no latent cache.
    """

    codec: str = "cuszp"
    bound: ErrorBound | BoundPolicy | None = None
    layer_bounds: Mapping[int, tuple[ErrorBound, ErrorBound]] = field(default_factory=dict)
    mode: str | None = None
    verify: float = 0.0
    threads: int = 0
    max_workers: int = 2
    head_dim: int = 0
    packed: bool = False

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> SerdeSettings:
        """Take the settings out of LMCache's dictionary, and check them.

        Raises:
            ConfigError: one is misspelt or out of range, or two do not fit together.
            CodecNotFoundError: no such codec.
            FormatError: a calibration table is none.
        """
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in _READERS:
                near = difflib.get_close_matches(str(name), sorted(_READERS), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(_READERS))}"
                raise ConfigError(f"the serde 'kvzip' has no setting {name!r}: {hint}")
            values[name] = _READERS[name](value)
        settings = cls(**values)
        settings._check()
        return settings

    @property
    def default_bound(self) -> ErrorBound | BoundPolicy:
        """What holds without `bound`: where heads are not known, nothing that speaks of them."""
        bound = super().default_bound
        return bound.with_keys_bound() if isinstance(bound, BoundPolicy) and not self.head_dim else bound

    def _check(self) -> None:
        codec = get_codec(self.codec)
        codec.check_available()
        if "cpu" not in codec.devices:
            raise ConfigError(f"codec {self.codec!r} does not work in host memory, where the objects lie: use cuszp")
        if self.mode is not None:
            codec.check_mode(self.mode)
        codec.check_bound(self.bounds)
        if self.within_pages and not self.head_dim:
            raise ConfigError(
                f"bounds {self.bounds} are by token and head or by channel: set head_dim, the values of one head"
            )
        if self.packed and not self.head_dim:
            raise ConfigError("packed needs head_dim, the values of one head: without it K and V cannot be told apart")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"packed {value!r}: give true or false")
    return value


_READERS: dict[str, Callable[[Any], Any]] = {
    "codec": lambda value: parse_name("codec", value),
    "bound": lambda value: None if value is None else parse_bound(value),
    "layer_bounds": parse_layer_bounds,
    "mode": lambda value: None if value is None else parse_name("mode", value),
    "verify": lambda value: parse_fraction("verify", value),
    "threads": lambda value: parse_integer("threads", value, 0),
    "max_workers": lambda value: parse_integer("max_workers", value, 1),
    "head_dim": lambda value: parse_integer("head_dim", value, 0),
    "packed": _flag,
}
assert set(_READERS) == {f.name for f in fields(SerdeSettings)}
