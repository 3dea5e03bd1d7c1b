# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Scripts of the repository as modules, for the tests of what is in them; and what scripts among the tests share."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def load_script(path: str) -> Any:
    """A script as a module, under its own name; its `main` does not run.

    Args:
        path: from the root of the repository.
    """
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def seeded_parser(description: str, counted: str, default: int) -> argparse.ArgumentParser:
    """The command line of a script that tries so many random things.

    Args:
        description: what it does.
        counted: what they are called: an option of that name says how many.
        default: how many without it.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{counted}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the result")
    return parser


def give_result(result: dict[str, Any], path: Path | None) -> None:
    """Print the result, and write it where the command line says."""
    text = json.dumps(result, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
