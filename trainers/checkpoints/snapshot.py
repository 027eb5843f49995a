"""What a checkpoint holds: collected from a run, and given back to one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trainers.checkpoints.files import FORMAT_VERSION, to_plain
from trainers.checkpoints.objects import class_names
from trainers.errors import TrainerError
from trainers.ranks import gathered_from_ranks, rank
from trainers.reporting.metrics import model_metrics_of
from trainers.settings import GenericTrainerConfig
from trainers.states import ResumeState, RNGState, TrainerPhase, rng_to_dict

if TYPE_CHECKING:
    from trainers.callbacks import TrainingCallback
    from trainers.generic import GenericTrainer
    from trainers.loop import TrainingLoop
    from trainers.reporting.early_stopping import EarlyStopping

_LOGGER = logging.getLogger(__name__)
# Settings, or groups of them, that do not change what a run computes.
_FREE = (
    "checkpoint.",
    "preemption.",
    "logging.",
    "max_epochs",
    "max_steps",
    "save_in_background",
    "performance.pin_memory",
    "performance.prefetch_factor",
    "performance.persistent_workers",
)


def collect(trainer: GenericTrainer, loop: TrainingLoop, state: ResumeState) -> dict[str, Any]:
    """Return the whole state of a run as plain data.

    Args:
        trainer: That trains.
        loop: Its run.
        state: Where it is.

    Returns:
        A dict for `CheckpointStore.save`. Tensors that are on the CPU are the run's own, not copies.

    Raises:
        TrainerError: Something that is to be saved is no plain data; names it.
    """
    settings = trainer.config.checkpoint
    scaler = loop.training.scaler
    place = state.to_dict()
    # Validations may be of different lengths.
    batches = {part: place[part]["batch_idx"] for part in ("train", "val") if place[part] is not None}
    own = {"rng": place["rng"], "loader_state": _loader_state(loop), "batches": batches}
    resume_state = {**place, "rng": None}
    return {
        "format_version": FORMAT_VERSION,
        "experiment_name": trainer.config.experiment_name,
        "save_timestamp": time.time(),
        "epoch": state.epoch,
        "global_step": state.global_step,
        "model_state_dict": to_plain(trainer.model.state_dict(), "the model's state_dict()"),
        "optimizer_state_dict": to_plain(trainer.optimizer.state_dict(), "the optimizer's state_dict()")
        if settings.save_optimizer
        else None,
        "scheduler_state_dict": [
            to_plain(scheduler.state_dict(), "the scheduler's state_dict()") for scheduler in loop.schedulers
        ]
        if settings.save_scheduler and loop.schedulers
        else None,
        "classes": class_names(trainer.optimizer, loop.schedulers),
        "scaler_state_dict": None if scaler is None else to_plain(scaler.state_dict(), "the scaler"),
        "resume_state": resume_state,
        **_of_first_rank(to_plain(gathered_from_ranks(own), "the state of the loaders"), resume_state),
        "metrics": to_plain(trainer.logs, "logs"),
        "early_stopping": loop.early_stopping.state_dict(),
        "preemption_count": trainer.preemption_count,
        "stop_training": bool(trainer.stop_training),
        "callbacks": [_callback_state(callback) for callback in trainer.callbacks],
        "trackers": {logger.name: to_plain(logger.state_dict(), logger.name) for logger in loop.loggers},
        "config": to_plain(trainer.config.to_dict(), "config"),
        "environment": _environment(),
    }


def own_rank(content: Mapping[str, Any]) -> tuple[ResumeState, dict[str, Any]]:
    """Return this process's part of a checkpoint.

    Args:
        content: Of the checkpoint.

    Returns:
        Where the run goes on, and the state of its loaders.

    Raises:
        TrainerError: It is of another version, or of fewer processes.
    """
    others = content["other_ranks"]
    if rank() > len(others):
        raise TrainerError(
            f"rank {rank()} at resume", received=f"a checkpoint of {len(others) + 1} processes", expected="as many"
        )
    if rank() == 0:
        return ResumeState.from_dict(content["resume_state"]), content["loader_state"]
    own = others[rank() - 1]
    place = {**content["resume_state"], "rng": own["rng"]}
    # Checkpoints of earlier versions have no batches.
    for part, batch_idx in own.get("batches", {}).items():
        place[part] = {**place[part], "batch_idx": batch_idx}
    return ResumeState.from_dict(place), own["loader_state"]


def check_same_place(content: Mapping[str, Any] | None) -> None:
    """Refuse to go on from different checkpoints in the processes of a run.

    Args:
        content: Of the checkpoint that this process goes on from; None to begin.

    Raises:
        TrainerError: Another process goes on from another one.
    """
    place = None if content is None else (content["global_step"], content["save_timestamp"])
    places = gathered_from_ranks(place)
    if len(set(places)) > 1:
        steps = ["the beginning" if each is None else f"step {each[0]}" for each in places]
        raise TrainerError(
            "the ranks would go on from different checkpoints",
            received=", ".join(f"rank {number} from {step}" for number, step in enumerate(steps)),
            expected="the same one",
            fix="Let all of them see the same folder, and call load_checkpoint() in all or in none.",
        )


def warn_of_other_settings(trainer: GenericTrainer, schedulers: Sequence[Any], content: Mapping[str, Any]) -> None:
    """Log where a run is to go on with other settings than those of the checkpoint; before that is loaded.

    Args:
        trainer: That trains.
        schedulers: All there are.
        content: Of the checkpoint.
    """
    saved = _by_dotted_key({**content["config"], "experiment_name": content["experiment_name"]})
    present = _by_dotted_key(to_plain(trainer.config.to_dict(), "config"))
    changes = [
        f"{key} was {saved[key]!r} and is {value!r}"
        for key, value in present.items()
        if key in saved and saved[key] != value and not key.startswith(_FREE)
    ]
    if changes:
        _LOGGER.warning(
            "the checkpoint was written with other settings; the run goes on with those of now: %s. To begin anew, use "
            "another folder or experiment_name",
            ", ".join(changes),
        )
    if content["optimizer_state_dict"] is None:
        return
    # A scheduler changes the others.
    keys = ("initial_lr", "weight_decay", "eps") if schedulers else ("lr", "weight_decay", "eps", "momentum", "betas")
    groups = zip(content["optimizer_state_dict"]["param_groups"], trainer.optimizer.param_groups, strict=False)
    differences: dict[str, str] = {}
    for number, (before, group) in enumerate(groups):
        own = to_plain({key: group[key] for key in keys if key in group and key in before}, "optimizer")
        for key, value in own.items():
            if _as_numbers(before[key]) != _as_numbers(value):
                differences.setdefault(key, f"{key} {value!r} instead of {before[key]!r} in group {number}")
    if differences:
        _LOGGER.warning(
            "the optimizer was made with other settings than the checkpoint has; the run goes on with those of the "
            "checkpoint: %s",
            ", ".join(differences.values()),
        )


def apply_run(trainer: GenericTrainer, loop: TrainingLoop, content: Mapping[str, Any]) -> None:
    """Load everything else that belongs to a run, but its position and the random generators.

    Args:
        trainer: That trains.
        loop: Its run.
        content: Of the checkpoint.
    """
    scaler = loop.training.scaler
    if scaler is not None and content["scaler_state_dict"] is not None:
        scaler.load_state_dict(content["scaler_state_dict"])
    loop.early_stopping.load_state_dict(content["early_stopping"])
    loop.training.set_active(loop.early_stopping.active())
    restore_callbacks(trainer.callbacks, content["callbacks"])
    # Nothing fails from here on: after an error the trainer is what it was.
    trainer.stopped_models = dict(loop.early_stopping.stopped)
    trainer.diverged_models = set(loop.early_stopping.diverged)
    trainer.store.best = content["best"]
    trainer.logs = dict(content["metrics"])
    trainer.model_metrics = model_metrics_of(trainer.logs)
    trainer.preemption_count = content["preemption_count"]
    for key, value in _environment().items():
        if content["environment"].get(key) != value:
            _LOGGER.warning(
                "%s was %s when the checkpoint was written and is %s now: the run goes on validly, but its numbers may "
                "differ in the last digits from those of an uninterrupted one",
                key,
                content["environment"].get(key),
                value,
            )


def is_finished(content: Mapping[str, Any], config: GenericTrainerConfig, early_stopping: EarlyStopping) -> bool:
    """Whether a checkpoint is that of a complete run, and neither bounds nor a patience that ended it were raised.

    Args:
        content: Of the checkpoint.
        config: As it is now.
        early_stopping: With the patience of now.

    Returns:
        True if there is nothing left to train.
    """
    state = ResumeState.from_dict(content["resume_state"])
    if state.phase is not TrainerPhase.TRAINING_COMPLETE:
        return False
    saved = content["config"]
    more_epochs = config.max_epochs > saved["max_epochs"]
    more_steps = saved["max_steps"] is not None and (config.max_steps is None or config.max_steps > saved["max_steps"])
    next_epoch = state.epoch + (state.train is None)
    has_room = next_epoch < config.max_epochs and (config.max_steps is None or state.global_step < config.max_steps)
    early = content["early_stopping"]
    # Where some models are left, something else has ended the run.
    more_patience = len(early["stopped"]) == len(early["best"]) and bool(early_stopping.revived(early))
    return not ((more_epochs or more_steps or more_patience) and has_room)


def _loader_state(loop: TrainingLoop) -> dict[str, Any]:
    start: RNGState | None = loop.epoch_start_rng
    return {
        "train": loop.train_loader.state_dict(),
        "val": None if loop.val_loader is None else loop.val_loader.state_dict(),
        "epoch_start_rng": None if start is None else rng_to_dict(start),
        "train_is_over": loop.train_is_over,
        "val_is_over": loop.val_is_over,
    }


def _of_first_rank(states: list[dict[str, Any]], resume_state: dict[str, Any]) -> dict[str, Any]:
    """Put rank 0's part where a run of one process has it."""
    resume_state["rng"] = states[0]["rng"]
    return {"loader_state": states[0]["loader_state"], "other_ranks": states[1:]}


