"""Built experiments: their seeds, what makes them alike, and what they need of memory."""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from tests.packs import pack_config
from tests.training_runs import assert_identical
from trainers.built import Built, build_experiment, load_build, model_seed
from trainers.config import ConfigurationError
from trainers.config.schema import ExperimentConfig
from trainers.packed import memory
from trainers.packed.alike import difference, group_alike
from trainers.packed.first_batch import first_batch
from trainers.packed.same import first_difference
from trainers.states import capture_rng_state, rng_to_dict

mse = nn.functional.mse_loss
INPUTS, TARGETS = torch.arange(60.0).reshape(20, 3), torch.arange(40.0).reshape(20, 2)


def test_functions_are_found_by_their_path() -> None:
    assert load_build("tests.packs:build").__name__ == "build"
    for path in ("tests.packs:gone", "tests.gone:build", "no_such_package:build", "tests.packs", "tests.packs:", ":"):
        with pytest.raises(ConfigurationError, match=r"build: .* cannot be imported: .*; expected 'module:function'"):
            load_build(path)


def test_a_module_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_for_tests.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="No module named 'no_such_dependency'"):
        load_build("broken_for_tests:build")


@pytest.mark.parametrize("text", ["import sys; sys.exit(0)", "1 / 0", "def build(:"])
def test_a_module_that_cannot_be_imported_for_whatever_reason_says_so(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"unimportable_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=f"{name}:build.*which cannot be imported: (SystemExit|Zero|Syntax)"):
        load_build(f"{name}:build")


def drawing(config: ExperimentConfig) -> Built:
    """An experiment whose loss arguments are the first draws of the global generators."""
    draws = {"torch": float(torch.rand(())), "numpy": float(np.random.rand()), "python": random.random()}
    return Built(nn.Linear(3, 2), mse, [], loss_args=draws)


def test_each_experiment_is_built_with_its_own_seed() -> None:
    before = rng_to_dict(capture_rng_state())
    first, again, other = (build_experiment(drawing, pack_config("e", seed=seed)) for seed in (1, 1, 2))
    assert first.loss_args is not None
    assert first.loss_args == again.loss_args
    assert torch.equal(first.model.weight, again.model.weight)  # type: ignore[arg-type]
    assert all(value != (other.loss_args or {})[name] for name, value in first.loss_args.items())
    assert not torch.equal(first.model.weight, other.model.weight)  # type: ignore[arg-type]
    assert_identical(rng_to_dict(capture_rng_state()), before)


def test_generators_are_put_back_when_the_function_fails() -> None:
    def failing(config: ExperimentConfig) -> Built:
        drawing(config)
        raise ValueError

    before = rng_to_dict(capture_rng_state())
    with pytest.raises(ValueError, match=r"^$"):
        build_experiment(failing, pack_config("e"))
    assert_identical(rng_to_dict(capture_rng_state()), before)


def test_without_a_seed_the_name_decides() -> None:
    seeds = [model_seed(pack_config(name)) for name in ("a", "b", "a")]
    assert seeds[0] == seeds[2] != seeds[1]
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert model_seed(pack_config("a", seed=0)) == 0


def test_loss_arguments() -> None:
    def built(arguments: Any, **changes: Any) -> Any:
        return build_experiment(
            lambda config: Built(nn.Linear(3, 2), mse, [], loss_args=arguments), pack_config("e", **changes)
        ).loss_args

    weights = torch.ones(3)
    given = built({"a": 1, "b": 0.5, "c": True, "d": weights})
    assert {name: float(given[name]) for name in "abc"} == {"a": 1.0, "b": 0.5, "c": 1.0}
    assert {given[name].dtype for name in "abc"} == {torch.float32}
    assert given["d"] is weights
    assert built(None, custom_params__loss_args={"a": 2}) == {"a": torch.tensor(2.0)}
    assert built({}, custom_params__loss_args={"a": 2}) == {}
    with pytest.raises(ConfigurationError, match=r"loss_args\['a'\] of e: received 'x'; expected a number or a tensor"):
        built({"a": "x"})
    with pytest.raises(ConfigurationError, match="loss_args of e: received a int; expected a dict"):
        built(None, custom_params__loss_args=3)


@pytest.mark.parametrize("built", [None, nn.Linear(3, 2), Built(mse, mse, []), Built(nn.Linear(3, 2), None, [])])  # type: ignore[arg-type]
def test_something_else_is_refused(built: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"build of e: received .*; expected a trainers\.built\.Built"):
        build_experiment(lambda config: built, pack_config("e"))


class Noisy(Dataset):
    """Rows of which a few have another target, by a seed: the first, the middle and the last have not."""

    def __init__(self, seed: int, transform: Any = None) -> None:
        self.targets = TARGETS.clone()
        self.targets[3 + seed] = 0.0
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index], self.targets[index]

    def __len__(self) -> int:
        return len(INPUTS)


