# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Blocks of keys and values as transformers has them, in a `SwapEngine` of their own from which nothing is evicted.

`Records` stores and loads them; a `Record` is one block there, which leaves the pool when nobody refers to it any more.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kvzip.adapters.transformers.models import require
from kvzip.backends.base import Codec
from kvzip.bounds import BoundPolicy
from kvzip.coding import max_record_bytes
from kvzip.engine import SwapEngine
from kvzip.errors import KvzipError, PoolExhaustedError
from kvzip.memory import memory_for
from kvzip.pool import HostPool
from kvzip.transfer import Transfer
from kvzip.types import BlockLayout, BlockView, DType, ErrorBound, SegmentLayout

PAGE_TOKENS = 16  # what relative bounds are relative to
_MOST_CHUNK_BYTES = 64 << 20  # raw bytes of one store
_MOST_PENDING_BYTES = 256 << 20  # raw bytes of blocks on a GPU that wait for their encoder


class Record:
    """A block in the pool. It never changes, so copies of a cache share it; who drops the last one discards it."""

    __slots__ = ("_records", "key", "transfer")

    def __init__(self, records: Records, key: bytes, transfer: Transfer | None) -> None:
        self._records = records
        self.key = key
        self.transfer = transfer  # the store that is under way; None when it has ended

    def held(self) -> bytes:
        """The key, when the record is in the pool; waits for that."""
        if self.transfer is not None:
            self.transfer.result()
            self.transfer = None
        return self.key

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return self

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's end anything may be gone already
            if self.transfer is not None:
                self.transfer.wait()
            self._records.engine.discard([self.key])


@dataclass(frozen=True)
class _Pending:
    """A store under way: its tensors must stay as they are, and at most so many bytes of the pool are its."""

    transfer: Transfer
    tensors: tuple[Any, Any]
    pool_bytes: int
    nbytes: int


