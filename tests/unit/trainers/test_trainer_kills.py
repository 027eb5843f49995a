"""Stopped at random moments in every way, and started again: the end is that of a run which was never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.killed_runs import STOPS, VARIANTS, sequence
from tests.training_runs import EPOCHS, ROWS, assert_identical, final_state, run
from trainers.checkpoints.files import read_checkpoint

REPOSITORY = Path(__file__).parents[3]
SEED = 5
CASES = [
    *((kind, workers, variant) for kind in ("single", "batch") for workers in (0, 2) for variant in VARIANTS),
    *(("xla", 0, variant) for variant in VARIANTS),
    ("xla", 2, "plain"),
]


def _kinds(kind: str, workers: int, variant: str) -> list[tuple[str, str]]:
    """Half of all kinds of stops, the other variant gets the other half; on XLA some of them."""
    shuffled = random.Random(f"{SEED} {kind} {workers}").sample(STOPS, len(STOPS))
    chosen = shuffled[list(VARIANTS).index(variant) :: 2]
    # There every start compiles everything anew.
    return chosen[:4] if kind == "xla" else chosen


def test_at_least_sixty_stops_of_all_kinds() -> None:
    kinds = [stop for case in CASES for stop in _kinds(*case)]
    assert len(kinds) >= 60
    assert set(kinds) == set(STOPS)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "workers", "variant"), CASES)
def test_every_stop_ends_as_if_there_had_been_none(kind: str, workers: int, variant: str, tmp_path: Path) -> None:
    kinds = _kinds(kind, workers, variant)
    seed = random.Random(f"{SEED} {kind} {workers} {variant}").randrange(10**6)
    # Not as `-m`: loader processes would then import everything once more, as their main module.
    program = (
        "import json, sys; from pathlib import Path; from tests.killed_runs import main; "
        "main(Path(sys.argv[1]), *json.loads(sys.argv[2]))"
    )
    arguments = json.dumps([[kind, workers, variant], seed, kinds])
    command = [sys.executable, "-c", program, str(tmp_path), arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=1000)
    assert done.returncode == 0, done.stderr
    whole = _end(tmp_path / "whole")
    _assert_complete(whole["sequence"], variant)
    # Two runs that were not stopped: if these differ, the stops are not to blame.
    assert_identical(_end(tmp_path / "first"), whole, "not stopped: ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == len(kinds)
    for number, entry in enumerate(report):
        told = f"seed {seed}, planned {entry['planned']}, took place {entry['stops']}: "
        assert entry["error"] is None, told + entry["error"]
        assert entry["stops"], told + "no stop"
        assert_identical(_end(tmp_path / str(number)), whole, told)


def _end(folder: Path) -> dict[str, Any]:
    end = torch.load(folder / "end.pt", weights_only=False)
    return {**end, "sequence": sequence(folder / "notes")}


def _assert_complete(notes: list[Any], variant: str) -> None:
    """The sequence that all others are compared with lacks nothing."""
    for epoch in range(EPOCHS):
        trained = [
            number for place, what, values in notes if (place[0], what) == (epoch, "trained") for number in values[0]
        ]
        validated = [values[0] for place, what, values in notes if (place[0], what) == (epoch, "validated")]
        assert len(trained) == ROWS
        assert variant != "plain" or sorted(trained) == list(range(ROWS))
        assert validated == [[0, 1, 2, 3], [4, 5]]


def test_a_signal_while_the_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path) -> dict[str, Any]:
        signal.raise_signal(signal.SIGUSR1)
        return read_checkpoint(path)

    whole = final_state(run(tmp_path / "whole"))
    notes: dict[str, Any] = {}
    run(tmp_path / "stopped", stop_at=8, notes=notes)
    monkeypatch.setattr("trainers.checkpoints.store.read_checkpoint", slow)
    again = run(tmp_path / "stopped", notes=notes)
    assert (again.preempted, again.global_step, len(notes["samples"])) == (True, 7, 7)
    monkeypatch.undo()
    assert_identical(final_state(run(tmp_path / "stopped", notes=notes)), whole)


def test_a_complete_run_that_is_started_again_leaves_the_generators_as_it_did(tmp_path: Path) -> None:
    # One that was killed between its last save and the end of the program.
    whole = final_state(run(tmp_path))
    torch.rand(3)
    assert_identical(final_state(run(tmp_path))["rng"], whole["rng"])


def test_lost_and_repeated_samples_are_seen(tmp_path: Path) -> None:
    notes = tmp_path / "notes"

    def counted(*lines: list[Any]) -> list[Any]:
        notes.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [values for _, _, values in sequence(notes)]

    started = [None, "started", None]
    one, two, three = ([[0, 0, batch], "trained", batch] for batch in range(3))
    assert counted(started, one, two, started, one, two, three) == [0, 1, 2]
    resumed = [[0, 0, 1], "resumed", None]
    assert counted(started, one, two, started, resumed, two, three) == [0, 1, 2]
    assert counted(started, one, two, started, resumed, three) == [0, 2]
    assert counted(started, one, two, started, resumed, one, two) == [0, 0, 1]
