"""Configurations of experiments: schema, files, validation and grid searches. Needs neither torch nor JAX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainers.config.errors import ConfigurationError, MissingConfiguration, UnsupportedFormat, ValidationError
from trainers.config.grid import ParameterGrid
from trainers.config.keys import canonical_key, with_value
from trainers.config.naming import NamingStrategy
from trainers.config.results import ExecutionMode, GridSearchConfig, GridSearchResult
from trainers.config.schema import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PerformanceConfig,
    PreemptionConfig,
    SchedulerConfig,
    SLURMConfig,
    TrainingConfig,
)

if TYPE_CHECKING:
    from trainers.config.creation import create_experiment_config, to_dict
    from trainers.config.manager import ConfigurationManager
    from trainers.config.search import ParameterGridSearch

__all__ = [
    "CheckpointConfig",
    "ConfigurationError",
    "ConfigurationManager",
    "DataConfig",
    "ExecutionMode",
    "ExperimentConfig",
    "GridSearchConfig",
    "GridSearchResult",
    "LoggingConfig",
    "MissingConfiguration",
    "ModelConfig",
    "NamingStrategy",
    "OptimizerConfig",
    "ParameterGrid",
    "ParameterGridSearch",
    "PerformanceConfig",
    "PreemptionConfig",
    "SLURMConfig",
    "SchedulerConfig",
    "TrainingConfig",
    "UnsupportedFormat",
    "ValidationError",
    "canonical_key",
    "create_experiment_config",
    "to_dict",
    "with_value",
]

# Loaded at first use: these need the extra `config`, and a trainer gets along with the classes above.
_LATER = {
    "ConfigurationManager": "trainers.config.manager",
    "ParameterGridSearch": "trainers.config.search",
    "create_experiment_config": "trainers.config.creation",
    "to_dict": "trainers.config.creation",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("omegaconf", "yaml"):
            raise
        raise ImportError(
            f"{__name__}.{name} needs the package {error.name}. Run: pip install 'modelbatch-hybrid[config]'",
            name=error.name,
        ) from error
    globals()[name] = value
    return value
