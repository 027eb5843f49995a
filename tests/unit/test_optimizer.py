"""Per-model optimizers: live groups, views, masks, state dicts, compiled updates, configurations and errors."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from mb_torch.errors import InvalidInput, InvalidState, Unsupported
from mb_torch.optimizer import (
    OptimizerFactory,
    create_adam_configs,
    create_lr_sweep_configs,
    create_sgd_configs,
)
from mb_torch.stacked.buckets import Bucket, lerp_
from mb_torch.stacked.optim import StackedOptimizer, make_optimizer
from mb_torch.stacked.updates import UpdateInputs, apply_updates
from mb_torch.stacked.views import ViewOptimizer
from tests.compare import assert_close, assert_different, assert_equal
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

LRS = create_lr_sweep_configs(0.01, 0.1, NUM_MODELS)


def make(name: str) -> tuple[StandInBatch, Any]:
    """A batch and its optimizer, for a case of the table."""
    case = CASES[NAMES.index(name)]
    batch = StandInBatch(make_optimizer, starting_values(MATRIX_SHAPES if case.matrices_only else SHAPES))
    return batch, batch.make_optimizer(case.optimizer_cls, case.fresh_configs())


def train(batch: StandInBatch, optimizer: Any, *steps: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        batch.backward(step)
        optimizer.step()
    optimizer.zero_grad()


def grads_of(batch: StandInBatch, step: int) -> list[Tensor | None]:
    batch.backward(step)
    grads = [stack.grad for stack in batch.stacked_params.values()]
    for stack in batch.stacked_params.values():
        stack.grad = None
    return grads


def everything(batch: StandInBatch, optimizer: Any, model: int) -> dict[str, Any]:
    """All that belongs to one model."""
    return {
        "weights": {name: value[model] for name, value in batch.values().items()},
        "optimizer": optimizer.model_state_dict(model),
    }


# Every way an optimizer is run: by rule, by views, and by views because of a switch.
KINDS = ("Adam-all", "SGD-some-momentum", "NAdam-all", "Adagrad-accumulator", "ASGD", "Adam-some-amsgrad")


# Parameter groups and views ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_one_live_group_per_model(name: str) -> None:
    batch, optimizer = make(name)
    assert isinstance(optimizer, optim.Optimizer)
    assert len(optimizer.param_groups) == NUM_MODELS
    before = batch.values()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    if name == "ASGD":  # it has a decay of its own and takes its first rate from the group
        optimizer.param_groups[0]["lambd"] = 0.0
    train(batch, optimizer, 0)
    for key, stack in batch.stacked_params.items():
        assert_equal(stack[0], before[key][0])
        assert_different(stack[1], before[key][1])


def test_changing_one_group_changes_no_other_model() -> None:
    batch, optimizer = make("Adam-all")
    other, same = make("Adam-all")
    for index, one in enumerate((optimizer, same)):
        one.param_groups[2].update(lr=0.5 * index, betas=(0.1, 0.2), eps=1.0, weight_decay=3.0)
    train(batch, optimizer, 0, 1, 2)
    train(other, same, 0, 1, 2)
    for model in (0, 1):
        assert_equal(everything(batch, optimizer, model), everything(other, same, model))
    assert_different(batch.values()["weight"][2], other.values()["weight"][2])


@pytest.mark.parametrize("key", ["maximize", "amsgrad"])
def test_a_switch_changed_for_one_model_only_is_refused(key: str) -> None:
    batch, optimizer = make("Adam-lr")
    optimizer.param_groups[1][key] = True
    before = batch.values()
    with pytest.raises(Unsupported, match=rf"model 1: {key}=True"):
        train(batch, optimizer, 0)
    assert_equal(batch.values(), before)


def test_a_switch_changed_for_all_models_acts_at_the_next_step() -> None:
    batch, optimizer = make("SGD-lr")
    grads = grads_of(batch, 0)
    for group in optimizer.param_groups:
        group["maximize"] = True
    before = batch.values()
    optimizer.update(grads)
    for model, group in enumerate(optimizer.param_groups):
        assert_close(batch.values()["weight"][model], before["weight"][model] + group["lr"] * grads[0][model])  # type: ignore[index]


@pytest.mark.parametrize("bad", ["high", None, torch.ones(2), (1, 2)])
def test_a_rate_that_is_no_number_names_the_model(bad: Any) -> None:
    batch, optimizer = make("Adam-lr")
    train(batch, optimizer, 0)
    optimizer.param_groups[1]["lr"] = bad
    with pytest.raises(InvalidInput, match="model 1: lr"):
        train(batch, optimizer, 1)


def test_a_rate_that_is_a_tensor_may_change_in_place() -> None:
    batch, optimizer = make("SGD-tensor-lr")
    train(batch, optimizer, 0)
    before = batch.values()
    for group in optimizer.param_groups:
        group["lr"].zero_()
    train(batch, optimizer, 1)
    assert_equal(batch.values(), before)


@pytest.mark.parametrize("name", ["Adam-all", "ASGD"])
def test_views_share_parameters_and_gradients(name: str) -> None:
    batch, optimizer = make(name)
    stack = batch.stacked_params["weight"]
    view = optimizer.param_groups[1]["params"][0]
    assert isinstance(view, nn.Parameter)
    assert view.is_leaf
    assert view.requires_grad
    assert view.grad is None
    assert_equal(view.detach(), stack[1].detach())
    batch.backward(0)
    assert_equal(view.grad, stack.grad[1])
    with torch.no_grad():
        view.fill_(7.0)
        view.grad.fill_(3.0)
    assert_equal(stack[1].detach(), torch.full_like(stack[1], 7.0))
    assert_equal(stack.grad[1], torch.full_like(stack[1], 3.0))
    assert_different(stack.grad[0], torch.full_like(stack[0], 3.0))


def test_clipping_one_group_clips_one_model() -> None:
    batch, optimizer = make("Adam-all")
    batch.backward(0, torch.tensor([1.0, 2.0**40, 1.0]))
    before = {name: stack.grad.clone() for name, stack in batch.stacked_params.items()}
    models = models_one_by_one(starting_values())
    (loss(models[1], 0) * 2.0**40).backward()
    expected = nn.utils.clip_grad_norm_(models[1].values(), 0.5)
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[1]["params"], 0.5)
    assert_close(norm, expected, atol=0.0, rtol=1e-12)
    for name, stack in batch.stacked_params.items():
        assert_close(stack.grad[1], models[1][name].grad, atol=1e-12, rtol=0.0)
        assert_equal(stack.grad[::2], before[name][::2])


@pytest.mark.parametrize("name", ["SGD-decay", "Adam-all", "ASGD"])
def test_a_gradient_set_to_none_freezes_that_parameter_of_that_model(name: str) -> None:
    """As in plain torch: no update, no decay, no step counted; the other models do not notice."""
    batch, optimizer = make(name)
    other, same = make(name)
    train(batch, optimizer, 0)
    train(other, same, 0)
    weight, bias, gain = optimizer.param_groups[1]["params"]
    before = everything(batch, optimizer, 1)
    batch.backward(1)
    other.backward(1)
    weight.grad = None
    bias.grad = None
    assert weight.grad is None
    assert gain.grad is not None
    assert optimizer.param_groups[0]["params"][0].grad is not None
    optimizer.step()
    same.step()
    after = everything(batch, optimizer, 1)
    for position, key in enumerate(("weight", "bias")):
        assert_equal(after["weights"][key], before["weights"][key])
        assert (
            after["optimizer"]["state"].get(position, {}).keys()
            == before["optimizer"]["state"].get(position, {}).keys()
        )
        if position in after["optimizer"]["state"]:
            assert_equal(after["optimizer"]["state"][position], before["optimizer"]["state"][position])
    assert_equal(after["weights"]["gain"], other.values()["gain"][1])
    for model in (0, 2):
        assert_equal(everything(batch, optimizer, model), everything(other, same, model))


def test_a_gradient_set_to_none_comes_back_with_the_next_backward() -> None:
    batch, optimizer = make("SGD-lr")
    view = optimizer.param_groups[1]["params"][0]
    batch.backward(0)
    view.grad = None
    batch.backward(1)
    own = view.grad.clone()
    batch.stacked_params["weight"].grad = None
    batch.backward(1)
    assert_close(own, view.grad, atol=1e-12, rtol=0.0)


def test_gradients_set_one_by_one_belong_to_their_models() -> None:
    batch, optimizer = make("SGD-decay")
    before = batch.values()
    optimizer.param_groups[1]["params"][0].grad = torch.ones(4, 3, dtype=torch.float64)
    assert optimizer.param_groups[0]["params"][0].grad is None
    optimizer.step()
    after = batch.values()
    assert_equal(after["weight"][::2], before["weight"][::2])
    assert_equal(after["bias"], before["bias"])
    group = optimizer.param_groups[1]
    step = 1.0 + group["weight_decay"] * before["weight"][1]
    assert_close(after["weight"][1], before["weight"][1] - group["lr"] * step, atol=1e-12, rtol=0.0)
    with pytest.raises(InvalidInput, match="model 1: gradient of 'weight'"):
        optimizer.param_groups[1]["params"][0].grad = torch.ones(3, 4)


def test_a_penalty_on_one_models_views_reaches_its_gradient() -> None:
    batch, optimizer = make("SGD-lr")
    expected = grads_of(batch, 0)
    batch.backward(0)
    penalty = sum(view.square().sum() for view in optimizer.param_groups[1]["params"])
    penalty.backward()  # type: ignore[union-attr]
    for stack, own in zip(batch.stacked_params.values(), expected, strict=True):
        assert_equal(stack.grad[::2], own[::2])  # type: ignore[index]
        assert_close(stack.grad[1], own[1] + 2 * stack[1].detach(), atol=1e-12, rtol=0.0)  # type: ignore[index]


@pytest.mark.parametrize("name", ["Adam-all", "ASGD"])
def test_zero_grad(name: str) -> None:
    batch, optimizer = make(name)
    batch.backward(0)
    optimizer.zero_grad(set_to_none=False)
    assert all(bool((stack.grad == 0).all()) for stack in batch.stacked_params.values())
    optimizer.zero_grad()
    assert all(stack.grad is None for stack in batch.stacked_params.values())


def test_closure_and_hooks() -> None:
    batch, optimizer = make("SGD-lr")
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        batch.backward(0)
        return 1.5

    with torch.no_grad():
        assert optimizer.step(closure) == 1.5
    assert seen == ["before", "after"]
    assert_different(batch.values()["weight"], starting_values()["weight"])


def test_frozen_parameters_are_left_out() -> None:
    batch = StandInBatch(make_optimizer, frozen=("bias",))
    optimizer = batch.make_optimizer(optim.AdamW, LRS)
    assert list(optimizer.stacks) == ["weight", "gain"]  # type: ignore[attr-defined]
    assert len(optimizer.param_groups[0]["params"]) == 2
    train(batch, optimizer, 0)
    assert_equal(batch.values()["bias"], starting_values()["bias"])


def test_autograd_sees_that_a_step_changed_the_stacks() -> None:
    """As with plain torch, backward through weights that were changed since is an error, not a wrong gradient."""
    for name in ("SGD-lr", "ASGD"):
        batch, optimizer = make(name)
        for stack in batch.stacked_params.values():
            stack.data = stack.data.clone()
        optimizer.zero_grad()
        params = batch.model(0)
        output = (params["weight"] @ params["weight"].T).square().sum()
        batch.backward(0)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


# Updates of some models only -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_inactive_models_keep_every_bit(name: str) -> None:
    """Even with infinite weights, negative zeros and NaN gradients."""
    batch, optimizer = make(name)
    train(batch, optimizer, 0, 1)
    with torch.no_grad():
        batch.stacked_params["weight"][1, 0, 0] = math.inf
        batch.stacked_params["weight"][1, 0, 1] = -0.0
    before = everything(batch, optimizer, 1)
    active = torch.tensor([True, False, True])
    for step in (2, 3):
        grads = grads_of(batch, step)
        for grad in grads:
            grad[1] = math.nan  # type: ignore[index]
        optimizer.update(grads, active)
    assert_equal(everything(batch, optimizer, 1), before)
    assert_different(batch.values()["weight"][0], starting_values()["weight"][0])
    assert all(bool(value[::2].isfinite().all()) for value in batch.values().values())


@given(
    name=st.sampled_from(["Adam-all", "SGD-some-momentum", "RMSprop-momentum", "RAdam-all"]),
    masks=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=5),
    spoiled=st.integers(0, 2),
)
def test_no_model_sees_another(name: str, masks: list[tuple[bool, ...]], spoiled: int) -> None:
    """One model gets other gradients, NaN among them; the rest is the same to the bit."""
    results = []
    for spoil in (False, True):
        batch, optimizer = make(name)
        for step, mask in enumerate(masks):
            grads = [torch.full_like(stack, 0.1 * step - 0.2) for stack in batch.stacked_params.values()]
            for grad in grads:
                grad[spoiled] = (math.nan if step % 2 else 1e300) if spoil else 1.0
            optimizer.update(grads, torch.tensor(mask))
        results.append([everything(batch, optimizer, model) for model in range(NUM_MODELS) if model != spoiled])
    assert_equal(results[0], results[1])


OTHER_NUMBERS: dict[str, Any] = {
    "lr": 0.003,
    "weight_decay": 0.7,
    "momentum": 0.37,
    "dampening": 0.21,
    "betas": (0.37, 0.83),
    "eps": 1e-2,
    "alpha": 0.55,
    "lr_decay": 0.3,
    "rho": 0.44,
    "momentum_decay": 0.02,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name.endswith(("-all", "-nesterov", "-centered", "-dampening"))]
)
def test_what_one_model_does_differently_changes_no_bit_of_another(name: str, dtype: torch.dtype) -> None:
    """One model gets other numbers, or misses a step: what all share goes from one float to one value per model."""
    case = CASES[NAMES.index(name)]
    shared = {key: OTHER_NUMBERS[key] if key in ("lr", "eps") else value for key, value in case.configs[0].items()}
    shared.pop("weight_decay", None)
    shapes = {"matrix": (17, 9), "vector": (5,), "number": ()}
    values = starting_values(shapes, num_models=6, dtype=dtype)
    changes: list[Any] = [None, "mask", *(key for key in OTHER_NUMBERS if key in optim_options(case))]
    results = []
    for change in changes:
        batch = StandInBatch(make_optimizer, values)
        optimizer: Any = batch.make_optimizer(case.optimizer_cls, [dict(shared)] * 6)
        generator = torch.Generator().manual_seed(3)
        for step in range(8):
            grads = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in batch.stacked_params.values()]
            if change == "mask":
                optimizer.update(grads, torch.tensor([True, step != 2, True, True, True, True]))
                continue
            if change is not None and step == 3:
                optimizer.param_groups[1][change] = (
                    0.9 * OTHER_NUMBERS[change] if change in ("lr", "eps") else OTHER_NUMBERS[change]
                )
            optimizer.update(grads)
        results.append([everything(batch, optimizer, model) for model in range(6)])
        for own in results[-1]:
            own["optimizer"].pop("param_groups")
    for change, result in zip(changes[1:], results[1:], strict=True):
        unused = change == "dampening" and not case.configs[0].get("momentum")
        if not unused and dtype != torch.bfloat16:  # whose few bits need not show it
            assert_different(result[1]["weights"], results[0][1]["weights"])
        for model in (0, 2, 3, 4, 5):
            assert_equal(result[model], results[0][model])


def optim_options(case: OptimizerCase) -> dict[str, Any]:
    """The options of one model, with their defaults."""
    return case.optimizer_cls([nn.Parameter(torch.zeros(1))], **case.configs[0]).defaults


def test_nobody_active_changes_nothing() -> None:
    batch, optimizer = make("Adam-all")
    train(batch, optimizer, 0)
    before = [everything(batch, optimizer, model) for model in range(NUM_MODELS)]
    optimizer.update(grads_of(batch, 1), torch.zeros(NUM_MODELS, dtype=torch.bool))
    assert_equal([everything(batch, optimizer, model) for model in range(NUM_MODELS)], before)


def test_update_takes_gradients_and_leaves_the_stacks_own() -> None:
    for name in ("Adam-all", "ASGD"):
        batch, optimizer = make(name)
        other, same = make(name)
        grads = grads_of(batch, 0)
        batch.backward(5)
        own = [stack.grad for stack in batch.stacked_params.values()]
        optimizer.update(grads)
        assert all(stack.grad is grad for stack, grad in zip(batch.stacked_params.values(), own, strict=True))
        train(other, same, 0)
        assert_equal(batch.values(), other.values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda grads, active: (grads[:1], active), "gradients: received 1"),
        (lambda grads, active: ([grads[0].float(), *grads[1:]], active), "gradient of 'weight'"),
        (lambda grads, active: ([grads[0][:2], *grads[1:]], active), "gradient of 'weight'"),
        (lambda grads, active: ([grads[0].to_sparse(), *grads[1:]], active), "gradient of 'weight' is sparse"),
        (lambda grads, active: (grads, active[:2]), "active"),
        (lambda grads, active: (grads, active.float()), "active"),
    ],
)
def test_update_refuses_what_does_not_fit(change: Any, match: str) -> None:
    batch, optimizer = make("Adam-all")
    before = batch.values()
    with pytest.raises((InvalidInput, Unsupported), match=match):
        optimizer.update(*change(grads_of(batch, 0), torch.ones(NUM_MODELS, dtype=torch.bool)))
    assert_equal(batch.values(), before)


# Other storage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam-all", "SGD-momentum", "Adagrad-all", "ASGD"])
def test_views_and_state_follow_the_stacks(name: str) -> None:
    """`module.to(dtype)` gives every parameter new storage and keeps the parameter."""
    batch, optimizer = make(name)
    train(batch, optimizer, 0)
    view = optimizer.param_groups[1]["params"][0]
    for stack in batch.stacked_params.values():
        stack.data = stack.data.float()
    train(batch, optimizer, 1)
    assert optimizer.param_groups[1]["params"][0] is view
    assert view.dtype == torch.float32
    assert_equal(view.detach(), batch.stacked_params["weight"][1].detach())
    entries = optimizer.model_state_dict(1)["state"][0]
    assert all(value.dtype == torch.float32 for value in entries.values() if value.dim())

    other, same = make(name)
    train(other, same, 0)
    for stack in other.stacked_params.values():
        stack.data = stack.data.clone()
    train(other, same, 1)
    expected, plain = make(name)
    train(expected, plain, 0, 1)
    assert_equal(other.values(), expected.values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", KINDS)
def test_copies_of_batch_and_optimizer_belong_together(name: str, how: str) -> None:
    batch, optimizer = make(name)
    train(batch, optimizer, 0)
    pair = (batch, optimizer)
    if how == "deepcopy":
        other, same = copy.deepcopy(pair)
    elif how == "pickle":
        other, same = pickle.loads(pickle.dumps(pair))
    else:
        buffer = io.BytesIO()
        torch.save(pair, buffer)
        buffer.seek(0)
        other, same = torch.load(buffer, weights_only=False)
    train(batch, optimizer, 1)
    assert_different(other.values()["weight"], batch.values()["weight"])
    train(other, same, 1)
    for model in range(NUM_MODELS):
        assert_equal(everything(other, same, model), everything(batch, optimizer, model))


# State dicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_is_that_of_a_plain_optimizer_with_groups(name: str) -> None:
    case = CASES[NAMES.index(name)]
    batch, optimizer = make(name)
    models = models_one_by_one(starting_values())
    singles = [
        case.optimizer_cls(list(model.values()), **config)
        for model, config in zip(models, case.fresh_configs(), strict=True)
    ]
    plain = case.optimizer_cls([single.param_groups[0] for single in singles])
    for step in range(2):
        if step or case.optimizer_cls is not optim.Adagrad:  # a plain one fills all groups by its constructor
            assert _outline(optimizer.state_dict()) == _outline(plain.state_dict())
        train(batch, optimizer, step)
        for model in models:
            loss(model, step).backward()
        plain.step()
        plain.zero_grad()
    assert list(optimizer.state_dict()["state"]) == list(plain.state_dict()["state"])


def _outline(state: dict[str, Any]) -> Any:
    entries = {
        index: {
            name: (value.shape, value.dtype) if isinstance(value, Tensor) else type(value) for name, value in e.items()
        }
        for index, e in state["state"].items()
    }
    return entries, state["param_groups"]


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_is_a_snapshot_and_loads_where_it_came_from(name: str) -> None:
    batch, optimizer = make(name)
    train(batch, optimizer, 0, 1)
    state, weights = optimizer.state_dict(), batch.values()
    kept = copy.deepcopy(state)
    train(batch, optimizer, 2, 3)
    expected = [everything(batch, optimizer, model) for model in range(NUM_MODELS)]
    assert_equal(state, kept)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for stack, value in zip(batch.stacked_params.values(), weights.values(), strict=True):
        stack.data.copy_(value)
    optimizer.load_state_dict(state)
    train(batch, optimizer, 2, 3)
    assert_equal([everything(batch, optimizer, model) for model in range(NUM_MODELS)], expected)
    assert_equal(state, kept)


@pytest.mark.parametrize("name", NAMES)
def test_one_model_moves_to_a_plain_optimizer_and_back(name: str) -> None:
    case = CASES[NAMES.index(name)]
    batch, optimizer = make(name)
    train(batch, optimizer, 0, 1)
    others = [everything(batch, optimizer, model) for model in (0, 2)]
    single_model = {key: nn.Parameter(value[1].clone()) for key, value in batch.values().items()}
    single = case.optimizer_cls(list(single_model.values()), **case.fresh_configs()[1])
    single.load_state_dict(optimizer.model_state_dict(1))
    for step in (2, 3):
        single.zero_grad()
        loss(single_model, step).backward()
        single.step()
    for key, stack in batch.stacked_params.items():
        stack.data[1] = single_model[key].detach()
    optimizer.load_model_state_dict(1, single.state_dict())
    assert_equal([everything(batch, optimizer, model) for model in (0, 2)], others)
    # A plain NAdam goes on in float64 where it started in float32.
    exact = 1e-8 if case.optimizer_cls is optim.NAdam else 0.0
    assert_close(_as_numbers(optimizer.model_state_dict(1)), _as_numbers(single.state_dict()), atol=exact, rtol=0.0)
    train(batch, optimizer, 4)
    single.zero_grad()
    loss(single_model, 4).backward()
    single.step()
    own = {key: value[1] for key, value in batch.values().items()}
    assert_close(own, single_model, atol=1e-9, rtol=1e-9)


def _as_numbers(state: Any) -> Any:
    """A state in float64: a plain optimizer casts some counters to the parameters' dtype when it loads."""
    return torch.utils._pytree.tree_map(lambda leaf: leaf.double() if isinstance(leaf, Tensor) else leaf, state)


