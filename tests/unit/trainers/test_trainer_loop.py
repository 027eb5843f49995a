"""What a run does with batches: steps, logs, hooks, stopping, precision; one model or many."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mb_torch import ModelBatch, OptimizerFactory
from tests.training_runs import Recorder, assert_identical, final_state, make_loader, make_objects, run
from trainers.callbacks import TrainingCallback
from trainers.config.errors import ConfigurationError
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig
from trainers.states import TrainerPhase


def _fit(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    train: Any = None,
    val: Any = None,
    scheduler: Any = None,
    trainer_class: type[GenericTrainer] = GenericTrainer,
    loss_fn: Callable[..., Any] | None = nn.functional.mse_loss,
    **settings: Any,
) -> GenericTrainer:
    config = GenericTrainerConfig(**{"checkpoint_dir": str(folder), "max_epochs": 1, **settings})
    trainer = trainer_class(config, loss_fn=loss_fn)
    trainer.fit(model, optimizer, make_loader("list") if train is None else train, val, scheduler)
    return trainer


@pytest.mark.parametrize(
    ("batches", "accumulate", "steps"), [(4, 1, 4), (4, 2, 2), (4, 3, 2), (4, 4, 1), (4, 9, 1), (3, 2, 2)]
)
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("kind", ["single", "batch"])
def test_accumulation(kind: str, clip: float | None, batches: int, accumulate: int, steps: int, tmp_path: Path) -> None:
    """As the loop written out: the loss divided, a step every so many batches and one for the remainder."""
    data = make_loader("list")[:batches]
    starts = [nn.Linear(3, 1) for _ in range(1 if kind == "single" else 3)]
    expected = []
    for start in starts:
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for index, (inputs, targets) in enumerate(data):
            (nn.functional.mse_loss(model(inputs), targets) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(data):
                nn.utils.clip_grad_norm_(model.parameters(), float("inf") if clip is None else clip)
                optimizer.step()
                optimizer.zero_grad()
        expected.append(model.weight.detach())
    if kind == "single":
        trained: nn.Module = copy.deepcopy(starts[0])
    else:
        trained = ModelBatch(starts)
    trainer = _fit(
        tmp_path,
        trained,
        torch.optim.SGD(trained.parameters(), 0.1),
        train=data,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
    )
    assert trainer.global_step == steps
    weights = [trained.weight] if kind == "single" else trained.stacked_params["weight"]
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("training_step", [False, True])
def test_every_model_of_a_batch_trains_as_if_alone(training_step: bool, tmp_path: Path) -> None:
    class Own(GenericTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return super().training_step(batch, batch_idx)

    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(3)]
    factory = OptimizerFactory(torch.optim.SGD, {"momentum": 0.9})
    batch = ModelBatch(models)
    optimizer = factory.create_optimizer(batch, [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    together = _fit(
        tmp_path / "batch",
        batch,
        optimizer,
        val=make_loader("list"),
        max_epochs=2,
        max_grad_norm=0.1,
        trainer_class=Own if training_step else GenericTrainer,
    )
    for index, model in enumerate(models):
        alone = torch.optim.SGD(model.parameters(), 0.1 * (index + 1), momentum=0.9)
        trainer = _fit(tmp_path / str(index), model, alone, val=make_loader("list"), max_epochs=2, max_grad_norm=0.1)
        for name, value in batch.model(index).state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=2e-4, atol=2e-5)
        for key in ("loss", "val_loss"):
            assert together.model_metrics[key][index] == pytest.approx(trainer.logs[key], rel=1e-4)
            assert together.logs[f"{key}_model_{index}"] == together.model_metrics[key][index]
    assert together.logs["val_loss"] == pytest.approx(sum(together.model_metrics["val_loss"]) / 3)


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize(("interval", "accumulate", "steps"), [("epoch", 1, 3), ("step", 1, 12), ("step", 2, 6)])
def test_scheduler_steps(kind: str, interval: str, accumulate: int, steps: int, tmp_path: Path) -> None:
    trainer = run(tmp_path, kind, scheduler_interval=interval, gradient_accumulation_steps=accumulate)
    schedulers = trainer.scheduler if kind == "batch" else [trainer.scheduler]
    assert {scheduler.last_epoch for scheduler in schedulers} == {steps}


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_plateau_scheduler_gets_the_metric(kind: str, tmp_path: Path) -> None:
    model, optimizer, _ = make_objects(kind)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    scheduler: Any
    if kind == "batch":
        scheduler = OptimizerFactory(torch.optim.Adam).create_lr_scheduler(optimizer, plateau, [{"patience": 0}] * 3)
    else:
        scheduler = plateau(optimizer, patience=0)
    settings: dict[str, Any] = {"max_epochs": 2, "validate_every_n_epochs": 2, "val": make_loader("list")}
    trainer = _fit(tmp_path / "a", model, optimizer, scheduler=scheduler, **settings)
    best = [one.best for one in scheduler] if kind == "batch" else [scheduler.best]
    assert best == (trainer.model_metrics["val_loss"] if kind == "batch" else [trainer.logs["val_loss"]])
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau"):
        _fit(tmp_path / "b", model, optimizer, scheduler=scheduler, scheduler_interval="step")
    with pytest.raises(TrainerError, match=r"'no_such'.*\['loss'"):
        _fit(tmp_path / "c", model, optimizer, scheduler=scheduler, monitor="no_such")


class Scripted(GenericTrainer):
    """Validation losses by epoch, of one model or of each."""

    values: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": torch.tensor(self.values[self.current_epoch])}


@pytest.mark.parametrize(
    ("mode", "values", "patience", "epochs"),
    [
        ("min", [3.0, 2.0, 2.0, 2.5, 1.0, 0.5], 2, 4),
        ("max", [3.0, 2.0, 4.0, 3.0, 3.5, 9.0], 2, 5),
        ("min", [3.0, 2.0, 2.0, 2.5, 1.0, 0.5], 3, 6),
        ("min", [1.0, float("nan"), float("nan"), 0.5, 0.4, 0.3], 2, 3),
    ],
)
@pytest.mark.parametrize("stop_after", [None, 1])
def test_early_stopping(
    mode: str, values: list[float], patience: int, epochs: int, stop_after: int | None, tmp_path: Path
) -> None:
    class Stops(Scripted):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            if epoch == stop_after:
                self.request_preemption()

    Stops.values = values
    ended = []
    for trainer_class in (Stops, Scripted) if stop_after is not None else (Scripted,):
        trainer_class.values = values
        model, optimizer, _ = make_objects("single")
        trainer = _fit(
            tmp_path,
            model,
            optimizer,
            val=make_loader("list")[:1],
            max_epochs=6,
            early_stopping_patience=patience,
            early_stopping_mode=mode,
            trainer_class=trainer_class,
        )
        ended.append(trainer.current_epoch + 1)
    assert ended[-1] == epochs
    assert trainer.current_phase is TrainerPhase.TRAINING_COMPLETE


def test_early_stopping_of_each_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights: list[torch.Tensor] = []

    class Watched(Scripted):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            weights.append(self.model.state_dict()["stack.0.weight"].clone())

    Watched.values = [[1.0, 1.0, 1.0], [2.0, 0.9, 0.9], [2.0, 1.0, 0.8], [0.1, 0.1, 0.9], [0.0, 0.0, 0.0]]
    caplog.set_level(logging.INFO)
    model, optimizer, scheduler = make_objects("batch")
    trainer = _fit(
        tmp_path,
        model,
        optimizer,
        val=make_loader("list")[:1],
        scheduler=scheduler,
        max_epochs=5,
        early_stopping_patience=1,
        trainer_class=Watched,
    )
    moved = [[not torch.equal(*pair) for pair in zip(one, next_, strict=True)] for one, next_ in pairwise(weights)]
    assert moved == [[True, True, True], [False, True, True], [False, False, True]]
    assert (trainer.current_epoch, trainer.global_step) == (3, 16)
    assert [f"model {index} stops early" in caplog.text for index in range(3)] == [True, True, True]


@pytest.mark.parametrize("name", ["early_stopping_metric", "monitor"])
def test_unknown_metric_lists_the_known_ones(name: str, tmp_path: Path) -> None:
    settings = {"early_stopping_metric": "val/loss", "early_stopping_patience": 2, "monitor": None, name: "val/loss"}
    if name == "monitor":
        settings["early_stopping_patience"] = None
    model, optimizer, _ = make_objects("single")
    with pytest.raises(TrainerError, match=r"'val/loss' is no metric.*\['loss', 'val_loss'\]"):
        _fit(tmp_path, model, optimizer, val=make_loader("list"), **settings)


class Steps(GenericTrainer):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        return {"loss": loss, "accuracy": torch.tensor([batch_idx]), "lr": 0.5, "text": "x", "many": torch.ones(3)}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": 7, "val_other": 8.0, "new": batch_idx}


def test_logs(tmp_path: Path) -> None:
    seen = []

    class Hooked(Steps):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            seen.append(dict(logs))

    model, optimizer, _ = make_objects("single")
    _fit(tmp_path, model, optimizer, val=make_loader("list"), trainer_class=Hooked, loss_fn=None)
    (logs,) = seen
    assert logs.pop("loss") > 0
    assert logs == {"accuracy": 1.5, "lr": 0.5, "val_loss": 7.0, "val_other": 8.0, "new": 1.5, "val_new": 1.5}


def test_hooks_in_order(tmp_path: Path) -> None:
    calls: list[Any] = []

    def noting(who: str, name: str) -> Callable[..., None]:
        def hook(self: Any, *arguments: Any) -> None:
            shown = [argument for argument in arguments if isinstance(argument, int)]
            calls.append((who, name, *shown))

        return hook

    names = "training_start epoch_start batch_start batch_end epoch_end training_end".split()
    own = type("Own", (GenericTrainer,), {f"on_{name}": noting("trainer", name) for name in names})
    callbacks = [
        type("Callback", (TrainingCallback,), {f"on_{name}": noting(who, name) for name in names})() for who in "ab"
    ]
    trainer = own(GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=2), loss_fn=nn.functional.mse_loss)
    for callback in callbacks:
        trainer.add_callback(callback)
    model, optimizer, _ = make_objects("single")
    trainer.fit(model, optimizer, make_loader("list")[:2], make_loader("list")[:1])
    batches = [("batch_start", 0), ("batch_end", 0), ("batch_start", 1), ("batch_end", 1)]
    epochs = [[("epoch_start", epoch), *batches, ("epoch_end", epoch)] for epoch in range(2)]
    order = [("training_start",), *epochs[0], *epochs[1], ("training_end",)]
    assert calls == [(who, *entry) for entry in order for who in ("trainer", "a", "b")]
    with pytest.raises(TrainerError, match="expected a TrainingCallback"):
        trainer.add_callback(object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["on_training_start", "on_epoch_start", "on_batch_start", "on_batch_end", "on_epoch_end", "on_training_end"]
)
@pytest.mark.parametrize("where", ["trainer", "callback"])
def test_exceptions_in_hooks_propagate(name: str, where: str, tmp_path: Path) -> None:
    def fails(*arguments: Any) -> None:
        raise ZeroDivisionError

    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1)
    trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    callback = TrainingCallback()
    trainer.add_callback(callback)
    setattr(trainer if where == "trainer" else callback, name, fails)
    model, optimizer, _ = make_objects("single")
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, optimizer, make_loader("list"))
    assert trainer.current_phase is TrainerPhase.ERROR_FATAL


@pytest.mark.parametrize(
    ("hook", "steps", "epochs_ended"),
    [("on_batch_end", 2, 0), ("on_batch_end", 4, 0), ("on_epoch_end", 4, 1), ("on_epoch_start", 0, 0)],
)
def test_stop_training(hook: str, steps: int, epochs_ended: int, tmp_path: Path) -> None:
    ended = []

    class Stops(Recorder):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            super().on_epoch_end(epoch, logs)
            if hook == "on_epoch_end":
                self.stop_training = True

        def on_training_end(self, logs: dict[str, Any]) -> None:
            ended.append(self.global_step)

    def stops(self: Any, *arguments: Any) -> None:
        if hook == "on_epoch_start" or arguments[0] + 1 == steps:
            self.stop_training = True

    if hook != "on_epoch_end":
        setattr(Stops, hook, stops)
    trainer = run(tmp_path, trainer_class=Stops)
    assert (ended, len(trainer.notes["logs"])) == ([steps], epochs_ended)
    assert run(tmp_path).global_step == steps


@pytest.mark.parametrize(("steps", "validations"), [(6, 1), (8, 2), (100, 3)])
def test_max_steps(steps: int, validations: int, tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=steps)
    assert (trainer.global_step, len(trainer.notes["logs"])) == (min(steps, 12), validations)


class Longer:
    """Has more batches than its length says."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        return iter(make_loader("list"))


