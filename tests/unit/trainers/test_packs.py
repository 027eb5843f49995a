"""Packs: experiments trained as one batch end as they end alone, wherever they are stopped and however regrouped."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mb_torch import ModelBatch
from tests import packs
from tests.arch.repository import ROOT
from tests.compare import assert_close, assert_different
from tests.packs import (
    BATCH,
    BATCHES,
    BUILD,
    INPUTS,
    TARGETS,
    end_of,
    pack_config,
    rows_of,
    run_packs,
    states,
    stop_at,
    write_pack,
)
from tests.training_runs import assert_identical
from trainers import generic
from trainers.built import Built, build_experiment
from trainers.checkpoints.files import read_checkpoint
from trainers.config import ConfigurationError
from trainers.config.schema import ExperimentConfig
from trainers.generic import GenericTrainer
from trainers.packed import __main__ as packed_main
from trainers.packed import memory, run
from trainers.packed.experiment_files import ExperimentFiles
from trainers.packed.run import run_pack
from trainers.preemption.requeueing import RequeueDecision
from trainers.settings import GenericTrainerConfig

COMPLETED, FAILED, INTERRUPTED = "COMPLETED", "FAILED", "INTERRUPTED"


@pytest.fixture(autouse=True)
def _not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOP_AT", raising=False)


def various(number: int, **changes: Any) -> list[ExperimentConfig]:
    """Experiments that differ in everything that may differ within a pack."""
    return [
        pack_config(
            f"experiment{i}",
            seed=i % 3,
            optimizer__learning_rate=0.05 * (i + 1),
            optimizer__weight_decay=0.01 * i,
            optimizer__custom_params={"momentum": 0.5 + 0.1 * i},
            training__max_grad_norm=[0.05, None, 1.0][i % 3],
            custom_params__loss_args={"smoothing": 0.05 * i},
            **changes,
        )
        for i in range(number)
    ]


def adaptive(number: int, **changes: Any) -> list[ExperimentConfig]:
    return [
        pack_config(
            f"experiment{i}",
            seed=i,
            optimizer__name="adamw",
            optimizer__custom_params={},
            optimizer__betas=[0.9 - 0.1 * i, 0.99],
            optimizer__eps=1e-8 * (i + 1),
            optimizer__learning_rate=0.01 * (i + 1),
            scheduler={"name": "cosine", "warmup_steps": i, "min_lr": 1e-4 * i, "max_steps": 8 + i},
            training__early_stopping_patience=[None, 1, 2][i % 3],
            training__epochs=5,
            **changes,
        )
        for i in range(number)
    ]


def assert_same_ends(ours: Path, theirs: Path, names: Sequence[str], **bounds: float) -> None:
    for name in names:
        assert_close(end_of(ours, name), end_of(theirs, name), **bounds)


def names_of(configs: Sequence[ExperimentConfig]) -> list[str]:
    return [config.experiment_name for config in configs]


@pytest.mark.parametrize(
    ("configs", "bounds"),
    [
        (various(4, training__epochs=1, data__custom_params={"order_seed": 3}), {}),
        (various(4, model__custom_params={"double": True}), {"atol": 1e-9, "rtol": 0.0}),
        (adaptive(3, model__custom_params={"double": True}), {"atol": 1e-9, "rtol": 0.0}),
    ],
    ids=["float32", "float64", "adaptive"],
)
def test_a_packed_run_equals_the_unpacked_runs(
    configs: list[ExperimentConfig], bounds: dict[str, float], tmp_path: Path
) -> None:
    whole, single, other = tmp_path / "whole", tmp_path / "single", tmp_path / "other"
    for out, given, size in ((whole, configs, None), (single, configs, 1), (other, configs[::-1], 2)):
        assert set(states(run_packs(out, given, size)).values()) == {COMPLETED}
    names = names_of(configs)
    assert_same_ends(whole, single, names, **bounds)
    assert_same_ends(other, single, names, **bounds)
    for name in names[1:]:
        assert_different(end_of(whole, name)["model_state_dict"], end_of(whole, names[0])["model_state_dict"])


def test_a_packed_run_equals_plain_pytorch(tmp_path: Path) -> None:
    configs = various(3, model__custom_params={"double": True}, model__dropout=0.0, checkpoint__monitor=None)
    run_packs(tmp_path, configs, build="tests.packs:build_in_order")
    for config in configs:
        built = build_experiment(packs.build_in_order, config)
        options = {"weight_decay": config.optimizer.weight_decay, **config.optimizer.custom_params}
        optimizer = torch.optim.SGD(built.model.parameters(), config.optimizer.learning_rate, **options)
        for _ in range(config.training.epochs):
            for inputs, targets in built.train:
                optimizer.zero_grad()
                built.loss_fn(built.model(inputs), targets, **(built.loss_args or {})).backward()
                if config.training.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(built.model.parameters(), config.training.max_grad_norm)
                optimizer.step()
        content = read_checkpoint(tmp_path / config.experiment_name / "checkpoints" / "latest.ckpt")
        assert_close(content["model_state_dict"], built.model.state_dict(), atol=1e-9, rtol=0.0)
        assert_close(content["optimizer_state_dict"]["state"], optimizer.state_dict()["state"], atol=1e-9, rtol=0.0)


def test_each_experiment_has_files_of_its_own(tmp_path: Path) -> None:
    """Weights, optimizer and metrics of the folder belong together, and load where a single model trains."""
    configs = various(3, training__epochs=4, checkpoint__save_top_k=1)
    run_packs(tmp_path, configs)
    for config in configs:
        folder = tmp_path / config.experiment_name
        built = build_experiment(packs.build, config)
        last = torch.load(folder / "checkpoints" / "latest.ckpt", weights_only=True)
        best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
        assert last["experiment_name"] == config.experiment_name
        assert (last["epoch"], last["global_step"]) == (3, 4 * BATCHES)
        assert (last["callbacks"], last["trackers"]) == ([], {})
        assert last["config"]["performance"]["clip_grad_norm"] == config.training.max_grad_norm
        rows = {(int(epoch), name): float(value) for _, epoch, name, value in rows_of(folder)}
        accuracies = [rows[epoch, "val_accuracy"] for epoch in range(4)]
        assert best["epoch"] == accuracies.index(max(accuracies))
        for content in (best, last):
            built.model.load_state_dict(content["model_state_dict"])
            built.model.eval()
            with torch.no_grad():
                outputs = [(built.model(inputs), targets) for inputs, targets in built.val]
            value = sum(float(packs.accuracy(*pair)) for pair in outputs) / len(outputs)
            assert value == pytest.approx(rows[content["epoch"], "val_accuracy"])
            arguments = config.custom_params["loss_args"]
            loss = sum(float(packs.smoothed(*pair, **arguments)) for pair in outputs) / len(outputs)
            assert loss == pytest.approx(rows[content["epoch"], "val_loss"], rel=1e-5)
            assert content["metrics"]["val_loss"] == rows[content["epoch"], "val_loss"]
        own = GenericTrainerConfig.from_experiment_config(config)
        own.checkpoint_dir, own.experiment_name, own.max_epochs = str(folder / "checkpoints"), None, 5
        trainer = GenericTrainer(own, loss_fn=packs.smoothed, metrics=built.metrics)
        optimizer = torch.optim.SGD(built.model.parameters(), 1.0, **config.optimizer.custom_params)
        trainer.fit(built.model, optimizer, built.train, built.val)
        assert trainer.global_step == 5 * BATCHES
        assert optimizer.param_groups[0]["lr"] == config.optimizer.learning_rate


def test_an_experiment_that_stops_early_has_the_files_of_its_end(tmp_path: Path) -> None:
    patiences = {"e0": 1, "e1": None}
    configs = [
        pack_config(
            name, seed=1, training__epochs=6, training__early_stopping_patience=patience, optimizer__learning_rate=0.5
        )
        for name, patience in patiences.items()
    ]
    run_packs(tmp_path / "whole", configs)
    run_packs(tmp_path / "single", configs, 1)
    end = end_of(tmp_path / "whole", "e0")
    # The same model with the same data: only its patience keeps the other from stopping as well.
    assert end["has_stopped"]
    assert not end_of(tmp_path / "whole", "e1")["has_stopped"]
    assert end["epoch"] < 5
    assert end["csv"][-1][0][:2] == [str(end["global_step"]), str(end["epoch"])]
    assert_same_ends(tmp_path / "whole", tmp_path / "single", ["e0", "e1"])


def test_an_experiment_whose_patience_was_raised_has_the_files_of_its_new_end(tmp_path: Path) -> None:
    own: dict[str, Any] = {"seed": 1, "optimizer__learning_rate": 0.5}
    epochs = []
    for patience, last in ((1, 5), (9, 7)):
        own |= {"training__epochs": last + 1}
        run_packs(
            tmp_path, [pack_config("e0", training__early_stopping_patience=patience, **own), pack_config("e1", **own)]
        )
        epochs.append([int(row[1]) for row in rows_of(tmp_path / "e0") if row[2] == "val_loss"])
        assert end_of(tmp_path, "e0")["epoch"] == epochs[-1][-1]
    assert len(epochs[0]) < 6
    assert epochs[1] == [*epochs[0], 6, 7]


def test_what_cannot_be_built_or_diverges_fails_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = various(2)
    bad = [
        pack_config("unbuilt", custom_params__is_bad=True),
        pack_config("unstable", optimizer__learning_rate=1e300, custom_params__loss_args={"smoothing": 0.0}),
        pack_config(
            "momentum", optimizer__custom_params={"momentum": -1.0}, custom_params__loss_args={"smoothing": 0.0}
        ),
        pack_config("order", data__custom_params={"order_seed": "x"}),
    ]
    run_packs(tmp_path / "alone", good, 1)
    outcomes = run_packs(tmp_path / "all", [bad[0], good[0], *bad[1:], good[1]])
    assert states(outcomes) == {
        "unbuilt": FAILED,
        "experiment0": COMPLETED,
        "unstable": FAILED,
        "momentum": FAILED,
        "order": FAILED,
        "experiment1": COMPLETED,
    }
    assert outcomes["unbuilt"]["error"] == "it cannot be built: ValueError: no such data"
    assert outcomes["unstable"]["error"].startswith("it was stopped: its loss was ")
    assert "momentum" in outcomes["momentum"]["error"]
    assert "data.custom_params.order_seed: received 'x'" in outcomes["order"]["error"]
    assert json.loads(next(tmp_path.glob("all/packs/*/outcome.json")).read_text()) == outcomes
    assert_same_ends(tmp_path / "all", tmp_path / "alone", names_of(good))
    assert "unbuilt: it cannot be built" in caplog.text


@pytest.mark.parametrize("how", ["exception", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(
    "batch", [2 * BATCHES - 1, *(pytest.param(b, marks=pytest.mark.long) for b in (0, 2 * BATCHES + 2))]
)
def test_a_pack_that_is_stopped_ends_to_the_bit_as_one_that_is_not(
    how: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = adaptive(3, checkpoint__save_every_n_steps=3)
    run_packs(tmp_path / "whole", configs)
    out = tmp_path / "stopped"
    stop_at(monkeypatch, batch, how)
    outcomes = run_packs(out, configs)
    if how == "exception":
        assert {own["error"] for own in outcomes.values()} == {"training failed: OSError: the disk is gone"}
    assert set(states(outcomes).values()) == {FAILED if how == "exception" else INTERRUPTED}
    assert not list(out.glob("*/checkpoints"))
    monkeypatch.delenv("STOP_AT")
    assert set(states(run_packs(out, configs)).values()) == {COMPLETED}
    for name in names_of(configs):
        assert_identical(end_of(out, name), end_of(tmp_path / "whole", name))


@pytest.mark.long
def test_a_killed_pack_ends_to_the_bit_as_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = various(3, checkpoint__save_every_n_steps=3)
    run_packs(tmp_path / "whole", configs)
    folder = write_pack(tmp_path / "killed", configs)
    stop_at(monkeypatch, 2 * BATCHES + 2, "SIGKILL")
    path = os.pathsep.join([str(ROOT), str(ROOT / "compat")])
    command = [sys.executable, "-P", "-m", "trainers.packed", str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert set(states(json.loads((folder / "outcome.json").read_text())).values()) == {INTERRUPTED}
    monkeypatch.delenv("STOP_AT")
    # Its handlers would outlive this test.
    monkeypatch.setattr(packed_main, "setup_logging", lambda level: None)
    assert packed_main.main([str(folder)]) == 0
    for name in names_of(configs):
        assert_identical(end_of(tmp_path / "killed", name), end_of(tmp_path / "whole", name))


@pytest.mark.parametrize("batch", [pytest.param(2 * BATCHES - 1, marks=pytest.mark.long), 2 * BATCHES + 2])
@pytest.mark.parametrize(
    "chosen", [pytest.param([0, 1, 2, 3, 4, 5], id="all", marks=pytest.mark.long), pytest.param([5, 1, 4], id="some")]
)
def test_experiments_of_a_stopped_pack_go_on_in_other_packs(
    batch: int, chosen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = adaptive(6, model__custom_params={"double": True}, checkpoint__save_every_n_steps=3)
    run_packs(tmp_path / "whole", configs)
    out = tmp_path / "out"
    stop_at(monkeypatch, batch, "SIGTERM")
    assert set(states(run_packs(out, configs)).values()) == {INTERRUPTED}
    monkeypatch.delenv("STOP_AT")
    begun = count_begun(monkeypatch)
    again = [configs[place] for place in chosen]
    assert states(run_packs(out, again, 2)) == dict.fromkeys(names_of(again), COMPLETED)
    assert begun == []
    assert_same_ends(out, tmp_path / "whole", names_of(again), atol=1e-9, rtol=0.0)


def count_begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the seeds of runs that begin anew."""
    begun: list[int] = []
    seed_everything = generic.seed_everything

    def noted(seed: int) -> None:
        begun.append(seed)
        seed_everything(seed)

    monkeypatch.setattr(generic, "seed_everything", noted)
    return begun


