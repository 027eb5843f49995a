"""The schema: every field and default, other spellings in every place, inherited values, no unknown attribute."""

from __future__ import annotations

import copy
import dataclasses
import signal
import subprocess
import sys
from typing import Any

import pytest

from trainers.config import (
    CheckpointConfig,
    ConfigurationError,
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
    ValidationError,
    canonical_key,
    create_experiment_config,
    to_dict,
    with_value,
)

MINIMAL: dict[str, Any] = {
    "experiment_name": "run",
    "model": {"name": "mlp"},
    "training": {},
    "data": {"dataset_name": "digits"},
    "optimizer": {},
}

NOTHING_UNLESS_SET = (
    "gres partition account mem mem_per_cpu qos constraint gpu_bind begin reservation exclude nodelist mail_type "
    "mail_user array dependency output error"
).split()
DEFAULTS: dict[type, dict[str, Any]] = {
    ModelConfig: {
        **{"hidden_size": 512, "num_layers": 6, "num_heads": 8, "dropout": 0.1, "activation": "relu"},
        **{"num_classes": None, "pretrained": False, "freeze_backbone": False, "custom_params": {}},
    },
    TrainingConfig: {
        **{"epochs": 100, "max_steps": None, "batch_size": 32, "learning_rate": 1e-4},
        **{"gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "early_stopping_patience": None},
        **{"early_stopping_metric": "val_loss", "early_stopping_mode": "min", "validation_every_n_epochs": 1},
    },
    DataConfig: {
        **{"dataset_path": None, "train_split": "train", "val_split": "validation", "test_split": "test"},
        **{"shuffle_train": True, "drop_last": True, "preprocessing": {}, "augmentations": {}, "custom_params": {}},
        **{"batch_size": None, "num_workers": None, "pin_memory": None},
    },
    OptimizerConfig: {
        **{"name": "adamw", "weight_decay": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False},
        **{"custom_params": {}, "learning_rate": None},
    },
    SchedulerConfig: {
        **{"name": "cosine", "warmup_steps": 1000, "max_steps": None, "min_lr": 1e-6, "gamma": 0.1},
        **{"step_size": 10, "milestones": [], "custom_params": {}},
    },
    SLURMConfig: {
        **{"job_name": None, "time_limit": "1-00:00:00", "nodes": 1, "ntasks_per_node": 1, "cpus_per_task": 8},
        **{"requeue": True, "exclusive": False, "additional_args": []},
        **dict.fromkeys(NOTHING_UNLESS_SET),
    },
    LoggingConfig: {
        **{"log_level": "INFO", "log_file": None, "console_log": True, "log_every_n_steps": 50, "use_wandb": False},
        **{"wandb_project": None, "wandb_entity": None, "wandb_notes": None, "wandb_tags": []},
        **{"tensorboard_dir": None, "csv_log_dir": None},
    },
    CheckpointConfig: {
        **{"checkpoint_dir": "checkpoints", "save_every_n_epochs": 1, "save_every_n_steps": None},
        **{"save_every_n_minutes": None, "save_top_k": 5, "save_last": True, "monitor": None, "mode": "min"},
        **{"filename": "epoch_{epoch:03d}_step_{step:06d}.ckpt", "save_rng": True, "save_optimizer": True},
        **{"save_scheduler": True, "timeout_seconds": 300},
    },
    PreemptionConfig: {
        **{"timeout_minutes": 5, "grace_period_seconds": 60, "max_preemptions": 3},
        **{"signals": ["SIGUSR1", "SIGUSR2", "SIGTERM"], "requeue_signals": ["SIGUSR1", "SIGUSR2"]},
        **{"requeue_job": True, "checkpoint_on_preemption": True, "exit_on_max_preemptions": True},
        **{"auto_resume": True},
    },
    PerformanceConfig: {
        **{"num_workers": 4, "pin_memory": True, "prefetch_factor": 2, "persistent_workers": True},
        **{"compile_model": False, "mixed_precision": None},
        **{"gradient_accumulation_steps": None, "clip_grad_norm": None, "dataloader_drop_last": None},
    },
}
REQUIRED: dict[type, dict[str, Any]] = {ModelConfig: {"name": "mlp"}, DataConfig: {"dataset_name": "digits"}}
SECTION_CLASSES = {
    **{"model": ModelConfig, "training": TrainingConfig, "data": DataConfig, "optimizer": OptimizerConfig},
    **{"scheduler": SchedulerConfig, "slurm": SLURMConfig, "logging": LoggingConfig},
    **{"checkpoint": CheckpointConfig, "preemption": PreemptionConfig, "performance": PerformanceConfig},
}

# Other spelling, a value for it, canonical key, the value there.
SPELLINGS: list[tuple[str, Any, str, Any]] = [
    ("model.type", "cnn", "model.name", "cnn"),
    ("training.max_epochs", 7, "training.epochs", 7),
    ("training.validation_frequency", 2, "training.validation_every_n_epochs", 2),
    ("data.data_dir", "d", "data.dataset_path", "d"),
    ("optimizer.type", "sgd", "optimizer.name", "sgd"),
    ("optimizer.lr", 0.5, "optimizer.learning_rate", 0.5),
    ("scheduler.type", "step", "scheduler.name", "step"),
    ("slurm.time", "2:00:00", "slurm.time_limit", "2:00:00"),
    ("slurm.extra_args", {"x": "1", "hold": True}, "slurm.additional_args", ["--x=1", "--hold"]),
    ("slurm.gpus_per_node", 2, "slurm.gres", "gpu:2"),
    ("logging.console_log_level", "DEBUG", "logging.log_level", "DEBUG"),
    ("logging.log_scalars_every_n_steps", 3, "logging.log_every_n_steps", 3),
    ("checkpoint.root_dir", "c", "checkpoint.checkpoint_dir", "c"),
    ("checkpoint.max_checkpoints", 2, "checkpoint.save_top_k", 2),
    ("checkpoint.monitor_metric", "loss", "checkpoint.monitor", "loss"),
    ("checkpoint.monitor_mode", "max", "checkpoint.mode", "max"),
    ("checkpoint.filename_template", "{step}.ckpt", "checkpoint.filename", "{step}.ckpt"),
    ("preemption.max_checkpoint_sec", 90, "preemption.timeout_minutes", 1.5),
    ("preemption.signal", "SIGUSR2", "preemption.signals", ["SIGUSR2"]),
    ("preemption.resume_from_latest_symlink", False, "preemption.auto_resume", False),
    ("performance.dataloader_num_workers", 1, "performance.num_workers", 1),
    ("performance.use_amp", True, "performance.mixed_precision", "16-mixed"),
]


def value_at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


@pytest.mark.parametrize("section", SECTION_CLASSES)
def test_fields_and_defaults_of_a_section(section: str) -> None:
    section_class = SECTION_CLASSES[section]
    required = REQUIRED.get(section_class, {})
    assert dataclasses.asdict(section_class(**required)) == {**required, **DEFAULTS[section_class]}
    assert [field.name for field in dataclasses.fields(section_class)] == [*required, *DEFAULTS[section_class]]
    if required:
        with pytest.raises(TypeError, match=next(iter(required))):
            section_class()


def test_top_level_is_that_of_the_documentation() -> None:
    config = create_experiment_config(MINIMAL)
    assert (
        list(to_dict(config))
        == (
            "experiment_name model training data optimizer scheduler slurm logging checkpoint preemption performance "
            "description tags created_by created_at version seed deterministic benchmark custom_params"
        ).split()
    )
    assert (config.scheduler, config.slurm, config.seed, config.created_by) == (None, None, None, None)
    assert (config.tags, config.version, config.deterministic, config.benchmark) == ([], "1.0", True, False)
    sections = (ModelConfig("mlp"), TrainingConfig(), DataConfig("digits"), OptimizerConfig())
    assert ExperimentConfig("run", *sections) == config


@pytest.mark.parametrize("section", ["scheduler", "slurm"])
def test_null_leaves_an_optional_section_out(section: str) -> None:
    assert getattr(create_experiment_config({**MINIMAL, section: None}), section) is None
    assert getattr(create_experiment_config({**MINIMAL, section: {}}), section) == SECTION_CLASSES[section]()


@pytest.mark.parametrize("section", ["logging", "checkpoint", "preemption", "performance"])
@pytest.mark.parametrize("value", [None, {}])
def test_null_and_nothing_stand_for_the_defaults(section: str, value: Any) -> None:
    assert create_experiment_config({**MINIMAL, section: value}) == create_experiment_config(MINIMAL)


@pytest.mark.parametrize("section", ["model", "training", "data", "optimizer"])
def test_a_required_section_is_given_as_a_dict(section: str) -> None:
    for config in ({**MINIMAL, section: None}, {key: MINIMAL[key] for key in MINIMAL if key != section}):
        with pytest.raises(ValidationError) as caught:
            create_experiment_config(config)
        assert [text.split(":")[0] for text in caught.value.problems] == [section]


@pytest.mark.parametrize(("spelling", "value", "key", "canonical"), SPELLINGS)
def test_other_spellings(spelling: str, value: Any, key: str, canonical: Any) -> None:
    section, name = spelling.split(".")
    given = copy.deepcopy(value)
    # In dicts, as dotted keys, as constructor keywords and as read-only attributes.
    as_dict = create_experiment_config(
        {**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}}
        if key != "model.name"
        else {**MINIMAL, "model": {name: value}}
    )
    assert value_at(as_dict, key) == canonical
    assert canonical_key(spelling) == key
    assert value_at(create_experiment_config(with_value(MINIMAL, spelling, value)), key) == canonical
    required = {} if key == "model.name" else REQUIRED.get(SECTION_CLASSES[section], {})
    built = SECTION_CLASSES[section](**required, **{name: value})
    assert getattr(built, key.split(".")[1]) == canonical
    assert getattr(built, name) == value == given
    with pytest.raises(AttributeError, match=f"{name} is another spelling"):
        setattr(built, name, value)
    assert name not in to_dict(as_dict)[section]