@pytest.mark.parametrize("name", ["Adam-all", "SGD-momentum", "Adagrad-accumulator", "ASGD"])
def test_loading_a_state_without_steps_starts_anew(name: str) -> None:
    batch, optimizer = make(name)
    fresh = optimizer.state_dict()
    train(batch, optimizer, 0, 1)
    optimizer.load_state_dict(fresh)
    for stack, value in zip(batch.stacked_params.values(), starting_values().values(), strict=True):
        stack.data.copy_(value)
    train(batch, optimizer, 0)
    other, same = make(name)
    train(other, same, 0)
    for model in range(NUM_MODELS):
        assert_equal(everything(batch, optimizer, model), everything(other, same, model))


def test_counters_that_agree_are_one_number() -> None:
    """Else every later step would work with a row of numbers per model."""
    for name in ("Adam-all", "SGD-dampening"):
        batch, optimizer = make(name)
        train(batch, optimizer, 0, 1, 2)
        optimizer.load_model_state_dict(1, optimizer.model_state_dict(0))
        train(batch, optimizer, 3)
        (clock,) = optimizer._stacked_state.clocks
        assert all(isinstance(value, float) for value in clock)


def test_a_model_copied_over_another_trains_like_it() -> None:
    """As population based training does it."""
    batch, optimizer = make("Adam-all")
    train(batch, optimizer, 0, 1)
    optimizer.load_model_state_dict(2, optimizer.model_state_dict(0))
    for stack in batch.stacked_params.values():
        stack.data[2] = stack.data[0]
    train(batch, optimizer, 2, 3)
    assert_equal(everything(batch, optimizer, 2), everything(batch, optimizer, 0))


