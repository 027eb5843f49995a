"""Layers in JAX compute what they compute in PyTorch: outputs and gradients, in float64, stacked over models too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, tensor
from torch.utils import _pytree as pytree

jax = pytest.importorskip("jax")

from bridge.arrays import to_jax  # noqa: E402
from bridge.lowering import missing, run  # noqa: E402
from bridge.ops.functions import own_gradient  # noqa: E402
from bridge.ops.recurrent import recurrent, recurrent_dropout  # noqa: E402
from bridge.trace import Traced, trace  # noqa: E402
from mb_torch.errors import Unsupported  # noqa: E402

MODELS = 3
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _sixty_four_bits():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(before)


def _tensors(results: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def _weight_like(result: Tensor) -> Tensor:
    return torch.sin(torch.arange(result.numel()) * 0.7 + 1).reshape(result.shape).to(result.dtype)


def _in_torch(
    function: Callable[..., Any], inputs: Sequence[Tensor], floating: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    own = [one.clone().requires_grad_(differentiated) for one, differentiated in zip(inputs, floating, strict=True)]
    results = _tensors(function(*[one * 1 if one.requires_grad else one for one in own]))
    reached = [result for result in results if result.requires_grad]
    slopes = torch.autograd.grad(
        reached,
        [one for one in own if one.requires_grad],
        [_weight_like(result) for result in reached],
        materialize_grads=True,
        allow_unused=True,
    )
    return [result.detach() for result in results], list(slopes)


def compare(
    function: Callable[..., Any], *stacked: Tensor, convolution: str = "native", fixed: Sequence[int] = ()
) -> Traced:
    """Run ``[models, ...]`` inputs through one vmapped program and model by model in PyTorch; return the graph."""
    floating = [one.is_floating_point() and place not in fixed for place, one in enumerate(stacked)]
    first = [one[0].clone().requires_grad_(flows) for one, flows in zip(stacked, floating, strict=True)]
    traced = trace(lambda given: _tensors(function(*given)), first)
    constants = {name: to_jax(constant) for name, constant in traced.constants.items()}
    reached = [
        result.requires_grad for result in _tensors(function(*[one * 1 if one.requires_grad else one for one in first]))
    ]

    def loss(own: Sequence[Any], others: Sequence[Any], weights: Sequence[Any]) -> Any:
        left, right = iter(own), iter(others)
        given = [next(left) if differentiated else next(right) for differentiated in floating]
        results = run(traced, given, constants=constants, convolution=convolution)
        through = [result for result, flows in zip(results, reached, strict=True) if flows]
        return sum((result * weight).sum() for result, weight in zip(through, weights, strict=True)), results

    expected = [_in_torch(function, [one[model] for one in stacked], floating) for model in range(len(stacked[0]))]
    weights = [to_jax(_weight_like(result)) for result, flows in zip(expected[0][0], reached, strict=True) if flows]
    own = [to_jax(one) for one, flows in zip(stacked, floating, strict=True) if flows]
    others = [to_jax(one) for one, flows in zip(stacked, floating, strict=True) if not flows]
    gradient = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), in_axes=(0, 0, None)))
    slopes, results = gradient(own, others, weights)
    for model, (outputs, others_slopes) in enumerate(expected):
        for result, other in zip(results, outputs, strict=True):
            assert str(result.dtype) == str(other.dtype).removeprefix("torch.")
            np.testing.assert_allclose(np.asarray(result[model]), other.numpy(), rtol=1e-9, atol=1e-9)
        for slope, other in zip(slopes, others_slopes, strict=True):
            np.testing.assert_allclose(np.asarray(slope[model]), other.numpy(), rtol=1e-9, atol=1e-9)
    return traced


def draw(function: Callable[..., Any], *inputs: Tensor, seed: int = 0) -> list[np.ndarray]:
    traced = trace(lambda given: _tensors(function(*given)), list(inputs))
    assert traced.draws
    results = run(traced, [to_jax(one) for one in inputs], jax.random.key(seed))
    return [np.asarray(result) for result in results]


CONVOLUTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d": (1, {}),
    "1d, stride, padding, dilation": (1, {"stride": 2, "padding": 2, "dilation": 2}),
    "2d": (2, {"padding": 1}),
    "2d, one number for each axis": (2, {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "2d, groups": (2, {"stride": 2, "padding": 1, "groups": 2}),
    "2d, depthwise": (2, {"padding": 1, "groups": 4}),
    "3d": (3, {"stride": 2, "padding": 1}),
}


@pytest.mark.parametrize("form", ["native", "matmul"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, form: str):
    axes, settings = CONVOLUTIONS[name]
    convolve = getattr(F, f"conv{axes}d")
    images = torch.randn(MODELS, 2, 4, *(6, 5, 4)[:axes])
    weight = torch.randn(MODELS, 4, 4 // settings.get("groups", 1), *(3, 2, 2)[:axes])
    compare(lambda x, w, b: convolve(x, w, b, **settings), images, weight, torch.randn(MODELS, 4), convolution=form)


TRANSPOSED: dict[str, tuple[int, dict[str, Any]]] = {
    "1d": (1, {}),
    "1d, stride, output padding": (1, {"stride": 3, "padding": 1, "output_padding": 2}),
    "2d, stride, groups": (2, {"stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 2}),
    "2d, dilation": (2, {"padding": 2, "dilation": 2, "output_padding": 1}),
    "3d": (3, {"stride": 2, "padding": 1}),
}


@pytest.mark.parametrize("form", ["native", "matmul"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolution(name: str, form: str):
    axes, settings = TRANSPOSED[name]
    convolve = getattr(F, f"conv_transpose{axes}d")
    images = torch.randn(MODELS, 2, 4, *(4, 3, 3)[:axes])
    weight = torch.randn(MODELS, 4, 2, *(3, 2, 2)[:axes])
    compare(lambda x, w: convolve(x, w, **settings), images, weight, convolution=form)


def test_convolution_by_one_element_and_of_nothing():
    compare(lambda x, w: F.conv2d(x, w), torch.randn(2, 3, 4, 2, 2), torch.randn(2, 5, 4, 1, 1), convolution="matmul")
    empty = torch.randn(2, 0, 4, 5, 5)
    for form in ("native", "matmul"):
        compare(lambda x, w: F.conv2d(x, w), empty, torch.randn(2, 5, 4, 3, 3), convolution=form)


def _ties(*shape: int) -> Tensor:
    return torch.randint(0, 3, shape).to(torch.float64)


POOLS: dict[str, tuple[Callable[[Tensor], Any], Sequence[int]]] = {
    "max, ties": (lambda x: F.max_pool2d(x, 2, return_indices=True), (2, 3, 7, 6)),
    "max, overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True), (2, 3, 7, 6)),
    "max, dilation, ceil": (lambda x: F.max_pool2d(x, 2, 2, 1, 2, True, return_indices=True), (2, 3, 7, 6)),
    "max, 1d": (lambda x: F.max_pool1d(x, 3, 2, ceil_mode=True), (2, 3, 8)),
    "max, 3d": (lambda x: F.max_pool3d(x, 2, 1, 1, return_indices=True), (2, 2, 3, 4, 3)),
    "adaptive max": (lambda x: F.adaptive_max_pool2d(x, (3, 2), return_indices=True), (2, 3, 7, 6)),
    "average, ceil, padding counts": (lambda x: F.avg_pool2d(x, 3, 2, 1, True), (2, 3, 8, 6)),
    "average, ceil, padding does not": (lambda x: F.avg_pool2d(x, 3, 2, 1, True, False), (2, 3, 8, 6)),
    "average, own divisor": (lambda x: F.avg_pool3d(x, 2, divisor_override=3), (2, 2, 4, 3, 4)),
    "adaptive average": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), (2, 3, 7, 8)),
    "power average": (lambda x: F.lp_pool2d(x + 1, 3, 2), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name: str):
    function, shape = POOLS[name]
    compare(function, _ties(2, *shape))


def test_max_pooling_of_nan_and_infinity():
    image = torch.randn(1, 1, 4, 6)
    image[0, 0, 0, :2] = NAN
    image[0, 0, 2:, 2:4] = -INF
    compare(lambda x: F.max_pool2d(x, 2, return_indices=True), image[None])


def test_fractional_pooling_by_given_samples():
    samples = torch.rand(2, 2, 3, 2)
    pool = F.fractional_max_pool2d_with_indices
    compare(
        lambda x, s: pool(x, 2, output_size=(3, 4), _random_samples=s), torch.randn(2, 2, 3, 7, 8), samples, fixed=[1]
    )


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_its_statistics(training: bool):
    def normalise(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Any:
        mean, var = mean.clone(), var.clone()
        return F.batch_norm(x, mean, var, w, b, training, 0.3), mean, var

    vectors = [torch.rand(MODELS, 3) + 0.5 for _ in range(4)]
    compare(normalise, torch.randn(MODELS, 4, 3, 2), *vectors, fixed=[3, 4])


def test_running_variance_is_the_unbiased_one():
    def variance(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        F.batch_norm(x, mean, var, training=True, momentum=1.0)
        return var

    batch = torch.randn(5, 2)
    traced = trace(lambda given: [variance(*given)], [batch, torch.zeros(2), torch.ones(2)])
    (result,) = run(traced, [to_jax(one) for one in (batch, torch.zeros(2), torch.ones(2))])
    np.testing.assert_allclose(np.asarray(result), batch.var(0, correction=1).numpy())


def test_batch_norm_by_plain_averages():
    module = nn.BatchNorm1d(2, momentum=None)

    def step(x: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Any:
        own = {"running_mean": mean.clone(), "running_var": var.clone(), "num_batches_tracked": count.clone()}
        return torch.func.functional_call(module, own, (x,)), list(own.values())

    compare(step, torch.randn(2, 5, 2), torch.randn(2, 2), torch.rand(2, 2), tensor([0, 6]), fixed=[1, 2])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, (4, 3)),
        lambda x: F.group_norm(x, 2, torch.arange(4.0)),
        lambda x: F.instance_norm(x),
        lambda x: F.rms_norm(x, (3,)),
        nn.CrossMapLRN2d(3, 0.3, 0.6, 1.5),
    ],
    ids=["layer", "group", "instance", "rms", "cross map"],
)
def test_other_normalisation(function: Callable[[Tensor], Tensor]):
    compare(function, torch.randn(2, 2, 4, 4, 3))


TOKENS = tensor([[1, 2, 2], [0, 2, 4]])


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}, {"max_norm": 0.5, "norm_type": 1.0}],
    ids=str,
)
def test_embedding(settings: dict[str, Any]):
    compare(lambda table: F.embedding(TOKENS, table, **settings), torch.randn(2, 5, 3))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str, padding: int | None):
    def bags(table: Tensor) -> Any:
        flat, starts = TOKENS.reshape(-1), tensor([0, 2, 2, 5])
        ends = tensor([0, 3, 6])
        settings = {"mode": mode, "padding_idx": padding}
        return (
            F.embedding_bag(TOKENS, table, **settings),
            F.embedding_bag(flat, table, starts, **settings),
            F.embedding_bag(flat, table, ends, include_last_offset=True, **settings),
        )

    compare(bags, torch.randn(2, 5, 3).round(decimals=0))


def test_embedding_bag_weighs_its_rows():
    def bag(table: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(TOKENS, table, mode="sum", per_sample_weights=weights, padding_idx=0)

    compare(bag, torch.randn(2, 5, 3), torch.randn(2, 2, 3))


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "nearest", "scale_factor": 2},
        {"mode": "nearest", "size": (5, 3)},
        {"mode": "nearest-exact", "scale_factor": 1.7},
        {"mode": "bilinear", "size": (5, 9)},
        {"mode": "bilinear", "scale_factor": 1.7, "align_corners": True},
        {"mode": "bicubic", "scale_factor": 0.6},
        {"mode": "bicubic", "size": (3, 2), "antialias": True},
    ],
    ids=str,
)
def test_interpolation(settings: dict[str, Any]):
    compare(lambda x: F.interpolate(x, **settings), torch.randn(2, 1, 2, 4, 6))


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", pytest.param("bicubic", marks=pytest.mark.long)])
def test_grid_sampling(mode: str, padding: str):
    grid = torch.rand(2, 2, 3, 4, 2) * 3 - 1.5
    compare(lambda x, g: F.grid_sample(x, g, mode, padding, align_corners=False), torch.randn(2, 2, 2, 4, 5), grid)


def test_patches():
    compare(lambda x: F.unfold(x, (3, 2), 1, 1, 2), torch.randn(2, 1, 2, 6, 5))
    compare(lambda x: F.fold(x, (5, 6), (2, 3), 1, 1, 2), torch.randn(2, 1, 12, 9))


RECURRENT: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "lstm": (lambda: nn.LSTM(3, 4), (4, 2, 3)),
    "lstm, projected": (lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True), (4, 2, 3)),
    "lstm, no bias": (lambda: nn.LSTM(3, 4, bias=False), (4, 2, 3)),
    "gru": (lambda: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), (2, 4, 3)),
    "gru, unbatched": (lambda: nn.GRU(3, 4), (4, 3)),
    "rnn, tanh": (lambda: nn.RNN(3, 4), (4, 2, 3)),
    "rnn, relu": (lambda: nn.RNN(3, 4, 2, nonlinearity="relu"), (4, 2, 3)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_one_operation(name: str):
    build, shape = RECURRENT[name]
    module = build()
    names = [name for name, _ in module.named_parameters()]
    stacked = [torch.stack([torch.rand_like(one) - 0.5 for _ in range(2)]) for one in module.parameters()]

    def run_layer(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    traced = compare(run_layer, torch.randn(2, *shape), *[one.detach() for one in stacked])
    assert [node.target for node in traced.operations].count(recurrent) == 1
    assert not traced.draws


def test_dropout_between_recurrent_layers():
    module = nn.LSTM(3, 4, 2, dropout=0.5)
    states = [one.detach() for one in module.parameters()]
    names = [name for name, _ in module.named_parameters()]

    def output(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))[0]

    batch = torch.randn(4, 2, 3)
    first, again, other = (draw(output, batch, *states, seed=seed)[0] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    traced = trace(lambda given: [output(*given)], [batch, *states])
    assert [node.target for node in traced.operations].count(recurrent_dropout) == 1


class Straight(torch.autograd.Function):
    """Signs, whose gradient is that of the identity where it is small."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


