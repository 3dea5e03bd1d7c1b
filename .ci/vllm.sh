#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
#
# The adapter's tests in vLLM's real engine, on the CPU: no GPU, no download of a model. Makes an environment for it
# (about 2 GB) unless there is one.
#
#   PYTHON            the Python to make the environment with, 3.10 or later (default: python3)
#   KVZIP_VLLM_VENV   folder of the environment; it is kept, and used again when it is complete (default: temporary)
#   KVZIP_VLLM_BASE   virtual environment with kvzip, its `test` extra and torch to build on, instead of installing them
#   Arguments go to pytest instead of the default tests.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment vllm "${KVZIP_VLLM_VENV:-}" "${KVZIP_VLLM_BASE:-}"
[ "$#" -gt 0 ] || set -- tests/adapters
export OMP_NUM_THREADS=1 # read when torch is loaded, so not by the tests themselves
"$venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
