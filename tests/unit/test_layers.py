"""The gaps of torch.func that are closed in layers: under plain torch.func, without a ModelBatch."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from mb_torch.errors import InvalidInput
from mb_torch.vmap import layers, recurrent
from mb_torch.vmap.layers import find_gaps
from mb_torch.vmap.rng import seeded
from tests.compare import assert_close, assert_different, assert_equal
from tests.zoo import CASES, Case, by_name, zoo_loss

NUM_MODELS = 3
EXACT = {"atol": 1e-12, "rtol": 1e-12}

# One case for each batchable class: without it vmap raises, or warns that it runs model by model.
GAPS = {
    recurrent.BatchableLSTM: "lstm",
    recurrent.BatchableGRU: "gru",
    recurrent.BatchableRNN: "rnn_tanh",
    recurrent.BatchableLSTMCell: "lstm_cell",
    recurrent.BatchableGRUCell: "gru_cell",
    recurrent.BatchableRNNCell: "rnn_cell",
    layers.BatchableMultiheadAttention: "attention_eval",
    layers.BatchableTransformerEncoderLayer: "encoder_layer_eval",
    layers.BatchableTransformerEncoder: "encoder_eval",
    layers.BatchableBilinear: "bilinear",
    layers.BatchableEmbeddingBag: "embedding_bag_mean",
    layers.BatchableEmbedding: "embedding_sparse",
    layers.BatchableRReLU: "rrelu_eval",
    layers.BatchableBatchNorm: "batch_norm2d_cumulative",
}

# Not in the zoo, because the gradient of a model alone is a sparse tensor.
SPARSE = Case("embedding_sparse", lambda: nn.Embedding(7, 4, sparse=True), by_name["embedding"].inputs)

with_gaps = [case for case in CASES if not case.random and not case.loops and find_gaps(case.build(0))]
every_gap = pytest.mark.parametrize("case", with_gaps, ids=repr)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def make_batchable(module: nn.Module) -> None:
    """Close the gaps of a module for good, as a batch does while vmap runs it."""
    for gap in find_gaps(module):
        gap.module.__class__ = gap.batchable


def restore(module: nn.Module) -> None:
    """Give every submodule the class back that it had before `make_batchable`."""
    for submodule in module.modules():
        if isinstance(submodule, tuple(GAPS)):
            submodule.__class__ = type(submodule).__bases__[0]


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


Stacks = dict[str, Tensor]


def stacked(models: Sequence[nn.Module]) -> tuple[Stacks, Stacks]:
    """The stacked parameters and buffers."""
    parameters = {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models]).requires_grad_(
            parameter.requires_grad
        )
        for name, parameter in models[0].named_parameters()
    }
    buffers = {
        name: torch.stack([dict(model.named_buffers())[name] for model in models])
        for name, _ in models[0].named_buffers()
    }
    return parameters, buffers


def tensors_of(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def result(outputs: Any, gradients: Stacks, parameters: Stacks, buffers: Stacks) -> dict[str, Any]:
    return {
        "outputs": [leaf.detach() for leaf in tensors_of(outputs)],
        "gradients": gradients,
        # A maximum norm shortens the parameters themselves.
        "parameters": {name: parameter.detach() for name, parameter in parameters.items()},
        "buffers": dict(buffers),
    }


def run_at_once(model: nn.Module, models: Sequence[nn.Module], case: Case, *, how: str = "outside") -> dict[str, Any]:
    """One pass of all models: the gradient taken outside of vmap, inside of it, or not at all."""
    parameters, buffers = stacked(models)
    args, kwargs = case.batch()

    def one(own: Stacks, own_buffers: Stacks) -> tuple[Tensor, list[Tensor]]:
        outputs = functional_call(model, {**own, **own_buffers}, args, kwargs)
        return zoo_loss(outputs), tensors_of(outputs)

    if how == "inside":
        mapped = torch.vmap(grad_and_value(one, has_aux=True), randomness="different")
        with torch.no_grad():
            gradients, (_, outputs) = mapped(parameters, buffers)
        return result(outputs, gradients, parameters, buffers)
    with torch.set_grad_enabled(how == "outside"):
        losses, outputs = torch.vmap(one, randomness="different")(parameters, buffers)
    gradients = {}
    if how == "outside":
        found = torch.autograd.grad(losses.sum(), list(parameters.values()), materialize_grads=True)
        gradients = dict(zip(parameters, found, strict=True))
    return result(outputs, gradients, parameters, buffers)


def run_one_by_one(models: Sequence[nn.Module], case: Case, *, how: str = "outside") -> dict[str, Any]:
    """The same in a plain loop, then stacked."""
    results = []
    for model in models:
        args, kwargs = case.batch()
        with torch.set_grad_enabled(how != "without"):
            outputs = model(*args, **kwargs)
        parameters = dict(model.named_parameters())
        gradients = {}
        if how != "without":
            found = torch.autograd.grad(zoo_loss(outputs), list(parameters.values()), materialize_grads=True)
            gradients = {name: g.to_dense() for name, g in zip(parameters, found, strict=True)}
        results.append(result(outputs, gradients, parameters, dict(model.named_buffers())))
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *results)


def build(case: Case, count: int = NUM_MODELS) -> list[nn.Module]:
    return [case.build(seed) for seed in range(1, count + 1)]


def batchable(model: nn.Module) -> nn.Module:
    make_batchable(model)
    return model


# Every gap is closed, and is one


@every_gap
@pytest.mark.parametrize("how", ["outside", "inside", "without"])
@pytest.mark.usefixtures("double_precision")
def test_all_models_at_once_equal_the_loop(case: Case, how: str) -> None:
    if how == "inside" and "packed_inside" in case.name:
        pytest.skip("packing reads the lengths, which grad wraps")
    models = build(case)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        together = run_at_once(batchable(case.build(0)), models, case, how=how)
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        assert_close(together, run_one_by_one(models, case, how=how), **EXACT)


@pytest.mark.parametrize("ours", GAPS)
def test_every_class_closes_a_gap_that_torch_has(ours: type[nn.Module]) -> None:
    case = SPARSE if GAPS[ours] == SPARSE.name else by_name[GAPS[ours]]
    models = build(case)
    assert any(issubclass(gap.batchable, ours) for gap in find_gaps(models[0]))
    how = "inside" if case is SPARSE else "outside"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        with pytest.raises((RuntimeError, UserWarning)):
            run_at_once(models[0], models, case, how=how)


def test_every_class_is_tested() -> None:
    assert set(GAPS) == set(layers._BATCHABLE_CLASSES)


@pytest.mark.parametrize("how", ["outside", "inside"])
def test_sparse_gradients_become_dense(how: str) -> None:
    models = build(SPARSE)
    together = run_at_once(batchable(SPARSE.build(0)), models, SPARSE, how=how)
    assert_close(together, run_one_by_one(models, SPARSE, how=how))


def test_layers_without_a_gap_keep_their_class() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Embedding(3, 2), nn.Conv1d(2, 2, 1), nn.PReLU())
    assert find_gaps(model) == []


# Without vmap nothing changes


@every_gap
@pytest.mark.parametrize("how", ["outside", "without"])
def test_without_vmap_a_batchable_model_is_the_plain_one_to_the_bit(case: Case, how: str) -> None:
    plain, swapped = case.build(1), batchable(case.build(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        assert_equal(run_one_by_one([swapped], case, how=how), run_one_by_one([plain], case, how=how))


# Swapping classes


@every_gap
def test_restore_gives_every_class_back(case: Case) -> None:
    model = case.build(1)
    classes = [type(module) for module in model.modules()]
    state = model.state_dict()
    make_batchable(model)
    swapped = [type(module) for module in model.modules()]
    assert swapped != classes
    assert all(issubclass(ours, plain) for ours, plain in zip(swapped, classes, strict=True))
    make_batchable(model)
    assert [type(module) for module in model.modules()] == swapped
    assert_equal(model.state_dict(), state)
    for _ in range(2):
        restore(model)
        assert [type(module) for module in model.modules()] == classes
    if "weight_norm" not in case.name:  # torch itself refuses to pickle these
        assert_equal(copy.deepcopy(model).state_dict(), state)
        assert_equal(pickle.loads(pickle.dumps(model)).state_dict(), state)


class Doubled(nn.LSTM):
    """A user's subclass that goes on to torch's forward."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, state = super().forward(2.0 * input, hx)
        return output + 1.0, state


