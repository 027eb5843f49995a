"""Optimizers as optax transformations, mapped over models by JAX, against ``torch.optim`` model by model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from mb_jax.transforms import torch_optimizer, transform_for  # noqa: E402
from mb_jax.transforms.counts import COEFFICIENTS, Moment, averaged_length  # noqa: E402
from mb_jax.transforms.optimizers import hyper_parameters  # noqa: E402
from mb_torch.errors import InvalidInput, Unsupported  # noqa: E402
from mb_torch.stacked.optim import StackedOptimizer, make_optimizer  # noqa: E402
from mb_torch.stacked.update_rules import RULES  # noqa: E402
from tests.compare import assert_close  # noqa: E402
from tests.optimizers import (  # noqa: E402
    NUM_MODELS,
    STACKED_CASES,
    OptimizerCase,
    StandInBatch,
    loss,
    models_one_by_one,
    starting_values,
)

GAMMAS = [0.9, 0.97, 1.0]
STEPS = 20
BY_NAME = {case.name: case for case in STACKED_CASES}
NINE = ("SGD-momentum", *(name for name in BY_NAME if name.endswith("-all")))
CASES = pytest.mark.parametrize("case", STACKED_CASES, ids=lambda case: case.name)

Arrays = dict[str, Any]


@pytest.fixture(autouse=True)
def _double_precision() -> Any:
    with jax.enable_x64(True):
        yield


def to_jax(tensor: Tensor) -> Any:
    """A copy with the same dtype."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.float().numpy(), jnp.bfloat16)
    return jnp.array(tensor.numpy())


def to_torch(array: Any) -> Tensor:
    """A copy with the same dtype."""
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array, np.float32)).bfloat16()
    return torch.from_numpy(np.array(array))


class MappedOptimizer:
    """Models under `jax.vmap`, with counters and coefficients from the torch backend's optimizer.

    Args:
        case: What to optimize with.
        values: Initial parameters of all models.
        gammas: The decay of each model's learning rate.
    """

    def __init__(self, case: OptimizerCase, values: Mapping[str, Tensor], gammas: Sequence[float] = GAMMAS) -> None:
        self.case = case
        self.batch = StandInBatch(make_optimizer, values)
        self.host = self.batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
        assert isinstance(self.host, StackedOptimizer)
        self.gammas = gammas
        self.params: Arrays = {name: to_jax(value) for name, value in values.items()}
        self.state: Arrays | None = None
        self.traces = 0
        self.programs: dict[Any, Callable[..., Any]] = {}

    def numbers(self) -> tuple[dict[str, bool], Arrays]:
        """Flags and coefficients of the next step, counted as taken."""
        assert isinstance(self.host, StackedOptimizer)
        pending = self.host.begin_update()
        (rows,) = pending.inputs.numbers
        self.host.finish_update(pending)
        static, masks = pending.inputs.static, self.host.rule.masks
        own = zip(static.names, rows, strict=True)
        return dict(static.flags), {name: to_jax(row != 0 if name in masks else row) for name, row in own}

    def initial(self) -> Arrays:
        """Where state tensors start, for all models."""
        groups = [self.case.optimizer_cls([torch.zeros(1)], **c).param_groups[0] for c in self.case.fresh_configs()]
        rule = RULES[self.case.optimizer_cls]
        return {name: jnp.array([float(group[key]) for group in groups]) for name, key in rule.initial.items()}

    def step(self, grads: Arrays) -> None:
        """Update every model."""
        flags, numbers = self.numbers()
        key = tuple(flags.items())
        transform: Any = transform_for(self.case.optimizer_cls, flags)
        if self.state is None:
            self.state = jax.vmap(lambda params, initial: transform.init(params, initial=initial))(
                self.params, self.initial()
            )
        if key not in self.programs:

            def program(params: Any, state: Any, grads: Any, numbers: Any) -> tuple[Any, Any]:
                self.traces += 1
                changes, new = transform.update(grads, state, params, numbers=numbers)
                return optax.apply_updates(params, changes), new

            self.programs[key] = jax.jit(jax.vmap(program), donate_argnums=(0, 1))
        before = jax.tree.map(lambda array: (array.shape, array.dtype), (self.params, self.state))
        old = jax.tree.leaves((self.params, self.state))
        self.params, self.state = self.programs[key](self.params, self.state, grads, numbers)
        assert all(array.is_deleted() for array in old), "nothing was donated"
        assert jax.tree.map(lambda array: (array.shape, array.dtype), (self.params, self.state)) == before
        for group, gamma in zip(self.host.param_groups, self.gammas, strict=True):
            group["lr"] = group["lr"] * gamma

    def train(self, steps: range) -> None:
        """Train on gradients that torch computes at the parameters."""
        for step in steps:
            for name, stack in self.batch.stacked_params.items():
                stack.data.copy_(to_torch(self.params[name]))
                stack.grad = None
            self.batch.backward(step)
            self.step({name: to_jax(stack.grad) for name, stack in self.batch.stacked_params.items()})  # type: ignore[arg-type]

    def of_model(self, index: int) -> tuple[Arrays, Arrays]:
        """Parameters and state of one model, as tensors."""
        return jax.tree.map(lambda array: to_torch(array)[index], (self.params, self.state))


