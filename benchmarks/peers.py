"""Other libraries from PyPI, each in a folder of its own so that none gets into the environment.

Some own import names that ours has as well, so a peer is loaded only in a worker process of its own.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent / ".peers"
VERSIONS = {"modelbatch": "0.1.0", "torchmb": "0.2"}
# Installed beside a peer; all peers need PyTorch and NumPy as well, which are there.
NEEDED = {"torchmb": ["einops==0.8.1"]}


def folder_of(name: str) -> Path:
    """Where a peer is, or would be, installed."""
    return FOLDER / f"{name}-{VERSIONS[name]}"


def install(name: str) -> None:
    """Install a peer, without its dependencies, unless it is there already.

    Raises:
        RuntimeError: pip failed; with what it said.
    """
    if folder_of(name).exists():
        return
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / ".gitignore").write_text("*\n")
    requirements = [f"{name}=={VERSIONS[name]}", *NEEDED.get(name, [])]
    # Moved into place when complete, so that an interrupted installation is never taken for a finished one.
    with tempfile.TemporaryDirectory(dir=FOLDER) as partial:
        target = Path(partial) / "installed"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        finished = subprocess.run([*command, *requirements], capture_output=True, text=True, timeout=300, check=False)
        if finished.returncode:
            raise RuntimeError(f"pip could not install {requirements}: {finished.stderr.strip()}")
        target.rename(folder_of(name))


def load(name: str) -> ModuleType:
    """Import a peer in this process, and make sure that it is the peer.

    Raises:
        RuntimeError: Something else owns the name in this process.
    """
    folder = folder_of(name)
    sys.path.insert(0, str(folder))
    module = importlib.import_module(name)
    if module.__file__ is None or not Path(module.__file__).is_relative_to(folder):
        raise RuntimeError(f"{name} {VERSIONS[name]} expected in {folder}, imported from {module.__file__}")
    return module
