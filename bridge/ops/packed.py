"""Packed sequences: packing, padding and recurrent layers over them, for lengths that are known while recording.

Packing and padding move rows to places that follow from the lengths. PyTorch itself says which: its own function is
run on row numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from bridge.known import for_real, known_values, remember
from bridge.ops.recurrent import record


def record_pack(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Record ``torch._pack_padded_sequence``: the rows of a padded batch one after another, and how many a step has.

    Raises:
        DataDependentOutputException: The lengths are not known.
    """
    _check_known(lengths, torch._pack_padded_sequence)
    with for_real():
        numbers = torch.arange(input.shape[0] * input.shape[1]).view(input.shape[:2])
        rows, batch_sizes = torch._pack_padded_sequence(numbers, lengths, batch_first)
    return input.flatten(0, 1).index_select(0, rows), remember(batch_sizes)


def record_pad(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int = -1
) -> tuple[Tensor, Tensor]:
    """Record ``torch._pad_packed_sequence``: a padded batch, and the lengths of its sequences.

    Raises:
        DataDependentOutputException: The batch sizes are not known.
    """
    _check_known(batch_sizes, torch._pad_packed_sequence)
    with for_real():
        numbers = torch.arange(1, len(data) + 1)
        rows, lengths = torch._pad_packed_sequence(numbers, batch_sizes, batch_first, 0, total_length)
        places, empty = (rows - 1).clamp(0).flatten(), (rows == 0).view(*rows.shape, *[1] * (data.dim() - 1))
    padded = data.index_select(0, places).unflatten(0, rows.shape)
    return padded.masked_fill(empty, padding_value), remember(lengths)


def record_recurrent(cell: str, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """Record ``torch.lstm(*arguments)`` and its like for a packed sequence.

    Args:
        cell: See `bridge.ops.recurrent.record`.
        arguments: As for the form of the torch function that takes packed sequences.

    Returns:
        The outputs of all steps, packed, then the last states.

    Raises:
        DataDependentOutputException: The batch sizes are not known.
    """
    data, batch_sizes, states, weights, has_biases, num_layers, dropout, train, bidirectional = arguments
    padded, lengths = record_pad(data, batch_sizes, False, 0.0)
    with for_real():
        own = lengths.tolist()
    outputs, *last = record(
        cell,
        (padded, states, weights, has_biases, num_layers, dropout, train, bidirectional, False),
        own if min(own) < max(own) else None,
    )
    return record_pack(outputs, lengths, False)[0], *last


def _check_known(tensor: Tensor, function: Callable[..., Any]) -> None:
    if known_values(tensor) is None:
        raise DataDependentOutputException(function)  # type: ignore[arg-type]
