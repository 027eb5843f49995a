"""Translation by other packages: what they get right is used, what they get wrong or lack is refused."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._ops import OpOverloadPacket

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from bridge.arrays import to_jax  # noqa: E402
from bridge.denied import DENIED  # noqa: E402
from bridge.dtypes import torch_dtypes  # noqa: E402
from bridge.torchax_import import tolerant_overloads  # noqa: E402
from bridge.translators import translate_function  # noqa: E402
from bridge.verify import compare  # noqa: E402
from bridge.via_graph import GraphTranslator  # noqa: E402
from bridge.via_torch2jax import Torch2JaxTranslator  # noqa: E402
from bridge.via_torchax import TorchaxTranslator  # noqa: E402
from mb_torch.errors import Unsupported  # noqa: E402

CLASSES = {"torch2jax": Torch2JaxTranslator, "torchax": TorchaxTranslator}


def installed(name):
    return importlib.util.find_spec(name) is not None


NEEDS = {name: pytest.mark.skipif(not installed(name), reason=f"needs {name}") for name in CLASSES}
EACH = pytest.mark.parametrize("translator", [pytest.param(name, marks=NEEDS[name]) for name in CLASSES])


def swapping(module, *inputs):
    """A function of the module's parameters, buffers and inputs that returns its outputs and buffers; its inputs."""
    places = [
        (table, name)
        for submodule in module.modules()
        for table in (submodule._parameters, submodule._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    tensors = [table[name] for table, name in places]
    buffers = [index for index, tensor in enumerate(tensors) if not isinstance(tensor, nn.Parameter)]

    def function(given):
        try:
            for (table, name), tensor in zip(places, given, strict=False):
                table[name] = tensor
            return [module(*given[len(places) :]), *(given[index] for index in buffers)]
        finally:
            for (table, name), tensor in zip(places, tensors, strict=True):
                table[name] = tensor

    return function, [*tensors, *inputs]


def translated(translator, module, *inputs):
    return translate_function(*swapping(module, *inputs), [module], translator=translator)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


MODULES = {
    "mlp": (mlp, (3, 4)),
    "conv2d_pool": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)), (2, 2, 6, 6)),
    "layer_norm": (lambda: nn.LayerNorm(4), (3, 4)),
}


@EACH
@pytest.mark.parametrize("name", MODULES)
def test_equals_pytorch_in_float64(translator, name):
    make, shape = MODULES[name]
    checked = translated(translator, make(), torch.randn(shape))
    assert checked.comparison.dtype == torch.float64
    assert checked.comparison.largest < 1e-12
    assert checked.translation.translator == translator
    assert checked.translation.dtypes == (torch.float32,)
    assert not checked.translation.draws


@EACH
def test_says_which_outputs_are_inputs_and_what_gradients_reach(translator):
    def function(tensors):
        x, y, count = tensors
        return [x * y, x.detach() * y, y, count, (x > 0).sum()]

    inputs = [torch.ones(3, requires_grad=True), torch.ones(3), torch.tensor(2)]
    made = CLASSES[translator]().translate(function, inputs, [])
    assert made.unchanged == (None, None, 1, 2, None)
    assert made.reached == ({0, 1}, {1}, {1}, frozenset(), frozenset())
    assert made.dtypes[3:] == (torch.int64, torch.int64)


@NEEDS["torch2jax"]
def test_torch2jax_updates_batch_norm_statistics():
    module = nn.BatchNorm2d(2)
    checked = translated("torch2jax", module, torch.randn(3, 2, 4, 4))
    assert checked.comparison.largest < 1e-12
    assert checked.translation.unchanged == (None,) * 4


@NEEDS["torchax"]
def test_batch_norm_in_training_is_denied_under_torchax():
    with pytest.raises(Unsupported, match="batch_norm in training would leave its running statistics unchanged"):
        translated("torchax", nn.BatchNorm1d(4), torch.randn(3, 4))
    assert translated("torchax", nn.BatchNorm1d(4).eval(), torch.randn(3, 4)).comparison.largest < 1e-12


@NEEDS["torchax"]
def test_the_comparison_refuses_what_no_list_denies(monkeypatch):
    monkeypatch.setitem(DENIED, "torchax", {})
    with pytest.raises(Unsupported, match=r"differs from PyTorch by .* in output [12]"):
        translated("torchax", nn.BatchNorm1d(4), torch.randn(3, 4))


@NEEDS["torch2jax"]
def test_exact_gelu_is_denied_under_torch2jax():
    with pytest.raises(Unsupported, match="gelu would be its tanh approximation"):
        translated("torch2jax", nn.GELU(), torch.randn(3))
    assert translated("torch2jax", nn.GELU("tanh"), torch.randn(3)).comparison.largest < 1e-12


@EACH
def test_python_conditions_on_values_are_refused(translator):
    def function(tensors):
        return [tensors[0] * 2 if tensors[0].sum() > 0 else tensors[0]]

    with pytest.raises(Unsupported, match=r"every tensor would count as true|ConcretizationTypeError"):
        translate_function(function, [torch.ones(3)], translator=translator)