def _without(key: str, *path: Any) -> Any:
    def change(state: Any) -> None:
        for step in path:
            state = state[step]
        del state[key]

    return change


def _with(key: Any, value: Any, *path: Any) -> Any:
    def change(state: Any) -> None:
        for step in path:
            state = state[step]
        state[key] = value

    return change


BROKEN = {
    "no state": (_without("state"), "'state' and 'param_groups'"),
    "one group less": (lambda state: state["param_groups"].pop(), "2 parameter groups"),
    "one parameter less": (lambda state: state["param_groups"][1]["params"].pop(), "model 1: parameter group"),
    "no step": (_without("step", "state", 4), "model 1: state of parameter 'bias'.*'step'"),
    "no average": (_without("exp_avg", "state", 4), "model 1: state of parameter 'bias'.*'exp_avg'"),
    "unknown entry": (_with("momentum_buffer", torch.zeros(4), "state", 4), "model 1: state of parameter 'bias'"),
    "unknown parameter": (_with(77, {}, "state"), "77"),
    "wrong shape": (_with("exp_avg", torch.zeros(5), "state", 4), r"model 1.*'exp_avg'.*\[5\].*\[4\]"),
    "complex": (_with("exp_avg", torch.zeros(4, dtype=torch.complex64), "state", 4), "model 1.*'exp_avg'"),
    "no tensor": (_with("exp_avg", "zeros", "state", 4), "model 1.*'exp_avg'.*str"),
    "step no number": (_with("step", "three", "state", 4), "model 1.*'step'.*str"),
    "entry no dict": (_with(4, 3.0, "state"), "model 1.*'bias'.*float"),
    "no rate": (_without("lr", "param_groups", 1), "model 1: parameter group.*'lr'"),
    "one switch": (_with("amsgrad", True, "param_groups", 1), "model 1: amsgrad=True"),
    "differentiable": (_with("differentiable", True, "param_groups", 1), "model 1.*differentiable"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(problem: str) -> None:
    change, match = BROKEN[problem]
    batch, optimizer = make("Adam-all")
    train(batch, optimizer, 0)
    state = optimizer.state_dict()
    train(batch, optimizer, 1)
    before = optimizer.state_dict()
    change(state)
    with pytest.raises(InvalidState, match=match):
        optimizer.load_state_dict(state)
    assert_equal(optimizer.state_dict(), before)
    train(batch, optimizer, 2)


@pytest.mark.parametrize("problem", ["one group less", "one parameter less", "wrong shape"])
def test_a_state_that_does_not_fit_changes_nothing_behind_views(problem: str) -> None:
    batch, optimizer = make("ASGD")
    train(batch, optimizer, 0)
    state = optimizer.state_dict()
    train(batch, optimizer, 1)
    before = optimizer.state_dict()
    change = _with("ax", torch.zeros(5), "state", 4) if problem == "wrong shape" else BROKEN[problem][0]
    change(state)
    with pytest.raises(InvalidState):
        optimizer.load_state_dict(state)
    assert_equal(optimizer.state_dict(), before)
    train(batch, optimizer, 2)


def test_one_models_state_must_be_one_models() -> None:
    _, optimizer = make("Adam-all")
    with pytest.raises(InvalidState, match="3 parameter groups"):
        optimizer.load_model_state_dict(0, optimizer.state_dict())
    for index in (3, -1, True, "1"):
        with pytest.raises(InvalidInput, match="model index"):
            optimizer.model_state_dict(index)


def test_state_shows_what_a_plain_optimizer_has() -> None:
    batch, optimizer = make("Adam-all")
    view = optimizer.param_groups[1]["params"][0]
    assert view not in optimizer.state
    train(batch, optimizer, 0, 1)
    assert len(optimizer.state) == NUM_MODELS * 3
    entry = optimizer.state[view]
    assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]
    assert entry["step"].item() == 2.0
    entry["exp_avg"].zero_()
    assert_equal(optimizer.model_state_dict(1)["state"][0]["exp_avg"], torch.zeros(4, 3, dtype=torch.float64))


def test_state_dict_hooks_run() -> None:
    for name in ("Adam-all", "ASGD"):
        _, optimizer = make(name)
        seen: list[str] = []
        optimizer.register_state_dict_pre_hook(lambda _, seen=seen: seen.append("pack"))
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
        optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "extra"})
        optimizer.register_load_state_dict_post_hook(lambda _, seen=seen: seen.append("loaded"))
        state = optimizer.state_dict()
        assert state["extra"] == 1
        optimizer.load_state_dict(state)
        assert seen == ["pack", "loaded"]


