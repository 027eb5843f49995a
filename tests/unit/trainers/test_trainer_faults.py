"""Full and read-only disks, damaged and foreign files, clocks that jump: the last good checkpoint survives."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_disk import SmallDisk, small_disk_or_skip
from tests.training_runs import EPOCHS, Recorder, assert_identical, final_state, run
from trainers.checkpoints.files import read_checkpoint
from trainers.config.schema import CheckpointConfig
from trainers.errors import TrainerError

# Saved after every step, and everything kept.
OFTEN: dict[str, Any] = {"save_every_n_steps": 1, "save_top_k": -1}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk that holds about ten checkpoints."""
    (tmp_path / "disk").mkdir()
    with small_disk_or_skip(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Any]:
    """The end of the run that nothing happened to."""
    return _without_notes(final_state(run(tmp_path / "whole")))


def _without_notes(state: dict[str, Any]) -> dict[str, Any]:
    # A run that begins anew, or goes on from an older file, trains some batches again.
    return {name: value for name, value in state.items() if name != "notes"}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("epoch*"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("epoch*")}


class Meddled(Recorder):
    """Has something done to its disk at its event."""

    meddle: Any = None

    def stop(self) -> None:
        self.notes["before"] = _contents(self.store.folder)
        type(self).meddle()


def _meddled(action: Any) -> type[Meddled]:
    return type("Meddled", (Meddled,), {"meddle": staticmethod(action)})


def _assert_intact(folder: Path, before: dict[str, bytes]) -> None:
    """Every file that was there is there, unchanged; there is no other one, and no half of one."""
    assert _contents(folder) == before
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []
    for name in before:
        read_checkpoint(folder / name)


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize("event", [0, 3, 8, 13])
def test_disk_full_during_a_save(kind: str, event: int, disk: SmallDisk, whole: dict[str, Any], tmp_path: Path) -> None:
    if kind == "batch":
        whole = _without_notes(final_state(run(tmp_path / "whole_batch", kind)))
    folder = disk.folder / "run"
    # Enough for the first bytes of a file, not for all of them.
    full = _meddled(lambda: disk.fill(8192))
    notes: dict[str, Any] = {}
    with pytest.raises(TrainerError, match=r"epoch_00.*ckpt was not written: .*No space left.*make room"):
        run(folder, kind, trainer_class=full, stop_at=event, notes=notes, **OFTEN)
    assert bool(notes["before"]) == (event > 0)
    _assert_intact(folder, notes["before"])
    # Still full: fails again, and again nothing is lost.
    with pytest.raises(TrainerError, match="No space left"):
        run(folder, kind, **OFTEN)
    _assert_intact(folder, notes["before"])
    disk.make_room()
    resumed = run(folder, kind, **OFTEN)
    assert_identical(_without_notes(final_state(resumed)), whole)
    assert len(resumed.notes["samples"]) == 4 * EPOCHS - len(notes["before"])


def test_disk_full_at_a_preemption(disk: SmallDisk, whole: dict[str, Any]) -> None:
    class Full(Recorder):
        def on_preemption_signal(self, signum: int, frame: Any) -> None:
            disk.fill(8192)

    folder = disk.folder / "run"
    with pytest.raises(TrainerError, match="No space left"):
        run(folder, trainer_class=Full, stop_at=8)
    assert _names(folder) == ["epoch_000_step_000004.ckpt"]
    disk.make_room()
    assert_identical(_without_notes(final_state(run(folder))), whole)


def test_no_room_for_the_links(disk: SmallDisk, whole: dict[str, Any]) -> None:
    folder = disk.folder / "run"
    with pytest.raises(OSError, match="No space left"):
        run(folder, trainer_class=_meddled(lambda: disk.use_up_names(1)), stop_at=3, **OFTEN)
    assert os.readlink(folder / "latest.ckpt") == "epoch_000_step_000003.ckpt"
    disk.make_room()
    resumed = run(folder, **OFTEN)
    # The file itself was complete.
    assert len(resumed.notes["samples"]) == 4 * EPOCHS - 4
    assert_identical(_without_notes(final_state(resumed)), whole)


