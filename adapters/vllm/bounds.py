# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The operator's bounds, by layers of the model, as bounds of the pages of one KV cache group on one worker."""

from __future__ import annotations

from kvzip.adapters.shard import Shard
from kvzip.adapters.vllm.layout import Group
from kvzip.bounds import WITHIN_PAGES, BoundPolicy
from kvzip.types import BoundKind, ErrorBound


def group_bounds(bound: ErrorBound | BoundPolicy, group: Group, shard: Shard) -> BoundPolicy:
    """The bounds of a group's blocks.

    Pages that are not known to be K or V are exact, and so are layers behind those that the bounds speak of, such as a
    draft model's. A page in memory order, whose tokens are not known, gets the bound of K in place of one by token.

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
            if chosen.kind is BoundKind.TOKEN_RMS and segment.tokens == segment.heads == 1:
                chosen = exact if key.kind in WITHIN_PAGES else key
            bounds[segment.kind].append(shard.bound(chosen, segment, page.layer, page.heads, group.heads))
    keys, values = bounds["k"], bounds["v"]
    # The engine counts K pages and V pages each by themselves (`BlockLayout.layers`).
    layers = {
        i: (keys[i] if i < len(keys) else exact, values[i] if i < len(values) else exact)
        for i in range(max(len(keys), len(values)))
    }
    return BoundPolicy(exact, exact, layers=layers, sink=policy.sink, other=policy.other)
