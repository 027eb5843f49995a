"""Operations in JAX mean what they mean in PyTorch, also where their slopes jump, dtypes mix or shapes are odd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, tensor
from torch.utils import _pytree as pytree

jax = pytest.importorskip("jax")

from bridge.arrays import to_jax  # noqa: E402
from bridge.lowering import run  # noqa: E402
from bridge.trace import trace  # noqa: E402
from mb_torch.errors import Unsupported  # noqa: E402

INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def _sixty_four_bits():
    with jax.enable_x64(True):
        yield


def compare(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """Results, their dtypes, and gradients of a weighted sum are PyTorch's."""
    inputs = [one.clone().requires_grad_(one.is_floating_point()) for one in inputs]

    def flat(given: Sequence[Tensor]) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(function(*given)) if isinstance(leaf, Tensor)]

    traced = trace(flat, inputs)
    expected = flat(inputs)
    arrays = [to_jax(one) for one in inputs]
    constants = {name: to_jax(constant) for name, constant in traced.constants.items()}
    differentiated = [index for index, one in enumerate(inputs) if one.requires_grad]
    reached = [index for index, one in enumerate(expected) if one.requires_grad]
    weights = [torch.linspace(1, 2, expected[index].numel()).view_as(expected[index]) for index in reached]

    def of_differentiated(own: Sequence[Any]) -> Any:
        given = list(arrays)
        for index, array in zip(differentiated, own, strict=True):
            given[index] = array
        results = run(traced, given, constants=constants)
        return [results[index] for index in reached], results

    _, pull_back, results = jax.vjp(of_differentiated, [arrays[index] for index in differentiated], has_aux=True)
    for result, other in zip(results, expected, strict=True):
        assert str(result.dtype) == str(other.dtype).removeprefix("torch.")
        np.testing.assert_allclose(np.asarray(result), other.detach().numpy(), rtol=1e-6, atol=1e-7)
    if not reached:
        return
    (slopes,) = pull_back(
        [to_jax(weight.to(expected[index].dtype)) for weight, index in zip(weights, reached, strict=True)]
    )
    own = [inputs[index] for index in differentiated]
    others = torch.autograd.grad(
        [expected[index] for index in reached], own, weights, allow_unused=True, materialize_grads=True
    )
    for slope, other in zip(slopes, others, strict=True):
        np.testing.assert_allclose(np.asarray(slope), other.numpy(), rtol=1e-5, atol=1e-6)


SIGNS = tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
TIES = tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [3.0, 0.0, 1.0]])
ZEROS = torch.zeros(2, 3)
MASK = tensor([True, False, True])
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()
POSITIONS = tensor([[0, 0], [1, 2], [2, 2]])
ROWS = torch.arange(6.0).reshape(3, 2) - 2

