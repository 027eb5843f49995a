"""Mistakes that are easy to make in a batch of models, each one found in an earlier package of the same interface.

Every test fails on the behaviour that its docstring describes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from mb_torch import DataRouter, ModelBatch, OptimizerFactory

INPUTS = torch.linspace(-1, 1, 24).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5))


def train(mb: ModelBatch, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        mb.compute_loss(mb(INPUTS), LABELS, F.cross_entropy, reduction="sum").backward()
        optimizer.step()


def test_dropout_masks_change_from_pass_to_pass() -> None:
    """Wrong: the global generator is put back after a forward pass, so that every pass draws the same masks."""
    mb = ModelBatch([dropping()] * 2)
    first, second = mb(INPUTS), mb(INPUTS)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_a_forward_pass_moves_the_global_generator() -> None:
    """Wrong: a model's draws leave the global generator where it was, so later draws of the script repeat them."""
    mb = ModelBatch([dropping()] * 2)
    before = torch.get_rng_state()
    mb(INPUTS)
    assert not torch.equal(torch.get_rng_state(), before)


class Colliding(nn.Module):
    """`a.b_c.weight` and `a_b.c.weight` are one name once dots become underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b_c": nn.Linear(4, 4)})
        self.a_b = nn.ModuleDict({"c": nn.Linear(4, 4)})
        self.a["b_c"].register_buffer("n", torch.tensor(1.0))
        self.a_b["c"].register_buffer("n", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.a_b["c"](torch.tanh(self.a["b_c"](x) * self.a["b_c"].n)) * self.a_b["c"].n


def test_states_are_not_part_of_the_graph() -> None:
    """Wrong: states are results of the parameters, so they keep the graph alive and cannot be copied."""
    for state in ModelBatch([mlp()] * 2).get_model_states():
        assert all(value.is_leaf and not value.requires_grad for value in state.values())


def test_names_do_not_collide() -> None:
    """Wrong: dots in names become underscores, so one of two parameters or buffers is lost."""
    models = [Colliding() for _ in range(2)]
    mb = ModelBatch(models)
    other = ModelBatch([Colliding() for _ in range(2)])
    other.load_state_dict(mb.state_dict())
    torch.testing.assert_close(other(INPUTS)[1], models[1](INPUTS))
    assert len(list(mb.buffers())) == 2
    assert len(list(mb.parameters())) == 4
    torch.testing.assert_close(mb.double()(INPUTS.double())[1], models[1].double()(INPUTS.double()))


def test_parameters_lists_every_weight_once() -> None:
    """Wrong: the source models are kept as submodules, so `parameters()` lists every weight twice, once stale."""
    models = [mlp() for _ in range(3)]
    mb = ModelBatch(models)
    listed = sum(parameter.numel() for parameter in mb.parameters())
    assert listed == sum(parameter.numel() for model in models for parameter in model.parameters())
    assert len(list(mb.parameters())) == len(list(models[0].parameters()))
    assert sum(tensor.numel() for tensor in mb.state_dict().values()) == listed


def test_frozen_parameters_stay_frozen() -> None:
    """Wrong: every stack requires a gradient, so frozen parameters are trained."""
    models = [mlp() for _ in range(2)]
    for model in models:
        model[0].requires_grad_(False)
    mb = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.5, "weight_decay": 0.1}] * 2)
    train(mb, optimizer)
    for model, state in zip(models, mb.get_model_states(), strict=True):
        assert torch.equal(state["0.weight"], model[0].weight)
        assert not torch.equal(state["2.weight"], model[2].weight)
    assert not mb.stacked_params["0.weight"].requires_grad


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4, bias=False)
        self.decode = nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


def test_tied_weights_are_in_the_state_and_stay_tied() -> None:
    """Wrong: a tied weight has only its first name in the states, which a model then refuses to load."""
    models = [Tied() for _ in range(2)]
    mb = ModelBatch(models)
    optimizer = torch.optim.SGD(mb.parameters(), lr=0.1)
    mb.compute_loss(mb(INPUTS), INPUTS + 1, F.mse_loss, reduction="sum").backward()
    optimizer.step()
    for model, state in zip(models, mb.get_model_states(), strict=True):
        assert state.keys() == model.state_dict().keys()
        plain = torch.optim.SGD(model.parameters(), lr=0.1)
        F.mse_loss(model(INPUTS), INPUTS + 1).backward()
        plain.step()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value)
        Tied().load_state_dict(state)


def test_each_scheduler_moves_its_own_group() -> None:
    """Wrong: each of the N schedulers steps all N groups, so a step of one decays every learning rate."""
    factory = OptimizerFactory(torch.optim.SGD)
    mb = ModelBatch([mlp() for _ in range(3)])
    optimizer = factory.create_optimizer(mb, [{"lr": 1.0}, {"lr": 1.0}, {"lr": 1.0}])
    configs = [{"step_size": 1, "gamma": gamma} for gamma in (0.5, 0.1, 1.0)]
    schedulers = factory.create_lr_scheduler(optimizer, lr_scheduler.StepLR, configs)
    train(mb, optimizer, 1)
    for scheduler in schedulers:
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 1.0]


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_loading_refuses_unknown_and_missing_keys(change: str) -> None:
    """Wrong: unknown keys are skipped and missing ones leave old weights, both without a word."""
    mb = ModelBatch([mlp() for _ in range(2)])
    states = [dict(mlp().state_dict()) for _ in range(2)]
    if change == "missing":
        del states[1]["2.bias"]
    else:
        states[1]["2.extra"] = torch.zeros(3)
    before = [{key: value.detach().clone() for key, value in state.items()} for state in mb.get_model_states()]
    with pytest.raises(ValueError, match="model 1"):
        mb.load_model_states(states)
    for old, new in zip(before, mb.get_model_states(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_padding_of_routed_labels_does_not_count() -> None:
    """Wrong: missing labels are filled with class 0 and nothing says which rows are real."""
    models = [mlp() for _ in range(2)]
    mb = ModelBatch(models, shared_input=False)
    router = DataRouter(mode="indices")
    indices = [torch.tensor([1, 2, 3, 5]), torch.tensor([4])]
    inputs: Any = router.route_batch(INPUTS, indices=indices)
    labels: Any = router.route_batch(LABELS, indices=indices)
    losses = mb.compute_loss(mb(inputs), labels, F.cross_entropy, reduction="none")
    for model, loss, rows in zip(models, losses, indices, strict=True):
        torch.testing.assert_close(loss, F.cross_entropy(model(INPUTS[rows]), LABELS[rows]))


def test_padded_rows_stay_out_of_batch_statistics() -> None:
    """Wrong: rows of zeros go through BatchNorm and move means, variances and all outputs."""
    models = [nn.BatchNorm1d(4) for _ in range(2)]
    mb = ModelBatch(models, shared_input=False)
    indices = [torch.tensor([1, 2, 3, 5]), torch.tensor([4, 0])]
    inputs: Any = DataRouter(mode="indices").route_batch(INPUTS, indices=indices)
    outputs = mb(inputs)
    for number, (model, rows) in enumerate(zip(models, indices, strict=True)):
        torch.testing.assert_close(outputs[number, : len(rows)], model(INPUTS[rows]))
        torch.testing.assert_close(mb.get_model_states()[number]["running_mean"], model.running_mean)
        torch.testing.assert_close(mb.get_model_states()[number]["running_var"], model.running_var)


def test_differing_settings_are_refused() -> None:
    """Wrong: with two different `Dropout(p)` both models silently use the first one's."""
    with pytest.raises(ValueError, match=r"model 1.*\.p is 0\.9, in model 0 0\.1"):
        ModelBatch([nn.Sequential(nn.Linear(4, 4), nn.Dropout(p)) for p in (0.1, 0.9)])


