"""What a forward pass leaves on a module, and that it can be forgotten."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from mb_torch.errors import Unsupported
from mb_torch.stacked.leftovers import Forgotten, Leftovers
from tests.compare import assert_close
from tests.zoo import by_name


class Keeping(nn.Module):
    """Keeps its features in every way there is, beside a constant that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.constant = torch.arange(3.0)
        self.features: Tensor | None = None
        self.history: dict[str, list[Tensor]] = {"hidden": []}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + self.constant
        self.features = y.detach()
        self.history["hidden"] = [*self.history["hidden"], y]
        self.linear.seen = (self.constant, y)
        return y.square().sum()


def run(model: nn.Module, how: str) -> None:
    def one(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (torch.ones(2, 4),))

    parameters = {name: torch.stack([p.detach(), p.detach()]) for name, p in model.named_parameters()}
    if how == "plain":
        model(torch.ones(2, 4))
    else:
        torch.vmap(grad(one) if how == "gradient inside" else one)(parameters)


@pytest.mark.parametrize("how", ["plain", "vmap", "gradient inside"])
def test_what_a_pass_left_is_forgotten(how: str) -> None:
    model = Keeping()
    leftovers = Leftovers(model)
    constant = model.constant
    assert not leftovers.forget()
    for _ in range(2):
        run(model, how)
        assert leftovers.forget()
        assert not leftovers.forget()
        assert model.constant is constant
        assert model.linear.seen[0] is constant
        kept = [model.features, *model.history["hidden"], model.linear.seen[1]]
        assert all(tensor.is_meta and tensor.shape == (2, 3) for tensor in kept)
    pickle.dumps(model)
    assert torch.equal(copy.deepcopy(model).constant, constant)


class Pair(NamedTuple):
    """A container that is built from its items one by one."""

    name: str
    value: Tensor


def test_every_container_is_searched_and_kept() -> None:
    model = nn.Module()
    leftovers = Leftovers(model)
    endless: list[object] = [torch.ones(2)]
    endless.append(endless)
    mapping = OrderedDict(pair=Pair("first", torch.ones(3)), nested=(torch.ones(4), [torch.ones(5), "text"]))
    model.endless, model.mapping = endless, mapping
    assert leftovers.forget()
    assert model.endless is endless is endless[1]
    assert model.mapping is mapping
    found = [endless[0], mapping["pair"].value, mapping["nested"][0], mapping["nested"][1][0]]
    assert [(type(tensor), *tensor.shape) for tensor in found] == [(Forgotten, size) for size in (2, 3, 4, 5)]
    assert (mapping["pair"].name, mapping["nested"][1][1]) == ("first", "text")
    assert not leftovers.forget()


@pytest.mark.parametrize("how", ["plain", "vmap"])
def test_known_places_are_reset_without_a_search(how: str) -> None:
    model = Keeping()
    leftovers = Leftovers(model)
    leftovers.reset()
    assert model.features is None
    for _ in range(2):
        run(model, how)
        leftovers.forget()
        placeholder = model.features
        run(model, how)
        leftovers.reset()
        assert model.features is placeholder


def test_without_forgetting_a_module_can_be_neither_copied_nor_pickled() -> None:
    model = Keeping()
    run(model, "vmap")
    with pytest.raises((RuntimeError, NotImplementedError)):
        copy.deepcopy(model)
    with pytest.raises((RuntimeError, NotImplementedError)):
        pickle.dumps(model)


@pytest.mark.parametrize(
    "read",
    [
        lambda real, kept: real + kept,
        lambda real, kept: kept * real,
        lambda real, kept: real.add_(kept),
        lambda real, kept: real.copy_(kept),
        lambda real, kept: torch.stack([real, kept]),
        lambda real, kept: torch.vmap(lambda x: x + kept)(torch.stack([real, real])),
        lambda real, kept: nn.functional.linear(torch.zeros(2, 2), kept),
        lambda real, kept: kept.detach(),
        lambda real, kept: kept.sum(),
        lambda real, kept: float(kept),
        lambda real, kept: bool(kept.any()),
    ],
)
@pytest.mark.parametrize("shape", [(2,), ()])
def test_what_is_read_after_it_was_forgotten_raises(
    read: Callable[[Tensor, Tensor], object], shape: tuple[int, ...]
) -> None:
    model = nn.Module()
    leftovers = Leftovers(model)
    model.kept = torch.ones(shape, dtype=torch.float64)
    leftovers.forget()
    for own in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (own.kept.shape, own.kept.dtype, own.kept.dim()) == (shape, torch.float64, len(shape))
        with pytest.raises(Unsupported, match="register_buffer"):
            read(torch.zeros(shape), own.kept)


@pytest.mark.parametrize("name", ["pruned", "spectral_norm_hook"])
def test_a_hook_compiles_with_its_weight_reset(name: str) -> None:
    case = by_name[name]
    model = case.build(1).eval()
    args, kwargs = case.batch()
    leftovers = Leftovers(model)
    parameters = {name: torch.stack([p.detach(), 0.5 * p.detach()]) for name, p in model.named_parameters()}

    def one(own: dict[str, Tensor]) -> Tensor:
        value = functional_call(model, own, args, kwargs).square().sum()
        leftovers.reset()
        return value

    mapped = torch.vmap(grad(one))
    expected = mapped(parameters)
    assert leftovers.forget()
    received = torch.compile(mapped, backend="aot_eager", fullgraph=True)(parameters)
    torch._dynamo.reset()
    assert_close(received, expected)
    assert not leftovers.forget()


@pytest.mark.parametrize("name", ["weight_norm_hook", "weight_norm_hook_lstm", "spectral_norm_hook", "pruned"])
def test_a_hook_computes_its_weight_anew(name: str) -> None:
    case = by_name[name]
    model = case.build(1)
    args, kwargs = case.batch()
    leftovers = Leftovers(model)
    expected = model.eval()(*args, **kwargs)
    assert leftovers.forget()
    received = model(*args, **kwargs)
    assert torch.equal(
        torch.cat([r.flatten() for r in flat(received)]), torch.cat([e.flatten() for e in flat(expected)])
    )


def flat(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [leaf for part in outputs for leaf in flat(part)]
