"""Successive halving: who goes on, that survivors end as without it, and that a halved run resumes exactly."""

from __future__ import annotations

import logging
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.compare import assert_close
from tests.populations import BATCHES, NAMES, RATES, StopAt, ends, fit, make_population, val_batches
from tests.training_runs import assert_identical
from trainers.callbacks import TrainingCallback
from trainers.checkpoints.files import read_checkpoint
from trainers.config.errors import ConfigurationError, ValidationError
from trainers.config.schema import LoggingConfig
from trainers.errors import TrainerError
from trainers.per_model import PerModel
from trainers.population import Halving, Population
from trainers.population.rungs import Rungs

# Five models, three after the first epoch, two after the second.
HALVING = Halving(every_n_epochs=1, at_least=2)


@pytest.mark.parametrize(
    ("keep", "count", "at_least", "survivors"),
    [(0.5, 5, 1, 3), (0.5, 1, 1, 1), (0.07, 100, 1, 7), (1 / 3, 9, 1, 3), (0.01, 8, 3, 3), (0.01, 2, 3, 2)],
)
def test_number_of_survivors(keep: float, count: int, at_least: int, survivors: int) -> None:
    assert Halving(every_n_epochs=1, keep=keep, at_least=at_least).survivors(count) == survivors


@pytest.mark.parametrize(
    ("values", "mode", "keep", "chosen"),
    [
        ([3.0, 1.0, 2.0, 4.0], "min", 0.5, "bc"),
        ([3.0, 1.0, 2.0, 4.0], "max", 0.5, "ad"),
        ([1.0, 1.0, 1.0, 1.0], "min", 0.5, "ab"),
        ([1.0, 1.0, 1.0, 1.0], "max", 0.5, "ab"),
        ([math.nan, 5.0, -math.inf, 4.0], "min", 0.5, "bd"),
        ([math.nan, 5.0, math.inf, 4.0], "max", 0.5, "bd"),
        ([math.nan, 5.0, math.nan, math.nan], "min", 0.5, "ab"),
        ([math.nan] * 4, "min", 0.25, "a"),
    ],
)
def test_who_survives(values: list[float], mode: str, keep: float, chosen: str) -> None:
    halving = Halving(every_n_epochs=1, keep=keep, mode=mode)
    assert "".join(halving.chosen(dict(zip("abcd", values, strict=True)))) == chosen


# Of the first model that is dropped, and of those that go on.
PER_MODEL = PerModel(
    max_grad_norm=[9.0, 0.4, 0.5, 9.0, None],
    early_stopping_patience=[1, 9, 1, None, None],
    loss_args={"factor": torch.tensor([7.0, 1.5, 0.5, 7.0, 7.0]).double()},
)


