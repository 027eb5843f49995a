"""Padded tensors know their real rows through everything that is done to them, and never claim wrong ones."""

from __future__ import annotations

import copy
import io
import operator
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mb_torch.errors import InvalidInput
from mb_torch.routed import RoutedTensor, plain, routed_leaves, rows_from_weights, strip, with_rows
from mb_torch.row_tracking import common_rows

ROWS = (3, 1, 4)
SHAPE = (3, 4, 4, 4)  # every length occurs twice, so that operations on the wrong dimension keep the shape


def padding_of(rows, length):
    return torch.arange(length) >= torch.tensor(rows)[:, None]


def routed(*shape, rows=ROWS, seed=0):
    return RoutedTensor.wrap(torch.rand(shape or SHAPE, generator=torch.Generator().manual_seed(seed)), rows)


def with_other_padding(tensor):
    changed = tensor.plain().clone()
    changed[padding_of(tensor.rows, tensor.shape[1])] = 7.25
    return RoutedTensor.wrap(changed, tensor.rows)


def assert_rows(result, rows):
    assert type(result) is RoutedTensor
    assert result.rows == rows


def assert_plain(result):
    assert type(result) is Tensor


def assert_padding_stays_out(operation, tensor):
    """Real rows of the result are those of plain PyTorch, whatever the padding of the input holds."""
    result, other = operation(tensor), operation(with_other_padding(tensor))
    expected = operation(tensor.plain())
    torch.testing.assert_close(result.plain(), expected, rtol=0, atol=0, equal_nan=True)
    assert other.rows == result.rows
    for model, count in enumerate(result.rows):
        real = result.plain()[model, :count]
        torch.testing.assert_close(other.plain()[model, :count], real, rtol=0, atol=0, equal_nan=True)


