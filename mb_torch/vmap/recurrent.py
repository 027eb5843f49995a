"""Recurrent layers in operations that vmap can batch; torch's own kernels for them have no batching rule.

The product with the inputs is taken for the whole sequence at once; only the recurrent part runs step by step. A
padded batch is treated as a packed one whose steps all have the same number of rows.

Source of the equations: https://docs.pytorch.org/docs/stable/nn.html#recurrent-layers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mb_torch.errors import InvalidInput
from mb_torch.vmap.functorch_state import each_alone, mapped_models, under_vmap

State = tuple[Tensor, ...]
"""What a layer carries from step to step: ``(h,)``, or ``(h, c)`` for an LSTM."""


def _add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first + second


def _lstm_step(gates: Tensor, state: State, projection: Tensor | None) -> State:
    in_gate, forget_gate, candidate, out_gate = gates.chunk(4, dim=-1)
    cell = torch.sigmoid(forget_gate) * state[1] + torch.sigmoid(in_gate) * torch.tanh(candidate)
    hidden = torch.sigmoid(out_gate) * torch.tanh(cell)
    return (hidden if projection is None else F.linear(hidden, projection)), cell


def _gru_step(from_input: Tensor, from_hidden: Tensor, hidden: Tensor) -> Tensor:
    size = hidden.shape[-1]
    gates = torch.sigmoid(from_input[..., : 2 * size] + from_hidden[..., : 2 * size])
    reset, update = gates.chunk(2, dim=-1)
    candidate = torch.tanh(from_input[..., 2 * size :] + reset * from_hidden[..., 2 * size :])
    return candidate + update * (hidden - candidate)


def _read_weights(module: nn.RNNBase) -> dict[str, Tensor]:
    """The weights by name, those computed by a parametrization included."""
    names = module._flat_weights_names
    computed = [name for name in names if name not in module._parameters]
    if computed:
        # torch asks whether weights have changed, up to the first that has, before it reads them all, both times with
        # hasattr first. It matters where each look has an effect: spectral_norm iterates at every one.
        _ = hasattr(module, computed[0]), getattr(module, computed[0], None)
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


class _Direction:
    """One direction of one layer: its weights, and what they do at one step."""

    def __init__(self, module: nn.RNNBase, weights: dict[str, Tensor], layer: int, reverse: bool) -> None:
        suffix = f"_l{layer}" + ("_reverse" if reverse else "")
        self.weight_input = weights["weight_ih" + suffix]
        self.weight_hidden = weights["weight_hh" + suffix]
        self.bias_input = weights.get("bias_ih" + suffix)
        self.bias_hidden = weights.get("bias_hh" + suffix)
        self.projection = weights.get("weight_hr" + suffix)
        self.mode = module.mode
        self.reverse = reverse

    def project(self, rows: Tensor) -> Tensor:
        """The product with the inputs, for all steps: ``[rows, gates]``."""
        # A GRU applies its reset gate to the hidden bias as well, so only there the biases stay apart.
        bias = self.bias_input if self.mode == "GRU" else _add(self.bias_input, self.bias_hidden)
        return F.linear(rows, self.weight_input, bias)

    def step(self, projected: Tensor, state: State) -> State:
        """One step for the rows that still run."""
        hidden = state[0]
        if self.mode == "GRU":
            return (_gru_step(projected, F.linear(hidden, self.weight_hidden, self.bias_hidden), hidden),)
        gates = projected + F.linear(hidden, self.weight_hidden)
        if self.mode == "LSTM":
            return _lstm_step(gates, state, self.projection)
        return (torch.tanh(gates) if self.mode == "RNN_TANH" else torch.relu(gates),)

    def run(self, rows: Tensor, sizes: Sequence[int], start: State) -> tuple[Tensor, State]:
        """Run over a packed sequence.

        Args:
            rows: ``[sum(sizes), features]``, step after step.
            sizes: Rows that run at each step; never more than at the step before.
            start: The initial state, ``[sizes[0], hidden]`` each.

        Returns:
            The hidden values ``[sum(sizes), hidden]`` and the state in which each row ended.
        """
        steps = self.project(rows).split(list(sizes))
        order = range(len(sizes) - 1, -1, -1) if self.reverse else range(len(sizes))
        hidden_values: list[Tensor] = [rows] * len(sizes)
        state = tuple(part[: sizes[order[0]]] for part in start)
        ended: list[State] = []
        running = sizes[order[0]]
        for index in order:
            size = sizes[index]
            if size > running:
                state = tuple(torch.cat([part, first[running:size]]) for part, first in zip(state, start, strict=True))
            elif size < running:
                ended.append(tuple(part[size:] for part in state))
                state = tuple(part[:size] for part in state)
            running = size
            state = self.step(steps[index], state)
            hidden_values[index] = state[0]
        if ended:
            # The rows that ended last come first: rows are sorted by length.
            pieces = [state, *reversed(ended)]
            state = tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))
        return torch.cat(hidden_values), state


def _run_layers(module: nn.RNNBase, rows: Tensor, sizes: Sequence[int], start: State) -> tuple[Tensor, State]:
    """Run all layers and directions over a packed sequence; states are ``[layers * directions, rows, hidden]``."""
    weights = _read_weights(module)
    directions = 2 if module.bidirectional else 1
    ends: list[State] = []
    for layer in range(module.num_layers):
        if layer > 0:
            rows = F.dropout(rows, module.dropout, module.training)
        results = []
        for direction in range(directions):
            first = tuple(part[layer * directions + direction] for part in start)
            hidden, end = _Direction(module, weights, layer, reverse=direction == 1).run(rows, sizes, first)
            results.append(hidden)
            ends.append(end)
        rows = torch.cat(results, dim=-1) if directions == 2 else results[0]
    return rows, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))


def _zero_state(module: nn.RNNBase, rows: int, like: Tensor) -> State:
    slots = module.num_layers * (2 if module.bidirectional else 1)
    hidden = torch.zeros(slots, rows, module.proj_size or module.hidden_size, dtype=like.dtype, device=like.device)
    if module.mode != "LSTM":
        return (hidden,)
    return hidden, torch.zeros(slots, rows, module.hidden_size, dtype=like.dtype, device=like.device)


def _to_hx(module: nn.RNNBase, state: State) -> Any:
    """A state in the form that the layer takes and returns: a pair for an LSTM, else one tensor."""
    return state if module.mode == "LSTM" else state[0]


def _recur(module: nn.RNNBase, sequence: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
    """What ``module(sequence, hx)`` returns."""
    if isinstance(sequence, PackedSequence):
        rows, batch_sizes, sorted_indices, unsorted_indices = sequence
        sizes = batch_sizes.tolist()
        given = None if hx is None else module.permute_hidden(hx, sorted_indices)
        start = _start(module, rows, batch_sizes, given, sizes[0])
        hidden, end = _run_layers(module, rows, sizes, start)
        ends = module.permute_hidden(_to_hx(module, end), unsorted_indices)
        return PackedSequence(hidden, batch_sizes, sorted_indices, unsorted_indices), ends
    if sequence.dim() == 2:
        return _recur_one_row(module, sequence, hx)
    if sequence.dim() != 3:
        raise InvalidInput(
            f"input of {type(module).__name__}",
            received=f"{sequence.dim()} axes",
            expected="2 or 3 ([time, batch, features], or batch first if the layer says so)",
        )
    steps, count = (1, 0) if module.batch_first else (0, 1)
    start = _start(module, sequence, None, hx, sequence.shape[count])
    if _own_kernel_is_faster(module, sequence, sequence.shape[count]):
        return _run_own_kernel(module, sequence, start)
    time_major = sequence.transpose(0, 1) if module.batch_first else sequence
    hidden, end = _run_layers(module, time_major.flatten(0, 1), [sequence.shape[count]] * sequence.shape[steps], start)
    hidden = hidden.unflatten(0, (sequence.shape[steps], sequence.shape[count]))
    return (hidden.transpose(0, 1) if module.batch_first else hidden), _to_hx(module, end)


def _recur_one_row(module: nn.RNNBase, sequence: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """A sequence ``[time, features]`` without a batch axis, with states ``[layers * directions, hidden]``."""
    row_axis = 0 if module.batch_first else 1
    if hx is not None:
        hx = tuple(part.unsqueeze(1) for part in hx) if module.mode == "LSTM" else hx.unsqueeze(1)
    hidden, end = _recur(module, sequence.unsqueeze(row_axis), hx)
    end = tuple(part.squeeze(1) for part in end) if module.mode == "LSTM" else end.squeeze(1)
    return hidden.squeeze(row_axis), end


def _start(module: nn.RNNBase, sequence: Tensor, batch_sizes: Tensor | None, hx: Any, rows: int) -> State:
    """The initial state, zeros unless given, after torch's own checks of input and state."""
    if hx is None:
        start = _zero_state(module, rows, sequence)
        module.check_forward_args(sequence, _to_hx(module, start), batch_sizes)
        return start
    module.check_forward_args(sequence, hx, batch_sizes)
    return tuple(hx) if module.mode == "LSTM" else (hx,)


