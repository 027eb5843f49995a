"""The stacked state of a batch: N models' parameters and buffers as ``[num_models, ...]`` tensors.

Names are those of a single model. The stacks live in a tree of plain modules that mirrors the model's own tree, so
``a.b_c`` and ``a_b.c`` stay apart, ``state_dict()`` nests as usual and ``.to()`` moves everything.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mb_torch.compatibility import check_compatible
from mb_torch.errors import InvalidInput, InvalidState, Unsupported

ModelState = dict[str, Tensor]


class StackTree(nn.Module):
    """One level of the module tree that holds the stacks under the models' own names."""


class StackedState:
    """All models' parameters and buffers, each stacked along a new first dimension.

    Args:
        names: Every name a tensor has in a model, to its first name (tied tensors have several names).
        parameters: First name to stacked parameter ``[num_models, ...]``.
        buffers: First name to stacked buffer ``[num_models, ...]``.
        transient: Names of the buffers that a ``state_dict`` leaves out (``persistent=False``).
    """

    def __init__(
        self,
        names: Mapping[str, str],
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        transient: Collection[str] = (),
    ) -> None:
        self.names = dict(names)
        self.tree = StackTree()
        self._parameters = {name: self._owner(name) for name in parameters}
        self._buffers = {name: self._owner(name) for name in buffers}
        for name, first in self.names.items():
            owner, leaf = self._owner(name)
            if first in parameters:
                owner.register_parameter(leaf, parameters[first])
            else:
                owner.register_buffer(leaf, buffers[first], persistent=name not in transient)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        node: nn.Module = self.tree
        for part in path:
            if part not in node._modules:
                # add_module refuses names such as "type", which a model's own __setattr__ accepts.
                node._modules[part] = StackTree()
            node = node._modules[part]  # type: ignore[assignment]
        return node, leaf

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """First name to stacked parameter ``[num_models, ...]``, in the order of ``model.parameters()``."""
        return {name: owner._parameters[leaf] for name, (owner, leaf) in self._parameters.items()}  # type: ignore[misc]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """First name to stacked buffer ``[num_models, ...]``."""
        return {name: owner._buffers[leaf] for name, (owner, leaf) in self._buffers.items()}  # type: ignore[misc]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters, then buffers, by first name, without gradient tracking."""
        return {name: tensor.detach() for name, tensor in (*self.parameters.items(), *self.buffers.items())}

    def retie_buffers(self) -> None:
        """Make all names of a tied buffer one tensor again: ``Module._apply`` converts each name by itself."""
        for name, first in self.names.items():
            if name != first and first in self._buffers:
                owner, leaf = self._owner(name)
                first_owner, first_leaf = self._buffers[first]
                owner._buffers[leaf] = first_owner._buffers[first_leaf]

    def model_tensors(self, index: int) -> dict[str, Tensor]:
        """Views of one model's tensors by first name; they share memory with the stacks."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class StackBuilder:
    """Builds a prototype and the stacks model by model, so that no more than one extra model need exist at a time.

    Args:
        first: Model 0; the prototype is its copy on the meta device.
        num_models: How many models will be added.
        device: Where the stacks go; by default where each tensor of ``first`` is.
        ignore: Names of settings in which the models may differ.
    """

    def __init__(
        self,
        first: nn.Module,
        num_models: int,
        *,
        device: torch.device | str | None = None,
        ignore: Collection[str] = (),
    ) -> None:
        _check_stackable(first)
        self.prototype = meta_copy(first)
        self.ignore = ignore
        self.added = 0
        self.names = first_names(first)
        self.stacks: dict[str, Tensor] = {}
        for name, tensor in _named_tensors(first).items():
            self.stacks[name] = torch.empty(
                (num_models, *tensor.shape), dtype=tensor.dtype, device=device or tensor.device
            )

    def add(self, model: nn.Module) -> None:
        """Copy the next model's values into the stacks.

        Raises:
            IncompatibleModels: The model differs from model 0 in more than values.
            Unsupported: A parameter has hooks.
        """
        if not isinstance(model, nn.Module):
            raise InvalidInput(f"model {self.added}", received=type(model).__name__, expected="a torch.nn.Module")
        check_compatible(self.prototype, model, self.added, self.ignore)
        for name, tensor in _named_tensors(model).items():
            if tensor.is_leaf and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks):
                raise Unsupported(
                    f"model {self.added}: {name!r} has hooks, which its copy in a stack would lack",
                    fix="Register them on stacked_params[name] of the batch.",
                )
            self.stacks[name][self.added].copy_(tensor.detach())
        self.added += 1

    def finish(self) -> tuple[nn.Module, StackedState]:
        """Return the prototype and the stacks of all models added."""
        parameters = {
            name: nn.Parameter(self.stacks[name], requires_grad=parameter.requires_grad)
            for name, parameter in self.prototype.named_parameters()
        }
        buffers = {name: tensor for name, tensor in self.stacks.items() if name not in parameters}
        return self.prototype, StackedState(self.names, parameters, buffers, transient_names(self.prototype))


def select_models(state: StackedState, prototype: nn.Module, indices: Tensor) -> StackedState:
    """Copy the stacks of some models, in the order of ``indices`` ``[count]``."""
    parameters = {
        name: nn.Parameter(p.detach().index_select(0, indices.to(p.device)), requires_grad=p.requires_grad)
        for name, p in state.parameters.items()
    }
    buffers = {name: b.index_select(0, indices.to(b.device)) for name, b in state.buffers.items()}
    return StackedState(state.names, parameters, buffers, transient_names(prototype))


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy a module with its parameters and buffers on the meta device: a definition without memory."""
    replaced: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        replaced[id(buffer)] = torch.empty_like(buffer, device="meta")
    return _copy_with(module, replaced)


