"""Every module of the zoo, trained in a batch and in the loop: weights, buffers, optimizer state and losses agree."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mb_torch import ModelBatch, OptimizerFactory, Unsupported, make_joint_step
from tests.compare import assert_close, assert_different, assert_equal
from tests.parity.loop import Trained, as_tree, batch_ended, sgd_config, train_alone
from tests.zoo import CASES, Case, by_name, zoo_loss

# torch says it once per process, in the loop.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

NUM_MODELS, STEPS = 3, 3

# What a module that runs as a loop must be called in the warning.
LOOPING = {
    "cross_map_lrn": "CrossMapLRN2d",
    "adaptive_softmax": "AdaptiveLogSoftmaxWithLoss",
    "branch_on_value": "BranchOnValue",
    "boolean_selection": "BooleanSelection",
    "records_item": "RecordsItem",
}

# What runs as a loop when each model has inputs of its own.
LOOPING_ON_OWN_INPUTS = {
    "lstm_packed_input": "the number of rows at each time step is data",
    "lstm_packed_inside": "packing reads the lengths",
    "gru_packed_inside": "packing reads the lengths",
    "transformer": "it looks whether the mask it is given is causal",
}

# Modules that draw random numbers in evaluation mode too, so that no loop can be compared with them.
ALWAYS_RANDOM = {
    "fractional_max_pool2d": "the pooling regions are drawn in every mode",
    "variational_autoencoder": "the latent is sampled in every mode",
    "gumbel_router": "the noise is drawn in every mode",
}

# Random modules that refuse seeds.
NO_STREAM = {"fractional_max_pool2d": "torch draws the pooling regions inside one operation"}

# One model goes another way than several: without vmap.
SINGLE = [
    "linear",
    "activations",
    "conv2d",
    "batch_norm2d",
    "batch_norm2d_cumulative",
    "embedding_max_norm",
    "lstm_packed_inside",
    "gru",
    "encoder_layer_eval",
    "attention_cross",
    "tied_language_model",
    "frozen_part",
    "spectral_norm",
    "weight_norm_hook",
    "parametrized",
    "running_centre",
    "mean_teacher",
    "buffers_only",
    "colliding_names",
    "many_outputs",
    "extra_inputs",
    "keyword_only",
    "complex_parameter",
    "resnet_block",
    "encoder_for_classification",
    "boolean_selection",
]

deterministic = [case for case in CASES if not case.random]
randomised = [case for case in CASES if case.random]


def models_of(case: Case, count: int = NUM_MODELS) -> list[nn.Module]:
    return [case.build(seed) for seed in range(1, count + 1)]


def batches_of(case: Case) -> list[Any]:
    """One batch per step, as `(args, kwargs)` with floats in the default dtype."""
    return [case.batch(step) for step in range(STEPS)]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    args, kwargs = batch
    return zoo_loss(model(*args, **kwargs))


def stacked(batches: Sequence[Any]) -> Any:
    """One batch for each model, as one with a leading model axis."""
    return pytree.tree_map(
        lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *batches
    )


def optimizer_for(mb: ModelBatch) -> torch.optim.Optimizer | None:
    if not any(parameter.requires_grad for parameter in mb.parameters()):
        return None
    configs = [sgd_config(index) for index in range(mb.num_models)]
    return OptimizerFactory(torch.optim.SGD).create_optimizer(mb, configs)


def train_eagerly(mb: ModelBatch, batches: Sequence[Any]) -> list[Trained]:
    """The documented way: forward, `compute_loss`, `backward`, `step`."""
    optimizer, losses = optimizer_for(mb), []
    unused = torch.zeros(())
    for args, kwargs in batches:
        outputs = mb(*args, **kwargs)
        loss = mb.compute_loss(outputs, unused, lambda outputs, _: zoo_loss(outputs), "none", shared_targets=True)
        losses.append(loss.detach())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    return batch_ended(mb, optimizer, losses)


def train_fused(mb: ModelBatch, batches: Sequence[Any]) -> list[Trained]:
    """The fused step; `make_train_step` where the model takes one argument, else a loss that calls the model."""
    optimizer = optimizer_for(mb)
    assert optimizer is not None
    unused = torch.zeros(())
    args, kwargs = batches[0]
    if len(args) == 1 and not kwargs:
        step = mb.make_train_step(lambda outputs, _: zoo_loss(outputs), optimizer, shared_targets=True)
        losses = [step(args[0], unused) for args, _ in batches]
    else:
        step = make_joint_step([mb], lambda model, batch, _: loss_of(model, batch), [optimizer], shared_targets=True)
        losses = [step(batch, unused) for batch in batches]
    return batch_ended(mb, optimizer, losses)


@contextmanager
def one_warning_naming(case: Case, *, per_model: bool) -> Iterator[None]:
    """A module that cannot be batched says so, once; the others are silent (warnings are errors)."""
    own_inputs = per_model and case.name in LOOPING_ON_OWN_INPUTS
    if case.loops is None and not own_inputs:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(entry.message) for entry in caught]
    assert len(messages) == 1, messages
    assert own_inputs or LOOPING[case.name] in messages[0]
    assert "one after another" in messages[0]


def check(
    case: Case,
    train: Callable[..., list[Trained]],
    *,
    count: int = NUM_MODELS,
    per_model: bool = False,
    backend: str = "torch",
) -> None:
    models = models_of(case, count)
    batches = batches_of(case)
    given = batches
    if per_model:
        batches = [[case.batch(100 * index + step) for index in range(count)] for step in range(STEPS)]
        given = [stacked(own) for own in batches]
    mb = ModelBatch(models, shared_input=not per_model, backend=backend)
    with one_warning_naming(case, per_model=per_model):
        received = train(mb, given)
    expected = train_alone(models, batches, loss_of)
    tolerance = {"atol": 1e-9, "rtol": 1e-9} if torch.get_default_dtype() == torch.float64 else {}
    assert_close(as_tree(received), as_tree(expected), **tolerance)


every_case = pytest.mark.parametrize("case", deterministic, ids=repr)
every_trained_case = pytest.mark.parametrize(
    "case", [case for case in deterministic if case.name != "buffers_only"], ids=repr
)


@every_case
def test_eager_training_equals_the_loop(case: Case) -> None:
    check(case, train_eagerly)


@every_trained_case
def test_fused_training_equals_the_loop(case: Case) -> None:
    check(case, train_fused)


@every_trained_case
def test_fused_training_on_inputs_of_its_own_equals_the_loop(case: Case) -> None:
    check(case, train_fused, per_model=True)


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_precision")
@every_case
def test_eager_training_equals_the_loop_in_double_precision(case: Case) -> None:
    check(case, train_eagerly)


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_model_equals_plain_pytorch(name: str) -> None:
    case = by_name[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case = Case(case.name, case.make, case.inputs, case.training)  # alone, nothing has to run one by one
        check(case, train_eagerly, count=1)
        if name != "buffers_only":
            check(case, train_fused, count=1)


@pytest.mark.parametrize("case", [case for case in randomised if case.name not in ALWAYS_RANDOM], ids=repr)
@pytest.mark.parametrize("train", [train_eagerly, train_fused])
def test_a_random_module_in_evaluation_equals_the_loop(case: Case, train: Callable[..., list[Trained]]) -> None:
    check(Case(case.name, case.make, case.inputs, training=False), train)


@pytest.mark.parametrize("case", randomised, ids=repr)
def test_random_numbers_differ_between_models_and_steps(case: Case) -> None:
    model = case.build(1)
    mb = ModelBatch([model] * NUM_MODELS)
    torch.manual_seed(5)
    args, kwargs = case.batch()
    first, second = (tensors(mb(*args, **kwargs)) for _ in range(2))
    for index in range(NUM_MODELS):
        assert_different(row(first, index), row(second, index))
        assert_different(row(first, index), row(first, index - 1))
    torch.manual_seed(5)
    assert_equal(tensors(mb(*args, **kwargs)), first)


@pytest.mark.parametrize("case", [case for case in randomised if case.name not in NO_STREAM], ids=repr)
@pytest.mark.parametrize("train", [train_eagerly, train_fused])
def test_with_seeds_a_random_model_trains_as_it_does_alone(case: Case, train: Callable[..., list[Trained]]) -> None:
    models, seeds = models_of(case), [11, 12, 13]
    together = train(ModelBatch(models, seeds=seeds), batches_of(case))
    factory = copy.deepcopy(models)
    for index, model in enumerate(factory):
        # One model runs as plain PyTorch. Its optimizer is that of its place in the batch.
        alone = ModelBatch([model], seeds=[seeds[index]])
        optimizer = OptimizerFactory(torch.optim.SGD).create_optimizer(alone, [sgd_config(index)])
        step = make_joint_step([alone], lambda m, batch, _: loss_of(m, batch), [optimizer], shared_targets=True)
        losses = [step(batch, torch.zeros(())) for batch in batches_of(case)]
        assert_close(vars(together[index]), vars(batch_ended(alone, optimizer, losses)[0]))


@pytest.mark.parametrize("name", NO_STREAM)
def test_a_random_module_without_a_stream_refuses_seeds(name: str) -> None:
    case = by_name[name]
    mb = ModelBatch(models_of(case), seeds=[1, 2, 3])
    args, kwargs = case.batch()
    with pytest.raises(Unsupported, match="random"):
        mb(*args, **kwargs)


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def row(outputs: Sequence[Tensor], index: int) -> list[Tensor]:
    return [leaf[index] for leaf in outputs]


def test_the_zoo_is_large_and_its_lists_name_its_cases() -> None:
    assert len(CASES) >= 90
    assert {case.name for case in CASES if case.loops} == set(LOOPING)
    assert {*ALWAYS_RANDOM, *NO_STREAM} <= {case.name for case in randomised}
    assert LOOPING_ON_OWN_INPUTS.keys() <= {case.name for case in deterministic}
