# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Shared fixtures: real KV data and the Hypothesis profiles.

Environment:
    KVZIP_KVDATA: folder with more KV caches as ``*.npy`` (uint16 bit patterns of bfloat16, shape [layers, 2, tokens,
        kv_heads, head_dim]); without it the tests use the sample that ships with the package.
    HYPOTHESIS_PROFILE: ``ci`` (the same examples every time, the default) or ``dev`` (new examples every time).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings

TESTS = Path(__file__).parent
if str(TESTS) not in sys.path:  # `import reference_codec` also when pytest's `pythonpath` is not set
    sys.path.insert(0, str(TESTS))

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.register_profile("dev", deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SAMPLE = TESTS.parent / "kvzip" / "data" / "smollm2_sample.npy"


def kv_files() -> list[Path]:
    """The sample, and every KV cache in the folder that KVZIP_KVDATA names."""
    files = [SAMPLE]
    folder = os.environ.get("KVZIP_KVDATA")
    if folder:
        more = sorted(Path(folder).glob("*.npy"))
        files += [f for f in more if np.load(f, mmap_mode="r").ndim == 5]
    return files


@pytest.fixture(params=kv_files(), ids=lambda path: str(path.stem))
def kv_cache(request: pytest.FixtureRequest) -> npt.NDArray[Any]:
    """A real KV cache: bit patterns of bfloat16, shape [layers, 2 (K, V), tokens, kv_heads, head_dim]."""
    cache: npt.NDArray[Any] = np.load(request.param)
    assert cache.dtype == np.uint16
    assert cache.ndim == 5
    assert cache.shape[1] == 2
    return cache
