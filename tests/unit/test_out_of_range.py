"""A position or class that does not exist, where PyTorch raises, gives a loudly wrong result in a compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, tensor

jax = pytest.importorskip("jax")

from bridge.arrays import to_jax  # noqa: E402
from bridge.lowering import run  # noqa: E402
from bridge.trace import trace  # noqa: E402

Function = Callable[[Tensor, Tensor], Tensor]

MODELS, ROWS, COLUMNS = 3, 5, 4
ODD, PLACE = 1, 2
"""The model, and the place among its indices, that get a position outside."""

VALUES = torch.linspace(-2, 3, MODELS * ROWS * COLUMNS).reshape(MODELS, ROWS, COLUMNS)
INDICES = tensor([[0, 3, 3], [1, 3, 2], [2, 0, 1]])
FIRST = tensor([0, 1, 3])
WEIGHT = tensor([1.0, 2.0, 0.5, 3.0])


@pytest.fixture(autouse=True)
def _sixty_four_bits():
    with jax.enable_x64(True):
        yield


class Compiled:
    """A function of one model over all models, compiled once, and its gradient with respect to the values."""

    def __init__(self, function: Function, values: Tensor = VALUES, indices: Tensor = INDICES) -> None:
        traced = trace(lambda given: [function(*given)], [values[0], indices[0]])
        constants = {name: to_jax(constant) for name, constant in traced.constants.items()}
        self._compiled = 0

        def of_model(value, index):
            self._compiled += 1
            result, pull_back = jax.vjp(lambda own: run(traced, [own, index], constants=constants)[0], value)
            slope = (
                jax.numpy.ones_like(result) if result.dtype.kind == "f" else np.zeros(result.shape, jax.dtypes.float0)
            )
            return result, pull_back(slope)[0]

        self._program = jax.jit(jax.vmap(of_model))

    def __call__(self, values: Tensor, indices: Tensor) -> tuple[np.ndarray, np.ndarray]:
        result, slopes = self._program(to_jax(values), to_jax(indices))
        assert self._compiled == 1
        return np.asarray(result), np.asarray(slopes)


def of_torch(function: Function, values: Tensor, indices: Tensor, counted: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Results, and the gradients of the sum of the counted rows, in a loop over models."""
    results, slopes = [], []
    for value, index, own in zip(values, indices, counted, strict=True):
        value = value.clone().requires_grad_()
        result = function(value, index)
        (slope,) = torch.autograd.grad(result[own].sum(), value)
        results.append(result.detach().numpy())
        slopes.append(slope.numpy())
    return np.stack(results), np.stack(slopes)


def with_one(indices: Tensor, wrong: float) -> Tensor:
    changed = indices.clone()
    changed[ODD, PLACE] = wrong
    return changed


