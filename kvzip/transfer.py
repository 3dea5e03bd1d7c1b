# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`Transfer`: a store or a load under way, and what it did."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvzip.errors import KvzipError, TransferError


@dataclass(frozen=True)
class TransferResult:
    """What a finished transfer did.

    Attributes:
        blocks: number of blocks.
        raw_bytes: bytes of their values.
        record_bytes: bytes of their records in the pool.
        seconds: from the call to its end.
        evicted: records that had to leave the pool.
        fallbacks: pages that were not coded as asked, by reason.
        max_error: largest absolute error of a store with ``measure_error``, else None.
        violations: values that broke the bound in such a store (0 unless a codec is at fault), else None.
    """

    blocks: int
    raw_bytes: int
    record_bytes: int
    seconds: float
    evicted: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    max_error: float | None = None
    violations: int | None = None


class Transfer:
    """A store or a load that was accepted. Thread-safe.

    On the CPU the work is done when `store` or `load` returns, and an error has been raised there.
    """

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._result: TransferResult | None = None
        self._error: KvzipError | None = None

    def done(self) -> bool:
        """Whether the transfer has ended, well or not. Never blocks."""
        return self._finished.is_set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Block the host until the transfer has ended.

        Args:
            timeout_seconds: give up after this long; None waits for ever.

        Returns:
            Whether it has ended.

        Raises:
            TransferError: it failed; the pool and the pages are as they were.
        """
        if not self._finished.wait(timeout_seconds):
            return False
        if self._error is not None:
            raise self._error
        return True

    def result(self, timeout_seconds: float | None = None) -> TransferResult:
        """Wait, and say what was done.

        Raises:
            TransferError: it failed, or it has not ended within the time.
        """
        if not self.wait(timeout_seconds):
            raise TransferError(f"the transfer has not ended within {timeout_seconds} s: wait longer")
        assert self._result is not None
        return self._result

    def _finish(self, result: TransferResult) -> None:
        self._result = result
        self._finished.set()
