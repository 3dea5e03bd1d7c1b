# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A causal language model and its tokenizer from a folder, a hub name or a GGUF file, and its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip.errors import BackendUnavailableError, ConfigError

#: K and V of one layer: two tensors of shape ``[tokens, kv_heads, head_dim]``, keys after RoPE.
LayerKV = tuple[Any, Any]


def require(*packages: str) -> list[Any]:
    """Import packages of the extra ``calibrate``.

    Raises:
        BackendUnavailableError: one of them is not installed.
    """
    import importlib

    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError as error:
        raise BackendUnavailableError(f"cannot import {error.name or error}: pip install 'kvzip[calibrate]'") from error


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode.

    Attributes:
        name: what it was loaded from, without the folders above it.
        model: a ``transformers`` model for causal language modelling.
        tokenizer: turns text into token ids.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def device(self) -> Any:
        """The torch device of its weights."""
        return self.model.device

    def tokens(self, text: str, *, special: bool = True) -> Any:
        """Token ids of a text, shape ``[1, tokens]``, int64, on the model's device.

        Args:
            text: the text.
            special: with the tokens that the tokenizer puts around a text, such as the one that begins a sequence.
        """
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids
        return ids.to(self.device)

    def prefill(self, ids: Any) -> tuple[list[LayerKV], Any]:
        """Run a prefix.

        Args:
            ids: token ids, shape ``[1, tokens]``.

        Returns:
            Keys and values of every layer, in the model's dtype, and the logits of the last token, shape ``[vocab]``,
            float32.

        Raises:
            ConfigError: the model keeps something else than keys and values of every token.
        """
        torch, transformers = require("torch", "transformers")
        (cache_utils,) = require("transformers.cache_utils")
        for number, layer in enumerate(transformers.DynamicCache(config=self.model.config).layers):
            if not isinstance(layer, cache_utils.DynamicLayer) or hasattr(layer, "recurrent_states"):
                raise ConfigError(
                    f"layer {number} of {self.name} keeps a state that is no keys and values ({type(layer).__name__}): "
                    "use a model whose layers all have attention alone"
                )
        cache = transformers.DynamicCache()  # without the config: sliding windows are left to the mask, nothing is cut
        try:
            with torch.inference_mode():
                logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        except (TypeError, AttributeError, ValueError) as error:  # of models that keep something else
            raise ConfigError(
                f"{self.name} does not fill a DynamicCache ({error}): use a decoder with attention"
            ) from error
        layers: list[LayerKV] = []
        for number, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or not keys.shape[2] == values.shape[2] == ids.shape[1]:
                raise ConfigError(
                    f"layer {number} of {self.name} keeps no keys and values of all {ids.shape[1]} tokens: "
                    "use a model whose layers all have attention"
                )
            layers.append((keys[0].transpose(0, 1), values[0].transpose(0, 1)))
        if not layers:
            raise ConfigError(f"{self.name} fills no DynamicCache: use a decoder of transformers")
        return layers, logits[0, -1].float()

    def continue_from(self, layers: Sequence[LayerKV], ids: Any) -> Any:
        """Run tokens behind a cache, teacher-forced.

        Args:
            layers: keys and values, as `prefill` gives them; they stay as they are.
            ids: token ids that follow, shape ``[1, tokens]``.

        Returns:
            Logits, shape ``[tokens, vocab]``, float32.
        """
        torch, _ = require("torch", "transformers")
        with torch.inference_mode():
            return self.logits(layers, ids)

    def logits(self, layers: Sequence[LayerKV], ids: Any) -> Any:
        """`continue_from`, in the caller's mode of autograd: gradients reach keys and values that ask for them."""
        return self.model(ids, past_key_values=self._cache(layers), use_cache=True).logits[0].float()

    def greedy(self, layers: Sequence[LayerKV], logits: Any, count: int) -> Any:
        """Decode behind a cache, the most likely token each time.

        Args:
            layers: keys and values, as `prefill` gives them; they stay as they are.
            logits: those of the cache's last token, shape ``[vocab]``.
            count: tokens to decode.

        Returns:
            Token ids, shape ``[1, count]``.
        """
        torch, _ = require("torch", "transformers")
        cache = self._cache(layers)
        chosen = [logits.argmax().view(1, 1)]
        with torch.inference_mode():
            while len(chosen) < count:
                logits = self.model(chosen[-1], past_key_values=cache, use_cache=True).logits
                chosen.append(logits[0, -1].argmax().view(1, 1))
        return torch.cat(chosen, 1)

    def _cache(self, layers: Sequence[LayerKV]) -> Any:
        """A cache of transformers with these keys and values, in the model's dtype."""
        (transformers,) = require("transformers")
        cache = transformers.DynamicCache()
        for number, pair in enumerate(layers):
            cache.update(*(t.transpose(0, 1)[None].to(self.device, self.model.dtype) for t in pair), number)
        return cache


def load_model(source: str, *, device: str = "auto") -> LanguageModel:
    """Load a model for inference, float32 on the CPU and in its own dtype on a GPU.

    Args:
        source: a folder with a checkpoint, a folder with one ``.gguf`` file, such a file, or a name of the Hugging Face
            hub. GGUF weights are dequantised (needs the package ``gguf``).
        device: ``"cpu"``, a torch device such as ``"cuda:0"``, or ``"auto"``: the GPU when there is one.

    Raises:
        BackendUnavailableError: torch or transformers is not installed.
        ConfigError: there is no such model, or it cannot be loaded.
    """
    torch, transformers = require("torch", "transformers")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {}
    where = Path(source)
    if not where.exists() and (where.is_absolute() or source.startswith(".") or len(where.parts) > 2):
        raise ConfigError(
            f"there is no {source}: give a folder with a checkpoint and its tokenizer, a GGUF file, or a name of the "
            "Hugging Face hub such as org/model"
        )
    gguf = [where] if where.suffix == ".gguf" else sorted(where.glob("*.gguf"))
    if gguf and not (where / "config.json").exists():
        if len(gguf) > 1:
            raise ConfigError(f"{source} has {len(gguf)} GGUF files: give one of them")
        require("gguf")
        folder, options["gguf_file"] = str(gguf[0].parent), gguf[0].name
    else:
        folder = source
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        if options:
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        options["dtype"] = torch.float32 if device == "cpu" else "auto"
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(device).eval()
    except Exception as error:  # each architecture, loader and hub client has kinds of its own
        lines = str(error).strip().splitlines()
        raise ConfigError(
            f"cannot load a model from {source}: {lines[0] if lines else type(error).__name__}; give a folder with a "
            "checkpoint and its tokenizer, or a name of the Hugging Face hub"
        ) from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return LanguageModel(gguf[0].stem if "gguf_file" in options else Path(source).name, model, tokenizer)
