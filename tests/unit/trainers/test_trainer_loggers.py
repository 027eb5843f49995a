"""Where metrics and messages go, and that a resumed run continues its own files and runs."""

from __future__ import annotations

import io
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mb_torch import MissingPackage
from tests.training_runs import make_loader, run
from trainers.config.schema import LoggingConfig
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.reporting.loggers import CsvLogger, make_loggers, messages_as_configured
from trainers.reporting.progress import Progress
from trainers.settings import GenericTrainerConfig


def _logging(**settings: Any) -> LoggingConfig:
    return LoggingConfig(log_every_n_steps=2, **settings)


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_csv_of_a_resumed_run_is_that_of_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    for name, stops in (("whole", [None]), ("stopped", [3, 4, 9, None])):
        notes: dict[str, Any] = {}
        for stop_at in stops:
            run(
                tmp_path / name,
                kind,
                notes=notes,
                stop_at=stop_at,
                logging=_logging(csv_log_dir=str(tmp_path / "logs")),
                experiment_name=name,
            )
    whole, stopped = ((tmp_path / "logs" / name / "metrics.csv").read_text() for name in ("whole", "stopped"))
    assert whole == stopped
    lines = whole.splitlines()
    assert lines[0] == "step,epoch,name,value"
    assert [line.split(",")[0] for line in lines if "step_loss" in line] == ["2", "4", "6", "8", "10", "12"]
    assert sum(",val_loss," in line for line in lines) == 3


def test_rows_after_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"logging": _logging(csv_log_dir=str(tmp_path)), "save_top_k": -1}
    run(tmp_path / "run", **settings)
    whole = (tmp_path / "metrics.csv").read_text()
    for step in (8, 12):
        (tmp_path / "run" / f"epoch_{step // 4 - 1:03d}_step_{step:06d}.ckpt").unlink()
    run(tmp_path / "run", **settings)
    assert (tmp_path / "metrics.csv").read_text() == whole


def test_wandb_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, set[str]]] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, set(values)))

        def finish(self) -> None:
            started[-1]["finished"] = True

    def init(**arguments: Any) -> Run:
        started.append(arguments)
        return Run()

    wandb = types.ModuleType("wandb")
    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = {"logging": _logging(use_wandb=True, wandb_project="p", wandb_tags=["t"]), "experiment_name": "name"}
    run(tmp_path, stop_at=3, **settings)
    run(tmp_path, **settings)
    assert [entry["id"] for entry in started] == [None, "abc"]
    assert all(entry["finished"] and entry["resume"] == "allow" for entry in started)
    assert (started[0]["project"], started[0]["tags"], started[0]["name"]) == ("p", ["t"], "name")
    assert started[0]["config"]["max_epochs"] == 3
    assert (4, {"loss", "val_loss", "epoch"}) in logged


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, int, float]]]:
    """What TensorBoard shows, by folder."""
    shown: dict[str, list[tuple[str, int, float]]] = {}

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            self._folder: str | None = folder
            rows = shown.setdefault(folder, [])
            if purge_step is not None:
                rows[:] = [row for row in rows if row[1] < purge_step]

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert self._folder is not None, "closed"
            shown[self._folder].append((name, step, value))

        def close(self) -> None:
            self._folder = None

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return shown


def test_tensorboard_of_a_resumed_run_is_that_of_an_uninterrupted_one(
    boards: dict[str, list[tuple[str, int, float]]], tmp_path: Path
) -> None:
    for name, stops in (("whole", [None]), ("stopped", [3, 4, 9, None])):
        notes: dict[str, Any] = {}
        settings = {"logging": _logging(tensorboard_dir=str(tmp_path / "board")), "experiment_name": name}
        for stop_at in stops:
            run(tmp_path / name, notes=notes, stop_at=stop_at, **settings)
    whole, stopped = (boards[str(tmp_path / "board" / name)] for name in ("whole", "stopped"))
    assert stopped == whole
    assert [step for tag, step, _ in whole if tag == "step_loss"] == [2, 4, 6, 8, 10, 12]
    assert [step for tag, step, _ in whole if tag == "val_loss"] == [4, 8, 12]


