"""Training steps: forward, loss, backward, clipping and update of all models in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mb_torch.backend import Step, StepSpec
from mb_torch.errors import InvalidInput
from mb_torch.stacked.views import PerModelOptimizer
from mb_torch.targets import (
    batch_length,
    check_per_model,
    check_targets_may_be_shared,
    loss_accepts,
    of_first_model,
    targets_are_shared,
)
from mb_torch.trees import leaves_of

if TYPE_CHECKING:
    from mb_torch.core import ModelBatch


class PlainLoss:
    """A loss of outputs and targets, as a loss that calls the model itself."""

    def __init__(self, plain_loss: Callable[..., Any]) -> None:
        self.plain_loss = plain_loss

    def __call__(self, model: nn.Module, inputs: Any, targets: Any, **arguments: Any) -> Any:
        """Call the model, then the loss."""
        return self.plain_loss(model(inputs), targets, **arguments)


class TrainStep:
    """A training step made by `make_joint_step` or `ModelBatch.make_train_step`.

    Attributes:
        loss_args: Per-model arguments of the loss, ``[num_models, ...]`` each. Live: change entries or values and the
            next step uses them.
        shared_args: Arguments that all models share; live.

    Example:
        >>> from torch import nn
        >>> from mb_torch import ModelBatch
        >>> mb = ModelBatch([nn.Linear(4, 1) for _ in range(3)])
        >>> step = mb.make_train_step(nn.functional.mse_loss, torch.optim.SGD(mb.parameters(), lr=0.1))
        >>> step.run([(torch.randn(8, 4), torch.zeros(8, 1))] * 5).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        batches: Sequence[ModelBatch],
        spec: StepSpec,
        step: Step,
        shared_targets: bool | None,
        plain_loss: Any,
    ) -> None:
        self._batches = list(batches)
        self._spec = spec
        self._step = step
        self._shared_targets = shared_targets
        self._plain_loss = plain_loss
        self._decided: dict[Any, bool] = {}

    def __repr__(self) -> str:
        spec = self._spec
        bound = spec.clip_norm
        loss = spec.loss_fn if self._plain_loss is None else self._plain_loss
        given = {
            "loss": _name_of(loss),
            "models": _listed([f"{b.num_models} x {type(b.prototype).__name__}" for b in self._batches]),
            "optimizer": _listed([_optimizer_name(optimizer) for optimizer in spec.optimizers]),
            "backend": repr(self._batches[0].backend.name),
        }
        # What is as usual is not worth its place.
        options = {
            "loss_args": [*spec.loss_args],
            "shared_args": [*spec.shared_args],
            "clip_norm": "one per model" if isinstance(bound, Tensor) and bound.dim() else bound,
            "accumulate": None if spec.accumulate == 1 else spec.accumulate,
            "active": None if spec.active is None else f"{int(spec.active.sum())} of {len(spec.active)}",
            "scaler": None if spec.scaler is None else type(spec.scaler).__name__,
            "aux": spec.aux,
            "shared_targets": None if self._shared_targets is None else str(self._shared_targets),
        }
        given |= {name: str(value) for name, value in options.items() if value not in (None, False, [])}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in given.items())})"

    @property
    def loss_args(self) -> dict[str, Tensor]:
        """Per-model arguments of the loss, live."""
        return self._spec.loss_args

    @property
    def shared_args(self) -> dict[str, Any]:
        """Arguments of the loss that all models share, live."""
        return self._spec.shared_args

    @property
    def active(self) -> Tensor | None:
        """``[num_models]`` bool: which models train; None is all. The others are frozen wholly. May be set."""
        return self._spec.active

    @active.setter
    def active(self, value: Tensor | None) -> None:
        self._spec.active = _checked_active(value, self._batches[0].num_models)

    def __call__(self, inputs: Any, targets: Any) -> Any:
        """Train every model on one batch.

        Args:
            inputs: ``[batch, ...]``, or ``[num_models, batch, ...]`` with ``shared_input=False``; a pytree of such.
            targets: ``[batch, ...]`` or ``[num_models, batch, ...]``; a pytree of such.

        Returns:
            Losses ``[num_models]`` before the update, detached, on the models' device and not waited for; with
            ``aux=True`` a pair of these and the ``aux`` of all models.
        """
        self._check(inputs)
        shared_targets = self._targets_shared(inputs, targets)
        losses, aux = self._step(inputs, targets, shared_targets=shared_targets)
        return self._report(losses, losses, aux)

    def run(self, batches: Iterable[tuple[Any, Any]]) -> Any:
        """Train every model on several batches in a row.

        Args:
            batches: Pairs ``(inputs, targets)`` as for a single step, equal in shape.

        Returns:
            Losses ``[steps, num_models]``; with ``aux=True`` a pair of these and the last step's ``aux``.
        """
        batches = list(batches)
        if not batches:
            raise InvalidInput("step.run", received="no batches", expected="at least one (inputs, targets) pair")
        for inputs, _ in batches:
            self._check(inputs)
        losses, aux = self._step.run(batches, shared_targets=self._targets_shared(*batches[0]))
        return self._report(losses, losses[-1], aux)

    def run_rows(self, inputs: Any, targets: Any, rows: Tensor) -> Any:
        """Train every model on batches that are rows of a data set, a whole epoch say.

        On XLA the data set is copied to the device once, and all steps are one program that picks the rows.

        Args:
            inputs: The whole data set: ``[rows, ...]``, or ``[num_models, rows, ...]`` with ``shared_input=False``.
            targets: ``[rows, ...]`` or ``[num_models, rows, ...]``.
            rows: Which rows each step trains on: integers ``[steps, batch]``.

        Returns:
            As `run`.

        Raises:
            InvalidInput: ``rows`` is no such tensor, or there is no such row.

        Example:
            >>> from torch import nn
            >>> from mb_torch import ModelBatch
            >>> mb = ModelBatch([nn.Linear(4, 1) for _ in range(3)])
            >>> step = mb.make_train_step(nn.functional.mse_loss, torch.optim.SGD(mb.parameters(), lr=0.1))
            >>> epoch = torch.randperm(100).view(5, 20)
            >>> step.run_rows(torch.randn(100, 4), torch.zeros(100, 1), epoch).shape
            torch.Size([5, 3])
        """
        self._check(inputs)
        count = batch_length(inputs, model_axis=not self._spec.shared_input)
        if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.numel() or rows.is_floating_point():
            received = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise InvalidInput("rows", received=received, expected="integers [steps, batch]")
        if rows.dtype == torch.bool or count is None or int(rows.min()) < 0 or int(rows.max()) >= count:
            raise InvalidInput(
                "rows", received=f"{rows.dtype} from {rows.min()} to {rows.max()}", expected=f"rows below {count}"
            )
        shared_targets = self._targets_shared(inputs, targets)
        losses, aux = self._step.run_rows(inputs, targets, rows, shared_targets=shared_targets)
        return self._report(losses, losses[-1], aux)

    def flush(self) -> None:
        """Update with what has been accumulated so far (``accumulate > 1``), at the end of an epoch say.

        Fewer calls than ``accumulate`` still count ``1 / accumulate`` each.
        """
        self._step.flush()

    def _check(self, inputs: Any) -> None:
        for batch in self._batches:
            batch.check_inputs(inputs)
        for name, value in self._spec.loss_args.items():
            check_per_model(f"loss_args[{name!r}]", value, self._batches[0].num_models)

    def _report(self, losses: Tensor, latest: Tensor, aux: Any) -> Any:
        for batch in self._batches:
            batch.latest_losses = latest
        return (losses, aux) if self._spec.aux else losses

    def _targets_shared(self, inputs: Any, targets: Any) -> bool:
        shared = self._decide_shared(inputs, targets)
        if shared:
            check_targets_may_be_shared(inputs)
        return shared

    def _decide_shared(self, inputs: Any, targets: Any) -> bool:
        if self._shared_targets is not None:
            return self._shared_targets
        shapes = tuple(getattr(leaf, "shape", None) for leaf in leaves_of((inputs, targets)))
        if shapes not in self._decided:
            self._decided[shapes] = targets_are_shared(
                targets,
                num_models=self._batches[0].num_models,
                batch=batch_length(inputs, model_axis=not self._spec.shared_input),
                loss_fits=None if self._plain_loss is None else lambda given: self._loss_fits(inputs, given),
            )
        return self._decided[shapes]

    def _loss_fits(self, inputs: Any, targets: Any) -> bool:
        """Ask the loss itself, on outputs of a copy of model 0."""
        batch = self._batches[0]
        if not self._spec.shared_input:
            inputs = of_first_model(inputs)
        with torch.no_grad(), torch.random.fork_rng():
            outputs = batch.model(0)(inputs)
        first_args = {name: value[0] for name, value in self._spec.loss_args.items()}
        arguments = {**first_args, **self._spec.shared_args}

        def loss(outputs: Any, targets: Any) -> Any:
            result = self._plain_loss(outputs, targets, **arguments)
            return result[0] if self._spec.aux else result

        return loss_accepts(loss, outputs)(targets)