def _scaled(outputs: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return factor * nn.functional.mse_loss(outputs, targets)


@pytest.mark.parametrize(
    "options",
    [{"kind": "adam"}, {"kind": "sgd"}, {"kind": "adam", "per_model": PER_MODEL, "loss_fn": _scaled}],
    ids=["adam", "sgd", "per_model"],
)
def test_survivors_end_as_without_halving(options: dict[str, Any], tmp_path: Path) -> None:
    whole = ends(fit(make_population(tmp_path / "whole", keep_best="val_loss", **options)))
    population = fit(make_population(tmp_path / "halved", keep_best="val_loss", **options), HALVING)
    halved = ends(population)

    def ranking(epoch: int, names: list[str]) -> list[str]:
        values = {row["name"]: whole["history"]["by_model"][row["name"]]["values"] for row in whole["table"]}
        return sorted(names, key=lambda name: values[name]["val_loss"][epoch])

    after_first = ranking(0, NAMES)[:3]
    after_second = ranking(1, after_first)[:2]
    assert set(population.history.models) == set(after_second)
    assert population.history.models == [name for name in NAMES if name in after_second]
    assert population.history.dropped == {
        name: 1 if name in after_first else 0 for name in NAMES if name not in after_second
    }
    for place, name in enumerate(halved["history"]["models"]):
        before = NAMES.index(name)
        assert_close(halved["models"][name], whole["models"][name], atol=1e-9, rtol=1e-9)
        for part in ("optimizers", "schedulers"):
            assert_close(halved[part][place], whole[part][before], atol=1e-9, rtol=1e-9)
        for part in ("history", "best"):
            own = [run[part]["by_model"][name] for run in (halved, whole)]
            assert_close(*own, atol=1e-9, rtol=1e-9)
    assert_identical(halved["rng"], whole["rng"])
    assert halved["steps"] == whole["steps"] == 4 * BATCHES


def test_table_of_a_halved_run(tmp_path: Path) -> None:
    population = fit(make_population(tmp_path, keep_best="error"), HALVING)
    left = population.history.models
    for row in population.table():
        name = row["name"]
        dropped = population.history.dropped.get(name)
        assert row["state"] == ("trained" if name in left else f"dropped after epoch {dropped}")
        assert row["epochs"] == (4 if dropped is None else dropped + 1)
        assert row["val_loss"] == population.history.of_model(name)["val_loss"][row["epochs"] - 1]
    gone = next(iter(population.history.dropped))
    with pytest.raises(TrainerError, match=f"model '{gone}': received a model that was dropped after epoch"):
        population.model(gone)
    assert population.model(gone, best=True).state_dict()["0.weight"].shape == (4, 3)


def test_best_is_one_of_those_that_are_left(tmp_path: Path) -> None:
    # The largest error is not what the models are chosen by, and one that was dropped may have the smallest.
    population = fit(make_population(tmp_path), Halving(every_n_epochs=1, keep=0.2, mode="max"))
    (left,) = population.history.models
    assert population.best() == left
    assert min(population.table(), key=lambda row: row["val_loss"])["name"] != left


class Notes(TrainingCallback):
    """Which models each trainer had, and from which step on."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int]] = []

    def on_training_start(self, trainer: Any) -> None:
        self.entered.append((trainer.model.num_models, trainer.global_step))


def test_rungs_have_fewer_and_fewer_models(tmp_path: Path) -> None:
    notes = Notes()
    population = make_population(tmp_path)
    make_optimizer, asked = population._make_optimizer, []
    population._make_optimizer = lambda batch, models: asked.append(models) or make_optimizer(batch, models)
    fit(population, HALVING, notes)
    # Nobody is dropped after the third epoch, so the last rung takes two.
    assert notes.entered == [(5, 0), (3, BATCHES), (2, 2 * BATCHES)]
    assert asked == [[0, 1, 2, 3, 4], [1, 2, 4], [1, 2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rung_0", "rung_1", "rung_2"]


def test_what_is_dropped_is_logged_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainers"):
        population = fit(make_population(tmp_path), HALVING)
    told = [record.getMessage() for record in caplog.records if record.name == "trainers.population.rungs"]
    for name, epoch in population.history.dropped.items():
        value = population.history.at(name, epoch)["val_loss"]
        assert f"{name} is dropped: val_loss {value:.6g}" in told
    assert f"2 of 3 models go on after epoch 1: {', '.join(population.history.models)}" in told


def test_each_rung_has_log_files_of_its_own(tmp_path: Path) -> None:
    settings = {"experiment_name": "sweep"}
    population = make_population(tmp_path / "runs", settings=settings)
    population.trainer.config.logging.csv_log_dir = str(tmp_path / "logs")
    fit(population, HALVING)
    # Neither does a tracker go on with the run of other models.
    begun = read_checkpoint(tmp_path / "runs" / "sweep_rung_1" / "epoch_000_step_000003.ckpt")
    assert begun["trackers"] == {}
    models = {}
    for path in sorted((tmp_path / "logs").iterdir()):
        lines = [line.split(",") for line in (path / "metrics.csv").read_text().splitlines()[1:]]
        models[path.name] = ({line[1] for line in lines}, sum(line[2].startswith("loss_model_") for line in lines))
    assert models == {"sweep_rung_0": ({"0"}, 5), "sweep_rung_1": ({"1"}, 3), "sweep_rung_2": ({"2", "3"}, 4)}


# --- resuming


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run ends with that was never stopped."""
    return ends(fit(make_population(tmp_path_factory.mktemp("whole"), keep_best="val_loss"), HALVING))


def _again(folder: Path, *callbacks: TrainingCallback, **options: Any) -> Population:
    """Another process: nothing but the folder is the same."""
    torch.manual_seed(99)
    return fit(make_population(folder, keep_best="val_loss", **options), HALVING, *callbacks)


# With the last batch of a rung, and in the middle of a later one.
@pytest.mark.parametrize(
    "batch", [b if b in (2, 4) else pytest.param(b, marks=pytest.mark.long) for b in range(4 * BATCHES)]
)
def test_stopped_after_any_batch(batch: int, whole: dict[str, Any], tmp_path: Path) -> None:
    stopped = _again(tmp_path / "stopped", StopAt(batch=batch))
    assert stopped.trainer.preempted
    assert stopped.trainer.global_step == batch + 1
    assert_identical(ends(_again(tmp_path / "stopped")), whole)


@pytest.mark.parametrize("epoch", [0, 3, *(pytest.param(e, marks=pytest.mark.long) for e in (1, 2))])
def test_stopped_at_the_end_of_an_epoch(epoch: int, whole: dict[str, Any], tmp_path: Path) -> None:
    """After the last boundary of a rung: its trainer does not look again."""
    stopped = _again(tmp_path / "stopped", StopAt(epoch=epoch))
    assert stopped.trainer.preempted is (epoch < 3)
    assert stopped.trainer.late_signals == ([] if epoch < 3 else [0])
    assert stopped.trainer.global_step == (epoch + 1) * BATCHES
    assert_identical(ends(_again(tmp_path / "stopped")), whole)


def test_stopped_by_a_signal_between_two_rungs(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Rungs.begin

    def signalled(self: Rungs, number: int, content: Any) -> Any:
        if number == 1:
            signal.raise_signal(signal.SIGUSR1)
        return begin(self, number, content)

    monkeypatch.setattr(Rungs, "begin", signalled)
    before = signal.getsignal(signal.SIGUSR1)
    stopped = _again(tmp_path / "stopped")
    assert signal.getsignal(signal.SIGUSR1) == before
    assert (stopped.trainer.preempted, stopped.trainer.global_step) == (True, BATCHES)
    monkeypatch.undo()
    assert_identical(ends(_again(tmp_path / "stopped")), whole)


@pytest.mark.long
def test_stopped_again_and_again(whole: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(4 * BATCHES):
        assert _again(tmp_path / "stopped", StopAt(batch=0)).trainer.preempted
    assert_identical(ends(_again(tmp_path / "stopped", StopAt(batch=0))), whole)


@pytest.mark.parametrize(
    "batch", [BATCHES, *(pytest.param(b, marks=pytest.mark.long) for b in (0, BATCHES - 1, 2 * BATCHES + 1))]
)
def test_exception(batch: int, whole: dict[str, Any], tmp_path: Path) -> None:
    settings = {"save_every_n_steps": 1}
    stop = StopAt(batch=batch, error=ZeroDivisionError("of the user"))
    with pytest.raises(ZeroDivisionError, match="of the user"):
        _again(tmp_path / "failed", stop, settings=settings)
    assert_identical(ends(_again(tmp_path / "failed", settings=settings)), whole)


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("rung", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_between_two_rungs(
    rung: int, moment: str, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Rungs.begin

    def killed(rungs: Rungs, number: int, content: dict[str, Any]) -> dict[str, Any]:
        if number != rung:
            return begin(rungs, number, content)
        folder = tmp_path / "killed" / f"rung_{number}"
        if moment == "during":
            folder.mkdir()
            (folder / f".epoch_000.ckpt.{'0' * 32}.tmp").write_bytes(b"half of it")
        if moment == "after":
            begin(rungs, number, content)
        raise SystemExit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Rungs, "begin", killed)
        with pytest.raises(SystemExit):
            _again(tmp_path / "killed")
    assert (tmp_path / "killed" / f"rung_{rung}").exists() is (moment != "before")
    assert_identical(ends(_again(tmp_path / "killed")), whole)


def test_damaged_rung_begins_again(whole: dict[str, Any], tmp_path: Path) -> None:
    _again(tmp_path)
    for path in (tmp_path / "rung_2").glob("epoch*"):
        path.write_bytes(path.read_bytes()[:100])
    assert_identical(ends(_again(tmp_path)), whole)


def test_complete_run_returns_at_once(whole: dict[str, Any], tmp_path: Path) -> None:
    _again(tmp_path)
    notes = Notes()
    again = _again(tmp_path, notes)
    assert notes.entered == []
    loaded = {key: value for key, value in ends(again).items() if key != "rng"}
    assert_identical(loaded, {key: value for key, value in whole.items() if key != "rng"})
    # And once more in the same process.
    fit(again, HALVING)
    assert_identical(again.table(), whole["table"])


def test_more_epochs_go_on(whole: dict[str, Any], tmp_path: Path) -> None:
    _again(tmp_path / "short", settings={"max_epochs": 2})
    assert_identical(ends(_again(tmp_path / "short")), whole)


@pytest.mark.parametrize(
    ("names", "halving"),
    [
        ([*NAMES[:4], "other"], HALVING),
        ([NAMES[1], NAMES[0], *NAMES[2:]], HALVING),
        (NAMES, Halving(every_n_epochs=2, at_least=2)),
        (NAMES, Halving(every_n_epochs=1, keep=0.4, at_least=2)),
        (NAMES, Halving(every_n_epochs=1, at_least=2, mode="max")),
        (NAMES, None),
    ],
    ids=["names", "order", "epochs", "keep", "mode", "none"],
)
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.long), BATCHES + 1])
def test_another_run_in_the_same_folder(batch: int, names: list[str], halving: Halving | None, tmp_path: Path) -> None:
    fit(make_population(tmp_path), HALVING, StopAt(batch=batch))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    with pytest.raises(TrainerError, match="received .*rung_0 with the check|at resume: received .*Use another ch"):
        fit(make_population(tmp_path, names=names), halving)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")} == files


def test_halving_where_a_run_without_was(tmp_path: Path) -> None:
    fit(make_population(tmp_path, settings={"max_epochs": 1}))
    with pytest.raises(TrainerError, match="the checkpoints of a run without halving"):
        fit(make_population(tmp_path), HALVING)


def test_without_auto_resume(whole: dict[str, Any], tmp_path: Path) -> None:
    settings = {"auto_resume": False}
    assert_identical(ends(_again(tmp_path / "other", settings=settings)), whole)
    with pytest.raises(TrainerError, match="auto_resume=False does not go on"):
        _again(tmp_path / "other", settings=settings)


# --- ends other than the last epoch


class Stop(TrainingCallback):
    def __init__(self, batch: tuple[int, int]) -> None:
        self.batch = batch

    def on_batch_end(self, trainer: Any, batch_idx: int, logs: dict[str, Any]) -> None:
        trainer.stop_training = trainer.stop_training or (trainer.current_epoch, batch_idx) == self.batch


@pytest.mark.parametrize(
    ("settings", "batch", "steps", "left"),
    [
        ({"max_steps": BATCHES}, None, BATCHES, 5),
        ({"max_steps": BATCHES + 1}, None, BATCHES + 1, 3),
        ({"max_steps": BATCHES - 1}, None, BATCHES - 1, 5),
        ({}, (1, 0), BATCHES + 1, 3),
        ({}, (2, 0), 2 * BATCHES + 1, 2),
    ],
)
def test_run_that_ends_before_its_last_epoch(
    settings: dict[str, Any], batch: tuple[int, int] | None, steps: int, left: int, tmp_path: Path
) -> None:
    def run() -> Population:
        return _again(tmp_path, *([] if batch is None else [Stop(batch)]), settings=settings)

    first, again = run(), run()
    for population in (first, again):
        assert population.trainer.global_step == steps
        assert len(population.history.models) == left
    assert_identical(again.table(), first.table())


class StopAfterFirstEpoch(TrainingCallback):
    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, Any]) -> None:
        trainer.stop_training = epoch == 0


