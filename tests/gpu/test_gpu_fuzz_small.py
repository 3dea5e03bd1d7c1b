# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Hostile records in small transfers (fuzz_small.py runs as many as you like)."""

from __future__ import annotations

import fuzz_small
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_hostile_small_loads() -> None:
    found = fuzz_small.run(cases=2000, seed=1)
    assert found["faults"] == 0
    assert found["cases"] == found["accepted"] + found["refused"] >= 2000
    assert min(found["accepted"], found["refused"]) > 300
