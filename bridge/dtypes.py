"""Dtypes: JAX keeps those of PyTorch, 64-bit integers and floats included."""

from __future__ import annotations

from contextlib import AbstractContextManager

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


def torch_dtypes() -> AbstractContextManager[object]:
    """Within the block JAX has 64-bit types, without which it would cut int64 and float64 in half in silence.

    Example:
        >>> with torch_dtypes():
        ...     jnp.arange(2, dtype=jnp.int64).dtype.name
        'int64'
    """
    return jax.enable_x64(True)
