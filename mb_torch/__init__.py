"""Train many independent PyTorch models at once."""

from mb_torch.advice import Advice, Trial
from mb_torch.amp import GradScaler
from mb_torch.backend import available_backends, init_distributed, process_rank, register_backend
from mb_torch.batching import (
    AbstractBatchModule,
    BatchModule,
    batch_accuracy,
    batch_loss,
    batch_topk,
    register_module,
)
from mb_torch.compatibility import check_compatible
from mb_torch.core import ModelBatch
from mb_torch.data import DataRouter, Routed, StratifiedDataRouter, StratifiedRouter, create_random_masks
from mb_torch.errors import (
    IncompatibleModels,
    InvalidInput,
    InvalidState,
    MissingPackage,
    MissingState,
    ModelBatchError,
    Unsupported,
)
from mb_torch.host_memory import keep_freed_memory
from mb_torch.numerics import numerics
from mb_torch.optimizer import (
    OptimizerFactory,
    create_adam_configs,
    create_lr_sweep_configs,
    create_sgd_configs,
)
from mb_torch.routed import RoutedTensor
from mb_torch.train_step import TrainStep, make_joint_step

__version__ = "0.1.0"

__all__ = [
    "AbstractBatchModule",
    "Advice",
    "BatchModule",
    "DataRouter",
    "GradScaler",
    "IncompatibleModels",
    "InvalidInput",
    "InvalidState",
    "MissingPackage",
    "MissingState",
    "ModelBatch",
    "ModelBatchError",
    "OptimizerFactory",
    "Routed",
    "RoutedTensor",
    "StratifiedDataRouter",
    "StratifiedRouter",
    "TrainStep",
    "Trial",
    "Unsupported",
    "available_backends",
    "batch_accuracy",
    "batch_loss",
    "batch_topk",
    "check_compatible",
    "create_adam_configs",
    "create_lr_sweep_configs",
    "create_random_masks",
    "create_sgd_configs",
    "init_distributed",
    "keep_freed_memory",
    "make_joint_step",
    "numerics",
    "process_rank",
    "register_backend",
    "register_module",
]
