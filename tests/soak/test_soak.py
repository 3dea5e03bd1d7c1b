# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""A short soak (soak.py): engines on host memory and on a GPU made of it, with faults, against a dict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("soak.py")


def test_a_short_soak(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    command = [sys.executable, "-X", "faulthandler", str(SCRIPT), "--operations", "4000", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["operations"] == 4000
    assert found["faults"] > 100
    outcomes = found["outcomes"]
    assert {"store: ended well", "load: ended well", "store: PoolExhaustedError", "transfer given up"} <= set(outcomes)
    assert any(name.startswith("store or load, the device fails: ") for name in outcomes)
