"""What is the XLA backend's own: interchange with the torch backend, compiles, donation, reports, refusals."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mb_torch import InvalidInput, ModelBatch, OptimizerFactory, Unsupported
from tests.compare import assert_close, assert_equal
from tests.contract.base import (
    batches,
    build,
    classify,
    features,
    gradients,
    labels,
    mlp,
    normed,
    plain_gradients,
    plain_sgd,
    sgd_for,
    state_of,
)
from tests.contract.isolation import OPTIMIZERS
from tests.parity.loop import train_alone

OTHER = {"torch": "jax", "jax": "torch"}


def optimizer_for(mb: ModelBatch, name: str) -> Any:
    cls, config = OPTIMIZERS[name]
    return OptimizerFactory(cls, config).create_optimizer(mb, [{}] * mb.num_models)


def train(mb: ModelBatch, optimizer: Any, data: list[Any]) -> None:
    step = mb.make_train_step(F.cross_entropy, optimizer)
    for batch in data:
        step(*batch)


class TestInterchange:
    """A run that changes its backend in the middle ends where the loop ends."""

    @pytest.mark.parametrize("first", OTHER)
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_a_run_goes_on_where_the_other_backend_stopped(self, first: str, name: str) -> None:
        models = [model.double() for model in build(mlp, 3)]
        data = [(inputs.double(), targets) for inputs, targets in batches(6)]
        mb = ModelBatch(models, backend=first)
        optimizer = optimizer_for(mb, name)
        train(mb, optimizer, data[:3])
        other = ModelBatch(build(lambda: mlp().double(), 3, seed=9), backend=OTHER[first])
        other.load_state_dict(mb.state_dict())
        other_optimizer = optimizer_for(other, name)
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(other, other_optimizer, data[3:])
        cls, config = OPTIMIZERS[name]
        train_alone(models, data, classify, lambda _, parameters: cls(parameters, **config))
        expected = [dict(model.state_dict()) for model in models]
        assert_close([dict(state) for state in other.get_model_states()], expected, atol=1e-9, rtol=1e-9)

    def test_states_hold_plain_tensors(self, tmp_path: Any) -> None:
        mb = ModelBatch(build(normed, 2), backend="jax")
        optimizer = optimizer_for(mb, "Adam")
        train(mb, optimizer, batches(1))
        torch.save({"models": mb.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert_equal(loaded["models"], dict(mb.state_dict()))
        leaves = torch.utils._pytree.tree_leaves(loaded)
        assert {type(leaf) for leaf in leaves if isinstance(leaf, Tensor)} == {Tensor}

    def test_streams_go_on(self) -> None:
        models = build(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), 2)
        mb = ModelBatch(models, backend="torch", seeds=[1, 2])
        mb(features())
        other = ModelBatch(models, backend="jax", seeds=[5, 6])
        other.load_state_dict(mb.state_dict())
        assert other.streams is not None
        assert other.streams.seeds.tolist() == [1, 2]
        assert other.streams.steps.tolist() == [1, 1]


def compiles(mb: ModelBatch) -> int:
    return mb.backend_report()["compiles"]


class TestCompiles:
    """One program for each form of arguments and mode, whatever else changes."""

    def test_a_step_is_compiled_once(self) -> None:
        torch.manual_seed(41)
        mb = ModelBatch(build(normed, 5), backend="jax")
        optimizer = optimizer_for(mb, "Adam")
        weight = torch.ones(5)

        def loss(outputs: Tensor, targets: Tensor, *, weight: Tensor) -> Tensor:
            return weight * F.cross_entropy(outputs, targets)

        step = mb.make_train_step(loss, optimizer, loss_args={"weight": weight}, clip_norm=1.0)
        step(*batches(1)[0])
        once = compiles(mb)
        assert once == 1
        for index, batch in enumerate(batches(4)):
            optimizer.param_groups[1]["lr"] = 0.1 / (index + 1)
            optimizer.param_groups[2]["betas"] = (0.5, 0.9 + 0.01 * index)
            optimizer.param_groups[3]["weight_decay"] = 0.1 * index
            step.loss_args["weight"] = torch.rand(5)
            step.active = torch.tensor([True, index != 1, True, True, index > 2])
            step(*batch)
        step.active = None
        step(*batches(1)[0])
        assert compiles(mb) == once

    def test_a_new_batch_size_or_mode_compiles_once_more(self) -> None:
        mb = ModelBatch(build(normed, 6), backend="jax")
        with torch.no_grad():
            counts = []
            for rows, training in ((6, True), (6, True), (7, True), (7, True), (7, False), (6, True), (7, False)):
                mb.train(training)
                mb(features(rows=rows))
                counts.append(compiles(mb))
        assert counts == [1, 1, 2, 2, 3, 3, 3]

    def test_a_run_of_steps_is_one_program(self) -> None:
        mb = ModelBatch(build(mlp, 7), backend="jax")
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        step.run(batches(4))
        step.run(batches(4))
        assert compiles(mb) == 1

    def test_equal_batches_share_programs(self) -> None:
        models = build(mlp, 8)
        first = ModelBatch(models, backend="jax")
        first(features())
        second = first.select(range(8))
        second(features())
        assert (compiles(first), compiles(second)) == (1, 0)

    def test_a_setting_of_the_prototype_is_seen(self) -> None:
        mb = ModelBatch([nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1)) for _ in range(2)], backend="jax")
        before = mb(features())
        mb.prototype[1].negative_slope = 0.9
        after = mb(features())
        assert not torch.equal(before, after)
        assert_close(after[1], mb.model(1)(features()))

    def test_what_a_loss_has_caught_is_seen(self) -> None:
        mb = ModelBatch([nn.Linear(1, 1, bias=False) for _ in range(2)], backend="jax")
        factor = 1.0

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return factor + 0 * outputs.sum() + 0 * targets.sum()

        step = mb.make_train_step(loss, sgd_for(mb))
        batch = torch.ones(3, 1), torch.zeros(3, 1)
        assert step(*batch).tolist() == [1.0, 1.0]
        factor = 2.0
        assert step(*batch).tolist() == [2.0, 2.0]

    def test_tensors_that_a_loss_or_model_has_caught_are_live(self) -> None:
        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(1, 1, bias=False)
                self.factor = torch.ones(())

            def forward(self, x: Tensor) -> Tensor:
                return 0 * self.linear(x) + self.factor

        mb = ModelBatch([Scaled() for _ in range(2)], backend="jax")
        offset = torch.zeros(())

        class Loss:
            def __init__(self) -> None:
                self.scale = torch.ones(())

            def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
                return outputs.mean() * self.scale + offset + targets.mean()

        loss = Loss()
        step = mb.make_train_step(loss, sgd_for(mb))
        batch = torch.ones(3, 1), torch.zeros(3, 1)
        assert step(*batch).tolist() == [1.0, 1.0]
        offset.fill_(10.0)
        assert step(*batch).tolist() == [11.0, 11.0]
        loss.scale = torch.tensor(2.0)
        assert step(*batch).tolist() == [12.0, 12.0]
        mb.prototype.factor.mul_(3)
        assert step(*batch).tolist() == [16.0, 16.0]
        assert mb(batch[0]).unique().tolist() == [3.0]
        mb.prototype.factor.add_(1)
        assert mb(batch[0]).unique().tolist() == [4.0]

    def test_a_loss_may_be_recursive(self) -> None:
        def power(x: Tensor, exponent: int) -> Tensor:
            return x if exponent == 1 else x * power(x, exponent - 1)

        mb = ModelBatch([nn.Linear(1, 1, bias=False) for _ in range(2)], backend="jax")
        step = mb.make_train_step(lambda outputs, targets: power(outputs + targets, 3).mean(), sgd_for(mb))
        weights = [model.weight.item() for model in (mb.model(0), mb.model(1))]
        assert_close(step(torch.ones(3, 1), torch.zeros(3, 1)) + 0, torch.tensor(weights) ** 3)

    def test_outputs_may_be_changed_in_place(self) -> None:
        grads = []
        for change in (False, True):
            mb = ModelBatch(build(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 2), backend="jax")
            outputs = mb(features())
            if change:
                outputs.detach().mul_(100)
            outputs.sum().backward()
            grads.append(gradients(mb))
        assert_equal(grads[1], grads[0])

    def test_compile_time_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        mb = ModelBatch(build(mlp, 9), backend="jax")
        with caplog.at_level(logging.INFO, logger="modelbatch.jax"), torch.no_grad():
            mb(features())
            mb(features())
        lines = [record.getMessage() for record in caplog.records if "compiled" in record.getMessage()]
        assert len(lines) == 1
        assert "forward of 9 Sequential" in lines[0]


class TestDonation:
    def test_a_step_replaces_its_arrays_in_place(self) -> None:
        mb = ModelBatch(build(normed, 3), backend="jax")
        optimizer = optimizer_for(mb, "Adam")
        step = mb.make_train_step(F.cross_entropy, optimizer)
        step(*batches(1)[0])
        stacks = [*mb.stacked_params.values(), mb.stacked_buffers["1.running_mean"]]
        for batch in batches(2):
            # Reading does not prevent it.
            assert all(bool(stack.isfinite().all()) for stack in stacks)
            old = [stack.array() for stack in stacks]  # type: ignore[union-attr]
            step(*batch)
            assert all(array.is_deleted() for array in old)

    def test_parameters_held_across_steps_show_the_new_values(self) -> None:
        models = build(mlp, 3)
        mb, reference = ModelBatch(models, backend="jax"), ModelBatch(models)
        held, data = dict(mb.stacked_params), [parameter.data for parameter in mb.stacked_params.values()]
        for one in (mb, reference):
            train(one, sgd_for(one), batches(3))
        assert_close({name: p.detach() for name, p in held.items()}, state_of(reference)["parameters"])
        assert_close(data, list(state_of(reference)["parameters"].values()))

    def test_writes_between_steps_are_kept(self) -> None:
        models = build(mlp, 2)
        results = []
        for backend in OTHER:
            mb = ModelBatch(models, backend=backend)
            optimizer = sgd_for(mb)
            step = mb.make_train_step(F.cross_entropy, optimizer)
            for batch in batches(3):
                step(*batch)
                with torch.no_grad():
                    mb.stacked_params["0.weight"][1] *= 0.5
                optimizer.param_groups[0]["params"][1].data.add_(0.25)
            results.append(state_of(mb))
        assert_close(results[1], results[0])

    def test_backward_after_an_update_gives_the_gradients_of_the_forward_pass(self) -> None:
        models = build(mlp, 2)
        mb = ModelBatch(models, backend="jax")
        loss = mb.compute_loss(mb(features()), labels(), F.cross_entropy, "sum")
        train(mb, sgd_for(mb), batches(1))
        loss.backward()
        for model in models:
            classify(model, (features(), labels())).backward()
        assert_close(gradients(mb), plain_gradients(models))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 0.5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))


class OwnGradient(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.linear(x)) * self.linear.bias


class InPlace(Layer):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        out = torch.zeros_like(h)
        out[:, ::2] = h[:, ::2] * 2
        out[:, 1] = x[:, 0]
        h.add_(1)
        return out + h.relu_()


class ReplacesBuffer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.mean(0)
        self.last = x.sum()
        return self.linear(x - self.mean)


class MixedPrecision(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).double().softmax(-1).float()


class Checkpointed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=False)


class FrozenPart(Layer):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.linear(x).exp()
            self.mean.lerp_(x.mean(0), 0.1)
        return self.linear(x) * scale + scale.detach()


@pytest.mark.parametrize("make", [OwnGradient, InPlace, ReplacesBuffer, MixedPrecision, Checkpointed, FrozenPart])
def test_unusual_models_train_as_they_do_alone(make: Callable[[], nn.Module]) -> None:
    models = build(make, 3)
    mb = ModelBatch(models, backend="jax")
    train(mb, sgd_for(mb), batches(3))
    train_alone(models, batches(3), classify, plain_sgd)
    assert_close([dict(state) for state in mb.get_model_states()], [dict(model.state_dict()) for model in models])


class ScaledUnseen(Layer):
    """PyTorch does not differentiate the doubling; the recorded graph would."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight * 1.0
        with torch.no_grad():
            weight.mul_(2)
        return x @ weight.T


