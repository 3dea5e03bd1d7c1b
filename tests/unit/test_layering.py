# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Layers import downwards only, and the heavy packages are imported late and in few places. Read from the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kvzip"

# From the top to the bottom. A module imports from lower layers, or from its own.
LAYERS: list[set[str]] = [
    {
        "kvzip.cli",
        "kvzip._arguments",
        "kvzip._text",
        "kvzip.demo",
        "kvzip.benchmark",
        "kvzip.selfcheck",
        "kvzip.plots",
        "kvzip.info",
        "kvzip.testing",
        "kvzip.adapters",
    },
    {"kvzip.engine", "kvzip.planner", "kvzip.device", "kvzip.torch_swap", "kvzip.worker"},
    {
        "kvzip.transport",
        "kvzip.staging",
        "kvzip.small",
        "kvzip.index",
        "kvzip.transfer",
        "kvzip.coding",
        "kvzip.cuda_codec",
    },
    {
        "kvzip.pool",
        "kvzip.memory",
        "kvzip.policy",
        "kvzip.controller",
        "kvzip.pressure",
        "kvzip.metrics",
        "kvzip.integrity",
        "kvzip.backends",
    },
    {
        "kvzip.record",
        "kvzip._native",
        "kvzip._cuda",
        "kvzip.driver",
        "kvzip.interop",
        "kvzip.calibration",
        "kvzip.extents",
    },
    {"kvzip.bounds"},
    {"kvzip.types", "kvzip.errors", "kvzip._config", "kvzip._log", "kvzip._process"},
]
# Devices' packages: imported by functions of these modules alone, never when a module is imported.
LAZY = {
    "torch": {"kvzip.interop", "kvzip.backends", "kvzip.adapters"},
    "triton": {"kvzip.backends"},
    "nvidia": {"kvzip.backends"},
    "nvcomp": {"kvzip.backends"},
    "ml_dtypes": set(),
    "prometheus_client": {"kvzip.adapters", "kvzip.metrics"},
    "vllm": {"kvzip.adapters"},
    "lmcache": {"kvzip.adapters"},
    "transformers": {"kvzip.adapters"},
    "matplotlib": {"kvzip.plots"},
    "shtab": {"kvzip.cli"},
    "cupy": set(),
    "pytest": set(),
    "hypothesis": set(),
}
# The kernels of the Triton codec are a module that is itself imported lazily: Triton's decorators need the package.
LAZY_MODULES = {"kvzip.backends.triton.kernels"}
# Modules whose classes derive from a serving stack's: it imports them, by name.
FOR_STACKS = {f"kvzip.adapters.vllm.{m}" for m in ("connector", "manager", "messages", "metrics", "spec", "worker")}
FOR_STACKS |= {f"kvzip.adapters.lmcache.{m}" for m in ("files", "serde")} | {"kvzip.adapters.transformers.cache"}
# What the core may import at once.
ALLOWED = {"numpy", "crc32c", "kvzip"} | set(sys.stdlib_module_names)


