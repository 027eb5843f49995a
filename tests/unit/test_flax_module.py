"""Torch modules as flax modules: the same numbers, the same names, and there and back from a batch."""

from __future__ import annotations

import copy
from collections import namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402

from bridge import TorchModule, translate  # noqa: E402
from bridge.arrays import to_jax, to_torch  # noqa: E402
from bridge.dtypes import torch_dtypes  # noqa: E402
from bridge.flax_module import Frozen  # noqa: E402
from mb_torch import ModelBatch  # noqa: E402
from mb_torch.errors import InvalidInput, InvalidState, ModelBatchError, Unsupported  # noqa: E402


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def normalised():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def dropping():
    return nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x):
        return self.again(self.first(x).sin())


class Structured(nn.Module):
    Result = namedtuple("Result", "low high")

    def forward(self, pair, *, scale=1.0):
        low, high = pair["low"], pair["high"]
        return {
            "both": self.Result(low * scale, high + 1),
            "name": "x",
            "none": None,
            "list": [low.argmax(-1), low.dtype],
        }


class Indexed(nn.Module):
    """Takes indices and a float64 buffer, counts in int64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.register_buffer("scale", torch.tensor(1 / 3, dtype=torch.float64))
        self.register_buffer("total", torch.tensor(2**40))

    def forward(self, indices):
        self.total += 1
        return (self.embedding(indices).double() * self.scale).float()


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_torch(array):
    return to_torch(jnp.array(array, copy=True))


def assert_close(array, tensor, tolerance=1e-6):
    assert array.dtype == to_jax(tensor).dtype
    torch.testing.assert_close(as_torch(array), tensor.detach(), rtol=tolerance, atol=tolerance)


def assert_same_state(module, torch_module, tolerance=1e-6):
    expected = {**dict(torch_module.named_parameters()), **dict(torch_module.named_buffers())}
    arrays = module.arrays()
    assert list(arrays) == list(expected)
    for name, tensor in expected.items():
        assert_close(arrays[name], tensor, tolerance)


# One model


def test_outputs_gradients_and_names_are_those_of_torch() -> None:
    model, x = mlp(), inputs(3, 4)
    module = translate(model, x)
    assert isinstance(module, TorchModule)
    assert module.report()[0].largest < 1e-12
    assert list(module.arrays()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert_close(module(to_jax(x)), model(x))
    loss, grads = nnx.value_and_grad(lambda module: (module(to_jax(x)) ** 2).sum())(module)
    expected = (model(x) ** 2).sum()
    expected.backward()
    assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        assert_close(grads[name].get_value(), parameter.grad)
    input_grad = jax.grad(lambda x: (module(x) ** 2).sum())(to_jax(x))
    x.requires_grad_()
    (model(x) ** 2).sum().backward()
    assert_close(input_grad, x.grad)


def test_the_module_is_a_copy() -> None:
    model, x = mlp(), inputs(3, 4)
    module = TorchModule(model)
    before = model(x)
    with torch.no_grad():
        model[0].weight.zero_()
    model.append(nn.Tanh())
    assert_close(module(to_jax(x)), before)


def test_tied_tensors_are_one_variable() -> None:
    model, x = Tied(), inputs(3, 4)
    module = TorchModule(model)
    assert list(nnx.state(module)) == ["first.weight"]
    assert module["again.weight"] is module["first.weight"]
    grads = nnx.grad(lambda module: module(to_jax(x)).sum())(module)
    model(x).sum().backward()
    assert_close(grads["first.weight"].get_value(), model.first.weight.grad)
    with pytest.raises(InvalidInput, match="'nothing'"):
        module["nothing"]


def test_frozen_parameters_are_no_param() -> None:
    model, x = mlp(), inputs(3, 4)
    model[0].weight.requires_grad_(False)
    module = TorchModule(model)
    assert list(nnx.state(module, Frozen)) == ["0.weight"]
    grads = nnx.grad(lambda module: module(to_jax(x)).sum())(module)
    assert sorted(grads) == ["0.bias", "2.bias", "2.weight"]


def test_batch_norm_keeps_its_statistics_and_modes() -> None:
    model = normalised()
    module = TorchModule(model)
    assert sorted(nnx.state(module, nnx.BatchStat)) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    for seed in range(3):
        x = inputs(6, 4, seed=seed)
        assert_close(module(to_jax(x)), model(x), 5e-6)
    assert_same_state(module, model)
    assert int(module["1.num_batches_tracked"][...]) == 3
    module.eval()
    model.eval()
    assert_close(module(to_jax(x)), model(x))
    assert_same_state(module, model)
    module.train()
    model.train()
    assert_close(module(to_jax(x)), model(x), 5e-6)
    viewed = nnx.view(module, deterministic=True)
    assert_close(viewed(to_jax(x)), model.eval()(x))


def test_submodules_start_in_their_own_modes() -> None:
    model, x = normalised(), inputs(6, 4)
    model[1].eval()
    module = TorchModule(model)
    assert_close(module(to_jax(x)), model(x))
    assert int(module["1.num_batches_tracked"][...]) == 0
    # Also after a time in another mode, for inputs of another form.
    module.eval()
    module(to_jax(x))
    module.train()
    module(to_jax(x))
    assert int(module["1.num_batches_tracked"][...]) == 1
    module.deterministic = None
    module(to_jax(inputs(5, 4)))
    assert int(module["1.num_batches_tracked"][...]) == 1


def test_eval_of_a_module_that_holds_one() -> None:
    class Parent(nnx.Module):
        def __init__(self) -> None:
            self.child = TorchModule(dropping())

    parent = Parent()
    parent.eval()
    assert parent.child.deterministic
    assert parent.child(jnp.ones((2, 4))).shape == (2, 50)


def test_dropout_takes_its_numbers_from_rngs() -> None:
    model, x = dropping(), jnp.ones((3, 4))
    module = TorchModule(model)
    for wrong in (None, nnx.Rngs(params=0), 3):
        with pytest.raises(InvalidInput, match="draws random numbers"):
            module(x, rngs=wrong)
    first, again = (module(x, rngs=nnx.Rngs(0)) for _ in range(2))
    assert (first == again).all()
    assert 30 < int((first == 0).sum()) < 120
    rngs = nnx.Rngs(dropout=0)
    assert (module(x, rngs=rngs) != module(x, rngs=rngs)).any()
    key = jax.random.key(3)
    assert (module(x, rngs=key) == module(x, rngs=key)).all()
    assert (module(x, rngs=key) == jax.jit(module.apply)(module.arrays(), key, x)[0]).all()
    assert (module(x, rngs=nnx.Rngs(5).dropout) == module(x, rngs=nnx.Rngs(5))).all()
    module.eval()
    assert_close(module(x), model.eval()(torch.ones(3, 4)))


def test_training_with_optax_is_training_in_torch() -> None:
    model = normalised()
    module = translate(model, inputs(6, 4))
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)
    torch_optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    @nnx.jit
    def step(module, optimizer, x, y):
        loss, grads = nnx.value_and_grad(lambda module: ((module(x) - y) ** 2).mean())(module)
        optimizer.update(module, grads)
        return loss

    for seed in range(5):
        x, y = inputs(6, 4, seed=seed), inputs(6, 2, seed=50 + seed)
        loss = step(module, optimizer, to_jax(x), to_jax(y))
        torch_optimizer.zero_grad()
        expected = F.mse_loss(model(x), y)
        expected.backward()
        torch_optimizer.step()
        assert_close(loss, expected, 1e-5)
    # The bias before the normalisation has gradient zero, so Adam divides noise by noise there.
    with torch.no_grad():
        model[0].bias.copy_(as_torch(module["0.bias"].get_value()))
        model[1].running_mean.copy_(as_torch(module["1.running_mean"].get_value()))
    assert_same_state(module, model, 2e-5)


def test_split_merge_copies_and_pure_functions() -> None:
    model, x = normalised(), inputs(6, 4)
    module = TorchModule(model)
    definition, parameters, statistics = nnx.split(module, nnx.Param, nnx.BatchStat)

    @jax.jit
    def run(parameters, statistics, x):
        merged = nnx.merge(definition, parameters, statistics)
        outputs = merged(x)
        return outputs, nnx.state(merged, nnx.BatchStat)

    outputs, statistics = run(parameters, statistics, to_jax(x))
    copied, flat, state = copy.deepcopy(module), module.arrays(), nnx.state(module)
    applied, new_flat = jax.jit(module.apply)(flat, None, to_jax(x))
    applied_too, new_state = jax.jit(module.apply)(state, None, to_jax(x))
    expected = model(x)
    for array in (outputs, applied, applied_too, copied(to_jax(x))):
        assert_close(array, expected, 5e-6)
    assert isinstance(new_state, nnx.State)
    assert isinstance(new_state["0.weight"], nnx.Param)
    counter = "1.num_batches_tracked"
    counts = [statistics[counter].get_value(), new_flat[counter], new_state[counter].get_value(), copied[counter][...]]
    assert [int(count) for count in counts] == [1, 1, 1, 1]
    assert int(module[counter][...]) == 0
    nnx.update(module, new_state)
    assert_same_state(module, model)
    with pytest.raises(InvalidInput, match=r"missing \['0\.weight'\]"):
        module.apply({name: array for name, array in flat.items() if name != "0.weight"}, None, to_jax(x))


def test_first_use_inside_jit_is_verified_too() -> None:
    model, x = mlp(), inputs(3, 4)
    module = TorchModule(model)
    loss = jax.jit(jax.value_and_grad(lambda state, x: (module.apply(state, None, x)[0] ** 2).sum()))
    value, grads = loss(module.arrays(), to_jax(x))
    assert module.report()[0].largest < 1e-12
    (model(x) ** 2).sum().backward()
    assert_close(value, (model(x) ** 2).sum())
    assert_close(grads["0.weight"], model[0].weight.grad)
    # Nothing of the trace is kept.
    assert_close(jax.vmap(module)(to_jax(x)), model(x))
    jax.make_jaxpr(module)(to_jax(x))


@pytest.mark.parametrize("transform", [jax.jit, nnx.jit, jax.vmap, jax.jacfwd])
def test_first_use_inside_a_transform(transform) -> None:
    """A tensor that the module holds as a plain attribute becomes a constant; slices and lists stay what they are."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = torch.arange(4.0)

        def forward(self, x, rows):
            return (x + self.shift)[..., rows]

    module, x = TorchModule(Shifted()), inputs(3, 4)
    with jax.checking_leaks():
        result = transform(lambda x: module(x, slice(1, 3)))(to_jax(x))
    if transform is not jax.jacfwd:
        assert_close(result, (x + torch.arange(4.0))[:, 1:3])
    assert_close(module(to_jax(x), slice(0, 1)), (x + torch.arange(4.0))[:, :1])


