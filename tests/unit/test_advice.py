"""Advice on how to train: what was tried, what follows from the times, and that the batch stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mb_torch import Advice, InvalidInput, ModelBatch, Trial, Unsupported, advice
from tests.compare import assert_equal

X, Y = torch.ones(4, 3), torch.zeros(4, 2)
QUICK = 1e-6


def batch(num_models: int = 3, **options: object) -> ModelBatch:
    models = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)) for _ in range(num_models)]
    return ModelBatch(models, **options)  # type: ignore[arg-type]


def named(*trials: Trial) -> Advice:
    return Advice(8, tuple(trials))


def test_every_way_is_tried_and_the_fastest_comes_first() -> None:
    found = batch(32).advise(X, Y, nn.functional.mse_loss, backends=["torch"], seconds=QUICK)
    assert sorted(map(str, found.trials)) == [
        "backend='torch'",
        "backend='torch', chunk_size=2",
        "backend='torch', chunk_size=8",
        "one by one, plain PyTorch",
    ]
    times = [trial.seconds for trial in found.trials]
    assert times == sorted(times, key=float)  # type: ignore[arg-type]


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("own_targets", [True, False])
def test_inputs_and_targets_may_be_shared_or_not(shared_input: bool, own_targets: bool) -> None:
    inputs = X if shared_input else X.expand(3, 4, 3)
    targets = Y.expand(3, 4, 2) if own_targets else Y
    found = batch(shared_input=shared_input).advise(
        inputs, targets, nn.functional.mse_loss, backends=["torch"], seconds=QUICK
    )
    assert [trial.failure for trial in found.trials] == [None, None]


def test_the_batch_and_the_generator_stay_as_they_are() -> None:
    mb = batch(seeds=[1, 2, 3])
    before = {name: value.clone() for name, value in mb.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    mb.advise(X, Y, nn.functional.mse_loss, backends=["torch"], seconds=QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert_equal(dict(mb.state_dict()), before)
    assert all(parameter.grad is None for parameter in mb.parameters())


def test_both_backends() -> None:
    pytest.importorskip("jax")
    found = batch().advise(X, Y, nn.functional.mse_loss, seconds=QUICK)
    assert {trial.backend for trial in found.trials} == {None, "torch", "jax"}
    # What XLA has compiled cannot be compiled once more.
    assert [left_out.split(",")[0] for left_out in found.not_tried] == ["enable_compile() on backend='torch'"]
    assert all(trial.seconds for trial in found.trials)


def test_the_way_to_take_must_be_worth_it() -> None:
    loop = Trial(None, seconds=1.0, first_seconds=1.0)
    faster = named(Trial("torch", 4, seconds=0.5, first_seconds=2.0), loop)
    assert (faster.batch, faster.speedup, faster.options) == (True, 2.0, {"backend": "torch", "chunk_size": 4})
    assert "ModelBatch(models, backend='torch', chunk_size=4); 2.0 times as fast" in str(faster)
    assert "the first step took 2.0 s" in str(faster)
    hardly = named(Trial("torch", seconds=0.96, first_seconds=1.0), loop)
    assert (hardly.batch, hardly.speedup, hardly.options) == (False, 1.0, {})
    assert "do not batch" in str(hardly)
    compiled = named(Trial("torch", compiled=True, seconds=0.5, first_seconds=1.0), loop)
    assert "enable_compile()" in str(compiled)


def test_what_a_backend_cannot_do_is_part_of_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Unsupported("not here")

    monkeypatch.setattr(advice._Trainer, "_copy", refuse)
    found = batch().advise(X, Y, nn.functional.mse_loss, backends=["torch"], seconds=QUICK)
    assert not found.batch
    assert "backend='torch': not here" in str(found)


def test_a_loop_of_many_models_is_measured_on_some(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 2.0])
    monkeypatch.setattr(advice._Trainer, "_time", lambda self, step: (next(times), next(times)))
    trainer = advice._Trainer(batch(32), X, Y, nn.functional.mse_loss, torch.optim.SGD, 1.0, True)
    loop = trainer.loop()
    assert (loop.seconds, loop.first_seconds) == (4.0, 6.0)


def test_what_was_not_tried_is_said_where_it_could_help() -> None:
    found = batch().advise(X, Y, nn.functional.mse_loss, backends=["torch"], seconds=QUICK)
    (left_out,) = found.not_tried
    assert "enable_compile() on backend='torch', because" in left_out
    assert "mb.advise(..., compiled=True) tries it." in left_out
    assert str(found).endswith(f"Not tried: {left_out}")


def test_compiling_is_not_advised_where_models_run_one_by_one() -> None:
    def looks(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, targets) * (1 + 0 * outputs.max().item())

    with pytest.warns(UserWarning, match="cannot be batched"):
        found = batch().advise(X, Y, looks, backends=["torch"], seconds=QUICK)
    assert found.not_tried == ()
    assert "Not tried" not in str(found)


def test_compiling_is_tried_where_it_does_something(monkeypatch: pytest.MonkeyPatch) -> None:
    enable = ModelBatch.enable_compile
    monkeypatch.setattr(ModelBatch, "enable_compile", lambda self: enable(self, backend="eager"))
    found = batch(2).advise(X, Y, nn.functional.mse_loss, backends=["torch"], compiled=True, seconds=QUICK)
    assert [trial.backend for trial in found.trials if trial.compiled] == ["torch"]
    assert found.not_tried == ()


def test_errors_of_the_model_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        batch().advise(torch.ones(4, 7), Y, nn.functional.mse_loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backends": ["tpu"]}, r"backends: received \['tpu'\]"),
        ({"seconds": 0}, "seconds: received 0"),
        ({"seconds": float("nan")}, "seconds: received nan"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        batch().advise(X, Y, nn.functional.mse_loss, **arguments)  # type: ignore[arg-type]
