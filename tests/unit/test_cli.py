"""The command `modelbatch demo`: what it writes, what it says, and how it fails."""

from __future__ import annotations

import doctest
import importlib
import io
import itertools
import json
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import cli.comparison
import cli.main
from cli.app import app
from cli.comparison import WEIGHT_TOLERANCE, Comparison, compare_with_loop, weight_difference
from cli.datasets import load_digit_images
from cli.errors import CommandError
from cli.grid import Grid, make_grid
from cli.models import ModelName, make_model
from cli.plots import plot_curves, plot_heat_map
from cli.report import print_comparison, rank, stage, write_results
from cli.training import History, Task, make_order, train_alone, train_at_once
from mb_torch import ModelBatch
from tests.arch.repository import ROOT, run_python

QUICK = ["--models", "6", "--epochs", "2", "--seed", "3"]


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One quick run of the command for all tests that look at what it leaves."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "by demo"
    torch.set_num_threads(1)
    result = run("demo", *QUICK, "--output", folder)
    assert result.exit_code == 0, result.output
    return result, folder


@pytest.fixture
def results(finished: tuple[Result, Path]) -> dict[str, Any]:
    return json.loads((finished[1] / "results.json").read_text())


@pytest.fixture(scope="module")
def task() -> Task:
    """Six MLPs of the demo and two epochs of it."""
    data = load_digit_images(seed=0)
    order = make_order(len(data.train_targets), 64, 2, seed=0)
    make = partial(make_model, ModelName.MLP, 8, 10)
    return Task(data, make, make_grid(6).configs, range(6), order)


def history_of(accuracies: list[list[float]], losses: list[list[float]]) -> History:
    rows = [torch.tensor(row) for row in losses]
    return History(rows, rows, [torch.tensor(row) for row in accuracies], [1.0] * len(rows))


