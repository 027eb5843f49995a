"""Routed rows: every model sees its real rows only, as if the padding were not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import DataRouter, ModelBatch, OptimizerFactory
from tests.compare import assert_close, assert_different, assert_equal
from tests.contract.base import (
    ContractBase,
    batches,
    build,
    classify,
    dropping,
    features,
    gradients,
    labels,
    mlp,
    model_state,
    normed,
    normed_and_dropping,
    plain_gradients,
    plain_sgd,
    sgd_for,
    state_of,
)
from tests.contract.steps import everything_of_all
from tests.parity.loop import train_alone

# Rows of models 0 to 3; model 3 has none in the second case.
SOME = [[0, 1, 2, 3, 4, 9], [5, 2, 8, 7], [1, 3, 4, 0, 2, 6], [2, 5, 5, 8, 9]]
NONE_FOR_ONE = [[0, 1, 2, 3, 9], [5, 2, 6, 7], [3, 1, 0, 4, 8], []]
EVEN = [[0, 1, 2, 3, 9], [5, 2, 6, 7, 1], [3, 3, 1, 0, 8], [4, 1, 8, 9, 0]]
ROWS = 10

selections = pytest.mark.parametrize(
    "rows", [SOME, NONE_FOR_ONE, EVEN], ids=["ragged", "one model without rows", "even"]
)
CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 5.0])


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean whose denominator depends on the labels: padding can not be divided out afterwards."""
    return F.cross_entropy(outputs, targets, weight=CLASS_WEIGHTS)


def of_known_lengths(outputs: Tensor, targets: Tensor) -> Tensor:
    if len(outputs) > 3:
        raise ValueError(f"{len(outputs)} rows")
    return F.cross_entropy(outputs, targets)


def route(rows: list[list[int]], inputs: Tensor | None = None, targets: Tensor | None = None) -> Any:
    inputs = features(rows=ROWS) if inputs is None else inputs
    targets = labels(rows=ROWS) if targets is None else targets
    return DataRouter("indices").route_batch(inputs, indices=rows, targets=targets)


