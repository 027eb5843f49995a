"""Operations that draw random numbers: pure functions of a key.

Every draw names its dtype. In JAX's 64-bit mode a draw without one is a draw of 64 bits, at twice the cost.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch

from bridge.ops.registry import Operation, lowers

aten = torch.ops.aten


def is_random(target: Any) -> bool:
    """Whether a torch operation draws random numbers."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _key(operation: Operation) -> jax.Array:
    assert operation.key is not None, f"{operation.target} draws without a key"
    return operation.key


def _uniform(operation: Operation) -> jax.Array:
    """Uniform in [0, 1), of the operation's dtype, or of float32 for results that are no floats."""
    return jax.random.uniform(_key(operation), operation.shape, _draw_dtype(operation.dtype))


def _open_uniform(operation: Operation) -> jax.Array:
    """Uniform in (0, 1): its logarithm is finite."""
    dtype = _draw_dtype(operation.dtype)
    return jax.random.uniform(_key(operation), operation.shape, dtype, minval=jnp.finfo(dtype).tiny)


def _normal(operation: Operation) -> jax.Array:
    return jax.random.normal(_key(operation), operation.shape, _draw_dtype(operation.dtype))


def _draw_dtype(dtype: Any) -> Any:
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.dtype(jnp.float32)


@lowers(aten.rand.default, aten.rand_like.default)
def rand(operation: Operation, *_: Any, **__: Any) -> jax.Array:
    """Uniform in [0, 1)."""
    return _uniform(operation)


@lowers(aten.randn.default, aten.randn_like.default)
def randn(operation: Operation, *_: Any, **__: Any) -> jax.Array:
    """Standard normal."""
    return _normal(operation)


@lowers(aten.uniform.default)
def uniform(
    operation: Operation, self: jax.Array, low: float = 0.0, high: float = 1.0, *, generator: None = None
) -> jax.Array:
    """Uniform between two numbers."""
    return _uniform(operation) * (high - low) + low


@lowers(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor, aten.normal.float_float)
def normal(operation: Operation, mean: Any = 0.0, std: Any = 1.0, size: Any = None, **_: Any) -> jax.Array:
    """Normal with given means and standard deviations."""
    return _normal(operation) * std + mean


@lowers(aten.normal_functional.default)
def normal_functional(
    operation: Operation, self: jax.Array, mean: float = 0.0, std: float = 1.0, *, generator: None = None
) -> jax.Array:
    """Normal, in the place of a tensor's values."""
    return _normal(operation) * std + mean


@lowers(aten.log_normal.default)
def log_normal(
    operation: Operation, self: jax.Array, mean: float = 1.0, std: float = 2.0, *, generator: None = None
) -> jax.Array:
    """The exponential of a normal draw."""
    return jnp.exp(_normal(operation) * std + mean)


@lowers(aten.cauchy.default)
def cauchy(
    operation: Operation, self: jax.Array, median: float = 0.0, sigma: float = 1.0, *, generator: None = None
) -> jax.Array:
    """Cauchy distribution."""
    return jnp.tan(jnp.pi * (_open_uniform(operation) - 0.5)) * sigma + median


@lowers(aten.exponential.default)
def exponential(operation: Operation, self: jax.Array, lambd: float = 1.0, *, generator: None = None) -> jax.Array:
    """Exponential distribution; never 0, so that its logarithm is finite (Gumbel noise)."""
    return -jnp.log(_open_uniform(operation)) / lambd


@lowers(aten.geometric.default)
def geometric(operation: Operation, self: jax.Array, p: float, *, generator: None = None) -> jax.Array:
    """Number of trials up to the first success."""
    draws = _open_uniform(operation)
    return jnp.maximum(jnp.ceil(jnp.log(draws) / jnp.log1p(jnp.asarray(-p, draws.dtype))), 1)


@lowers(aten.bernoulli.default)
def bernoulli(operation: Operation, self: jax.Array, *, generator: None = None) -> jax.Array:
    """1 with the probability that stands there."""
    return _uniform(operation) < self


@lowers(aten.bernoulli.p, aten.bernoulli.Tensor)
def bernoulli_p(
    operation: Operation, self: jax.Array, p: float | jax.Array = 0.5, *, generator: None = None
) -> jax.Array:
    """1 with a given probability, in the shape of a tensor."""
    return _uniform(operation) < p


@lowers(aten.native_dropout.default)
def native_dropout(operation: Operation, input: jax.Array, p: float, train: bool | None) -> tuple[jax.Array, jax.Array]:
    """Zero elements with probability ``p`` and enlarge the others; also which are kept."""
    if train is False or p == 0:
        return input, jnp.ones(input.shape, bool)
    kept = _uniform(operation) >= p
    factor = 0.0 if p == 1 else 1 / (1 - p)
    return input * kept * factor, kept


