"""Buffers that a forward pass has moved, put back: those of a batch that is left out, those of stopped models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mb_torch import ModelBatch


class KeptBuffers:
    """A copy of a model's buffers: running statistics, mostly, which a forward pass moves.

    Args:
        model: A module or a `ModelBatch`.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> kept = KeptBuffers(model)
        >>> kept.keep()
        >>> _ = model(torch.tensor([[float("nan")], [1.0]]))
        >>> kept.put_back()
        >>> model.running_mean
        tensor([0.])
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        self._copies: list[Tensor] = []

    def keep(self) -> None:
        """Copy them as they are now."""
        # Looked for every time: a module may replace its buffers.
        places = [
            (module._buffers, name, buffer)
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        buffers = [_own_elements(buffer.detach()) for _, _, buffer in places]
        if [_form(buffer) for buffer in buffers] == [_form(copied) for copied in self._copies]:
            if buffers:
                torch._foreach_copy_(self._copies, buffers)
        else:
            self._copies = [buffer.clone() for buffer in buffers]
        self._places = places

    def put_back(self) -> None:
        """Give them the values that they had when they were copied."""
        for (table, name, buffer), copied in zip(self._places, self._copies, strict=True):
            # One that was made in inference mode can be written to only there.
            with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
                _own_elements(buffer).copy_(copied)
            table[name] = buffer


class KeptRows:
    """A copy of the buffers of models that were stopped, which a forward pass of all models moves.

    Args:
        model: All models.
        stopped: Which were stopped.

    Example:
        >>> batch = ModelBatch([nn.BatchNorm1d(1) for _ in range(2)])
        >>> kept = KeptRows(batch, [1])
        >>> _ = batch(torch.ones(4, 1))
        >>> kept.put_back()
        >>> batch.stacked_buffers["running_mean"].flatten().tolist()
        [0.10000000149011612, 0.0]
    """

    def __init__(self, model: ModelBatch, stopped: Sequence[int]) -> None:
        self._model = model
        self._stopped = list(stopped)
        self._copies = {name: buffer[self._stopped].clone() for name, buffer in model.stacked_buffers.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the stopped models the values that they had when they were stopped."""
        for name, buffer in self._model.stacked_buffers.items():
            buffer[self._stopped] = self._copies[name]


def _own_elements(buffer: Tensor) -> Tensor:
    """An expanded buffer without the repetition, which cannot be written to."""
    if buffer.layout is not torch.strided or 0 not in buffer.stride():
        return buffer
    return buffer[tuple([slice(None) if stride else slice(1) for stride in buffer.stride()])]


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
