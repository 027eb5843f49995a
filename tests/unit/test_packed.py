"""Packed sequences as they are recorded: outputs and gradients are PyTorch's, in float64, whatever the lengths are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

pytest.importorskip("jax")

from bridge.by_value import Knowable
from bridge.ops.recurrent import recurrent, recurrent_dropout
from bridge.translators import translate_function

# torch says it once per process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def difference(call: Callable[..., Any], *inputs: Tensor, module: nn.Module | None = None) -> float:
    """The largest difference from PyTorch in outputs and gradients of floating inputs and of a module's parameters."""
    module = nn.Module() if module is None else module.double()
    names = [name for name, _ in module.named_parameters()]

    def function(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
        with torch.nn.utils.stateless._reparametrize_module(module, parameters):
            results = call(*tensors[: len(inputs)])
        return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]

    given = [one.clone().requires_grad_(one.is_floating_point()) for one in inputs]
    parameters = [one.detach().requires_grad_() for one in module.parameters()]
    integers = tuple(place for place, one in enumerate(inputs) if not one.is_floating_point())
    checked = translate_function(
        function, [*given, *parameters], [module], translator="graph", knowable=Knowable(shared=integers)
    )
    assert checked.comparison is not None
    return checked.comparison.largest


def through(layer: nn.RNNBase, *, given_state: bool = False, **packing: Any) -> Callable[..., Any]:
    """Pack, run a layer, pad again."""

    def call(x: Tensor, lengths: Tensor, *state: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths, batch_first=True, **packing)
        outputs, last = layer(packed, (state if len(state) > 1 else state[0]) if given_state else None)
        return pad_packed_sequence(outputs, batch_first=True), outputs, last

    return call


LAYERS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(3, 4),
    "lstm, two directions": lambda: nn.LSTM(3, 4, bidirectional=True),
    "lstm, deep, two directions": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True),
    "lstm, no bias": lambda: nn.LSTM(3, 4, bias=False),
    "lstm, batch first": lambda: nn.LSTM(3, 4, batch_first=True),
    "gru": lambda: nn.GRU(3, 4, 2),
    "gru, two directions": lambda: nn.GRU(3, 4, bidirectional=True),
    "rnn, tanh": lambda: nn.RNN(3, 4, bidirectional=True),
    "rnn, relu": lambda: nn.RNN(3, 4, 2, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [(2, 5, 1, 4), (5, 5, 5, 5)])
def test_layers_over_packed_sequences(name: str, lengths: tuple[int, ...]) -> None:
    layer = LAYERS[name]()
    assert difference(through(layer, enforce_sorted=False), rows(4, 5, 3), tensor(lengths), module=layer) < 1e-12


def test_sorted_sequences_and_given_states() -> None:
    sizes = tensor([5, 4, 4, 1])
    gru, lstm = nn.GRU(3, 4, bidirectional=True), nn.LSTM(3, 4, 2, proj_size=2)
    assert difference(through(gru), rows(4, 5, 3), sizes, module=gru) < 1e-12
    call = through(gru, given_state=True, enforce_sorted=False)
    assert difference(call, rows(4, 5, 3), tensor([1, 5, 4, 2]), rows(2, 4, 4), module=gru) < 1e-12
    states = rows(2, 4, 2), rows(2, 4, 4)
    assert difference(through(lstm, given_state=True), rows(4, 5, 3), sizes, *states, module=lstm) < 1e-12


def test_a_packed_sequence_as_the_input() -> None:
    packed = pack_padded_sequence(rows(4, 5, 3), tensor([2, 5, 1, 4]), batch_first=True, enforce_sorted=False)
    layer = nn.LSTM(3, 4, 2, bidirectional=True)
    assert difference(lambda *parts: layer(PackedSequence(*parts)), *packed, module=layer) < 1e-12


