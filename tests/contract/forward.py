"""Running models and their losses: outputs, gradients and buffers are those of each model alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from mb_torch import InvalidInput, OptimizerFactory, Unsupported
from tests.compare import assert_close, assert_different, assert_equal
from tests.contract.base import (
    ContractBase,
    KeywordOnly,
    ManyArguments,
    Mixed,
    batches,
    build,
    classify,
    features,
    for_each,
    gradients,
    labels,
    mlp,
    model_state,
    normed,
    plain_gradients,
    plain_sgd,
    sgd_for,
    state_of,
)
from tests.parity.loop import as_tree, batch_ended, train_alone

counts = pytest.mark.parametrize("count", [1, 3])


def smooth_loss(outputs: Tensor, targets: Tensor, smoothing: Tensor) -> Tensor:
    log_probabilities = F.log_softmax(outputs, -1)
    right = log_probabilities.gather(1, targets[:, None]).mean()
    return -(1 - smoothing) * right - smoothing * log_probabilities.mean()


class ForwardContract(ContractBase):
    @counts
    @pytest.mark.parametrize("make", [mlp, normed, Mixed])
    def test_forward_shares_inputs(self, make: Any, count: int) -> None:
        models = build(make, count)
        mb = self.batch(models)
        outputs = mb(features())
        expected = torch.stack([model(features()) for model in models])
        assert_close(outputs, expected)
        assert_close(mb.get_model_states(), [dict(model.state_dict()) for model in models])

    @counts
    @pytest.mark.parametrize("make", [mlp, normed, Mixed])
    def test_forward_gives_each_model_its_inputs(self, make: Any, count: int) -> None:
        models = build(make, count)
        inputs = for_each(count, features)
        outputs = self.batch(models, shared_input=False)(inputs)
        assert_close(outputs, torch.stack([model(x) for model, x in zip(models, inputs, strict=True)]))

    @counts
    def test_loss_and_gradients_are_those_of_each_model(self, count: int) -> None:
        models = build(normed, count)
        mb = self.batch(models)
        losses = mb.compute_loss(mb(features()), labels(), F.cross_entropy, reduction="none")
        expected = torch.stack([classify(model, (features(), labels())) for model in models])
        assert_close(losses, expected)
        losses.sum().backward()
        expected.sum().backward()
        assert_close(gradients(mb), plain_gradients(models))

    def test_mean_is_a_true_mean(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        losses = [F.cross_entropy(model(features()), labels()) for model in models]
        for reduction, factor in (("mean", 1 / 3), ("sum", 1.0)):
            mb.zero_grad()
            loss = mb.compute_loss(mb(features()), labels(), F.cross_entropy, reduction=reduction)
            assert loss.shape == ()
            assert_close(loss, torch.stack(losses).sum() * factor)
            loss.backward()
            for model in models:
                model.zero_grad()
            (torch.stack([classify(model, (features(), labels())) for model in models]).sum() * factor).backward()
            assert_close(gradients(mb), plain_gradients(models))
        assert_equal(
            mb.compute_loss(mb(features()), labels(), F.cross_entropy),
            mb.compute_loss(mb(features()), labels(), F.cross_entropy, reduction="mean"),
        )

    def test_targets_of_each_model(self) -> None:
        models, targets = build(mlp, 3), for_each(3, labels)
        mb = self.batch(models)
        losses = mb.compute_loss(mb(features()), targets, F.cross_entropy, reduction="none")
        assert_close(
            losses, torch.stack([classify(m, (features(), own)) for m, own in zip(models, targets, strict=True)])
        )

    def test_targets_that_fit_both_ways_are_told_apart_by_the_loss(self) -> None:
        # Three models, three rows: [3, 3] could be either, but cross entropy takes [3] class numbers only.
        models, targets = build(mlp, 3), torch.tensor([[0, 1, 2], [2, 1, 0], [1, 1, 0]])
        mb, inputs = self.batch(models), features(rows=3)
        losses = mb.compute_loss(mb(inputs), targets, F.cross_entropy, reduction="none")
        assert_close(losses, torch.stack([classify(m, (inputs, own)) for m, own in zip(models, targets, strict=True)]))

    def test_shared_targets_can_be_said(self) -> None:
        models = build(mlp, 3)
        mb, inputs = self.batch(models), features(rows=3)
        targets = features(9, rows=3, width=3)
        by_hand = {
            True: torch.stack([broadcast_loss(model(inputs), targets) for model in models]),
            False: torch.stack([broadcast_loss(m(inputs), own) for m, own in zip(models, targets, strict=True)]),
        }
        assert_different(by_hand[True], by_hand[False])
        for shared, expected in by_hand.items():
            losses = mb.compute_loss(mb(inputs), targets, broadcast_loss, "none", shared_targets=shared)
            assert_close(losses, expected)

    @pytest.mark.parametrize("own_targets", [False, True])
    def test_arguments_of_each_model_s_loss(self, own_targets: bool) -> None:
        models, smoothing = build(mlp, 3), torch.tensor([0.0, 0.1, 0.5])
        targets = for_each(3, labels) if own_targets else labels()
        mb = self.batch(models)
        losses = mb.compute_loss(
            mb(features()), targets, smooth_loss, reduction="none", loss_args={"smoothing": smoothing}
        )
        expected = [
            smooth_loss(model(features()), targets[i] if own_targets else targets, smoothing[i])
            for i, model in enumerate(models)
        ]
        assert_close(losses, torch.stack(expected))
        assert_different(losses[0], losses[2])

    def test_an_optimizer_step_without_gradients_changes_nothing(self) -> None:
        mb = self.batch(build(mlp, 3))
        optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(mb, [{}] * 3)
        before = [dict(state) for state in copy.deepcopy(mb.get_model_states())]
        optimizer.step()
        assert_equal(mb.get_model_states(), before)

    def test_arguments_of_another_number_of_models_are_refused(self) -> None:
        mb = self.batch(build(mlp, 3))
        with pytest.raises(InvalidInput, match=r"loss_args\['smoothing'\].*\[3, ...\]"):
            mb.compute_loss(mb(features()), labels(), smooth_loss, loss_args={"smoothing": torch.zeros(2)})

    def test_targets_may_be_a_pytree(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        weights = torch.rand(6)

        def loss(outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
            return (targets["weight"] * F.cross_entropy(outputs, targets["label"], reduction="none")).sum()

        shared = {"label": labels(), "weight": weights}
        losses = mb.compute_loss(mb(features()), shared, loss, reduction="none")
        assert_close(losses, torch.stack([loss(model(features()), shared) for model in models]))
        own = {"label": for_each(3, labels), "weight": weights.repeat(3, 1)}
        losses = mb.compute_loss(mb(features()), own, loss, reduction="none")
        expected = [loss(m(features()), {"label": own["label"][i], "weight": weights}) for i, m in enumerate(models)]
        assert_close(losses, torch.stack(expected))

    def test_outputs_may_be_a_pytree_of_anything(self) -> None:
        models = build(ManyArguments, 3)
        arguments = ((features(), {"extra": features(1, width=2)}), torch.tensor(1.5))
        keywords = {"shift": features(2, width=3), "power": 2}
        outputs = self.batch(models)(*arguments, **keywords)
        expected = [model(*arguments, **keywords) for model in models]
        assert outputs["rows"] == 6
        assert outputs["name"] == "y"
        assert_close(outputs, stacked(expected))
        mb = self.batch(models, shared_input=False)
        per_model = pytree.tree_map(lambda leaf: leaf.expand(3, *leaf.shape), arguments)
        assert_close(mb(*per_model, shift=keywords["shift"].expand(3, 6, 3), power=2), stacked(expected))

    def test_inputs_by_keyword(self) -> None:
        models = build(KeywordOnly, 3)
        outputs = self.batch(models)(features=features(), scale=2.0)
        assert_close(outputs, torch.stack([model(features=features(), scale=2.0) for model in models]))
        plain = build(mlp, 3)
        mb = self.batch(plain)
        assert_equal(mb(inputs=features()), mb(features()))

    def test_gradients_reach_the_inputs(self) -> None:
        models, inputs = build(mlp, 3), features().requires_grad_()
        self.batch(models)(inputs).square().sum().backward()
        received, inputs.grad = inputs.grad, None
        torch.stack([model(inputs) for model in models]).square().sum().backward()
        assert_close(received, inputs.grad)

    def test_gradients_add_up_until_they_are_cleared(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        for step in range(2):
            mb.compute_loss(mb(features(step)), labels(), F.cross_entropy, "sum").backward()
            for model in models:
                classify(model, (features(step), labels())).backward()
        assert_close(gradients(mb), plain_gradients(models))
        mb.zero_grad(set_to_none=False)
        assert_equal(gradients(mb), {name: torch.zeros_like(p) for name, p in mb.stacked_params.items()})
        mb.zero_grad()
        assert all(grad is None for grad in gradients(mb).values())

    def test_the_graph_of_one_pass_survives_another(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        first, second = mb(features(0)), mb(features(1))
        (first.sum() + 2 * second.sum()).backward()
        for model in models:
            (model(features(0)).sum() + 2 * model(features(1)).sum()).backward()
        assert_close(gradients(mb), plain_gradients(models))

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, context: Any) -> None:
        models = build(normed, 3)
        mb = self.batch(models)
        with context():
            outputs = mb(features())
            expected = torch.stack([model(features()) for model in models])
        assert not outputs.requires_grad
        assert_close(outputs, expected)

    def test_training_and_evaluation_mode(self) -> None:
        models = build(normed, 3)
        mb = self.batch(models)
        assert mb.training
        mb(features())
        before = state_of(mb)
        assert mb.eval() is mb
        assert not mb.training
        for model in models:
            model(features())
            model.eval()
        assert_close(mb(features(1)), torch.stack([model(features(1)) for model in models]))
        assert_equal(state_of(mb), before)
        assert mb.train() is mb
        assert mb.training
        mb(features())
        assert_different(state_of(mb)["buffers"], before["buffers"])

    def test_models_come_in_the_mode_of_the_first(self) -> None:
        models = build(normed, 2)
        for model in models:
            model.eval()
        mb = self.batch(models)
        assert not mb.training
        assert_close(mb(features()), torch.stack([model(features()) for model in models]))

    def test_one_submodule_can_be_put_into_evaluation(self) -> None:
        models = build(normed, 3)
        mb = self.batch(models)
        mb(features())
        for model in models:
            model(features())
            model[1].eval()
        mb.prototype[1].eval()
        assert_close(mb(features(1)), torch.stack([model(features(1)) for model in models]))
        assert_close(mb.get_model_states(), [dict(model.state_dict()) for model in models])

    @counts
    def test_eager_training_equals_the_loop(self, count: int) -> None:
        models = build(normed, count)
        mb = self.batch(models)
        optimizer, losses = sgd_for(mb), []
        for inputs, targets in batches():
            optimizer.zero_grad()
            loss = mb.compute_loss(mb(inputs), targets, F.cross_entropy, "none")
            losses.append(loss.detach())
            loss.sum().backward()
            optimizer.step()
        assert_close(
            as_tree(batch_ended(mb, optimizer, losses)), as_tree(train_alone(models, batches(), classify, plain_sgd))
        )

    def test_a_plain_optimizer_over_all_parameters_trains_each_model(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        optimizer = torch.optim.SGD(mb.parameters(), lr=0.1, momentum=0.9)
        for inputs, targets in batches():
            optimizer.zero_grad()
            mb.compute_loss(mb(inputs), targets, F.cross_entropy, "sum").backward()
            optimizer.step()
        train_alone(models, batches(), classify, lambda _, own: torch.optim.SGD(own, lr=0.1, momentum=0.9))
        assert_close(mb.get_model_states(), [dict(model.state_dict()) for model in models])

    def test_frozen_parameters_stay_and_tied_ones_stay_tied(self) -> None:
        models = build(Mixed, 3)
        mb = self.batch(models)
        frozen = mb.stacked_params["a_b.c.weight"].detach().clone()
        assert not mb.stacked_params["a_b.c.weight"].requires_grad
        optimizer = sgd_for(mb)
        data = [(features(step), features(step + 9)) for step in range(3)]
        for inputs, targets in data:
            optimizer.zero_grad()
            mb.compute_loss(mb(inputs), targets, F.mse_loss, "sum").backward()
            optimizer.step()
        train_alone(models, data, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), plain_sgd)
        assert_equal(mb.stacked_params["a_b.c.weight"].detach(), frozen)
        states = mb.get_model_states()
        assert_close(states, [dict(model.state_dict()) for model in models])
        for state in states:
            assert_equal(state["tied.weight"], state["out.weight"])

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
    @pytest.mark.parametrize("shared", [True, False])
    def test_chunks_change_nothing(self, size: int, shared: bool) -> None:
        models = build(normed, 5)
        inputs = features() if shared else for_each(5, features)
        results = []
        for chunk_size in (None, size):
            mb = self.batch(models, shared, chunk_size=chunk_size)
            outputs = mb(inputs)
            mb.compute_loss(outputs, labels(), F.cross_entropy, "sum").backward()
            results.append((outputs, gradients(mb), state_of(mb)))
        assert_close(results[1], results[0])

    def test_metrics_are_the_latest_losses(self) -> None:
        mb = self.batch(build(mlp, 2))
        assert mb.metrics() == {}
        losses = mb.compute_loss(mb(features()), labels(), F.cross_entropy, "none")
        assert mb.metrics() == {"loss_model_0": losses[0].item(), "loss_model_1": losses[1].item()}

    def test_autocast_is_honoured_or_refused(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = torch.stack([model(features()) for model in models])
            try:
                outputs = mb(features())
            except Unsupported:
                return
        assert outputs.dtype == expected.dtype == torch.bfloat16
        assert_close(outputs, expected, atol=1e-2, rtol=1e-2)

    def test_the_source_models_are_not_touched(self) -> None:
        models = build(normed, 3)
        before = copy.deepcopy([dict(model.state_dict()) for model in models])
        mb = self.batch(models)
        optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}] * 3)
        mb.compute_loss(mb(features()), labels(), F.cross_entropy, "sum").backward()
        optimizer.step()
        assert_equal([dict(model.state_dict()) for model in models], before)
        assert all(parameter.grad is None for model in models for parameter in model.parameters())
        assert_different(model_state(mb, 0), before[0])

    def test_models_may_share_weights_or_be_one_object(self) -> None:
        model = mlp()
        mb = self.batch([model, model])
        mb.stacked_params["0.weight"].data[0] += 1
        assert_different(mb.get_model_states()[0], mb.get_model_states()[1])
        assert_equal(mb.get_model_states()[1], dict(model.state_dict()))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        models = [model.to(dtype) for model in build(mlp, 3)]
        outputs = self.batch(models)(features().to(dtype))
        tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-2, "rtol": 2e-2}
        assert_close(outputs, torch.stack([model(features().to(dtype)) for model in models]), **tolerance)

    def test_integer_inputs(self) -> None:
        models = build(lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), 3)
        tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
        mb = self.batch(models)
        mb(tokens).square().sum().backward()
        for model in models:
            model(tokens).square().sum().backward()
        assert_close(gradients(mb), plain_gradients(models))


def broadcast_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that takes targets for all rows as well as one target for each row's mean."""
    return (outputs - targets).square().mean() + targets.sum()


def stacked(results: list[Any]) -> Any:
    """The results of all models as a batch returns them."""
    return pytree.tree_map(
        lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *results
    )
