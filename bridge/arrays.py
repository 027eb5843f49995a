"""Tensors to JAX arrays and back.

Dtypes stay what they are: float16, bfloat16, float32, float64, complex64, complex128, bool and the integers of 8 to
64 bits, signed or not. 64 bits are kept whether or not ``jax.enable_x64`` is on where the functions are called; JAX
programs on such arrays have to run with it on, or they compute in 32 bits. Everything else raises `Unsupported`
before anything is copied: quantized and 8-bit floating point dtypes, sparse tensors, tensors without values (meta),
arrays of random keys.

Arrays may be spread over several devices of this process: their values are gathered when they go to PyTorch. Arrays
on devices that PyTorch lacks (a TPU, or a GPU with a PyTorch made for the CPU) are copied to the host.

CUDA tensors take the same way through DLPack, with a copy on the device. That part is untested.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from mb_torch.errors import InvalidInput, Unsupported

_JAX_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    **{
        getattr(torch, name): np.dtype(name)
        for name in (
            "float16 float32 float64 complex64 complex128 bool int8 int16 int32 int64 uint8 uint16 uint32 uint64"
        ).split()
    },
}
_TORCH_DTYPES = {own: dtype for dtype, own in _JAX_DTYPES.items()}


def to_jax(tensor: Tensor, *, donated: bool = False) -> jax.Array:
    """Copy a tensor into a new JAX array, on JAX's default device or the tensor's GPU.

    Writing to the tensor afterwards does not reach the array.

    Args:
        tensor: Any strides, any number of dimensions, with or without gradient.
        donated: Use memory of JAX's own, which a program that the array is donated to can use again; takes longer.

    Returns:
        An array of the same shape and dtype.

    Raises:
        InvalidInput: Not a tensor.
        Unsupported: A tensor JAX has no form for; see the module's text.

    Example:
        >>> to_jax(torch.tensor([1, 2])).dtype
        dtype('int64')
    """
    values = _checked(tensor)
    with jax.enable_x64(True):
        if values.device.type == "cpu":
            # JAX may read the memory later, or take it over: it gets a copy that nobody else knows.
            own = _copied(values)
            return jnp.array(own, copy=True) if donated else jax.device_put(own)
        # An imported array cannot be donated, and the source must not change before it has been read.
        imported = jax.dlpack.from_dlpack(values.contiguous())
        return jnp.array(imported, copy=True).block_until_ready()


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Copy a tensor into a new NumPy array, in the dtype that its JAX array would have.

    Raises:
        InvalidInput: Not a tensor.
        Unsupported: A tensor JAX has no form for; see the module's text.

    Example:
        >>> to_numpy(torch.ones(2, dtype=torch.bfloat16)).dtype
        dtype(bfloat16)
    """
    return _copied(_checked(tensor).cpu())


def _checked(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise InvalidInput("to_jax", received=type(tensor).__name__, expected="a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise Unsupported(f"to_jax: a tensor of layout {tensor.layout}", fix="Use tensor.to_dense().")
    if tensor.is_meta:
        raise Unsupported("to_jax: a tensor on the meta device has no values")
    if tensor.dtype not in _JAX_DTYPES:
        raise Unsupported(f"to_jax: JAX arrays of {tensor.dtype}", fix="Convert the tensor to another dtype first.")
    return tensor.detach().resolve_conj().resolve_neg()


def _copied(values: Tensor) -> np.ndarray[Any, Any]:
    is_bfloat16 = values.dtype is torch.bfloat16
    array = np.array((values.view(torch.int16) if is_bfloat16 else values).numpy(), copy=True, order="C")
    return array.view(ml_dtypes.bfloat16) if is_bfloat16 else array


def to_torch(array: jax.Array) -> Tensor:
    """Hand an array's memory over to torch, without a copy. Waits until the array has been computed.

    Values that are spread over devices, or on one that PyTorch lacks, are copied to the host. The caller promises
    that JAX does not use the array afterwards: torch may write to it. (A jitted program given the array for donation
    would copy it instead as long as the tensor lives.)

    Args:
        array: An array on devices of this process, or with equal values on all devices.

    Returns:
        A tensor of the same shape and dtype in the same memory.

    Raises:
        InvalidInput: Not a JAX array with values, or it was deleted (donated).
        Unsupported: An array torch has no form for (see the module's text), or spread over several processes.

    Example:
        >>> to_torch(jnp.arange(3.0)) * 2
        tensor([0., 2., 4.])
    """
    dtype = torch_dtype_of(array)
    if array.is_deleted():
        raise InvalidInput("the array was deleted, most likely because it was donated to a JAX program")
    if len(array.sharding.device_set) == 1:
        return _of_one_device(array)
    if array.is_fully_replicated:
        return _of_one_device(array.addressable_data(0))
    if not array.is_fully_addressable:
        raise Unsupported("to_torch: an array that is spread over several processes", fix="Gather it in JAX first.")
    gathered = torch.empty(array.shape, dtype=dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            gathered[shard.index].copy_(_of_one_device(shard.data))
    return gathered


def _of_one_device(array: jax.Array) -> Tensor:
    (device,) = array.devices()
    if device.platform != "cpu" and not (device.platform == "gpu" and torch.cuda.is_available()):
        array = jax.device_put(array, jax.local_devices(backend="cpu")[0])
    result: Tensor = torch.utils.dlpack.from_dlpack(array.block_until_ready())
    return result


def torch_dtype_of(array: jax.Array) -> torch.dtype:
    """Say which torch dtype an array's values have.

    Raises:
        InvalidInput: Not a JAX array with values.
        Unsupported: torch has no such dtype.

    Example:
        >>> torch_dtype_of(jnp.zeros(2, "bfloat16"))
        torch.bfloat16
    """
    if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
        raise InvalidInput("an array for torch", received=type(array).__name__, expected="a jax.Array with values")
    dtype = _TORCH_DTYPES.get(array.dtype)
    if dtype is None:
        raise Unsupported(f"torch tensors of JAX's {array.dtype}")
    return dtype


def copy_to_torch(array: jax.Array, destination: Tensor) -> None:
    """Copy an array's values into a tensor, in place and without gradient.

    Waits until the array has been computed. The array may be donated afterwards.

    Args:
        array: As for `to_torch`.
        destination: A tensor of its shape and dtype, on any device and with any strides.

    Raises:
        InvalidInput: Shapes or dtypes differ, or the array has no values.
        Unsupported: An array torch has no form for; see the module's text.

    Example:
        >>> weight = torch.zeros(2)
        >>> copy_to_torch(jnp.ones(2, "float32"), weight)
        >>> weight
        tensor([1., 1.])
    """
    check_fits(array, destination)
    with torch.no_grad():
        # The view of JAX's memory ends with this statement: while it lives, donation would copy.
        destination.copy_(to_torch(array))


def check_fits(array: jax.Array, tensor: Tensor) -> None:
    """Raise `InvalidInput` unless an array and a tensor have the same shape and dtype.

    Example:
        >>> check_fits(jnp.ones(2, "float32"), torch.zeros(2))
    """
    dtype = torch_dtype_of(array)
    if array.shape != tensor.shape or dtype != tensor.dtype:
        raise InvalidInput(
            "an array for a tensor",
            received=f"{dtype} of shape {list(array.shape)}",
            expected=f"{tensor.dtype} of shape {list(tensor.shape)}",
        )
