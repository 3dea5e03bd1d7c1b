# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""What a host pool holds and what its transfers take, estimated without a GPU: ``kvzip plan``.

The estimate of a transfer is a straight line, ``fixed + encoded bytes / link + raw bytes / codec``, because chunks of a
large transfer overlap: what is left is what the link takes, and the coding that it waits for. Small transfers, which
take another path, have a line of their own. `Rates` has the measured constants. docs/explanation/break-even.md has the
model, and what it leaves out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from kvzip.errors import ConfigError
from kvzip.types import DType

BREAK_EVENS = {
    "store": "stores: records beat raw bytes",
    "load": "loads: records beat raw bytes",
    "recompute": "loading beats recomputing",
}
_MOST_TOKENS = 1 << 40  # nothing breaks even beyond it


@dataclass(frozen=True)
class Model:
    """The geometry of a model's KV cache, and what a prefill computes.

    Attributes:
        layers: layers that keep keys and values.
        kv_heads: heads of K, and of V.
        head_dim: values of one head and token.
        dtype: of the cache.
        parameters: those that one token passes through (of a mixture of experts, the active ones); None if unknown.
        query_width: query heads x head_dim; None if unknown.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: DType = DType.BFLOAT16
    parameters: float | None = None
    query_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: use at least 1")
        if self.dtype is DType.OPAQUE:
            raise ConfigError("opaque caches (fp8, int8) are stored as they are: plan for bfloat16, float16 or float32")
        if self.parameters is not None and not self.parameters > 0:
            raise ConfigError(f"parameters is {self.parameters}: use at least 1")

    @property
    def bytes_per_token(self) -> int:
        """Raw bytes of the keys and values of one token, all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def prefill_flop(self, tokens: int) -> float | None:
        """Floating-point operations that compute the cache of a sequence; None where too little is known of the model.

        Two for each parameter and token, and causal attention: 2 x layers x query_width x tokens^2.
        """
        if self.parameters is None:
            return None
        return 2 * self.parameters * tokens + 2 * self.layers * (self.query_width or 0) * float(tokens) ** 2

    @classmethod
    def from_config(cls, path: Path) -> Model:
        """Read a ``config.json`` of Hugging Face transformers.

        Args:
            path: the file, or the folder that it is in.

        Raises:
            ConfigError: it cannot be read, does not say enough, or keeps something else than keys and values.
        """
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read {path}: {error}; give a config.json of a model, or its numbers") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{path} holds no object: give a config.json of a model, or its numbers")
        text = config.get("text_config")
        return cls.from_dict({**config, **text} if isinstance(text, dict) else config, str(path))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], name: str = "the configuration") -> Model:
        """The same of what such a file holds; `name` is what errors call it."""
        if config.get("kv_lora_rank"):
            raise ConfigError(
                f"{name} keeps latent vectors (MLA), which kvzip codes without loss: give --layers, --kv-heads 1, "
                "--head-dim (half of kv_lora_rank + qk_rope_head_dim) and --bound lossless"
            )
        try:
            query_heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            kinds = config.get("layer_types")
            layers = int(config["num_hidden_layers"])
            if kinds:
                layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
            kv_heads = int(config.get("num_key_value_heads") or query_heads)
            head_dim = int(config.get("head_dim") or hidden // query_heads)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(
                f"{name} does not say what a KV cache needs ({type(error).__name__}: {error}): give --layers, "
                "--kv-heads and --head-dim"
            ) from error
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        parameters = _parameters(config, hidden, query_heads, kv_heads, head_dim)
        return cls(layers, kv_heads, head_dim, DType.parse(dtype), parameters, query_heads * head_dim)


def _parameters(config: Mapping[str, Any], hidden: int, heads: int, kv_heads: int, head_dim: int) -> float | None:
    """Those of the projections and of a gated MLP, or of the experts that a token passes through."""
    experts = config.get("num_experts_per_tok")
    width = config.get("moe_intermediate_size") if experts else None
    width = width or config.get("intermediate_size")
    if not width:
        return None
    mlp = 3 * hidden * int(width) * int(experts or 1)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    return float(int(config["num_hidden_layers"]) * (attention + mlp))


@dataclass(frozen=True)
class Line:
    """Time of a transfer: seconds + seconds_per_encoded_byte x encoded bytes + seconds_per_raw_byte x raw bytes."""

    seconds: float
    seconds_per_encoded_byte: float
    seconds_per_raw_byte: float

    def __call__(self, raw_bytes: float, encoded_bytes: float) -> float:
        """Seconds that the transfer takes."""
        return self.seconds + self.seconds_per_encoded_byte * encoded_bytes + self.seconds_per_raw_byte * raw_bytes

    def behind(self, slower: float) -> Line:
        """The same where the link takes so many times as long."""
        return replace(self, seconds_per_encoded_byte=self.seconds_per_encoded_byte * slower)


