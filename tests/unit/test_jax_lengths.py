"""Batches of sequences on the XLA backend: a program for each set of lengths, the loop's results for all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mb_torch import ModelBatch, OptimizerFactory, Unsupported, make_joint_step
from tests.compare import assert_close, assert_equal
from tests.contract.base import state_of
from tests.parity.loop import as_tree, batch_ended, sgd_config, train_alone

pytest.importorskip("jax")

EXACT = {"atol": 1e-9, "rtol": 1e-9}
UNCHECKED = {"verify": False}
SETS = [(4, 2, 3), (5, 5, 1), (4, 2, 3), (1, 2, 3), (5, 5, 1), (4, 2, 3)]
# Compiling a program takes seconds.
TWO_SETS = [(4, 2, 3), (5, 5, 1), (4, 2, 3)]


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tagger(nn.Module):
    """Token numbers, which are only looked up, and lengths, whose values decide shapes."""

    def __init__(self, layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.rnn = nn.LSTM(3, 2, layers, dropout=dropout, bidirectional=True, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, lengths = batch
        packed = pack_padded_sequence(self.embed(tokens), lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(outputs.sum(1) / lengths[:, None])


def build(count: int = 3, **options: Any) -> list[nn.Module]:
    models: list[nn.Module] = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(Tagger(**options))
    return models


def data(sets: Sequence[tuple[int, ...]] = SETS) -> list[Any]:
    """One batch for each set of lengths; tokens and targets differ from batch to batch."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            (torch.randint(0, 7, (3, 5), generator=generator), tensor(lengths)),
            torch.randint(0, 2, (3,), generator=generator),
        )
        for lengths in sets
    ]


def optimizer_for(mb: ModelBatch) -> Any:
    configs = [sgd_config(index) for index in range(mb.num_models)]
    return OptimizerFactory(torch.optim.SGD).create_optimizer(mb, configs)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def in_loop(batches: Sequence[Any]) -> dict[str, Any]:
    return as_tree(train_alone(build(), batches, loss_of))


def programs(mb: ModelBatch) -> int:
    """How many programs have been translated for steps."""
    return sum(len(step["translations"]) for step in mb.backend_report()["steps"])


class TestSteps:
    @pytest.mark.long
    def test_each_set_of_lengths_has_its_program(self) -> None:
        mb = ModelBatch(build(), backend="jax", chunk_size=2)
        optimizer = optimizer_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        losses, counts = [], []
        for batch in data():
            losses.append(step(*batch))
            counts.append((programs(mb), mb.backend_report()["compiles"]))
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), in_loop(data()), **EXACT)
        assert [count for count, _ in counts] == [1, 2, 2, 3, 3, 3]
        # Batches of equal models share what is compiled, so that there may be less to compile.
        compiles = [compiled for _, compiled in counts]
        assert (compiles[2], compiles[4:]) == (compiles[1], [compiles[3]] * 2)
        assert all(0 < one["largest_difference"] < 1e-12 for one in step._step.report()["translations"])

    def test_lengths_may_change_in_place(self) -> None:
        mb = ModelBatch(build(), backend="jax", backend_options=UNCHECKED)
        optimizer = optimizer_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        lengths = torch.zeros(3, dtype=torch.int64)
        losses = []
        for (tokens, own), targets in data(TWO_SETS):
            lengths.copy_(own)
            losses.append(step((tokens, lengths), targets))
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), in_loop(data(TWO_SETS)), **EXACT)

    @pytest.mark.parametrize("sets", [TWO_SETS, [SETS[0]] * 3])
    def test_several_batches_are_one_program_only_if_the_lengths_are_equal(self, sets: Any) -> None:
        mb = ModelBatch(build(), backend="jax", backend_options=UNCHECKED)
        optimizer = optimizer_for(mb)
        step = mb.make_train_step(F.cross_entropy, optimizer)
        batches = data(sets)
        losses = [*step.run(batches), *step.run(batches)]
        expected = in_loop([*batches, *batches])
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), expected, **EXACT)
        assert programs(mb) == len(set(sets))

    @pytest.mark.long
    @pytest.mark.parametrize(("steps", "accumulate"), [(3, 2), (1, 1), (1, 2), (3, 1)])
    def test_rows_of_a_data_set(self, steps: int, accumulate: int) -> None:
        tokens, targets = torch.randint(0, 7, (8, 5)), torch.randint(0, 2, (8,))
        lengths = tensor([4, 2, 3, 1, 5, 5, 2, 4])
        results = []
        for by_rows in (True, False):
            mb = ModelBatch(build(), backend="jax", backend_options=UNCHECKED)
            optimizer = optimizer_for(mb)
            step = mb.make_train_step(F.cross_entropy, optimizer, accumulate=accumulate)
            losses = []
            for seed in range(2):
                rows = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[: 2 * steps].view(steps, 2)
                if by_rows:
                    losses.append(step.run_rows((tokens, lengths), targets, rows).detach().clone())
                else:
                    own = [step((tokens[one], lengths[one]), targets[one]) for one in rows]
                    losses.append(torch.stack(own).detach())
            results.append((losses, state_of(mb), optimizer.state_dict()))
        assert_close(results[0], results[1], **EXACT)

    def test_rows_stay_one_program_where_they_do_not_decide(self) -> None:
        def loss(outputs: Tensor, targets: Tensor, columns: Tensor) -> Tensor:
            return F.mse_loss(outputs[:, : columns.max()], targets[:, : columns.max()])

        models = [nn.Linear(4, 3) for _ in range(2)]
        x, y, rows = torch.randn(6, 4), torch.randn(6, 3), tensor([[0, 1], [2, 3], [4, 5]])
        results = []
        for by_rows in (True, False):
            mb = ModelBatch(copy.deepcopy(models), backend="jax", backend_options=UNCHECKED)
            step = mb.make_train_step(loss, optimizer_for(mb), shared_args={"columns": tensor([1, 2])})
            losses = step.run_rows(x, y, rows) if by_rows else torch.stack([step(x[one], y[one]) for one in rows])
            assert programs(mb) == 1
            results.append((losses + 0, state_of(mb)))
        assert_close(results[0], results[1], **EXACT)

    def test_lengths_among_targets_and_arguments(self) -> None:
        def loss(outputs: Tensor, lengths: Tensor, limit: Tensor) -> Tensor:
            return (
                sum(row[:size].square().sum() for row, size in zip(outputs, lengths.tolist(), strict=True))
                * limit.item()
            )

        torch.manual_seed(0)
        models = [nn.Linear(4, 3) for _ in range(2)]
        mb = ModelBatch(copy.deepcopy(models), backend="jax")
        optimizer = optimizer_for(mb)
        limit = tensor(2)
        step = mb.make_train_step(loss, optimizer, shared_args={"limit": limit}, shared_targets=True)
        x, losses, seen = torch.randn(2, 4), [], []
        for sizes, value in (((1, 3), 2), ((2, 2), 2), ((1, 3), 2), ((1, 3), 5)):
            limit.fill_(value)
            losses.append(step(x, tensor(sizes)))
            seen.append((tensor(sizes), tensor(value)))
        expected = train_alone(models, seen, lambda model, given: loss(model(x), *given))
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), as_tree(expected), **EXACT)
        assert programs(mb) == 3

    def test_what_is_looked_at_may_depend_on_values(self) -> None:
        def loss(model: nn.Module, x: Tensor, given: tuple[Tensor, Tensor]) -> Tensor:
            first, second = given
            return model(x).square().sum() * (second.item() if first.item() > 1 else 1)

        torch.manual_seed(0)
        models = [nn.Linear(4, 3) for _ in range(2)]
        mb = ModelBatch(copy.deepcopy(models), backend="jax")
        optimizer = optimizer_for(mb)
        step = make_joint_step([mb], loss, [optimizer], shared_targets=True)
        x, losses = torch.randn(2, 4), []
        pairs = [(tensor(one), tensor(two)) for one, two in ((1, 5), (1, 6), (2, 5), (2, 6), (1, 6), (2, 5))]
        losses = [step(x, pair) for pair in pairs]
        expected = train_alone(models, pairs, lambda model, pair: loss(model, x, pair))
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), as_tree(expected), **EXACT)

    def test_copies_of_a_step_make_their_own_programs(self) -> None:
        mb = ModelBatch(build(), backend="jax")
        step = mb.make_train_step(F.cross_entropy, optimizer_for(mb))
        batches = data()
        step(*batches[0])
        again = copy.deepcopy(step)
        assert_close(again(*batches[1]) + 0, step(*batches[1]) + 0, **EXACT)

    @pytest.mark.long
    def test_a_model_that_draws(self) -> None:
        mb = ModelBatch(build(layers=2, dropout=0.5), backend="jax")
        step = mb.make_train_step(
            F.cross_entropy, OptimizerFactory(torch.optim.SGD, {"lr": 0.0}).create_optimizer(mb, [{}] * 3)
        )
        batch = data()[0]
        assert (step(*batch) + 0 != step(*batch) + 0).all()
        mb.eval()
        assert_equal(step(*batch) + 0, step(*batch) + 0)
        expected = torch.stack([loss_of(model.eval(), batch) for model in build(layers=2, dropout=0.5)])
        assert_close(step(*batch) + 0, expected.detach(), **EXACT)


