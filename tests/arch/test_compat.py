"""The compatibility packages refuse to run beside the distribution whose names they offer."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from mb_torch._distributions import refuse_second_owner

PACKAGES = ["modelbatch", "torchmb", "model_training_framework"]
FRONT_END_PACKAGES = ["modelbatch", "torchmb"]


def install_fake(folder: Path, name: str) -> None:
    info = folder / f"{name}-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")


@pytest.mark.parametrize("package", PACKAGES)
def test_import_refuses_a_second_owner(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, package)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ImportError, match=f"pip uninstall {package}"):
        importlib.import_module(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_import_alone_is_fine(package: str) -> None:
    refuse_second_owner(package)


@pytest.mark.parametrize("spelling", ["ModelBatch", "MODELBATCH"])
def test_other_spellings_are_seen(spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, spelling)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"pip uninstall {spelling}"):
        refuse_second_owner("modelbatch")


@pytest.mark.parametrize("neighbour", ["modelbatch_hybrid", "modelbatch_tools", "torchmb2"])
def test_similar_names_are_no_owners(neighbour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, neighbour)
    monkeypatch.syspath_prepend(tmp_path)
    for package in PACKAGES:
        refuse_second_owner(package)


@pytest.mark.parametrize("package", FRONT_END_PACKAGES)
def test_names_are_the_front_ends(package: str) -> None:
    import mb_torch

    loaded = importlib.import_module(package)
    for name in set(loaded.__all__) - {"__version__"}:
        assert getattr(loaded, name) is getattr(mb_torch, name)


@pytest.mark.parametrize("submodule", ["config", "utils"])
def test_names_are_the_trainers(submodule: str) -> None:
    loaded = importlib.import_module(f"model_training_framework.{submodule}")
    ours = importlib.import_module(f"trainers.{submodule}")
    for name in loaded.__all__:
        assert getattr(loaded, name) is getattr(ours, name)


def test_configurations_and_trainer_share_their_classes() -> None:
    """One class for one thing: what `config` hands out is what `trainer` accepts."""
    import model_training_framework
    import model_training_framework.config
    import model_training_framework.trainer
    import trainers.settings
    from trainers.config import CheckpointConfig

    assert model_training_framework.config.CheckpointConfig is CheckpointConfig
    assert model_training_framework.trainer.GenericTrainerConfig is trainers.settings.GenericTrainerConfig
    assert model_training_framework.ParameterGrid is model_training_framework.config.ParameterGrid
