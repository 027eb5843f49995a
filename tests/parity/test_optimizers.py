"""Optimizers over stacks against one plain torch optimizer per model: weights and state after 20 steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from mb_jax.mirror import MirrorParameter
from mb_jax.optim import JaxOptimizer, MirrorStack
from mb_torch.schedule import create_lr_scheduler
from mb_torch.stacked import optim as stacked_optim
from mb_torch.stacked.optim import StackedOptimizer
from mb_torch.stacked.optim import make_optimizer as make_on_stacks
from mb_torch.stacked.views import ViewOptimizer
from tests.compare import assert_close
from tests.optimizers import (
    CASES,
    MATRIX_SHAPES,
    NAMES,
    NUM_MODELS,
    SHAPES,
    STACKED_CASES,
    OptimizerCase,
    StandInBatch,
    loss,
    models_one_by_one,
    starting_values,
)

make_optimizer = make_on_stacks

GAMMAS = [0.9, 0.97, 1.0]
STEPS = 20

Models = list[dict[str, nn.Parameter]]


def make_for_jax(
    optimizer_cls: type[Optimizer], configs: Sequence[Mapping[str, Any]], stacks: dict[str, Any], num_models: int
) -> Optimizer:
    """As the XLA backend makes optimizers: the stacks become parameters whose values live in JAX arrays."""
    for name, stack in stacks.items():
        stacks[name] = MirrorParameter(stack.detach(), requires_grad=stack.requires_grad)
    return make_on_stacks(optimizer_cls, configs, stacks, num_models, MirrorStack, JaxOptimizer)


@pytest.fixture(autouse=True, params=["torch", "jax"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test on both backends."""
    if request.param == "jax":
        monkeypatch.setitem(globals(), "make_optimizer", make_for_jax)


def assert_same_training(
    stacks: Mapping[str, Tensor], optimizer: Any, models: Models, singles: Sequence[Optimizer]
) -> None:
    """Compare weights and optimizer state of all models."""
    for index, (model, single) in enumerate(zip(models, singles, strict=True)):
        weights = {name: stack[index] for name, stack in stacks.items()}
        actual = {"weights": weights, "optimizer": optimizer.model_state_dict(index)}
        expected = {"weights": model, "optimizer": single.state_dict()}
        assert_close(actual, expected, atol=1e-9, rtol=1e-9)


def make_singles(case: OptimizerCase, models: Models) -> list[Optimizer]:
    """One plain optimizer per model."""
    return [
        case.optimizer_cls(list(model.values()), **config)
        for model, config in zip(models, case.fresh_configs(), strict=True)
    ]


def train(batch: StandInBatch, optimizer: Optimizer, steps: range) -> None:
    """Train the stacked models."""
    for step in steps:
        optimizer.zero_grad()
        batch.backward(step)
        optimizer.step()


def train_singles(models: Models, singles: Sequence[Optimizer], steps: range) -> None:
    """Train the same models one by one."""
    for model, single in zip(models, singles, strict=True):
        for step in steps:
            single.zero_grad()
            loss(model, step).backward()
            single.step()


