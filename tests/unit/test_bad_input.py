"""Bad input: the error names what is wrong, what was expected, and where; and nothing has changed or is lost."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import (
    DataRouter,
    IncompatibleModels,
    InvalidInput,
    InvalidState,
    MissingState,
    ModelBatch,
    ModelBatchError,
    OptimizerFactory,
    Unsupported,
    make_joint_step,
)
from tests.compare import assert_equal

INPUTS = torch.linspace(-1, 1, 24).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def mb() -> ModelBatch:
    return ModelBatch([mlp() for _ in range(3)], seeds=[1, 2, 3])


def optimizer_for(mb: ModelBatch, lr: float = 0.1) -> torch.optim.Optimizer:
    return OptimizerFactory(torch.optim.Adam).create_optimizer(mb, [{"lr": lr}] * mb.num_models)


def everything(mb: ModelBatch, optimizer: Any = None) -> Any:
    state = {name: value.clone() for name, value in mb.state_dict().items()}
    modes = [module.training for module in mb.prototype.modules()]
    return state, modes, copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None


@contextmanager
def refused(
    mb: ModelBatch | None, error: type[Exception], message: str, optimizer: Any = None
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The block raises the error with this message, and the batch stays what it was to the bit."""
    before = everything(mb, optimizer) if mb is not None else None
    with pytest.raises(error, match=f"(?s){message}") as caught:
        yield caught
    assert isinstance(caught.value, ModelBatchError)
    if mb is not None:
        assert_equal(everything(mb, optimizer), before)


# Models


@pytest.mark.parametrize("models", [[], (), iter([])])
def test_no_models(models: Any) -> None:
    with refused(None, InvalidInput, "no models; expected at least one"):
        ModelBatch(models)


def test_no_seeds_in_the_factory() -> None:
    with refused(None, InvalidInput, "no seeds; expected at least one"):
        ModelBatch.from_factory(mlp, seeds=[])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Conv1d(4, 3, 1), "model 2 .*is a Conv1d, in model 0 a Linear"),
        (lambda: nn.Linear(4, 5), r"model 2 .*weight has shape \(5, 4\), in model 0 \(3, 4\)"),
        (
            lambda: nn.Linear(4, 3, dtype=torch.float64),
            "model 2 .*weight has dtype torch.float64, in model 0 torch.float32",
        ),
        (lambda: nn.Linear(4, 3).requires_grad_(False), "model 2 .*weight has requires_grad False, in model 0 True"),
        (lambda: nn.Linear(4, 3, bias=False), "model 2 .*bias is None"),
    ],
)
def test_models_that_differ(other: Callable[[], nn.Module], message: str) -> None:
    with refused(None, IncompatibleModels, message):
        ModelBatch([nn.Linear(4, 3), nn.Linear(4, 3), other()])


def test_models_that_differ_in_a_setting() -> None:
    with refused(None, IncompatibleModels, r"model 1 .*3\.p is 0\.25, in model 0 0\.5.*ignore="):
        other = mlp()
        other[3].p = 0.25
        ModelBatch([mlp(), other])


@pytest.mark.parametrize("bad", [None, "model", F.relu, nn.Linear])
def test_what_is_no_model(bad: Any) -> None:
    for index, models in enumerate(([bad], [nn.Linear(4, 3), bad])):
        with refused(None, InvalidInput, f"model {index}: received .*expected a torch.nn.Module"):
            ModelBatch(models)


def test_models_without_shapes_yet() -> None:
    with refused(None, InvalidInput, "0.weight of model 0 has no shape yet"):
        ModelBatch([nn.Sequential(nn.LazyLinear(3))])


def test_sparse_parameters() -> None:
    model = nn.Module()
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    with refused(None, Unsupported, "adjacency of model 0 has layout torch.sparse_coo"):
        ModelBatch([model])