KEPT = {
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "rsub": lambda x: 1 - x,
    "divide": lambda x: x / 255,
    "rdivide": lambda x: 1 / (x + 1),
    "power": lambda x: 2**x,
    "floordiv": lambda x: x // 0.3,
    "rmod": lambda x: 2 % (x + 1),
    "negative": operator.neg,
    "compare": lambda x: x == 0.5,
    "not": lambda x: ~(x > 0.5),
    "and": lambda x: (x > 0.2) & (x < 0.8),
    "with a plain tensor": lambda x: x * torch.arange(4.0),
    "plain tensor first": lambda x: torch.arange(4.0) - x,
    "where": lambda x: torch.where(x > 0.5, x, 0.0),
    "clamp": lambda x: x.clamp(0.1, 0.5),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "to dtype": lambda x: x.to(torch.float64),
    "to other": lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
    "half": lambda x: x.half(),
    "long": lambda x: (x * 9).long(),
    "type": lambda x: x.type(torch.float64),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "contiguous copy": lambda x: x.transpose(2, 3).contiguous(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "zeros_like": torch.zeros_like,
    "relu": torch.relu,
    "functional relu": functional.relu,
    "gelu": functional.gelu,
    "dropout in evaluation": lambda x: functional.dropout(x, 0.5, training=False),
    "softmax": lambda x: x.softmax(-1),
    "functional softmax": lambda x: functional.softmax(x, dim=2),
    "normalize": lambda x: functional.normalize(x, dim=-1),
    "sum": lambda x: x.sum(-1),
    "sum of two": lambda x: x.sum((2, 3)),
    "mean with axis": lambda x: x.mean(axis=2, keepdim=True),
    "argmax": lambda x: x.argmax(-1),
    "largest": lambda x: x.max(dim=-1).values,
    "larger": lambda x: torch.max(x, torch.tensor(0.5)),
    "std": lambda x: x.std(dim=3),
    "sort": lambda x: x.sort().values,
    "topk": lambda x: x.topk(2).indices,
    "cumsum": lambda x: x.cumsum(2),
    "flatten": lambda x: x.flatten(2),
    "reshape": lambda x: x.reshape(3, 4, 2, 8),
    "view": lambda x: x.view(3, 4, -1),
    "view dtype": lambda x: x.view(torch.int32),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "squeeze": lambda x: x[:, :, None].squeeze(2),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "index item": lambda x: x[:, :, 0],
    "index last": lambda x: x[..., 1:3],
    "new dimension": lambda x: x[..., None],
    "permute trailing": lambda x: x.permute(0, 1, 3, 2),
    "transpose trailing": lambda x: x.transpose(2, 3),
    "mT": lambda x: x.mT,
    "flip trailing": lambda x: x.flip(3),
    "roll trailing": lambda x: x.roll(1, 2),
    "index_select trailing": lambda x: x.index_select(2, torch.tensor([3, 0])),
    "gather trailing": lambda x: x.gather(3, torch.zeros(3, 4, 4, 1, dtype=torch.int64)),
    "expand": lambda x: x[:, :, None].expand(3, 4, 5, 4, 4),
    "repeat trailing": lambda x: x.repeat(1, 1, 2, 1),
    "unfold": lambda x: x.unfold(2, 2, 1),
    "narrow": lambda x: x.narrow(3, 1, 2),
    "matmul": lambda x: x @ torch.arange(8.0).view(4, 2),
    "matmul per model": lambda x: x[:, :, 0] @ torch.arange(24.0).view(3, 4, 2),
    "matmul vector": lambda x: x @ torch.arange(4.0),
    "linear": lambda x: functional.linear(x, torch.arange(8.0).view(2, 4), torch.ones(2)),
    "layer_norm": lambda x: functional.layer_norm(x, (4, 4)),
    "pad": lambda x: functional.pad(x, (1, 1)),
    "one_hot": lambda x: functional.one_hot(x[:, :, 0, 0].long().clamp(max=1), 4),
    "embedding": lambda x: functional.embedding((x > 0.5).long(), torch.arange(8.0).view(2, 4)),
    "table": lambda x: torch.arange(8.0).view(2, 4)[(x > 0.5).long()],
    "mse_loss per element": lambda x: functional.mse_loss(x, torch.zeros(SHAPE), reduction="none"),
    "cat": lambda x: torch.cat([x, torch.zeros(3, 4, 4, 1), x], dim=-1),
    "chunk": lambda x: x.chunk(2, dim=2)[1],
    "unbind trailing": lambda x: x.unbind(-1)[2],
}


@pytest.mark.parametrize("name", KEPT)
def test_operation_on_each_row_keeps_the_rows(name):
    tensor = routed()
    assert_rows(KEPT[name](tensor), ROWS)
    assert_padding_stays_out(KEPT[name], tensor)


def test_random_operations_keep_the_rows():
    for operation in (functional.dropout, torch.rand_like, torch.bernoulli):
        assert_rows(operation(routed()), ROWS)


MOVED = {
    "slice of rows": (lambda x: x[:, :3], (3, 1, 3)),
    "later rows": (lambda x: x[:, 2:], (1, 0, 2)),
    "every second row": (lambda x: x[:, ::2], (2, 1, 2)),
    "slice of models": (lambda x: x[1:], (1, 4)),
    "chosen models": (lambda x: x[[2, 0, 2]], (4, 3, 4)),
    "models by tensor": (lambda x: x[torch.tensor([1, 2, 0])], (1, 4, 3)),
    "models by mask": (lambda x: x[torch.tensor([True, True, False])], (3, 1)),
    "chosen models, one item": (lambda x: x[[2, 0, 1], :, 0], (4, 3, 1)),
    "index_select of models": (lambda x: x.index_select(0, torch.tensor([2, 1])), (4, 1)),
    "flipped models": (lambda x: x.flip(0), (4, 1, 3)),
    "rolled models": (lambda x: x.roll(1, 0), (4, 3, 1)),
    "rows swapped within the real ones": (lambda x: x[:2][:, [0, 2, 1, 3]][:1], (3,)),
    "narrow": (lambda x: x.narrow(1, 0, 2), (2, 1, 2)),
    "first piece": (lambda x: x.split(3, dim=1)[0], (3, 1, 3)),
    "last piece": (lambda x: x.split(3, dim=1)[1], (0, 0, 1)),
    "chunk of models": (lambda x: x.chunk(3)[1], (1,)),
    "repeated rows": (lambda x: x.repeat_interleave(2, dim=1), (6, 2, 8)),
    "repeated models": (lambda x: x.repeat(2, 1, 1, 1), ROWS + ROWS),
}


@pytest.mark.parametrize("name", MOVED)
def test_moved_rows_are_followed(name):
    operation, rows = MOVED[name]
    assert_rows(operation(routed()), rows)
    assert_padding_stays_out(operation, routed())


def test_pieces_without_padding_are_plain():
    assert_plain(routed()[:, :1])
    assert_plain(routed()[2:])


LOST = {
    "flipped rows": lambda x: x.flip(1),
    "rolled rows": lambda x: x.roll(1, 1),
    "permuted rows": lambda x: x[:, [3, 0, 1, 2]],
    "permuted rows by index_select": lambda x: x.index_select(1, torch.tensor([3, 2, 1, 0])),
    "real rows last": lambda x: x[:, [3, 0]],
    "rows by gather": lambda x: x.gather(1, torch.tensor([3, 2, 1, 0]).view(1, 4, 1, 1).expand(SHAPE)),
    "rows and items swapped": lambda x: x.transpose(1, 2),
    "rows and items permuted": lambda x: x.permute(0, 3, 2, 1),
    "models and rows swapped": lambda x: x.transpose(0, 1),
    "rotated": lambda x: x.rot90(2, (1, 2)),
    "sorted rows": lambda x: x.sort(dim=1).values,
    "sorted labels": lambda x: x[:, :, 0, 0].sort().values,
    "sorted order": lambda x: x.argsort(1),
    "softmax over rows": lambda x: x.softmax(1),
    "softmax over models": lambda x: functional.softmax(x, 0),
    "cumulative sum over rows": lambda x: x.cumsum(1),
    "normalized over rows": lambda x: functional.normalize(x),
    "rows mixed by a matrix": lambda x: torch.eye(4).expand(3, 4, 4) @ x[:, :, 0],
    "rows mixed by einsum": lambda x: torch.einsum("nmab,mk->nkab", x, torch.eye(4)),
    "rows as channels": lambda x: functional.conv2d(x, torch.ones(4, 4, 1, 1)),
    "rows as items of a matrix": lambda x: x[:, :, 0, 0] @ torch.eye(4),
    "rows as items of a layer": lambda x: functional.linear(x[:, :, 0, 0], torch.eye(4)),
    "layer norm over rows": lambda x: functional.layer_norm(x, (4, 4, 4)),
    "statistics over rows": lambda x: functional.batch_norm(x, None, None, training=True),
    "padded before the rows": lambda x: functional.pad(x, (0, 0, 0, 0, 1, -1)),
    "more rows joined": lambda x: torch.cat([x, x], dim=1),
    "lower triangle": lambda x: x[:, :, 0, 0].tril(),
}


@pytest.mark.parametrize("name", LOST)
def test_rows_that_cannot_be_followed_are_dropped_with_a_warning(name):
    with pytest.warns(UserWarning, match="padding counts as data"):
        result = LOST[name](routed())
    assert_plain(result)


def test_warning_points_at_the_caller_and_names_the_operation():
    with pytest.warns(UserWarning, match=r"torch.Tensor.flip: the result \[3, 4, 4, 4\]") as record:
        routed().flip(1)
    assert record[0].filename == __file__


DROPPED = {
    "mean": lambda x: x.mean(),
    "one model": lambda x: x[0],
    "one row": lambda x: x[:, 0],
    "mean over rows": lambda x: x.mean(1),
    "merged": lambda x: x.flatten(0, 1),
    "real items": lambda x: x[x.weights.bool()],
    "models one by one": lambda x: next(iter(x)),
    "weights": lambda x: x.weights,
    "no rows": lambda x: x[:, :0],
    "average loss": lambda x: functional.mse_loss(x, x),
}


@pytest.mark.parametrize("name", DROPPED)
def test_results_without_the_two_dimensions_are_plain(name):
    assert_plain(DROPPED[name](routed()))


def test_two_dimensions_by_coincidence_are_not_rows():
    labels = routed(4, 4, rows=(1, 2, 3, 4))
    with pytest.warns(UserWarning, match="padding counts as data"):
        assert_plain(labels + torch.zeros(4, 4, 4, 4))
    with pytest.warns(UserWarning, match="padding counts as data"):
        assert_plain(functional.embedding(torch.tensor([3, 2, 1, 0]), labels))
    with pytest.warns(UserWarning, match="padding counts as data"):
        assert_plain(routed(4, 4, 4, rows=(1, 2, 3, 4)) @ torch.zeros(4, 4, 4, 4))
    diagonal = RoutedTensor.wrap(torch.eye(4, dtype=torch.bool), (1, 2, 3, 4))
    with pytest.warns(UserWarning, match="padding counts as data"):
        assert_plain(torch.zeros(4, 4, 4)[diagonal])


def test_rows_in_front_by_coincidence_are_not_real_rows():
    with pytest.warns(UserWarning, match="padding counts as data"):
        assert_plain(routed(4, 4, 2, rows=(4, 3, 1, 0)).transpose(0, 1))
    # All are copies of a real row, but padding chose which.
    choice = RoutedTensor.wrap(torch.zeros(3, 4, dtype=torch.int64), ROWS)
    with pytest.warns(UserWarning, match="padding counts as data"):
        assert_plain(routed(3, 4).gather(1, choice))


indices = st.one_of(
    st.slices(4),
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.integers(0, 3),
    st.just(slice(None)),
)


@given(
    rows=st.tuples(*[st.integers(0, 4)] * 4),
    index=st.tuples(indices, indices) | st.tuples(indices) | st.tuples(indices, indices, indices),
)
@settings(max_examples=300, deadline=None)
def test_indexing_never_calls_padding_real(rows, index):
    index = tuple(slice(i.start, i.stop) if isinstance(i, slice) and (i.step or 1) < 0 else i for i in index)
    numbers = torch.arange(64.0).view(4, 4, 4)
    try:
        expected = numbers[index]
    except IndexError:
        return
    marked = numbers.masked_fill(padding_of(rows, 4)[..., None], -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = RoutedTensor.wrap(marked, rows)[index]
    if isinstance(result, RoutedTensor):
        assert result.shape == expected.shape
        flags = padding_of(result.rows, result.shape[1])
        assert bool((plain(result)[flags] == -1).all())
        assert bool((plain(result)[~flags] >= 0).all())
    elif all(isinstance(i, slice) for i in index):
        assert result.numel() == 0 or bool((result >= 0).all()), "slices must not lose padded rows"


def test_different_rows_cannot_be_mixed():
    first, second = routed(), routed(rows=(2, 2, 4))
    for mix in (operator.add, torch.maximum, lambda x, y: x.copy_(y), lambda x, y: torch.cat([x, y], 2)):
        with pytest.raises(InvalidInput, match=r"rows \(3, 1, 4\) and \(2, 2, 4\)"):
            mix(first, second)
    assert torch.equal(plain(first), plain(routed())), "a refused write must change nothing"


def test_same_rows_can_be_mixed():
    assert_rows(routed() * routed(seed=1), ROWS)
    labels = (routed()[:, :, 0, :1] > 0.5).long()
    assert_rows(routed()[:, :, 0].gather(-1, labels), ROWS)


def test_models_joined_join_their_rows():
    joined = torch.cat([routed(), torch.zeros(2, 4, 4, 4), routed(rows=(0, 4, 1))])
    assert_rows(joined, (3, 1, 4, 4, 4, 0, 4, 1))


def test_writes_in_place_keep_the_object_and_its_rows():
    tensor = routed()
    same = tensor
    same += 1
    same.mul_(2).clamp_(max=3).copy_(torch.ones(SHAPE))
    same[:, 0] = 5.0
    assert same is tensor
    assert_rows(tensor, ROWS)
    assert bool((tensor.plain()[:, 0] == 5).all())
    torch.mul(tensor, 0, out=tensor)
    assert float(tensor.plain().sum()) == 0


def test_plain_target_of_a_write_stays_plain():
    total = torch.zeros(SHAPE)
    assert total.add_(routed()) is total
    assert_plain(total)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose_(1, 2),
        lambda x: x.swapaxes_(0, 1),
        lambda x: x.resize_(4, 4),
        lambda x: setattr(x, "data", torch.zeros(1)),
        lambda x: x.index_copy_(1, torch.tensor([3, 2, 1, 0]), torch.zeros(SHAPE)),
        lambda x: torch.cumsum(torch.zeros(SHAPE), 1, out=x),
    ],
)
def test_moves_in_place_are_refused(change):
    tensor = routed()
    with pytest.raises(InvalidInput, match="in place could move the rows"):
        change(tensor)
    assert torch.equal(tensor.plain(), routed().plain())


