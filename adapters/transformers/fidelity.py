# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What a coded KV cache does to a model's output.

The keys and values of a prefix are replaced by what comes back from a swap, and the text goes on behind them,
teacher-forced. The reference is the same model behind the same cache, rounded to the cache's dtype and otherwise exact.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvzip.adapters.transformers.models import LanguageModel, LayerKV, require
from kvzip.adapters.transformers.schemes import Scheme
from kvzip.errors import ConfigError

#: Peers of the gate: a scheme of kvzip must not be worse than the better one of these.
GATE = ("fp8", "fp8 unscaled")


@dataclass(frozen=True)
class Row:
    """One scheme over all texts.

    Attributes:
        scheme: its name.
        own: whether it is kvzip's.
        note: what it does.
        ratio: bytes of the cache in 16-bit floats over bytes that the scheme takes, everything counted: headers, tables
            and the rounding to the pool's extents.
        kl: mean over the positions of KL(reference || scheme) of the next token's distribution, in nats.
        kl_p999: its 99.9th percentile.
        top1: share of positions whose most likely token is the reference's.
        dnll: mean negative log-likelihood of the text, less the reference's, in nats.
        greedy: mean share of the reference's greedy continuation that greedy decoding repeats before it first differs.
        needle: share of needles that greedy decoding recalls; None without needles.
        kl_by_text: `kl` of each text.
    """

    scheme: str
    own: bool
    note: str
    ratio: float
    kl: float
    kl_p999: float
    top1: float
    dnll: float
    greedy: float
    needle: float | None
    kl_by_text: dict[str, float]


@dataclass(frozen=True)
class FidelityResult:
    """What `evaluate` found.

    Attributes:
        model: its name.
        prefix: tokens whose cache was replaced.
        continuation: tokens that were run behind it.
        positions: continuation tokens of all texts.
        reference_nll: mean negative log-likelihood with the exact cache, in nats.
        reference_needle: share of needles that the exact cache recalls; None without needles.
        rows: one a scheme.
    """

    model: str
    prefix: int
    continuation: int
    positions: int
    reference_nll: float
    reference_needle: float | None
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """The result as plain types."""
        return asdict(self)

    def limit(self) -> float:
        """The gate: the lower mean KL of fp8's rows.

        Raises:
            ConfigError: fp8 was not measured.
        """
        found = [row.kl for row in self.rows if row.scheme in GATE]
        if not found:
            raise ConfigError("no row of fp8 to compare with: measure `schemes.peers()` in the same run")
        return min(found)

    def table(self) -> str:
        """The rows as a table for a terminal."""
        head = ("scheme", "ratio", "KL", "KL p99.9", "top-1", "dNLL", "greedy", "needles")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
        return "\n".join(
            "  ".join((line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))))
            for line in cells
        )

    def worse(self) -> list[str]:
        """Names of kvzip's schemes whose mean KL is above `limit`."""
        limit = self.limit()
        return [row.scheme for row in self.rows if row.own and row.kl > limit]


def _cells(row: Row) -> tuple[str, ...]:
    needle = "" if row.needle is None else f"{row.needle:.0%}"
    kl, worst, dnll = f"{row.kl:.2e}", f"{row.kl_p999:.2e}", f"{row.dnll:+.4f}"
    return row.scheme, f"{row.ratio:.2f}", kl, worst, f"{row.top1:.1%}", dnll, f"{row.greedy:.0%}", needle


@dataclass(frozen=True)
class _Outcome:
    """What a scheme does on a text; see `Row`, and `kl` for every position."""

    kl: npt.NDArray[np.float64]
    same: float
    dnll: float
    greedy: float


@dataclass
class _Sums:
    """What is added up over texts for a scheme."""

    raw_bytes: int = 0
    nbytes: int = 0
    outcomes: dict[str, _Outcome] = field(default_factory=dict)
    needles: list[bool] = field(default_factory=list)


