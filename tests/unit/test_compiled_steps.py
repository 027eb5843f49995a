"""Compiled batches and steps: the same results, one graph for one form, and nothing of an earlier graph taken over."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import ModelBatch, OptimizerFactory, RoutedTensor, Unsupported
from tests.compare import assert_close, assert_equal
from tests.marks import needs_compiler
from tests.parity.loop import as_tree, train_alone
from tests.unit.test_train_step import BATCHES, INPUTS, build, classify, everything, sgd_for, states


def compiles(counters: Any) -> int:
    return int(counters["stats"]["unique_graphs"])


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


# "eager" traces and guards as any other backend does, without the minutes that a C++ compiler takes.
@pytest.mark.parametrize("count", [1, 3])
def test_compiled_models_give_the_same_and_compile_once(dynamo: Any, count: int) -> None:
    models = build(small, count)
    mb = ModelBatch(models)
    mb.enable_compile(backend="eager")
    for index, (inputs, targets) in enumerate(BATCHES):
        outputs = mb(inputs)
        expected = torch.stack([model(inputs) for model in models])
        assert_close(outputs, expected)
        mb.compute_loss(outputs, targets, F.cross_entropy, "sum").backward()
        torch.stack([F.cross_entropy(own, targets) for own in expected]).sum().backward()
        if index == 0:
            first = compiles(dynamo)
    assert compiles(dynamo) == first >= 1
    assert_close([dict(state) for state in mb.get_model_states()], states(models))
    for name, parameter in mb.stacked_params.items():
        assert_close(parameter.grad, torch.stack([dict(model.named_parameters())[name].grad for model in models]))


def test_the_usual_name_of_a_module_compiles_steps_too() -> None:
    mb = ModelBatch(build(small))
    mb.compile(backend="eager")
    assert mb.backend_report()["compiled"]


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("seeds", [None, [1, 2, 3]])
def test_a_compiled_step_gives_the_same_and_compiles_once(dynamo: Any, optimizer_cls: Any, seeds: Any) -> None:
    # In double precision: Adam magnifies the rounding of a gradient that is zero by construction.
    models = [model.double() for model in build(small)]
    results = []
    for compiled in (False, True):
        mb = ModelBatch(models, seeds=seeds)
        if compiled:
            mb.enable_compile(backend="eager")
        # A larger eps for the same reason.
        options = {"eps": 1e-4} if optimizer_cls is torch.optim.Adam else {}
        configs = [{"lr": 0.01 * (i + 1), **options} for i in range(3)]
        optimizer = OptimizerFactory(optimizer_cls).create_optimizer(mb, configs)
        step = mb.make_train_step(F.cross_entropy, optimizer, clip_norm=0.5)
        losses = []
        for index, batch in enumerate(BATCHES * 2):
            if index == 4:
                optimizer.param_groups[1]["lr"] = 0.001
            losses.append(step(batch[0].double(), batch[1]))
            if index == 1:
                warm = compiles(dynamo)
        results.append(everything(mb, optimizer, losses))
    assert compiles(dynamo) == warm >= 1
    assert_close(results[1], results[0], atol=1e-9, rtol=1e-9)


def test_compiled_steps_follow_active_and_loss_arguments_without_compiling(dynamo: Any) -> None:
    def loss(outputs: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return weight * F.cross_entropy(outputs, targets)

    models, results = build(small), []
    for compiled in (False, True):
        mb = ModelBatch(models)
        if compiled:
            mb.enable_compile(backend="eager")
        optimizer = sgd_for(mb)
        step = mb.make_train_step(loss, optimizer, loss_args={"weight": torch.ones(3)}, active=torch.ones(3).bool())
        losses = []
        for index, batch in enumerate(BATCHES * 2):
            losses.append(step(*batch))
            if index == 1:
                warm = compiles(dynamo)
            step.loss_args["weight"] = torch.tensor([1.0, 2.0 + index, 0.5])
            step.active = torch.tensor([True, index % 2 == 0, True])
        results.append(everything(mb, optimizer, losses))
    assert compiles(dynamo) == warm
    assert_close(results[1], results[0])


@pytest.mark.parametrize("steps", [1, 3])
def test_a_compiled_batch_in_evaluation(dynamo: Any, steps: int) -> None:
    models = [model.eval() for model in build(small)]
    mb = ModelBatch(models)
    mb.enable_compile(backend="eager")
    with torch.no_grad():
        for _ in range(steps):
            assert_close(mb(INPUTS), torch.stack([model(INPUTS) for model in models]))
    assert compiles(dynamo) == 1


def test_compiled_dropout_differs_between_models_and_steps(dynamo: Any) -> None:
    for seeds in (None, [1, 2, 3]):
        mb = ModelBatch(build(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5))), seeds=seeds)
        mb.enable_compile(backend="eager")
        first, second = mb(INPUTS) == 0, mb(INPUTS) == 0
        assert not torch.equal(first, second)
        assert not torch.equal(first[0], first[1])


def test_with_seeds_compiled_models_draw_what_others_draw(dynamo: Any) -> None:
    models = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)))
    plain, compiled = (ModelBatch(models, seeds=[1, 2, 3]) for _ in range(2))
    compiled.enable_compile(backend="eager")
    for _ in range(3):
        assert_close(compiled(INPUTS), plain(INPUTS))


def test_an_unknown_compiler_is_an_error_of_torch() -> None:
    mb = ModelBatch(build(small))
    mb.enable_compile(backend="no such compiler")
    with pytest.raises(Exception, match="no such compiler"):
        mb(INPUTS)


def test_a_compiler_that_fails_is_not_mistaken_for_a_model_that_cannot_be_batched(dynamo: Any) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    models = build(small)
    mb = ModelBatch(models)
    mb.enable_compile(backend=no_compiler)
    with pytest.raises(Unsupported, match="torch.compile failed.*no compiler on this machine"):
        mb(INPUTS)
    assert mb.backend_report()["runs"] == "vmap"


inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@needs_compiler
@inductor
@pytest.mark.long
@pytest.mark.parametrize("count", [1, 3])
def test_the_default_compiler_trains_like_the_loop(dynamo: Any, count: int) -> None:
    models = build(small, count)
    mb = ModelBatch(models)
    mb.enable_compile()
    optimizer = sgd_for(mb)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    losses = [step(*BATCHES[0])]
    warm = compiles(dynamo)
    losses += [step(*batch) for batch in BATCHES[1:]]
    assert compiles(dynamo) == warm
    assert_close(everything(mb, optimizer, losses), as_tree(train_alone(models, BATCHES, classify)))


@needs_compiler
@inductor
@pytest.mark.long
def test_the_default_compiler_in_the_eager_loop(dynamo: Any) -> None:
    models = build(small)
    mb = ModelBatch(models)
    mb.enable_compile()
    optimizer, losses = sgd_for(mb), []
    for index, (inputs, targets) in enumerate(BATCHES):
        optimizer.zero_grad()
        own = mb.compute_loss(mb(inputs), targets, F.cross_entropy, "none")
        own.sum().backward()
        optimizer.step()
        losses.append(own.detach())
        if index == 0:
            warm = compiles(dynamo)
    assert compiles(dynamo) == warm
    assert_close(everything(mb, optimizer, losses), as_tree(train_alone(models, BATCHES, classify)))


# What a graph was made for


class Branches(nn.Module):
    """Uses its second layer where a setting, an argument or a shape says so."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)
        self.dropout = nn.Dropout(p)
        self.both = False

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.dropout(self.first(x))
        return outputs + self.second(x) if self.both or len(x) > 6 else outputs


