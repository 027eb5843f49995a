"""The training step on the default backend: fallbacks, gradients, memory, and what it leaves behind."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mb_torch import GradScaler, InvalidInput, ModelBatch, OptimizerFactory, Unsupported, make_joint_step
from tests.compare import assert_close, assert_equal
from tests.parity.loop import as_tree, batch_ended, sgd_config, train_alone

INPUTS = torch.linspace(-1, 1, 24).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])
BATCHES = [(INPUTS * (step + 1), LABELS.roll(step)) for step in range(3)]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd_for(mb: ModelBatch) -> torch.optim.Optimizer:
    configs = [sgd_config(index) for index in range(mb.num_models)]
    return OptimizerFactory(torch.optim.SGD).create_optimizer(mb, configs)


def build(make: Any, count: int = 3) -> list[nn.Module]:
    return [make() for _ in range(count)]


def everything(mb: ModelBatch, optimizer: Any, losses: Any) -> Any:
    return as_tree(batch_ended(mb, optimizer, losses))


def states(models: list[nn.Module]) -> list[dict[str, Tensor]]:
    return [dict(model.state_dict()) for model in models]


@contextmanager
def one_warning(*names: str) -> Iterator[None]:
    """Exactly one warning, which names what cannot be batched."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(entry.message) for entry in caught]
    assert len(messages) == 1, messages
    for name in (*names, "one after another"):
        assert name in messages[0]


# What vmap cannot run


class Logs(nn.Module):
    """Counts its calls in buffers, before and after it calls `.item()`."""

    def __init__(self, fail: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 3)
        self.fail = fail
        self.register_buffer("in_place", torch.tensor(0))
        self.register_buffer("replaced", torch.tensor(0.0))
        self.last = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 1
        y = self.linear(self.norm(x))
        if self.fail:
            self.last = y.mean().item()
        self.in_place += 10
        return y