class Records:
    """The records of a cache and of its copies: an engine of their own, from which nothing is evicted.

    Args:
        pool, bound, mode, codec, block_tokens, threads: see `kvzip.adapters.transformers.cache.CompressedCache`.
    """

    def __init__(
        self,
        pool: HostPool | int,
        bound: ErrorBound | BoundPolicy,
        mode: str | None,
        codec: str | Codec,
        block_tokens: int,
        threads: int,
    ) -> None:
        self.block_tokens = block_tokens
        self._own_pool: HostPool | None = None
        if not isinstance(pool, HostPool):
            (torch,) = require("torch")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            pool = self._own_pool = HostPool(pool, resource=memory_for(device))
        try:
            self.engine = SwapEngine(pool, bound=bound, mode=mode, codec=codec, threads=threads)
        except BaseException:
            if self._own_pool is not None:
                self._own_pool.close()
            raise
        self._numbers = itertools.count()
        self._pending: deque[_Pending] = deque()

    def store(
        self,
        keys: Any,
        values: Any,
        spots: Sequence[tuple[int, int]],
        bound: ErrorBound | BoundPolicy,
        sink: Sequence[bool],
    ) -> list[Record]:
        """Encode blocks. On a GPU it goes on in the background.

        Args:
            keys: contiguous, shape ``[rows, kv_heads, tokens, head_dim]``; on a GPU they must stay as they are.
            values: the same; head_dim may differ.
            spots: row and first token of each block.
            bound: how far they may be from what they are.
            sink: for each, whether a sequence begins there.

        Raises:
            PoolExhaustedError: the pool cannot hold them; on a GPU it may come later. No other record has left.
        """
        made: list[Record] = []
        layout = _layout(keys, values, self.block_tokens)
        most = min(_MOST_CHUNK_BYTES, self.engine.pool.capacity_bytes // 64)
        step = max(1, most // layout.nbytes)
        for first in range(0, len(spots), step):
            part = slice(first, first + step)
            made += self._store_chunk(keys, values, layout, spots[part], bound, sink[part])
        return made

    def _store_chunk(
        self,
        keys: Any,
        values: Any,
        layout: BlockLayout,
        spots: Sequence[tuple[int, int]],
        bound: ErrorBound | BoundPolicy,
        sink: Sequence[bool],
    ) -> list[Record]:
        engine, pool = self.engine, self.engine.pool
        blocks = _view(keys, values, layout, spots)
        names = [next(self._numbers).to_bytes(8, "little") for _ in spots]
        self._release()
        worst = len(names) * pool.round_up(max_record_bytes(engine.settings.codec, layout))
        if worst + sum(p.pool_bytes for p in self._pending) <= pool.free_bytes:
            transfer = engine.store(names, blocks, bound=bound, sink=sink)
        else:  # nearly full: the real sizes decide, and what is held must not make room
            self.settle()
            with engine.pin(engine.list_keys()):
                transfer = engine.store(names, blocks, bound=bound, sink=sink)
                transfer.result()
        pending = _Pending(transfer, (keys, values), worst, blocks.nbytes)
        self._pending.append(pending)
        if transfer.done():
            self.settle()
        return [Record(self, name, transfer) for name in names]

    def load(self, records: Sequence[Record], keys: Any, values: Any, spots: Sequence[tuple[int, int]]) -> Transfer:
        """Decode records into tensors; shapes as in `store`. On a GPU it goes on in the background.

        Raises:
            CorruptRecordError: one is damaged; on a GPU it comes from the transfer.
        """
        self._release()
        blocks = _view(keys, values, _layout(keys, values, self.block_tokens), spots)
        return self.engine.load([record.held() for record in records], blocks)

    @property
    def pending_bytes(self) -> int:
        """Raw bytes of blocks that wait for their encoder."""
        return sum(p.nbytes for p in self._pending)

    def pool_bytes(self) -> int:
        """Bytes of the pool that the records take."""
        return sum(self.engine.record_sizes(self.engine.list_keys()))

    def settle(self) -> None:
        """Wait for all stores under way."""
        while self._pending:
            self._finish_first()

    def _release(self) -> None:
        """Let go of the tensors of stores that have ended, and wait for some where too many are under way."""
        while self._pending and (self._pending[0].transfer.done() or self.pending_bytes > _MOST_PENDING_BYTES):
            self._finish_first()

    def _finish_first(self) -> None:
        result = self._pending.popleft().transfer.result()
        if result.evicted:  # only when others take from the same pool at the same time
            raise PoolExhaustedError(
                f"{result.evicted} records of this cache had to leave, others fill the same pool of "
                f"{self.engine.pool.capacity_bytes} bytes: make it larger",
                requested=result.record_bytes,
                free=self.engine.pool.free_bytes,
            )

    def close(self) -> None:
        """Forget all records and give memory back."""
        with suppress(KvzipError):
            self.settle()
        self.engine.close()
        if self._own_pool is not None:
            self._own_pool.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Records:
        return self

    def __del__(self) -> None:
        if hasattr(self, "engine"):
            with suppress(Exception):  # at the interpreter's end anything may be gone already
                self.close()


def _layout(keys: Any, values: Any, block_tokens: int) -> BlockLayout:
    """How a block lies in tensors of shape ``[rows, kv_heads, tokens, head_dim]``."""
    dtypes = DType.parse(str(keys.dtype)), DType.parse(str(values.dtype))
    dims = int(keys.shape[-1]), int(values.shape[-1])
    return _layout_of(dtypes, int(keys.shape[1]), dims, int(keys.shape[-2]), block_tokens)


@lru_cache(maxsize=64)
def _layout_of(
    dtypes: tuple[DType, DType], heads: int, dims: tuple[int, int], tokens: int, block_tokens: int
) -> BlockLayout:
    segments = []
    for first in range(0, block_tokens, PAGE_TOKENS):
        for tensor, kind in enumerate("kv"):
            line = dims[tensor] * dtypes[tensor].itemsize
            segments.append(
                SegmentLayout(
                    tensor,
                    dtypes[tensor],
                    PAGE_TOKENS,
                    heads,
                    dims[tensor],
                    offset_bytes=first * line,
                    token_stride_bytes=line,
                    head_stride_bytes=tokens * line,
                    kind=kind,
                )
            )
    return BlockLayout(tuple(segments), "HND")


def _view(keys: Any, values: Any, layout: BlockLayout, spots: Sequence[tuple[int, int]]) -> BlockView:
    """Blocks of tensors of shape ``[rows, kv_heads, tokens, head_dim]``, by row and first token.

    A block may begin at any token, so block n of the view is the one that begins n lines of head_dim values into the
    memory. Such blocks overlap; those that are chosen do not.
    """
    rows, heads, tokens, _ = keys.shape
    size = layout.segments[0].tokens * len(layout.segments) // 2
    lines = (rows * heads - heads + 1) * tokens - size + 1
    tensors = [
        t.as_strided((lines, heads, size, t.shape[-1]), (t.shape[-1], tokens * t.shape[-1], t.shape[-1], 1))
        for t in (keys, values)
    ]
    return BlockView(tensors, layout, [row * heads * tokens + token for row, token in spots])
