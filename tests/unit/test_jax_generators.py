"""Random numbers that do not come from PyTorch's own generator: a program would draw them once, so they are refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("jax")

from mb_torch import ModelBatch, OptimizerFactory, Unsupported

X, Y = torch.ones(4, 3), torch.zeros(4, 2)


def linears(**options: Any) -> ModelBatch:
    return ModelBatch([nn.Linear(3, 2) for _ in range(2)], backend="jax", **options)


def step_of(mb: ModelBatch, loss: Callable[..., Tensor]) -> Any:
    return mb.make_train_step(loss, OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(mb, [{}] * 2))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_random_numbers_of_python_are_refused(draw: Callable[[], float]) -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if draw() < 2 else x

    with pytest.raises(Unsupported, match=r"numpy\.random are drawn(.|\n)*torch\.rand"):
        ModelBatch([Drops() for _ in range(2)], backend="jax")(X)


GENERATORS = {
    "Random": random.Random,
    "Generator": lambda seed: np.random.Generator(np.random.MT19937(seed)),
    "RandomState": np.random.RandomState,
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_coin_of_a_generator_of_ones_own_is_refused(kind: str, verify: bool) -> None:
    """Also where the program that is compared falls on the same side."""
    generator, expected = GENERATORS[kind](5), GENERATORS[kind](5)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets) * (1 if generator.random() < 2 else 0)

    step = step_of(linears(backend_options={"verify": verify}), loss)
    with pytest.raises(Unsupported, match=rf"random\.{kind} of your own are drawn(.|\n)*torch\.rand"):
        step(X, Y)
    assert generator.random() == expected.random(), "it was not put back"


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_of_ones_own_is_put_back_where_a_loss_fails(kind: str) -> None:
    generator, expected = GENERATORS[kind](5), GENERATORS[kind](5)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError(generator.random())

    with pytest.raises(KeyError):
        step_of(linears(), loss)(X, Y)
    assert generator.random() == expected.random(), "it was not put back"


@pytest.mark.parametrize("drawn", [0, 1])
def test_the_second_of_two_normal_numbers_belongs_to_the_generator(drawn: int) -> None:
    """A ``RandomState`` makes two at a time and keeps one for the next call."""
    generator, expected = np.random.RandomState(5), np.random.RandomState(5)
    assert generator.randn(drawn).tolist() == expected.randn(drawn).tolist()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets) * (1 if generator.randn() < 100 else 0)

    with pytest.raises(Unsupported, match=r"random\.RandomState of your own are drawn"):
        step_of(linears(backend_options={"verify": False}), loss)(X, Y)
    assert generator.randn(3).tolist() == expected.randn(3).tolist()


def test_numbers_that_make_a_translation_wrong_are_named() -> None:
    draw = np.random.default_rng(0).random

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets) * float(draw())

    with pytest.raises(Unsupported, match=r"numpy\.random\.Generator of your own are drawn"):
        step_of(linears(), loss)(X, Y)


def test_a_generator_among_the_attributes_of_a_model() -> None:
    class Drops(nn.Linear):
        def __init__(self, generator: random.Random) -> None:
            super().__init__(3, 2)
            self.generator = generator

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.generator.random() < 2 else x

    generator = random.Random(3)
    mb = ModelBatch([Drops(generator) for _ in range(2)], backend="jax", ignore=["generator"])
    with pytest.raises(Unsupported, match=r"random\.Random of your own"):
        mb(X)
    with pytest.raises(Unsupported, match=r"random\.Random of your own"):
        step_of(mb, nn.functional.mse_loss)(X, Y)


def test_generators_that_are_not_drawn_from_may_be_read() -> None:
    generator, system = np.random.default_rng(0), random.SystemRandom()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets) * (2 if generator is not system else 1)

    assert step_of(linears(), loss)(X, Y).shape == (2,)


def test_a_generator_of_torch_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs + torch.randn(outputs.shape, generator=generator), targets)

    with pytest.raises(Unsupported, match=r"numbers of a torch\.Generator are drawn(.|\n)*without generator="):
        step_of(linears(), loss)(X, Y)
