"""Pytrees, with a short way for what they nearly always are: a tensor, or a few in a tuple, list or dict.

``torch.utils._pytree`` knows every container, also those that users register, but walking a few tensors with it costs
as much as a small layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_EMPTY = pytree.tree_structure({})


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of a pytree.

    Example:
        >>> leaves_of({"x": [1, 2], "y": (3,)})
        [1, 2, 3]
    """
    if isinstance(tree, Tensor):
        return [tree]
    # Classes derived from these may be registered as other containers, or as leaves.
    if type(tree) is tuple or type(tree) is list:
        return [leaf for item in tree for leaf in leaves_of(item)]
    if type(tree) is dict:
        return [leaf for item in tree.values() for leaf in leaves_of(item)]
    return pytree.tree_leaves(tree)


def path_of_leaf(tree: Any, index: int) -> str:
    """Say where a leaf is, for an error message.

    Example:
        >>> path_of_leaf({"x": [1, 2]}, 1)
        "['x'][1]"
    """
    try:
        return pytree.keystr(pytree.tree_leaves_with_path(tree)[index][0])
    except ValueError:  # a container that was registered without names for its entries
        return f"number {index}"


def take_apart(tree: Any) -> tuple[list[Any], pytree.TreeSpec | None]:
    """Return a pytree's leaves and its structure, which is None for a tensor alone.

    Example:
        >>> leaves, structure = take_apart({"x": 1, "y": 2})
        >>> put_together([10 * leaf for leaf in leaves], structure)
        {'x': 10, 'y': 20}
    """
    if isinstance(tree, Tensor):
        return [tree], None
    if type(tree) is dict and not tree:
        return [], _EMPTY
    return pytree.tree_flatten(tree)


def put_together(leaves: Sequence[Any], structure: pytree.TreeSpec | None) -> Any:
    """Undo `take_apart`, with the same leaves or others."""
    return leaves[0] if structure is None else pytree.tree_unflatten(leaves, structure)
