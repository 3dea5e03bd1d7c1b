# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""How large the bounds of a calibration table may be for one model: measured on texts, not assumed.

Models differ in what they bear: the same t and r that keep one model well below fp8's divergence put another above it.
The divergence of a model's output grows about with the square of t and r, so that a measurement says which t and r
would just reach a limit, and a second one whether they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kvzip.adapters.transformers import fidelity, schemes
from kvzip.adapters.transformers.models import LanguageModel
from kvzip.calibration import CalibrationTable
from kvzip.errors import ConfigError

_ROUNDS = 4
_SHARE = 0.8  # of the limit: over a few hundred positions two schemes that are alike differ by a fifth
_FARTHEST = 8.0  # from t of the table, in either direction
_BLOCK_TOKENS = 16
_LEAST_TOKENS = 64


@dataclass(frozen=True)
class Fit:
    """What `fit` found.

    Attributes:
        table: with the t and r that were chosen.
        kl: mean KL that was measured with them, in nats.
        limit: what it was not to exceed, in nats.
        ratio: 16-bit bytes over bytes in the pool.
    """

    table: CalibrationTable
    kl: float
    limit: float
    ratio: float


def fit(
    model: LanguageModel,
    table: CalibrationTable,
    texts: Mapping[str, str],
    *,
    limit: float | None = None,
    mode: str = "rice",
    max_tokens: int = 2048,
    kv_dtype: str = "bfloat16",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Fit:
    """Choose t and r of a table, at its own proportion, so that the mean KL on texts stays within a limit.

    Args:
        model: the model.
        table: its calibration table; its t and r are where the search begins.
        texts: by name, others than those of the calibration, each of about 2,000 tokens. Several kinds of text make the
            choice hold for more.
        limit: mean KL in nats that is not to be exceeded; None takes 0.8 of what fp8 has on the same texts.
        mode: encoding mode.
        max_tokens: tokens of a text that are used, three quarters of them as the prefix that is swapped; of all texts
            as many as the shortest has.
        kv_dtype: dtype of the cache, ``"bfloat16"`` or ``"float16"``.
        progress: called with the stage, the steps done and the steps in all.

    Raises:
        ConfigError: no text, or one is too short; the limit is not positive; or not even an eighth of the table's t
            and r keeps it.
    """
    if limit is not None and not limit > 0:
        raise ConfigError(f"limit {limit!r} of the mean KL is not positive: use nats such as 1e-3")
    tokens = min([max_tokens, *(model.tokens(text).shape[1] for text in texts.values())])
    if not texts or tokens < _LEAST_TOKENS:
        raise ConfigError(
            f"{len(texts)} texts of {tokens} tokens to fit with: give texts of {_LEAST_TOKENS} at least, better 2,000"
        )
    prefix = tokens * 3 // 4 // _BLOCK_TOKENS * _BLOCK_TOKENS
    steps: list[int] = []

    def measured(chosen: list[schemes.Scheme]) -> fidelity.FidelityResult:
        result = fidelity.evaluate(
            model,
            texts,
            chosen,
            prefix=prefix,
            continuation=tokens - prefix,
            greedy_tokens=1,
            needle_depths=(),
            kv_dtype=kv_dtype,
        )
        steps.append(1)
        progress("fit", len(steps), _ROUNDS)
        return result

    first, strength = table, 1.0
    best: Fit | None = None
    while len(steps) < _ROUNDS:
        tried = replace(table, t=first.t * strength, r=min(1.0, first.r * strength))
        result = measured(
            [
                *(schemes.peers()[: len(fidelity.GATE)] if limit is None else ()),
                schemes.engine_scheme("tried", tried.policy(), mode=mode),
            ]
        )
        limit = _SHARE * result.limit() if limit is None else limit
        row = result.rows[-1]
        if row.kl <= limit and (best is None or row.ratio > best.ratio):
            best = Fit(tried, row.kl, limit, row.ratio)
        if best is not None and best.kl > 0.9 * limit:
            break
        aimed = 0.95 * limit  # a little below, so that the next one keeps it
        strength *= min(4.0, max(0.25, (aimed / row.kl) ** 0.5)) if row.kl > 0 else 4.0
        strength = min(_FARTHEST, max(1 / _FARTHEST, strength))
    if best is None:
        assert limit is not None
        raise ConfigError(
            f"no t and r down to {tried.t:.3g} and {tried.r:.3g} keep a mean KL of {limit:.2g} nats on these texts: "
            "use ErrorBound.lossless() for this model, or allow more"
        )
    return best
