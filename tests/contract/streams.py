"""Random numbers: with seeds a model's own, whoever its companions are; without, torch's, but one draw for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import ModelBatch, Unsupported
from tests.compare import assert_close, assert_different, assert_equal
from tests.contract.base import ContractBase, build, dropping, features, labels, mlp, sgd_for, state_of

SEEDS = [3, 14, 15, 92, 65]


class Masks(nn.Module):
    """Shows its draws: dropout on ones."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.ones_like(x)) * self.weight


class Permutes(nn.Module):
    """Draws by a function that has no per-model form."""

    def forward(self, x: Tensor) -> Tensor:
        return x[torch.randperm(len(x))]


def masks(mb: ModelBatch, steps: int = 3) -> list[Tensor]:
    return [mb(features()).detach() for _ in range(steps)]


class StreamsContract(ContractBase):
    def masked(self, seeds: list[int] | None, count: int = 5, **options: Any) -> ModelBatch:
        return self.batch([Masks() for _ in range(count if seeds is None else len(seeds))], seeds=seeds, **options)

    @pytest.mark.parametrize("seeds", [SEEDS, None])
    def test_draws_differ_between_models_and_steps(self, seeds: list[int] | None) -> None:
        first, second, third = masks(self.masked(seeds))
        for index in range(5):
            assert_different(first[index], second[index])
            assert_different(second[index], third[index])
            for other in range(index):
                assert_different(first[index], first[other])
            assert set(first[index].unique().tolist()) == {0.0, 2.0}

    def test_without_seeds_draws_repeat_under_manual_seed(self) -> None:
        mb = self.masked(None)
        torch.manual_seed(5)
        first = masks(mb)
        torch.manual_seed(5)
        assert_equal(masks(mb), first)
        torch.manual_seed(6)
        assert_different(masks(mb), first)

    def test_with_seeds_draws_do_not_depend_on_the_global_generator(self) -> None:
        torch.manual_seed(5)
        first = masks(self.masked(SEEDS))
        torch.manual_seed(6)
        state = torch.get_rng_state()
        assert_equal(masks(self.masked(SEEDS)), first)
        assert_equal(torch.get_rng_state(), state)

    def test_equal_seeds_draw_equally(self) -> None:
        for step in masks(self.masked([7, 8, 7])):
            assert_equal(step[0], step[2])
            assert_different(step[0], step[1])

    @pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"chunk_size": 3}])
    @pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1, 3], [2]])
    def test_draws_do_not_depend_on_companions(self, order: list[int], options: dict[str, int]) -> None:
        together = masks(self.masked(SEEDS))
        apart = masks(self.masked([SEEDS[index] for index in order], **options))
        assert_equal(apart, [step[order] for step in together])

    def test_draws_do_not_depend_on_whether_inputs_are_shared(self) -> None:
        shared, own = self.masked(SEEDS), self.masked(SEEDS, shared_input=False)
        for _ in range(3):
            assert_equal(own(features().expand(5, 6, 4)), shared(features()))

    def test_a_selection_continues_its_streams(self) -> None:
        mb = self.masked(SEEDS)
        masks(mb, 2)
        chosen = mb.select([3, 1])
        assert_equal(masks(chosen), [step[[3, 1]] for step in masks(mb)])

    def test_a_selected_model_and_the_batch_are_independent(self) -> None:
        mb = self.masked(SEEDS)
        chosen = mb.select([0])
        first = masks(chosen, 1)[0]
        assert_equal(masks(mb, 1)[0][:1], first)

    def test_a_pass_that_draws_nothing_does_not_count(self) -> None:
        mb, reference = self.masked(SEEDS), self.masked(SEEDS)
        expected = masks(reference, 2)
        first = masks(mb, 1)
        mb.eval()
        assert_equal(mb(features()), torch.ones(5, 6, 4))
        mb.train()
        assert_equal([*first, *masks(mb, 1)], expected)

    @pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63, -(2**63), 2**200])
    def test_any_integer_is_a_seed(self, seed: int) -> None:
        mb = self.masked([seed, seed + 1])
        step = masks(mb, 1)[0]
        assert_different(step[0], step[1])
        assert_equal(masks(self.masked([seed]), 1)[0][0], step[0])

    def test_what_has_no_stream_is_refused(self) -> None:
        mb = self.batch([nn.Sequential(nn.Linear(4, 4), Permutes()) for _ in range(2)], seeds=[1, 2])
        before = state_of(mb)
        with pytest.raises(Unsupported, match="randperm"):
            mb(features())
        assert_equal(state_of(mb), before)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("order", [[4, 2, 0, 1, 3], [1, 3], [2]])
    def test_training_does_not_depend_on_companions(self, order: list[int], fused: bool) -> None:
        models = build(dropping, 5)
        rates = [0.1, 0.05, 0.02, 0.01, 0.2]
        together = self.batch(models, seeds=SEEDS)
        train(together, rates, fused)
        apart = self.batch([models[index] for index in order], seeds=[SEEDS[index] for index in order])
        train(apart, [rates[index] for index in order], fused)
        states = together.get_model_states()
        assert_close(apart.get_model_states(), [states[index] for index in order])

    @pytest.mark.parametrize("options", [{"chunk_size": 2}, {}])
    def test_the_fused_step_draws_what_the_eager_one_draws(self, options: dict[str, int]) -> None:
        models, results = build(dropping, 5), []
        for fused, own in ((False, {}), (True, options)):
            mb = self.batch(models, seeds=SEEDS, **own)
            train(mb, [0.1] * 5, fused)
            results.append(mb.get_model_states())
        assert_close(results[1], results[0])

    def test_without_seeds_training_repeats_under_manual_seed(self) -> None:
        models, results = build(dropping, 3), []
        for _ in range(2):
            torch.manual_seed(8)
            mb = self.batch(models)
            train(mb, [0.1] * 3, fused=True)
            results.append(mb.get_model_states())
        assert_equal(results[1], results[0])

    def test_copying_a_model_leaves_each_its_stream(self) -> None:
        mb, reference = self.masked(SEEDS), self.masked(SEEDS)
        mb.copy_model(0, 1)
        assert_equal(masks(mb), masks(reference))

    def test_models_that_draw_nothing_may_have_seeds(self) -> None:
        models = build(mlp, 2)
        assert_close(self.batch(models, seeds=[1, 2])(features()), torch.stack([model(features()) for model in models]))


def train(mb: ModelBatch, rates: list[float], fused: bool, steps: int = 3) -> None:
    optimizer = sgd_for(mb, rates)
    if fused:
        step = mb.make_train_step(F.cross_entropy, optimizer)
        for index in range(steps):
            step(features(index), labels(index))
        return
    for index in range(steps):
        optimizer.zero_grad()
        mb.compute_loss(mb(features(index)), labels(index), F.cross_entropy, "sum").backward()
        optimizer.step()
