# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Coverage-guided fuzzing of `read_header`, `read_record` and `decode`, with Atheris (``pip install atheris``).

    python tests/fuzz/fuzz_record.py -max_total_time=60 [CORPUS_FOLDER]

Options are libFuzzer's. The Python that parses records is instrumented; the native decoder behind it has a target of
its own (fuzz_codec.cpp). Inputs are records; the first byte says whether their checksums are made to hold, so that the
checks behind them are reached. What must hold is what `fuzz_decode.check_case` says.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import fuzz_decode

import kvzip
from kvzip import coding, record
from kvzip.errors import KvzipError

for _module in (record, coding):
    for _function in vars(_module).values():
        if inspect.isfunction(_function) and _function.__module__ == _module.__name__:
            atheris.instrument_func(_function)  # in place
_FENCE = fuzz_decode.FencedMemory(1 << 20)


def test_one_input(data: bytes) -> None:
    """One record, behind a byte that says whether its checksums are computed anew."""
    case = bytearray(data[1:])
    if data[:1] > b"\x1f":
        fuzz_decode.reseal(case)
    with contextlib.suppress(KvzipError):
        kvzip.read_header(bytes(case))
    fuzz_decode.check_case(bytes(case), _FENCE)


def main() -> None:
    """Start from the corpus of fuzz_decode.py where no folder is given."""
    os.environ["KVZIP_THREADS"] = "1"
    arguments = list(sys.argv)
    with tempfile.TemporaryDirectory() as folder:
        if not any(Path(a).is_dir() for a in arguments[1:]):
            for number, valid in enumerate(fuzz_decode.corpus()):
                Path(folder, str(number)).write_bytes(b"\xff" + valid)
            arguments.append(folder)
        atheris.Setup(arguments, test_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
