# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Where a model's output bears larger errors: a calibration table weighed by gradients.

Query moments say what an error of a key does to attention, not what attention does to the output, and they say nothing
of values. The divergence of the output is, to second order, half the sum of F e^2 over the errors e of the cache, with
F the diagonal of the Fisher information: the mean square of the gradient of the log-likelihood of tokens that are
drawn from the model's own distribution. At a given size of the records it is least where every F e^2 is the same, so a
bound should follow 1 / sqrt(F).

An estimate from one text, followed to the letter, fits that text, and the second order ends where errors are large. So
the channels of K go half of the way on a logarithmic scale, the layers of V, which are means over many values, the
whole way, and no bound changes by more than a factor of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.adapters.transformers.models import LanguageModel, require
from kvzip.calibration import CalibrationTable
from kvzip.errors import ConfigError

_PROTECTED = 16  # tokens at the start of a sequence: they are kept exact, and their gradients are of another size
_LEAST_TOKENS = 64


def weigh(
    model: LanguageModel,
    table: CalibrationTable,
    texts: Sequence[str],
    *,
    max_tokens: int = 2048,
    samples: int = 3,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CalibrationTable:
    """Weigh the channels of K and the layers of V by the gradients of the model's output.

    Runs the last quarter of each text behind the cache of the rest, backwards too: takes about the memory of one
    training step on that quarter, for the cache alone.

    Args:
        model: the model.
        table: its query moments.
        texts: each is a sequence of its own of at least 64 tokens, cut after `max_tokens`; their gradients add up.
            About 2,000 tokens each are right, and several kinds of text better than one.
        max_tokens: tokens of a text that are used.
        samples: continuations that are drawn from the model for each text.
        seed: of the draws.
        progress: called with the stage, the texts done and the texts in all.

    Returns:
        A table whose bounds are larger where the output is less sensitive and smaller where it is more; their geometric
        mean over the model stays as it was. Where later layers use the keys and values of an earlier one, the gradients
        of all of them count there.

    Raises:
        ConfigError: no text, or one is too short; the table is of another model; or the model keeps something else than
            keys and values of every token.
    """
    if not texts:
        raise ConfigError("no text to weigh with: give about 2,000 tokens of text")
    own = [layer for layer, (heads, _) in enumerate(table.shapes) if heads]
    floored = (1 / table.key_bounds(1.0)) ** 2
    moments = [floored[layer, : table.shapes[layer][0], : table.shapes[layer][1]] for layer in own]
    keys = [np.zeros(m.shape) for m in moments]
    layers = np.zeros(len(own))
    for done, text in enumerate(texts, 1):
        ids = model.tokens(text)[:, :max_tokens]
        if ids.shape[1] < _LEAST_TOKENS:
            raise ConfigError(
                f"text {done} has {ids.shape[1]} tokens, gradients need {_LEAST_TOKENS} at least: use about 2,000"
            )
        cut = ids.shape[1] * 3 // 4
        shapes, squares, values = squared_gradients(model, ids[:, :cut], ids[:, cut:], samples=samples, seed=seed)
        if shapes != [table.shapes[layer] for layer in own]:
            raise ConfigError(
                f"a table of {table.shapes} KV heads and channels does not fit {model.name}, which has "
                f"{tuple(shapes)}: calibrate this model"
            )
        late = [total[_PROTECTED:] for total in squares]
        for total, f in zip(keys, late[::2], strict=True):
            total += f.sum(0).double().cpu().numpy()
        # An error of V is bounded by the rms of its token and head.
        scales = [v.float()[_PROTECTED:].square().mean(-1, keepdim=True) for v in values]
        layers += [float((f * scale).sum()) for f, scale in zip(late[1::2], scales, strict=True)]
        progress("weigh", done, len(texts))

    factors = _factors(np.concatenate([(k / m).ravel() for k, m in zip(keys, moments, strict=True)]), 0.5)
    weighed = np.zeros(table.moments.shape, np.float32)
    for layer, m, part in zip(own, moments, np.split(factors, np.cumsum([m.size for m in moments])[:-1]), strict=True):
        weighed[layer, : m.shape[0], : m.shape[1]] = m / part.reshape(m.shape) ** 2
    value_factors = np.ones(len(weighed), np.float32)
    value_factors[own] = _factors(layers, 1.0)
    return replace(table, moments=weighed, value_factors=value_factors)


def squared_gradients(
    model: LanguageModel, prefix: Any, rest: Any, *, samples: int, seed: int
) -> tuple[list[tuple[int, int]], list[Any], list[Any]]:
    """Diagonal of the Fisher information of a cache, for all tokens that follow.

    Args:
        model: the model.
        prefix: token ids whose cache is looked at, shape ``[1, tokens]``.
        rest: token ids that follow.
        samples: continuations to average over.
        seed: of the draws.

    Returns:
        KV heads and head_dim of every layer; the squared gradients of K and V in turn, layer by layer, each of shape
        ``[tokens, kv_heads, head_dim]``, float32; and every layer's V.
    """
    (torch,) = require("torch")
    cache = [(k.clone().requires_grad_(), v.clone().requires_grad_()) for k, v in model.prefill(prefix)[0]]
    flat = [t for pair in cache for t in pair]
    squares = [torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in flat]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    trained = [p for p in model.model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        logs = model.logits(cache, rest).log_softmax(-1)
        chances = logs.detach().exp().cpu()
        for left in reversed(range(samples)):
            drawn = torch.multinomial(chances, 1, generator=generator).to(logs.device)
            gradients = torch.autograd.grad(logs.gather(1, drawn).sum(), flat, retain_graph=left > 0)
            for total, gradient in zip(squares, gradients, strict=True):
                total += gradient.float().square() / samples
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return [tuple(k.shape[1:]) for k, _ in cache], squares, [v.detach() for _, v in cache]


def _factors(sensitivity: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.float64]:
    """What bounds are multiplied by: ``sensitivity^(-share / 2)``, geometric mean about 1, from a half to two."""
    tiny = sensitivity[sensitivity > 0].min(initial=1.0)
    log = -0.5 * share * np.log2(np.maximum(sensitivity, tiny))
    factors: npt.NDArray[np.float64] = 2.0 ** np.clip(log - log.mean(), -1, 1)
    return factors
