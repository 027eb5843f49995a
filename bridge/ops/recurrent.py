"""LSTM, GRU and plain recurrent layers as one operation for all time steps and layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from torch import Tensor

from bridge.ops.registry import Operation, lowers

_ARGUMENTS = (
    "Tensor input, Tensor[] states, Tensor[] weights, str cell, bool has_biases, int num_layers, float dropout, "
    "bool bidirectional, bool batch_first, int[]? lengths=None"
)
_LIBRARY = torch.library.Library("bridge", "FRAGMENT")
_LIBRARY.define(f"recurrent({_ARGUMENTS}) -> Tensor[]")
_LIBRARY.define(f"recurrent_dropout({_ARGUMENTS}) -> Tensor[]", tags=(torch.Tag.nondeterministic_seeded,))

recurrent = torch.ops.bridge.recurrent.default
recurrent_dropout = torch.ops.bridge.recurrent_dropout.default


def _results(
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    cell: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    lengths: Sequence[int] | None = None,
) -> list[Tensor]:
    """Tensors like the results, without values: the outputs of all steps and the last states."""
    features = states[0].shape[-1] * (2 if bidirectional else 1)
    return [input.new_empty(*input.shape[:2], features), *(state.new_empty(state.shape) for state in states)]


def _no_backward(*_: Any) -> Any:
    raise AssertionError("only recorded, never run in PyTorch")


for _name in ("bridge::recurrent", "bridge::recurrent_dropout"):
    torch.library.register_fake(_name, _results, lib=_LIBRARY)
    # So that results require gradients where PyTorch's would; JAX differentiates the lowering.
    torch.library.register_autograd(_name, _no_backward, lib=_LIBRARY)


def record(cell: str, arguments: Sequence[Any], lengths: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Record ``torch.lstm(*arguments)`` and its like as one operation.

    Args:
        cell: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        arguments: As for the form of the torch function that takes no packed sequences.
        lengths: How long each sequence is; None if they all have all steps.

    Returns:
        The outputs of all steps, then the last states.
    """
    input, states, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first = arguments
    states = list(states) if isinstance(states, (tuple, list)) else [states]
    draws = train and dropout > 0 and num_layers > 1
    operation = recurrent_dropout if draws else recurrent
    results = operation(
        input, states, list(weights), cell, has_biases, num_layers, float(dropout), bidirectional, batch_first, lengths
    )
    return tuple(results)


@lowers(recurrent, recurrent_dropout)
def lower_recurrent(
    operation: Operation,
    input: jax.Array,
    states: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    cell: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
    lengths: Sequence[int] | None = None,
) -> list[jax.Array]:
    """Run all layers; the products with the inputs are one matrix multiplication for all steps.

    Where lengths of the sequences are given, each starts and ends with itself: a state changes within them only, and
    the outputs after them mean nothing.
    """
    remaining = iter(weights)
    projected = cell == "lstm" and states[0].shape[-1] != states[1].shape[-1]
    directions = 2 if bidirectional else 1
    sequence = input.swapaxes(0, 1) if batch_first else input
    within = None if lengths is None else jnp.arange(len(sequence))[:, None, None] < jnp.array(lengths)[:, None]
    last: list[list[jax.Array]] = []
    for layer in range(num_layers):
        if layer > 0 and operation.key is not None:
            sequence = _dropout(jax.random.fold_in(operation.key, layer), sequence, dropout)
        outputs = []
        for direction in range(directions):
            initial = [state[layer * directions + direction] for state in states]
            own = _take(remaining, has_biases, projected)
            output, final = _one_direction(cell, sequence, initial, own, within, backwards=direction == 1)
            outputs.append(output)
            last.append(final)
        sequence = jnp.concatenate(outputs, -1)
    finals = [jnp.stack(final) for final in zip(*last, strict=True)]
    return [sequence.swapaxes(0, 1) if batch_first else sequence, *finals]


_Weights = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, jax.Array | None]
_Step = Callable[[list[jax.Array], jax.Array], list[jax.Array]]


def _take(remaining: Iterator[jax.Array], has_biases: bool, projected: bool) -> _Weights:
    """The weights of one layer and direction: two matrices, two biases, a projection."""
    of_input, of_state = next(remaining), next(remaining)
    biases = (next(remaining), next(remaining)) if has_biases else (None, None)
    return of_input, of_state, *biases, next(remaining) if projected else None


def _dropout(key: jax.Array, array: jax.Array, p: float) -> jax.Array:
    kept = jax.random.uniform(key, array.shape, array.dtype) >= p
    return jnp.where(kept, array / (1 - p) if p < 1 else 0, jnp.zeros_like(array))


def _one_direction(
    cell: str,
    sequence: jax.Array,
    initial: list[jax.Array],
    weights: _Weights,
    within: jax.Array | None,
    backwards: bool,
) -> tuple[jax.Array, list[jax.Array]]:
    """The outputs ``[T, N, features]`` of one layer in one direction, and its last states.

    States change where ``within`` ``[T, N, 1]`` is true.
    """
    of_input, _, input_bias, _, _ = weights
    gates = sequence @ of_input.T
    if input_bias is not None:
        gates = gates + input_bias
    step = _STEPS[cell](weights)

    def scanned(states: list[jax.Array], inputs: Any) -> tuple[list[jax.Array], jax.Array]:
        from_input, changes = inputs
        after = step(states, from_input)
        if changes is not None:
            after = [jnp.where(changes, new, old) for new, old in zip(after, states, strict=True)]
        return after, after[0]

    # Unrolled steps were measured to take longer, and many times longer to compile.
    final, outputs = lax.scan(scanned, initial, (gates, within), reverse=backwards)
    return outputs, final


def _lstm(weights: _Weights) -> _Step:
    projection = weights[4]

    def step(states: list[jax.Array], from_input: jax.Array) -> list[jax.Array]:
        hidden, memory = states
        gates = from_input + _from_state(hidden, weights)
        enter, forget, content, leave = jnp.split(gates, 4, -1)
        memory = jax.nn.sigmoid(forget) * memory + jax.nn.sigmoid(enter) * jnp.tanh(content)
        hidden = jax.nn.sigmoid(leave) * jnp.tanh(memory)
        return [hidden if projection is None else hidden @ projection.T, memory]

    return step


def _gru(weights: _Weights) -> _Step:
    def step(states: list[jax.Array], from_input: jax.Array) -> list[jax.Array]:
        (hidden,) = states
        reset, update, content = jnp.split(from_input, 3, -1)
        own_reset, own_update, own_content = jnp.split(_from_state(hidden, weights), 3, -1)
        kept = jax.nn.sigmoid(update + own_update)
        new = jnp.tanh(content + jax.nn.sigmoid(reset + own_reset) * own_content)
        return [(hidden - new) * kept + new]

    return step


def _rnn(activation: Callable[[jax.Array], jax.Array]) -> Callable[[_Weights], _Step]:
    return lambda weights: lambda states, from_input: [activation(from_input + _from_state(states[0], weights))]


def _from_state(hidden: jax.Array, weights: _Weights) -> jax.Array:
    product = hidden @ weights[1].T
    return product if weights[3] is None else product + weights[3]


_STEPS: dict[str, Callable[[_Weights], _Step]] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _rnn(jnp.tanh),
    "rnn_relu": _rnn(jax.nn.relu),
}