class TestRun:
    def test_writes_exactly_what_it_says(self, finished: tuple[Result, Path]) -> None:
        result, folder = finished
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        weights = {f"weights/model_{i}.pt" for i in range(6)}
        assert written == {"results.json", "validation_curves.png", "heat_map.png", *weights}
        assert f"Written to {folder}" in result.stdout
        assert "backend torch." in result.stdout.splitlines()[0]
        assert result.stderr == ""

    def test_pictures_are_large_enough_to_read(self, finished: tuple[Result, Path]) -> None:
        for name in ("validation_curves.png", "heat_map.png"):
            assert min(png_size(finished[1] / name)) >= 500
            assert (finished[1] / name).stat().st_size > 10_000

    def test_saved_weights_reach_the_reported_accuracy(
        self, finished: tuple[Result, Path], results: dict[str, Any]
    ) -> None:
        data = load_digit_images(seed=3)
        for record in results["models"]:
            model = make_model("mlp", 8, 10)
            model.load_state_dict(torch.load(finished[1] / record["weights"], weights_only=True))
            scores = model(data.validation_inputs)
            accuracy = (scores.argmax(1) == data.validation_targets).float().mean().item()
            loss = torch.nn.functional.cross_entropy(scores, data.validation_targets).item()
            assert accuracy == pytest.approx(record["validation_accuracy"], abs=1e-6)
            assert loss == pytest.approx(record["validation_loss"], rel=1e-4)

    def test_saved_weights_load_as_a_batch(self, finished: tuple[Result, Path]) -> None:
        mb = ModelBatch.from_factory(partial(make_model, ModelName.MLP, 8, 10), seeds=range(6))
        mb.load_all(finished[1] / "weights")

    def test_each_model_has_its_own_point_of_the_grid(self, results: dict[str, Any]) -> None:
        points = [(record["learning_rate"], record["weight_decay"]) for record in results["models"]]
        assert points == list(itertools.product(results["learning_rates"], results["weight_decays"]))
        assert [record["seed"] for record in results["models"]] == list(range(3, 9))

    def test_numbers_agree_with_each_other(self, results: dict[str, Any]) -> None:
        assert results["settings"]["models"] == 6
        assert results["settings"]["backend"] == "torch"
        assert results["settings"]["epochs"] == 2
        for record in results["models"]:
            for name, curve in record["epochs"].items():
                assert len(curve) == 2
                assert curve[-1] == record[name]
        by_rank = sorted(results["models"], key=lambda record: record["rank"])
        assert [record["rank"] for record in by_rank] == list(range(1, 7))
        keys = [(-record["validation_accuracy"], record["validation_loss"]) for record in by_rank]
        assert keys == sorted(keys)
        seconds = results["seconds"]
        assert seconds["at_once"] == pytest.approx(sum(seconds["each_epoch"]))
        assert len(seconds["each_epoch"]) == 2

    def test_comparison_covers_all_models(self, results: dict[str, Any]) -> None:
        comparison = results["comparison"]
        assert comparison["models"] == list(range(6))
        assert not comparison["extrapolated"]
        assert comparison["one_after_another_seconds"] == comparison["measured_seconds"] > 0
        assert comparison["float64_steps"] == 20
        assert 0 <= comparison["float64_weight_difference"] <= WEIGHT_TOLERANCE
        assert len(comparison["validation_accuracy_differences"]) == 6

    def test_says_times_and_differences(self, finished: tuple[Result, Path], results: dict[str, Any]) -> None:
        output = finished[0].stdout
        loop, at_once = results["comparison"]["one_after_another_seconds"], results["seconds"]["at_once"]
        said = re.search(r"6 models one after another: ([\d.]+) s, at once: ([\d.]+) s \(([\d.]+) times\)", output)
        assert said is not None
        # The file holds rounded seconds.
        assert [float(number) for number in said.groups()] == pytest.approx([loop, at_once, loop / at_once], abs=0.11)
        assert f"by at most {results['comparison']['float64_weight_difference']:.1e}" in output
        assert "Largest difference" in output
        assert "extrapolated" not in output

    def test_shows_a_line_an_epoch_and_the_best_models(
        self, finished: tuple[Result, Path], results: dict[str, Any]
    ) -> None:
        output = finished[0].stdout
        for epoch in (1, 2):
            best = max(record["epochs"]["validation_accuracy"][epoch - 1] for record in results["models"])
            assert f"epoch {epoch}/2, its best validation accuracy {best:.2%}" in output
        for record in results["models"]:
            row = next(line for line in output.splitlines() if f"│{record['rank']:>5} │" in line)
            assert f"{record['validation_accuracy']:.2%}" in row
            assert f"{record['validation_loss']:.4f}" in row

    def test_repeats_to_the_bit(self, finished: tuple[Result, Path], results: dict[str, Any], tmp_path: Path) -> None:
        assert run("demo", *QUICK, "--output", tmp_path, "--compare-seconds", "0").exit_code == 0
        again = json.loads((tmp_path / "results.json").read_text())
        assert again["models"] == results["models"]
        assert again["comparison"] is None

    def test_removes_what_a_larger_run_left(self, tmp_path: Path) -> None:
        weights = tmp_path / "weights"
        weights.mkdir()
        for name in ("model_1.pt", "model_2.pt", "model_best.pt", "notes.txt"):
            (weights / name).write_text("old")
        arguments = ["--models", "2", "--epochs", "1", "--compare-seconds", "0", "--model", "cnn"]
        assert run("demo", *arguments, "--output", tmp_path).exit_code == 0
        assert {path.name for path in weights.iterdir()} == {
            "model_0.pt",
            "model_1.pt",
            "model_best.pt",
            "notes.txt",
        }
        assert set(torch.load(weights / "model_1.pt", weights_only=True)) >= {"0.weight", "5.bias"}

    def test_other_numbers_than_a_grid_are_announced(self, tmp_path: Path) -> None:
        arguments = ["--models", "7", "--epochs", "1", "--compare-seconds", "0", "--output", tmp_path]
        output = run("demo", *arguments).stdout
        assert "7 models make no near-square grid; running 6." in output
        assert "6 models (mlp): 3 learning rates x 2 weight decays" in output


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--models", "0"], "--models"),
            (["--model", "rnn"], "'rnn' is not one of 'mlp', 'cnn'"),
            (["--data", "cifar"], "'cifar' is not one of 'digits', 'fashion-mnist'"),
            (["--epochs", "many"], "--epochs"),
            (["--nonsense"], "--nonsense"),
        ],
    )
    def test_bad_option(self, arguments: list[str], message: str) -> None:
        result = run("demo", *arguments)
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert result.exit_code == 2
        assert len(errors) == 1
        assert message in errors[0]
        assert "Traceback" not in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--batch-size", "5000"], "--batch-size 5000 is more than the 1438 training images"),
            (["--backend", "abacus"], "'abacus'; expected one of"),
            (["--data", "fashion-mnist", "--data-dir", "/nowhere"], "apt-get install dataset-fashion-mnist"),
        ],
    )
    def test_what_cannot_be_done(self, arguments: list[str], message: str, tmp_path: Path) -> None:
        result = run("demo", *arguments, "--output", tmp_path)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert result.stdout == ""
        assert isinstance(result.exception, SystemExit)

    def test_unwritable_output_is_found_before_the_training(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        result = run("demo", *QUICK, "--output", tmp_path / "file" / "folder")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: cannot write to {tmp_path / 'file' / 'folder'}: ")
        assert result.stdout == ""

    def test_compiling_without_a_compiler(self, tmp_path: Path) -> None:
        result = run("demo", "--compile", "--output", tmp_path, CXX="no-such-compiler")
        assert result.exit_code == 1
        assert "'no-such-compiler', which is not installed" in result.stderr

    def test_folder_of_the_data_may_come_from_the_environment(self, tmp_path: Path) -> None:
        result = run(
            "demo", "--data", "fashion-mnist", "--output", tmp_path, MODELBATCH_DATA_DIR=str(tmp_path / "mine")
        )
        assert result.exit_code == 1
        assert f"in {tmp_path / 'mine'}" in result.stderr


class TestEntryPoint:
    def test_missing_packages_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli.main, "REQUIRED", {"typer": "typer", "no_such_module": "no-such-package"})
        with pytest.raises(SystemExit) as caught:
            cli.main.main()
        assert caught.value.code == (
            "Error: the command modelbatch needs no-such-package: pip install 'modelbatch-hybrid[demo]'"
        )

    def test_every_optional_package_is_asked_for(self) -> None:
        assert set(cli.main.REQUIRED.values()) == {"typer", "rich", "matplotlib", "scikit-learn"}

    def test_importing_it_loads_none_of_them(self) -> None:
        code = "import sys, cli.main; print([m for m in (*cli.main.REQUIRED, 'torch') if m in sys.modules])"
        assert run_python(code).stdout.strip() == "[]"

    def test_version(self) -> None:
        code = "import sys, cli.main; sys.argv = ['modelbatch', '--version']; cli.main.main()"
        assert run_python(code).stdout == "modelbatch-hybrid 0.1.0\n"

    @pytest.mark.parametrize("name", ["report", "models", "grid"])
    def test_examples_in_docstrings(self, name: str) -> None:
        tried = doctest.testmod(importlib.import_module(f"cli.{name}"))
        assert tried.attempted
        assert not tried.failed


