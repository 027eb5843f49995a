"""Dtypes: JAX keeps those of PyTorch, 64-bit integers and floats included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import jax
import jax.numpy as jnp
import torch

_DTYPES = {
    torch.bool: jnp.bool_,
    torch.uint8: jnp.uint8,
    torch.int8: jnp.int8,
    torch.int16: jnp.int16,
    torch.int32: jnp.int32,
    torch.int64: jnp.int64,
    torch.uint16: jnp.uint16,
    torch.uint32: jnp.uint32,
    torch.uint64: jnp.uint64,
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.float32: jnp.float32,
    torch.float64: jnp.float64,
    torch.complex64: jnp.complex64,
    torch.complex128: jnp.complex128,
}


def as_jax_dtype(dtype: torch.dtype) -> jnp.dtype:
    """The JAX dtype with the same values.

    Example:
        >>> as_jax_dtype(torch.bfloat16).name
        'bfloat16'
    """
    return jnp.dtype(_DTYPES[dtype])


# What torch says of products in float32, in JAX's words.
_PRECISIONS = {"highest": "highest", "high": "high", "medium": "default"}


@contextmanager
def torch_dtypes() -> Iterator[None]:
    """Within the block JAX computes with PyTorch's types.

    It has 64-bit types, without which it would cut int64 and float64 in half in silence, and computes float32 products
    as precisely as ``torch.set_float32_matmul_precision`` says; left to itself, it takes bfloat16 on a TPU and
    TensorFloat-32 on a GPU. (A CPU has no choice, and asking costs time.)

    Example:
        >>> with torch_dtypes():
        ...     jnp.arange(2, dtype=jnp.int64).dtype.name
        'int64'
    """
    with jax.enable_x64(True), _products():
        yield


def _products() -> AbstractContextManager[object]:
    if jax.default_backend() == "cpu":
        return nullcontext()
    return jax.default_matmul_precision(_PRECISIONS[torch.get_float32_matmul_precision()])
