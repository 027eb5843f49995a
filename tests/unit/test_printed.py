"""What `print` shows of batches and training steps: one line that says what they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mb_torch import GradScaler, ModelBatch, OptimizerFactory, make_joint_step


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def batch(count: int = 3, **options: Any) -> ModelBatch:
    return ModelBatch([mlp() for _ in range(count)], **options)


def optimizer_for(mb: ModelBatch, optimizer_cls: type[torch.optim.Optimizer] = torch.optim.Adam) -> Any:
    return OptimizerFactory(optimizer_cls).create_optimizer(mb, [{"lr": 0.1}] * mb.num_models)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_batch(backend: str) -> None:
    if backend == "jax":
        pytest.importorskip("jax")
    given = f"3 x Sequential, 83 parameters each, dtype=float32, backend='{backend}', device=cpu, shared_input"
    assert repr(batch(backend=backend)) == f"ModelBatch({given}=True, chunk_size=None, has_seeds=False)"
    other = batch(backend=backend, seeds=[1, 2, 3], chunk_size=2, shared_input=False)
    assert str(other) == f"ModelBatch({given}=False, chunk_size=2, has_seeds=True)"
    # As part of another module as well.
    assert f"(0): {other}\n" in str(nn.Sequential(other))


def test_batches_of_several_dtypes_and_of_nothing() -> None:
    both = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float64)])
    assert "12 parameters each, dtype=float32, float64" in str(ModelBatch([both, both]))
    assert "0 parameters each, dtype=None, backend='torch', device=None" in str(ModelBatch([nn.ReLU()]))


def test_a_step() -> None:
    mb = batch()
    optimizer = optimizer_for(mb)
    begin = "TrainStep(loss=cross_entropy, models=3 x Sequential, optimizer=Adam, backend='torch'"
    assert repr(mb.make_train_step(F.cross_entropy, optimizer)) == f"{begin})"
    smoothed = partial(partial(F.cross_entropy), label_smoothing=0.1)
    step = mb.make_train_step(
        smoothed,
        optimizer,
        loss_args={"weight": torch.ones(3, 3)},
        shared_args={"reduction": "mean"},
        clip_norm=0.5,
        accumulate=4,
        active=torch.tensor([True, False, True]),
        scaler=GradScaler(3),
        aux=True,
        shared_targets=False,
    )
    assert repr(step) == (
        f"{begin}, loss_args=['weight'], shared_args=['reduction'], clip_norm=0.5, accumulate=4, active=2 of 3, "
        "scaler=GradScaler, aux=True, shared_targets=False)"
    )
    step.active = None
    assert "active" not in repr(step)


def test_optimizers_and_losses_have_the_names_of_their_classes() -> None:
    mb = batch()
    for optimizer in (optimizer_for(mb, torch.optim.Rprop), torch.optim.Rprop(mb.parameters())):
        step = mb.make_train_step(nn.CrossEntropyLoss(), optimizer, clip_norm=torch.ones(3))
        assert "loss=CrossEntropyLoss, models=3 x Sequential, optimizer=Rprop" in repr(step)
        assert "clip_norm=one per model" in repr(step)


def test_classes_that_share_a_rule_keep_their_names() -> None:
    for backend in ("torch", "jax"):
        if backend == "jax":
            pytest.importorskip("jax")
        mb = batch(backend=backend)
        assert "optimizer=AdamW" in repr(mb.make_train_step(F.cross_entropy, optimizer_for(mb, torch.optim.AdamW)))


def test_a_joint_step() -> None:
    one, other = batch(), ModelBatch([nn.Linear(4, 3) for _ in range(3)])

    def both(model: nn.Module, second: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs) + second(inputs), targets)

    step = make_joint_step([one, other], both, [optimizer_for(one), None])
    assert "loss=both, models=[3 x Sequential, 3 x Linear], optimizer=[Adam, None], backend" in repr(step)