@dataclass(frozen=True)
class Curve:
    """Time of a transfer of any size: a line each for small and for large ones, and between them a weighted mean.

    Attributes:
        small: of transfers that are queued whole.
        large: of those that go in chunks.
        small_bytes: raw bytes of the largest small one that was measured; `small` alone holds up to there.
        large_bytes: raw bytes of the smallest large one; `large` alone holds from there.
    """

    small: Line
    large: Line
    small_bytes: float
    large_bytes: float

    def __call__(self, raw_bytes: float, encoded_bytes: float) -> float:
        """Seconds that the transfer takes."""
        part = (raw_bytes - self.small_bytes) / (self.large_bytes - self.small_bytes)
        part = min(max(part, 0.0), 1.0)
        return (1 - part) * self.small(raw_bytes, encoded_bytes) + part * self.large(raw_bytes, encoded_bytes)

    def behind(self, slower: float) -> Curve:
        """The same where the link takes so many times as long."""
        return replace(self, small=self.small.behind(slower), large=self.large.behind(slower))


@dataclass(frozen=True)
class Rates:
    """What a machine does; `measured` gives those that ship with kvzip.

    Attributes:
        machine: where they were measured.
        sources: files of bench/results/ that they come from.
        link_gb_per_s: 1e9 bytes a second of one large copy, by direction, ``"out"`` (GPU to host) and ``"in"``.
        raw: transfers of raw bytes as one large copy, by direction.
        encoded: transfers by kvzip, by mode (``"rice"``, or ``"fixed"`` for those with codes of fixed length) and
            direction.
        rice_gb_per_s: what the mode ``rice`` encodes (``"out"``) and decodes (``"in"``) of raw data.
        prefill_flop_per_s: floating-point operations a second of a prefill.
        pool_payload_fraction: part of a pool's bytes that hold records.
    """

    machine: str
    sources: tuple[str, ...]
    link_gb_per_s: Mapping[str, float]
    raw: Mapping[str, Line]
    encoded: Mapping[str, Mapping[str, Curve]]
    rice_gb_per_s: Mapping[str, float]
    prefill_flop_per_s: float
    pool_payload_fraction: float

    @classmethod
    def measured(cls) -> Rates:
        """Those of an H100, from the table that ships with kvzip (bench/planner_rates.py makes it)."""
        table = json.loads((resources.files("kvzip") / "data" / "planner.json").read_text(encoding="utf-8"))
        table["sources"] = tuple(table["sources"])
        table["raw"] = {direction: Line(**line) for direction, line in table["raw"].items()}
        for curves in table["encoded"].values():
            for direction, curve in curves.items():
                lines = {name: Line(**curve[name]) for name in ("small", "large")}
                curves[direction] = Curve(**{**curve, **lines})
        return cls(**table)

    def with_link(self, gb_per_s: float) -> Rates:
        """The same machine behind another link, of this rate in both directions.

        Raises:
            ConfigError: the rate is not positive.
        """
        if not 1e-6 <= gb_per_s < math.inf:
            raise ConfigError(f"link of {gb_per_s} GB/s: use a positive rate, 55 is what PCIe 5.0 x16 reaches")

        slower = {direction: rate / gb_per_s for direction, rate in self.link_gb_per_s.items()}
        return replace(
            self,
            link_gb_per_s=dict.fromkeys(self.link_gb_per_s, gb_per_s),
            raw={direction: line.behind(slower[direction]) for direction, line in self.raw.items()},
            encoded={
                mode: {direction: curve.behind(slower[direction]) for direction, curve in curves.items()}
                for mode, curves in self.encoded.items()
            },
        )

    def transfer_seconds(self, direction: str, raw_bytes: float, *, ratio: float | None, mode: str = "fixed") -> float:
        """Time of one transfer, from the call to its end.

        Args:
            direction: ``"out"`` for a store, ``"in"`` for a load.
            raw_bytes: bytes of the values.
            ratio: raw bytes over encoded bytes; None for raw bytes as one large copy.
            mode: encoding mode.
        """
        if ratio is None:
            return self.raw[direction](0, raw_bytes)
        curve = self.encoded["rice" if mode == "rice" else "fixed"][direction]
        seconds = curve(raw_bytes, raw_bytes / ratio)
        if mode == "rice":  # slower than a fast link where the ratio is high
            return max(seconds, curve(0, 0) + raw_bytes / self.rice_gb_per_s[direction] / 1e9)
        return seconds