class Stream(IterableDataset):
    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(INPUTS[self.first :], TARGETS, strict=False))


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


def weighted(weight: float) -> Callable[..., Tensor]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return weight * mse(outputs, targets)

    return loss


def experiment(**changes: Any) -> Built:
    rows = TensorDataset(INPUTS.clone(), TARGETS.clone())
    loader = DataLoader(rows, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    options = {"model": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), "loss_fn": mse, "train": loader}
    return Built(**{**options, **changes})


def over(dataset: Any, **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"train": DataLoader(dataset() if callable(dataset) else dataset, **options)}


ROWS = TensorDataset(INPUTS, TARGETS)
# What is built twice in the same way, by an expression of its own each time.
SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "as it is": dict,
    "closure": lambda: {"loss_fn": weighted(0.5)},
    "partial": lambda: {"loss_fn": functools.partial(mse, reduction="sum")},
    "module": lambda: {"loss_fn": nn.CrossEntropyLoss(torch.ones(2))},
    "metrics": lambda: {"metrics": {"mse": lambda outputs, targets: mse(outputs, targets)}},
    "data set": over(lambda: Noisy(1, transform=lambda row: row)),
    "subset": over(lambda: Subset(ROWS, [1, 2, 3])),
    "stream": over(lambda: Stream(2)),
    "batches": lambda: {"train": [(INPUTS.clone(), TARGETS.clone())], "val": ((INPUTS.clone(), TARGETS),)},
    "arrays": lambda: {"train": [(INPUTS.numpy().copy(), np.array(["a"]))]},
    "missing values": lambda: {"train": [(torch.tensor([float("nan")]), np.array([np.nan]), float("nan"))]},
    "collate": lambda: {"train": DataLoader(ROWS, collate_fn=lambda rows: rows, worker_init_fn=lambda number: None)},
    "sampler": lambda: {"train": DataLoader(ROWS, sampler=WeightedRandomSampler(torch.ones(20), 20))},
    "generators": lambda: {"train": [np.random.default_rng(1), random.Random(1)]},
    "others": lambda: {"train": [Slotted(1), SimpleNamespace(path=Path("a")), {1: {2, 3}}, range(3), copy.copy, int]},
    "loss_args": lambda: {"loss_args": {"a": torch.rand(()), "b": torch.rand(2)}},
    "weights": lambda: {"model": nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1))},
}


@pytest.mark.parametrize("kind", SAME)
def test_what_is_made_alike_is_alike(kind: str) -> None:
    assert difference(experiment(**SAME[kind]()), experiment(**SAME[kind]())) is None


def sampled(seed: int) -> DataLoader[Any]:
    return DataLoader(ROWS, 4, shuffle=True, generator=torch.Generator().manual_seed(seed))


