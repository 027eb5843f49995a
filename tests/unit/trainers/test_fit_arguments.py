"""What `fit` refuses before it trains: models, optimizers, schedulers and loaders that do not belong together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, SequentialLR, StepLR
from torch.utils.data import TensorDataset

from mb_torch import ModelBatch, OptimizerFactory
from trainers.errors import TrainerError
from trainers.fit_arguments import check_fit_arguments
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig

BATCHES = [(torch.ones(4, 3), torch.ones(4, 1))] * 2


class Weighted(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.weight.sum() * nn.functional.mse_loss(outputs, targets)


def sgd(*modules: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1, **options)


def fit(folder: Path, model: Any, optimizer: Any, loader: Any = BATCHES, loss_fn: Any = None, **rest: Any) -> None:
    settings = {"checkpoint_dir": str(folder / "run"), "max_epochs": 1, **rest.pop("settings", {})}
    trainer = GenericTrainer(GenericTrainerConfig(**settings), loss_fn=loss_fn or nn.functional.mse_loss)
    trainer.fit(model, optimizer, loader, **rest)


def test_optimizer_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="the SGD has no parameter of this Linear"):
        fit(tmp_path, nn.Linear(3, 1), sgd(nn.Linear(3, 1)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_own", [True, False])
def test_optimizer_of_another_batch(is_own: bool, tmp_path: Path) -> None:
    batch, other = (ModelBatch([nn.Linear(3, 1) for _ in range(2)]) for _ in range(2))
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch if is_own else other, [{"lr": 0.1}] * 2)
    if is_own:
        fit(tmp_path, batch, optimizer)
        return
    with pytest.raises(TrainerError, match="has no parameter of this ModelBatch"):
        fit(tmp_path, batch, optimizer)


def test_parameters_that_no_checkpoint_would_hold(tmp_path: Path) -> None:
    model, loss_fn = nn.Linear(3, 1), Weighted()
    with pytest.raises(TrainerError, match=r"received 1 of 3, of the shapes \[2\];.*a part of the model"):
        fit(tmp_path, model, sgd(model, loss_fn), loss_fn=loss_fn)
    # What the optimizer does not train need not be saved; part of a model may be left untrained.
    fit(tmp_path, model, torch.optim.SGD([model.bias], lr=0.1), loss_fn=loss_fn)


SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda optimizer: StepLR(optimizer, 1),
    lambda optimizer: ReduceLROnPlateau(optimizer),
    lambda optimizer: SequentialLR(optimizer, [ExponentialLR(optimizer, 0.9), StepLR(optimizer, 1)], [1]),
    lambda optimizer: [StepLR(optimizer, 1)],
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_scheduler_of_another_optimizer(make: Callable[[torch.optim.Optimizer], Any]) -> None:
    model = nn.Linear(3, 1)
    optimizer = sgd(model)
    check_fit_arguments(model, optimizer, make(optimizer), clips=True)
    with pytest.raises(TrainerError, match="of another optimizer"):
        check_fit_arguments(model, optimizer, make(sgd(model)), clips=True)


def test_scheduler_for_each_model_of_a_batch() -> None:
    batch = ModelBatch([nn.Linear(3, 1) for _ in range(2)])
    factory = OptimizerFactory(torch.optim.SGD)
    mine, other = (factory.create_optimizer(batch, [{"lr": 0.1}] * 2) for _ in range(2))
    schedulers = factory.create_lr_scheduler(mine, StepLR, [{"step_size": 1}] * 2)
    mine.load_state_dict(mine.state_dict())
    check_fit_arguments(batch, mine, schedulers, clips=True)
    with pytest.raises(TrainerError, match="of another optimizer"):
        check_fit_arguments(batch, other, schedulers, clips=True)


def test_other_objects(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    with pytest.raises(TrainerError, match=r"fit: model: received a SGD; .*The order is fit\(model, optimizer"):
        fit(tmp_path, sgd(model), model)
    with pytest.raises(TrainerError, match="fit: optimizer: received the class SGD"):
        fit(tmp_path, model, torch.optim.SGD)
    for scheduler in (StepLR, [StepLR]):
        with pytest.raises(TrainerError, match="fit: scheduler: received the class StepLR"):
            fit(tmp_path, model, sgd(model), scheduler=scheduler)
    with pytest.raises(TrainerError, match="a LBFGS, which needs a closure"):
        fit(tmp_path, model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TrainerError, match=r"received a TensorDataset; .*Wrap it in a DataLoader"):
        fit(tmp_path, model, sgd(model), TensorDataset(torch.ones(4, 3), torch.ones(4, 1)))
    with pytest.raises(TrainerError, match="received a int; "):
        fit(tmp_path, model, sgd(model), 5)


def test_sparse_gradients_cannot_be_clipped(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(5, 1, sparse=True), nn.Flatten())
    batches = [(torch.tensor([[1], [2]]), torch.ones(2, 1))]
    with pytest.raises(TrainerError, match=r"the embedding '0': .*max_grad_norm=None"):
        fit(tmp_path, model, sgd(model), batches)
    fit(tmp_path, model, sgd(model), batches, settings={"max_grad_norm": None})


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_model_that_was_left_in_evaluation_mode_is_trained(frozen: int, tmp_path: Path) -> None:
    modes = []

    class Noting(GenericTrainer):
        def on_batch_start(self, batch_idx: int) -> None:
            modes.append([module.training for module in self.model])

    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout()).eval()
    if frozen:
        model[1].train()
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1)
    Noting(config, loss_fn=nn.functional.mse_loss).fit(model, sgd(model), BATCHES)
    # Where only a part is in evaluation mode, it is meant to be.
    assert modes == [[not frozen, True]] * 2


def test_folder_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(3, 1)
    fit(tmp_path, model, sgd(model), settings={"checkpoint_dir": "~/runs"})
    assert os.listdir(tmp_path) == ["runs"]
