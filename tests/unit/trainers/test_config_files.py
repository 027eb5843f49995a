"""Files: what YAML and JSON mean, errors with file and line, atomic writes, and that what was saved loads equal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies

from tests.unit.trainers.test_config_schema import MINIMAL, SECTION_CLASSES
from trainers.config import (
    ConfigurationError,
    ConfigurationManager,
    ExperimentConfig,
    ModelConfig,
    TrainingConfig,
    UnsupportedFormat,
    ValidationError,
    create_experiment_config,
    files,
    to_dict,
    with_value,
)

DOCUMENTED = """\
experiment_name: "example_experiment"
description: "Complete configuration example"

model:
  name: "transformer"
  hidden_size: 512
  num_layers: 6
  num_heads: 8
  dropout: 0.1

training:
  epochs: 100
  batch_size: 32
  learning_rate: 0.001
  gradient_accumulation_steps: 1
  max_grad_norm: 1.0

data:
  dataset_name: "custom_dataset"
  train_split: "train"
  val_split: "validation"
  test_split: "test"
  preprocessing: {}

optimizer:
  name: "adamw"
  weight_decay: 0.01
  betas: [0.9, 0.999]
  eps: 1e-8

scheduler:
  name: "cosine"
  warmup_steps: 1000
  min_lr: 1e-6

slurm:
  job_name: "training_job"
  time_limit: "24:00:00"
  nodes: 1
  ntasks_per_node: 1
  cpus_per_task: 4
  mem: "32G"
  gres: "gpu:1"
  partition: "gpu"
  additional_args: []

logging:
  log_level: "INFO"
  use_wandb: true
  wandb_project: "my_project"
  wandb_entity: "my_team"
  log_every_n_steps: 10

checkpoint:
  save_every_n_epochs: 5
  save_top_k: 3
  monitor: "val_loss"
  mode: "min"
  checkpoint_dir: "./checkpoints"

preemption:
  timeout_minutes: 5
  grace_period_seconds: 60
  max_preemptions: 3

performance:
  num_workers: 4
  pin_memory: true
  prefetch_factor: 2
  persistent_workers: true

