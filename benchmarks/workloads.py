"""What is trained: models, data and learning rates, the same in every process that asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.networks import RecurrentClassifier, ResNet18, SequenceClassifier
from benchmarks.recipes import RECIPES, Recipe

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload(ABC):
    """Classifiers trained with cross entropy.

    Attributes:
        num_models: How many models are trained at once.
        classes: Width of the output.
        batch: Rows in a batch.
        lowest_rate: Learning rate of the first model.
        highest_rate: Learning rate of the last; those between are spaced evenly in the logarithm.
        dtype: Name of the dtype of weights and inputs.
        device: Where PyTorch has weights and batches.
        num_batches: Step `k` gets batch `k % num_batches`.
        optimizer: A key of `RECIPES`.
        shared_input: Whether all models get the same batch; otherwise each has its own.
    """

    num_models: int = 64
    classes: int = 10
    batch: int = 64
    lowest_rate: float = 1e-3
    highest_rate: float = 1e-3
    dtype: str = "float32"
    device: str = "cpu"
    num_batches: int = 32
    optimizer: str = "Adam"
    shared_input: bool = True

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
    def _model(self) -> nn.Module: ...

    def __str__(self) -> str:
        count = f"one {self.kind}" if self.num_models == 1 else f"{self.num_models} {self.kind}s"
        rates = f"learning rate {self.lowest_rate:g}"
        if self.highest_rate != self.lowest_rate:
            rates = f"learning rates {self.lowest_rate:g} to {self.highest_rate:g}"
        rows = f"batch {self.batch}" if self.shared_input else f"batch {self.batch} of its own for each"
        return f"{count} {self.shape}, {rows}, {self.optimizer}, {rates}"

    @property
    def recipe(self) -> Recipe:
        """The optimizer."""
        return RECIPES[self.optimizer]

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

    def models(self) -> list[nn.Module]:
        """The untrained models; the same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return [self._model().to(self.device, self.torch_dtype) for _ in range(self.num_models)]

    def written_out(self) -> nn.Module:
        """A model with the same names and results whose operations `torch.func.vmap` can batch; without weights."""
        with torch.device("meta"):
            return self._model()

    def batches(self) -> list[Batch]:
        """Inputs `[batch, *input_shape]` and labels `[batch]` by a random linear teacher, so that losses fall.

        Both have a first axis `num_models` unless inputs are shared.
        """
        generator = torch.Generator().manual_seed(1)
        teacher = torch.randn(torch.Size(self.input_shape).numel(), self.classes, generator=generator)
        leading = (self.batch,) if self.shared_input else (self.num_models, self.batch)
        batches = []
        for _ in range(self.num_batches):
            inputs = torch.randn(*leading, *self.input_shape, generator=generator)
            targets = (inputs.flatten(len(leading)) @ teacher).argmax(-1)
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
        batch_norm: Whether BatchNorm follows each convolution.
    """

    side: int = 8
    channels: tuple[int, int] = (8, 16)
    batch_norm: bool = False

    @property
    def kind(self) -> str:
        return "BatchNorm CNN" if self.batch_norm else "CNN"

    @property
    def shape(self) -> str:
        first, second = self.channels
        return f"1-{first}-{second}-{self.classes}, two 3x3 convolutions on {self.side}x{self.side}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (1, self.side, self.side)

    def _model(self) -> nn.Sequential:
        first, second = self.channels
        layers: list[nn.Module] = []
        for before, after in ((1, first), (first, second)):
            layers.append(nn.Conv2d(before, after, 3, padding=1))
            if self.batch_norm:
                layers.append(nn.BatchNorm2d(after))
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(second * (self.side // 4) ** 2, self.classes))


@dataclass(frozen=True)
class Transformers(Workload):
    """Small transformer encoders with a linear layer on the mean over positions.

    Attributes:
        length: Positions of a sequence.
        width: Features of a position.
        heads: Heads of attention.
        hidden: Width of the feed-forward layers.
        layers: How many encoder layers.
    """

    length: int = 16
    width: int = 32
    heads: int = 4
    hidden: int = 64
    layers: int = 2

    @property
    def kind(self) -> str:
        return "transformer encoder"

    @property
    def shape(self) -> str:
        return f"of {self.layers} layers, width {self.width}, {self.heads} heads, {self.length} positions"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.length, self.width)

    def _model(self) -> nn.Module:
        return SequenceClassifier(self.width, self.heads, self.hidden, self.layers, self.classes)


@dataclass(frozen=True)
class LSTMs(Workload):
    """An LSTM with a linear layer on its last output.

    Attributes:
        length: Positions of a sequence.
        features: Features of a position.
        hidden: Width of the state.
    """

    length: int = 16
    features: int = 16
    hidden: int = 32

    @property
    def kind(self) -> str:
        return "LSTM"

    @property
    def shape(self) -> str:
        return f"{self.features}-{self.hidden}-{self.classes}, {self.length} positions"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.length, self.features)

    def _model(self) -> nn.Module:
        return RecurrentClassifier(self.features, self.hidden, self.classes)

    def written_out(self) -> nn.Module:
        with torch.device("meta"):
            return RecurrentClassifier(self.features, self.hidden, self.classes, unrolled=True)


@dataclass(frozen=True)
class ResNets(Workload):
    """ResNet-18 for small colour images, after the workload of HFTA (Wang et al., 2021, arXiv:2102.02344).

    Attributes:
        side: Height and width of an image.
        width: Channels of the first stage.
    """

    side: int = 32
    width: int = 64

    @property
    def kind(self) -> str:
        return "ResNet-18"

    @property
    def shape(self) -> str:
        return f"of width {self.width} on {self.side}x{self.side}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (3, self.side, self.side)

    def _model(self) -> nn.Module:
        return ResNet18(self.width, self.classes)
