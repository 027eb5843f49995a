"""The state of per-model optimizers: stacked in memory, in torch's own structure in state dicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mb_torch.errors import InvalidState
from mb_torch.stacked.buckets import Value
from mb_torch.stacked.model_view import Stack
from mb_torch.stacked.updates import Rule


class StackedOptimizerState:
    """State tensors ``[num_models, ...]`` of every stack, and the counters of every model.

    torch.optim counts the steps of each parameter by itself, because one without a gradient is skipped.
    Stacks that were always updated together share a clock: the counters of an update rule, each a float while
    all models agree.

    Args:
        rule: The optimizer's rule.
        stacks: Trainable parameters.
        num_models: How many models there are.
        initial: Where state tensors start that do not start at zero: for each of them a number per model.
    """

    def __init__(
        self, rule: Rule, stacks: Sequence[Stack], num_models: int, initial: Mapping[str, Sequence[float]]
    ) -> None:
        self.rule = rule
        self.stacks = list(stacks)
        self.num_models = num_models
        self.clocks: list[list[Value]] = [[self.value([start] * num_models) for start in rule.first_clock]]
        self.clock_of = [0] * len(self.stacks)
        # torch.optim keeps its counters in float64 if that is the default dtype when an optimizer is made.
        wide = torch.get_default_dtype() == torch.float64
        self.counter_dtype = torch.float64 if wide else torch.float32
        self._initial = {name: list(values) for name, values in initial.items()}
        self._tensors: dict[str, list[Tensor | None]] = {name: [None] * len(stacks) for name in rule.tensors}
        for name in rule.initial:
            for position in range(len(self.stacks)):
                self.tensor(name, position)

    def tensor(self, name: str, position: int) -> Tensor:
        """Return a state tensor of a stack, made when it is first needed."""
        tensor = self._tensors[name][position]
        if tensor is None:
            tensor = self.stored(torch.zeros_like(self.stacks[position].parameter, requires_grad=False))
            if name in self._initial:
                for model in range(self.num_models):
                    self._reset(name, model, tensor[model])
            self._tensors[name][position] = tensor
        return tensor

    def stored(self, tensor: Tensor) -> Tensor:
        """The form in which a state tensor is kept."""
        return tensor

    def _reset(self, name: str, model: int, row: Tensor) -> None:
        start = self._initial[name][model] if name in self._initial else 0.0
        row.fill_(complex(start, start) if row.is_complex() else start)

    def value(self, values: Sequence[float]) -> Value:
        """Return one number per model as a float where they agree and that is as exact as a tensor.

        An accelerator's arithmetic may differ from the host's in the last bit, and what one model changes must not
        decide which of the two its companions get.
        """
        device = self.stacks[0].parameter.device
        if (self.num_models == 1 or device.type == "cpu") and values.count(values[0]) == len(values):
            return values[0]
        return torch.tensor(values, dtype=torch.float64, device=device)

    def split_clocks(self, present: Sequence[bool]) -> None:
        """Give stacks that are skipped a clock of their own."""
        if all(present):
            return
        for index in range(len(self.clocks)):
            members = [position for position, owner in enumerate(self.clock_of) if owner == index]
            skipped = [position for position in members if not present[position]]
            if skipped and len(skipped) < len(members):
                values = self.clocks[index]
                self.clocks.append([v.clone() if isinstance(v, Tensor) else v for v in values])
                for position in skipped:
                    self.clock_of[position] = len(self.clocks) - 1

    def counts(self, position: int) -> list[list[float]]:
        """Return every counter of a stack, for all models."""
        clock = self.clocks[self.clock_of[position]]
        return [v.tolist() if isinstance(v, Tensor) else [v] * self.num_models for v in clock]

    def move(self) -> None:
        """Follow the stacks to their device and dtype."""
        for tensors in self._tensors.values():
            for position, tensor in enumerate(tensors):
                if tensor is not None:
                    tensors[position] = self.stored(tensor.to(self.stacks[position].parameter))
        self.set_counts([self.counts(position) for position in range(len(self.stacks))])

    def pack(self, models: Sequence[int], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the state of one model or of all as a plain optimizer's state dict.

        Args:
            models: One model, or all in order.
            groups: The parameter groups of all models.
        """
        count = len(self.stacks)
        rows = [self._rows(position, models, groups) for position in range(count)]
        state = {
            place * count + position: own[place]
            for place in range(len(models))
            for position, own in enumerate(rows)
            if own[place] is not None
        }
        packed = [
            {**options(groups[model]), "params": list(range(place * count, (place + 1) * count))}
            for place, model in enumerate(models)
        ]
        return {"state": state, "param_groups": packed}

    def _rows(
        self, position: int, models: Sequence[int], groups: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Tensor] | None]:
        """For each of the models its state of one parameter, as copies; None where it has none."""
        chosen = slice(models[0], models[-1] + 1)
        tensors = {
            name: own[position][chosen].clone()  # type: ignore[index]
            for name, own in self._tensors.items()
            if own[position] is not None
        }
        counts = self.counts(position)
        counters = {
            name: torch.tensor(values[chosen], dtype=self.counter_dtype)
            for name, values in zip(self.rule.counters, counts, strict=True)
            if name in self.rule.saved_counters
        }
        rows: list[dict[str, Tensor] | None] = []
        for place, model in enumerate(models):
            if not self.has_state(counts, model):
                rows.append(None)
                continue
            row = {name: values[place] for name, values in counters.items()}
            needed = self.rule.needed(groups[model])
            for name in self.rule.tensors:
                # A buffer stays in a plain optimizer's state after the option that made it is off.
                if name in tensors and (name in needed or bool(tensors[name][place].any())):
                    row[name] = tensors[name][place]
                elif name in needed:
                    row[name] = torch.zeros_like(self.stacks[position].parameter.detach()[model])
            rows.append(row)
        return rows

    def has_state(self, counts: Sequence[Sequence[float]], model: int) -> bool:
        """Whether a plain optimizer would have state by now: from its first step on, or at once."""
        return bool(self.rule.initial) or counts[0][model] > 0

    def check(self, model: int, state: Mapping[int, Any], group: Mapping[str, Any]) -> None:
        """Raise `InvalidState` unless a single model's state can be loaded.

        Args:
            model: Which model it is for.
            state: Entries by position of the parameter.
            group: The parameter group that comes with it.
        """
        saved, needed = self.rule.saved_counters, self.rule.needed(group)
        for position, entry in state.items():
            stack = self.stacks[position]
            where = f"model {model}: state of parameter {stack.name!r}"
            if not isinstance(entry, Mapping):
                _refuse(where, type(entry).__name__, "a dict")
            unknown = sorted(str(name) for name in set(entry) - {*saved, *self.rule.tensors})
            if unknown:
                _refuse(where, f"entries {unknown}", f"entries among {[*saved, *self.rule.tensors]}")
            missing = [name for name in (*saved, *needed) if entry.get(name) is None]
            # SGD has no counters and is as good as new without its buffer.
            if missing and saved:
                _refuse(where, f"entries {sorted(entry)}", f"also {missing}")
            for name, value in entry.items():
                _check_entry(f"{where}: {name!r}", value, stack, counter=name in saved)

    def load(self, model: int, state: Mapping[int, Mapping[str, Any]], counts: list[list[list[float]]]) -> None:
        """Take over a checked state of one model.

        Args:
            model: Which model.
            state: Entries by position of the parameter; parameters without one start anew.
            counts: Per stack its counters for all models; model i's are changed. `set_counts` makes them
                valid.
        """
        for position in range(len(self.stacks)):
            entry = state.get(position, {})
            for name in self.rule.tensors:
                value = entry.get(name)
                if value is not None:
                    self.tensor(name, position)[model].copy_(value)
                elif self._tensors[name][position] is not None:
                    self._reset(name, model, self.tensor(name, position)[model])
            for own, value in zip(counts[position], self._counters(entry), strict=True):
                own[model] = value

    def _counters(self, entry: Mapping[str, Any]) -> list[float]:
        if not self.rule.saved_counters:
            used = any(value is not None for value in entry.values())
            return [2.0 if used else 0.0]
        first = zip(self.rule.counters, self.rule.first_clock, strict=True)
        return [float(entry.get(name, start)) for name, start in first]

    def set_counts(self, counts: Sequence[Sequence[Sequence[float]]]) -> None:
        """Set the counters: for each stack and counter one value per model. Equal ones share a clock."""
        keys = [tuple(tuple(values) for values in own) for own in counts]
        distinct = list(dict.fromkeys(keys))
        self.clocks = [[self.value(own) for own in key] for key in distinct]
        self.clock_of = [distinct.index(key) for key in keys]


