"""Models trained group after group: the same as all at once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import jax
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mb_jax import programs, step_program
from mb_jax.groups import WorkingSet, group_size
from mb_torch import ModelBatch, OptimizerFactory, make_joint_step
from tests.compare import assert_close

_ON_CPU = pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs take models in groups")
_NUM_MODELS = 6


class _Net(nn.Module):
    """Has all that a group must get its share of: parameters, statistics, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(torch.relu(self.norm(self.hidden(x))))
        result: Tensor = self.out(hidden)
        return result


def _loss(outputs: Tensor, targets: Tensor, *, weight: Tensor) -> Any:
    return weight * cross_entropy(outputs, targets), outputs


def _data(shared_input: bool, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    leading = () if shared_input else (_NUM_MODELS,)
    return [
        (
            torch.randn(*leading, 5, 4, dtype=torch.float64, generator=generator),
            torch.randint(3, (*leading, 5), generator=generator),
        )
        for _ in range(steps)
    ]


def _trained(size: int, monkeypatch: pytest.MonkeyPatch, *, shared_input: bool, way: str) -> list[Tensor]:
    """Losses, aux, parameters, buffers and optimizer states after some steps in groups of so many."""
    sizes: list[int] = []

    def chosen(num_models: int, working_set: Any, *, repeats: bool) -> int:
        sizes.append(size)
        return size

    monkeypatch.setattr(step_program, "group_size", chosen)
    monkeypatch.setattr(programs, "_compiled", OrderedDict())
    torch.manual_seed(0)
    batch = ModelBatch(
        [_Net().double() for _ in range(_NUM_MODELS)],
        shared_input=shared_input,
        backend="jax",
        seeds=range(_NUM_MODELS),
    )
    configs = [{"lr": 0.01 * (1 + model), "momentum": 0.9} for model in range(_NUM_MODELS)]
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, configs)
    step = batch.make_train_step(
        _loss,
        optimizer,
        loss_args={"weight": torch.arange(1.0, 7.0, dtype=torch.float64)},
        clip_norm=torch.full((_NUM_MODELS,), 0.5),
        active=torch.tensor([True, True, False, True, True, True]),
        aux=True,
    )
    data = _data(shared_input)
    if way == "run":
        losses, aux = step.run(data)
    elif way == "run_rows":
        axis = 0 if shared_input else 1
        inputs, targets = (torch.cat(parts, axis) for parts in zip(*data, strict=True))
        losses, aux = step.run_rows(inputs, targets, torch.arange(15).view(3, 5))
    else:
        pairs = [step(inputs, targets) for inputs, targets in data]
        losses, aux = torch.stack([losses for losses, _ in pairs]), pairs[-1][1]
    assert sizes
    states = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    models = [value for state in batch.get_model_states() for value in state.values()]
    return [losses, aux, *models, *states]


@pytest.mark.parametrize(("way", "shared_input"), [("run", False), ("run_rows", True), ("steps", True)])
def test_groups_change_nothing(way: str, shared_input: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_groups = _trained(2, monkeypatch, shared_input=shared_input, way=way)
    at_once = _trained(_NUM_MODELS, monkeypatch, shared_input=shared_input, way=way)
    assert_close(in_groups, at_once, atol=1e-12, rtol=1e-10)


def test_joint_steps_run_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(size: int) -> list[Tensor]:
        monkeypatch.setattr(step_program, "group_size", lambda *_, **__: size)
        monkeypatch.setattr(programs, "_compiled", OrderedDict())
        torch.manual_seed(0)
        batches = [ModelBatch([nn.Linear(*sizes).double() for _ in range(4)], backend="jax") for sizes in [(4, 3)] * 2]
        optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batches[1], [{"lr": 0.1}] * 4)

        def loss(teacher: nn.Module, student: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.mse_loss(student(inputs), teacher(inputs))

        step = make_joint_step(batches, loss, [None, optimizer])
        losses = step.run(_data(shared_input=True))
        return [losses, *batches[1].state_dict().values()]

    assert_close(trained(1), trained(4), atol=1e-12, rtol=1e-10)


@_ON_CPU
@pytest.mark.parametrize(
    ("num_models", "state", "activations", "repeats", "expected"),
    [
        (64, 150_000, 200_000, True, 4),
        (64, 150_000, 200_000, False, 64),  # the state would have to be brought to each group
        (64, 30_000, 4_000_000, False, 4),
        (1024, 100, 1000, True, 1024),  # all fit
        (31, 150_000, 200_000, True, 31),  # no divisor
        (62, 150_000, 200_000, True, 2),
        (4, 10**9, 10**9, True, 2),
        (1, 10**9, 10**9, True, 1),
    ],
)
def test_group_size(num_models: int, state: int, activations: int, repeats: bool, expected: int) -> None:
    assert group_size(num_models, lambda: WorkingSet(state, activations), repeats=repeats) == expected


def test_accelerators_train_all_models_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert group_size(64, lambda: pytest.fail("nothing to find out"), repeats=True) == 64


def test_the_users_chunk_size_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> int:
        raise AssertionError("group_size was asked")

    monkeypatch.setattr(step_program, "group_size", never)
    monkeypatch.setattr(programs, "_compiled", OrderedDict())
    batch = ModelBatch([nn.Linear(4, 3).double() for _ in range(4)], backend="jax", chunk_size=2)
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(batch, [{"lr": 0.1}] * 4)
    assert batch.make_train_step(cross_entropy, optimizer).run(_data(shared_input=True)).shape == (3, 4)
