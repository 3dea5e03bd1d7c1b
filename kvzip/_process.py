# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What the fork and the end of a process mean to objects that own threads, locks or a GPU: they are told of both."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol


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


def _tell_fork() -> None:
    for one in list(_watched):
        one._after_fork()


def _tell_exit() -> None:
    for one in list(_watched):
        one._at_exit()
