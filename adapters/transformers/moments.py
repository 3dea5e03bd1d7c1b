# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Second moments of a model's queries: what an error of a key channel does to attention.

An error e_c in channel c of a key moves the attention logit of query q by ``scale * q_c * e_c``. Over many queries that
is ``scale * sqrt(E[q_c^2]) * |e_c|``, so channels with small queries can take large errors. The moment of a channel is

    ``(scale * sqrt(head_dim))^2 * sum over the query heads of its KV head of E[q_c^2]``

with the queries as attention gets them: after bias, normalisation and RoPE. The factor is 1 for the usual
``scale = 1 / sqrt(head_dim)``; it makes a bound of t mean the same for models that scale in another way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from kvzip.adapters.transformers.models import LanguageModel, require
from kvzip.calibration import CalibrationTable
from kvzip.errors import ConfigError


def calibrate(
    model: LanguageModel,
    texts: Sequence[str],
    *,
    max_tokens: int = 2048,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CalibrationTable:
    """Run texts through a model and measure its queries.

    Args:
        model: the model.
        texts: each is a sequence of its own, cut after `max_tokens`; a moment is the mean over the tokens of all.
        max_tokens: tokens of a text that are used.
        progress: called with the stage, the texts done and the texts in all.

    Returns:
        The table, with the moments as they were measured.

    Raises:
        ConfigError: no text; or the model does not dispatch its attention as transformers' own decoders do, or its
            layers differ in heads.
    """
    torch, _ = require("torch", "transformers")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens {max_tokens}: use at least 1; 2048 is usual")
    sums: dict[int, Any] = {}
    total = 0
    with _watched(model.model, sums), torch.inference_mode():
        for done, text in enumerate(texts, 1):
            ids = model.tokens(text)[:, :max_tokens]
            if ids.shape[1] == 0:
                raise ConfigError(f"text {done} has no tokens: give about 2,000 tokens of text")
            model.model(ids, use_cache=False, logits_to_keep=1)
            total += ids.shape[1]
            progress("calibrate", done, len(texts))
    if not total:
        raise ConfigError("no text to calibrate with: give about 2,000 tokens of text")
    shapes = {tuple(moment.shape) for moment in sums.values()}
    if sorted(sums) != list(range(len(sums))) or len(shapes) != 1:
        raise ConfigError(
            f"{model.name} has attention with {sorted(shapes)} KV heads and channels in the layers {sorted(sums)}: "
            "use a decoder whose layers all have attention of one shape, dispatched through ALL_ATTENTION_FUNCTIONS"
        )
    moments = np.stack([(sums[layer] / total).float().cpu().numpy() for layer in range(len(sums))])
    return CalibrationTable(moments, model.name, total)


@contextmanager
def _watched(model: Any, sums: dict[int, Any]) -> Iterator[None]:
    """Let every attention function that the model's modules may dispatch to add up its queries first."""
    replaced: list[tuple[Any, str, Any]] = []
    modules = {type(module).__module__ for module in model.modules()}
    try:
        for interface in {id(i): i for i in (_interface(name) for name in modules) if i is not None}.values():
            for name in {*interface, "eager"}:
                replaced.append((interface, name, interface.get(name)))
                interface[name] = _watching(interface.get(name), sums)
        yield
    finally:
        for interface, name, before in replaced:
            del interface[name]
            if interface.get(name) is not before:  # it was an override of this interface itself
                interface[name] = before


def _interface(module: str) -> Any:
    """The table of attention functions that a module dispatches through, or None."""
    return getattr(sys.modules[module], "ALL_ATTENTION_FUNCTIONS", None)


def _watching(attention: Callable[..., Any] | None, sums: dict[int, Any]) -> Callable[..., Any]:
    """An attention function that adds up its queries, then does what `attention` does (None: the module's own)."""

    def watching(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer is not None and getattr(module, "is_causal", True):
            heads, head_dim = key.shape[1], query.shape[3]
            scale = kwargs.get("scaling")
            scale = head_dim**-0.5 if scale is None else float(scale)
            # Query heads of one KV head are neighbours: [batch, kv_heads, group, tokens, head_dim].
            groups = query.detach().double().unflatten(1, (heads, -1))
            moment = groups.square().sum((0, 2, 3)) * (scale * scale * head_dim)
            sums[layer] = sums[layer] + moment if layer in sums else moment
        own = attention or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, *args, **kwargs)

    return watching