def run_both(
    dynamo: Any, drive: Callable[[ModelBatch, Any], Any], make: Callable[[], nn.Module] = Branches, **options: Any
) -> None:
    """The same, eagerly and compiled: `drive(mb, step)` gives what is compared beside the weights."""
    models = build(make)
    results = []
    for compiled in (False, True):
        mb = ModelBatch(models, seeds=[1, 2, 3])
        if compiled:
            mb.enable_compile(backend="eager")
        optimizer = OptimizerFactory(torch.optim.AdamW, {"lr": 0.01}).create_optimizer(mb, [{}] * 3)
        step = mb.make_train_step(classify_with, optimizer, shared_targets=True, **options)
        results.append((drive(mb, step), [dict(state) for state in mb.get_model_states()], optimizer.state_dict()))
    assert_close(results[1], results[0])


def classify_with(outputs: Tensor, labels: Tensor, penalty: bool = False) -> Tensor:
    return F.cross_entropy(outputs, labels) + (outputs.square().mean() if penalty else 0.0)


def test_a_setting_of_the_prototype_changes_in_both_directions(dynamo: Any) -> None:
    def drive(mb: ModelBatch, step: Any) -> Any:
        losses = []
        for both in (False, True, True, False, True, False):
            mb.prototype.both = both
            losses.append(step(*BATCHES[0]))
        return losses

    run_both(dynamo, drive)