def test_run_that_ends_between_the_epochs_of_a_rung(tmp_path: Path) -> None:
    halving = Halving(every_n_epochs=2)
    first = fit(make_population(tmp_path), halving, StopAfterFirstEpoch())
    again = fit(make_population(tmp_path), halving, StopAfterFirstEpoch())
    for population in (first, again):
        assert population.trainer.global_step == BATCHES
        assert population.history.models == NAMES
    assert_identical(again.table(), first.table())


class StopWithFirstRung(TrainingCallback):
    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, Any]) -> None:
        trainer.stop_training = epoch == 1


def test_run_that_a_callback_ends_with_a_rung(tmp_path: Path) -> None:
    """Started again it is complete; one that was killed there goes on (see above)."""
    halving = Halving(every_n_epochs=2)
    first = fit(make_population(tmp_path), halving, StopWithFirstRung())
    again = fit(make_population(tmp_path), halving)
    for population in (first, again):
        assert population.trainer.global_step == 2 * BATCHES
        assert population.history.models == NAMES
    assert_identical(again.table(), first.table())


def test_rungs_stay_where_a_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Moves(TrainingCallback):
        def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, Any]) -> None:
            monkeypatch.chdir(tmp_path / "elsewhere")

    for name in ("start", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "start")
    settings = {"logging": LoggingConfig(csv_log_dir="logs", log_file="run.log")}
    fit(make_population(Path("runs"), settings=settings), Halving(every_n_epochs=1), Moves())
    assert sorted(path.name for path in (tmp_path / "start").iterdir()) == ["logs", "run.log", "runs"]
    for name in ("logs", "runs"):
        assert len(list((tmp_path / "start" / name).iterdir())) == 4
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_refused_call_keeps_the_results_of_the_one_before(tmp_path: Path) -> None:
    population = fit(make_population(tmp_path / "own", keep_best="error"), Halving(every_n_epochs=2))
    table, trainer, weights = population.table(), population.trainer, population.model(population.best(), best=True)
    fit(make_population(tmp_path / "other"), Halving(every_n_epochs=1))
    fit(make_population(tmp_path / "renamed", names=NAMES[::-1], settings={"max_epochs": 1}))
    refusals = [("other", Halving(every_n_epochs=2), "at resume"), ("other", None, "with halving")]
    # By the trainer, when it has taken the place of the one before.
    refusals.append(("renamed", None, "at resume"))
    for folder, halving, refused in refusals:
        population._config.checkpoint_dir = str(tmp_path / folder)
        with pytest.raises(TrainerError, match=refused):
            fit(population, halving)
        assert population.table() == table
        assert population.trainer is trainer
        assert_identical(population.model(population.best(), best=True).state_dict(), dict(weights.state_dict()))
    # What fails later has begun anew.
    population._config.checkpoint_dir = str(tmp_path / "new")
    with pytest.raises(RuntimeError, match="failed"):
        fit(population, None, StopAt(batch=BATCHES, error=RuntimeError("failed")))
    assert {row["epochs"] for row in population.table()} == {1}