# Custom parameters
seed: 42
deterministic: true
benchmark: false
tags: ["experiment", "baseline"]
version: "1.0"
"""

ODD: dict[str, Any] = {
    "numbers as text": ["1e-8", "010", "0x1F", "1_000", "24:00:00", "1.0", ".5", "-.inf", "1e5", "0o7", "+3"],
    "words as text": [
        "on",
        "Yes",
        "null",
        "~",
        "true",
        "",
        " ",
        "-",
        "=",
        "<<",
        "2024-01-01",
        "!x",
        "&a",
        "*a",
        "a: b",
        "#",
    ],
    "interpolations as text": ["${", "${oc.env:HOME}", "a${b}c", "\\${x}", "\\\\${x}", "$X $(x) $", "${{x}}", "$${x}"],
    "to be given": ["???", "\\???", "\\\\???", "a???"],
    "unicode": "naïve – 日本 🎈 \u2028 \x85 \ufeff",
    "lines": "first\n  second\n\nlast\n",
    "blanks": "  around \t ",
    "control": "\x00\x07\r\n\x1b",
    "long": "word " * 60,
    "numbers": [1e-8, 1e22, -0.0, 5e-324, 2**70, 0.1, 1.0, 3],
    "others": [None, True, False, [], {}, [[]], {"a": {"b": [{"c": None}]}}],
    "keys": {"on": 1, "1": 2, "null": 3, "a.b": 4, "": 5, "ü": 6, "???": 7},
    "tuples": (1, (2, "x")),
}


@pytest.fixture
def manager(tmp_path: Path) -> ConfigurationManager:
    return ConfigurationManager(tmp_path)


def load(manager: ConfigurationManager, text: str | bytes, name: str = "run.yaml", validate: bool = False) -> Any:
    path = manager.config_dir / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return manager.load_config(path, validate=validate)


@pytest.mark.parametrize("format", ["yaml", "yml", "json"])
def test_the_documented_example(manager: ConfigurationManager, format: str, caplog: pytest.LogCaptureFixture) -> None:
    content = load(manager, DOCUMENTED, validate=True)
    assert not caplog.records
    assert content == {
        **yaml.safe_load(DOCUMENTED),
        "optimizer": {**content["optimizer"], "eps": 1e-8},
        "scheduler": {"name": "cosine", "warmup_steps": 1000, "min_lr": 1e-6},
    }
    config = create_experiment_config(content)
    assert (config.optimizer.eps, config.scheduler.min_lr, config.slurm.time_limit) == (1e-8, 1e-6, "24:00:00")
    saved = manager.project_root / "new" / f"saved.{format}"
    manager.save_config(config, saved, format=format)
    assert create_experiment_config(manager.load_config(saved)) == config


def full_config() -> ExperimentConfig:
    content = {**MINIMAL, **{name: {} for name in SECTION_CLASSES if name not in MINIMAL}, "custom_params": ODD}
    for key, value in {
        "description": "${x} ???",
        "created_by": "???",
        "model.custom_params": ODD,
        "data.preprocessing": ODD,
        "data.batch_size": 7,
        "logging.wandb_notes": "on",
        "logging.wandb_tags": ("1e-8", "é"),
        "optimizer.betas": (0.5, 0.75),
        "slurm.additional_args": ["--comment=${USER} 'x'"],
        "slurm.account": "1e-8",
        "slurm.begin": "010",
        "scheduler.milestones": (1, 2),
        "seed": 3,
    }.items():
        content = with_value(content, key, value)
    return create_experiment_config(content)


@pytest.mark.parametrize("format", ["yaml", "json"])
def test_everything_saved_loads_equal(manager: ConfigurationManager, format: str) -> None:
    config = full_config()
    manager.save_config(config, manager.config_dir / f"run.{format}", format=format)
    loaded = manager.load_config(f"run.{format}")
    assert loaded == to_dict(config)
    assert create_experiment_config(loaded) == config
    built = ExperimentConfig(
        "run",
        ModelConfig("mlp", custom_params=ODD),
        TrainingConfig(),
        config.data,
        config.optimizer,
        tags=("a", "b"),
        custom_params=ODD,
    )  # type: ignore[arg-type]
    manager.save_config(built, manager.config_dir / f"built.{format}", format=format)
    assert create_experiment_config(manager.load_config(f"built.{format}")) == built


PLAIN = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.text()
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(alphabet="${}\\?:.-+0123456789eE_xXonyYtTfF~\n\t #'\"", max_size=8),
    lambda below: strategies.lists(below, max_size=3) | strategies.dictionaries(strategies.text(), below, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("format", ["yaml", "json"])
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(params=strategies.dictionaries(strategies.text(), PLAIN, max_size=4))
def test_any_plain_value_loads_equal(manager: ConfigurationManager, format: str, params: dict[str, Any]) -> None:
    config = create_experiment_config({**MINIMAL, "custom_params": params})
    path = manager.config_dir / f"any.{format}"
    manager.save_config(config, path, format=format)
    loaded = create_experiment_config(manager.load_config(path))
    assert repr(loaded) == repr(config)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-8", 1e-8),
        ("-1E5", -1e5),
        ("1.5", 1.5),
        ("24:00:00", "24:00:00"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("1_000", "1_000"),
        ("0x1F", 31),
        ("-3", -3),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("true", True),
        ("~", None),
    ],
)
def test_what_yaml_means(manager: ConfigurationManager, text: str, value: Any) -> None:
    found = load(manager, f"custom_params: {{a: {text}}}")["custom_params"]["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_numbers_in_text_fields_stay_as_written(manager: ConfigurationManager, name: str) -> None:
    text = '{"version": 1.10, "tags": [1e5, 7], "slurm": {"mem": 64000}, "custom_params": {"a": 1.10}}'
    content = load(manager, text, name)
    assert content == {"version": "1.10", "tags": ["1e5", 7], "slurm": {"mem": 64000}, "custom_params": {"a": 1.1}}
    assert type(content["custom_params"]["a"]) is float
    examined = create_experiment_config({**MINIMAL, **content})
    assert (examined.tags, examined.slurm and examined.slurm.mem) == (["1e5", "7"], "64000")


def test_octal_looking_numbers_are_decimal(manager: ConfigurationManager) -> None:
    content = load(manager, f"{json.dumps(MINIMAL)[:-1]}, seed: 010, slurm: {{time_limit: 24:00:00}}}}", validate=True)
    assert content["seed"] == 10
    assert content["slurm"] == {"time_limit": "24:00:00"}


@pytest.mark.parametrize(
    ("name", "text", "line", "what"),
    [
        ("a.yaml", "seed: 1\nmodel:\n  name: a\n  name: b\n", 4, "'name' appears twice"),
        ("a.yaml", "seed: 1\nseed: 1\n", 2, "'seed' appears twice"),
        ("a.yaml", "# list\n- 1\n", 2, "received list"),
        ("a.yaml", "seed\n", 1, "received str"),
        ("a.yaml", "seed: 1\nmodel: [1\n", 3, "expected ',' or ']'"),
        ("a.yaml", "seed: 1\n\tmodel: 1\n", 2, "cannot start any token"),
        ("a.yaml", "seed: 1\nmodel: !!python/tuple [1]\n", 2, "could not determine a constructor"),
        ("a.yaml", "seed: 1\n---\nseed: 2\n", 2, "single document"),
        ("a.yaml", "seed: 1\nmodel: \x00\n", 2, "special characters"),
        ("a.yaml", b"seed: 1\nmodel: \xff\n", 2, "UTF-8"),
        ("a.json", '{"seed": 1,\n "model": }', 2, "no valid JSON"),
        ("a.json", '{"seed": 1,\n "seed": 2}', 2, "'seed' appears twice"),
        ("a.json", "[1]", 1, "received list"),
    ],
)
def test_broken_files(manager: ConfigurationManager, name: str, text: str | bytes, line: int, what: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(manager, text, name)
    assert f"{manager.config_dir / name}, line {line}: " in str(caught.value)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.yaml", "custom_params: {a: .nan}", "custom_params.a: received nan"),
        ("a.yaml", "custom_params: {a: [.inf]}", "custom_params.a[0]: received inf"),
        ("a.yaml", "custom_params: {a: !!set {x, y}}", "custom_params.a: received"),
        ("a.yaml", "custom_params: {1: x}", "custom_params.1: received 1"),
        ("a.yaml", "on: x", "True: received True"),
        ("a.json", '{"seed": NaN}', "seed: received nan"),
        ("a.json", '{"seed": -Infinity}', "seed: received -inf"),
        ("a.yaml", "seed: ???", "seed: still to be given"),
    ],
)
def test_values_that_no_file_may_hold(manager: ConfigurationManager, name: str, text: str, problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        load(manager, text, name)
    assert [found[: len(problem)] for found in caught.value.problems] == [problem]


def test_aliases_and_merge_keys(manager: ConfigurationManager) -> None:
    text = "custom_params: {a: &a {x: [1], y: 2}, b: {<<: *a, y: 3}, c: *a}"
    content = load(manager, text)["custom_params"]
    assert content == {"a": {"x": [1], "y": 2}, "b": {"x": [1], "y": 3}, "c": {"x": [1], "y": 2}}
    content["a"]["x"].append(2)
    assert content["c"]["x"] == [1]
    with pytest.raises(ConfigurationError, match="contains itself"):
        load(manager, "custom_params: &a {b: *a}")


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", ""), ("a.yml", "# nothing\n"), ("a.json", " \n"), ("a.JSON", "{}")]
)
def test_empty_files(manager: ConfigurationManager, name: str, text: str) -> None:
    assert load(manager, text, name) == {}


def test_unvalidated_content_is_the_files_own(manager: ConfigurationManager) -> None:
    text = "model: {type: mlp, wat: 1}\nmore: [1, {a: 1e-3}]\nscheduler:\n"
    assert load(manager, text) == {"model": {"type": "mlp", "wat": 1}, "more": [1, {"a": 1e-3}], "scheduler": None}


def test_validated_content_is_canonical_and_typed(manager: ConfigurationManager) -> None:
    content = load(
        manager, json.dumps({**MINIMAL, "model": {"type": "mlp"}, "optimizer": {"lr": "1e-3"}}), "a.json", True
    )
    assert content == {**MINIMAL, "optimizer": {"learning_rate": 1e-3}}
    with pytest.raises(ValidationError, match=r"(?s)problems in .*a\.yaml.*model: missing.*training\.epochs"):
        load(manager, "training: {epochs: 0}", "a.yaml", validate=True)


@pytest.mark.parametrize("name", ["run.toml", "run", "run.yaml.txt"])
def test_other_suffixes(manager: ConfigurationManager, name: str) -> None:
    with pytest.raises(UnsupportedFormat, match=r"expected one of \.yaml, \.yml, \.json"):
        load(manager, "seed: 1", name)
    assert issubclass(UnsupportedFormat, ConfigurationError)
    assert issubclass(UnsupportedFormat, ValueError)


@pytest.mark.parametrize("format", ["toml", "YAML", "", ".yaml"])
def test_other_formats(manager: ConfigurationManager, tmp_path: Path, format: str) -> None:
    with pytest.raises(UnsupportedFormat, match="expected yaml, yml or json"):
        manager.save_config(MINIMAL, tmp_path / "new" / "run.yaml", format=format)
    assert not (tmp_path / "new").exists()


def test_the_format_decides_whatever_the_suffix(manager: ConfigurationManager, tmp_path: Path) -> None:
    manager.save_config(MINIMAL, tmp_path / "run.txt", format="json")
    assert json.loads((tmp_path / "run.txt").read_text()) == MINIMAL


def test_what_is_written_is_canonical(manager: ConfigurationManager, tmp_path: Path) -> None:
    given = {"model": {"type": "mlp"}, "slurm": {"gpus_per_node": 2}, "custom_params": {"type": (1, 2)}}
    manager.save_config(given, tmp_path / "run.yaml")
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == {
        "model": {"name": "mlp"},
        "slurm": {"gres": "gpu:2"},
        "custom_params": {"type": [1, 2]},
    }
    assert given == {"model": {"type": "mlp"}, "slurm": {"gpus_per_node": 2}, "custom_params": {"type": (1, 2)}}


@pytest.mark.parametrize("value", [float("nan"), {1}, object(), {1: 2}, "\udcff"])
@pytest.mark.parametrize("format", ["yaml", "json"])
def test_what_cannot_be_written_leaves_the_file_as_it_was(
    manager: ConfigurationManager, tmp_path: Path, value: Any, format: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("old")
    with pytest.raises(ValidationError, match=r"custom_params\.a"):
        manager.save_config({"custom_params": {"a": value}}, path, format=format)
    assert path.read_text() == "old"


def test_a_crash_leaves_the_old_file(
    manager: ConfigurationManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("old")

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", crash)
        with pytest.raises(OSError, match="disk full"):
            manager.save_config(MINIMAL, path)
    assert path.read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["configs", "run.yaml"]


def test_a_link_keeps_pointing_to_its_file(manager: ConfigurationManager, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to("real.yaml")
    manager.save_config({"seed": 1}, link)
    assert link.is_symlink()
    assert (tmp_path / "real.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 50_000,
        "{a: " * 50_000,
        "- " * 50_000,
        "? " * 50_000,
        "\n".join(" " * n + "a:" for n in range(3000)),
    ],
    ids=["lists", "dicts", "items", "keys", "blocks"],
)
def test_what_nests_too_deep_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=r"deep\.yaml, line \d+"):
        ConfigurationManager(tmp_path, tmp_path).load_config(path)


def test_the_fast_parser_reads_what_is_written() -> None:
    text = files.written(to_dict(create_experiment_config(MINIMAL)), "yaml")
    assert files._is_plain(text)
    assert files._parsed(files._FastLoader, text)[1] == files._parsed(files._Loader, text)[1]
