"""The README's examples run, one after another as somebody would type them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arch.repository import ROOT

# Of blocks that need files of the reader's project.
NEEDS_A_PROJECT = ("run_grid_search(", "# project/")


@pytest.mark.long
def test_examples_run(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    own = [block for block in blocks if not any(text in block for text in NEEDS_A_PROJECT)]
    assert len(blocks) > len(own) > 5
    script = tmp_path / "examples.py"
    script.write_text("\n".join(own))
    finished = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
