"""The adaptive softmax as it is recorded: PyTorch's values and gradients without looking at the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn, tensor

pytest.importorskip("jax")

from bridge import translate
from bridge.ops.modules import recordable
from bridge.translators import translate_function
from mb_torch import ModelBatch, Unsupported
from tests.compare import assert_close

Layer = nn.AdaptiveLogSoftmaxWithLoss


def layer(**options: Any) -> Layer:
    torch.manual_seed(3)
    return Layer(4, 10, [3, 6], div_value=1.5, **options).double()


def rows(count: int) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


class Method(nn.Module):
    """Calls a method of the layer."""

    def __init__(self, owner: Layer, name: str) -> None:
        super().__init__()
        self.owner, self.name = owner, name

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self.owner, self.name)(*inputs)


def difference(owner: Layer, method: str, *inputs: Tensor) -> float:
    """The largest difference from PyTorch in outputs and gradients of parameters and floating inputs."""
    module = Method(owner, method)
    names = [name for name, _ in module.named_parameters()]

    def function(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        parameters = dict(zip(names, tensors[len(inputs) :], strict=True))
        result = torch.func.functional_call(module, parameters, tuple(tensors[: len(inputs)]))
        return list(result) if isinstance(result, tuple) else [result]

    given = [one.clone().requires_grad_(one.is_floating_point()) for one in inputs]
    parameters = [one.detach().requires_grad_() for one in module.parameters()]
    comparison = translate_function(function, [*given, *parameters], [module], translator="graph").comparison
    assert comparison is not None
    return comparison.largest


CASES = {
    "every cluster has rows": (rows(6), tensor([0, 4, 7, 1, 5, 9])),
    "one cluster has none": (rows(3), tensor([0, 4, 5])),
    "only the head": (rows(2), tensor([2, 0])),
    "one row": (rows(1), tensor([7])),
    "no batch axis": (rows(1)[0], tensor(5)),
    "the bounds of clusters": (rows(5), tensor([2, 3, 5, 6, 9])),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_pytorch(name: str) -> None:
    assert difference(layer(), "forward", *CASES[name]) < 1e-12


def test_a_head_with_biases() -> None:
    module = layer(head_bias=True)
    assert difference(module, "forward", rows(3), tensor([0, 4, 9])) < 1e-12


@pytest.mark.parametrize("favoured", ["both", "head", "clusters"])
def test_all_probabilities_and_the_most_likely_class(favoured: str) -> None:
    module = layer(head_bias=True)
    with torch.no_grad():
        module.head.bias[:3] += {"both": 0.0, "head": 200.0, "clusters": -200.0}[favoured]
    inputs = 20 * rows(8)
    assert difference(module, "log_prob", inputs) < 1e-12
    assert difference(module, "predict", inputs) == 0.0
    in_head = module.predict(inputs) < 3
    assert bool(in_head.any()) == (favoured != "clusters")
    assert bool(in_head.all()) == (favoured == "head")


def test_a_target_that_is_no_class_gives_nan_and_the_first_one_raises() -> None:
    module = layer().float()
    mb = ModelBatch([module, layer().float()], backend="jax")
    inputs = rows(3).float()
    with pytest.raises(RuntimeError, match=r"Target values should be in \[0, 9\]"):
        mb(inputs, tensor([0, 4, 10]))
    assert_close(mb(inputs, tensor([0, 4, 9])).output[0], module(inputs, tensor([0, 4, 9])).output)
    for wrong in (10, -1):
        output, loss = mb(inputs, tensor([0, 4, wrong]))
        assert output.isnan().tolist() == [[False, False, True]] * 2
        assert loss.isnan().all()


def test_shapes_that_do_not_fit_raise_as_in_pytorch() -> None:
    # The comparison with PyTorch would raise too.
    mb = ModelBatch([layer().float()], backend="jax", backend_options={"verify": False})
    with pytest.raises(RuntimeError, match="same size in the batch dimension") as raised:
        mb(rows(3).float(), tensor([0]))
    assert not isinstance(raised.value, Unsupported)


def test_the_class_is_what_it_was_afterwards() -> None:
    before = Layer.forward, Layer.predict
    translate(layer(), rows(2), tensor([0, 4]))
    with recordable():
        assert Layer.forward is not before[0]
    assert (Layer.forward, Layer.predict) == before
