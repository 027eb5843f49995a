"""What is not done with every batch, and that the short ways there are lead to the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mb_torch import ModelBatch, OptimizerFactory
from tests.training_runs import run
from trainers import loop, states, training
from trainers.errors import TrainerError
from trainers.generic import GenericTrainer
from trainers.loaders import remembered
from trainers.per_model import PerModel
from trainers.reporting.early_stopping import EarlyStopping
from trainers.reporting.metrics import MetricSums
from trainers.settings import GenericTrainerConfig
from trainers.training import as_pair


def make_objects(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    if kind == "single":
        model = nn.Linear(2, 1)
        return model, torch.optim.Adam(model.parameters())
    batch = ModelBatch([nn.Linear(2, 1) for _ in range(2)])
    return batch, OptimizerFactory(torch.optim.Adam).create_optimizer(batch, [{}] * 2)


@pytest.mark.parametrize("kind", ["single", "batch"])
def test_nothing_is_captured_with_every_batch(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often for twenty batches as for two."""
    calls: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, counted)

    from torchdata.stateful_dataloader import StatefulDataLoader

    captures = [
        (torch, "get_rng_state"),
        (states, "capture_rng_state"),
        (loop, "capture_rng_state"),
        (remembered, "states_of"),
        (StatefulDataLoader, "state_dict"),
        (MetricSums, "means"),
        (MetricSums, "state_dict"),
        (loop.TrainingLoop, "resume_state"),
        (GenericTrainer, "save_checkpoint"),
    ]
    for owner, name in captures:
        count(owner, name)
    found = []
    for batches in (2, 20):
        model, optimizer = make_objects(kind)
        for owned in (model, optimizer):
            count(owned, "state_dict")
        calls.clear()
        loader = DataLoader(TensorDataset(torch.ones(batches, 2), torch.zeros(batches, 1)), shuffle=True)
        config = GenericTrainerConfig(checkpoint_dir=str(tmp_path / str(batches)), max_epochs=2)
        GenericTrainer(config, loss_fn=nn.functional.mse_loss).fit(model, optimizer, loader, loader)
        found.append(dict(calls))
    assert found[0] == found[1]
    # Two epochs of training and validation, and a save at the end of each.
    assert found[0]["save_checkpoint"] == 2
    assert found[0]["capture_rng_state"] == 6


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize(("size", "is_finite"), [(3e38, True), (float("inf"), False), (float("nan"), False)])
def test_losses_are_looked_at_one_by_one_where_their_sum_is_not_finite(
    kind: str, size: float, is_finite: bool, tmp_path: Path
) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0 * outputs.sum() + targets.mean()

    model, optimizer = make_objects(kind)
    trainer = GenericTrainer(GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1), loss_fn=loss_fn)
    batches = [(torch.ones(1, 2), torch.full((1, 1), size))]
    if is_finite:
        trainer.fit(model, optimizer, batches)
        assert trainer.logs["loss"] == pytest.approx(size)
    else:
        with pytest.raises(TrainerError, match="expected finite numbers"):
            trainer.fit(model, optimizer, batches)


def test_finite_losses_of_several_models_whose_sum_overflows_are_trained_on(tmp_path: Path) -> None:
    class Own(GenericTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"loss": 0 * self.model(batch).sum((1, 2)) + 3e38}

    trainer = Own(GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1))
    trainer.fit(*make_objects("batch"), [torch.ones(1, 2)])
    assert trainer.model_metrics["loss"] == pytest.approx([3e38, 3e38])


@pytest.mark.parametrize(
    ("sizes", "named"), [([float("inf"), 1.0], "{0: inf}"), ([float("inf"), -float("inf")], "{0: inf, 1: -inf}")]
)
def test_only_models_whose_losses_are_not_finite_are_named(sizes: list[float], named: str, tmp_path: Path) -> None:
    def loss_fn(outputs: Tensor, targets: Tensor, size: Tensor) -> Tensor:
        return 0 * outputs.sum() + size

    config = GenericTrainerConfig(checkpoint_dir=str(tmp_path), max_epochs=1)
    trainer = GenericTrainer(config, loss_fn=loss_fn, per_model=PerModel(loss_args={"size": torch.tensor(sizes)}))
    with pytest.raises(TrainerError, match=f"the loss of models: received {named}"):
        trainer.fit(*make_objects("batch"), [(torch.ones(1, 2), torch.zeros(1, 1))])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.ones(1), torch.zeros(1)), (torch.ones(1), torch.zeros(1))),
        ([torch.ones(1), "name"], (torch.ones(1), "name")),
        (({"a": torch.ones(1)}, [torch.zeros(1), 2]), ({"a": torch.ones(1)}, [torch.zeros(1), 2])),
    ],
)
def test_pairs_of_any_structure(batch: Any, expected: Any) -> None:
    assert as_pair(batch, torch.device("cpu")) == expected
    moved = torch.utils._pytree.tree_leaves(as_pair(batch, torch.device("meta")))
    assert {leaf.device.type for leaf in moved if isinstance(leaf, Tensor)} == {"meta"}


def test_the_models_that_train_are_always_those_that_were_not_stopped() -> None:
    early = EarlyStopping([1, 1, None], "min")
    assert early.active() is None
    early.update([1.0, 1.0, 1.0])
    early.update([0.5, 2.0, 2.0])
    for _ in range(2):
        assert early.active().tolist() == [True, False, True]
    early.stopped[2] = "diverged"
    assert early.active().tolist() == [True, False, False]
    early.load_state_dict({"best": [1.0] * 3, "waited": [1] * 3, "stopped": {0: "a", 1: "b"}})
    assert early.active().tolist() == [False, False, True]
    early.load_state_dict({"best": [1.0] * 3, "waited": [0] * 3, "stopped": {}})
    assert early.active() is None


def test_memory_that_a_step_frees_is_kept_for_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(training, "keep_freed_memory", lambda: calls.append("kept"))
    run(tmp_path, "single")
    assert calls == ["kept"]
