"""Routers give each model exactly its rows, strategies balance what they promise, wrong input is named."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mb_torch.data import (
    DataRouter,
    Routed,
    StratifiedDataRouter,
    StratifiedRouter,
    create_random_masks,
)
from mb_torch.errors import InvalidInput
from mb_torch.routed import RoutedTensor, plain, routed_leaves
from mb_torch.row_tracking import common_rows

BATCH = torch.arange(12.0).view(6, 2) + 1


def bools(*masks):
    return [torch.tensor(mask, dtype=torch.bool) for mask in masks]


def route(masks=None, indices=None, batch=BATCH, **options):
    mode = "passthrough" if masks is indices is None else "mask" if indices is None else "indices"
    return DataRouter(mode).route_batch(batch, masks=masks, indices=indices, **options)


def assert_routes(routed, selections, batch=BATCH):
    """Each model's real rows are its selection of the batch, and its padding repeats the first of them."""
    counts = tuple(len(batch[selection]) for selection in selections)
    assert routed.shape == (len(selections), max(counts), *batch.shape[1:])
    assert common_rows(routed_leaves(routed)) == (None if len(set(counts)) == 1 else counts)
    assert type(routed) is (Tensor if len(set(counts)) == 1 else RoutedTensor)
    for model, (selection, count) in enumerate(zip(selections, counts, strict=True)):
        rows = plain(routed)[model]
        assert torch.equal(rows[:count], batch[selection])
        first = batch[selection][0] if count else batch[0]
        assert torch.equal(rows[count:], first.expand(len(rows) - count, *first.shape))


@st.composite
def masks_of_some_rows(draw):
    size = draw(st.integers(1, 8))
    masks = draw(st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=1, max_size=5))
    masks[draw(st.integers(0, len(masks) - 1))][draw(st.integers(0, size - 1))] = True
    return bools(*masks)


@given(masks_of_some_rows())
def test_masks_route_like_indexing_with_each_mask(masks):
    batch = torch.rand(len(masks[0]), 3)
    assert_routes(route(masks, batch=batch), masks, batch)
    assert_routes(route(torch.stack(masks), batch=batch), masks, batch)


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=7), min_size=1, max_size=5).filter(any),
    st.sampled_from([torch.int64, torch.int32, torch.uint8, None]),
)
def test_indices_route_like_indexing_with_each_index(indices, dtype):
    tensors = [torch.tensor(index, dtype=torch.int64) for index in indices]
    given_as = indices if dtype is None else [tensor.to(dtype) for tensor in tensors]
    assert_routes(route(indices=given_as), tensors)


def test_index_matrix_routes_one_row_per_model():
    matrix = torch.tensor([[5, 5, 0], [1, 2, 3]])
    assert_routes(route(indices=matrix), list(matrix))


def test_passthrough_returns_the_batch_itself():
    assert route() is BATCH
    labels = torch.arange(6)
    routed = route(targets=labels)
    assert isinstance(routed, Routed)
    assert routed.inputs is BATCH
    assert routed.targets is labels
    assert routed.weights is None


def test_inputs_and_targets_are_routed_together_with_weights():
    masks = bools([1, 1, 0, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 1, 0])
    labels = torch.arange(6)
    inputs, targets, weights = route(masks, targets=labels)
    assert_routes(inputs, masks)
    assert_routes(targets, masks, labels)
    assert targets.dtype == torch.int64
    assert weights.tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert torch.equal(weights, inputs.weights)
    assert weights.dtype == torch.float32


def test_weights_without_padding_are_ones():
    inputs, _, weights = route(indices=[[0, 1], [4, 2]], targets=BATCH)
    assert type(inputs) is Tensor
    assert torch.equal(weights, torch.ones(2, 2))


class Pair(NamedTuple):
    first: Tensor
    second: list[Tensor]


def test_pytrees_keep_their_structure():
    labels = torch.arange(6)
    batch = {"x": BATCH, "pair": Pair(labels, [BATCH.long()])}
    indices = [torch.tensor([2, 2]), torch.tensor([5])]
    inputs, targets, _ = route(indices=indices, batch=batch, targets=(labels,))
    assert_routes(inputs["x"], indices)
    assert type(inputs["pair"]) is Pair
    assert_routes(inputs["pair"].first, indices, labels)
    assert_routes(inputs["pair"].second[0], indices, BATCH.long())
    assert_routes(targets[0], indices, labels)


