"""Translation by torchax, whose tensors are PyTorch tensors made of JAX arrays.

What it lacks for the purpose is added around it: ``torch.no_grad`` and ``detach`` stop gradients, tensors that the
function makes or takes from elsewhere become its own, and random numbers are a function of the key alone. Its tensors
never require gradients, so ``if tensor.requires_grad`` and the backward of an own ``torch.autograd.Function`` are
lost; the comparison with PyTorch shows the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bridge.probe import constant, translate_by_running
from bridge.torchax_import import DEVICE, Torchax, device_module, torchax
from bridge.trace import without_fast_paths
from bridge.translation import TensorFunction, Translation
from mb_torch.errors import Unsupported


class TorchaxTranslator:
    """Translates by running the function on the tensors of torchax."""

    name = "torchax"

    def translate(
        self, function: TensorFunction, inputs: Sequence[Tensor], modules: Sequence[nn.Module] = ()
    ) -> Translation:
        """Run a function once in PyTorch and once in torchax, on abstract values.

        Which inputs gradients reach is read off the JAX program, through float values.

        Raises:
            Unsupported: torchax is not installed, has no lowering for operations (all are listed), or is known to get
                them wrong.
        """
        torchax()
        return translate_by_running(self, function, inputs)

    def execute(self, function: TensorFunction, arrays: Sequence[jax.Array], key: jax.Array | None) -> list[jax.Array]:
        """Run a function on arrays."""
        package = torchax()
        own = [package.tensor(array, package.environment) for array in arrays]
        with ExitStack() as stack:
            stack.enter_context(without_fast_paths())
            stack.enter_context(device_module())
            stack.enter_context(package.environment.override_property(prng=key))
            stack.enter_context(package.environment)
            stack.enter_context(_Around(package))
            outputs = list(function(own))
        return [_array(package, output) for output in outputs]

    @contextmanager
    def note_missing(self, missing: set[str]) -> Iterator[None]:
        """Within the block, note the core operations that torchax has no lowering for."""
        operations = _MissingOperations(torchax(), missing)
        with operations, _KnownFunctions(torchax(), operations):
            yield


def _is_own(package: Torchax, value: Any) -> bool:
    return isinstance(value, (package.tensor, package.view))


def _array(package: Torchax, output: Any) -> jax.Array:
    # What is not its own does not depend on the inputs.
    array: jax.Array = output.jax() if _is_own(package, output) else constant(output)
    return array


def _knows(package: Torchax, func: Callable[..., Any]) -> bool:
    try:
        package.environment._get_op_or_decomp(func)
    except package.not_found:
        return False
    return True


class _Around(TorchFunctionMode):
    """Does before and after each torch function what torchax does not."""

    def __init__(self, package: Torchax) -> None:
        super().__init__()
        self._package = package

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        changes_first = _changes_first_argument(func)
        if not given and func in self._package.constructors and kwargs.get("device") is None:
            kwargs["device"] = DEVICE
        elif any(_is_own(self._package, tensor) for tensor in given):
            if changes_first and isinstance(args[0], Tensor) and not _is_own(self._package, args[0]):
                raise Unsupported(f"torchax: {func.__name__} changes a tensor that is no input of the function")
            args, kwargs = tree_map_only(Tensor, self._as_own, (args, kwargs))
        if torch.is_grad_enabled():
            return func(*args, **kwargs)
        if changes_first:
            rest, kwargs = tree_map_only(Tensor, self._stopped, (args[1:], kwargs))
            return func(args[0], *rest, **kwargs)
        return tree_map_only(self._package.tensor, self._stopped, func(*args, **kwargs))

    def _as_own(self, tensor: Tensor) -> Tensor:
        if _is_own(self._package, tensor):
            return tensor
        own: Tensor = self._package.tensor(constant(tensor), self._package.environment)
        return own

    def _stopped(self, tensor: Any) -> Any:
        if not _is_own(self._package, tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        return self._package.tensor(jax.lax.stop_gradient(tensor.jax()), self._package.environment)


def _changes_first_argument(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in _NOT_IN_PLACE)


_NOT_IN_PLACE = ("__index__", "__invert__", "__int__")


class _MissingOperations(TorchDispatchMode):
    """Notes operations without a lowering, except inside functions that torchax knows as a whole."""

    def __init__(self, package: Torchax, missing: set[str]) -> None:
        super().__init__()
        self.inside_known = False
        self._package = package
        self._missing = missing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.inside_known and not _knows(self._package, func):
            self._missing.add(str(func))
        return func(*args, **(kwargs or {}))


class _KnownFunctions(TorchFunctionMode):
    def __init__(self, package: Torchax, operations: _MissingOperations) -> None:
        super().__init__()
        self._package = package
        self._operations = operations

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self._operations.inside_known
        self._operations.inside_known = before or _knows(self._package, func)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._operations.inside_known = before
