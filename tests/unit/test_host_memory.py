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

# How often 64 MiB are filled to find out how much is fetched from the system each time.
_ROUNDS = 4
_PAGES = _ROUNDS * (64 << 20) // 4096

# Counts page faults while a large tensor is made, filled and freed, as in one step after another. Some rounds go
# before: a block that was cut from a larger one to be aligned is too short for the next request, and is kept as well.
# Huge pages, with which a few faults fetch as much, are switched off where the system lets us (PR_SET_THP_DISABLE).
_PROGRAM = f"""
import ctypes, resource, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
from mb_torch.host_memory import keep_freed_memory
keep_freed_memory()
def step(): torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
for _ in range(8): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({_ROUNDS}): step()
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
    # Where huge pages stay on, a fault fetches 2 MiB.
    assert _page_faults(MALLOC_MMAP_THRESHOLD_="1000000") > _PAGES // 1000