@lowers(aten.rrelu_with_noise_functional.default)
def rrelu_with_noise(
    operation: Operation,
    self: jax.Array,
    noise: jax.Array,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    generator: None = None,
) -> tuple[jax.Array, jax.Array]:
    """Leaky ReLU with slopes of its own for each element; also the slopes."""
    if not training:
        return jnp.where(self > 0, self, self * ((lower + upper) / 2)), noise
    drawn = _uniform(operation) * (upper - lower) + lower
    slopes = jnp.where(self > 0, jnp.ones_like(drawn), drawn)
    return self * slopes, slopes


@lowers(aten.randint.default, aten.randint_like.default)
def randint(operation: Operation, first: Any, second: Any, **_: Any) -> jax.Array:
    """Integers from 0; ``(high, size)`` or ``(like, high)``."""
    return _integers(operation, 0, second if isinstance(first, jax.Array) else first)


@lowers(aten.randint.low, aten.randint_like.low_dtype)
def randint_low(operation: Operation, first: Any, second: Any, third: Any, **_: Any) -> jax.Array:
    """Integers between two numbers; ``(low, high, size)`` or ``(like, low, high)``."""
    bounds = (second, third) if isinstance(first, jax.Array) else (first, second)
    return _integers(operation, *bounds)


@lowers(aten.random.default, aten.random.to, getattr(aten.random, "from"))
def random(operation: Operation, self: jax.Array, *bounds: Any, generator: None = None) -> jax.Array:
    """Integers: all that the dtype holds exactly, those below a number, or those between two numbers."""
    if not bounds:
        return _integers(operation, 0, _end(operation.dtype))
    low, high = (0, bounds[0]) if len(bounds) == 1 else bounds
    if high is None:
        high = int(jnp.iinfo(operation.dtype).max)
    return _integers(operation, low, high)


def _end(dtype: Any) -> int:
    """One more than the largest number that PyTorch draws for a dtype."""
    if dtype == jnp.bool_:
        return 2
    if jnp.issubdtype(dtype, jnp.inexact):
        return 2 ** (int(jnp.finfo(dtype).nmant) + 1) + 1
    return int(jnp.iinfo(dtype).max)


def _integers(operation: Operation, low: Any, high: Any) -> jax.Array:
    """Integers from ``low`` to below ``high``; of 32 bits where those are enough."""
    wide = not all(isinstance(bound, int) and abs(bound) < 2**31 for bound in (low, high))
    return jax.random.randint(_key(operation), operation.shape, low, high, jnp.int64 if wide else jnp.int32)


@lowers(aten.randperm.default)
def randperm(operation: Operation, n: int, **_: Any) -> jax.Array:
    """The numbers below ``n`` in random order."""
    return jax.random.permutation(_key(operation), jnp.arange(n, dtype=jnp.int32))


@lowers(aten.multinomial.default)
def multinomial(
    operation: Operation, self: jax.Array, num_samples: int, replacement: bool = False, *, generator: None = None
) -> jax.Array:
    """Places drawn by weight from each row; each place once, or as often as it comes."""
    scores = jnp.log(self)
    if replacement:
        rows = scores.reshape(-1, scores.shape[-1])
        drawn = jax.random.categorical(_key(operation), rows[:, None, :], shape=(rows.shape[0], num_samples))
        return drawn.reshape(operation.shape)
    # The largest of the weights' logarithms plus Gumbel noise are a draw without replacement.
    noise = jax.random.gumbel(_key(operation), self.shape, self.dtype)
    return jax.lax.top_k(scores + noise, num_samples)[1]


@lowers(aten.poisson.default)
def poisson(operation: Operation, self: jax.Array, generator: None = None) -> jax.Array:
    """Poisson distribution with given rates."""
    return jax.random.poisson(_key(operation), self, operation.shape, jnp.int32)


@lowers(aten.binomial.default)
def binomial(operation: Operation, count: jax.Array, prob: jax.Array, generator: None = None) -> jax.Array:
    """Binomial distribution with given counts and probabilities."""
    return jax.random.binomial(_key(operation), count, prob, operation.shape, operation.dtype)


@lowers(aten._standard_gamma.default)
def standard_gamma(operation: Operation, self: jax.Array, generator: None = None) -> jax.Array:
    """Gamma distribution; differentiable in its shape parameter."""
    return jax.random.gamma(_key(operation), self, operation.shape, operation.dtype)


@lowers(aten._sample_dirichlet.default)
def sample_dirichlet(operation: Operation, self: jax.Array, generator: None = None) -> jax.Array:
    """Dirichlet distribution, from gamma draws."""
    draws = jax.random.gamma(_key(operation), self, operation.shape, operation.dtype)
    return draws / draws.sum(-1, keepdims=True)