# Options


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1, 2], "received 2 seeds; expected one for each of 3 models"),
        ([1, 2, 3, 4], "received 4 seeds"),
        ([1, 2.5, 3], "seed of model 1: received 2.5; expected an integer"),
        ([1, 2, True], "seed of model 2: received True"),
        ([1, None, 3], "seed of model 1: received None"),
        (torch.tensor([0.5, 1.0, 2.0]), "seed of model 0: received 0.5"),
    ],
)
def test_seeds(seeds: Any, message: str) -> None:
    with refused(None, InvalidInput, message):
        ModelBatch([mlp() for _ in range(3)], seeds=seeds)


@pytest.mark.parametrize("size", [0, -1, 2.0, "all", True])
def test_chunk_size(size: Any) -> None:
    with refused(None, InvalidInput, f"chunk_size: received {size!r}; expected a positive integer"):
        ModelBatch([mlp()], chunk_size=size)


def test_backend_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(None, InvalidInput, "backend: received 'tensorflow'; expected one of .*'torch'"):
        ModelBatch([mlp()], backend="tensorflow")
    monkeypatch.setenv("MODELBATCH_BACKEND", "tensorflow")
    with refused(None, InvalidInput, "MODELBATCH_BACKEND: received 'tensorflow'"):
        ModelBatch([mlp()])
    ModelBatch([mlp()], backend="torch")


# Inputs and targets


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (INPUTS, r"shape \(6, 4\); expected \[3, batch, \.\.\.\].*expand"),
        (INPUTS.expand(2, 6, 4), r"shape \(2, 6, 4\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        ({"x": INPUTS.expand(3, 6, 4), "mask": INPUTS}, r"'mask'.*shape \(6, 4\)"),
    ],
)
def test_inputs_without_the_model_axis(inputs: Any, message: str) -> None:
    mb = ModelBatch([mlp() for _ in range(3)], shared_input=False)
    optimizer = optimizer_for(mb)
    with refused(mb, InvalidInput, message, optimizer):
        mb(inputs)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    with refused(mb, InvalidInput, message, optimizer):
        step(inputs, LABELS)
    with refused(mb, InvalidInput, message, optimizer):
        step.run([(INPUTS.expand(3, 6, 4), LABELS), (inputs, LABELS)])


def test_keyword_inputs_without_the_model_axis(mb: ModelBatch) -> None:
    own = ModelBatch([mlp() for _ in range(3)], shared_input=False)
    with refused(own, InvalidInput, r"'input'.*shape \(6, 4\)"):
        own(input=INPUTS)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (LABELS[:5], r"\[\(5,\)\] for 3 models and 6 rows; expected \[6, \.\.\.\] if shared or \[3, 6, \.\.\.\]"),
        (LABELS.expand(2, 6), r"\[\(2, 6\)\]"),
        (LABELS.expand(3, 6)[:, :5], r"\[\(3, 5\)\]"),
        ({"a": LABELS, "b": LABELS.expand(3, 6)}, "do not fit"),
    ],
)
def test_targets_that_fit_neither_shape(mb: ModelBatch, targets: Any, message: str) -> None:
    outputs, optimizer = mb(INPUTS), optimizer_for(mb)
    with refused(mb, InvalidInput, message):
        mb.compute_loss(outputs, targets, F.cross_entropy)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    with refused(mb, InvalidInput, message, optimizer):
        step(INPUTS, targets)


