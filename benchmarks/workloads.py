"""What is trained: models, data and learning rates, the same in every process that asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload(ABC):
    """Classifiers trained with Adam and cross entropy on shared batches.

    Attributes:
        num_models: How many models are trained at once.
        classes: Width of the output.
        batch: Rows in a batch.
        lowest_rate: Learning rate of the first model.
        highest_rate: Learning rate of the last; those between are spaced evenly in the logarithm.
        dtype: Name of the dtype of weights and inputs.
        device: Where PyTorch has weights and batches.
        num_batches: Step `k` gets batch `k % num_batches`.
    """

    num_models: int = 64
    classes: int = 10
    batch: int = 64
    lowest_rate: float = 1e-3
    highest_rate: float = 1e-3
    dtype: str = "float32"
    device: str = "cpu"
    num_batches: int = 32

    @property
    @abstractmethod
    def kind(self) -> str:
        """What one model is."""

    @property
    @abstractmethod
    def shape(self) -> str:
        """The sizes of a model."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Of one row."""

    @abstractmethod
    def _model(self) -> nn.Sequential: ...

    def __str__(self) -> str:
        count = f"one {self.kind}" if self.num_models == 1 else f"{self.num_models} {self.kind}s"
        rates = f"learning rate {self.lowest_rate:g}"
        if self.highest_rate != self.lowest_rate:
            rates = f"learning rates {self.lowest_rate:g} to {self.highest_rate:g}"
        return f"{count} {self.shape}, batch {self.batch}, Adam, {rates}"

    @property
    def learning_rates(self) -> list[float]:
        """One per model."""
        last = max(self.num_models - 1, 1)
        growth = self.highest_rate / self.lowest_rate
        return [self.lowest_rate * growth ** (model / last) for model in range(self.num_models)]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and inputs."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def models(self) -> list[nn.Sequential]:
        """The untrained models; the same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [self._model().to(self.device, self.torch_dtype) for _ in range(self.num_models)]

    def batches(self) -> list[Batch]:
        """Inputs `[batch, *input_shape]` and labels `[batch]` by a random linear teacher, so that losses fall."""
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(torch.Size(self.input_shape).numel(), self.classes, generator=generator)
        batches = []
        for _ in range(self.num_batches):
            inputs = torch.randn(self.batch, *self.input_shape, generator=generator)
            targets = (inputs.flatten(1) @ teacher).argmax(1)
            batches.append((inputs.to(self.device, self.torch_dtype), targets.to(self.device)))
        return batches

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the parameters of all models together."""
        with torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in self._model().parameters())
        return self.num_models * numbers * self.torch_dtype.itemsize


@dataclass(frozen=True)
class MLPs(Workload):
    """Linear-ReLU-Linear classifiers.

    Attributes:
        features: Width of the input.
        hidden: Width of the hidden layer.
    """

    features: int = 64
    hidden: int = 128

    @property
    def kind(self) -> str:
        return "MLP"

    @property
    def shape(self) -> str:
        return f"{self.features}-{self.hidden}-{self.classes}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.features,)

    def _model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.classes))


@dataclass(frozen=True)
class CNNs(Workload):
    """Twice a 3x3 convolution, ReLU and 2x2 max pooling, then a linear layer; for square images of one channel.

    Attributes:
        side: Height and width of an image, a multiple of four.
        channels: Channels after the first convolution and after the second.
    """

    side: int = 8
    channels: tuple[int, int] = (8, 16)

    @property
    def kind(self) -> str:
        return "CNN"

    @property
    def shape(self) -> str:
        first, second = self.channels
        return f"1-{first}-{second}-{self.classes}, two 3x3 convolutions on {self.side}x{self.side}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.side, self.side)

    def _model(self) -> nn.Sequential:
        first, second = self.channels
        return nn.Sequential(
            *(nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(second * (self.side // 4) ** 2, self.classes)),
        )