def test_experiments_of_several_stopped_packs_go_on_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = various(5, model__custom_params={"double": True})
    run_packs(tmp_path / "whole", configs)
    out = tmp_path / "out"
    # Two stand at the same place, one elsewhere, one is complete, one has not begun.
    for places, batch in (([0], 6), ([2], 6), ([1], 9)):
        stop_at(monkeypatch, batch, "SIGTERM")
        run_packs(out, [configs[place] for place in places])
    monkeypatch.delenv("STOP_AT")
    run_packs(out, [configs[3]])
    begun = count_begun(monkeypatch)
    again = [configs[place] for place in (2, 4, 1, 3, 0)]
    assert states(run_packs(out, again)) == dict.fromkeys(names_of(again), COMPLETED)
    assert len(begun) == 1
    members = {tuple(json.loads(path.read_text())["experiments"]) for path in out.glob("packs/*/members.json")}
    assert ("experiment2", "experiment0") in members
    assert_same_ends(out, tmp_path / "whole", names_of(configs), atol=1e-9, rtol=0.0)


def test_the_newest_checkpoint_counts_also_if_the_packs_own_is_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = various(2, model__custom_params={"double": True})
    run_packs(tmp_path / "whole", configs)
    out = tmp_path / "out"
    stop_at(monkeypatch, 2, "SIGTERM")
    run_packs(out, configs)
    monkeypatch.delenv("STOP_AT")
    run_packs(out, configs, 1)
    monkeypatch.setenv("STOP_AT", str(BATCH + 1))
    monkeypatch.setenv("STOP_BY", "exception")
    packs.Rows.accesses = 0
    assert set(states(run_packs(out, configs)).values()) == {COMPLETED}, "it trained again"
    assert_same_ends(out, tmp_path / "whole", names_of(configs), atol=1e-9, rtol=0.0)