@pytest.mark.parametrize(("spelling", "value", "key", "canonical"), SPELLINGS)
def test_both_spellings_must_agree(spelling: str, value: Any, key: str, canonical: Any) -> None:
    section, name = spelling.split(".")
    canonical_name = key.split(".")[1]
    both = {**REQUIRED.get(SECTION_CLASSES[section], {}), name: value, canonical_name: canonical}
    assert value_at(create_experiment_config({**MINIMAL, section: both}), key) == canonical
    for wrong in ({**both, canonical_name: "other"}, dict(reversed({**both, canonical_name: "other"}.items()))):
        with pytest.raises(ValidationError, match=f"(?s){key}: given twice.*expected one of them"):
            create_experiment_config({**MINIMAL, section: wrong})
        with pytest.raises(ConfigurationError, match=f"{key}: given twice"):
            SECTION_CLASSES[section](**wrong)


@pytest.mark.parametrize(
    ("spelling", "value", "canonical"),
    [
        ("slurm.gpus_per_node", None, None),
        ("slurm.gpus_per_node", 0, None),
        ("slurm.gpus_per_node", "4", "gpu:4"),
        ("slurm.extra_args", None, []),
        ("slurm.extra_args", {"-p": "x", "off": False, "none": None}, ["-p=x"]),
        ("performance.use_amp", False, None),
        ("performance.use_amp", "true", "16-mixed"),
        ("preemption.signal", signal.SIGUSR1, ["SIGUSR1"]),
        ("preemption.signals", [int(signal.SIGTERM), "SIGUSR1"], ["SIGTERM", "SIGUSR1"]),
        ("preemption.signals", "SIGTERM", ["SIGTERM"]),
    ],
)
def test_converted_values(spelling: str, value: Any, canonical: Any) -> None:
    config = create_experiment_config(with_value(MINIMAL, spelling, value))
    assert value_at(config, canonical_key(spelling)) == canonical


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("slurm.gpus_per_node", True),
        ("slurm.gpus_per_node", -1),
        ("slurm.gpus_per_node", 1.5),
        ("slurm.extra_args", ["--x"]),
        ("slurm.extra_args", {"x": [1]}),
        ("performance.use_amp", 2),
        ("performance.use_amp", "perhaps"),
        ("preemption.max_checkpoint_sec", "soon"),
        ("preemption.max_checkpoint_sec", True),
        ("preemption.signals", [True]),
        ("preemption.signal", 1000),
    ],
)
def test_values_that_a_spelling_cannot_convert(spelling: str, value: Any) -> None:
    section, name = spelling.split(".")
    with pytest.raises(ValidationError, match=f"{spelling}: received .*; expected"):
        create_experiment_config({**MINIMAL, section: {name: value}})


