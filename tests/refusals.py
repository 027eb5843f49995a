"""Bad input and what it must not change: a batch of small models, and the check that it stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from mb_torch import ModelBatch, ModelBatchError, OptimizerFactory
from tests.compare import assert_equal

INPUTS = torch.linspace(-1, 1, 24).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def optimizer_for(mb: ModelBatch, lr: float = 0.1) -> torch.optim.Optimizer:
    return OptimizerFactory(torch.optim.Adam).create_optimizer(mb, [{"lr": lr}] * mb.num_models)


def everything(mb: ModelBatch, optimizer: Any = None) -> Any:
    state = {name: value.clone() for name, value in mb.state_dict().items()}
    modes = [module.training for module in mb.prototype.modules()]
    return state, modes, copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None


@contextmanager
def refused(
    mb: ModelBatch | None, error: type[Exception], message: str, optimizer: Any = None
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The block raises the error with this message, and the batch stays what it was to the bit."""
    before = everything(mb, optimizer) if mb is not None else None
    with pytest.raises(error, match=f"(?s){message}") as caught:
        yield caught
    assert isinstance(caught.value, ModelBatchError)
    if mb is not None:
        assert_equal(everything(mb, optimizer), before)
