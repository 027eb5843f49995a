"""One scheduler per model: each moves its own group, as it would move the only group of a plain optimizer."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedules

from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.optimizer import OptimizerFactory
from mb_torch.schedule import create_lr_scheduler
from mb_torch.stacked.optim import make_optimizer
from tests.optimizers import NUM_MODELS, StandInBatch

LRS = [0.1, 0.2, 0.4]
STEPS = 12


def halve(step: int) -> float:
    return 0.5**step


def shrink(step: int) -> float:
    return 1 / (1 + step)


# For each class its options per model; `schedulers` are pairs of class and options.
SCHEDULES: dict[str, tuple[type, list[dict[str, Any]]]] = {
    "StepLR": (schedules.StepLR, [{"step_size": 1 + i, "gamma": 0.5 + 0.1 * i} for i in range(3)]),
    "MultiStepLR": (schedules.MultiStepLR, [{"milestones": [2 + i, 5 + i], "gamma": 0.3} for i in range(3)]),
    "ConstantLR": (schedules.ConstantLR, [{"factor": 0.2 + 0.1 * i, "total_iters": 3 + i} for i in range(3)]),
    "LinearLR": (schedules.LinearLR, [{"start_factor": 0.1 + 0.1 * i, "total_iters": 4 + i} for i in range(3)]),
    "ExponentialLR": (schedules.ExponentialLR, [{"gamma": 0.9 - 0.1 * i} for i in range(3)]),
    "PolynomialLR": (schedules.PolynomialLR, [{"total_iters": 5 + i, "power": 1.0 + i} for i in range(3)]),
    "CosineAnnealingLR": (schedules.CosineAnnealingLR, [{"T_max": 4 + i, "eta_min": 0.01 * i} for i in range(3)]),
    "CosineAnnealingWarmRestarts": (
        schedules.CosineAnnealingWarmRestarts,
        [{"T_0": 3 + i, "T_mult": 1 + i} for i in range(3)],
    ),
    "OneCycleLR": (schedules.OneCycleLR, [{"max_lr": 1.0 + i, "total_steps": 13 + i} for i in range(3)]),
    "CyclicLR": (
        schedules.CyclicLR,
        [{"base_lr": 0.01 * (i + 1), "max_lr": 0.5, "step_size_up": 2 + i, "mode": "exp_range"} for i in range(3)],
    ),
    "LambdaLR": (schedules.LambdaLR, [{"lr_lambda": f} for f in (halve, shrink, halve)]),
    "MultiplicativeLR": (schedules.MultiplicativeLR, [{"lr_lambda": f} for f in (shrink, halve, shrink)]),
    "SequentialLR": (
        schedules.SequentialLR,
        [
            {
                "schedulers": [
                    (schedules.LinearLR, {"start_factor": 0.1, "total_iters": 2 + i}),
                    (schedules.CosineAnnealingLR, {"T_max": 6 + i}),
                ],
                "milestones": [2 + i],
            }
            for i in range(3)
        ],
    ),
    "ChainedScheduler": (
        schedules.ChainedScheduler,
        [
            {
                "schedulers": [
                    (schedules.ConstantLR, {"factor": 0.5, "total_iters": 3 + i}),
                    (schedules.ExponentialLR, {"gamma": 0.9 - 0.1 * i}),
                ]
            }
            for i in range(3)
        ],
    ),
    "ReduceLROnPlateau": (schedules.ReduceLROnPlateau, [{"patience": i, "factor": 0.5} for i in range(3)]),
}

KINDS = {
    "stacked SGD": (optim.SGD, {"momentum": 0.9}),
    "stacked Adam": (optim.Adam, {}),
    "views": (optim.Rprop, {}),
    "plain": (optim.SGD, {"momentum": 0.9}),
}


def make(kind: str) -> optim.Optimizer:
    """An optimizer with a group per model, in which every model has a gradient."""
    optimizer_cls, options = KINDS[kind]
    if kind == "plain":
        groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in LRS]
        optimizer = optimizer_cls(groups, **options)
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        return optimizer
    batch = StandInBatch(make_optimizer)
    configs = [{"lr": lr, **options} for lr in LRS]
    optimizer = batch.make_optimizer(optimizer_cls, configs)
    batch.backward(0)
    return optimizer


def make_single(kind: str, model: int) -> optim.Optimizer:
    """One model's own plain optimizer."""
    optimizer_cls, options = KINDS[kind]
    single = optimizer_cls([nn.Parameter(torch.ones(2))], lr=LRS[model], **options)
    single.param_groups[0]["params"][0].grad = torch.ones(2)
    return single