class Scaled(torch.autograd.Function):
    """The newer form; its backward is no derivative of its forward, so that it is seen to be used."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return x * y * factor, (x > 0).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.factor = inputs[2]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y = ctx.saved_tensors
        return gradient * y * ctx.factor * 3, gradient * x, None


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class LooksAtGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient if gradient.sum().item() > 0 else gradient * 2


def test_own_backward_of_a_function():
    traced = compare(lambda x: Straight.apply(x * 2) * x, torch.randn(2, 3, 4))
    assert own_gradient in [node.target for node in traced.operations]
    assert not missing(traced)
    again = trace(lambda given: [Straight.apply(given[0] * 2) * given[0]], [torch.randn(3, 4).requires_grad_()])
    assert again.text == traced.text
    compare(lambda x, y: Scaled.apply(x.sin(), y, 2.0), torch.randn(2, 3), torch.randn(2, 3))


@pytest.mark.parametrize("function", [InPlace, LooksAtGradients])
def test_functions_whose_gradient_would_be_wrong_are_refused(function: type[torch.autograd.Function]):
    with pytest.raises(Unsupported, match=function.__name__):
        trace(lambda given: [function.apply(given[0] * 2)], [torch.randn(3).requires_grad_()])


def test_draws_have_their_distributions():
    many = torch.zeros(20_000)
    expected = {
        "uniform": (lambda x: torch.rand_like(x), 0.5, 1 / 12),
        "normal": (lambda x: torch.randn_like(x), 0.0, 1.0),
        "exponential": (lambda x: x.clone().exponential_(2.0), 0.5, 0.25),
        "geometric": (lambda x: x.clone().geometric_(0.25), 4.0, 12.0),
        "bernoulli": (lambda x: torch.bernoulli(x + 0.3), 0.3, 0.21),
        "dropout": (lambda x: F.dropout(x + 1, 0.2), 1.0, 0.25),
        "integers": (lambda x: torch.randint_like(x, 4), 1.5, 1.25),
        "poisson": (lambda x: torch.poisson(x + 3), 3.0, 3.0),
        "log-normal": (lambda x: x.clone().log_normal_(0.0, 0.5).log(), 0.0, 0.25),
    }
    for name, (function, mean, variance) in expected.items():
        (values,) = draw(function, many)
        assert values.mean() == pytest.approx(mean, abs=5 * (variance / len(many)) ** 0.5), name
        assert values.var() == pytest.approx(variance, rel=0.1), name


def test_multinomial_and_permutation():
    weights = tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 2.0]])
    (places,) = draw(lambda w: torch.multinomial(w, 4000, replacement=True), weights)
    assert (places[0] == 2).mean() == pytest.approx(0.75, abs=0.05)
    assert not (places[0] == 1).any()
    (once,) = draw(lambda w: torch.multinomial(w, 2), weights)
    assert sorted(once[0]) == [0, 2]
    assert sorted(once[1]) == [1, 2]
    (order,) = draw(lambda x: torch.randperm(10) + x.long(), torch.zeros(10))
    assert sorted(order) == list(range(10))


def test_leaky_relu_with_drawn_slopes():
    x = torch.linspace(-2, 2, 4000)
    (values,) = draw(lambda x: F.rrelu(x, 0.1, 0.4, training=True), x)
    slopes = (values / x.numpy())[:2000]
    assert slopes.min() >= 0.1
    assert slopes.max() <= 0.4
    assert slopes.mean() == pytest.approx(0.25, abs=0.01)
    assert (values[2000:] == x.numpy()[2000:]).all()


def test_draws_are_functions_of_the_key_alone():
    x = torch.ones(50, dtype=torch.float32)
    traced = trace(lambda given: [F.dropout(given[0], 0.5) + torch.randn_like(given[0])], [x])
    keys = jax.random.split(jax.random.key(3), 4)
    array = to_jax(x)
    together = jax.vmap(lambda key: run(traced, [array], key)[0])(keys)
    assert str(together.dtype) == "float32"
    for key, own in zip(keys, together, strict=True):
        np.testing.assert_array_equal(np.asarray(run(traced, [array], key)[0]), np.asarray(own))
    assert len(np.unique(np.asarray(together), axis=0)) == 4


def test_single_precision_draws_need_no_double_precision():
    x = torch.ones(50, dtype=torch.float32)
    layer = lambda x: F.rrelu(F.dropout(x, 0.5), training=True) * torch.rand_like(x) + x.clone().exponential_()  # noqa: E731
    traced = trace(lambda given: [layer(given[0])], [x])
    text = jax.jit(lambda array, key: run(traced, [array], key)).lower(to_jax(x), jax.random.key(0)).as_text()
    assert "tensor<50xf64>" not in text
