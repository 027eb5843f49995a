"""The optimizers as optax transformations: driven by coefficients from outside, or counting for themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import torch
from jax import Array, lax
from jax.typing import ArrayLike

from mb_jax.transforms.counts import COEFFICIENTS, Moment, nadam_momentum
from mb_jax.transforms.leaves import Numbers, update_leaf
from mb_jax.transforms.steps import STEPS
from mb_torch.errors import InvalidInput, Unsupported
from mb_torch.stacked.update_rules import RULES
from mb_torch.stacked.updates import Rule

Tensors = dict[str, Any]
"""State tensors by name, each a pytree like the parameters."""


class CountedState(NamedTuple):
    """State of `torch_optimizer`.

    Attributes:
        count: Steps taken, int32.
        product: NAdam's product of momenta, float32 as in ``torch.optim``; 1 elsewhere.
        tensors: State tensors by ``torch.optim``'s name, each a pytree like the parameters.
    """

    count: Array  # type: ignore[assignment]  # Hides a tuple's method, as optax's own states do.
    product: Array
    tensors: Tensors


def transform_for(
    optimizer_cls: type[torch.optim.Optimizer], flags: Mapping[str, bool]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer's update of one model, with every coefficient an argument of the step.

    To be mapped over models by `jax.vmap`; a change of a coefficient compiles nothing anew.

    * ``init(params, initial={})`` returns the state: a dict with a pytree like `params` for each state tensor of
      ``torch.optim``. `initial` has the value of one that does not start at zero (Adagrad's `sum`).
    * ``update(grads, state, params, numbers=..., active=None)`` returns changes for `optax.apply_updates` and the new
      state. `numbers` are the step's coefficients, from the ``coefficients`` of the class's rule. The state of a model
      that is not active stays as it is; its changes are to be dropped. Further state tensors, of other flags, are
      handed through.

    Parameters and state may be in half, single or double precision or complex, and keep their dtypes. Changes of
    half-precision parameters are float32, and `optax.apply_updates` rounds the sum as ``torch.optim`` does. Gradients
    of complex parameters are torch's, which are the conjugates of those from `jax.grad`.

    Args:
        optimizer_cls: One of the nine classes that have an update rule.
        flags: What decides the course of the update, from ``Rule.flags``.

    Raises:
        Unsupported: There is no rule for the class.

    Example:
        >>> flags = {"maximize": False, "nesterov": False, "momentum": False, "some_without": False}
        >>> sgd = transform_for(torch.optim.SGD, {**flags, "penalty": False, "shrink": False})
        >>> params = {"weight": jnp.ones(2)}
        >>> numbers = {"lr": -0.5, "decay": 0.0}
        >>> changes, state = sgd.update({"weight": jnp.ones(2)}, sgd.init(params), params, numbers=numbers)
        >>> optax.apply_updates(params, changes)["weight"].tolist()
        [0.5, 0.5]
    """
    rule, step = _rule(optimizer_cls), STEPS[optimizer_cls]
    names = rule.state_names(flags)

    def init(params: optax.Params, *, initial: Mapping[str, ArrayLike] | None = None) -> Tensors:
        starts = initial or {}
        return {name: jax.tree.map(functools.partial(_filled, start=starts.get(name, 0.0)), params) for name in names}

    def update(
        grads: optax.Updates,
        state: Tensors,
        params: optax.Params | None = None,
        *,
        numbers: Numbers | None = None,
        active: Array | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, Tensors]:
        if params is None or numbers is None:
            missing = "params" if params is None else "numbers"
            raise InvalidInput(f"update without {missing}", expected="update(grads, state, params, numbers=...)")
        structure: Any
        leaves, structure = jax.tree.flatten(params)
        own_grads = structure.flatten_up_to(grads)
        tensors = {name: structure.flatten_up_to(state[name]) for name in names}
        changes, rows = [], []
        for place, (param, grad) in enumerate(zip(leaves, own_grads, strict=True)):
            own = {name: tensors[name][place] for name in names}
            change, row = update_leaf(step, param, grad, own, numbers, flags, active)
            changes.append(change)
            rows.append(row)
        new = {name: structure.unflatten([row[name] for row in rows]) for name in names}
        return structure.unflatten(changes), {**state, **new}

    return optax.GradientTransformationExtraArgs(init, update)


