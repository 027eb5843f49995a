"""Tests that need 8 devices; run by `tests/unit/test_sharding.py` in a process that has them."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import jax
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from mb_jax.sharding import ONE_DEVICE, layout_for
from mb_jax.start import usable_cores
from mb_jax.step_program import StepProgram
from mb_torch import DataRouter, InvalidInput, ModelBatch, OptimizerFactory, make_joint_step
from tests.compare import assert_close, assert_different
from tests.sharded.workload import batches, build, sgd_for, train

_COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast")
# Sums in another order: each device multiplies the matrices of fewer models at a time.
BOUND = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What XLA made of the training programs that ran."""
    texts: list[str] = []
    training = StepProgram.training

    def spied(*args: Any, **kwargs: Any) -> Any:
        program: Any = training(*args, **kwargs)

        def run(*given: Any) -> Any:
            texts.append(program.lower(*given).compile().as_text())
            return program(*given)

        return run

    monkeypatch.setattr(StepProgram, "training", spied)
    return texts


def devices_of(mb: ModelBatch) -> set[int]:
    """On how many devices the parameters and buffers are that programs left behind."""
    return {len(mirror._array.sharding.device_set) for mirror in mb.backend.mirrors()}  # type: ignore[attr-defined]


def test_there_are_eight_devices() -> None:
    assert jax.device_count() == 8


@pytest.mark.parametrize(("num_models", "devices"), [(16, 8), (13, 7)])
def test_training_equals_one_device(num_models: int, devices: int) -> None:
    one, spread = build(num_models), build(num_models, devices="all")
    assert (one.backend_report()["devices"], spread.backend_report()["devices"]) == (1, devices)
    assert_close(train(spread), train(one), **BOUND)
    assert devices_of(spread) == {devices}


