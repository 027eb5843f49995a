"""What nine optimizers do to one parameter, from the step's coefficients.

Each formula is that of ``torch.optim``'s function for single tensors (named with it), in the order of operations of
`mb_torch.stacked.update_rules`, whose coefficients it takes. ``g`` is the gradient after `maximize` and the L2 penalty,
``p`` the parameter after decoupled weight decay.

Optax has pieces of the same names (`optax.scale_by_adam`, `optax.trace`...). They compute bias corrections themselves,
from counts in float32, and treat dampening, eps and rounding otherwise, so they are not used.
"""

from __future__ import annotations

import jax.numpy as jnp
import torch
from jax import Array

from mb_jax.transforms.leaves import Leaf, Step


def sgd(leaf: Leaf) -> Array:
    """``torch.optim.sgd._single_tensor_sgd``.

    ``b = momentum b + weight g``, where weight is 1 the first time and ``1 - dampening`` later; ``p -= lr b``,
    with Nesterov momentum ``p -= lr (g + momentum b)``, without momentum ``p -= lr g``.
    """
    direction = leaf.gradient()
    if leaf.flags["momentum"]:
        buffer = _momentum(leaf, direction * leaf.number("weight"))
        ahead = leaf.store(direction + buffer * leaf.number("momentum")) if leaf.flags["nesterov"] else buffer
        direction = _where_momentum(leaf, ahead, direction)
    return leaf.change(direction * leaf.number("lr"))


def _momentum(leaf: Leaf, addend: Array) -> Array:
    """The momentum buffer, updated; a model without momentum keeps the buffer it had."""
    buffer = leaf.scaled_sum("momentum_buffer", "momentum", addend)
    return leaf.put("momentum_buffer", _where_momentum(leaf, buffer, leaf.state["momentum_buffer"]))


def _where_momentum(leaf: Leaf, having: Array, without: Array) -> Array:
    """What holds for a model with momentum, or for one without."""
    return jnp.where(leaf.switch("with_momentum"), having, without) if leaf.flags["some_without"] else having


def adam(leaf: Leaf) -> Array:
    """``torch.optim.adam._single_tensor_adam``, of which AdamW is the case with decoupled weight decay.

    ``m += (1 - beta1) (g - m)``, ``v = beta2 v + (1 - beta2) g g``; with `amsgrad` the largest v so far replaces v.
    ``p -= lr / (1 - beta1^t) m / (sqrt(v) / c + eps)`` where ``c = sqrt(1 - beta2^t)``; the division by c is moved
    into the coefficients: ``eps c`` is called `eps` and ``-lr c / (1 - beta1^t)`` is called `size`.
    """
    first, second = _moments(leaf, leaf.gradient())
    if leaf.flags["amsgrad"]:
        second = leaf.put("max_exp_avg_sq", jnp.maximum(leaf.state["max_exp_avg_sq"], second))
    return leaf.change(leaf.quotient(first, leaf.root_plus_eps(second)) * leaf.number("size"))


def _moments(leaf: Leaf, grad: Array) -> tuple[Array, Array]:
    """The running averages of gradient and squared gradient in the Adam family, updated."""
    first = leaf.move_towards("exp_avg", grad, "first")
    second = leaf.scale_and_add("exp_avg_sq", "second_keep", (grad * leaf.number("second")) * grad)
    return first, second


def nadam(leaf: Leaf) -> Array:
    """``torch.optim.nadam._single_tensor_nadam``.

    m and v as for Adam, and with the momentum schedule ``mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)``:
    ``p -= lr (1 - mu_t) / (1 - mu_1 ... mu_t) g / d``, then ``p -= lr mu_(t+1) / (1 - mu_1 ... mu_(t+1)) m / d`` where
    ``d = sqrt(v / (1 - beta2^t)) + eps``. The bias correction is moved into the coefficients as for Adam.
    """
    grad = leaf.gradient()
    first, second = _moments(leaf, grad)
    scale = leaf.root_plus_eps(second)
    return leaf.change(
        leaf.quotient(grad, scale) * leaf.number("gradient_size"),
        leaf.quotient(first, scale) * leaf.number("average_size"),
    )