def test_gradients_flow_to_the_rows_that_were_used():
    batch = BATCH.clone().requires_grad_()
    routed = route(indices=[[0, 0, 3], [3]], batch=batch)
    (routed * routed.weights[..., None]).sum().backward()
    assert batch.grad[:, 0].tolist() == [2, 0, 0, 2, 0, 0]


def test_routing_changes_nothing_it_was_given():
    masks = bools([1, 0, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0])
    indices = [[0, 5], torch.tensor([1])]
    before = copy.deepcopy((masks, indices, BATCH))
    route(masks)[:] = 0
    route(indices=indices)[:] = 0
    assert [mask.tolist() for mask in masks] == [mask.tolist() for mask in before[0]]
    assert indices[0] == before[1][0]
    assert torch.equal(indices[1], before[1][1])
    assert torch.equal(BATCH, before[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a second device is needed")
def test_masks_and_indices_move_to_the_device_of_the_batch():
    masks = bools([1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0])
    for options in ({"masks": masks}, {"indices": [[0, 1, 5], [1]]}):
        routed = route(batch=BATCH.cuda(), **options)
        assert routed.device.type == "cuda"
        assert_routes(routed.cpu(), masks)


ALL = [True] * 6
NONE = [False] * 6


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("mask", {}, 'mode "mask": received neither masks nor indices; expected masks'),
        ("mask", {"indices": [[0]]}, "received indices; expected masks"),
        ("mask", {"masks": bools(ALL), "indices": [[0]]}, "received masks and indices; expected masks"),
        ("indices", {"masks": bools(ALL)}, "received masks; expected indices"),
        ("passthrough", {"masks": bools(ALL)}, "received masks; expected neither masks nor indices"),
        ("mask", {"masks": []}, "masks are empty"),
        ("mask", {"masks": torch.ones(6, dtype=torch.bool)}, r"wrong type: received bool of shape \[6\]"),
        ("mask", {"masks": 3}, "wrong type: received int"),
        ("mask", {"masks": [torch.ones(6)]}, r"model 0: the mask does not fit .* float32 of shape \[6\]"),
        ("mask", {"masks": bools(ALL, [True] * 5)}, r"model 1: .* received bool of shape \[5\]; .* \[6\]"),
        ("mask", {"masks": [torch.ones(6, 1, dtype=torch.bool)]}, r"model 0: .* bool of shape \[6, 1\]"),
        ("mask", {"masks": [ALL]}, "model 0: .* received list"),
        ("mask", {"masks": torch.ones(2, 5, dtype=torch.bool)}, r"model 0: .* received bool of shape \[5\]"),
        ("mask", {"masks": torch.ones(2, 6)}, r"model 0: .* received float32 of shape \[6\]"),
        ("mask", {"masks": bools(NONE, NONE)}, "no model gets any row: received masks .* all 2 models"),
        ("indices", {"indices": []}, "indices are empty"),
        ("indices", {"indices": [[], []]}, "no model gets any row: received indices .* all 2 models"),
        ("indices", {"indices": torch.tensor([0, 1])}, r"wrong type: received int64 of shape \[2\]"),
        ("indices", {"indices": "01"}, "wrong type: received str"),
        ("indices", {"indices": [[0], [6]]}, "model 1: row number .* received 6; expected 0 to 5, .* 6 rows"),
        ("indices", {"indices": [[0], [1, -1]]}, "model 1: row number out of range: received -1"),
        ("indices", {"indices": [torch.tensor([0.0])]}, r"model 0: .* received float32 of shape \[1\]"),
        ("indices", {"indices": [[0], [0.5]]}, "model 1: indices are not row numbers"),
        ("indices", {"indices": bools(ALL)}, "model 0: .* received bool"),
        ("indices", {"indices": [[0], torch.tensor([[1]])]}, r"model 1: .* received int64 of shape \[1, 1\]"),
        ("indices", {"indices": [3, 4]}, "model 0: indices are not row numbers"),
        ("indices", {"indices": [[0], ["a"]]}, "model 1: indices are not row numbers: received list"),
        ("indices", {"indices": [None]}, "model 0: indices are not row numbers"),
    ],
)
def test_wrong_selections_are_named(mode, options, message):
    with pytest.raises(InvalidInput, match=message):
        DataRouter(mode).route_batch(BATCH, **options)


