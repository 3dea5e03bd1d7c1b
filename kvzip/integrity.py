# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""How much of what an engine moves is checked: `Integrity`, and the sampling that it asks for."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from kvzip.errors import ConfigError

__all__ = ["Integrity"]


@dataclass(frozen=True)
class Integrity:
    """Checks beside those that every load makes (lengths, header, codes).

    Attributes:
        checksum: part of the loads whose payloads' checksums are verified: 1.0 = always, 0.0 = never. Small loads of
            blocks on a GPU (`Staging.small_bytes`) are always verified: what carries them forms the checksum anyway.
        bound: part of the stores that are decoded again and compared with their pages, as with ``measure_error``;
            values outside their bound are counted as violations and logged as an error.

    Raises:
        ConfigError: a part is not between 0 and 1.
    """

    checksum: float = 1.0
    bound: float = 0.0

    def __post_init__(self) -> None:
        for name, part in (("checksum", self.checksum), ("bound", self.bound)):
            if not (isinstance(part, (int, float)) and 0 <= part <= 1):
                raise ConfigError(f"integrity {name}={part!r}: use a part of all from 0 (never) to 1 (always)")


class Sampler:
    """Picks a part of its calls, evenly spread, the first one among them. Thread-safe.

    Args:
        part: of the calls that are picked, 0 to 1.
    """

    def __init__(self, part: float) -> None:
        self._part = part
        self._lock = threading.Lock()
        self._owed = 1.0 - part if part else 0.0

    def __call__(self) -> bool:
        """Whether this call is picked."""
        if self._part in (0, 1):
            return self._part == 1
        with self._lock:
            self._owed += self._part
            picked = self._owed >= 1 - 1e-9
            if picked:
                self._owed -= 1
            return picked
