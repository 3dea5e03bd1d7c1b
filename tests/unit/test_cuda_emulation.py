# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The CUDA codec's device code, run on the host thread by thread, against the CPU codec. Needs no GPU and no nvcc."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kvzip import _native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuszp"
EMULATION = ROOT / "tests" / "gpu" / "emulation"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        pytest.skip("the emulation needs a C++ compiler on x86-64 Linux")
    library = _native.find_library()
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


#: widths, and how many bits of a bound the step keeps: that of this width, and, for Rice codes, of the next one
LIMITS = [(width, min(9 - width, 5)) for width in range(2, 8)] + [(width, 8 - width) for width in range(4, 8)]


@pytest.mark.parametrize(("width", "bits"), LIMITS)
def test_limits_of_codes_are_those_of_exact_differences(width: int, bits: int) -> None:
    """What `codes_exceed` (cuda_bounds.inl) rests on, for all bfloat16 values and all bounds of tokens.

    It compares a value with the limits of a width exactly, where the format rounds the value times the rounded inverse
    of the step; the one bound for which that differs, `is_apart` (cuda_encode_strips.inl) leaves to the other way.
    """
    most = 2 ** (width - 1)  # codes are -most .. most - 1
    magnitudes = (np.arange(128, 256)[:, None] / 128 * 2.0 ** np.arange(-12, 12)).ravel()
    x = np.concatenate([[0], magnitudes, -magnitudes]).astype(np.float32)
    differs = set()
    for sixteenths in range(16, 32):  # bounds have 5 significant bits; their exponent changes nothing
        half_step = sixteenths >> (5 - bits) << (5 - bits)
        codes = np.rint(x * (np.float32(1) / np.float32(half_step / 8)))
        rounded = (codes < -most) | (codes >= most)
        exact = (x * 16.0 >= (2.0 * most - 1) * half_step) | (x * 16.0 < -(2.0 * most + 1) * half_step)
        if (rounded != exact).any():
            differs.add(sixteenths)
    assert differs == ({30} if width == 2 else set())