def modules() -> dict[str, Path]:
    found = {}
    for base, prefix in ((PACKAGE, "kvzip"), (ROOT / "adapters", "kvzip.adapters")):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join((prefix, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """(module, imported when the module is, line) of every import of a module; type checking does not count."""
    tree = ast.parse(MODULES[name].read_text(), str(MODULES[name]))
    is_package = MODULES[name].name == "__init__.py"

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                for other in child.orelse:
                    yield from walk(other, at_import)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, at_import, child.lineno
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = name.split(".") if is_package else name.split(".")[:-1]
                    package = package[: len(package) - child.level + 1]
                    base = ".".join([*package, *([base] if base else [])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"  # a module of the package, or a name in one
                    yield (full if full in MODULES or base == "kvzip" else base), at_import, child.lineno
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, at_import and not function)

    yield from walk(tree, True)


def inside(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def layer(module: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if any(inside(module, n) for n in names)), None)


def test_every_module_has_its_layer() -> None:
    homeless = [m for m in MODULES if m not in ("kvzip", "kvzip.adapters") and layer(m) is None]
    assert not homeless, f"say in LAYERS where {', '.join(homeless)} belongs"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_layers_import_downwards_only(name: str) -> None:
    own = layer(name)
    if own is None:
        assert name in ("kvzip", "kvzip.adapters")  # exports only
        return
    for module, _, line in imports(name):
        if not inside(module, "kvzip"):
            continue
        other = layer(module)
        assert other is not None, f"{name}:{line} imports {module}, which is in no layer: import modules, not exports"
        assert other >= own, f"{name}:{line} imports {module}, which is above it"


@pytest.mark.parametrize("name", sorted(m for m in MODULES if inside(m, "kvzip.backends")))
def test_a_backend_never_imports_the_engine(name: str) -> None:
    above = {"kvzip.engine", "kvzip.device", "kvzip.transport", "kvzip.index", "kvzip.coding", "kvzip.pool"}
    assert not [m for m, _, _ in imports(name) if any(inside(m, n) for n in above)]


@pytest.mark.parametrize("name", sorted(m for m in MODULES if not inside(m, "kvzip.adapters")))
def test_the_core_imports_little_and_devices_late(name: str) -> None:
    for module, at_import, line in imports(name):
        top = module.partition(".")[0]
        if top in LAZY:
            where = f"{name}:{line} imports {module}"
            assert any(inside(name, allowed) for allowed in LAZY[top]), f"{where}: only {sorted(LAZY[top])} may"
            lazily = not at_import or name in LAZY_MODULES
            assert lazily, f"{where} when it is imported itself: do it in a function"
        else:
            assert top in ALLOWED, f"{name}:{line} imports {module}, which is no dependency of the core"


@pytest.mark.parametrize("name", sorted(LAZY_MODULES))
def test_lazy_modules_are_imported_lazily(name: str) -> None:
    for other in MODULES:
        for module, at_import, line in imports(other):
            assert not (inside(module, name) and at_import), f"{other}:{line} imports {name} at once"


@pytest.mark.parametrize("name", sorted(m for m in MODULES if inside(m, "kvzip.adapters")))
def test_adapters_import_a_serving_stack_in_their_own_modules_alone(name: str) -> None:
    for module, at_import, line in imports(name):
        if module.partition(".")[0] in LAZY and at_import:
            assert name in FOR_STACKS, f"{name}:{line} imports {module} when it is imported itself: do it in a function"
        if not inside(module, "kvzip") and module.partition(".")[0] not in LAZY:
            assert module.partition(".")[0] in ALLOWED, f"{name}:{line} imports {module}"
        assert not (module in FOR_STACKS and at_import) or name in FOR_STACKS, f"{name}:{line} imports {module} at once"


def test_torch_only_in_interop_and_backends() -> None:
    users = {name for name in MODULES for module, _, _ in imports(name) if inside(module, "torch")}
    core = {u for u in users if not inside(u, "kvzip.adapters") and not inside(u, "kvzip.backends")}
    assert core <= {"kvzip.interop.torch"}


def test_the_rules_see_through_functions_and_relative_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nfrom . import record\n"
        "from .backends.base import Codec\ndef f():\n    import triton.language as tl\nclass C:\n    import vllm\n"
    )
    file = tmp_path / "made_up.py"
    file.write_text(source)
    monkeypatch.setitem(MODULES, "kvzip.made_up", file)
    assert [(m, at) for m, at, _ in imports("kvzip.made_up")] == [
        ("typing", True),
        ("kvzip.record", True),
        ("kvzip.backends.base", True),
        ("triton.language", False),
        ("vllm", True),
    ]


def test_nothing_runs_at_import() -> None:
    """No torch, no native library, no thread, no logging handler."""
    code = (
        "import sys, threading, logging, os\n"
        "before = set(threading.enumerate())\n"
        "import kvzip, kvzip.testing, kvzip.cli, kvzip.demo\n"
        "heavy = {'torch', 'triton', 'vllm', 'transformers', 'ml_dtypes', 'pytest', 'hypothesis'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(threading.enumerate()) == before\n"
        "assert len(os.listdir('/proc/self/task')) == 1 if os.path.isdir('/proc/self/task') else True\n"
        "from kvzip import _native\n"
        "assert _native._library is None\n"
        "maps = open('/proc/self/maps').read() if os.path.exists('/proc/self/maps') else ''\n"
        "assert 'kvzip_native' not in maps and 'libcuda' not in maps\n"
        "assert [type(h) for h in logging.getLogger('kvzip').handlers] == [logging.NullHandler]\n"
        "assert not logging.getLogger().handlers\n"
    )
    # NumPy's own BLAS threads are not ours.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)


def test_the_environment_is_read_in_one_place() -> None:
    readers = []
    for name, path in MODULES.items():
        if inside(name, "kvzip.adapters") or name == "kvzip._config":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.append(f"{name}:{node.lineno}")
    assert not readers, f"only kvzip/_config.py reads environment variables, but so do {readers}"
