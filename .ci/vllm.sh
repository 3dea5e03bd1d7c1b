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

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1
if [ -n "${KVZIP_VLLM_VENV:-}" ]; then
  venv="$KVZIP_VLLM_VENV"
else
  venv="$(mktemp -d "${TMPDIR:-/tmp}/kvzip-vllm.XXXXXX")"
  trap 'rm -rf "$venv"' EXIT
fi

if [ ! -e "$venv/complete" ]; then
  "$python" -m venv "$venv"
  if [ -n "${KVZIP_VLLM_BASE:-}" ]; then
    base="$("$KVZIP_VLLM_BASE/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # addsitedir, and no mere path: an editable install is a .pth file there.
    echo "import site; site.addsitedir('$base')" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  fi
  list="$root/.ci/vllm-requirements.txt"
  "$venv/bin/pip" install -r <(sed '/^# without dependencies/,$d' "$list")
  "$venv/bin/pip" install --no-deps -r <(sed '1,/^# without dependencies/d' "$list")
  [ -n "${KVZIP_VLLM_BASE:-}" ] || KVZIP_CUDA=off "$venv/bin/pip" install -e "$root[test]"
  touch "$venv/complete"
fi

cd "$root"
[ "$#" -gt 0 ] || set -- tests/adapters
export OMP_NUM_THREADS=1 # read when torch is loaded, so not by the tests themselves
"$venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
