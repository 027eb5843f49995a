"""Loss scaling for float16 training, with one scale per model.

A stock ``torch.amp.GradScaler`` keeps one scale for all: a model whose gradients always overflow drives the
scale of its companions to zero. Here every model has its own scale and its own count of steps without
overflow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from mb_torch.clipping import scale_rows_
from mb_torch.errors import InvalidInput, InvalidState, Unsupported


def finite_models(grads: Sequence[Tensor]) -> Tensor:
    """Say which models' gradients are all finite.

    Args:
        grads: At least one stacked gradient, each ``[num_models, ...]``.

    Returns:
        Bool ``[num_models]``, on the gradients' device.

    Example:
        >>> finite_models([torch.tensor([[1.0, 2.0], [0.0, float("inf")]])])
        tensor([ True, False])
    """
    num_models = grads[0].shape[0]
    # The largest absolute value is NaN or infinite where any entry is; a sum could overflow.
    largest = [grad.abs().reshape(num_models, -1).amax(1).isfinite() for grad in grads if grad.numel()]
    if not largest:
        return torch.ones(num_models, dtype=torch.bool, device=grads[0].device)
    return torch.stack(largest).all(0)


class _Stage(Enum):
    READY = "ready"
    UNSCALED = "unscaled"
    STEPPED = "stepped"


class GradScaler:
    """Scale each model's loss so that its float16 gradients neither vanish nor overflow.

    It is used like ``torch.amp.GradScaler``, on a batch's losses ``[num_models]`` and an optimizer made by
    `OptimizerFactory`. A model whose gradients are not finite skips the step and gets a smaller scale; no
    other model notices.

    Args:
        num_models: How many models there are.
        init_scale: First scale of every model. Default: 65536.
        growth_factor: What a scale is multiplied by after `growth_interval` steps in a row without overflow.
            Default: 2.
        backoff_factor: What it is multiplied by after an overflow. Default: 0.5.
        growth_interval: Default: 2000.
        enabled: If false, nothing is scaled and no step is skipped. Default: true.
        device: Where the scales are kept; they follow the losses. Default: CPU.

    Attributes:
        scales: Float32 ``[num_models]``, changed in place.
        growth_tracker: Steps since the last overflow or growth, int32 ``[num_models]``, changed in place.

    Raises:
        InvalidInput: A number is out of range.

    Example:
        >>> scaler = GradScaler(2, init_scale=4.0)
        >>> scaler.scale(torch.tensor([1.0, 2.0]))
        tensor([4., 8.])
        >>> scaler.record(torch.tensor([True, False]))
        >>> scaler.get_scale()
        tensor([4., 2.])
    """

    def __init__(
        self,
        num_models: int,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value, accepted, expected in (
            ("num_models", num_models, num_models >= 1, "at least 1"),
            ("init_scale", init_scale, 0.0 < init_scale < float("inf"), "a positive number"),
            ("growth_factor", growth_factor, growth_factor > 1.0, "more than 1"),
            ("backoff_factor", backoff_factor, 0.0 < backoff_factor < 1.0, "between 0 and 1"),
            ("growth_interval", growth_interval, growth_interval >= 1, "at least 1"),
        ):
            if not accepted:
                raise InvalidInput(f"GradScaler: {name}", received=value, expected=expected)
        self.num_models = num_models
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.enabled = enabled
        self.scales = torch.full((num_models,), init_scale, dtype=torch.float32, device=device)
        self.growth_tracker = torch.zeros(num_models, dtype=torch.int32, device=device)
        self._stages: dict[int, _Stage] = {}
        self._finite: dict[int, Tensor] = {}

    def is_enabled(self) -> bool:
        """Whether anything is scaled."""
        return self.enabled

    def scale(self, losses: Tensor) -> Tensor:
        """Multiply each model's loss by its scale.

        Args:
            losses: ``[num_models, ...]``. Half precision losses become float32, where a scale does not
                overflow.

        Returns:
            The scaled losses. Sum them before ``backward()``: a mean would divide the gradients by
            `num_models`.

        Raises:
            InvalidInput: The losses are not per model.
        """
        if not self.enabled:
            return losses
        if losses.dim() == 0 or losses.shape[0] != self.num_models:
            raise InvalidInput(
                "GradScaler.scale needs one loss per model",
                received=f"shape {list(losses.shape)}",
                expected=f"shape [{self.num_models}, ...]",
                fix="Use compute_loss(..., reduction='none') and sum the scaled losses.",
            )
        self._follow(losses.device)
        return losses * self.scales.view(-1, *[1] * (losses.dim() - 1))

    def unscale(self, grads: Sequence[Tensor]) -> Tensor:
        """Divide gradients by the models' scales, in place, and say which models' are finite.

        This is the part that a fused training step calls; it does not wait for the device.

        Args:
            grads: Stacked gradients, each ``[num_models, ...]``.

        Returns:
            Bool ``[num_models]``.

        Raises:
            Unsupported: Float16 gradients, which would lose what scaling has saved.
        """
        if not grads or not self.enabled:
            return torch.ones(self.num_models, dtype=torch.bool, device=self.scales.device)
        for grad in grads:
            if grad.dtype == torch.float16:
                raise Unsupported(
                    "GradScaler: the gradients are float16",
                    fix="Keep the parameters in float32 and run the forward pass under torch.autocast.",
                )
        self._follow(grads[0].device)
        finite = finite_models(grads)
        scale_rows_(grads, self.scales.double().reciprocal().float())
        return finite

    def record(self, finite: Tensor, active: Tensor | None = None) -> None:
        """Adjust the scales after a step, without waiting for the device.

        Args:
            finite: Which models' gradients were finite, bool ``[num_models]``.
            active: Models that took part, bool ``[num_models]``; the others' scales stay. Default: all.
        """
        if not self.enabled:
            return
        scales, tracker = self.scales, self.growth_tracker
        finite = finite.to(scales.device)
        counted = torch.where(finite, tracker + 1, 0)
        grown = scales * self.growth_factor
        grows = counted >= self.growth_interval
        new = torch.where(finite, scales, scales * self.backoff_factor)
        # As in torch, a scale that would overflow itself stays.
        new = torch.where(grows & grown.isfinite(), grown, new)
        counted = torch.where(grows, 0, counted)
        if active is not None:
            active = active.to(scales.device)
            new, counted = torch.where(active, new, scales), torch.where(active, counted, tracker)
        scales.copy_(new)
        tracker.copy_(counted)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients of an optimizer's stacks by the models' scales, to clip them say.

        Args:
            optimizer: Made by `OptimizerFactory`.

        Raises:
            InvalidInput: Called twice in an iteration or after `step`, or the optimizer is not per model.
        """
        if not self.enabled:
            return
        stage = self._stages.get(id(optimizer), _Stage.READY)
        if stage is not _Stage.READY:
            raise InvalidInput(
                "GradScaler.unscale_",
                received=f"an optimizer already {stage.value}",
                fix="Call update() first.",
            )
        parameters = self._stacks(optimizer)
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        with torch.no_grad():
            self._finite[id(optimizer)] = self.unscale(grads)
        self._stages[id(optimizer)] = _Stage.UNSCALED

    def step(self, optimizer: torch.optim.Optimizer) -> Any:
        """Update the models whose gradients are finite; unscale them first if that was not done.

        Args:
            optimizer: Made by `OptimizerFactory`.

        Returns:
            What ``optimizer.step()`` returns.

        Raises:
            InvalidInput: Called twice without `update`, or the optimizer is not per model.
        """
        if not self.enabled:
            return optimizer.step()
        if self._stages.get(id(optimizer)) is _Stage.STEPPED:
            raise InvalidInput(
                "GradScaler.step",
                received="an optimizer already stepped",
                fix="Call update() after each step.",
            )
        if id(optimizer) not in self._stages:
            self.unscale_(optimizer)
        # The protocol of torch.amp, with one number per model.
        optimizer.found_inf = (~self._finite[id(optimizer)]).float()  # type: ignore[attr-defined]
        try:
            result = optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        self._stages[id(optimizer)] = _Stage.STEPPED
        return result

    def update(self) -> None:
        """Adjust the scales; call it once per iteration, after every `step`.

        Raises:
            InvalidInput: No gradients were unscaled since the last call.
        """
        if not self.enabled:
            return
        if not self._finite:
            raise InvalidInput("GradScaler.update", received="no gradients", fix="Call step(optimizer) first.")
        self.record(torch.stack([finite.to(self.scales.device) for finite in self._finite.values()]).all(0))
        self._stages.clear()
        self._finite.clear()

    def get_scale(self) -> Tensor:
        """Return a copy of the scales, ``[num_models]``; ones if not enabled."""
        return self.scales.clone() if self.enabled else torch.ones_like(self.scales)

    def state_dict(self) -> dict[str, Any]:
        """Return a snapshot of scales, counts and settings, on the CPU; empty if not enabled."""
        if not self.enabled:
            return {}
        return {
            "scales": self.scales.cpu().clone(),
            "growth_tracker": self.growth_tracker.cpu().clone(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a snapshot.

        Args:
            state_dict: From `state_dict`. Ignored if not enabled.

        Raises:
            InvalidState: Missing entries, or another number of models; nothing was changed.
        """
        if not self.enabled:
            return
        expected = set(self.state_dict())
        if set(state_dict) != expected:
            raise InvalidState("GradScaler state", received=sorted(state_dict), expected=sorted(expected))
        for name in ("scales", "growth_tracker"):
            if not isinstance(state_dict[name], Tensor) or state_dict[name].shape != (self.num_models,):
                received = getattr(state_dict[name], "shape", type(state_dict[name]).__name__)
                raise InvalidState(
                    f"GradScaler state: {name!r}", received=received, expected=f"a tensor [{self.num_models}]"
                )
        self.scales.copy_(state_dict["scales"])
        self.growth_tracker.copy_(state_dict["growth_tracker"])
        self.growth_factor = state_dict["growth_factor"]
        self.backoff_factor = state_dict["backoff_factor"]
        self.growth_interval = state_dict["growth_interval"]

    def _follow(self, device: torch.device) -> None:
        if self.scales.device != device:
            self.scales, self.growth_tracker = self.scales.to(device), self.growth_tracker.to(device)

    def _stacks(self, optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
        if getattr(optimizer, "num_models", None) != self.num_models:
            raise InvalidInput(
                "GradScaler",
                received=f"a {type(optimizer).__name__} for {getattr(optimizer, 'num_models', 'no')} models",
                expected=f"an optimizer with one parameter group for each of {self.num_models} models",
                fix="Make it with OptimizerFactory.create_optimizer.",
            )
        return list(optimizer.stacks.values())  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        if self._finite:
            raise InvalidInput("a GradScaler cannot be pickled within an iteration", fix="Pickle it after update().")
        return dict(self.__dict__)