def _callback_state(callback: TrainingCallback) -> dict[str, Any]:
    name = type(callback).__name__
    state = callback.state_dict() if hasattr(callback, "state_dict") else None
    return {"class": name, "state": to_plain(state, f"the state_dict() of callback {name}")}


def restore_callbacks(callbacks: Sequence[TrainingCallback], saved: Sequence[Mapping[str, Any]]) -> None:
    """Give callbacks the states that those of the saved run had.

    Args:
        callbacks: Of this run.
        saved: What the checkpoint has under ``"callbacks"``.
    """
    left = list(saved)
    begin_anew = []
    for callback in callbacks:
        name = type(callback).__name__
        place = next((i for i, entry in enumerate(left) if entry["class"] == name), None)
        if place is None:
            if hasattr(callback, "state_dict"):
                begin_anew.append(name)
            continue
        entry = left.pop(place)
        if entry["state"] is not None and hasattr(callback, "load_state_dict"):
            callback.load_state_dict(entry["state"])
    # What has no state may come and go.
    unused = [entry["class"] for entry in left if entry["state"] is not None and entry["state"] != {}]
    if begin_anew or unused:
        _LOGGER.warning(
            "states of callbacks are restored by class name: the checkpoint has none for %s, which begin anew, and "
            "those of %s are not used",
            begin_anew,
            unused,
        )


def _by_dotted_key(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _by_dotted_key(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _as_numbers(value: Any) -> Any:
    """A value of a parameter group as something to be compared: some are tensors."""
    return torch.as_tensor(value, dtype=torch.float64).tolist() if value is not None else None


def _environment() -> dict[str, Any]:
    """What bit-identity depends on beside the state."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