@pytest.mark.parametrize(
    ("batch", "targets", "message"),
    [
        ([], None, "nothing to route"),
        ({"x": BATCH, "y": "text"}, None, r"batch\['y'\] cannot be routed: received str"),
        (torch.tensor(1.0), None, r"batch cannot be routed: received float32 of shape \[\]"),
        (BATCH, torch.zeros(5), "targets and batch have different batch sizes: received 5 and 6"),
        ([BATCH, BATCH[:2]], None, r"batch\[1\] and batch\[0\] have different batch sizes"),
        (RoutedTensor.wrap(BATCH, [1] * 6), None, "batch is already routed"),
    ],
)
def test_batches_that_cannot_be_routed_are_named(batch, targets, message):
    with pytest.raises(InvalidInput, match=message):
        route(indices=[[0], [0, 1]], batch=batch, targets=targets)


def test_unknown_mode_lists_the_modes():
    with pytest.raises(InvalidInput, match="'masks'; expected one of 'passthrough', 'mask', 'indices'"):
        DataRouter("masks")


def counts_per_model(hands, labels):
    """`[num_models, num_classes]`."""
    return torch.stack([torch.bincount(labels[hand], minlength=int(labels.max()) + 1) for hand in hands])


def assert_balanced(hands, labels):
    counts = counts_per_model(hands, labels)
    assert int((counts.amax(0) - counts.amin(0)).max()) <= 1
    totals = counts.sum(1)
    assert int(totals.max() - totals.min()) <= 1


def assert_each_row_once(hands, labels):
    assert torch.cat(hands).sort().values.tolist() == list(range(len(labels)))


labels_of_classes = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(torch.tensor)
numbers_of_models = st.integers(1, 9)


@given(labels_of_classes, numbers_of_models, st.sampled_from(["round_robin", "random"]))
def test_dealing_is_balanced_and_uses_each_row_once(labels, num_models, strategy):
    hands = StratifiedRouter(num_models, strategy).create_stratified_indices(labels)
    assert len(hands) == num_models
    assert_each_row_once(hands, labels)
    assert_balanced(hands, labels)
    assert all(torch.equal(hand, hand.sort().values) for hand in hands)


@given(labels_of_classes, numbers_of_models)
def test_class_based_shows_every_class_to_every_model(labels, num_models):
    hands = StratifiedRouter(num_models, "class_based").create_stratified_indices(labels)
    assert_balanced(hands, labels)
    present = labels.unique().tolist()
    assert all(labels[hand].unique().tolist() == present for hand in hands)
    assert set(torch.cat(hands).tolist()) == set(range(len(labels)))
    assert all(len(hand) == len(hand.unique()) for hand in hands), "no model gets a row twice"
    sizes = torch.bincount(labels)
    assert counts_per_model(hands, labels).sum(0).tolist() == [
        max(size, num_models) if size else 0 for size in sizes.tolist()
    ]


def test_round_robin_deals_on_over_class_borders():
    labels = torch.tensor([1, 0, 1, 0, 0, 1, 1])
    hands = StratifiedRouter(3).create_stratified_indices(labels)
    # Class by class: 1 3 4 | 0 2 5 6, dealt to the models 0 1 2 0 1 2 0.
    assert [hand.tolist() for hand in hands] == [[0, 1, 6], [2, 3], [4, 5]]


def test_class_based_deals_small_classes_again():
    labels = torch.tensor([0, 1, 1, 1, 0])
    hands = StratifiedRouter(3, "class_based").create_stratified_indices(labels)
    # Class by class: 0 4 0 | 1 2 3.
    assert [hand.tolist() for hand in hands] == [[0, 1], [2, 4], [0, 3]]


def test_random_repeats_with_the_generator_and_leaves_the_global_one_alone():
    labels = torch.arange(40) % 4
    router = StratifiedRouter(3, "random")

    def deal(seed):
        generator = torch.Generator().manual_seed(seed)
        return [hand.tolist() for hand in router.create_stratified_indices(labels, generator=generator)]

    state = torch.get_rng_state()
    assert deal(1) == deal(1)
    assert deal(1) != deal(2)
    assert torch.equal(torch.get_rng_state(), state)
    first = router.create_stratified_indices(labels)
    assert any(not torch.equal(a, b) for a, b in zip(first, router.create_stratified_indices(labels), strict=True))
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, router.create_stratified_indices(labels), strict=True))


