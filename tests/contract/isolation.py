"""Nothing that happens to one model changes a bit of another."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import GradScaler, ModelBatch, OptimizerFactory
from tests.compare import assert_different, assert_equal
from tests.contract.base import ContractBase, build, features, for_each, labels, model_state

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
}
COUNT, VICTIM, STEPS = 4, 2, 4

# The generated methods run for every backend's class, and none of them keeps anything in the fixtures.
thorough = settings(
    max_examples=15, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]
)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25), nn.Linear(8, 3))


Harm = Callable[[ModelBatch, Any, Any, int, Tensor], None]
"""Called before each step with the batch, the optimizer, the fused step, the step's number and the inputs."""


def train_four(
    backend: str, name: str, harm: Harm | None = None, *, fused: bool = True, **options: Any
) -> tuple[Any, list[Any]]:
    """Train four models, one of them harmed; return everything of that one and everything of the others."""
    mb = ModelBatch(build(make, COUNT), shared_input=False, seeds=[1, 2, 3, 4], backend=backend)
    optimizer_cls, config = OPTIMIZERS[name]
    optimizer: Any = OptimizerFactory(optimizer_cls, config).create_optimizer(mb, [{}] * COUNT)
    step = mb.make_train_step(F.cross_entropy, optimizer, **options) if fused else None
    losses = []
    for index in range(STEPS):
        inputs, targets = for_each(COUNT, features, index), for_each(COUNT, labels, index)
        if harm is not None:
            harm(mb, optimizer, step, index, inputs)
        if step is not None:
            losses.append(step(inputs, targets))
            continue
        optimizer.zero_grad()
        own = mb.compute_loss(mb(inputs), targets, F.cross_entropy, "none")
        own.sum().backward()
        if options.get("clip_norm") is not None:
            mb.clip_grad_norm_(options["clip_norm"])
        optimizer.step()
        losses.append(own.detach())
    columns = torch.stack(losses).unbind(1)
    of_each = [(model_state(mb, i), optimizer.model_state_dict(i)["state"], columns[i]) for i in range(COUNT)]
    return of_each[VICTIM], [own for index, own in enumerate(of_each) if index != VICTIM]


@functools.cache
def unharmed(backend: str, name: str, fused: bool = True, clip_norm: float | None = None) -> tuple[Any, list[Any]]:
    """The same without harm, trained once."""
    return train_four(backend, name, fused=fused, clip_norm=clip_norm)


class IsolationContract(ContractBase):
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("fused", [True, False])
    @given(
        value=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 3e38]),
        where=st.sampled_from(["inputs", "weights", "statistics"]),
        when=st.integers(0, STEPS - 1),
        place=st.integers(0, 3),
        clip=st.booleans(),
    )
    @thorough
    def test_a_broken_model_harms_no_other(
        self, name: str, fused: bool, value: float, where: str, when: int, place: int, clip: bool
    ) -> None:
        def harm(mb: ModelBatch, _: Any, __: Any, index: int, inputs: Tensor) -> None:
            if index != when:
                return
            with torch.no_grad():
                if where == "inputs":
                    inputs[VICTIM, :, place] = value
                elif where == "weights":
                    mb.stacked_params["0.weight"][VICTIM, place] = value
                else:
                    mb.stacked_buffers["1.running_mean"][VICTIM, place] = value

        clip_norm = 0.5 if clip else None
        victim, others = train_four(self.backend, name, harm, fused=fused, clip_norm=clip_norm)
        expected = unharmed(self.backend, name, fused, clip_norm)
        assert_different(victim, expected[0])
        assert_equal(others, expected[1])

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @given(
        key=st.sampled_from(["lr", "weight_decay"]),
        value=st.sampled_from([0.0, 0.037, 5.0]),
        when=st.integers(0, STEPS - 1),
    )
    @thorough
    def test_another_hyper_parameter_of_one_model_changes_no_other(
        self, name: str, key: str, value: float, when: int
    ) -> None:
        def harm(_: Any, optimizer: Any, __: Any, index: int, ___: Any) -> None:
            if index == when:
                optimizer.param_groups[VICTIM][key if key in optimizer.param_groups[0] else "lr"] = value

        _, others = train_four(self.backend, name, harm)
        assert_equal(others, unharmed(self.backend, name)[1])

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @given(when=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
    @thorough
    def test_freezing_one_model_changes_no_other(self, name: str, when: list[bool]) -> None:
        def harm(_: Any, __: Any, step: Any, index: int, ___: Any) -> None:
            step.active = torch.tensor([i != VICTIM or not when[index] for i in range(COUNT)])

        _, others = train_four(self.backend, name, harm)
        assert_equal(others, unharmed(self.backend, name)[1])

    @pytest.mark.parametrize("name", ["SGD", "Adam"])
    def test_a_model_that_always_overflows_leaves_the_scales_of_others(self, name: str) -> None:
        def harm(_: Any, __: Any, ___: Any, ____: int, inputs: Tensor) -> None:
            inputs[VICTIM] = math.inf

        scalers = [GradScaler(COUNT, init_scale=256.0, growth_interval=2) for _ in range(2)]
        _, others = train_four(self.backend, name, harm, scaler=scalers[0])
        assert_equal(others, train_four(self.backend, name, scaler=scalers[1])[1])
        keep = [index for index in range(COUNT) if index != VICTIM]
        assert_equal(scalers[0].get_scale()[keep], scalers[1].get_scale()[keep])
        assert scalers[0].get_scale()[VICTIM] == 256.0 * 0.5**STEPS

    def test_loading_or_copying_one_model_changes_no_other(self) -> None:
        def harm(mb: ModelBatch, _: Any, __: Any, index: int, ___: Any) -> None:
            if index == 2:
                mb.copy_model(0, VICTIM)

        victim, others = train_four(self.backend, "Adam", harm)
        expected = unharmed(self.backend, "Adam")
        assert_different(victim, expected[0])
        assert_equal(others, expected[1])

    def test_the_check_notices_a_leak(self) -> None:
        """A negative control: clipping all models by one common norm does leak."""

        def gradients_of_first(factor: float) -> list[Tensor]:
            mb = self.batch(build(make, COUNT), shared_input=False, seeds=[1, 2, 3, 4])
            inputs = for_each(COUNT, features)
            inputs[VICTIM] *= factor
            mb.compute_loss(mb(inputs), for_each(COUNT, labels), F.cross_entropy, "sum").backward()
            nn.utils.clip_grad_norm_(mb.parameters(), 0.01)
            return [parameter.grad[0] for parameter in mb.parameters() if parameter.grad is not None]

        assert_different(gradients_of_first(0.1), gradients_of_first(1.0))