SLOPES: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "abs at zero": (torch.abs, [SIGNS]),
    "relu at zero": (torch.relu, [SIGNS]),
    "relu6 at its bounds": (torch.nn.functional.relu6, [SIGNS * 3]),
    "hardtanh at its bounds": (torch.nn.functional.hardtanh, [SIGNS]),
    "leaky relu at zero": (torch.nn.functional.leaky_relu, [SIGNS]),
    "elu at zero": (torch.nn.functional.elu, [SIGNS * 60]),
    "clamp at its bounds": (lambda x: x.clamp(-1, 1), [SIGNS]),
    "clamp by tensors": (torch.clamp, [SIGNS, -SIGNS.abs() / 2, tensor([-2.0, 1, 0, 1, 1])]),
    "clamp below": (lambda x: x.clamp(min=0), [SIGNS]),
    "clamp above": (lambda x: x.clamp(max=1), [SIGNS]),
    "maximum of equal": (torch.maximum, [SIGNS, SIGNS.abs()]),
    "minimum of equal": (torch.minimum, [SIGNS, SIGNS.abs()]),
    "amax of ties": (lambda x: x.amax(1), [TIES]),
    "amin of ties": (lambda x: x.amin(0), [TIES]),
    "max of all": (torch.max, [TIES]),
    "max along a dimension": (lambda x: x.max(1), [TIES]),
    "min along a dimension": (lambda x: x.min(-1, keepdim=True), [TIES]),
    "median": (lambda x: x.median(1), [tensor([[3.0, 1, 2, 5], [9, 8, 7, 6]])]),
    "norm of zero": (lambda x: x.norm(dim=1), [ZEROS]),
    "norm with zeros": (lambda x: torch.linalg.vector_norm(x, 3), [SIGNS]),
    "norm below one": (lambda x: torch.linalg.vector_norm(x, 0.5), [SIGNS]),
    "one-norm with zeros": (lambda x: torch.linalg.vector_norm(x, 1), [SIGNS]),
    "largest with ties": (lambda x: torch.linalg.vector_norm(x, INF), [SIGNS]),
    "largest of zeros": (lambda x: torch.linalg.vector_norm(x, INF, 1), [ZEROS]),
    "distance zero": (torch.cdist, [TIES, TIES]),
    "one-distance zero": (lambda x, y: torch.cdist(x, y, 1.0), [TIES, TIES]),
    "std of equal": (lambda x: x.std(1), [TIES]),
    "product with zeros": (lambda x: x.prod(1), [tensor([[0.0, 2, 3], [0, 0, 1], [1, 2, 3]])]),
    "running product with zeros": (lambda x: x.cumprod(0), [SIGNS]),
    "running maximum": (lambda x: x.cummax(1), [TIES]),
    "power at zero": (lambda x: (x.pow(2), x.pow(3), x.pow(0), x.abs().pow(1.5)), [SIGNS]),
    "power of tensors": (torch.pow, [tensor([0.0, 0, 2, 3]), tensor([0.0, 2, -1, 0.5])]),
    "remainder": (
        lambda x, y: (x % y, torch.fmod(x, y), torch.div(x, y, rounding_mode="floor")),
        [SIGNS * 1.3, SIGNS * 0 + 0.7],
    ),
    "logsumexp of nothing": (lambda x: x.logsumexp(1), [tensor([[-INF, 1.0], [0.0, 0.0]])]),
    "softmax with masked": (lambda x: x.softmax(1), [tensor([[-INF, 1.0], [0.0, 0.0]])]),
    "huber at its bend": (lambda x: torch.nn.functional.huber_loss(x, x.detach() * 0, reduction="none"), [SIGNS]),
    "smooth l1 at its bend": (lambda x: torch.nn.functional.smooth_l1_loss(x, x.detach() * 0), [SIGNS]),
    "scatter amax with ties": (
        lambda x, y: x.scatter_reduce(0, POSITIONS, y, "amax"),
        [torch.ones(3, 2), tensor([[1.0, 3], [1, 3], [1, 0]])],
    ),
    "scatter product with zeros": (
        lambda x, y: x.scatter_reduce(0, POSITIONS, y, "prod"),
        [torch.ones(3, 2) * 2, tensor([[0.0, 3], [1, 0], [4, 0]])],
    ),
    "scatter mean": (lambda x, y: x.scatter_reduce(0, POSITIONS, y, "mean", include_self=False), [ROWS, ROWS + 1]),
    "softplus of large values": (torch.nn.functional.softplus, [SIGNS * 500]),
    "mish of large values": (torch.nn.functional.mish, [SIGNS * 500]),
    "celu of large values": (torch.nn.functional.celu, [SIGNS * 500]),
    "log sigmoid of large values": (torch.nn.functional.logsigmoid, [SIGNS * 500]),
    "cross entropy of certain probabilities": (
        lambda x: torch.nn.functional.binary_cross_entropy(x, tensor([0.0, 1, 0, 1]), reduction="none"),
        [tensor([0.0, 0, 1, 1])],
    ),
    "sinc at zero": (torch.sinc, [SIGNS / 2]),
    "x log y at zero": (
        lambda x: torch.xlogy(x, tensor([0.0, 2, 1, 3])),
        [tensor([0.0, 0, 2, 1])],
    ),
    "log of summed nothing": (lambda x: torch.logaddexp(x, tensor(0.0)), [tensor([-INF, -800.0, 800.0])]),
    "hard swish at its bounds": (torch.nn.functional.hardswish, [SIGNS * 1.5]),
    "hard sigmoid at its bounds": (torch.nn.functional.hardsigmoid, [SIGNS * 1.5]),
    "shrinking at its bounds": (lambda x: (torch.nn.functional.softshrink(x, 1), x.hardshrink(1)), [SIGNS]),
    "std and mean of equal": (lambda x: torch.std_mean(x, 1), [TIES]),
    "distance of equal": (lambda x, y: torch.dist(x, y), [TIES, TIES]),
    "modified bessel at zero": (torch.i0, [SIGNS]),
    "attention without any allowed position": (
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL.logical_not()),
        [torch.linspace(-1, 1, 24).reshape(1, 4, 6) * scale for scale in (1, 2, 3)],
    ),
    "detach": (lambda x: x * x.detach(), [SIGNS]),
    "where with nan": (lambda x: torch.where(x > 0, x, 0.0), [tensor([NAN, 1.0, -1.0])]),
}

