"""A batch on the XLA backend as a module of flax.nnx, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from bridge import TorchModule  # names what is missing where flax is
from bridge.arrays import to_torch
from bridge.dtypes import as_jax_dtype, torch_dtypes
from bridge.flax_module import values_of
from mb_jax.convolution import convolution_form
from mb_torch.errors import InvalidState

if TYPE_CHECKING:
    from mb_jax.engine import JaxBackend

_NOTHING_LOADED = "Nothing was loaded."


def to_flax(backend: JaxBackend) -> TorchModule:
    """Return a flax module with copies of the stacks as variables.

    Args:
        backend: The backend of the batch; what it does later leaves the module alone.

    Returns:
        A module with a leading model axis, in the modes and with the options of the batch.

    Example:
        >>> from mb_torch import ModelBatch
        >>> from torch import nn
        >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)], backend="jax")
        >>> to_flax(mb.backend)["weight"].shape
        (3, 2, 4)
    """
    options, state, num_models = backend.options, backend.spec.state, backend.spec.num_models
    return TorchModule(
        backend.spec.prototype,
        num_models=num_models,
        values=state.tensors,
        translator=options.translator,
        verify=options.verify,
        convolution=convolution_form(options.convolution, num_models),
    )


def load_flax(backend: JaxBackend, source: TorchModule | Mapping[str, Any]) -> None:
    """Set the stacks to copies of a flax module's variables, all or none.

    Args:
        backend: The backend of the batch.
        source: A `TorchModule`, its ``nnx.State``, or a flat dict of arrays by name; with a leading model axis.

    Raises:
        InvalidState: Names the variable; the batch is unchanged.

    Example:
        >>> from mb_torch import ModelBatch
        >>> from torch import nn
        >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)], backend="jax")
        >>> load_flax(mb.backend, {"weight": jnp.ones((3, 2, 4)), "bias": jnp.zeros((3, 2))})
        >>> mb.stacked_params["weight"].sum().item()
        24.0
    """
    if not isinstance(source, (TorchModule, Mapping)):
        raise InvalidState(
            "load_flax", received=type(source).__name__, expected="a TorchModule, an nnx.State or a dict of arrays"
        )
    values = source.arrays() if isinstance(source, TorchModule) else values_of(source)
    stacks = backend.spec.state.tensors
    missing = [name for name in stacks if name not in values]
    unknown = [name for name in values if name not in stacks]
    if missing or unknown:
        raise InvalidState(
            f"the variables do not fit the batch: missing {missing}, unknown {unknown}", fix=_NOTHING_LOADED
        )
    tensors = {name: _checked(name, values[name], stack) for name, stack in stacks.items()}
    for name, mirror in (*backend.spec.state.parameters.items(), *backend.spec.state.buffers.items()):
        with torch.no_grad():
            mirror.copy_(tensors[name])


def _checked(name: str, value: Any, stack: Tensor) -> Tensor:
    """The value as a tensor that has the form of a stack."""
    shape, dtype = tuple(stack.shape), as_jax_dtype(stack.dtype)
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (jax.Array, np.ndarray)):
        received = f"a {type(value).__name__}"
    elif isinstance(value, jax.Array) and value.is_deleted():
        received = "an array that was deleted, most likely because it was donated"
    elif value.shape != shape or value.dtype != dtype:
        received = f"{value.dtype} of shape {value.shape}"
    else:
        with torch_dtypes():
            return to_torch(jnp.asarray(value))
    raise InvalidState(
        f"variable {name!r}", received=received, expected=f"{dtype} of shape {shape}", fix=_NOTHING_LOADED
    )
