"""The zoo's own layers: what wraps torch's, and the structural oddities that real training scripts contain."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


class Permute(nn.Module):
    """Reorders the axes, so that layers of different layouts can follow each other in a Sequential."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class First(nn.Module):
    """Keeps the first output of the wrapped module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        return self.inner(*args, **kwargs)[0]


class Residual(nn.Module):
    """`x + inner(x)`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Concatenate(nn.Module):
    """Runs every branch on the same input and joins the results along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], dim=1)


class Activations(nn.Module):
    """Every deterministic activation of torch.nn, each after its own slice of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.functions = nn.ModuleList(
            [
                nn.ELU(),
                nn.Hardshrink(0.1),
                nn.Hardsigmoid(),
                nn.Hardtanh(),
                nn.Hardswish(),
                nn.LeakyReLU(),
                nn.LogSigmoid(),
                nn.ReLU6(),
                nn.SELU(),
                nn.CELU(),
                nn.GELU(),
                nn.GELU(approximate="tanh"),
                nn.Sigmoid(),
                nn.SiLU(),
                nn.Mish(),
                nn.Softplus(),
                nn.Softshrink(0.1),
                nn.Softsign(),
                nn.Tanh(),
                nn.Tanhshrink(),
                nn.Threshold(0.1, 0.2),
                nn.Softmin(dim=-1),
                nn.Softmax(dim=-1),
                nn.LogSoftmax(dim=-1),
                nn.GLU(),
                nn.ReLU(inplace=True),
            ]
        )
        self.linear = nn.Linear(4, 4 * len(self.functions))

    def forward(self, x: Tensor) -> Tensor:
        slices = self.linear(x).chunk(len(self.functions), dim=-1)
        return torch.cat([f(part.clone()) for f, part in zip(self.functions, slices, strict=True)], dim=-1)


class Unpool(nn.Module):
    """Max pooling whose indices put the values back in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(self.conv(x)))


class GivenState(nn.Module):
    """A recurrent layer that starts from learnt initial states."""

    def __init__(self, rnn: nn.RNNBase, rows: int = 3) -> None:
        super().__init__()
        self.rnn = rnn
        layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
        hidden = rnn.proj_size or rnn.hidden_size
        self.h0 = nn.Parameter(torch.randn(layers, rows, hidden) * 0.3)
        self.c0 = nn.Parameter(torch.randn(layers, rows, rnn.hidden_size) * 0.3) if rnn.mode == "LSTM" else None

    def forward(self, x: Tensor) -> tuple[Tensor, object]:
        return self.rnn(x, self.h0 if self.c0 is None else (self.h0, self.c0))


class CellLoop(nn.Module):
    """A recurrent cell unrolled over a sequence `[time, batch, features]` (or `[time, features]`)."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        outputs = []
        for step in x.unbind(0):
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


class PackedClassifier(nn.Module):
    """Sequences of different lengths: packed inside the model, run through a recurrent layer, padded again."""

    def __init__(self, rnn: nn.RNNBase, enforce_sorted: bool) -> None:
        super().__init__()
        self.project = nn.Linear(3, 3)
        self.rnn = rnn
        self.enforce_sorted = enforce_sorted

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, object]:
        packed = pack_padded_sequence(self.project(x), lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        outputs, state = self.rnn(packed)
        return pad_packed_sequence(outputs, batch_first=True)[0], state


class PackedInput(nn.Module):
    """Takes a PackedSequence as its input."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, packed: PackedSequence) -> tuple[Tensor, object]:
        outputs, state = self.rnn(packed)
        return outputs.data, state


class MaskedAttention(nn.Module):
    """Self-attention with a causal mask and, where given, a padding mask; returns the weights too."""

    def __init__(self, average_weights: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.average_weights = average_weights

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.attention(
            x, x, x, attn_mask=causal, key_padding_mask=padding, average_attn_weights=self.average_weights
        )


class SelfAttention(nn.Module):
    """Self-attention without masks, with the given options of nn.MultiheadAttention."""

    def __init__(self, need_weights: bool = True, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, need_weights=self.need_weights)


class TiedLanguageModel(nn.Module):
    """Embedding and decoder are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.hidden = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 9, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embedding(tokens))))


class TiedAutoencoder(nn.Module):
    """The decoder is the transposed encoder; the encoder is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        once = F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)
        return F.linear(torch.tanh(self.encoder(once)), self.encoder.weight.t(), self.bias)


class NonPersistent(nn.Module):
    """A buffer that moves with the module but is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(4, 8), persistent=False)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.sin(x @ self.frequencies))


