"""The benchmarks compare like with like, notice when they do not, and run. Nothing here looks at times."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bars, command, comparison, packing, peers, plots, report, resnet_step
from benchmarks.contestants import CONTESTANTS, CONVOLUTIONS, ON_JAX, ON_TORCH, ONE_RATE, TOGETHER, Contestant, Loop
from benchmarks.floors import Rates, floor_of
from benchmarks.measure import (
    Disagreement,
    Memory,
    Race,
    Spread,
    Timings,
    check_losses,
    check_weights,
    race,
)
from benchmarks.plan import Choices, Plan
from benchmarks.recipes import RECIPES
from benchmarks.results import Results
from benchmarks.worker import Weights, Worker, WorkerFailed
from benchmarks.workloads import CNNs, MLPs, Workload
from tests.marks import needs_compiler

SMALL = MLPs(num_models=3, features=6, hidden=5, classes=4, batch=8)
ONE = replace(SMALL, num_models=1)
SWEEP = replace(SMALL, lowest_rate=1e-4, highest_rate=1e-2)
IMAGES = CNNs(num_models=3, side=4, channels=(2, 3), classes=4, batch=8, lowest_rate=1e-2, highest_rate=1e-2)
KINDS: dict[str, Workload] = {**comparison.KINDS, "ResNet-18": resnet_step.WORKLOAD}
EAGER = [name for name in ON_TORCH if name not in bars.PEERS and "compiled" not in name]


def train(contestant: Contestant, workload: Workload, steps: int) -> tuple[np.ndarray, Weights]:
    """Losses of each step and the weights afterwards; five steps a call."""
    batches = workload.batches()
    calls = [[batches[k % len(batches)] for k in range(first, first + 5)] for first in range(0, steps, 5)]
    losses = [contestant.losses(contestant.run(own)) for own in calls]
    contestant.wait()
    weights = [{name: value.detach().numpy() for name, value in model.items()} for model in contestant.weights()]
    return np.concatenate(losses), weights


@pytest.mark.parametrize("workload", [SMALL, ONE, SWEEP], ids=["many", "one", "sweep"])
@pytest.mark.parametrize("name", EAGER)
def test_contestants_train_the_same_models(name: str, workload: MLPs) -> None:
    if workload is SWEEP and name in ONE_RATE:
        with pytest.raises(ValueError, match="one learning rate"):
            CONTESTANTS[name](workload)
        return
    agrees_with_the_loop(name, workload)


@pytest.mark.long
@pytest.mark.parametrize("name", ON_JAX)
def test_contestants_on_jax_train_the_same_models(name: str) -> None:
    agrees_with_the_loop(name, SWEEP)


@pytest.mark.parametrize(
    "name", [bars.FUSED, *(pytest.param(name, marks=pytest.mark.long) for name in [bars.JAX_FUSED, *CONVOLUTIONS])]
)
def test_contestants_train_the_same_convolutions(name: str) -> None:
    agrees_with_the_loop(name, IMAGES)


@pytest.mark.parametrize(
    ("name", "workload"), [(bars.TRAINED, ONE), (bars.TRAINED_BATCH, SMALL), (bars.TRAINED_BATCH, SWEEP)]
)
def test_trainers_train_the_same_models(name: str, workload: MLPs) -> None:
    agrees_with_the_loop(name, workload)


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_the_same(kind: str, shared_input: bool) -> None:
    for optimizer in RECIPES if kind == "MLP" else [KINDS[kind].optimizer]:
        own = comparison.small(replace(KINDS[kind], dtype="float64"))
        own = replace(own, optimizer=optimizer, shared_input=shared_input)
        _, expected = train(Loop(own), own, 5)
        for name in EAGER:
            assert check_weights({"loop": expected, name: train(CONTESTANTS[name](own), own, 5)[1]}) <= 1e-9


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained_the_same_on_jax(kind: str) -> None:
    own = comparison.small(replace(KINDS[kind], dtype="float64"))
    _, expected = train(Loop(own), own, 5)
    for name in ON_JAX:
        assert check_weights({"loop": expected, name: train(CONTESTANTS[name](own), own, 5)[1]}) <= 1e-9


def agrees_with_the_loop(name: str, workload: Workload) -> None:
    precise = replace(workload, dtype="float64")
    _, expected = train(Loop(precise), precise, 5)
    _, found = train(CONTESTANTS[name](precise), precise, 5)
    assert found[0].keys() == expected[0].keys()
    assert {value.dtype.name for model in found for value in model.values()} == {"float64"}
    assert check_weights({"loop": expected, name: found}) <= 1e-9

    curve, _ = train(Loop(workload), workload, 40)
    own_curve, _ = train(CONTESTANTS[name](workload), workload, 40)
    check_losses({"loop": curve, name: own_curve})


def test_another_learning_rate_is_noticed() -> None:
    precise = replace(SMALL, dtype="float64")
    off = replace(precise, lowest_rate=1.001e-3, highest_rate=1.001e-3)
    with pytest.raises(Disagreement, match="off from loop"):
        check_weights({"loop": train(Loop(precise), precise, 5)[1], "other": train(Loop(off), off, 5)[1]})
    off = replace(SMALL, lowest_rate=2e-3, highest_rate=2e-3)
    with pytest.raises(Disagreement, match="other: loss"):
        check_losses({"loop": train(Loop(SMALL), SMALL, 40)[0], "other": train(Loop(off), off, 40)[0]})


@pytest.mark.parametrize("spoil", ["value", "nan", "shape", "key", "model"])
def test_wrong_weights_are_noticed(spoil: str) -> None:
    right: Weights = [{"weight": np.ones((2, 2))}, {"weight": np.ones((2, 2))}]
    wrong: Weights = [{"weight": np.ones((2, 2))}, {"weight": np.ones((2, 2))}]
    if spoil == "value":
        wrong[1]["weight"][0, 1] += 1e-8
    elif spoil == "nan":
        wrong[1]["weight"][0, 1] = np.nan
    elif spoil == "shape":
        wrong[1]["weight"] = np.ones((1, 2))
    elif spoil == "key":
        wrong[1]["bias"] = np.ones(2)
    else:
        del wrong[1]
    assert check_weights({"right": right, "the same": right}) == 0
    with pytest.raises(Disagreement, match="wrong"):
        check_weights({"right": right, "wrong": wrong})


@pytest.mark.parametrize("spoil", ["value", "nan", "length"])
def test_wrong_losses_are_noticed(spoil: str) -> None:
    right = np.array([[2.0, 2.0], [1.0, 1.0]])
    wrong = {
        "value": np.array([[2.0, 2.0], [1.0, 1.1]]),
        "nan": np.array([[2.0, np.nan], [1.0, 1.0]]),
        "length": right[:1],
    }
    check_losses({"right": right, "the same": right})
    with pytest.raises(Disagreement, match="wrong"):
        check_losses({"right": right, "wrong": wrong[spoil]})


def test_a_single_model_is_compared_for_so_many_steps() -> None:
    right = np.linspace(2.0, 1.0, 400)[:, None]
    for step, value, agrees in ((299, 9.0, False), (300, 9.0, True), (300, np.nan, False)):
        wrong = right.copy()
        wrong[step] = value
        with nullcontext() if agrees else pytest.raises(Disagreement, match="wrong"):
            check_losses({"right": right, "wrong": wrong})


def test_losses_must_fall() -> None:
    with pytest.raises(Disagreement, match="do not fall"):
        check_losses({"constant": np.ones((5, 2))})


@pytest.mark.long
def test_contestants_race_in_processes_of_their_own() -> None:
    names = ["loop", bars.FUSED]
    lines: list[str] = []
    timings = race(Race(names, SMALL, steps=4, warm_up=1), 1, rounds=5, say=lines.append)
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == dict.fromkeys(names, 5)
    assert timings.ratio("loop", "loop").median == 1
    assert any("round 5 of 5" in line for line in lines)


@pytest.mark.long
def test_a_failing_worker_is_named_with_its_error() -> None:
    with Worker("loop", threads=1) as worker:
        with pytest.raises(WorkerFailed, match="loop: 'build' failed(.|\n)*float17"):
            worker.build(replace(SMALL, dtype="float17"))
        worker.build(SMALL)
        worker.run(1)
        assert worker.losses().shape == (1, SMALL.num_models)


@pytest.mark.long
@pytest.mark.parametrize("name", [bars.JAX_SCAN, bars.JAX_RUN])
def test_a_worker_keeps_the_losses_of_every_step_of_a_call(name: str) -> None:
    with Worker(name, threads=1) as worker, Worker("loop", threads=1) as loop:
        for own in (worker, loop):
            own.build(SMALL)
            own.run(25)
        check_losses({"loop": loop.losses(), name: worker.losses()})
        assert worker.losses().shape == (25, SMALL.num_models)


@pytest.mark.long
def test_a_disagreement_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def disagree(*_: object) -> float:
        raise Disagreement("the weights differ")

    monkeypatch.setattr(command, "agree_in_float64", disagree)
    assert command.main(["--quick", "--without-peers", "--only", "mlp", "cnn"]) == 1
    said = capsys.readouterr().err
    assert "mlp: the contestants do not compute the same: the weights differ" in said
    assert "cnn: the contestants do not compute the same: the weights differ" in said


def test_too_few_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--rounds", "14"])
    assert "at least 15" in capsys.readouterr().err


def test_ratios_are_formed_round_by_round() -> None:
    timings = Timings(SMALL, 5, {}, {"slow": [2.0, 8.0, 6.0], "fast": [1.0, 2.0, 2.0]}, 0.0)
    assert timings.ratio("slow", "fast") == Spread(3.0, 2.5, 3.5, 2.0, 4.0)
    assert timings.fastest(["slow", "fast"]) == "fast"


@pytest.mark.parametrize(
    ("value", "at_least", "holds"),
    [(1.6, True, True), (1.59, True, False), (1.6, False, True), (1.61, False, False), (float("nan"), True, False)],
)
def test_bars(value: float, at_least: bool, holds: bool) -> None:
    bar = bars.Bar("a ratio", Spread(value, value, value, value, value), 1.6, at_least)
    assert bar.holds is holds
    assert ("**no**" in report.bars_table([bar])) is not holds


def test_bars_of_many_use_the_fastest_by_hand() -> None:
    seconds = {name: [1.0, 1.0] for name in ON_TORCH} | {"by hand, rate per model": [0.5, 0.5]}
    found = bars.bars_of_many(Timings(SMALL, 5, {}, seconds, 0.0))
    assert found[0].what == "ours, make_train_step / by hand, rate per model"
    assert (found[0].measured.median, found[0].holds) == (2.0, False)
    assert len(found) == 4


def test_bars_of_jax_compare_single_steps_with_single_steps_and_scans_with_scans() -> None:
    seconds = {
        bars.PEER: 12.0,
        "jax by hand": 2.0,
        "jax by hand, scan": 1.0,
        "ours on jax, documented step": 8.0,
        "ours on jax, make_train_step": 3.0,
        "ours on jax, step.run": 1.5,
    }
    timings = Timings(SMALL, 20, {}, {name: [time, time] for name, time in seconds.items()}, 0.0)
    found = {bar.what: (bar.measured.median, bar.limit, bar.at_least) for bar in bars.bars_of_jax(timings)}
    assert found == {
        "ours on jax, make_train_step / jax by hand": (1.5, 1.1, False),
        "ours on jax, step.run / jax by hand, scan": (1.5, 1.1, False),
        "modelbatch 0.1.0 / ours on jax, documented step": (1.5, 1.5, True),
        "modelbatch 0.1.0 / ours on jax, make_train_step": (4.0, 4.5, True),
        "modelbatch 0.1.0 / ours on jax, step.run": (8.0, 6.0, True),
    }
    del timings.seconds[bars.PEER]
    assert len(bars.bars_of_jax(timings)) == 2


def test_bars_of_the_trainer_compare_it_with_the_same_steps_by_hand() -> None:
    one = Timings(ONE, 5, {}, {"loop": [10.0, 10.0], bars.TRAINED: [10.4, 10.4]}, 0.0)
    seconds = {"loop": 50.0, bars.FUSED: 10.0, bars.TRAINED_BATCH: 10.6}
    many = Timings(SMALL, 5, {}, {name: [time, time] for name, time in seconds.items()}, 0.0)
    found = bars.bars_of_trainer(Results({"one": one, "many": many}, {}, Rates(1.0, 1.0), {}, {}))
    assert {bar.what: (bar.measured.median, bar.holds) for bar in found} == {
        "GenericTrainer / loop": (1.04, True),
        "GenericTrainer of a batch / ours, make_train_step": (1.06, False),
    }


def test_the_bar_of_convolutions_is_for_the_form_that_jax_chooses() -> None:
    seconds = {name: [9.0, 9.0] for name in CONVOLUTIONS} | {bars.FUSED: [2.0, 2.0], bars.JAX_FUSED: [4.0, 4.0]}
    (bar,) = bars.bars_of_cnns(Timings(IMAGES, 5, {}, seconds, 0.0))
    assert bar.what == "ours on jax, make_train_step / ours, make_train_step"
    assert (bar.measured.median, bar.limit, bar.holds) == (2.0, 1.5, False)


@pytest.mark.parametrize("name", command.BENCHMARKS)
def test_plans_name_contestants_that_there_are(name: str) -> None:
    for quick in (False, True):
        plan = command.BENCHMARKS[name](Choices(quick=quick))
        # The first is what the others are checked against.
        assert all(one.contestants[0] == "loop" for one in plan.races.values())
        assert {who for one in plan.races.values() for who in one.contestants} <= set(CONTESTANTS)
    without = command.BENCHMARKS[name](Choices(left_out=(bars.PEER,)))
    assert not any(bars.PEER in one.contestants for one in without.races.values())


def test_contestants_of_several_steps_a_call_get_as_many_every_time() -> None:
    (one,) = command.BENCHMARKS["xla"](Choices()).races.values()
    assert {steps % TOGETHER for steps in (one.steps, one.warm_up, one.first_steps)} == {0}


def test_results_of_a_gpu_have_files_of_their_own() -> None:
    assert command.file_name("xla", None) == "xla_step"
    assert command.file_name("xla", "NVIDIA A100-SXM4 (80GB)") == "xla_step-nvidia-a100-sxm4-80gb"


def test_memory_is_counted_in_copies_of_the_parameters() -> None:
    parameters = sum(p.numel() * p.element_size() for model in SMALL.models() for p in model.parameters())
    assert SMALL.parameter_bytes == parameters
    memory = Memory(SMALL, peak=5 * parameters)
    assert (memory.rest, memory.copies) == (2 * parameters, 2.0)
    assert [bar.holds for bar in bars.bars_of_memory({bars.EAGER: memory, "loop": memory})] == [False]


def test_bytes_of_the_parameters_of_convolutions() -> None:
    parameters = sum(p.numel() * p.element_size() for model in IMAGES.models() for p in model.parameters())
    assert IMAGES.parameter_bytes == parameters


def test_the_floor_counts_operations_and_bytes() -> None:
    rates = Rates(flops=1e9, bytes=1e6)
    floor = floor_of(SMALL, rates)
    # Forward, gradients of the weights, and of the hidden layer: those of the inputs nobody needs.
    products = 8 * (6 * 5 + 5 * 4)
    assert floor.flops == 3 * 2 * (2 * products + 8 * 5 * 4)
    # Parameters and two averages of Adam's, in and out.
    assert floor.bytes == 2 * 3 * SMALL.parameter_bytes
    assert floor.seconds == floor.bytes / 1e6
    assert floor_of(SMALL, Rates(flops=1.0, bytes=1e6)).seconds == floor.flops
    momentum = floor_of(replace(SMALL, optimizer="SGD with momentum"), rates)
    assert momentum.bytes == 2 * 2 * SMALL.parameter_bytes
    # What PyTorch has as one operation is counted, too.
    assert floor_of(comparison.KINDS["LSTM"], rates).flops > 1e9


def equal_results() -> Results:
    """Every contestant of the comparison takes a second."""
    races = comparison.plan(Choices()).races
    timings = {
        key: Timings(
            one.workload,
            5,
            dict.fromkeys(one.contestants, 1.0),
            {name: [1.0, 1.0] for name in one.contestants},
            0.0,
        )
        for key, one in races.items()
    }
    rates = Rates(flops=1e12, bytes=1e12)
    return Results(timings, {}, rates, {key: floor_of(one.workload, rates) for key, one in races.items()}, {})


def test_the_figure_of_the_comparison(tmp_path: Path) -> None:
    plots.draw(equal_results(), tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.count('id="axes_') == 2


@pytest.mark.long
def test_what_was_measured_before_a_failure_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = equal_results()
    first, second = list(comparison.plan(Choices(left_out=tuple(bars.PEERS))).races)[:2]

    def disagree(contestants: list[str], workload: Workload, threads: int) -> float:
        if workload == full.timings[second].workload:
            raise Disagreement("they differ")
        return 0.0

    monkeypatch.setattr(command, "agree_in_float64", disagree)
    monkeypatch.setattr(command, "race", lambda *_, **__: full.timings[first])
    arguments = ["--only", "comparison", "--rounds", "15", "--without-peers", "--output", str(tmp_path)]
    assert command.main(arguments) == 1
    assert [*json.loads((tmp_path / "comparison_step.json").read_text())["timings"]] == [first]
    assert (tmp_path / "comparison_step.svg").exists()


@pytest.mark.parametrize("changed", [None, "workload", "rounds", "machine"])
def test_an_interrupted_run_is_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str | None) -> None:
    races = {name: Race(["loop"], replace(SMALL, batch=rows), 2, 2) for name, rows in (("few", 8), ("more", 16))}
    raced: list[int] = []

    def race(one: Race, threads: int, *, rounds: int, **_: object) -> Timings:
        raced.append(one.workload.batch)
        return Timings(one.workload, one.first_steps, {"loop": 1.0}, {"loop": [1.0] * rounds}, 0.0)

    def run(names: list[str], *more: str) -> None:
        plan = Plan("A benchmark", {name: races[name] for name in names}, lambda results: [])
        monkeypatch.setitem(command.BENCHMARKS, "comparison", lambda choices: plan)
        assert command.main(["--only", "comparison", "--output", str(tmp_path), *more]) == 0

    monkeypatch.setattr(command, "agree_in_float64", lambda *_: 0.0)
    monkeypatch.setattr(command, "measure_rates", lambda threads: Rates(1.0, 1.0))
    monkeypatch.setattr(command, "race", race)
    run(["few"], "--rounds", "15")
    if changed == "workload":
        races["few"] = replace(races["few"], workload=replace(SMALL, batch=8, hidden=9))
    if changed == "machine":
        monkeypatch.setattr(report, "cores", lambda: 77)
    run(["few", "more"], "--rounds", "16" if changed == "rounds" else "15", "--resume")
    assert raced == ([8, 16] if changed is None else [8, 8, 16])
    assert [*json.loads((tmp_path / "comparison_step.json").read_text())["timings"]] == ["few", "more"]


def test_bars_of_the_comparison() -> None:
    results = equal_results()
    timings = results.timings
    timings["MLP, 64"].seconds[bars.JAX_RUN] = [0.5, 0.5]
    timings["MLP, 1024"].seconds[bars.FUSED] = [12.8, 12.8]
    for name in {*timings["MLP, 1024"].seconds} - {bars.FUSED}:
        timings["MLP, 1024"].seconds[name] = [16.0, 16.0]
    found = {bar.what: bar for bar in bars.bars_of_comparison(results)}
    assert len(found) == len(bars.bars_of_comparison(results))
    assert found["MLP, 64: modelbatch 0.1.0 / ours on jax, step.run"].measured.median == 2.0
    assert not found["MLP, 64: modelbatch 0.1.0 / ours on jax, step.run"].holds
    assert found["MLP, 64: ours on jax, step.run / loop, the best of the others"].measured.median == 0.5
    growth = found["ours, make_train_step: time per model with 1024 models / with 64"]
    assert (growth.measured.median, growth.holds) == (0.8, True)
    least = results.floors["MLP, 64"].flops / 1e12
    assert found["MLP, 64: ours on jax, step.run / floor of operations"].measured.median == pytest.approx(0.5 / least)


def test_learning_rates_of_a_sweep() -> None:
    assert SWEEP.learning_rates == pytest.approx([1e-4, 1e-3, 1e-2])
    assert ONE.learning_rates == [1e-3]


def test_something_else_under_the_name_of_a_peer_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(peers, "VERSIONS", {"json": "1.0"})
    with pytest.raises(RuntimeError, match=r"json 1\.0 expected in"):
        peers.load("json")


def test_a_failed_installation_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(RuntimeError, match="no network"):
        peers.install("modelbatch")
    assert [path.name for path in tmp_path.iterdir()] == [".gitignore"]


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "contestants"),
    [
        ("mlp", {*ON_TORCH} - {*bars.PEERS}),
        ("xla", {"loop", bars.FUSED, *ON_JAX}),
        ("cnn", {"loop", bars.FUSED, bars.JAX_FUSED, *CONVOLUTIONS}),
        ("comparison", {*EAGER, *ON_JAX}),
        ("trainer", {"loop", bars.TRAINED}),
    ],
)
def test_a_quick_run(name: str, contestants: set[str], tmp_path: Path) -> None:
    options = ["--quick", "--without-peers", "--threads", "1", "--only", name, "--output", str(tmp_path)]
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=Path(command.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    output = next(tmp_path.glob("*.json"))
    assert output.name.startswith(f"{name}_step")
    results = json.loads(output.read_text())
    race, *others = results["timings"].values()
    assert set(race["seconds"]) == contestants
    assert race["floor"]["seconds"] > 0
    if name == "comparison":
        assert len(others) == len(comparison.SMOKE) - 1
    assert results["bars"] == []
    for contestant in contestants:
        assert f"| {contestant} |" in finished.stdout
    assert output.with_suffix(".md").read_text() == finished.stdout


@pytest.mark.long
def test_a_quick_run_of_packing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Both are of the process.
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert packing.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    for contestant in packing.CONTESTANTS:
        assert f"| {contestant} |" in printed


def test_packed_runs_with_other_weights_are_noticed() -> None:
    right = [{"weight": torch.ones(2)}]
    assert packing.check_same_weights({"one": right, "other": [{"weight": torch.ones(2) + 1e-3}]}) > 0
    for wrong in ({"weight": torch.ones(2) + 0.1}, {"weight": torch.full((2,), torch.nan)}, {"bias": torch.ones(2)}):
        with pytest.raises(Disagreement):
            packing.check_same_weights({"one": right, "other": [wrong]})
