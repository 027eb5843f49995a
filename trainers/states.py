"""Where a training run is, in plain data: phases, progress within an epoch, random number generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainers.errors import DamagedCheckpointError, TrainerError

RESUME_VERSION = "v2.0"


class TrainerPhase(Enum):
    """What the trainer is doing; the value of each member is its name."""

    INIT = "INIT"
    TRAIN_START_EPOCH = "TRAIN_START_EPOCH"
    TRAIN_BATCH_LOAD = "TRAIN_BATCH_LOAD"
    TRAIN_BATCH_FORWARD = "TRAIN_BATCH_FORWARD"
    TRAIN_BATCH_BACKWARD = "TRAIN_BATCH_BACKWARD"
    TRAIN_BATCH_OPTIM_STEP = "TRAIN_BATCH_OPTIM_STEP"
    TRAIN_BATCH_END = "TRAIN_BATCH_END"
    VAL_START_EPOCH = "VAL_START_EPOCH"
    VAL_BATCH_LOAD = "VAL_BATCH_LOAD"
    VAL_BATCH_FORWARD = "VAL_BATCH_FORWARD"
    VAL_BATCH_END = "VAL_BATCH_END"
    SCHEDULER_EPOCH_STEP = "SCHEDULER_EPOCH_STEP"
    SCHEDULER_BATCH_STEP = "SCHEDULER_BATCH_STEP"
    CHECKPOINT_SAVE_START = "CHECKPOINT_SAVE_START"
    CHECKPOINT_SAVE_END = "CHECKPOINT_SAVE_END"
    EPOCH_END = "EPOCH_END"
    TRAINING_COMPLETE = "TRAINING_COMPLETE"
    ERROR_RECOVERABLE = "ERROR_RECOVERABLE"
    ERROR_FATAL = "ERROR_FATAL"


@dataclass
class TrainMicroState:
    """Progress within a training epoch.

    Attributes:
        batch_idx: The next batch.
        micro_step: Batches since the last optimizer step; 0 in every checkpoint.
        loss_sum: Sum of the losses of the epoch so far.
        num_samples: Samples of the epoch so far.
        additional_metrics: Sums of everything that the epoch's logs average.
    """

    batch_idx: int
    micro_step: int = 0
    loss_sum: float = 0.0
    num_samples: int = 0
    additional_metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class ValMicroState:
    """Progress within a validation.

    Attributes:
        batch_idx: The next batch.
        loss_sum: Sum of the losses so far.
        metrics: Sums of everything that the logs average.
        num_samples: Samples so far.
    """

    batch_idx: int
    loss_sum: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 0


@dataclass
class RNGState:
    """States of the global random number generators.

    Attributes:
        torch_state: Of the CPU generator, a byte tensor.
        cuda_states: One byte tensor per CUDA device.
        numpy_state: Of ``numpy.random``, as nested lists and numbers.
        python_state: Of ``random``, as nested lists and numbers.
    """

    torch_state: Tensor
    cuda_states: list[Tensor] = field(default_factory=list)
    numpy_state: list[Any] | None = None
    python_state: list[Any] | None = None


@dataclass
class ResumeState:
    """Where a run goes on; part of every checkpoint.

    Attributes:
        phase: What had been finished when the checkpoint was written.
        epoch: From 0.
        global_step: Optimizer steps done.
        version: Of this structure.
        train: Progress within the epoch, if the epoch is not over.
        val: Progress within the validation, if one is running.
        rng: The generators at the save; None if they were not to be saved.
        timestamp: Seconds since 1970.

    Example:
        >>> state = ResumeState(TrainerPhase.TRAIN_BATCH_END, epoch=1, global_step=7, train=TrainMicroState(3))
        >>> ResumeState.from_dict(state.to_dict()) == state
        True
    """

    phase: TrainerPhase
    epoch: int
    global_step: int
    version: str = RESUME_VERSION
    train: TrainMicroState | None = None
    val: ValMicroState | None = None
    rng: RNGState | None = None
    timestamp: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain dicts, lists, numbers and tensors (not copied)."""
        return {
            "phase": self.phase.value,
            "epoch": self.epoch,
            "global_step": self.global_step,
            "version": self.version,
            "train": None if self.train is None else asdict(self.train),
            "val": None if self.val is None else asdict(self.val),
            "rng": None if self.rng is None else rng_to_dict(self.rng),
            "timestamp": self.timestamp,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResumeState:
        """Make a state from what `to_dict` returned.

        Args:
            values: A plain dict.

        Raises:
            TrainerError: It is of another version.
            DamagedCheckpointError: It is incomplete or altered.
        """
        version = values.get("version")
        if version != RESUME_VERSION:
            raise TrainerError(
                "the resume state of a checkpoint",
                received=f"version {version!r}",
                expected=f"version {RESUME_VERSION!r}",
                fix="Continue it with the version of this library that wrote it.",
            )
        try:
            return cls(
                phase=TrainerPhase(values["phase"]),
                epoch=values["epoch"],
                global_step=values["global_step"],
                version=version,
                train=None if values["train"] is None else TrainMicroState(**values["train"]),
                val=None if values["val"] is None else ValMicroState(**values["val"]),
                rng=None if values["rng"] is None else RNGState(**values["rng"]),
                timestamp=values["timestamp"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedCheckpointError(
                f"the resume state of a checkpoint is incomplete or altered: {error!r}"
            ) from error


def rng_to_dict(state: RNGState) -> dict[str, Any]:
    """Return the fields by name, tensors not copied.

    Args:
        state: Of the generators.

    Returns:
        What ``RNGState(**...)`` takes.
    """
    return {
        "torch_state": state.torch_state,
        "cuda_states": list(state.cuda_states),
        "numpy_state": state.numpy_state,
        "python_state": state.python_state,
    }


def capture_rng_state() -> RNGState:
    """Return the states of the generators of torch (CPU and every CUDA device), numpy and Python.

    Returns:
        Copies; nothing is drawn.

    Example:
        >>> state = capture_rng_state()
        >>> first = torch.rand(2), random.random()
        >>> restore_rng_state(state)
        >>> bool((torch.rand(2) == first[0]).all()), random.random() == first[1]
        (True, True)
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return RNGState(
        torch_state=torch.get_rng_state(),
        cuda_states=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        numpy_state=[str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        python_state=[version, list(internal), gauss],
    )


def restore_rng_state(state: RNGState) -> None:
    """Set the generators to what `capture_rng_state` returned.

    Args:
        state: Of the generators. CUDA states beyond the devices there are, are left out.

    Example:
        >>> restore_rng_state(capture_rng_state())
    """
    torch.set_rng_state(state.torch_state)
    for device, cuda_state in enumerate(state.cuda_states[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
    if state.numpy_state is not None:
        kind, keys, position, has_gauss, cached = state.numpy_state
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if state.python_state is not None:
        version, internal, gauss = state.python_state
        random.setstate((version, tuple(internal), gauss))
