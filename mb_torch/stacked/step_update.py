"""What a training step does with gradients: accumulate, unscale, clip, update."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from mb_torch.amp import GradScaler
from mb_torch.backend import StepSpec
from mb_torch.clipping import clip_gradients_, rows, separate
from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.stacked.definition import Definition
from mb_torch.stacked.optim import StackedOptimizer
from mb_torch.stacked.views import PerModelOptimizer, ViewOptimizer

Place = tuple[int, int]
"""A trained stack: which definition, and its position among that definition's tensors."""

Gradients = list[Tensor | None]


class PendingGradients:
    """Gradients of several calls that make one update.

    Attributes:
        calls: How many calls they are from.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._grads: dict[Place, Tensor] = {}
        self._active: Tensor | None = None

    def add(self, grads: Mapping[Place, Tensor], active: Tensor | None, share: float) -> None:
        """Add a call's gradients times ``share``; models that are not active add nothing, not even a NaN."""
        for place, grad in grads.items():
            own = _of_active(grad, active)
            total = self._grads.get(place)
            self._grads[place] = own * share if total is None else total.add_(own, alpha=share)
        self._active = self.active_with(active)
        self.calls += 1

    def active_with(self, active: Tensor | None) -> Tensor | None:
        """The models that were active in any call, those of another call included; None for all."""
        if not self.calls:
            return active
        return None if active is None or self._active is None else self._active | active

    def with_call(
        self, grads: Mapping[Place, Tensor], active: Tensor | None, share: float
    ) -> tuple[dict[Place, Tensor], Tensor | None]:
        """What `add` would make of a call, in tensors that may be changed; nothing changes here."""
        totals = {place: total.clone() for place, total in self._grads.items() if place not in grads}
        for place, grad in grads.items():
            own = _of_active(grad, active)
            total = self._grads.get(place)
            totals[place] = own * share if total is None else total.add(own, alpha=share)
        return totals, self.active_with(active)

    def so_far(self) -> tuple[dict[Place, Tensor], Tensor | None]:
        """The gradients, in tensors that may be changed, and the models that were active in any call."""
        return {place: total.clone() for place, total in self._grads.items()}, self._active

    def clear(self) -> None:
        """Start anew, after an update."""
        self.calls, self._grads, self._active = 0, {}, None


def _of_active(grad: Tensor, active: Tensor | None) -> Tensor:
    return grad if active is None else torch.where(rows(active, grad), grad, 0)


def check_update(spec: StepSpec, active: Tensor | None) -> None:
    """Raise what `update_models` would raise because of what the optimizers are asked for.

    Called before anything has changed: what a failed update follows (changed buffers, say) stays otherwise.

    Args:
        spec: What the step was asked to do.
        active: As in `update_models`.
    """
    for optimizer in spec.optimizers:
        if isinstance(optimizer, PerModelOptimizer):
            optimizer.check_groups()
        elif optimizer is not None and active is not None and spec.scaler is None:
            raise Unsupported(
                f"a {type(optimizer).__name__} over stacked parameters updates all models or none, "
                "but not all are active",
                fix="Make the optimizer with OptimizerFactory.",
            )


def update_models(spec: StepSpec, trained: list[list[Tensor]], grads: Gradients, active: Tensor | None) -> None:
    """Unscale, clip and apply gradients, after `check_update`.

    Args:
        spec: What the step was asked to do.
        trained: The trained stacks of each batch.
        grads: Their gradients, those of all batches in a row.
        active: Which models may change, bool ``[num_models]``; None for all.
    """
    scaler = spec.scaler
    if scaler is not None or spec.clip_norm is not None:
        present = iter(separate([g for g in grads if g is not None]))
        grads = [None if g is None else next(present) for g in grads]
    if isinstance(scaler, torch.amp.GradScaler):
        _update_through(spec, scaler, trained, grads)
        return
    applied = active
    finite: Tensor | None = None
    if scaler is not None:
        finite = scaler.unscale([g for g in grads if g is not None])
        applied = finite if active is None else active & finite
    if spec.clip_norm is not None:
        clip_gradients_([g for g in grads if g is not None], spec.clip_norm)
    remaining = iter(grads)
    for optimizer, own in zip(spec.optimizers, trained, strict=True):
        own_grads = [next(remaining) for _ in own]
        if optimizer is not None:
            _apply(optimizer, own, own_grads, applied)
    if scaler is not None and finite is not None:
        scaler.record(finite, active)


def _update_through(
    spec: StepSpec, scaler: torch.amp.GradScaler, trained: list[list[Tensor]], grads: Gradients
) -> None:
    """Let a stock scaler drive the optimizers, as a hand-written loop would."""
    parameters = [parameter for own in trained for parameter in own]
    optimizers = [optimizer for optimizer in spec.optimizers if optimizer is not None]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if spec.clip_norm is not None:
        clip_gradients_([g for g in grads if g is not None], spec.clip_norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    for parameter in parameters:
        parameter.grad = None


def _apply(optimizer: torch.optim.Optimizer, parameters: list[Tensor], grads: Gradients, active: Tensor | None) -> None:
    if isinstance(optimizer, PerModelOptimizer):
        by_stack = {id(parameter): grad for parameter, grad in zip(parameters, grads, strict=True)}
        optimizer.update([by_stack.get(id(stack)) for stack in optimizer.stacks.values()], active)
        return
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def updates_exactly(optimizer: torch.optim.Optimizer, stacks: list[Tensor]) -> bool:
    """Whether the optimizer can update in a compiled function, and updates those stacks that are trained."""
    if not isinstance(optimizer, StackedOptimizer):
        return False
    return list(map(id, optimizer.stacks.values())) == [id(stack) for stack in stacks if stack.requires_grad]


def check_optimizer(definition: Definition, optimizer: torch.optim.Optimizer, spec: StepSpec) -> None:
    """Raise unless the optimizer trains this batch and can do what the step asks of it."""
    per_model = isinstance(optimizer, PerModelOptimizer)
    optimizer_cls = optimizer.optimizer_cls if isinstance(optimizer, ViewOptimizer) else type(optimizer)
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise Unsupported(
            f"{optimizer_cls.__name__} needs a closure that evaluates the loss anew; a training step evaluates it once",
            fix="Train these models one by one, or choose another optimizer.",
        )
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if isinstance(optimizer, PerModelOptimizer):
        given = list(optimizer.stacks.values())
    own = {id(parameter) for parameter in definition.state.parameters.values()}
    if any(id(parameter) not in own for parameter in given):
        raise InvalidInput(
            f"the {type(optimizer).__name__} holds parameters of another batch",
            fix="Make the optimizer for the batch that the step trains (a copied batch needs its own).",
        )
    if not per_model and (spec.active is not None or isinstance(spec.scaler, GradScaler)):
        raise Unsupported(
            f"a {type(optimizer).__name__} over stacked parameters updates all models or none",
            fix="For active= and for one scale per model make the optimizer with OptimizerFactory.",
        )
