# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The CUDA codec without the engine, for the tests that call it directly."""

from __future__ import annotations

from typing import Any

import cuda_bridge as bridge
import pytest

from kvzip.errors import BackendUnavailableError


@pytest.fixture(scope="module")
def cuda() -> tuple[Any, Any]:
    """What `cuda_bridge.load` gives; skips where there is no GPU or no CUDA codec."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    try:
        return bridge.load()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
