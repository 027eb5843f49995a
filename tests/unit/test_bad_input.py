"""Bad input: the error names what is wrong, what was expected, and where; and nothing has changed or is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import (
    DataRouter,
    IncompatibleModels,
    InvalidInput,
    ModelBatch,
    OptimizerFactory,
    Unsupported,
    make_joint_step,
)
from tests.compare import assert_equal
from tests.refusals import INPUTS, LABELS, everything, mlp, optimizer_for, refused


@pytest.fixture
def mb() -> ModelBatch:
    return ModelBatch([mlp() for _ in range(3)], seeds=[1, 2, 3])


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
