"""Functions that are recorded as one operation each, which PyTorch would take apart into one piece per time step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
_PACKING: dict[Any, Callable[..., Any]] = {
    torch._pack_padded_sequence: record_pack,
    torch._pad_packed_sequence: record_pad,
}


class _Whole(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packing = _PACKING.get(func)
        if packing is not None:
            return packing(*args, **(kwargs or {}))
        cell = _CELLS.get(func)
        if cell is None or len(args) != 9:
            return func(*args, **(kwargs or {}))
        # Of the forms for packed sequences, the fourth argument is no switch.
        return record(cell, args) if isinstance(args[3], bool) else record_recurrent(cell, args)
