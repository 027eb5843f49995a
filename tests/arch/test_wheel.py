"""The built wheel, installed into an empty environment away from the repository."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from mb_torch import __version__
from tests.arch.repository import PACKAGES, ROOT

INFO = f"modelbatch_hybrid-{__version__}.dist-info"
EXTRAS = {"jax", "config", "train", "slurm", "vision", "tracking", "demo", "dev"}
# Imports every module of the packages, reads every public name, and tells where each module came from.
IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
files = {}
for package in sys.argv[1:]:
    folders = importlib.import_module(package).__path__
    for name in [package, *(info.name for info in pkgutil.walk_packages(folders, package + "."))]:
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", []):
            getattr(module, public)
        files[name] = module.__file__
print(json.dumps(files))
"""


@dataclass(frozen=True)
class Installation:
    """An environment with the wheel in it; `python` runs there, in a folder with nothing else."""

    folder: Path
    wheel: Path

    def run(self, *command: str) -> str:
        program, *arguments = command
        finished = subprocess.run(
            [str(self.folder / "bin" / program), *arguments],
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel without its dependencies, which a path file lends from the running environment.

    Folders named in a path file have their own path files ignored, so an editable install of the repository
    stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        cwd=folder,
        check=True,
        timeout=120,
    )
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    lent = {*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "lent.pth").write_text("\n".join(sorted(lent)) + "\n")
    return Installation(folder, wheel)


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {*PACKAGES, INFO}
    assert [name for name in names if re.search(r"__pycache__|\.pyc$|(^|/)tests?/", name)] == []
    assert {f"{package}/py.typed" for package in PACKAGES if package != "cli"} <= set(names)


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in [*ROOT.glob("compat/*/"), *(ROOT / name for name in PACKAGES if (ROOT / name).is_dir())]:
        for source in folder.rglob("*.py"):
            assert source.relative_to(folder.parent).as_posix() in names


def test_wheel_describes_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{INFO}/METADATA").decode())
        entry_points = archive.read(f"{INFO}/entry_points.txt").decode()
        assert "MIT License" in archive.read(f"{INFO}/licenses/LICENSE").decode()
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    requirements = metadata.get_all("Requires-Dist")
    assert {line for line in requirements if "extra" not in line} == {"torch", "numpy", "tqdm"}
    assert [line for line in requirements if re.search(r"[<>=~]=?\s*\d", line)] == []
    assert "modelbatch = cli.main:main" in entry_points


@pytest.mark.long
def test_installed_wheel_imports_away_from_the_repository(installation: Installation) -> None:
    files = json.loads(installation.run("python", "-I", "-c", IMPORT_EVERYTHING, *PACKAGES))
    assert set(PACKAGES) <= set(files)
    inside = str(installation.folder.resolve())
    assert {name: file for name, file in files.items() if not str(Path(file).resolve()).startswith(inside)} == {}


@pytest.mark.long
def test_installed_command_runs(installation: Installation) -> None:
    assert "demo" in installation.run("modelbatch", "--help")