class RunningCentre(nn.Module):
    """Reassigns one buffer and updates two others in place, one of them an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(4))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        if self.training:
            self.centre = self.centre * 0.9 + 0.1 * hidden.detach().mean(0)
            self.spread.mul_(0.9).add_(0.1 * hidden.detach().std())
            self.steps += 1
        return (hidden - self.centre) / self.spread


class BuffersOnly(nn.Module):
    """A module without a single parameter: a fixed random projection that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(4, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.projection


class Colliding(nn.Module):
    """`a.b_c` and `a_b.c` become one name where dots turn into underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.b_c = nn.Parameter(torch.randn(4))
        self.a_b = nn.Module()
        self.a_b.c = nn.Parameter(torch.randn(4))
        self.a.register_buffer("x_y", torch.randn(4))
        self.a_x = nn.Module()
        self.a_x.register_buffer("y", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.a.b_c + self.a_x.y) * self.a_b.c + self.a.x_y


class Containers(nn.Module):
    """Parameters and modules in every container of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.shifts = nn.ParameterList([torch.randn(4) for _ in range(3)])
        self.scales = nn.ParameterDict({"in": torch.randn(4), "out": torch.randn(4)})
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.heads = nn.ModuleDict({"mean": nn.Linear(4, 2), "scale": nn.Linear(4, 2)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x * self.scales["in"]
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            x = torch.tanh(layer(x) + shift)
        return {name: head(x * self.scales["out"]) for name, head in self.heads.items()}


class ScalarParameter(nn.Module):
    """A learnt temperature without axes, beside a plain tensor attribute that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.linear = nn.Linear(4, 3)
        self.offsets = torch.linspace(-1.0, 1.0, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.temperature.exp() + self.offsets


class Pair(NamedTuple):
    """A named output."""

    logits: Tensor
    features: Tensor


class ManyOutputs(nn.Module):
    """A nest of tuple, dict, list, named tuple and an integer leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Pair, dict[str, list[Tensor]]]:
        features = torch.tanh(self.body(x))
        logits = self.head(features)
        return Pair(logits, features), {"classes": [logits.argmax(-1), logits.softmax(-1)]}


class ExtraInputs(nn.Module):
    """Positional, keyword and optional inputs, among them one that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.condition = nn.Linear(2, 3)

    def forward(
        self, x: Tensor, context: Tensor, *, gate: Tensor, power: int = 1, skip: Tensor | None = None
    ) -> Tensor:
        y = self.linear(x) * torch.sigmoid(gate) + self.condition(context) ** power
        return y if skip is None else y + skip


class KeywordOnly(nn.Module):
    """Called by keyword alone, as Hugging Face models are, with a nested input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, *, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = batch["mask"].unsqueeze(-1).to(self.linear.weight.dtype)
        pooled = (self.embedding(batch["tokens"]) * mask).sum(1) / mask.sum(1)
        return {"logits": self.linear(pooled)}


class FrozenPart(nn.Module):
    """A frozen sub-tree in front, one frozen parameter in the middle, a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU())
        self.backbone.requires_grad_(False)
        self.middle = nn.Linear(4, 4)
        self.middle.bias.requires_grad_(False)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.backbone(x).mean(-1))))


class NoGradPart(nn.Module):
    """One submodule runs under `torch.no_grad`, one output is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.teacher = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(self.encoder(x))
        hidden = self.encoder(x)
        return self.head(hidden) - target + hidden.detach()


class SharedSubmodule(nn.Module):
    """One block used three times, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.alias = self.block
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.block(self.block(x))))


class Positive(nn.Module):
    """A parametrization: keeps a weight positive."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


class Scaled(nn.Module):
    """A parametrization that has a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.8))
        self.register_buffer("offset", torch.tensor(0.1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain + self.offset


class ComplexFilter(nn.Module):
    """A learnt filter in the frequency domain: a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.view_as_complex(torch.randn(2, 5, 2)))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=8))


class MeanTeacher(nn.Module):
    """Keeps a moving average of its own weights in buffers, updated at every training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 3)
        self.register_buffer("average", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.average.lerp_(self.student.weight.detach(), 0.1)
        return self.student(x) - F.linear(x, self.average)


class LossInside(nn.Module):
    """Computes its own weighted loss, as some published models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.1)
        self.binary = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 0.5]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.linear(x)
        return self.criterion(logits, y) + self.binary(logits, F.one_hot(y, 3).to(logits.dtype))


class BranchOnValue(nn.Module):
    """Python control flow on a value that differs between models."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if y.sum() > 0 else y - 1


class BooleanSelection(nn.Module):
    """The size of an intermediate result depends on the values of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y[y > 0].square().sum() + y.sum()


class RecordsItem(nn.Module):
    """Logs a number with `.item()` while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.last = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.last = y.mean().item()
        return y
