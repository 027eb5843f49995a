"""Where a project begins, and whether it has the folders that the framework uses."""

from __future__ import annotations

import os
from pathlib import Path

# A folder that holds one of these is a project's root.
ROOT_MARKERS = (
    ".git",
    "pyproject.toml",
    "setup.py",
    "requirements.txt",
    "Pipfile",
    "conda.yaml",
    "environment.yml",
    "slurm_template.txt",
)
PROJECT_FOLDERS = ("configs", "experiments", "scripts")


def get_project_root(start: str | os.PathLike[str] | None = None) -> Path:
    """Return the nearest folder at or above ``start`` that looks like a project's root.

    Args:
        start: A folder, or a file in it. Default: the working directory.

    Returns:
        The nearest folder with ``.git`` (a folder or, in a linked worktree, a file), ``pyproject.toml`` or one of the
        other files that projects keep at their top; where no folder has any, ``start``. Always absolute.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "pyproject.toml").touch()
        ...     inside = ensure_directory_exists(Path(folder) / "scripts")
        ...     get_project_root(inside) == Path(folder).resolve()
        True
    """
    place = (Path.cwd() if start is None else Path(start)).resolve()
    if place.is_file():
        place = place.parent
    for folder in (place, *place.parents):
        if any((folder / marker).exists() for marker in ROOT_MARKERS):
            return folder
    return place


def find_structure_problems(root: str | os.PathLike[str]) -> list[str]:
    """Say what a project lacks of the folders that the framework uses.

    Args:
        root: The project's root.

    Returns:
        One text for each problem, naming the folder concerned; empty if there is none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ["configs", "scripts"]:
        ...         (Path(folder) / name).mkdir()
        ...     [problem.split(":")[0] for problem in find_structure_problems(folder)]
        ['experiments/ is missing']
    """
    root = Path(root)
    if not root.is_dir():
        return [f"{root} is no directory: give the folder that holds the project"]
    return [
        f"{name}/ is missing: expected a folder {root / name}" for name in PROJECT_FOLDERS if not (root / name).is_dir()
    ]


def validate_project_structure(root: str | os.PathLike[str]) -> bool:
    """Whether a project has all folders that the framework uses; `find_structure_problems` says what is missing.

    Args:
        root: The project's root.

    Returns:
        True if nothing is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     validate_project_structure(folder)
        False
    """
    return not find_structure_problems(root)


def ensure_directory_exists(path: str | os.PathLike[str]) -> Path:
    """Make a folder and those above it, unless it is there already.

    Args:
        path: The folder.

    Returns:
        The folder as a `Path`.

    Raises:
        FileExistsError: There is a file of that name.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ensure_directory_exists(Path(folder) / "a" / "b").is_dir()
        True
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return path
