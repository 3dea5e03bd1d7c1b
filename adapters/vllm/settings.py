# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The adapter's settings, read from vLLM's ``kv_connector_extra_config``."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
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
from kvzip.controller import make_controller
from kvzip.errors import ConfigError
from kvzip.policy import make_policy
from kvzip.pressure import BoundPressure
from kvzip.types import ErrorBound

_log = logging.getLogger("kvzip")

#: Keys of ``kv_connector_extra_config`` that are vLLM's own.
VLLM_KEYS = frozenset(
    {
        "spec_name",
        "spec_module_path",
        "block_size",
        "blocks_per_chunk",
        "offload_prompt_only",
        "self_describing_kv_events",
        "sync_load_budget_bytes",
        "canonical_layout",
    }
)


#: What `KvzipOffloadingWorker.configure` can change while vLLM runs.
CHANGEABLE = frozenset({"codec", "bound", "layer_bounds", "mode"})


@dataclass(frozen=True)
class AdapterSettings(Coding):
    """What an operator may set.

    Attributes:
        cpu_bytes_to_use: bytes of host memory for the records of all workers of an engine. It is divided evenly.
        codec: name of the codec.
        bound: error bound of the values, in any form of `kvzip.calibration.parse_bounds`: a number or ``rel:1e-3`` (of
            each page's range), ``abs:1e-2``, ``rms:0.17``, ``lossless``, ``k=BOUND,v=BOUND``, ``table:FILE``. None =
            the default of the codec, `BoundPolicy.uncalibrated`.
        layer_bounds: bounds of single layers, by the layer's number, in the forms above except those of a table.
        mode: encoding mode of the codec; None = see `coding_mode`.
        verify: part of the stores, from 0 to 1, that are decoded again to count values outside the bound; slower.
        max_ctas: most thread blocks of a codec kernel on the GPU at a time; 0 = as many as fit.
        chunk_bytes: raw bytes that the GPU pipelines take in one step.
        threads: most host threads for coding on the CPU platform; 0 = all usable cores.
        policy: name of the eviction policy.
        objective: what the choice between raw and encoded serves: ``latency``, ``balanced`` or ``capacity``; None =
            everything is encoded.
        pressure: bounds that new records step through as a worker's pool fills, in the forms of `bound`.
        pressure_thresholds: part of the pool in use from which each holds; by default evenly spaced from 0.8 to 0.95.
        pressure_floor: the coarsest of them that is accepted; None = the last one.
    """

    cpu_bytes_to_use: int
    codec: str = "cuszp"
    bound: ErrorBound | BoundPolicy | None = None
    layer_bounds: Mapping[int, tuple[ErrorBound, ErrorBound]] = field(default_factory=dict)
    mode: str | None = None
    verify: float = 0.0
    max_ctas: int = 0
    chunk_bytes: int = 64 << 20
    threads: int = 0
    policy: str = "lru"
    objective: str | None = None
    pressure: tuple[ErrorBound | BoundPolicy, ...] = ()
    pressure_thresholds: tuple[float, ...] = ()
    pressure_floor: ErrorBound | BoundPolicy | None = None

    @classmethod
    def read(cls, extra_config: Mapping[str, Any]) -> AdapterSettings:
        """Take the adapter's settings out of vLLM's dictionary, and check them.

        Raises:
            ConfigError: one is missing, misspelt or out of range.
            CodecNotFoundError: no such codec.
        """
        known = {f.name for f in fields(cls)}
        for key in extra_config:
            if key in known or key in VLLM_KEYS:
                continue
            near = difflib.get_close_matches(str(key), sorted(known), n=1, cutoff=0.75)
            if near:
                raise ConfigError(f"kv_connector_extra_config has {key!r}: did you mean {near[0]!r}?")
            _log.warning("kv_connector_extra_config has %r, which kvzip does not know; it is left to vLLM", key)
        given = {key: extra_config[key] for key in known if key in extra_config}
        if not given.get("cpu_bytes_to_use"):
            raise ConfigError(
                "cpu_bytes_to_use is not set: put the bytes of host memory for KV records into "
                'kv_connector_extra_config, for instance "cpu_bytes_to_use": 8589934592'
            )
        nbytes = parse_integer("cpu_bytes_to_use", given.pop("cpu_bytes_to_use"), 1 << 20)
        return cls(nbytes).change(**given)

    def change(self, **changes: Any) -> AdapterSettings:
        """The settings with some of them changed, in the form of ``kv_connector_extra_config``.

        Raises:
            ConfigError: one is not known or out of range.
            CodecNotFoundError: no such codec.
        """
        values: dict[str, Any] = {}
        for name, value in changes.items():
            if name in ("max_ctas", "threads"):
                values[name] = parse_integer(name, value, 0)
            elif name == "chunk_bytes":
                values[name] = parse_integer(name, value, 1 << 20)
            elif name == "verify":
                values[name] = parse_fraction(name, value)
            elif name == "bound":
                values[name] = None if value is None else parse_bound(value)
            elif name == "pressure":
                values[name] = tuple(parse_bound(one) for one in _list(name, value))
            elif name == "pressure_thresholds":
                values[name] = tuple(parse_fraction(name, one) for one in _list(name, value))
            elif name == "pressure_floor":
                values[name] = None if value is None else parse_bound(value)
            elif name == "layer_bounds":
                values[name] = parse_layer_bounds(value)
            elif name in ("codec", "policy") or (name in ("mode", "objective") and value is not None):
                values[name] = parse_name(name, value)
            elif name in ("mode", "objective"):
                values[name] = None
            else:
                raise ConfigError(f"{name!r} cannot be changed: use one of {', '.join(sorted(CHANGEABLE))}")
        if "codec" in values and "mode" not in values:
            values["mode"] = None  # a mode is one of its codec's
        changed = replace(self, **values)
        codec = get_codec(changed.codec)
        if changed.mode is not None:
            codec.check_mode(changed.mode)
        for bound in changed.steps:
            codec.check_bound(bound)
        make_policy(changed.policy)
        make_controller(changed.objective)
        changed.bound_pressure  # noqa: B018 - says what is wrong with it
        return changed

    @property
    def steps(self) -> tuple[ErrorBound | BoundPolicy, ...]:
        """`bounds`, and what takes their place under pressure; `layer_bounds` hold in all of them."""
        return (self.bounds, *(self.with_layers(bound) for bound in self.pressure))

    @property
    def bound_pressure(self) -> BoundPressure | None:
        """What the engine is given.

        Raises:
            ConfigError: the bounds, the thresholds and the floor do not fit together.
        """
        if not self.pressure:
            if self.pressure_thresholds or self.pressure_floor is not None:
                raise ConfigError("pressure_thresholds or pressure_floor without pressure: give the bounds in pressure")
            return None
        return BoundPressure(self.pressure, self.pressure_thresholds, floor=self.pressure_floor)


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{name} {value!r}: give a list")
    return list(value)