class Loud:
    """A user's mixin that stands between."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, state = super().forward(*args, **kwargs)
        return 3.0 * output, state


class LoudDoubled(Loud, Doubled):
    """Two steps of super() before torch's forward."""


class OwnForward(nn.GRU):
    """A user's subclass that never calls torch's forward."""

    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return input @ self.weight_ih_l0.t()


class OwnBatchNorm(nn.BatchNorm1d):
    """A user's subclass two steps below the class with the gap."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


@pytest.mark.parametrize(
    ("make", "like"),
    [
        (lambda: Doubled(4, 3), "lstm"),
        (lambda: LoudDoubled(4, 3, bidirectional=True), "lstm"),
        (lambda: OwnForward(4, 3), "gru"),
        (lambda: OwnBatchNorm(4, momentum=None), "batch_norm1d"),
        (lambda: parametrizations.weight_norm(Doubled(4, 3), "weight_ih_l0"), "lstm"),
        (lambda: parametrizations.spectral_norm(nn.GRU(4, 3), "weight_hh_l0"), "gru"),
    ],
)
@pytest.mark.usefixtures("double_precision")
def test_a_subclass_reaches_our_forward_through_its_own(make: Callable[[], nn.Module], like: str) -> None:
    case = Case("subclass", make, by_name[like].inputs)
    models = build(case)
    swapped = batchable(copy.deepcopy(models[0]))
    assert isinstance(swapped, type(models[0]))
    assert type(swapped).__name__ == type(models[0]).__name__
    assert_close(run_at_once(swapped, models, case), run_one_by_one(models, case), **EXACT)


def test_one_class_is_made_for_a_class_and_it_can_go() -> None:
    class Passing(nn.GRU):
        pass

    first, second = batchable(Passing(2, 2)), batchable(Passing(3, 3))
    assert type(first) is type(second) is not Passing
    made = weakref.ref(type(first))
    del first, second, Passing
    gc.collect()
    assert made() is None


# Recurrent layers


@pytest.mark.parametrize("name", ["lstm_dropout", "transformer_dropout", "rrelu"])
def test_random_layers_differ_between_models_and_repeat_under_a_seed(name: str) -> None:
    case = by_name[name]
    model = batchable(case.build(1))
    first, second, third = (seeded_run(model, [case.build(1)] * NUM_MODELS, case, seed) for seed in (4, 4, 5))
    assert_equal(first, second)
    assert_different(first, third)
    assert_different(first[0][0], first[0][1])


def seeded_run(swapped: nn.Module, models: Sequence[nn.Module], case: Case, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return run_at_once(swapped, models, case)["outputs"]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_acts_between_layers_only(
    layer: type[nn.RNNBase], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def dropout(rows: Tensor, p: float, training: bool) -> Tensor:
        calls.append((tuple(rows.shape), p, training))
        return rows

    monkeypatch.setattr(recurrent.F, "dropout", dropout)
    model = batchable(layer(4, 6, num_layers=3, dropout=0.3, bidirectional=True).double().train(training))
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    torch.vmap(lambda scale: model(scale * x)[0])(torch.ones(2, dtype=torch.float64))
    assert calls == [((10, 12), 0.3, training)] * 2


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_single_model_draws_its_dropout_where_a_random_stream_sees_it(layer: type[nn.RNNBase]) -> None:
    model = batchable(layer(4, 6, num_layers=2, dropout=0.5))
    x = torch.randn(5, 2, 4)
    with seeded(torch.tensor(3)) as stream:
        first = model(x)[0]
    with seeded(torch.tensor(3)):
        second = model(x)[0]
    assert stream.draws == 1
    assert_equal(first, second)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_bad_inputs_of_a_recurrent_layer_raise(layer: type[nn.RNNBase]) -> None:
    model = batchable(layer(4, 3))
    state = torch.zeros(1, 2, 3)

    def run(x: Tensor, hx: Any = None) -> Tensor:
        return torch.vmap(lambda scale: model(scale * x, hx)[0])(torch.ones(2))

    with pytest.raises(InvalidInput, match="2 or 3"):
        run(torch.zeros(1, 5, 2, 4))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        run(torch.zeros(5, 2, 3))
    with pytest.raises(RuntimeError, match="Expected hidden"):
        run(torch.zeros(5, 3, 4), (state, state) if layer is nn.LSTM else state)
    with pytest.raises(ValueError, match="dtype"):
        run(torch.zeros(5, 2, 4, dtype=torch.float64))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_state_that_would_only_fit_by_broadcasting_is_refused(cell: type[nn.RNNCellBase]) -> None:
    model = batchable(cell(4, 3))
    state = torch.zeros(1, 3)
    given = (state, state) if cell is nn.LSTMCell else state
    with pytest.raises(InvalidInput, match=r"\(2, 3\)"):
        torch.vmap(lambda scale: model(scale * torch.zeros(2, 4), given))(torch.ones(2))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.usefixtures("double_precision")
def test_a_packed_sequence_stays_one(layer: type[nn.RNNBase]) -> None:
    model = layer(3, 4, bidirectional=True)
    (packed,), _ = by_name["lstm_packed_input"].batch()
    swapped = batchable(copy.deepcopy(model))
    forms = []

    def one(scale: Tensor) -> tuple[Tensor, Any]:
        output, state = swapped(PackedSequence(scale * packed.data, *packed[1:]))
        forms.append(output)
        return output.data, state

    data, states = torch.vmap(one)(torch.tensor([1.0, 0.5]))
    assert_equal(list(forms[0][1:]), list(packed[1:]))
    for index, scale in enumerate((1.0, 0.5)):
        output, state = model(PackedSequence(scale * packed.data, *packed[1:]))
        own = pytree.tree_map(lambda leaf, index=index: leaf[index], states)
        assert_close((data[index], own), (output.data, state), **EXACT)


@pytest.mark.parametrize("name", ["lstm", "lstm_deep_bidirectional", "lstm_no_bias", "lstm_unbatched", "lstm_eval"])
@pytest.mark.parametrize("fused", [True, False])
def test_both_ways_of_running_an_lstm_equal_the_loop(name: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own_kernel = recurrent._run_own_kernel
    monkeypatch.setattr(recurrent, "_run_own_kernel", lambda *args: calls.append(args) or own_kernel(*args))
    monkeypatch.setattr(recurrent, "_FEW_MODELS", NUM_MODELS if fused else 0)
    models = build(by_name[name])
    together = run_at_once(batchable(by_name[name].build(0)), models, by_name[name])
    assert_close(together, run_one_by_one(models, by_name[name]), atol=1e-6, rtol=1e-5)
    assert len(calls) == (1 if fused else 0)


@pytest.mark.parametrize("how", ["dropout", "projection", "inner gradient", "double precision"])
def test_the_fused_lstm_is_left_alone_where_it_does_not_fit(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("the fused kernel was used")

    monkeypatch.setattr(recurrent, "_run_own_kernel", never)
    options = {"dropout": {"num_layers": 2, "dropout": 0.5}, "projection": {"proj_size": 2}}.get(how, {})
    dtype = torch.float64 if how == "double precision" else torch.float32
    model = batchable(nn.LSTM(4, 3, **options).to(dtype))
    x = torch.randn(5, 2, 4, dtype=dtype)

    def one(scale: Tensor) -> Tensor:
        return model(scale * x)[0].sum()

    run = torch.func.grad(one) if how == "inner gradient" else one
    assert torch.vmap(run, randomness="different")(torch.ones(2, dtype=dtype)).shape == (2,)


# Batch normalisation without momentum


@pytest.mark.usefixtures("double_precision")
def test_each_model_averages_over_its_own_count_of_batches() -> None:
    case = Case("norm", lambda: nn.BatchNorm1d(4, momentum=None), by_name["batch_norm1d"].inputs)
    models = build(case)
    for index, model in enumerate(models):
        for _ in range(2 * index):
            model(torch.randn(5, 4))
    together = run_at_once(batchable(case.build(0)), models, case)
    assert together["buffers"]["num_batches_tracked"].tolist() == [1, 3, 5]
    assert_close(together, run_one_by_one(models, case), **EXACT)


# Attention


def padding_at(*lengths: int) -> Tensor:
    return torch.arange(5) >= torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("mode", ["no grad", "frozen", "trained"])
@pytest.mark.parametrize(
    "padding", [padding_at(5, 2, 3), ~padding_at(1, 2, 3), padding_at(5, 2, 3).double() * -torch.inf], ids="ela"
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.usefixtures("double_precision")
def test_an_encoder_in_evaluation_treats_ended_rows_as_torch_does(mode: str, padding: Tensor) -> None:
    """torch puts zeros at the ended places, if no gradient is wanted and they are all at the end of their row."""
    padding = padding if padding.dtype == torch.bool else padding.nan_to_num(nan=0.0, neginf=-torch.inf)
    model = by_name["encoder_eval"].build(1).requires_grad_(mode == "trained")
    scales = torch.tensor([1.0, 0.5])
    x = torch.randn(3, 5, 8)
    swapped = batchable(copy.deepcopy(model))
    parameters = {name: torch.stack([p, p]) for name, p in model.named_parameters()}

    def one(parameters: Stacks, scale: Tensor) -> Tensor:
        return functional_call(swapped, parameters, (x * scale,), {"src_key_padding_mask": padding})

    with torch.set_grad_enabled(mode != "no grad"):
        together = torch.vmap(one)(parameters, scales)
        alone = torch.stack([model(x * scale, src_key_padding_mask=padding) for scale in scales])
    assert_close(together, alone, **EXACT)


@pytest.mark.usefixtures("double_precision")
def test_padding_may_differ_between_models() -> None:
    model = by_name["encoder_eval"].build(1)
    paddings = torch.stack([padding_at(5, 2, 3), ~padding_at(1, 2, 3)])
    x = torch.randn(3, 5, 8)
    swapped = batchable(copy.deepcopy(model))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        together = torch.vmap(lambda padding: swapped(x, src_key_padding_mask=padding))(paddings)
        alone = torch.stack([model(x, src_key_padding_mask=padding) for padding in paddings])
    assert_close(together, alone, **EXACT)


# Compiled


@pytest.mark.parametrize("name", ["lstm", "batch_norm1d_cumulative", "encoder_layer_eval"])
def test_a_batchable_layer_compiles_in_one_graph(name: str) -> None:
    case = by_name[name]
    models = build(case)
    swapped = batchable(case.build(0))
    parameters, buffers = stacked(models)
    args, kwargs = case.batch()

    def one(own: Stacks, own_buffers: Stacks) -> Tensor:
        return zoo_loss(functional_call(swapped, {**own, **own_buffers}, args, kwargs))

    mapped = torch.vmap(grad_and_value(one))
    own = {name: parameter.detach() for name, parameter in parameters.items()}
    with warnings.catch_warnings(), torch._dynamo.config.patch(allow_rnn=True):
        warnings.simplefilter("ignore")
        compiled = torch.compile(mapped, backend="aot_eager", fullgraph=True)
        received = compiled(own, {name: buffer.clone() for name, buffer in buffers.items()})
    assert_close(received, mapped(own, buffers))
    torch._dynamo.reset()
