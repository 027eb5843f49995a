"""torchmb's interface: batches made from one module, and losses and accuracies per model."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import (
    AbstractBatchModule,
    BatchModule,
    InvalidInput,
    InvalidState,
    OptimizerFactory,
    batch_accuracy,
    batch_loss,
    batch_topk,
    batching,
    register_module,
)
from tests.compare import assert_close, assert_different, assert_equal
from tests.optimizers import CASES as OPTIMIZERS

BATCH, ROWS = 3, 5


class LeNet(nn.Module):
    """The README's model, on small images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Scale(nn.Module):
    """Multiplies by a number that it learns, plus a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("offset", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.offset


class BatchScale(AbstractBatchModule):
    """All models' `Scale` at once."""

    calls = 0

    def __init__(self, module: Scale, batch: int) -> None:
        super().__init__(batch)
        self.factor = nn.Parameter(module.factor.detach().repeat(batch))
        self.register_buffer("offset", module.offset.repeat(batch))

    def forward(self, batch_inputs: Tensor) -> Tensor:
        type(self).calls += 1
        shape = (-1, *[1] * (batch_inputs.dim() - 1))
        return batch_inputs * self.factor.view(shape) + self.offset.view(shape)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_REGISTERED", {})
    monkeypatch.setattr(BatchScale, "calls", 0)
    register_module(Scale, BatchScale)


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, ROWS, 1, 8, 8, generator=generator)
    return inputs, torch.randint(10, (BATCH, ROWS), generator=generator)


def rows(width: int = 4) -> Tensor:
    return torch.randn(BATCH, ROWS, width, generator=torch.Generator().manual_seed(2))


def as_dicts(models: Any) -> list[dict[str, Tensor]]:
    return [dict(model.state_dict()) for model in models]


# The README, step by step


def test_training_as_in_the_readme() -> None:
    module = LeNet()
    batch_model = BatchModule(module, batch=BATCH)
    models = [copy.deepcopy(module) for _ in range(BATCH)]
    inputs, targets = images()
    optimizer = torch.optim.SGD(batch_model.parameters(), lr=0.1, momentum=0.9)
    plain = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]
    for _ in range(3):
        outputs = batch_model(inputs)
        assert outputs.shape == (BATCH, ROWS, 10)
        losses = batch_loss(outputs, targets, BATCH, F.cross_entropy, "mean")
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        expected = []
        for model, own, x, y in zip(models, plain, inputs, targets, strict=True):
            own.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            own.step()
            expected.append(loss)
        assert_close(losses, torch.stack(expected))
    assert_close([dict(state) for state in batch_model.state_dicts()], as_dicts(models))
    assert_different(batch_model.state_dicts()[0], batch_model.state_dicts()[1])


def test_the_copies_start_equal_and_the_module_is_not_changed() -> None:
    module = LeNet()
    before = copy.deepcopy(dict(module.state_dict()))
    batch_model = BatchModule(module, batch=BATCH)
    assert_equal([dict(state) for state in batch_model.state_dicts()], [before] * BATCH)
    batch_model(images()[0])
    assert_equal(dict(module.state_dict()), before)
    assert module.features[0].weight.grad is None


def test_a_batch_of_one_is_the_default() -> None:
    module = nn.Linear(4, 2)
    batch_model = BatchModule(module)
    assert batch_model.batch == 1
    assert_close(batch_model(rows()[:1]), module(rows()[:1]))


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.LSTM(4, 3, batch_first=True),
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        lambda: nn.GRUCell(4, 3),
    ],
)
def test_any_module_works_not_only_registered_ones(module: Any) -> None:
    made = module()
    x = rows() if isinstance(made, nn.GRUCell) else torch.randn(BATCH, 2, ROWS, 4)
    arguments = (x, x, x) if isinstance(made, nn.MultiheadAttention) else (x,)
    outputs = BatchModule(made, BATCH)(*arguments)
    expected = [made(*(own[index] for own in arguments)) for index in range(BATCH)]
    for index, own in enumerate(expected):
        for received, wanted in zip(tensors(outputs), tensors(own), strict=True):
            assert_close(received[index], wanted)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def test_keyword_inputs() -> None:
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    x = torch.randn(BATCH, 2, ROWS, 4)
    outputs, weights = BatchModule(module, BATCH)(query=x, key=x, value=x)
    for index in range(BATCH):
        own = module(x[index], x[index], x[index])
        assert_close((outputs[index], weights[index]), own)