class TestEager:
    def test_each_set_of_lengths_has_its_program(self) -> None:
        mb = ModelBatch(build(), backend="jax")
        optimizer = optimizer_for(mb)
        losses, counts = [], []
        for inputs, targets in data(TWO_SETS):
            loss = mb.compute_loss(mb(inputs), targets, F.cross_entropy, "none")
            losses.append(loss.detach())
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            counts.append(len(mb.backend_report()["translations"]))
        assert_close(as_tree(batch_ended(mb, optimizer, losses)), in_loop(data(TWO_SETS)), **EXACT)
        assert counts == [1, 2, 2]

    def test_packed_sequences_come_out_as_they_went_in(self) -> None:
        packed = pack_padded_sequence(torch.randn(3, 5, 3), tensor([2, 5, 4]), batch_first=True, enforce_sorted=False)
        models = [nn.GRU(3, 2) for _ in range(2)]
        results = {}
        for backend in ("torch", "jax"):
            results[backend] = ModelBatch(copy.deepcopy(models), backend=backend)(packed)
        (ours, last), (theirs, other) = results["jax"], results["torch"]
        assert type(ours) is type(theirs)
        assert_close([ours.data.detach(), last.detach()], [theirs.data.detach(), other.detach()], **EXACT)

    @pytest.mark.parametrize("per_model", [True, False])
    def test_lengths_of_each_model_are_refused(self, per_model: bool) -> None:
        mb = ModelBatch(build(), shared_input=not per_model, backend="jax")
        (tokens, lengths), _ = data()[0]
        if not per_model:
            assert mb((tokens, lengths)).shape == (3, 3, 2)
            return
        given = tokens.expand(3, -1, -1).contiguous(), lengths.expand(3, -1).contiguous()
        with pytest.raises(Unsupported, match=r"(?s)the model \(Tagger\): .*every model has its own of\n.*\nShare"):
            mb(given)

    def test_a_wrong_lowering_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from bridge.ops import packed

        plain = packed.record_recurrent

        def shifted(cell: str, arguments: Any) -> Any:
            output, *last = plain(cell, arguments)
            return (output.roll(1, 0), *last)

        monkeypatch.setattr("bridge.ops.whole.record_recurrent", shifted)
        mb = ModelBatch(build(), backend="jax", backend_options={"translator": "graph"})
        with pytest.raises(Unsupported, match="differs from PyTorch"):
            mb(data([(3, 3, 2)])[0][0])
