"""Some models of a checkpoint, several checkpoints joined, one model alone: each goes on as in the run of all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler as schedules

from mb_torch import GradScaler, ModelBatch, OptimizerFactory
from tests.compare import assert_close
from tests.training_runs import Recorder, assert_identical, make_loader
from trainers.checkpoints.files import checkpoint_timeout, read_checkpoint, to_plain, write_checkpoint
from trainers.checkpoints.slices import join, model_content, num_models, select_models
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.reproducibility import seed_everything
from trainers.settings import GenericTrainerConfig

EPOCHS, PER_EPOCH = 4, 4
# Model 3 does not learn, and is stopped for it.
RATES = [0.01, 0.02, 0.03, 0.0]
ALL = [0, 1, 2, 3]
BACKENDS = ["torch", pytest.param("jax", marks=pytest.mark.long)]


def noisy() -> nn.Module:
    # A bias before BatchNorm has no gradient but rounding, which Adam magnifies.
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 1))


def silent() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))


def _schedule(kind: str, optimizer: Any, models: list[int]) -> Any:
    """No scheduler, one for each model, or one for all."""
    if kind == "each":
        configs = [{"step_size": 1 + model, "gamma": 0.9} for model in models]
        return OptimizerFactory(optim.Adam).create_lr_scheduler(optimizer, schedules.StepLR, configs)
    if kind == "all":
        return schedules.LambdaLR(optimizer, [lambda epoch, model=model: 0.9 ** (epoch * model) for model in models])
    return None


def train(
    folder: Path,
    models: list[int],
    *,
    start: dict[str, Any] | None = None,
    backend: str = "torch",
    make: Callable[[], nn.Module] = noisy,
    schedule: str = "all",
    stop_at: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train some of four models to the end, from the beginning or from a checkpoint; returns the last checkpoint."""
    seed_everything(0)
    batch = ModelBatch([make() for _ in ALL], backend=backend, seeds=[11, 12, 13, 14])
    if models != ALL:
        batch = batch.select(models)
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, [{"lr": RATES[model]} for model in models])
    own = {"early_stopping_patience": 2, "save_every_n_steps": 1, "save_top_k": -1, "max_epochs": EPOCHS}
    config = GenericTrainerConfig(**{"checkpoint_dir": str(folder), **own, **settings})
    trainer = Recorder(config, {}, stop_at)
    seed_everything(1)
    if start is not None:
        trainer.load_checkpoint(written(start, folder.with_suffix(".ckpt")))
    trainer.fit(
        batch, optimizer, make_loader("shuffled"), make_loader("list")[:2], _schedule(schedule, optimizer, models)
    )
    return read_checkpoint(folder / "latest.ckpt")


def written(content: dict[str, Any], path: Path) -> Path:
    """Write and hand back the path: what cannot be written or read again is no checkpoint."""
    write_checkpoint(content, path, time.monotonic() + 60, lambda: checkpoint_timeout(60))
    return path


