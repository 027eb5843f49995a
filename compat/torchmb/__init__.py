"""The documented names of `torchmb`, provided by `mb_torch`."""

from __future__ import annotations

from mb_torch import __version__
from mb_torch._distributions import refuse_second_owner

refuse_second_owner("torchmb")

from mb_torch import (
    AbstractBatchModule,
    BatchModule,
    batch_accuracy,
    batch_loss,
    batch_topk,
    register_module,
)

__all__ = [
    "AbstractBatchModule",
    "BatchModule",
    "__version__",
    "batch_accuracy",
    "batch_loss",
    "batch_topk",
    "register_module",
]
