# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The CUDA codec's device code, run on the host thread by thread, against the CPU codec. Needs no GPU and no nvcc."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from kvzip import _native
from kvzip.errors import BackendUnavailableError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuszp"
EMULATION = ROOT / "tests" / "gpu" / "emulation"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the emulation needs a C++ compiler on x86-64 Linux")
    try:
        library = _native.find_library()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    found = tmp_path_factory.mktemp("emulation") / "codec_emulation"
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", f"-I{SOURCES}", f"-I{EMULATION}"]
    command += [str(EMULATION / "codec_emulation.cpp"), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(found)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-2000:]
    return found


@pytest.mark.slow
def test_device_code_writes_the_bytes_of_the_cpu_codec(program: Path) -> None:
    """Random geometries, dtypes, codings, bounds and values; foreign bytes get the same verdict and the same values."""
    done = subprocess.run([str(program), "600", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "600 cases equal" in done.stdout
