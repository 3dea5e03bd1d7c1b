# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The operator's bounds, by layers of the model, as bounds of the pages of one KV cache group on one worker."""

from __future__ import annotations

from dataclasses import dataclass

from kvzip.adapters.vllm.layout import Group, Page
from kvzip.bounds import BoundPolicy
from kvzip.errors import ConfigError
from kvzip.types import ErrorBound, SegmentLayout


@dataclass(frozen=True)
class Shard:
    """Which part of the model's KV heads a worker has.

    Attributes:
        rank: of the worker among those that share its layers.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def first_head(self, total: int, own: int) -> int:
        """The worker's first KV head among the model's.

        Args:
            total: KV heads of the model.
            own: KV heads of a worker; heads are replicated where there are more workers than heads.

        Raises:
            ConfigError: the numbers do not fit together.
        """
        if total == own * self.size:
            return self.rank * own
        if own == 1 and total <= self.size and self.size % total == 0:
            return self.rank // (self.size // total)
        if total == own:
            return 0
        raise ConfigError(
            f"the calibration table is for {total} KV heads, this model has {own} on each of {self.size} workers: "
            "use the table of this model"
        )


def group_bounds(bound: ErrorBound | BoundPolicy, group: Group, shard: Shard) -> BoundPolicy:
    """The bounds of a group's blocks.

    Pages that are not known to be K or V are exact, and so are layers behind those that the bounds speak of, such as a
    draft model's.

    Args:
        bound: one for all K and V pages, or by kind and layer of the model.
        group: the blocks.
        shard: the worker's part of the model.

    Raises:
        ConfigError: a calibration table is for another number of heads or channels.
    """
    exact = ErrorBound.lossless()
    policy = bound if isinstance(bound, BoundPolicy) else BoundPolicy(bound, bound)
    bounds: dict[str, list[ErrorBound]] = {"k": [], "v": []}
    for segment, page in zip(group.view.layout.segments, group.pages, strict=True):
        if segment.kind:
            pair = policy.layers.get(page.layer, (policy.key, policy.value))
            if policy.num_layers is not None and page.layer >= policy.num_layers:
                pair = (exact, exact)
            key, value = pair if isinstance(pair, tuple) else (pair, pair)
            chosen = key if segment.kind == "k" else value
            bounds[segment.kind].append(_of_page(chosen, segment, page, group.heads, shard))
    keys, values = bounds["k"], bounds["v"]
    # The engine counts K pages and V pages each by themselves (`BlockLayout.layers`).
    layers = {
        i: (keys[i] if i < len(keys) else exact, values[i] if i < len(values) else exact)
        for i in range(max(len(keys), len(values)))
    }
    return BoundPolicy(exact, exact, layers=layers, sink=policy.sink, other=policy.other)


def _of_page(bound: ErrorBound, segment: SegmentLayout, page: Page, own: int, shard: Shard) -> ErrorBound:
    if bound.channels is None:
        return bound
    table = bound.channels.values
    first = shard.first_head(table.shape[0], own)
    part = table[first + page.heads[0] : first + page.heads[1]]
    if part.size != segment.heads * segment.head_dim:
        if segment.tokens == 1:  # in memory order, where channels are not known
            return ErrorBound.lossless()
        raise ConfigError(
            f"the calibration table is for {table.shape[1]} channels a head, layer {page.layer} has "
            f"{segment.heads * segment.head_dim // max(1, page.heads[1] - page.heads[0])}: use the table of this model"
        )
    return ErrorBound.channel_table(part.reshape(segment.heads, segment.head_dim))
