"""Processes of one run that differ, or fail alone, end together: none waits for the others for ever."""

from __future__ import annotations

import datetime
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Subset

from tests.training_runs import Again, Recorder, Rows, make_loader
from trainers.config.schema import LoggingConfig
from trainers.errors import TrainerError
from trainers.ranks import rank
from trainers.reproducibility import seed_everything
from trainers.settings import GenericTrainerConfig


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes have seen, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def test_validations_of_different_lengths(outcomes: list[dict[str, Any]]) -> None:
    for number, own in enumerate(outcomes):
        assert own["whole"] == [[epoch, batch] for epoch in range(2) for batch in range(1 + 2 * number)]
        assert own["steps"] == 8
    assert outcomes[0]["logs"] == outcomes[1]["logs"]


def test_a_validation_that_starts_over_after_its_end_is_done_once(outcomes: list[dict[str, Any]]) -> None:
    assert [own["starting_over"] for own in outcomes] == [own["whole"] for own in outcomes]


def test_validations_of_different_lengths_are_resumed(outcomes: list[dict[str, Any]]) -> None:
    """Stopped when one of the ranks has no batch left."""
    for own in outcomes:
        assert own["left"] == [True, False]
        assert own["resumed"] == own["whole"]
        assert own["resumed_logs"] == own["logs"]


def test_a_validation_by_data_loaders_is_resumed_where_one_rank_has_finished_it(outcomes: list[dict[str, Any]]) -> None:
    for own in outcomes:
        assert own["shuffled_left"] == [True, False]
        assert own["shuffled_resumed"] == own["shuffled"]


def test_where_a_load_fails_in_one_rank_the_others_keep_their_weights(outcomes: list[dict[str, Any]]) -> None:
    assert [own["kept"] for own in outcomes] == [True, True]


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("loggers", "TrainerError", "OtherRankFailed: rank 0 failed"),
        ("loader", "OtherRankFailed: rank 1 failed", "TrainerError: train_loader: received a int"),
        ("architecture", "OtherRankFailed: rank 1 failed", "TrainerError: the checkpoint"),
        ("val_loader", "TrainerError: fit: val_loader: received one on the ranks [0] of 2", None),
        ("batches", "TrainerError: fit: train_loader: received [4, 3] batches an epoch", None),
        ("accumulated", "TrainerError: fit: train_loader: received [4, 3] batches an epoch", None),
        ("validation", "TrainerError: val_loader: received no batch in a validation", "OtherRankFailed: rank 0 failed"),
        ("checkpoints", "received rank 0 from the beginning, rank 1 from step 4; expected the same one", None),
    ],
)
def test_errors_are_shared(case: str, first: str, second: str | None, outcomes: list[dict[str, Any]]) -> None:
    assert first in outcomes[0][case]
    assert (second or first) in outcomes[1][case]


def test_a_loader_of_unknown_length_is_not_refused(outcomes: list[dict[str, Any]]) -> None:
    assert [own["unknown_length"] for own in outcomes] == [8, 8]


class Unsized:
    """A loader that may have no batch."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Noting(Recorder):
    """Notes the batches that it validates; one rank may ask to stop at an epoch's batch."""

    asks: tuple[int, int] | None = None

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.notes.setdefault("seen", []).append([self.current_epoch, batch_idx])
        if rank() == 1 and (self.current_epoch, batch_idx) == self.asks:
            self.request_preemption()
        return {"loss": float(batch[0].sum())}