def plain_with_groups(case: OptimizerCase, models: Models) -> Optimizer:
    """A plain optimizer over all models, with one group each and every option in the group."""
    groups = [single.param_groups[0] for single in make_singles(case, models)]
    return case.optimizer_cls(groups)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_twenty_steps_with_a_schedule(case: OptimizerCase) -> None:
    values = starting_values(MATRIX_SHAPES if case.matrices_only else SHAPES)
    batch = StandInBatch(make_optimizer, values)
    optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
    assert isinstance(optimizer, StackedOptimizer if case.stacked else ViewOptimizer)
    schedulers = create_lr_scheduler(optimizer, ExponentialLR, [{"gamma": gamma} for gamma in GAMMAS])
    models = models_one_by_one(values)
    singles = make_singles(case, models)
    single_schedulers = [ExponentialLR(s, gamma) for s, gamma in zip(singles, GAMMAS, strict=True)]
    for step in range(STEPS):
        train(batch, optimizer, range(step, step + 1))
        train_singles(models, singles, range(step, step + 1))
        for scheduler in (*schedulers, *single_schedulers):
            scheduler.step()
    assert all(not torch.equal(stack, values[name]) for name, stack in batch.stacked_params.items())
    assert_same_training(batch.stacked_params, optimizer, models, singles)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_state_of_a_plain_optimizer_and_back(case: OptimizerCase) -> None:
    """Start on N groups of a plain optimizer, go on stacked, and end as N plain optimizers."""
    values = starting_values(MATRIX_SHAPES if case.matrices_only else SHAPES)
    models = models_one_by_one(values)
    singles = make_singles(case, models)
    train_singles(models, singles, range(20))

    halfway = models_one_by_one(values)
    plain = plain_with_groups(case, halfway)
    if case.optimizer_cls is torch.optim.Adagrad:
        # A plain Adagrad takes this option from its constructor only, not from its groups.
        for group in plain.param_groups:
            for parameter in group["params"]:
                plain.state[parameter]["sum"].fill_(group["initial_accumulator_value"])
    for step in range(7):
        plain.zero_grad()
        sum(loss(model, step) for model in halfway).backward()  # type: ignore[union-attr]
        plain.step()
    weights = {name: torch.stack([model[name].detach() for model in halfway]) for name in values}
    batch = StandInBatch(make_optimizer, weights)
    optimizer = batch.make_optimizer(
        case.optimizer_cls, [{} for _ in halfway] if _agree(case) else case.fresh_configs()
    )
    optimizer.load_state_dict(plain.state_dict())
    train(batch, optimizer, range(7, 14))

    ending = models_one_by_one(batch.values())
    last = plain_with_groups(case, ending)
    last.load_state_dict(optimizer.state_dict())
    assert list(last.state_dict()["state"]) == list(optimizer.state_dict()["state"])
    for step in range(14, 20):
        last.zero_grad()
        sum(loss(model, step) for model in ending).backward()  # type: ignore[union-attr]
        last.step()
    for model, expected in zip(ending, models, strict=True):
        assert_close(model, expected, atol=1e-9, rtol=1e-9)


def _agree(case: OptimizerCase) -> bool:
    """Whether an optimizer made with defaults can load the options: models may not differ in a switch."""
    return case.stacked and case.optimizer_cls is not torch.optim.Adagrad


@pytest.mark.parametrize("case", STACKED_CASES, ids=lambda case: case.name)
def test_parameters_without_gradients_are_skipped(case: OptimizerCase) -> None:
    """`bias` gets no gradient at two steps, so its counters fall behind and its weights do not decay."""
    batch = StandInBatch(make_optimizer)
    optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
    models = models_one_by_one(starting_values())
    singles = make_singles(case, models)
    for step in range(8):
        optimizer.zero_grad()
        batch.backward(step)
        without = step in (0, 3)
        if without:
            batch.stacked_params["bias"].grad = None
        optimizer.step()
        for model, single in zip(models, singles, strict=True):
            single.zero_grad()
            loss(model, step).backward()
            if without:
                model["bias"].grad = None
            single.step()
    assert_same_training(batch.stacked_params, optimizer, models, singles)


