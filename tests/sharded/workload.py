"""A small training with everything that could differ between devices: batch statistics, dropout, options per model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import ModelBatch, OptimizerFactory


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def build(num_models: int, *, shared_input: bool = True, **options: Any) -> ModelBatch:
    return ModelBatch.from_factory(
        model,
        seeds=range(num_models),
        shared_input=shared_input,
        backend="jax",
        backend_options={"verify": False, **options},
    )


def sgd_for(mb: ModelBatch) -> Any:
    # Adaptive optimizers magnify rounding: the gradient of the bias before the BatchNorm is zero.
    configs = [{"lr": 0.01 * (index + 1)} for index in range(mb.num_models)]
    return OptimizerFactory(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}).create_optimizer(mb, configs)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(10, 6, generator=generator), torch.randint(0, 3, (10,), generator=generator)) for _ in range(count)
    ]


class Trained(NamedTuple):
    losses: Tensor
    states: list[Any]
    optimizer: dict[str, Any]


def train(mb: ModelBatch, optimizer: Any = None) -> Trained:
    """A fused step, two in one program, and one as an unchanged script makes it."""
    optimizer = optimizer or sgd_for(mb)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    first, *middle, last = batches(4)
    losses = [step(*first), *step.run(middle)]
    own = mb.compute_loss(mb(last[0]), last[1], F.cross_entropy, reduction="none")
    optimizer.zero_grad()
    own.sum().backward()
    optimizer.step()
    # All processes read, if there are several.
    return Trained(torch.stack([*losses, own.detach()]), mb.get_model_states(), optimizer.state_dict())
