"""Which torch functions change a tensor they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def changes_first_argument(func: Callable[..., Any]) -> bool:
    """Whether a torch function works in place, by its name.

    Example:
        >>> import torch
        >>> changes_first_argument(torch.Tensor.add_), changes_first_argument(torch.Tensor.add)
        (True, False)
    """
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__invert__"))


def changed_arguments(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that a call writes to.

    Example:
        >>> import torch
        >>> changed_arguments(torch.add, (1, 2), {"out": 3}), changed_arguments(torch.Tensor.add_, (4, 5), {})
        ([3], [4])
    """
    out = kwargs.get("out")
    results = [] if out is None else [*out] if isinstance(out, (tuple, list)) else [out]
    if changes_first_argument(func):
        # Functions of nn.init give theirs by this name.
        results.append(args[0] if args else kwargs["tensor"])
    return results