def test_all_models_stopped(tmp_path: Path) -> None:
    settings = {"on_nan_loss": "freeze"}
    population = make_population(tmp_path, rates=[math.inf] * 5, settings=settings)
    for _ in range(2):
        fit(population, HALVING)
        assert population.history.models == NAMES
        assert {row["state"][:21] for row in population.table()} == {"stopped: its loss was"}


def test_all_models_stopped_with_the_end_of_a_rung(tmp_path: Path) -> None:
    # One batch an epoch: nothing but the validation sees that the models have diverged.
    settings = {"on_nan_loss": "freeze", "early_stopping_patience": 1}
    for _ in range(2):
        population = make_population(tmp_path, rates=[math.inf] * 5, settings=settings)
        population.fit(val_batches()[:1], val_batches(), halving=HALVING)
        assert population.history.models == NAMES
        assert {row["state"][:23] for row in population.table()} == {"stopped: no improvement"}


def test_a_diverged_model_is_the_worst(tmp_path: Path) -> None:
    settings = {"on_nan_loss": "freeze", "validate_every_n_epochs": 2}
    population = make_population(tmp_path, rates=[*RATES[:2], math.inf, *RATES[3:]], settings=settings)
    fit(population, Halving(every_n_epochs=2, keep=0.8))
    assert population.history.dropped == {"medium": 1}
    assert population.history.epochs("medium") == 1