# 4 and 8 are the last steps of their epochs, whose logs come after the checkpoint; 9 logs nothing itself.
@pytest.mark.parametrize("last", [1, 4, 5, 8, 9])
@pytest.mark.parametrize("every_epoch", [None, 1])
def test_tensorboard_hides_what_is_logged_again(
    last: int, every_epoch: int | None, boards: dict[str, list[tuple[str, int, float]]], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_every_n_steps": 1, "save_every_n_epochs": every_epoch, "save_top_k": -1}
    settings |= {"logging": _logging(tensorboard_dir=str(tmp_path / "board"))}
    run(tmp_path / "run", **settings)
    (board,) = boards.values()
    whole = list(board)
    for path in (tmp_path / "run").glob("epoch*.ckpt"):
        if int(path.stem[-6:]) > last:
            path.unlink()
    run(tmp_path / "run", **settings)
    assert board == whole


def test_tensorboard_goes_on_from_a_checkpoint_that_does_not_say_what_it_shows(
    boards: dict[str, list[tuple[str, int, float]]], tmp_path: Path
) -> None:
    for trackers in (None, {"tensorboard": {}}):
        (logger,) = make_loggers(
            LoggingConfig(tensorboard_dir=str(tmp_path)), None, {}, trackers, None if trackers is None else 4
        )
        for step in (4, 5) if trackers is None else (5,):
            logger.log({"loss": 1.0}, 0, step)
        logger.close()
    (board,) = boards.values()
    assert [step for tag, step, _ in board if tag == "loss"] == [4, 5]


@pytest.mark.parametrize(
    ("settings", "module"),
    [({"use_wandb": True}, "wandb"), ({"tensorboard_dir": "x"}, "torch.utils.tensorboard")],
)
def test_missing_package_names_the_extra(
    settings: dict[str, Any], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage, match=r"modelbatch-hybrid\[tracking\]"):
        make_loggers(LoggingConfig(**settings), None, {})


def test_messages_go_where_the_configuration_says(tmp_path: Path) -> None:
    logger = logging.getLogger("trainers")
    handlers, level = list(logger.handlers), logger.level
    path = tmp_path / "logs" / "run.log"
    run(tmp_path / "run", max_epochs=1, logging=LoggingConfig(log_file=str(path), log_level="info"))
    assert "epoch 0: loss" in path.read_text()
    with messages_as_configured(LoggingConfig(log_level="WARNING")):
        assert logger.level == logging.WARNING
    assert (logger.handlers, logger.level) == (handlers, level)
    with pytest.raises(TrainerError, match="LOUD"), messages_as_configured(LoggingConfig(log_level="LOUD")):
        pass


def test_console_only_where_wanted_and_nobody_else_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("trainers")
    counts = []
    monkeypatch.setattr(logger, "propagate", False)
    for wanted in (True, False):
        with messages_as_configured(LoggingConfig(console_log=wanted)):
            counts.append(len(logger.handlers))
    assert counts == [1, 0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "wanted", "shown"), [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)]
)
def test_progress(stream: io.StringIO, wanted: bool, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("epoch 3", total=4, done=1, is_wanted=wanted) as progress:
        progress.advance({"loss": 0.25})
    assert ("epoch 3" in stream.getvalue()) == shown


@pytest.mark.parametrize(("app", "shown"), [("IPKernelApp", True), ("TerminalIPythonApp", False)])
def test_progress_in_a_notebook(app: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(config={app: {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("epoch 3", total=4) as progress:
        assert progress.is_shown == shown


def test_log_files_stay_where_a_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("start", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "start")
    (logger,) = make_loggers(LoggingConfig(csv_log_dir="logs"), "run", {})
    monkeypatch.chdir(tmp_path / "elsewhere")
    logger.log({"loss": 1.0}, 0, 1)
    assert "loss" in (tmp_path / "start" / "logs" / "run" / "metrics.csv").read_text()
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("moves", ["before", "between"])
def test_logs_are_beside_the_checkpoints_wherever_fit_is_called(
    moves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("start", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / ("elsewhere" if moves == "before" else "start"))
    logging_config = _logging(csv_log_dir="logs", log_file="messages.txt")
    config = GenericTrainerConfig(checkpoint_dir="runs", max_epochs=1, logging=logging_config)
    trainer = GenericTrainer(config, loss_fn=torch.nn.functional.mse_loss)
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = torch.nn.Linear(3, 1)
    trainer.fit(model, torch.optim.SGD(model.parameters(), 0.1), make_loader("list"))
    place, other = ("elsewhere", "start") if moves == "before" else ("start", "elsewhere")
    assert sorted(path.name for path in (tmp_path / place).iterdir()) == ["logs", "messages.txt", "runs"]
    assert not any((tmp_path / other).iterdir())
    assert (config.logging.csv_log_dir, config.logging.log_file) == ("logs", "messages.txt")


def test_a_new_run_keeps_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("my own")
    for name in ("first", "second"):
        run(tmp_path / name, logging=_logging(csv_log_dir=str(tmp_path)))
    assert (tmp_path / "metrics.1.csv").read_text() == "my own"
    assert (tmp_path / "metrics.2.csv").read_text() == (tmp_path / "metrics.csv").read_text()
    assert sorted(path.name for path in tmp_path.glob("*metrics*")) == ["metrics.1.csv", "metrics.2.csv", "metrics.csv"]


def test_broken_bytes_behind_the_rows_of_a_resumed_run(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"logging": _logging(csv_log_dir=str(tmp_path))}
    run(tmp_path / "run", stop_at=9, **settings)
    with (tmp_path / "metrics.csv").open("ab") as stream:
        stream.write(b"\xff\xfe\x00broken")
    run(tmp_path / "run", **settings)
    run(tmp_path / "whole", logging=_logging(csv_log_dir=str(tmp_path / "logs")))
    assert (tmp_path / "metrics.csv").read_bytes() == (tmp_path / "logs" / "metrics.csv").read_bytes()


def test_torn_last_row_of_a_csv_file_is_no_row_of_a_resumed_run(tmp_path: Path) -> None:
    """A machine that fails may lose the end of a file that was there at the checkpoint."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,name,value\n1,0,loss,0.5\n2,1,loss,1.2")
    logger = CsvLogger(tmp_path, rows=2)
    logger.log({"loss": 0.25}, 2, 3)
    assert path.read_text().splitlines() == ["step,epoch,name,value", "1,0,loss,0.5", "3,2,loss,0.25"]
    assert logger.state_dict() == {"rows": 2}


def test_csv_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("no folder")
    with pytest.raises(TrainerError, match=r"metrics\.csv cannot be written"):
        run(tmp_path / "run", logging=_logging(csv_log_dir=str(tmp_path / "logs")))


def test_log_file_on_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.warns(UserWarning, match="messages are lost") as caught:
        trainer = run(tmp_path, logging=_logging(log_file="/dev/full", console_log=False))
    assert trainer.current_phase.name == "TRAINING_COMPLETE"
    assert sum("messages are lost" in str(warning.message) for warning in caught) == 1
