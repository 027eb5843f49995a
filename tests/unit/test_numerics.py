"""The policy for float32 products: what PyTorch and JAX are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import nn

from bridge.dtypes import torch_dtypes
from mb_torch import InvalidInput, ModelBatch, OptimizerFactory, numerics


def settings() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("policy", "expected"), [("accuracy", ("highest", False)), ("performance", ("medium", True))])
def test_a_policy_holds_within_its_block(policy: Any, expected: tuple[str, bool]) -> None:
    torch.set_float32_matmul_precision("high")
    before = settings()
    with numerics(policy):
        assert settings() == expected
        with numerics("accuracy"):
            assert settings() == ("highest", False)
        assert settings() == expected
    assert settings() == before
    with pytest.raises(RuntimeError, match="broken"), numerics(policy):
        raise RuntimeError("broken")
    assert settings() == before


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'fast'.*accuracy.*performance"), numerics("fast"):  # type: ignore[arg-type]
        pass


def _precision() -> Any:
    x = jnp.ones((2, 2), jnp.float32)
    with torch_dtypes():
        jaxpr = jax.make_jaxpr(jnp.matmul)(x, x)
    (product,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    precision = product.params["precision"]
    return precision and precision[0]


def test_accelerators_compute_products_as_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert _precision() == jax.lax.Precision.HIGHEST
    with numerics("performance"):
        assert _precision() == jax.lax.Precision.DEFAULT
    torch.set_float32_matmul_precision("high")
    assert _precision() == jax.lax.Precision.HIGH


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert _precision() is None


def test_a_compiled_step_is_compiled_for_each_policy(dynamo: Any) -> None:
    mb = ModelBatch([nn.Linear(4, 3) for _ in range(2)])
    mb.enable_compile(backend="eager")
    optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}] * 2)
    step = mb.make_train_step(nn.functional.cross_entropy, optimizer)
    inputs, targets = torch.randn(8, 4), torch.randint(3, (8,))
    graphs = []
    for policy in ("accuracy", "performance", "accuracy", "performance"):
        with numerics(policy):  # type: ignore[arg-type]
            step(inputs, targets)
        graphs.append(dynamo["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 2]
