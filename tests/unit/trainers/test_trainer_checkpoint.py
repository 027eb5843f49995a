"""Checkpoint files: written whole, when due, bounded in number, and never executed."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training_runs import Recorder, assert_identical, final_state, make_loader, make_objects, run
from trainers.callbacks import TrainingCallback
from trainers.checkpoints.files import read_checkpoint, to_plain
from trainers.checkpoints.snapshot import restore_callbacks
from trainers.checkpoints.store import LATEST, SET_ASIDE, CheckpointStore
from trainers.config.errors import ConfigurationError
from trainers.errors import (
    CheckpointTimeoutError,
    DamagedCheckpointError,
    MissingCheckpointError,
    PreemptionTimeoutError,
    TrainerError,
)
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig

KEYS = set(
    "format_version experiment_name save_timestamp epoch global_step model_state_dict optimizer_state_dict "
    "scheduler_state_dict scaler_state_dict resume_state loader_state metrics best early_stopping preemption_count "
    "callbacks trackers config".split()
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_symlink())


def _steps(folder: Path) -> list[int]:
    return [int(name[-11:-5]) for name in _names(folder)]


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_content_is_plain(kind: str, tmp_path: Path) -> None:
    trainer = run(tmp_path, kind, experiment_name="first", max_epochs=1)
    path = tmp_path / "first" / "epoch_000_step_000004.ckpt"
    content = torch.load(path, weights_only=True)
    assert set(content) >= KEYS
    assert set(content["loader_state"]) >= {"train", "val", "epoch_start_rng"}
    assert content["experiment_name"] == "first"
    assert content["metrics"] == trainer.logs
    for link in ("latest.ckpt",):
        assert os.readlink(tmp_path / "first" / link) == path.name

    def check(value: Any) -> None:
        if isinstance(value, dict):
            for entry in value.values():
                check(entry)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                check(entry)
        else:
            assert value is None or type(value) in (torch.Tensor, int, float, str, bool), type(value)
            assert not isinstance(value, torch.Tensor) or value.device.type == "cpu"

    check(content)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [4, 8, 12]),
        ({"save_every_n_epochs": 2}, [8, 12]),
        ({"save_every_n_epochs": None}, [12]),
        ({"save_every_n_epochs": None, "save_every_n_steps": 5}, [5, 10, 12]),
        ({"save_every_n_epochs": None, "save_every_n_steps": 3, "save_top_k": 2}, [9, 12]),
        ({"save_top_k": 1}, [12]),
        ({"save_every_n_epochs": None, "save_every_n_minutes": 1e-9, "save_top_k": -1}, [*range(1, 13), 4, 8]),
    ],
)
def test_saved_when_due(settings: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    run(tmp_path, **settings)
    assert sorted(set(_steps(tmp_path))) == sorted(set(steps))


def test_end_is_not_saved_without_save_last(tmp_path: Path) -> None:
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=2, save_every_n_epochs=3)
    config.checkpoint.save_last = False
    model, optimizer, _ = make_objects("single")
    GenericTrainer(config, loss_fn=nn.functional.mse_loss).fit(model, optimizer, make_loader("list"))
    assert _names(tmp_path) == []


class Valued(Recorder):
    """Ends epochs with given values of a metric."""

    def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
        logs["val_loss"] = self.notes["values"][epoch]


@pytest.mark.parametrize(
    ("mode", "values", "keep", "kept", "best"),
    [
        ("min", [3.0, 1.0, 2.0, 5.0, 4.0], 1, [8, 20], 8),
        ("min", [3.0, 1.0, 2.0, 5.0, 4.0], 3, [8, 12, 20], 8),
        ("max", [3.0, 1.0, 2.0, 5.0, 4.0], 2, [16, 20], 16),
        ("min", [1.0, 1.0, 1.0, 1.0, 2.0], 1, [4, 20], 4),
        ("min", [float("nan"), 2.0, 2.0, 2.0, 1.0], 1, [20], 20),
        ("min", [3.0, 1.0, 2.0, 5.0, 4.0], -1, [4, 8, 12, 16, 20], 8),
    ],
)
@pytest.mark.parametrize("stop_at", [None, 13])
def test_rotation(
    mode: str, values: list[float], keep: int, kept: list[int], best: int, stop_at: int | None, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"monitor": "val_loss", "mode": mode, "save_top_k": keep, "max_epochs": 5}
    notes = {"values": values}
    trainer = run(tmp_path, trainer_class=Valued, notes=notes, stop_at=stop_at, **settings)
    if stop_at is not None:
        assert trainer.preempted
        trainer = run(tmp_path, trainer_class=Valued, notes=notes, **settings)
    steps = _steps(tmp_path)
    # The checkpoint of the preemption may be one of those that are kept, where there is room.
    assert set(steps) - {10} == set(kept) or (stop_at is not None and len(steps) == max(keep, len(kept)))
    assert {best, 20} <= set(steps)
    link = os.readlink(tmp_path / "best.ckpt")
    assert link == f"epoch_{best // 4 - 1:03d}_step_{best:06d}.ckpt"
    content = read_checkpoint(tmp_path / "latest.ckpt")
    assert content["best"] == {"metric": "val_loss", "value": values[best // 4 - 1], "file": link}


def test_pattern_may_use_logs(tmp_path: Path) -> None:
    trainer = run(tmp_path, filename="{step}-{val_loss:.3f}.ckpt", max_epochs=1, save_every_n_steps=2)
    # Before the first epoch's end there are no logs.
    first = ["epoch_000_step_000002.ckpt", "epoch_000_step_000004.ckpt"]
    assert _names(tmp_path) == [f"4-{trainer.logs['val_loss']:.3f}.ckpt", *first]


PATTERNS = ["{epoch.ckpt", "a/{step}.ckpt", "{val_loss}/{step}", "latest", "{step:q}", "{step.x}", "{}.ckpt", ""]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_can_name_no_file_is_refused_at_the_start(pattern: str) -> None:
    with pytest.raises(TrainerError, match="checkpoint.filename: received"):
        GenericTrainer(GenericTrainerConfig(filename=pattern))


@pytest.mark.parametrize("pattern", ["{nothing}.ckpt", "{val_loss:q}"])
def test_a_pattern_of_metrics_is_known_to_be_bad_when_there_are_some(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="checkpoint.filename"):
        run(tmp_path, filename=pattern)


@pytest.mark.parametrize("stop_at", [None, 6])
def test_pattern_may_use_logs_that_not_every_epoch_has(stop_at: int | None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"filename": "e{epoch}_{val_loss:.3f}", "validate_every_n_epochs": 2, "max_epochs": 4}
    trainer = run(tmp_path, stop_at=stop_at, **settings)
    assert trainer.preempted is (stop_at is not None)
    names = _names(tmp_path)
    assert names[-1] == ("epoch_001_step_000007.ckpt" if stop_at else "epoch_002_step_000012.ckpt")
    assert any(name.startswith("e3_") for name in names) is (stop_at is None)


def test_pattern_with_an_unknown_key_is_found_at_the_first_validation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"filename": "e{epoch}_{val_los:.3f}", "validate_every_n_epochs": 2, "max_epochs": 4}
    with pytest.raises(TrainerError, match=r"checkpoint.filename.*val_los"):
        run(tmp_path, **settings)
    assert _names(tmp_path) == ["epoch_000_step_000004.ckpt"]


def test_a_run_is_not_lost_over_the_name_of_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(tmp_path, filename="{val_loss:q}", save_every_n_epochs=None, stop_at=8).preempted
    assert _names(tmp_path) == ["epoch_001_step_000007.ckpt"]
    assert "The default name is used" in caplog.text


def test_best_is_kept_where_the_save_that_replaces_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(Valued):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            super().on_epoch_end(epoch, logs)
            if epoch:
                monkeypatch.setattr(torch, "save", None)

    with pytest.raises(TypeError):
        run(tmp_path, trainer_class=Fails, notes={"values": [1.0, 2.0]}, filename="model", monitor="val_loss")
    assert read_checkpoint(tmp_path / "best.ckpt")["global_step"] == 4


def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    notes: dict[str, Any] = {}
    assert run(tmp_path, stop_at=8, notes=notes).preempted
    run(tmp_path, notes=notes)
    assert len(notes["samples"]) == 12
    assert _steps(tmp_path) == [4, 7, 8, 12]
    assert caplog.text.count("no link can be made") == 2


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("stop_at", [None, 6, 19])
def test_states_that_the_pattern_gives_one_name_do_not_replace_each_other(
    stop_at: int | None, in_background: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"filename": "m-{val_loss:.1f}.ckpt", "monitor": "val_loss", "save_top_k": 3}
    settings |= {"max_epochs": 5, "save_in_background": in_background}
    notes = {"values": [1.40, 1.21, 1.23, 1.24, 1.22]}
    if stop_at is not None:
        assert run(tmp_path, trainer_class=Valued, notes=notes, stop_at=stop_at, **settings).preempted
    trainer = run(tmp_path, trainer_class=Valued, notes=notes, **settings)
    contents = {name: read_checkpoint(tmp_path / name) for name in _names(tmp_path)}
    assert sorted(content["global_step"] for content in contents.values()) == [8, 12, 20]
    assert all(name.startswith("m-1.2") and name == content["file"] for name, content in contents.items())
    assert read_checkpoint(tmp_path / "best.ckpt")["global_step"] == 8
    assert trainer.store.best == {"metric": "val_loss", "value": 1.21, "file": os.readlink(tmp_path / "best.ckpt")}
    latest = read_checkpoint(tmp_path / "latest.ckpt")
    assert (latest["global_step"], latest["resume_state"]["phase"]) == (20, "TRAINING_COMPLETE")


def test_a_copy_that_somebody_made_keeps_its_name(tmp_path: Path) -> None:
    run(tmp_path, max_epochs=1, filename="{epoch}")
    shutil.copy(tmp_path / "0.ckpt", tmp_path / "1.ckpt")
    run(tmp_path, max_epochs=2, filename="{epoch}")
    assert {name: read_checkpoint(tmp_path / name)["global_step"] for name in _names(tmp_path)} == {
        "0.ckpt": 4,
        "1.ckpt": 4,
        "1-1.ckpt": 8,
    }


def test_save_checkpoint_returns_the_name_with_its_number(tmp_path: Path) -> None:
    class Saves(Recorder):
        def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
            super().on_batch_end(batch_idx, logs)
            notes.setdefault("paths", []).append(self.save_checkpoint().name)

    notes: dict[str, Any] = {}
    run(tmp_path, trainer_class=Saves, notes=notes, filename="e{epoch}", max_epochs=1, save_in_background=True)
    assert notes["paths"] == ["e0.ckpt", "e0-1.ckpt", "e0-2.ckpt", "e0-3.ckpt"]
    assert [read_checkpoint(tmp_path / name)["global_step"] for name in notes["paths"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "monitor", "kept"),
    [
        ([1.0, 2.0, 3.0], "val_loss", {"model.ckpt": 4, "model-1.ckpt": 12}),
        ([2.0, 1.0, 3.0], "val_loss", {"model.ckpt": 12, "model-1.ckpt": 8}),
        ([1.0, 2.0, 3.0], None, {"model.ckpt": 12}),
    ],
)
def test_one_name_for_all_replaces_all_but_the_best(
    values: list[float], monitor: str | None, kept: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes = {"values": values}
    run(tmp_path, trainer_class=Valued, notes=notes, filename="model.ckpt", monitor=monitor, save_every_n_steps=1)
    assert {name: read_checkpoint(tmp_path / name)["global_step"] for name in _names(tmp_path)} == kept
    assert read_checkpoint(tmp_path / "latest.ckpt")["global_step"] == 12
    assert ("one name for all states" in caplog.text) is (monitor is not None)
    if monitor is not None:
        assert read_checkpoint(tmp_path / "best.ckpt")["metrics"]["val_loss"] == min(values)


def test_a_best_that_was_removed_is_not_the_file_that_gets_its_name(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trainer_class": Valued, "filename": "model.ckpt", "monitor": "val_loss"}
    notes = {"values": [1.0, 2.0, 3.0]}
    run(tmp_path, notes=notes, max_epochs=2, **settings)
    (tmp_path / "model.ckpt").unlink()
    run(tmp_path, notes=notes, **settings)
    assert not (tmp_path / "best.ckpt").is_symlink()
    assert read_checkpoint(tmp_path / "latest.ckpt")["best"]["file"] is None


class Dies(BaseException):
    pass


def test_files_that_somebody_else_put_there_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, "single", max_epochs=1, save_top_k=2)
    first = next(path for path in tmp_path.glob("epoch*.ckpt"))
    favourite = shutil.copy(first, tmp_path / "favourite.ckpt")
    (tmp_path / LATEST).unlink()
    (tmp_path / LATEST).write_bytes(b"mine")
    run(tmp_path, "single", max_epochs=4, save_top_k=2)
    assert Path(favourite).exists()
    assert len([*tmp_path.glob("epoch*.ckpt")]) == 2
    assert (tmp_path / (LATEST + SET_ASIDE)).read_bytes() == b"mine"
    assert "was a file" in caplog.text


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "denied"), OSError(5, "I/O error"), MemoryError(), RuntimeError("can't allocate memory")],
)
def test_a_checkpoint_that_cannot_be_read_for_now_is_not_trained_over(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, max_epochs=1)
    files = {path: path.read_bytes() for path in tmp_path.glob("*.ckpt")}

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(TrainerError, match="may be whole"):
        run(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.ckpt")} == files


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_death_during_a_save_leaves_the_old_file(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = final_state(run(tmp_path / "whole"))
    run(tmp_path / "stopped", max_epochs=1)
    before = {name: (tmp_path / "stopped" / name).read_bytes() for name in _names(tmp_path / "stopped")}

    def dies(*arguments: Any, **keywords: Any) -> None:
        raise Dies

    with monkeypatch.context() as patch:
        patch.setattr(moment, dies)
        # What a kill leaves behind; an exception would tidy up.
        patch.setattr(Path, "unlink", lambda *arguments, **keywords: None)
        with pytest.raises(Dies):
            run(tmp_path / "stopped")
    after = {name: (tmp_path / "stopped" / name).read_bytes() for name in _names(tmp_path / "stopped")}
    assert {name: data for name, data in after.items() if name.endswith(".ckpt")} == before
    resumed = final_state(run(tmp_path / "stopped"))
    assert _steps(tmp_path / "stopped") == [4, 8, 12]
    assert_identical({**resumed, "notes": None}, {**whole, "notes": None})


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "hostile"])
def test_damaged_newest_is_skipped(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = final_state(run(tmp_path, save_top_k=-1))
    newest = tmp_path / "epoch_002_step_000012.ckpt"
    executed = tmp_path / "executed"
    hostile = pickle.dumps(Hostile(executed))
    cut, flipped = newest.read_bytes()[:-200], _flipped(newest)
    newest.write_bytes({"cut": cut, "flipped": flipped, "empty": b"", "hostile": hostile}[damage])
    with pytest.raises(DamagedCheckpointError, match="epoch_002"):
        GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path))).load_checkpoint(newest)
    resumed = run(tmp_path)
    assert len(resumed.notes["samples"]) == 4
    assert_identical({**final_state(resumed), "notes": None}, {**whole, "notes": None})
    assert "epoch_002_step_000012.ckpt" in caplog.text
    assert not executed.exists()


def test_a_damaged_file_is_not_counted_among_those_that_are_kept(tmp_path: Path) -> None:
    run(tmp_path, save_top_k=2)
    newest = tmp_path / "epoch_002_step_000012.ckpt"
    data = _flipped(newest)
    newest.write_bytes(data)
    assert run(tmp_path, save_top_k=2, stop_at=1).global_step == 10
    # Two that can be used, and the damaged one, whose name was not needed.
    assert _steps(tmp_path) == [8, 10, 12]
    assert newest.read_bytes() == data


def _flipped(path: Path) -> bytes:
    """Changed within a tensor, which no reader of pickles would notice."""
    data = bytearray(path.read_bytes())
    data[data.rindex(torch.load(path)["model_state_dict"]["0.weight"].numpy().tobytes())] ^= 1
    return bytes(data)


def _edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"something else"), "is truncated, or no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is truncated, or no checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is truncated, or no checkpoint"),
        (lambda path: torch.save(Hostile(path), path), "holds more than tensors and plain data"),
        (lambda path: torch.save([1], path), "is no checkpoint of a run: received a list"),
        (lambda path: _edited(path, lambda c: c.pop("optimizer_state_dict")), "without ['optimizer_state_dict']"),
        (lambda path: _edited(path, lambda c: c.pop("loader_state")), "without ['loader_state']"),
        (lambda path: _edited(path, lambda c: c.update(resume_state=None)), "received a NoneType as 'resume_state'"),
        (lambda path: _edited(path, lambda c: c.update(metrics=None)), "received a NoneType as 'metrics'"),
        (lambda path: _edited(path, lambda c: c["resume_state"].pop("epoch")), "a resume_state without ['epoch']"),
        (lambda path: _edited(path, lambda c: c["resume_state"].update(phase="FOO")), "FOO"),
        (lambda path: _edited(path, lambda c: c["resume_state"].update(val={"what": 1})), "incomplete or altered"),
    ],
)
def test_what_is_no_checkpoint_is_named_and_an_older_one_is_used(
    damage: Callable[[Path], Any], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, max_epochs=2)
    newest = tmp_path / "epoch_001_step_000008.ckpt"
    damage(newest)
    trainer = GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path)))
    with pytest.raises(DamagedCheckpointError, match=re.escape(text)) as caught:
        trainer.load_checkpoint(newest)
    assert str(newest) in str(caught.value)
    assert "load_checkpoint() without a path" in str(caught.value)
    assert trainer.load_checkpoint().global_step == 4
    caplog.clear()
    assert len(run(tmp_path, max_epochs=2).notes["samples"]) == 4
    (message,) = [record.getMessage() for record in caplog.records if "the newest good one is used" in record.message]
    assert str(newest) in message
    assert text in message
    assert "torch.save" not in caplog.text


def test_a_file_that_is_removed_while_it_is_read_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.ckpt"
    torch.save({}, path)

    def load(*arguments: Any, **options: Any) -> None:
        path.unlink()
        raise RuntimeError("something")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MissingCheckpointError, match=r"some\.ckpt does not exist"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda content: content.update(format_version=99), "format version 99"),
        (lambda content: content["resume_state"].update(version="v9"), "resume state version v9"),
    ],
)
def test_a_checkpoint_of_another_version_is_named(
    edit: Callable[[dict[str, Any]], Any], text: str, tmp_path: Path
) -> None:
    run(tmp_path, max_epochs=1)
    path = tmp_path / "epoch_000_step_000004.ckpt"
    _edited(path, edit)
    for load in (lambda: run(tmp_path), lambda: read_checkpoint(path)):
        with pytest.raises(TrainerError, match=f"{re.escape(str(path))}: received {text}; expected"):
            load()
    assert _names(tmp_path) == [path.name]


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_hostile_pickle_in_a_torch_file_is_refused(tmp_path: Path) -> None:
    torch.save(Hostile(tmp_path / "executed"), tmp_path / "hostile.ckpt")
    with pytest.raises(DamagedCheckpointError):
        read_checkpoint(tmp_path / "hostile.ckpt")
    assert run(tmp_path, max_epochs=1).global_step == 4
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_all_damaged_starts_anew(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, other = tmp_path / "epoch_000_step_000004.ckpt", tmp_path / "of_another_tool.ckpt"

    def train() -> bytes:
        run(tmp_path, max_epochs=1)
        path.write_bytes(_flipped(path) if damage == "flipped" else path.read_bytes()[:-200])
        return path.read_bytes()

    other.write_bytes(b"something")
    damaged = [train(), train(), train()]
    assert len(run(tmp_path, max_epochs=1, save_top_k=1).notes["samples"]) == 4
    assert "starts from the beginning" in caplog.text
    assert "['epoch_000_step_000004.ckpt', 'of_another_tool.ckpt']" in caplog.text
    assert "epoch_000_step_000004.ckpt is damaged, and a new checkpoint has its name" in caplog.text
    # What may be saved from a damaged file is not lost, and a name that is not needed is left to it.
    kept = [path.with_name(path.name + end) for end in (".damaged", ".damaged.1", ".damaged.2")]
    assert [file.read_bytes() for file in kept] == damaged
    assert other.read_bytes() == b"something"
    assert read_checkpoint(path)["global_step"] == 4


@pytest.mark.parametrize(
    ("stop_at", "settings", "error"),
    [
        (None, {}, CheckpointTimeoutError),
        (1, {"preemption_timeout": 0.05}, PreemptionTimeoutError),
    ],
)
def test_slow_saves_raise(
    stop_at: int | None, settings: Any, error: type[TrainerError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def slow(*arguments: Any, **keywords: Any) -> None:
        time.sleep(0.3)
        save(*arguments, **keywords)

    monkeypatch.setattr(torch, "save", slow)
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1, **settings)
    if error is CheckpointTimeoutError:
        config.checkpoint.timeout_seconds = 0.05
    trainer = Recorder(config, {}, stop_at)
    model, optimizer, _ = make_objects("single")
    with pytest.raises(error, match="Nothing half-written") as caught:
        trainer.fit(model, optimizer, make_loader("list"))
    assert isinstance(caught.value, TrainerError)
    time.sleep(0.5)
    assert _names(tmp_path) == []


def test_tensors_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    save = torch.save

    def watched(value: Any, *arguments: Any, **keywords: Any) -> None:
        saved.append({name: tensor.data_ptr() for name, tensor in value["model_state_dict"].items()})
        save(value, *arguments, **keywords)

    monkeypatch.setattr(torch, "save", watched)
    trainer = run(tmp_path, max_epochs=1)
    assert saved == [{name: tensor.data_ptr() for name, tensor in trainer.model.state_dict().items()}]


@pytest.mark.parametrize("hook", ["on_batch_start", "training_step", "on_batch_end"])
def test_saving_by_hand_only_where_nothing_is_half_done(hook: str, tmp_path: Path) -> None:
    class Saves(Recorder):
        pass

    def call(self: Any, *arguments: Any) -> Any:
        if self.global_step < 1:
            self.save_checkpoint()
        return getattr(Recorder, hook)(self, *arguments)

    setattr(Saves, hook, call)
    # In the first batch of two that make a step, the end of a batch is half-way as well.
    with pytest.raises(TrainerError, match="cannot be saved now"):
        run(tmp_path, trainer_class=Saves, gradient_accumulation_steps=2)
    assert _names(tmp_path) == []


@pytest.mark.parametrize("hook", ["on_resume_from_checkpoint", "on_training_start", "on_epoch_start"])
@pytest.mark.parametrize("stop_at", [2, 4])
def test_no_save_before_a_resumed_run_is_back_at_its_place(hook: str, stop_at: int, tmp_path: Path) -> None:
    class Saves(Recorder):
        pass

    setattr(Saves, hook, lambda self, *arguments: self.save_checkpoint())
    run(tmp_path, stop_at=stop_at)
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    with pytest.raises(TrainerError, match="before the run was back at its place"):
        run(tmp_path, trainer_class=Saves)
    assert {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)} == before


def test_fewer_epochs_than_were_trained(tmp_path: Path) -> None:
    run(tmp_path, stop_at=8)
    assert run(tmp_path, max_epochs=1).global_step == 7
    # What the checkpoint says of the place is still true.
    assert read_checkpoint(tmp_path / "latest.ckpt")["resume_state"]["phase"] == "TRAIN_BATCH_END"


def test_saving_by_hand(tmp_path: Path) -> None:
    class Saves(Recorder):
        def on_batch_end(self, batch_idx: int, logs: dict[str, Any]) -> None:
            super().on_batch_end(batch_idx, logs)
            if batch_idx == 2:
                self.notes.setdefault("paths", []).append(self.save_checkpoint().name)

    trainer = run(tmp_path, trainer_class=Saves, max_epochs=1)
    assert trainer.notes["paths"] == ["epoch_000_step_000003.ckpt"]
    assert _steps(tmp_path) == [3, 4]
    with pytest.raises(TrainerError, match="Call fit"):
        GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path))).save_checkpoint()


def test_parts_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1, save_rng_state=False)
    config.checkpoint.save_optimizer = config.checkpoint.save_scheduler = False
    model, optimizer, scheduler = make_objects("single")
    GenericTrainer(config, loss_fn=nn.functional.mse_loss).fit(
        model, optimizer, make_loader("list"), scheduler=scheduler
    )
    content = read_checkpoint(tmp_path / "latest.ckpt")
    left_out = [content["optimizer_state_dict"], content["scheduler_state_dict"], content["resume_state"]["rng"]]
    assert left_out == [None, None, None]
    run(tmp_path, max_epochs=2)
    assert "no optimizer state" in caplog.text
    assert "no scheduler state" in caplog.text


def test_callback_states_are_restored(tmp_path: Path) -> None:
    class Counter(TrainingCallback):
        count = 0

        def on_batch_end(self, trainer: GenericTrainer, batch_idx: int, logs: dict[str, Any]) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    counts = []
    for stop_at in (5, 9, None):
        counter = Counter()

        class WithCounter(Recorder):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                self.add_callback(counter)  # noqa: B023 (used at once)

        notes = {"events": counts[-1] if counts else 0}
        run(tmp_path, trainer_class=WithCounter, stop_at=stop_at, notes=notes, loader="list")
        counts.append(counter.count)
    assert counts[-1] == 12


class Stateless(TrainingCallback):
    pass


class WithState(TrainingCallback):
    state: Any = "new"

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class OtherState(WithState):
    pass


@pytest.mark.parametrize(
    ("before", "now", "begin_anew", "unused"),
    [
        ([], [Stateless], [], []),
        ([Stateless], [], [], []),
        ([WithState, Stateless], [WithState], [], []),
        ([WithState, OtherState], [OtherState, WithState], [], []),
        ([Stateless], [WithState], ["WithState"], []),
        ([WithState], [Stateless], [], ["WithState"]),
        ([WithState, WithState], [WithState, OtherState], ["OtherState"], ["WithState"]),
    ],
)
def test_only_callbacks_with_a_state_are_missed(
    before: list[type[TrainingCallback]],
    now: list[type[TrainingCallback]],
    begin_anew: list[str],
    unused: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved: list[dict[str, Any]] = []
    for kind in before:
        saved.append({"class": kind.__name__, "state": torch.zeros(2) if issubclass(kind, WithState) else None})
    callbacks = [kind() for kind in now]
    restore_callbacks(callbacks, saved)
    names = [type(callback).__name__ for callback in callbacks if getattr(callback, "state", None) is WithState.state]
    assert names == begin_anew
    expected = f"none for {begin_anew}, which begin anew, and those of {unused} are not used"
    assert (expected in caplog.text) is bool(begin_anew or unused)
    assert bool(caplog.records) is bool(begin_anew or unused)


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(TrainerError, match=r"state\['a'\]\[1\].*object"):
        to_plain({"a": [1, object()]}, "state")


def test_another_environment_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, max_epochs=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    run(tmp_path, max_epochs=2)
    assert "threads was 1 when the checkpoint was written and is 64 now" in caplog.text


def test_other_settings_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, max_epochs=1, experiment_name="a")
    caplog.clear()
    run(tmp_path, max_epochs=2, experiment_name="a", save_top_k=2, log_every_n_steps=7)
    assert "settings" not in caplog.text
    model, optimizer, scheduler = make_objects("single")
    optimizer.param_groups[0]["weight_decay"] = 0.5
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=3, experiment_name="b", max_grad_norm=2.0)
    trainer = Recorder(config, {})
    trainer.load_checkpoint(tmp_path / "a" / "latest.ckpt")
    trainer.fit(model, optimizer, make_loader("shuffled"), make_loader("list")[:2], scheduler)
    assert "experiment_name was 'a' and is 'b'" in caplog.text
    assert "performance.clip_grad_norm was 1.0 and is 2.0" in caplog.text
    assert "weight_decay 0.5 instead of 0" in caplog.text


def test_a_complete_run_with_other_settings_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, monitor="val_loss")
    trainer = run(tmp_path, monitor="val_loss", gradient_accumulation_steps=2)
    assert "performance.gradient_accumulation_steps was 1 and is 2" in caplog.text
    assert trainer.store.best == read_checkpoint(tmp_path / "latest.ckpt")["best"] is not None


def test_runs_have_their_own_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tmp_path, experiment_name=name, max_epochs=1)
    assert _names(tmp_path) == ["a", "b"]
    with pytest.raises(ConfigurationError, match="experiment_name"):
        run(tmp_path, experiment_name="../c")


def test_leftovers_go_at_the_next_start(tmp_path: Path) -> None:
    leftover = tmp_path / f".epoch_000_step_000001.ckpt.{'0' * 32}.tmp"
    foreign = tmp_path / ".notes.tmp"
    leftover.touch()
    foreign.touch()
    with CheckpointStore(tmp_path).held():
        pass
    assert not leftover.exists()
    assert foreign.exists()
