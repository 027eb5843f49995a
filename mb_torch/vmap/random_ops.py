"""What random functions of torch do when a model draws from its own stream.

Two tables: `REPLACEMENTS` (functions that draw, made anew on a `Stream`, and those that have no such form and
raise), and `COMPOSITES` (Python functions of torch that draw by calling the former; their own body runs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import init

from mb_torch.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from mb_torch.vmap.rng import Stream

COVERED = (
    "the dropout family, scaled_dot_product_attention, rrelu, gumbel_softmax, rand, randn, normal, bernoulli, "
    "multinomial, bernoulli_, uniform_, normal_, exponential_"
)

Replacement = TypeVar("Replacement", bound=Callable[..., Any])

REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {}


def _replaces(*functions: Callable[..., Any]) -> Callable[[Replacement], Replacement]:
    """Register a replacement; its arguments are a stream and those of the functions, but ``generator`` and ``out``."""

    def register(replacement: Replacement) -> Replacement:
        for function in functions:
            REPLACEMENTS[function] = _own_generator(function, replacement)
        return replacement

    return register


def _own_generator(function: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse the caller's generator, which would make a model's numbers depend on its companions, and ``out=``."""
    name = function.__name__

    def call(stream: Stream, *args: Any, generator: object = None, out: object = None, **kwargs: Any) -> Any:
        if generator is not None or any(isinstance(arg, torch.Generator) for arg in args):
            raise Unsupported(
                f"{name} was given a generator, which cannot be one per model",
                fix="Leave out seeds=, or call it without generator=.",
            )
        if out is not None:
            raise Unsupported(f"{name} was given out=", fix="Leave out seeds=, or use the returned tensor.")
        return replacement(stream, *args, **kwargs)

    return call


# Dropout


