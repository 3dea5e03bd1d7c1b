# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Fuzzing in processes of their own, so that a crash is a failed test and not the end of the run.

100,000 mutated records, and a short run of the coverage-guided target where Atheris is installed. `.ci/sanitize.sh`
runs the target of the native decoder.

Environment: KVZIP_FUZZ_CASES (100000), KVZIP_FUZZ_SEED (1), and KVZIP_FUZZ_JSON, a file that gets the report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_decode.py")
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")


def test_mutated_records(tmp_path: Path) -> None:
    cases, seed = os.environ.get("KVZIP_FUZZ_CASES", "100000"), os.environ.get("KVZIP_FUZZ_SEED", "1")
    report = Path(os.environ.get("KVZIP_FUZZ_JSON") or tmp_path / "report.json")
    command = [sys.executable, str(SCRIPT), "--cases", cases, "--seed", seed, "--processes", "2", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["faults"] == 0
    counted = sum(sum(by_outcome.values()) for by_outcome in found["outcomes"].values())
    assert found["accepted"] + found["refused"] == counted == int(cases)
    assert "decoded" not in found["outcomes"]["anywhere"]  # damage without new checksums
    if int(cases) >= 1000:  # the checks behind the checksums are reached, and pass what they should
        assert 0.1 < found["accepted"] / int(cases) < 0.5


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris")
@pytest.mark.skipif(
    ASAN, reason="a preloaded AddressSanitizer takes the coverage from Atheris; kvzip_fuzz runs instead"
)
def test_coverage_guided(tmp_path: Path) -> None:
    runs = int(os.environ.get("KVZIP_FUZZ_CASES", "100000")) // 4
    command = [sys.executable, str(SCRIPT.with_name("fuzz_record.py")), f"-runs={runs}", "-seed=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"Done {runs} runs" in done.stderr
    assert "no interesting inputs" not in done.stderr