@NEEDS["torch2jax"]
def test_torch2jax_lists_what_it_does_not_know():
    module = nn.Sequential(nn.Softmax(-1), nn.Linear(4, 4), nn.Softplus())
    with pytest.raises(Unsupported, match=r"does not know torch.nn.functional.softmax, .*softplus"):
        translated("torch2jax", module, torch.randn(3, 4))


@NEEDS["torchax"]
def test_torchax_lists_operations_without_lowering():
    with pytest.raises(Unsupported, match=r"torchax does not know aten.adaptive_max_pool2d.default"):
        translated("torchax", nn.AdaptiveMaxPool2d(2), torch.randn(1, 1, 4, 4))


@NEEDS["torchax"]
def test_a_missing_derivative_shows_at_translation():
    def function(tensors):
        return [torch.linalg.householder_product(tensors[0], tensors[1])]

    with pytest.raises(Unsupported, match="Differentiation rule for 'householder_product' not implemented"):
        translate_function(function, [torch.randn(3, 2), torch.randn(2)], translator="torchax")


@EACH
def test_errors_of_the_function_are_those_of_pytorch(translator):
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied") as raised:
        translated(translator, nn.Linear(4, 2), torch.randn(3, 5))
    assert not isinstance(raised.value, Unsupported)


@NEEDS["torchax"]
def test_torchax_stops_gradients_where_pytorch_does():
    def function(tensors):
        x, y = tensors
        with torch.no_grad():
            scale = (x * 2).exp()
            y.mul_(0.5).add_(x)
        return [x * scale, x.view(-1)[:2].detach() * x[:2], y * x, y]

    checked = translate_function(function, [torch.randn(3), torch.randn(3)], translator="torchax")
    assert checked.comparison.largest < 1e-12
    # What is changed in place under no_grad still depends on its own former value.
    assert checked.translation.reached[3] == {1}


@NEEDS["torchax"]
def test_torchax_takes_tensors_from_inside_and_outside_the_function():
    outside = torch.tensor([1.0, 2.0, 3.0])

    def function(tensors):
        table = torch.zeros(2, 3, dtype=tensors[0].dtype)
        table[1] = tensors[0] * outside
        return [table + torch.arange(3), outside]

    assert translate_function(function, [torch.randn(3)], translator="torchax").comparison.largest < 1e-12


@NEEDS["torchax"]
def test_torchax_refuses_to_lose_a_change_of_an_outside_tensor():
    outside = torch.zeros(3)

    def function(tensors):
        return [outside.add_(tensors[0].detach())]

    with pytest.raises(Unsupported, match="add_ changes a tensor that is no input"):
        TorchaxTranslator().translate(function, [torch.randn(3)], [])
    outside.zero_()
    with pytest.raises(Unsupported, match="outside is written to"):
        translate_function(function, [torch.randn(3)], translator="torchax")
    assert outside.tolist() == [0, 0, 0]


@EACH
def test_dropout_is_a_function_of_the_key(translator):
    translation = translated(translator, nn.Dropout(), torch.ones(100)).translation
    assert translation.draws
    ones = to_jax(torch.ones(100))
    with torch_dtypes():
        masks = [translation.run([ones], jax.random.key(seed), "native")[0] for seed in (1, 1, 2)]
    assert (masks[0] == masks[1]).all()
    assert (masks[0] != masks[2]).any()
    assert set(masks[0].tolist()) == {0.0, 2.0}


@NEEDS["torchax"]
@pytest.mark.parametrize(
    "draw",
    [
        lambda x: x + torch.rand(3, generator=torch.Generator()),
        lambda x: x + torch.rand(3, device="cpu"),
        lambda x: torch.empty_like(x).exponential_() + x,
        lambda x: nn.functional.gumbel_softmax(x),
    ],
    ids=["generator", "cpu", "fixed key", "fixed key inside"],
)
def test_numbers_that_no_key_decides_are_refused(draw):
    before = torch.get_rng_state()
    with pytest.raises(Unsupported, match="would draw"):
        translate_function(lambda tensors: [draw(tensors[0])], [torch.ones(3).double()], translator="torchax")
    assert torch.equal(torch.get_rng_state(), before)


@EACH
def test_gradients_of_three_models_at_once(translator):
    models = [mlp() for _ in range(3)]
    x = torch.randn(6, 4)
    function, inputs = swapping(models[0], x)
    translation = translate_function(function, inputs, translator=translator).translation

    def loss(arrays, key):
        return translation.run(arrays, key, "native")[0].sum()

    with torch_dtypes():
        stacked = [
            jnp.stack([to_jax(p) for p in same]) for same in zip(*(list(m.parameters()) for m in models), strict=True)
        ]
        gradients = jax.jit(jax.vmap(jax.grad(lambda p, x, key: loss([*p, x], key)), in_axes=(0, None, 0)))
        got = gradients(stacked, to_jax(x), jax.random.split(jax.random.key(0), 3))
    for index, model in enumerate(models):
        model(x).sum().backward()
        for parameter, array in zip(model.parameters(), got, strict=True):
            assert jnp.allclose(array[index], to_jax(parameter.grad), rtol=1e-5, atol=1e-6)


@NEEDS["torchax"]
def test_dropout_differs_between_models_with_a_key_each():
    translation = translated("torchax", nn.Dropout(), torch.ones(50)).translation
    with torch_dtypes():
        keys = jax.random.split(jax.random.key(0), 3)
        masks = jax.vmap(lambda key: translation.run([jnp.ones(50, "float32")], key, "native")[0])(keys)
    assert len({tuple(mask.tolist()) for mask in masks}) == 3


@NEEDS["torchax"]
def test_auto_falls_through_to_the_next(monkeypatch):
    def refuse(*_):
        raise Unsupported("made to fail")

    monkeypatch.setattr(GraphTranslator, "translate", refuse)
    monkeypatch.setattr(Torch2JaxTranslator, "translate", refuse)
    assert translated("auto", nn.Linear(2, 2), torch.ones(1, 2)).translation.translator == "torchax"
    monkeypatch.setattr(TorchaxTranslator, "translate", refuse)
    with pytest.raises(
        Unsupported, match="no translation to JAX: made to fail\n  torch2jax: .*\n  torchax: made to fail$"
    ):
        translated("auto", nn.Linear(2, 2), torch.ones(1, 2))


@NEEDS["torch2jax"]
@NEEDS["torchax"]
def test_reasons_of_all_translators_are_a_line_each():
    class Looks(nn.Linear):
        def forward(self, x):
            return -super().forward(x) if x.sum().item() > 0 else x

    with pytest.raises(Unsupported) as raised:
        translated("auto", nn.Sequential(Looks(2, 2)), torch.ones(1, 2))
    first, second, third, remedy = str(raised.value).split("\n")
    assert first.startswith("no translation to JAX: 0 (Looks): a tensor's value is looked at")
    assert second == "  torch2jax: does not know torch.Tensor.neg"
    assert third.startswith("  torchax: cannot run it: ConcretizationTypeError")
    assert remedy == raised.value.fix
    assert remedy.endswith("use backend='torch'.")


@pytest.mark.parametrize("translator", CLASSES)
def test_a_missing_package_is_named(translator, monkeypatch):
    if installed(translator):
        for name in [name for name in sys.modules if name.split(".")[0] == translator]:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, translator, None)
    loader = importlib.import_module("bridge.torchax_import").torchax
    loader.cache_clear()
    try:
        with pytest.raises(Unsupported, match=f"{translator} is not installed. pip install {translator}"):
            CLASSES[translator]().translate(lambda tensors: tensors, [torch.ones(1)], [])
    finally:
        loader.cache_clear()


def test_removed_overloads_exist_while_torchax_loads(monkeypatch):
    monkeypatch.delattr(torch.ops.aten.prod, "dim_Dimname", raising=False)
    if hasattr(torch.ops.aten.prod, "dim_Dimname"):
        pytest.skip("this PyTorch has named tensors")
    with tolerant_overloads():
        assert torch.ops.aten.prod.dim_Dimname is not None
        assert torch.ops.aten.std.names_dim is not None
        with pytest.raises(AttributeError):
            torch.ops.aten.prod.no_such_overload  # noqa: B018
    with pytest.raises(AttributeError):
        torch.ops.aten.std.names_dim  # noqa: B018


def test_nothing_is_changed_where_pytorch_has_the_overloads(monkeypatch):
    monkeypatch.setattr(torch.ops.aten.prod, "dim_Dimname", object(), raising=False)
    look_up = OpOverloadPacket.__getattr__
    with tolerant_overloads():
        assert OpOverloadPacket.__getattr__ is look_up


_UNTOUCHED = """
import os, sys, torch
def state():
    return (
        torch.accelerator.current_accelerator(), torch.backends.mha.get_fastpath_enabled(), torch.get_default_device(),
        torch._C._get_privateuse1_backend_name(), hasattr(torch, "jax"), "torch.privateuseone" in sys.modules,
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), torch._C._get_mkldnn_enabled(),
        dict(os.environ),
    )
before = state()
from bridge.translators import translate_function
translate_function(lambda tensors: [tensors[0].sin()], [torch.ones(2)], translator="torchax")
assert state() == before, (before, state())
with torch.random.fork_rng():
    torch.rand(1)
"""


@pytest.mark.long
@NEEDS["torchax"]
def test_pytorch_is_as_before_after_torchax():
    subprocess.run(
        [sys.executable, "-c", _UNTOUCHED], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@NEEDS["torchax"]
def test_embedding_gradients_by_frequency_are_refused():
    module = nn.Embedding(4, 2, scale_grad_by_freq=True)
    with pytest.raises(Unsupported, match="scale_grad_by_freq"):
        translated("torchax", module, torch.tensor([1, 1, 2]))


@EACH
def test_float32_and_float64_are_translated_as_they_are(translator):
    function, inputs = swapping(mlp(), torch.randn(3, 4))
    assert compare(CLASSES[translator](), function, inputs).largest < 1e-12
    wide = CLASSES[translator]().translate(function, [tensor.detach().double() for tensor in inputs], [])
    assert wide.dtypes == (torch.float64,)