class Outer(nn.Module):
    """Holds the module that cannot be batched one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"log": Logs()})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["log"](x)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"compiled": True}], ids=str)
def test_a_loop_replaces_what_vmap_cannot_run(dynamo: Any, fused: bool, options: dict[str, int]) -> None:
    """The result is right, buffers are updated once a pass, and one warning names the innermost submodule."""
    models = build(Outer)
    compiled = options.pop("compiled", False)
    mb = ModelBatch(models, **options)
    if compiled:
        mb.enable_compile(backend="eager")
    optimizer, losses = sgd_for(mb), []
    step = mb.make_train_step(F.cross_entropy, optimizer)
    with one_warning("body.log (Logs)"):
        for inputs, targets in BATCHES:
            if fused:
                losses.append(step(inputs, targets))
                continue
            optimizer.zero_grad()
            own = mb.compute_loss(mb(inputs), targets, F.cross_entropy, "none")
            own.sum().backward()
            optimizer.step()
            losses.append(own.detach())
    expected = train_alone(models, BATCHES, classify)
    assert_close(everything(mb, optimizer, losses), as_tree(expected))
    assert mb.stacked_buffers["body.log.in_place"].tolist() == [33] * 3
    assert mb.stacked_buffers["body.log.replaced"].tolist() == [3.0] * 3


def test_the_report_says_why_models_run_one_by_one() -> None:
    mb = ModelBatch(build(Logs))
    assert mb.backend_report()["runs"] == "vmap"
    with one_warning("Logs"):
        mb(INPUTS)
    assert mb.backend_report()["runs"] == "one by one"
    assert "Logs" in mb.backend_report()["reason"]


def test_the_report_lists_training_steps_apart() -> None:
    mb = ModelBatch(build(mlp))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * outputs.max().item()

    step = mb.make_train_step(loss, sgd_for(mb))
    with one_warning("the loss"):
        step(*BATCHES[0])
    report = mb.backend_report()
    assert report["runs"] == "vmap"
    (own,) = report["steps"]
    assert own["runs"] == "one by one"
    assert "the loss" in own["reason"]
    del step
    gc.collect()
    assert mb.backend_report()["steps"] == []


def test_buffers_that_change_in_evaluation_are_put_back_before_the_loop() -> None:
    class Visits(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("visits", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.visits += 1
            return super().forward(x) * (1.0 if float(self.weight.detach().sum()) > -1e9 else 0.0)

    mb = ModelBatch(build(Visits)).eval()
    with one_warning("Visits"):
        mb(INPUTS)
    assert mb.stacked_buffers["visits"].tolist() == [1.0] * 3


def test_evaluation_may_be_batched_where_training_is_not() -> None:
    class Counts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.last = x.new_zeros(()).add(self.weight.sum()).item()
            return super().forward(x)

    mb = ModelBatch(build(lambda: Counts(4, 3))).eval()
    mb(INPUTS)
    assert mb.backend_report()["runs"] == "vmap"
    assert mb.backend_report()["one_by_one"] == {}
    with one_warning("Counts"):
        mb.train()(INPUTS)
    training = mb.backend_report()
    assert training["runs"] == "one by one"
    assert "Counts" in training["reason"]
    mb.eval()(INPUTS)
    # Each mode tells its own, and both are told.
    evaluation = mb.backend_report()
    assert (evaluation["runs"], evaluation["reason"]) == ("vmap", None)
    assert training["one_by_one"] == evaluation["one_by_one"] == {"train": training["reason"]}


def test_a_layer_that_cannot_be_batched_for_a_reason_in_each_mode() -> None:
    class Modes(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            size = self.weight.sum()
            return super().forward(x) * (1 if (size.item() if self.training else size > 0) else 2)

    mb = ModelBatch(build(lambda: Modes(4, 3)))
    with one_warning("item"):
        mb(INPUTS)
    with one_warning("control flow"):
        mb.eval()(INPUTS)
    report = mb.backend_report()
    assert [*report["one_by_one"]] == ["train", "eval"]
    assert report["reason"] == report["one_by_one"]["eval"] != report["one_by_one"]["train"]
    assert mb.train().backend_report()["reason"] == report["one_by_one"]["train"]


def test_a_loss_that_cannot_be_batched_is_named() -> None:
    def logs(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        loss.item()
        return loss

    models = build(mlp)
    mb = ModelBatch(models)
    expected = torch.stack([F.cross_entropy(model(INPUTS), LABELS) for model in models])
    outputs = mb(INPUTS)
    with one_warning("the loss"):
        for _ in range(2):
            assert_close(mb.compute_loss(outputs, LABELS, logs, "none"), expected)
    assert mb.backend_report()["runs"] == "vmap"
    step = mb.make_train_step(logs, sgd_for(mb))
    with one_warning("the loss"):
        for batch in BATCHES:
            step(*batch)


@pytest.mark.parametrize("seeds", [None, [1, 2, 3]])
def test_dropout_in_a_loop_draws_for_each_model(seeds: list[int] | None) -> None:
    class Drops(Logs):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x) * 0 + 1, 0.5)

    mb = ModelBatch(build(Drops), seeds=seeds)
    with one_warning("Drops"):
        first, second = mb(INPUTS), mb(INPUTS)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_with_seeds_a_loop_draws_what_vmap_draws() -> None:
    class Drops(nn.Module):
        def __init__(self, fail: bool) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.fail = fail

        def forward(self, x: Tensor) -> Tensor:
            y = F.dropout(torch.ones_like(x), 0.5) * self.linear(x)
            if self.fail:
                y.sum().item()
            return y

    models = [Drops(fail) for fail in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    batched, looped = (ModelBatch([model] * 3, seeds=[1, 2, 3]) for model in models)
    with one_warning("Drops"):
        for _ in range(2):
            assert_close(looped(INPUTS), batched(INPUTS))


class Chosen(nn.Module):
    """Returns another structure depending on its weights."""

    def __init__(self, value: float, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = x * self.weight
        if self.weight.item() > 0:
            return y
        return (y, y) if self.kind == "structure" else y[:3]


@pytest.mark.parametrize("kind", ["structure", "shape"])
def test_models_that_return_different_forms_are_refused(kind: str) -> None:
    mb = ModelBatch([Chosen(value, kind) for value in (1.0, 2.0, -1.0)])
    with pytest.raises((Unsupported, InvalidInput), match=r"model 2.*model 0"):
        mb(INPUTS)


# Memory


def test_the_step_holds_no_graph() -> None:
    class Remembers(torch.autograd.Function):
        alive: weakref.WeakSet[Any] = weakref.WeakSet()

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            kept = x.clone()
            Remembers.alive.add(kept)
            ctx.save_for_backward(kept)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    mb = ModelBatch([nn.Linear(4, 3)])
    optimizer = sgd_for(mb)
    step = make_joint_step([mb], lambda m, x, y: F.cross_entropy(Remembers.apply(m(x)), y), [optimizer])
    losses = step(INPUTS, LABELS)
    gc.collect()
    assert not list(Remembers.alive)
    assert losses.grad_fn is None
    assert all(parameter.grad is None for parameter in mb.parameters())


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_chunks_hold_one_part_s_activations_at_a_time(chunk_size: int | None) -> None:
    """Counts the bytes that autograd saves at once; a bound on time or on a process would not repeat."""
    alive, peak = 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.numel()
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.numel()

    def deep() -> nn.Module:
        return nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.Tanh())])

    mb = ModelBatch(build(deep, 8), chunk_size=chunk_size)
    step = mb.make_train_step(F.mse_loss, sgd_for(mb))
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        step(torch.randn(1000, 4), torch.randn(1000, 4))
    of_one_model = 10 * 1000 * 4
    assert (peak > 6 * of_one_model) == (chunk_size is None)


# Scalers


def test_a_stock_scaler_skips_the_model_that_overflows() -> None:
    models = build(mlp)
    mb = ModelBatch(models, shared_input=False)
    optimizer = sgd_for(mb)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = mb.make_train_step(F.cross_entropy, optimizer, scaler=scaler)
    inputs = INPUTS.repeat(3, 1, 1)
    inputs[1] = torch.inf
    before = mb.get_model_states()[1]
    step(inputs, LABELS)
    parameters = [name for name, _ in models[1].named_parameters()]
    after = mb.get_model_states()[1]
    assert_equal({name: after[name] for name in parameters}, {name: before[name] for name in parameters})
    assert scaler.get_scale() == 128.0
    for index in (0, 2):
        train_alone(
            [models[index]], [(INPUTS, LABELS)], classify, lambda _, p, i=index: torch.optim.SGD(p, **sgd_config(i))
        )
        assert_close(dict(mb.get_model_states()[index]), dict(models[index].state_dict()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_scaler_with_accumulation_and_frozen_models(accumulate: int) -> None:
    models, results = build(mlp), []
    for scaler in (None, GradScaler(3, init_scale=64.0)):
        mb = ModelBatch(models)
        optimizer = sgd_for(mb)
        active = torch.tensor([True, False, True])
        step = mb.make_train_step(
            F.cross_entropy, optimizer, scaler=scaler, accumulate=accumulate, active=active, clip_norm=0.3
        )
        results.append(everything(mb, optimizer, [step(*batch) for batch in BATCHES[:2]]))
    assert_close(results[1], results[0])


def test_autocast_around_the_step() -> None:
    models, results = build(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))), []
    for use_autocast in (False, True):
        mb = ModelBatch(models)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=use_autocast):
            results.append(everything(mb, optimizer, [step(*batch) for batch in BATCHES]))
    assert_close(results[1], results[0], atol=3e-2, rtol=3e-2)


# Gradients that cannot be changed in place, hooks


class Addends(nn.Module):
    """Autograd gives both parameters the same gradient tensor, and the third one an expanded number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.linspace(0.5, 1, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = (x * (self.a + self.b)).sum(1, keepdim=True) + self.c.mean()
        return torch.cat([rows, -rows, 2 * rows], 1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["clip", "scaler", "stock scaler"])
def test_shared_gradients_are_scaled_once(dynamo: Any, count: int, how: str, compiled: bool) -> None:
    models = build(Addends, count)
    mb = ModelBatch(models)
    if compiled:
        mb.enable_compile(backend="eager")
    optimizer = sgd_for(mb)
    scalers = {
        "scaler": GradScaler(count, init_scale=64.0),
        "stock scaler": torch.amp.GradScaler("cpu", init_scale=64.0),
    }
    step = mb.make_train_step(
        F.cross_entropy, optimizer, clip_norm=0.01 if how == "clip" else None, scaler=scalers.get(how)
    )
    losses = [step(*batch) for batch in BATCHES]
    expected = train_alone(models, BATCHES, classify, clip_norm=0.01 if how == "clip" else None)
    assert_close(everything(mb, optimizer, losses), as_tree(expected))


def test_accumulated_gradients_stay_with_their_parameters() -> None:
    mb = ModelBatch(build(mlp))
    step = mb.make_train_step(F.cross_entropy, sgd_for(mb), accumulate=3)
    before = {name: stack.detach().clone() for name, stack in mb.stacked_params.items()}
    step(*BATCHES[0])
    mb.stacked_params["0.weight"].requires_grad_(False)
    step(*BATCHES[1])
    step.flush()
    moved = {name: not torch.equal(stack, before[name]) for name, stack in mb.stacked_params.items()}
    assert moved == {name: name != "0.weight" for name in before}


@pytest.mark.parametrize("count", [1, 3])
def test_backward_hooks_of_modules_run(count: int) -> None:
    models = build(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), count)
    mb = ModelBatch(models)
    for model in (mb.prototype, *models):
        model[1].register_full_backward_hook(lambda module, inner, outer: (0.5 * inner[0],))
    optimizer = sgd_for(mb)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    with one_warning("1 (Tanh) has backward hooks") if count > 1 else nullcontext():
        losses = [step(*batch) for batch in BATCHES]
    assert_close(everything(mb, optimizer, losses), as_tree(train_alone(models, BATCHES, classify)))


