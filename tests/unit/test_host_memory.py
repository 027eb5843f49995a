"""Freed memory stays with the process, so that the next step need not fetch it page by page."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="about glibc's malloc"
)

_PAGES = (64 << 20) // 4096

# Counts page faults while a large tensor is made, filled and freed for the second time.
_PROGRAM = """
import resource, torch
from mb_torch.host_memory import keep_freed_memory
keep_freed_memory()
torch.zeros(64 << 20, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(**variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env={**environment, **variables}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_large_block_is_not_fetched_twice() -> None:
    assert _page_faults() < _PAGES // 10


def test_the_users_own_thresholds_win() -> None:
    # Huge pages take fewer faults than small ones.
    assert _page_faults(MALLOC_MMAP_THRESHOLD_="1000000") > 20
