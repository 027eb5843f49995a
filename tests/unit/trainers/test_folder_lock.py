"""One process at a time trains in a folder; who reads there, or was forked from one that trained, is no hindrance."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.training_runs import EPOCHS, Recorder, run
from trainers import folder_lock
from trainers.checkpoints import store
from trainers.config.manager import ConfigurationManager
from trainers.errors import TrainerError
from trainers.folder_lock import held
from trainers.generic import GenericTrainer
from trainers.searches.folder import GridFolder
from trainers.settings import GenericTrainerConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked on Windows")


def _other_process(path: Path, then: str) -> subprocess.Popen[str]:
    code = f"""
import os, pathlib, signal, sys
from trainers.folder_lock import held
with held(pathlib.Path(sys.argv[1]), RuntimeError):
    {then}
"""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_second_run_in_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.0)
    refused: list[str] = []

    class Twice(Recorder):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            with pytest.raises(TrainerError, match="in which another process trains") as caught:
                run(tmp_path)
            refused.append(str(caught.value))

    run(tmp_path, trainer_class=Twice)
    assert len(refused) == EPOCHS
    assert str(tmp_path) in refused[0]
    # Nothing is left of it, and the next one is not refused.
    assert not (tmp_path / ".fit.lock").exists()
    assert run(tmp_path).notes["samples"] == []


def test_reading_a_folder_leaves_a_save_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def read(descriptor: int) -> None:
        fsync(descriptor)
        trainer = GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path)))
        if any(tmp_path.glob("epoch*")):
            trainer.load_checkpoint()
        else:
            with pytest.raises(FileNotFoundError):
                trainer.load_checkpoint()

    monkeypatch.setattr(os, "fsync", read)
    assert run(tmp_path).global_step == 12


def test_a_killed_process_gives_its_folder_back_though_its_child_lives(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    then = "os.fork() or (print(os.getpid(), flush=True), sys.stdin.read(), os._exit(0)); signal.pause()"
    with _other_process(path, then) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert int(process.stdout.readline()) != process.pid
        with pytest.raises(RuntimeError), held(path, RuntimeError):
            pass
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
        with held(path, RuntimeError):
            pass
        # Only now the child ends.
        process.stdin.close()


def test_a_forked_process_gives_nothing_back(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    then = "child = os.fork(); child and os.waitpid(child, 0) and (print(flush=True), sys.stdin.read())"
    with _other_process(path, then) as process:
        assert process.stdout is not None
        process.stdout.readline()
        # The child has left the block.
        with pytest.raises(RuntimeError), held(path, RuntimeError):
            pass
        assert process.communicate("")[0] == ""
        assert process.returncode == 0
    assert not path.exists()


def test_the_other_process_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, is_held, let_go = tmp_path / ".lock", threading.Event(), threading.Event()

    def hold() -> None:
        with held(path, RuntimeError):
            is_held.set()
            assert let_go.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert is_held.wait(60)
    threading.Timer(0.1, let_go.set).start()
    with held(path, RuntimeError, seconds=50.0):
        thread.join()
    assert "is held by another process" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    assert run(tmp_path / "run").global_step == 12
    with GridFolder(tmp_path / "grid", ConfigurationManager(tmp_path, tmp_path)).lock() as descriptor:
        assert os.fstat(descriptor)
