"""How one batch trains: a single module through autograd, a `ModelBatch` with a loss function through its fused step.

Both look alike to the loop: `train_batch` takes a batch and says what it measured and whether the optimizer stepped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mb_torch import GradScaler, ModelBatch, keep_freed_memory
from trainers.config.errors import ConfigurationError
from trainers.errors import TrainerError
from trainers.kept_buffers import KeptBuffers, KeptRows
from trainers.per_model import PerModel
from trainers.settings import GenericTrainerConfig
from trainers.states import TrainerPhase

_HALF_TYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class BatchResult(NamedTuple):
    """What came of one training batch.

    Attributes:
        logs: What the training step returned.
        has_stepped: Whether the optimizer made a step.
        is_skipped: Whether the batch was left out because of its loss.
    """

    logs: dict[str, Any]
    has_stepped: bool
    is_skipped: bool = False


class Training(Protocol):
    """What the loop needs of a way to train.

    Attributes:
        num_models: How many are trained at once; None for a single module.
        patiences: Of early stopping: one for each model of a `ModelBatch`, one for a single module.
        scaler: Of the losses in float16; None otherwise.
        micro_step: Batches since the last optimizer step.
    """

    num_models: int | None
    patiences: list[int | None]
    scaler: Any
    micro_step: int

    def train_batch(self, batch: Any, batch_idx: int) -> BatchResult:
        """Train on one batch, with an optimizer step where one is due."""

    def flush(self) -> bool:
        """Make the optimizer step of an incomplete accumulation; returns whether there was one."""

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for forward passes."""

    def set_active(self, active: Tensor | None) -> None:
        """Freeze all models but the active ones ``[num_models]``; None is all."""


class _Base:
    """What both ways have in common."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: GenericTrainerConfig, scaler: Any
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self.micro_step = 0
        self.num_models: int | None = model.num_models if isinstance(model, ModelBatch) else None
        self.patiences = [config.early_stopping_patience]
        self._accumulate = config.gradient_accumulation_steps
        self._max_norm = config.max_grad_norm
        self._nan_policy = config.on_nan_loss
        self._half = _HALF_TYPES.get(config.mixed_precision or "")
        self._device = device_of(model)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """See `Training`."""
        if self._half is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._half)


class AutogradTraining(_Base):
    """A training step that returns a loss, and backward through it.

    Args:
        model: A module, or a `ModelBatch` whose training step is the user's own.
        optimizer: Of its parameters.
        config: Of the trainer.
        training_step: ``training_step(batch, batch_idx)`` returns a dict with the loss.
        set_phase: Is told what happens.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: GenericTrainerConfig,
        training_step: Callable[[Any, int], dict[str, Any]],
        set_phase: Callable[[TrainerPhase], None],
    ) -> None:
        super().__init__(model, optimizer, config, _make_scaler(model, config))
        if self._nan_policy == "freeze":
            raise ConfigurationError(
                "on_nan_loss: received 'freeze'; expected 'stop' or 'skip', because models can be frozen only in a "
                "ModelBatch that is trained with loss_fn="
            )
        if isinstance(model, ModelBatch):
            self.patiences = [config.early_stopping_patience] * model.num_models
            if config.early_stopping_patience is not None:
                _check_freezes(optimizer, model.num_models)
        self._training_step = training_step
        self._set_phase = set_phase
        self._kept_buffers = KeptBuffers(model) if self._nan_policy == "skip" else None
        self._stopped: list[int] = []
        self._kept_rows: KeptRows | None = None
        # As a `ModelBatch` does: gradients and activations are as large in the next step.
        keep_freed_memory()
        optimizer.zero_grad(set_to_none=True)

    def train_batch(self, batch: Any, batch_idx: int) -> BatchResult:
        """See `Training`."""
        self._set_phase(TrainerPhase.TRAIN_BATCH_FORWARD)
        if self._kept_buffers is not None:
            self._kept_buffers.keep()
        with self.precision():
            logs = self._training_step(batch, batch_idx)
        loss = self._loss_of(logs)
        is_skipped = self._is_to_be_skipped(loss, batch_idx)
        self.micro_step += 1
        if not is_skipped:
            self._set_phase(TrainerPhase.TRAIN_BATCH_BACKWARD)
            share = loss if self._accumulate == 1 else loss / self._accumulate
            scaled = share if self.scaler is None else self.scaler.scale(share)
            (scaled.sum() if scaled.dim() else scaled).backward()
        if self._kept_rows is not None:
            # Not before: the backward pass may use the buffers as the forward pass left them.
            self._kept_rows.put_back()
        has_stepped = self._step() if self.micro_step == self._accumulate else False
        return BatchResult(logs, has_stepped, is_skipped)

    def flush(self) -> bool:
        """See `Training`."""
        return self._step() if self.micro_step else False

    def set_active(self, active: Tensor | None) -> None:
        """See `Training`; where the only model has stopped, the run ends."""
        self._stopped = [] if active is None else (~active).nonzero().flatten().tolist()
        if isinstance(self.model, ModelBatch):
            self._kept_rows = KeptRows(self.model, self._stopped) if self._stopped else None

    def _step(self) -> bool:
        """Clip and update; False if every batch since the last step was skipped."""
        self.micro_step = 0
        self._set_phase(TrainerPhase.TRAIN_BATCH_OPTIM_STEP)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if all(parameter.grad is None for parameter in parameters):
            return False
        if self._kept_rows is not None:
            # What has no gradient is left out by the optimizer, with its decay and its state.
            for model in self._stopped:
                for view in self.optimizer.param_groups[model]["params"]:
                    view.grad = None
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self._max_norm is not None:
            if isinstance(self.model, ModelBatch):
                self.model.clip_grad_norm_(self._max_norm)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, self._max_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _loss_of(self, logs: Any) -> Tensor:
        if not isinstance(logs, dict) or "loss" not in logs:
            received = f"a dict with the keys {sorted(logs)}" if isinstance(logs, dict) else f"a {type(logs).__name__}"
            raise TrainerError("training_step", received=received, expected="a dict with the key 'loss'")
        loss = logs["loss"]
        is_per_model = self.num_models is not None and isinstance(loss, Tensor) and loss.shape == (self.num_models,)
        if not isinstance(loss, Tensor) or (loss.numel() != 1 and not is_per_model) or not loss.requires_grad:
            received = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TrainerError(
                "training_step: 'loss'",
                received=received + (" without a gradient" if isinstance(loss, Tensor) else ""),
                expected="a tensor of one element that depends on the model's parameters",
            )
        return loss if is_per_model or not loss.dim() else loss.reshape(())

    def _is_to_be_skipped(self, loss: Tensor, batch_idx: int) -> bool:
        if _are_finite(loss.detach()):
            return False
        values, broken = loss.detach().tolist(), _broken_weights(self.model)
        if self._nan_policy == "stop" or broken:
            other = None if broken else "on_nan_loss='skip' leaves such batches out"
            raise _not_finite(f"batch {batch_idx}: the loss", values, broken, other)
        assert self._kept_buffers is not None
        self._kept_buffers.put_back()
        return True