def test_gradients_reach_the_leaf_and_have_its_rows():
    leaf = routed().requires_grad_()
    assert leaf.is_leaf
    loss = ((leaf * 3).flatten(2).sum(-1) * leaf.weights).sum()
    (by_call,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    loss.backward()
    for gradient in (leaf.grad, by_call):
        assert_rows(gradient, ROWS)
        padding = padding_of(ROWS, 4)
        assert bool((gradient.plain()[padding] == 0).all())
        assert bool((gradient.plain()[~padding] == 3).all())


def test_gradients_flow_through_wrapping_and_plain():
    source = torch.rand(SHAPE, requires_grad=True)
    RoutedTensor.wrap(source, ROWS).plain().sum().backward()
    assert torch.equal(source.grad, torch.ones(SHAPE))


def test_plain_and_wrap_share_memory():
    source = torch.zeros(SHAPE)
    tensor = RoutedTensor.wrap(source, ROWS)
    tensor.plain()[0, 0] = 1
    assert float(source.sum()) == 16
    assert_plain(tensor.plain())
    assert plain(source) is source


def test_weights_are_one_for_real_rows():
    weights = routed(rows=(0, 4, 2)).weights
    assert weights.dtype == torch.float32
    assert weights.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert_plain(weights)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "duplicate", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy], ids="pickle deep copy".split()
)
def test_copies_keep_everything(duplicate, requires_grad):
    tensor = routed().requires_grad_(requires_grad)
    result = duplicate(tensor)
    assert_rows(result, ROWS)
    assert result.is_leaf
    assert result.requires_grad == requires_grad
    assert torch.equal(result.plain(), tensor.plain())
    assert result is not tensor