def torch_optimizer(
    optimizer_cls: type[torch.optim.Optimizer], **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Return one of torch's optimizers as an optax transformation that counts its own steps.

    Agrees with ``torch.optim`` to rounding, in float32 too: what depends on the step count is computed so that no
    digits cancel. Options that choose an implementation (`foreach`, `fused`, `capturable`, `differentiable`) have no
    effect. Gradients of complex parameters are torch's, which are the conjugates of those from `jax.grad`.

    Args:
        optimizer_cls: One of the nine classes that have an update rule.
        **options: Its options by torch's names, with torch's defaults. `lr` may be a schedule: a function of the
            number of steps taken, an int32 array, 0 at the first step.

    Returns:
        A transformation with a `CountedState`; its `update` needs `params`.

    Raises:
        Unsupported: There is no rule for the class.
        ValueError: The class refuses an option.

    Example:
        >>> adam = torch_optimizer(torch.optim.AdamW, lr=optax.cosine_decay_schedule(0.1, 100), weight_decay=0.01)
        >>> params = {"weight": jnp.ones(2)}
        >>> changes, state = adam.update({"weight": jnp.ones(2)}, adam.init(params), params)
        >>> [round(value, 4) for value in optax.apply_updates(params, changes)["weight"].tolist()]
        [0.899, 0.899]
    """
    rule = _rule(optimizer_cls)
    schedule: Callable[[Array], ArrayLike] | None = options.pop("lr") if callable(options.get("lr")) else None
    # The class itself checks its options and knows the defaults.
    group = optimizer_cls([torch.nn.Parameter(torch.zeros(1))], **options).param_groups[0]
    hyper = hyper_parameters(rule, group)
    switches = {key: bool(group[key]) for key in rule.switches}
    flags = rule.flags({name: [value] for name, value in hyper.items()}, switches)
    inner: Any = transform_for(optimizer_cls, flags)
    initial = {name: float(group[key]) for name, key in rule.initial.items()}

    def init(params: optax.Params) -> CountedState:
        return CountedState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), inner.init(params, initial=initial))

    def update(
        grads: optax.Updates, state: CountedState, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, CountedState]:
        count = optax.safe_increment(state.count)
        wide = jnp.result_type(float)
        step = count.astype(wide)
        lr = jnp.asarray(hyper["lr"] if schedule is None else schedule(state.count), wide)
        product = state.product
        if optimizer_cls is torch.optim.NAdam:
            product = product * nadam_momentum(step, hyper).astype(jnp.float32)
        numbers = COEFFICIENTS[optimizer_cls](Moment(step, lr, hyper, product))
        changes, tensors = inner.update(grads, state.tensors, params, numbers=numbers)
        return changes, CountedState(count, product, tensors)

    return optax.GradientTransformationExtraArgs(init, update)


def _rule(optimizer_cls: type[torch.optim.Optimizer]) -> Rule:
    if optimizer_cls not in STEPS:
        known = ", ".join(cls.__name__ for cls in STEPS)
        raise Unsupported("no update rule for this optimizer", received=optimizer_cls, expected=f"one of {known}")
    return RULES[optimizer_cls]


def _filled(param: Array, *, start: ArrayLike) -> Array:
    """A state tensor at its start; both parts of a complex one are filled, as ``torch.optim`` does."""
    if not jnp.iscomplexobj(param):
        return jnp.full_like(param, start, dtype=param.dtype)
    part = jnp.full_like(param.real, start)
    return lax.complex(part, part)


def hyper_parameters(rule: Rule, group: Mapping[str, Any]) -> dict[str, float]:
    """A parameter group's numbers by the names that rules use."""
    hyper = {key: float(group[key]) for key in rule.numbers if key != "betas"}
    if "betas" in rule.numbers:
        hyper["beta1"], hyper["beta2"] = map(float, group["betas"])
    return hyper
