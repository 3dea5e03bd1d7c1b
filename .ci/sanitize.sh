#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
#
# The tests of the native CPU codec and its fuzz target (tests/fuzz/fuzz_codec.cpp) in a build with AddressSanitizer and
# UndefinedBehaviorSanitizer, made out of the source tree. Needs a Python that has kvzip and its `test` extra; the installed library stays as it is.
#
#   PYTHON    the Python to use (default: python3)
#   Arguments go to pytest instead of the default list of tests.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
work="$(mktemp -d "${TMPDIR:-/tmp}/kvzip-sanitize.XXXXXX")"
trap 'rm -rf "$work"' EXIT

cmake -S "$root" -B "$work/build" -DKVZIP_CUDA=off -DKVZIP_SANITIZE=ON -DKVZIP_FUZZ=ON >"$work/log" || { cat "$work/log"; exit 1; }
cmake --build "$work/build" --parallel "${KVZIP_BUILD_JOBS:-2}" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }

export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
"$work/build/kvzip_fuzz" "-runs=${KVZIP_FUZZ_CASES:-100000}" "-seed=${KVZIP_FUZZ_SEED:-1}"

# Python is not instrumented: its runtime has to come first, and the interpreter's own leaks are not of interest. libstdc++
# must be there before a C++ exception is thrown.
preload="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
cd "$root"
[ "$#" -gt 0 ] || set -- tests/unit/test_native.py tests/golden tests/fuzz
LD_PRELOAD="$preload" KVZIP_LIBRARY="$work/build/libkvzip_native.so" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
  PYTHONMALLOC=malloc "$python" -m pytest -q -p no:cacheprovider "$@"
