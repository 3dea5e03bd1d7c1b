# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Fuzzing in processes of their own, so that a crash is a failed test and not the end of the run.

100,000 mutated records, and a short run of the coverage-guided target where Atheris is installed. `.ci/sanitize.sh`
runs the target of the native decoder.

Environment: KVZIP_FUZZ_CASES (100000) and KVZIP_FUZZ_SEED (1).
"""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_decode.py")
PROCESSES = 2
ASAN = "asan" in os.environ.get("LD_PRELOAD", "")


def test_mutated_records(tmp_path: Path) -> None:
    cases = int(os.environ.get("KVZIP_FUZZ_CASES", "100000"))
    seed = int(os.environ.get("KVZIP_FUZZ_SEED", "1"))
    print(f"seed {seed}, {cases} cases")
    memory_mib = "0" if ASAN else "512"
    share = -(-cases // PROCESSES)
    running = []
    for i in range(PROCESSES):
        note = tmp_path / f"case{i}"
        command = [sys.executable, "-X", "faulthandler", str(SCRIPT), "--cases", str(share), "--first", str(i * share)]
        command += ["--seed", str(seed), "--last-case", str(note), "--memory-mib", memory_mib]
        running.append((subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), note))
    for process, note in running:
        output, _ = process.communicate()
        print(output)
        case = struct.unpack("<q", note.read_bytes())[0] if note.exists() else None
        assert process.returncode == 0, f"exit {process.returncode} at case {case} of seed {seed}:\n{output[-4000:]}"


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
