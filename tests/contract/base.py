"""What the parts of the suite share: a backend's name, small models and plain references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import ModelBatch, OptimizerFactory

Make = Callable[[], nn.Module]


class ContractBase:
    """A backend's test class sets `backend`.

    Attributes:
        backend: The registered name.
    """

    backend: ClassVar[str]

    def batch(self, models: Sequence[nn.Module], shared_input: bool = True, **options: Any) -> ModelBatch:
        """Make a batch on the backend under test."""
        return ModelBatch(models, shared_input, backend=self.backend, **options)


def build(make: Make, count: int, seed: int = 1) -> list[nn.Module]:
    """Make models with different weights."""
    models = []
    for index in range(count):
        torch.manual_seed(1000 * seed + index)
        models.append(make())
    return models


def mlp() -> nn.Module:
    """4 numbers in, 3 classes out; smooth."""
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Module:
    """A model with buffers of both kinds, which depend on all rows of the batch."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def dropping() -> nn.Module:
    """A model that draws random numbers twice in each forward pass in training."""
    return nn.Sequential(nn.Dropout(0.25), nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3))


def normed_and_dropping() -> nn.Module:
    """A model whose passes change buffers and the step of its random stream."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.25), nn.Linear(8, 3))


class Mixed(nn.Module):
    """Frozen, tied and transient tensors, and names that collide when dots become underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})
        self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
        self.a_b["c"].requires_grad_(False)
        self.out = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.out.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.rand(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.tied(self.out(self.a_b["c"](self.a["b_c"](x).tanh()) * self.scale).tanh())


class ManyArguments(nn.Module):
    """Positional, keyword and plain arguments in; tensors, numbers, text and None out."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(2, 3)

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]], factor: Tensor, *, shift: Tensor, power: int = 1) -> Any:
        x, named = pair
        y = self.first(x) * factor + self.second(named["extra"]) + shift
        return {"power": y**power, "list": [y.sum(-1), (y, None)], "rows": len(x), "name": "y"}


class KeywordOnly(nn.Module):
    """Takes keywords only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, *, features: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(features) * scale


def features(seed: int = 0, rows: int = 6, width: int = 4) -> Tensor:
    """Inputs `[rows, width]`."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def labels(seed: int = 0, rows: int = 6, classes: int = 3) -> Tensor:
    """Class numbers `[rows]`."""
    return torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed + 77))


def for_each(count: int, make: Callable[..., Tensor], seed: int = 0, **options: int) -> Tensor:
    """Stack data that differs between models, `[count, rows, ...]`."""
    return torch.stack([make(seed + 31 * (index + 1), **options) for index in range(count)])


def batches(steps: int = 3, rows: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Shared inputs and labels, one pair per step."""
    return [(features(step, rows), labels(step, rows)) for step in range(steps)]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of one model, in plain PyTorch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd_for(mb: ModelBatch, lr: Sequence[float] | None = None, **options: Any) -> torch.optim.Optimizer:
    """SGD with momentum, a learning rate of its own for each model."""
    rates = lr or [0.1 / (index + 1) for index in range(mb.num_models)]
    return OptimizerFactory(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-3, **options}).create_optimizer(
        mb, [{"lr": rate} for rate in rates]
    )


def plain_sgd(index: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The same for one plain model."""
    return torch.optim.SGD(parameters, lr=0.1 / (index + 1), momentum=0.9, weight_decay=1e-3)


def state_of(mb: ModelBatch) -> dict[str, dict[str, Tensor]]:
    """A copy of all stacked tensors."""
    return {
        "parameters": {name: value.detach().clone() for name, value in mb.stacked_params.items()},
        "buffers": {name: value.clone() for name, value in mb.stacked_buffers.items()},
    }


def model_state(mb: ModelBatch, index: int) -> dict[str, Tensor]:
    """A copy of one model's tensors."""
    both = {**mb.stacked_params, **mb.stacked_buffers}
    return {name: value.detach()[index].clone() for name, value in both.items()}


def gradients(mb: ModelBatch) -> dict[str, Tensor | None]:
    """A copy of all stacked gradients."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in mb.stacked_params.items()}


def plain_gradients(models: Sequence[nn.Module]) -> dict[str, Tensor | None]:
    """The gradients of plain models, stacked."""
    columns: dict[str, Tensor | None] = {}
    for name, parameter in models[0].named_parameters():
        own = [dict(model.named_parameters())[name].grad for model in models]
        columns[name] = None if parameter.grad is None else torch.stack([grad for grad in own if grad is not None])
    return columns