def own_rows(rows: list[list[int]], batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What each model sees."""
    return [
        (batch[0][torch.tensor(own, dtype=torch.long)], batch[1][torch.tensor(own, dtype=torch.long)]) for own in rows
    ]


class RoutingContract(ContractBase):
    def routed_batch(self, models: list[nn.Module], **options: Any) -> ModelBatch:
        return self.batch(models, shared_input=False, **options)

    @selections
    @pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": 3}])
    @pytest.mark.parametrize("make", [mlp, normed])
    def test_eager_losses_gradients_and_buffers(
        self, make: Any, rows: list[list[int]], options: dict[str, int]
    ) -> None:
        models = build(make, 4)
        mb = self.routed_batch(models, **options)
        inputs, targets, weights = route(rows)
        outputs = mb(inputs)
        losses = mb.compute_loss(outputs, targets, weighted, "none", weights=weights)
        losses.sum().backward()
        for index, (model, (x, y)) in enumerate(
            zip(models, own_rows(rows, (features(rows=ROWS), labels(rows=ROWS))), strict=True)
        ):
            if not len(x):
                continue
            own = model(x)
            loss = weighted(own, y)
            assert_close(outputs[index, : len(x)], own)
            assert_close(losses[index], loss)
            loss.backward()
        assert_close(self.of_models_with_rows(gradients(mb), rows), plain_gradients(self.with_rows(models, rows)))
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    @staticmethod
    def with_rows(models: list[nn.Module], rows: list[list[int]]) -> list[nn.Module]:
        return [model for model, own in zip(models, rows, strict=True) if own]

    @staticmethod
    def of_models_with_rows(grads: dict[str, Any], rows: list[list[int]]) -> dict[str, Any]:
        kept = [index for index, own in enumerate(rows) if own]
        for grad in grads.values():
            for index, own in enumerate(rows):
                assert own or not grad[index].any()
        return {name: grad[kept] for name, grad in grads.items()}

    @selections
    @pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
    @pytest.mark.parametrize("clip_norm", [None, 0.1])
    def test_fused_training_equals_the_loop(
        self, rows: list[list[int]], options: dict[str, int], clip_norm: float | None
    ) -> None:
        models = build(normed, 4)
        mb = self.routed_batch(models, **options)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(weighted, optimizer, clip_norm=clip_norm)
        losses = []
        for inputs, targets in batches(3, ROWS):
            routed = route(rows, inputs, targets)
            losses.append(step(routed.inputs, routed.targets))
        for index, model in enumerate(models):
            if not rows[index]:
                assert_equal(model_state(mb, index), dict(model.state_dict()))
                assert not optimizer.model_state_dict(index)["state"]
                continue
            data = [own_rows(rows, batch)[index] for batch in batches(3, ROWS)]
            loss_of = lambda m, batch: weighted(m(batch[0]), batch[1])  # noqa: E731
            trained = train_alone([model], data, loss_of, lambda _, p, i=index: plain_sgd(i, p), clip_norm=clip_norm)
            assert_close(torch.stack(losses)[:, index], trained[0].losses)
            assert_close(mb.get_model_states()[index], dict(model.state_dict()))
            assert_close(optimizer.model_state_dict(index)["state"], trained[0].optimizer)

    def test_rows_may_change_from_step_to_step(self) -> None:
        models = build(normed, 4)
        mb = self.routed_batch(models)
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        plan = [SOME, NONE_FOR_ONE, EVEN]
        for rows, batch in zip(plan, batches(3, ROWS), strict=True):
            routed = route(rows, *batch)
            step(routed.inputs, routed.targets)
        for index, model in enumerate(models):
            data = [own_rows(rows, batch)[index] for rows, batch in zip(plan, batches(3, ROWS), strict=True)]
            data = [batch for batch in data if len(batch[0])]
            train_alone([model], data, classify, lambda _, p, i=index: plain_sgd(i, p))
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_masks_route_like_indices(self) -> None:
        models = build(normed, 3)
        masks = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [1] * 7, [0, 0, 1, 0, 1, 1, 1]], dtype=torch.bool)
        inputs, targets = features(rows=7), labels(rows=7)
        routed = DataRouter("mask").route_batch(inputs, masks=list(masks), targets=targets)
        mb = self.routed_batch(models)
        losses = mb.compute_loss(mb(routed.inputs), routed.targets, weighted, "none")
        expected = [weighted(model(inputs[mask]), targets[mask]) for model, mask in zip(models, masks, strict=True)]
        assert_close(losses, torch.stack(expected))

    def test_weights_alone_leave_padding_out_of_the_loss(self) -> None:
        """Outputs that lost their rows on the way: the weights say which are real."""
        models = build(mlp, 4)
        mb = self.routed_batch(models)
        inputs, targets, weights = route(SOME)
        outputs = mb(torch.stack([own.clone() for own in inputs.plain()]))
        losses = mb.compute_loss(outputs, targets.plain(), weighted, "none", weights=weights)
        data = own_rows(SOME, (features(rows=ROWS), labels(rows=ROWS)))
        expected = [weighted(model(x), y) for model, (x, y) in zip(models, data, strict=True)]
        assert_close(losses, torch.stack(expected))

    def test_a_model_without_rows_has_loss_zero_and_counts_as_one(self) -> None:
        mb = self.routed_batch(build(mlp, 4))
        inputs, targets, _ = route(NONE_FOR_ONE)
        outputs = mb(inputs)
        losses = mb.compute_loss(outputs, targets, F.cross_entropy, "none")
        assert losses[3] == 0
        assert_close(mb.compute_loss(outputs, targets, F.cross_entropy), losses.sum() / 4)

    @pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW])
    def test_a_model_without_rows_is_left_alone_by_the_step(self, optimizer_cls: Any) -> None:
        mb = self.routed_batch(build(normed, 4), seeds=[1, 2, 3, 4])
        optimizer = OptimizerFactory(optimizer_cls, {"weight_decay": 0.1}).create_optimizer(mb, [{"lr": 0.1}] * 4)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        step(*route(SOME)[:2])
        before = model_state(mb, 3), optimizer.model_state_dict(3)
        step(*route(NONE_FOR_ONE)[:2])
        assert_equal((model_state(mb, 3), optimizer.model_state_dict(3)), before)

    @pytest.mark.parametrize("fused", [False, True])
    def test_draws_of_a_model_do_not_depend_on_the_others_rows(self, fused: bool) -> None:
        models, states = build(dropping, 4), []
        for rows in (SOME, [SOME[0], [1], [1, 2], [3, 0, 9]]):
            mb = self.routed_batch(models, seeds=[1, 2, 3, 4])
            routed = route(rows)
            if fused:
                mb.make_train_step(F.cross_entropy, sgd_for(mb))(routed.inputs, routed.targets)
            else:
                mb.compute_loss(mb(routed.inputs), routed.targets, F.cross_entropy, "sum").backward()
                sgd_for(mb).step()
            states.append(model_state(mb, 0))
        assert_close(states[1], states[0])

    def test_what_is_in_the_padding_does_not_matter(self) -> None:
        inputs, targets, _ = route(SOME)
        spoiled = inputs.clone()
        for index, own in enumerate(SOME):
            spoiled.plain()[index, len(own) :] = float("nan")
        results = []
        for given in (inputs, spoiled):
            mb = self.routed_batch(build(normed, 4))
            step = mb.make_train_step(weighted, sgd_for(mb))
            results.append((step(given, targets), state_of(mb)))
        assert_equal(results[1], results[0])

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_a_part_that_fails_leaves_the_others_unchanged(self, accumulate: int) -> None:
        """Models with equally many rows run together; those with more come after others have run."""
        pairs = []
        for _ in range(2):
            mb = self.routed_batch(build(normed_and_dropping, 4), seeds=[1, 2, 3, 4])
            optimizer = sgd_for(mb)
            pairs.append((mb, optimizer, mb.make_train_step(of_known_lengths, optimizer, accumulate=accumulate)))
        (mb, optimizer, step), (other, other_optimizer, other_step) = pairs
        known, unknown = [[0, 1], [1, 2, 3], [2, 3], [4, 5]], [[0, 1], [1, 2, 3], [0, 1, 2, 3], [4, 5]]
        for own in (step, other_step):
            for _ in range(2 * accumulate - 1):
                own(*route(known)[:2])
        state = everything_of_all(mb, optimizer)
        with pytest.raises(ValueError, match="4 rows"):
            step(*route(unknown)[:2])
        assert_equal(everything_of_all(mb, optimizer), state)
        for own in (step, other_step):
            own(*route(known)[:2])
        assert_different(everything_of_all(mb, optimizer), state)
        assert_equal(
            everything_of_all(mb, optimizer),
            everything_of_all(other, other_optimizer),
        )

    def test_accumulation_with_a_model_that_has_rows_only_sometimes(self) -> None:
        models = build(mlp, 4)
        mb = self.routed_batch(models)
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb), accumulate=2)
        plan = [NONE_FOR_ONE, SOME]
        for rows, batch in zip(plan, batches(2, ROWS), strict=True):
            step(*route(rows, *batch)[:2])
        for index, model in enumerate(models):
            data = [own_rows(rows, batch)[index] for rows, batch in zip(plan, batches(2, ROWS), strict=True)]
            data = [batch for batch in data if len(batch[0])]
            halves = lambda m, group: torch.stack([classify(m, batch) for batch in group]).sum() / 2  # noqa: E731
            train_alone([model], [tuple(data)], halves, lambda _, p, i=index: plain_sgd(i, p))
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])
