"""The linear layer of stacked models, in a vmap of its own: values, gradients and how they lie in memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import linear

import mb_torch.vmap.batching_rules  # noqa: F401  registers the rule under test
from mb_torch import ModelBatch
from mb_torch.vmap.linear import StackedLinear, stacked_linear
from tests.compare import assert_close

NUM_MODELS = 3
EXACT = {"atol": 1e-12, "rtol": 1e-12}

# Shape of the inputs and their model axis.
INPUTS = {
    "shared": ((5, 4), None),
    "own": ((NUM_MODELS, 5, 4), 0),
    "own-axis-1": ((5, NUM_MODELS, 4), 1),
    "shared-vector": ((4,), None),
    "own-vector": ((NUM_MODELS, 4), 0),
    "shared-sequence": ((6, 5, 4), None),
    "own-sequence": ((NUM_MODELS, 6, 5, 4), 0),
    "no-rows": ((0, 4), None),
    "own-no-rows": ((NUM_MODELS, 0, 4), 0),
}


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [shape, (NUM_MODELS, 2, 4), (NUM_MODELS, 2)]
    return [torch.randn(size, dtype=dtype, generator=generator).requires_grad_() for size in shapes]


def one_by_one(inputs: Tensor, axis: int | None, *stacks: Tensor) -> Tensor:
    shares = [inputs if axis is None else inputs.select(axis, model) for model in range(NUM_MODELS)]
    return torch.stack([linear(share, *(s[model] for s in stacks)) for model, share in enumerate(shares)])


def operations(outputs: Tensor) -> set[str]:
    """The names of all operations in the graph of a tensor."""
    found, remaining = set(), [outputs.grad_fn]
    while remaining:
        node = remaining.pop()
        if node is not None:
            found.add(node.name())
            remaining += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", INPUTS)
def test_values_and_gradients(case: str, dtype: torch.dtype, bias: bool) -> None:
    shape, axis = INPUTS[case]
    inputs, *stacks = tensors(shape, dtype)
    stacks = stacks if bias else stacks[:1]
    with stacked_linear():
        outputs = vmap(linear, in_dims=(axis, *[0] * len(stacks)))(inputs, *stacks)
    expected = one_by_one(inputs, axis, *stacks)
    assert_close(outputs, expected, **EXACT)
    assert "StackedLinearBackward" in operations(outputs)
    weights = torch.randn(expected.shape, dtype=dtype)
    leaves = [inputs, *stacks]
    found = torch.autograd.grad((outputs * weights).sum().abs(), leaves)
    wanted = torch.autograd.grad((expected * weights).sum().abs(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, **EXACT)
    # What it is for: optimizers read gradients as they read the stacks, and `.grad` needs no copy.
    assert all(gradient.is_contiguous() for gradient in found[1:])


def test_gradients_of_gradients() -> None:
    assert torch.autograd.gradgradcheck(StackedLinear.apply, tensors((5, 4)))
    assert torch.autograd.gradgradcheck(StackedLinear.apply, tensors((NUM_MODELS, 5, 4)))


def test_gradients_of_a_batch_lie_as_its_stacks_do() -> None:
    batch = ModelBatch([nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(NUM_MODELS)])
    batch(torch.randn(6, 4)).square().sum().backward()
    for name, parameter in batch.stacked_params.items():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


def shared_weight(inputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, Any]:
    return vmap(lambda x: linear(x, weight[0], bias[0]))(inputs), one_by_one(
        inputs, 0, *(t[:1].expand_as(t) for t in (weight, bias))
    )


def shared_bias(inputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, Any]:
    found = vmap(lambda x, w: linear(x, w, bias[0]))(inputs, weight)
    return found, one_by_one(inputs, 0, weight, bias[:1].expand_as(bias))


def nested(inputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, Any]:
    found = vmap(lambda w, b: vmap(lambda x: linear(x, w, b))(inputs))(weight, bias)
    return found, torch.stack([linear(inputs, w, b) for w, b in zip(weight, bias, strict=True)])


def inner_gradient(inputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, Any]:
    def loss(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return linear(x, w, b).square().sum()

    found = vmap(grad(loss))(weight, bias, inputs)
    total = one_by_one(inputs, 0, weight, bias).square().sum()
    return found, torch.autograd.grad(total, weight)[0]


def outer_gradient(inputs: Tensor, weight: Tensor, bias: Tensor) -> tuple[Any, Any]:
    def loss(w: Tensor) -> Tensor:
        return vmap(linear)(inputs, w, bias).square().sum()

    return grad(loss)(weight), torch.autograd.grad(one_by_one(inputs, 0, weight, bias).square().sum(), weight)[0]


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("how", [shared_weight, shared_bias, nested, inner_gradient, outer_gradient])
def test_other_uses_of_vmap_are_as_before(how: Any, on: bool) -> None:
    with stacked_linear() if on else nullcontext():
        found, expected = how(*tensors((NUM_MODELS, 5, 4)))
    assert_close(found, expected, **EXACT)


def test_outside_of_a_batch_torch_is_left_alone() -> None:
    inputs, weight, bias = tensors((5, 4))
    assert "StackedLinearBackward" not in operations(vmap(linear, in_dims=(None, 0, 0))(inputs, weight, bias))
    with stacked_linear():
        pass
    assert "StackedLinearBackward" not in operations(vmap(linear, in_dims=(None, 0, 0))(inputs, weight, bias))


def test_only_what_gradients_need_is_kept() -> None:
    """A weight may be updated before another backward pass, a frozen layer's input may be changed in place."""
    batch = ModelBatch([nn.Linear(4, 1) for _ in range(NUM_MODELS)])
    inputs = torch.randn(5, 4)
    first, second = batch(inputs).sum(), batch(2 * inputs).sum()
    first.backward()
    torch.optim.SGD(batch.parameters(), lr=0.1).step()
    second.backward()

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x)
            return hidden.add_(self.frozen(hidden))

    models = [Residual() for _ in range(NUM_MODELS)]
    residuals = ModelBatch(models)
    residuals(inputs).sum().backward()
    for index, model in enumerate(models):
        model(inputs).sum().backward()
        assert_close(residuals.stacked_params["inner.weight"].grad[index], model.inner.weight.grad)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_jacobians_of_a_batch(strategy: str) -> None:
    models = [nn.Linear(4, 2) for _ in range(NUM_MODELS)]
    batch, inputs = ModelBatch(models), torch.randn(5, 4)
    jacobian = torch.autograd.functional.jacobian
    found = jacobian(batch, inputs, vectorize=True, strategy=strategy)
    assert_close(found, torch.stack([jacobian(model, inputs) for model in models]))


def test_what_plain_pytorch_refuses_is_refused() -> None:
    models = [nn.Linear(4, 2) for _ in range(NUM_MODELS)]
    for model in models:
        model.bias = nn.Parameter(model.bias.detach().double())
    with pytest.raises(RuntimeError, match="dtype|type"):
        ModelBatch(models)(torch.randn(5, 4))


@pytest.mark.parametrize("shape", [(), (1,), (2,)], ids=str)
def test_biases_of_other_shapes(shape: tuple[int, ...]) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.weight, self.bias)

    models = [Biased() for _ in range(NUM_MODELS)]
    batch, inputs = ModelBatch(models), torch.randn(NUM_MODELS, 4)
    assert_close(batch(inputs), torch.stack([model(inputs) for model in models]))
    batch(inputs).square().sum().backward()
    for index, model in enumerate(models):
        model(inputs).square().sum().backward()
        assert_close(batch.stacked_params["bias"].grad[index], model.bias.grad)