class Packed(nn.Module):
    """Its program depends on the lengths of the sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 2, bidirectional=True)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.rnn(pack_padded_sequence(*batch, batch_first=True))[1].transpose(0, 1).flatten(1)


def test_each_set_of_lengths_has_its_program_on_all_devices() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(3, 5, 3), torch.tensor([0, 1, 2])
    given = [((x, torch.tensor(lengths)), labels) for lengths in ([5, 2, 1], [4, 4, 2], [5, 2, 1])]
    results = []
    for options in ({}, {"devices": "all"}):
        mb = ModelBatch.from_factory(Packed, range(13), backend="jax", backend_options={"verify": False, **options})
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        losses = [*step.run(given), step(*given[1]), mb.compute_loss(mb(given[1][0]), labels, F.cross_entropy, "none")]
        results.append((torch.stack(losses).detach(), mb.get_model_states()))
        assert len(step._step.report()["translations"]) == 2
    assert_close(results[1], results[0], **BOUND)


def test_what_a_step_replaces_is_donated() -> None:
    mb = build(13, devices="all")
    optimizer = sgd_for(mb)
    step = mb.make_train_step(F.cross_entropy, optimizer)
    (batch,) = batches(1)
    step(*batch)
    before = [mirror._array for mirror in mb.backend.mirrors()]
    places = [shard.data.unsafe_buffer_pointer() for shard in before[0].addressable_shards]
    step(*batch)
    assert all(array.is_deleted() for array in before)
    after = next(iter(mb.backend.mirrors()))._array
    assert sorted(shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards) == sorted(places)


def test_devices_exchange_nothing(programs: list[str]) -> None:
    def images() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    x, y = torch.randn(2, 13, 5, 2, 4, 4), torch.randint(0, 3, (2, 5))
    results = []
    for options in ({}, {"devices": "all", "convolution": "native"}):
        mb = ModelBatch.from_factory(
            images,
            range(13),
            shared_input=False,
            backend="jax",
            chunk_size=None if not options else 1,
            backend_options={"verify": False, **options},
        )
        step = mb.make_train_step(
            F.cross_entropy,
            OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(mb, [{}] * 13),
            clip_norm=1.0,
        )
        losses = step.run(list(zip(x, y, strict=True)))
        results.append((losses, mb.get_model_states()))
    assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    assert len(programs) == 2
    assert "num_partitions=7" in programs[1]
    assert not _COLLECTIVE.findall(programs[1])


def test_an_exchange_would_be_seen() -> None:
    layout = layout_for(16, "all")
    array = layout.place(torch.ones(16, 2))
    text = jax.jit(lambda array: array[::-1].sum()).lower(array).compile().as_text()
    assert _COLLECTIVE.findall(text)


def test_checkpoints_go_from_one_layout_to_the_other() -> None:
    mb = build(13, devices="all")
    optimizer = sgd_for(mb)
    train(mb, optimizer)
    results = []
    for options in ({}, {"devices": "all"}, {"devices": 3}):
        other = build(13, **options)
        other.load_model_states(mb.get_model_states())
        own = sgd_for(other)
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        results.append(train(other, own))
    assert_close(results[1], results[0], **BOUND)
    assert_close(results[2], results[0], **BOUND)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda mb: pickle.loads(pickle.dumps(mb))])
def test_copies_are_spread_too(again: Any) -> None:
    mb = build(13, devices="all")
    mb(batches(1)[0][0])
    other = again(mb)
    assert_close(train(other), train(mb), **BOUND)
    assert devices_of(other) <= {7, 1}
    assert other.backend.layout is mb.backend.layout


def test_a_gradient_of_a_shared_input_counts_each_model_once() -> None:
    (x, y), grads = batches(1)[0], []
    for options in ({}, {"devices": "all"}):
        mb = build(13, **options).eval()
        own = x.clone().requires_grad_()
        mb.compute_loss(mb(own), y, F.cross_entropy, reduction="sum").backward()
        grads.append((own.grad, {name: parameter.grad for name, parameter in mb.stacked_params.items()}))
    assert_close(grads[1], grads[0], **BOUND)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_options_of_a_step(accumulate: int) -> None:
    active = torch.arange(13) % 3 != 0
    bounds = torch.linspace(0.1, 2.0, 13)

    def loss(outputs: Any, targets: Any, weight: Any) -> Any:
        return weight * F.cross_entropy(outputs, targets), {"outputs": outputs, "weight": weight}

    results = []
    for options in ({}, {"devices": "all"}):
        mb = build(13, **options)
        step = mb.make_train_step(
            loss,
            sgd_for(mb),
            loss_args={"weight": torch.arange(13.0)},
            clip_norm=bounds,
            accumulate=accumulate,
            active=active,
            aux=True,
        )
        results.append(([step(*batch) for batch in batches(2)], step.run(batches(3)), mb.get_model_states()))
    assert_close(results[1], results[0], **BOUND)
    assert_different(results[0][2], build(13).get_model_states())


def test_models_with_different_numbers_of_rows() -> None:
    x, y = batches(1)[0]
    routed = DataRouter("indices").route_batch(x, indices=[range(10 - model % 2) for model in range(13)], targets=y)
    results = []
    for options in ({}, {"devices": "all"}):
        mb = build(13, shared_input=False, **options)
        step = mb.make_train_step(F.cross_entropy, sgd_for(mb))
        losses = [step(routed.inputs, routed.targets), step(x.expand(13, 10, 6), y)]
        results.append((losses, mb(routed.inputs).data, mb.get_model_states()))
    assert_close(results[1], results[0], **BOUND)


def test_a_plain_optimizer_serves_too() -> None:
    results = []
    for options in ({}, {"devices": "all"}):
        mb = build(13, **options)
        step = mb.make_train_step(F.cross_entropy, torch.optim.SGD(mb.parameters(), lr=0.1))
        results.append(([step(*batch) for batch in batches(3)], mb.get_model_states()))
    assert_close(results[1], results[0], **BOUND)


@pytest.mark.parametrize(
    ("num_models", "asked", "devices"),
    [(16, None, 1), (16, 1, 1), (16, 3, 3), (1, "all", 1), (2, "all", 2), (9, "all", 5), (8, 8, 8)],
)
def test_how_many_devices_are_used(num_models: int, asked: Any, devices: int) -> None:
    layout = layout_for(num_models, asked)
    assert layout.num_devices == devices
    assert (layout is ONE_DEVICE) == (devices == 1)


@pytest.mark.parametrize("asked", [0, 9, 2.0, True, "some"])
def test_devices_that_do_not_exist(asked: Any) -> None:
    with pytest.raises(InvalidInput, match="devices"):
        build(4, devices=asked)


def joint_loss(first: nn.Module, second: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(first(x) + second(x), y)


def test_a_joint_step_needs_one_layout() -> None:
    one, spread = build(4, devices=1), build(4, devices=2)
    with pytest.raises(InvalidInput, match=r"batches on \[1, 2\] devices"):
        make_joint_step([one, spread], joint_loss, [sgd_for(one), None])


@pytest.mark.parametrize("again", [lambda step: step, copy.deepcopy])
def test_in_a_joint_step_batches_without_a_choice_follow_the_others(again: Any) -> None:
    results = []
    for devices in (1, 3):
        first, second = build(4), build(4, devices=devices)
        step = again(make_joint_step([first, second], joint_loss, [sgd_for(first), sgd_for(second)]))
        losses = [step(*batch) for batch in batches(3)]
        results.append((torch.stack(losses), [mb.get_model_states() for mb in step._batches]))
        assert all(devices_of(mb) == {min(devices, 2)} for mb in step._batches)
    assert_close(results[1], results[0], **BOUND)


def test_large_batches_use_a_host_device_for_each_core() -> None:
    cores = min(usable_cores(), 8)
    assert layout_for(16, None, 2**16 - 1) is ONE_DEVICE
    assert layout_for(16, None, 2**16).num_devices == cores
    mb = ModelBatch([nn.Linear(256, 64) for _ in range(8)], backend="jax")
    step = mb.make_train_step(F.mse_loss, sgd_for(mb))
    losses = step(torch.ones(2, 256), torch.zeros(2, 64))
    assert losses.shape == (8,)
    assert bool((losses > 0).all())
    assert devices_of(mb) == {cores}
