"""Batching rules that torch lacks: each operation under vmap against a loop, gradients included."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import mb_torch.vmap.batching_rules  # noqa: F401  registers the rules under test
from mb_torch.vmap.functorch_state import each_alone, mapped_models, needs_gradient, under_vmap
from tests.compare import assert_close, assert_different, assert_equal

NUM_MODELS = 3
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Every rule is compared in float64, and none may fall back to running model by model."""
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield
    torch.set_default_dtype(torch.float32)


def check(function: Callable[..., Any], *tensors: Tensor, in_dims: tuple[int | None, ...] | None = None) -> None:
    """The function under vmap equals the loop: results, and gradients taken outside and inside of vmap."""
    dims = in_dims or (0,) * len(tensors)
    differentiable = [i for i, tensor in enumerate(tensors) if tensor.is_floating_point()]

    def scalar(*own: Tensor) -> Tensor:
        leaves = [leaf for leaf in pytree.tree_leaves(function(*own)) if leaf.is_floating_point()]
        return sum((leaf * torch.arange(leaf.numel()).view(leaf.shape).sin()).sum() for leaf in leaves)

    def own(index: int) -> list[Tensor]:
        return [t if d is None else t.select(d, index) for t, d in zip(tensors, dims, strict=True)]

    alone = [function(*own(index)) for index in range(NUM_MODELS)]
    expected = pytree.tree_map(lambda *leaves: torch.stack(leaves), *alone)
    assert_close(torch.vmap(function, dims)(*tensors), expected, **EXACT)
    if not differentiable:
        return
    tracked = [tensor.clone().requires_grad_(i in differentiable) for i, tensor in enumerate(tensors)]
    inputs = [tracked[i] for i in differentiable]
    together = torch.autograd.grad(torch.vmap(scalar, dims)(*tracked).sum(), inputs, materialize_grads=True)
    losses = [
        scalar(*(t if d is None else t.select(d, index) for t, d in zip(tracked, dims, strict=True)))
        for index in range(NUM_MODELS)
    ]
    gradients = torch.autograd.grad(sum(losses), inputs, materialize_grads=True)
    assert_close(together, gradients, **EXACT)
    inside = torch.vmap(torch.func.grad(scalar, argnums=tuple(differentiable)), dims)(*tensors)
    for gradient, position, whole in zip(inside, differentiable, gradients, strict=True):
        dim = dims[position]
        assert_close(gradient.sum(0) if dim is None else gradient.movedim(0, dim), whole, **EXACT)


# Attention


def heads(*leading: int, length: int = 4) -> Tensor:
    return torch.randn(*leading, 2, length, 8)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
def test_attention(options: dict[str, Any]) -> None:
    query, key, value = (heads(NUM_MODELS, 2) for _ in range(3))
    check(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), query, key, value)


def test_attention_where_models_share_and_axes_differ() -> None:
    query, key, value = heads(NUM_MODELS, 2), heads(2), heads(2, NUM_MODELS)
    check(F.scaled_dot_product_attention, query, key, value, in_dims=(0, None, 1))


@pytest.mark.parametrize("shape", [(4, 5), (1, 1, 4, 5), (2, 1, 1, 5), (2, 2, 4, 5)])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
def test_attention_masks(shape: tuple[int, ...], own: bool, boolean: bool) -> None:
    mask = torch.randn(*((NUM_MODELS,) if own else ()), *shape)
    if boolean:
        mask = mask > -0.5
        mask[..., 0] = True
    query, key = heads(NUM_MODELS, 2), heads(NUM_MODELS, 2, length=5)
    check(
        lambda q, k, m: F.scaled_dot_product_attention(q, k, 0.5 * k, attn_mask=m.detach()),
        query,
        key,
        mask,
        in_dims=(0, 0, 0 if own else None),
    )


def test_attention_inside_two_vmaps() -> None:
    query, key = heads(NUM_MODELS, 4, 2), heads(NUM_MODELS, 2)
    check(torch.vmap(lambda q, k: F.scaled_dot_product_attention(q, k, k), (0, None)), query, key)


# Packed sequences


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("lengths", [[5, 4, 1], [2, 4, 3], [3, 3, 3]])
def test_packing(batch_first: bool, lengths: list[int]) -> None:
    sequences = torch.randn(NUM_MODELS, 3, 5, 2) if batch_first else torch.randn(NUM_MODELS, 5, 3, 2)

    def pack(own: Tensor) -> Tensor:
        packed = pack_padded_sequence(own, torch.tensor(lengths), batch_first, enforce_sorted=False)
        return packed.data.clone()

    alone = torch.stack([pack(own) for own in sequences])
    assert_close(torch.vmap(pack)(sequences), alone, **EXACT)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"padding_value": 2.5}, {"total_length": 7}])
def test_packing_and_padding_again(options: dict[str, Any]) -> None:
    sequences = torch.randn(NUM_MODELS, 5, 3, 2, requires_grad=True)
    seen = []

    def there_and_back(own: Tensor) -> Tensor:
        packed = pack_padded_sequence(own, torch.tensor([2, 4, 3]), enforce_sorted=False)
        padded, lengths = pad_packed_sequence(packed, **options)
        seen.append((packed.batch_sizes, lengths))
        return padded

    together = torch.vmap(there_and_back)(sequences)
    alone = torch.stack([there_and_back(own) for own in sequences])
    assert_close(together, alone, **EXACT)
    for batch_sizes, lengths in seen:
        assert (batch_sizes.tolist(), lengths.tolist()) == ([3, 3, 2, 1], [2, 4, 3])
    weights = torch.randn_like(alone)
    assert_close(
        torch.autograd.grad((together * weights).sum(), sequences),
        torch.autograd.grad((alone * weights).sum(), sequences),
        **EXACT,
    )


