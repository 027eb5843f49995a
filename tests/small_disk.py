"""A small file system of its own, which no other process sees, to be filled and made read-only."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import TracebackType

import pytest


class SmallDisk:
    """A file system in memory for at most 200 files, mounted in a private namespace that a shell keeps alive.

    This process stays outside and goes in by way of ``/proc``, so that the shell's end takes everything away.

    Args:
        point: An empty folder to mount it on.
        size: In bytes.

    Attributes:
        folder: Where it is found.
    """

    def __init__(self, point: Path, size: int = 1 << 20) -> None:
        self._point = point
        self._shell = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.folder = Path(f"/proc/{self._shell.pid}/root{point}")
        self._do(f"mount -t tmpfs -o size={size},nr_inodes=200 tmpfs '{point}'")

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        # A mount that fails has the shell end on its own.
        self._shell.communicate()

    def fill(self, leaving: int) -> None:
        """Leave so many bytes, in whole pages."""
        facts = os.statvfs(self.folder)
        size = facts.f_bavail * facts.f_frsize - leaving
        (self.folder / "filler").write_bytes(bytes(max(0, size)))

    def use_up_names(self, leaving: int) -> None:
        """Leave so many files that can be made."""
        facts = os.statvfs(self.folder)
        (self.folder / "names").mkdir()
        for number in range(facts.f_favail - leaving - 1):
            (self.folder / "names" / str(number)).touch()

    def make_room(self) -> None:
        """Undo `fill` and `use_up_names`."""
        (self.folder / "filler").unlink(missing_ok=True)
        self._do(f"rm -rf '{self._point}/names'")

    def set_read_only(self, is_read_only: bool) -> None:
        """Let nothing be written any more, or let it again."""
        self._do(f"mount -o remount,{'ro' if is_read_only else 'rw'} '{self._point}'")

    def _do(self, command: str) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        try:
            self._shell.stdin.write(f"{command}; echo status $?\n")
            self._shell.stdin.flush()
        except BrokenPipeError:
            pass
        said = []
        for line in self._shell.stdout:
            if line.startswith("status "):
                if int(line.split()[1]):
                    raise OSError(f"{command}: {''.join(said)}")
                return
            said.append(line)
        raise OSError(f"{command}: {''.join(said)}")


def small_disk_or_skip(point: Path, size: int = 1 << 20) -> SmallDisk:
    """Return a disk, or skip the test where this process may mount none."""
    try:
        disk = SmallDisk(point, size)
        (disk.folder / "probe").touch()
        (disk.folder / "probe").unlink()
    except OSError as error:
        pytest.skip(f"needs the right to mount a file system in a namespace of its own (root, unshare): {error}")
    return disk