def test_made_up_values_suit_the_function() -> None:
    """Probabilities, and indices into a table of one row."""
    rows, x = inputs(1, 3), torch.rand(4, generator=torch.Generator().manual_seed(0))
    function = translate(F.embedding, torch.tensor([0]), rows)
    assert_close(jax.jit(function)(jnp.zeros(5, int), to_jax(rows)), rows.expand(5, 3))
    entropy = translate(F.binary_cross_entropy, x, x)
    assert_close(jax.jit(entropy)(to_jax(x[:3]), to_jax(x[:3])), F.binary_cross_entropy(x[:3], x[:3]))


def test_a_wrong_translation_is_refused_inside_jit(monkeypatch) -> None:
    from bridge.ops.registry import LOWERINGS

    monkeypatch.setitem(LOWERINGS, torch.ops.aten.tanh.default, lambda operation, x: jnp.tanh(x) * (1 + 1e-6))
    module = TorchModule(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), translator="graph")
    with pytest.raises(Unsupported, match="differs from PyTorch"):
        jax.jit(module)(jnp.ones((2, 4)))
    unchecked = TorchModule(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), translator="graph", verify=False)
    assert jax.jit(unchecked)(jnp.ones((2, 4))).shape == (2, 3)
    assert unchecked.report()[0].largest is None