def test_another_build_function_does_not_go_on_from_the_firsts_checkpoints(tmp_path: Path) -> None:
    configs = various(2)
    run_packs(tmp_path / "out", configs)
    for out in (tmp_path / "out", tmp_path / "other"):
        run_packs(out, configs, 1, build="tests.packs:build_in_order")
    for name in names_of(configs):
        assert_identical(end_of(tmp_path / "out", name), end_of(tmp_path / "other", name))


def test_without_resume_a_pack_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = various(2, preemption__auto_resume=False)
    run_packs(tmp_path, configs)
    begun = count_begun(monkeypatch)
    monkeypatch.setattr(run, "starting_points", lambda *arguments: pytest.fail("it looked for checkpoints"))
    run_packs(tmp_path, configs)
    run_packs(tmp_path, configs, 1)
    assert len(begun) == 3


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    configs = various(2, checkpoint__save_every_n_steps=3)
    run_packs(tmp_path / "whole", configs)
    (folder,) = (tmp_path / "whole" / "packs").iterdir()
    out = tmp_path / "out"

    def again(*damaged: str, size: int = 2) -> None:
        shutil.rmtree(out, ignore_errors=True)
        stop_at(monkeypatch, 2 * BATCHES + 2, "SIGTERM")
        run_packs(out, configs)
        monkeypatch.delenv("STOP_AT")
        for pattern in damaged:
            for path in (out / "packs" / folder.name).glob(pattern):
                content = path.read_bytes()
                path.write_bytes(content[: len(content) // 2])
        assert set(states(run_packs(out, configs, size)).values()) == {COMPLETED}

    again("members.json", "outcome.json")
    for name in names_of(configs):
        assert_identical(end_of(out, name), end_of(tmp_path / "whole", name))
    again("epoch_*.ckpt")
    for name in names_of(configs):
        assert_identical(end_of(out, name), end_of(tmp_path / "whole", name))
    caplog.clear()
    again("members.json", size=1)
    assert "members.json is damaged" in caplog.text
    assert_same_ends(out, tmp_path / "whole", names_of(configs))
    again("epoch_002_step_*.ckpt", size=1)
    assert_same_ends(out, tmp_path / "whole", names_of(configs))
    again("epoch_*.ckpt", size=1)
    assert_same_ends(out, tmp_path / "whole", names_of(configs))


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_pack_that_cannot_be_read_is_an_error(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "pack.json").write_text(text)
    with pytest.raises(ConfigurationError, match=r"pack\.json"):
        run_pack(tmp_path)
    assert not (tmp_path / "outcome.json").exists()


def test_one_damaged_configuration_fails_alone(tmp_path: Path) -> None:
    configs = various(2)
    folder = write_pack(tmp_path, configs)
    (tmp_path / "experiment1" / "config.yaml").write_text("experiment_name: [")
    outcomes = run_pack(folder)
    assert states(outcomes) == {"experiment0": COMPLETED, "experiment1": FAILED}
    assert "config.yaml" in outcomes["experiment1"]["error"]


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"build: received 'tests\.packs:gone', which cannot be imported"):
        run_packs(tmp_path, various(1), build="tests.packs:gone")


def test_a_function_that_is_not_there_is_one_cause_for_all(tmp_path: Path) -> None:
    """Or a pack that died of it would be tried again in halves."""
    folder = write_pack(tmp_path, various(3), build="tests.packs:gone")
    with pytest.raises(ConfigurationError):
        run_pack(folder)
    outcomes = json.loads((folder / "outcome.json").read_text())
    assert set(states(outcomes).values()) == {FAILED}
    assert len({own["error"] for own in outcomes.values()}) == 1


def test_an_experiment_that_exits_fails_alone(tmp_path: Path) -> None:
    configs = [pack_config("fine"), pack_config("leaves", custom_params__exits=True)]
    outcomes = run_packs(tmp_path, configs)
    assert states(outcomes) == {"fine": COMPLETED, "leaves": FAILED}
    assert outcomes["leaves"]["error"] == "it cannot be built: SystemExit: 3"


def test_an_experiment_that_exits_in_training_does_not_end_the_others(tmp_path: Path) -> None:
    configs = [pack_config("leaves", custom_params__exits_in_training=True), pack_config("fine")]
    outcomes = run_packs(tmp_path, configs)
    assert states(outcomes) == {"leaves": FAILED, "fine": COMPLETED}
    assert outcomes["leaves"]["error"] == "training failed: SystemExit: 4"


def test_an_experiment_that_exits_when_it_is_built_again_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, built = GenericTrainer.fit, []

    def fit_one(self: GenericTrainer, model: Any, *others: Any) -> None:
        if model.num_models > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        fit(self, model, *others)

    def build_once(build: Any, config: ExperimentConfig) -> Built:
        if config.experiment_name == "leaves" and "leaves" in built:
            sys.exit(3)
        built.append(config.experiment_name)
        return build_experiment(build, config)

    monkeypatch.setattr(GenericTrainer, "fit", fit_one)
    monkeypatch.setattr(run, "build_experiment", build_once)
    outcomes = run_packs(tmp_path, [pack_config("leaves"), pack_config("fine")])
    assert states(outcomes) == {"leaves": FAILED, "fine": COMPLETED}
    assert outcomes["leaves"]["error"] == "it cannot be built: SystemExit: 3"


def test_two_processes_do_not_run_one_pack(tmp_path: Path) -> None:
    folder = write_pack(tmp_path, various(1))
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="another process runs this pack"):
            run_pack(folder)
    assert not (folder / "outcome.json").exists()
    assert states(run_pack(folder)) == {"experiment0": COMPLETED}