def evaluate(
    model: LanguageModel,
    texts: Mapping[str, str],
    schemes: Sequence[Scheme],
    *,
    prefix: int = 1536,
    continuation: int = 512,
    greedy_tokens: int = 32,
    needle_depths: Sequence[float] = (0.2, 0.7),
    kv_dtype: str = "bfloat16",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> FidelityResult:
    """Measure schemes on texts.

    Args:
        model: the model.
        texts: by name; each must have `prefix` + `continuation` tokens.
        schemes: what to measure.
        prefix: tokens whose cache is replaced.
        continuation: tokens that follow, at least 2.
        greedy_tokens: length of the greedy continuation.
        needle_depths: where in the prefix of each text a sentence with a number is hidden, as fractions; the number is
            asked for at the end.
        kv_dtype: dtype of the cache, ``"bfloat16"`` or ``"float16"``.
        progress: called with the stage, the steps done and the steps in all.

    Raises:
        ConfigError: a text is too short, there is none, or an argument is out of range.
    """
    (torch,) = require("torch")
    if not texts or not schemes:
        raise ConfigError("nothing to measure: give at least one text and one scheme")
    if min(prefix, greedy_tokens) < 1 or continuation < 2:
        raise ConfigError(f"prefix {prefix}, continuation {continuation}, greedy {greedy_tokens}: use 1, 2, 1 or more")
    if kv_dtype not in ("bfloat16", "float16"):
        raise ConfigError(f"dtype {kv_dtype!r} of the cache: use bfloat16 or float16")
    dtype = getattr(torch, kv_dtype)
    ids = {name: model.tokens(text)[:, : prefix + continuation] for name, text in texts.items()}
    for name, found in ids.items():
        if found.shape[1] < prefix + continuation:
            raise ConfigError(
                f"text {name!r} has {found.shape[1]} tokens, {prefix} + {continuation} are needed: "
                "give longer texts, or a shorter prefix and continuation"
            )

    sums = {scheme.name: _Sums() for scheme in schemes}
    nll: list[float] = []
    recalled: list[bool] = []
    steps = len(texts) * len(schemes) * (1 + len(needle_depths))
    done = 0

    def swapped(layers: Sequence[LayerKV]) -> Any:
        """Every scheme, its sums and its cache, one after the other."""
        nonlocal done
        for scheme in schemes:
            yield scheme, sums[scheme.name], *scheme.swap(layers)
            done += 1
            progress("fidelity", done, steps)

    def cached(tokens: Any) -> tuple[list[LayerKV], Any]:
        layers, last = model.prefill(tokens)
        return [(k.to("cpu", dtype), v.to("cpu", dtype)) for k, v in layers], last

    for name, tokens in ids.items():
        layers, last = cached(tokens[:, :prefix])
        raw_bytes = sum(t.numel() * t.element_size() for pair in layers for t in pair)
        rest, targets = tokens[:, prefix:], tokens[0, prefix + 1 :, None]
        exact = model.continue_from(layers, rest).log_softmax(-1)
        likelihood, top = exact.exp(), exact.argmax(-1)
        exact_nll = -float(exact[:-1].gather(1, targets).double().mean())
        nll.append(exact_nll)
        chosen = model.greedy(layers, last, greedy_tokens)
        likely = model.continue_from(layers, chosen).argmax(-1)
        # Schemes that give the same values have the same effect, and those that give the exact ones have none.
        nothing = _Outcome(np.zeros(continuation), same=1.0, dnll=0.0, greedy=1.0)
        outcomes = {_digest(layers): nothing}
        for _, found, after, nbytes in swapped(layers):
            values = _digest(after)
            if values not in outcomes:
                logs = model.continue_from(after, rest).log_softmax(-1)
                divergence = (likelihood * (exact - logs)).sum(-1, dtype=torch.float64)
                # Fed with the reference's choices, the first difference is where decoding by itself would leave them.
                differs = (model.continue_from(after, chosen).argmax(-1) != likely).nonzero()
                outcomes[values] = _Outcome(
                    kl=divergence.clamp(min=0).cpu().numpy(),
                    same=float((logs.argmax(-1) == top).double().mean()),
                    dnll=-float(logs[:-1].gather(1, targets).double().mean()) - exact_nll,
                    greedy=(int(differs[0, 0]) if len(differs) else greedy_tokens) / greedy_tokens,
                )
            found.raw_bytes += raw_bytes
            found.nbytes += nbytes
            found.outcomes[name] = outcomes[values]
        for depth in needle_depths:
            hay, question, answer = _needle(model, tokens, prefix, depth, seed=name)
            layers, _ = cached(hay)
            asked = torch.cat([question, answer], 1)[:, :-1]

            def recalls(cache: Sequence[LayerKV], asked: Any = asked, answer: Any = answer) -> bool:
                return bool((model.continue_from(cache, asked)[-answer.shape[1] :].argmax(-1) == answer[0]).all())

            recalled.append(recalls(layers))
            answers = {_digest(layers): recalled[-1]}
            for _, found, after, _ in swapped(layers):
                values = _digest(after)
                if values not in answers:
                    answers[values] = recalls(after)
                found.needles.append(answers[values])

    rows = [_row(scheme, sums[scheme.name]) for scheme in schemes]
    return FidelityResult(
        model=model.name,
        prefix=prefix,
        continuation=continuation,
        positions=continuation * len(texts),
        reference_nll=float(np.mean(nll)),
        reference_needle=float(np.mean(recalled)) if recalled else None,
        rows=rows,
    )


def _digest(layers: Sequence[LayerKV]) -> bytes:
    """Stands for the values of a cache."""
    (torch,) = require("torch")
    found = hashlib.sha256()
    for pair in layers:
        for tensor in pair:
            found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.digest()


def _row(scheme: Scheme, found: _Sums) -> Row:
    outcomes = list(found.outcomes.values())
    kl = np.concatenate([o.kl for o in outcomes])
    return Row(
        scheme=scheme.name,
        own=scheme.own,
        note=scheme.note,
        ratio=found.raw_bytes / found.nbytes,
        kl=float(kl.mean()),
        kl_p999=float(np.quantile(kl, 0.999)),
        top1=float(np.mean([o.same for o in outcomes])),
        dnll=float(np.mean([o.dnll for o in outcomes])),
        greedy=float(np.mean([o.greedy for o in outcomes])),
        needle=float(np.mean(found.needles)) if found.needles else None,
        kl_by_text={name: float(o.kl.mean()) for name, o in found.outcomes.items()},
    )


def _needle(model: LanguageModel, tokens: Any, prefix: int, depth: float, seed: str) -> tuple[Any, Any, Any]:
    """A prefix with a sentence hidden in it, the question at its end, and the answer; token ids of shape [1, n]."""
    (torch,) = require("torch")
    number = random.Random(f"{seed} {depth}").randint(10_000, 99_999)
    claim = "The number of the white boat is"
    needle = model.tokens(f"\n{claim} {number}.\n", special=False)
    question = model.tokens(f"\n{claim}", special=False)
    answer = model.tokens(f"\n{claim} {number}", special=False)[:, question.shape[1] :]
    room = prefix - needle.shape[1]
    if room < 2:
        raise ConfigError(f"a prefix of {prefix} tokens cannot hide {needle.shape[1]}: use a longer one, or no needles")
    cut = min(max(1, round(room * depth)), room)
    return torch.cat([tokens[:, :cut], needle, tokens[:, cut:room]], 1), question, answer
