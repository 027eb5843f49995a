"""Where the arrays of a batch live: on one device, or with the model axis spread over the devices of a mesh.

Models never talk to each other, so neither do devices: every device runs the program of its own models, wrapped in
``jax.shard_map``. Left to itself the compiler would exchange data where models share an operation (grouped
convolutions, chunks of models taken one after another).

JAX wants equal shards. Each device gets ``ceil(num_models / devices)`` models, and the arrays end with copies of the
last model where that is more than there are: 13 models on 8 devices are 2 on each of 7, with one copy. A copy is a
model like all others whose results nobody reads, and it takes no time of its own, since another device has as many
models to run. It is cut off wherever values go to PyTorch. (The largest number of devices that divides the number of
models, which needs no copies, would run 13 models on one device.)

With several processes (`init_distributed`) every process runs the same script and makes the same batch, and keeps
the models of its own devices. Losses reach every process. Whatever reads parameters, buffers, optimizer states or
outputs (``state_dict``, ``save_all``, a look at a parameter) gathers them and has to be done by all processes; write
files in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Literal

import jax
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

from bridge.arrays import check_fits, copy_to_torch, to_jax, to_numpy, to_torch, torch_dtype_of
from mb_jax.start import usable_cores
from mb_torch.errors import InvalidInput, Unsupported

_AXIS = "models"
EVERYWHERE = PartitionSpec()
"""What all devices have whole."""


def along(axis: int = 0) -> PartitionSpec:
    """Say which axis of an array is that of the models.

    Example:
        >>> along(1) == PartitionSpec(None, "models")
        True
    """
    return PartitionSpec(*[None] * axis, _AXIS)


def axis_of_models(spec: PartitionSpec) -> int:
    """The axis that `along` was made for; -1 for `EVERYWHERE`.

    Example:
        >>> axis_of_models(along(1)), axis_of_models(EVERYWHERE)
        (1, -1)
    """
    return len(spec) - 1


class Layout:
    """All arrays on one device. What is the same for all layouts is described here.

    Example:
        >>> ONE_DEVICE.local_models(5)
        5
    """

    num_devices = 1

    def local_models(self, num_models: int) -> int:
        """How many models a program runs on one device."""
        return num_models

    def place(self, values: Any, axis: int = 0, *, fill: Literal["edge", "constant"] = "edge") -> Any:
        """Bring values per model to their devices.

        Args:
            values: A tensor or array.
            axis: The axis of the models.
            fill: What follows the last model where the devices have room for more: its copies, or zeros.
        """
        return to_jax(values) if isinstance(values, Tensor) else values

    def share(self, tensor: Tensor) -> jax.Array:
        """Bring values that all models share to all devices."""
        return to_jax(tensor)

    def push(self, tensor: Tensor) -> jax.Array:
        """As `place`, in memory that a program may be given for its results."""
        return to_jax(tensor, donated=True)

    def check(self, array: jax.Array, tensor: Tensor) -> None:
        """Raise `InvalidInput` unless an array is what `push` would make of a tensor but for the values."""
        check_fits(array, tensor)

    def copy(self, array: jax.Array, tensor: Tensor) -> None:
        """Copy values per model into a tensor."""
        copy_to_torch(array, tensor)

    def read(self, array: jax.Array) -> Tensor:
        """Return values per model as a tensor; JAX does not use the array afterwards."""
        return to_torch(array)

    def empty(self, array: jax.Array) -> Tensor:
        """Return a tensor for `copy`, whose values until then are none that could be taken for results."""
        return _without_values(array.shape, torch_dtype_of(array))

    def whole(self, array: jax.Array, axis: int = 0) -> jax.Array:
        """Return values per model so that every process has those of all models, without waiting for them."""
        return array

    def spread(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """Make a function of `local_models` models one of all models.

        Args:
            function: To be compiled.
            inputs: For its arguments, a tree of `along` and `EVERYWHERE`, or one of them for a whole subtree.
            outputs: The same for what it returns.
        """
        return function


def _without_values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # What reads memory past PyTorch's functions (torch.tensor) sees these.
    if dtype == torch.bool:
        return torch.zeros(shape, dtype=dtype)
    smooth = dtype.is_floating_point or dtype.is_complex
    return torch.full(shape, torch.nan if smooth else torch.iinfo(dtype).min, dtype=dtype)


ONE_DEVICE = Layout()


class Spread(Layout):
    """The model axis over several devices; made by `layout_for`, which makes one of each kind.

    Args:
        num_models: How many models there are.
        devices: The devices.

    Attributes:
        padded: Length of the model axis, with the copies at its end.
    """

    def __init__(self, num_models: int, devices: Sequence[jax.Device]) -> None:
        self.num_models = num_models
        self.num_devices = len(devices)
        self.padded = self.local_models(num_models) * len(devices)
        self._mesh = Mesh(np.array(devices), (_AXIS,))
        self._shardings: dict[PartitionSpec, NamedSharding] = {}
        self._gatherings: dict[int, Callable[[jax.Array], jax.Array]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process may have fewer devices.
        return _spread, (self.num_models, self.num_devices // jax.process_count())

    def local_models(self, num_models: int) -> int:
        """See `Layout`."""
        return -(-num_models // self.num_devices)

    def place(self, values: Any, axis: int = 0, *, fill: Literal["edge", "constant"] = "edge") -> jax.Array:
        """See `Layout`."""
        host = to_numpy(values) if isinstance(values, Tensor) else np.asarray(values)
        missing = self.padded - self.num_models
        if missing:
            host = np.pad(host, [(0, missing if index == axis else 0) for index in range(host.ndim)], mode=fill)
        return self._put(host, along(axis))

    def share(self, tensor: Tensor) -> jax.Array:
        """See `Layout`."""
        return self._put(to_numpy(tensor), EVERYWHERE)

    def _put(self, host: np.ndarray[Any, Any], places: PartitionSpec) -> jax.Array:
        if places not in self._shardings:
            self._shardings[places] = NamedSharding(self._mesh, places)
        # Unlike device_put it asks other processes nothing, and it is faster for small arrays.
        with jax.enable_x64(True):
            return jax.make_array_from_callback(host.shape, self._shardings[places], host.__getitem__)

    def push(self, tensor: Tensor) -> jax.Array:
        """See `Layout`."""
        return self.place(tensor)

    def check(self, array: jax.Array, tensor: Tensor) -> None:
        """See `Layout`."""
        received = torch_dtype_of(array), array.shape
        expected = tensor.dtype, (self.padded, *tensor.shape[1:])
        if received != expected:
            raise InvalidInput("an array for a tensor", received=received, expected=expected)

    def copy(self, array: jax.Array, tensor: Tensor) -> None:
        """See `Layout`."""
        with torch.no_grad():
            tensor.copy_(self.read(array))

    def read(self, array: jax.Array) -> Tensor:
        """See `Layout`."""
        if array.is_fully_addressable:
            return to_torch(array)[: self.num_models]
        return to_torch(self.whole(array))

    def empty(self, array: jax.Array) -> Tensor:
        """See `Layout`."""
        return _without_values((self.num_models, *array.shape[1:]), torch_dtype_of(array))

    def whole(self, array: jax.Array, axis: int = 0) -> jax.Array:
        """See `Layout`."""
        with jax.enable_x64(True):
            return self._gathering(axis)(array)

    def _gathering(self, axis: int) -> Callable[[jax.Array], jax.Array]:
        if axis not in self._gatherings:
            rows = (*[slice(None)] * axis, slice(self.num_models))
            everywhere = NamedSharding(self._mesh, EVERYWHERE)
            self._gatherings[axis] = jax.jit(lambda array: array[rows], out_shardings=everywhere)
        return self._gatherings[axis]

    def spread(self, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
        """See `Layout`."""
        # check_vma would ask for a mark on every constant that a loop carries.
        return jax.shard_map(function, mesh=self._mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


# On CPUs: models of fewer numbers take longer to be dispatched to several devices than to run on one.
_LEAST_NUMBERS_ON_HOST_DEVICES = 2**16


def layout_for(num_models: int, asked: int | Literal["all"] | None = None, num_numbers: int = 0) -> Layout:
    """Choose the devices of a batch.

    Args:
        num_models: How many models there are.
        asked: How many devices to use at most, or ``"all"``. None is all accelerators; on a CPU a device for each
            core (see `mb_jax.start.prepare`) if the models have at least 65,536 parameters together, else one.
            Of several processes, each uses as many.
        num_numbers: How many parameters all models have together.

    Returns:
        The same object for as many models on as many devices.

    Raises:
        InvalidInput: There are not so many devices, or a number was given with several processes.

    Example:
        >>> layout_for(4, 1) is ONE_DEVICE
        True
    """
    devices, num_processes = jax.local_devices(), jax.process_count()
    if num_processes > 1 and isinstance(asked, int):
        raise InvalidInput(
            "backend_options['devices']",
            received=asked,
            expected="'all' or None with several processes",
        )
    count = asked if isinstance(asked, int) else len(devices)
    if count > len(devices):
        raise InvalidInput("backend_options['devices']", received=count, expected=f"at most {len(devices)}")
    if asked is None and devices[0].platform == "cpu":
        count = min(count, usable_cores()) if num_numbers >= _LEAST_NUMBERS_ON_HOST_DEVICES else 1
    # Processes get equal shares first: none may be left without models, so that all take part in all programs.
    models_each = -(-num_models // (count * num_processes))
    used = -(-num_models // (models_each * num_processes))
    return ONE_DEVICE if used * num_processes == 1 else _spread(num_models, used)


@cache
def _spread(num_models: int, num_devices: int) -> Layout:
    """Models on so many devices of each process."""
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    by_process = groupby(devices, key=lambda device: device.process_index)
    return Spread(num_models, [device for _, own in by_process for device in list(own)[:num_devices]])


def placed(tensors: Sequence[Tensor], mapped: Sequence[bool], layout: Layout, axis: int = 0) -> list[Any]:
    """Bring tensors to the devices, as arguments of a program; some of them have a model axis.

    Args:
        tensors: Arguments of models.
        mapped: For each of them, whether it has values per model.
        layout: Where they go.
        axis: The axis of the models.

    Example:
        >>> placed([torch.ones(2)], [True], ONE_DEVICE)[0].shape
        (2,)
    """
    if layout is ONE_DEVICE:
        # A program takes NumPy arrays along for a fifth of what `jax.device_put` costs.
        return [to_numpy(tensor) if tensor.device.type == "cpu" else to_jax(tensor) for tensor in tensors]
    return [
        layout.place(tensor, axis) if flag else layout.share(tensor)
        for tensor, flag in zip(tensors, mapped, strict=True)
    ]


def common_layout(layouts: Sequence[Layout], chosen: Sequence[bool]) -> Layout:
    """Return the layout that all batches of a step can have.

    Args:
        layouts: That of each batch.
        chosen: For each of them, whether the user has said how many devices there are to be.

    Raises:
        InvalidInput: The user has said different things.

    Example:
        >>> common_layout([ONE_DEVICE, ONE_DEVICE], [True, False]).num_devices
        1
    """
    asked = [layout for layout, flag in zip(layouts, chosen, strict=True) if flag]
    if any(layout is not asked[0] for layout in asked):
        raise InvalidInput(
            "a joint step",
            received=f"batches on {[layout.num_devices for layout in asked]} devices",
            expected="the same backend_options['devices'] for all",
        )
    return max(asked or layouts, key=lambda layout: layout.num_devices)


def init_distributed(rank: int, size: int, address: str) -> None:
    """Connect this process with the others; see `mb_torch.backend.init_distributed`.

    Args:
        rank: Number of this process, from 0.
        size: How many processes there are.
        address: ``host:port`` of process 0.

    Raises:
        Unsupported: JAX has been used already, or the processes have been connected before.
    """
    if size == 1:
        return
    # Accelerators have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(address, num_processes=size, process_id=rank)
    except RuntimeError as error:
        raise Unsupported(
            f"init_distributed: JAX refuses ({error})",
            fix="Call it once, before the first ModelBatch(backend='jax') and any other use of JAX.",
        ) from error
