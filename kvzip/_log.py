# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The logger ``kvzip``, and warnings that are worth saying once."""

from __future__ import annotations

import logging

logger = logging.getLogger("kvzip")
logger.addHandler(logging.NullHandler())  # what an application wants to see of a library it says itself
_logged: set[tuple[str, str]] = set()
_MOST_LOGGED = 1000  # details may differ every time: neither the log nor this set grows for ever


def log_once(event: str, detail: str) -> None:
    """Log a warning the first time that this event happens with this detail."""
    if (event, detail) not in _logged and len(_logged) < _MOST_LOGGED:
        _logged.add((event, detail))
        logger.warning("%s: %s (logged once; the counters have the rest)", event, detail)
