"""The fused step over one batch: what it does to every model is what the loop does to each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import GradScaler, InvalidInput, ModelBatch, OptimizerFactory, Unsupported
from tests.compare import assert_close, assert_different, assert_equal
from tests.contract.base import (
    ContractBase,
    Mixed,
    batches,
    build,
    classify,
    dropping,
    features,
    for_each,
    labels,
    mlp,
    model_state,
    normed,
    normed_and_dropping,
    plain_sgd,
    sgd_for,
    state_of,
)
from tests.parity.loop import as_tree, batch_ended, train_alone

counts = pytest.mark.parametrize("count", [1, 3])
FROZEN = torch.tensor([True, False, True])


def everything(mb: ModelBatch, optimizer: Any, index: int) -> dict[str, Any]:
    """All that belongs to one model: tensors, optimizer state and the step of its random stream."""
    steps = mb.streams.steps[index].clone() if mb.streams is not None else None
    return copy.deepcopy([model_state(mb, index), optimizer.model_state_dict(index), steps])


def everything_of_all(mb: ModelBatch, optimizer: Any) -> list[Any]:
    """All that belongs to each model."""
    return [everything(mb, optimizer, index) for index in range(mb.num_models)]


def smoothed(outputs: Tensor, targets: Tensor, *, smoothing: Tensor, weight: Tensor, power: float = 1.0) -> Tensor:
    """A loss with a number and a vector of its own for each model."""
    log_probabilities = outputs.log_softmax(-1)
    right = -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
    return ((1 - smoothing) * right * weight[targets] - smoothing * log_probabilities.mean(-1)).mean() * power


class StepsContract(ContractBase):
    def check_step(
        self,
        make: Callable[[], nn.Module],
        *,
        count: int = 3,
        clip_norm: Any = None,
        run: bool = False,
        per_model: bool = False,
        **options: Any,
    ) -> None:
        """Train in a batch and in the loop, and compare everything."""
        models = build(make, count)
        mb = self.batch(models, not per_model, **options)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer, clip_norm=clip_norm)
        data: list[Any] = batches()
        own: list[Any] = data
        if per_model:
            data = [(for_each(count, features, seed), for_each(count, labels, seed)) for seed in range(3)]
            own = [[(x[i], y[i]) for i in range(count)] for x, y in data]
        losses = step.run(data) if run else torch.stack([step(*batch) for batch in data])
        assert losses.shape == (3, count)
        assert not losses.requires_grad
        expected = train_alone(models, own, classify, plain_sgd, clip_norm=clip_norm)
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), as_tree(expected))
        assert all(parameter.grad is None for parameter in mb.parameters())
        assert mb.metrics() == {f"loss_model_{i}": loss.item() for i, loss in enumerate(losses[-1])}

    @counts
    @pytest.mark.parametrize("make", [mlp, normed])
    @pytest.mark.parametrize("per_model", [False, True])
    def test_step_equals_the_loop(self, make: Any, count: int, per_model: bool) -> None:
        self.check_step(make, count=count, per_model=per_model)

    @counts
    def test_run_equals_single_steps(self, count: int) -> None:
        self.check_step(normed, count=count, run=True)

    def test_a_scheduler_of_torch_sees_the_updates_of_steps(self) -> None:
        """Warnings are errors here, and torch warns about a scheduler that is stepped before its optimizer."""
        mb = self.batch(build(mlp, 2))
        optimizer = sgd_for(mb)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        mb.make_train_step(F.cross_entropy, optimizer)(features(), labels())
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.025]

    def test_an_optimizer_that_evaluates_the_loss_itself_is_refused(self) -> None:
        mb = self.batch(build(mlp, 2))
        with pytest.raises(Unsupported, match="LBFGS needs a closure .* one by one, or choose another optimizer"):
            mb.make_train_step(F.cross_entropy, torch.optim.LBFGS(mb.parameters()))

    @pytest.mark.parametrize("steps", [1, 4])
    @pytest.mark.parametrize("per_model", [False, True])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_rows_of_a_data_set(self, steps: int, per_model: bool, accumulate: int) -> None:
        models = build(normed, 3)
        inputs, targets = features(rows=20), labels(rows=20)
        if per_model:
            inputs, targets = for_each(3, features, rows=20), for_each(3, labels, rows=20)
        results = []
        for by_rows in (True, False):
            mb = self.batch(models, not per_model)
            optimizer = sgd_for(mb)
            step = mb.make_train_step(F.cross_entropy, optimizer, accumulate=accumulate)
            for seed in range(2):
                order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[: steps * 5].view(steps, 5)
                axis = int(per_model)
                batches_ = [(inputs.index_select(axis, own), targets.index_select(axis, own)) for own in order]
                losses = step.run_rows(inputs, targets, order) if by_rows else step.run(batches_)
            assert losses.shape == (steps, 3)
            results.append((losses.detach().clone(), state_of(mb), optimizer.state_dict()))
        assert_close(results[0], results[1])

    def test_a_data_set_may_change_in_place(self) -> None:
        mb, inputs, targets = self.batch([nn.Linear(1, 1, bias=False)] * 2), torch.ones(4, 1), torch.zeros(4, 1)
        step = mb.make_train_step(lambda _, targets: targets.mean() + 0 * _.sum(), sgd_for(mb))
        rows = torch.tensor([[0, 1], [2, 3]])
        assert_equal(step.run_rows(inputs, targets, rows) + 0, torch.zeros(2, 2))
        targets[2:] = 3.0
        assert_equal(step.run_rows(inputs, targets, rows) + 0, torch.tensor([[0.0, 0.0], [3.0, 3.0]]))

    @pytest.mark.parametrize("rows", [torch.tensor([0, 1]), torch.tensor([[0.0]]), torch.tensor([[20]]), [[1]]])
    def test_rows_that_are_not_there(self, rows: Any) -> None:
        mb = self.batch(build(mlp, 2))
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        with pytest.raises(InvalidInput, match="rows"):
            step.run_rows(features(rows=20), labels(rows=20), rows)

    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    @pytest.mark.parametrize("per_model", [False, True])
    def test_chunks_change_nothing(self, size: int, per_model: bool) -> None:
        self.check_step(normed, count=5, chunk_size=size, per_model=per_model)

    def test_clip_norm(self) -> None:
        self.check_step(mlp, clip_norm=0.1)
        self.check_step(mlp, clip_norm=1e9)

    def test_an_infinite_bound_leaves_a_model_alone(self) -> None:
        # Its norm overflows, its gradient does not.
        mb = self.batch([nn.Linear(1, 1, bias=False) for _ in range(2)])
        before = [state["weight"].clone() for state in mb.get_model_states()]
        optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 1e-25}] * 2)
        bounds = torch.tensor([float("inf"), 1.0])
        step = mb.make_train_step(lambda outputs, _: 1e25 * outputs.sum(), optimizer, clip_norm=bounds)
        step(torch.ones(1, 1), torch.zeros(1))
        assert_close(mb.get_model_states()[0]["weight"], before[0] - 1.0)
        assert_equal(mb.get_model_states()[1]["weight"], before[1])

    def test_clip_norm_of_each_model(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        bounds = torch.tensor([0.1, 0.01, 1e9])
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb), clip_norm=bounds)
        step.run(batches())
        for index, model in enumerate(models):
            train_alone(
                [model], batches(), classify, lambda _, p, i=index: plain_sgd(i, p), clip_norm=float(bounds[index])
            )
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_frozen_and_tied_parameters(self) -> None:
        models = build(Mixed, 3)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.mse_loss, optimizer)
        data = [(features(index), features(index + 9)) for index in range(3)]
        losses = [step(*batch) for batch in data]
        expected = train_alone(models, data, lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), plain_sgd)
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), as_tree(expected))

    def test_arguments_of_the_loss(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        own = {"smoothing": torch.tensor([0.0, 0.1, 0.5]), "weight": torch.rand(3, 3) + 0.5}
        step = mb.make_train_step(smoothed, optimizer, loss_args=own, shared_args={"power": 2.0})
        losses = [step(*batch) for batch in batches()]
        expected = []
        for index, model in enumerate(models):
            arguments = {name: value[index] for name, value in own.items()}
            expected += train_alone(
                [model],
                batches(),
                lambda m, batch, a=arguments: smoothed(m(batch[0]), batch[1], **a, power=2.0),
                lambda _, p, i=index: plain_sgd(i, p),
            )
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), as_tree(expected))

    def test_arguments_of_the_loss_are_live(self) -> None:
        mb = self.batch([nn.Linear(1, 1, bias=False) for _ in range(2)])

        def loss(outputs: Tensor, targets: Tensor, *, weight: Tensor, offset: float) -> Tensor:
            return weight + offset + 0 * outputs.sum() + 0 * targets.sum()

        step = mb.make_train_step(loss, sgd_for(mb), loss_args={"weight": torch.zeros(2)}, shared_args={"offset": 0.0})
        batch = torch.ones(3, 1), torch.zeros(3, 1)
        assert_equal(step(*batch), torch.tensor([0.0, 0.0]))
        step.loss_args["weight"][1] = 5.0
        assert_equal(step(*batch), torch.tensor([0.0, 5.0]))
        step.loss_args["weight"] = torch.tensor([1.0, 2.0])
        step.shared_args["offset"] = 10.0
        assert_equal(step(*batch), torch.tensor([11.0, 12.0]))

    @pytest.mark.parametrize("options", [{}, {"chunk_size": 2}])
    @pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
    def test_a_model_that_is_not_active_is_frozen_wholly(self, optimizer_cls: Any, options: dict[str, int]) -> None:
        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

        models = build(make, 3)
        mb, reference = (self.batch(models, seeds=[1, 2, 3], **options) for _ in range(2))
        decay = {"weight_decay": 0.1} if optimizer_cls is not torch.optim.Rprop else {}
        optimizers = [
            OptimizerFactory(optimizer_cls, decay).create_optimizer(batch, [{"lr": 0.01}] * 3)
            for batch in (mb, reference)
        ]
        step = mb.make_train_step(F.cross_entropy, optimizers[0])
        other = reference.make_train_step(F.cross_entropy, optimizers[1])
        for batch in batches(2):
            step(*batch)
            other(*batch)
        step.active = FROZEN
        before = everything(mb, optimizers[0], 1)
        for batch in batches(3):
            losses = step(*batch)
            expected = other(*batch)
            assert_equal(everything(mb, optimizers[0], 1), before)
            # Whether a companion is frozen changes nothing for the others.
            assert_equal(losses[FROZEN], expected[FROZEN])
        for index in (0, 2):
            assert_equal(everything(mb, optimizers[0], index), everything(reference, optimizers[1], index))
        step.active = None
        step(*batches(1)[0])
        assert_different(model_state(mb, 1), before[0])

    def test_active_is_live_and_may_be_given_at_the_start(self) -> None:
        mb = self.batch(build(mlp, 3))
        active = torch.tensor([False, True, True])
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb), active=active)
        assert step.active is active
        first, second = model_state(mb, 0), model_state(mb, 1)
        step(*batches()[0])
        assert_equal(model_state(mb, 0), first)
        assert_different(model_state(mb, 1), second)
        active[0] = True
        step(*batches()[1])
        assert_different(model_state(mb, 0), first)

    def test_no_model_active(self) -> None:
        mb = self.batch(build(normed, 3))
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer, active=torch.zeros(3, dtype=torch.bool))
        before = [everything(mb, optimizer, index) for index in range(3)]
        step.run(batches())
        assert_equal([everything(mb, optimizer, index) for index in range(3)], before)

    def test_a_frozen_model_s_rubbish_stays_its_own(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models, shared_input=False)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer, active=FROZEN, clip_norm=0.5)
        before = everything(mb, optimizer, 1)
        inputs = for_each(3, features)
        inputs[1] = float("nan")
        step(inputs, for_each(3, labels))
        assert_equal(everything(mb, optimizer, 1), before)
        assert all(bool(value.isfinite().all()) for value in state_of(mb)["parameters"].values())

    @counts
    @pytest.mark.parametrize("clip_norm", [None, 0.05])
    def test_accumulation_updates_with_the_mean(self, count: int, clip_norm: float | None) -> None:
        models = build(mlp, count)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer, accumulate=3, clip_norm=clip_norm)
        before = state_of(mb)
        for index, batch in enumerate(batches(6)):
            if index in (1, 2):
                assert_equal(state_of(mb), before)
            step(*batch)
        train_alone(models, self.groups(2, 3), mean_of(classify), plain_sgd, clip_norm=clip_norm)
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    @staticmethod
    def groups(count: int, size: int) -> list[tuple[Any, ...]]:
        """The batches of `count` updates of `size` calls each."""
        data = batches(count * size)
        return [tuple(data[start : start + size]) for start in range(0, len(data), size)]

    def test_flush_updates_with_what_there_is(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb), accumulate=4)
        step.flush()
        data = batches(3)
        for batch in data[:2]:
            step(*batch)
        step.flush()
        step(*data[2])
        step.flush()
        state = state_of(mb)
        step.flush()
        assert_equal(state_of(mb), state)
        train_alone(models, [tuple(data[:2]), tuple(data[2:])], share_of(classify, 4), plain_sgd)
        assert_close([dict(own) for own in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_accumulation_while_active_changes(self) -> None:
        """Model 0 sees all calls, model 1 the first, model 2 the last, model 3 none."""
        models = build(normed, 4)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer, accumulate=2)
        data = batches(2)
        untouched = everything(mb, optimizer, 3)
        step.active = torch.tensor([True, True, False, False])
        step(*data[0])
        step.active = torch.tensor([True, False, True, False])
        step(*data[1])
        assert_equal(everything(mb, optimizer, 3), untouched)
        for index, seen in enumerate([data, data[:1], data[1:]]):
            train_alone([models[index]], [tuple(seen)], share_of(classify, 2), lambda _, p, i=index: plain_sgd(i, p))
        states = mb.get_model_states()[:3]
        assert_close([dict(state) for state in states], [dict(m.state_dict()) for m in models[:3]])

    @pytest.mark.parametrize(("accumulate", "flushes"), [(1, False), (2, False), (3, True)])
    @pytest.mark.parametrize("scaled", [False, True])
    def test_a_call_whose_update_is_refused_changes_nothing(self, accumulate: int, flushes: bool, scaled: bool) -> None:
        pairs = []
        for _ in range(2):
            mb = self.batch(build(normed_and_dropping, 3), seeds=[1, 2, 3])
            optimizer = sgd_for(mb)
            scaler = GradScaler(3, init_scale=8.0) if scaled else None
            options = {"accumulate": accumulate, "clip_norm": 0.05, "scaler": scaler}
            pairs.append((mb, optimizer, mb.make_train_step(F.cross_entropy, optimizer, **options)))
        (mb, optimizer, step), (other, other_optimizer, other_step) = pairs
        *before, last = batches(2 * accumulate)
        for batch in before:
            step(*batch)
            other_step(*batch)
        state = everything_of_all(mb, optimizer)
        group = optimizer.param_groups[1]
        lr, group["lr"] = group["lr"], "x"
        with pytest.raises(InvalidInput, match="model 1: lr"):
            step.flush() if flushes else step(*last)
        group["lr"] = lr
        assert_equal(everything_of_all(mb, optimizer), state)
        for own in (step, other_step):
            own.flush() if flushes else own(*last)
        assert_different(everything_of_all(mb, optimizer), state)
        assert_equal(everything_of_all(mb, optimizer), everything_of_all(other, other_optimizer))

    def test_an_update_that_fails_leaves_the_gradients_before(self) -> None:
        """An optimizer of another kind, which raises when it updates."""
        pairs = []
        for _ in range(2):
            mb = self.batch(build(mlp, 3))
            optimizer = torch.optim.SGD(mb.parameters(), lr=0.1)
            pairs.append((mb, optimizer, mb.make_train_step(F.cross_entropy, optimizer, accumulate=2, clip_norm=0.05)))
        (mb, optimizer, step), (other, _, other_step) = pairs
        first, second = batches(2)
        step(*first)
        other_step(*first)
        optimizer.param_groups[0]["lr"] = "x"
        with pytest.raises((TypeError, ValueError)):
            step(*second)
        optimizer.param_groups[0]["lr"] = 0.1
        assert_equal(state_of(mb), state_of(other))
        step(*second)
        other_step(*second)
        assert_equal(state_of(mb), state_of(other))

    def test_no_model_active_while_accumulating(self) -> None:
        mb = self.batch(build(mlp, 2))
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer, accumulate=2)
        before = [everything(mb, optimizer, index) for index in range(2)]
        step.active = torch.zeros(2, dtype=torch.bool)
        step.run(batches(2))
        assert_equal([everything(mb, optimizer, index) for index in range(2)], before)

    def test_aux_is_given_for_every_model(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)

        def loss(outputs: Tensor, targets: Tensor) -> Any:
            return F.cross_entropy(outputs, targets), {"right": (outputs.argmax(-1) == targets).sum(), "name": "x"}

        step = mb.make_train_step(loss, sgd_for(mb), aux=True)
        expected = [loss(model(features()), labels()) for model in models]
        losses, aux = step(features(), labels())
        assert_close(losses, torch.stack([own for own, _ in expected]))
        assert_equal(aux, {"right": torch.stack([own["right"] for _, own in expected]), "name": "x"})
        losses, aux = step.run(batches(2))
        assert losses.shape == (2, 3)
        assert aux["right"].shape == (3,)

    def test_a_scaler_with_one_scale_for_each_model(self) -> None:
        models = build(mlp, 3)
        mb, reference = self.batch(models, False), self.batch(models, False)
        optimizer, plain = sgd_for(mb), sgd_for(reference)
        scaler = GradScaler(3, init_scale=2.0**8, growth_interval=2)
        step = mb.make_train_step(F.cross_entropy, optimizer, scaler=scaler, clip_norm=0.5)
        expected = reference.make_train_step(F.cross_entropy, plain, clip_norm=0.5)
        for seed in range(4):
            inputs, targets = for_each(3, features, seed), for_each(3, labels, seed)
            expected.active = torch.tensor([True, seed != 1, True])
            assert_close(expected(inputs, targets)[[0, 2]], step(poisoned(inputs, 1, seed == 1), targets)[[0, 2]])
        # Model 1 skipped its step and halved its scale once; the others never noticed.
        assert_close(state_of(mb), state_of(reference))
        assert_equal(scaler.get_scale(), torch.tensor([1024.0, 256.0, 1024.0]))

    def test_a_plain_optimizer_serves_too(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        step = mb.make_train_step(F.cross_entropy, torch.optim.SGD(mb.parameters(), lr=0.1, momentum=0.9))
        step.run(batches())
        train_alone(models, batches(), classify, lambda _, p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_eager_and_fused_steps_may_alternate(self) -> None:
        models = build(normed, 3)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        for index, (inputs, targets) in enumerate(batches(4)):
            if index % 2:
                step(inputs, targets)
                continue
            optimizer.zero_grad()
            mb.compute_loss(mb(inputs), targets, F.cross_entropy, "sum").backward()
            optimizer.step()
            optimizer.zero_grad()
        train_alone(models, batches(4), classify, plain_sgd)
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_hyper_parameters_are_live(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        data = batches(2)
        step(*data[0])
        optimizer.param_groups[1]["lr"] = 0.003
        step(*data[1])
        for index, model in enumerate(models):
            plain = plain_sgd(index, list(model.parameters()))
            for number, batch in enumerate(data):
                if number and index == 1:
                    plain.param_groups[0]["lr"] = 0.003
                plain.zero_grad()
                classify(model, batch).backward()
                plain.step()
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_loading_between_steps_takes_effect(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(build(mlp, 3, seed=2))
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        mb.load_model_states([model.state_dict() for model in models])
        step.run(batches())
        train_alone(models, batches(), classify, plain_sgd)
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_evaluation_mode_holds_in_the_step(self) -> None:
        models = build(lambda: nn.Sequential(normed(), nn.Dropout(0.5)), 3)
        mb = self.batch(models).eval()
        buffers = state_of(mb)["buffers"]
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        step.run(batches())
        for model in models:
            model.eval()
        train_alone(models, batches(), classify, plain_sgd)
        assert_equal(state_of(mb)["buffers"], buffers)
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_a_step_works_under_no_grad(self) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        with torch.no_grad():
            step.run(batches())
        train_alone(models, batches(), classify, plain_sgd)
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_steps_of_copies_are_independent(self) -> None:
        mb = self.batch(build(dropping, 3), seeds=[1, 2, 3])
        twin = copy.deepcopy(mb)
        mb.make_train_step(F.cross_entropy, sgd_for(mb)).run(batches())
        twin.make_train_step(F.cross_entropy, sgd_for(twin)).run(batches())
        assert_equal(state_of(twin), state_of(mb))

    def test_shapes_may_change_between_steps(self) -> None:
        models = build(normed, 3)
        mb = self.batch(models)
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        data = [(features(rows, rows), labels(rows, rows)) for rows in (6, 4, 6, 9)]
        for batch in data:
            step(*batch)
        train_alone(models, data, classify, plain_sgd)
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])

    def test_inputs_and_targets_may_be_pytrees(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 3)

            def forward(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
                y = self.linear(given["x"])
                return y, y * given["scale"]

        def loss(outputs: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
            return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])

        models = build(Two, 3)
        mb = self.batch(models)
        step = mb.make_train_step(loss, sgd_for(mb))
        data = [
            ({"x": features(i), "scale": features(i + 5, width=1)}, (labels(i), features(i + 9, width=3)))
            for i in range(3)
        ]
        losses = [step(*batch) for batch in data]
        expected = train_alone(models, data, lambda m, batch: loss(m(batch[0]), batch[1]), plain_sgd)
        assert_close(torch.stack(losses), torch.stack([own.losses for own in expected], 1))
        assert_close([dict(state) for state in mb.get_model_states()], [dict(m.state_dict()) for m in models])


def mean_of(loss_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mean of a loss over several batches."""
    return lambda model, group: torch.stack([loss_of(model, batch) for batch in group]).mean()


def share_of(loss_of: Callable[..., Tensor], calls: int) -> Callable[..., Tensor]:
    """The sum of a loss over several batches, each divided by the number of calls that make an update."""
    return lambda model, group: torch.stack([loss_of(model, batch) for batch in group]).sum() / calls


def poisoned(inputs: Tensor, index: int, now: bool) -> Tensor:
    """The inputs, with those of one model infinite if it is time."""
    if not now:
        return inputs
    changed = inputs.clone()
    changed[index] = torch.inf
    return changed