# What an experiment has, what the other has, and the place that the reason names.
OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "layers": ({}, {"model": nn.Linear(3, 2)}, "their models differ"),
    "width": ({"model": nn.Linear(3, 2)}, {"model": nn.Linear(3, 4)}, "their models differ: weight has shape"),
    "setting": ({"model": nn.Dropout(0.1)}, {"model": nn.Dropout(0.2)}, "their models differ: p is 0.2"),
    "loss": ({}, {"loss_fn": nn.functional.l1_loss}, "loss_fn differs"),
    "closure": ({"loss_fn": weighted(0.5)}, {"loss_fn": weighted(0.6)}, "loss_fn['weight'] differs"),
    "partial": (
        {"loss_fn": functools.partial(mse, reduction="sum")},
        {"loss_fn": functools.partial(mse, reduction="mean")},
        "loss_fn",
    ),
    "buffer of the loss": (
        {"loss_fn": nn.CrossEntropyLoss(torch.ones(2))},
        {"loss_fn": nn.CrossEntropyLoss(torch.tensor([1.0, 2.0]))},
        "loss_fn._buffers['weight'] differs",
    ),
    "metrics": ({}, {"metrics": {"mse": mse}}, "metrics differs"),
    "a metric": ({"metrics": {"m": mse}}, {"metrics": {"m": nn.functional.l1_loss}}, "metrics['m'] differs"),
    "no validation": ({"val": [(INPUTS, TARGETS)]}, {}, "val differs"),
    "a few targets": (over(Noisy(1))(), over(Noisy(2))(), "train.dataset.targets differs"),
    "augmentation": (
        over(Noisy(1, transform=SimpleNamespace(strength=1)))(),
        over(Noisy(1, transform=SimpleNamespace(strength=2)))(),
        "train.dataset.transform.strength differs",
    ),
    "subset": (over(Subset(ROWS, [1, 2, 3]))(), over(Subset(ROWS, [1, 4, 3]))(), "train.dataset.indices[1] differs"),
    "one batch of many": (
        {"train": [(INPUTS, TARGETS)] * 5},
        {"train": [*[(INPUTS, TARGETS)] * 3, (INPUTS, TARGETS + 1), (INPUTS, TARGETS)]},
        "train[3][1] differs",
    ),
    "batch size": (over(ROWS, batch_size=4)(), over(ROWS, batch_size=5)(), "differs"),
    "order": (over(ROWS, shuffle=True)(), over(ROWS)(), "differs"),
    "generator": ({"train": sampled(1)}, {"train": sampled(2)}, "generator differs"),
    "own class of loader": ({"train": [1]}, {"train": (1,)}, "train differs"),
    "stream": (over(Stream(1))(), over(Stream(2))(), "train.dataset.first differs"),
    "sampler": (
        {"train": DataLoader(ROWS, sampler=WeightedRandomSampler(torch.ones(20), 20))},
        {"train": DataLoader(ROWS, sampler=WeightedRandomSampler(torch.arange(20.0), 20))},
        "weights differs",
    ),
    "dtype": ({"train": [INPUTS]}, {"train": [INPUTS.double()]}, "train[0] differs"),
    "arrays": ({"train": [np.ones(2)]}, {"train": [np.zeros(2)]}, "train[0] differs"),
    "others": ({"train": [Slotted(1)]}, {"train": [Slotted(2)]}, "train[0]"),
    "paths": ({"train": [Path("a")]}, {"train": [Path("b")]}, "train[0]"),
    "containers": ({"train": [OrderedDict(a=1)]}, {"train": [OrderedDict(a=2)]}, "train[0]"),
    "iterators": ({"train": (x for x in [1])}, {"train": (x for x in [1])}, "train differs"),
    "no loss_args": ({}, {"loss_args": {"a": torch.ones(())}}, "loss_args differ"),
    "names of loss_args": ({"loss_args": {"a": torch.ones(())}}, {"loss_args": {"b": torch.ones(())}}, "loss_args"),
    "shapes of loss_args": ({"loss_args": {"a": torch.ones(2)}}, {"loss_args": {"a": torch.ones(3)}}, "loss_args"),
    "types of loss_args": (
        {"loss_args": {"a": torch.ones(2)}},
        {"loss_args": {"a": torch.ones(2, dtype=torch.long)}},
        "loss_args",
    ),
}


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("is_turned", [False, True])
def test_what_is_made_otherwise_is_not_alike(kind: str, is_turned: bool) -> None:
    ours, theirs, place = OTHER[kind]
    first, other = experiment(**ours), experiment(**theirs)
    reason = difference(other, first) if is_turned else difference(first, other)
    assert reason is not None
    if not is_turned:
        assert place in reason
    assert ("order_seed" in reason) == reason.startswith(("train", "val"))


def test_objects_that_hold_each_other() -> None:
    first, other = ([1, 2] for _ in range(2))
    first.append(first)  # type: ignore[arg-type]
    other.append(other)  # type: ignore[arg-type]
    assert first_difference(first, other, "list") is None
    other[1] = 3
    assert first_difference(first, other, "list") == "list[1]"


def test_functions_that_are_defined_later() -> None:
    def make() -> Callable[[], Any]:
        def outer() -> Any:
            return inner

        if not INPUTS.numel():
            inner = None
        return outer

    assert first_difference(make(), make(), "function") is None


def test_comparing_draws_nothing() -> None:
    def stream(seed: int) -> Built:
        return experiment(train=sampled(seed))

    first, other = stream(1), stream(1)
    before = rng_to_dict(capture_rng_state())
    assert difference(first, other) is None
    assert_identical(rng_to_dict(capture_rng_state()), before)
    for built in (first, other):
        assert torch.equal(built.train.generator.get_state(), torch.Generator().manual_seed(1).get_state())


