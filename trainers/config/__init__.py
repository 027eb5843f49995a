"""Configurations of experiments: schema, files, validation and grid searches. Needs neither torch nor JAX."""

from trainers.config.creation import create_experiment_config, to_dict
from trainers.config.errors import ConfigurationError, MissingConfiguration, UnsupportedFormat, ValidationError
from trainers.config.keys import canonical_key, with_value
from trainers.config.manager import ConfigurationManager
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

__all__ = [
    "CheckpointConfig",
    "ConfigurationError",
    "ConfigurationManager",
    "DataConfig",
    "ExperimentConfig",
    "LoggingConfig",
    "MissingConfiguration",
    "ModelConfig",
    "OptimizerConfig",
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