@dataclass(frozen=True)
class Plan:
    """What a pool of a size means for a model.

    Attributes:
        model: the model.
        rates: the machine.
        budget_bytes: bytes of the host pool.
        ratio: raw bytes over bytes of the records.
        mode: encoding mode.
        prefill_tokens_per_s: tokens a second that a prefill computes, where the caller measured it.
    """

    model: Model
    rates: Rates
    budget_bytes: int
    ratio: float
    mode: str = "fixed"
    prefill_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        if self.budget_bytes < 1:
            raise ConfigError(f"budget of {self.budget_bytes} bytes: use at least one")
        if not 0 < self.ratio < math.inf:
            raise ConfigError(f"ratio {self.ratio}: use a positive number, 2.7 is usual for the default bounds")
        if self.prefill_tokens_per_s is not None and not self.prefill_tokens_per_s > 0:
            raise ConfigError(f"a prefill of {self.prefill_tokens_per_s} tokens/s: use a positive rate")

    @property
    def encoded_bytes_per_token(self) -> float:
        """Bytes of records for one token."""
        return self.model.bytes_per_token / self.ratio

    def tokens_held(self, *, encoded: bool) -> int:
        """Tokens that the budget holds, as records in a pool or as raw bytes without any overhead."""
        if encoded:
            return int(self.budget_bytes * self.rates.pool_payload_fraction / self.encoded_bytes_per_token)
        return self.budget_bytes // self.model.bytes_per_token

    def transfer_seconds(self, direction: str, tokens: int, *, encoded: bool) -> float:
        """Time to store (``"out"``) or load (``"in"``) so many tokens in one transfer."""
        ratio = self.ratio if encoded else None
        return self.rates.transfer_seconds(direction, tokens * self.model.bytes_per_token, ratio=ratio, mode=self.mode)

    def recompute_seconds(self, tokens: int) -> float | None:
        """Time to compute the keys and values of so many tokens again; None where too little is known of the model."""
        if self.prefill_tokens_per_s is not None:
            return tokens / self.prefill_tokens_per_s
        flop = self.model.prefill_flop(tokens)
        return None if flop is None else flop / self.rates.prefill_flop_per_s

    def break_even(self) -> dict[str, int | None]:
        """Fewest tokens from which on something pays; None where it does not for many, or too little is known.

        Returns:
            The number by the names of `BREAK_EVENS`.
        """

        def faster(direction: str) -> Callable[[int], bool]:
            return lambda tokens: (
                self.transfer_seconds(direction, tokens, encoded=True)
                < self.transfer_seconds(direction, tokens, encoded=False)
            )

        def spared(tokens: int) -> bool:
            seconds = self.recompute_seconds(tokens)
            return seconds is not None and self.transfer_seconds("in", tokens, encoded=True) < seconds

        return {"store": _first(faster("out")), "load": _first(faster("in")), "recompute": _first(spared)}

    def row(self, tokens: int) -> dict[str, Any]:
        """What a sequence of so many tokens takes, in bytes and seconds."""
        if not 1 <= tokens < 2**53:
            raise ConfigError(f"{tokens} tokens: use at least 1, and fewer than 2^53")
        return {
            "tokens": tokens,
            "raw_bytes": tokens * self.model.bytes_per_token,
            "encoded_bytes": round(tokens * self.encoded_bytes_per_token),
            **{
                f"{name}_{what}_seconds": self.transfer_seconds(direction, tokens, encoded=what == "encoded")
                for name, direction in (("store", "out"), ("load", "in"))
                for what in ("raw", "encoded")
            },
            "recompute_seconds": self.recompute_seconds(tokens),
        }

    def as_dict(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The plan as plain types; docs/reference/cli.md has the keys."""
        return {
            "model": {**asdict(self.model), "dtype": self.model.dtype.name.lower()},
            "budget_bytes": self.budget_bytes,
            "mode": self.mode,
            "ratio": self.ratio,
            "bytes_per_token": {"raw": self.model.bytes_per_token, "encoded": self.encoded_bytes_per_token},
            "tokens_held": {"raw": self.tokens_held(encoded=False), "encoded": self.tokens_held(encoded=True)},
            "link_gb_per_s": dict(self.rates.link_gb_per_s),
            "rows": [self.row(tokens) for tokens in lengths],
            "break_even_tokens": self.break_even(),
            "machine": self.rates.machine,
            "sources": list(self.rates.sources),
        }


def _first(holds: Callable[[int], bool]) -> int | None:
    """The smallest number from which on a condition holds for good; None if it does not for the largest one.

    Numbers above it are looked at in steps of an eighth: narrower gaps are passed over.
    """
    if not holds(_MOST_TOKENS):
        return None
    low = high = _MOST_TOKENS
    while low > 0 and holds(low):
        low, high = low * 7 // 8, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