@contextmanager
def parameters_replaced_on_conversion() -> Iterator[None]:
    """The other of torch's two ways to convert a module: new parameters instead of new data in the old ones."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_moving_the_batch_moves_its_stacks() -> None:
    """Wrong: `.to(device)` replaces the registered parameters, and `stacked_params` keeps the old ones."""
    mb = ModelBatch([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]).to("meta")
    assert all(value.is_meta for value in (*mb.stacked_params.values(), *mb.stacked_buffers.values()))
    assert all(a is b for a, b in zip(mb.parameters(), mb.stacked_params.values(), strict=True))


def test_converting_the_batch_converts_its_stacks() -> None:
    """Wrong: as above, with a dtype and real values."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    mb = ModelBatch([model] * 2)
    with parameters_replaced_on_conversion():
        mb.double()
    assert {p.dtype for p in mb.stacked_params.values()} == {torch.float64}
    torch.testing.assert_close(mb(INPUTS.double())[1], model.double()(INPUTS.double()))


def test_loss_reduction_is_mean_by_default_as_documented() -> None:
    """Wrong: the default is the sum."""
    mb = ModelBatch([mlp() for _ in range(3)])
    losses = mb.compute_loss(mb(INPUTS), LABELS, F.cross_entropy, reduction="none")
    torch.testing.assert_close(mb.compute_loss(mb(INPUTS), LABELS, F.cross_entropy), losses.mean())


def test_source_models_do_not_share_their_mode_or_hooks_with_the_batch() -> None:
    """Wrong: the first model itself is the definition, so `source[0].eval()` changes the batch."""
    models = [dropping() for _ in range(2)]
    mb = ModelBatch(models)
    models[0].eval()
    assert bool((mb(INPUTS) == 0).any())


class FreshEachTime(nn.Module):
    """Uses what torch.func has no batching rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(3, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.rnn(x.unsqueeze(0))[0][0])


def test_what_torch_func_cannot_batch_trains_like_the_loop() -> None:
    """Wrong: an error from deep inside vmap about missing batching rules or `.item()`."""
    models = [FreshEachTime() for _ in range(2)]
    mb = ModelBatch(models)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}, {"lr": 0.2}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(mb, optimizer)
    for model, state, lr in zip(models, mb.get_model_states(), (0.1, 0.2), strict=True):
        plain = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(3):
            plain.zero_grad()
            F.cross_entropy(model(INPUTS), LABELS).backward()
            plain.step()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, atol=2e-5, rtol=2e-4)


def test_unknown_optimizer_keywords_are_named() -> None:
    """Wrong: a misspelt option lands in the parameter group and is ignored."""
    mb = ModelBatch([mlp() for _ in range(2)])
    with pytest.raises(ValueError, match=r"model 1.*'weight_decays'"):
        OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}, {"lr": 0.1, "weight_decays": 0.1}])


def test_parametrized_modules_can_be_stacked() -> None:
    """Wrong: parametrized modules have a class of their own each and are refused."""
    models = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)) for _ in range(2)]
    outputs = ModelBatch(models)(INPUTS)
    torch.testing.assert_close(outputs, torch.stack([model(INPUTS) for model in models]))