class TestGrid:
    @pytest.mark.parametrize(
        ("asked", "rates", "decays"),
        [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 2, 2), (7, 3, 2), (11, 3, 3), (32, 8, 4), (53, 7, 7), (64, 8, 8)],
    )
    def test_shape(self, asked: int, rates: int, decays: int) -> None:
        grid = make_grid(asked)
        assert (len(grid.learning_rates), len(grid.weight_decays)) == (rates, decays)
        assert grid.num_models == rates * decays == len(grid.configs)

    def test_values_are_evenly_spaced_on_a_log_scale(self) -> None:
        for values in (make_grid(64).learning_rates, make_grid(64).weight_decays):
            ratios = [after / before for before, after in itertools.pairwise(values)]
            assert ratios == pytest.approx([math.sqrt(10)] * 7, rel=1e-3)


class TestTraining:
    def test_order_uses_each_row_at_most_once_an_epoch(self) -> None:
        order = make_order(num_rows=50, batch_size=8, epochs=3, seed=0)
        assert order.shape == (3, 6, 8)
        for epoch in order:
            assert len(epoch.unique()) == 48
        assert not order[0].equal(order[1])
        assert order.equal(make_order(50, 8, 3, seed=0))

    def test_order_needs_a_whole_batch(self) -> None:
        with pytest.raises(CommandError, match="more than the 7 training images"):
            make_order(num_rows=7, batch_size=8, epochs=1, seed=0)

    @pytest.mark.parametrize("name", list(ModelName))
    @pytest.mark.parametrize("size", [8, 28])
    def test_models_accept_both_image_sizes(self, name: ModelName, size: int) -> None:
        assert make_model(name, size, 10)(torch.zeros(5, 1, size, size)).shape == (5, 10)

    def test_validation_in_pieces_is_validation_at_once(self, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        _, whole = train_alone(task, 2)
        monkeypatch.setattr("cli.training.VALIDATION_ROWS", 100)
        _, pieces = train_alone(task, 2)
        assert pieces.validation_accuracy[-1].equal(whole.validation_accuracy[-1])
        torch.testing.assert_close(pieces.validation_loss[-1], whole.validation_loss[-1])

    def test_both_ways_agree_after_an_epoch(self, task: Task) -> None:
        """In float64, so that rounding cannot blur it: losses, accuracies and weights of every model."""
        exact = replace(
            task,
            data=task.data.to(torch.float64),
            make_model=lambda: task.make_model().double(),
            order=task.order[:1],
        )
        mb, at_once = train_at_once(exact)
        for index, state in enumerate(mb.get_model_states()):
            model, alone = train_alone(exact, index)
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-9)
            assert at_once.validation_accuracy[0][index] == alone.validation_accuracy[0][0]
            for curve in ("train_loss", "validation_loss"):
                both = getattr(at_once, curve)[0][index], getattr(alone, curve)[0][0]
                torch.testing.assert_close(*both, rtol=0, atol=1e-9)

    def test_start_up_is_what_the_first_epoch_took_longer(self) -> None:
        assert History(seconds=[9.0, 2.0, 1.0, 3.0]).start_up_seconds == 7.0
        assert History(seconds=[1.0, 2.0]).start_up_seconds == 0.0
        assert History(seconds=[9.0]).start_up_seconds is None