def test_a_pack_too_large_for_memory_trains_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = various(5, model__custom_params={"double": True})
    run_packs(tmp_path / "whole", configs)
    needed = memory.bytes_of(build_experiment(packs.build, configs[0]))
    monkeypatch.setattr(memory, "free_memory", lambda device: int(2.5 * needed / memory.SHARE))
    alive: list[int] = []
    train = run._PackRun._train

    def noted(self: Any, group: Any, content: Any) -> bool:
        alive.append(len(self._configs))
        return train(self, group, content)

    monkeypatch.setattr(run._PackRun, "_train", noted)
    assert set(states(run_packs(tmp_path / "divided", configs)).values()) == {COMPLETED}
    assert alive == [2, 4, 5]  # no more are built than train
    assert_same_ends(tmp_path / "divided", tmp_path / "whole", names_of(configs), atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("resumes", [pytest.param(True, marks=pytest.mark.long), False])
def test_where_memory_runs_out_half_of_the_experiments_are_tried(
    resumes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configs = odd("own generator", 5, preemption__auto_resume=resumes)
    run_packs(tmp_path / "single", configs, 1, build=ODD)
    fit, sizes = GenericTrainer.fit, []

    def fit_few(self: GenericTrainer, model: Any, *others: Any) -> None:
        sizes.append(model.num_models)
        if model.num_models > 2:
            next(iter(others[1]))  # where the order of the data has begun
            raise torch.OutOfMemoryError("CUDA out of memory")
        fit(self, model, *others)

    monkeypatch.setattr(GenericTrainer, "fit", fit_few)
    assert set(states(run_packs(tmp_path / "halves", configs, build=ODD)).values()) == {COMPLETED}
    assert sizes == [5, 2, 3, 1, 2]
    assert "memory ran out with 5 experiments at once" in caplog.text
    assert_same_ends(tmp_path / "halves", tmp_path / "single", names_of(configs))


def test_one_experiment_too_large_for_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(GenericTrainer, "fit", fail)
    outcomes = run_packs(tmp_path, odd("own generator", 3), build=ODD)
    assert {own["error"] for own in outcomes.values()} == {"training failed: MemoryError: "}


def test_the_backend_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Chosen:
        options = {"backend": "torch", "chunk_size": 2}

    def advise(self: ModelBatch, inputs: Any, targets: Any, loss_fn: Any, *, optimizer_cls: Any) -> Any:
        asked.append((loss_fn(self.model(0)(inputs), targets).shape, optimizer_cls))
        return Chosen()

    monkeypatch.setattr(ModelBatch, "advise", advise)
    made: list[Any] = []
    monkeypatch.setattr(
        run, "ModelBatch", lambda models, **options: made.append(options) or ModelBatch(models, **options)
    )
    configs = various(3)
    stop_at(monkeypatch, 0, "SIGTERM")
    # One more look at the first batch.
    monkeypatch.setenv("STOP_AT", str(3 * BATCH + 1))
    folder = write_pack(tmp_path / "auto", configs, backend="auto")
    assert set(states(run_pack(folder)).values()) == {INTERRUPTED}
    monkeypatch.delenv("STOP_AT")
    assert set(states(run_pack(folder)).values()) == {COMPLETED}
    assert asked == [(torch.Size([]), torch.optim.SGD)]
    assert json.loads((folder / "backend.json").read_text()) == {"backend": "torch", "chunk_size": 2}
    assert made[-1]["chunk_size"] == 2
    run_packs(tmp_path / "plain", configs)
    assert_same_ends(tmp_path / "auto", tmp_path / "plain", names_of(configs))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["jax", "auto"])
def test_on_another_backend(backend: str, tmp_path: Path) -> None:
    configs = various(3, model__dropout=0.0, training__epochs=1)
    assert set(states(run_packs(tmp_path / backend, configs, backend=backend)).values()) == {COMPLETED}
    run_packs(tmp_path / "torch", configs)
    assert_same_ends(tmp_path / backend, tmp_path / "torch", names_of(configs))


ONE_MODEL = nn.Linear(5, 3)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(INPUTS.float(), TARGETS, strict=True))