def test_states_go_in_and_out() -> None:
    batch_model = BatchModule(LeNet(), batch=BATCH)
    others = [LeNet() for _ in range(BATCH)]
    batch_model.load_state_dicts([other.state_dict() for other in others])
    assert_equal([dict(state) for state in batch_model.state_dicts()], as_dicts(others))
    batch_model.load_state_dicts(others[1].state_dict())
    assert_equal([dict(state) for state in batch_model.state_dicts()], as_dicts([others[1]] * BATCH))
    with pytest.raises(InvalidInput, match="received 2 states; expected one or 3"):
        batch_model.load_state_dicts([other.state_dict() for other in others[:2]])
    with pytest.raises(InvalidState, match="model 0.*missing keys"):
        batch_model.load_state_dicts(nn.Linear(4, 2).state_dict())
    assert_equal([dict(state) for state in batch_model.state_dicts()], as_dicts([others[1]] * BATCH))


def test_modes_and_dtypes_reach_the_models() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    batch_model = BatchModule(module, BATCH).eval().double()
    module = module.eval().double()
    expected = torch.stack([module(x) for x in rows().double()])
    assert_close(batch_model(rows().double()), expected, atol=1e-12, rtol=1e-12)
    assert not torch.equal(batch_model.train()(rows().double()), expected)


@pytest.mark.parametrize("module", [nn.Linear, "Linear", None])
def test_what_is_no_module(module: Any) -> None:
    with pytest.raises(InvalidInput, match="expected a torch.nn.Module"):
        BatchModule(module, 2)


@pytest.mark.parametrize("batch", [0, -1, 1.0, True, None])
def test_impossible_batch(batch: Any) -> None:
    with pytest.raises(InvalidInput, match=f"batch: received {batch}; expected a positive integer"):
        BatchModule(nn.Linear(4, 2), batch)


# Isolation: the README warns that AdamW leaks between models


def train_isolated(optimizer_for: Any, factor: float) -> list[dict[str, Tensor]]:
    """Train three models; the inputs of model 1 are multiplied."""
    torch.manual_seed(3)
    batch_model = BatchModule(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), BATCH)
    optimizer = optimizer_for(batch_model)
    inputs, targets = rows(), torch.arange(BATCH * ROWS).reshape(BATCH, ROWS) % 3
    inputs[1] *= factor
    for _ in range(4):
        optimizer.zero_grad()
        batch_loss(batch_model(inputs), targets, BATCH).sum().backward()
        optimizer.step()
    return [dict(state) for state in batch_model.state_dicts()]


def check_isolation(optimizer_for: Any) -> None:
    expected = train_isolated(optimizer_for, 1.0)
    for factor in (1e3, float("inf"), float("nan"), 0.0):
        received = train_isolated(optimizer_for, factor)
        assert_equal([received[0], received[2]], [expected[0], expected[2]])
        assert_different(received[1], expected[1])


@pytest.mark.parametrize(
    "optimizer_cls",
    [
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Rprop,
        torch.optim.ASGD,
    ],
)
def test_models_are_isolated_under_plain_optimizers(optimizer_cls: Any) -> None:
    check_isolation(lambda batch_model: optimizer_cls(batch_model.parameters(), lr=0.05))


@pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS if not c.matrices_only and "tensor" not in c.name], ids=lambda c: c.name
)
def test_models_are_isolated_under_every_optimizer_of_the_factory(case: Any) -> None:
    check_isolation(
        lambda batch_model: OptimizerFactory(case.optimizer_cls).create_optimizer(batch_model.models, case.configs)
    )


