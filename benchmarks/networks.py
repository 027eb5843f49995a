"""The networks that are trained and are more than a row of PyTorch's layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class SequenceClassifier(nn.Module):
    """A transformer encoder, the mean over positions, a linear layer; inputs `[batch, length, width]`.

    Args:
        width: Features of a position.
        heads: Heads of attention.
        hidden: Width of the feed-forward layers.
        layers: How many encoder layers.
        classes: Width of the output.
    """

    def __init__(self, width: int, heads: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        # No dropout: who draws other random numbers could not be compared.
        layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(inputs).mean(1))
        return logits


class RecurrentClassifier(nn.Module):
    """An LSTM and a linear layer on its last output; inputs `[batch, length, features]`.

    Args:
        features: Features of a position.
        hidden: Width of the state.
        classes: Width of the output.
        unrolled: Whether the recurrence is written out in elementary operations, which `torch.func.vmap` can batch;
            it cannot batch PyTorch's own.
    """

    def __init__(self, features: int, hidden: int, classes: int, *, unrolled: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)
        self.unrolled = unrolled

    def forward(self, inputs: Tensor) -> Tensor:
        last = self._unroll(inputs) if self.unrolled else self.lstm(inputs)[0][:, -1]
        logits: Tensor = self.head(last)
        return logits

    def _unroll(self, inputs: Tensor) -> Tensor:
        # Looked up by name: modules have parameters as attributes that type checkers know nothing of.
        weights = dict(self.lstm.named_parameters())
        bias = weights["bias_ih_l0"] + weights["bias_hh_l0"]
        from_inputs = nn.functional.linear(inputs, weights["weight_ih_l0"], bias)
        state = cell = inputs.new_zeros(inputs.shape[0], self.lstm.hidden_size)
        for position in from_inputs.unbind(1):
            gates = position + state @ weights["weight_hh_l0"].T
            entering, forgetting, candidate, leaving = gates.chunk(4, 1)
            cell = torch.sigmoid(forgetting) * cell + torch.sigmoid(entering) * torch.tanh(candidate)
            state = torch.sigmoid(leaving) * torch.tanh(cell)
        return state


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a short cut around them; inputs `[batch, channels, height, width]`.

    Args:
        before: Channels of the input.
        after: Channels of the output.
        stride: Of the first convolution.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.projected = stride != 1 or before != after
        if self.projected:
            self.conv3 = nn.Conv2d(before, after, 1, stride, bias=False)
            self.bn3 = nn.BatchNorm2d(after)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(inputs)))
        short_cut = self.bn3(self.conv3(inputs)) if self.projected else inputs
        return torch.relu(self.bn2(self.conv2(hidden)) + short_cut)


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images (He et al., 2016, arXiv:1512.03385, with a 3x3 convolution at the entrance).

    Args:
        width: Channels of the first stage; doubled in each of the three others. The paper has 64.
        classes: Width of the output.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = []
        for stage, (before, after) in enumerate(pairwise(channels)):
            blocks += [Residual(before, after, 1 if stage == 0 else 2), Residual(after, after, 1)]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(inputs)))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits
