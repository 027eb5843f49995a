"""States of models: in and out of the batch, to disk, copied, selected, converted, clipped."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import InvalidInput, ModelBatch
from tests.compare import assert_close, assert_different, assert_equal
from tests.contract.base import (
    ContractBase,
    Mixed,
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
    plain_gradients,
    plain_sgd,
    sgd_for,
    state_of,
)
from tests.parity.loop import train_alone

NAN, INF = math.nan, math.inf

makes = pytest.mark.parametrize("make", [mlp, normed, Mixed])


def plain_states(models: list[nn.Module]) -> list[dict[str, Tensor]]:
    return [dict(model.state_dict()) for model in models]


def train(mb: ModelBatch, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for inputs, targets in batches(steps):
        optimizer.zero_grad()
        mb.compute_loss(mb(inputs), targets, F.cross_entropy, "sum").backward()
        optimizer.step()


class StatesContract(ContractBase):
    @makes
    def test_states_are_those_of_the_models(self, make: Any) -> None:
        models = build(make, 3)
        states = self.batch(models).get_model_states()
        assert_equal([dict(state) for state in states], plain_states(models))
        for state, model in zip(states, models, strict=True):
            assert list(state) == list(model.state_dict())
            make().load_state_dict(state, strict=True)

    def test_states_are_copies(self) -> None:
        mb = self.batch(build(normed, 2))
        before = state_of(mb)
        for state in mb.get_model_states():
            for value in state.values():
                value.zero_()
        assert_equal(state_of(mb), before)

    @makes
    def test_states_round_trip(self, make: Any) -> None:
        models, others = build(make, 3), build(make, 3, seed=2)
        mb, other = self.batch(models), self.batch(others)
        other.load_model_states(mb.get_model_states())
        assert_equal(other.get_model_states(), mb.get_model_states())
        other.load_model_states(plain_states(others))
        assert_equal([dict(state) for state in other.get_model_states()], plain_states(others))

    def test_loaded_states_are_copied(self) -> None:
        mb, states = self.batch(build(mlp, 2)), plain_states(build(mlp, 2, seed=2))
        mb.load_model_states(states)
        before = state_of(mb)
        for state in states:
            for value in state.values():
                value.zero_()
        assert_equal(state_of(mb), before)

    def test_loading_reaches_optimizer_and_gradients_stay(self) -> None:
        models = build(mlp, 2)
        mb = self.batch(build(mlp, 2, seed=2))
        optimizer = sgd_for(mb)
        mb.load_model_states(plain_states(models))
        train(mb, optimizer, 3)
        train_alone(models, batches(3), classify, plain_sgd)
        assert_close([dict(state) for state in mb.get_model_states()], plain_states(models))

    @makes
    def test_files_hold_plain_states(self, make: Any, tmp_path: Path) -> None:
        models = build(make, 3)
        mb = self.batch(models)
        mb.save_all(str(tmp_path / "new" / "folder"))
        assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
            "model_0.pt",
            "model_1.pt",
            "model_2.pt",
        ]
        for index, model in enumerate(models):
            loaded = torch.load(tmp_path / "new" / "folder" / f"model_{index}.pt", weights_only=True)
            assert type(loaded) is dict
            assert all(type(value) is Tensor and value.device.type == "cpu" for value in loaded.values())
            assert_equal(loaded, dict(model.state_dict()))
        other = self.batch(build(make, 3, seed=2))
        other.load_all(tmp_path / "new" / "folder")
        assert_equal(other.get_model_states(), mb.get_model_states())

    def test_files_do_not_hold_the_whole_stack(self, tmp_path: Path) -> None:
        # A slice of a stack would drag all models' storage into every file.
        self.batch([nn.Linear(100, 100) for _ in range(20)]).save_all(tmp_path)
        assert (tmp_path / "model_3.pt").stat().st_size < 2 * 4 * 100 * 101

    def test_a_dtype_converts_everything(self) -> None:
        models = build(normed, 3)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        train(mb, optimizer)
        assert mb.to(torch.float64) is mb
        assert {p.dtype for p in mb.stacked_params.values()} == {torch.float64}
        assert mb.stacked_buffers["1.running_mean"].dtype == torch.float64
        assert mb.stacked_buffers["1.num_batches_tracked"].dtype == torch.int64
        outputs = mb(features().double())
        assert outputs.dtype == torch.float64
        for index in range(3):
            assert_close(outputs[index], mb.model(index)(features().double()), atol=1e-9, rtol=1e-9)
        mb.compute_loss(outputs, labels(), F.cross_entropy, "sum").backward()
        before = state_of(mb)
        optimizer.step()
        assert_different(state_of(mb)["parameters"], before["parameters"])

    def test_moving_keeps_the_parameters_that_an_optimizer_holds(self) -> None:
        mb = self.batch(build(mlp, 2))
        held = list(mb.parameters())
        mb.to("cpu").float()
        assert all(a is b for a, b in zip(held, mb.parameters(), strict=True))

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda mb: pickle.loads(pickle.dumps(mb))])
    def test_a_copy_is_whole_and_independent(self, duplicate: Any) -> None:
        mb = self.batch(build(normed, 3), chunk_size=2, seeds=[1, 2, 3])
        mb(features())
        mb.eval()
        twin = duplicate(mb)
        assert not twin.training
        assert_equal(state_of(twin), state_of(mb))
        assert_equal(twin(features()), mb(features()))
        twin.train()
        assert not mb.training
        before = state_of(mb)
        train(twin, sgd_for(twin))
        assert_equal(state_of(mb), before)
        assert_different(state_of(twin)["parameters"], before["parameters"])

    def test_a_copied_batch_trains_with_its_copied_optimizer(self) -> None:
        mb = self.batch(build(mlp, 3))
        optimizer = sgd_for(mb)
        train(mb, optimizer)
        twin, twin_optimizer = copy.deepcopy((mb, optimizer))
        train(mb, optimizer)
        train(twin, twin_optimizer)
        assert_equal(state_of(twin), state_of(mb))

    def test_torch_save_keeps_a_whole_batch(self, tmp_path: Path) -> None:
        mb = self.batch(build(normed, 3))
        torch.save(mb, tmp_path / "batch.pt")
        assert_equal(torch.load(tmp_path / "batch.pt", weights_only=False)(features()), mb(features()))

    @makes
    def test_state_dict_round_trip(self, make: Any) -> None:
        mb, other = self.batch(build(make, 3)), self.batch(build(make, 3, seed=2))
        buffer = io.BytesIO()
        torch.save(mb.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert_equal(other.get_model_states(), mb.get_model_states())

    def test_state_dict_holds_the_streams(self) -> None:
        mb = self.batch(build(dropping, 2), seeds=[5, 6])
        mb(features())
        other = self.batch(build(dropping, 2, seed=2), seeds=[1, 2])
        other.load_state_dict(mb.state_dict())
        assert_equal(other(features()), mb(features()))

    def test_state_dict_refuses_what_does_not_fit(self) -> None:
        mb = self.batch(build(mlp, 2))
        state = mb.state_dict()
        key = next(iter(state))
        with pytest.raises(RuntimeError, match="Unexpected key"):
            mb.load_state_dict({**state, "unknown": torch.zeros(1)})
        with pytest.raises(RuntimeError, match="Missing key"):
            mb.load_state_dict({name: value for name, value in state.items() if name != key})
        with pytest.raises(RuntimeError, match="size mismatch"):
            self.batch(build(mlp, 3)).load_state_dict(state)

    @makes
    def test_each_parameter_is_listed_once(self, make: Any) -> None:
        model = make()
        mb = self.batch([model] * 3)
        listed = list(mb.parameters())
        assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
        assert [tuple(p.shape) for p in listed] == [(3, *p.shape) for p in model.parameters()]
        assert list(mb.stacked_params) == [name for name, _ in model.named_parameters()]
        assert list(mb.stacked_buffers) == [name for name, _ in model.named_buffers()]
        assert all(a is b for a, b in zip(listed, mb.stacked_params.values(), strict=True))
        assert sum(p.numel() for p in listed) == 3 * sum(p.numel() for p in model.parameters())

    @makes
    def test_one_model_comes_out_as_a_plain_module(self, make: Any) -> None:
        models = build(make, 3)
        mb = self.batch(models)
        for index in (0, 2, -1):
            model = mb.model(index)
            assert type(model) is type(models[index])
            assert_equal(dict(model.state_dict()), dict(models[index].state_dict()))
            assert_equal(model(features()), copy.deepcopy(models[index])(features()))
            assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in models[0].parameters()]
        before = state_of(mb)
        train_alone([mb.model(1)], batches(1), lambda m, batch: m(batch[0]).square().mean(), plain_sgd)
        assert_equal(state_of(mb), before)
        mb.eval()
        assert not mb.model(0).training

    @makes
    @pytest.mark.parametrize("given", [[2, 0], torch.tensor([2, 0]), (-1, 0)])
    def test_select_copies_models_in_order(self, make: Any, given: Any) -> None:
        mb = self.batch(build(make, 3))
        chosen = mb.select(given)
        assert chosen.num_models == 2
        assert chosen.backend.name == self.backend
        assert_equal(chosen.get_model_states(), [mb.get_model_states()[2], mb.get_model_states()[0]])
        assert_equal(model_state(chosen, 0), model_state(mb, 2))
        assert_close(chosen(features()), mb(features())[[2, 0]])
        before = state_of(mb)
        chosen(features()).square().sum().backward()
        sgd_for(chosen).step()
        assert_equal(state_of(mb), before)
        assert all(p.grad is None for p in mb.parameters())

    def test_select_by_mask_repeats_and_keeps_options(self) -> None:
        mb = self.batch(build(mlp, 3), False, chunk_size=2).eval()
        masked = mb.select(torch.tensor([False, True, True]))
        assert_equal(masked.get_model_states(), mb.get_model_states()[1:])
        assert not masked.shared_input
        assert not masked.training
        assert_equal(mb.select([1, 1]).get_model_states(), [mb.get_model_states()[1]] * 2)

    def test_copy_model(self) -> None:
        models = build(normed, 3)
        mb = self.batch(models)
        optimizer = sgd_for(mb)
        train(mb, optimizer)
        before = [model_state(mb, index) for index in range(3)]
        momentum = copy.deepcopy(optimizer.state_dict())
        mb.copy_model(2, 0)
        assert_equal([model_state(mb, index) for index in range(3)], [before[2], before[1], before[2]])
        assert_equal(optimizer.state_dict(), momentum)
        assert_equal(mb(features())[0], mb(features())[2])

    def test_from_factory_builds_each_model_from_its_seed(self) -> None:
        torch.manual_seed(3)
        state = torch.get_rng_state()
        mb = ModelBatch.from_factory(normed, seeds=[7, 8, 7], backend=self.backend)
        assert_equal(torch.get_rng_state(), state)
        expected = []
        for seed in (7, 8, 7):
            torch.manual_seed(seed)
            expected.append(dict(normed().state_dict()))
        assert_equal([dict(state) for state in mb.get_model_states()], expected)

    def test_from_factory_gives_the_seeds_to_the_streams(self) -> None:
        mb = ModelBatch.from_factory(dropping, [7, 8, 7], False, backend=self.backend, chunk_size=2)
        outputs = mb(features().expand(3, 6, 4))
        assert_equal(outputs[0], outputs[2])
        assert_different(outputs[0], outputs[1])

    @pytest.mark.parametrize("bound", [0.05, [0.01, 0.5, 1e9]])
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
    def test_clipping_is_that_of_each_model_alone(self, bound: Any, norm_type: float) -> None:
        models = build(mlp, 3)
        mb = self.batch(models)
        losses = mb.compute_loss(mb(features()), labels(), F.cross_entropy, "none")
        (losses * torch.tensor([1.0, 30.0, 0.1])).sum().backward()
        norms = mb.clip_grad_norm_(torch.tensor(bound) if isinstance(bound, list) else bound, norm_type)
        expected = []
        for index, (model, factor) in enumerate(zip(models, (1.0, 30.0, 0.1), strict=True)):
            (factor * classify(model, (features(), labels()))).backward()
            own = bound[index] if isinstance(bound, list) else bound
            expected.append(nn.utils.clip_grad_norm_(model.parameters(), own, norm_type))
        assert_close(norms, torch.stack(expected))
        assert_close(gradients(mb), plain_gradients(models))

    def test_clipping_keeps_a_bad_model_to_itself(self) -> None:
        mb = self.batch([nn.Linear(1, 2) for _ in range(4)])
        weight = torch.tensor([[3.0, 4.0], [NAN, 1.0], [INF, 1.0], [0.3, 0.4]]).unsqueeze(-1)
        mb.stacked_params["weight"].grad = weight.clone()
        mb.stacked_params["bias"].grad = torch.zeros(4, 2)
        norms = mb.clip_grad_norm_(1.0)
        assert_close(norms[[0, 3]], torch.tensor([5.0, 0.5]))
        assert not norms[[1, 2]].isfinite().any()
        assert_close(mb.stacked_params["weight"].grad[0, :, 0], torch.tensor([0.6, 0.8]))
        assert_equal(mb.stacked_params["weight"].grad[3], weight[3])

    def test_clipping_may_refuse_what_is_not_finite(self) -> None:
        mb = self.batch([nn.Linear(1, 2, bias=False) for _ in range(3)])
        grad = torch.tensor([[3.0, 4.0], [NAN, 1.0], [1.0, INF]]).unsqueeze(-1)
        mb.stacked_params["weight"].grad = grad.clone()
        with pytest.raises(InvalidInput, match=r"\[1, 2\] is not finite"):
            mb.clip_grad_norm_(1.0, error_if_nonfinite=True)
        assert_equal(mb.stacked_params["weight"].grad, grad)

    def test_clipping_without_gradients(self) -> None:
        assert_equal(self.batch(build(mlp, 2)).clip_grad_norm_(1.0), torch.zeros(2))