def at(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint after a step; after the last one of an epoch it is that of the epoch's end."""
    return read_checkpoint(folder / f"epoch_{(step - 1) // PER_EPOCH:03d}_step_{step:06d}.ckpt")


def of_models(content: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about its models, and where it stands.

    Means over the models are left out: a run counts those that are stopped at the end of an epoch in it.
    """
    keys = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict")
    resume = content["resume_state"]
    metrics = {key: value for key, value in content["metrics"].items() if "_model_" in key}
    place = (resume["phase"], resume["epoch"], resume["global_step"])
    early = _without_texts(content["early_stopping"])
    return {**{key: content[key] for key in keys}, "early_stopping": early, "metrics": metrics, "place": place}


def _without_texts(early: dict[str, Any]) -> dict[str, Any]:
    """Reasons tell losses to the last digit."""
    return {**early, "stopped": sorted(early["stopped"])}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("step", "schedule"),
    [
        (6, "each"),
        (8, "all"),
        (11, "none"),
        *(pytest.param(*own, marks=pytest.mark.long) for own in [(3, "all"), (12, "each")]),
    ],
)
def test_a_selection_goes_on_as_in_the_run_of_all(step: int, schedule: str, backend: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", ALL, schedule=schedule, backend=backend)
    assert 3 in whole["early_stopping"]["stopped"]
    assert 2 not in whole["early_stopping"]["stopped"]
    for chosen in ([2, 0], [3, 2], [1]):
        start = select_models(at(tmp_path / "whole", step), chosen)
        name = "-".join(map(str, chosen))
        end = train(tmp_path / name, chosen, start=start, schedule=schedule, backend=backend)
        assert_close(of_models(end), of_models(select_models(whole, chosen)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selection_goes_on_within_a_validation(backend: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", ALL, backend=backend)
    # The first batch of the second validation.
    stopped = train(tmp_path / "stopped", ALL, backend=backend, stop_at=10)
    assert stopped["resume_state"]["phase"] == "VAL_BATCH_END"
    end = train(tmp_path / "end", [2, 3], start=select_models(stopped, [2, 3]), backend=backend)
    assert_close(of_models(end), of_models(select_models(whole, [2, 3])), atol=1e-6, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [("torch", "jax"), ("jax", "torch")])
def test_a_selection_goes_on_on_the_other_backend(before: str, after: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", ALL, make=silent, backend=before)
    start = select_models(at(tmp_path / "whole", 6), [2, 0])
    end = train(tmp_path / "end", [2, 0], start=start, make=silent, backend=after)
    assert_close(of_models(end), of_models(select_models(whole, [2, 0])), atol=1e-5, rtol=1e-4)


def test_the_same_models_in_the_same_order_are_bit_identical(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", ALL)
    end = train(tmp_path / "end", ALL, start=select_models(at(tmp_path / "whole", 6), ALL))
    assert_identical(of_models(end), of_models(whole))


def test_selections_of_selections_are_selections(tmp_path: Path) -> None:
    train(tmp_path / "run", ALL, max_epochs=2)
    for step in (7, 8):
        content = at(tmp_path / "run", step)
        twice = select_models(select_models(content, [3, 1, 2]), [2, 0])
        assert_identical(twice, select_models(content, [2, 3]))
        assert num_models(twice) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("step", "schedule"), [pytest.param(6, "all", marks=pytest.mark.long), (8, "each")])
def test_joined_slices_go_on_as_in_the_run_of_all(step: int, schedule: str, backend: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", ALL, schedule=schedule, backend=backend)
    content = at(tmp_path / "whole", step)
    paths = [
        written(select_models(content, chosen), tmp_path / f"{index}.ckpt")
        for index, chosen in enumerate(([2, 0], [3], [1]))
    ]
    joined = join([read_checkpoint(path) for path in paths])
    # Means over the models are summed up in another order.
    assert_close(joined, select_models(content, [2, 0, 3, 1]), atol=0, rtol=1e-12)
    assert_identical(joined["model_state_dict"], select_models(content, [2, 0, 3, 1])["model_state_dict"])
    end = train(tmp_path / "end", [2, 0, 3, 1], start=joined, schedule=schedule, backend=backend)
    assert_close(of_models(end), of_models(select_models(whole, [2, 0, 3, 1])), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["all", "each", "none"])
@pytest.mark.parametrize("step", [6, 8])
def test_single_models_joined_are_what_they_were(schedule: str, step: int, tmp_path: Path) -> None:
    train(tmp_path / "run", ALL, schedule=schedule, max_epochs=2)
    content = at(tmp_path / "run", step)
    joined = join([select_models(content, [model]) for model in ALL])
    assert_close({**joined, "best": content["best"]}, content, atol=0, rtol=1e-12)
    assert join([content]) == content


def test_what_diverged_models_measure_is_not_in_means(tmp_path: Path) -> None:
    content = train(tmp_path / "run", ALL, max_epochs=1)
    stopped = {"best": [0.1, 0.2, 0.3, 0.4], "waited": [0, 0, 2, 0], "stopped": {2: "loss nan"}, "diverged": [2]}
    metrics = {
        "loss": 1.0,
        "lr": 0.5,
        **{f"loss_model_{model}": value for model, value in enumerate([1, 3, math.nan, 5])},
    }
    content = {**content, "early_stopping": stopped, "metrics": metrics}
    selected = select_models(content, [2, 3, 1])
    expected = {"best": [0.3, 0.4, 0.2], "waited": [2, 0, 0], "stopped": {0: "loss nan"}, "diverged": [0]}
    assert selected["early_stopping"] == expected
    assert selected["metrics"]["loss"] == 4.0
    assert selected["metrics"]["lr"] == 0.5
    assert list(selected["metrics"]) == ["loss", "lr", "loss_model_0", "loss_model_1", "loss_model_2"]
    assert selected["metrics"]["loss_model_1"] == 5
    assert math.isnan(select_models(content, [2])["metrics"]["loss"])
    assert join([selected, select_models(content, [0])])["early_stopping"]["stopped"] == {0: "loss nan"}
    assert join([select_models(content, [0]), selected])["early_stopping"]["stopped"] == {1: "loss nan"}
    assert join([select_models(content, [0]), selected])["early_stopping"]["diverged"] == [1]
    assert join([select_models(content, [0]), selected])["metrics"]["loss"] == 3.0
    # One that stopped early counts on.
    early = select_models({**content, "early_stopping": {**stopped, "stopped": {1: "ready", 2: "loss nan"}}}, [2, 3, 1])
    assert early["metrics"]["loss"] == 4.0


def test_sums_of_the_epoch_are_those_of_the_models(tmp_path: Path) -> None:
    train(tmp_path / "run", ALL, max_epochs=1)
    content = at(tmp_path / "run", 3)
    train_state = select_models(content, [3, 0])["resume_state"]["train"]
    before = content["resume_state"]["train"]["additional_metrics"]["model_sums"]["loss"]
    sums = train_state["additional_metrics"]
    assert_identical(sums["model_sums"]["loss"], before[[3, 0]])
    assert sums["sums"]["loss"] == train_state["loss_sum"] == pytest.approx(float(before[[3, 0]].mean()))
    assert train_state["loss_sum"] != content["resume_state"]["train"]["loss_sum"]
    own = model_content(content, 3)["resume_state"]["train"]
    assert own["additional_metrics"]["sums"] == {"loss": own["loss_sum"]} == {"loss": float(before[3])}
    assert own["additional_metrics"]["counts"] == {"loss": 3}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [6, pytest.param(8, marks=pytest.mark.long)])
def test_one_model_goes_on_alone(step: int, backend: str, tmp_path: Path) -> None:
    """With a plain module, optimizer and scheduler, as the trainer of single models has them."""
    whole = train(tmp_path / "whole", ALL, make=silent, schedule="each", backend=backend)
    for chosen in (2, 3):
        own = model_content(at(tmp_path / "whole", step), chosen)
        model = silent()
        optimizer = optim.Adam(model.parameters(), RATES[chosen])
        scheduler = schedules.StepLR(optimizer, 1 + chosen, 0.9)
        folder = tmp_path / str(chosen)
        settings = {"early_stopping_patience": 2, "max_epochs": EPOCHS}
        trainer = GenericTrainer(
            GenericTrainerConfig(checkpoint_dir=str(folder), **settings), loss_fn=nn.functional.mse_loss
        )
        trainer.load_checkpoint(written(own, tmp_path / f"{chosen}.ckpt"))
        trainer.fit(model, optimizer, make_loader("shuffled"), make_loader("list")[:2], scheduler)
        end = read_checkpoint(folder / "latest.ckpt")
        expected = model_content(whole, chosen)
        assert bool(end["early_stopping"]["stopped"]) == (chosen == 3)
        keys = ["model_state_dict"]
        if chosen != 3:
            # A model that has stopped ends its run.
            keys += ["metrics", "optimizer_state_dict"]
        close = {"atol": 1e-5, "rtol": 1e-4}
        assert_close(_without_texts(end["early_stopping"]), _without_texts(expected["early_stopping"]), **close)
        for key in keys:
            assert_close(_plain_options(end[key]), _plain_options(expected[key]), **close)


def _plain_options(state: dict[str, Any]) -> dict[str, Any]:
    """Without the options by which a class of torch chooses between its implementations."""
    if "param_groups" not in state:
        return state
    groups = [{k: v for k, v in group.items() if k not in ("foreach", "fused")} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("optimizer_cls", "options"),
    [(optim.Adam, {}), (optim.SGD, {"momentum": 0.9}), (optim.SGD, {}), (optim.Adagrad, {}), (optim.Rprop, {})],
    ids=["adam", "momentum", "sgd", "adagrad", "rprop"],
)
def test_plain_objects_load_what_is_one_model_s(
    optimizer_cls: type[optim.Optimizer], options: dict[str, Any], backend: str, tmp_path: Path
) -> None:
    def make() -> nn.Module:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        first.bias.requires_grad_(False)
        return nn.Sequential(first, nn.BatchNorm1d(3), nn.Dropout(0.3), second, nn.Linear(3, 1))

    batch = ModelBatch([make() for _ in range(3)], seeds=[1, 2, 3], backend=backend)
    optimizer = OptimizerFactory(optimizer_cls).create_optimizer(batch, [{"lr": lr, **options} for lr in RATES[:3]])
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1)
    trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
    trainer.fit(batch, optimizer, make_loader("list"))
    content = read_checkpoint(tmp_path / "latest.ckpt")
    for index in range(3):
        own = read_checkpoint(written(model_content(content, index), tmp_path / "own.ckpt"))
        assert_identical(own["optimizer_state_dict"], to_plain(optimizer.model_state_dict(index), ""))
        model = make()
        model.load_state_dict(own["model_state_dict"])
        assert_identical(dict(model.state_dict()), dict(batch.model(index).state_dict()))
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        alone = optimizer_cls(trainable, **options)
        alone.load_state_dict(own["optimizer_state_dict"])
        assert alone.param_groups[0]["lr"] == RATES[index]
        model(torch.ones(4, 3)).sum().backward()
        alone.step()
        assert own["random_stream"] == {"seed": index + 1, "step": 4}
        assert own["metrics"] == {"loss": trainer.model_metrics["loss"][index]}


def test_a_slice_does_not_hold_the_others_memory(tmp_path: Path) -> None:
    content = train(tmp_path / "run", ALL, max_epochs=1)

    def check(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
            return 1
        entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return sum(map(check, entries))

    keys = ("model_state_dict", "optimizer_state_dict", "resume_state")
    with pytest.raises(AssertionError):
        check(content["optimizer_state_dict"])
    for own in (model_content(content, 1), select_models(content, [1, 2])):
        assert sum(check(own[key]) for key in keys) > 20


Make = Callable[[optim.Optimizer], Any]
OVER_ALL: dict[str, Make] = {
    "step": lambda o: schedules.StepLR(o, 2),
    "multistep": lambda o: schedules.MultiStepLR(o, [2, 3, 5]),
    "lambda": lambda o: schedules.LambdaLR(o, [lambda e, k=k: 1 / (1 + k * e) for k in range(len(o.param_groups))]),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.9, patience=0, min_lr=[0.001] * len(o.param_groups)),
    "one_cycle": lambda o: schedules.OneCycleLR(o, [2 * g["lr"] for g in o.param_groups], total_steps=12),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.01, 0.5, step_size_up=2),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o, 0.5, 2), schedules.ExponentialLR(o, 0.5)], [2]
    ),
    "chain": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.5, 2), schedules.ExponentialLR(o, 0.5)]),
}


def _plain_groups(rates: list[float]) -> optim.Optimizer:
    return optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates], momentum=0.9)


def _stepped(optimizer: optim.Optimizer, scheduler: Any, times: int) -> list[list[float]]:
    seen = []
    for step in range(times):
        optimizer.step()
        scheduler.step(*([float(step % 2)] if isinstance(scheduler, schedules.ReduceLROnPlateau) else []))
        seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint of three models."""
    content = train(tmp_path_factory.mktemp("three") / "run", ALL, max_epochs=1, schedule="none")
    return select_models(content, [0, 1, 2])


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step", "ignore:Detected call of `lr_sched")
@pytest.mark.parametrize("name", OVER_ALL)
def test_every_scheduler_of_all_models(name: str, three: dict[str, Any]) -> None:
    rates = [0.1, 0.2, 0.4]
    optimizer = _plain_groups(rates)
    scheduler = OVER_ALL[name](optimizer)
    _stepped(optimizer, scheduler, 3)
    content = {**three, "scheduler_state_dict": [to_plain(scheduler.state_dict(), "it")]}
    selected = select_models(content, [2, 0])
    fewer = _plain_groups([0.4, 0.1])
    resumed = OVER_ALL[name](fewer)
    if name == "lambda":
        resumed.lr_lambdas = [scheduler.lr_lambdas[2], scheduler.lr_lambdas[0]]
    (state,) = selected["scheduler_state_dict"]
    resumed.load_state_dict(dict(state))  # CyclicLR takes an entry out of it
    for group, model in zip(fewer.param_groups, [2, 0], strict=True):
        group.update({key: value for key, value in optimizer.param_groups[model].items() if key != "params"})
    joined = join([selected, select_models(content, [1])])["scheduler_state_dict"]
    assert_identical(joined, select_models(content, [2, 0, 1])["scheduler_state_dict"])
    expected = _stepped(optimizer, scheduler, 6)
    assert len({tuple(seen) for seen in expected}) > 1
    assert _stepped(fewer, resumed, 6) == [[seen[2], seen[0]] for seen in expected]


def test_two_schedulers_of_all_models_and_one_that_does_not_say(three: dict[str, Any]) -> None:
    optimizer = _plain_groups([0.1, 0.2, 0.4])
    both = [schedules.StepLR(optimizer, 2), schedules.ExponentialLR(optimizer, 0.5)]
    content = {**three, "scheduler_state_dict": [to_plain(one.state_dict(), "it") for one in both]}
    assert [state["base_lrs"] for state in select_models(content, [2, 0])["scheduler_state_dict"]] == [[0.4, 0.1]] * 2
    # As many schedulers as models, and yet each of them of all.
    two = select_models(content, [2, 0])
    assert [state["base_lrs"] for state in select_models(two, [1])["scheduler_state_dict"]] == [[0.1]] * 2
    joined = join([two, select_models(content, [1])])
    assert [state["base_lrs"] for state in joined["scheduler_state_dict"]] == [[0.4, 0.1, 0.2]] * 2
    content = {**three, "scheduler_state_dict": [{"steps": 5}]}
    assert select_models(content, [1])["scheduler_state_dict"] == [{"steps": 5}]
    content = {**three, "scheduler_state_dict": [{"base_lrs": [0.1]}, {"base_lrs": [0.1]}]}
    with pytest.raises(TrainerError, match=r"received 2 over \[1\] parameter groups; expected one for each of 3"):
        select_models(content, [1])


def test_schedulers_of_several_classes_go_with_their_models(tmp_path: Path) -> None:
    def fit(folder: Path, kinds: str, start: dict[str, Any] | None = None) -> dict[str, Any]:
        batch = ModelBatch([silent() for _ in kinds])
        factory = OptimizerFactory(optim.Adam)
        optimizer = factory.create_optimizer(batch, [{"lr": 0.1}] * len(kinds))
        steps = factory.create_lr_scheduler(optimizer, schedules.StepLR, [{"step_size": 1}] * len(kinds))
        decays = factory.create_lr_scheduler(optimizer, schedules.ExponentialLR, [{"gamma": 0.9}] * len(kinds))
        own = [(steps if kind == "s" else decays)[model] for model, kind in enumerate(kinds)]
        config = GenericTrainerConfig(checkpoint_dir=str(folder), max_epochs=1 if start is None else 2)
        trainer = GenericTrainer(config, loss_fn=nn.functional.mse_loss)
        if start is not None:
            trainer.load_checkpoint(written(start, folder.with_suffix(".ckpt")))
        trainer.fit(batch, optimizer, make_loader("list"), None, own)
        return read_checkpoint(folder / "latest.ckpt")

    content = fit(tmp_path / "all", "see")
    names = {"s": "StepLR", "e": "ExponentialLR"}
    assert content["classes"]["schedulers"] == [names[kind] for kind in "see"]
    assert model_content(content, 0)["classes"]["schedulers"] == ["StepLR"]
    some, rest = select_models(content, [1, 2]), select_models(content, [0])
    for name, kinds, start in (("some", "ee", some), ("joined", "ees", join([some, rest]))):
        assert start["classes"]["schedulers"] == [names[kind] for kind in kinds]
        assert fit(tmp_path / name, kinds, start)["global_step"] == 8
    with pytest.raises(TrainerError, match="the scheduler 0 at resume .* received StepLR; expected ExponentialLR"):
        fit(tmp_path / "mixed", "see", join([some, rest]))


def test_loss_scales_go_with_their_models(three: dict[str, Any]) -> None:
    scaler = GradScaler(3, growth_interval=5)
    scaler.record(torch.tensor([True, False, True]))
    scaler.record(torch.tensor([True, True, False]))
    content = {**three, "scaler_state_dict": scaler.state_dict()}
    selected = select_models(content, [2, 0])["scaler_state_dict"]
    fewer = GradScaler(2)
    fewer.load_state_dict(selected)
    assert_identical(fewer.scales, scaler.scales[[2, 0]])
    assert fewer.growth_tracker.tolist() == [0, 2]
    assert fewer.growth_interval == 5
    joined = join([select_models(content, [model]) for model in range(3)])["scaler_state_dict"]
    assert_identical(joined, scaler.state_dict())
    alone = torch.amp.GradScaler("cpu")
    alone.load_state_dict(model_content(content, 1)["scaler_state_dict"])
    assert alone.get_scale() == 32768.0
    assert alone.state_dict()["_growth_tracker"] == 1
    assert alone.get_growth_interval() == 5
    assert model_content({**three, "scaler_state_dict": {}}, 1)["scaler_state_dict"] == {}


def test_a_batch_that_is_trained_by_ones_own_step(tmp_path: Path) -> None:
    class Own(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            losses = self.model.compute_loss(self.model(batch[0]), batch[1], _loss, reduction="none")
            return {"val_loss": losses}

    batch = ModelBatch([silent() for _ in range(3)])
    optimizer = OptimizerFactory(optim.Adam).create_optimizer(batch, [{}] * 3)
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), early_stopping_patience=9, max_epochs=2)
    Own(config, {}).fit(batch, optimizer, make_loader("list"), make_loader("list"))
    content = read_checkpoint(tmp_path / "latest.ckpt")
    best = content["early_stopping"]["best"]
    assert len(best) == 3
    parts = [select_models(content, [2, 0]), select_models(content, [1])]
    assert [part["early_stopping"]["best"] for part in parts] == [[best[2], best[0]], [best[1]]]
    assert join(parts)["early_stopping"]["best"] == [best[2], best[0], best[1]]


@pytest.mark.parametrize("indices", [[], [0, 0], [3], [-1], [True], [0.0]], ids=repr)
def test_models_that_are_not_there(indices: list[Any], three: dict[str, Any]) -> None:
    with pytest.raises(TrainerError, match="expected numbers from 0 to 2, each once"):
        select_models(three, indices)
    if len(indices) == 1:
        with pytest.raises(TrainerError, match="expected numbers from 0 to 2"):
            model_content(three, indices[0])


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    # Looks like the state of one model.
    with pytest.raises(TrainerError, match=r"state of \['weight'\]; expected a ModelBatch"):
        num_models({"model_state_dict": {"weight": torch.ones(1, 1)}, "optimizer_state_dict": None})
    model = silent()
    trainer = GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path / "one"), max_epochs=1), loss_fn=_loss)
    trainer.fit(model, optim.Adam(model.parameters()), make_loader("list"))
    with pytest.raises(TrainerError, match=r"state of \['0.weight', .*expected a ModelBatch"):
        select_models(read_checkpoint(tmp_path / "one" / "latest.ckpt"), [0])
    batch = ModelBatch([silent() for _ in range(3)])
    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path / "batch"), max_epochs=1, save_every_n_epochs=None)
    GenericTrainer(config, loss_fn=_loss).fit(batch, optim.Adam(batch.parameters()), make_loader("list"))
    with pytest.raises(TrainerError, match="received 1 parameter groups; expected 3, one per model"):
        model_content(read_checkpoint(tmp_path / "batch" / "latest.ckpt"), 0)


_loss = nn.functional.mse_loss


def test_a_checkpoint_without_optimizer_and_scheduler(tmp_path: Path) -> None:
    content = train(tmp_path / "run", ALL, max_epochs=1)
    content |= {"optimizer_state_dict": None, "scheduler_state_dict": None}
    joined = join([select_models(content, [2, 0]), select_models(content, [1])])
    assert joined["optimizer_state_dict"] is joined["scheduler_state_dict"] is None
    assert model_content(content, 0)["optimizer_state_dict"] is None


def _changed(content: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    """A copy with another value at one place."""
    key, *rest = path
    old = content[key]
    new = to if not rest else _changed(old, *rest, to=to)
    if isinstance(content, list):
        return [new if index == key else entry for index, entry in enumerate(content)]  # type: ignore[return-value]
    return {**content, key: new}


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        (("resume_state", "global_step"), 5, "different places: global_step: received 5; expected 6, as in the first"),
        (("resume_state", "epoch"), 5, "different places: epoch: received 5; expected 1"),
        (("resume_state", "phase"), "EPOCH_END", "different places: phase: received 'EPOCH_END'"),
        (("resume_state", "train", "batch_idx"), 5, r"train\.batch_idx: received 5; expected 2"),
        (("resume_state", "train"), None, r"different places: train\.batch_idx"),
        (("resume_state", "rng", "torch_state"), torch.zeros(1), "different places: rng: received another one"),
        (("loader_state", "epoch_start_rng", "python_state"), [], "different places: loader_state"),
        (("loader_state", "train_is_over"), True, "different places: loader_state"),
        (("other_ranks",), [{}], "different places: other_ranks"),
        (("model_state_dict", "stack.0.weight"), torch.zeros(1, 9, 9), r"their models: received \['stack.0.weight'\]"),
        (
            ("model_state_dict", "stack.0.weight"),
            torch.zeros(1, 5, 3).double(),
            r"models: received \['stack.0.weight'\]",
        ),
        (("model_state_dict", "stack.more"), torch.zeros(1), r"models: received \['stack.more'\]"),
        (("optimizer_state_dict",), None, "differ in optimizer_state_dict: received in some of them only"),
        (("optimizer_state_dict", "param_groups", 0, "momentum"), 0.9, "differ in their optimizers"),
        (("optimizer_state_dict", "param_groups", 0, "params"), [0], "their optimizers: received 1 parameters"),
        (("scheduler_state_dict",), None, "differ in scheduler_state_dict"),
        (("scheduler_state_dict", 0, "last_epoch"), 7, "'last_epoch' of a scheduler of all models"),
        (("scheduler_state_dict", 0, "gamma"), 7, "differ in their schedulers"),
        (("scheduler_state_dict",), [{"base_lrs": [0.1]}] * 2, r"their schedulers: received \[1, 2\] of them"),
        (("metrics",), {"loss": 1.0}, "differ in metrics"),
        (("resume_state", "train", "additional_metrics", "counts"), {"loss": 9}, "numbers of batches"),
    ],
)
def test_what_cannot_be_joined(path: tuple[Any, ...], to: Any, message: str, six: dict[str, Any]) -> None:
    first, second = select_models(six, [2, 0]), select_models(six, [1])
    assert num_models(join([first, second])) == 3
    if path[0] == "model_state_dict" and path[1] not in second["model_state_dict"]:
        second["model_state_dict"][path[1]] = to
    elif path[-1] in ("momentum", "gamma"):
        second = _changed(second, *path[:-1], to={**_at(second, path[:-1]), path[-1]: to})
    else:
        second = _changed(second, *path, to=to)
    with pytest.raises(TrainerError, match=message):
        join([first, second])


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint in the middle of the second epoch."""
    folder = tmp_path_factory.mktemp("six") / "run"
    train(folder, ALL, max_epochs=2)
    return at(folder, 6)


def test_schedulers_of_two_kinds_cannot_be_joined(tmp_path: Path) -> None:
    each, of_all = (
        select_models(train(tmp_path / kind, ALL, schedule=kind, max_epochs=1), [0, 1]) for kind in ("each", "all")
    )
    of_all = {**each, "scheduler_state_dict": of_all["scheduler_state_dict"]}
    with pytest.raises(TrainerError, match="one for each model in some, for all in others"):
        join([each, of_all])
    with pytest.raises(TrainerError, match="received none; expected at least one"):
        join([])


def test_loss_scaling_of_two_kinds_cannot_be_joined(three: dict[str, Any]) -> None:
    one = {**select_models(three, [0]), "scaler_state_dict": GradScaler(1).state_dict()}
    other = {**one, "scaler_state_dict": GradScaler(1, growth_interval=7).state_dict()}
    with pytest.raises(TrainerError, match="differ in loss scaling: .*'growth_interval': 7"):
        join([one, other])
    with pytest.raises(TrainerError, match="differ in scaler_state_dict"):
        join([one, {**one, "scaler_state_dict": None}])


def test_metrics_that_are_not_per_model(three: dict[str, Any]) -> None:
    first, second = select_models(three, [0, 1]), select_models(three, [2])
    first["metrics"]["temperature"], second["metrics"]["temperature"] = 1.0, 4.0
    assert join([first, second])["metrics"]["temperature"] == 2.0
    assert model_content(first, 0)["metrics"]["temperature"] == 1.0
    first["metrics"]["temperature"] = "warm"
    with pytest.raises(TrainerError, match="a metric that is no number"):
        join([first, second])