def build_single(scheduler_cls: type, config: Mapping[str, Any], optimizer: optim.Optimizer) -> Any:
    """A plain scheduler, its parts built by hand."""
    options = dict(config)
    if "schedulers" in options:
        options["schedulers"] = [cls(optimizer, **part) for cls, part in options["schedulers"]]
    return scheduler_cls(optimizer=optimizer, **options)


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def metric(model: int, step: int) -> float:
    return float((step + model) % 4 - step * 0.01 * model)


def advance(scheduler: Any, model: int, step: int) -> None:
    if isinstance(scheduler, schedules.ReduceLROnPlateau):
        scheduler.step(metric(model, step))
    else:
        scheduler.step()


def applicable(name: str, kind: str) -> bool:
    """Cyclic schedules move the momentum, which Rprop has not."""
    return kind != "views" or name not in ("OneCycleLR", "CyclicLR")


COMBINATIONS = [(name, kind) for name in SCHEDULES for kind in KINDS if applicable(name, kind)]


@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_each_scheduler_moves_its_own_group(name: str, kind: str) -> None:
    """All options of every group, momentum and betas included, at every step."""
    scheduler_cls, configs = SCHEDULES[name]
    optimizer = make(kind)
    schedulers = create_lr_scheduler(optimizer, scheduler_cls, configs)
    assert [isinstance(scheduler, scheduler_cls) for scheduler in schedulers] == [True] * NUM_MODELS
    singles = [make_single(kind, model) for model in range(NUM_MODELS)]
    plain = [build_single(scheduler_cls, c, s) for c, s in zip(configs, singles, strict=True)]
    rates: list[set[float]] = [set() for _ in singles]
    for step in range(STEPS):
        for seen, group in zip(rates, optimizer.param_groups, strict=True):
            seen.add(group["lr"])
        for group, single in zip(optimizer.param_groups, singles, strict=True):
            assert options_of(group) == options_of(single.param_groups[0])
        optimizer.step()
        for model, single in enumerate(singles):
            single.step()
            advance(schedulers[model], model, step)
            advance(plain[model], model, step)
        assert [s.get_last_lr() for s in schedulers] == [p.get_last_lr() for p in plain]
    assert all(len(seen) > 1 for seen in rates)


def test_stepping_one_scheduler_moves_one_group() -> None:
    optimizer = make("stacked SGD")
    schedulers = create_lr_scheduler(optimizer, schedules.StepLR, [{"step_size": 1, "gamma": 0.5}] * 3)
    optimizer.step()
    schedulers[1].step()
    schedulers[1].step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05, 0.4]


def _packed(*states: Any) -> Any:
    """Through a file, as a checkpoint goes."""
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("order", ["schedulers first", "optimizer first", "schedulers made after the optimizer loaded"])
@pytest.mark.parametrize(("name", "kind"), COMBINATIONS)
def test_resume_in_any_order(name: str, kind: str, order: str) -> None:
    scheduler_cls, configs = SCHEDULES[name]
    optimizer = make(kind)
    schedulers = create_lr_scheduler(optimizer, scheduler_cls, configs)
    expected = []
    for step in range(STEPS):
        if step == 5:
            saved = _packed(optimizer.state_dict(), [_without_lambdas(s.state_dict()) for s in schedulers])
        if step >= 5:
            expected.append([options_of(group) for group in optimizer.param_groups])
        optimizer.step()
        for model, scheduler in enumerate(schedulers):
            advance(scheduler, model, step)

    optimizer_state, scheduler_states = saved
    optimizer = make(kind)
    if order == "schedulers made after the optimizer loaded":
        optimizer.load_state_dict(optimizer_state)
        schedulers = create_lr_scheduler(optimizer, scheduler_cls, configs)
    else:
        schedulers = create_lr_scheduler(optimizer, scheduler_cls, configs)
        if order == "optimizer first":
            optimizer.load_state_dict(optimizer_state)
    for scheduler, state in zip(schedulers, scheduler_states, strict=True):
        scheduler.load_state_dict(state)
    if order == "schedulers first":
        optimizer.load_state_dict(optimizer_state)
    actual = []
    for step in range(5, STEPS):
        actual.append([options_of(group) for group in optimizer.param_groups])
        optimizer.step()
        for model, scheduler in enumerate(schedulers):
            advance(scheduler, model, step)
    assert actual == expected


