# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""bench/policies.py: its simulation on traces whose hit rates can be told."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "bench"))
    yield importlib.import_module("policies")
    sys.path.remove(str(ROOT / "bench"))


def rate(module: Any, requests: list[list[int]], capacity: int, policy: str = "lru", order: str = "forward") -> Any:
    sizes = {i: 1 for request in requests for i in request}
    return module.run(policy, requests, sizes, capacity, order)


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_a_pool_that_holds_everything_reaches_the_ceiling(module: Any, policy: str) -> None:
    requests = module.synthetic(3, 40)
    found = rate(module, requests, 10**9, policy)
    assert found["evicted"] == 0
    assert found["prefix_hit_rate"] == round(module.ceiling(requests), 4) > 0.3
    small = rate(module, requests, 100, policy)
    assert small["evicted"] > 0
    assert small["prefix_hit_rate"] <= small["block_hit_rate"] < found["block_hit_rate"]


def test_only_a_prefix_counts_as_loaded(module: Any) -> None:
    requests = [[1, 2, 3, 4], [9], [1, 2, 3, 4]]
    forward = rate(module, requests, 4)  # 9 takes the place of 1
    assert (forward["prefix_hit_rate"], forward["block_hit_rate"]) == (0.0, round(3 / 9, 4))
    reverse = rate(module, requests, 4, order="reverse")  # 9 takes the place of 4
    assert reverse["prefix_hit_rate"] == reverse["block_hit_rate"] == round(3 / 9, 4)


def test_a_request_does_not_evict_its_own_blocks(module: Any) -> None:
    found = rate(module, [[1, 2, 3, 4, 5], [1, 2, 3]], 3)
    assert (found["evicted"], found["prefix_hit_rate"]) == (0, round(3 / 8, 4))


def test_traces_of_ones_own(module: Any, tmp_path: Path) -> None:
    trace = tmp_path / "mine.jsonl"
    lines = [{"hash_ids": [1, 2, 3]}, {"hash_ids": []}, {"hash_ids": [1, 2, 4]}]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.json"
    assert module.main(["--trace", str(trace), "--conversations", "0", "--output", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["traces"] == [
        {"trace": "mine", "requests": 2, "blocks": 4, "mean_blocks_of_a_request": 3.0, "ceiling": round(2 / 6, 4)}
    ]
    assert len(written["rows"]) == len(module.POLICIES) * len(module.ORDERS) * len(module.FRACTIONS)
    trace.write_text('{"hash_ids": [1]}\n{"ids": [1]}\n')
    with pytest.raises(SystemExit, match=r"mine\.jsonl:2"):
        module.main(["--trace", str(trace), "--output", str(out)])
