"""Gradient scaling: a stock scaler and one scale per model; an overflow stays with the model that has it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from mb_torch.amp import GradScaler, finite_models
from mb_torch.errors import InvalidInput, InvalidState, Unsupported
from mb_torch.stacked.optim import make_optimizer
from tests.compare import assert_different, assert_equal
from tests.optimizers import CASES, NAMES, NUM_MODELS, StandInBatch, starting_values

# Updates of whole stacks, and updates through views.
KINDS = ("Adam-all", "SGD-some-momentum", "ASGD", "SGD-some-nesterov")
OVERFLOWING = 1


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[StandInBatch, Any]:
    case = CASES[NAMES.index(name)]
    batch = StandInBatch(make_optimizer, starting_values(dtype=dtype))
    return batch, batch.make_optimizer(case.optimizer_cls, case.fresh_configs())


def everything(batch: StandInBatch, optimizer: Any, model: int) -> Any:
    weights = {name: value[model] for name, value in batch.values().items()}
    return {"weights": weights, "optimizer": optimizer.model_state_dict(model)}


def spoil(batch: StandInBatch, value: float = math.inf) -> None:
    """Let one entry of one model's gradient overflow."""
    batch.stacked_params["bias"].grad[OVERFLOWING, 2] = value  # type: ignore[index]


def test_finite_models() -> None:
    grads = [torch.ones(4, 2, 3), torch.ones(4), torch.ones(4, 0)]
    assert finite_models(grads).tolist() == [True] * 4
    grads[0][1, 0, 2] = math.nan
    grads[1][3] = -math.inf
    assert finite_models(grads).tolist() == [True, False, True, False]
    assert finite_models([torch.full((2, 5), 3e38)]).tolist() == [True, True]
    assert finite_models([torch.ones(2, 0)]).tolist() == [True, True]


