#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
#
# The LMCache serde's tests with the real package, in its own storage manager over files: no GPU. Makes an environment
# for it unless there is one.
#
#   PYTHON              the Python to make the environment with, 3.10 or later (default: python3)
#   KVZIP_LMCACHE_VENV  folder of the environment; it is kept, and used again when it is complete (default: temporary)
#   KVZIP_LMCACHE_BASE  virtual environment with kvzip, its `test` extra and torch to build on, instead of installing them
#   Arguments go to pytest instead of the default tests.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment lmcache "${KVZIP_LMCACHE_VENV:-}" "${KVZIP_LMCACHE_BASE:-}"
[ "$#" -gt 0 ] || set -- tests/adapters/lmcache_tier
"$venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
