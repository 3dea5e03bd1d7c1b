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
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
        ConfigError: no text; the model does not dispatch its attention through transformers' table of attention
            functions, as older ones of its decoders do not; or it keeps something else than the keys that attention
            meets, such as the latent vectors of MLA.
    """
    torch, _ = require("torch", "transformers")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens {max_tokens}: use at least 1; 2048 is usual")
    sums: dict[int, Any] = {}
    total = 0
    # A model whose last layers share keys computes their queries for the logits that are asked for alone: ask for all.
    shared = getattr(model.model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    few = {} if shared else {"logits_to_keep": 1}
    with _watched(model.model, sums), torch.inference_mode():
        for done, text in enumerate(texts, 1):
            ids = model.tokens(text)[:, :max_tokens]
            if ids.shape[1] == 0:
                raise ConfigError(f"text {done} has no tokens: give about 2,000 tokens of text")
            model.model(ids, use_cache=False, **few)
            total += ids.shape[1]
            progress("calibrate", done, len(texts))
    if not total:
        raise ConfigError("no text to calibrate with: give about 2,000 tokens of text")
    shapes = _shapes(model, sums, ids[:, :1])
    moments = np.zeros((len(shapes), *(max(sizes) for sizes in zip(*shapes, strict=True))), np.float32)
    for layer, moment in sums.items():
        heads, dim = moment.shape
        moments[layer, :heads, :dim] = (moment / total).float().cpu().numpy()
    return CalibrationTable(moments, model.name, total, shapes=tuple(shapes))


def _shapes(model: LanguageModel, sums: dict[int, Any], token: Any) -> list[tuple[int, int]]:
    """KV heads and head_dim of every layer that a cache of the model has; (0, 0) of those without attention.

    Args:
        model: the model.
        sums: moments by layer, as attention met them.
        token: any token id, shape ``[1, 1]``: the model runs it to see what it keeps.

    Raises:
        ConfigError: a layer with keys was not seen, or keeps keys of another shape than attention met.
    """
    torch, cache_utils = require("torch", "transformers.cache_utils")
    if not sums:
        raise ConfigError(
            f"no attention of {model.name} goes through transformers' ALL_ATTENTION_FUNCTIONS (it has none, or "
            "computes it by itself), so its queries cannot be seen: use the default bounds, which need no table"
        )
    cache = cache_utils.DynamicCache(config=model.model.config)
    with suppress(ValueError), torch.inference_mode():  # of models that take a cache of their own alone
        model.model(token, past_key_values=cache, use_cache=True)
    layers = cache.layers
    shapes = [(0, 0)] * max(len(layers), max(sums) + 1)
    for number, moment in sums.items():
        shapes[number] = (int(moment.shape[0]), int(moment.shape[1]))
    with_keys = [number for number, layer in enumerate(layers) if isinstance(layer, cache_utils.CacheLayerMixin)]
    if unseen := [number for number in with_keys if number not in sums]:
        raise ConfigError(
            f"{model.name} keeps keys in layer {unseen[0]}, whose attention was not seen: use a decoder that "
            "dispatches all of it through ALL_ATTENTION_FUNCTIONS"
        )
    for number in with_keys:
        keys = layers[number].keys
        if keys is not None and (kept := (keys.shape[1], keys.shape[3])) != shapes[number]:
            raise ConfigError(
                f"layer {number} of {model.name} keeps {kept[0]} x {kept[1]} values of a token where attention meets "
                f"keys of {shapes[number][0]} x {shapes[number][1]} (latent vectors, as of MLA?): no table fits its "
                "cache; use ErrorBound.lossless(), or a bound relative to the page"
            )
    return shapes


@contextmanager
def _watched(model: Any, sums: dict[int, Any]) -> Iterator[None]:
    """Let every attention function that the model's modules may dispatch to add up its queries first."""
    replaced: list[tuple[Any, str, Any]] = []
    owners: list[tuple[Callable[[], Any], int]] = []
    modules = {type(module).__module__ for module in model.modules()}
    try:
        for interface in {id(i): i for i in (_interface(name) for name in modules) if i is not None}.values():
            for name in {*interface, "eager"}:
                replaced.append((interface, name, interface.get(name)))
                interface[name] = _watching(interface.get(name), sums, owners)
        yield
    finally:
        for interface, name, before in replaced:
            del interface[name]
            if interface.get(name) is not before:  # it was an override of this interface itself
                interface[name] = before


def _interface(module: str) -> Any:
    """The table of attention functions that a module dispatches through, or None."""
    return getattr(sys.modules[module], "ALL_ATTENTION_FUNCTIONS", None)


def _watching(
    attention: Callable[..., Any] | None, sums: dict[int, Any], owners: list[tuple[Callable[[], Any], int]]
) -> Callable[..., Any]:
    """An attention function that adds up its queries, then does what `attention` does (None: the module's own).

    Queries count for the layer whose keys they meet: some models give the keys of one layer to later ones. `owners` has
    the keys that still live, and whose they are.
    """

    def watching(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(module, "layer_idx", None)
        if layer is not None and getattr(module, "is_causal", True):
            heads, head_dim = key.shape[1], query.shape[3]
            scale = kwargs.get("scaling")
            scale = head_dim**-0.5 if scale is None else float(scale)
            # Query heads of one KV head are neighbours: [batch, kv_heads, group, tokens, head_dim].
            groups = query.detach().double().unflatten(1, (heads, -1))
            moment = groups.square().sum((0, 2, 3)) * (scale * scale * head_dim)
            owners[:] = [known for known in owners if known[0]() is not None]
            owner = next((number for keys, number in owners if keys() is key), layer)
            if owner == layer:
                owners.append((weakref.ref(key), layer))
            sums[owner] = sums[owner] + moment if owner in sums else moment
        own = attention or sys.modules[type(module).__module__].eager_attention_forward
        return own(module, query, key, value, *args, **kwargs)

    return watching