def test_results_keep_their_structure() -> None:
    low, high = inputs(2, 3), inputs(2, 3, seed=2)
    module = translate(Structured(), {"low": low, "high": high}, scale=2.0)
    result = module({"low": to_jax(low), "high": np.asarray(high)}, scale=2.0)
    assert list(result) == ["both", "name", "none", "list"]
    assert isinstance(result["both"], Structured.Result)
    assert_close(result["both"].low, low * 2)
    assert_close(result["both"].high, high + 1)
    assert_close(result["list"][0], low.argmax(-1))
    assert (result["name"], result["none"], result["list"][1]) == ("x", None, torch.float32)
    assert_close(module({"low": to_jax(low), "high": to_jax(high)})["both"].low, low)


@pytest.mark.parametrize("x64", [False, True])
def test_dtypes_are_those_of_torch(x64) -> None:
    """With or without 64-bit types where the module is called."""
    with jax.enable_x64(x64):
        model, indices = Indexed(), torch.tensor([1, 2, 5, 2])
        module = TorchModule(model)
        given = jnp.array([1, 2, 5, 2])
        assert given.dtype == (jnp.int64 if x64 else jnp.int32)
        step = nnx.jit(nnx.value_and_grad(lambda module, indices: (module(indices) ** 2).sum()))
        for _ in range(2):
            loss, grads = step(module, given)
            model.zero_grad()
            expected = (model(indices) ** 2).sum()
            expected.backward()
            assert_close(loss, expected)
            assert_close(grads["embedding.weight"].get_value(), model.embedding.weight.grad)
        assert_same_state(module, model)
        assert int(module["total"][...]) == 2**40 + 2


def test_float64_needs_64_bits_outside_only_where_others_compute() -> None:
    model, x = nn.Linear(4, 2).double(), inputs(3, 4).double()
    module = TorchModule(model)
    assert_close(module(to_jax(x)), model(x), 1e-15)
    narrowed = {name: array.astype(jnp.float32) for name, array in module.arrays().items()}
    with pytest.raises(InvalidInput, match=r"'weight': received float32 .* expected float64 .* jax.enable_x64"):
        module.apply(narrowed, None, to_jax(x))
    with torch_dtypes():
        grads = nnx.grad(lambda module: (module(to_jax(x)) ** 2).sum())(module)
    (model(x) ** 2).sum().backward()
    assert_close(grads["weight"].get_value(), model.weight.grad, 1e-14)


def test_positions_of_extremes_in_a_jitted_program() -> None:
    """JAX writes the instructions for some int64 operations only where 64-bit types are on."""
    x = inputs(5, 7)
    function = translate(torch.argmin, x, dim=-1)
    assert_close(function(to_jax(x), dim=-1), x.argmin(-1))
    with jax.enable_x64(True):
        assert_close(jax.jit(lambda x: function(x, dim=-1))(to_jax(x)), x.argmin(-1))


def test_what_cannot_become_a_flax_module_is_refused() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_models = nn.Parameter(torch.ones(1))

    hooked = mlp()
    hooked[0].register_full_backward_hook(lambda *_: None)
    for model, error, message in (
        (Named(), Unsupported, "'num_models'"),
        (hooked, Unsupported, r"0 \(Linear\) has backward hooks"),
        (nn.LazyLinear(2), InvalidInput, "no shape yet"),
        (3, InvalidInput, "expected a torch.nn.Module"),
    ):
        with pytest.raises(error, match=message):
            TorchModule(model)
    with pytest.raises(InvalidInput, match="'weight'"):
        TorchModule(nn.Linear(2, 2), values={"weight": jnp.ones((2, 3)), "bias": jnp.ones(2)})
    with pytest.raises(InvalidInput, match="without num_models"):
        TorchModule(nn.Linear(2, 2))(jnp.ones((1, 2, 2)), per_model=True)
    with pytest.raises(InvalidInput, match="or a function"):
        translate(3)
    with pytest.raises(InvalidInput, match="translator"):
        translate(torch.sin, torch.ones(2), translator="none")


def test_a_pass_leaves_nothing_behind() -> None:
    class Keeps(nn.Module):
        def forward(self, x):
            previous = getattr(self, "features", None)
            self.features = x * 2
            return self.features if previous is None else previous

    model = TorchModule(Keeps())
    for _ in range(2):
        assert_close(model(jnp.ones(3)), 2 * torch.ones(3))
    assert_close(model(jnp.ones(4)), 2 * torch.ones(4))


def test_containers_that_hold_tensors_only() -> None:
    pack = nn.utils.rnn.PackedSequence
    sizes = torch.tensor([2, 1])
    packed = pack(inputs(3, 4), sizes)
    function = translate(lambda packed: packed.data * 2, packed)
    assert_close(function(packed), packed.data * 2)
    with pytest.raises(Unsupported, match="PackedSequence"):
        translate(lambda x: pack(x, sizes), packed.data)(to_jax(packed.data))


# Many models


def stacked(models, **options):
    names = [*dict(models[0].named_parameters()), *dict(models[0].named_buffers())]
    tensors = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in models]
    values = {name: torch.stack([own[name].detach() for own in tensors]) for name in names}
    return TorchModule(models[0], num_models=len(models), values=values, **options)


@pytest.mark.parametrize("per_model", [False, True])
@pytest.mark.parametrize("convolution", ["native", "matmul"])
def test_stacked_models_equal_each_alone(per_model, convolution) -> None:
    def convolutional():
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))

    models = [convolutional() for _ in range(3)]
    module = stacked(models, convolution=convolution)
    x = inputs(3, 5, 2, 4, 4) if per_model else inputs(5, 2, 4, 4)

    @nnx.jit
    def run(module, x):
        return nnx.value_and_grad(lambda module: (module(x, per_model=per_model) ** 2).sum())(module)

    loss, grads = run(module, to_jax(x))
    expected = [(model(x[i] if per_model else x) ** 2).sum() for i, model in enumerate(models)]
    sum(expected).backward()
    assert_close(loss, sum(expected), 1e-5)
    for index, model in enumerate(models):
        for name, parameter in model.named_parameters():
            assert_close(grads[name].get_value()[index], parameter.grad, 2e-5)
        for name, buffer in model.named_buffers():
            assert_close(module[name].get_value()[index], buffer)
    state, fresh = stacked(models).arrays(), TorchModule(models[0], num_models=3)
    applied, _ = jax.jit(lambda state, x: fresh.apply(state, None, x, per_model=per_model))(state, to_jax(x))
    for index, model in enumerate(models):
        assert_close(applied[index], model(x[index] if per_model else x), 1e-5)
    if per_model:
        with pytest.raises(InvalidInput, match=r"received shape \(2, 5, 2, 4, 4\); expected \[3, \.\.\.\]"):
            module(jnp.ones((2, 5, 2, 4, 4)), per_model=True)


def test_stacked_models_draw_their_own_numbers() -> None:
    model, x, key = dropping(), jnp.ones((3, 4)), jax.random.key(0)
    alone, module = TorchModule(model), TorchModule(model, num_models=3)
    outputs = module(x, rngs=key)
    for index in range(3):
        torch.testing.assert_close(
            as_torch(outputs[index]), as_torch(alone(x, rngs=jax.random.fold_in(key, index))), rtol=1e-6, atol=1e-6
        )
    assert (outputs[0] != outputs[1]).any()
    larger = TorchModule(model, num_models=5)(x, rngs=key)
    assert ((larger[:3] == 0) == (outputs == 0)).all()


def test_models_without_tensors() -> None:
    module = TorchModule(nn.Tanh(), num_models=3)
    assert module(jnp.ones(4)).shape == (3, 4)


# There and back


def batch(make=normalised, num_models=3, **options):
    torch.manual_seed(3)
    mb = ModelBatch([make() for _ in range(num_models)], backend="jax", **options)
    return mb


def train(mb, steps):
    step = mb.make_train_step(F.mse_loss, torch.optim.Adam(mb.parameters(), lr=0.01))
    for seed in range(steps):
        step(inputs(6, 4, seed=seed), inputs(6, 2, seed=9 + seed))


def values(mb):
    stacks = {**mb.stacked_params, **mb.stacked_buffers}
    return {name: tensor.detach().clone() for name, tensor in stacks.items()}


def assert_values(mb, expected):
    for name, tensor in values(mb).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_batch_goes_to_flax_and_comes_back() -> None:
    mb, x = batch(), inputs(6, 4)
    train(mb, 2)
    module = mb.to_flax()
    kept = values(mb)
    # What the batch does later, giving its arrays away, leaves the module alone.
    train(mb, 2)
    for name, array in module.arrays().items():
        assert torch.equal(as_torch(array), kept[name])
    # Trained in JAX, and loaded back.
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        optimizer.update(module, nnx.grad(lambda module: (module(x) ** 2).sum())(module))

    for _ in range(2):
        step(module, optimizer, to_jax(x))
    mb.load_flax(module)
    assert_values(mb, {name: as_torch(array) for name, array in module.arrays().items()})
    mb.eval()
    module.eval()
    assert_close(module(to_jax(x)), mb(x))
    # The module keeps its arrays when the batch trains on.
    mb.train()
    train(mb, 2)
    assert module(to_jax(x)).shape == (3, 6, 2)


def test_the_options_of_the_batch_go_along() -> None:
    for convolution, grouped in (("native", True), ("matmul", False)):
        mb = batch(lambda: nn.Conv1d(2, 3, 3), backend_options={"convolution": convolution, "verify": False})
        module = mb.to_flax()
        assert ("conv_general_dilated" in str(jax.make_jaxpr(module)(jnp.ones((2, 2, 5))))) is grouped
        assert module.report()[0].largest is None


def test_every_form_of_a_state_is_taken() -> None:
    source, mb = batch(), batch()
    train(source, 1)
    expected = values(source)
    module = source.to_flax()
    numpy = {name: np.asarray(array) for name, array in module.arrays().items()}
    for given in (nnx.state(module), module.arrays(), numpy):
        train(mb, 1)
        mb.load_flax(given)
        assert_values(mb, expected)


def test_what_does_not_fit_changes_nothing() -> None:
    mb = batch()
    train(mb, 1)
    before, good = values(mb), mb.to_flax().arrays()
    gone = jnp.ones((3, 2)) + 1
    gone.delete()
    for changed, message in (
        ({"3.bias": None}, r"'3\.bias': received a NoneType"),
        ({"3.bias": jnp.ones((2, 2))}, r"'3\.bias': received float32 of shape \(2, 2\); expected float32 .*\(3, 2\)"),
        ({"3.bias": jnp.ones((3, 2), jnp.bfloat16)}, r"'3\.bias': received bfloat16 .*; expected float32"),
        ({"1.num_batches_tracked": jnp.ones(3, jnp.int32)}, "received int32 .*; expected int64"),
        ({"3.bias": gone}, "deleted"),
        ({"other": jnp.ones(3)}, r"missing \[\], unknown \['other'\]"),
    ):
        given = {"0.weight": good["0.weight"] + 1, **{k: v for k, v in good.items() if k != "0.weight"}, **changed}
        with pytest.raises(InvalidState, match=message) as caught:
            mb.load_flax(given)
        assert str(caught.value).endswith("Nothing was loaded.")
        assert_values(mb, before)
    with pytest.raises(InvalidState, match=r"missing \['3\.bias'\]"):
        mb.load_flax({name: array for name, array in good.items() if name != "3.bias"})
    with pytest.raises(InvalidState, match="received list"):
        mb.load_flax([])
    for wrong in (batch(num_models=2).to_flax(), batch(make=mlp).to_flax()):
        with pytest.raises(InvalidState, match=r"Nothing was loaded\."):
            mb.load_flax(wrong)
    assert_values(mb, before)


def test_the_torch_backend_has_no_flax_form() -> None:
    mb = ModelBatch([mlp()], backend="torch")
    for call in (mb.to_flax, lambda: mb.load_flax({})):
        with pytest.raises(Unsupported, match="backend='jax'"):
            call()


# Functions


def test_a_loss_function_becomes_a_function_of_arrays() -> None:
    logits, labels = inputs(5, 3), torch.tensor([0, 2, 1, 1, 0])
    loss = translate(F.cross_entropy, logits, labels, label_smoothing=0.1)
    report = loss.report()[0]
    assert report.inputs == ("float32[5, 3]", "int64[5]")
    assert report.largest < 1e-12
    run = jax.jit(jax.value_and_grad(lambda x, y: loss(x, y, label_smoothing=0.1)))
    value, grad = run(to_jax(logits), jnp.array(labels.tolist()))
    logits.requires_grad_()
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected.backward()
    assert_close(value, expected)
    assert_close(grad, logits.grad)
    assert len(loss.report()) == 1
    assert_close(loss(to_jax(logits), to_jax(labels)), F.cross_entropy(logits, labels))
    assert len(loss.report()) == 2


def test_only_marked_inputs_of_a_function_are_differentiated() -> None:
    """PyTorch has no gradient of class weights, and refuses to be asked for one."""
    logits, labels, weight = inputs(5, 3), torch.tensor([0, 2, 1, 1, 0]), torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(RuntimeError, match="not differentiable"):
        translate(F.cross_entropy, logits, labels, weight)
    loss = translate(F.cross_entropy, logits.clone().requires_grad_(), labels, weight)
    assert_close(loss(to_jax(logits), to_jax(labels), to_jax(weight)), F.cross_entropy(logits, labels, weight))


def test_a_function_that_draws_needs_a_key() -> None:
    function = translate(lambda x: x + torch.rand_like(x), torch.zeros(100))
    with pytest.raises(InvalidInput, match="no key"):
        function(jnp.zeros(100))
    first, again, other = (function(jnp.zeros(100), key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert 0.3 < float(first.mean()) < 0.7


def test_functions_that_cannot_be_translated_say_why() -> None:
    with pytest.raises(Unsupported, match=r"\.item\(\)"):
        translate(lambda x: x * x.sum().item(), torch.ones(3), translator="graph")
    with pytest.raises(ModelBatchError, match="may hold tensors"):
        translate(lambda x: object(), torch.ones(3), translator="graph")
