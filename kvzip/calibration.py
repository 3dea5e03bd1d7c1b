# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What a model's queries look like: the table that gives each channel of K the error that attention can bear.

The logit of a query q and a key k is a sum over channels; an error e of channel c changes it by q_c x e. So a channel
may have an error that is inverse to the size of the queries there. One pass over a text of about 2,000 tokens measures
that size well enough, and it carries over to other texts. The error that a bound of t allows is about t in a logit
times sqrt(head_dim), for each channel by itself.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.bounds import BoundPolicy
from kvzip.errors import ConfigError, FormatError
from kvzip.types import BoundKind, ErrorBound

__all__ = ["CalibrationTable", "parse_bounds"]

_FORMAT = "kvzip calibration 1"
_FORMAT_OF_SHAPES = "kvzip calibration 2"  # of layers that differ; what reads only 1 must not take their padding
_T, _R = 0.4, 0.17  # where nothing was measured; bench/fidelity.py has what they do to one model
_FLOOR = 0.01  # of the head's mean: a channel that queries never use in the text may be used in another one


@dataclass(frozen=True, eq=False)
class CalibrationTable:
    """Second moments of a model's queries, after the rotary embedding.

    Attributes:
        moments: shape ``[layers, kv_heads, head_dim]``, float32: for each channel the sum, over the query heads that
            share the KV head, of the mean of q_c^2 over the tokens of a text. Where layers differ, the sizes are the
            largest ones, and what is beyond a layer's own is padding.
        model: name of the model, for messages.
        tokens: tokens of the text; 0 = not known.
        value_factors: shape ``[layers]``, float32: what the bound of V is multiplied by in each layer; None = 1.
        shapes: KV heads and head_dim of each layer, (0, 0) for a layer without attention; none given = all are alike.
        t, r: what `policy` takes when it is not told; what the model bears, where it was measured.

    Raises:
        ConfigError: the moments or the factors have another shape, or one is negative or not finite; or t or r is not
            positive.
    """

    moments: npt.NDArray[np.float32]
    model: str = ""
    tokens: int = 0
    value_factors: npt.NDArray[np.float32] | None = None
    shapes: tuple[tuple[int, int], ...] = ()
    t: float = _T
    r: float = _R

    def __post_init__(self) -> None:
        moments = np.array(self.moments, np.float32)
        if moments.ndim != 3 or moments.size == 0:
            raise ConfigError(f"moments of shape {moments.shape}: give [layers, kv_heads, head_dim]")
        if not (np.isfinite(moments).all() and (moments >= 0).all()):
            raise ConfigError("a query moment is negative or not finite: calibrate again")
        shapes = tuple((int(h), int(d)) for h, d in self.shapes) or ((moments.shape[1], moments.shape[2]),) * len(
            moments
        )
        most = tuple(max(sizes) for sizes in zip(*shapes, strict=True))
        if len(shapes) != len(moments) or most != moments.shape[1:] or any((h == 0) != (d == 0) for h, d in shapes):
            raise ConfigError(
                f"layers of {shapes} KV heads and channels do not fit moments of shape {moments.shape}: the moments' "
                "axes are the layers, the most KV heads and the most channels of any layer"
            )
        object.__setattr__(self, "shapes", shapes)
        for layer, (heads, dim) in zip(moments, shapes, strict=True):
            layer[heads:] = layer[:, dim:] = 0
            if not (layer[:heads].max(axis=1) > 0).all():
                raise ConfigError("a KV head has only zero moments: its queries were not measured; calibrate again")
        moments.flags.writeable = False
        object.__setattr__(self, "moments", moments)
        if self.value_factors is not None:
            factors = np.array(self.value_factors, np.float32)
            if factors.shape != moments.shape[:1] or not (np.isfinite(factors).all() and (factors > 0).all()):
                raise ConfigError(f"value factors {factors}: give one finite, positive number for each layer")
            factors.flags.writeable = False
            object.__setattr__(self, "value_factors", factors)
        if not (np.isfinite(self.t) and self.t > 0 and 0 < self.r <= 1):
            raise ConfigError(f"t {self.t!r}, r {self.r!r} of a calibration table: t is positive, r in (0, 1]")

    @property
    def geometry(self) -> tuple[int, int, int]:
        """(layers, KV heads, head_dim), the largest where layers differ."""
        layers, heads, dim = self.moments.shape
        return layers, heads, dim

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have attention of one shape."""
        return len(set(self.shapes)) == 1

    def select(self, *, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None) -> CalibrationTable:
        """The table of some layers or KV heads, such as those of one rank of a tensor-parallel model.

        Raises:
            ConfigError: heads are selected of layers that have different numbers of them.
        """
        chosen = list(range(len(self.moments)) if layers is None else layers)
        shapes = [self.shapes[layer] for layer in chosen]
        own = range(self.geometry[1]) if heads is None else heads
        if heads is not None:
            if len({h for h, _ in shapes}) > 1:
                raise ConfigError(
                    f"heads {list(heads)} of layers with {shapes} KV heads and channels: select layers first"
                )
            shapes = [(len(own), d) for _, d in shapes]
        most_heads, most_dim = (max(sizes) for sizes in zip(*shapes, strict=True))
        moments = self.moments[chosen][:, list(own)[:most_heads], :most_dim]
        factors = None if self.value_factors is None else self.value_factors[chosen]
        return replace(self, moments=moments, value_factors=factors, shapes=tuple(shapes))

    def key_bounds(self, t: float) -> npt.NDArray[np.float64]:
        """Absolute bounds of K: ``t / sqrt(moment)``, the moments floored at 1 % of the mean of their head.

        Returns:
            Shape ``[layers, kv_heads, head_dim]``; NaN where a layer has padding.

        Raises:
            ConfigError: t is not finite and positive.
        """
        if not (np.isfinite(t) and t > 0):
            raise ConfigError(f"t {t!r} is not finite and positive: use 0.4")
        bounds = np.full(self.moments.shape, np.nan)
        for bound, layer, (heads, dim) in zip(bounds, self.moments.astype(np.float64), self.shapes, strict=True):
            moments = layer[:heads, :dim]
            if heads:
                floor = _FLOOR * moments.mean(axis=1, keepdims=True)
                bound[:heads, :dim] = t / np.sqrt(np.maximum(moments, floor))
        return bounds

    def policy(self, t: float | None = None, r: float | None = None, *, sink: ErrorBound | None = None) -> BoundPolicy:
        """Bounds for this model: K by channel, V by token, the block of position 0 exact.

        Args:
            t: how much of an error attention logits may get through one channel of K; by default the table's.
            r: error of V relative to the rms of its token's vector, times the factor of its layer; by default as much
                larger or smaller than the table's as t is.
            sink: bound of blocks that begin a sequence; by default lossless.

        Raises:
            ConfigError: t is not finite and positive, or r is not in (0, 1].
        """
        t = self.t if t is None else t
        r = min(1.0, self.r * t / self.t) if r is None else r
        return self._policy(t, ErrorBound.token_rms(r), ErrorBound.lossless() if sink is None else sink)

    def _policy(
        self, t: float, value: ErrorBound, sink: ErrorBound | None, other: ErrorBound | None = None
    ) -> BoundPolicy:
        keys = {
            layer: ErrorBound.channel_table(bounds[:heads, :dim])
            for layer, (bounds, (heads, dim)) in enumerate(zip(self.key_bounds(t), self.shapes, strict=True))
            if heads
        }
        return BoundPolicy(
            key=next(iter(keys.values())),
            value=value,
            layers={layer: (key, self._value(value, layer)) for layer, key in keys.items()},
            sink=sink,
            other=ErrorBound.lossless() if other is None else other,
            num_layers=len(self.shapes),
        )

    def _value(self, bound: ErrorBound, layer: int) -> ErrorBound:
        if self.value_factors is None or bound.kind is not BoundKind.TOKEN_RMS:
            return bound
        return ErrorBound.token_rms(min(1.0, bound.value * float(self.value_factors[layer])))

    def save(self, path: str | Path) -> None:
        """Write the table: JSON where the name ends in ``.json``, else NumPy's ``.npz``."""
        target = Path(path)
        about: dict[str, Any] = {"format": _FORMAT, "model": self.model, "tokens": self.tokens}
        about["geometry"] = list(self.geometry)
        if not self.is_uniform:
            about |= {"format": _FORMAT_OF_SHAPES, "shapes": [list(shape) for shape in self.shapes]}
        about["value_factors"] = None if self.value_factors is None else self.value_factors.tolist()
        about |= {"t": self.t, "r": self.r}
        if target.suffix == ".json":
            target.write_text(json.dumps({**about, "moments": self.moments.tolist()}), encoding="utf-8")
            return
        with target.open("wb") as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), moments=self.moments)

    @classmethod
    def load(cls, path: str | Path) -> CalibrationTable:
        """Read a table that `save` wrote, or a bare ``.npy`` of moments. Nothing is unpickled.

        Raises:
            FormatError: the file is no such table.
            OSError: it cannot be read.
        """
        source = Path(path)
        about: dict[str, Any]
        try:
            if source.suffix == ".npy":
                return cls(np.load(source, allow_pickle=False), source.stem)
            if source.suffix == ".json":
                about = json.loads(source.read_text(encoding="utf-8"))
                moments = np.asarray(about["moments"], np.float32)
            else:
                with np.load(source, allow_pickle=False) as arrays:
                    about = json.loads(arrays["about"].tobytes())
                    moments = np.asarray(arrays["moments"], np.float32)
            known = _FORMAT_OF_SHAPES if "shapes" in about else _FORMAT
            if about["format"] != known or list(moments.shape) != about["geometry"]:
                raise ConfigError(f"format {about['format']!r}, geometry {about['geometry']}, shape {moments.shape}")
            shapes = tuple((h, d) for h, d in about.get("shapes", ()))
            given = {name: float(about[name]) for name in ("t", "r") if name in about}  # older tables have none
            factors = about.get("value_factors")
            return cls(moments, str(about["model"]), int(about["tokens"]), factors, shapes, **given)
        except (KeyError, TypeError, ValueError, EOFError, RecursionError, zipfile.BadZipFile) as error:
            raise FormatError(f"{source} is no calibration table ({error}): make one with `kvzip calibrate`") from error


