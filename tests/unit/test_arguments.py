"""Pytrees and arguments taken apart: as torch's own functions would, in fewer steps."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import _pytree as pytree

from mb_torch.routed import RoutedTensor
from mb_torch.stacked.arguments import Arguments
from mb_torch.trees import leaves_of, put_together, take_apart


class Pair(NamedTuple):
    """A registered container: torch knows every named tuple."""

    x: Any
    y: Any


class Record(dict):  # type: ignore[type-arg]
    """A class derived from dict is a leaf, unless it is registered."""


X, Y, Z = torch.arange(6.0).view(2, 3), torch.arange(2.0), torch.ones(4)
TREES = {
    "tensor": X,
    "none": None,
    "tuple": (X, None, "text", 3),
    "nested": {"b": [X, (Y,)], "a": {"z": Z, "empty": {}}, 3: ()},
    "named": Pair(X, [Pair(Y, Z)]),
    "ordered": OrderedDict(b=X, a=Y),
    "default": defaultdict(list, {"x": [X, Y]}),
    "leaf": (Record(x=X), Y),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_short_way_finds_the_same_leaves(tree: Any) -> None:
    assert list(map(id, leaves_of(tree))) == list(map(id, pytree.tree_leaves(tree)))
    leaves, structure = take_apart(tree)
    assert list(map(id, leaves)) == list(map(id, pytree.tree_leaves(tree)))
    assert pytree.tree_structure(put_together(leaves, structure)) == pytree.tree_structure(tree)


def arguments() -> Arguments:
    return Arguments(({"x": X, "n": 1}, Y, Pair(Z, "text")), (True, True, False))


def test_one_models_share() -> None:
    own, target, shared = arguments().of_model(1)
    assert torch.equal(own["x"], X[1])
    assert (own["n"], target.item()) == (1, 1.0)
    assert shared == Pair(Z, "text")
    assert shared.x is Z


def test_copies_share_no_memory() -> None:
    every, some = arguments().own_copies(), arguments().own_copies(only_shared=True)
    assert [leaf is given for leaf, given in zip(every.leaves, arguments().leaves, strict=True)] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert some.leaves[0] is X
    assert some.leaves[2] is Y
    assert some.leaves[3] is not Z
    assert torch.equal(some.trees[2].x, Z)


def test_versions_of_tensors_that_can_be_changed() -> None:
    with torch.inference_mode():
        frozen = torch.ones(2)
    changed = torch.ones(2)
    given = Arguments((changed, frozen), (False, False))
    before = given.versions()
    changed.add_(1)
    assert len(before) == 1
    assert given.versions() != before


def test_rows_of_routed_tensors_survive_copies() -> None:
    routed = RoutedTensor(torch.zeros(2, 3, 1), (3, 1))
    given = Arguments((routed, Z), (True, False))
    for one in (given, given.own_copies()):
        assert (one.rows, one.padded_rows) == ((3, 1), 3)
    assert given.plain().rows is None
    assert type(given.plain().leaves[0]) is torch.Tensor