def _without_lambdas(state: Any) -> Any:
    """A state as `torch.load(weights_only=True)` can read it."""
    if isinstance(state, dict):
        return {key: _without_lambdas(value) for key, value in state.items() if key not in ("_anneal_func",)}
    if isinstance(state, list):
        return [_without_lambdas(entry) for entry in state]
    return dict(state) if isinstance(state, Mapping) else state


def test_new_schedulers_on_a_loaded_optimizer_start_their_schedule() -> None:
    """Without the schedulers' state nothing is resumed, as in plain torch."""
    optimizer = make("stacked SGD")
    create_lr_scheduler(optimizer, schedules.LinearLR, [{"start_factor": 0.1}] * 3)
    state = optimizer.state_dict()
    optimizer = make("stacked SGD")
    optimizer.load_state_dict(state)
    create_lr_scheduler(optimizer, schedules.ConstantLR, [{"factor": 0.5}] * 3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.01, 0.02])


def test_going_back_to_an_earlier_state_in_one_process() -> None:
    optimizer = make("stacked SGD")
    configs = [{"start_factor": 0.5, "total_iters": 4}] * 3
    schedulers = create_lr_scheduler(optimizer, schedules.LinearLR, configs)
    saved = copy.deepcopy((optimizer.state_dict(), [scheduler.state_dict() for scheduler in schedulers]))
    rates = [group["lr"] for group in optimizer.param_groups]
    for _ in range(2):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    schedulers = create_lr_scheduler(optimizer, schedules.LinearLR, configs)
    optimizer.load_state_dict(saved[0])
    for scheduler, state in zip(schedulers, saved[1], strict=True):
        scheduler.load_state_dict(state)
    assert [group["lr"] for group in optimizer.param_groups] == rates


def test_loading_a_scheduler_keeps_a_rate_that_was_set_by_hand() -> None:
    optimizer = make("stacked SGD")
    for _ in range(2):  # the second time the groups have been scheduled before, as after a resume
        schedulers = create_lr_scheduler(optimizer, schedules.StepLR, [{"step_size": 5}] * 3)
    states = [scheduler.state_dict() for scheduler in schedulers]
    optimizer.param_groups[1]["lr"] = 7.0
    optimizer.step()
    for scheduler, state in zip(schedulers, states, strict=True):
        scheduler.load_state_dict(state)
    assert optimizer.param_groups[1]["lr"] == 7.0


@pytest.mark.parametrize("kind", KINDS)
def test_warning_about_the_order_of_steps(kind: str) -> None:
    """It comes where the optimizer was not stepped, and nowhere else."""
    optimizer = make(kind)
    schedulers = create_lr_scheduler(optimizer, schedules.StepLR, [{"step_size": 1}] * 3)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        schedulers[0].step()
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers[1].step()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    # Steps before the schedulers were made do not count.
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        create_lr_scheduler(optimizer, schedules.StepLR, [{"step_size": 1}] * 3)[2].step()


def test_a_fused_update_counts_as_a_step() -> None:
    batch = StandInBatch(make_optimizer)
    optimizer: Any = batch.make_optimizer(optim.SGD, [{"lr": lr} for lr in LRS])
    compiled = lambda: optimizer.finish_update(optimizer.begin_update())  # noqa: E731
    for update in (lambda: optimizer.update([None] * 3), compiled):
        (scheduler, *_) = create_lr_scheduler(optimizer, schedules.StepLR, [{"step_size": 1}] * 3)
        update()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_and_their_optimizer_can_be_copied_together(name: str, how: str) -> None:
    scheduler_cls, configs = SCHEDULES[name]
    optimizer = make("stacked SGD")
    schedulers = create_lr_scheduler(optimizer, scheduler_cls, configs)
    optimizer.step()
    for model, scheduler in enumerate(schedulers):
        advance(scheduler, model, 0)
    pair = (optimizer, schedulers)
    other, copies = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    for one, own in ((optimizer, schedulers), (other, copies)):
        for step in range(1, 4):
            one.step()
            for model, scheduler in enumerate(own):
                advance(scheduler, model, step)
        assert all(isinstance(scheduler, scheduler_cls) for scheduler in own)
    assert [options_of(g) for g in other.param_groups] == [options_of(g) for g in optimizer.param_groups]
    other.step()
    copies[0].step(*([0.0] if name == "ReduceLROnPlateau" else []))
    assert optimizer.param_groups[0] is not other.param_groups[0]