# A stock torch.amp.GradScaler ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", KINDS)
def test_stock_scaler_skips_only_the_overflowing_model(name: str, value: float, unscale_first: bool) -> None:
    batch, optimizer = make(name)
    other, same = make(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        optimizer.zero_grad()
        same.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(torch.zeros(()))
        batch.backward(step, scale)
        other.backward(step)
        if step == 2:
            spoil(batch, value)
            for parameter in same.param_groups[OVERFLOWING]["params"]:
                parameter.grad = None
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        same.step()
        assert scaler.get_scale() == (scale / 2 if step == 2 else scale)
    for model in range(NUM_MODELS):
        assert_equal(everything(batch, optimizer, model), everything(other, same, model))


def test_stock_scaler_leaves_unscaled_gradients() -> None:
    for name in ("Adam-all", "ASGD"):
        batch, optimizer = make(name)
        batch.backward(0)
        expected = {key: stack.grad.clone() for key, stack in batch.stacked_params.items()}  # type: ignore[union-attr]
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        batch.backward(0, 1024.0)
        scaler.step(optimizer)
        assert_equal({key: stack.grad for key, stack in batch.stacked_params.items()}, expected)


def test_stock_scaler_after_clipping_that_hides_the_overflow_skips_all() -> None:
    """Where no gradient shows the overflow any more, the step is skipped as with plain torch."""
    batch, optimizer = make("Adam-all")
    before = batch.values()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    batch.backward(0, 1024.0)
    spoil(batch)
    scaler.unscale_(optimizer)
    for group in optimizer.param_groups:
        nn.utils.clip_grad_value_(group["params"], 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert_equal(batch.values(), before)
    assert scaler.get_scale() == 512.0


def test_stock_scaler_when_disabled_or_without_gradients() -> None:
    batch, optimizer = make("SGD-lr")
    batch.backward(0)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert_different(batch.values(), starting_values())
    optimizer.zero_grad()
    before = batch.values()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert_equal(batch.values(), before)


# One scale per model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_always_overflows_disturbs_nobody(name: str, unscale_first: bool) -> None:
    """The other models, and their scales, are to the bit what they are without it."""
    results = []
    for spoiled in (False, True):
        batch, optimizer = make(name)
        scaler = GradScaler(NUM_MODELS, init_scale=1024.0, growth_interval=4)
        for step in range(10):
            optimizer.zero_grad()
            batch.backward(step, scaler.scale(torch.ones(NUM_MODELS)))
            if spoiled:
                spoil(batch, math.nan)
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append([everything(batch, optimizer, model) for model in range(NUM_MODELS) if model != OVERFLOWING])
        scales = scaler.get_scale().tolist()
        assert scales[0] == scales[2] == 4096.0
        assert scales[OVERFLOWING] == (1024.0 / 2**10 if spoiled else 4096.0)
        if spoiled:
            assert_equal(batch.values()["weight"][OVERFLOWING], starting_values()["weight"][OVERFLOWING])
    assert_equal(results[0], results[1])


@pytest.mark.parametrize("name", KINDS)
def test_scaled_training_is_plain_training(name: str) -> None:
    """Powers of two scale without rounding."""
    batch, optimizer = make(name)
    other, same = make(name)
    scaler = GradScaler(NUM_MODELS, init_scale=4.0, growth_interval=2)
    for step in range(6):
        optimizer.zero_grad()
        same.zero_grad()
        batch.backward(step, scaler.scale(torch.ones(NUM_MODELS)))
        other.backward(step)
        scaler.step(optimizer)
        scaler.update()
        same.step()
    assert scaler.get_scale().tolist() == [32.0] * NUM_MODELS
    for model in range(NUM_MODELS):
        assert_equal(everything(batch, optimizer, model), everything(other, same, model))


@given(overflows=st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=2, max_size=4))
def test_scales_move_like_those_of_stock_scalers(overflows: list[list[bool]]) -> None:
    """One stock scaler per model, each fed its own overflows."""
    steps = min(len(own) for own in overflows)
    count = len(overflows)
    options = {"init_scale": 2.0**10, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 3}
    scaler = GradScaler(count, **options)  # type: ignore[arg-type]
    stock = [torch.amp.GradScaler("cpu", **options) for _ in range(count)]  # type: ignore[arg-type]
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(count)]
    optimizers = [optim.SGD([parameter]) for parameter in parameters]
    for step in range(steps):
        bad = torch.tensor([own[step] for own in overflows])
        scaler.record(~bad)
        for index, own in enumerate(stock):
            own.scale(torch.zeros(()))
            parameters[index].grad = torch.full((1,), math.inf if bad[index] else 1.0)
            own.step(optimizers[index])
            own.update()
        assert scaler.get_scale().tolist() == [own.get_scale() for own in stock]


def test_a_scale_stays_finite() -> None:
    scaler = GradScaler(2, init_scale=2.0**127, growth_interval=1)
    scaler.record(torch.tensor([True, False]))
    assert scaler.get_scale().tolist() == [2.0**127, 2.0**126]


def test_record_leaves_inactive_models() -> None:
    scaler = GradScaler(3, init_scale=8.0, growth_interval=1)
    scaler.record(torch.tensor([True, False, False]), active=torch.tensor([False, False, True]))
    assert scaler.get_scale().tolist() == [8.0, 8.0, 4.0]
    assert scaler.growth_tracker.tolist() == [0, 0, 0]


def test_unscale_works_in_place_and_reports() -> None:
    scaler = GradScaler(2, init_scale=4.0)
    scaler.record(torch.tensor([True, False]))
    grads = [torch.full((2, 3), 8.0), torch.tensor([8.0, math.inf])]
    assert scaler.unscale(grads).tolist() == [True, False]
    assert_equal(grads, [torch.tensor([[2.0] * 3, [4.0] * 3]), torch.tensor([2.0, math.inf])])


def test_nothing_waits_for_the_device() -> None:
    """The parts that a fused step uses run on the meta device, where no value can be looked at."""
    scaler = GradScaler(2, device="meta")
    grads = [torch.ones(2, 3, device="meta")]
    finite = scaler.unscale(grads)
    scaler.record(finite, active=finite)
    assert scaler.scale(torch.ones(2, device="meta")).shape == (2,)