def build_odd(config: ExperimentConfig) -> Any:
    """Something unusual, by the name of the model."""
    kind, model = config.model.name, nn.Linear(5, 3)
    rows = TensorDataset(INPUTS.float(), TARGETS)
    loader: Any = DataLoader(rows, BATCH, shuffle=True)
    if kind == "one model":
        return Built(ONE_MODEL, nn.functional.cross_entropy, loader)
    if kind == "loss per row":
        return Built(model, nn.CrossEntropyLoss(reduction="none"), loader)
    if kind == "no batches":
        return Built(model, nn.functional.cross_entropy, [])
    if kind == "no val batches":
        return Built(model, nn.functional.cross_entropy, loader, [])
    if kind == "no rows":
        return Built(model, nn.functional.cross_entropy, DataLoader(TensorDataset(INPUTS[:0], TARGETS[:0]), BATCH))
    if kind == "no pairs":
        return Built(model, nn.functional.cross_entropy, [INPUTS.float()])
    if kind == "wrong width":
        return Built(nn.Linear(4, 3), nn.functional.cross_entropy, loader)
    if kind == "once":
        return Built(model, nn.functional.cross_entropy, iter(loader))
    if kind == "nothing":
        return None
    if kind == "stream":
        return Built(model, nn.functional.cross_entropy, DataLoader(Stream(), BATCH))
    if kind == "own generator":
        generator = torch.Generator().manual_seed(5)
        return Built(model, nn.functional.cross_entropy, DataLoader(rows, BATCH, shuffle=True, generator=generator))
    if kind == "numpy":
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(np.random.randn(3, 5)))
        torch.manual_seed(99)
        torch.set_default_dtype(torch.float32)
        print("built")
        return Built(model, nn.functional.cross_entropy, loader)
    raise AssertionError(kind)