class FusedTraining(_Base):
    """The fused step of a `ModelBatch`.

    The losses of every batch are waited for: only then is known whether they are finite.

    Args:
        model: The batch.
        optimizer: Made by `OptimizerFactory`, or any over the batch's parameters.
        config: Of the trainer.
        loss_fn: ``loss_fn(outputs_i, targets_i, **loss_args_i)``.
        set_phase: Is told what happens.
        freeze: Is told which models' losses are not finite.
        per_model: What differs between the models.
    """

    def __init__(
        self,
        model: ModelBatch,
        optimizer: torch.optim.Optimizer,
        config: GenericTrainerConfig,
        loss_fn: Callable[..., Any],
        set_phase: Callable[[TrainerPhase], None],
        freeze: Callable[[dict[int, float]], None],
        per_model: PerModel,
    ) -> None:
        super().__init__(model, optimizer, config, _make_scaler(model, config))
        if self._nan_policy == "skip":
            raise ConfigurationError(
                "on_nan_loss: received 'skip'; expected 'stop' or 'freeze' for a ModelBatch, whose fused step has "
                "updated all models before their losses are seen"
            )
        patiences = per_model.patiences(model.num_models, config)
        freezes = self._nan_policy == "freeze" or any(patience is not None for patience in patiences)
        if freezes:
            _check_freezes(optimizer, model.num_models)
        self.patiences = patiences
        self._set_phase = set_phase
        self._freeze = freeze
        self._trains = torch.ones(model.num_models, dtype=torch.bool)
        self._fused = model.make_train_step(
            loss_fn,
            optimizer,
            loss_args=per_model.loss_args_on(self._device),
            clip_norm=per_model.clip_norm(model.num_models, config),
            accumulate=self._accumulate,
            scaler=self.scaler,
        )

    def train_batch(self, batch: Any, batch_idx: int) -> BatchResult:
        """See `Training`."""
        self._set_phase(TrainerPhase.TRAIN_BATCH_FORWARD)
        inputs, targets = as_pair(batch, self._device)
        with self.precision():
            losses = self._fused(inputs, targets).cpu()
        values = self._diverged(losses)
        if values:
            if self._nan_policy == "stop":
                other = "on_nan_loss='freeze' stops these models only"
                raise _not_finite(f"batch {batch_idx}: the loss of models", values, self._broken_of(values), other)
            self._freeze(values)
        self.micro_step = (self.micro_step + 1) % self._accumulate
        return BatchResult({"loss": losses}, self.micro_step == 0)

    def flush(self) -> bool:
        """See `Training`."""
        if not self.micro_step:
            return False
        self._set_phase(TrainerPhase.TRAIN_BATCH_OPTIM_STEP)
        self._fused.flush()
        self.micro_step = 0
        return True

    def set_active(self, active: Tensor | None) -> None:
        """See `Training`."""
        self._fused.active = active
        self._trains = torch.ones_like(self._trains) if active is None else active

    def _broken_of(self, models: Mapping[int, float]) -> list[str]:
        """Names of these models' parameters that are not finite any more: the step has updated them already."""
        assert isinstance(self.model, ModelBatch)
        rows, stacks = torch.tensor(list(models), device=self._device), self.model.stacked_params
        return [name for name, stack in stacks.items() if not stack.detach()[rows].isfinite().all()]

    def _diverged(self, losses: Tensor) -> dict[int, float]:
        """Models that train and whose losses are not finite."""
        if _are_finite(losses):
            return {}
        bad = self._trains & ~losses.isfinite()
        return {model: float(losses[model]) for model in bad.nonzero().flatten().tolist()}


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are; the CPU for a model without any.

    Args:
        model: The model.

    Returns:
        The device of its first parameter.

    Example:
        >>> device_of(nn.Linear(1, 1))
        device(type='cpu')
    """
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; afterwards every submodule is in the mode it was in.

    Args:
        model: A module or a `ModelBatch`.
    """
    modules = list(model.modules())
    if isinstance(model, ModelBatch):
        modules.extend(model.prototype.modules())
    modes = [module.training for module in modules]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def train_mode_if_evaluating(model: nn.Module) -> None:
    """Put a model into training mode if all of it is in evaluation mode; parts of it may be so on purpose.

    Args:
        model: A module or a `ModelBatch`.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout()).eval()
        >>> train_mode_if_evaluating(model)
        >>> model[1].training
        True
    """
    if not any(module.training for module in model.modules()):
        model.train()