def train_plain(case: OptimizerCase, values: Mapping[str, Tensor], steps: int) -> list[tuple[Arrays, Arrays]]:
    """Parameters and state tensors of each model after training it by itself."""
    results = []
    for model, config, gamma in zip(models_one_by_one(values), case.fresh_configs(), GAMMAS, strict=True):
        single = case.optimizer_cls(list(model.values()), **config)
        scheduler = ExponentialLR(single, gamma)
        for step in range(steps):
            single.zero_grad()
            loss(model, step).backward()
            single.step()
            scheduler.step()
        results.append((model, state_tensors(case, model, single.state_dict())))
    return results


def state_tensors(case: OptimizerCase, model: Mapping[str, Tensor], state_dict: Mapping[str, Any]) -> Arrays:
    """A plain optimizer's state tensors by name and parameter."""
    state = state_dict["state"]
    names = [name for name in RULES[case.optimizer_cls].tensors if state and state[0].get(name) is not None]
    return {name: {key: state[place][name] for place, key in enumerate(model)} for name in names}


def assert_same_models(
    mapped: MappedOptimizer, plain: Sequence[tuple[Arrays, Arrays]], *, atol: float, rtol: float, state: bool = True
) -> None:
    """Compare parameters, and the state tensors that the plain optimizers have."""
    for index, (params, tensors) in enumerate(plain):
        own_params, own_tensors = mapped.of_model(index)
        actual = own_params, {name: own_tensors[name] for name in tensors if state}
        expected = {name: param.detach() for name, param in params.items()}, tensors if state else {}
        assert_close(actual, expected, atol=atol, rtol=rtol)


