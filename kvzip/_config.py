# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Settings from the environment: the only module that reads it. ``docs/reference/settings.md`` has the same table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvzip.errors import ConfigError

_MOST_THREADS = 256


@dataclass(frozen=True)
class Setting:
    """One environment variable.

    Attributes:
        name: of the variable.
        default: what holds when it is not set, as text.
        unit: of the value; ``""`` when it has none.
        meaning: one sentence.
    """

    name: str
    default: str
    unit: str
    meaning: str


LIBRARY = Setting("KVZIP_LIBRARY", "", "path", "native library to load instead of the one that was installed")
THREADS = Setting(
    "KVZIP_THREADS", "0", "threads", "most threads of the CPU codec when a call does not say; 0 = all usable cores"
)
CPU_ISA = Setting(
    "KVZIP_CPU_ISA",
    "auto",
    "",
    "instruction set of the CPU codec: auto, baseline, avx2 or avx512; the bytes are the same",
)

SETTINGS = (LIBRARY, THREADS, CPU_ISA)


def _read(setting: Setting) -> str:
    return os.environ.get(setting.name, "").strip() or setting.default


def library_path() -> Path | None:
    """The library that KVZIP_LIBRARY names, or None."""
    text = _read(LIBRARY)
    return Path(text).expanduser() if text else None


def threads() -> int:
    """The number of threads that KVZIP_THREADS asks for; 0 = all usable cores.

    Raises:
        ConfigError: it is not a number from 0 to 256.
    """
    text = _read(THREADS)
    if not (text.isascii() and text.isdigit() and int(text) <= _MOST_THREADS):
        raise ConfigError(f"{THREADS.name}={text!r}: use a number from 0 (all usable cores) to {_MOST_THREADS}")
    return int(text)


def cpu_isa() -> str:
    """The instruction set that KVZIP_CPU_ISA asks for."""
    return _read(CPU_ISA)


def describe() -> dict[str, str]:
    """Every setting by name, as it holds now, as text."""
    return {setting.name: _read(setting) for setting in SETTINGS}