def as_pair(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """Return ``(inputs, targets)`` on the model's device.

    Args:
        batch: A pair of tensors or pytrees.
        device: Where to.

    Raises:
        TrainerError: It is no pair.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of length {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
        raise TrainerError(
            "a batch for loss_fn",
            received=f"a {type(batch).__name__}{length}",
            expected="a pair (inputs, targets)",
            fix="Override training_step for batches of another form.",
        )

    def moved(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf

    inputs, targets = batch
    if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
        # To walk through structures takes longer than many a small step.
        return moved(inputs), moved(targets)
    inputs, targets = pytree.tree_map(moved, (inputs, targets))
    return inputs, targets


def _make_scaler(model: nn.Module, config: GenericTrainerConfig) -> Any:
    """A scaler for float16, with one scale per model for a batch."""
    if config.mixed_precision != "16-mixed":
        return None
    device = device_of(model)
    if isinstance(model, ModelBatch):
        return GradScaler(model.num_models, device=device)
    return torch.amp.GradScaler(device.type)


def _are_finite(losses: Tensor) -> bool:
    # Of finite numbers the sum is finite, unless it overflows; it costs a fraction of the look at each.
    return math.isfinite(float(losses.sum())) or bool(losses.isfinite().all())


def _check_freezes(optimizer: torch.optim.Optimizer, num_models: int) -> None:
    """Refuse an optimizer that cannot leave models out; it would come out at the first of them, maybe after hours."""
    if getattr(optimizer, "num_models", None) != num_models:
        raise ConfigurationError(
            f"optimizer: received a {type(optimizer).__name__} over stacked parameters, which updates all models "
            "or none; expected one made by OptimizerFactory, because early stopping and on_nan_loss='freeze' "
            "freeze models one by one"
        )


def _broken_weights(model: nn.Module) -> list[str]:
    """Names of the trained parameters that are not finite any more: no loss will be finite again."""
    return [name for name, value in model.named_parameters() if value.requires_grad and not value.isfinite().all()]


def _not_finite(what: str, values: Any, broken: list[str], other_policy: str | None) -> TrainerError:
    fix = "Lower the learning rate or look at the data"
    if broken:
        names = ", ".join(broken[:3]) + (", ..." if broken[3:] else "")
        fix = (
            f"The weights are not finite either ({names}), so no later loss can be: go on from an earlier checkpoint "
            "with load_checkpoint(FILE), and lower the learning rate or look for what has no finite gradient, such as "
            "the root of 0"
        )
    fix += "." if other_policy is None else f"; {other_policy}."
    return TrainerError(what, received=values, expected="finite numbers", fix=fix)
