"""The fused step over several batches whose models are chained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import GradScaler, ModelBatch, make_joint_step
from tests.compare import assert_close, assert_different, assert_equal
from tests.contract.base import (
    ContractBase,
    KeywordOnly,
    batches,
    build,
    features,
    for_each,
    labels,
    mlp,
    model_state,
    normed,
    plain_sgd,
    sgd_for,
    state_of,
)


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())


def neck() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh())


def head() -> nn.Module:
    return nn.Linear(5, 3)


def chain(first: Any, second: Any, third: Any, inputs: Tensor, targets: Tensor, *, weight: Any, power: float) -> Tensor:
    """A loss that uses the second model twice."""
    hidden = second(first(inputs))
    return weight * F.cross_entropy(third(hidden), targets) + hidden.square().mean() ** power


class JointContract(ContractBase):
    def trio(self, count: int = 3, **options: Any) -> tuple[list[list[nn.Module]], list[ModelBatch]]:
        models = [build(make, count, seed) for seed, make in enumerate((encoder, neck, head), start=1)]
        return models, [self.batch(own, **options) for own in models]

    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("untrained", [None, 0, 1, 2])
    @pytest.mark.parametrize("clip_norm", [None, 0.05])
    def test_three_batches_equal_the_loop(self, count: int, untrained: int | None, clip_norm: float | None) -> None:
        models, trio = self.trio(count)
        optimizers = [None if place == untrained else sgd_for(mb) for place, mb in enumerate(trio)]
        weights = torch.tensor([1.0, 0.5, 2.0])[:count]
        step = make_joint_step(
            trio, chain, optimizers, loss_args={"weight": weights}, shared_args={"power": 2.0}, clip_norm=clip_norm
        )
        losses = torch.stack([step(*batch) for batch in batches()])
        for index in range(count):
            own = [column[index] for column in models]
            expected = self.train_together(own, index, untrained, weights[index], clip_norm)
            assert_close(losses[:, index], expected)
            for mb, model in zip(trio, own, strict=True):
                assert_close(mb.get_model_states()[index], dict(model.state_dict()))

    @staticmethod
    def train_together(
        models: list[nn.Module], index: int, untrained: int | None, weight: Tensor, clip_norm: float | None
    ) -> Tensor:
        """The loop over one model of each kind; returns its losses."""
        trained = [model for place, model in enumerate(models) if place != untrained]
        parameters = [parameter for model in trained for parameter in model.parameters()]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizers = [plain_sgd(index, list(model.parameters())) for model in trained]
        losses = []
        for batch in batches():
            for model in models:
                model.zero_grad()
            loss = chain(*models, *batch, weight=weight, power=2.0)
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.detach())
        assert_different(parameters, before)
        return torch.stack(losses)

    def test_a_batch_without_optimizer_keeps_its_weights(self) -> None:
        _, trio = self.trio()
        before = state_of(trio[1])
        arguments = {"loss_args": {"weight": torch.ones(3)}, "shared_args": {"power": 1.0}}
        step = make_joint_step(trio, chain, [sgd_for(trio[0]), None, sgd_for(trio[2])], **arguments)
        step.run(batches())
        assert_equal(state_of(trio[1]), before)
        assert all(parameter.grad is None for mb in trio for parameter in mb.parameters())

    def test_its_statistics_move_as_they_would_in_the_loop(self) -> None:
        models, trio = self.trio()
        arguments = {"loss_args": {"weight": torch.ones(3)}, "shared_args": {"power": 1.0}}
        make_joint_step(trio, chain, [None, None, sgd_for(trio[2])], **arguments).run(batches())
        for index, model in enumerate(models[0]):
            for inputs, _ in batches():
                model(inputs)
            assert_close(trio[0].get_model_states()[index], dict(model.state_dict()))

    def test_active_accumulate_and_chunks(self) -> None:
        models, trio = self.trio(chunk_size=2)
        _, whole = self.trio()
        arguments: dict[str, Any] = {
            "loss_args": {"weight": torch.tensor([1.0, 2.0, 3.0])},
            "shared_args": {"power": 1.0},
            "active": torch.tensor([True, False, True]),
            "accumulate": 2,
            "clip_norm": 0.1,
        }
        before = [model_state(mb, 1) for mb in trio]
        for own in (trio, whole):
            make_joint_step(own, chain, [sgd_for(mb) for mb in own], **arguments).run(batches(4))
        assert_close([state_of(mb) for mb in trio], [state_of(mb) for mb in whole])
        assert_equal([model_state(mb, 1) for mb in trio], before)
        assert_different([model_state(mb, 0) for mb in trio], [copy.deepcopy(dict(m[0].state_dict())) for m in models])

    def test_models_may_be_called_with_any_arguments(self) -> None:
        first, second = build(KeywordOnly, 3), build(mlp, 3)
        batches_ = [self.batch(first), self.batch(second)]

        def loss(named: Any, plain: Any, inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(named(features=inputs, scale=2.0) + plain(inputs), targets)

        step = make_joint_step(batches_, loss, [sgd_for(mb) for mb in batches_])
        expected = torch.stack([loss(a, b, features(), labels()) for a, b in zip(first, second, strict=True)])
        assert_close(step(features(), labels()), expected)

    def test_inputs_of_each_model_and_aux(self) -> None:
        models = build(normed, 3)
        mb = self.batch(models, shared_input=False)

        def loss(model: Any, inputs: Tensor, targets: Tensor) -> Any:
            outputs = model(inputs)
            return F.cross_entropy(outputs, targets), outputs

        step = make_joint_step([mb], loss, [sgd_for(mb)], aux=True)
        inputs, targets = for_each(3, features), for_each(3, labels)
        expected = [loss(model, x, y) for model, x, y in zip(models, inputs, targets, strict=True)]
        losses, outputs = step(inputs, targets)
        assert_close(losses, torch.stack([own for own, _ in expected]))
        assert_close(outputs, torch.stack([own for _, own in expected]))
        assert not outputs.requires_grad

    def test_one_scaler_for_all_batches(self) -> None:
        models, trio = self.trio()
        scaler = GradScaler(3, init_scale=2.0**10)

        def loss(*given: Any) -> Tensor:
            *three, inputs, targets = given
            return chain(*three, inputs, targets, weight=1.0, power=1.0)

        step = make_joint_step(trio, loss, [sgd_for(mb) for mb in trio], scaler=scaler)
        _, plain = self.trio()
        expected = make_joint_step(plain, loss, [sgd_for(mb) for mb in plain])
        assert_close(step.run(batches()), expected.run(batches()))
        assert_close([state_of(mb) for mb in trio], [state_of(mb) for mb in plain])
        assert len(models) == 3

    def test_streams_do_not_depend_on_companions(self) -> None:
        def make_one() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))

        def make_other() -> nn.Module:
            return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))

        def loss(one: Any, other: Any, inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(other(one(inputs)), targets)

        models = build(make_one, 3), build(make_other, 3)
        results = []
        for order in ([0, 1, 2], [2, 0]):
            pair = [self.batch([own[i] for i in order], seeds=[5 + i for i in order]) for own in models]
            rates = [[0.1, 0.05, 0.02][i] for i in order]
            make_joint_step(pair, loss, [sgd_for(mb, rates) for mb in pair]).run(batches())
            results.append([mb.get_model_states() for mb in pair])
        assert_close(results[1], [[own[2], own[0]] for own in results[0]])
