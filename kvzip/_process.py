# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Objects that own threads, locks or a GPU: told of forks and of the process's end, released when nobody holds them."""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Protocol

_log = logging.getLogger("kvzip")


class Watched(Protocol):
    """Something that is told."""

    def _after_fork(self) -> None:
        """This is the child of a fork. No other thread runs; locks may be held for ever, and the GPU is the parent's.

        Must not raise, wait, or touch the GPU.
        """
        ...

    def _at_exit(self) -> None:
        """The interpreter ends. Must not raise; may wait a little."""
        ...


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_registered = False


def watch(one: Watched) -> None:
    """Tell an object of forks and of the interpreter's end, for as long as it lives."""
    global _registered
    if not _registered:  # at the first use, as nothing runs at import
        _registered = True
        atexit.register(_tell_exit)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_tell_fork)
    _watched.add(one)


def when_dropped(owner: object, release: Callable[[], None]) -> weakref.finalize[Any, Any]:
    """Have `release` called, in a thread of its own, when `owner` is collected; with a `ResourceWarning`.

    Args:
        owner: what should have been closed. `release` must not hold it.
        release: may wait; must not raise.

    Returns:
        Its ``detach()`` calls that off.
    """
    made = weakref.finalize(owner, _release, release)
    made.atexit = False
    return made


def _release(release: Callable[[], None]) -> None:
    # Whatever thread happens to collect garbage comes here. It may hold any lock, or be one that `release` waits for.
    # A `threading.Thread` would wait for its own start.
    try:
        _thread.start_new_thread(release, ())
    except RuntimeError as error:
        _log.warning("an engine was not closed, and no thread can do it: %s", str(error))
    warnings.warn(
        "an engine that used a GPU was not closed: its threads and its memory there are released now; use a with "
        "statement, or close()",
        ResourceWarning,
        stacklevel=2,
    )


def _tell_fork() -> None:
    for one in list(_watched):
        one._after_fork()


def _tell_exit() -> None:
    for one in list(_watched):
        one._at_exit()
