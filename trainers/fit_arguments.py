"""What `fit` refuses before the first batch: arguments with which it would train nothing, or lose what it trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from trainers.errors import TrainerError
from trainers.ranks import gathered_from_ranks

_ORDER = "The order is fit(model, optimizer, train_loader, val_loader, scheduler)."
_NAMED = 5


def check_fit_arguments(model: Any, optimizer: Any, scheduler: Any, *, clips: bool) -> None:
    """Refuse a model, an optimizer and a scheduler that do not belong together.

    Args:
        model: A module or a `ModelBatch`.
        optimizer: Of its parameters.
        scheduler: Of the optimizer: one, a list of them, or None.
        clips: Whether gradients are clipped.

    Raises:
        TrainerError: One of them is something else, such as a class, the optimizer has parameters of something else,
            or a scheduler moves another optimizer.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1)
        >>> check_fit_arguments(model, torch.optim.SGD(model.parameters(), lr=0.1), None, clips=True)
    """
    if not isinstance(model, nn.Module):
        raise TrainerError(
            "fit: model", received=_described(model), expected="a torch.nn.Module or a ModelBatch", fix=_ORDER
        )
    _check_kind(optimizer)
    _check_parameters(model, optimizer)
    for one in scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]:
        _check_scheduler(one, optimizer)
    if clips:
        _check_gradients(model)


def check_ranks(batches: int | None, *, validates: bool) -> None:
    """Refuse loaders with which the processes of a run would wait for each other for ever.

    Args:
        batches: Of an epoch in this process; None if that is unknown.
        validates: Whether it has a ``val_loader``.

    Raises:
        TrainerError: The processes do not have the same.

    Example:
        >>> check_ranks(3, validates=False)
    """
    every = gathered_from_ranks((batches, validates))
    with_validation = [rank for rank, (_, validates) in enumerate(every) if validates]
    if with_validation and len(with_validation) < len(every):
        raise TrainerError(
            "fit: val_loader",
            received=f"one on the ranks {with_validation} of {len(every)}",
            expected="one on all ranks or on none, because the ranks validate together",
        )
    if len({batches for batches, _ in every if batches is not None}) > 1:
        raise TrainerError(
            "fit: train_loader",
            received=f"{[batches for batches, _ in every]} batches an epoch on the ranks",
            expected="as many on all ranks, because they train together, batch by batch",
            fix="Use a DistributedSampler, or drop_last=True.",
        )


def _check_kind(optimizer: Any) -> None:
    needed = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
    if isinstance(optimizer, type) or not all(hasattr(optimizer, name) for name in needed):
        raise TrainerError(
            "fit: optimizer",
            received=_described(optimizer),
            expected="an optimizer, such as torch.optim.SGD(model.parameters(), lr=0.1)",
            fix=_ORDER,
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TrainerError(
            "fit: optimizer",
            received=f"{_described(optimizer)}, which needs a closure that evaluates the loss anew",
            expected="an optimizer whose step() needs none, because a batch is evaluated once",
        )


def _check_parameters(model: nn.Module, optimizer: Any) -> None:
    # An optimizer with a group for each model has views of the stacks in its groups.
    stacks = getattr(optimizer, "stacks", None)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    given = grouped if stacks is None else list(stacks.values())
    own = {id(parameter) for parameter in model.parameters()}
    foreign = [parameter for parameter in given if id(parameter) not in own]
    if not foreign:
        return
    name = type(optimizer).__name__
    if len(foreign) == len(given):
        raise TrainerError(
            f"fit: the {name} has no parameter of this {type(model).__name__}",
            received="parameters of another model",
            expected="those of the model that is trained",
            fix="Make the optimizer anew whenever the model was made anew.",
        )
    raise TrainerError(
        f"fit: the {name} trains parameters that the model does not have, so that no checkpoint would hold them",
        received=f"{len(foreign)} of {len(given)}, of the shapes {_some(list(each.shape) for each in foreign)}",
        expected="parameters of the model only",
        fix="Make the module that holds them, such as a loss with parameters, a part of the model.",
    )


def _check_scheduler(scheduler: Any, optimizer: Any) -> None:
    if isinstance(scheduler, type):
        raise TrainerError(
            "fit: scheduler",
            received=_described(scheduler),
            expected=f"an object, such as {scheduler.__name__}(optimizer, ...)",
        )
    moved = getattr(scheduler, "optimizer", optimizer)
    if moved is optimizer:
        return
    # A scheduler of one model in a batch has a view of the optimizer, with that model's group.
    own = {id(group) for group in optimizer.param_groups}
    if not any(id(group) in own for group in getattr(moved, "param_groups", [])):
        raise TrainerError(
            "fit: scheduler",
            received=f"{_described(scheduler)} of another optimizer, whose learning rates it would move",
            expected=f"one of the {type(optimizer).__name__} that is given",
            fix="Make the scheduler anew whenever the optimizer was made anew.",
        )


def _check_gradients(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise TrainerError(
                f"fit: the embedding {name!r}",
                received="sparse=True, whose gradients cannot be clipped",
                expected="dense gradients",
                fix="Set max_grad_norm=None, or sparse=False.",
            )


def _described(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _some(shapes: Iterable[list[int]]) -> str:
    shown = [str(shape) for shape in shapes]
    return ", ".join(shown[:_NAMED]) + (", ..." if len(shown) > _NAMED else "")
