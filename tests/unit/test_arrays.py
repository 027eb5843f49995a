"""Tensors to JAX arrays and back: values, dtypes, memory, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from bridge.arrays import copy_to_torch, to_jax, to_torch
from mb_torch.errors import InvalidInput, Unsupported

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
]
SHAPES = [(3, 4), (), (0, 3), (3, 0), (1,)]
BIG = 2**40 + 1


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(-3, 9)[: torch.Size(shape).numel()].reshape(shape).abs().to(dtype)


@pytest.fixture(params=[True, False], ids=["x64", "x32"], autouse=True)
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_keeps_dtype_shape_and_values(dtype, shape):
    tensor = values(dtype, shape)
    array = to_jax(tensor)
    assert array.shape == shape
    assert str(array.dtype) == str(dtype).removeprefix("torch.")
    back = to_torch(array)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    destination = torch.zeros_like(tensor)
    copy_to_torch(to_jax(tensor), destination)
    assert torch.equal(destination, tensor)


def test_64_bits_are_kept_whatever_the_mode():
    assert to_torch(to_jax(torch.tensor([BIG, -BIG]))).tolist() == [BIG, -BIG]
    assert to_torch(to_jax(torch.tensor(0.1, dtype=torch.float64))).item() == 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t.T,
        lambda t: t[::2, 1:],
        lambda t: t.expand(2, 3, 4),
        lambda t: t.flip(0),
        lambda t: torch.complex(t, t + 1).conj(),
        lambda t: torch.complex(t, t + 1).conj().imag,
        lambda t: t.requires_grad_(),
        lambda t: t.bfloat16().T,
    ],
    ids="transposed strided expanded flipped conj neg requires_grad bfloat16".split(),
)
def test_any_strides_and_bits(make):
    tensor = make(torch.arange(12.0).reshape(3, 4))
    assert torch.equal(to_torch(to_jax(tensor)), tensor)
    destination = torch.zeros(4, 3).T
    copy_to_torch(to_jax(torch.arange(12.0).reshape(3, 4)), destination)
    assert torch.equal(destination, torch.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_to_jax_copies_before_it_returns(size):
    tensor = torch.empty(size)
    for _ in range(5):
        array = to_jax(tensor.fill_(1.0))
        tensor.fill_(2.0)
        assert float(array.min()) == float(array.max()) == 1.0


def test_to_jax_holds_nothing_of_the_tensor():
    tensor = torch.zeros(1000)
    storage = tensor.untyped_storage()
    before = torch._C._storage_Use_Count(storage._cdata)
    array = to_jax(tensor)
    assert torch._C._storage_Use_Count(storage._cdata) == before
    assert array.sum() == 0


def test_arrays_are_donated_in_place_and_reading_does_not_prevent_it():
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = to_jax(torch.zeros(1000), donated=True)
    seen = torch.empty(1000)
    for step in range(3):
        copy_to_torch(array, seen)
        assert torch.equal(seen, torch.full((1000,), float(step)))
        address = array.unsafe_buffer_pointer()
        old, array = array, increment(array)
        assert old.is_deleted()
        assert array.unsafe_buffer_pointer() == address


def test_to_torch_does_not_copy():
    array = to_jax(torch.zeros(1000))
    assert to_torch(array).data_ptr() == array.unsafe_buffer_pointer()


def test_copy_to_torch_is_a_change_in_place_without_gradient():
    leaf = torch.zeros(3, requires_grad=True)
    loss = (leaf * leaf).sum()
    copy_to_torch(to_jax(torch.ones(3)), leaf)
    assert leaf.is_leaf
    assert leaf.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse_coo"),
        (lambda: torch.empty(2, device="meta"), "meta"),
        (lambda: torch.zeros(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_tensors_without_a_form_in_jax_are_refused(make, message):
    with pytest.raises(Unsupported, match=message):
        to_jax(make())


def test_arrays_without_a_form_in_torch_are_refused():
    with pytest.raises(Unsupported, match="key"):
        to_torch(jax.random.key(0))
    with pytest.raises(Unsupported, match="float8"):
        to_torch(jnp.zeros(2, "float8_e4m3fn"))
    with pytest.raises(InvalidInput, match="Tracer"):
        jax.jit(to_torch)(jnp.zeros(2))
    with pytest.raises(InvalidInput, match="list"):
        to_torch([1.0])  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="list"):
        to_jax([1.0])  # type: ignore[arg-type]


def test_a_donated_array_is_refused():
    array = to_jax(torch.zeros(2))
    jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    with pytest.raises(InvalidInput, match="donated"):
        to_torch(array)


@pytest.mark.parametrize("destination", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.float64)])
def test_copy_to_torch_does_not_broadcast_or_convert(destination):
    with pytest.raises(InvalidInput, match=r"received torch.float32 of shape \[2\]"):
        copy_to_torch(to_jax(torch.ones(2)), destination)
    assert not destination.any()
