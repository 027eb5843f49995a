"""Optimizers and schedules from configurations: each model's is the plain one of torch, and nothing is ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedules

from mb_torch import InvalidInput, ModelBatch
from tests.compare import assert_close
from tests.training_runs import assert_identical
from trainers.checkpoints.files import to_plain, with_types_of
from trainers.config.errors import ConfigurationError, ValidationError
from trainers.config.schema import (
    CheckpointConfig,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
)
from trainers.generic import GenericTrainer
from trainers.packed.from_config import make_optimizer, make_schedulers, optimizer_steps, scheduler_interval
from trainers.settings import GenericTrainerConfig

RATES = [0.1, 0.02, 0.05]
PER_EPOCH, EPOCHS = 4, 5
STEPS = PER_EPOCH * EPOCHS


def experiment(
    name: str = "run",
    optimizer: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> ExperimentConfig:
    return ExperimentConfig(
        name,
        ModelConfig("mlp"),
        TrainingConfig(**{"epochs": EPOCHS, **(training or {})}),
        DataConfig("digits"),
        OptimizerConfig(**(optimizer or {})),
        None if scheduler is None else SchedulerConfig(**scheduler),
    )


def experiments(optimizer: dict[str, Any], scheduler: dict[str, Any] | None = None) -> list[ExperimentConfig]:
    """Three; a tuple among the options has one value for each."""

    def of(model: int, options: dict[str, Any]) -> dict[str, Any]:
        return {
            key: of(model, value) if isinstance(value, dict) else value[model] if isinstance(value, tuple) else value
            for key, value in options.items()
        }

    return [
        experiment(f"e{model}", of(model, {"lr": tuple(RATES), **optimizer}), scheduler and of(model, scheduler))
        for model in range(3)
    ]


def models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(3)]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (3, 1))  # type: ignore[return-value]


OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any], list[dict[str, Any]]]] = {
    "adam": (
        optim.Adam,
        {"weight_decay": (0.0, 0.1, 0.2), "betas": ([0.9, 0.99], [0.5, 0.9], [0.8, 0.8]), "eps": 1e-6},
        [
            {"betas": b, "eps": 1e-6, "weight_decay": d}
            for b, d in (((0.9, 0.99), 0), ((0.5, 0.9), 0.1), ((0.8,) * 2, 0.2))
        ],
    ),
    "AdamW": (optim.AdamW, {"amsgrad": True}, [{"amsgrad": True, "weight_decay": 0.01}] * 3),
    "SGD": (
        optim.SGD,
        {"weight_decay": 0.0, "custom_params": {"momentum": (0.9, 0.5, 0.7), "nesterov": True}},
        [{"momentum": momentum, "nesterov": True} for momentum in (0.9, 0.5, 0.7)],
    ),
    "rmsprop": (
        optim.RMSprop,
        {"eps": 1e-4, "custom_params": {"alpha": 0.9}},
        [{"eps": 1e-4, "alpha": 0.9, "weight_decay": 0.01}] * 3,
    ),
    "adagrad": (
        optim.Adagrad,
        {"eps": (1e-8, 1e-4, 1e-2)},
        [{"eps": e, "weight_decay": 0.01} for e in (1e-8, 1e-4, 1e-2)],
    ),
    "adadelta": (optim.Adadelta, {"weight_decay": 0.0}, [{"eps": 1e-8}] * 3),
    "adamax": (optim.Adamax, {"weight_decay": 0.0}, [{}] * 3),
    "nadam": (optim.NAdam, {"weight_decay": 0.0}, [{}] * 3),
    "radam": (optim.RAdam, {"weight_decay": 0.0}, [{}] * 3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_model_trains_as_with_a_plain_optimizer(name: str) -> None:
    cls, settings, options = OPTIMIZERS[name]
    alone = models()
    batch = ModelBatch(alone)
    optimizer = make_optimizer(batch, experiments({"name": name, **settings}))
    step = batch.make_train_step(nn.functional.mse_loss, optimizer)
    plain = [cls(m.parameters(), lr=lr, **own) for m, lr, own in zip(alone, RATES, options, strict=True)]
    inputs, targets = data()
    for _ in range(5):
        step(inputs, targets)
        for model, own in zip(alone, plain, strict=True):
            own.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            own.step()
    expected = [dict(model.state_dict()) for model in alone]
    assert_close([dict(state) for state in batch.get_model_states()], expected, atol=1e-9, rtol=1e-9)
    for model, own in enumerate(plain):
        group = optimizer.param_groups[model]
        for key, value in own.param_groups[0].items():
            # Which of torch's implementations runs has no say in the result.
            if key not in ("params", "foreach", "fused", "capturable", "differentiable"):
                assert group[key] == value, key


def test_the_learning_rate_is_that_of_training_unless_the_optimizer_has_its_own() -> None:
    configs = [experiment("a", training={"learning_rate": 0.5}), experiment("b", {"lr": 0.25})]
    optimizer = make_optimizer(ModelBatch(models()[:2]), configs)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sgd", "betas": [0.5, 0.9]}, r"'e1'.*\n.*optimizer\.betas: received \[0\.5, 0\.9\].*sgd"),
        ({"name": "sgd", "amsgrad": True}, r"optimizer\.amsgrad: received True"),
        ({"name": "sgd", "eps": 1e-3}, r"optimizer\.eps"),
        ({"name": "rmsprop", "betas": [0.5, 0.9]}, r"optimizer\.betas"),
        ({"name": "adamax", "amsgrad": True}, r"optimizer\.amsgrad"),
        ({"name": "adam", "custom_params": {"momentum": 0.9}}, r"optimizer\.custom_params\.momentum.*options of adam"),
        ({"name": "adam", "custom_params": {"eps": 1e-3}}, r"optimizer\.custom_params\.eps.*as optimizer\.eps"),
        ({"name": "adam", "custom_params": {"lr": 1e-3}}, r"custom_params\.lr.*as optimizer\.learning_rate"),
        ({"name": "sgd", "custom_params": {"momentum": -1.0}}, "Invalid momentum"),
        ({"name": "sgd", "custom_params": {"nesterov": True}}, "Nesterov"),
        ({"name": "lion"}, r"optimizer\.name: received 'lion'; expected one of adam, adamw, sgd"),
    ],
)
def test_what_the_optimizer_cannot_take_is_refused(settings: dict[str, Any], message: str) -> None:
    configs = experiments({"name": settings["name"]})
    configs[1] = experiment("e1", settings)
    if settings["name"] == "lion":
        configs = experiments(settings)
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        make_optimizer(ModelBatch(models()), configs)


def test_all_problems_of_an_experiment_are_listed() -> None:
    config = experiment("odd", {"name": "sgd", "amsgrad": True, "eps": 1.0, "custom_params": {"momentun": 0.9}})
    with pytest.raises(ValidationError) as caught:
        make_optimizer(ModelBatch(models()[:1]), [config])
    assert [text.split(":")[0] for text in caught.value.problems] == [
        "optimizer.eps",
        "optimizer.amsgrad",
        "optimizer.custom_params.momentun",
    ]


def test_experiments_must_agree_on_classes_and_their_number_must_fit() -> None:
    batch = ModelBatch(models()[:2])
    configs = [experiment("one", {"name": "adam"}), experiment("two", {"name": "sgd"})]
    with pytest.raises(ConfigurationError, match="optimizer.name: received adam in one, sgd in two"):
        make_optimizer(batch, configs)
    configs = [experiment("one", scheduler={}), experiment("two", scheduler={"name": "linear"})]
    with pytest.raises(ConfigurationError, match="scheduler.name: received cosine in one, linear in two"):
        make_schedulers(make_optimizer(batch, configs), configs, 1)
    configs = [experiment("one", scheduler={}), experiment("two")]
    with pytest.raises(ConfigurationError, match="scheduler.name: received cosine in one, None in two"):
        make_schedulers(make_optimizer(batch, configs), configs, 1)
    with pytest.raises(InvalidInput, match="1 configurations"):
        make_optimizer(batch, configs[:1])
    with pytest.raises(ConfigurationError, match="received none"):
        make_optimizer(batch, [])
    with pytest.raises(ConfigurationError, match="1 configurations; expected 2"):
        make_schedulers(make_optimizer(batch, configs), configs[:1], 1)
    with pytest.raises(ConfigurationError, match="steps_per_epoch: received 0"):
        make_schedulers(make_optimizer(batch, configs), configs, 0)


def _warmed(optimizer: optim.Optimizer, steps: int) -> Any:
    return schedules.LinearLR(optimizer, 1 / (steps + 1), total_iters=steps)


def _then(after: Callable[[optim.Optimizer], Any], warmup: int) -> Callable[[optim.Optimizer], Any]:
    """Warm-up, then another schedule from its beginning."""

    def make(optimizer: optim.Optimizer) -> Any:
        return schedules.SequentialLR(optimizer, [_warmed(optimizer, warmup), after(optimizer)], [warmup])

    return make


def _with(other: Callable[[optim.Optimizer], Any], warmup: int) -> Callable[[optim.Optimizer], Any]:
    """Warm-up and another schedule at once."""

    def make(optimizer: optim.Optimizer) -> Any:
        return schedules.ChainedScheduler([_warmed(optimizer, warmup), other(optimizer)], optimizer)

    return make


Plain = list[Callable[[optim.Optimizer], Any]]
# Configuration, and for each model the schedule of torch that coincides with it.
SCHEDULES: dict[str, tuple[dict[str, Any], Plain]] = {
    "constant": (
        {"name": "Constant", "warmup_steps": (0, 3, 6)},
        [lambda o: schedules.ConstantLR(o, 1.0)] + [lambda o, n=n: _warmed(o, n) for n in (3, 6)],
    ),
    "cosine": (
        {"name": "cosine", "warmup_steps": (0, 3, 5), "min_lr": (0.01, 0.0, 1e-3)},
        [
            lambda o: schedules.CosineAnnealingLR(o, STEPS, 0.01),
            _then(lambda o: schedules.CosineAnnealingLR(o, STEPS - 3), 3),
            _then(lambda o: schedules.CosineAnnealingLR(o, STEPS - 5, 1e-3), 5),
        ],
    ),
    "cosine-max-steps": (
        {"name": "cosine", "warmup_steps": 0, "min_lr": 0.0, "max_steps": (STEPS, 30, 40)},
        [lambda o, n=n: schedules.CosineAnnealingLR(o, n) for n in (STEPS, 30, 40)],
    ),
    "linear": (
        {"name": "linear", "warmup_steps": (0, 3, 0), "min_lr": (0.01, 0.002, 0.0), "max_steps": (10, 15, None)},
        [
            lambda o: schedules.LinearLR(o, 1.0, 0.1, 10),
            _then(lambda o: schedules.LinearLR(o, 1.0, 0.1, 12), 3),
            lambda o: schedules.LinearLR(o, 1.0, 0.0, STEPS),
        ],
    ),
    "step": (
        {"name": "step", "warmup_steps": (0, 0, 6), "step_size": (1, 2, 3), "gamma": (0.5, 0.3, 0.9), "min_lr": 0.0},
        [
            lambda o: schedules.StepLR(o, PER_EPOCH, 0.5),
            lambda o: schedules.StepLR(o, 2 * PER_EPOCH, 0.3),
            _with(lambda o: schedules.StepLR(o, 3 * PER_EPOCH, 0.9), 6),
        ],
    ),
    "multistep": (
        {"name": "MULTISTEP", "warmup_steps": (0, 2, 0), "milestones": ([1, 3], [2], [1, 2, 4]), "min_lr": 0.0},
        [
            lambda o: schedules.MultiStepLR(o, [PER_EPOCH, 3 * PER_EPOCH]),
            _with(lambda o: schedules.MultiStepLR(o, [2 * PER_EPOCH]), 2),
            lambda o: schedules.MultiStepLR(o, [PER_EPOCH, 2 * PER_EPOCH, 4 * PER_EPOCH]),
        ],
    ),
    "exponential": (
        {"name": "exponential", "warmup_steps": 0, "gamma": (0.5, 0.9, 1.1), "min_lr": 0.0},
        [lambda o, g=g: schedules.StepLR(o, PER_EPOCH, g) for g in (0.5, 0.9, 1.1)],
    ),
    "cyclic": (
        {"name": "cyclic", "custom_params": {"base_lr": (0.01, 0.001, 0.0), "step_size_up": (2, 3, 4)}},
        [
            lambda o, b=b, n=n, r=r: schedules.CyclicLR(o, b, r, step_size_up=n)
            for b, n, r in ((0.01, 2, 0.1), (0.001, 3, 0.02), (0.0, 4, 0.05))
        ],
    ),
    "one_cycle": (
        {"name": "one-cycle", "max_steps": (STEPS, 25, None), "custom_params": {"pct_start": (0.3, 0.5, 0.2)}},
        [
            lambda o, p=p, n=n, r=r: schedules.OneCycleLR(o, r, total_steps=n, pct_start=p)
            for p, n, r in ((0.3, STEPS, 0.1), (0.5, 25, 0.02), (0.2, STEPS, 0.05))
        ],
    ),
    "warm_restarts": (
        {"name": "Cosine-Annealing_Warm-Restarts", "min_lr": 1e-3, "custom_params": {"T_0": (3, 4, 5), "T_mult": 2}},
        [lambda o, t=t: schedules.CosineAnnealingWarmRestarts(o, t, 2, 1e-3) for t in (3, 4, 5)],
    ),
}


def _stepped(scheduler: Any, optimizer: optim.Optimizer) -> None:
    optimizer.step()
    for one in scheduler if isinstance(scheduler, list) else [scheduler]:
        one.step()


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR's own way
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_model_has_the_rates_of_a_plain_schedule(name: str) -> None:
    settings, plain = SCHEDULES[name]
    configs = experiments({"name": "sgd", "custom_params": {"momentum": 0.9}}, settings)
    optimizer = make_optimizer(ModelBatch(models()), configs)
    scheduler, interval = make_schedulers(optimizer, configs, PER_EPOCH)
    assert interval == scheduler_interval(configs[0]) == "step"
    assert isinstance(scheduler, schedules.LambdaLR) == (name not in ("cyclic", "one_cycle", "warm_restarts"))
    alone = [optim.SGD([nn.Parameter(torch.zeros(1))], lr, momentum=0.9) for lr in RATES]
    expected = [make(own) for make, own in zip(plain, alone, strict=True)]
    seen = []
    for _ in range(STEPS + 1):
        rates = [group["lr"] for group in optimizer.param_groups]
        momenta = [group["momentum"] for group in optimizer.param_groups]
        seen.append(rates)
        assert rates == pytest.approx([own.param_groups[0]["lr"] for own in alone], rel=1e-9, abs=1e-15)
        assert momenta == pytest.approx([own.param_groups[0]["momentum"] for own in alone])
        if len(seen) <= STEPS:
            _stepped(scheduler, optimizer)
            for one, own in zip(expected, alone, strict=True):
                _stepped(one, own)
    # A schedule that never moves would agree with anything that never moves.
    assert all(len({rates[model] for rates in seen}) > 1 for model in range(name == "constant", 3))


def test_a_plateau_lowers_the_rate_of_its_model_only() -> None:
    configs = experiments({}, {"name": "Reduce-On-Plateau", "gamma": (0.5, 0.1, 0.5), "custom_params": {"patience": 0}})
    optimizer = make_optimizer(ModelBatch(models()), configs)
    scheduler, interval = make_schedulers(optimizer, configs, PER_EPOCH)
    assert interval == scheduler_interval(configs[0]) == "epoch"
    assert [type(one) for one in scheduler] == [type(scheduler[0])] * 3
    assert isinstance(scheduler[0], schedules.ReduceLROnPlateau)
    for values in ([1.0, 1.0, 1.0], [2.0, 1.0, 0.5]):
        for one, value in zip(scheduler, values, strict=True):
            one.step(value)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.002, 0.05])
    assert [one.min_lrs for one in scheduler] == [[1e-6]] * 3


def test_one_warning_of_long_warm_ups(caplog: pytest.LogCaptureFixture) -> None:
    configs = experiments({}, {"warmup_steps": (2, 1000, 3)})
    make_schedulers(make_optimizer(ModelBatch(models()), configs), configs, PER_EPOCH)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "e1: scheduler.warmup_steps: received 1000; expected at most a tenth of the 20 steps of the run, usually "
        "(and 1 more of these experiments)"
    )
    make_schedulers(make_optimizer(ModelBatch(models()), configs), configs, 10 * 1000)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("training", "checkpoint", "mode"),
    [({}, {}, "min"), ({"early_stopping_mode": "max"}, {}, "max"), ({}, {"monitor": "accuracy", "mode": "max"}, "max")],
)
def test_a_plateau_looks_where_the_trainer_looks(
    training: dict[str, Any], checkpoint: dict[str, Any], mode: str
) -> None:
    config = experiment(training=training, scheduler={"name": "reduce_on_plateau"})
    config.checkpoint = CheckpointConfig(**checkpoint)
    scheduler, _ = make_schedulers(make_optimizer(ModelBatch(models()[:1]), [config]), [config], 1)
    assert scheduler[0].mode == mode


def _rates(config: ExperimentConfig, steps: int, per_epoch: int = PER_EPOCH) -> list[float]:
    optimizer = make_optimizer(ModelBatch(models()[:1]), [config])
    scheduler, _ = make_schedulers(optimizer, [config], per_epoch)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        _stepped(scheduler, optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("training", "scheduler", "end"),
    [({}, {}, STEPS), ({"max_steps": 9}, {}, 9), ({"max_steps": 9}, {"max_steps": 12}, 12)],
)
def test_a_schedule_ends_with_the_run(name: str, training: dict[str, Any], scheduler: dict[str, Any], end: int) -> None:
    settings = {"name": name, "warmup_steps": 0, "min_lr": 0.01, **scheduler}
    rates = _rates(experiment("run", {"lr": 0.1}, settings, training), STEPS + 2)
    assert rates[end - 1] > 0.0101
    assert rates[end:] == pytest.approx([0.01] * (STEPS + 3 - end))


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "constant", "warmup_steps": 15},
        {"name": "cosine", "warmup_steps": 15},
        {"name": "step", "warmup_steps": 4, "step_size": 1},
        {"name": "multistep", "warmup_steps": 0, "milestones": [1, 2, 3]},
        {"name": "exponential", "warmup_steps": 0, "gamma": 0.01},
    ],
    ids=lambda settings: settings["name"],
)
def test_no_rate_is_below_min_lr_unless_the_learning_rate_is(settings: dict[str, Any]) -> None:
    free = min(_rates(experiment("run", {"lr": 1.0}, {**settings, "min_lr": 0.0}), STEPS))
    bounded = _rates(experiment("run", {"lr": 1.0}, {**settings, "min_lr": 0.25}), STEPS)
    assert free < 0.25 == pytest.approx(min(bounded))
    assert max(bounded) <= 1.0
    above = _rates(experiment("run", {"lr": 0.1}, {**settings, "min_lr": 0.25}), STEPS)
    assert 0 < min(above) < 0.1
    assert max(above) <= 0.1


def test_warm_up_that_outlasts_the_run_is_followed_by_the_end() -> None:
    config = experiment("run", {"lr": 1.0}, {"name": "cosine", "warmup_steps": 25, "min_lr": 0.5})
    rates = _rates(config, 26)
    assert rates[24] == pytest.approx(25 / 26)
    assert rates[25] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "polynomial"}, r"scheduler\.name: received 'polynomial'; expected one of constant, linear, cosine"),
        ({"name": "cosine", "gamma": 0.5}, r"'run'.*\n.*scheduler\.gamma: received 0\.5.*cosine does not use it"),
        ({"name": "cosine", "step_size": 3}, r"scheduler\.step_size"),
        ({"name": "step", "max_steps": 3}, r"scheduler\.max_steps"),
        ({"name": "step", "milestones": [3]}, r"scheduler\.milestones"),
        ({"name": "cyclic", "warmup_steps": 7, "custom_params": {"base_lr": 0.1}}, r"scheduler\.warmup_steps"),
        ({"name": "cyclic", "min_lr": 0.1, "custom_params": {"base_lr": 0.1}}, r"scheduler\.min_lr"),
        ({"name": "cosine", "custom_params": {"T_max": 3}}, r"scheduler\.custom_params: received {'T_max': 3}"),
        ({"name": "step", "step_size": 0}, r"scheduler\.step_size: received 0; expected more than 0"),
        ({"name": "exponential", "gamma": -0.5}, r"scheduler\.gamma: received -0\.5; expected more than 0"),
        ({"name": "multi_step"}, r"scheduler\.name"),
        ({"name": "Multistep"}, r"scheduler\.milestones: received \[\]"),
        ({"name": "cyclic"}, r"scheduler\.custom_params\.base_lr: received nothing; cyclic needs it"),
        ({"name": "cosine_annealing_warm_restarts"}, r"scheduler\.custom_params\.T_0: received nothing"),
        (
            {"name": "one_cycle", "custom_params": {"max_lr": 1.0}},
            r"custom_params\.max_lr.*as optimizer\.learning_rate",
        ),
        (
            {"name": "one_cycle", "custom_params": {"total_steps": 9}},
            r"custom_params\.total_steps.*scheduler\.max_steps",
        ),
        ({"name": "one_cycle", "max_steps": STEPS - 1}, r"scheduler\.max_steps: received 19; expected at least 20"),
        (
            {"name": "reduce_on_plateau", "custom_params": {"factor": 0.5}},
            r"custom_params\.factor.*as scheduler\.gamma",
        ),
        ({"name": "reduce_on_plateau", "custom_params": {"patienc": 5}}, r"patienc: .*options of reduce_on_plateau"),
        ({"name": "reduce_on_plateau", "gamma": 1.5}, r"reduce_on_plateau.*Factor should be < 1"),
        ({"name": "cyclic", "custom_params": {"base_lr": 0.1, "mode": "odd"}}, "mode is invalid"),
    ],
)
def test_what_the_schedule_cannot_take_is_refused(settings: dict[str, Any], message: str) -> None:
    config = experiment(scheduler=settings)
    optimizer = make_optimizer(ModelBatch(models()[:1]), [config])
    with pytest.raises(ConfigurationError, match=f"(?s){message}"):
        make_schedulers(optimizer, [config], PER_EPOCH)


def test_without_a_schedule_there_is_no_scheduler() -> None:
    configs = experiments({})
    made = make_schedulers(make_optimizer(ModelBatch(models()), configs), configs, 1)
    assert made == (None, scheduler_interval(configs[0])) == (None, "epoch")


@pytest.mark.parametrize(("batches", "accumulation", "steps"), [(8, 1, 8), (8, 4, 2), (9, 4, 3), (1, 4, 1)])
def test_optimizer_steps_of_an_epoch(batches: int, accumulation: int, steps: int, tmp_path: Path) -> None:
    assert optimizer_steps(batches, accumulation) == steps
    model = nn.Linear(2, 1)
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1, gradient_accumulation_steps=accumulation)
    trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    trainer.fit(model, optim.SGD(model.parameters(), 0.1), [(torch.ones(2, 2), torch.ones(2, 1))] * batches)
    assert trainer.global_step == steps


@pytest.mark.parametrize("backend", ["torch", pytest.param("jax", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["cosine", "multistep", "one_cycle"])
def test_a_schedule_goes_on_from_a_checkpoint(name: str, backend: str) -> None:
    settings, _ = SCHEDULES[name]
    configs = experiments({"name": "adam"}, settings)
    inputs, targets = data()

    def objects() -> tuple[Any, list[Any], Callable[[], None]]:
        batch = ModelBatch(models(), backend=backend)
        optimizer = make_optimizer(batch, configs)
        made, _ = make_schedulers(optimizer, configs, PER_EPOCH)
        schedulers = made if isinstance(made, list) else [made]
        fused = batch.make_train_step(nn.functional.mse_loss, optimizer)

        def step() -> None:
            fused(inputs, targets)
            for scheduler in schedulers:
                scheduler.step()

        return optimizer, schedulers, step

    def plain(schedulers: list[Any]) -> list[Any]:
        return [to_plain(one.state_dict(), "the scheduler") for one in schedulers]

    optimizer, schedulers, step = objects()
    for _ in range(7):
        step()
    assert [group["lr"] for group in optimizer.param_groups] != RATES
    saved = to_plain(optimizer.state_dict(), "the optimizer"), plain(schedulers)
    resumed, resumed_schedulers, resumed_step = objects()
    resumed.load_state_dict(saved[0])
    for one, state in zip(resumed_schedulers, saved[1], strict=True):
        one.load_state_dict(with_types_of(state, one.state_dict()))
    for _ in range(STEPS - 7):
        step()
        resumed_step()
        assert_identical([g["lr"] for g in resumed.param_groups], [g["lr"] for g in optimizer.param_groups])
    assert_identical(plain(resumed_schedulers), plain(schedulers))
