"""Decides whether targets are one set shared by all models or one set per model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mb_torch.errors import InvalidInput
from mb_torch.routed import RoutedTensor, routed_leaves
from mb_torch.trees import leaves_of

_ADVICE = "Pass shared_targets=True (all models get the same) or shared_targets=False (a leading model axis)."


def targets_are_shared(
    targets: Any, *, num_models: int, batch: int | None, loss_fits: Callable[[Any], bool] | None = None
) -> bool:
    """Tell shared targets ``[batch, ...]`` from per-model targets ``[num_models, batch, ...]``.

    Args:
        targets: A tensor or a pytree of tensors.
        num_models: How many models there are.
        batch: How many rows each model has, or None if that is not known.
        loss_fits: Says whether the loss accepts given targets for model 0; asked only if both shapes fit.

    Returns:
        True if all models share the targets.

    Raises:
        InvalidInput: Neither shape fits, or both do and the loss accepts both.

    Example:
        >>> targets_are_shared(torch.zeros(32), num_models=4, batch=32)
        True
        >>> targets_are_shared(torch.zeros(4, 32), num_models=4, batch=32)
        False
    """
    leaves = [leaf for leaf in leaves_of(targets) if isinstance(leaf, Tensor)]
    if any(isinstance(leaf, RoutedTensor) for leaf in leaves):
        return False
    shared = all(leaf.dim() == 0 or leaf.shape[0] == batch for leaf in leaves)
    per_model = bool(leaves) and all(leaf.dim() >= 2 and leaf.shape[:2] == (num_models, batch) for leaf in leaves)
    if shared and per_model and loss_fits is not None:
        shared, per_model = loss_fits(targets), loss_fits(of_first_model(targets))
    if shared != per_model:
        return shared
    shapes = [tuple(leaf.shape) for leaf in leaves]
    raise InvalidInput(
        "the targets fit both as shared and as per-model targets" if shared else "the targets do not fit the outputs",
        received=f"shapes {shapes} for {num_models} models" + (f" and {batch} rows" if batch is not None else ""),
        expected=f"[{batch if batch is not None else 'batch'}, ...] if shared or "
        f"[{num_models}, {batch if batch is not None else 'batch'}, ...] if per model",
        fix=_ADVICE,
    )


def check_targets_may_be_shared(data: Any) -> None:
    """Raise `InvalidInput` if the data is routed: rows that differ between models have targets that do."""
    if routed_leaves(data):
        raise InvalidInput(
            "the rows are routed to the models, but the targets are shared",
            fix="Route the targets too: route_batch(inputs, masks=..., targets=targets).",
        )


def check_per_model(what: str, value: Any, num_models: int) -> None:
    """Raise `InvalidInput` unless a value is a tensor ``[num_models, ...]``."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != num_models:
        received = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInput(what, received=received, expected=f"a tensor [{num_models}, ...], one entry per model")


@dataclass(frozen=True)
class WithArguments:
    """A loss whose further arguments come with the targets: ``loss(outputs_i, (targets_i, arguments_i))``."""

    loss_fn: Callable[..., Any]

    def __call__(self, outputs: Any, targets: tuple[Any, dict[str, Any]]) -> Any:
        """Call the loss."""
        own_targets, arguments = targets
        return self.loss_fn(outputs, own_targets, **arguments)


def for_each_model(tree: Any, num_models: int) -> Any:
    """A pytree of shared tensors with a leading model axis, without copies."""
    return pytree.tree_map(
        lambda leaf: leaf.expand(num_models, *leaf.shape) if isinstance(leaf, Tensor) else leaf, tree
    )


def of_first_model(tree: Any) -> Any:
    """Model 0's share of a pytree of tensors ``[num_models, ...]``."""
    return pytree.tree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, tree)


def loss_accepts(loss_fn: Callable[..., Any], outputs: Any) -> Callable[[Any], bool]:
    """Return a test whether ``loss_fn`` takes one model's ``outputs`` with given targets, without broadcasting."""

    def accepts(targets: Any) -> bool:
        with torch.no_grad(), warnings.catch_warnings():
            # mse_loss and its like broadcast targets of another size and only warn.
            warnings.simplefilter("error")
            try:
                loss = loss_fn(outputs, targets)
            except Exception:  # whatever a loss raises, it does not accept these targets
                return False
        return isinstance(loss, Tensor) and loss.dim() == 0

    return accepts


def batch_length(tree: Any, model_axis: bool) -> int | None:
    """Rows per model of the first tensor in a pytree, behind the model axis if there is one; None if it has none."""
    axis = 1 if model_axis else 0
    for leaf in leaves_of(tree):
        if isinstance(leaf, Tensor):
            return leaf.shape[axis] if leaf.dim() > axis else None
    return None