def test_requeue_signals_follow_the_signals() -> None:
    assert PreemptionConfig(signal="SIGUSR2").requeue_signals == ["SIGUSR2"]
    assert create_experiment_config({**MINIMAL, "preemption": {"signal": "SIGTERM"}}).preemption.requeue_signals == []


@pytest.mark.parametrize(
    ("inheriting", "source", "value"),
    [
        ("data.batch_size", "training.batch_size", 8),
        ("data.num_workers", "performance.num_workers", 0),
        ("data.pin_memory", "performance.pin_memory", False),
        ("optimizer.learning_rate", "training.learning_rate", 0.25),
        ("performance.gradient_accumulation_steps", "training.gradient_accumulation_steps", 3),
        ("performance.clip_grad_norm", "training.max_grad_norm", 0.5),
        ("performance.dataloader_drop_last", "data.drop_last", False),
    ],
)
def test_inherited_values(inheriting: str, source: str, value: Any, caplog: pytest.LogCaptureFixture) -> None:
    default = value_at(create_experiment_config(MINIMAL), source)
    assert value_at(create_experiment_config(MINIMAL), inheriting) == default is not None
    inherited = create_experiment_config(with_value(MINIMAL, source, value))
    assert value_at(inherited, inheriting) == value
    own = create_experiment_config(with_value(MINIMAL, inheriting, value))
    assert (value_at(own, inheriting), value_at(own, source)) == (value, default)
    assert not caplog.records

    # A file that was saved has the default of every source.
    assert create_experiment_config(to_dict(own)) == own
    assert not caplog.records

    mine, other = (True, False) if isinstance(value, bool) else (value, 3 * value or 3)
    both = create_experiment_config(with_value(with_value(MINIMAL, inheriting, mine), source, other))
    assert (value_at(both, inheriting), value_at(both, source)) == (mine, other)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{inheriting}: {mine!r} differs from {source} = {value_at(both, source)!r} and wins" in caplog.text

    # What was written down stays inherited, so that a grid over the source changes both.
    again = create_experiment_config(with_value(to_dict(create_experiment_config(MINIMAL)), source, value))
    assert value_at(again, inheriting) == value