@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_max_steps_holds_whatever_a_loader_says_of_its_length(
    steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer, _ = make_objects("single")
    trainer = _fit(tmp_path, model, optimizer, train=Longer(), max_steps=steps, max_epochs=2)
    assert trainer.global_step == steps
    assert ("more batches than the 3" in caplog.text) == (steps == 3)


def test_an_epoch_before_which_a_run_was_stopped_is_still_to_come(tmp_path: Path) -> None:
    class StopsAtOnce(Recorder):
        def on_training_start(self) -> None:
            self.stop_training = True

    assert run(tmp_path / "run", trainer_class=StopsAtOnce, max_epochs=1).global_step == 0
    notes: dict[str, Any] = {}
    longer, whole = run(tmp_path / "run", notes=notes), run(tmp_path / "whole")
    assert_identical(final_state(longer), final_state(whole))


def test_checkpoints_stay_where_a_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("start", "elsewhere"):
        (tmp_path / name).mkdir()

    class Moves(Recorder):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any]) -> None:
            monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.chdir(tmp_path / "start")
    run(Path("runs"), trainer_class=Moves)
    assert (tmp_path / "start" / "runs" / "epoch_002_step_000012.ckpt").is_file()
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_loss_that_is_not_finite(policy: str, value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Spoiled(GenericTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            logs = super().training_step(batch, batch_idx)
            return {"loss": logs["loss"] * value if batch_idx == 1 else logs["loss"]}

    model, optimizer, _ = make_objects("single")
    if policy == "stop":
        with pytest.raises(TrainerError, match=r"batch 1.*(nan|inf)"):
            _fit(tmp_path, model, optimizer, trainer_class=Spoiled)
        assert not (tmp_path / "latest.ckpt").exists()
        return
    trainer = _fit(tmp_path, model, optimizer, trainer_class=Spoiled, on_nan_loss="skip")
    assert trainer.global_step == 3
    assert f"epoch 0: batch 1 is skipped: its loss is {value}" in caplog.text
    assert "has trained nothing" not in caplog.text
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert 0 < trainer.logs["loss"] < float("inf")


@pytest.mark.parametrize("policy", ["stop", "freeze"])
def test_one_model_of_a_batch_diverges(policy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = [nn.Linear(3, 1) for _ in range(3)]
    healthy = copy.deepcopy(models[0])
    with torch.no_grad():
        models[1].weight.fill_(float("nan"))
    batch = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, [{"lr": 0.1}] * 3)
    if policy == "stop":
        with pytest.raises(TrainerError, match=r"models.*\{1: nan\}"):
            _fit(tmp_path, batch, optimizer)
        return
    trainer = _fit(tmp_path, batch, optimizer, on_nan_loss="freeze", max_epochs=2)
    assert trainer.global_step == 8
    assert "model 1 is frozen" in caplog.text
    assert "model 0 is frozen" not in caplog.text
    assert trainer.logs["loss"] == pytest.approx(sum(trainer.model_metrics["loss"][::2]) / 2)
    _fit(tmp_path / "alone", healthy, torch.optim.SGD(healthy.parameters(), 0.1), max_epochs=2)
    torch.testing.assert_close(batch.model(0).weight, healthy.weight, rtol=2e-4, atol=2e-5)


def test_run_ends_when_all_models_diverged(tmp_path: Path) -> None:
    batch = ModelBatch([nn.Linear(3, 1) for _ in range(2)])
    with torch.no_grad():
        batch.stacked_params["weight"].fill_(float("nan"))
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, [{"lr": 0.1}] * 2)
    assert _fit(tmp_path, batch, optimizer, on_nan_loss="freeze", max_epochs=9).global_step == 1


@pytest.mark.parametrize("settings", [{"on_nan_loss": "freeze"}, {"early_stopping_patience": 1}])
def test_freezing_needs_an_optimizer_with_a_group_per_model(settings: dict[str, Any], tmp_path: Path) -> None:
    batch = ModelBatch([nn.Linear(3, 1) for _ in range(2)])
    with pytest.raises(ConfigurationError, match="made by OptimizerFactory"):
        _fit(tmp_path, batch, torch.optim.SGD(batch.parameters(), 0.1), **settings)


@pytest.mark.parametrize(("kind", "policy"), [("single", "freeze"), ("batch", "skip")])
def test_policies_that_do_not_fit(kind: str, policy: str, tmp_path: Path) -> None:
    model, optimizer, _ = make_objects(kind)
    with pytest.raises(ConfigurationError, match="on_nan_loss"):
        _fit(tmp_path, model, optimizer, on_nan_loss=policy)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["single", "batch"])
