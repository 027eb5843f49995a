"""The loop: N models trained one after another in plain PyTorch, which is what a batch must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mb_torch import ModelBatch

MakeOptimizer = Callable[[int, list[nn.Parameter]], torch.optim.Optimizer]
"""Makes the optimizer of one model from its number and its trainable parameters."""


@dataclass
class Trained:
    """Where one model ended.

    Attributes:
        parameters: By name.
        buffers: By name, those outside the `state_dict` included.
        optimizer: The optimizer's state, by parameter number; empty for a model without trainable parameters.
        losses: One per step, `[steps]`.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[int, Any]
    losses: Tensor


def sgd(index: int, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with momentum and a learning rate of its own for each model."""
    return torch.optim.SGD(parameters, **sgd_config(index))


def sgd_config(index: int) -> dict[str, float]:
    """What `sgd` gives model `index`."""
    return {"lr": 0.05 / (index + 1), "momentum": 0.9, "weight_decay": 1e-3}


def train_alone(
    models: Sequence[nn.Module],
    batches: Sequence[Any],
    loss_of: Callable[..., Tensor],
    make_optimizer: MakeOptimizer = sgd,
    *,
    clip_norm: float | None = None,
) -> list[Trained]:
    """Train each model by itself, in place, and check that it moved.

    Args:
        models: The models; each is changed.
        batches: One per step; a list of lists gives every model its own batches.
        loss_of: `loss_of(model, batch)`.
        make_optimizer: See `MakeOptimizer`.
        clip_norm: Largest norm of a model's gradient.

    Returns:
        Where each model ended.
    """
    trained = []
    for index, model in enumerate(models):
        before = [parameter.detach().clone() for parameter in trainable(model)]
        optimizer = make_optimizer(index, trainable(model)) if before else None
        losses = []
        for batch in batches:
            own = batch[index] if isinstance(batch, list) else batch
            loss = loss_of(model, own)
            losses.append(loss.detach())
            if optimizer is None:
                continue
            optimizer.zero_grad()
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(trainable(model), clip_norm)
            optimizer.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True)]
        assert any(moved) or not moved, f"model {index} did not move: the comparison would show nothing"
        trained.append(where_it_is(model, optimizer, torch.stack(losses)))
    return trained


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def where_it_is(model: nn.Module, optimizer: torch.optim.Optimizer | None, losses: Tensor) -> Trained:
    """Copy a model's tensors and its optimizer's state."""
    return Trained(
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        {} if optimizer is None else optimizer.state_dict()["state"],
        losses,
    )


def batch_ended(mb: ModelBatch, optimizer: Any, losses: Iterable[Tensor]) -> list[Trained]:
    """Where every model of a batch is.

    Args:
        mb: The batch.
        optimizer: Made by `OptimizerFactory`, or None.
        losses: The losses of each step, `[num_models]`.
    """
    columns = torch.stack(list(losses)).unbind(1)
    return [
        Trained(
            {name: stack.detach()[index].clone() for name, stack in mb.stacked_params.items()},
            {name: stack[index].clone() for name, stack in mb.stacked_buffers.items()},
            {} if optimizer is None else optimizer.model_state_dict(index)["state"],
            columns[index],
        )
        for index in range(mb.num_models)
    ]


def as_tree(trained: Sequence[Trained]) -> dict[str, Any]:
    """Everything that is to be compared, as one nest whose paths name the model."""
    return {f"model {index}": vars(entry) for index, entry in enumerate(trained)}
