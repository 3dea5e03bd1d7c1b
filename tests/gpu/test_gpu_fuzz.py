# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Hostile records against the CUDA decoder, in batches (fuzz_gpu.py runs as many as you like)."""

from __future__ import annotations

from typing import Any

import fuzz_gpu
import pytest

pytestmark = pytest.mark.gpu


def test_hostile_batches(cuda: tuple[Any, Any]) -> None:
    found = fuzz_gpu.run(*cuda, cases=12 * fuzz_gpu.BLOCKS, seed=1)
    assert found["faults"] == 0
    assert found["cases"] == found["accepted"] + found["refused"] == 12 * fuzz_gpu.BLOCKS
    assert min(found["accepted"], found["refused"]) > 1000