class StateOfViews(Mapping[Tensor, dict[str, Any]]):
    """A stacked state as ``Optimizer.state`` shows it: parameter view -> name -> value.

    Args:
        state: The stacked state; its tensors are shown as they are, counters as copies.
        groups: The parameter groups of all models.
    """

    def __init__(self, state: StackedOptimizerState, groups: Sequence[Mapping[str, Any]]) -> None:
        self._state = state
        self._groups = groups

    def _places(self) -> dict[Tensor, tuple[int, int]]:
        counts = [self._state.counts(position) for position in range(len(self._state.stacks))]
        return {
            view: (model, position)
            for model, group in enumerate(self._groups)
            for position, view in enumerate(group["params"])
            if self._state.has_state(counts[position], model)
        }

    def __getitem__(self, view: Tensor) -> dict[str, Any]:
        model, position = self._places()[view]
        rule = self._state.rule
        entry: dict[str, Any] = {
            name: torch.tensor(values[model], dtype=self._state.counter_dtype)
            for name, values in zip(rule.counters, self._state.counts(position), strict=True)
            if name in rule.saved_counters
        }
        needed = rule.needed(self._groups[model])
        return entry | {name: self._state.tensor(name, position)[model] for name in needed}

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._places())

    def __len__(self) -> int:
        return len(self._places())


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _check_entry(where: str, value: Any, stack: Stack, *, counter: bool) -> None:
    if counter:
        if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
            _refuse(where, type(value).__name__, "a number")
        if not math.isfinite(float(value)):
            _refuse(where, str(float(value)), "a finite number")
    elif isinstance(value, Tensor):
        check_shape(where, value, stack.parameter.shape[1:])
        if value.is_complex() != stack.parameter.is_complex():
            _refuse(where, str(value.dtype), str(stack.parameter.dtype))
    elif value is not None:
        _refuse(where, type(value).__name__, "a tensor")


