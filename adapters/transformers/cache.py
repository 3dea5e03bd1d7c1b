# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""`CompressedCache`: a KV cache for ``generate`` of transformers whose layers lie compressed in host memory.

A layer's tokens are cut into blocks. A full block is encoded once, when its last token comes, and never changes: a
lossy bound errs once, however long the sequence gets. The tokens behind the last full block, the *tail*, stay as they
are on the model's device. An attention layer gets its whole K and V as new tensors: records decoded into them, the tail
and the new tokens behind. They are gone when the layer has used them, so that at a time the device holds one layer, on
a GPU the next one too, which is loaded while this one computes, and the tails.

Records are immutable, so rows of a batch, and copies of a cache, share them: beams are reordered without a copy.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from kvzip.adapters.transformers.records import PAGE_TOKENS, Record, Records
from kvzip.backends.base import Codec
from kvzip.backends.registry import get_codec
from kvzip.bounds import BoundPolicy
from kvzip.engine import SwapEngine
from kvzip.errors import BackendUnavailableError, ConfigError, CorruptRecordError, KvzipError
from kvzip.pool import HostPool
from kvzip.transfer import Transfer
from kvzip.types import ErrorBound

try:
    import torch
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )
except ImportError as error:
    raise BackendUnavailableError(
        f"cannot import {error.name or error}: pip install 'kvzip[transformers]' (transformers 5)"
    ) from error

__all__ = ["CacheMemory", "CompressedCache"]

# transformers 5.0 crops to a length, later versions by a number of tokens; only 0 is not told apart by its sign.
_CROPS_TO_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


@dataclass(frozen=True)
class CacheMemory:
    """Where the bytes of a cache are now.

    Attributes:
        device_bytes: tensors that the cache holds on the model's devices: tails, layers loaded ahead, blocks that wait
            for their encoder, and layers of kinds that are not compressed. The layer that is computing is not among
            them: it belongs to the model.
        pool_bytes: bytes of the host pool that the records take; copies of a cache share them.
        raw_bytes: bytes of the values in these records.
    """

    device_bytes: int
    pool_bytes: int
    raw_bytes: int