def test_the_isolation_check_notices_a_leak() -> None:
    """A negative control: an optimizer that looks at all models' gradients together does leak."""

    class Normalised(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            parameters = [p for group in self.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
            super().step(closure)

    with pytest.raises(AssertionError, match="differ"):
        check_isolation(lambda batch_model: Normalised(batch_model.parameters(), lr=0.1))


# Registered modules


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("nest", [False, True])
def test_a_registered_module_does_the_work(nest: bool) -> None:
    module: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Scale(), nn.Linear(4, 3))) if nest else Scale()
    batch_model = BatchModule(module, BATCH)
    models = [copy.deepcopy(module) for _ in range(BATCH)]
    inputs = rows()
    optimizer = torch.optim.SGD(batch_model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        outputs = batch_model(inputs)
        outputs.square().mean((1, 2)).sum().backward()
        optimizer.step()
        assert BatchScale.calls == step + 1
        for index, model in enumerate(models):
            own = model(inputs[index])
            assert_close(outputs[index], own)
            plain = torch.optim.SGD(model.parameters(), lr=0.1)
            plain.zero_grad()
            own.square().mean().backward()
            plain.step()
    assert_close([dict(state) for state in batch_model.state_dicts()], as_dicts(models))


@pytest.mark.usefixtures("registered")
def test_parameters_of_registered_modules_are_listed_once() -> None:
    batch_model = BatchModule(nn.Sequential(nn.Linear(4, 4), Scale()), BATCH)
    assert sum(p.numel() for p in batch_model.parameters()) == BATCH * (20 + 1)
    assert len(list(batch_model.parameters())) == 3


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_registered_modules_are_independent(duplicate: Any) -> None:
    batch_model = BatchModule(nn.Sequential(nn.Linear(4, 4), Scale()), BATCH)
    twin = duplicate(batch_model)
    before = batch_model(rows()).detach()
    assert_equal(twin(rows()).detach(), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert_equal(batch_model(rows()).detach(), before)
    changed = twin(rows()).detach()
    model = nn.Sequential(nn.Linear(4, 4), Scale())
    model.load_state_dict(twin.state_dicts()[2])
    assert_close(changed[2], model(rows()[2]))


@pytest.mark.usefixtures("registered")
def test_registered_modules_follow_dtype_and_states() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Scale())
    batch_model = BatchModule(module, BATCH).double()
    assert batch_model(rows().double()).dtype == torch.float64
    others = [nn.Sequential(nn.Linear(4, 4), Scale()).double() for _ in range(BATCH)]
    for index, other in enumerate(others):
        other[1].factor.data.fill_(index)
    batch_model.load_state_dicts([other.state_dict() for other in others])
    assert_equal([dict(state) for state in batch_model.state_dicts()], as_dicts(others))
    assert_close(
        batch_model(rows().double()), torch.stack([o(x) for o, x in zip(others, rows().double(), strict=True)])
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("change", ["missing in one", "missing in the other", "unknown", "shape"])
def test_loading_into_registered_modules_is_all_or_nothing(change: str) -> None:
    batch_model = BatchModule(nn.Sequential(nn.Linear(4, 4), Scale()), BATCH)
    states: list[Any] = [dict(nn.Sequential(nn.Linear(4, 4), Scale()).state_dict()) for _ in range(BATCH)]
    for state in states:
        state["1.factor"] = torch.tensor(7.0)
    if change == "missing in one":
        del states[2]["0.bias"]
    elif change == "missing in the other":
        del states[2]["1.offset"]
    elif change == "unknown":
        states[2]["1.unknown"] = torch.tensor(1.0)
    else:
        states[2]["1.factor"] = torch.zeros(2)
    before = copy.deepcopy(batch_model.state_dicts())
    with pytest.raises(InvalidState, match="model 2"):
        batch_model.load_state_dicts(states)
    assert_equal(batch_model.state_dicts(), before)


@pytest.mark.usefixtures("registered")
def test_a_registered_module_in_a_batch_of_one() -> None:
    module = nn.Sequential(nn.Linear(4, 4), Scale())
    assert_close(BatchModule(module, 1)(rows()[:1]), module(rows()[:1]))


@pytest.mark.usefixtures("registered")
def test_a_registered_module_that_occurs_twice_is_shared() -> None:
    scale = Scale()
    module = nn.Sequential(scale, nn.Linear(4, 4), scale)
    batch_model = BatchModule(module, BATCH)
    assert_close(batch_model(rows()), torch.stack([module(x) for x in rows()]))
    assert sum(p.numel() for p in batch_model.parameters()) == BATCH * (20 + 1)
    batch_model(rows()).sum().backward()
    module(rows()[0]).sum().backward()
    factors = [p.grad for p in batch_model.parameters() if p.shape == (BATCH,)]
    assert len(factors) == 1
    assert factors[0] is not None
    assert_close(factors[0][0], scale.factor.grad)


@pytest.mark.usefixtures("registered")
def test_what_is_registered_is_a_module_class() -> None:
    for bad in (Scale(), int, "Scale"):
        with pytest.raises(InvalidInput, match="expected a subclass of torch.nn.Module"):
            register_module(bad, BatchScale)  # type: ignore[arg-type]


def test_an_abstract_batch_module_has_no_forward() -> None:
    with pytest.raises(NotImplementedError, match="AbstractBatchModule must define forward"):
        AbstractBatchModule(2)(torch.zeros(2, 3))


# Losses and accuracies


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (F.cross_entropy, {}),
        (F.cross_entropy, {"label_smoothing": 0.2, "weight": torch.tensor([0.1, 1.0, 3.0, 0.5]), "ignore_index": 2}),
        (F.nll_loss, {}),
    ],
)
def test_batch_loss(loss: Any, options: dict[str, Any], reduction: Any) -> None:
    outputs, targets = rows().requires_grad_(), torch.arange(BATCH * ROWS).reshape(BATCH, ROWS) % 4
    losses = batch_loss(outputs, targets, BATCH, loss, reduction, **options)
    expected = torch.stack([loss(x, y, reduction=reduction, **options) for x, y in zip(outputs, targets, strict=True)])
    assert losses.shape == ((BATCH, ROWS) if reduction == "none" else (BATCH,))
    assert_close(losses, expected)
    grads = [torch.autograd.grad(own.sum(), outputs, retain_graph=True)[0] for own in (losses, expected)]
    assert_close(grads[0], grads[1])