def odd(kind: str, number: int = 3, **changes: Any) -> list[ExperimentConfig]:
    changes = {"checkpoint__monitor": "val_loss" if "val" in kind else "loss", "checkpoint__mode": "min", **changes}
    return [pack_config(f"e{i}", seed=i, model__name=kind, **changes) for i in range(number)]


ODD = f"{__name__}:build_odd"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("loss per row", "loss"),
        ("no batches", "train: received a loader without batches; expected at least one batch"),
        ("no rows", "train: received a loader without batches"),
        ("no val batches", "val_loader: received a loader without batches"),
        ("no pairs", "a batch for loss_fn: received a Tensor"),
        ("wrong width", "mat1 and mat2 shapes cannot be multiplied"),
        ("once", "which ends after one epoch"),
        ("nothing", "received a NoneType; expected a trainers.built.Built"),
    ],
)
def test_what_cannot_be_trained_says_why(kind: str, error: str, tmp_path: Path) -> None:
    outcomes = run_packs(tmp_path, odd(kind), build=ODD)
    assert set(states(outcomes).values()) == {FAILED}
    for own in outcomes.values():
        assert error in own["error"]


def test_a_name_that_no_checkpoint_can_have_is_refused_before_training(tmp_path: Path) -> None:
    configs = [pack_config("good"), pack_config("bad", checkpoint__filename="latest.ckpt")]
    outcomes = run_packs(tmp_path, configs)
    assert states(outcomes) == {"good": COMPLETED, "bad": FAILED}
    assert "it cannot be built" in outcomes["bad"]["error"]
    assert "checkpoint.filename: received 'latest.ckpt'" in outcomes["bad"]["error"]


