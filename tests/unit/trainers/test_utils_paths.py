"""Where a project begins and what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainers.utils import (
    ensure_directory_exists,
    find_structure_problems,
    get_project_root,
    validate_project_structure,
)
from trainers.utils.paths import ROOT_MARKERS


@pytest.mark.parametrize("marker", ROOT_MARKERS)
def test_nearest_parent_with_a_marker_is_the_root(tmp_path: Path, marker: str) -> None:
    (tmp_path / "setup.py").touch()
    root = ensure_directory_exists(tmp_path / "project")
    inside = ensure_directory_exists(root / "a" / "b")
    (root / marker).touch()  # .git may be a file, too: that of a linked worktree
    (inside / "train.py").touch()
    assert get_project_root(inside) == get_project_root(inside / "train.py") == get_project_root(root) == root.resolve()


def test_git_folder_and_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = ensure_directory_exists(tmp_path / "inside")
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(inside)
    assert get_project_root() == tmp_path.resolve()


def test_without_any_marker_the_start_is_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.utils.paths.ROOT_MARKERS", ("no-such-marker",))
    assert get_project_root(tmp_path) == tmp_path.resolve()


@pytest.mark.parametrize(
    "missing", [[], ["configs"], ["experiments"], ["scripts"], ["configs", "experiments", "scripts"]]
)
def test_each_missing_folder_is_named_alone(tmp_path: Path, missing: list[str]) -> None:
    for name in {"configs", "experiments", "scripts"} - set(missing):
        (tmp_path / name).mkdir()
    problems = find_structure_problems(tmp_path)
    assert [text.split("/")[0] for text in problems] == missing
    for text, name in zip(problems, missing, strict=True):
        assert [other for other in ("configs", "experiments", "scripts") if f"{other}/ " in text] == [name]
    assert validate_project_structure(tmp_path) is (not missing)


def test_root_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "nowhere"):
        (text,) = find_structure_problems(place)
        assert "is no directory" in text
        assert not validate_project_structure(place)


def test_files_are_no_folders(tmp_path: Path) -> None:
    for name in ("configs", "experiments", "scripts"):
        (tmp_path / name).touch()
    assert len(find_structure_problems(tmp_path)) == 3


def test_ensure_directory_exists(tmp_path: Path) -> None:
    path = ensure_directory_exists(str(tmp_path / "a" / "b"))
    assert path == tmp_path / "a" / "b"
    assert path.is_dir()
    assert ensure_directory_exists(path) == path
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        ensure_directory_exists(tmp_path / "file")
