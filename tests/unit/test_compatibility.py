"""Which models may share a batch: everything but values must agree, and the first difference is named."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from mb_torch import IncompatibleModels, ModelBatch
from tests.compare import assert_close
from tests.zoo import CASES

X = torch.linspace(-1, 1, 24).reshape(6, 4)


class Model(nn.Module):
    """A model with one setting."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        for name, value in settings.items():
            setattr(self.inner[0], name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Options:
    width: int
    nested: dict[str, Any]


class Scaler:
    """Holds a number that a method uses."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def scale(self, x: float) -> float:
        return x * self.factor


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * factor


def with_default(factor: float) -> Callable[..., Tensor]:
    def scale(x: Tensor, by: float = factor) -> Tensor:
        return x * by

    return scale


def with_keyword_default(factor: float) -> Callable[..., Tensor]:
    def scale(x: Tensor, *, by: float = factor) -> Tensor:
        return x * by

    return scale


def nested(factor: float) -> Callable[..., Any]:
    def outer(x: Tensor) -> Callable[[Tensor], Tensor]:
        return scaled(factor)

    return outer


def power(x: Tensor, exponent: float) -> Tensor:
    return x**exponent


def cube(x: Tensor) -> Tensor:
    return x**3


# Makes a setting from one of two values: equal values must be accepted, different ones refused.
KINDS: dict[str, Callable[[int], Any]] = {
    "integer": lambda v: v,
    "float": lambda v: v / 10,
    "text": lambda v: f"mode {v}",
    "bytes": lambda v: bytes([v]),
    "complex": lambda v: complex(v, 1),
    "boolean": lambda v: v == 1,
    "none or not": lambda v: None if v == 1 else 0,
    "kind of number": lambda v: 1 if v == 1 else 1.0,
    "dtype": lambda v: torch.float32 if v == 1 else torch.float64,
    "device": lambda v: torch.device("cpu" if v == 1 else "meta"),
    "size": lambda v: torch.Size([v]),
    "enum": lambda v: Colour(v),
    "slice": lambda v: slice(0, v),
    "list": lambda v: [1, v],
    "length of a list": lambda v: [0] * v,
    "tuple": lambda v: (1, (2, v)),
    "dictionary": lambda v: {"a": {"b": v}},
    "keys of a dictionary": lambda v: {f"key {v}": 0},
    "set": lambda v: {1, v + 5},
    "frozen set": lambda v: frozenset({v}),
    "array": lambda v: np.array([1.0, v]),
    "tensor without a name": lambda v: torch.tensor([1.0, v]),
    "shape of a tensor": lambda v: torch.zeros(v),
    "dtype of a tensor": lambda v: torch.zeros(2, dtype=torch.float32 if v == 1 else torch.float64),
    "data class": lambda v: Options(3, {"x": [v]}),
    "name space": lambda v: types.SimpleNamespace(a=v),
    "closure": lambda v: scaled(v),
    "default": lambda v: with_default(v),
    "keyword default": lambda v: with_keyword_default(v),
    "closure in a closure": lambda v: nested(v),
    "constant of a lambda": lambda v: (lambda x: x * 3) if v == 1 else (lambda x: x * 4),
    "function": lambda v: cube if v == 1 else F.relu,
    "built-in function": lambda v: torch.relu if v == 1 else torch.tanh,
    "partial": lambda v: functools.partial(power, exponent=v),
    "positional partial": lambda v: functools.partial(power, v),
    "partial of a closure": lambda v: functools.partial(scaled(v), 1),
    "class": lambda v: nn.ReLU if v == 1 else nn.GELU,
    "type": lambda v: [] if v == 1 else (),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_settings_are_accepted(kind: str) -> None:
    models = [Model(setting=KINDS[kind](1)) for _ in range(3)]
    outputs = ModelBatch(models)(X)
    assert_close(outputs, torch.stack([model(X) for model in models]))


@pytest.mark.parametrize("kind", KINDS)
def test_different_settings_are_refused_and_named(kind: str) -> None:
    models = [Model(setting=KINDS[kind](value)) for value in (1, 1, 2)]
    with pytest.raises(IncompatibleModels, match=r"model 2 cannot share a batch with model 0: .*inner\.0\.setting"):
        ModelBatch(models)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["setting", "inner.0.setting"])
def test_settings_can_be_ignored_by_name(kind: str, name: str) -> None:
    models = [Model(setting=KINDS[kind](value), other=1) for value in (1, 2)]
    assert ModelBatch(models, ignore=(name,)).num_models == 2
    models[1].inner[0].other = 2
    with pytest.raises(IncompatibleModels, match=r"inner\.0\.other"):
        ModelBatch(models, ignore=(name,))


def test_ignoring_a_name_ignores_only_that_name() -> None:
    models = [nn.Sequential(nn.Dropout(p), nn.Dropout(p)) for p in (0.1, 0.2)]
    with pytest.raises(IncompatibleModels, match=r"1\.p is 0\.2, in model 0 0\.1"):
        ModelBatch(models, ignore=["0.p"])
    ModelBatch(models, ignore=["0.p", "1.p"])
    ModelBatch(models, ignore={"p"})


def test_nan_equals_nan() -> None:
    assert ModelBatch([Model(setting=float("nan")) for _ in range(2)]).num_models == 2


def test_a_setting_that_only_one_model_has() -> None:
    with pytest.raises(IncompatibleModels, match="model 1 .*'inner.0.extra' is extra"):
        ModelBatch([Model(), Model(extra=1)])
    with pytest.raises(IncompatibleModels, match="model 1 .*'inner.0.extra' is missing"):
        ModelBatch([Model(extra=1), Model()])


def test_the_mode_is_a_setting() -> None:
    models = [Model(), Model()]
    models[1].inner.eval()
    with pytest.raises(IncompatibleModels, match=r"inner\.training is False, in model 0 True|inner.*training"):
        ModelBatch(models)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh()), "submodules differ: .*'2' is extra"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "submodules differ: .*'1' is missing"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "submodule '1' is a ReLU, in model 0 a Linear"),
        (
            lambda: nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]),
            "the model is a ModuleList, in model 0 a Sequential",
        ),
    ],
)
def test_structures_that_differ(other: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(IncompatibleModels, match=f"model 1 .*{message}"):
        ModelBatch([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), other()])


@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleDict])
def test_the_order_of_submodules_counts(container: Any) -> None:
    """What runs first is part of the definition where a container runs its submodules in their order."""
    parts = {"a": nn.Linear(4, 4), "b": nn.Tanh()}
    one = container(collections.OrderedDict(parts))
    other = container(collections.OrderedDict(reversed(parts.items())))
    with pytest.raises(IncompatibleModels, match="model 1 .*order"):
        ModelBatch([one, other])


def test_tensors_that_differ() -> None:
    def model(**buffers: Tensor | None) -> nn.Module:
        made = nn.Linear(4, 4)
        for name, value in buffers.items():
            made.register_buffer(name, value)
        return made

    for one, other, message in (
        ({}, {"b": torch.zeros(1)}, "'b' is extra"),
        ({"b": torch.zeros(1)}, {}, "'b' is missing"),
        ({"b": torch.zeros(1)}, {"b": None}, "b is None in it only"),
        ({"b": torch.zeros(1)}, {"b": torch.zeros(2)}, r"b has shape \(2,\), in model 0 \(1,\)"),
        ({"b": torch.zeros(1)}, {"b": torch.zeros(1).int()}, "b has dtype torch.int32"),
    ):
        with pytest.raises(IncompatibleModels, match=f"model 1 .*{message}"):
            ModelBatch([model(**one), model(**other)])


def test_buffers_that_a_state_dict_leaves_out() -> None:
    models = [nn.Linear(4, 4) for _ in range(2)]
    for model, persistent in zip(models, (True, False), strict=True):
        model.register_buffer("b", torch.zeros(1), persistent=persistent)
    with pytest.raises(IncompatibleModels, match="model 1"):
        ModelBatch(models)


def test_ties_count() -> None:
    def model(tied: bool) -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if tied:
            made[1].weight = made[0].weight
        return made

    for one, other in ((True, False), (False, True)):
        with pytest.raises(IncompatibleModels, match="model 1 .*tied"):
            ModelBatch([model(one), model(other)])
    assert ModelBatch([model(True), model(True)]).num_models == 2


def test_a_shared_submodule_is_not_two_equal_ones() -> None:
    shared = nn.Linear(4, 4)
    with pytest.raises(IncompatibleModels, match="model 1"):
        ModelBatch([nn.Sequential(shared, shared), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])


def local_class(factor: float, second: bool = False) -> type[nn.Module]:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * factor

    class Derived(Local):
        def extra(self) -> int:
            return 1

    return Derived if second else Local


def test_a_class_made_anew_by_a_function_is_one_class_if_its_code_is() -> None:
    models = [local_class(2.0)() for _ in range(2)]
    assert type(models[0]) is not type(models[1])
    assert_close(ModelBatch(models)(X), torch.stack([model(X) for model in models]))
    assert ModelBatch([local_class(2.0, True)() for _ in range(2)]).num_models == 2
    with pytest.raises(IncompatibleModels, match="model 1"):
        ModelBatch([local_class(2.0)(), local_class(3.0)()])
    with pytest.raises(IncompatibleModels, match="model 1"):
        ModelBatch([local_class(2.0, True)(), local_class(3.0, True)()])
    with pytest.raises(IncompatibleModels, match="model 1"):
        ModelBatch([local_class(2.0)(), local_class(2.0, True)()])


class ByName(nn.Linear):
    """A subclass without any change of its own."""


def test_a_subclass_is_another_class() -> None:
    with pytest.raises(IncompatibleModels, match="model 1 .*the model is a ByName, in model 0 a Linear"):
        ModelBatch([nn.Linear(4, 4), ByName(4, 4)])


def test_parametrized_modules() -> None:
    def normed(dim: int = 0) -> nn.Module:
        return parametrizations.weight_norm(nn.Linear(4, 4), dim=dim)

    models = [normed() for _ in range(2)]
    assert_close(ModelBatch(models)(X), torch.stack([model(X) for model in models]))
    with pytest.raises(IncompatibleModels, match="model 1 "):
        ModelBatch([normed(0), normed(1)])
    with pytest.raises(IncompatibleModels, match="model 1 "):
        ModelBatch([normed(), nn.Linear(4, 4)])
    with pytest.raises(IncompatibleModels, match="model 1 "):
        ModelBatch([normed(), parametrizations.spectral_norm(nn.Linear(4, 4))])


def test_forward_hooks_count() -> None:
    def hooked(factor: float | None) -> nn.Module:
        model = nn.Linear(4, 4)
        if factor is not None:
            model.register_forward_hook(lambda module, args, output: output * factor)
        return model

    models = [hooked(2.0) for _ in range(2)]
    assert_close(ModelBatch(models)(X), torch.stack([model(X) for model in models]))
    for one, other in ((2.0, 3.0), (2.0, None), (None, 2.0)):
        with pytest.raises(IncompatibleModels, match="model 1 .*_forward_hooks"):
            ModelBatch([hooked(one), hooked(other)])


def test_bound_methods() -> None:
    """A method is its function and the object it belongs to; that of the model itself is no difference."""

    class Own(Model):
        def __init__(self, name: str = "double") -> None:
            super().__init__()
            self.act = getattr(self, name)

        def double(self, x: Tensor) -> Tensor:
            return 2 * x

        def triple(self, x: Tensor) -> Tensor:
            return 3 * x

    assert ModelBatch([Own(), Own()]).num_models == 2
    with pytest.raises(IncompatibleModels, match="model 1 .*act"):
        ModelBatch([Own(), Own("triple")])


def test_objects_that_refer_to_themselves() -> None:
    def circular() -> Any:
        ring: dict[str, Any] = {"value": 1}
        ring["self"] = [ring]
        return ring

    assert ModelBatch([Model(setting=circular()) for _ in range(2)]).num_models == 2


def test_settings_that_hold_the_model_s_own_tensors_and_submodules() -> None:
    class Cross(Model):
        def __init__(self) -> None:
            super().__init__()
            self.listed = [self.inner[0].weight]
            self.also = {"inner": (self.inner,)}

    models = [Cross() for _ in range(2)]
    assert_close(ModelBatch(models)(X), torch.stack([model(X) for model in models]))


def test_the_first_difference_is_named_only() -> None:
    with pytest.raises(IncompatibleModels) as caught:
        ModelBatch([Model(a=1, b=1), Model(a=2, b=2)])
    assert "inner.0.a is 2, in model 0 1" in str(caught.value)
    assert "inner.0.b" not in str(caught.value)


def test_models_are_not_changed_by_being_compared() -> None:
    models = [Model(setting=KINDS["closure"](1)) for _ in range(2)]
    before = [(dict(vars(model)), dict(vars(model.inner[0]))) for model in models]
    ModelBatch(models)
    for model, (own, inner) in zip(models, before, strict=True):
        assert vars(model) == own
        assert vars(model.inner[0]) == inner


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_two_modules_of_one_kind_are_compatible(case: Any) -> None:
    assert ModelBatch([case.build(1), case.build(2)]).num_models == 2


def test_a_batch_can_be_built_one_by_one_with_ignored_settings() -> None:
    rates = iter([0.1, 0.2])
    mb = ModelBatch.from_factory(lambda: nn.Dropout(next(rates)), seeds=[1, 2], ignore=("p",))
    assert mb.prototype.p == 0.1
