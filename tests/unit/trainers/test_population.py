"""A population without halving: metrics by name, the best of each model, early stopping, resume."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mb_torch import ModelBatch, OptimizerFactory
from tests.compare import assert_close, assert_different, assert_equal
from tests.populations import BATCHES, NAMES, RATES, StopAt, ends, fit, make_models, make_population, rows, val_batches
from tests.training_runs import assert_identical
from trainers.callbacks import TrainingCallback
from trainers.config.errors import ConfigurationError
from trainers.errors import TrainerError
from trainers.per_model import PerModel
from trainers.population import BestModels, History, Population
from trainers.settings import GenericTrainerConfig


class States(TrainingCallback):
    """Every model's weights, optimizer state and metrics after every epoch."""

    def __init__(self) -> None:
        self.weights: list[list[dict[str, torch.Tensor]]] = []
        self.optimizers: list[list[Any]] = []

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, Any]) -> None:
        count = trainer.model.num_models
        self.weights.append(copy.deepcopy([dict(state) for state in trainer.model.get_model_states()]))
        self.optimizers.append(copy.deepcopy([trainer.optimizer.model_state_dict(place) for place in range(count)]))


def _validated(weights: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Mean over the validation batches of loss and largest error, by plain PyTorch."""
    (model,) = make_models(1)
    model.load_state_dict(weights)
    model.eval()
    losses, errors = [], []
    with torch.no_grad():
        for inputs, targets in val_batches():
            difference = model(inputs) - targets
            losses.append(difference.square().mean())
            errors.append(difference.abs().max())
    return float(torch.stack(losses).mean()), float(torch.stack(errors).mean())


def test_metrics_of_every_model_and_epoch(tmp_path: Path) -> None:
    states = States()
    population = fit(make_population(tmp_path), None, states)
    for place, name in enumerate(NAMES):
        history = population.history.of_model(name)
        assert set(history) == {"loss", "val_loss", "error", "val_error"}
        for epoch in range(4):
            expected = _validated(states.weights[epoch][place])
            at = population.history.at(name, epoch)
            assert_close([at["val_loss"], at["val_error"]], list(expected), atol=1e-12, rtol=1e-12)
            assert at["error"] == at["val_error"]
            assert at["loss"] != at["val_loss"]
        assert population.history.last(name) == population.history.at(name, 3)
        assert population.history.at(name, 4) == {}
    values = {name: population.history.of_model(name)["val_loss"][3] for name in NAMES}
    assert len(set(values.values())) == 5
    assert population.best() == min(NAMES, key=values.__getitem__)
    assert population.best(mode="max") == max(NAMES, key=values.__getitem__)
    assert population.table() == [
        {"name": name, "state": "trained", "epochs": 4, **population.history.last(name)} for name in NAMES
    ]


def test_metrics_of_the_trainer_itself(tmp_path: Path) -> None:
    trainer = fit(make_population(tmp_path, settings={"max_epochs": 1})).trainer
    values = trainer.model_metrics["val_error"]
    assert [trainer.logs[f"val_error_model_{model}"] for model in range(5)] == values
    assert trainer.logs["val_error"] == pytest.approx(sum(values) / 5, rel=1e-12)


def test_weights_by_name(tmp_path: Path) -> None:
    states = States()
    population = fit(make_population(tmp_path), None, states)
    for place, name in enumerate(NAMES):
        module = population.model(name)
        assert isinstance(module, nn.Sequential)
        assert_equal(dict(module.state_dict()), states.weights[-1][place])
        with torch.no_grad():
            module[0].weight.zero_()
        assert_equal(dict(population.model(name).state_dict()), states.weights[-1][place])


@pytest.mark.parametrize(("metric", "mode"), [("val_loss", "min"), ("error", "max"), ("loss", "min")])
def test_best_weights(metric: str, mode: str, tmp_path: Path) -> None:
    states = States()
    # The largest rates make models that get worse again.
    rates = [0.001, 0.3, 0.5, 0.8, 1.0]
    population = fit(make_population(tmp_path, rates=rates, keep_best=metric, mode=mode), None, states)
    assert population.best_models is not None
    epochs = set()
    for place, name in enumerate(NAMES):
        values = population.history.of_model(name)[metric]
        epoch = (min if mode == "min" else max)(values, key=values.__getitem__)
        best = population.best_models.bests[name]
        assert (best.value, best.epoch, best.step) == (values[epoch], epoch, (epoch + 1) * BATCHES)
        assert_equal(dict(population.model(name, best=True).state_dict()), states.weights[epoch][place])
        epochs.add(epoch)
    assert len(epochs) > 1


def test_first_of_equal_bests(tmp_path: Path) -> None:
    population = fit(make_population(tmp_path, rates=[0.0] * 5, keep_best="loss", settings={"max_epochs": 1}))
    best = population.best_models
    assert best is not None
    value = best.bests["tiny"].value
    population.history._values["tiny"]["loss"][1] = value
    best.on_epoch_end(population.trainer, 1, {})
    assert best.bests["tiny"].epoch == 0
    population.history._values["tiny"]["loss"][2] = math.nan
    best.on_epoch_end(population.trainer, 2, {})
    assert best.bests["tiny"].epoch == 0


def test_best_weights_of_validated_epochs_only(tmp_path: Path) -> None:
    population = fit(make_population(tmp_path, keep_best="error", settings={"validate_every_n_epochs": 3}))
    assert population.best_models is not None
    assert {best.epoch for best in population.best_models.bests.values()} == {2}
    row = population.table()[0]
    assert row["val_loss"] == population.history.at("tiny", 2)["val_loss"]
    assert row["loss"] == population.history.at("tiny", 3)["loss"]


# --- models that are stopped


def test_a_stopped_model_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = States()
    per_model = PerModel(early_stopping_patience=[2, None, 1, None, None])
    population = make_population(tmp_path, per_model=per_model, settings={"max_epochs": 6}, keep_best="loss")
    with caplog.at_level(logging.INFO, "trainers"):
        fit(population, None, states)
    stops = {"tiny": 2, "medium": 1}
    for name, epoch in stops.items():
        place = NAMES.index(name)
        for later in range(epoch + 1, 6):
            assert_equal(states.weights[later][place], states.weights[epoch][place])
            # Its schedule goes on, to no effect.
            assert_equal(states.optimizers[later][place]["state"], states.optimizers[epoch][place]["state"])
        row = population.table()[place]
        assert row["epochs"] == epoch + 1
        assert row["state"].startswith("stopped: no improvement on ")
        assert row["val_loss"] == population.history.at(name, epoch)["val_loss"]
        assert set(population.history.of_model(name)["val_loss"]) == set(range(epoch + 1))
        assert f"{name} was stopped in epoch {epoch}: no improvement" in caplog.text
        # Shuffling and dropout go on, so its training loss still changes; its weights are not better for it.
        assert population.best_models is not None
        assert population.best_models.bests[name].epoch <= epoch
    for place in (1, 3, 4):
        assert_different(states.weights[5][place], states.weights[4][place])
        assert population.table()[place]["epochs"] == 6


def test_a_diverged_model_is_frozen(tmp_path: Path) -> None:
    states = States()
    settings = {"on_nan_loss": "freeze"}
    rates = [*RATES[:2], math.inf, *RATES[3:]]
    population = fit(make_population(tmp_path / "one", rates=rates, settings=settings), None, states)
    whole = fit(make_population(tmp_path / "none"))
    row = population.table()[2]
    assert (row["name"], row["epochs"], row["state"]) == ("medium", 1, "stopped: its loss was nan after step 1")
    assert math.isnan(row["loss"])
    assert_equal(states.weights[3][2], states.weights[0][2])
    for name in (*NAMES[:2], *NAMES[3:]):
        assert_equal(dict(population.model(name).state_dict()), dict(whole.model(name).state_dict()))
        assert population.history.of_model(name) == whole.history.of_model(name)
    assert population.best() != "medium"


def test_nobody_is_the_best(tmp_path: Path) -> None:
    settings = {"on_nan_loss": "freeze"}
    population = fit(make_population(tmp_path, rates=[math.inf] * 5, settings=settings, keep_best="val_loss"))
    with pytest.raises(TrainerError, match="'val_loss' has no finite value.*table"):
        population.best()
    with pytest.raises(TrainerError, match="model 'tiny' has no best state: received no finite val_loss so far"):
        population.model("tiny", best=True)


# --- resuming


PATIENCE = PerModel(early_stopping_patience=[1, None, 2, None, 3])
SETTINGS = {"early_stopping_metric": "loss", "early_stopping_mode": "max"}


def _run(folder: Path, *callbacks: TrainingCallback) -> Population:
    torch.manual_seed(99)
    return fit(make_population(folder, keep_best="error", per_model=PATIENCE, settings=SETTINGS), None, *callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run ends with that was never stopped."""
    ended = ends(_run(tmp_path_factory.mktemp("whole")))
    assert ended["stopped"]
    return ended


@pytest.mark.parametrize("batch", [0, 2, 4, *(pytest.param(b, marks=pytest.mark.long) for b in (3, 5, 6, 8, 10))])
def test_stopped_after_a_batch(batch: int, whole: dict[str, Any], tmp_path: Path) -> None:
    assert _run(tmp_path, StopAt(batch=batch)).trainer.preempted
    assert_identical(ends(_run(tmp_path)), whole)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_stopped_at_the_end_of_an_epoch(epoch: int, whole: dict[str, Any], tmp_path: Path) -> None:
    assert _run(tmp_path, StopAt(epoch=epoch)).trainer.preempted
    assert_identical(ends(_run(tmp_path)), whole)


def test_complete_run_returns_at_once(whole: dict[str, Any], tmp_path: Path) -> None:
    _run(tmp_path)
    states = States()
    again = _run(tmp_path, states)
    assert not states.weights
    assert_identical(again.table(), whole["table"])
    assert_identical({name: dict(again.model(name).state_dict()) for name in NAMES}, whole["models"])
    assert_identical(again.history.state_dict(), whole["history"])
    assert again.best_models is not None
    assert_identical(again.best_models.state_dict(), whole["best"])


def test_begins_anew_without_auto_resume(whole: dict[str, Any], tmp_path: Path) -> None:
    make = {"keep_best": "error", "per_model": PATIENCE, "settings": {**SETTINGS, "auto_resume": False}}
    for _ in range(2):
        assert_identical(ends(fit(make_population(tmp_path, **make))), whole)
    population = make_population(tmp_path, **make)
    fit(population)
    first = population.history.state_dict()
    # The weights go on from where they are; the history is that of the second run only.
    fit(population)
    assert population.history.state_dict() != first
    assert all(population.history.epochs(name) <= 4 for name in NAMES)


def test_models_whose_patience_was_raised_have_metrics_of_every_epoch_from_then_on(tmp_path: Path) -> None:
    # With a rate of 0 only the statistics of the normalisation change, here for the worse.
    make: dict[str, Any] = {"rates": [0.1, 0.0], "names": NAMES[:2]}
    settings = {"early_stopping_metric": "val_loss", "max_epochs": 3}
    fit(make_population(tmp_path, **make, settings={**settings, "early_stopping_patience": 1}))
    settings = {**settings, "early_stopping_patience": 9, "max_epochs": 5}
    history = fit(make_population(tmp_path, **make, settings=settings)).history
    assert {name: list(history.of_model(name)["val_loss"]) for name in NAMES[:2]} == {
        "tiny": [0, 1, 2, 3, 4],
        "small": [0, 1, 3, 4],
    }


def test_other_names(tmp_path: Path) -> None:
    fit(make_population(tmp_path), None, StopAt(batch=1))
    for names in ([*NAMES[:4], "other"], NAMES[::-1]):
        population = make_population(tmp_path, names=names)
        before = [dict(population.model(name).state_dict()) for name in names]
        with pytest.raises(TrainerError, match="the models of the population at resume: received a checkpoint of "):
            fit(population)
        assert_identical([dict(population.model(name).state_dict()) for name in names], before)


# --- what is given


def test_optimizer_without_a_scheduler(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def make_optimizer(batch: ModelBatch, models: list[int]) -> torch.optim.Optimizer:
        asked.append(models)
        return OptimizerFactory(torch.optim.SGD).create_optimizer(batch, [{"lr": 0.1}] * len(models))

    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1)
    population = Population(
        ModelBatch(make_models(2, dropout=0.0)), make_optimizer, loss_fn=nn.functional.mse_loss, config=config
    )
    assert population.names == ["model_0", "model_1"]
    assert population.table() == [{"name": name, "state": "trained", "epochs": 0} for name in population.names]
    assert population.model("model_1").state_dict()["0.weight"].shape == (4, 3)
    population.fit([rows(4, seed=1)])
    assert asked == [[0, 1]]
    assert population.best("loss") in population.names


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"names": ["one"] * 5}, "names: received 5 with 1 different; expected 5, one per model"),
        ({"names": NAMES[:4]}, "names: received 4 with 4 different; expected 5"),
        ({"keep_best": "loss", "mode": "smallest"}, "mode: received 'smallest'; expected 'min' or 'max'"),
        ({"per_model": PerModel(max_grad_norm=[1.0] * 6)}, "PerModel.max_grad_norm: received 6 values; expected 5"),
        ({"per_model": PerModel(loss_args={"w": torch.ones(4)})}, r"PerModel.loss_args\['w'\]: received 4 values"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make_population(tmp_path, **options)


def test_unknown_metric_is_refused_before_training(tmp_path: Path) -> None:
    population = make_population(tmp_path, keep_best="accuracy")
    with pytest.raises(TrainerError, match=r"keep_best = 'accuracy' is no metric of this run: expected one of \['err"):
        fit(population)
    with pytest.raises(TrainerError, match=r"keep_best = 'val_loss' is no metric of this run: expected one of \['lo"):
        make_population(tmp_path, keep_best="val_loss").fit(val_batches())
    assert population.trainer.global_step == 0


def test_wrong_questions(tmp_path: Path) -> None:
    population = fit(make_population(tmp_path, settings={"max_epochs": 1}))
    with pytest.raises(ConfigurationError, match="mode: received 'biggest'"):
        population.best(mode="biggest")
    with pytest.raises(TrainerError, match="metric 'accuracy' has no finite value"):
        population.best("accuracy")
    with pytest.raises(TrainerError, match="model 'giant': received no name of this population; expected one of"):
        population.model("giant")
    with pytest.raises(TrainerError, match="best=True: received a population without keep_best"):
        population.model("tiny", best=True)


def test_states_of_another_history() -> None:
    history, other = History(["a", "b"]), History(["a"])
    with pytest.raises(TrainerError, match="at resume"):
        history.load_state_dict(other.state_dict())
    assert BestModels("loss", "max", history).state_dict() == {"by_model": {}}


@pytest.mark.long
def test_on_jax(tmp_path: Path) -> None:
    states = States()
    options: dict[str, Any] = {"backend": "jax", "rates": RATES[:3], "names": NAMES[:3], "keep_best": "val_loss"}
    options["per_model"] = PerModel(max_grad_norm=[0.1, None, 0.2], early_stopping_patience=[None, 1, None])
    options["settings"] = SETTINGS
    population = fit(make_population(tmp_path / "whole", **options), None, states)
    assert population.best_models is not None
    for place, name in enumerate(NAMES[:3]):
        best = population.best_models.bests[name]
        assert_equal(dict(population.model(name, best=True).state_dict()), states.weights[best.epoch][place])
        last = population.history.epochs(name) - 1
        assert_close(population.history.at(name, last)["val_loss"], _validated(states.weights[last][place])[0])
    assert list(population.trainer.stopped_models) == [1]
    assert_equal(states.weights[3][1], states.weights[population.history.epochs("small") - 1][1])
    fit(make_population(tmp_path / "stopped", **options), None, StopAt(batch=2 * BATCHES + 1))
    assert_identical(ends(fit(make_population(tmp_path / "stopped", **options))), ends(population))