def test_batch_loss_is_a_mean_of_cross_entropies_by_default() -> None:
    outputs, targets = rows(), torch.zeros(BATCH, ROWS, dtype=torch.long)
    assert_equal(batch_loss(outputs, targets, BATCH), batch_loss(outputs, targets, BATCH, F.cross_entropy, "mean"))


def test_batch_loss_of_real_targets() -> None:
    outputs = rows()
    assert_close(batch_loss(outputs, outputs * 0, BATCH, F.mse_loss), outputs.square().mean((1, 2)))


def test_a_loss_that_cannot_be_batched_runs_one_by_one() -> None:
    def loss(inputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return inputs.sum() if inputs.sum().item() > 0 else 2 * targets.sum()

    outputs = torch.stack([torch.ones(2, 1), -torch.ones(2, 1)])
    assert_equal(batch_loss(outputs, torch.ones(2, 2, 1), 2, loss), torch.tensor([2.0, 4.0]))


def test_wrong_losses() -> None:
    outputs, targets = rows(), torch.zeros(BATCH, ROWS, dtype=torch.long)
    with pytest.raises(InvalidInput, match=r"batch_inputs: received shape \(3, 5, 4\); expected \[4, rows"):
        batch_loss(outputs, targets, 4)
    with pytest.raises(InvalidInput, match=r"batch_targets: received shape \(2, 5\)"):
        batch_loss(outputs, targets[:2], BATCH)
    with pytest.raises(InvalidInput, match="reduction: received 'max'"):
        batch_loss(outputs, targets, BATCH, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="out of bounds"):
        batch_loss(outputs, targets + 9, BATCH)


def test_batch_topk_counts_the_right_rows() -> None:
    scores = torch.tensor(
        [[[0.1, 0.9, 0.5], [0.7, 0.2, 0.1]], [[0.3, 0.2, 0.5], [0.1, 0.6, 0.3]]],
    )
    targets = torch.tensor([[2, 0], [0, 0]])
    accuracies = batch_topk(scores, targets, 2, (1, 2, 3))
    assert_equal(accuracies, torch.tensor([[0.5, 0.0], [1.0, 0.5], [1.0, 1.0]]))
    counts = batch_topk(scores, targets, 2, (1, 2, 3), count=True)
    assert_equal(counts, torch.tensor([[1, 0], [2, 1], [2, 2]]))
    assert_equal(batch_topk(scores, targets, 2), accuracies[:1])
    assert_equal(batch_topk(scores, targets, 2, (3, 1)), accuracies[[2, 0]])
    assert batch_accuracy is batch_topk


def test_batch_topk_equals_the_loop() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(BATCH, 40, 10, generator=generator)
    targets = torch.randint(10, (BATCH, 40), generator=generator)
    ks = (1, 5, 10)
    expected = torch.tensor(
        [
            [
                sum(int(y in x.topk(k).indices) for x, y in zip(*own, strict=True)) / 40
                for own in zip(scores, targets, strict=True)
            ]
            for k in ks
        ]
    )
    assert_close(batch_topk(scores, targets, BATCH, ks), expected)


@pytest.mark.parametrize("k", [(0,), (5,), (1, 5), (-1,), ()])
def test_impossible_k(k: Any) -> None:
    with pytest.raises(InvalidInput, match="k: received .*numbers from 1 to 4"):
        batch_topk(rows(), torch.zeros(BATCH, ROWS, dtype=torch.long), BATCH, k)


def test_wrong_shapes_for_topk() -> None:
    with pytest.raises(InvalidInput, match=r"scores \(3, 5, 4\) and targets \(3, 5, 1\)"):
        batch_topk(rows(), torch.zeros(BATCH, ROWS, 1, dtype=torch.long), BATCH)
    with pytest.raises(InvalidInput, match=r"batch_inputs: received shape \(3, 5, 4\); expected \[2"):
        batch_topk(rows(), torch.zeros(BATCH, ROWS, dtype=torch.long), 2)


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BatchModule(LeNet(), BATCH)(images()[0]).sum().backward()
