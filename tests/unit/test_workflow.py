# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The public workflow can be read, and runs what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"

pytestmark = pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="a source distribution leaves .ci out")


def test_the_workflow_runs_scripts_and_versions_that_there_are() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    scripts = {script for command in commands for script in re.findall(r"\.ci/[\w.]+", command)}
    assert scripts == {".ci/run", ".ci/vllm.sh", ".ci/lmcache.sh", ".ci/release.sh"}
    assert all((ROOT / script).exists() for script in scripts)
    versions = set(jobs["python"]["strategy"]["matrix"]["python"])
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert versions == set(classified)
