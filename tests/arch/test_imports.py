"""Who imports whom: the contracts of pyproject.toml, the front-end's dependencies, what is loaded lazily."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.arch.repository import ROOT, SOURCE_FOLDERS, run_python

# Beside the standard library and itself, the front-end may import these, at any depth of its code.
FRONT_END_IMPORTS = {"mb_torch", "torch", "numpy"}
# `import mb_torch` loads none of these: they belong to backends, the command line or the tests.
LAZY = ["jax", "jaxlib", "flax", "optax", "matplotlib", "sklearn", "typer", "rich", "omegaconf", "cli"]


def lint_imports(root: Path, folders: list[Path]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders)}
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
        "--no-cache",
    ]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)


def imported_top_levels(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield str(node.module).split(".")[0]


def foreign_imports(source: str) -> set[str]:
    return set(imported_top_levels(source)) - FRONT_END_IMPORTS - sys.stdlib_module_names


def test_import_contracts_hold() -> None:
    finished = lint_imports(ROOT, SOURCE_FOLDERS)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize(
    ("importer", "line", "contract"),
    [
        ("mb_torch/core.py", "import mb_torch.vmap", "backends are loaded by registered name"),
        ("mb_torch/core.py", "import cli.main", "mb_torch stands alone"),
        ("mb_torch/vmap/engine.py", "import mb_torch.core", "layers of mb_torch"),
        ("mb_torch/vmap/engine.py", "from mb_torch import ModelBatch", "layers of mb_torch"),
        ("mb_torch/unplaced.py", "", "layers of mb_torch"),
        ("cli/main.py", "import mb_torch.core", "only the public names of mb_torch"),
        ("cli/main.py", "import modelbatch", "nothing imports the compatibility packages"),
        ("mb_torch/core.py", "import jax", "mb_torch stands alone"),
        ("mb_jax/engine.py", "import mb_torch.core", "the xla backend does not lean on the other one"),
        ("mb_jax/engine.py", "import mb_torch.vmap.mapping", "backends are loaded by registered name"),
        ("bridge/trace.py", "import mb_torch.core", "of mb_torch the bridge knows its errors only"),
        ("bridge/trace.py", "import mb_jax.rng", "the bridge knows nothing of model batches"),
        ("bridge/translators.py", "import bridge.via_graph", "translators are loaded by name"),
        ("cli/main.py", "import mb_jax.engine", "nobody imports the xla backend"),
        ("cli/main.py", "import model_training_framework.utils", "nothing imports the compatibility packages"),
        ("mb_torch/core.py", "import trainers", "mb_torch stands alone"),
        ("trainers/searches/folder.py", "import trainers.generic", "layers of trainers"),
        ("trainers/checkpoints/files.py", "import trainers.packed.run", "layers of trainers"),
        ("trainers/reporting/metrics.py", "import mb_torch.state", "only the public names of mb_torch"),
        ("trainers/reporting/metrics.py", "import mb_jax.engine", "trainers know the front-end only"),
        ("trainers/reporting/metrics.py", "import slurm.executor", "trainers know the front-end only"),
        ("trainers/config/grid.py", "import torch", "configurations and grid searches work without torch"),
        ("trainers/searches/executors.py", "import mb_torch", "configurations and grid searches work without torch"),
        (
            "trainers/searches/framework.py",
            "import trainers.searches.local_executor",
            "executors are loaded by registered name",
        ),
        ("compat/torchmb/__init__.py", "import modelbatch", "nothing imports the compatibility packages"),
    ],
)
def test_import_contracts_catch(tmp_path: Path, importer: str, line: str, contract: str) -> None:
    """Each contract fails on the import it is there for, shown on a copy that has nothing but imports."""
    folders = ("mb_torch", "mb_jax", "bridge", "trainers", "cli", "compat")
    for path in [path for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        imports = (
            ast.unparse(n) for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
        )
        copy.write_text("\n".join(imports) + "\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    offender = tmp_path / importer
    offender.write_text((offender.read_text() if offender.exists() else "") + line + "\n")

    finished = lint_imports(tmp_path, [tmp_path, tmp_path / "compat"])

    broken = [text for text in finished.stdout.splitlines() if text.endswith("BROKEN")]
    assert finished.returncode == 1
    assert any(contract in text.lower() for text in broken), finished.stdout + finished.stderr


def test_front_end_imports_torch_and_numpy_only() -> None:
    sources = sorted((ROOT / "mb_torch").rglob("*.py"))
    assert sources
    found = {path.relative_to(ROOT).as_posix(): foreign_imports(path.read_text()) for path in sources}
    assert not any(found.values()), found


def test_foreign_imports_are_seen_inside_functions() -> None:
    assert foreign_imports("def f():\n    import jax.numpy\n    from flax import nnx\n    import os, torch") == {
        "jax",
        "flax",
    }


@pytest.mark.parametrize(
    ("imported", "lazy"),
    [
        ("mb_torch, modelbatch, torchmb", LAZY),
        ("trainers", [*LAZY, "torch"]),
        ("trainers.config", ["torch", "jax", "flax", "optax"]),
        ("trainers.utils", [*LAZY, "torch"]),
        (
            "trainers.searches.framework, trainers.searches.local_executor, trainers.searches.dry_run_executor",
            ["torch", "jax", "slurm"],
        ),
        ("trainers.generic", [*LAZY, "yaml", "torchdata"]),
    ],
)
def test_import_loads_nothing_optional(imported: str, lazy: list[str]) -> None:
    code = f"import sys, {imported}; print([n for n in {lazy!r} if n in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["omegaconf", "yaml"])
@pytest.mark.parametrize("imported", ["ConfigurationManager", "ParameterGridSearch", "create_experiment_config"])
def test_missing_package_of_configurations_names_the_extra(imported: str, package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from trainers.config import {imported}"
    finished = run_python(code, check=False)
    assert finished.returncode == 1
    assert f"needs the package {package}. Run: pip install 'modelbatch-hybrid[config]'" in finished.stderr


def test_loaded_modules_are_seen() -> None:
    code = f"import sys, matplotlib; print([n for n in {LAZY!r} if n in sys.modules])"
    assert run_python(code).stdout.strip() == "['matplotlib']"
