"""Translation by torch2jax, which stands JAX arrays in for tensors while a torch function runs.

It knows few functions, and it knows neither ``torch.no_grad`` nor most methods of tensors. It is GPL-3 (MIT for some
users), so it is called where it is installed and never required.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import jax
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from bridge.probe import constant, translate_by_running
from bridge.trace import without_fast_paths
from bridge.translation import TensorFunction, Translation
from mb_torch.errors import Unsupported


class Torch2JaxTranslator:
    """Translates by running the function on the arrays of torch2jax."""

    name = "torch2jax"

    def translate(
        self, function: TensorFunction, inputs: Sequence[Tensor], modules: Sequence[nn.Module] = ()
    ) -> Translation:
        """Run a function once in PyTorch and once in torch2jax, on abstract values.

        Which inputs gradients reach is read off the JAX program, through float values.

        Raises:
            Unsupported: torch2jax is not installed, or does not know functions that are called; lists those.
        """
        _package()
        return translate_by_running(self, function, inputs)

    def execute(self, function: TensorFunction, arrays: Sequence[jax.Array], key: jax.Array | None) -> list[jax.Array]:
        """Run a function on arrays."""

        def outputs(*stand_ins: Any) -> SimpleNamespace:
            # The package takes one result, by its `value`.
            return SimpleNamespace(value=[_array(output) for output in function(stand_ins)])

        with without_fast_paths():
            results: list[jax.Array] = _package().t2j(outputs)(*arrays, rng=key)
        return results

    @contextmanager
    def note_missing(self, missing: set[str]) -> Iterator[None]:
        """Within the block, note the functions and methods that torch2jax does not know."""
        with _Missing(missing):
            yield


def _package() -> Any:
    try:
        return importlib.import_module("torch2jax")
    except ModuleNotFoundError as error:
        if error.name != "torch2jax":
            raise
        raise Unsupported("torch2jax is not installed", fix="pip install torch2jax") from None


def _array(output: Any) -> jax.Array:
    array: jax.Array = constant(output) if isinstance(output, Tensor) else output.value
    return array


class _Missing(TorchFunctionMode):
    def __init__(self, missing: set[str]) -> None:
        super().__init__()
        self._missing = missing

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        package = _package()
        name = resolve_name(func) or getattr(func, "__name__", repr(func))
        parts = name.removesuffix(".__get__").split(".")
        has_method = name.startswith("torch.Tensor.") and hasattr(package.Torchish, parts[-1])
        if func not in package.HANDLED_FUNCTIONS and not has_method:
            self._missing.add(name.removesuffix(".__get__"))
        return func(*args, **(kwargs or {}))