@pytest.mark.parametrize("case", STACKED_CASES, ids=lambda case: case.name)
def test_models_that_skip_steps(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that sat out some steps is where its own optimizer is without them; stacks are cut into pieces."""
    monkeypatch.setitem(stacked_optim._BUCKET_BYTES, "cpu", 2 * 8 * 12)
    batch = StandInBatch(make_optimizer)
    optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
    models = models_one_by_one(starting_values())
    singles = make_singles(case, models)
    for step in range(9):
        active = torch.tensor([True, step not in (0, 4), step % 3 != 1])
        batch.backward(step)
        grads = [stack.grad for stack in batch.stacked_params.values()]
        for grad in grads:
            grad[~active] = float("nan")  # type: ignore[index]
        optimizer.update(grads, active)  # type: ignore[attr-defined]
        optimizer.zero_grad()
        for index in active.nonzero().view(-1).tolist():
            train_singles([models[index]], [singles[index]], range(step, step + 1))
    assert_same_training(batch.stacked_params, optimizer, models, singles)


NINE = ("SGD-momentum", *(name for name in NAMES if name.endswith("-all")))


@pytest.mark.parametrize("name", NINE)
def test_complex_parameters(name: str) -> None:
    case = CASES[NAMES.index(name)]
    values = starting_values(dtype=torch.complex128)
    batch = StandInBatch(make_optimizer, values)
    optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
    models = models_one_by_one(values)
    singles = make_singles(case, models)
    train(batch, optimizer, range(5))
    train_singles(models, singles, range(5))
    assert_same_training(batch.stacked_params, optimizer, models, singles)


@pytest.mark.parametrize("name", NINE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    """Rounding differs, nothing else does: 0.999 does not become 1 in bfloat16."""
    case = CASES[NAMES.index(name)]
    values = starting_values(dtype=dtype)
    batch = StandInBatch(make_optimizer, values)
    optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
    models = models_one_by_one(values)
    singles = make_singles(case, models)
    train(batch, optimizer, range(STEPS))
    train_singles(models, singles, range(STEPS))
    rtol, atol = (2e-4, 2e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    for index, model in enumerate(models):
        for key, stack in batch.stacked_params.items():
            assert_close(stack[index], model[key], rtol=rtol, atol=atol)


def sgd_in_half_precision(parameter: Tensor, grad: Tensor, config: dict[str, Any]) -> Tensor:
    """SGD of one parameter: every operation in float32 with all digits of its numbers, its result rounded."""
    dtype = parameter.dtype
    momentum, weight = config.get("momentum", 0.0), 1.0 - config.get("dampening", 0.0)
    buffer = grad
    for step in range(STEPS):
        if momentum and step:
            buffer = (buffer.float() * momentum).to(dtype)
            buffer = (buffer.float() + grad.float() * weight).to(dtype)
        parameter = (parameter.float() - buffer.float() * config["lr"]).to(dtype)
    return parameter


@pytest.mark.parametrize("name", NINE)
def test_single_model(name: str) -> None:
    case = CASES[NAMES.index(name)]
    values = starting_values(num_models=1)
    batch = StandInBatch(make_optimizer, values)
    optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs()[:1])
    models = models_one_by_one(values)
    single = case.optimizer_cls(list(models[0].values()), **case.fresh_configs()[0])
    train(batch, optimizer, range(STEPS))
    train_singles(models, [single], range(STEPS))
    assert_same_training(batch.stacked_params, optimizer, models, [single])


@pytest.mark.parametrize("name", ["NAdam-all", "Adam-all"])
def test_counters_follow_the_default_dtype(name: str) -> None:
    """torch keeps counters in float64 where that is the default, which changes NAdam's arithmetic."""
    case = CASES[NAMES.index(name)]
    torch.set_default_dtype(torch.float64)
    try:
        batch = StandInBatch(make_optimizer)
        optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
        models = models_one_by_one(starting_values())
        singles = make_singles(case, models)
        train(batch, optimizer, range(STEPS))
        train_singles(models, singles, range(STEPS))
        assert_same_training(batch.stacked_params, optimizer, models, singles)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["SGD-shared-momentum", "Adam-all", "RMSprop-momentum"])
def test_hyper_parameters_changed_between_steps(name: str) -> None:
    """Every option of a group is live, momentum to zero and back included."""
    case = CASES[NAMES.index(name)]
    batch = StandInBatch(make_optimizer)
    optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
    models = models_one_by_one(starting_values())
    singles = make_singles(case, models)
    for step in range(12):
        groups = [single.param_groups[0] for single in singles]
        for index, group in [*enumerate(optimizer.param_groups), *enumerate(groups)]:
            group["weight_decay"] = 0.0 if step % 4 == 0 else 0.1 * index
            if "momentum" in group and step and (step + index) % 3 == 0:
                group["momentum"] = 0.0 if group["momentum"] else 0.8
            if "betas" in group:
                group["betas"] = (0.5 + 0.1 * index, 0.9 + 0.001 * step)
        train(batch, optimizer, range(step, step + 1))
        train_singles(models, singles, range(step, step + 1))
    assert_same_training(batch.stacked_params, optimizer, models, singles)


def test_the_table_covers_the_nine_classes_and_all_options() -> None:
    """Every option of the nine classes that changes an update occurs in a configuration."""
    implementation_only = {"params", "foreach", "capturable", "differentiable", "fused", "self"}
    classes = {case.optimizer_cls for case in STACKED_CASES}
    assert len(classes) == 9
    for optimizer_cls in classes:
        options = set(inspect.signature(optimizer_cls).parameters) - implementation_only
        used = {key for case in STACKED_CASES if case.optimizer_cls is optimizer_cls for key in case.configs[0]}
        assert used == options, optimizer_cls.__name__
    assert all(len(case.configs) == NUM_MODELS for case in CASES)
    assert len(set(NAMES)) == len(NAMES)