def test_a_section_shared_by_two_configurations_inherits_in_each() -> None:
    data = DataConfig("digits")
    shared = {"model": ModelConfig("mlp"), "data": data, "optimizer": OptimizerConfig()}
    sizes = [
        ExperimentConfig("run", training=TrainingConfig(batch_size=size), **shared).data.batch_size for size in (2, 4)
    ]
    assert sizes == [2, 4]
    assert data.batch_size is None


def test_sections_are_plain_and_independent_of_what_they_were_given() -> None:
    mine = {"sizes": (1, 2)}
    model = ModelConfig("mlp", custom_params=mine)
    mine["more"] = (3,)
    assert model.custom_params == {"sizes": [1, 2]}
    assert OptimizerConfig(betas=(0.5, 0.9)).betas == [0.5, 0.9]  # type: ignore[arg-type]
    assert SLURMConfig(mem=64000).mem == "64000"  # type: ignore[arg-type]


def test_misspelled_attributes_and_arguments_are_refused() -> None:
    with pytest.raises(AttributeError, match="'hiden_size'. Did you mean 'hidden_size'"):
        ModelConfig("mlp").hiden_size = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="hiden_size"):
        ModelConfig("mlp", hiden_size=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="name"):
        ModelConfig("mlp", name="cnn")  # type: ignore[misc]
    with pytest.raises(ConfigurationError, match="given twice"):
        ModelConfig("mlp", type="cnn")  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match="model: received dict; expected ModelConfig"):
        ExperimentConfig("run", {"name": "mlp"}, TrainingConfig(), DataConfig("d"), OptimizerConfig())  # type: ignore


def test_constructing_a_section_checks_no_ranges() -> None:
    assert ModelConfig("mlp", hidden_size=-1).hidden_size == -1


def test_no_tensor_library_is_imported() -> None:
    program = "import sys, trainers.config; print({'torch', 'jax', 'mb_torch', 'numpy'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "set()\n", "")
