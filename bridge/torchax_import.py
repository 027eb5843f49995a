"""Loads torchax, without what importing it changes in PyTorch for good.

``import torchax`` names PyTorch's spare device "jax" and registers a module for it, which cannot be undone: from then
on it is ``torch.accelerator.current_accelerator()``, and ``torch.random.fork_rng()`` raises. It also turns off the fast
path of attention and sets an environment variable. None of that is needed to run functions on its tensors, so none of
it stays. (A program that also uses torchax by itself imports torchax first; then nothing is changed here.)
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import torch
from torch._ops import OpOverloadPacket

from mb_torch.errors import Unsupported

DEVICE = torch.device("privateuseone", 0)
"""What torchax calls the device of its tensors, under the name that PyTorch gives it."""


class Torchax(NamedTuple):
    """What is used of the package.

    Attributes:
        environment: Holds its operations; of our own, so that settings of a program's environment do not matter.
        tensor: The class of its tensors.
        view: The class of views of them.
        constructors: Torch functions that make a tensor out of none.
        not_found: What it raises for an operation that it does not know.
    """

    environment: Any
    tensor: type
    view: type
    constructors: frozenset[Any]
    not_found: type[Exception]


@functools.cache
def torchax() -> Torchax:
    """Load the package once.

    Raises:
        Unsupported: It is not installed, or does not load beside this version of PyTorch.
    """
    with ExitStack() as stack:
        if "torchax" not in sys.modules:
            stack.enter_context(_without_lasting_changes())
        stack.enter_context(tolerant_overloads())
        try:
            importlib.import_module("torchax")
            tensor = importlib.import_module("torchax.tensor")
            view = importlib.import_module("torchax.view")
            environment = _environment(tensor, importlib.import_module("torchax.config"))
        except ModuleNotFoundError as error:
            if error.name != "torchax":
                raise
            raise Unsupported("torchax is not installed", fix="pip install torchax") from None
        except (AttributeError, ImportError) as error:
            raise Unsupported(f"torchax does not load beside torch {torch.__version__}: {error}") from error
    for own in (tensor.Tensor, view.View):
        # Where the device was not renamed, the name they give it does not exist.
        own.device = property(lambda _: DEVICE)
    return Torchax(
        environment, tensor.Tensor, view.View, frozenset(tensor.TENSOR_CONSTRUCTORS), tensor.OperatorNotFound
    )


def _environment(tensor: Any, config: Any) -> Any:
    class Environment(tensor.Environment):  # type: ignore[misc]
        def get_and_rotate_prng_key(self, generator: torch.Generator | None = None) -> Any:
            if generator is not None:
                raise Unsupported(
                    "torchax would draw the same numbers at each call from a torch.Generator",
                    fix="Draw without generator=.",
                )
            return super().get_and_rotate_prng_key()

    environment = Environment(config.Configuration(internal_respect_torch_return_dtypes=True))
    # As it is there, gradients flow through.
    environment.override_op_definition(
        torch.ops.aten.detach.default, lambda value: value.apply_jax(jax.lax.stop_gradient)
    )
    return environment


@contextmanager
def _without_lasting_changes() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        with (
            patch.object(torch.utils, "rename_privateuse1_backend", lambda name: None),
            patch.object(torch, "_register_device_module", lambda name, module: None),
            patch.dict(os.environ),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def device_module() -> Iterator[None]:
    """Within the block, PyTorch finds a module for the spare device, as it demands before it makes a tensor there.

    What PyTorch makes inside its own functions gets that far; it becomes a tensor of torchax all the same.
    """
    name = f"torch.{DEVICE.type}"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        sys.modules.pop(name, None)


@contextmanager
def tolerant_overloads() -> Iterator[None]:
    """Within the block, overloads for named dimensions exist, as placeholders where PyTorch has removed them.

    torchax 0.0.13 names 22 of them while it loads; PyTorch has had none since 2.13.

    Example:
        >>> with tolerant_overloads():
        ...     overload = torch.ops.aten.prod.dim_Dimname
    """
    if hasattr(torch.ops.aten.prod, "dim_Dimname"):
        yield
        return
    look_up = OpOverloadPacket.__getattr__

    def tolerant(packet: OpOverloadPacket, name: str) -> Any:
        try:
            return look_up(packet, name)
        except AttributeError:
            if "imname" in name or "names" in name:
                return object()
            raise

    with patch.object(OpOverloadPacket, "__getattr__", tolerant):
        yield