def test_random_gives_the_extra_rows_and_every_row_to_changing_models():
    labels = torch.zeros(4, dtype=torch.int64)
    router, generator = StratifiedRouter(3, "random"), torch.Generator().manual_seed(0)
    longest, owners, companions = set(), [set() for _ in labels], set()
    for _ in range(60):
        hands = router.create_stratified_indices(labels, generator=generator)
        longest.add(max(range(3), key=lambda model: len(hands[model])))
        for model, hand in enumerate(hands):
            companions.add(tuple(hand.tolist()))
            for row in hand.tolist():
                owners[row].add(model)
    assert longest == {0, 1, 2}
    assert owners == [{0, 1, 2}] * 4
    assert len(companions) == 10, "4 single rows and 6 pairs"


def test_other_strategies_use_no_randomness():
    labels = torch.arange(20) % 3
    for strategy in ("round_robin", "class_based"):
        state = torch.get_rng_state()
        StratifiedRouter(4, strategy).create_stratified_indices(labels)
        assert torch.equal(torch.get_rng_state(), state)


def test_more_models_than_rows_leaves_some_empty_and_routes():
    labels = torch.tensor([1, 0])
    router = StratifiedRouter(4)
    hands = router.create_stratified_indices(labels, num_classes=2)
    assert [hand.tolist() for hand in hands] == [[1], [0], [], []]
    assert router.route_batch(labels, indices=hands).rows == (1, 1, 0, 0)


def test_alias_is_the_same_class():
    assert StratifiedDataRouter is StratifiedRouter


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), None, r"int64 of shape \[0\]"),
        (torch.zeros(3), None, "received float32"),
        (torch.zeros(3, dtype=torch.bool), None, "received bool"),
        (torch.zeros(3, 1, dtype=torch.int64), None, r"shape \[3, 1\]"),
        ([0, 1], None, "received list"),
        (torch.tensor([0, 1, -1]), None, "row 2: label out of range: received -1; expected 0 or more"),
        (torch.tensor([0, 5, 9]), 5, "row 1: label out of range: received 5; expected 0 to 4"),
        (torch.tensor([0]), 0, "impossible num_classes: received 0"),
    ],
)
def test_wrong_labels_are_named(labels, num_classes, message):
    with pytest.raises(InvalidInput, match=message):
        StratifiedRouter(2).create_stratified_indices(labels, num_classes)


def test_wrong_router_settings_are_named():
    with pytest.raises(InvalidInput, match="'shuffle'; expected one of 'round_robin', 'random', 'class_based'"):
        StratifiedRouter(2, "shuffle")
    for number in (0, -1, 1.5, None):
        with pytest.raises(InvalidInput, match=f"impossible num_models: received {number}"):
            StratifiedRouter(number)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 100))
def test_random_masks_have_the_exact_number_of_rows(batch_size, num_models, percent):
    masks = create_random_masks(batch_size, num_models, percent / 100)
    assert len(masks) == num_models
    for mask in masks:
        assert mask.shape == (batch_size,)
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == max(1, batch_size * percent // 100)


@pytest.mark.parametrize(
    ("ratio", "batch_size", "rows"), [(0.29, 100, 29), (0.57, 100, 57), (1 / 3, 3, 1), (1, 7, 7), (0.999, 7, 6)]
)
def test_random_masks_round_down_but_forgive_float_error(ratio, batch_size, rows):
    assert int(create_random_masks(batch_size, 1, ratio)[0].sum()) == rows


def test_random_masks_differ_and_cover_all_rows_equally():
    masks = torch.stack(create_random_masks(10, 2000, 0.3, generator=torch.Generator().manual_seed(0)))
    shares = masks.float().mean(0)
    # Standard deviation of a share: sqrt(0.3 * 0.7 / 2000) = 0.01.
    assert torch.allclose(shares, torch.full((10,), 0.3), atol=0.05)
    assert len(masks.unique(dim=0)) > 100


def test_random_masks_follow_the_generator():
    def masks(seed):
        return torch.stack(create_random_masks(20, 3, generator=torch.Generator().manual_seed(seed)))

    state = torch.get_rng_state()
    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert int(masks(1)[0].sum()) == 16


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_impossible_ratios_are_named(ratio):
    with pytest.raises(InvalidInput, match=r"impossible subset_ratio: received .*; expected a number in \(0, 1\]"):
        create_random_masks(10, 2, ratio)


def test_impossible_sizes_are_named():
    with pytest.raises(InvalidInput, match="impossible batch_size: received 0"):
        create_random_masks(0, 2)
    with pytest.raises(InvalidInput, match=r"impossible num_models: received 2\.0"):
        create_random_masks(4, 2.0)
