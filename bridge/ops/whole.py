"""Functions that are recorded in another way than PyTorch would take them apart.

Those of recurrent layers are one operation each, not one piece per time step. One-hot vectors see a class that does not
exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bridge.ops.modules import recordable
from bridge.ops.packed import record_pack, record_pad, record_recurrent
from bridge.ops.recurrent import record


@contextmanager
def keep_whole() -> Iterator[None]:
    """Within the block, such functions are recorded whole, and modules so that they can be recorded."""
    with recordable(), _Whole():
        yield


_CELLS = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "rnn_tanh", torch.rnn_relu: "rnn_relu"}


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """PyTorch raises for a class that does not exist; recorded, it gives zeros. Now the row is the smallest integer."""
    hot = torch.nn.functional.one_hot(tensor, num_classes)
    exists = (tensor >= 0) & (tensor < hot.shape[-1])
    return torch.where(exists.unsqueeze(-1), hot, torch.iinfo(hot.dtype).min)


_REPLACED: dict[Any, Callable[..., Any]] = {
    torch._pack_padded_sequence: record_pack,
    torch._pad_packed_sequence: record_pad,
    torch.nn.functional.one_hot: _one_hot,
}


class _Whole(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replaced = _REPLACED.get(func)
        if replaced is not None:
            return replaced(*args, **(kwargs or {}))
        cell = _CELLS.get(func)
        if cell is None or len(args) != 9:
            return func(*args, **(kwargs or {}))
        # Of the forms for packed sequences, the fourth argument is no switch.
        return record(cell, args) if isinstance(args[3], bool) else record_recurrent(cell, args)
