"""The optimizers of the workloads: PyTorch's classes, and the same updates written out for stacked parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Stacks = dict[str, Tensor]

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # the defaults of torch.optim.Adam


class Update(ABC):
    """An update of stacked parameters `[num_models, ...]` with a learning rate per model, written out in place.

    Args:
        params: The stacked parameters.
        rates: Learning rates `[num_models]`.
        options: Of the optimizer.
    """

    def __init__(self, params: Stacks, rates: Tensor, options: Mapping[str, float]) -> None:
        self.params = params
        self.rates = {name: rates.view(-1, *[1] * (p.dim() - 1)) for name, p in params.items()}
        self.options = options

    def next_numbers(self) -> tuple[float, ...]:
        """Count a step; the numbers that differ between steps, in the order in which `apply` takes them."""
        return ()

    @abstractmethod
    def apply(self, gradients: Stacks, *numbers: float) -> None:
        """Update with Python's numbers, step by step: every operation is one kernel."""

    @abstractmethod
    def apply_traced(self, gradients: Stacks, *numbers: Tensor) -> None:
        """Update with numbers in tensors, for a compiler that fuses operations."""


class Adam(Update):
    """Adam, and AdamW where `weight_decay` is an option."""

    def __init__(self, params: Stacks, rates: Tensor, options: Mapping[str, float]) -> None:
        super().__init__(params, rates, options)
        self.first = {name: torch.zeros_like(p) for name, p in params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in params.items()}
        self.steps = 0
        decay = options.get("weight_decay", 0.0)
        self.kept = {name: 1 - rate * decay for name, rate in self.rates.items()} if decay else {}

    def next_numbers(self) -> tuple[float, ...]:
        self.steps += 1
        return 1 - BETA1**self.steps, (1 - BETA2**self.steps) ** 0.5

    def apply(self, gradients: Stacks, *numbers: float) -> None:
        correction1, correction2 = numbers
        for name, param in self.params.items():
            gradient, first, second = gradients[name], self.first[name], self.second[name]
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            scale = second.sqrt().div_(correction2).add_(EPS)
            direction = torch.div(first, scale, out=scale)
            if self.kept:
                param.mul_(self.kept[name])
            param.addcmul_(direction, self.rates[name], value=-1 / correction1)

    def apply_traced(self, gradients: Stacks, *numbers: Tensor) -> None:
        correction1, correction2 = numbers
        for name, param in self.params.items():
            gradient, first, second = gradients[name], self.first[name], self.second[name]
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            if self.kept:
                param.mul_(self.kept[name])
            size = self.rates[name] / correction1
            param.sub_(size * first / (second.sqrt() / correction2 + EPS))


class Momentum(Update):
    """SGD with momentum."""

    def __init__(self, params: Stacks, rates: Tensor, options: Mapping[str, float]) -> None:
        super().__init__(params, rates, options)
        self.velocities = {name: torch.zeros_like(p) for name, p in params.items()}

    def apply(self, gradients: Stacks, *numbers: float) -> None:
        for name, param in self.params.items():
            velocity = self.velocities[name].mul_(self.options["momentum"]).add_(gradients[name])
            param.addcmul_(velocity, self.rates[name], value=-1)

    def apply_traced(self, gradients: Stacks, *numbers: Tensor) -> None:
        self.apply(gradients)


@dataclass(frozen=True)
class Recipe:
    """An optimizer.

    Attributes:
        optimizer: Of PyTorch.
        update: The same, written out.
        options: Besides the learning rate; all others are PyTorch's defaults.
        state_copies: Numbers of state that the optimizer keeps for each parameter.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    update: type[Update]
    options: Mapping[str, float]
    state_copies: int

    def on_optax(self) -> Any:
        """Optax's transformation to directions; the learning rate is still to be multiplied."""
        import optax

        if self.update is Momentum:
            return optax.trace(decay=self.options["momentum"])
        adam = optax.scale_by_adam(b1=BETA1, b2=BETA2, eps=EPS)
        decay = self.options.get("weight_decay")
        return adam if decay is None else optax.chain(adam, optax.add_decayed_weights(decay))


RECIPES = {
    "Adam": Recipe(torch.optim.Adam, Adam, {}, 2),
    "AdamW": Recipe(torch.optim.AdamW, Adam, {"weight_decay": 1e-2}, 2),
    "SGD with momentum": Recipe(torch.optim.SGD, Momentum, {"momentum": 0.9}, 1),
}