def test_half_precision_losses_are_scaled_in_float32() -> None:
    scaler = GradScaler(2)
    scaled = scaler.scale(torch.tensor([2.0, 3.0], dtype=torch.float16))
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [131072.0, 196608.0]


def test_two_optimizers_share_an_overflow() -> None:
    """A model whose overflow shows in one optimizer's gradients backs off once."""
    scaler = GradScaler(NUM_MODELS, init_scale=16.0)
    first, second = make("Adam-all"), make("SGD-lr")
    for batch, _ in (first, second):
        batch.backward(0, scaler.scale(torch.ones(NUM_MODELS)))
    spoil(second[0])
    for _, optimizer in (first, second):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale().tolist() == [16.0, 8.0, 16.0]


def test_disabled_scaler_does_nothing() -> None:
    scaler = GradScaler(NUM_MODELS, enabled=False)
    batch, optimizer = make("SGD-lr")
    loss = torch.tensor(3.0)
    assert scaler.scale(loss) is loss
    batch.backward(0)
    spoil(batch)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not bool(batch.values()["bias"].isfinite().all())
    assert scaler.get_scale().tolist() == [1.0] * NUM_MODELS
    assert scaler.state_dict() == {}
    assert not scaler.is_enabled()


def test_state_goes_through_files_and_copies() -> None:
    scaler = GradScaler(3, init_scale=8.0, growth_interval=5)
    scaler.record(torch.tensor([True, False, True]))
    state = scaler.state_dict()
    scaler.record(torch.tensor([False, False, False]))
    assert state["scales"].tolist() == [8.0, 4.0, 8.0]
    other = GradScaler(3)
    other.load_state_dict(state)
    for one in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert_equal(one.state_dict(), state)
    for bad in ({}, {**state, "scales": torch.ones(2)}, {**state, "scales": 8.0}, {**state, "more": 1}):
        with pytest.raises(InvalidState, match="GradScaler state"):
            other.load_state_dict(bad)
        assert_equal(other.state_dict(), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_models", 0),
        ("init_scale", 0.0),
        ("init_scale", math.inf),
        ("growth_factor", 1.0),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
    ],
)
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=f"GradScaler: {name}"):
        GradScaler(**{"num_models": 2, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "losses", [torch.tensor(1.0), torch.ones(2), torch.ones(1, 3)], ids=lambda t: str(list(t.shape))
)
def test_losses_must_be_per_model(losses: Tensor) -> None:
    with pytest.raises(InvalidInput, match="reduction='none'"):
        GradScaler(3).scale(losses)


def test_calls_out_of_order() -> None:
    batch, optimizer = make("SGD-lr")
    scaler = GradScaler(NUM_MODELS)
    with pytest.raises(InvalidInput, match=r"GradScaler\.update"):
        scaler.update()
    batch.backward(0, scaler.scale(torch.ones(NUM_MODELS)))
    scaler.unscale_(optimizer)
    with pytest.raises(InvalidInput, match="already unscaled"):
        scaler.unscale_(optimizer)
    with pytest.raises(InvalidInput, match="pickled"):
        pickle.dumps(scaler)
    scaler.step(optimizer)
    with pytest.raises(InvalidInput, match="already stepped"):
        scaler.step(optimizer)
    with pytest.raises(InvalidInput, match="already stepped"):
        scaler.unscale_(optimizer)
    scaler.update()
    scaler.step(optimizer)


def test_optimizers_that_cannot_skip_one_model() -> None:
    plain = optim.SGD([nn.Parameter(torch.zeros(3))])
    with pytest.raises(InvalidInput, match="a SGD for no models"):
        GradScaler(3).step(plain)
    with pytest.raises(InvalidInput, match=r"for 3 models.*each of 2 models"):
        GradScaler(2).step(make("SGD-lr")[1])


def test_float16_gradients_are_refused() -> None:
    with pytest.raises(Unsupported, match="float16"):
        GradScaler(2).unscale([torch.ones(2, 3, dtype=torch.float16)])
