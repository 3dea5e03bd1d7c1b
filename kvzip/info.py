# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What this installation can do, for bug reports and for programs; it answers even when parts are broken."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import Any

from kvzip import _config, _cuda, _native
from kvzip.backends.portable import device_codec
from kvzip.backends.registry import codec_names, get_codec
from kvzip.record import FORMAT_VERSION

_OPTIONAL = (
    "numpy",
    "crc32c",
    "torch",
    "triton",
    "nvidia-nvcomp-cu13",
    "vllm",
    "lmcache",
    "transformers",
    "ml_dtypes",
    "prometheus_client",
)


def system_info() -> dict[str, Any]:
    """Versions, the native library, codecs and devices.

    Never raises: what cannot be found out is reported as ``{"error": "..."}`` in its place.
    """
    return {
        "kvzip": _version("kvzip"),
        "format_version": FORMAT_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "native": _guarded(_native.describe),
        "cuda": _guarded(_cuda.describe),
        "device_codec": _guarded(lambda: asdict(device_codec())),
        "codecs": {name: _guarded(lambda name=name: _codec(name)) for name in codec_names()},
        "packages": {name: _version(name) for name in _OPTIONAL},
        "settings": _config.describe(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _codec(name: str) -> dict[str, Any]:
    codec = get_codec(name)
    return {"modes": list(codec.modes), "lossless_only": codec.lossless_only, "devices": list(codec.devices)}


def _guarded(question: Any) -> Any:
    try:
        return question()
    except Exception as error:  # a report must not fail because a part does
        return {"error": f"{type(error).__name__}: {error}"}