@CASES
def test_twenty_steps_with_a_schedule(case: OptimizerCase) -> None:
    """Every option, with other numbers for every model and step, in one program."""
    values = starting_values()
    mapped = MappedOptimizer(case, values)
    mapped.train(range(STEPS))
    assert mapped.traces == 1
    assert_same_models(mapped, train_plain(case, values, STEPS), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", NINE)
def test_complex_parameters(name: str) -> None:
    case, values = BY_NAME[name], starting_values(dtype=torch.complex128)
    mapped = MappedOptimizer(case, values)
    mapped.train(range(8))
    assert_same_models(mapped, train_plain(case, values, 8), atol=1e-9, rtol=1e-9)


def test_a_complex_accumulator_starts_in_both_parts() -> None:
    case, values = BY_NAME["Adagrad-accumulator"], starting_values(dtype=torch.complex128)
    mapped = MappedOptimizer(case, values)
    mapped.train(range(2))
    assert_same_models(mapped, train_plain(case, values, 2), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [*NINE, "AdamW-amsgrad", "SGD-some-momentum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    case, values = BY_NAME[name], starting_values(dtype=dtype)
    mapped = MappedOptimizer(case, values)
    mapped.train(range(STEPS))
    rtol, atol = (2e-4, 2e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    assert_same_models(mapped, train_plain(case, values, STEPS), atol=atol, rtol=rtol, state=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*NINE, "SGD-dampening", "AdamW-amsgrad", "RMSprop-momentum"])
def test_half_precision_is_rounded_where_the_torch_backend_rounds(name: str, dtype: torch.dtype) -> None:
    """The stacked update of the torch backend on the same gradients; at most the last of 8 or 11 bits differs."""
    case, values = BY_NAME[name], starting_values(dtype=dtype)
    if case.optimizer_cls is not torch.optim.SGD:
        # The usual eps is zero in float16.
        case = replace(case, configs=tuple({**config, "eps": 1e-3} for config in case.configs))
    mapped = MappedOptimizer(case, values, gammas=[1.0] * NUM_MODELS)
    stacked = StandInBatch(make_optimizer, values)
    optimizer = stacked.make_optimizer(case.optimizer_cls, case.fresh_configs())
    for step in range(STEPS):
        stacked.backward(step, scale=0.01)
        mapped.step({key: to_jax(stack.grad) for key, stack in stacked.stacked_params.items()})  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
    bits = torch.finfo(dtype).eps
    for index in range(NUM_MODELS):
        model = {key: value.detach() for key, value in stacked.model(index).items()}
        tensors = state_tensors(case, model, optimizer.model_state_dict(index))  # type: ignore[attr-defined]
        assert_close(mapped.of_model(index), (model, tensors), atol=1e-7, rtol=2 * bits)


def test_a_broken_model_harms_no_other() -> None:
    case, values = BY_NAME["Adam-all"], starting_values()
    grads = {name: jnp.ones_like(to_jax(value)) for name, value in values.items()}
    ends = []
    for bad in (1.0, math.nan, math.inf):
        mapped = MappedOptimizer(case, values)
        for _ in range(3):
            mapped.step({name: grad.at[1].set(bad) for name, grad in grads.items()})
        ends.append(mapped)
    assert all(jnp.isnan(array[1]).all() for array in ends[1].params.values())
    for index in (0, 2):
        for other in ends[1:]:
            assert_close(other.of_model(index), ends[0].of_model(index), atol=0.0, rtol=0.0)


@pytest.mark.parametrize("name", ["SGD-dampening", "RMSprop-momentum"])
def test_momentum_that_comes_and_goes(name: str) -> None:
    """A model without momentum keeps its buffer for when it has momentum again, as a plain optimizer does."""
    case, values = BY_NAME[name], starting_values()
    mapped = MappedOptimizer(case, values, gammas=[1.0] * NUM_MODELS)
    models = models_one_by_one(values)
    singles = [case.optimizer_cls([*m.values()], **c) for m, c in zip(models, case.fresh_configs(), strict=True)]
    for step in range(9):
        for index, (model, single) in enumerate(zip(models, singles, strict=True)):
            momentum = 0.0 if step and (step + index) % 3 == 0 else 0.8
            single.param_groups[0]["momentum"] = mapped.host.param_groups[index]["momentum"] = momentum
            single.zero_grad()
            loss(model, step).backward()
            single.step()
        mapped.train(range(step, step + 1))
    assert mapped.traces == 2
    plain = [(m, state_tensors(case, m, s.state_dict())) for m, s in zip(models, singles, strict=True)]
    assert_same_models(mapped, plain, atol=1e-9, rtol=1e-9)


def test_state_of_an_option_that_is_off_is_handed_through() -> None:
    flags = {"maximize": False, "nesterov": False, "some_without": False, "penalty": False, "shrink": False}
    params = {"weight": jnp.ones(2)}
    numbers = {"lr": -0.5, "decay": 0.0, "momentum": 0.9, "weight": 1.0}
    state = transform_for(torch.optim.SGD, {**flags, "momentum": True}).init(params)
    assert list(state) == ["momentum_buffer"]
    without = transform_for(torch.optim.SGD, {**flags, "momentum": False})
    assert without.init(params) == {}
    _, new = without.update(params, state, params, numbers=numbers)
    assert list(new) == ["momentum_buffer"]


def test_what_is_refused() -> None:
    sgd = transform_for(torch.optim.SGD, {"momentum": False})
    with pytest.raises(InvalidInput, match="without params"):
        sgd.update({}, {}, numbers={})
    with pytest.raises(InvalidInput, match="without numbers"):
        sgd.update({}, {}, {})
    with pytest.raises(Unsupported, match="Rprop.*SGD, Adam"):
        transform_for(torch.optim.Rprop, {})
    with pytest.raises(Unsupported, match="Rprop"):
        torch_optimizer(torch.optim.Rprop, lr=0.1)
    with pytest.raises(ValueError, match="Invalid beta"):
        torch_optimizer(torch.optim.Adam, betas=(1.5, 0.9))


COUNTED = [
    *NINE,
    *("SGD-nesterov", "SGD-dampening", "Adam-defaults", "Adam-amsgrad", "Adam-no-averaging", "AdamW-amsgrad"),
    *("RMSprop-centered-momentum", "Adagrad-accumulator", "NAdam-defaults", "NAdam-decoupled"),
    *("RAdam-defaults", "RAdam-maximize"),
]


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", COUNTED)
def test_counting_inside(name: str, wide: bool) -> None:
    """The optimizer that counts for itself, in both widths, on the gradients that torch sees; `lr` is a schedule."""
    case, dtype = BY_NAME[name], torch.float64 if wide else torch.float32
    config = case.fresh_configs()[1]
    model = models_one_by_one(starting_values(dtype=dtype))[1]
    single = case.optimizer_cls(list(model.values()), **config)
    scheduler = ExponentialLR(single, 0.95)
    lr = single.param_groups[0]["lr"]
    traces = 0
    with jax.enable_x64(wide):
        options = {**config, "lr": lambda count: lr * 0.95**count}
        transform = torch_optimizer(case.optimizer_cls, **options)

        @jax.jit
        def program(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            nonlocal traces
            traces += 1
            changes, new = transform.update(grads, state, params)
            return optax.apply_updates(params, changes), new

        params = {key: to_jax(parameter) for key, parameter in model.items()}
        state = transform.init(params)
        for step in range(STEPS):
            single.zero_grad()
            loss(model, step).backward()
            params, state = program(params, state, {key: to_jax(value.grad) for key, value in model.items()})
            single.step()
            scheduler.step()
    assert traces == 1
    assert int(state.count) == STEPS
    bound = 1e-9 if wide else 1e-5
    actual = jax.tree.map(to_torch, (params, state.tensors))
    expected = {key: value.detach() for key, value in model.items()}, state_tensors(case, model, single.state_dict())
    assert_close(actual, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("optimizer_cls", [*COEFFICIENTS], ids=lambda cls: cls.__name__)
def test_coefficients_keep_their_digits_in_float32(optimizer_cls: type[torch.optim.Optimizer]) -> None:
    """Those of the rule in float64, from the first step on; of the default betas 1 - 0.999 ** step is a hard one."""
    rule = RULES[optimizer_cls]
    group = optimizer_cls([torch.zeros(1)], lr=0.1).param_groups[0]
    hyper = hyper_parameters(rule, group)
    switches = {key: bool(group[key]) for key in rule.switches}
    flags = {**rule.flags({name: [value] for name, value in hyper.items()}, switches), "float64_counters": False}
    clock: list[Any] = list(rule.first_clock)
    for step in range(1, 30):
        clock = rule.advance(clock, hyper, flags)
        expected = rule.coefficients(clock, hyper, flags)
        with jax.enable_x64(False):
            moment = Moment(*(jnp.float32(x) for x in (step, 0.1)), hyper, jnp.float32(clock[-1]))
            actual = COEFFICIENTS[optimizer_cls](moment)
        for name, value in expected.items():
            assert float(actual[name]) == pytest.approx(float(value), rel=2e-6), (step, name)


@pytest.mark.parametrize("beta2", [0.9999, 0.999, 0.9, 0.6, 0.3, 0.0])
def test_radam_keeps_its_digits_in_float32(beta2: float) -> None:
    """The length of the average decides when the second moment is used and by how much."""
    steps = np.array([1, 2, 5, 6, 10, 100, 999, 1001, 5000, 10**6], np.float64)
    expected = [_length(beta2, int(step)) for step in steps]
    with jax.enable_x64(False):
        actual = jax.jit(lambda step: averaged_length(beta2, step))(jnp.asarray(steps, jnp.float32))
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=2e-6)
    wide = jax.jit(lambda step: averaged_length(beta2, step))(jnp.asarray(steps))
    np.testing.assert_allclose(np.asarray(wide), expected, rtol=1e-13)


def _length(beta2: float, step: int) -> float:
    """torch's formula with many digits."""
    with localcontext(prec=60):
        base = Decimal(beta2)
        decayed = base**step
        return float(2 / (1 - base) - 1 - 2 * step * decayed / (1 - decayed))


def test_a_plain_learning_rate_and_a_chain() -> None:
    """Without a schedule, and as one link among others of optax."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    single = torch.optim.Adam([parameter], lr=0.1)
    transform = optax.chain(optax.clip(0.5), torch_optimizer(torch.optim.Adam, lr=torch.tensor(0.1)))
    params = jnp.ones(3)
    state = transform.init(params)
    for grad in ([1.0, 0.2, -3.0], [0.1, 0.1, 0.1]):
        changes, state = transform.update(jnp.array(grad), state, params)
        params = optax.apply_updates(params, changes)
        parameter.grad = torch.tensor(grad, dtype=torch.float64).clamp(-0.5, 0.5)
        single.step()
    # The tensor's 0.1 is a float32.
    assert_close(to_torch(params), parameter.detach(), atol=1e-8, rtol=0.0)
    assert optax.tree_utils.tree_get(state, "count") == 2
