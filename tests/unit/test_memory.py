"""What is computed once: seen in the programs that XLA makes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge.ops.memory import in_memory
from bridge.translators import translate_function
from mb_jax.optim import UpdatePlan, apply_update
from mb_torch.stacked.update_rules import RULES

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about XLA's programs for CPUs")


def test_what_is_to_be_in_memory_is_no_part_of_the_gather_that_reads_it() -> None:
    places = np.tile(np.arange(8), 4)

    def gathered(x: jax.Array, kept: bool) -> jax.Array:
        value = jnp.where(x > 0, x, 0) * 2
        return (in_memory(value) if kept else value)[places]

    x = jnp.arange(-4.0, 4.0)
    one, other = (jax.jit(gathered, static_argnums=1).lower(x, kept).compile() for kept in (False, True))
    assert " call(" not in one.as_text()
    assert " call(" in other.as_text()
    assert one(x).tolist() == other(x).tolist()


def test_an_activation_before_a_convolution_of_windows_is_computed_once() -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.GELU(), torch.nn.Conv2d(2, 2, 3))
    translation = translate_function(lambda given: [layers(given[0])], [torch.ones(2, 1, 8, 8)]).translation
    run = jax.vmap(lambda images: translation.run([images], None, "matmul")[0])
    text = jax.jit(run).lower(np.ones((3, 2, 1, 8, 8), np.float32)).compile().as_text()
    assert " call(" in text


@pytest.mark.parametrize(
    "optimizer_cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adamax]
)
def test_an_update_needs_no_copy_of_what_is_donated_to_it(optimizer_cls: type[torch.optim.Optimizer]) -> None:
    rule = RULES[optimizer_cls]
    group = optimizer_cls([torch.nn.Parameter(torch.zeros(1))], weight_decay=0.1).param_groups[0]
    flags = {key: bool(group[key]) for key in rule.switches}
    flags = rule.flags({"weight_decay": [0.1], "momentum": [0.0], "lr": [0.1]}, flags)
    names = ("decay", "eps", "first", "keep", "lr", "new", "norm_keep", "second", "second_keep", "shrink", "size")
    plan = UpdatePlan((0,), (0,), (names,), tuple(sorted(flags.items())))

    def update(params: list[jax.Array], state: dict[str, list[jax.Array]], grads: list[jax.Array]) -> object:
        rows = jnp.full((len(names), 4), 0.1)
        return apply_update(optimizer_cls, plan, params, state, grads, [rows], jnp.array([True, True, True, False]))

    stack = jnp.ones((4, 30, 20))
    state = {name: [stack] for name in rule.state_names(flags)}
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower([stack], state, [stack]).compile()
    assert not re.findall(r"f32\[4,30,20\]\S* copy\(", compiled.as_text())
