"""The documented names of `model_training_framework`, provided by `trainers`."""

from __future__ import annotations

from mb_torch import __version__
from mb_torch._distributions import refuse_second_owner

refuse_second_owner("model_training_framework")

from trainers.config import ExecutionMode, NamingStrategy, ParameterGrid, ParameterGridSearch
from trainers.searches.framework import ModelTrainingFramework

__all__ = [
    "ExecutionMode",
    "ModelTrainingFramework",
    "NamingStrategy",
    "ParameterGrid",
    "ParameterGridSearch",
    "__version__",
]
