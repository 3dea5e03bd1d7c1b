# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The adapter's settings, read from vLLM's ``kv_connector_extra_config``."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kvzip.backends.registry import get_codec
from kvzip.errors import ConfigError
from kvzip.policy import make_policy
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


@dataclass(frozen=True)
class AdapterSettings:
    """What an operator may set.

    Attributes:
        cpu_bytes_to_use: bytes of host memory for the records of all workers of an engine. It is divided evenly.
        codec: name of the codec.
        bound: error bound of the values: a number or ``rel:1e-3`` (of each page's range), ``abs:1e-2``, ``lossless``.
        mode: encoding mode of the codec; None = its first.
        verify: decode every stored block as well and count the values outside the bound; slower.
        max_ctas: most thread blocks of a codec kernel on the GPU at a time; 0 = as many as fit.
        chunk_bytes: raw bytes that the GPU pipelines take in one step.
        threads: most host threads for coding on the CPU platform; 0 = all usable cores.
        policy: name of the eviction policy.
    """

    cpu_bytes_to_use: int
    codec: str = "cuszp"
    bound: ErrorBound = field(default_factory=lambda: ErrorBound.relative(1e-3))
    mode: str | None = None
    verify: bool = False
    max_ctas: int = 0
    chunk_bytes: int = 64 << 20
    threads: int = 0
    policy: str = "lru"

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
        values: dict[str, Any] = {
            "cpu_bytes_to_use": _integer("cpu_bytes_to_use", given.pop("cpu_bytes_to_use"), 1 << 20),
        }
        for name, least in (("max_ctas", 0), ("chunk_bytes", 1 << 20), ("threads", 0)):
            if name in given:
                values[name] = _integer(name, given.pop(name), least)
        if "verify" in given:
            values["verify"] = _boolean("verify", given.pop("verify"))
        if "bound" in given:
            values["bound"] = parse_bound(given.pop("bound"))
        for name in ("codec", "mode", "policy"):
            value = given.pop(name, None)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{name} {value!r}: give a name")
            if value is not None:
                values[name] = value
        settings = cls(**values)
        codec = get_codec(settings.codec)
        if settings.mode is not None:
            codec.check_mode(settings.mode)
        make_policy(settings.policy)
        return settings


def parse_bound(value: Any) -> ErrorBound:
    """An error bound as it stands in JSON: a number is a fraction of each page's range.

    Raises:
        ConfigError: it is no bound.
    """
    if isinstance(value, ErrorBound):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return ErrorBound.relative(float(value))
    if isinstance(value, str):
        return ErrorBound.parse(value)
    raise ConfigError(f"bound {value!r}: give a number such as 1e-3, or a text such as 'abs:1e-2' or 'lossless'")


def _integer(name: str, value: Any, least: int) -> int:
    number = value
    if (isinstance(value, str) and value.strip().isdigit()) or (isinstance(value, float) and value.is_integer()):
        number = int(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise ConfigError(f"{name} {value!r}: give a whole number, at least {least}")
    return number


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} {value!r}: give true or false")
    return value