def make_joint_step(
    batches: Sequence[ModelBatch],
    loss_fn: Callable[..., Any],
    optimizers: Sequence[torch.optim.Optimizer | None],
    *,
    loss_args: Mapping[str, Tensor] | None = None,
    shared_args: Mapping[str, Any] | None = None,
    clip_norm: float | Tensor | None = None,
    accumulate: int = 1,
    active: Tensor | None = None,
    scaler: Any = None,
    aux: bool = False,
    shared_targets: bool | None = None,
) -> TrainStep:
    """Return one training step over several batches, for losses that chain models of different kinds.

    Model *i* of every batch belongs together: ``loss_fn`` is written for one model of each, in plain PyTorch, and
    every model is trained on its own loss exactly as if alone.

    Args:
        batches: Batches of equally many models, on one backend, with equal ``shared_input``.
        loss_fn: ``loss_fn(*models, inputs, targets, **loss_args_i, **shared_args)``; calls the models itself and
            returns one number (with ``aux=True`` a pair of it and a pytree of tensors).
        optimizers: One per batch, by `OptimizerFactory` or any ``torch.optim.Optimizer`` over the batch's
            parameters; None leaves that batch untrained (gradients still flow through it).
        loss_args: Per-model arguments, ``[num_models, ...]`` tensors: loss weights, temperatures, label smoothing.
            They may change without recompiling.
        shared_args: Arguments that all models share.
        clip_norm: Clip each model's gradient, over all batches together, to this norm; one number or
            ``[num_models]``. Default: no clipping.
        accumulate: Make an update every so many calls. Each call adds ``1 / accumulate`` of its gradient (of those
            models that are active in it), as a loop that divides its loss does; see `TrainStep.flush`.
        active: ``[num_models]`` bool. A model that is not active is frozen wholly: parameters, buffers, optimizer
            state and decay, to the bit. Default: all are.
        scaler: `mb_torch.GradScaler` (one scale per model) or ``torch.amp.GradScaler`` for float16; it is updated by
            the step.
        aux: Whether ``loss_fn`` returns ``(loss, aux)``.
        shared_targets: Says whether all models share the targets; default: decided by shape.

    Returns:
        A `TrainStep`.

    Raises:
        InvalidInput: The batches, optimizers or per-model arguments do not fit together.

    Example:
        >>> from torch import nn
        >>> from mb_torch import ModelBatch
        >>> encoders = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
        >>> heads = ModelBatch([nn.Linear(2, 1) for _ in range(3)])
        >>> def loss_fn(encoder, head, inputs, targets, *, weight):
        ...     return weight * nn.functional.mse_loss(head(encoder(inputs)), targets)
        >>> optimizers = [torch.optim.SGD(batch.parameters(), lr=0.1) for batch in (encoders, heads)]
        >>> weights = torch.tensor([1.0, 0.5, 0.1])
        >>> step = make_joint_step([encoders, heads], loss_fn, optimizers, loss_args={"weight": weights})
        >>> step(torch.randn(8, 4), torch.zeros(8, 1)).shape
        torch.Size([3])
    """
    batches, optimizers = list(batches), list(optimizers)
    _check_batches(batches, optimizers)
    num_models = batches[0].num_models
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise InvalidInput("accumulate", received=repr(accumulate), expected="a positive integer")
    if isinstance(clip_norm, Tensor) and clip_norm.dim():
        check_per_model("clip_norm", clip_norm, num_models)
    for name, value in (loss_args or {}).items():
        check_per_model(f"loss_args[{name!r}]", value, num_models)
    spec = StepSpec(
        loss_fn=loss_fn,
        optimizers=optimizers,
        loss_args=dict(loss_args or {}),
        shared_args=dict(shared_args or {}),
        clip_norm=clip_norm,
        accumulate=accumulate,
        active=_checked_active(active, num_models),
        scaler=scaler,
        aux=aux,
        shared_input=batches[0].shared_input,
    )
    step = batches[0].backend.make_step(spec, [batch.backend for batch in batches])
    return TrainStep(
        batches, spec, step, shared_targets, loss_fn.plain_loss if isinstance(loss_fn, PlainLoss) else None
    )


