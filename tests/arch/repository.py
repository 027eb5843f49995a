"""Where the repository's files are, and a Python started apart from the running one."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE_FOLDERS = [ROOT, ROOT / "compat"]
PACKAGES = ["mb_torch", "mb_jax", "bridge", "trainers", "cli", "modelbatch", "torchmb", "model_training_framework"]
_BUILT = re.compile(r"(^|/)(\.(?!ci/|github/|gitignore$)|__pycache__/|build/|dist/|[^/]+\.egg-info/)")


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """All files that are tracked or could be; without git, all that do not look like a build's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0:
        names = listed.stdout.decode().rstrip("\0").split("\0")
    else:
        found = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*"))
        names = [name for name in found if not _BUILT.search(name)]
    return tuple(sorted(ROOT / name for name in names if (ROOT / name).is_file()))


def run_python(code: str, *, path: list[Path] | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds our packages, with `path` looked through first."""
    folders = [*(path or []), *SOURCE_FOLDERS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders)}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert not check or finished.returncode == 0, finished.stderr
    return finished