def parse_bounds(text: str) -> ErrorBound | BoundPolicy:
    """Read the command line's form of error bounds.

    Either one bound as `ErrorBound.parse` takes it; or ``table:FILE``, the policy of a calibration table, with another
    t than the table's behind it as ``table:FILE:0.6`` (r grows with it); or parts such as
    ``k=table:FILE,v=rms:0.17,sink=lossless,other=1e-3`` (``k`` and ``v`` are required, ``sink=none`` treats the first
    block of a sequence as the others).

    Raises:
        ConfigError: the text has none of these forms.
        FormatError: the file is no calibration table.
        OSError: it cannot be read.
    """
    if "=" not in text:
        if not text.startswith("table:"):
            return ErrorBound.parse(text)
        calibration, strength = _table(text)
        return calibration.policy(strength)
    parts: dict[str, str] = {}
    for part in text.split(","):
        name, _, bound = part.partition("=")
        if name not in ("k", "v", "sink", "other") or name in parts:
            raise ConfigError(f"bounds {text!r}: use k=BOUND,v=BOUND and, if you like, sink=BOUND and other=BOUND")
        parts[name] = bound
    if not {"k", "v"} <= set(parts):
        raise ConfigError(f"bounds {text!r}: k=BOUND and v=BOUND are both needed")
    value = ErrorBound.parse(parts["v"])
    sink = None if parts.get("sink") == "none" else ErrorBound.parse(parts.get("sink", "lossless"))
    other = ErrorBound.parse(parts.get("other", "lossless"))
    if not parts["k"].startswith("table:"):
        return BoundPolicy(ErrorBound.parse(parts["k"]), value, sink=sink, other=other)
    table, t = _table(parts["k"])
    return table._policy(t, value, sink, other)


def _table(text: str) -> tuple[CalibrationTable, float]:
    whole = text.removeprefix("table:")
    path, _, number = whole.rpartition(":")
    t: float | None
    try:
        t = float(number)
    except ValueError:  # no number: all of it is the file's name
        path, t = whole if Path(whole).is_file() else "", None
    if not path or (t is not None and not math.isfinite(t)):
        raise ConfigError(
            f"bound {text!r} names no calibration table: use table:FILE or table:FILE:T, such as "
            "table:calibration.npz:0.4"
        )
    table = CalibrationTable.load(path)
    return table, table.t if t is None else t