@pytest.mark.parametrize("event", [3, 8])
def test_read_only_from_some_moment_on(
    event: int, disk: SmallDisk, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only errors make a disk read-only on which a file is open for writing.
    monkeypatch.setattr("trainers.checkpoints.store.held", lambda *arguments, **keywords: nullcontext())
    folder = disk.folder / "run"
    notes: dict[str, Any] = {}
    with pytest.raises(TrainerError, match=r"was not written: .*Read-only file system"):
        run(folder, trainer_class=_meddled(lambda: disk.set_read_only(True)), stop_at=event, notes=notes, **OFTEN)
    _assert_intact(folder, notes["before"])
    disk.set_read_only(False)
    resumed = run(folder, **OFTEN)
    assert len(resumed.notes["samples"]) == 4 * EPOCHS - len(notes["before"])
    assert_identical(_without_notes(final_state(resumed)), whole)


def test_a_complete_run_is_read_from_a_read_only_folder(disk: SmallDisk) -> None:
    whole = run(disk.folder / "run")
    # What a killed save has left cannot be removed either.
    (disk.folder / "run" / f".epoch_000_step_000001.ckpt.{'0' * 32}.tmp").touch()
    disk.set_read_only(True)
    again = run(disk.folder / "run")
    assert again.notes["samples"] == []
    assert_identical(again.model.state_dict(), dict(whole.model.state_dict()))


def test_a_folder_that_cannot_be_made(disk: SmallDisk) -> None:
    disk.set_read_only(True)
    notes: dict[str, Any] = {}
    with pytest.raises(TrainerError, match=r"checkpoint_dir.*run.*Read-only file system"):
        run(disk.folder / "run", notes=notes)
    assert notes["samples"] == []


def test_a_folder_that_cannot_be_written_to(disk: SmallDisk) -> None:
    folder = disk.folder / "run"
    folder.mkdir()
    disk.set_read_only(True)
    notes: dict[str, Any] = {}
    with pytest.raises(TrainerError, match=r"checkpoint_dir: the folder .*run cannot be written to .*Read-only file"):
        run(folder, notes=notes)
    assert notes["samples"] == []
    # A run that saves nothing needs no such folder.
    assert run(folder, save_every_n_epochs=None, checkpoint=CheckpointConfig(save_last=False)).global_step == 4 * EPOCHS


def test_truncated_anywhere(tmp_path: Path, whole: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "stopped", stop_at=8, **OFTEN)
    newest = "epoch_001_step_000007.ckpt"
    assert _names(tmp_path / "stopped")[-1] == newest
    data = (tmp_path / "stopped" / newest).read_bytes()
    for length in [0, 1, *random.Random(0).sample(range(2, len(data) - 1), 5), len(data) - 1]:
        folder = tmp_path / str(length)
        shutil.copytree(tmp_path / "stopped", folder, symlinks=True)
        (folder / newest).write_bytes(data[:length])
        caplog.clear()
        resumed = run(folder, **OFTEN)
        assert len(resumed.notes["samples"]) == 4 * EPOCHS - 6, length
        assert_identical(_without_notes(final_state(resumed)), whole, f"cut after {length} bytes: ")
        assert newest in caplog.text


def test_foreign_files(tmp_path: Path, whole: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "stopped"
    run(folder, stop_at=8)
    # They come after the run's own by name and by time.
    (folder / "notes.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {"weight": torch.ones(2)}, "epoch": 9, "global_step": 99}, folder / "other.ckpt")
    torch.save(torch.ones(3), folder / "tensor.ckpt")
    (folder / "folder.ckpt").mkdir()
    (folder / "dangling.ckpt").symlink_to("nothing")
    (folder / "latest.ckpt").unlink()
    (folder / "latest.ckpt").symlink_to("nothing")
    resumed = run(folder)
    assert len(resumed.notes["samples"]) == 4 * EPOCHS - 7
    assert_identical(_without_notes(final_state(resumed)), whole)
    for name in ("notes.ckpt", "other.ckpt", "tensor.ckpt"):
        assert name in caplog.text
        assert (folder / name).exists()
    assert os.readlink(folder / "latest.ckpt") == "epoch_002_step_000012.ckpt"


@pytest.mark.parametrize("jumps", ["back", "forth", "at random"])
def test_clock_that_jumps(jumps: str, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    generator, calls = random.Random(1), iter(range(10**6))
    real = time.time

    def jumping() -> float:
        days = {"back": -next(calls), "forth": next(calls), "at random": generator.randint(-9999, 9999)}[jumps]
        return real() + 86400.0 * days

    monkeypatch.setattr(time, "time", jumping)
    settings = {"save_every_n_steps": 1, "save_top_k": 3}
    notes: dict[str, Any] = {}
    for stop_at, steps in ((2, [1, 2, 3]), (8, [5, 6, 7]), (None, [10, 11, 12])):
        trainer = run(tmp_path / "stopped", stop_at=stop_at, notes=notes, **settings)
        assert trainer.preempted is (stop_at is not None)
        assert [int(name[-11:-5]) for name in _names(tmp_path / "stopped")] == steps
        for path in (tmp_path / "stopped").glob("epoch*"):
            os.utime(path, (jumping(), jumping()))
    assert len(notes["samples"]) == 4 * EPOCHS
    assert_identical(_without_notes(final_state(trainer)), whole)


def test_clock_that_jumps_between_two_files_of_one_step(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    calls = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0 * next(calls))
    notes: dict[str, Any] = {}
    # After the last batch of an epoch and after the epoch: names differ, since the second one has logs.
    settings = {"filename": "{step}-{val_loss:.3f}.ckpt", **OFTEN}
    run(tmp_path / "stopped", max_epochs=1, notes=notes, **settings)
    resumed = run(tmp_path / "stopped", notes=notes, **settings)
    assert notes["events"] == EPOCHS * 6
    assert_identical(_without_notes(final_state(resumed)), whole)