def test_mixed_precision(kind: str, precision: str, tmp_path: Path) -> None:
    seen = []

    def loss_fn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(outputs.dtype)
        return nn.functional.mse_loss(outputs.float(), targets)

    model: nn.Module = nn.Linear(3, 1) if kind == "single" else ModelBatch([nn.Linear(3, 1) for _ in range(2)])
    trainer = _fit(
        tmp_path,
        model,
        torch.optim.SGD(model.parameters(), 0.1)
        if kind == "single"
        else OptimizerFactory(torch.optim.SGD).create_optimizer(model, [{"lr": 0.1}] * 2),
        loss_fn=loss_fn,
        val=make_loader("list"),
        mixed_precision=precision,
    )
    assert set(seen) == {torch.float16 if precision == "16-mixed" else torch.bfloat16}
    assert trainer.global_step == 4
    content = torch.load(tmp_path / "latest.ckpt")
    assert (content["scaler_state_dict"] is not None) == (precision == "16-mixed")


def test_compile_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    model, optimizer, _ = make_objects("single")
    monkeypatch.setattr(model, "compile", lambda: compiled.append(model))
    _fit(tmp_path, model, optimizer, compile_model=True)
    assert compiled == [model]


def test_validation_leaves_every_mode_as_it_was(tmp_path: Path) -> None:
    modes = []

    class Watched(GenericTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            modes.append([module.training for module in self.model.modules()])
            assert not torch.is_grad_enabled()
            return super().validation_step(batch, batch_idx)

    model, optimizer, _ = make_objects("single")
    model[1].eval()
    _fit(tmp_path, model, optimizer, val=make_loader("list")[:1], trainer_class=Watched)
    assert modes == [[False] * 5]
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (1.0, "received a float"),
        ({"lozz": 1}, r"keys \['lozz'\]"),
        ({"loss": 1.0}, "received a float"),
        ({"loss": torch.ones(2)}, r"a tensor \[2\]"),
        ({"loss": torch.ones(())}, "without a gradient"),
    ],
)
def test_bad_training_step(result: Any, message: str, tmp_path: Path) -> None:
    class Bad(GenericTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return result

    model, optimizer, _ = make_objects("single")
    with pytest.raises(TrainerError, match=message):
        _fit(tmp_path, model, optimizer, trainer_class=Bad)


class Nothing:
    """Batches without a length, of which there are none."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


EMPTY = [
    (lambda: [], None),
    (lambda: DataLoader(TensorDataset(torch.ones(3, 3)), 4, drop_last=True), "drop_last=True leaves out"),
]


@pytest.mark.parametrize("which", ["train", "val"])
@pytest.mark.parametrize(("make", "fix"), EMPTY)
def test_loader_of_length_zero_is_refused_at_the_start(which: str, make: Any, fix: str | None, tmp_path: Path) -> None:
    trained = []

    class Noting(GenericTrainer):
        def on_batch_start(self, batch_idx: int) -> None:
            trained.append(batch_idx)

    model, optimizer, _ = make_objects("single")
    with pytest.raises(TrainerError, match=f"{which}_loader: received a loader without batches.*{fix or ''}"):
        _fit(tmp_path / "run", model, optimizer, trainer_class=Noting, validate_every_n_epochs=5, **{which: make()})
    assert trained == []
    assert not (tmp_path / "run").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    model, optimizer, _ = make_objects("single")
    with pytest.raises(NotImplementedError, match="training_step"):
        _fit(tmp_path, model, optimizer, loss_fn=None)
    half = type("Half", (GenericTrainer,), {"training_step": lambda self, batch, batch_idx: {"loss": 1}})
    with pytest.raises(NotImplementedError, match="validation_step"):
        _fit(tmp_path, model, optimizer, loss_fn=None, val=make_loader("list"), trainer_class=half)
    with pytest.raises(TrainerError, match="train_loader: received no batch in an epoch"):
        _fit(tmp_path, model, optimizer, train=Nothing())
    with pytest.raises(TrainerError, match="val_loader: received no batch in a validation"):
        _fit(tmp_path / "val", model, optimizer, val=Nothing())
    with pytest.raises(TrainerError, match=r"pair \(inputs, targets\)"):
        _fit(tmp_path, model, optimizer, train=[torch.ones(2, 3)])
    with pytest.raises(TrainerError, match="without step"):
        _fit(tmp_path, model, optimizer, scheduler=object())
    with pytest.raises(ConfigurationError, match="from_experiment_config"):
        GenericTrainer({"max_epochs": 1})  # type: ignore[arg-type]


class InfiniteGradient(GenericTrainer):
    """Its second batch has a finite loss, and gradients that are not."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logs = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            logs["loss"] = logs["loss"] + (self.model[0].weight * 0).sum().sqrt()
        return logs


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_weights_that_are_not_finite(policy: str, tmp_path: Path) -> None:
    model, optimizer, _ = make_objects("single")
    with pytest.raises(TrainerError, match=r"batch 2: .*The weights are not finite either \(0\.weight, "):
        _fit(tmp_path, model, optimizer, trainer_class=InfiniteGradient, on_nan_loss=policy)


def test_an_epoch_of_skipped_batches_has_no_metric(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, _ = make_objects("single")
    batches = [(torch.full((4, 3), math.nan), torch.ones(4, 1))] * 2
    with pytest.raises(TrainerError, match="received 2 batches, all of them skipped"):
        _fit(tmp_path / "monitored", model, optimizer, train=batches, on_nan_loss="skip", monitor="loss")
    # Without need of a metric there is nothing wrong: the next epoch may have other batches.
    caplog.clear()
    assert _fit(tmp_path / "plain", model, optimizer, train=batches, on_nan_loss="skip").global_step == 0
    assert "epoch 0 has trained nothing: all of its 2 batches were skipped" in caplog.text


def test_values_that_are_no_metrics_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Verbose(GenericTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {**super().training_step(batch, batch_idx), "note": "text", "none": None, "parts": torch.ones(2)}

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {**super().validation_step(batch, batch_idx), "nested": {"a": 1}}

    model, optimizer, _ = make_objects("single")
    _fit(tmp_path, model, optimizer, val=make_loader("list"), trainer_class=Verbose, max_epochs=2)
    left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [text.partition(" is")[0] for text in left_out] == ["training_step: 'parts'", "validation_step: 'nested'"]
    assert "a tensor [2]" in left_out[0]


def test_subclass_with_its_own_model(tmp_path: Path) -> None:
    class Own(GenericTrainer):
        def __init__(self, config: GenericTrainerConfig, **keywords: Any) -> None:
            super().__init__(config, **keywords)
            self.model, self.optimizer, _ = make_objects("single")

    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1)
    trainer = Own(config, loss_fn=nn.functional.mse_loss)
    trainer.fit(trainer.model, trainer.optimizer, make_loader("list"))
    assert trainer.global_step == 4
