"""Functions that are recorded as one operation each, which PyTorch would take apart into one piece per time step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bridge.ops.modules import recordable
from bridge.ops.recurrent import record


@contextmanager
def keep_whole() -> Iterator[None]:
    """Within the block, such functions are recorded whole, and modules so that they can be recorded."""
    with recordable(), _Whole():
        yield


_CELLS = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "rnn_tanh", torch.rnn_relu: "rnn_relu"}


class _Whole(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cell = _CELLS.get(func)
        # Of the forms for packed sequences, the fourth argument is no switch.
        if cell is None or len(args) != 9 or not isinstance(args[3], bool):
            return func(*args, **(kwargs or {}))
        return record(cell, args)
