"""The documented names of `model_training_framework.trainer`."""

from trainers.callbacks import TrainingCallback
from trainers.errors import CheckpointTimeoutError, PreemptionTimeoutError, TrainerError
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig
from trainers.states import ResumeState, RNGState, TrainerPhase, TrainMicroState, ValMicroState

__all__ = [
    "CheckpointTimeoutError",
    "GenericTrainer",
    "GenericTrainerConfig",
    "PreemptionTimeoutError",
    "RNGState",
    "ResumeState",
    "TrainMicroState",
    "TrainerError",
    "TrainerPhase",
    "TrainingCallback",
    "ValMicroState",
]
