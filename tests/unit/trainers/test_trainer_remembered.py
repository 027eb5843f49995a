"""Random generators and counters that the objects of a loader hold are part of a run's place."""

from __future__ import annotations

import functools
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from tests.training_runs import BATCH, ROWS, OwnLoader, Recorder, Rows, assert_identical, final_state, make_objects
from trainers.errors import TrainerError
from trainers.loaders import resumable
from trainers.loaders.processes import can_fork
from trainers.loaders.randomness import WithWorkerRandomness
from trainers.loaders.remembered import Remembered, generators_in
from trainers.loaders.resumable import make_resumable
from trainers.settings import GenericTrainerConfig

MAKERS: dict[str, Callable[[int], Any]] = {
    "numpy": np.random.default_rng,
    "philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "legacy": np.random.RandomState,
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "python": random.Random,
}


def drawn(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return float(torch.rand((), generator=generator))
    return float(generator.random())


class Noise:
    """A transform with a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self, value: Tensor) -> Tensor:
        return value + 0.1 * drawn(self.generator)


class Noisy(Dataset):
    """Augments by the generators of its transforms."""

    def __init__(self, transforms: list[Any]) -> None:
        self.rows = Rows()
        self.transforms = transforms

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs = self.rows.inputs[index]
        for transform in self.transforms:
            inputs = transform(inputs)
        return inputs, self.rows.targets[index]


class Lazy(Noisy):
    """Makes its generator at its first use."""

    def __init__(self) -> None:
        super().__init__([])
        self.rng: Any = None

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.rng = np.random.default_rng(3) if self.rng is None else self.rng
        inputs, targets = super().__getitem__(index)
        return inputs + drawn(self.rng), targets


class Drawing(Sampler):
    """Draws every index anew."""

    def __init__(self, generator: Any) -> None:
        self.rng = generator

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        return (int(drawn(self.rng) * ROWS) for _ in range(ROWS))


class Counting:
    """Another order in every epoch, by a count of its own; no class of torch."""

    def __init__(self) -> None:
        self.rounds = 0

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        return iter(np.random.default_rng(self.rounds).permutation(ROWS).tolist())


class Reseeding:
    """Makes its generator anew in every epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(7 + self.epoch)
        self.epoch += 1
        for _ in range(ROWS):
            yield int(drawn(self.generator) * ROWS)


class CountingNumbers(Counting):
    """Counts in numbers of several types."""

    __slots__ = ("in_slot",)

    def __init__(self) -> None:
        self.rounds, self.part, self.exact, self.small = 0, 0.0, np.int64(0), np.float32(0)
        self.in_slot = 0

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        self.part, self.exact, self.small = self.part + 0.5, self.exact + 1, self.small + np.float32(0.25)
        self.in_slot += 3
        seed = int(self.part * 2 + self.exact * 10 + self.small * 400 + self.in_slot * 1000)
        return iter(np.random.default_rng(seed).permutation(ROWS).tolist())


GLOBAL = np.random.default_rng(0)


def augment(inputs: Tensor) -> Tensor:
    return inputs + drawn(GLOBAL)


class ClassLevel(Noisy):
    rng = np.random.default_rng(0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitem__(index)
        return inputs + drawn(self.rng), targets


class ByFunction(Noisy):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitem__(index)
        return augment(inputs), targets


class ByMethod(Noisy):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.load(index)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitem__(index)
        return sum((entry for entry in [drawn(GLOBAL)]), inputs), targets


class Spawning(Noisy):
    """Makes a generator for each of its parts from one of its own."""

    def __init__(self) -> None:
        super().__init__([])
        self.rng = np.random.default_rng(0)
        self.part = self.rng.spawn(1)[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index % 3 == 0:
            self.part = self.rng.spawn(1)[0]
        inputs, targets = super().__getitem__(index)
        return inputs + drawn(self.part), targets


class Compose(nn.Module):
    def __init__(self, transforms: list[Any]) -> None:
        super().__init__()
        self.transforms = transforms

    def forward(self, inputs: Tensor) -> Tensor:
        for transform in self.transforms:
            inputs = transform(inputs)
        return inputs


class Slotted:
    __slots__ = ("generator", "unset")

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __call__(self, value: Tensor) -> Tensor:
        return value + drawn(self.generator)


class NoisyStream(IterableDataset):
    def __init__(self) -> None:
        self.rows = Rows()
        self.rng = np.random.default_rng(4)
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        for inputs, targets in zip(self.rows.inputs, self.rows.targets, strict=True):
            yield inputs + self.epoch + drawn(self.rng), targets


def noisy_collate(rng: Any, samples: list[Any]) -> Any:
    inputs, targets = default_collate(samples)
    return inputs + drawn(rng), targets


HIDDEN: dict[str, Callable[[], Any]] = {
    "class": lambda: ClassLevel([]),
    "function": lambda: ByFunction([]),
    "method": lambda: ByMethod([]),
    "module": lambda: Noisy([Compose([nn.Sequential(Compose([Noise(np.random.default_rng(1))]))])]),
    "slots": lambda: Noisy([Slotted()]),
    "spawning": Spawning,
}


def make_loader(kind: str, workers: int) -> Any:
    if kind in MAKERS:
        return DataLoader(Noisy([Noise(MAKERS[kind](7))]), BATCH, shuffle=True, num_workers=workers)
    if kind == "collate":
        collate = functools.partial(noisy_collate, np.random.default_rng(5))
        return DataLoader(Rows(), BATCH, collate_fn=collate, num_workers=workers)
    if kind == "closure":
        rng = np.random.default_rng(5)
        return DataLoader(Rows(), BATCH, collate_fn=lambda samples: noisy_collate(rng, samples), num_workers=workers)
    if kind == "stream":
        return DataLoader(NoisyStream(), BATCH, num_workers=workers)
    if kind == "counting":
        return DataLoader(Rows(), BATCH, sampler=Counting(), num_workers=workers)
    if kind == "numbers":
        return DataLoader(Rows(), BATCH, sampler=CountingNumbers(), num_workers=workers)
    if kind in HIDDEN:
        # They outlast a run in this process.
        for outlasting in (GLOBAL, ClassLevel.rng):
            outlasting.bit_generator.state = np.random.default_rng(0).bit_generator.state
        return DataLoader(HIDDEN[kind](), BATCH, num_workers=workers)
    if kind == "reseeding":
        return DataLoader(Noisy([Noise(random.Random(2))]), BATCH, sampler=Reseeding(), num_workers=workers)
    rng = np.random.default_rng(6)
    loader = OwnLoader if kind == "subclass" else DataLoader
    data = Noisy([Noise(rng)]) if kind == "shared" else Rows()
    return loader(data, BATCH, sampler=Drawing(rng), num_workers=workers)


KINDS = [
    *MAKERS,
    *HIDDEN,
    "collate",
    "closure",
    "stream",
    "counting",
    "numbers",
    "reseeding",
    "sampler",
    "shared",
    "subclass",
]


def fit(
    folder: Path, loader: Any, stop_at: int | None = None, notes: dict[str, Any] | None = None, epochs: int = 2
) -> Recorder:
    model, optimizer, scheduler = make_objects("single")
    config = GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=epochs)
    trainer = Recorder(config, {} if notes is None else notes, stop_at)
    trainer.fit(model, optimizer, loader, None, scheduler)
    return trainer


def check(kind: str, workers: int, events: tuple[int, ...], folder: Path) -> None:
    whole = final_state(fit(folder / "whole", make_loader(kind, workers)))
    for event in events:
        notes: dict[str, Any] = {}
        assert fit(folder / str(event), make_loader(kind, workers), event, notes).preempted
        resumed = fit(folder / str(event), make_loader(kind, workers), None, notes)
        assert_identical(final_state(resumed), whole, f"stopped at event {event}: ")


@pytest.mark.parametrize("kind", KINDS)
def test_generators_and_counters_of_ones_own(kind: str, tmp_path: Path) -> None:
    check(kind, 0, (1, 3, 5), tmp_path)


@pytest.mark.parametrize("kind", ["numpy", "closure", pytest.param("counting", marks=pytest.mark.long)])
def test_in_worker_processes(kind: str, tmp_path: Path) -> None:
    check_with_workers(kind, (5,), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_in_worker_processes_of_every_kind(kind: str, tmp_path: Path) -> None:
    check_with_workers(kind, (2, 5), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["torch", "class", "module", "stream", "subclass"])
def test_in_worker_processes_beside_jax(kind: str, tmp_path: Path) -> None:
    check_with_workers(kind, (5,), tmp_path, beside_jax=True)


def check_with_workers(kind: str, events: tuple[int, ...], folder: Path, beside_jax: bool = False) -> None:
    in_own_process(_check_with_workers, kind, events, folder, beside_jax)


def in_own_process(function: Callable[..., None], *arguments: Any) -> None:
    """Run something in a process which other tests have not given threads."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def _check_with_workers(kind: str, events: tuple[int, ...], folder: Path, beside_jax: bool) -> None:
    # A process that was spawned would spawn its own as well.
    multiprocessing.set_start_method("fork", force=True)
    if beside_jax:
        pytest.importorskip("jax").devices()
    assert can_fork(nn.Linear(1, 1)) != beside_jax
    # Otherwise an epoch of so few batches is drawn anew as a whole.
    resumable._BATCHES_PER_SNAPSHOT = 1
    check(kind, 2, events, folder)


def test_what_changes_a_sampler_beside_worker_processes_stays() -> None:
    in_own_process(_check_changed_sampler)


def _check_changed_sampler() -> None:
    multiprocessing.set_start_method("fork", force=True)
    for loader_class in (DataLoader, OwnLoader):
        samplers = [Counting(), Counting()]
        loaders = [
            make_resumable(loader_class(Rows(), BATCH, sampler=sampler, num_workers=1), "train_loader")
            for sampler in samplers
        ]
        batches = loaders[0].start()
        next(batches)
        # As a callback that makes the samples harder with every batch.
        samplers[0].rounds = 7
        loaders[1].resume(loaders[0].state_dict(), None, 1)
        assert samplers[1].rounds == 7
        for loader in loaders:
            loader.close()


def test_a_loader_that_is_given_again_in_the_same_process(tmp_path: Path) -> None:
    whole = final_state(fit(tmp_path / "whole", make_loader("counting", 0)))
    notes: dict[str, Any] = {}
    loader = make_loader("counting", 0)
    fit(tmp_path / "stopped", loader, 1, notes)
    assert_identical(final_state(fit(tmp_path / "stopped", loader, None, notes)), whole)


def test_a_counter_that_is_back_where_it_began() -> None:
    sampler = Counting()
    remembered = Remembered(DataLoader(Rows(), sampler=sampler), "train_loader")
    sampler.rounds = 1
    remembered.note_start()
    sampler.rounds = 0
    state = remembered.state_dict()
    remembered.restore(state["generators_at_start"])
    assert sampler.rounds == 1
    remembered.restore(state["generators"])
    assert sampler.rounds == 0


def test_a_generator_that_is_made_later_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, DataLoader(Lazy(), BATCH), 1)
    assert "rng" not in caplog.text
    fit(tmp_path, DataLoader(Lazy(), BATCH))
    assert caplog.text.count("train_loader: the random generator dataset.rng is in the checkpoint, but not there") == 1


def test_a_generator_that_is_made_later_in_a_worker_process_is_named(caplog: pytest.LogCaptureFixture) -> None:
    before = WithWorkerRandomness(Noisy([Noise(random.Random(0))]), name="train_loader")
    WithWorkerRandomness(Noisy([]), name="train_loader").load_state_dict(before.state_dict())
    assert "train_loader, in a worker process: the random generator dataset.transforms[0].generator is" in caplog.text


@pytest.mark.parametrize("event", [1, 3, 5])
def test_a_sampler_that_makes_its_generator_in_iter(
    event: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, make_loader("reseeding", 0), event)
    fit(tmp_path, make_loader("reseeding", 0))
    assert "another loader" not in caplog.text
    # Within the first epoch it was not there at the start either.
    assert caplog.text.count("the random generator sampler.generator is in the checkpoint, but not") == (event > 3)


def test_a_sampler_that_makes_its_generator_in_iter_between_epochs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = final_state(fit(tmp_path / "whole", make_loader("reseeding", 0)))
    notes: dict[str, Any] = {}
    fit(tmp_path / "first", make_loader("reseeding", 0), notes=notes, epochs=1)
    again = fit(tmp_path / "first", make_loader("reseeding", 0), notes=notes)
    assert "another loader" not in caplog.text
    assert_identical(final_state(again)["model"], whole["model"])


@pytest.mark.parametrize("event", [1, 5])
def test_such_a_sampler_that_is_given_again_in_the_same_process(event: int, tmp_path: Path) -> None:
    whole = final_state(fit(tmp_path / "whole", make_loader("reseeding", 0)))
    notes: dict[str, Any] = {}
    loader = make_loader("reseeding", 0)
    fit(tmp_path / "stopped", loader, event, notes)
    assert_identical(final_state(fit(tmp_path / "stopped", loader, None, notes)), whole)


def test_what_cannot_be_saved_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    data = Noisy([])
    data.order = (index for index in range(3))  # type: ignore[attr-defined]
    make_resumable(DataLoader(data), "train_loader")
    assert caplog.text.count("train_loader: dataset.order is a Python generator") == 1
    caplog.clear()

    class Stateful(NoisyStream):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """Nothing."""

    collate = functools.partial(noisy_collate, np.random.default_rng(5))
    make_resumable(DataLoader(Stateful(), BATCH, collate_fn=collate, num_workers=1), "val_loader")
    assert "val_loader: the random generators ['collate_fn.args[0]'] are drawn from in worker" in caplog.text


def test_a_generator_of_another_kind_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, make_loader("numpy", 0), 1)
    with pytest.raises(TrainerError, match=r"generator dataset\.transforms\[0\]\.generator: received a Random that"):
        fit(tmp_path, make_loader("python", 0))


def test_checkpoints_of_earlier_versions() -> None:
    """They have lists, of the generators of samplers alone."""
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(Noisy([Noise(random.Random(1))]), shuffle=True, generator=generator)
    remembered = Remembered(loader, "train_loader")
    before = generator.get_state()
    torch.rand(3, generator=generator)
    remembered.restore([before])
    assert generator.get_state().equal(before)
    with pytest.raises(TrainerError, match=r"\['generator'\]; expected \[\]"):
        remembered.restore([])


def test_what_limits_leave_out_is_named_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Noisy([])
    data.paths = [("a", {"label": index}) for index in range(101)]  # type: ignore[attr-defined]
    Remembered(DataLoader(data), "train_loader").note_start()
    assert not caplog.text
    data.many = [Noise(random.Random(0)) for _ in range(101)]  # type: ignore[attr-defined]
    Remembered(DataLoader(data), "train_loader").note_start()
    assert caplog.text.count("are not looked for in dataset.many, which has more than 100 entries") == 1
    monkeypatch.setattr("trainers.loaders.reachable._MOST_OBJECTS", 3)
    Remembered(DataLoader(data), "train_loader").note_start()
    assert caplog.text.count("are not looked for in what lies beyond the first 3 objects") == 1


def test_nothing_of_the_objects_is_run() -> None:
    class Unwilling:
        __slots__ = ("rng",)

        def __init__(self) -> None:
            self.rng = random.Random(0)

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

        @property
        def ready(self) -> Any:
            raise AssertionError("a property")

        def __eq__(self, other: object) -> bool:
            raise AssertionError("==")

        def __hash__(self) -> int:
            raise AssertionError("hash")

    assert list(generators_in({"dataset": Unwilling()})) == ["dataset.rng"]


def test_other_ways_to_hold_a_generator() -> None:
    def with_default(value: float, rng: Any = random.Random(1)) -> float:  # noqa: B008
        return value + rng.random()

    held = {
        "default": with_default,
        "bound": random.Random(2).random,
        "numpy": np.random.default_rng(3).normal,
        "static": Noisy([staticmethod(with_default)]),
    }
    found = generators_in(held)
    assert list(found) == ["bound", "numpy", "default.__defaults__[0]"]


def test_global_generators_and_large_lists_are_left_out() -> None:
    class Holder:
        own = np.random.mtrand._rand

        def __init__(self) -> None:
            self.legacy = np.random.mtrand._rand
            self.system = random.SystemRandom()
            self.default = torch.default_generator
            self.many = [random.Random(0)] * 101

    assert generators_in({"dataset": Holder()}) == {}