def radam(leaf: Leaf) -> Array:
    """``torch.optim.radam._single_tensor_radam``.

    m and v as for Adam; ``p -= lr / (1 - beta1^t) m r`` where r is 1 until the variance of v is tractable and then
    ``rect sqrt(1 - beta2^t) / (sqrt(v) + eps)``. All factors are in the coefficient `size`.
    """
    first, second = _moments(leaf, leaf.gradient())
    scale = jnp.where(leaf.switch("tractable"), leaf.root_plus_eps(second), 1.0)
    return leaf.change(leaf.quotient(first, scale) * leaf.number("size"))


def adamax(leaf: Leaf) -> Array:
    """``torch.optim.adamax._single_tensor_adamax``.

    m as for Adam, ``u = max(beta2 u, |g| + eps)``; ``p -= lr / (1 - beta1^t) m / u``.
    """
    grad = leaf.gradient()
    first = leaf.move_towards("exp_avg", grad, "first")
    kept = leaf.store(leaf.state["exp_inf"] * leaf.number("norm_keep"))
    norm = leaf.put("exp_inf", jnp.maximum(kept, leaf.store(jnp.abs(grad) + leaf.number("eps"))))
    return leaf.change(leaf.quotient(first, norm) * leaf.number("size"))


def rmsprop(leaf: Leaf) -> Array:
    """``torch.optim.rmsprop._single_tensor_rmsprop``.

    ``v = alpha v + (1 - alpha) g g``; ``d = sqrt(v) + eps``, centered ``a += (1 - alpha) (g - a)`` and
    ``d = sqrt(v - a a) + eps``; ``p -= lr g / d``, with momentum ``b = momentum b + g / d`` and ``p -= lr b``.
    """
    grad = leaf.gradient()
    square = leaf.scale_and_add("square_avg", "keep", (grad * leaf.number("new")) * grad)
    if leaf.flags["centered"]:
        average = leaf.move_towards("grad_avg", grad, "new")
        square = leaf.store(square - average * average)
    direction = leaf.quotient(grad, leaf.root_plus_eps(square))
    if leaf.flags["momentum"]:
        direction = _where_momentum(leaf, _momentum(leaf, direction), direction)
    return leaf.change(direction * leaf.number("lr"))


def adagrad(leaf: Leaf) -> Array:
    """``torch.optim.adagrad._single_tensor_adagrad``.

    ``s += g g``; ``p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)``; the factor is the coefficient `size`.
    """
    grad = leaf.gradient()
    total = leaf.put("sum", leaf.store(leaf.state["sum"] + grad * grad))
    return leaf.change(leaf.quotient(grad, leaf.root_plus_eps(total)) * leaf.number("size"))


def adadelta(leaf: Leaf) -> Array:
    """``torch.optim.adadelta._single_tensor_adadelta``.

    ``v = rho v + (1 - rho) g g``; ``s = sqrt(a + eps) / sqrt(v + eps) g``;
    ``a = rho a + (1 - rho) s s``; ``p -= lr s``.
    """
    grad, weight, eps = leaf.gradient(), leaf.number("new"), leaf.number("eps")
    square = leaf.scale_and_add("square_avg", "keep", (grad * weight) * grad)
    size, scale = (leaf.store(jnp.sqrt(leaf.store(one + eps))) for one in (leaf.state["acc_delta"], square))
    step = leaf.store(leaf.quotient(size, scale) * grad)
    leaf.scale_and_add("acc_delta", "keep", (step * weight) * step)
    return leaf.change(step * leaf.number("lr"))


STEPS: dict[type[torch.optim.Optimizer], Step] = {
    torch.optim.SGD: sgd,
    torch.optim.Adam: adam,
    torch.optim.AdamW: adam,
    torch.optim.NAdam: nadam,
    torch.optim.RAdam: radam,
    torch.optim.Adamax: adamax,
    torch.optim.RMSprop: rmsprop,
    torch.optim.Adagrad: adagrad,
    torch.optim.Adadelta: adadelta,
}