def test_deepcopy_copies_memory_and_gradient_and_keeps_sharing():
    tensor = routed().requires_grad_()
    tensor.plain().sum().backward()
    first, second = copy.deepcopy([tensor, tensor])
    assert first is second
    assert first.plain().data_ptr() != tensor.plain().data_ptr()
    assert_rows(first.grad, ROWS)
    with pytest.raises(InvalidInput, match="deep-copied"):
        copy.deepcopy(tensor * 2)


def test_saved_files_keep_the_rows_and_need_trust():
    file = io.BytesIO()
    torch.save({"x": routed()}, file)
    file.seek(0)
    assert_rows(torch.load(file, weights_only=False)["x"], ROWS)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)


def test_repr_shows_the_rows():
    text = repr(RoutedTensor.wrap(torch.tensor([[1, 2], [3, 3]]), (2, 1)))
    assert text.startswith("RoutedTensor(tensor([[1, 2],")
    assert text.endswith("rows=(2, 1))")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and other devices need a GPU")
def test_pinned_memory_and_devices_keep_the_rows():
    assert_rows(routed().pin_memory(), ROWS)
    on_device = routed().to("cuda", non_blocking=True)
    assert_rows(on_device, ROWS)
    assert_rows(on_device[torch.tensor([2, 0], device="cuda")], (4, 3))
    assert on_device.weights.device.type == "cuda"