def _check_batches(batches: list[ModelBatch], optimizers: list[torch.optim.Optimizer | None]) -> None:
    if not batches or len(batches) != len(optimizers):
        raise InvalidInput(
            "a training step",
            received=f"{len(batches)} batches and {len(optimizers)} optimizers",
            expected="at least one batch and one optimizer (or None) for each",
        )
    for what in ("num_models", "shared_input"):
        values = [getattr(batch, what) for batch in batches]
        if len(set(values)) > 1:
            raise InvalidInput("batches of a joint step", received=f"{what} {values}", expected=f"equal {what}")
    for index, (batch, optimizer) in enumerate(zip(batches, optimizers, strict=True)):
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidInput(
                f"optimizer {index}",
                received=type(optimizer).__name__,
                expected="a torch.optim.Optimizer or None",
            )
        if optimizer is not None and not any(p.requires_grad for p in batch.parameters()):
            raise InvalidInput(f"batch {index} has an optimizer but no parameter that requires a gradient")
    if all(optimizer is None for optimizer in optimizers):
        raise InvalidInput("a training step", received="no optimizer", expected="at least one")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{', '.join(names)}]"


def _optimizer_name(optimizer: torch.optim.Optimizer | None) -> str:
    if optimizer is None:
        return "None"
    return optimizer.class_name if isinstance(optimizer, PerModelOptimizer) else type(optimizer).__name__


def _name_of(loss: Any) -> str:
    while isinstance(loss, partial):
        loss = loss.func
    return getattr(loss, "__name__", type(loss).__name__)


def _checked_active(active: Tensor | None, num_models: int) -> Tensor | None:
    if active is None:
        return None
    if not isinstance(active, Tensor) or active.dtype != torch.bool or active.shape != (num_models,):
        received = f"{active.dtype} {tuple(active.shape)}" if isinstance(active, Tensor) else type(active).__name__
        raise InvalidInput("active", received=received, expected=f"a bool tensor [{num_models}]")
    return active