# Compiled updates ----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """A backend's record of the graphs it was given: one entry each."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


COMPILED = ("Adam-all", "SGD-some-momentum", "NAdam-all", "RAdam-all", "RMSprop-centered", "Adagrad-all", "Adamax-all")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_updates_are_the_same_and_compile_once(name: str, graphs: list[int]) -> None:
    def count(module: Any, _: Any) -> Any:
        graphs.append(len(module.graph.nodes))
        return module.forward

    @torch.compile(backend=count, fullgraph=True)
    def compiled(inputs: UpdateInputs, grads: list[Tensor], active: Tensor) -> None:
        apply_updates(inputs, grads, active)

    batch, optimizer = make(name)
    other, same = make(name)
    for step in range(6):
        active = torch.tensor([True, step != 2, step % 2 == 0])
        for one in (optimizer, same):
            for index, group in enumerate(one.param_groups):
                group["lr"] *= 0.9 - 0.1 * index
        optimizer.update(grads_of(batch, step), active)
        if step == 4:  # eager and compiled steps can follow each other
            same.update(grads_of(other, step), active)
        else:
            pending = same.begin_update(active=active)
            compiled(pending.inputs, grads_of(other, step), active)
            same.finish_update(pending)
    assert len(graphs) == 1
    assert_close(other.values(), batch.values(), atol=1e-12, rtol=1e-12)
    assert_close(same.state_dict(), optimizer.state_dict(), atol=1e-12, rtol=1e-12)