_FEW_MODELS = 8
_MUCH_WORK = 1024


def _own_kernel_is_faster(module: nn.RNNBase, sequence: Tensor, rows: int) -> bool:
    """Whether oneDNN's fused LSTM for one model after another beats the steps of all models together.

    Measured on a CPU: for few models the steps cost more calls than they save, and where a step of one model fills
    the cache (rows times hidden size) the fused kernel is up to three times as fast. torch has no such kernel for
    the other layers, other dtypes, projections and other devices.
    """
    if torch.compiler.is_compiling() or module.mode != "LSTM" or module.proj_size > 0:
        return False
    if sequence.device.type != "cpu" or sequence.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    if module.training and module.dropout > 0.0 and module.num_layers > 1:
        # The kernel would draw the masks out of reach of the models' random streams.
        return False
    models = mapped_models()
    return models is not None and (models <= _FEW_MODELS or rows * module.hidden_size >= _MUCH_WORK)


def _run_own_kernel(module: nn.RNNBase, sequence: Tensor, start: State) -> tuple[Tensor, State]:
    """What an LSTM returns, by torch's own kernel for each model."""

    def run(sequence: Tensor, hidden: Tensor, cell: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return torch.lstm(
            sequence,
            (hidden, cell),
            weights,
            module.bias,
            module.num_layers,
            0.0,
            module.training,
            module.bidirectional,
            module.batch_first,
        )

    output, hidden, cell = each_alone(run, [sequence, *start, *_read_weights(module).values()])
    return output, (hidden, cell)


def _in_steps(module: nn.RNNBase) -> bool:
    """Whether to leave torch's kernels: under vmap, and where their dropout would bypass the model's random stream."""
    return under_vmap() or (module.training and module.dropout > 0.0 and module.num_layers > 1)


class BatchableLSTM(nn.LSTM):
    """`torch.nn.LSTM` that also runs under vmap."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over a sequence; as in `torch.nn.LSTM`."""
        return _recur(self, input, hx) if _in_steps(self) else super().forward(input, hx)


class BatchableGRU(nn.GRU):
    """`torch.nn.GRU` that also runs under vmap."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over a sequence; as in `torch.nn.GRU`."""
        return _recur(self, input, hx) if _in_steps(self) else super().forward(input, hx)


class BatchableRNN(nn.RNN):
    """`torch.nn.RNN` that also runs under vmap."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over a sequence; as in `torch.nn.RNN`."""
        return _recur(self, input, hx) if _in_steps(self) else super().forward(input, hx)


def _cell_state(cell: nn.RNNCellBase, input: Tensor, state: Tensor | None) -> Tensor:
    """The previous hidden values, zeros unless given; refuses what would only fit by broadcasting."""
    expected = (*input.shape[:-1], cell.hidden_size)
    if state is None:
        return torch.zeros(expected, dtype=input.dtype, device=input.device)
    if input.dim() not in (1, 2) or state.shape != expected:
        raise InvalidInput(
            f"{type(cell).__name__}: input of shape {tuple(input.shape)} with a state",
            received=f"a state of shape {tuple(state.shape)}",
            expected=f"[batch, features] or [features], and a state of shape {expected}",
        )
    return state


class BatchableLSTMCell(nn.LSTMCell):
    """`torch.nn.LSTMCell` that also runs under vmap."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Run one step; as in `torch.nn.LSTMCell`."""
        if not under_vmap():
            return super().forward(input, hx)
        hidden, cell = (_cell_state(self, input, part) for part in (hx or (None, None)))
        gates = F.linear(input, self.weight_ih, _add(self.bias_ih, self.bias_hh))
        new_hidden, new_cell = _lstm_step(gates + F.linear(hidden, self.weight_hh), (hidden, cell), None)
        return new_hidden, new_cell


class BatchableGRUCell(nn.GRUCell):
    """`torch.nn.GRUCell` that also runs under vmap."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step; as in `torch.nn.GRUCell`."""
        if not under_vmap():
            return super().forward(input, hx)
        hidden = _cell_state(self, input, hx)
        from_input = F.linear(input, self.weight_ih, self.bias_ih)
        return _gru_step(from_input, F.linear(hidden, self.weight_hh, self.bias_hh), hidden)


class BatchableRNNCell(nn.RNNCell):
    """`torch.nn.RNNCell` that also runs under vmap."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Run one step; as in `torch.nn.RNNCell`."""
        if not under_vmap():
            return super().forward(input, hx)
        gates = F.linear(input, self.weight_ih, _add(self.bias_ih, self.bias_hh))
        gates = gates + F.linear(_cell_state(self, input, hx), self.weight_hh)
        return torch.tanh(gates) if self.nonlinearity == "tanh" else torch.relu(gates)
