"""Loader processes: started so that they cannot hang, and out of reach of the signals that are for the trainer."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mb_torch import ModelBatch
from tests import training_runs
from tests.training_runs import assert_identical, final_state, run
from trainers.errors import TrainerError
from trainers.loaders import processes
from trainers.loaders.processes import can_fork, safe_context
from trainers.loaders.resumable import make_resumable

REPOSITORY = Path(__file__).parents[3]
HAS_RUN_JAX = processes._has_run_jax


class Facts(Dataset):
    """What a worker knows about itself: its process, its parent's, and whether two signals are kept from it."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> list[int]:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return [os.getpid(), os.getppid(), int(signal.SIGUSR1 in blocked), int(signal.SIGTERM in blocked)]


class FactsInTurn(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([Facts()[0]] * 40)


class OwnLoader(DataLoader):
    pass


class LateLoader(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


class WithFunction(Facts):
    """Cannot be pickled."""

    def __init__(self) -> None:
        self.function = lambda: 0


LOADERS: dict[str, Callable[..., DataLoader]] = {
    "rebuilt": lambda **options: DataLoader(Facts(), **options),
    "stream": lambda **options: DataLoader(FactsInTurn(), **options),
    "own class": lambda **options: OwnLoader(Facts(), **options),
}


@pytest.fixture(autouse=True)
def _no_threads_noted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(processes, "_threaded_backends", set())
    # Other tests of this process may have run it.
    monkeypatch.setattr(processes, "_has_run_jax", lambda: False)
    caplog.set_level(logging.INFO)


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals that this process handles, as in `fit`."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


def _first(loader: Any) -> list[int]:
    batches = loader.start()
    facts = next(batches)
    del batches
    loader.close()
    return [int(value) for value in facts]


@pytest.mark.long
@pytest.mark.parametrize("kind", LOADERS)
def test_workers_are_no_copies_where_these_may_hang(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    given = LOADERS[kind](num_workers=1)
    _, parent, *_ = _first(make_resumable(given, "train_loader", can_fork=False))
    assert parent != os.getpid()
    assert "train_loader: its worker processes are started by 'forkserver'" in caplog.text
    # The user's own loader is as it was.
    assert given.multiprocessing_context is None
    caplog.clear()
    make_resumable(given, "train_loader")
    assert caplog.text == ""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_what_the_user_says_holds(method: str, caplog: pytest.LogCaptureFixture) -> None:
    loader = DataLoader(Facts(), num_workers=1, multiprocessing_context=method)
    assert safe_context(loader, "train_loader").get_start_method() == method
    assert safe_context(DataLoader(Facts()), "train_loader") is None
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dataset": WithFunction()}, "its data set cannot be pickled"),
        ({"dataset": Facts(), "collate_fn": lambda rows: rows}, "its collate_fn cannot be pickled"),
        ({"dataset": Facts(), "worker_init_fn": lambda worker: None}, "its worker_init_fn cannot be pickled"),
        ({"dataset": Facts(), "multiprocessing_context": "fork"}, "it was given multiprocessing_context='fork'"),
    ],
)
def test_a_warning_where_workers_must_be_copies(
    options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    _assert_warned(DataLoader(num_workers=2, **options), reason, caplog)


def test_a_warning_where_a_class_starts_its_workers_itself(caplog: pytest.LogCaptureFixture) -> None:
    _assert_warned(LateLoader(Facts(), num_workers=2), "LateLoader starts them itself", caplog)


def _assert_warned(loader: DataLoader, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert safe_context(loader, "val_loader") is loader.multiprocessing_context
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("val_loader: its 2 worker processes are forked")
    assert reason in record.getMessage()
    assert "num_workers=0" in record.getMessage()


def test_a_data_set_of_an_interactive_session(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session: Any = ModuleType("__main__")
    session.Typed = type("Typed", (Facts,), {"__module__": "__main__"})
    monkeypatch.setitem(sys.modules, "__main__", session)
    assert safe_context(DataLoader(session.Typed(), num_workers=1), "train_loader") is None
    assert "interactive session" in caplog.text
    # What a session imports, and a script itself, can be imported elsewhere too.
    assert safe_context(DataLoader(Facts(), num_workers=1), "train_loader").get_start_method() == "forkserver"
    session.__file__ = "script.py"
    assert safe_context(DataLoader(session.Typed(), num_workers=1), "train_loader").get_start_method() == "forkserver"


def test_tensors_and_arrays_are_not_pickled_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(torch.storage.UntypedStorage, "__reduce__", refuse)
    rows = torch.utils.data.TensorDataset(torch.zeros(3))
    assert safe_context(DataLoader(rows, num_workers=1), "train_loader").get_start_method() == "forkserver"


def test_a_script_without_a_main_guard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a worker that imports the script.
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(TrainerError, match='if __name__ == "__main__"'):
        make_resumable(DataLoader(Facts(), num_workers=1), "train_loader", can_fork=False)


def test_backends_say_whether_they_survive_a_fork() -> None:
    models = [nn.Linear(2, 1) for _ in range(2)]
    assert can_fork(models[0])
    assert can_fork(ModelBatch(models, backend="torch"))
    assert not can_fork(ModelBatch(models, backend="jax"))
    # Its threads stay, whatever is trained next.
    assert not can_fork(models[0])


# A release without that name may have run.
@pytest.mark.parametrize("internals", [{"backends_are_initialized": lambda: True}, {}])
def test_threads_of_a_jax_that_the_user_runs(internals: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_has_run_jax", HAS_RUN_JAX)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", SimpleNamespace(**internals))
    assert can_fork(nn.Linear(2, 1))
    monkeypatch.setitem(sys.modules, "jax", ModuleType("jax"))
    assert not can_fork(nn.Linear(2, 1))


def test_a_torch_generator_is_sent_by_value() -> None:
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    sent = bytes(ForkingPickler.dumps([generator, generator]))
    first, second = pickle.loads(sent)
    assert first is second
    assert first.initial_seed() == 3
    torch.testing.assert_close(torch.rand(4, generator=first), torch.rand(4, generator=generator), rtol=0, atol=0)
    # A tensor of its state would be one in shared memory, which is gone before a worker can open it.
    assert b"rebuild_storage" not in sent


def test_a_loader_whose_workers_cannot_start_fails_once() -> None:
    loader = make_resumable(DataLoader(WithFunction(), num_workers=1, multiprocessing_context="spawn"), "train_loader")
    with pytest.raises(AttributeError, match="Can't pickle local object"):
        loader.start()
    # In the end of `fit`.
    loader.close()


@pytest.mark.long
def test_resume_with_workers_that_are_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_runs, "_processes", lambda workers: {"num_workers": workers})
    # JAX warns of a fork, and warnings are errors here.
    whole = final_state(run(tmp_path / "whole", "xla", workers=2, max_epochs=2))
    notes: dict[str, Any] = {}
    assert run(tmp_path / "stopped", "xla", workers=2, max_epochs=2, notes=notes, stop_at=2).preempted
    resumed = run(tmp_path / "stopped", "xla", workers=2, max_epochs=2, notes=notes)
    assert_identical(final_state(resumed), whole)


@pytest.mark.long
def test_workers_outlive_signals_that_are_for_the_trainer(handled: list[int]) -> None:
    # The workers' maker is there already, and hands on nothing.
    forkserver.ensure_running()
    loader = make_resumable(DataLoader(Facts(), num_workers=1), "train_loader", can_fork=False)
    batches = loader.start()
    worker, _, *blocked = (int(value) for value in next(batches))
    assert blocked == [1, 1]
    for name in ("USR1", "TERM"):
        # From another process, as a scheduler sends them to all processes of a job.
        subprocess.run(["sh", "-c", f"kill -{name} {worker}"], check=True)
    assert sum(1 for _ in batches) == 39
    # Nothing is blocked in this process.
    assert not {signal.SIGUSR1, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    signal.raise_signal(signal.SIGUSR1)
    assert handled == [signal.SIGUSR1]
    loader.close()


@pytest.mark.long
@pytest.mark.parametrize("kind", LOADERS)
def test_workers_end_with_a_process_that_is_killed(kind: str) -> None:
    program = (
        "import os, signal, sys; sys.path.insert(0, '.'); from tests.unit.trainers import test_trainer_workers as t; "
        f"loader = t.make_resumable(t.LOADERS[{kind!r}](num_workers=1), 'train_loader', can_fork=False); "
        "print(int(next(loader.start())[0]), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker, deadline = int(done.stdout), time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.long
def test_workers_end_when_their_own_process_says_so(handled: list[int]) -> None:
    loader = make_resumable(DataLoader(Facts(), num_workers=1), "train_loader", can_fork=False)
    batches = loader.start()
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
    del batches
    loader.close()
