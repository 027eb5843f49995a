"""The documented names of `modelbatch`, provided by `mb_torch`."""

from __future__ import annotations

from mb_torch import __version__
from mb_torch._distributions import refuse_second_owner

refuse_second_owner("modelbatch")

from modelbatch.core import ModelBatch
from modelbatch.data import (
    DataRouter,
    StratifiedDataRouter,
    StratifiedRouter,
    create_random_masks,
)
from modelbatch.optimizer import (
    OptimizerFactory,
    create_adam_configs,
    create_lr_sweep_configs,
    create_sgd_configs,
)

__all__ = [
    "DataRouter",
    "ModelBatch",
    "OptimizerFactory",
    "StratifiedDataRouter",
    "StratifiedRouter",
    "__version__",
    "create_adam_configs",
    "create_lr_sweep_configs",
    "create_random_masks",
    "create_sgd_configs",
]