@_replaces(F.dropout)
def _functional_dropout(
    stream: Stream, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return _dropout(stream, input, p, training, inplace=inplace)


@_replaces(torch.dropout)
def _dropout(stream: Stream, input: Tensor, p: float, train: bool, *, inplace: bool = False) -> Tensor:
    return _scaled(stream, input, input.shape, p, train, inplace)


@_replaces(torch.dropout_)
def _dropout_(stream: Stream, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(stream, input, p, train, inplace=True)


@_replaces(torch.feature_dropout)
def _feature_dropout(stream: Stream, input: Tensor, p: float, train: bool) -> Tensor:
    return _scaled(stream, input, _feature_shape(input), p, train, inplace=False)


@_replaces(torch.feature_dropout_)
def _feature_dropout_(stream: Stream, input: Tensor, p: float, train: bool) -> Tensor:
    return _scaled(stream, input, _feature_shape(input), p, train, inplace=True)


@_replaces(torch.native_dropout)
def _native_dropout(stream: Stream, input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    _check_probability(p)
    if train is False or input.numel() == 0:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    kept = stream.below(1 - p, input.shape, input.device) if 0 < p < 1 else torch.full_like(input, p == 0).bool()
    return input * kept * (1 / (1 - p) if p < 1 else 0.0), kept


def _scaled(stream: Stream, input: Tensor, shape: Sequence[int], p: float, train: bool, inplace: bool) -> Tensor:
    """Zero elements with probability ``p``, one decision for each element of ``shape``, and scale up the others."""
    _check_probability(p)
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        factors = input.new_zeros(())
    else:
        # Multiplied, not selected: what is not finite stays visible, as in torch.
        factors = stream.below(1 - p, shape, input.device).to(input.dtype).mul_(1 / (1 - p))
    return input.mul_(factors) if inplace else input * factors


@_replaces(torch.alpha_dropout)
def _alpha_dropout(stream: Stream, input: Tensor, p: float, train: bool) -> Tensor:
    return _self_normalising(stream, input, input.shape, p, train, inplace=False)


@_replaces(torch.alpha_dropout_)
def _alpha_dropout_(stream: Stream, input: Tensor, p: float, train: bool) -> Tensor:
    return _self_normalising(stream, input, input.shape, p, train, inplace=True)


@_replaces(torch.feature_alpha_dropout)
def _feature_alpha_dropout(stream: Stream, input: Tensor, p: float, train: bool) -> Tensor:
    return _self_normalising(stream, input, _feature_shape(input), p, train, inplace=False)


@_replaces(torch.feature_alpha_dropout_)
def _feature_alpha_dropout_(stream: Stream, input: Tensor, p: float, train: bool) -> Tensor:
    return _self_normalising(stream, input, _feature_shape(input), p, train, inplace=True)


def _self_normalising(
    stream: Stream, input: Tensor, shape: Sequence[int], p: float, train: bool, inplace: bool
) -> Tensor:
    """Set elements to SELU's lowest value, then restore zero mean and unit variance (Klambauer et al., 2017)."""
    _check_probability(p)
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input.mul_(0) if inplace else input * 0
    # The lowest value of SELU: minus its scale times its alpha.
    lowest = -1.7580993408473766
    scale = 1 / math.sqrt((1 - p) * (1 + p * lowest**2))
    factors = stream.below(1 - p, shape, input.device).to(input.dtype)
    terms = (1 - factors).mul_(lowest * scale).sub_(lowest * scale * p)
    factors.mul_(scale)
    return input.mul_(factors).add_(terms) if inplace else input * factors + terms


def _feature_shape(input: Tensor) -> list[int]:
    if input.dim() < 2:
        raise InvalidInput(
            "dropout of whole features", received=f"a {input.dim()}-dim input", expected="at least 2 dimensions"
        )
    return [*input.shape[:2], *(1 for _ in input.shape[2:])]


def _check_probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise InvalidInput("the dropout probability", received=p, expected="0 <= p <= 1")


@_replaces(F.scaled_dot_product_attention)
def _attention(
    stream: Stream,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    if is_causal:
        if attn_mask is not None:
            raise InvalidInput("attention", received="attn_mask and is_causal", expected="one of the two")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
        # A row that may attend to nothing gets zeros, not NaN.
        hidden = scores.isneginf().all(-1, keepdim=True)
        weights = scores.masked_fill(hidden, 0).softmax(-1).masked_fill(hidden, 0)
    return _dropout(stream, weights, dropout_p, True) @ value


@_replaces(torch.rrelu)
def _rrelu(
    stream: Stream,
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    *,
    inplace: bool = False,
) -> Tensor:
    if not training:
        leaky_relu = F.leaky_relu_ if inplace else F.leaky_relu
        return leaky_relu(input, (lower + upper) / 2)
    slopes = stream.uniform(input.shape, input.dtype, input.device) * (upper - lower) + lower
    factors = slopes.masked_fill(input > 0, 1)
    return input.mul_(factors) if inplace else input * factors


@_replaces(torch.rrelu_)
def _rrelu_(
    stream: Stream, input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False
) -> Tensor:
    return _rrelu(stream, input, lower, upper, training, inplace=True)


@_replaces(F.gumbel_softmax)
def _gumbel_softmax(
    stream: Stream, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> Tensor:
    # Not torch's own body: vmap is slow at its scatter in place, and refuses it for logits that all models share.
    gumbels = -stream.exponential(logits.shape, logits.dtype, logits.device).log()
    soft = ((logits + gumbels) / tau).softmax(dim)
    if not hard:
        return soft
    chosen = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return chosen - soft.detach() + soft


# New tensors


def _created(
    draw: Callable[[Stream, Sequence[int], torch.dtype, torch.device], Tensor],
    stream: Stream,
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    layout: torch.layout = torch.strided,
    requires_grad: bool = False,
    pin_memory: bool = False,
    memory_format: torch.memory_format | None = None,
    **unknown: object,
) -> Tensor:
    """Draw a tensor with the options of torch's factory functions; a memory format changes no value."""
    if layout not in (None, torch.strided) or pin_memory or any(value is not None for value in unknown.values()):
        raise Unsupported("a random tensor with layout=, pin_memory= or names=", fix="Leave that option out.")
    # torch.compile traces this form of asking for the default device, and not torch.get_default_device().
    where = torch.empty(0, device=device).device
    drawn = draw(stream, shape, dtype or torch.get_default_dtype(), where)
    return drawn.requires_grad_() if requires_grad else drawn


def _size(args: tuple[Any, ...], size: Sequence[int] | None) -> Sequence[int]:
    """The shape given as ``f(2, 3)``, ``f((2, 3))`` or ``f(size=(2, 3))``."""
    if size is not None:
        return size
    return args[0] if len(args) == 1 and not isinstance(args[0], int | torch.SymInt) else args


def _uniform(stream: Stream, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return stream.uniform(shape, dtype, device)


def _normal(stream: Stream, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    _check_real(dtype)
    return stream.normal(shape, dtype, device)


def _check_real(dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise InvalidInput("random numbers", received=dtype, expected="a real floating-point dtype")


@_replaces(torch.rand)
def _rand(stream: Stream, *args: Any, size: Sequence[int] | None = None, **options: Any) -> Tensor:
    return _created(_uniform, stream, _size(args, size), **options)


@_replaces(torch.randn)
def _randn(stream: Stream, *args: Any, size: Sequence[int] | None = None, **options: Any) -> Tensor:
    return _created(_normal, stream, _size(args, size), **options)


@_replaces(torch.rand_like)
def _rand_like(stream: Stream, input: Tensor, **options: Any) -> Tensor:
    return _created(_uniform, stream, input.shape, **_like(input, options))


@_replaces(torch.randn_like)
def _randn_like(stream: Stream, input: Tensor, **options: Any) -> Tensor:
    return _created(_normal, stream, input.shape, **_like(input, options))


def _like(input: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    chosen = {name: value for name, value in options.items() if value is not None}
    return {"dtype": input.dtype, "device": input.device, **chosen}


@_replaces(torch.normal)
def _torch_normal(
    stream: Stream,
    mean: Tensor | float = 0.0,
    std: Tensor | float = 1.0,
    size: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    tensors = [value.detach() for value in (mean, std) if isinstance(value, Tensor)]
    if tensors:
        like = tensors[0]
        shape: Sequence[int] = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        options = {"dtype": like.dtype, "device": like.device}
    else:
        assert size is not None  # torch has no other form without tensors
        shape = size
    standard = _created(_normal, stream, shape, **options)
    return standard * _value(std) + _value(mean)


def _value(number: Tensor | float) -> Tensor | float:
    """A parameter of a distribution; no gradient flows through a draw."""
    return number.detach() if isinstance(number, Tensor) else number


@_replaces(torch.bernoulli, torch.Tensor.bernoulli)
def _bernoulli(stream: Stream, input: Tensor, p: float | None = None) -> Tensor:
    return _ones(stream, input, input if p is None else p).to(input.dtype)


def _ones(stream: Stream, like: Tensor, probability: Tensor | float) -> Tensor:
    """Booleans of ``like``'s shape, true with ``probability``: a number or a tensor that broadcasts to it."""
    if not isinstance(probability, Tensor):
        _check_probability(probability)
        if probability in (0, 1):
            return torch.full_like(like, probability).bool()
        return stream.below(probability, like.shape, like.device)
    return stream.positive_uniform(like.shape, probability.dtype, like.device) <= probability.detach()


@_replaces(torch.multinomial, torch.Tensor.multinomial)
def _multinomial(stream: Stream, input: Tensor, num_samples: int, replacement: bool = False) -> Tensor:
    weights = input.detach()
    if replacement:
        # Inverse of the cumulative sum; on the right side, so that what has no weight is never picked.
        exact = torch.float32 if weights.device.type == "mps" else torch.float64
        cumulative = weights.to(exact).cumsum(-1)
        levels = stream.uniform((*weights.shape[:-1], num_samples), exact, weights.device) * cumulative[..., -1:]
        return torch.searchsorted(cumulative.expand(*levels.shape[:-1], -1).contiguous(), levels, right=True)
    if num_samples > weights.size(-1):
        raise InvalidInput(
            "multinomial without replacement",
            received=f"{num_samples} samples",
            expected=f"at most the number of categories, {weights.size(-1)}",
        )
    # Exponential races: the order of arrival is a draw without replacement (Efraimidis and Spirakis, 2006).
    arrivals = stream.exponential(weights.shape, weights.dtype, weights.device)
    return (weights / arrivals).topk(num_samples, dim=-1).indices


# Tensors filled in place


@_replaces(torch.Tensor.bernoulli_)
def _bernoulli_(stream: Stream, input: Tensor, p: Tensor | float = 0.5) -> Tensor:
    return input.copy_(_ones(stream, input, p))


@_replaces(torch.Tensor.uniform_)
def _uniform_(stream: Stream, input: Tensor, *bounds: float, **named: float) -> Tensor:
    # "from" is a keyword of Python, so the names can only be read from a dict.
    lower, upper = (*bounds, *(named.get(name, value) for name, value in (("from", 0.0), ("to", 1.0))[len(bounds) :]))
    if lower > upper:
        raise InvalidInput("uniform_", received=f"from {lower} to {upper}", expected="from <= to")
    return input.copy_(stream.uniform(input.shape, _wide(input), input.device).mul_(upper - lower).add_(lower))


@_replaces(torch.Tensor.normal_)
def _normal_(stream: Stream, input: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return input.copy_(stream.normal(input.shape, _wide(input), input.device).mul_(std).add_(mean))


@_replaces(torch.Tensor.exponential_)
def _exponential_(stream: Stream, input: Tensor, lambd: float = 1.0) -> Tensor:
    if lambd <= 0:
        raise InvalidInput("exponential_", received=f"lambd={lambd}", expected="lambd > 0")
    return input.copy_(stream.exponential(input.shape, _wide(input), input.device).div_(lambd))


@_replaces(init.uniform_)
def _init_uniform_(stream: Stream, tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    with torch.no_grad():
        return _uniform_(stream, tensor, a, b)


@_replaces(init.normal_)
def _init_normal_(stream: Stream, tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    with torch.no_grad():
        return _normal_(stream, tensor, mean, std)


def _wide(input: Tensor) -> torch.dtype:
    """The dtype to draw in before the copy into ``input`` rounds."""
    _check_real(input.dtype)
    return torch.float64 if input.dtype == torch.float64 else torch.float32


# Python functions of torch that draw by calling the functions above


def _check_key_padding_mask(mask: Tensor, src_len: int, bsz: int) -> None:
    """Stand in for attention's own check, whose messages hold tensors, which torch.compile cannot trace."""
    if mask.shape != (bsz, src_len):
        raise InvalidInput("key_padding_mask", received=f"shape {tuple(mask.shape)}", expected=f"({bsz}, {src_len})")


def _body(function: Any) -> FunctionType:
    """Return a function of torch.nn.functional without its first step, the question whether a mode replaces it."""
    never = {f"has_torch_function{form}": lambda *_: False for form in ("", "_unary", "_variadic")}
    names = {**function.__globals__, **never, "_check_key_padding_mask": _check_key_padding_mask}
    # torch.compile looks the globals of a function up in the module of that name, which are the original ones.
    del names["__name__"]
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _body(function)
    for function in (
        F.alpha_dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.feature_alpha_dropout,
        F.multi_head_attention_forward,
        F.rrelu,
    )
}


# What has no per-model form


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(stream: Stream, *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(
            f"{name} draws random numbers and has no per-model form",
            fix=f"Leave out seeds=, or use one of the functions that have: {COVERED}.",
        )

    return refuse


def _refuse_if_dropping(function: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent function of torch, which is random only in training and with dropout."""

    def call(stream: Stream, *args: Any, **kwargs: Any) -> Any:
        # (input, hidden, weights, has_biases, ...), or with batch sizes after the input.
        position = 5 if isinstance(args[3], bool) else 6
        dropout, training = args[position : position + 2]
        return _refuse(function.__name__)(stream) if dropout > 0 and training else function(*args, **kwargs)

    return call


REPLACEMENTS.update(
    {
        function: _refuse(function.__name__)
        for function in (
            torch.binomial,
            torch.poisson,
            torch.randint,
            torch.randint_like,
            torch.randperm,
            torch.Tensor.cauchy_,
            torch.Tensor.geometric_,
            torch.Tensor.log_normal_,
            torch.Tensor.random_,
            F.fractional_max_pool2d,
            F.fractional_max_pool2d_with_indices,
            F.fractional_max_pool3d,
            F.fractional_max_pool3d_with_indices,
            init.kaiming_uniform_,
        )
    }
)
REPLACEMENTS.update(
    {function: _refuse_if_dropping(function) for function in (torch.gru, torch.lstm, torch.rnn_relu, torch.rnn_tanh)}
)