def test_one_model_for_all_is_refused(tmp_path: Path) -> None:
    outcomes = run_packs(tmp_path, odd("one model"), build=ODD)
    assert states(outcomes) == {"e0": COMPLETED, "e1": FAILED, "e2": FAILED}
    assert "expected a new one at every call" in outcomes["e2"]["error"]


@pytest.mark.parametrize("kind", ["stream", "own generator", "numpy"])
def test_odd_data_and_generators(kind: str, tmp_path: Path) -> None:
    configs = odd(kind)
    assert set(states(run_packs(tmp_path / "whole", configs, build=ODD)).values()) == {COMPLETED}
    assert len(list((tmp_path / "whole").glob("packs/*/members.json"))) == 1
    run_packs(tmp_path / "single", configs, 1, build=ODD)
    run_packs(tmp_path / "other", configs[::-1], 2, build=ODD)
    assert_same_ends(tmp_path / "whole", tmp_path / "single", names_of(configs))
    assert_same_ends(tmp_path / "other", tmp_path / "single", names_of(configs))


def test_a_look_at_the_first_batch_changes_no_order(tmp_path: Path) -> None:
    """A loader with a generator of its own trains on the batches that it would give anybody else."""
    (config,) = odd("own generator", 1, training__epochs=1)
    seen: list[Any] = []
    fit = GenericTrainer.fit

    def noted(self: GenericTrainer, model: Any, optimizer: Any, train: Any, *others: Any) -> None:
        seen.append(train.generator.get_state())
        fit(self, model, optimizer, train, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenericTrainer, "fit", noted)
        run_packs(tmp_path, [config], build=ODD)
    assert torch.equal(seen[0], torch.Generator().manual_seed(5).get_state())


def test_a_schedule_needs_the_length_of_an_epoch(tmp_path: Path) -> None:
    outcomes = run_packs(tmp_path, odd("stream", scheduler={"name": "cosine"}), build=ODD)
    assert "received 'cosine' with a train loader that has no length" in outcomes["e0"]["error"]