# Weights and buffers


@pytest.mark.parametrize("dim", [-1, 0, 1])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2, 2)])
def test_weight_norm(dim: int, shape: tuple[int, ...]) -> None:
    v = torch.randn(NUM_MODELS, *shape)
    sizes = [size if axis == dim else 1 for axis, size in enumerate(shape)]
    g = torch.rand(NUM_MODELS, *([] if dim == -1 else sizes)) + 0.5
    if dim == -1:
        # torch's own kernel wants a scalar only where it is not fused.
        check(lambda v, g: torch._weight_norm(v, g, dim), v, g)
    else:
        check(lambda v, g: torch._weight_norm(v, g, dim), v, g)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
@pytest.mark.parametrize("own_indices", [True, False])
def test_rows_are_shortened_in_place_where_they_were_looked_up(norm_type: float, own_indices: bool) -> None:
    tables = torch.randn(NUM_MODELS, 7, 4)
    expected = tables.clone()
    indices = torch.randint(7, (NUM_MODELS, 2, 3)) if own_indices else torch.tensor([[0, 3, 3], [5, 0, 6]])
    in_dims = (0, 0 if own_indices else None)

    def look_up(table: Tensor, indices: Tensor) -> Tensor:
        return F.embedding(indices, table, max_norm=1.0, norm_type=norm_type)

    rows = torch.vmap(look_up, in_dims)(tables, indices)
    alone = [look_up(expected[i], indices[i] if own_indices else indices) for i in range(NUM_MODELS)]
    assert_close((rows, tables), (torch.stack(alone), expected), **EXACT)


@pytest.mark.parametrize("padding_idx", [None, 0, 2])
@pytest.mark.parametrize("by_frequency", [True, False])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 2)])
def test_embedding(padding_idx: int | None, by_frequency: bool, in_dims: tuple[int | None, int | None]) -> None:
    table = torch.randn(5, 4) if in_dims[0] is None else torch.randn(NUM_MODELS, 5, 4).movedim(0, in_dims[0])
    indices = torch.randint(5, (2, 6)) if in_dims[1] is None else torch.randint(5, (NUM_MODELS, 2, 6))
    indices = indices if in_dims[1] is None else indices.movedim(0, in_dims[1])

    def look_up(table: Tensor, indices: Tensor) -> Tensor:
        return F.embedding(indices, table, padding_idx, scale_grad_by_freq=by_frequency)

    check(look_up, table, indices, in_dims=in_dims)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: x.lerp_(y, 0.3),
        lambda x, y: x.tril_(),
        lambda x, y: x.tril_(-1),
        lambda x, y: x.index_copy_(0, torch.tensor([2, 0]), y[:2]),
        lambda x, y: F.normalize(y, dim=0, out=x),
    ],
    ids=["lerp", "tril", "tril below", "index_copy", "normalize into"],
)
def test_changes_in_place(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    ours, other = torch.randn(NUM_MODELS, 3, 4), torch.randn(NUM_MODELS, 3, 4)
    theirs = ours.clone()
    before = ours.clone()
    returned = torch.vmap(change)(ours, other)
    alone = torch.stack([change(x, y) for x, y in zip(theirs, other, strict=True)])
    assert_close((ours, returned), (theirs, alone), **EXACT)
    assert_different(ours, before)


# Pooling


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (3, 6, 6)])
def test_unpooling(shape: tuple[int, ...]) -> None:
    check(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), torch.randn(NUM_MODELS, *shape))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 8, 8)])
def test_fractional_pooling(shape: tuple[int, ...]) -> None:
    samples = torch.rand(NUM_MODELS, shape[0] if len(shape) == 4 else 1, 3, 2)
    images = torch.randn(NUM_MODELS, *shape)

    def pool(image: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        return F.fractional_max_pool2d(image, 2, output_size=5, return_indices=True, _random_samples=samples)

    alone = [pool(image, own) for image, own in zip(images, samples, strict=True)]
    expected = tuple(torch.stack(parts) for parts in zip(*alone, strict=True))
    assert_equal(torch.vmap(pool)(images, samples), expected)


# What is going on


def test_whether_transformations_are_in_force() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((under_vmap(), mapped_models()))
        return x.sum()

    x = torch.randn(NUM_MODELS, 2, 4)
    look(x)
    torch.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.vmap(torch.func.grad(look))(x)
    torch.vmap(torch.vmap(look))(x)
    assert seen == [(False, None), (True, NUM_MODELS), (True, None), (True, None), (True, None)]


def test_whether_a_gradient_is_wanted() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(needs_gradient(x))
        return x.sum()

    x = torch.randn(NUM_MODELS)
    for tensor in (x, x.clone().requires_grad_()):
        look(tensor)
        torch.vmap(look)(tensor)
    torch.vmap(torch.func.grad(look))(x)
    torch.vmap(torch.vmap(look))(x.unsqueeze(1).clone().requires_grad_())
    assert seen == [False, False, True, True, True, True]


def test_each_alone_runs_one_model_at_a_time() -> None:
    shapes = []

    def operation(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append((under_vmap(), tuple(x.shape), tuple(y.shape)))
        return x @ y, x.sum(1)

    x, y = torch.randn(2, NUM_MODELS, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    product, total = torch.vmap(lambda x: each_alone(operation, [x, y]), in_dims=1)(x)
    assert shapes == [(False, (2, 4), (4, 5))] * NUM_MODELS
    expected = x.transpose(0, 1) @ y, x.sum(2).t()
    assert_close((product, total), expected, **EXACT)
    loss, other = (a.square().sum() + b.square().sum() for a, b in ((product, total), expected))
    assert_close(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(other, (x, y)), **EXACT)
