"""`modelbatch.optimizer`: one optimizer, one configuration per model."""

from __future__ import annotations

from mb_torch import OptimizerFactory, create_adam_configs, create_lr_sweep_configs, create_sgd_configs

__all__ = ["OptimizerFactory", "create_adam_configs", "create_lr_sweep_configs", "create_sgd_configs"]