# --- settings


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs: received 0; expected a whole number >= 1"),
        ({"every_n_epochs": 1.5}, "every_n_epochs: received 1.5"),
        ({"keep": 1.0}, "keep: received 1.0; expected more than 0 and less than 1"),
        ({"keep": 0.0}, "keep: received 0.0"),
        ({"keep": math.nan}, "keep: received nan"),
        ({"keep": "half"}, "keep: received 'half'"),
        ({"mode": "best"}, "mode: received 'best'; expected 'min' or 'max'"),
        ({"at_least": 0}, "at_least: received 0"),
    ],
)
def test_bad_halving(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Halving(**{"every_n_epochs": 1, **values})


def test_unknown_metric_is_refused_before_training(tmp_path: Path) -> None:
    population = make_population(tmp_path)
    with pytest.raises(TrainerError, match=r"Halving.metric = 'val_acc' is no metric .* 'val_error', 'val_loss'"):
        fit(population, Halving(every_n_epochs=1, metric="val_acc"))
    with pytest.raises(TrainerError, match=r"Halving.metric = 'val_loss' is no metric .*\['loss'\]"):
        population.fit(val_batches(), halving=HALVING)
    assert population.trainer.global_step == 0


def test_selections_need_a_validation(tmp_path: Path) -> None:
    settings = {"validate_every_n_epochs": 2}
    with pytest.raises(ConfigurationError, match="received 1 with a validation every 2 epochs; expected a multiple"):
        fit(make_population(tmp_path, settings=settings), HALVING)
    fit(make_population(tmp_path, settings=settings), Halving(every_n_epochs=1, metric="loss", at_least=2))


@pytest.mark.parametrize("name", ["save_last", "save_optimizer", "save_scheduler", "save_rng"])
def test_rungs_need_whole_checkpoints(name: str, tmp_path: Path) -> None:
    population = make_population(tmp_path)
    setattr(population.trainer.config.checkpoint, name, False)
    with pytest.raises(ConfigurationError, match=rf"checkpoint: received \['{name}'\] switched off"):
        fit(population, HALVING)


def test_warns_if_nobody_is_ever_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    population = fit(make_population(tmp_path, settings={"max_epochs": 1}), Halving(every_n_epochs=1))
    assert "every_n_epochs = 1 drops no model within max_epochs = 1" in caplog.text
    assert population.history.models == NAMES


@pytest.mark.long
def test_on_jax(tmp_path: Path) -> None:
    """Survivors end as without halving, and a stopped run as one that was not."""
    options: dict[str, Any] = {"backend": "jax", "rates": RATES[:3], "names": NAMES[:3], "kind": "sgd"}
    halving = Halving(every_n_epochs=2, at_least=2)
    whole = ends(fit(make_population(tmp_path / "whole", **options)))
    halved = ends(fit(make_population(tmp_path / "halved", **options), halving))
    assert len(halved["models"]) == 2
    for name, state in halved["models"].items():
        assert_close(state, whole["models"][name], atol=1e-9, rtol=1e-9)
    for batch in (1, 2 * BATCHES - 1, 3 * BATCHES):
        folder = tmp_path / str(batch)
        assert fit(make_population(folder, **options), halving, StopAt(batch=batch)).trainer.preempted
        assert_identical(ends(fit(make_population(folder, **options), halving)), halved)