def check_shape(where: str, value: Tensor, shape: torch.Size) -> None:
    """Raise `InvalidState` unless a state tensor has values, and its parameter's shape."""
    if value.is_meta or value.layout != torch.strided:
        _refuse(where, f"a tensor of layout {value.layout} on {value.device}", "a dense tensor with values")
    if value.shape != shape:
        _refuse(where, f"shape {list(value.shape)}", f"shape {list(shape)}")


def split_state(
    state_dict: Mapping[str, Any], num_models: int, num_params: int, first_model: int = 0
) -> list[dict[str, Any]]:
    """Split an optimizer state with one group per model into the states of single models.

    Args:
        state_dict: As a plain torch optimizer writes it.
        num_models: How many groups there must be.
        num_params: How many parameters each must have.
        first_model: What errors call the first one.

    Returns:
        For each model a state dict with one group, whose parameters are numbered from 0.

    Raises:
        InvalidState: The structure is another one.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        _refuse("optimizer state", type(state_dict).__name__, "a dict with 'state' and 'param_groups'")
    groups, state = state_dict["param_groups"], dict(state_dict["state"])
    if len(groups) != num_models:
        raise InvalidState(
            "optimizer state",
            received=f"{len(groups)} parameter groups",
            expected=f"{num_models}, one per model",
            fix="Load the state of a single model with load_model_state_dict(i, state).",
        )
    result = []
    for model, group in enumerate(groups, start=first_model):
        if len(group["params"]) != num_params:
            _refuse(f"model {model}: parameter group", f"{len(group['params'])} parameters", f"{num_params}")
        own = {new: state.pop(old) for new, old in enumerate(group["params"]) if old in state}
        result.append({"state": own, "param_groups": [{**group, "params": list(range(num_params))}]})
    if state:
        _refuse("optimizer state", f"entries {[*state][:5]} of no parameter group", "entries of parameters only")
    return result


def _refuse(problem: str, received: str, expected: str) -> NoReturn:
    raise InvalidState(problem, received=received, expected=expected)