class Shadow(Tensor):
    """A tensor class that counts the operations it sees."""

    seen = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_other_tensor_classes_see_the_operation():
    shadow = torch.ones(4).as_subclass(Shadow)
    before = Shadow.seen
    result = routed() * shadow
    assert Shadow.seen > before
    assert torch.equal(result.as_subclass(Tensor), routed().plain())


@pytest.mark.parametrize(
    ("tensor", "rows", "message"),
    [
        (torch.zeros(3), (1, 1, 1), r"tensor of shape \[3\]"),
        ([[1.0]], (1,), "received list"),
        (torch.zeros(2, 3), (1,), "1 for 2 models"),
        (torch.zeros(2, 3), (1, 4), "model 1: impossible number of real rows: received 4"),
        (torch.zeros(2, 3), (-1, 2), "model 0: impossible number of real rows: received -1"),
        (torch.zeros(2, 3), (1.5, 2), "not integers"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tensor, rows, message):
    with pytest.raises(InvalidInput, match=message):
        RoutedTensor.wrap(tensor, rows)
    with pytest.raises(InvalidInput, match=message):
        RoutedTensor(tensor, rows)


def test_with_rows_is_plain_without_padding():
    assert_plain(with_rows(torch.zeros(2, 3), (3, 3)))
    assert_rows(with_rows(torch.zeros(2, 3), (3, 2)), (3, 2))


def rows_of(*trees):
    return common_rows(routed_leaves(trees))


def test_rows_are_found_anywhere():
    assert rows_of(torch.zeros(2), {"a": [1, None]}) is None
    assert rows_of(torch.zeros(2), {"a": [1, (routed(), routed(3, 4))]}) == ROWS
    with pytest.raises(InvalidInput, match="different real rows"):
        rows_of(routed(), [routed(rows=(1, 1, 4))])


def test_strip_leaves_plain_tensors_only():
    other = torch.zeros(2)
    stripped = strip({"a": [routed(), 1], "b": other})
    assert_plain(stripped["a"][0])
    assert stripped["a"][1] == 1
    assert stripped["b"] is other


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_weights_and_rows_are_inverse(rows):
    tensor = RoutedTensor.wrap(torch.zeros(len(rows), 5), rows)
    expected = None if all(count == 5 for count in rows) else tuple(rows)
    for weights in (tensor.weights, tensor.weights.bool(), tensor.weights.long()):
        assert rows_from_weights(weights) == expected


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([[1.0, 1.0], [1.0, 0.5]]), "model 1: the row weight at position 1 is neither 0 nor 1"),
        (torch.tensor([[float("nan"), 0.0]]), "model 0: the row weight at position 0 is neither 0 nor 1"),
        (torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 1.0]]), "model 1: the row weight at position 2 marks a real"),
        (torch.ones(3), r"shape \[3\]"),
        ([[1.0]], "received list"),
    ],
)
def test_weights_that_are_no_rows_are_refused(weights, message):
    with pytest.raises(InvalidInput, match=message):
        rows_from_weights(weights)
