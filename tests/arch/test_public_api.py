"""The public API changes on purpose only, and every public name explains itself with examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

from tests.arch.public_api import GOLDEN, MODULES, render
from tests.arch.repository import SOURCE_FOLDERS
from trainers.config.section import Section

DOCUMENTED = {
    "modelbatch": {
        "DataRouter",
        "ModelBatch",
        "OptimizerFactory",
        "StratifiedDataRouter",
        "StratifiedRouter",
        "create_adam_configs",
        "create_lr_sweep_configs",
        "create_random_masks",
        "create_sgd_configs",
    },
    "modelbatch.core": {"ModelBatch"},
    "modelbatch.data": {"DataRouter", "StratifiedDataRouter", "StratifiedRouter", "create_random_masks"},
    "modelbatch.optimizer": {
        "OptimizerFactory",
        "create_adam_configs",
        "create_lr_sweep_configs",
        "create_sgd_configs",
    },
    "model_training_framework": {"ModelTrainingFramework"},
    "model_training_framework.config": {
        "ConfigurationError",
        "ConfigurationManager",
        "ExperimentConfig",
        "ParameterGrid",
        "ParameterGridSearch",
        "ValidationError",
    },
    "model_training_framework.trainer": {
        "CheckpointTimeoutError",
        "GenericTrainer",
        "PreemptionTimeoutError",
        "ResumeState",
        "TrainerError",
        "TrainerPhase",
        "TrainingCallback",
    },
    "model_training_framework.utils": {
        "Error",
        "Result",
        "Success",
        "ensure_directory_exists",
        "get_logger",
        "get_project_root",
        "setup_logging",
        "validate_project_structure",
    },
    "torchmb": {
        "AbstractBatchModule",
        "BatchModule",
        "batch_accuracy",
        "batch_loss",
        "batch_topk",
        "register_module",
    },
}


def all_modules() -> list[str]:
    """Every module of the front-end, the trainers and the compatibility packages, found on disk, not imported."""
    found: list[str] = []
    for package in ("mb_torch", "trainers", "modelbatch", "torchmb", "model_training_framework"):
        folder = next(base / package for base in SOURCE_FOLDERS if (base / package).is_dir())
        found.append(package)
        found += [info.name for info in pkgutil.walk_packages([str(folder)], f"{package}.")]
    return found


def test_public_api_is_as_written_down() -> None:
    assert render(MODULES) == GOLDEN.read_text(encoding="utf-8"), (
        "the public API changed; if that is wanted: python -m tests.arch.public_api --write"
    )


def test_public_api_shows_a_changed_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    import mb_torch

    before = render(["mb_torch"])
    original = mb_torch.create_random_masks
    monkeypatch.setattr(mb_torch, "create_random_masks", lambda *args, extra=1: original(*args))
    assert render(["mb_torch"]) != before


@pytest.mark.parametrize("module", sorted(DOCUMENTED))
def test_documented_names_are_exported(module: str) -> None:
    assert DOCUMENTED[module] <= set(importlib.import_module(module).__all__)


@pytest.mark.parametrize("module", MODULES)
def test_all_lists_what_is_there(module: str) -> None:
    loaded = importlib.import_module(module)
    assert sorted(set(loaded.__all__)) == sorted(loaded.__all__)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", ["mb_torch", "trainers.config", "trainers.utils"])
def test_public_names_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    objects = {name: getattr(loaded, name) for name in loaded.__all__}
    callables = {name: value for name, value in objects.items() if callable(value)}
    without_text = [name for name, value in callables.items() if not (value.__doc__ or "").strip()]
    # Errors are shown where they are raised, sections of a configuration in the whole one.
    own_example = {
        name: value
        for name, value in callables.items()
        if not (inspect.isclass(value) and issubclass(value, Exception | Section)) or name == "ExperimentConfig"
    }
    without_example = [name for name, value in own_example.items() if ">>>" not in (inspect.getdoc(value) or "")]
    assert without_text == []
    assert without_example == []


@pytest.mark.parametrize("module", all_modules())
def test_examples_in_docstrings_run(module: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    loaded = importlib.import_module(module)
    torch.manual_seed(0)
    results = doctest.testmod(loaded, optionflags=flags, raise_on_error=False)
    assert results.failed == 0