def test_compilable_update_of_some_parameters() -> None:
    batch, optimizer = make("Adam-all")
    other, same = make("Adam-all")
    train(batch, optimizer, 0)
    train(other, same, 0)
    for step in (1, 2, 3):
        grads = grads_of(batch, step)
        present = [True, step != 2, True]
        kept = [grad if wanted else None for grad, wanted in zip(grads, present, strict=True)]
        optimizer.update(kept)
        pending = same.begin_update(present)
        others = [grad for grad, wanted in zip(grads_of(other, step), present, strict=True) if wanted]
        with torch.no_grad():
            apply_updates(pending.inputs, others)  # type: ignore[arg-type]
        same.finish_update(pending)
    assert_close(same.state_dict(), optimizer.state_dict(), atol=1e-12, rtol=1e-12)
    assert {float(entry["step"]) for entry in same.state_dict()["state"].values()} == {3.0, 4.0}
    train(batch, optimizer, 4)
    train(other, same, 4)
    assert_close(other.values(), batch.values(), atol=1e-12, rtol=1e-12)


def test_a_compilable_update_that_never_ran_changes_nothing() -> None:
    batch, optimizer = make("Adam-all")
    train(batch, optimizer, 0)
    before, updates = optimizer.state_dict(), optimizer.updates_done
    optimizer.begin_update()
    assert_equal(optimizer.state_dict(), before)
    assert optimizer.updates_done == updates


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.AdamW])
def test_a_single_model_takes_gradients_of_any_layout(optimizer_cls: Any, options: dict[str, Any]) -> None:
    """torch's fused kernels read a transposed gradient as if it were contiguous."""
    start = torch.randn(1, 4, 3, dtype=torch.float64)
    stack, plain = nn.Parameter(start.clone()), nn.Parameter(start[0].clone())
    optimizer: Any = make_optimizer(optimizer_cls, [options], {"weight": stack}, 1)
    alone = optimizer_cls([plain], **options)
    for step in range(4):
        gradient = torch.randn(1, 3, 4, dtype=torch.float64).mT
        stack.grad = gradient if step % 2 else gradient.contiguous()
        plain.grad = gradient[0].clone()
        optimizer.step()
        alone.step()
    assert_close(stack[0], plain, atol=1e-12, rtol=1e-12)
    assert_close(optimizer.model_state_dict(0), alone.state_dict(), atol=1e-12, rtol=1e-12)


