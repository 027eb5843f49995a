"""What differs between the models of a batch acts on each as it would have alone; metrics of each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mb_torch import InvalidInput, ModelBatch, OptimizerFactory
from tests.compare import assert_close, assert_different, assert_equal
from tests.populations import largest_error, make_models, rows, val_batches
from trainers.config.errors import ConfigurationError, ValidationError
from trainers.generic import GenericTrainer
from trainers.per_model import PerModel
from trainers.settings import GenericTrainerConfig

RATES = [0.05, 0.1, 0.2]
BOUNDS = {"atol": 1e-9, "rtol": 1e-9}


def _batches() -> list[Any]:
    inputs, targets = rows(12, seed=1)
    return list(zip(inputs.split(4), (5 * targets).split(4), strict=True))


def _config(folder: Path, **settings: Any) -> GenericTrainerConfig:
    return GenericTrainerConfig(**{"checkpoint_dir": str(folder), "max_epochs": 4, "max_grad_norm": None, **settings})


def _together(
    folder: Path,
    per_model: PerModel | None,
    *,
    loss_fn: Any = nn.functional.mse_loss,
    backend: str = "torch",
    metrics: Any = None,
    **settings: Any,
) -> GenericTrainer:
    batch = ModelBatch(make_models(3, dropout=0.0), backend=backend)
    factory = OptimizerFactory(torch.optim.SGD)
    optimizer = factory.create_optimizer(batch, [{"lr": rate, "momentum": 0.9} for rate in RATES])
    trainer = GenericTrainer(_config(folder, **settings), loss_fn=loss_fn, metrics=metrics, per_model=per_model)
    trainer.fit(batch, optimizer, _batches(), val_batches())
    return trainer


def _alone(
    folder: Path, model: int, *, loss_fn: Any = nn.functional.mse_loss, metrics: Any = None, **settings: Any
) -> GenericTrainer:
    module = make_models(3, dropout=0.0)[model]
    optimizer = torch.optim.SGD(module.parameters(), lr=RATES[model], momentum=0.9)
    trainer = GenericTrainer(_config(folder / str(model), **settings), loss_fn=loss_fn, metrics=metrics)
    trainer.fit(module, optimizer, _batches(), val_batches())
    return trainer


def _assert_as_alone(together: GenericTrainer, alone: list[GenericTrainer]) -> None:
    states = together.model.get_model_states()
    for place, trainer in enumerate(alone):
        assert_close(dict(states[place]), dict(trainer.model.state_dict()), **BOUNDS)
        own = together.optimizer.model_state_dict(place)["state"]
        assert_close(own, trainer.optimizer.state_dict()["state"], **BOUNDS)


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_each_is_clipped_by_its_own_norm(backend: str, tmp_path: Path) -> None:
    # 0.1 is another number in float32, and every gradient of these is larger.
    norms = [0.1, None, 0.3]
    together = _together(tmp_path / "together", PerModel(max_grad_norm=norms), backend=backend)
    alone = [_alone(tmp_path, model, max_grad_norm=norm) for model, norm in enumerate(norms)]
    _assert_as_alone(together, alone)
    unclipped = _together(tmp_path / "unclipped", None, backend=backend).model.get_model_states()
    states = together.model.get_model_states()
    assert_close(dict(states[1]), dict(unclipped[1]), **BOUNDS)
    assert_different(dict(states[0]), dict(unclipped[0]))
    assert_different(dict(states[2]), dict(unclipped[2]))


def test_norms_take_the_place_of_the_common_one(tmp_path: Path) -> None:
    for per_model, common in ((PerModel(max_grad_norm=[None] * 3), 0.1), (PerModel(max_grad_norm=(0.1,) * 3), None)):
        name = str(common)
        together = _together(tmp_path / name, per_model, max_grad_norm=common)
        own = (per_model.max_grad_norm or [None])[0]
        _assert_as_alone(together, [_alone(tmp_path / name, model, max_grad_norm=own) for model in range(3)])


def test_each_has_its_own_patience(tmp_path: Path) -> None:
    patiences = [1, None, 3]
    settings = {"max_epochs": 8, "early_stopping_metric": "val_error", "early_stopping_mode": "max"}
    metrics = {"error": largest_error}
    per_model = PerModel(early_stopping_patience=patiences)
    together = _together(tmp_path / "together", per_model, metrics=metrics, **settings)
    alone = [
        _alone(tmp_path, model, metrics=metrics, early_stopping_patience=patience, **settings)
        for model, patience in enumerate(patiences)
    ]
    _assert_as_alone(together, alone)
    assert sorted(together.stopped_models) == [0, 2]
    steps = [trainer.global_step for trainer in alone]
    assert steps[0] < steps[2] < steps[1] == together.global_step
    for model in (0, 2):
        assert together.stopped_models[model].split("in")[1] == alone[model].stopped_models[0].split("in")[1]
    # One patience for all is the config's.
    common = _together(tmp_path / "common", None, metrics=metrics, early_stopping_patience=1, **settings)
    assert common.stopped_models.keys() == {0, 1, 2}


def _weighted(outputs: Tensor, targets: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    return (weight * (outputs - targets + shift[0]) ** 2).mean()


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.long)])
def test_loss_args_in_training_and_validation(backend: str, tmp_path: Path) -> None:
    weights, shifts = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([[0.0], [1.0], [-1.0]])
    arguments = {"weight": weights.double(), "shift": shifts.double()}
    together = _together(tmp_path / "together", PerModel(loss_args=arguments), loss_fn=_weighted, backend=backend)

    def loss_of(model: int) -> Any:
        return lambda outputs, targets: _weighted(
            outputs, targets, arguments["weight"][model], arguments["shift"][model]
        )

    alone = [_alone(tmp_path, model, loss_fn=loss_of(model)) for model in range(3)]
    _assert_as_alone(together, alone)
    for key in ("loss", "val_loss"):
        assert_close(together.model_metrics[key], [trainer.logs[key] for trainer in alone], **BOUNDS)


def test_metrics_are_those_of_each_model_alone(tmp_path: Path) -> None:
    metrics = {"error": largest_error, "val_bias": lambda outputs, targets: (outputs - targets).mean()}
    together = _together(tmp_path / "together", None, metrics=metrics)
    alone = [_alone(tmp_path, model, metrics=metrics) for model in range(3)]
    assert set(together.model_metrics) == {"loss", "val_loss", "error", "val_error", "val_bias"}
    for key, values in together.model_metrics.items():
        assert_close(values, [trainer.logs[key] for trainer in alone], **BOUNDS)
        assert together.logs[key] == pytest.approx(sum(values) / 3, rel=1e-12)
    module = alone[0].model.eval()
    with torch.no_grad():
        errors = [float((module(inputs) - targets).abs().max()) for inputs, targets in val_batches()]
    assert alone[0].logs["val_error"] == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_settings_of_some_of_the_models() -> None:
    arguments = {"weight": torch.tensor([[1.0], [2.0], [3.0]])}
    per_model = PerModel(max_grad_norm=[1.0, None, 3.0], early_stopping_patience=[None, 2, 3], loss_args=arguments)
    some = per_model.of_models([2, 0])
    assert (some.max_grad_norm, some.early_stopping_patience) == ([3.0, 1.0], [3, None])
    assert_equal(some.loss_args, {"weight": torch.tensor([[3.0], [1.0]])})
    assert PerModel().of_models([1]) == PerModel()


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"max_grad_norm": [1.0, 0.0, -1.0]}, [r"max_grad_norm\[1\]: received 0.0; expected a num", r"norm\[2\]"]),
        ({"max_grad_norm": [math.nan]}, [r"max_grad_norm\[0\]: received nan; expected a number > 0, or None"]),
        ({"max_grad_norm": ["1"]}, [r"max_grad_norm\[0\]: received '1'"]),
        ({"max_grad_norm": 1.0}, ["max_grad_norm: received 1.0; expected a list with one value per model"]),
        ({"early_stopping_patience": [0]}, [r"early_stopping_patience\[0\]: received 0; expected a whole number > 0"]),
        ({"early_stopping_patience": [True]}, [r"early_stopping_patience\[0\]: received True"]),
        ({"early_stopping_patience": [2.5]}, [r"early_stopping_patience\[0\]: received 2.5"]),
        ({"loss_args": {"weight": [1.0]}}, [r"loss_args\['weight'\]: received \[1.0\]; expected a tensor"]),
        ({"loss_args": {"weight": torch.tensor(1.0)}}, [r"loss_args\['weight'\]: received tensor\(1.\)"]),
    ],
)
def test_bad_values(values: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        PerModel(**values)
    for text in texts:
        assert caught.match(text)


@pytest.mark.parametrize(
    "per_model",
    [
        PerModel(max_grad_norm=[1.0] * 2),
        PerModel(early_stopping_patience=[1] * 4),
        PerModel(loss_args={"weight": torch.ones(4)}),
    ],
    ids=["norms", "patiences", "loss_args"],
)
def test_another_number_of_models(per_model: PerModel, tmp_path: Path) -> None:
    with pytest.raises((ConfigurationError, InvalidInput), match="received .*expected .*3"):
        _together(tmp_path, per_model)


def test_only_where_they_have_an_effect(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="metrics or per_model without loss_fn"):
        GenericTrainer(_config(tmp_path), per_model=PerModel())
    with pytest.raises(ConfigurationError, match="metrics or per_model without loss_fn"):
        GenericTrainer(_config(tmp_path), metrics={"error": largest_error})
    trainer = GenericTrainer(_config(tmp_path), loss_fn=nn.functional.mse_loss, per_model=PerModel())
    (module,) = make_models(1)
    with pytest.raises(ConfigurationError, match="per_model: received settings of single models; expected them only"):
        trainer.fit(module, torch.optim.SGD(module.parameters()), _batches())


@pytest.mark.parametrize("metrics", [{"loss": largest_error}, {"val_loss": largest_error}, {"error": 1.0}])
def test_bad_metrics(metrics: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="metrics: received .*; expected functions by name"):
        GenericTrainer(_config(tmp_path), loss_fn=nn.functional.mse_loss, metrics=metrics)
    both = {"error": largest_error, "val_error": largest_error}
    with pytest.raises(ConfigurationError, match="metrics: received .*; expected functions by name"):
        GenericTrainer(_config(tmp_path), loss_fn=nn.functional.mse_loss, metrics=both)
