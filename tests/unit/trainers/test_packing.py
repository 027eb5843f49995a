"""Which experiments are put into one pack, under which name, and how packs are started; all without torch."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.experiments import base_config
from trainers.config import ConfigurationError, create_experiment_config
from trainers.config.schema import ExperimentConfig
from trainers.searches.executors import Job, Plan
from trainers.searches.packing import (
    DEFAULT_PACK_SIZE,
    batch_signature,
    forget_outcomes,
    pack,
    pack_command,
    pack_name,
    read_outcomes,
)


def experiment(**changes: Any) -> ExperimentConfig:
    """A configuration; changes have dotted keys with ``__`` for the dots."""
    content = base_config(custom_params={"loss_args": {"smoothing": 0.1}}, slurm={})
    content["optimizer"] = {"name": "sgd", "custom_params": {"momentum": 0.9, "nesterov": False}}
    content["scheduler"] = {"name": "cyclic", "custom_params": {"base_lr": 0.1, "mode": "triangular"}}
    for key, value in changes.items():
        own = content
        *sections, last = key.split("__")
        for section in sections:
            own[section] = {**(own.get(section) or {})}
            own = own[section]
        own[last] = value
    return create_experiment_config(content)


PER_MODEL = {
    "seed": 5,
    "experiment_name": "other",
    "description": "other",
    "tags": ["other"],
    "created_by": "other",
    "created_at": "other",
    "version": "2.0",
    "training__learning_rate": 0.5,
    "training__max_grad_norm": 0.5,
    "training__early_stopping_patience": 5,
    "performance__clip_grad_norm": 0.5,
    "optimizer__learning_rate": 0.5,
    "optimizer__weight_decay": 0.5,
    "optimizer__betas": [0.5, 0.6],
    "optimizer__eps": 0.5,
    "optimizer__custom_params__momentum": 0,
    "scheduler__warmup_steps": 5,
    "scheduler__max_steps": 5000,
    "scheduler__min_lr": 0.5,
    "scheduler__gamma": 0.7,
    "scheduler__step_size": 5,
    "scheduler__milestones": [5],
    "scheduler__custom_params__base_lr": 0.5,
    "custom_params__loss_args__smoothing": 1,
    "checkpoint__checkpoint_dir": "other",
    "checkpoint__filename": "other_{epoch}",
    "slurm__job_name": "other",
}
SHARED = {
    "model__name": "other",
    "model__hidden_size": 5,
    "model__dropout": 0.5,
    "model__custom_params__depth": 5,
    "training__epochs": 5,
    "training__max_steps": 5,
    "training__batch_size": 5,
    "training__gradient_accumulation_steps": 5,
    "training__early_stopping_metric": "loss",
    "training__validation_every_n_epochs": 5,
    "data__dataset_name": "other",
    "data__custom_params": {"order_seed": 5},
    "optimizer__name": "adam",
    "optimizer__amsgrad": True,
    "optimizer__custom_params__nesterov": True,
    "optimizer__custom_params__dampening": 0.5,
    "scheduler": None,
    "scheduler__name": "cosine",
    "scheduler__custom_params__mode": "other",
    "custom_params__loss_args__other": 0.1,
    "custom_params__loss_args__smoothing": [0.1],
    "custom_params__other": 1,
    "checkpoint__monitor": "loss",
    "checkpoint__save_every_n_epochs": 5,
    "performance__mixed_precision": "bf16-mixed",
    "logging__use_wandb": True,
    "preemption__timeout_minutes": 1.0,
    "slurm": None,
    "slurm__mem": "5G",
    "deterministic": False,
}


@pytest.mark.parametrize("key", PER_MODEL)
def test_what_a_batch_has_for_each_model_does_not_divide(key: str) -> None:
    other = experiment(**{key: PER_MODEL[key]})
    assert other != experiment()
    assert batch_signature(other) == batch_signature(experiment())


@pytest.mark.parametrize("key", SHARED)
def test_everything_else_divides(key: str) -> None:
    assert batch_signature(experiment(**{key: SHARED[key]})) != batch_signature(experiment())


def test_a_signature_changes_nothing() -> None:
    config = experiment()
    batch_signature(config)
    assert config == experiment()


def test_packs_have_one_signature_and_at_most_so_many_experiments() -> None:
    configs = [experiment(seed=seed, model__hidden_size=[8, 16][seed % 2]) for seed in range(7)]
    assert pack(configs) == [[0, 2, 4, 6], [1, 3, 5]]
    assert pack(configs, 3) == [[0, 2, 4], [6], [1, 3, 5]]
    assert pack(configs, 1) == [[0], [2], [4], [6], [1], [3], [5]]
    assert pack([], 1) == []
    assert [len(own) for own in pack([experiment()] * (2 * DEFAULT_PACK_SIZE + 1))] == [64, 64, 1]


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"pack_size: received .*; expected a whole number >= 1"):
        pack([experiment()], size)


def test_names_of_packs_follow_from_what_is_in_them() -> None:
    given = [("m:f", "ab"), ("m:f", "ba"), ("m:g", "ab"), ("m:f", "abc"), ("m:f", ["ab"])]
    names = [pack_name(build, experiments) for build, experiments in given]
    assert len(set(names)) == len(names)
    assert pack_name("m:f", iter("ab")) == names[0]


def plan_of(tmp_path: Path, **settings: Any) -> Plan:
    configs = [experiment(experiment_name=name, model__hidden_size=len(name)) for name in ("a", "bb", "c")]
    jobs = [
        Job(index, config.experiment_name, config, tmp_path / "out" / config.experiment_name)
        for index, config in enumerate(configs)
    ]
    return Plan(tuple(jobs), tmp_path / "train.py", tmp_path, tmp_path / "out", **settings)


def test_a_process_for_each_pack(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, build="m:f", backend="jax")
    first, second = plan.tasks()
    assert [[job.name for job in task.jobs] for task in (first, second)] == [["a", "c"], ["bb"]]
    assert first.folder == tmp_path / "out" / "packs" / pack_name("m:f", ["a", "c"])
    assert first.command == pack_command(str(first.folder))
    assert first.is_pack
    assert plan.pack_contents() == {
        first.folder / "pack.json": {"build": "m:f", "backend": "jax", "experiments": ["a", "c"]},
        second.folder / "pack.json": {"build": "m:f", "backend": "jax", "experiments": ["bb"]},
    }
    assert [len(task.jobs) for task in plan_of(tmp_path, build="m:f", pack_size=1).tasks()] == [1, 1, 1]


def test_a_process_for_each_script(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert [[job.name for job in task.jobs] for task in plan.tasks()] == [["a"], ["bb"], ["c"]]
    assert not any(task.is_pack for task in plan.tasks())
    assert plan.pack_contents() == {}


def test_outcomes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "outcome.json"
    assert read_outcomes(tmp_path) == {}
    forget_outcomes(tmp_path)
    content = {"a": {"state": "FAILED", "error": "why"}}
    path.write_text(json.dumps(content))
    assert read_outcomes(tmp_path) == content
    with caplog.at_level(logging.WARNING):
        path.write_text('{"a": {"state"')
        assert read_outcomes(tmp_path) == {}
    assert "outcome.json cannot be read" in caplog.text
    forget_outcomes(tmp_path)
    assert not path.exists()


def test_planning_needs_no_torch() -> None:
    modules = "trainers.searches.packing, trainers.searches.framework, trainers.searches.local_executor"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