def test_a_shape_decides_what_is_used(dynamo: Any) -> None:
    long = torch.cat([INPUTS, INPUTS]), torch.cat([BATCHES[0][1], BATCHES[0][1]])
    run_both(dynamo, lambda mb, step: [step(*batch) for batch in (BATCHES[0], long, BATCHES[1], long)])


def test_dropout_with_a_smaller_last_batch(dynamo: Any) -> None:
    mb = ModelBatch([nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 3)) for _ in range(2)])
    mb.enable_compile(backend="eager")
    step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
    with warnings.catch_warnings():
        # It is no reason to run without the compiler, or one by one.
        warnings.simplefilter("error", UserWarning)
        for rows in (8, 3, 8, 5):
            step(torch.randn(rows, 4), torch.arange(rows) % 3)


def test_a_shared_argument_changes(dynamo: Any) -> None:
    def drive(mb: ModelBatch, step: Any) -> Any:
        losses = [step(*BATCHES[0])]
        step.shared_args["penalty"] = True
        return [*losses, step(*BATCHES[1]), step(*BATCHES[2])]

    run_both(dynamo, drive, shared_args={"penalty": False})


@pytest.mark.long
def test_parameters_are_frozen_and_thawed(dynamo: Any) -> None:
    def drive(mb: ModelBatch, step: Any) -> Any:
        mb.prototype.both = True
        losses = []
        for frozen in ("first.weight", "second.bias", "first.weight", None):
            for name, stack in mb.stacked_params.items():
                stack.requires_grad_(name != frozen)
            losses.append(step(*BATCHES[0]))
        return losses

    run_both(dynamo, drive)


def test_dropout_that_is_turned_on_draws_from_the_streams(dynamo: Any) -> None:
    def drive(mb: ModelBatch, step: Any) -> Any:
        losses = [step(*BATCHES[0])]
        mb.prototype.dropout.p = 0.5
        losses += [step(*BATCHES[0]) for _ in range(3)]
        assert mb.streams is not None
        return losses, mb.streams.steps

    run_both(dynamo, drive)


def test_constants_among_the_outputs_follow_the_shape(dynamo: Any) -> None:
    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"outputs": super().forward(x), "rows": len(x)}

    mb = ModelBatch(build(lambda: Counting(4, 3)))
    mb.enable_compile(backend="eager")
    assert [mb(INPUTS[:rows])["rows"] for rows in (6, 2, 6, 3)] == [6, 2, 6, 3]


def test_buffers_of_routed_rows_change_once(dynamo: Any) -> None:
    """In any order of row counts, which makes parts that are copies of the stacks."""
    routed = RoutedTensor(torch.randn(3, 5, 2) + 3, (4, 0, 2))
    models = build(lambda: nn.BatchNorm1d(2))
    plain, compiled = (ModelBatch(models, shared_input=False) for _ in range(2))
    compiled.enable_compile(backend="eager")
    assert_close(compiled(routed), plain(routed))
    assert_close(dict(compiled.stacked_buffers), dict(plain.stacked_buffers))
    assert compiled.stacked_buffers["num_batches_tracked"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "how", [copy.deepcopy, pytest.param(lambda value: pickle.loads(pickle.dumps(value)), marks=pytest.mark.long)]
)
def test_a_copy_of_a_compiled_step_runs_its_own_models(dynamo: Any, how: Any) -> None:
    mb = ModelBatch(build(lambda: Branches(0.5)))
    mb.enable_compile(backend="eager")
    step = mb.make_train_step(classify_with, sgd_for(mb), shared_args={"penalty": False})
    step(*BATCHES[0])
    before = [dict(state) for state in mb.get_model_states()]
    other, other_step = how((mb, step))
    other.eval()
    other_step.shared_args["penalty"] = True
    other_step.active = torch.zeros(3, dtype=torch.bool)
    first, second = other_step(*BATCHES[0]), other_step(*BATCHES[0])
    assert_equal(first, second)
    expected = [classify_with(other.model(i)(BATCHES[0][0]), BATCHES[0][1], penalty=True) for i in range(3)]
    assert_close(first, torch.stack(expected).detach())
    assert_equal([dict(state) for state in mb.get_model_states()], before)


