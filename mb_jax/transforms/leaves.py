"""One parameter of one model within an update, and the arithmetic that the nine optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

Numbers = Mapping[str, Any]
"""The coefficients of one step of one model: floats or 0-dimensional arrays, and booleans."""


class Leaf:
    """One real parameter of one model, its gradient and its state while they are updated.

    Half precision is computed in float32, and what ``torch.optim`` writes to memory is rounded as memory rounds it:
    a value goes through `store` wherever torch's operation is in place or makes a tensor in the parameter's dtype.
    Coefficients stay in float32 there, because 0.999 would become 1 in bfloat16. In full precision `store` does
    nothing.

    Args:
        param: The parameter, in its own dtype.
        grad: Its gradient.
        state: State tensors by name.
        numbers: The step's coefficients, from ``Rule.coefficients``.
        flags: The step's flags, from ``Rule.flags``.
        active: Whether the state may change; None if it may.

    Attributes:
        dtype: The dtype of the arithmetic.
        state: State tensors in that dtype; the optimizer puts the new ones in their place by `put`.
    """

    def __init__(
        self,
        param: Array,
        grad: Array,
        state: Mapping[str, Array],
        numbers: Numbers,
        flags: Mapping[str, bool],
        active: Array | None = None,
    ) -> None:
        self.stored_dtype = param.dtype
        self.dtype = jnp.promote_types(param.dtype, jnp.float32)
        self.param = param.astype(self.dtype)
        self.grad = grad.astype(self.dtype)
        self.state = {name: tensor.astype(self.dtype) for name, tensor in state.items()}
        self.flags = flags
        self._numbers = numbers
        self._active = active

    def number(self, name: str) -> Array:
        """A coefficient in the dtype of the arithmetic, rounded once from all the digits it came with."""
        return jnp.asarray(self._numbers[name], self.dtype)

    def switch(self, name: str) -> Array:
        """A boolean among the coefficients."""
        return jnp.asarray(self._numbers[name], jnp.bool_)

    def store(self, value: Array) -> Array:
        """What is left of a value in memory of the parameter's dtype."""
        if self.dtype == self.stored_dtype:
            return value
        if self.stored_dtype == jnp.bfloat16:
            # The compiler may leave out a conversion there and back, but not this.
            return lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7)
        # `reduce_precision` would turn the subnormal numbers of float16 into zeros.
        return value.astype(self.stored_dtype).astype(self.dtype)

    def put(self, name: str, value: Array) -> Array:
        """Make a value the new state; returns what the state is afterwards, which is the old one if not active.

        The change of the parameter is to be computed from what is returned. From anything else XLA would compute the
        new state a second time, from the old one, which on CPUs no order of its loops leaves in donated memory: it
        would copy the whole state first, a third of the time of Adam's update.
        """
        if self._active is not None:
            value = jnp.where(self._active, value, self.state[name])
        self.state[name] = value
        return value

    def gradient(self) -> Array:
        """The gradient to descend along: negated for `maximize`, with the L2 penalty's gradient added."""
        grad = -self.grad if self.flags["maximize"] else self.grad
        if self.flags["penalty"]:
            decay = self.number("decay")
            # A model without decay does not see its weights here, not even infinite ones.
            grad = jnp.where(decay != 0, self.store(grad + self.param * decay), grad)
        return grad

    def scaled_sum(self, name: str, keep: str, addend: Array) -> Array:
        """`keep * state + addend`, where `keep` names a coefficient."""
        return self.store(self.store(self.state[name] * self.number(keep)) + addend)

    def scale_and_add(self, name: str, keep: str, addend: Array) -> Array:
        """`state = keep * state + addend`, where `keep` names a coefficient."""
        return self.put(name, self.scaled_sum(name, keep, addend))

    def move_towards(self, name: str, target: Array, weight: str) -> Array:
        """`state += weight * (target - state)`, as ``torch.lerp`` does it, where `weight` names a coefficient."""
        start, share = self.state[name], self.number(weight)
        # Counted from the nearer end, so that a weight of one gives the target to the last bit.
        near = share < 0.5
        base = jnp.where(near, start, target)
        return self.put(name, self.store(base + jnp.where(near, share, share - 1.0) * (target - start)))

    def root_plus_eps(self, square: Array) -> Array:
        """`sqrt(square) + eps`."""
        return self.store(self.store(jnp.sqrt(square)) + self.number("eps"))

    def quotient(self, numerator: Array, denominator: Array) -> Array:
        """`numerator / denominator`."""
        return self.store(numerator / denominator)

    def change(self, *steps: Array) -> Array:
        """What decoupled weight decay and then these steps, one by one, add to the parameter.

        The last step is not rounded to the parameter's dtype: that is for whoever adds the change.
        """
        *earlier, last = steps
        value = self.param
        if self.flags["shrink"]:
            value = self.store(value * self.number("shrink"))
        for step in earlier:
            value = self.store(value + step)
        return last if value is self.param else (value - self.param) + last


Step = Callable[[Leaf], Array]
"""An optimizer on one real parameter: it replaces the leaf's state and returns the change of the parameter."""


def update_leaf(
    step: Step,
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    numbers: Numbers,
    flags: Mapping[str, bool],
    active: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Update one parameter of one model.

    Args:
        step: What the optimizer does.
        param: The parameter, real or complex. The parts of a complex one are two parameters, as in ``torch.optim``.
        grad: Its gradient.
        state: State tensors by name.
        numbers: The step's coefficients.
        flags: The step's flags.
        active: Whether the state may change; None if it may.

    Returns:
        The change of the parameter, in float32 for half precision, and the new state in the dtype of the old.
    """
    if jnp.iscomplexobj(param):
        (real, real_state), (imaginary, imaginary_state) = (
            _update_real(step, part(param), part(grad), {n: part(s) for n, s in state.items()}, numbers, flags, active)
            for part in (jnp.real, jnp.imag)
        )
        return lax.complex(real, imaginary), {
            name: lax.complex(one, imaginary_state[name]) for name, one in real_state.items()
        }
    return _update_real(step, param, grad, state, numbers, flags, active)


def _update_real(
    step: Step,
    param: Array,
    grad: Array,
    state: Mapping[str, Array],
    numbers: Numbers,
    flags: Mapping[str, bool],
    active: Array | None,
) -> tuple[Array, dict[str, Array]]:
    leaf = Leaf(param, grad, state, numbers, flags, active)
    change = step(leaf)
    return change, {name: tensor.astype(state[name].dtype) for name, tensor in leaf.state.items()}
