"""Every rule about values, and that everything wrong is reported at once, by dotted key."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from tests.unit.trainers.test_config_schema import MINIMAL
from trainers.config import ConfigurationError, ValidationError, create_experiment_config, with_value

POSITIVE = """
    model.hidden_size model.num_layers model.num_heads model.num_classes training.epochs training.max_steps
    training.batch_size data.batch_size training.gradient_accumulation_steps performance.gradient_accumulation_steps
    training.max_grad_norm performance.clip_grad_norm training.early_stopping_patience
    training.validation_every_n_epochs checkpoint.save_every_n_epochs checkpoint.save_every_n_steps
    checkpoint.save_every_n_minutes logging.log_every_n_steps slurm.nodes slurm.ntasks_per_node slurm.cpus_per_task
    training.learning_rate optimizer.learning_rate optimizer.eps checkpoint.timeout_seconds preemption.timeout_minutes
    performance.prefetch_factor
""".split()
NOT_NEGATIVE = """
    optimizer.weight_decay scheduler.warmup_steps scheduler.min_lr performance.num_workers data.num_workers
    preemption.grace_period_seconds preemption.max_preemptions
""".split()

# Key, a legal value, an illegal one.
RANGES: list[tuple[str, Any, Any]] = [
    *((key, 1, 0) for key in POSITIVE),
    *((key, 1, -1) for key in POSITIVE),
    *((key, 0, -1) for key in NOT_NEGATIVE),
    ("experiment_name", "A.b_c=1+2-3", ""),
    ("experiment_name", "n" * 200, "n" * 201),
    ("experiment_name", "0", "-run"),
    *(("experiment_name", "run", name) for name in ("a/b", "a..b", "a.", "a.lock", ".a", "ä", "a b", "a\n", "a:b")),
    ("seed", 0, -1),
    ("seed", 2**32 - 1, 2**32),
    ("model.name", "mlp", " "),
    ("data.dataset_name", "digits", ""),
    ("model.dropout", 0, -0.1),
    ("model.dropout", 1.0, 1.1),
    ("training.early_stopping_mode", "max", "maximum"),
    ("checkpoint.mode", "max", "MAX"),
    *(("optimizer.betas", [0, 0.5], betas) for betas in ([0.9], [0.9, 0.99, 0.999], [0.9, 1.0], [-0.1, 0.9], [])),
    ("checkpoint.save_top_k", -1, 0),
    ("checkpoint.save_top_k", 1, -2),
    ("performance.mixed_precision", "bf16-mixed", "fp16"),
    ("logging.log_level", "debug", "LOUD"),
    *(("slurm.mem", "32G", memory) for memory in ("1.5G", "G", "32 G", "-1", "32GiB", "")),
    *(("slurm.mem", memory, "much") for memory in ("0", "512", "32GB", "4k", "1T")),
    ("slurm.mem_per_cpu", "2G", "2.5G"),
    *(("slurm.time_limit", form, "soon") for form in ("1:30", "24:00:00", "2-0", "2-12:30", "2-12:30:00")),
    *(("slurm.time_limit", "1:00:00", form) for form in ("", "1:2:3:4", "1-", "-1", "1.5", "1d", "1-2:3:4:5")),
    ("slurm.gres", "gpu:a100:2", "2"),
    ("slurm.additional_args", ["--hold", "-p x"], ["hold"]),
    ("slurm.additional_args", ["--comment=a b"], ["--comment=a\n--b"]),
    *(("slurm." + name, "x", "x\ny") for name in ("account", "partition", "job_name", "output", "mail_user")),
    ("slurm.qos", "x", "x\x00"),
    ("preemption.signals", ["SIGUSR1", "SIGUSR2", "SIGHUP"], ["SIGUSR1", "SIGUSR2", "SIGNONE"]),
    ("preemption.signals", ["SIGUSR1", "SIGUSR2"], ["SIGUSR1", "SIGUSR2", "SIGKILL"]),
    ("preemption.requeue_signals", [], ["SIGHUP"]),
]


def problems_of(config: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        create_experiment_config(config)
    return caught.value.problems


@pytest.mark.parametrize(("key", "legal", "illegal"), RANGES)
def test_ranges(key: str, legal: Any, illegal: Any) -> None:
    create_experiment_config(with_value(MINIMAL, key, legal))
    (problem,) = problems_of(with_value(MINIMAL, key, illegal))
    assert problem.startswith(f"{key}: received ")
    assert "; expected " in problem


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [
        ({"name": "step", "step_size": 0}, "scheduler.step_size"),
        ({"name": "step", "gamma": 0}, "scheduler.gamma"),
        ({"name": "step", "gamma": 1.5}, "scheduler.gamma"),
        ({"name": "Step", "gamma": 1.5}, "scheduler.gamma"),
        ({"name": "multistep"}, "scheduler.milestones"),
        ({"name": "multistep", "milestones": [2, 2]}, "scheduler.milestones"),
        ({"name": "multistep", "milestones": [3, 2]}, "scheduler.milestones"),
        ({"warmup_steps": 10, "max_steps": 10}, "scheduler.warmup_steps"),
    ],
)
def test_schedulers(scheduler: dict[str, Any], key: str) -> None:
    assert [text.split(":")[0] for text in problems_of({**MINIMAL, "scheduler": scheduler})] == [key]


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "step", "step_size": 1, "gamma": 1.0},
        {"name": "multistep", "milestones": [1, 3]},
        {"name": "cosine", "gamma": 5, "step_size": 0, "milestones": [2, 1]},
        {"warmup_steps": 1, "max_steps": 10},
    ],
)
def test_legal_schedulers(scheduler: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    create_experiment_config({**MINIMAL, "scheduler": scheduler})
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optimizer.name": "lion"}, "optimizer.name"),
        ({"scheduler.name": "linear", "scheduler.warmup_steps": 0}, "scheduler.name"),
        ({"training.learning_rate": 1.5}, "training.learning_rate"),
        ({"optimizer.learning_rate": 1.5}, "optimizer.learning_rate"),
        ({"training.batch_size": 5000, "training.gradient_accumulation_steps": 3}, "data.batch_size"),
        ({"scheduler.warmup_steps": 11, "scheduler.max_steps": 100}, "scheduler.warmup_steps"),
        ({"scheduler.warmup_steps": 11, "training.max_steps": 100}, "scheduler.warmup_steps"),
        (
            {"training.early_stopping_patience": 1, "training.validation_every_n_epochs": 2},
            "training.early_stopping_patience",
        ),
        ({"slurm.time_limit": "60"}, "slurm.time_limit"),
        ({"custom_params.a": ["${oc.env:HOME}"]}, "custom_params.a[0]"),
    ],
)
def test_warnings_go_to_the_log(changes: dict[str, Any], key: str, caplog: pytest.LogCaptureFixture) -> None:
    config = MINIMAL
    for name, value in changes.items():
        config = with_value(config, name, value)
    create_experiment_config(config)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("key", "value", "converted"),
    [
        ("optimizer.eps", "1e-8", 1e-8),
        ("training.epochs", "3", 3),
        ("training.max_steps", 1e5, 100_000),
        ("training.learning_rate", 1, 1.0),
        ("slurm.requeue", "no", False),
        ("slurm.requeue", 0, False),
        ("slurm.mem", 64000, "64000"),
        ("version", 2.5, "2.5"),
        ("optimizer.betas", ("0.5", 0), [0.5, 0.0]),
        ("tags", ["a", 1], ["a", "1"]),
        ("model.hidden_size", np.int64(8), 8),
        ("custom_params.sizes", np.arange(2), [0, 1]),
        ("custom_params.rate", np.float32(0.5), 0.5),
    ],
)
def test_conversions(key: str, value: Any, converted: Any) -> None:
    config: Any = create_experiment_config(with_value(MINIMAL, key, value))
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    assert config == converted
    assert type(config) is type(converted)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.hidden_size", "wide", "a whole number"),
        ("model.hidden_size", 1.5, "a whole number"),
        ("model.hidden_size", True, "a whole number"),
        ("model.hidden_size", None, "a whole number"),
        ("model.hidden_size", [1], "a whole number"),
        ("model.num_classes", "many", "a whole number or null"),
        ("model.dropout", False, "a number"),
        ("model.dropout", "nan", "a number"),
        ("model.dropout", "???", "a number"),
        ("model.dropout", "${oc.env:HOME}", "a number"),
        ("model.name", True, "text"),
        ("model.name", {}, "text"),
        ("slurm.requeue", 2, "true or false"),
        ("slurm.requeue", "perhaps", "true or false"),
        ("tags", "baseline", "a list of texts"),
        ("tags", [False], "a list of texts"),
        ("optimizer.betas", 0.9, "a list of numbers"),
        ("optimizer.betas", [0.9, "high"], "a list of numbers"),
        ("custom_params", [1], "a dict"),
        ("model", "mlp", "a dict"),
        ("training.learning_rate", float("nan"), "a finite number"),
        ("training.learning_rate", float("inf"), "a finite number"),
    ],
)
def test_wrong_types(key: str, value: Any, expected: str) -> None:
    (problem,) = problems_of(with_value(MINIMAL, key, value))
    assert problem.startswith(f"{key}: received ")
    assert f"; expected {expected}" in problem


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [float("nan")]}, "a[0]: received nan"),
        ({"a": {"b": float("-inf")}}, "a.b: received -inf"),
        ({"a": {1, 2}}, "a: received {1, 2}"),
        ({"a": {3: "x"}}, "a.3: received 3"),
        ({"a": b"x"}, "a: received b'x'"),
        ({"a": "\ud800"}, "a: received"),
    ],
)
@pytest.mark.parametrize("key", ["custom_params", "model.custom_params", "data.preprocessing"])
def test_free_form_dicts_hold_plain_values(key: str, value: Any, place: str) -> None:
    (problem,) = problems_of(with_value(MINIMAL, key, value))
    assert problem.startswith(f"{key}.{place}")


def test_a_dict_that_contains_itself() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = [endless]
    with pytest.raises(ConfigurationError, match="contains itself"):
        create_experiment_config({**MINIMAL, "custom_params": endless})


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model": {"hiden_size": 1}}, "model.hiden_size: no key of the schema. Did you mean 'model.hidden_size'?"),
        ({"modle": {}}, "modle: no key of the schema. Did you mean 'model'?"),
        ({"learning_rate": 1}, "learning_rate: no key of the schema. Did you mean 'training.learning_rate'?"),
        (
            {"training": {"use_amp": True}},
            "training.use_amp: no key of the schema. Did you mean 'performance.mixed_precision'?",
        ),
        ({"model.hidden_size": 1}, "model.hidden_size: dotted keys belong into parameter_overrides or a grid"),
        ({5: 1}, "5: received 5; expected text as key"),
        ({"training": {True: 1}}, "training.True: received True; expected text as key"),
    ],
)
def test_unknown_keys(config: dict[Any, Any], problem: str) -> None:
    merged = {
        **MINIMAL,
        **{
            key: {**MINIMAL.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in config.items()
        },
    }
    (found,) = problems_of(merged)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    "key",
    [
        *("log_images_every_n_steps", "log_gradients", "log_model_parameters", "log_system_metrics"),
        *("backup_checkpoints", "cleanup_on_exit", "debug_mode", "log_frequency", "save_frequency"),
    ],
)
@pytest.mark.parametrize("section", ["training", "logging", "checkpoint", "preemption"])
def test_keys_that_were_read_nowhere_are_unknown(section: str, key: str) -> None:
    assert problems_of({**MINIMAL, section: {key: 1}})[0].startswith(f"{section}.{key}: no key of the schema")


def test_everything_wrong_is_reported_at_once() -> None:
    config = {
        "experiment_name": "a/b",
        "model": {"hiden_size": 3, "dropout": 2, "num_layers": "deep"},
        "training": {"epochs": 0, "batch_size": 0},
        "data": {"dataset_name": "d", "custom_params": {"x": float("nan")}},
        "scheduler": {"name": "multistep"},
        "slurm": {"gpus_per_node": "some"},
    }
    before = copy.deepcopy(config)
    problems = problems_of(config)
    assert sorted(text.split(":")[0] for text in problems) == sorted(
        [
            *(
                "experiment_name",
                "model.hiden_size",
                "model.dropout",
                "model.num_layers",
                "model.name",
                "training.epochs",
            ),
            *(
                "training.batch_size",
                "data.custom_params.x",
                "optimizer",
                "scheduler.milestones",
                "slurm.gpus_per_node",
            ),
        ]
    )
    with pytest.raises(ValueError, match="11 problems") as caught:
        create_experiment_config(config, source="run.yaml")
    assert all(text in str(caught.value) for text in [*problems, "run.yaml"])
    assert isinstance(caught.value, ConfigurationError)
    assert repr(config) == repr(before)


def test_an_error_survives_the_way_between_processes() -> None:
    error = ValidationError(["seed: wrong"], "run.yaml")
    again = pickle.loads(pickle.dumps(error))
    assert (again.problems, again.source, str(again)) == (error.problems, error.source, str(error))


@pytest.mark.parametrize("config", [None, [], "run.yaml", 3])
def test_only_dicts_are_configurations(config: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a dict"):
        create_experiment_config(config)


def test_a_dict_is_never_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBER", "0.5")
    (problem,) = problems_of(with_value(MINIMAL, "model.dropout", "${oc.env:NUMBER}"))
    assert problem.startswith("model.dropout: received '${oc.env:NUMBER}'; expected a number")
