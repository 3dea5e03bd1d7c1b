# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""The documentation's site: ``sphinx-build -W -c docs . build/docs``, from the root of the repository.

The source folder is the root, so that links between pages, the README and files of the repository hold here as they do
where the Markdown is read as it is. The pages stay plain Markdown: where a page stands is said here.
"""

from __future__ import annotations

from typing import Any

project = "kvzip"
copyright = "The kvzip authors"
extensions = ["myst_parser"]
include_patterns = ["docs/**.md", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".venv", "build", "dist"]  # not to be searched
root_doc = "docs/index"
myst_heading_anchors = 4
html_theme = "furo"
html_title = "kvzip"
html_show_sourcelink = False
html_copy_source = False
# The blocks of the record format, and lists of a value's forms, are no language.
highlight_language = "none"

# Diataxis: learn, do, look up, understand. A pattern takes the pages that are not named before it.
NAVIGATION = {
    "Start": ["/README", "/docs/tutorial"],
    "How to": [
        "/docs/guides/vllm",
        "/docs/guides/lmcache",
        "/docs/guides/gpu",
        "/docs/guides/choose-a-bound",
        "/docs/guides/calibrate",
        "/docs/guides/operate",
        "/docs/guides/troubleshooting",
        "/docs/guides/*",
    ],
    "Reference": [
        "/docs/reference/api",
        "/docs/reference/cli",
        "/docs/reference/settings",
        "/docs/reference/metrics",
        "/docs/reference/faults",
        "/docs/reference/format",
    ],
    "Explanation": [
        "/docs/explanation/design",
        "/docs/explanation/rate",
        "/docs/explanation/break-even",
        "/docs/explanation/controller",
        "/docs/performance",
        "/docs/fidelity",
        "/docs/limitations",
    ],
    "Project": ["/CHANGELOG", "/CONTRIBUTING"],
}


def _add_navigation(app: Any, name: str, text: list[str]) -> None:
    if name == root_doc:
        trees = (
            "\n".join([f":caption: {caption}", ":hidden:", ":glob:", "", *pages])
            for caption, pages in NAVIGATION.items()
        )
        text[0] += "".join(f"\n```{{toctree}}\n{tree}\n```\n" for tree in trees)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_navigation)