@pytest.mark.long
def test_many_batches_compile_each_for_itself(dynamo: Any) -> None:
    for width in range(2, 13):
        before = compiles(dynamo)
        mb = ModelBatch(build(lambda width=width: nn.Linear(4, width)))
        mb.enable_compile(backend="eager")
        mb(INPUTS)
        assert compiles(dynamo) == before + 1


class Breaks(Branches):
    """Has a graph break, where the compiler would have to do with two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_what_cannot_be_compiled_in_one_piece_runs_without(dynamo: Any) -> None:
    def drive(mb: ModelBatch, step: Any) -> Any:
        losses = []
        for both in (False, True, True, False):
            mb.prototype.both = both
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                losses.append(step(*BATCHES[0]))
            messages.append([str(entry.message) for entry in caught])
        (report,) = mb.backend_report()["steps"]
        assert (report["runs"], report["compiled"]) == ("vmap", False)
        return losses

    messages: list[list[str]] = []
    run_both(dynamo, drive, Breaks)
    assert [len(own) for own in messages] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert "not compiled" in messages[4][0]


def test_a_forward_that_cannot_be_compiled_runs_without(dynamo: Any) -> None:
    models = build(Breaks)
    mb = ModelBatch(models)
    mb.enable_compile(backend="eager")
    expected = torch.stack([model(INPUTS) for model in models])
    with pytest.warns(UserWarning, match="vectorised, but not compiled"):
        assert_close(mb(INPUTS), expected)
    assert_close(mb(INPUTS), expected)
    assert not mb.backend_report()["compiled"]


@pytest.mark.long
def test_too_many_graphs(dynamo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mb_torch.vmap.compiled._GRAPHS", 3)

    def drive(mb: ModelBatch, step: Any) -> Any:
        losses = []
        for index in range(8):
            mb.prototype.both, mb.prototype.dropout.eps = index % 3 == 0, float(index)
            inputs = torch.cat([INPUTS] * 2)[: 2 + index]
            losses.append(step(inputs, torch.zeros(len(inputs), dtype=torch.long)))
        return losses

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_both(dynamo, drive)


def test_numbers_that_are_returned_are_those_of_the_call(dynamo: Any) -> None:
    class Echoes(nn.Linear):
        def forward(self, x: Tensor, number: float) -> Any:
            return {"outputs": super().forward(x), "number": number}

    mb = ModelBatch(build(lambda: Echoes(4, 3)))
    mb.enable_compile(backend="eager")
    numbers = (2, 3, 4, 5, 2.5, 3.5, 2)
    assert [mb(INPUTS, number)["number"] for number in numbers] == list(numbers)


def test_counters_in_attributes_count_passes(dynamo: Any) -> None:
    class Counts(Branches):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    def drive(mb: ModelBatch, step: Any) -> Any:
        losses = [step(*batch) for batch in BATCHES]
        assert mb.prototype.calls == len(BATCHES)
        return losses

    run_both(dynamo, drive, Counts)


def test_clipping_keeps_double_precision(dynamo: Any) -> None:
    models = [model.double() for model in build(Branches)]
    batches = [(inputs.double(), labels) for inputs, labels in BATCHES]
    mb = ModelBatch(models)
    mb.enable_compile(backend="eager")
    optimizer = sgd_for(mb)
    step = mb.make_train_step(F.cross_entropy, optimizer, clip_norm=0.1)
    losses = [step(*batch) for batch in batches]
    expected = train_alone(models, batches, classify, clip_norm=0.1)
    assert_close(everything(mb, optimizer, losses), as_tree(expected), atol=1e-13, rtol=1e-13)