DTYPES: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "integers and a float": (lambda x: (x + 0.5, x * 2.0, x - 1, x > 1.5, x / 2), [tensor([1, 2, 3])]),
    "integers of two sizes": (torch.add, [tensor([1, 2], dtype=torch.int32), tensor([3, 4])]),
    "unsigned and signed": (torch.mul, [tensor([200], dtype=torch.uint8), tensor([-3], dtype=torch.int8)]),
    "a scalar tensor does not promote": (torch.add, [tensor([1.0, 2.0]), tensor(2.0, dtype=torch.float64)]),
    "halves": (torch.mul, [tensor([1.5, 2.0]).half(), tensor([3.0, 4.0]).half()]),
    "half and float": (torch.add, [tensor([1.5]).half(), tensor([2.5])]),
    "logical": (lambda x, y: (x & y, x | y, x ^ y, ~x, x * y, x + y, x == y), [MASK, ~MASK]),
    "mean of masks": (lambda x: (x.sum(), x.float().mean(), x.any(), x.all(), x.cumsum(0)), [MASK]),
    "integer division": (
        lambda x, y: (x // y, x % y, torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y)),
        [tensor([7, -7, 7, -7]), tensor([2, 2, -2, -2])],
    ),
    "large integers": (
        lambda x: (x + 1, x * 2, x % 1000, x // 3, -x, x.sum(), x.max(), x.sort().values, x.abs(), x.bitwise_xor(5)),
        [tensor([2**53 + 1, 2**31 + 3, -(2**40) - 1])],
    ),
    "large integers compared": (lambda x: (x == 2**53 + 1, x > 2**53), [tensor([2**53, 2**53 + 1])]),
    "rounding of integers": (lambda x: (x.floor(), x.ceil(), x.round()), [tensor([2**53 + 1])]),
    "sine of integers": (lambda x: (x.sin(), x.exp(), x.sqrt()), [tensor([1, 2])]),
    "conversions": (lambda x: (x.long(), x.bool(), x.double(), x.half()), [tensor([-1.7, 0.0, 2.5])]),
    "halves to even": (lambda x: (x.round(), x.trunc(), x.frac()), [tensor([0.5, 1.5, -0.5, 2.5])]),
    "sum in another dtype": (lambda x: (x.sum(dtype=torch.float64), x.prod(0)), [tensor([1, 2], dtype=torch.int32)]),
    "ranges": (lambda x: x + torch.arange(0, 1, 0.25) + torch.linspace(0, 1, 4), [torch.ones(4)]),
    "bits": (lambda x: (x << 2, x >> 1, ~x, x & 6), [tensor([5, -5])]),
}

EMPTY = torch.zeros(0, 3)
SCALAR = tensor(2.0)
SHAPES: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "no dimensions": (
        lambda x: (x.sum(0), x.max(0), x.cumsum(0), x.softmax(-1), x.sort(), x.unsqueeze(-1), x.flip(0), x.argmax()),
        [SCALAR],
    ),
    "indexing no dimensions": (
        lambda x: (x.gather(0, tensor([0, 0])), x.index_select(0, tensor([0])), x[None], x.mean(dim=-1)),
        [SCALAR],
    ),
    "negative dimensions": (
        lambda x: (x.sum(-2), x.select(-1, -1), x.transpose(-1, -2), x.narrow(-1, 1, 2), x.unbind(-2)),
        [TIES],
    ),
    "negative slices": (lambda x: (x[-2:], x[:, ::2], x[..., -1], x[5:], x[::2, 1:]), [TIES]),
    "nothing": (
        lambda x: (x.sum(), x.sum(0), x.mean(1), x.relu(), torch.cat([x, x]), x @ x.T, x.cumsum(0), x.any()),
        [EMPTY],
    ),
    "joined with an empty vector": (lambda x: torch.cat([x, torch.zeros(0)], 0), [TIES]),
    "pads and crops": (lambda x: torch.nn.functional.pad(x, (1, -1, 0, 2), value=3), [TIES]),
    "rolled": (lambda x: (x.roll(1), x.roll((1, -1), (0, 1)), x.flip(0, -1), x.rot90()), [TIES]),
    "triangles": (lambda x: (x.tril(-1), x.triu(1), x.diagonal(1), torch.diag_embed(x)), [TIES]),
    "strides": (lambda x: (x.as_strided((2, 2), (1, 3), 1), x.unfold(1, 2, 1)), [TIES]),
    "order with ties": (lambda x: (*x.sort(dim=1, stable=True), *x.sort(dim=1, descending=True, stable=True)), [TIES]),
    "largest few": (lambda x: x.topk(2, -1, largest=False).values + x.topk(2).values, [SIGNS]),
    "any of many": (lambda x: (x.bool().any(1), x.all(0), (x == 3).sum((0, 1))), [TIES]),
}