class StartingOver:
    """Batches whose iterator begins again where it is asked after its end."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return _AroundAndAround(self.batches)


class _AroundAndAround(Iterator[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.rounds = itertools.cycle([*batches, None])

    def __next__(self) -> Any:
        batch = next(self.rounds)
        if batch is None:
            raise StopIteration
        return batch


def _rank(number: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    place, timeout = f"file://{folder}/rendezvous", datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", rank=number, world_size=2, init_method=place, timeout=timeout)
    batches = make_loader("list")
    noted: dict[str, Any] = {}

    def fit(
        name: str,
        train: Any = batches,
        val: Any = None,
        notes: dict[str, Any] | None = None,
        prepare: Callable[[Noting], None] = lambda trainer: None,
        width: int = 1,
        **settings: Any,
    ) -> Noting:
        torch.manual_seed(0)
        model = nn.Linear(3, width)
        config = GenericTrainerConfig(checkpoint_dir=f"{folder}/{name}", max_epochs=2, **settings)
        trainer = Noting(config, {} if notes is None else notes)
        prepare(trainer)
        trainer.fit(model, torch.optim.SGD(model.parameters(), 0.01), train, val)
        return trainer

    def failure(name: str, **options: Any) -> None:
        try:
            fit(name, **options)
            noted[name] = "none"
        except TrainerError as error:
            noted[name] = f"{type(error).__name__}: {error}"

    def ask(trainer: Noting) -> None:
        trainer.asks = (1, 1)

    def ask_early(trainer: Noting) -> None:
        trainer.asks = (0, 3)

    val = batches[: 1 + 2 * number]
    trainer = fit("whole", val=val)
    noted |= {"whole": trainer.notes["seen"], "steps": trainer.global_step, "logs": trainer.logs}
    noted["starting_over"] = fit("starting_over", val=StartingOver(val)).notes["seen"]
    notes: dict[str, Any] = {}
    stopped = fit("stopped", val=val, notes=notes, prepare=ask)
    resumed = fit("stopped", val=val, notes=notes)
    noted |= {"left": [stopped.preempted, resumed.preempted], "resumed": notes["seen"], "resumed_logs": resumed.logs}

    def fit_shuffled(name: str, notes: dict[str, Any], prepare: Callable[[Noting], None] = lambda trainer: None) -> Any:
        rows = Subset(Rows(), range(6 * (1 + number)))
        loaders = {"train": make_loader("shuffled"), "val": DataLoader(rows, batch_size=2, shuffle=True)}
        seed_everything(0)
        trainer = fit(name, **loaders, notes=notes, prepare=prepare)
        return trainer, [notes["seen"], notes["samples"], trainer.logs, trainer.model.weight.tolist()]

    _, noted["shuffled"] = fit_shuffled("shuffled", {})
    notes = {}
    stopped, _ = fit_shuffled("shuffled_stopped", notes, ask_early)
    resumed, noted["shuffled_resumed"] = fit_shuffled("shuffled_stopped", notes)
    noted["shuffled_left"] = [stopped.preempted, resumed.preempted]

    Path(folder, "file").touch()
    failure("loggers", logging=LoggingConfig(csv_log_dir=f"{folder}/file/metrics"))
    failure("loader", train=batches if number == 0 else 5)
    failure("val_loader", val=batches if number == 0 else None)
    failure("batches", train=batches[: 4 - number])
    failure("accumulated", train=batches[: 4 - number], gradient_accumulation_steps=2)
    failure("validation", val=Unsized(batches[:number]))
    # As many as on the other rank, but it does not say so.
    noted["unknown_length"] = fit("unknown_length", train=batches if number == 0 else Again()).global_step
    fit("architecture", save_top_k=-1)
    started: list[Noting] = []
    failure("architecture", width=1 + number, auto_resume=True, prepare=started.append)
    torch.manual_seed(0)
    noted["kept"] = torch.equal(started[0].model.weight, nn.Linear(3, 1 + number).weight)

    def load(trainer: Noting) -> None:
        if number == 1:
            trainer.load_checkpoint(Path(folder, "architecture", "epoch_000_step_000004.ckpt"))

    failure("checkpoints", prepare=load)
    Path(folder, f"{number}.json").write_text(json.dumps(noted))
    distributed.barrier()
    # Not through the interpreter's end: threads of gloo that still run then would abort the process.
    os._exit(0)