PACKING: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "time first": (lambda x, n: pack_padded_sequence(x, n, enforce_sorted=False), (rows(5, 3, 2), tensor([2, 5, 3]))),
    "lengths below the number of steps": (
        lambda x, n: pad_packed_sequence(pack_padded_sequence(x, n)),
        (rows(6, 3, 2), tensor([4, 3, 3])),
    ),
    "int32": (lambda x, n: pack_padded_sequence(x, n), (rows(5, 2, 2), tensor([5, 2], dtype=torch.int32))),
    "more axes": (lambda x, n: pack_padded_sequence(x, n, True), (rows(2, 5, 2, 3), tensor([5, 2]))),
    "no features": (lambda x, n: pack_padded_sequence(x, n, True), (rows(2, 5), tensor([5, 2]))),
    "token numbers": (
        lambda x, n: pad_packed_sequence(pack_padded_sequence(x, n, True), True, -1),
        (torch.arange(10).view(2, 5), tensor([4, 2])),
    ),
    "padded with a number to a length": (
        lambda x, n: pad_packed_sequence(pack_padded_sequence(x, n, True), True, -1.5, total_length=7),
        (rows(2, 5, 3), tensor([4, 2])),
    ),
    "a list of lengths": (lambda x: pack_padded_sequence(x, [4, 2], True), (rows(2, 5, 3),)),
    "a list of sequences": (lambda x: rnn.pack_sequence([x[0], x[1, :2]]), (rows(2, 5, 3),)),
    "packed and padded lists": (
        lambda x: rnn.unpack_sequence(rnn.pack_sequence([x[0, :2], x[1]], enforce_sorted=False)),
        (rows(2, 5, 3),),
    ),
    "unpad": (lambda x, n: rnn.unpad_sequence(x, n, batch_first=True), (rows(3, 5, 2), tensor([2, 5, 3]))),
    "pad": (
        lambda x, n: rnn.pad_sequence([one[:size] for one, size in zip(x, n.tolist(), strict=True)], True, 2.5),
        (rows(3, 5, 2), tensor([2, 4, 3])),
    ),
}


@pytest.mark.parametrize("name", PACKING)
def test_packing_and_padding(name: str) -> None:
    function, inputs = PACKING[name]
    assert difference(function, *inputs) < 1e-12


@pytest.mark.parametrize("lengths", [(0, 3), (2, 3), (3, 2, 1)])
def test_lengths_that_pytorch_refuses_raise_its_error(lengths: tuple[int, ...]) -> None:
    x = rows(2, 5, 3)
    with pytest.raises(RuntimeError) as plain:
        pack_padded_sequence(x, tensor(lengths), True)
    with pytest.raises(RuntimeError) as ours:
        difference(lambda x, n: pack_padded_sequence(x, n, True), x, tensor(lengths))
    assert str(ours.value) == str(plain.value)


def test_layers_are_one_operation_with_the_lengths_and_dropout_draws() -> None:
    for dropout, operation in ((0.0, recurrent), (0.5, recurrent_dropout)):
        layer = nn.LSTM(3, 4, 2, dropout=dropout)
        packed = pack_padded_sequence(torch.randn(4, 5, 3), tensor([5, 4, 2, 2]), batch_first=True)
        translation = translate_function(
            lambda given, layer=layer: [layer(PackedSequence(*given))[0].data],
            packed[:2],
            [layer],
            knowable=Knowable(shared=(1,)),
            verify=dropout == 0,
        ).translation
        assert translation.known == (1,)
        assert translation.draws == (operation is recurrent_dropout)


def test_unknown_lengths_are_named_with_the_module_that_looks() -> None:
    layer = nn.LSTM(3, 4)
    packed = pack_padded_sequence(torch.randn(4, 5, 3), tensor([5, 4, 2, 2]), batch_first=True)
    with pytest.raises(RuntimeError, match=r"the model \(LSTM\): a tensor's value is looked at"):
        translate_function(lambda given: [layer(PackedSequence(*given))[0].data], packed[:2], [layer])
