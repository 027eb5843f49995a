"""The documented names of `model_training_framework.trainer`, and those of packed experiments and populations."""

from trainers.built import Built
from trainers.callbacks import TrainingCallback
from trainers.errors import CheckpointTimeoutError, PreemptionTimeoutError, TrainerError
from trainers.generic import GenericTrainer
from trainers.per_model import PerModel
from trainers.population import Halving, Population
from trainers.settings import GenericTrainerConfig
from trainers.states import ResumeState, RNGState, TrainerPhase, TrainMicroState, ValMicroState

__all__ = [
    "Built",
    "CheckpointTimeoutError",
    "GenericTrainer",
    "GenericTrainerConfig",
    "Halving",
    "PerModel",
    "Population",
    "PreemptionTimeoutError",
    "RNGState",
    "ResumeState",
    "TrainMicroState",
    "TrainerError",
    "TrainerPhase",
    "TrainingCallback",
    "ValMicroState",
]