def test_targets_that_fit_both_shapes() -> None:
    # Three models, three rows, and a loss that takes [3, 1] against one row as well as against all.
    mb = ModelBatch([nn.Linear(4, 3) for _ in range(3)])
    targets = torch.zeros(3, 3)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum()

    optimizer = optimizer_for(mb)
    with refused(mb, InvalidInput, "fit both as shared and as per-model.*shared_targets=True.*shared_targets=False"):
        mb.compute_loss(mb(INPUTS[:3]), targets, loss)
    with refused(mb, InvalidInput, "shared_targets=True", optimizer):
        mb.make_train_step(loss, optimizer)(INPUTS[:3], targets)
    for shared in (True, False):
        assert mb.compute_loss(mb(INPUTS[:3]), targets, loss, shared_targets=shared).shape == ()
        mb.make_train_step(loss, optimizer, shared_targets=shared)(INPUTS[:3], targets)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda o, t: F.cross_entropy(o, t, reduction="none"),
            r"one value per model: received a tensor of shape \(6,\)",
        ),
        (lambda o, t: F.cross_entropy(o, t).reshape(1), r"shape \(1,\)"),
        (lambda o, t: 0.5, "received float"),
        (lambda o, t: None, "received NoneType"),
        (lambda o, t: (F.cross_entropy(o, t), o), "received tuple"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_losses_that_are_not_one_value(loss: Any, message: str, count: int) -> None:
    mb = ModelBatch([mlp() for _ in range(count)], seeds=range(count))
    outputs, optimizer = mb(INPUTS), optimizer_for(mb)
    with refused(mb, InvalidInput, message):
        mb.compute_loss(outputs, LABELS, loss)
    with refused(mb, InvalidInput, message, optimizer):
        mb.make_train_step(loss, optimizer)(INPUTS, LABELS)


def test_a_loss_that_depends_on_no_parameter(mb: ModelBatch) -> None:
    optimizer = optimizer_for(mb)
    with refused(mb, InvalidInput, "does not depend on any parameter", optimizer):
        mb.make_train_step(lambda o, t: o.detach().sum(), optimizer)(INPUTS, LABELS)


def test_unknown_reduction(mb: ModelBatch) -> None:
    outputs: Any = mb(INPUTS)
    with refused(mb, InvalidInput, "reduction: received 'avg'; expected 'mean', 'sum' or 'none'"):
        mb.compute_loss(outputs, LABELS, F.cross_entropy, reduction="avg")  # type: ignore[arg-type]


class FailsLate(nn.Module):
    """Updates its statistics, then fails on a certain input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        self.calls += 1
        self.calls = self.calls + 1
        if len(x) == 5:
            raise ValueError("five rows are too few")
        return self.linear(x)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_model_that_fails_half_way_leaves_nothing_behind(count: int, chunk_size: int | None) -> None:
    mb = ModelBatch([FailsLate() for _ in range(count)], chunk_size=chunk_size)
    optimizer = optimizer_for(mb)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    step(INPUTS, LABELS)
    before = everything(mb, optimizer)
    for call in (lambda: mb(INPUTS[:5]), lambda: step(INPUTS[:5], LABELS[:5])):
        with pytest.raises(ValueError, match="five rows are too few"):
            call()
        assert_equal(everything(mb, optimizer), before)
    assert mb(INPUTS).shape == (count, 6, 3)
    assert mb.backend_report()["runs"] != "one by one"


def test_a_wrong_input_shape_is_told_as_plain_pytorch_tells_it(mb: ModelBatch) -> None:
    before = everything(mb)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        mb(torch.zeros(6, 5))
    assert_equal(everything(mb), before)


# Optimizers and steps


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([{"lr": 0.1}] * 2, "received 2 configurations; expected 3, one for each model"),
        ([], "received 0 configurations"),
        ({"lr": 0.1}, "expected a list of 3 dicts"),
        ([{"lr": 0.1}, None, {}], r"model 1: configs\[1\]"),
        ([{"lr": 0.1}, {"lr": 0.1}, {"lr": 0.1, "beta": 0.9}], "model 2: Adam has no option 'beta'.*betas"),
        ([{"lr": 0.1}, {"lr": -0.1}, {}], "model 1: Adam refuses its configuration because of 'lr'"),
    ],
)
def test_optimizer_configurations(mb: ModelBatch, configs: Any, message: str) -> None:
    with refused(mb, InvalidInput, message):
        OptimizerFactory(torch.optim.Adam).create_optimizer(mb, configs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate: received 0; expected a positive integer"),
        ({"accumulate": 1.5}, "accumulate: received 1.5"),
        ({"active": torch.ones(3)}, r"active: received torch.float32 \(3,\); expected a bool tensor \[3\]"),
        ({"active": torch.ones(2, dtype=torch.bool)}, r"active: received torch.bool \(2,\)"),
        ({"active": [True, True, True]}, "active: received list"),
        ({"clip_norm": torch.ones(2)}, r"clip_norm: received shape \(2,\); expected a tensor \[3, \.\.\.\]"),
        ({"loss_args": {"weight": torch.ones(2)}}, r"loss_args\['weight'\]: received shape \(2,\)"),
        ({"loss_args": {"weight": torch.tensor(1.0)}}, r"loss_args\['weight'\]: received shape \(\)"),
        ({"loss_args": {"weight": [1.0, 2.0, 3.0]}}, r"loss_args\['weight'\]: received list"),
    ],
)
def test_options_of_a_step(mb: ModelBatch, options: dict[str, Any], message: str) -> None:
    with refused(mb, InvalidInput, message):
        mb.make_train_step(F.cross_entropy, optimizer_for(mb), **options)


def test_options_that_become_wrong_later(mb: ModelBatch) -> None:
    optimizer = optimizer_for(mb)
    step = mb.make_train_step(
        lambda o, t, weight: weight * F.cross_entropy(o, t), optimizer, loss_args={"weight": torch.ones(3)}
    )
    with refused(mb, InvalidInput, "active: received torch.int64", optimizer):
        step.active = torch.tensor([1, 0, 1])
    step.loss_args["weight"] = torch.ones(4)
    with refused(mb, InvalidInput, r"loss_args\['weight'\]: received shape \(4,\)", optimizer):
        step(INPUTS, LABELS)
    step.loss_args["weight"] = torch.ones(3)
    with refused(mb, InvalidInput, "no batches; expected at least one", optimizer):
        step.run([])


def test_aux_without_a_pair(mb: ModelBatch) -> None:
    optimizer = optimizer_for(mb)
    with refused(mb, InvalidInput, r"aux=True: received Tensor; expected \(loss, aux\)", optimizer):
        mb.make_train_step(F.cross_entropy, optimizer, aux=True)(INPUTS, LABELS)


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (lambda mb: [], "1 batches and 0 optimizers"),
        (lambda mb: [None, None], "1 batches and 2 optimizers"),
        (lambda mb: [None], "no optimizer; expected at least one"),
        (lambda mb: ["Adam"], "optimizer 0: received str"),
        (lambda mb: [optimizer_for(ModelBatch([mlp() for _ in range(3)]))], "optimizer"),
        (lambda mb: [torch.optim.SGD(mlp().parameters())], "optimizer"),
        (lambda mb: [optimizer_for(mb.select([0, 1]))], "optimizer"),
    ],
)
def test_optimizers_of_a_step(mb: ModelBatch, optimizers: Callable[[ModelBatch], Any], message: str) -> None:
    with refused(mb, InvalidInput, message):
        step = make_joint_step([mb], lambda model, x, y: F.cross_entropy(model(x), y), optimizers(mb))
        step(INPUTS, LABELS)


def test_batches_of_a_joint_step(mb: ModelBatch) -> None:
    def loss(one: Any, other: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(one(x) + other(x), y)

    fewer = ModelBatch([mlp() for _ in range(2)])
    with refused(mb, InvalidInput, r"num_models \[3, 2\]; expected equal num_models"):
        make_joint_step([mb, fewer], loss, [optimizer_for(mb), optimizer_for(fewer)])
    own = ModelBatch([mlp() for _ in range(3)], shared_input=False)
    with refused(mb, InvalidInput, r"shared_input \[True, False\]"):
        make_joint_step([mb, own], loss, [optimizer_for(mb), optimizer_for(own)])
    with refused(None, InvalidInput, "0 batches"):
        make_joint_step([], loss, [])


def test_a_batch_without_anything_to_train() -> None:
    mb = ModelBatch([nn.Linear(4, 3).requires_grad_(False) for _ in range(2)])
    with refused(mb, InvalidInput, "no parameter|requires a gradient"):
        OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{}] * 2)


def test_per_model_operations(mb: ModelBatch) -> None:
    for index in (3, -4, 99, True):
        with refused(mb, InvalidInput, f"model number: received {index}; expected 0 to 2"):
            mb.model(index)
        with refused(mb, InvalidInput, "model number"):
            mb.copy_model(0, index)
        with refused(mb, InvalidInput, "model number"):
            mb.copy_model(index, 0)
    for index in (1.0, "0", None):
        with refused(mb, InvalidInput, "model number"):
            mb.model(index)  # type: ignore[arg-type]
    for indices in ([], [3], [-4], [0.5], [[0, 1]], torch.tensor([True, False]), torch.zeros(3, dtype=torch.bool)):
        with refused(mb, InvalidInput, "select|model number"):
            mb.select(indices)  # type: ignore[arg-type]


# States


def change_state(states: list[dict[str, Tensor]], change: str) -> Any:
    if change == "missing":
        del states[2]["4.bias"]
    elif change == "unknown":
        states[2]["4.extra"] = torch.zeros(1)
    elif change == "shape":
        states[2]["4.bias"] = torch.zeros(4)
    elif change == "broadcasts":
        states[2]["4.bias"] = torch.zeros(1)
    elif change == "dtype":
        states[2]["4.bias"] = states[2]["4.bias"].double()
    elif change == "type":
        states[2]["4.bias"] = [0.0, 0.0, 0.0]  # type: ignore[assignment]
    elif change == "buffer":
        states[2]["1.running_mean"] = torch.zeros(9)
    elif change == "too few":
        states.pop()
    elif change == "too many":
        states.append(states[0])
    elif change == "no mapping":
        states[2] = torch.zeros(3)  # type: ignore[call-overload]
    return states


STATE_ERRORS = {
    "missing": r"model 2 does not fit: missing keys \['4.bias'\]",
    "unknown": r"model 2 does not fit: .*unknown keys \['4.extra'\]",
    "shape": r"model 2, key '4.bias': received torch.float32 of shape \(4,\); expected torch.float32 of shape \(3,\)",
    "broadcasts": r"model 2, key '4.bias': received torch.float32 of shape \(1,\)",
    "dtype": r"model 2, key '4.bias': received torch.float64",
    "type": r"model 2, key '4.bias': received list; expected a tensor",
    "buffer": r"model 2, key '1.running_mean': received torch.float32 of shape \(9,\)",
    "too few": "received 2 states; expected 3, one per model",
    "too many": "received 4 states; expected 3",
    "no mapping": "state of model 2: received Tensor; expected a state_dict",
}


@pytest.mark.parametrize("change", STATE_ERRORS)
def test_states_that_do_not_fit(mb: ModelBatch, change: str) -> None:
    states = change_state([dict(mlp().state_dict()) for _ in range(3)], change)
    optimizer = optimizer_for(mb)
    with refused(mb, InvalidState, STATE_ERRORS[change], optimizer):
        mb.load_model_states(states)


def test_tied_tensors_with_two_values() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.other.weight = self.one.weight

    mb = ModelBatch([Tied() for _ in range(2)])
    states = mb.get_model_states()
    states[1]["other.weight"] = states[1]["other.weight"] + 1
    with refused(mb, InvalidState, "model 1: 'other.weight' and 'one.weight' are one tied tensor"):
        mb.load_model_states(states)


@pytest.mark.parametrize("spoilt", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
def test_states_without_values(mb: ModelBatch, spoilt: Any) -> None:
    states = [{key: value + 1 for key, value in state.items()} for state in mb.get_model_states()]
    key = next(iter(states[2]))
    states[2][key] = spoilt(states[2][key])
    with refused(mb, InvalidState, f"model 2, key '{key}'.*expected a dense tensor with values"):
        mb.load_model_states(states)


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ModelBatch([mlp() for _ in range(3)]).save_all(tmp_path)
    return tmp_path


def test_a_missing_file(mb: ModelBatch, folder: Path) -> None:
    (folder / "model_1.pt").unlink()
    with refused(mb, MissingState, r"1 of 3 model files do not exist: .*model_1\.pt.*Nothing was loaded"):
        mb.load_all(folder)
    with pytest.raises(FileNotFoundError):
        mb.load_all(folder)


def test_threads_may_save_to_one_folder(mb: ModelBatch, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: mb.save_all(tmp_path), range(40)))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"model_{i}.pt" for i in range(3)]
    mb.load_all(tmp_path)


def test_a_missing_folder(mb: ModelBatch, tmp_path: Path) -> None:
    with refused(mb, MissingState, "3 of 3 model files do not exist"):
        mb.load_all(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file(mb: ModelBatch, folder: Path, kept: float) -> None:
    content = (folder / "model_2.pt").read_bytes()
    (folder / "model_2.pt").write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with refused(mb, InvalidState, r"model_2\.pt cannot be read.*Nothing was loaded") as caught:
        mb.load_all(folder)
    # torch's own message advises to allow the file to run code.
    assert "weights_only" not in str(caught.value)


def test_a_file_that_is_no_state(mb: ModelBatch, folder: Path) -> None:
    torch.save([torch.zeros(1)], folder / "model_2.pt")
    with refused(mb, InvalidState, r"model_2\.pt: received list; expected a state_dict"):
        mb.load_all(folder)


def test_a_file_of_another_model(mb: ModelBatch, folder: Path) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), folder / "model_2.pt")
    with refused(mb, InvalidState, "model 2 does not fit: missing keys"):
        mb.load_all(folder)


class Payload:
    """Unpickling it calls a function of the attacker's choice."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["PAYLOAD_TARGET"],)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_are_not_executed(mb: ModelBatch, folder: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYLOAD_TARGET", str(folder / "executed"))
    state = {**mlp().state_dict(), "4.bias": Payload()}
    torch.save(state, folder / "model_2.pt", _use_new_zipfile_serialization=zipped)
    with refused(mb, InvalidState, r"model_2\.pt cannot be read"):
        mb.load_all(folder)
    assert not (folder / "executed").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (folder / "executed").exists(), "the payload does nothing, so the test shows nothing"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saving_that_fails_leaves_the_old_files(mb: ModelBatch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    save, calls = torch.save, []

    def fail_in_the_middle(value: Any, stream: Any, *args: Any, **options: Any) -> None:
        calls.append(value)
        if len(calls) == 2:
            stream.write(b"half a file")
            raise OSError(28, "No space left on device")
        save(value, stream, *args, **options)

    monkeypatch.setattr(torch, "save", fail_in_the_middle)
    with pytest.raises(OSError, match="No space left"):
        mb.save_all(folder)
    assert names(folder) == ["model_0.pt", "model_1.pt", "model_2.pt"]
    assert (folder / "model_1.pt").read_bytes() == old["model_1.pt"]
    assert (folder / "model_2.pt").read_bytes() == old["model_2.pt"]
    assert_equal(torch.load(folder / "model_0.pt", weights_only=True), dict(mb.get_model_states()[0]))


def test_a_file_appears_whole_or_not_at_all(mb: ModelBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch writes goes somewhere else first, and is renamed only after it reached the disk."""
    seen: list[list[str]] = []
    save, flushed = torch.save, []

    def spy(value: Any, *args: Any, **options: Any) -> None:
        save(value, *args, **options)
        seen.append([name for name in names(tmp_path) if name.endswith(".pt")])

    monkeypatch.setattr(torch, "save", spy)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(names(tmp_path)), fsync(descriptor)))
    mb.save_all(tmp_path)
    assert seen == [[], ["model_0.pt"], ["model_0.pt", "model_1.pt"]]
    assert len(flushed) >= 3
    assert all("model_2.pt" not in earlier for earlier in flushed[:3])
    assert names(tmp_path) == ["model_0.pt", "model_1.pt", "model_2.pt"]


def test_a_stray_temporary_file_does_no_harm(mb: ModelBatch, folder: Path) -> None:
    (folder / ".model_1.pt.123.tmp").write_bytes(b"left by a crash")
    mb.load_all(folder)
    mb.save_all(folder)
    mb.load_all(folder)


def test_a_file_in_the_place_of_the_folder(mb: ModelBatch, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        mb.save_all(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "a file"


# Routing


@pytest.mark.parametrize(
    ("mode", "selection", "message"),
    [
        (
            "mask",
            [torch.ones(5, dtype=torch.bool)] * 3,
            r"model 0: the mask does not fit.*expected bool of shape \[6\]",
        ),
        ("mask", [torch.ones(6, dtype=torch.bool), torch.ones(6)], "model 1: the mask.*float32"),
        ("mask", [torch.zeros(6, dtype=torch.bool)] * 3, "no model gets any row"),
        ("mask", [], "masks are empty"),
        ("mask", None, "received neither masks nor indices; expected masks"),
        ("indices", [[0, 6]], "model 0.*6"),
        ("indices", [[0], [-7]], "model 1.*-7"),
        ("indices", [torch.tensor([0.5])], "model 0.*float32"),
        ("indices", [[], [], []], "no model gets any row"),
        ("indices", None, "expected indices"),
    ],
)
def test_masks_and_indices(mode: str, selection: Any, message: str) -> None:
    before = copy.deepcopy(selection)
    keyword = {"masks" if mode == "mask" else "indices": selection}
    with refused(None, InvalidInput, message):
        DataRouter(mode).route_batch(INPUTS, **keyword, targets=LABELS)
    assert str(selection) == str(before)


def test_routed_inputs_of_a_batch_that_shares_inputs(mb: ModelBatch) -> None:
    routed = DataRouter("indices").route_batch(INPUTS, indices=[[0, 1, 2], [3, 4], [5, 1]], targets=LABELS)
    with refused(mb, InvalidInput, "shared_input=True.*shared_input=False"):
        mb(routed.inputs)


def test_shared_targets_for_routed_inputs() -> None:
    mb = ModelBatch([mlp() for _ in range(3)], shared_input=False)
    routed = DataRouter("indices").route_batch(INPUTS, indices=[[0, 1, 2], [3, 4], [5, 1]], targets=LABELS)
    outputs, optimizer = mb(routed.inputs), optimizer_for(mb)
    with refused(mb, InvalidInput, "targets"):
        mb.compute_loss(outputs, LABELS[:3], F.cross_entropy)
    with refused(mb, InvalidInput, "targets", optimizer):
        mb.make_train_step(F.cross_entropy, optimizer)(routed.inputs, LABELS[:3])


def test_routed_for_another_number_of_models() -> None:
    mb = ModelBatch([mlp() for _ in range(3)], shared_input=False)
    routed = DataRouter("indices").route_batch(INPUTS, indices=[[0, 1, 2], [3, 4]], targets=LABELS)
    with refused(mb, InvalidInput, r"shape \(2, 3, 4\); expected \[3, batch, \.\.\.\]"):
        mb(routed.inputs)


def test_weights_of_the_wrong_shape(mb: ModelBatch) -> None:
    outputs, targets = mb(INPUTS), LABELS.expand(3, 6)
    for weights in (torch.ones(3, 5), torch.eye(3, 5), torch.ones(2, 6), torch.ones(6), torch.ones(3, 6, 1)):
        with refused(mb, InvalidInput, "weights"):
            mb.compute_loss(outputs, targets, F.cross_entropy, weights=weights)


def test_weights_that_do_not_come_from_routing(mb: ModelBatch) -> None:
    outputs, targets = mb(INPUTS), LABELS.expand(3, 6)
    with refused(mb, InvalidInput, "weight.*model 1|model 1.*weight"):
        mb.compute_loss(outputs, targets, F.cross_entropy, weights=torch.tensor([[1.0] * 6, [0.5] * 6, [1.0] * 6]))
    with refused(mb, InvalidInput, "weight.*model 2|model 2.*weight"):
        mb.compute_loss(outputs, targets, F.cross_entropy, weights=torch.tensor([[1.0] * 6] * 2 + [[0.0, 1.0] * 3]))