INDEXED: dict[str, tuple[Callable[..., Any], Sequence[Tensor]]] = {
    "put and accumulate at repeated places": (
        lambda x, y: x.index_put((tensor([0, 0, 2]),), y, accumulate=True),
        [TIES, TIES + 1],
    ),
    "put twice in one place": (lambda x, y: x.index_put((tensor([1, 1, 2]),), y), [TIES, TIES[0].expand(3, 3)]),
    "put at negative places": (lambda x, y: x.index_put((tensor([-1]), tensor([0, 1])), y), [TIES, tensor([7.0, 8.0])]),
    "put a number where a mask is": (lambda x: x.index_put((x > 2,), tensor(-1.0)), [TIES]),
    "put rows where a mask is": (lambda x, y: x.index_put((MASK,), y), [TIES, TIES[:2] + 5]),
    "accumulate where a mask is": (lambda x, y: x.index_put((MASK,), y, accumulate=True), [TIES, TIES[0]]),
    "put through a slice": (
        lambda x, y: [z := x.clone(), z.__setitem__((slice(None), tensor([2, 0])), y)][0],
        [TIES, ROWS],
    ),
    "index by several": (lambda x: (x[tensor([0, 2])], x[:, tensor([[0, 1], [2, 2]])], x[tensor([0, 1]), -1]), [TIES]),
    "index far apart": (lambda x: x[tensor([0, 1]), :, tensor([1, 0])], [torch.arange(12.0).reshape(2, 3, 2)]),
    "gather": (lambda x: x.gather(1, tensor([[2, 0], [1, 1]])), [TIES]),
    "scatter": (lambda x, y: x.scatter(1, tensor([[2, 0], [1, 0]]), y), [TIES, ROWS[:2]]),
    "scatter and add": (lambda x, y: x.scatter_add(0, POSITIONS, y), [ROWS, ROWS]),
    "add rows": (lambda x, y: x.index_add(0, tensor([1, 1, 0]), y, alpha=2), [TIES, TIES]),
    "copy and fill columns": (
        lambda x, y: x.index_copy(1, tensor([2, 0]), y).index_fill(0, tensor([1]), 9),
        [TIES, ROWS],
    ),
    "fill by mask": (lambda x: x.masked_fill(MASK, 5), [TIES]),
    "scatter by mask": (lambda x, y: x.masked_scatter(x > 1, y), [TIES, torch.arange(9.0)]),
    "take": (lambda x: x.take(tensor([0, 8, 0])), [TIES]),
    "in place": (lambda x: x.clone().t().select(0, 1).mul_(2).sum() + x, [TIES]),
    "written views": (lambda x: [y := x.clone(), y[::2, 1:].zero_()][0] * 2, [TIES]),
    "large values kept": (
        lambda x: (x[tensor([1])], x.gather(0, tensor([0])), x.flip(0)),
        [tensor([2**53 + 1, 2**40])],
    ),
    "class losses": (
        lambda x: torch.nn.functional.cross_entropy(x, tensor([0, -100, 2]), weight=tensor([1.0, 2.0, 0.5])),
        [TIES],
    ),
}

CASES = {**SLOPES, **DTYPES, **SHAPES, **INDEXED}


@pytest.mark.parametrize("name", CASES)
def test_means_what_it_means_in_torch(name: str) -> None:
    compare(*CASES[name])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t().as_strided((2, 2), (1, 2)),
        lambda x: x[1:].as_strided((2, 2), (1, 2)),
        lambda x: torch.as_strided(x.expand(3, 3), (2, 2), (1, 2)),
    ],
    ids=["transposed", "sliced", "expanded"],
)
def test_strides_of_views_are_refused(view: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(Unsupported, match="as_strided of a view"):
        trace(lambda inputs: [view(inputs[0])], [TIES])


def test_complex_views_are_recorded_where_inputs_require_gradients() -> None:
    compare(lambda x: torch.fft.irfft2(torch.fft.fft2(x)[:, :2] * 2, s=(3, 3)), [TIES])