def test_models_in_half_precision_round_as_plain_optimizers_do() -> None:
    """torch's operations on lists round a factor to half precision first: 0.997 becomes 0.996."""
    start = torch.full((1, 3), 1.3, dtype=torch.bfloat16)
    options = {"lr": 0.01, "weight_decay": 0.3}
    alone, pair = nn.Parameter(start.clone()), nn.Parameter(start.repeat(2, 1))
    single: Any = make_optimizer(optim.AdamW, [options], {"weight": alone}, 1)
    several: Any = make_optimizer(optim.AdamW, [options] * 2, {"weight": pair}, 2)
    plain = nn.Parameter(start[0].clone())
    optimizer = optim.AdamW([plain], **options)
    for _ in range(30):
        gradient = torch.randn(1, 3, dtype=torch.bfloat16)
        plain.grad = gradient[0].clone()
        optimizer.step()
        single.update([gradient])
        several.update([gradient.repeat(2, 1)])
    for found in (alone[0], pair[1]):
        assert_close(found, plain, atol=2**-6, rtol=0)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("exp_avg", torch.zeros(4, 3, dtype=torch.float64, device="meta"), "meta"),
        ("exp_avg_sq", torch.zeros(4, 3, dtype=torch.float64).to_sparse(), "sparse"),
        ("step", float("nan"), "nan"),
        ("lr", "abc", "lr"),
        ("lr", None, "lr"),
        ("betas", 0.9, "betas"),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_loaded_changes_nothing(where: str, value: Any, message: str) -> None:
    batch, optimizer = make("Adam-all")
    train(batch, optimizer, 0, 1)
    before = optimizer.state_dict()
    wrong = copy.deepcopy(before)
    for entry in wrong["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name].add_(1.0)
    if where in ("lr", "betas"):
        wrong["param_groups"][2][where] = value
    else:
        wrong["state"][2 * 3][where] = value
    with pytest.raises(InvalidState, match=f"model 2.*{message}"):
        optimizer.load_state_dict(wrong)
    assert_equal(optimizer.state_dict(), before)


def test_numbers_keep_their_digits_in_half_precision() -> None:
    """In bfloat16 a decay of 0.999 would be 1."""
    bucket = Bucket([torch.zeros(2, 3, dtype=torch.bfloat16)], [], {})
    (rows,) = bucket.rows(torch.tensor([0.999, 0.9], dtype=torch.float64))  # type: ignore[misc]
    assert_equal(rows, torch.tensor([[0.999], [0.9]], dtype=torch.float32))
    for rate in (0.999, 0.5):
        value = [torch.ones(2, 3, dtype=torch.bfloat16)]
        lerp_(value, [torch.zeros(2, 3, dtype=torch.bfloat16)], [torch.tensor([[rate], [rate]])])
        expected = torch.ones(2, 3, dtype=torch.bfloat16).lerp_(torch.zeros(2, 3, dtype=torch.bfloat16), rate)
        assert_equal(value[0], expected)


# Choice of the way ---------------------------------------------------------------------------------------------------


class OtherDefaults(optim.SGD):
    """Differs from SGD in a default only."""

    def __init__(self, params: Any, lr: float = 0.25, momentum: float = 0.5) -> None:
        super().__init__(params, lr=lr, momentum=momentum)


class OtherStep(optim.SGD):
    """Does something else."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(group["lr"] * parameter.grad.sign())


class StepCounter(optim.Optimizer):
    """Keeps something of its own beside the groups, and takes an option that is no hyper-parameter."""

    def __init__(self, params: Any, lr: float = 0.1, every: int = 1) -> None:
        super().__init__(params, {"lr": lr})
        self.every = every
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls % self.every == 0:
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("optimizer_cls", "configs", "kind"),
    [
        (OtherDefaults, [{}, {"lr": 0.1}, {"momentum": 0.0}], StackedOptimizer),
        (OtherStep, [{"lr": 0.1}, {"lr": 0.01}, {"lr": 0.2}], ViewOptimizer),
        (StepCounter, [{}, {"every": 2}, {"lr": 0.2, "every": 3}], ViewOptimizer),
    ],
)
def test_users_own_classes(optimizer_cls: type[optim.Optimizer], configs: list[dict[str, Any]], kind: type) -> None:
    batch = StandInBatch(make_optimizer)
    optimizer = batch.make_optimizer(optimizer_cls, configs)
    assert isinstance(optimizer, kind)
    train(batch, optimizer, *range(4))
    models = models_one_by_one(starting_values())
    for index, (model, config) in enumerate(zip(models, configs, strict=True)):
        single = optimizer_cls(list(model.values()), **config)
        for step in range(4):
            single.zero_grad()
            loss(model, step).backward()
            single.step()
        assert_close({k: v[index] for k, v in batch.values().items()}, model, atol=1e-12, rtol=1e-12)


def test_unsupported_classes_and_calls() -> None:
    for optimizer_cls in (optim.LBFGS, optim.SparseAdam):
        with pytest.raises(Unsupported, match=optimizer_cls.__name__):
            OptimizerFactory(optimizer_cls)
    for optimizer_cls in (optim.Adam, optim.ASGD):
        batch = StandInBatch(make_optimizer)
        with pytest.raises(Unsupported, match=r"model 1: .*differentiable"):
            batch.make_optimizer(optimizer_cls, [{}, {"differentiable": True}, {}])
        optimizer = batch.make_optimizer(optimizer_cls, LRS)
        with pytest.raises(Unsupported, match="one parameter group per model"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


# The factory ---------------------------------------------------------------------------------------------------------


def test_factory_merges_configurations() -> None:
    batch = StandInBatch(make_optimizer)
    factory = OptimizerFactory(optim.SGD, {"momentum": 0.9, "lr": 1.0})
    optimizer = factory.create_optimizer(batch, [{"lr": 0.1}, {"momentum": 0.5}, {}])  # type: ignore[arg-type]
    assert [(g["lr"], g["momentum"]) for g in optimizer.param_groups] == [(0.1, 0.9), (1.0, 0.5), (1.0, 0.9)]
    assert optimizer.defaults["momentum"] == 0.9


@pytest.mark.parametrize(
    ("optimizer_cls", "configs", "match"),
    [
        (optim.SGD, [{}, {}], "received 2 configurations; expected 3"),
        (optim.SGD, {"lr": 0.1}, "configs: received dict"),
        (optim.SGD, [{}, {}, None], "model 2"),
        (optim.SGD, [{}, {}, {3: 1}], "model 2"),
        (optim.SGD, [{}, {"learning_rate": 0.1}, {}], r"model 1: SGD has no option 'learning_rate'.*lr, momentum"),
        (optim.SGD, [{}, {"momentun": 0.1}, {}], r"model 1: .*'momentun'.*Did you mean 'momentum'"),
        (optim.SGD, [{}, {"lr": -1.0}, {}], r"model 1: SGD refuses .* because of 'lr'.*Invalid learning rate"),
        (optim.SGD, [{"lr": "high"}, {}, {}], r"model 0: SGD refuses .* because of 'lr'"),
        (optim.Adam, [{}, {}, {"lr": 0.1, "betas": (0.9, 1.5)}], r"model 2: Adam refuses .* because of 'betas'"),
        (optim.SGD, [{}, {"nesterov": True}, {}], r"model 1: SGD refuses .* because of 'nesterov'"),
        (optim.SGD, [{}, {"params": []}, {}], "model 1"),
        (optim.Rprop, [{}, {"learning_rate": 0.1}, {}], r"model 1: Rprop has no option 'learning_rate'"),
        (optim.Rprop, [{}, {"etas": (2.0, 1.0)}, {}], r"model 1: Rprop refuses .* because of 'etas'"),
        (optim.Muon, [{}, {}, {}], r"model 0: Muon refuses its configuration.*2D"),
    ],
)
def test_configurations_that_do_not_fit(optimizer_cls: type[optim.Optimizer], configs: Any, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        OptimizerFactory(optimizer_cls).create_optimizer(StandInBatch(make_optimizer), configs)  # type: ignore[arg-type]


def test_factory_arguments() -> None:
    for bad in (nn.Linear, optim.SGD([nn.Parameter(torch.zeros(1))]), "SGD"):
        with pytest.raises(InvalidInput, match="OptimizerFactory"):
            OptimizerFactory(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="base_config"):
        OptimizerFactory(optim.SGD, [("lr", 0.1)])  # type: ignore[arg-type]
    batch = StandInBatch(make_optimizer, frozen=tuple(SHAPES))
    with pytest.raises(InvalidInput, match="no parameter that requires a gradient"):
        OptimizerFactory(optim.SGD).create_optimizer(batch, LRS)  # type: ignore[arg-type]


def test_config_helpers() -> None:
    assert create_sgd_configs([0.1, 0.2]) == [
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-4},
    ]
    assert create_adam_configs([0.1], weight_decay=0.5) == [
        {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.5}
    ]
    assert_close(
        [config["lr"] for config in create_lr_sweep_configs(1e-4, 1e-1, 4)],
        [1e-4, 1e-3, 1e-2, 1e-1],
        atol=0.0,
        rtol=1e-12,
    )
    linear = create_lr_sweep_configs(0.0, 1.0, 5, scale="linear")
    assert linear == [{"lr": lr} for lr in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert create_lr_sweep_configs(0.1, 1.0, 1) == [{"lr": 0.1}]
    assert create_lr_sweep_configs(0.1, 0.3, 7)[-1] == {"lr": 0.3}


@pytest.mark.parametrize(
    "arguments",
    [
        (0.1, 1.0, 0),
        (0.1, 1.0, True),
        (0.1, 1.0, 2.0),
        (1.0, 0.1, 3),
        (0.0, 1.0, 3),
        (-1.0, 1.0, 3, "linear"),
        (0.1, math.inf, 3),
        (math.nan, 1.0, 3),
        (0.1, 1.0, 3, "cubic"),
    ],
)
def test_sweeps_out_of_range(arguments: Any) -> None:
    with pytest.raises(InvalidInput, match="create_lr_sweep_configs"):
        create_lr_sweep_configs(*arguments)


def test_the_table_names_the_way() -> None:
    """Whole-stack updates wherever the table says so."""
    for case in CASES:
        batch = StandInBatch(make_optimizer, starting_values(MATRIX_SHAPES if case.matrices_only else SHAPES))
        optimizer = batch.make_optimizer(case.optimizer_cls, case.fresh_configs())
        assert isinstance(optimizer, StackedOptimizer) is case.stacked, case.name
    assert all(isinstance(case, OptimizerCase) for case in STACKED_CASES)