READS: dict[str, tuple[Function, Sequence[int]]] = {
    "rows": (lambda x, i: x[i], (99, 5, -6)),
    "columns": (lambda x, i: x[:, i].T, (99, -5)),
    "first of two": (lambda x, i: x[i, FIRST], (99, -6)),
    "second of two": (lambda x, i: x[FIRST, i], (99, -5)),
    "far apart": (lambda x, i: x.reshape(5, 2, 2)[i, :, FIRST % 2], (99, -6)),
    "index_select": (lambda x, i: x.index_select(0, i), (99, 5, -1)),
    "gather": (lambda x, i: x.gather(0, i[:, None].expand(3, 4)), (99, 5, -1)),
    "gather along rows": (lambda x, i: x[:3].gather(1, i[:, None]), (99, 4, -1)),
    "take": (lambda x, i: x.take(i), (99, 20, -21)),
    "embedding": (lambda x, i: F.embedding(i, x), (99, 5, -1)),
    "embedding with padding": (lambda x, i: F.embedding(i, x, padding_idx=3), (99, -1)),
    "embedding by frequency": (lambda x, i: F.embedding(i, x, scale_grad_by_freq=True), (99, -1)),
    "bags summed": (lambda x, i: F.embedding_bag(i[:, None], x, mode="sum"), (99, -1)),
    "bags averaged": (lambda x, i: F.embedding_bag(i[:, None], x, mode="mean"), (99, -1)),
    "largest of bags": (lambda x, i: F.embedding_bag(i[:, None], x, mode="max"), (99, -1)),
    "bags by offsets": (lambda x, i: F.embedding_bag(i, x, torch.arange(3), mode="sum"), (99, -1)),
    "nll": (lambda x, i: F.nll_loss(x[:3], i, reduction="none"), (99, 4, -1)),
    "nll of images": (lambda x, i: F.nll_loss(x[:3, :, None, None], i[:, None, None], reduction="none"), (99, -1)),
    "cross entropy": (lambda x, i: F.cross_entropy(x[:3], i, WEIGHT, reduction="none"), (99, 4, -1)),
    "smooth cross entropy": (
        lambda x, i: F.cross_entropy(x[:3], i, reduction="none", label_smoothing=0.1, ignore_index=0),
        (99, -1),
    ),
    "margins": (lambda x, i: F.multi_margin_loss(x[:3], i, weight=WEIGHT, reduction="none"), (99, 4, -1)),
    "margins of several": (
        lambda x, i: F.multilabel_margin_loss(x[:3], F.pad(i[:, None], (0, 3), value=-1), reduction="none"),
        (99, -5),
    ),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_outside_is_nan_and_the_rest_is_as_in_torch(name: str) -> None:
    function, outside = READS[name]
    program = Compiled(function)
    counted = torch.ones(MODELS, 3, dtype=torch.bool)
    for own, other in zip(program(VALUES, INDICES), of_torch(function, VALUES, INDICES, counted), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    counted[ODD, PLACE] = False
    expected, slopes = of_torch(function, VALUES, INDICES, counted)
    for wrong in outside:
        with pytest.raises((IndexError, RuntimeError)):
            function(VALUES[ODD], with_one(INDICES, wrong)[ODD])
        result, own_slopes = program(VALUES, with_one(INDICES, wrong))
        assert np.isnan(result[ODD, PLACE]).all()
        np.testing.assert_allclose(result[counted.numpy()], expected[counted.numpy()], rtol=1e-5, atol=1e-6)
        if name in NAN_TO_THE_ROW:
            kept = counted.numpy()
            np.testing.assert_allclose(own_slopes[:, :3][kept], slopes[:, :3][kept], rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(own_slopes, slopes, rtol=1e-5, atol=1e-6)


NAN_TO_THE_ROW = ("cross entropy", "smooth cross entropy", "margins", "margins of several")
"""The scores of the row itself get a gradient, of whatever value; those of other rows get theirs."""


def test_negative_positions_count_from_the_end_where_they_do_in_torch() -> None:
    for function in (READS["rows"][0], READS["columns"][0], READS["first of two"][0], READS["take"][0]):
        result, _ = Compiled(function)(VALUES, with_one(INDICES, -2))
        np.testing.assert_allclose(result[ODD], function(VALUES[ODD], with_one(INDICES, -2)[ODD]))


def test_integers_read_outside_are_the_smallest() -> None:
    integers = torch.arange(5)
    result, _ = Compiled(lambda x, i: integers[i])(VALUES, with_one(INDICES, 99))
    assert (result == np.iinfo(np.int64).min).sum() == 1
    assert result[ODD, PLACE] == np.iinfo(np.int64).min


def test_a_class_that_does_not_exist_is_seen_in_one_hot_vectors() -> None:
    program = Compiled(lambda x, i: F.one_hot(i, num_classes=4))
    for wrong in (4, 7, -1):
        result, _ = program(VALUES, with_one(INDICES, wrong))
        expected = F.one_hot(INDICES, 4)
        expected[ODD, PLACE] = torch.iinfo(torch.int64).min
        np.testing.assert_array_equal(result, expected)


def test_targets_and_probabilities_outside_of_zero_to_one() -> None:
    def function(x: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy(x, target, WEIGHT[:3], reduction="none")

    values, targets = VALUES[:, 0, :3].sigmoid(), INDICES / 3
    program = Compiled(function, values, targets)
    counted = torch.ones(MODELS, 3, dtype=torch.bool)
    for own, other in zip(program(values, targets), of_torch(function, values, targets, counted), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    counted[ODD, PLACE] = False
    expected, slopes = of_torch(function, values, targets, counted)
    for wrong in (2.0, -0.5, 1.001):
        result, own_slopes = program(values, with_one(targets, wrong))
        np.testing.assert_array_equal(np.isnan(result), ~counted.numpy())
        np.testing.assert_allclose(result[counted.numpy()], expected[counted.numpy()], rtol=1e-5)
        np.testing.assert_allclose(own_slopes, slopes, rtol=1e-5, atol=1e-6)
        result, _ = program(with_one(values, wrong), targets)
        np.testing.assert_array_equal(np.isnan(result), ~counted.numpy())


WRITES: dict[str, tuple[Function, Sequence[int]]] = {
    "index_put": (lambda x, i: (x * 1).index_put((i,), x[:3]), (99, -6)),
    "accumulating": (lambda x, i: x.index_put((i,), x[:3], accumulate=True), (99, -6)),
    "second of two": (lambda x, i: x.index_put((FIRST, i), x[0, 0]), (99, -5)),
    "item assignment": (lambda x, i: [y := x.clone(), y.__setitem__(i, 0.0)][0], (99, -6)),
    "index_add": (lambda x, i: x.index_add(0, i, x[:3], alpha=2), (99, -1)),
    "index_copy": (lambda x, i: x.index_copy(1, i, x[:, :3]), (99, -1)),
    "index_fill": (lambda x, i: x.index_fill(0, i, 7.0), (99, -6)),
    "scatter": (lambda x, i: x.scatter(0, i[:, None], x[:3, :1] * 1), (99, -1)),
    "scatter a number": (lambda x, i: x.scatter(1, i[:, None], 2.0), (99, -1)),
    "scatter_add": (lambda x, i: x.scatter_add(0, i[:, None].expand(3, 4), x[:3]), (99, -1)),
    "largest": (lambda x, i: x.scatter_reduce(0, i[:, None].expand(3, 4), x[:3], "amax"), (99, -1)),
    "mean": (lambda x, i: x.scatter_reduce(0, i[:, None].expand(3, 4), x[:3], "mean", include_self=False), (99, -1)),
    "product": (lambda x, i: x.scatter_reduce(0, i[:, None].expand(3, 4), x[:3] + 9, "prod"), (99, -1)),
    "index_reduce": (lambda x, i: x.index_reduce(0, i, x[:3], "amin"), (99, -1)),
    "put": (lambda x, i: x.put(i, x[0, :3]), (99, -21)),
    "unpooling": (lambda x, i: F.max_unpool1d(x[:1, :3], i[None], 2), (99,)),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_outside_is_seen_in_its_own_model(name: str) -> None:
    function, outside = WRITES[name]
    # Nothing is written twice, for which PyTorch promises no order.
    indices = tensor([[0, 3, 2], [1, 3, 0], [2, 0, 1]])
    program = Compiled(function, indices=indices)
    counted = torch.ones(MODELS, len(function(VALUES[0], indices[0])), dtype=torch.bool)
    expected, slopes = of_torch(function, VALUES, indices, counted)
    for own, other in zip(program(VALUES, indices), (expected, slopes), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    # The nearest place of a position outside is written by others as well.
    for place, last in ((0, 3), (1, 3), (2, 3), (2, 0)):
        for wrong in outside:
            changed = indices.clone()
            changed[ODD] = last
            changed[ODD, place] = wrong
            with pytest.raises((IndexError, RuntimeError)):
                function(VALUES[ODD], changed[ODD])
            result, _ = program(VALUES, changed)
            assert np.isnan(result[ODD]).any()
            others = [model for model in range(MODELS) if model != ODD]
            np.testing.assert_allclose(result[others], expected[others], rtol=1e-5, atol=1e-6)


def test_a_scattered_position_outside_spoils_its_own_line_only() -> None:
    result, _ = Compiled(lambda x, i: x[:3].scatter(1, i[:, None], 2.0))(VALUES, with_one(INDICES, 99))
    assert {(model, row) for model, row, _ in np.argwhere(np.isnan(result)).tolist()} == {(ODD, PLACE)}


def test_offsets_that_bags_cannot_have() -> None:
    def function(x: Tensor, i: Tensor) -> Tensor:
        return F.embedding_bag(FIRST, x, i)

    offsets = tensor([[0, 1, 2], [0, 0, 3], [0, 2, 2]])
    program = Compiled(function, indices=offsets)
    results, _ = program(VALUES, offsets)
    for result, value, own in zip(results, VALUES, offsets, strict=True):
        np.testing.assert_allclose(result, function(value, own), rtol=1e-6)
    for wrong in (tensor([1, 2, 2]), tensor([0, 1, 4])):
        changed = offsets.clone()
        changed[ODD] = wrong
        with pytest.raises(RuntimeError):
            function(VALUES[ODD], wrong)
        assert np.isnan(program(VALUES, changed)[0]).any(axis=(1, 2)).tolist() == [False, True, False]


MASKED: dict[str, tuple[Function, Sequence[int]]] = {
    "index_put": (lambda x, i: x[:3].index_put((i > 0,), x[3:]), (0, 3)),
    "masked_scatter": (lambda x, i: x[:3].masked_scatter((i > 0)[:, None], x[3:]), (3,)),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_that_selects_another_number_than_there_are_values(name: str) -> None:
    function, selected = MASKED[name]
    two = tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0]])
    program = Compiled(function, indices=two)
    counted = torch.ones(MODELS, 3, dtype=torch.bool)
    for own, other in zip(program(VALUES, two), of_torch(function, VALUES, two, counted), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)
    for number in selected:
        changed = two.clone()
        changed[ODD] = torch.arange(3) < max(number, 1)
        with pytest.raises(RuntimeError):
            function(VALUES[ODD], changed[ODD])
        result, _ = program(VALUES, changed)
        assert np.isnan(result).any(axis=(1, 2)).tolist() == [model == ODD for model in range(MODELS)]
