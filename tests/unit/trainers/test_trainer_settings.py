"""`GenericTrainerConfig`: flat fields and groups are two views of one thing."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainers.config.errors import ConfigurationError, ValidationError
from trainers.config.schema import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    PerformanceConfig,
    PreemptionConfig,
    TrainingConfig,
)
from trainers.generic import GenericTrainer
from trainers.settings import GenericTrainerConfig

# Flat name, group, its class, name there, a flat value that is no default, the group's value for it.
FIELDS = [
    ("checkpoint_dir", "checkpoint", CheckpointConfig, "checkpoint_dir", "x", "x"),
    ("save_every_n_epochs", "checkpoint", CheckpointConfig, "save_every_n_epochs", 2, 2),
    ("save_every_n_steps", "checkpoint", CheckpointConfig, "save_every_n_steps", 3, 3),
    ("save_every_n_minutes", "checkpoint", CheckpointConfig, "save_every_n_minutes", 4.0, 4.0),
    ("save_top_k", "checkpoint", CheckpointConfig, "save_top_k", -1, -1),
    ("monitor", "checkpoint", CheckpointConfig, "monitor", "loss", "loss"),
    ("mode", "checkpoint", CheckpointConfig, "mode", "max", "max"),
    ("filename", "checkpoint", CheckpointConfig, "filename", "{step}", "{step}"),
    ("save_rng_state", "checkpoint", CheckpointConfig, "save_rng", False, False),
    ("preemption_timeout", "preemption", PreemptionConfig, "timeout_minutes", 90.0, 1.5),
    ("signals", "preemption", PreemptionConfig, "signals", ["SIGUSR1"], ["SIGUSR1"]),
    ("requeue_signals", "preemption", PreemptionConfig, "requeue_signals", ["SIGUSR2"], ["SIGUSR2"]),
    ("requeue_job", "preemption", PreemptionConfig, "requeue_job", False, False),
    ("max_preemptions", "preemption", PreemptionConfig, "max_preemptions", 0, 0),
    ("auto_resume", "preemption", PreemptionConfig, "auto_resume", False, False),
    ("gradient_accumulation_steps", "performance", PerformanceConfig, "gradient_accumulation_steps", 2, 2),
    ("max_grad_norm", "performance", PerformanceConfig, "clip_grad_norm", 5.0, 5.0),
    ("mixed_precision", "performance", PerformanceConfig, "mixed_precision", "16-mixed", "16-mixed"),
    ("compile_model", "performance", PerformanceConfig, "compile_model", True, True),
    ("log_every_n_steps", "logging", LoggingConfig, "log_every_n_steps", 7, 7),
    ("log_loss_every_n_steps", "logging", LoggingConfig, "log_every_n_steps", 7, 7),
]


@pytest.mark.parametrize(("flat", "group", "group_class", "name", "value", "stored"), FIELDS)
def test_flat_field_and_group(flat: str, group: str, group_class: Any, name: str, value: Any, stored: Any) -> None:
    own = group_class(**{name: stored})
    for config in (
        GenericTrainerConfig(**{flat: value}),
        GenericTrainerConfig(**{group: own}),
        GenericTrainerConfig(**{flat: value, group: own}),
    ):
        assert getattr(config, flat) == value
        assert getattr(getattr(config, group), name) == stored
    changed = GenericTrainerConfig()
    setattr(changed, flat, value)
    assert getattr(getattr(changed, group), name) == stored
    other = getattr(GenericTrainerConfig(), flat)
    with pytest.raises(ConfigurationError, match=rf"{flat}.*{group}\.{name}"):
        GenericTrainerConfig(**{flat: other, group: own})
    default = group_class()
    GenericTrainerConfig(**{flat: value, group: default})
    assert getattr(default, name) == getattr(group_class(), name)


def test_defaults() -> None:
    config = GenericTrainerConfig()
    assert (config.max_epochs, config.max_steps, config.max_grad_norm, config.preemption_timeout) == (100, None, 1, 300)
    assert config.gradient_accumulation_steps == 1
    assert GenericTrainerConfig(max_grad_norm=None).max_grad_norm is None
    assert config.signal_numbers() == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM]


@pytest.mark.parametrize("given", ["SIGUSR1", signal.SIGUSR1, int(signal.SIGUSR1), [signal.SIGUSR1], ("SIGUSR1",)])
def test_signals_in_any_form(given: Any) -> None:
    config = GenericTrainerConfig(signals=given)
    assert config.signals == ["SIGUSR1"]
    assert config.requeue_signals == ["SIGUSR1"]


@pytest.mark.parametrize(
    "bad",
    [
        *[{name: value} for name in ("max_epochs", "max_steps", "save_every_n_steps") for value in (0, -1, True, "2")],
        *[{name: 0} for name in "validate_every_n_epochs early_stopping_patience save_every_n_minutes".split()],
        *[{name: 0} for name in "preemption_timeout gradient_accumulation_steps max_grad_norm".split()],
        *[{name: "best"} for name in "mode early_stopping_mode scheduler_interval mixed_precision on_nan_loss".split()],
        *[{"save_top_k": value} for value in (0, -2)],
        {"max_preemptions": -1},
        {"max_epochs": None},
        *[{name: 2.5} for name in "max_epochs max_steps early_stopping_patience save_every_n_epochs".split()],
        *[{name: 2.5} for name in "gradient_accumulation_steps log_every_n_steps save_top_k max_preemptions".split()],
        *[{name: True} for name in "gradient_accumulation_steps max_grad_norm save_top_k".split()],
        {"max_grad_norm": "1"},
        {"signals": "SIGNOTHING"},
        *[{"signals": ["SIGUSR1", name]} for name in ("SIGKILL", "SIGSTOP", signal.SIGKILL)],
        {"signals": ["SIGUSR1"], "requeue_signals": ["SIGUSR2"]},
    ],
    ids=str,
)
def test_out_of_range(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=list(bad)[-1]) as caught:
        GenericTrainerConfig(**bad)
    assert isinstance(caught.value, ValueError)


def test_numbers_of_numpy() -> None:
    config = GenericTrainerConfig(max_epochs=np.int64(3), save_top_k=np.int32(2), max_grad_norm=np.float32(0.5))
    assert (config.max_epochs, config.save_top_k, config.max_grad_norm) == (3, 2, 0.5)


def test_what_is_no_field_cannot_be_set() -> None:
    config = GenericTrainerConfig()
    with pytest.raises(AttributeError, match="no field 'max_epoch'. Did you mean 'max_epochs'"):
        config.max_epoch = 3  # type: ignore[attr-defined]

    class WithOwn(GenericTrainerConfig):
        own = 1

    changed = WithOwn(max_epochs=2)
    changed.own = 2
    assert (copy.deepcopy(changed).own, changed.max_epochs) == (2, 2)


@pytest.mark.parametrize("bad", [{"save_top_k": 0}, {"max_epochs": 2.5}, {"signals": ["SIGKILL"]}], ids=str)
def test_what_is_set_later_is_checked_again(bad: dict[str, Any], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path))
    trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    ((name, value),) = bad.items()
    setattr(config, name, value)
    model = nn.Linear(1, 1)
    with pytest.raises(ValidationError, match=name):
        trainer.fit(model, torch.optim.SGD(model.parameters()), [])
    with pytest.raises(ValidationError, match=name):
        GenericTrainer(config)
    assert signal.getsignal(signal.SIGUSR1) is before
    assert list(tmp_path.iterdir()) == []


WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    *(({name: "no"}, f"{name}: received 'no'; expected True or False") for name in ("auto_resume", "deterministic")),
    *(({name: 1}, f"{name}: received 1; expected True or False") for name in ("save_in_background", "save_rng_state")),
    (
        {"performance": PerformanceConfig(compile_model="no", gradient_accumulation_steps=1)},  # type: ignore[arg-type]
        "compile_model: received 'no'; expected True or False",
    ),
    ({"checkpoint": CheckpointConfig(save_last="no")}, "checkpoint.save_last: received 'no'"),  # type: ignore[arg-type]
    ({"checkpoint": {"save_top_k": 3}}, "checkpoint: received {'save_top_k': 3}; expected a CheckpointConfig"),
    ({"logging": None}, "logging: received None; expected a LoggingConfig"),
    *(({"checkpoint_dir": value}, f"checkpoint_dir: received {value}; expected a string") for value in (None, 3)),
    *(({name: 3}, f"{name}: received 3; expected a string or None") for name in ("experiment_name", "monitor")),
    ({"filename": None}, "filename: received None; expected a string"),
    ({"early_stopping_metric": 3}, "early_stopping_metric: received 3; expected a string"),
    *(({"preemption_timeout": value}, f"preemption_timeout: received {value!r}") for value in ("5", True)),
    ({"signals": "SIGNOTHING"}, "signals: received 'SIGNOTHING'"),
]


@pytest.mark.parametrize(("bad", "expected"), WRONG_TYPES, ids=str)
def test_wrong_types(bad: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=r"2 problems") as caught:
        GenericTrainerConfig(max_epochs=0, **bad)
    assert any(text.startswith(expected) for text in caught.value.problems), caught.value.problems
    ((name, value),) = bad.items()

    def set_later() -> None:
        config = GenericTrainerConfig()
        setattr(config, name, value)
        config.check()

    with pytest.raises(ValidationError, match=r"1 problem") as caught:
        set_later()
    assert caught.value.problems[0].startswith(expected)


def test_a_folder_may_be_a_path(tmp_path: Path) -> None:
    assert GenericTrainerConfig(checkpoint_dir=tmp_path).checkpoint_dir == str(tmp_path)  # type: ignore[arg-type]


def test_a_keyword_that_is_no_field() -> None:
    with pytest.raises(TypeError, match="no field 'max_epoch'. Did you mean 'max_epochs'"):
        GenericTrainerConfig(max_epoch=3)  # type: ignore[call-arg]


def test_all_problems_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        GenericTrainerConfig(max_epochs=0, mode="best")
    assert len(caught.value.problems) == 2


def test_from_experiment_config() -> None:
    training = TrainingConfig(
        epochs=3,
        max_steps=9,
        gradient_accumulation_steps=2,
        max_grad_norm=None,
        early_stopping_patience=4,
        early_stopping_metric="accuracy",
        early_stopping_mode="max",
        validation_every_n_epochs=5,
    )
    experiment = ExperimentConfig(
        "name",
        ModelConfig("m"),
        training,
        DataConfig("d"),
        OptimizerConfig(),
        checkpoint=CheckpointConfig(save_top_k=2),
    )
    config = GenericTrainerConfig.from_experiment_config(experiment)
    assert (config.max_epochs, config.max_steps, config.gradient_accumulation_steps) == (3, 9, 2)
    assert (config.max_grad_norm, config.experiment_name, config.save_top_k) == (None, "name", 2)
    assert (config.early_stopping_patience, config.early_stopping_metric) == (4, "accuracy")
    assert (config.early_stopping_mode, config.validate_every_n_epochs) == ("max", 5)
    assert config.checkpoint is not experiment.checkpoint or config.checkpoint == experiment.checkpoint


def test_needs_neither_omegaconf_nor_jax() -> None:
    code = (
        "import sys\n"
        "sys.modules['omegaconf'] = sys.modules['yaml'] = sys.modules['torchdata'] = None\n"
        "import trainers.generic, trainers.settings\n"
        "assert not {'jax', 'flax', 'wandb', 'tensorboard'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_set_later_stays_out_of_the_caller_s_sections() -> None:
    groups = {
        "checkpoint": CheckpointConfig(),
        "preemption": PreemptionConfig(),
        "performance": PerformanceConfig(gradient_accumulation_steps=1, clip_grad_norm=1.0),
        "logging": LoggingConfig(),
    }
    before = copy.deepcopy(groups)
    config = GenericTrainerConfig(**groups)
    config.checkpoint_dir, config.max_preemptions, config.mixed_precision, config.log_every_n_steps = "x", 9, None, 7
    config.preemption.signals.clear()
    assert groups == before