@pytest.mark.parametrize("count", [1, 3])
def test_hooks_on_stacks_run(count: int) -> None:
    mb = ModelBatch(build(mlp, count))
    stack = mb.stacked_params["0.weight"]
    stack.register_hook(lambda grad: grad * 0)
    before = stack.detach().clone()
    mb.make_train_step(F.cross_entropy, torch.optim.SGD(mb.parameters(), lr=0.1))(*BATCHES[0])
    assert_equal(stack.detach(), before)


def test_checkpointing_is_refused() -> None:
    class Checkpointed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: super(Checkpointed, self).forward(x).tanh(), x, use_reentrant=False)

    mb = ModelBatch(build(lambda: Checkpointed(4, 3), 1))
    with pytest.raises(Unsupported, match="checkpoint"):
        mb.make_train_step(F.cross_entropy, sgd_for(mb))(*BATCHES[0])


@pytest.mark.parametrize("count", [1, 3])
def test_inputs_changed_in_place_are_changed_every_time(count: int) -> None:
    class Doubles(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    mb = ModelBatch(build(lambda: Doubles(4, 3), count), shared_input=False)
    inputs = torch.ones(count, 2, 4)
    for expected in (2.0, 4.0, 8.0):
        mb(inputs)
        assert inputs.unique().tolist() == [expected]


@pytest.mark.parametrize("count", [1, 3])
def test_inference_tensors_and_tensors_passed_twice(count: int) -> None:
    class Doubles(nn.Linear):
        def forward(self, x: Tensor, again: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(again)

    models = build(lambda: Doubles(4, 3), count)
    mb = ModelBatch(models, shared_input=False)
    with torch.inference_mode():
        inputs = torch.ones(count, 2, 4)
        for expected in (2.0, 4.0, 8.0):
            outputs = mb(inputs, inputs)
            assert inputs.unique().tolist() == [expected]
            for index, model in enumerate(models):
                assert_close(outputs[index], F.linear(inputs[index], model.weight, model.bias))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks_for_all_modules_run() -> None:
    def triple(module: nn.Module, grads: Any) -> Any:
        return (grads[0] * 3,)

    handle = nn.modules.module.register_module_full_backward_pre_hook(triple)
    try:
        models = build(mlp)
        mb = ModelBatch(models)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        with pytest.warns(UserWarning, match="backward hooks for all modules"):
            loss = step(*BATCHES[0])
        expected = train_alone(models, BATCHES[:1], classify)
    finally:
        handle.remove()
    assert_close(everything(mb, optimizer, [loss]), as_tree(expected))


def test_models_whose_parameters_have_hooks_are_refused() -> None:
    models = build(mlp)
    models[1][0].weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(Unsupported, match="model 1: '0.weight' has hooks.*stacked_params"):
        ModelBatch(models)