def test_groups(caplog: pytest.LogCaptureFixture) -> None:
    made: list[str] = []

    def built() -> Iterator[tuple[str, Built]]:
        for name, seed in {"a": 1, "b": 2, "c": 1, "left": 3, "d": 1, "e": 2}.items():
            made.append(name)
            yield name, experiment(train=sampled(seed))

    groups = group_alike(built(), lambda name, built: 0 if name == "left" else 2)
    first = next(groups)
    assert list(first) == ["a", "c"]
    assert first["c"].train is first["a"].train
    assert made == ["a", "b", "c"]  # the others are built when these are done
    assert [list(group) for group in groups] == [["b", "e"], ["d"]]
    assert "b cannot be trained in one batch with a: train" in caplog.text
    assert "c cannot" not in caplog.text


def test_the_first_batch() -> None:
    built = experiment(train=sampled(1), model=nn.Linear(3, 2))
    other = experiment(train=DataLoader(ROWS, 4, shuffle=True), model=nn.Linear(3, 2))
    before = rng_to_dict(capture_rng_state())
    inputs, targets = first_batch(built)
    assert (inputs.shape, targets.shape) == ((4, 3), (4, 2))
    assert torch.equal(first_batch(built)[0], inputs)
    assert_identical(rng_to_dict(capture_rng_state()), before)
    assert torch.equal(built.train.generator.get_state(), torch.Generator().manual_seed(1).get_state())
    first_batch(other)
    assert_identical(rng_to_dict(capture_rng_state()), before)


class Wide(nn.Module):
    """Keeps a thousand numbers a row for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 1000), nn.BatchNorm1d(1000), nn.Linear(1000, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.sigmoid(self.norm(self.first(inputs))))
        return outputs


def test_memory_of_a_model() -> None:
    built = experiment(model=Wide(), train=[(INPUTS, TARGETS)])
    state = copy.deepcopy(built.model.state_dict())
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    rows = len(INPUTS)
    needed = memory.bytes_of(built)
    # Inputs of normalisation and sigmoid, and little else.
    assert 4 * (5 * parameters + 2 * rows * 1000) <= needed <= 4 * (5 * parameters + 3 * rows * 1000)
    assert all(torch.equal(value, state[name]) for name, value in built.model.state_dict().items())


def test_models_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    built = experiment(model=Wide(), train=[(INPUTS, TARGETS)])
    needed = memory.bytes_of(built)
    for free, expected in ((0, 1), (7 * needed, 3), (8 * needed, 4)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        assert memory.models_that_fit(built) == expected
    # Free are still 8 of them, for two packs.
    assert memory.models_that_fit(built, 2) == 2


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert 2**20 < memory.free_memory(cpu) < 2**50
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:  16 kB\nMemAvailable:    8 kB\nHugePages_Total:       0\n")
    monkeypatch.setattr(memory, "_MEMORY_INFO", info)
    monkeypatch.setattr(memory, "_left_in_group", list)
    assert memory.free_memory(cpu) == 8 * 1024
    monkeypatch.setattr(memory, "_left_in_group", lambda: [5])
    assert memory.free_memory(cpu) == 5
    info.unlink()
    assert memory.free_memory(cpu) > 2**20


@pytest.mark.parametrize(
    ("version", "text", "group"),
    [(2, "0::/job/step\n", "job/step"), (1, "7:cpu,memory:/job/step\n6:cpuset:/x\n0::/\n", "job/step")],
)
def test_memory_of_control_groups(
    version: int, text: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tightest limit on the way to the root counts, and one that is none does not."""
    (tmp_path / "groups").write_text(text)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    _, *names = memory._VERSION_2 if version == 2 else memory._VERSION_1
    for number in (1, 2):
        monkeypatch.setattr(memory, f"_VERSION_{number}", (tmp_path / str(number), *names))
    root = tmp_path / str(version)
    assert memory._left_in_group() == []
    for folder, limit, used in ((root / group, "max", 1), ((root / group).parent, "30", 10), (root, "50", 60)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, used), strict=True):
            (folder / name).write_text(f"{value}\n")
    assert memory._left_in_group() == [20, 0]


@pytest.mark.parametrize(
    ("error", "is_so"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory of the past"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, is_so: bool) -> None:
    assert memory.is_out_of_memory(error) == is_so
    outer = KeyError("step")
    outer.__cause__ = error
    assert memory.is_out_of_memory(outer) == is_so
