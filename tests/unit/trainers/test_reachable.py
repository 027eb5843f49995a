"""Which objects are looked through for random generators, and which are not."""

from __future__ import annotations

import random
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trainers.loaders.reachable import cuts_of, reachable
from trainers.loaders.remembered import generators_in


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Another module, with a function that draws from a generator of that module."""
    made = ModuleType("helpers_of_a_test")
    source = "import random\nrng = random.Random(0)\ndef augment(value):\n    return value + rng.random()\n"
    exec(compile(source, "helpers_of_a_test.py", "exec"), vars(made))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def test_a_function_that_is_named_within_a_module(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "helpers", module)

    def transform(value: float) -> float:
        return helpers.augment(value)  # type: ignore[name-defined]  # noqa: F821

    assert list(generators_in({"transform": transform})) == ["transform.helpers.augment.rng"]


def test_functions_of_other_installed_packages_are_not_followed(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "augment", module.augment)

    def transform(value: float) -> float:
        return augment(value)  # type: ignore[name-defined]  # noqa: F821

    assert list(generators_in({"transform": transform})) == ["transform.augment.rng"]
    module.__file__ = str(Path("lib", "site-packages", "helpers_of_a_test.py"))
    assert not generators_in({"transform": transform})


def test_parameters_buffers_and_hooks_of_modules_are_passed_by() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    layer.transform = random.Random(0)  # type: ignore[assignment]
    assert {path for path, _ in reachable({"layer": layer})} == {"layer", "layer.transform", "layer._modules"}


def test_what_optimizers_and_schedules_hold_is_theirs_to_save() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.rng = schedule.rng = random.Random(0)  # type: ignore[attr-defined]
    assert not generators_in({"sampler": [optimizer, schedule]})


def test_containers() -> None:
    held: dict[str, Any] = {
        "queue": deque([random.Random(0)]),
        "bits": np.random.PCG64(0),
        "set": {random.Random(0)},
    }
    assert list(generators_in(held)) == ["bits", "queue[0]"]
    assert cuts_of(held) == ["set, a set, which has another order in every process"]
    assert not cuts_of({"set": {1, 2}})