def test_files_of_all_experiments_are_not_kept_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    configs = odd("own generator", 40, training__epochs=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
    try:
        outcomes = run_packs(tmp_path, configs, build=ODD)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert set(states(outcomes).values()) == {COMPLETED}, outcomes["e0"]


def test_a_checkpoint_that_cannot_be_written_fails_its_experiment_only(tmp_path: Path) -> None:
    configs = various(2)
    folder = write_pack(tmp_path, configs)
    (tmp_path / "experiment0" / "checkpoints").write_text("no folder")
    outcomes = run_pack(folder)
    assert states(outcomes) == {"experiment0": FAILED, "experiment1": COMPLETED}
    assert outcomes["experiment0"]["error"].startswith("its checkpoint was not written: TrainerError: checkpoint_dir")


@pytest.mark.parametrize("place", ["{out}/shared", "../shared", "{out}/shared/../{name}/own", "own/../own"])
def test_a_folder_of_checkpoints_that_experiments_share_has_a_part_for_each(place: str, tmp_path: Path) -> None:
    names = ["e0", "e1", "e2"]
    configs = [
        pack_config(
            name, training__epochs=1, checkpoint__checkpoint_dir=place.format(out=tmp_path, name=name), seed=seed
        )
        for seed, name in enumerate(names)
    ]
    assert set(states(run_packs(tmp_path, configs)).values()) == {COMPLETED}
    for name in names:
        folder = tmp_path / "shared" / name if place.endswith("shared") else tmp_path / name / "own"
        assert read_checkpoint(folder / "latest.ckpt")["experiment_name"] == name


# When a signal comes: while an experiment is built (from 0), measured, trained behind the last boundary, or written.
@pytest.mark.parametrize("when", ["build 0", "build 1", "measure", "end", "export"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_signal_while_nothing_trains(
    number: signal.Signals, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = various(4)
    run_packs(tmp_path / "whole", configs)
    out, asked = tmp_path / "out", []
    places = {
        "build 0": (run, "build_experiment"),
        "build 1": (run, "build_experiment"),
        "measure": (run, "models_that_fit"),
        "end": (ExperimentFiles, "on_training_end"),
        "export": (ExperimentFiles, "export"),
    }
    owner, name = places[when]
    inner, calls = getattr(owner, name), [0]

    def signalled(*arguments: Any) -> Any:
        if calls[0] == int(when == "build 1"):
            signal.raise_signal(number)
        calls[0] += 1
        return inner(*arguments)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        # Two at a time.
        patch.setattr(memory, "free_memory", lambda device: int(2.5 * needed / memory.SHARE))
        patch.setattr(RequeueDecision, "carry_out", lambda self: asked.append(self._limit))
        needed = memory.bytes_of(build_experiment(packs.build, configs[0]))
        begun = count_begun(patch)
        ended = states(run_packs(out, configs))
    assert signal.getsignal(number) == before
    is_half = when in ("end", "export")
    assert list(ended.values()) == [COMPLETED if is_half else INTERRUPTED] * 2 + [INTERRUPTED] * 2
    assert len(begun) == int(is_half)
    assert asked == [configs[0].preemption.max_preemptions]
    monkeypatch.setattr(memory, "free_memory", lambda device: int(2.5 * needed / memory.SHARE))
    assert set(states(run_packs(out, configs)).values()) == {COMPLETED}
    assert_same_ends(out, tmp_path / "whole", names_of(configs))


def test_a_signal_after_everything_is_done_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = ExperimentFiles.export

    def signalled(self: ExperimentFiles, name: str, content: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        export(self, name, content)

    monkeypatch.setattr(ExperimentFiles, "export", signalled)
    monkeypatch.setattr(RequeueDecision, "carry_out", lambda self: pytest.fail("the job was requeued"))
    assert set(states(run_packs(tmp_path, various(2))).values()) == {COMPLETED}


def test_signals_that_are_not_asked_for_keep_their_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(run, "models_that_fit", lambda *arguments: seen.append(signal.getsignal(signal.SIGTERM)) or 9)
    configs = various(2, preemption__signals=["SIGUSR2"], preemption__requeue_signals=["SIGUSR2"])
    run_packs(tmp_path, configs)
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_one_reason_is_explained_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = run_packs(tmp_path, [pack_config(f"bad{i}", custom_params__is_bad=True) for i in range(20)])
    assert set(states(outcomes).values()) == {FAILED}
    assert len(caplog.records) == 20
    assert [bool(record.exc_info) for record in caplog.records] == [True] + [False] * 19
    assert caplog.messages[7] == "bad7: it cannot be built: ValueError: no such data"


def test_log_names_the_experiments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trainers"):
        run_packs(tmp_path, [pack_config("fine"), pack_config("wild", optimizer__learning_rate=1e300)])
    assert "wild was stopped" in caplog.text


def test_the_functions_of_this_file_are_where_packs_look_for_them() -> None:
    assert f"{packs.__name__}:build" == BUILD
    assert sys.modules[__name__].build_odd is build_odd  # type: ignore[attr-defined]