def test_what_differs_from_pytorch_is_not_used() -> None:
    mb = ModelBatch(build(ScaledUnseen, 2), backend="jax", backend_options={"translator": "graph"})
    with pytest.raises(Unsupported, match="differs from PyTorch by .* in gradient"):
        mb(features())


class Item(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * x.mean().item()


class Branch(Item):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


class Sparse(Item):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to_sparse().to_dense())


class ToNumpy(Item):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * float(x.detach().numpy().mean())


class TestRefusals:
    @pytest.mark.parametrize("make", [Item, Branch, Sparse, ToNumpy])
    def test_a_model_that_cannot_be_recorded_is_named(self, make: Callable[[], nn.Module]) -> None:
        mb = ModelBatch([nn.Sequential(nn.Linear(4, 4), make()) for _ in range(2)], backend="jax")
        before = state_of(mb)
        with pytest.raises(Unsupported, match=make.__name__):
            mb(features())
        assert_equal(state_of(mb), before)

    def test_a_loss_that_cannot_be_recorded(self) -> None:
        mb = ModelBatch(build(normed, 2), backend="jax")
        optimizer = optimizer_for(mb, "Adam")

        def loss(outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets) * outputs.max().item()

        step = mb.make_train_step(loss, optimizer)
        before = state_of(mb), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(Unsupported, match="value is looked at"):
            step(features(), labels())
        assert_equal((state_of(mb), optimizer.state_dict()), before)

    def test_an_error_of_the_model_is_worded_by_torch(self) -> None:
        mb = ModelBatch(build(mlp, 2), backend="jax")
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            mb(features(width=5))

    def test_large_integers_and_double_precision_are_kept(self) -> None:
        class Plus(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("offset", torch.tensor(2**40))

            def forward(self, x: Tensor) -> Tensor:
                return x + self.offset

        mb = ModelBatch([Plus() for _ in range(2)], backend="jax")
        outputs = mb(torch.tensor([1, 2**50]))
        assert outputs.dtype == torch.int64
        assert outputs[1].tolist() == [2**40 + 1, 2**40 + 2**50]

    def test_a_joint_step_needs_one_backend(self) -> None:
        from mb_torch import make_joint_step

        models = build(mlp, 2)
        batches_ = [ModelBatch(models, backend=name) for name in ("jax", "torch")]
        with pytest.raises(InvalidInput, match="one backend"):
            make_joint_step(batches_, lambda *_: None, [sgd_for(one) for one in batches_])

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"translater": "graph"}, "translater"), ({"translator": "x"}, "torchax"), ({"convolution": 3}, "matmul")],
    )
    def test_options_are_checked(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            ModelBatch(build(mlp, 1), backend="jax", backend_options=options)
        with pytest.raises(InvalidInput, match="backend_options"):
            ModelBatch(build(mlp, 1), backend_options={"translator": "graph"})


def test_the_report_says_what_was_compared() -> None:
    mb = ModelBatch(build(normed, 2), backend="jax")
    mb(features())
    step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
    step(features(), labels())
    report = mb.backend_report()
    assert (report["backend"], report["runs"]) == ("jax", "xla")
    (forward,) = report["translations"]
    (own,) = report["steps"]
    for translation in (forward, *own["translations"]):
        assert translation["translator"] == "graph"
        assert 0 <= translation["largest_difference"] < 1e-9
    unverified = ModelBatch(build(normed, 2), backend="jax", backend_options={"verify": False})
    unverified(features())
    assert unverified.backend_report()["translations"][0]["largest_difference"] is None
