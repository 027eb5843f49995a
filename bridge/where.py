"""Says which submodule is running, and which one calls an operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def running_module(modules: Sequence[nn.Module]) -> Iterator[Callable[[], str]]:
    """Within the block, the given function names the innermost submodule that is running.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with running_module([model]) as where:
        ...     _ = model[0].register_forward_pre_hook(lambda *_: print(where()))
        ...     _ = model(torch.zeros(1, 2))
        0 (Linear)
    """
    names = {
        id(submodule): f"{name or 'the model'} ({type(submodule).__name__})"
        for module in modules
        for name, submodule in module.named_modules()
    }
    running: list[nn.Module] = []

    def entered(module: nn.Module, _: Any) -> None:
        running.append(module)

    def left(*_: Any) -> None:
        running.pop()

    hooks = [register_module_forward_pre_hook(entered), register_module_forward_hook(left)]
    try:
        yield lambda: names.get(id(running[-1]), type(running[-1]).__name__) if running else "the function"
    finally:
        for hook in hooks:
            hook.remove()


class _Callers(TorchDispatchMode):
    def __init__(self, wanted: Collection[Any], where: Callable[[], str]) -> None:
        super().__init__()
        self.found: dict[Any, str] = {}
        self._wanted = wanted
        self._where = where

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._wanted:
            self.found.setdefault(func, self._where())
        return func(*args, **(kwargs or {}))


def callers(run: Callable[[], Any], modules: Sequence[nn.Module], operations: Collection[Any]) -> dict[Any, str]:
    """Run something in PyTorch and return the submodule that first calls each operation, where that shows.

    Example:
        >>> model = nn.Sequential(nn.ReLU())
        >>> relu = torch.ops.aten.relu.default
        >>> callers(lambda: model(torch.zeros(2)), [model], [relu])[relu]
        '0 (ReLU)'
    """
    with running_module(modules) as where, torch.no_grad(), _Callers(operations, where) as mode:
        run()
    return mode.found