def test_parts_may_be_functions_and_nest() -> None:
    optimizer = make("stacked Adam")
    inner = (schedules.ChainedScheduler, {"schedulers": [(schedules.ExponentialLR, {"gamma": 0.5})]})
    config = {
        "schedulers": [lambda given: schedules.ConstantLR(given, factor=0.5, total_iters=2), inner],
        "milestones": [2],
    }
    with pytest.raises(InvalidInput, match="model 0: SequentialLR"):  # torch cannot restart a chain
        create_lr_scheduler(optimizer, schedules.SequentialLR, [{**config, "milestones": [2, 3]}] * 3)
    chained = {"schedulers": [lambda given: schedules.ConstantLR(given, factor=0.5, total_iters=2), inner]}
    schedulers = create_lr_scheduler(optimizer, schedules.ChainedScheduler, [chained] * 3)
    for _ in range(2):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.05, 0.1])


@pytest.mark.parametrize(
    ("scheduler_cls", "configs", "match"),
    [
        (schedules.StepLR, [{"step_size": 1}] * 2, "scheduler configs: received 2 configurations; expected 3"),
        (schedules.StepLR, {"step_size": 1}, "scheduler configs: received dict"),
        (schedules.StepLR, [{"step_size": 1}, {"step": 1}, {"step_size": 1}], "model 1: StepLR has no option 'step'"),
        (schedules.StepLR, [{}, {"step_size": 1}, {"step_size": 1}], "model 0: StepLR refuses .*step_size"),
        (
            schedules.LinearLR,
            [{"start_factor": 0.5}, {"start_factor": 0.5}, {"start_factor": 3.0}],
            "model 2: LinearLR refuses its configuration because of 'start_factor'",
        ),
        (schedules.SequentialLR, [{"schedulers": 3, "milestones": []}] * 3, "model 0: schedulers"),
        (schedules.SequentialLR, [{"schedulers": [3], "milestones": []}] * 3, "model 0: entry of schedulers"),
        (
            schedules.SequentialLR,
            [{"schedulers": [(schedules.StepLR, {"size": 1})], "milestones": []}] * 3,
            "model 0: StepLR has no option 'size'",
        ),
        ("StepLR", [{}] * 3, "model 0: scheduler"),
    ],
)
def test_configurations_that_do_not_fit_leave_the_groups_alone(scheduler_cls: Any, configs: Any, match: str) -> None:
    optimizer = make("stacked SGD")
    before = [options_of(group) for group in optimizer.param_groups]
    with pytest.raises(InvalidInput, match=match):
        create_lr_scheduler(optimizer, scheduler_cls, configs)
    assert [options_of(group) for group in optimizer.param_groups] == before


def test_a_schedulers_optimizer_is_not_for_stepping() -> None:
    optimizer = make("stacked SGD")
    (scheduler, *_) = OptimizerFactory(optim.SGD).create_lr_scheduler(
        optimizer, schedules.StepLR, [{"step_size": 1}] * 3
    )
    assert isinstance(scheduler.optimizer, optim.Optimizer)
    assert scheduler.optimizer.defaults is optimizer.defaults
    assert "lr: 0.1" in repr(scheduler.optimizer)
    with pytest.raises(Unsupported, match="one group of the real one"):
        scheduler.optimizer.step()
    with pytest.raises(InvalidInput, match="create_lr_scheduler"):
        create_lr_scheduler(nn.Linear(1, 1), schedules.StepLR, [])  # type: ignore[arg-type]
