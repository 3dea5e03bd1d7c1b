# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
#
# Sourced by the scripts that test an adapter with the real package.
#
# make_environment NAME FOLDER BASE sets $venv to an environment with what .ci/NAME-requirements.txt lists, and enters
# the repository. FOLDER is kept, and used again when it is complete; empty = temporary. BASE is a virtual environment
# with kvzip, its `test` extra and torch to build on; empty = kvzip is installed.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1

make_environment() {
  local list="$root/.ci/$1-requirements.txt" base
  venv="$2"
  if [ -z "$venv" ]; then
    venv="$(mktemp -d "${TMPDIR:-/tmp}/kvzip-$1.XXXXXX")"
    trap 'rm -rf "$venv"' EXIT
  fi
  if [ ! -e "$venv/complete" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    if [ -n "$3" ]; then
      base="$("$3/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
      # addsitedir, and no mere path: an editable install is a .pth file there.
      echo "import site; site.addsitedir('$base')" >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    fi
    "$venv/bin/pip" install -r <(sed '/^# without dependencies/,$d' "$list")
    "$venv/bin/pip" install --no-deps -r <(sed '1,/^# without dependencies/d' "$list")
    [ -n "$3" ] || KVZIP_CUDA=off "$venv/bin/pip" install -e "$root[test]"
    touch "$venv/complete"
  fi
  cd "$root"
}