class TestComparison:
    def test_stops_in_time_and_extrapolates(self, task: Task) -> None:
        _, history = train_at_once(task)
        comparison = compare_with_loop(task, history, seconds=1e-9)
        assert len(comparison.models) == 1
        assert comparison.loop_seconds == pytest.approx(6 * comparison.measured_seconds)
        assert comparison.checked_models == 6
        said = r"another: [\d.]+ s extrapolated from 1 model, at once: [\d.]+ s \([\d.]+ times, extrapolated\)"
        assert re.search(said, self.printed(comparison, history))

    def test_sees_that_other_weights_were_trained(self, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
        """Negative control: the loop gets configurations of other models."""

        def train_another(task: Task, index: int) -> Any:
            return train_alone(task, (index + 3) % task.num_models)

        assert weight_difference(task, [0, 4], steps=5) <= WEIGHT_TOLERANCE
        monkeypatch.setattr(cli.comparison, "train_alone", train_another)
        _, history = train_at_once(task)
        comparison = compare_with_loop(task, history, seconds=60)
        assert not comparison.weights_agree
        assert not comparison.accuracies_agree
        assert comparison.rounding_effect is not None
        printed = self.printed(comparison, history)
        assert "WARNING: that is beyond the tolerance" in printed
        assert "WARNING: less than half of the accuracies agree" in printed

    def test_rounding_effect_comes_from_one_rounding_step(self, task: Task) -> None:
        torch.manual_seed(0)
        before = task.make_model()
        torch.manual_seed(0)
        after = cli.comparison._nudged_model(task.make_model, 0)
        for old, new in zip(before.parameters(), after.parameters(), strict=True):
            assert new.requires_grad
            assert (new != old).all()
            back = torch.where(new > old, -torch.inf, torch.inf)
            assert torch.nextafter(new, back).equal(old)
            assert 0.3 < (new > old).float().mean() < 0.7 or new.numel() < 50

    def test_nan_does_not_pass_for_agreement(self) -> None:
        assert not replace(self.agreeing, weight_difference=math.nan).weights_agree

    def test_no_warning_without_need(self) -> None:
        history = history_of([[0.5] * 4], [[1.0] * 4])
        assert "WARNING" not in self.printed(self.agreeing, history)

    def test_time_of_compilation_is_told_apart(self) -> None:
        history = replace(history_of([[0.5] * 4] * 3, [[1.0] * 4] * 3), seconds=[6.0, 1.0, 1.0])
        printed = self.printed(self.agreeing, history, compiled=True)
        assert "4 models one after another: 12.0 s, at once: 8.0 s (1.5 times)" in printed
        assert "About 5.0 s of the 8.0 s went into torch.compile, once: 4.0 times without." in printed
        assert "torch.compile" not in self.printed(self.agreeing, history)

    agreeing = Comparison([0, 1, 2, 3], 12.0, 12.0, 4, 20, 1e-12, torch.zeros(4), None)

    @staticmethod
    def printed(comparison: Comparison, history: History, compiled: bool = False) -> str:
        console = Console(file=io.StringIO(), width=80)
        grid = make_grid(len(history.validation_loss[0]))
        print_comparison(console, grid, history, comparison, compiled=compiled)
        return console.file.getvalue()


class TestReport:
    def test_rank_puts_a_model_that_diverged_last(self) -> None:
        history = history_of([[0.1, 0.9, 0.9, 0.1]], [[math.nan, 0.5, 0.4, 2.0]])
        assert rank(history) == [2, 1, 3, 0]

    def test_diverged_models_still_give_valid_json_and_pictures(self, tmp_path: Path) -> None:
        grid = Grid([0.1, 1.0], [0.1])
        history = history_of([[0.5, 0.1], [1.0, 0.0]], [[1.0, math.nan], [0.5, math.inf]])
        write_results(tmp_path / "results.json", {}, {}, grid, [0, 1], history, None)
        plot_curves(tmp_path / "curves.png", "title", grid, history)
        plot_heat_map(tmp_path / "map.png", "title", grid, history)

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        record = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["models"][1]
        assert record["validation_loss"] is None
        assert record["epochs"]["validation_loss"] == [None, None]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "map.png", "results.json"]

    def test_terminal_gets_a_bar_with_rate_and_remaining_time(self) -> None:
        console = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={})
        with stage(console, "Training", 4, "steps") as progress:
            for _ in range(4):
                progress.advance()
            progress.say("epoch 1/1")
        shown = console.file.getvalue()
        for part in ("Training", "4/4", "steps/s", "0:00:00", "epoch 1/1"):
            assert part in shown


@pytest.mark.long
def test_simple_demo() -> None:
    """The script that newcomers read first; its two ways of training must agree."""
    printed = run_python((ROOT / "examples" / "simple_demo.py").read_text()).stdout
    difference = re.search(r"loop and fused step agree up to (\S+)", printed)
    best, taken_out = re.findall(r"(?:with|batch:) ([\d.]+)%", printed)
    assert difference
    assert float(difference[1]) < 1e-2
    assert best == taken_out
    assert float(best) > 85


@pytest.mark.long
def test_default_demo(tmp_path: Path) -> None:
    """The command as people run it, in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "cli.main", "demo", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert "WARNING" not in finished.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["models"]) == 64
    assert max(record["validation_accuracy"] for record in results["models"]) > 0.97
    assert results["comparison"]["float64_weight_difference"] <= WEIGHT_TOLERANCE
    # A model of small learning rate trains stably, so both ways end with the very same answers.
    stable = [place for place, model in enumerate(results["comparison"]["models"]) if model < 32]
    differences = results["comparison"]["validation_accuracy_differences"]
    assert max((differences[place] for place in stable), default=0.0) < 0.01
