"""What is trained: models, data and learning rates, the same in every process that asks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class MLPs:
    """Linear-ReLU-Linear classifiers trained with Adam and cross entropy on shared batches.

    Attributes:
        num_models: How many models are trained at once.
        features: Width of the input.
        hidden: Width of the hidden layer.
        classes: Width of the output.
        batch: Rows in a batch.
        lowest_rate: Learning rate of the first model.
        highest_rate: Learning rate of the last; those between are spaced evenly in the logarithm.
        dtype: Name of the dtype of weights and inputs.
        num_batches: Step `k` gets batch `k % num_batches`.
    """

    num_models: int = 64
    features: int = 64
    hidden: int = 128
    classes: int = 10
    batch: int = 64
    lowest_rate: float = 1e-3
    highest_rate: float = 1e-3
    dtype: str = "float32"
    num_batches: int = 32

    def __str__(self) -> str:
        count = "one MLP" if self.num_models == 1 else f"{self.num_models} MLPs"
        rates = f"learning rate {self.lowest_rate:g}"
        if self.highest_rate != self.lowest_rate:
            rates = f"learning rates {self.lowest_rate:g} to {self.highest_rate:g}"
        return f"{count} {self.features}-{self.hidden}-{self.classes}, batch {self.batch}, Adam, {rates}"

    @property
    def learning_rates(self) -> list[float]:
        """One per model."""
        last = max(self.num_models - 1, 1)
        growth = self.highest_rate / self.lowest_rate
        return [self.lowest_rate * growth ** (model / last) for model in range(self.num_models)]

    def models(self) -> list[nn.Module]:
        """The untrained models; the same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [self._model() for _ in range(self.num_models)]

    def _model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(self.features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.classes))
        return model.to(getattr(torch, self.dtype))

    def batches(self) -> list[Batch]:
        """Inputs `[batch, features]` and labels `[batch]` by a random linear teacher, so that losses fall."""
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(self.features, self.classes, generator=generator)
        batches = []
        for _ in range(self.num_batches):
            inputs = torch.randn(self.batch, self.features, generator=generator)
            batches.append((inputs.to(getattr(torch, self.dtype)), (inputs @ teacher).argmax(1)))
        return batches

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters of all models together."""
        numbers = (self.features + 1) * self.hidden + (self.hidden + 1) * self.classes
        dtype: torch.dtype = getattr(torch, self.dtype)
        return self.num_models * numbers * dtype.itemsize