class CompressedCache(Cache):
    """A cache whose full-attention and sliding-window layers are kept compressed; for ``generate(past_key_values=)``.

    Layers of other kinds (linear attention, indexed attention, those of a model's own) stay as transformers keeps them.
    A cache serves one batch of sequences at a time; `reset` makes it ready for another. After an error it must be
    reset. A deep copy shares the records of the original. Not thread-safe; cannot be pickled, compiled whole, captured
    in a CUDA graph, or differentiated through.

    Args:
        config: the model's configuration.
        pool: bytes of host memory for records, pinned where there is a GPU; or a `HostPool`, which caches may share.
        bound: how far keys and values may be from the model's: an `ErrorBound`, or a `BoundPolicy` by layers of the
            model; by default `BoundPolicy.uncalibrated`, and ``ErrorBound.lossless()`` keeps every bit.
            A page has 16 tokens.
        mode: encoding mode; by default `Codec.default_mode` of the bound.
        codec: name of a codec, or a codec.
        block_tokens: tokens of a record, a multiple of 16. More are faster; fewer leave a shorter tail uncompressed.
        sink: whether the block that begins a sequence gets `BoundPolicy.sink`, or is lossless under an `ErrorBound`.
        left_padding: tokens of padding before each row's first token, shape ``[rows]``: there its sequence begins. By
            default rows are not padded. Rows that ``generate`` makes of one (beams) follow from it.
        prefetch: load the next layer while this one computes; None: on a GPU.
        threads: most host threads for coding; 0 = all cores that the process may use.

    Raises:
        ConfigError: a setting is out of range, the model is an encoder-decoder, or none of its layers can be
            compressed.
    """

    def __init__(
        self,
        config: Any,
        pool: HostPool | int,
        *,
        bound: ErrorBound | BoundPolicy | None = None,
        mode: str | None = None,
        codec: str | Codec = "cuszp",
        block_tokens: int = 64,
        sink: bool = True,
        left_padding: Sequence[int] | Any = (),
        prefetch: bool | None = None,
        threads: int = 0,
    ) -> None:
        if block_tokens < PAGE_TOKENS or block_tokens % PAGE_TOKENS:
            raise ConfigError(f"block_tokens {block_tokens}: use a multiple of {PAGE_TOKENS} such as 64")
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError("an encoder-decoder model keeps two caches: use EncoderDecoderCache of transformers")
        layers = DynamicCache(config=config).layers
        if not any(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            raise ConfigError(
                f"none of the {len(layers)} layers of {type(config).__name__} has full or sliding-window attention: "
                "use a cache of transformers"
            )
        bound = get_codec(codec).default_bound() if bound is None else bound
        if isinstance(bound, BoundPolicy) and bound.num_layers not in (None, len(layers)):
            raise ConfigError(
                f"the bounds are for {bound.num_layers} layers, the model has {len(layers)}: use its own table"
            )
        padding = torch.as_tensor(left_padding, dtype=torch.int64).reshape(-1).tolist()
        if min(padding, default=0) < 0:
            raise ConfigError(f"left_padding {padding}: give numbers of tokens")
        records = Records(pool, bound, mode, codec, block_tokens, threads)
        for number, layer in enumerate(layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                window = layer.sliding_window if layer.is_sliding else None
                layers[number] = CompressedLayer(
                    records,
                    number,
                    bound=_of_layer(bound, number),
                    sinks=[tokens // block_tokens for tokens in padding] or [0] if sink else [],
                    sliding_window=window,
                )
        super().__init__(layers=layers)
        self._records = records
        self._prefetch = prefetch
        self._failed = ""

    # A compiled model leaves its graph here; with fullgraph=True torch says so.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add tokens to a layer, and return all that its attention sees.

        Args:
            key_states: shape ``[rows, kv_heads, tokens, head_dim]``, bfloat16, float16 or float32.
            value_states: the same; its head_dim may differ.
            layer_idx: the layer.
            *args: not used.
            **kwargs: not used.

        Returns:
            K and V, exact where the tokens are of the tail or new, within the bound otherwise.

        Raises:
            ConfigError: what comes does not fit what is held, or the cache cannot serve this way of running a model.
            CorruptRecordError: a record of the layer is damaged.
            PoolExhaustedError: the pool cannot hold the new blocks.
        """
        if self._failed:
            raise ConfigError(f"this cache failed before ({self._failed}): reset() it and run the prompt again")
        if layer_idx >= len(self.layers):
            raise ConfigError(f"layer {layer_idx} of a cache with {len(self.layers)}: make it from the model's config")
        layer = self.layers[layer_idx]
        if not isinstance(layer, CompressedLayer):
            kept: tuple[Any, Any] = layer.update(key_states, value_states, *args, **kwargs)
            return kept
        with self._all_or_failed(f"in layer {layer_idx}"):
            if self._prefetch or (self._prefetch is None and key_states.device.type == "cuda"):
                self._load_next(layer_idx, key_states.shape[-2])
            return layer.update(key_states, value_states)

    @contextmanager
    def _all_or_failed(self, where: str) -> Iterator[None]:
        """After an error layers may hold different numbers of tokens: nothing works before `reset`."""
        try:
            yield
        except BaseException as error:
            self._failed = f"{type(error).__name__} {where}"
            raise

    def _load_next(self, layer_idx: int, tokens: int) -> None:
        """Start to load the layer that comes next: of this pass, or the first one, for a pass of one token."""
        others = [i for i, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)]
        following = next((i for i in others if i > layer_idx), None)
        if following is not None:
            self.layers[following].prefetch(tokens)
        elif others[0] != layer_idx:
            self.layers[others[0]].prefetch(1)

    def early_initialization(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: records have no static place."""
        raise ConfigError("a compressed cache cannot be exported or made static: use StaticCache of transformers")

    def activate_past_recording(self) -> None:
        """Keep what leaves a sliding window until the next `crop`, which may then go back."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end of all layers: see `CompressedLayer.crop`.

        Raises:
            ConfigError: a sliding window cannot go back so far; nothing was changed.
            CorruptRecordError: a record where the sequence ends now is damaged.
        """
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.length_after(tokens_to_remove)
        with self._all_or_failed("in crop"):
            super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all sequences; their records leave the pool."""
        super().reset()
        self._failed = ""

    def memory(self) -> CacheMemory:
        """Where the bytes of the cache are now."""
        stats = self._records.engine.stats()
        device = sum(map(_nbytes, self.layers)) + self._records.pending_bytes
        return CacheMemory(device, self._records.pool_bytes(), stats.raw_bytes)

    @property
    def engine(self) -> SwapEngine:
        """The engine that holds the records, for its statistics and metrics."""
        return self._records.engine

    def close(self) -> None:
        """Give the pool's memory back, for all copies of the cache too. Happens by itself when they are all gone."""
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.offload()
        self._records.close()

    def __enter__(self) -> CompressedCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        self._records.settle()
        for layer in self.layers:
            if isinstance(layer, CompressedLayer):
                layer.offload()
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CompressedCache cannot be pickled: its records lie in a pool")


class CompressedLayer(CacheLayerMixin):
    """One attention layer of a `CompressedCache`: blocks in the pool, and the tail behind them.

    Args:
        records: where blocks go.
        number: the layer, for messages.
        bound: of its blocks.
        sinks: number of the block that begins a sequence, for each row; rows that were made of one follow each other.
            Empty: none is protected.
        sliding_window: tokens that a query sees, itself included; None = all.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self,
        records: Records,
        number: int,
        *,
        bound: ErrorBound | BoundPolicy,
        sinks: Sequence[int],
        sliding_window: int | None,
    ) -> None:
        super().__init__()
        self._records = records
        self._number = number
        self._bound = bound
        self._padding_blocks = tuple(sinks)
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.record_past = False  # of sliding windows: keep what has left the window until `crop`
        self._ahead: _Loading | None = None
        self._forget()

    def _forget(self) -> None:
        self._rows: list[list[Record]] = []  # of each row the records of its blocks, in order
        self._sinks: list[int] = []  # of each row the number of the block that begins its sequence; -1: none
        self._first = 0  # position of the first token that is held: a sliding window gives up blocks
        self._tail: tuple[Any, Any] | None = None
        self._tail_decoded = False  # the tail begins with values that a record was decoded to
        self.is_initialized = False

    # ---- what a cache of transformers asks of a layer

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Take shapes, dtype and device from the first tokens."""
        for states in (key_states, value_states):
            if states.dtype not in (torch.bfloat16, torch.float16, torch.float32):
                raise ConfigError(f"keys or values of {states.dtype}: load the model in bfloat16, float16 or float32")
        if key_states.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"a model on {key_states.device}: kvzip works on the CPU and on CUDA GPUs")
        rows, given = int(key_states.shape[0]), self._padding_blocks or (-1,)
        if rows % len(given):
            raise ConfigError(f"left_padding of {len(given)} rows, a batch of {rows}: give one number a row")
        self._sinks = [given[row * len(given) // rows] for row in range(rows)]
        self.dtype, self.device = key_states.dtype, key_states.device
        self._tail = (key_states[..., :0, :].clone(), value_states[..., :0, :].clone())
        self._rows = [[] for _ in range(rows)]
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """See `CompressedCache.update`."""
        _check_runs_plainly(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_fits(key_states, value_states)
        held = self.get_seq_length() - self._first
        keys, values = self._assemble(key_states.shape[-2])
        keys[..., held:, :] = key_states
        values[..., held:, :] = value_states
        hidden = held - self._seen(held)
        self._keep(keys, values)
        return keys[..., hidden:, :], values[..., hidden:, :]

    def get_seq_length(self) -> int:
        """Tokens so far, those that have left a sliding window included."""
        if self._tail is None:
            return 0
        blocks = len(self._rows[0]) if self._rows else 0
        return self._first + blocks * self._records.block_tokens + int(self._tail[0].shape[-2])

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Tokens that `update` returns for a query, and the position of the first one.

        Args:
            query_length: tokens of the query, or their positions (transformers 5.0).
        """
        tokens = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        length = self.get_seq_length()
        seen = self._seen(length)
        return seen + tokens, length - seen

    def get_max_length(self) -> int:
        """The sliding window; -1 = no limit."""
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length  # its name before transformers 5.16

    def prefetch(self, tokens: int = 1) -> None:
        """Start to load the layer, for an update of so many tokens."""
        if self._ahead is None and self._rows and self._rows[0]:
            self._ahead = self._load(tokens)

    def offload(self) -> None:
        """Let go of what `prefetch` loaded."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.abandon()

    def reset(self) -> None:
        """Forget all tokens."""
        self.offload()
        self._forget()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Let row i be what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(len(self._rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows, in this order; a mask of rows, or their numbers."""
        if self._tail is None:
            return
        self.offload()
        chosen = torch.arange(len(self._rows))[indices.cpu() if isinstance(indices, torch.Tensor) else indices]
        at = chosen.to(self.device)
        self._tail = (self._tail[0].index_select(0, at), self._tail[1].index_select(0, at))
        self._rows = [list(self._rows[i]) for i in chosen.tolist()]
        self._sinks = [self._sinks[i] for i in chosen.tolist()]

    def activate_past_recording(self) -> None:
        """Keep what leaves a sliding window until the next `crop`, which may then go back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end.

        Where that ends within a record, the rest of its block becomes the tail, as decoded; the block is kept exactly
        when it is full again, so that no value errs twice.

        Args:
            tokens_to_remove: minus their number; a positive number is the length to cut to (before transformers 5.24).

        Raises:
            ConfigError: the sliding window before the cut is no longer held; nothing was changed.
        """
        length, target = self.get_seq_length(), self.length_after(tokens_to_remove)
        if self._tail is None:
            return
        self.offload()  # what was loaded ahead may begin or end elsewhere
        if target < length:
            blocks, rest = divmod(target - self._first, self._records.block_tokens)
            if blocks < len(self._rows[0]):
                self._open_block(blocks)
            self._tail = (self._tail[0][..., :rest, :].clone(), self._tail[1][..., :rest, :].clone())
            self._tail_decoded = self._tail_decoded and rest > 0
        unseen = self._unseen_blocks(target - self._first)
        self._rows = [row[unseen:] for row in self._rows]
        self._first += unseen * self._records.block_tokens

    def length_after(self, tokens_to_remove: int) -> int:
        """Tokens that `crop` leaves.

        Raises:
            ConfigError: see `crop`.
        """
        length, tokens_to_remove = self.get_seq_length(), int(tokens_to_remove)  # some versions give a tensor
        if tokens_to_remove > 0 or (_CROPS_TO_LENGTH and tokens_to_remove == 0):
            target = min(length, tokens_to_remove)
        else:
            target = max(0, length + tokens_to_remove)
        if target - self._seen(target) < self._first:
            raise ConfigError(
                f"a sliding window of {self.sliding_window} tokens cannot go back from {length} to {target} tokens: it "
                f"holds them from {self._first} on; call activate_past_recording() before"
            )
        return target

    @property
    def keys(self) -> Any:
        """A copy of the keys that the next token sees, decoded; None before the first token."""
        return self._read()[0]

    @keys.setter
    def keys(self, tensor: Any) -> None:
        self._refuse_tensor(tensor)

    @property
    def values(self) -> Any:
        """A copy of the values that the next token sees, decoded; None before the first token."""
        return self._read()[1]

    @values.setter
    def values(self, tensor: Any) -> None:
        self._refuse_tensor(tensor)

    # ---- the rest

    def device_bytes(self) -> int:
        """Bytes of tensors that the layer holds."""
        ahead = () if self._ahead is None else (self._ahead.keys, self._ahead.values)
        return sum(t.numel() * t.element_size() for t in (*(self._tail or ()), *ahead))

    def _refuse_tensor(self, tensor: Any) -> None:
        if tensor is not None:
            raise ConfigError("the tensors of a compressed layer cannot be replaced: use update(), crop() or reset()")

    def _check_fits(self, key_states: Any, value_states: Any) -> None:
        assert self._tail is not None
        if key_states.shape[:3] != value_states.shape[:3]:
            raise ConfigError(
                f"keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} differ in rows, heads or "
                "tokens: a compressed cache keeps pairs"
            )
        for states, tail in zip((key_states, value_states), self._tail, strict=True):
            new, old = (*states.shape[:2], states.shape[-1]), (*tail.shape[:2], tail.shape[-1])
            if new != old or states.dtype != tail.dtype or states.device != tail.device:
                raise ConfigError(
                    f"layer {self._number} holds rows, heads and channels {old} of {tail.dtype} on {tail.device}, "
                    f"now {new} of {states.dtype} on {states.device} come: reset() the cache for another batch"
                )

    def _seen(self, length: int) -> int:
        """Tokens among so many that the next one sees."""
        return length if self.sliding_window is None else min(length, self.sliding_window - 1)

    def _load(self, tokens: int) -> _Loading:
        """Start to put what is held into new tensors, with room for tokens behind it."""
        assert self._tail is not None
        size, blocks = self._records.block_tokens, len(self._rows[0])
        held = blocks * size + self._tail[0].shape[-2]
        keys, values = (t.new_empty((*t.shape[:2], held + tokens, t.shape[-1])) for t in self._tail)
        for whole, tail in zip((keys, values), self._tail, strict=True):
            whole[..., blocks * size : held, :] = tail
        spots = [(row, block * size) for row in range(len(self._rows)) for block in range(blocks)]
        transfer = None
        if spots:
            with self._naming_the_layer():
                transfer = self._records.load([r for row in self._rows for r in row], keys, values, spots)
        return _Loading(keys, values, held, transfer)

    def _assemble(self, tokens: int) -> tuple[Any, Any]:
        """What is held, in new tensors with room for tokens behind it."""
        ahead, self._ahead = self._ahead, None
        loading = ahead or self._load(tokens)
        with self._naming_the_layer():
            loading.finish()
        frozen = loading.keys.is_inference() and not torch.is_inference_mode_enabled()
        if loading.keys.shape[-2] == loading.held + tokens and not frozen:
            return loading.keys, loading.values
        found = []
        for loaded in (loading.keys, loading.values):  # made ahead for something else than what came
            whole = loaded.new_empty((*loaded.shape[:2], loading.held + tokens, loaded.shape[-1]))
            whole[..., : loading.held, :] = loaded[..., : loading.held, :]
            found.append(whole)
        return found[0], found[1]

    @contextmanager
    def _naming_the_layer(self) -> Iterator[None]:
        """Say of damage whose it is."""
        try:
            yield
        except CorruptRecordError as error:
            raise CorruptRecordError(
                f"the cache of layer {self._number} is damaged in host memory: reset() it and run the prompt again "
                f"({error})",
                blocks=error.blocks,
            ) from error

    def _read(self) -> tuple[Any, Any]:
        if self._tail is None:
            return None, None
        loading = self._load(0)
        with self._naming_the_layer():
            loading.finish()
        hidden = loading.held - self._seen(loading.held)
        return loading.keys[..., hidden:, :], loading.values[..., hidden:, :]

    def _keep(self, keys: Any, values: Any) -> None:
        """Encode the blocks that are full now, keep the rest as the tail, and give up what has left the window."""
        size, stored, held = self._records.block_tokens, len(self._rows[0]), keys.shape[-2]
        full = held // size
        unseen = 0 if self.record_past else self._unseen_blocks(held)
        start = max(stored, unseen)
        added = self._store(keys, values, start, full) if start < full else [[] for _ in self._rows]
        # From here on nothing fails.
        if full > stored:
            self._tail_decoded = False
        self._rows = [old[unseen:] + new for old, new in zip(self._rows, added, strict=True)]
        self._first += unseen * size
        self._tail = (keys[..., full * size :, :].clone(), values[..., full * size :, :].clone())

    def _store(self, keys: Any, values: Any, start: int, stop: int) -> list[list[Record]]:
        """Encode blocks ``start`` to ``stop - 1`` of all rows; returns the records of each row."""
        size, base = self._records.block_tokens, self._first // self._records.block_tokens
        if start > 0:  # a copy of the new blocks, so that the whole layer need not wait for their encoder
            keys, values = (t[..., start * size : stop * size, :].contiguous() for t in (keys, values))
        added: list[list[Record]] = [[] for _ in self._rows]
        # What was decoded once must not err a second time.
        exact = start + (self._tail_decoded and start == len(self._rows[0]))
        for first, last, bound in ((start, exact, ErrorBound.lossless()), (exact, stop, self._bound)):
            spots = [(row, (block - start) * size) for row in range(len(added)) for block in range(first, last)]
            marks = [base + block == sink for sink in self._sinks for block in range(first, last)]
            made = self._records.store(keys, values, spots, bound, marks)
            for row, records in enumerate(added):
                records += made[row * (last - first) : (row + 1) * (last - first)]
        return added

    def _unseen_blocks(self, held: int) -> int:
        """Blocks at the start of so many tokens that no later token sees."""
        return (held - self._seen(held)) // self._records.block_tokens

    def _open_block(self, number: int) -> None:
        """Decode a block into the tail; it and those behind it are records no more."""
        assert self._tail is not None
        keys, values = (t.new_empty((*t.shape[:2], self._records.block_tokens, t.shape[-1])) for t in self._tail)
        spots = [(row, 0) for row in range(len(self._rows))]
        with self._naming_the_layer():
            transfer = self._records.load([row[number] for row in self._rows], keys, values, spots)
            _Loading(keys, values, self._records.block_tokens, transfer).finish()
        self._tail, self._tail_decoded = (keys, values), True
        self._rows = [row[:number] for row in self._rows]


@dataclass(eq=False)
class _Loading:
    """A layer on its way back.

    Attributes:
        keys, values: where it goes, shape ``[rows, kv_heads, tokens, head_dim]``.
        held: tokens of it that are held; behind them is room for new ones.
        transfer: what brings the records; None where there are none.
    """

    keys: Any
    values: Any
    held: int
    transfer: Transfer | None

    def finish(self) -> None:
        """Make torch's current stream wait for the values, and the host for the proof that they are right."""
        if self.transfer is not None:
            self.transfer.wait_stream()
            self.transfer.result()

    def abandon(self) -> None:
        """Wait until nothing writes to the tensors any more."""
        if self.transfer is not None:
            with suppress(KvzipError):
                self.transfer.wait()


def _of_layer(bound: ErrorBound | BoundPolicy, layer: int) -> ErrorBound | BoundPolicy:
    """The bounds of one layer of the model, whose blocks have pages of this layer alone."""
    if isinstance(bound, ErrorBound):
        return bound
    pair = bound.layers.get(layer, (bound.key, bound.value))
    key, value = pair if isinstance(pair, tuple) else (pair, pair)
    return BoundPolicy(key, value, sink=bound.sink, other=bound.other)


def _check_runs_plainly(key_states: Any, value_states: Any) -> None:
    if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
        raise ConfigError("gradients do not pass through a compressed cache: use torch.no_grad() or inference_mode()")
    if key_states.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError("a compressed cache cannot be captured in a CUDA graph: run the model without one")


def _nbytes(layer: Any) -> int:
    """Bytes of the tensors that a layer of any kind holds."""
    if isinstance(layer, CompressedLayer):
        return layer.device_bytes()
    held = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else [value])]
    return sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
