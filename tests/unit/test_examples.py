# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The examples run, and what they print is so: the serving loop compares every value at every turn by itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
from scripts import load_script

torch = pytest.importorskip("torch", reason="the example's cache is made of torch tensors")

SMALL = ["--conversations", "4", "--turns", "3", "--tokens", "20", "--blocks", "10"]


@pytest.fixture(scope="module")
def example() -> Any:
    return load_script("examples/paged_kv_server.py")


def numbers(text: str) -> dict[str, float]:
    found = {name: float(value) for name, value in re.findall(r"'(\w+)': (\d+)", text)}
    for name in ("ratio ", "error/bound <= "):
        found[name.split()[0]] = float(text.split(name)[1].split(";")[0].split()[0])
    return found


DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_conversations_that_outgrow_the_cache_come_back(
    example: Any, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([*SMALL, "--device", device])
    said = numbers(capsys.readouterr().out)
    assert said["computed_again"] == 0
    assert said["blocks_in"] > 4
    assert said["blocks_out"] > 4
    assert said["ratio"] > 1.4  # half of these small conversations is exact
    assert 0 < said["error/bound"] <= 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool_kib", [20, 150])
def test_a_pool_that_is_too_small_costs_computations_and_no_answers(
    example: Any, device: str, pool_kib: int, capsys: pytest.CaptureFixture[str]
) -> None:
    example.main([*SMALL, "--device", device, "--pool-kib", str(pool_kib)])
    assert numbers(capsys.readouterr().out)["computed_again"] > 0


@pytest.mark.parametrize("device", DEVICES)
def test_the_loop_notices_wrong_values(example: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is no formality: a swap that loads one wrong value fails it."""
    swap_in = example.Server.swap_in

    def one_value_wrong(self: Any, conversation: Any, keep: list[Any]) -> None:
        swap_in(self, conversation, keep)
        if conversation.tokens:
            self.settle(conversation)
            self.cache[0][conversation.table[0], 1, 0, 0, 0] += 1

    monkeypatch.setattr(example.Server, "swap_in", one_value_wrong)
    with pytest.raises(AssertionError, match="is wrong"):
        example.main([*SMALL, "--device", device])