def materialise(prototype: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy the prototype with real tensors, given by first name; ties and ``requires_grad`` are kept."""
    replaced: dict[int, Any] = {
        id(parameter): nn.Parameter(tensors[name], requires_grad=parameter.requires_grad)
        for name, parameter in prototype.named_parameters()
    }
    replaced.update((id(buffer), tensors[name]) for name, buffer in prototype.named_buffers())
    return _copy_with(prototype, replaced)


def _copy_with(module: nn.Module, replaced: dict[int, Any]) -> nn.Module:
    for submodule in module.modules():
        for value in vars(submodule).values():
            # deepcopy refuses tensors that are results, such as the weight a weight_norm hook has computed.
            if isinstance(value, Tensor) and value.grad_fn is not None:
                replaced[id(value)] = value.detach()
    return copy.deepcopy(module, replaced)


def first_names(module: nn.Module) -> dict[str, str]:
    """Every name of every tensor, to the first name of the same tensor."""
    firsts: dict[int, str] = {}
    names = {}
    for name, tensor in _all_named_tensors(module):
        names[name] = firsts.setdefault(id(tensor), name)
    return names


def transient_names(module: nn.Module) -> set[str]:
    """Names of the buffers that are left out of ``state_dict``."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, submodule in module.named_modules(remove_duplicate=False)
        for name in submodule._non_persistent_buffers_set
    }


def _all_named_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _check_stackable(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise InvalidInput("model 0", received=type(module).__name__, expected="a torch.nn.Module")
    for name, tensor in _all_named_tensors(module):
        if is_lazy(tensor):
            raise InvalidInput(
                f"{name} of model 0 has no shape yet",
                fix="Run every lazy model once on an example batch first.",
            )
        if tensor.layout is not torch.strided:
            raise Unsupported(f"{name} of model 0 has layout {tensor.layout}; only dense tensors can be stacked")


def model_states(prototype: nn.Module, state: StackedState, num_models: int) -> list[ModelState]:
    """One ``state_dict`` per model, copied out of the stacks."""
    definition = prototype.state_dict()
    unstacked = {name: tensor.unbind(0) for name, tensor in state.tensors.items()}
    states: list[ModelState] = []
    for index in range(num_models):
        values = {}
        for key, placeholder in definition.items():
            first = state.names.get(key)
            if first is None and isinstance(placeholder, Tensor) and placeholder.is_meta:
                raise Unsupported(f"state_dict() of the model renames a tensor to {key!r}; its value is not known")
            values[key] = placeholder if first is None else unstacked[first][index].clone()
        states.append(values)
    return states


def load_model_states(prototype: nn.Module, state: StackedState, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Copy per-model states into the stacks; all of them are checked before any is loaded."""
    expected = [key for key, value in prototype.state_dict().items() if isinstance(value, Tensor)]
    stacks = state.tensors
    for index, values in enumerate(states):
        _check_state(index, values, expected, state.names, stacks)
    for index, values in enumerate(states):
        for key in expected:
            stacks[state.names[key]][index].copy_(values[key])


def _check_state(
    index: int,
    values: Mapping[str, Tensor],
    expected: Sequence[str],
    names: Mapping[str, str],
    stacks: Mapping[str, Tensor],
) -> None:
    nothing_loaded = "Nothing was loaded."
    if not isinstance(values, Mapping):
        raise InvalidState(f"state of model {index}", received=type(values).__name__, expected="a state_dict")
    tensors = {key: value for key, value in values.items() if not key.endswith("_extra_state")}
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    if missing or unknown:
        raise InvalidState(
            f"state of model {index} does not fit: missing keys {missing}, unknown keys {unknown}",
            fix=nothing_loaded,
        )
    for key, value in tensors.items():
        stack = stacks[names[key]]
        if not isinstance(value, Tensor):
            raise InvalidState(
                f"state of model {index}, key {key!r}",
                received=type(value).__name__,
                expected="a tensor",
                fix=nothing_loaded,
            )
        if value.is_meta or value.layout != torch.strided:
            raise InvalidState(
                f"state of model {index}, key {key!r}",
                received="a tensor on the meta device" if value.is_meta else f"a tensor of layout {value.layout}",
                expected="a dense tensor with values",
                fix=nothing_loaded,
            )
        if value.shape != stack.shape[1:] or value.dtype != stack.dtype:
            raise InvalidState(
                f"state of model {index}, key {key!r}",
                received=f"{value.dtype} of shape {tuple(value.shape)}",
                expected=f"{stack.dtype} of shape {tuple(stack.shape[1:])}",
                fix=nothing_loaded,
            )
        tied = values[names[key]] if names[key] in tensors else value
        if tied is not value and not torch.equal(tied, value):
            raise InvalidState(
                f"state of model {index}: {key!r} and {names[key]!r} are one tied tensor but hold different values",
                fix=nothing_loaded,
            )
