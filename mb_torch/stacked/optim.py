"""Per-model optimizers on whole stacks: `make_optimizer` chooses, `StackedOptimizer` updates.

What a rule is stands in `mb_torch.stacked.updates`, the rules in `mb_torch.stacked.update_rules`; what no rule covers
goes through `mb_torch.stacked.views.ViewOptimizer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mb_torch.configs import call_with_config, check_configs
from mb_torch.errors import InvalidInput, InvalidState, Unsupported
from mb_torch.stacked.buckets import Bucket, Value, as_rows
from mb_torch.stacked.model_view import Stack
from mb_torch.stacked.optimizer_state import StackedOptimizerState, StateOfViews, options, split_state
from mb_torch.stacked.update_rules import RULES
from mb_torch.stacked.updates import Rule, Static, UpdateInputs, as_real, next_step, update_bucket
from mb_torch.stacked.views import PerModelOptimizer, ViewOptimizer, refuse_unsupported_groups

# Stacks are updated in buckets of about this size, so that temporaries stay in the cache of a CPU and small
# beside the stacks on an accelerator, where each operation costs more to start.
_BUCKET_BYTES = {"cpu": 1 << 19}
_BUCKET_BYTES_ELSEWHERE = 1 << 26


def make_optimizer(
    optimizer_cls: type[Optimizer],
    configs: Sequence[Mapping[str, Any]],
    stacks: Mapping[str, nn.Parameter],
    num_models: int,
    stack_cls: type[Stack] = Stack,
    stacked_cls: type[StackedOptimizer] | None = None,
) -> PerModelOptimizer:
    """Return an optimizer with one live parameter group per model.

    Args:
        optimizer_cls: A class derived from ``torch.optim.Optimizer``.
        configs: Its options, one dict per model.
        stacks: Parameters by name, each ``[num_models, ...]``; frozen ones are left out.
        num_models: How many models there are.
        stack_cls: A backend's own kind of stack.
        stacked_cls: A backend's own kind of `StackedOptimizer`.

    Returns:
        A `StackedOptimizer` where there is a rule for the class and the models agree on its switches, else a
        `ViewOptimizer`.

    Raises:
        InvalidInput: Names the model and the option that is refused, or says that nothing is trainable.
        Unsupported: ``differentiable=True``.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> optimizer = make_optimizer(torch.optim.SGD, [{"lr": 0.1}, {"lr": 0.5}], {"weight": weight}, 2)
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> weight[:, 0].tolist()
        [0.8999999761581421, 0.5]
    """
    own = check_configs(configs, num_models)
    trainable = [stack_cls(name, parameter) for name, parameter in stacks.items() if parameter.requires_grad]
    if not trainable:
        raise InvalidInput("the models have no parameter that requires a gradient", received=[*stacks])
    rule_cls = _class_with_rule(optimizer_cls)
    if rule_cls is None:
        return ViewOptimizer(optimizer_cls, own, trainable, num_models)
    singles = [
        call_with_config(f"model {model}", optimizer_cls, ([nn.Parameter(torch.zeros(1))],), config)
        for model, config in enumerate(own)
    ]
    for model, single in enumerate(singles):
        refuse_unsupported_groups(f"model {model}: {optimizer_cls.__name__}", single)
    switches = [tuple(bool(single.param_groups[0][key]) for key in RULES[rule_cls].switches) for single in singles]
    if len(set(switches)) > 1:
        return ViewOptimizer(optimizer_cls, own, trainable, num_models)
    return (stacked_cls or StackedOptimizer)(RULES[rule_cls], singles, trainable, num_models)


def _class_with_rule(optimizer_cls: type[Optimizer]) -> type[Optimizer] | None:
    """The class whose rule describes what `optimizer_cls` does; None if it may do something else."""
    for base in optimizer_cls.__mro__:
        if base in RULES:
            return base if _same_step(optimizer_cls, base) else None
        # A subclass may choose other defaults, but no other behaviour. (torch itself wraps `step` in place.)
        if {name for name in vars(base) if not name.startswith("__")} - {"step"}:
            return None
    return None


def _same_step(one: type[Optimizer], other: type[Optimizer]) -> bool:
    return inspect.unwrap(one.step) is inspect.unwrap(other.step)


class _Piece(NamedTuple):
    """A bucket without its gradients: stacks updated together, or some models of one big stack."""

    positions: list[int]
    models: slice | None
    params: list[Tensor]
    state: dict[str, list[Tensor]]

    def with_grads(self, grads: Sequence[Tensor | None]) -> Bucket:
        own = as_real([grads[k] for k in self.positions])  # type: ignore[misc]
        if self.models is not None:
            own = [grad[self.models] for grad in own]
        return Bucket(self.params, own, self.state, self.models)


class PendingUpdate(NamedTuple):
    """A compiled step of an optimizer before it has run.

    Attributes:
        inputs: What `apply_updates` needs.
        clocks: Counters after the step, by the index of the clock.
    """

    inputs: UpdateInputs
    clocks: dict[int, list[Value]]


class _Compilable(NamedTuple):
    """A compiled update without its numbers: the clocks that tick, and what the update works on."""

    clocks: list[int]
    clock_of: tuple[int, ...]
    params: list[Tensor]
    state: dict[str, list[Tensor]]


class _Hyper(NamedTuple):
    """The hyper-parameters of one step."""

    groups: list[tuple[Any, ...]]
    columns: dict[str, list[float]]
    values: dict[str, Value]
    flags: dict[str, bool]
    reusable: bool
    """False if a value can change without being replaced, as a tensor can."""


class StackedOptimizer(PerModelOptimizer):
    """An optimizer that updates whole stacks, each model with its own hyper-parameters.

    Made by `make_optimizer`. The state is stacked too; `state` and `state_dict` show it as a plain optimizer
    would.

    Args:
        rule: What the optimizer does.
        singles: A plain optimizer of the wanted class for each model, from which options are taken.
        stacks: Trainable parameters.
        num_models: How many models there are.
    """

    state_cls: ClassVar[type[StackedOptimizerState]] = StackedOptimizerState

    def __init__(self, rule: Rule, singles: Sequence[Optimizer], stacks: Sequence[Stack], num_models: int) -> None:
        self.rule = rule
        self._options_of = itemgetter(*rule.numbers, *rule.switches)
        # Knows how a parameter group of any torch version becomes one of this version.
        self._single = singles[0]
        self.class_name = type(singles[0]).__name__
        initial = {name: [s.param_groups[0][key] for s in singles] for name, key in rule.initial.items()}
        self._stacked_state = self.state_cls(rule, stacks, num_models, initial)
        self._forget()
        groups = [
            {"params": [stack.view(model) for stack in stacks], **options(single.param_groups[0])}
            for model, single in enumerate(singles)
        ]
        super().__init__(stacks, num_models, groups, dict(singles[0].defaults))

    def _forget(self) -> None:
        """Drop what is derived from groups, clocks and storage."""
        self._hyper: _Hyper | None = None
        self._compilables: dict[Any, _Compilable] = {}
        self._plans: dict[Any, list[tuple[int, list[_Piece]]]] = {}

    @property
    def state(self) -> Any:
        """State by parameter view, as in a plain optimizer; tensors are live, counts are copies."""
        return StateOfViews(self._stacked_state, self.param_groups)

    @state.setter
    def state(self, value: Any) -> None:
        """Ignore the empty state that the constructor of every torch optimizer sets."""

    @property
    def _device(self) -> torch.device:
        return self._stacks[0].parameter.device

    def _update(self, grads: list[Tensor | None], active: Tensor | None) -> None:
        # Looking at a mask on an accelerator would wait for it.
        look = active is not None and active.device.type == "cpu"
        if look and not bool(active.any()):  # type: ignore[union-attr]
            return
        ticking = None if active is None else active.to(self._device)
        hyper = self._read_groups()
        clocks = self._stacked_state.clocks
        for index, pieces in self._pieces(tuple(grad is not None for grad in grads), hyper.flags):
            buckets = [piece.with_grads(grads) for piece in pieces]
            if active is None and self._fits_kernel(buckets):
                clocks[index] = self.rule.advance(clocks[index], hyper.values, hyper.flags)
                for bucket in buckets:
                    self.rule.update_by_kernel(bucket, clocks[index], hyper.values, hyper.flags)
                continue
            clocks[index], numbers = next_step(self.rule, clocks[index], hyper.values, hyper.flags, ticking)
            for bucket in buckets:
                update_bucket(self.rule, bucket, numbers, hyper.flags, active, look=look)

    def check_groups(self) -> None:
        """See `PerModelOptimizer`."""
        self._read_groups()

    def _fits_kernel(self, buckets: Sequence[Bucket]) -> bool:
        # torch's kernels read any memory as if it were contiguous, and round half precision otherwise than its loops.
        return (
            self.num_models == 1
            and self.rule.has_kernel
            and all(bucket.is_contiguous() and bucket.is_full_precision() for bucket in buckets)
        )

    def begin_update(self, present: Sequence[bool] | None = None, active: Tensor | None = None) -> PendingUpdate:
        """Return one step as inputs of a compiled function that calls `apply_updates`.

        Call it before every step: it reads the parameter groups. The tensors in it are the optimizer's own, so that
        eager and compiled steps can follow each other. Nothing that shows changes before `finish_update`.

        Args:
            present: Which of `stacks` get a gradient. Default: all.
            active: Which models to update, bool ``[num_models]``; `apply_updates` must get the same. Default: all.
        """
        self.follow_stacks()
        hyper = self._read_groups()
        plan = self._compilable(tuple(present) if present is not None else (True,) * len(self._stacks), hyper.flags)
        ticking = None if active is None else active.to(self._device)
        clocks: dict[int, list[Value]] = {}
        names: tuple[str, ...] = ()
        numbers: list[Tensor] = []
        for index in plan.clocks:
            now = self._stacked_state.clocks[index]
            clocks[index], own = next_step(self.rule, now, hyper.values, hyper.flags, ticking)
            names = tuple(own)
            numbers.append(as_rows(own.values(), self.num_models, self._device))
        static = Static(tuple(sorted(hyper.flags.items())), plan.clock_of, names)
        return PendingUpdate(UpdateInputs(self.rule, static, plan.params, plan.state, numbers), clocks)

    def _compilable(self, present: tuple[bool, ...], flags: Mapping[str, bool]) -> _Compilable:
        """What compiled updates of these stacks have in common."""
        stacked = self._stacked_state
        stacked.split_clocks(present)
        key = (present, tuple(flags.values()), len(stacked.clocks))
        if key not in self._compilables:
            positions = [position for position, wanted in enumerate(present) if wanted]
            used = sorted({stacked.clock_of[position] for position in positions})
            self._compilables[key] = _Compilable(
                used,
                tuple(used.index(stacked.clock_of[position]) for position in positions),
                [self._stacks[position].parameter.detach() for position in positions],
                {
                    name: [stacked.tensor(name, position) for position in positions]
                    for name in self.rule.state_names(flags)
                },
            )
        return self._compilables[key]

    def finish_update(self, pending: PendingUpdate) -> None:
        """Count an update whose compiled function has run."""
        for index, clock in pending.clocks.items():
            self._stacked_state.clocks[index] = clock
        self.count_updates(1)

    def _read_groups(self) -> _Hyper:
        """The groups' hyper-parameters as they are now; recomputed only where they changed."""
        rule = self.rule
        try:
            groups = [*map(self._options_of, self.param_groups)]
        except KeyError as error:
            raise InvalidInput("param_groups", received=f"a group without {error}", expected="every option") from error
        seen = self._hyper
        if seen is not None and seen.reusable and _equal(groups, seen.groups):
            return seen
        if len(groups) != self.num_models:
            raise InvalidInput(
                "param_groups", received=f"{len(groups)} groups", expected=f"{self.num_models}, one per model"
            )
        columns = self._columns(groups)
        switches = {
            key: self._common([bool(group[len(rule.numbers) + place]) for group in groups], key)
            for place, key in enumerate(rule.switches)
        }
        flags = rule.flags(columns, switches)
        flags["float64_counters"] = self._stacked_state.counter_dtype == torch.float64
        values = {name: self._value(name, column) for name, column in columns.items()}
        reusable = not any(isinstance(value, (Tensor, list)) for group in groups for value in _flat(group))
        self._hyper = _Hyper(groups, columns, values, flags, reusable)
        return self._hyper

    def _columns(self, groups: Sequence[Sequence[Any]]) -> dict[str, list[float]]:
        """Every number over the models; ``groups`` holds them in the order of the rule."""
        columns: dict[str, list[float]] = {}
        for place, key in enumerate(self.rule.numbers):
            given = [group[place] for group in groups]
            if key == "betas":
                columns["beta1"] = _numbers([_item(value, 0) for value in given], key)
                columns["beta2"] = _numbers([_item(value, 1) for value in given], key)
            else:
                columns[key] = _numbers(given, key)
        return columns

    def _value(self, name: str, column: list[float]) -> Value:
        seen = self._hyper
        if seen is not None and seen.columns[name] == column:
            return seen.values[name]
        return self._stacked_state.value(column)

    def _common(self, values: Sequence[bool], key: str) -> bool:
        for model, value in enumerate(values):
            if value != values[0]:
                raise Unsupported(
                    f"model {model}: {key}={value} while model 0 has {key}={values[0]}",
                    fix="Models updated together share it; pass it in the configs of a new optimizer.",
                )
        return values[0]

    def _pieces(self, present: tuple[bool, ...], flags: Mapping[str, bool]) -> list[tuple[int, list[_Piece]]]:
        """Clocks that tick and the buckets each of them drives."""
        state = self._stacked_state
        state.split_clocks(present)
        key = (present, tuple(flags.values()), len(state.clocks))
        if key not in self._plans:
            names = state.rule.state_names(flags)
            pieces: dict[int, list[_Piece]] = {}
            for kind in sorted({self._kind(position) for position, wanted in enumerate(present) if wanted}):
                own = [k for k, wanted in enumerate(present) if wanted and self._kind(k) == kind]
                pieces.setdefault(kind[0], []).extend(self._cut(own, names))
            self._plans[key] = list(pieces.items())
        return self._plans[key]

    def _kind(self, position: int) -> tuple[int, str]:
        """What stacks of one bucket have in common."""
        return self._stacked_state.clock_of[position], str(self._stacks[position].parameter.dtype)

    def _cut(self, positions: Sequence[int], names: Sequence[str]) -> Iterator[_Piece]:
        """Small stacks together, big ones model by model."""
        limit = _BUCKET_BYTES.get(self._device.type, _BUCKET_BYTES_ELSEWHERE)
        pending: list[int] = []
        pending_bytes = 0
        for position in positions:
            parameter = self._stacks[position].parameter
            size = parameter.numel() * parameter.element_size()
            if size > limit and self.num_models > 1:
                count = max(1, limit * self.num_models // size)
                for first in range(0, self.num_models, count):
                    yield self._piece([position], names, slice(first, first + count))
                continue
            if pending and pending_bytes + size > limit:
                yield self._piece(pending, names)
                pending, pending_bytes = [], 0
            pending.append(position)
            pending_bytes += size
        if pending:
            yield self._piece(pending, names)

    def _piece(self, positions: list[int], names: Sequence[str], models: slice | None = None) -> _Piece:
        def cut(tensors: Sequence[Tensor]) -> list[Tensor]:
            whole = as_real(tensors)
            return whole if models is None else [tensor[models] for tensor in whole]

        params = cut([self._stacks[position].parameter.detach() for position in positions])
        state = {name: cut([self._stacked_state.tensor(name, position) for position in positions]) for name in names}
        return _Piece(positions, models, params, state)

    def _move_state(self) -> None:
        self._forget()
        self._stacked_state.move()

    def state_dict(self) -> dict[str, Any]:
        """Return a snapshot in the structure of a plain optimizer with one group per model.

        Unlike the tensors of a plain optimizer's state dict, these do not change with later steps.

        Returns:
            ``{"state": {i * num_params + j: {...}}, "param_groups": [...]}`` for model i and its j-th
            parameter.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self.follow_stacks()
        result = self._stacked_state.pack(range(self.num_models), self.param_groups)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, result) or result
        return result

    def model_state_dict(self, model: int) -> dict[str, Any]:
        """Return model i's state as a snapshot that a plain optimizer over its parameters can load.

        Args:
            model: Which model.

        Example:
            >>> weight = nn.Parameter(torch.ones(2, 3))
            >>> optimizer = make_optimizer(torch.optim.Adam, [{}, {}], {"weight": weight}, 2)
            >>> weight.grad = torch.ones(2, 3)
            >>> optimizer.step()
            >>> alone = torch.optim.Adam([nn.Parameter(weight[1].detach().clone())])
            >>> alone.load_state_dict(optimizer.model_state_dict(1))
        """
        self.follow_stacks()
        return self._stacked_state.pack([self._checked_model(model)], self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with one group per model.

        Args:
            state_dict: From `state_dict`, or from a plain optimizer of this class with one group per model.

        Raises:
            InvalidState: It does not fit (the error names the model and the parameter); nothing was changed.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._load(dict(enumerate(split_state(state_dict, self.num_models, len(self._stacks)))))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def load_model_state_dict(self, model: int, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a plain optimizer of this class over model i's parameters.

        Args:
            model: Which model; the others are not touched.
            state_dict: A state with one parameter group.

        Raises:
            InvalidState: It does not fit; nothing was changed.
        """
        model = self._checked_model(model)
        self._load({model: split_state(state_dict, 1, len(self._stacks), first_model=model)[0]})

    def _load(self, parts: Mapping[int, Mapping[str, Any]]) -> None:
        """Check the states of some models, then take them over."""
        self.follow_stacks()
        groups = list(self.param_groups)
        for model, part in parts.items():
            upgraded = self._upgraded(model, part["param_groups"][0])
            groups[model] = {**upgraded, "params": groups[model]["params"]}
        self._check_switches(groups)
        self._check_numbers(groups)
        for model, part in parts.items():
            self._stacked_state.check(model, part["state"], groups[model])
        counts = [self._stacked_state.counts(position) for position in range(len(self._stacks))]
        for model, part in parts.items():
            self._stacked_state.load(model, part["state"], counts)
        self._stacked_state.set_counts(counts)
        self.param_groups = groups
        self._forget()

    def _upgraded(self, model: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """A saved group with the options that this version of torch has, as torch fills them in."""
        where = f"model {model}: parameter group"
        try:
            self._single.load_state_dict({"state": {}, "param_groups": [{**group, "params": [0]}]})
        except Exception as error:
            raise InvalidState(where, received=dict(group)) from error
        upgraded = options(self._single.param_groups[0])
        missing = [key for key in (*self.rule.numbers, *self.rule.switches) if key not in upgraded]
        if missing:
            raise InvalidState(where, received=f"no {missing[0]!r}", expected="every option of the optimizer")
        if upgraded.get("differentiable"):
            raise InvalidState(where, received="differentiable=True", expected="differentiable=False")
        return upgraded

    def _check_numbers(self, groups: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._columns([[group[key] for key in self.rule.numbers] for group in groups])
        except InvalidInput as error:
            raise InvalidState(f"{error} Nothing was loaded.") from error

    def _check_switches(self, groups: Sequence[Mapping[str, Any]]) -> None:
        for key in self.rule.switches:
            for model, group in enumerate(groups):
                if bool(group[key]) != bool(groups[0][key]):
                    raise InvalidState(
                        f"model {model}: {key}={group[key]} while model 0 has {key}={groups[0][key]}",
                        fix="Make the optimizer with these options in its configs before loading.",
                    )

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_hyper", "_compilables", "_plans")
        return {key: value for key, value in super().__getstate__().items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        super().__setstate__(state)


def _equal(groups: list[tuple[Any, ...]], seen: list[tuple[Any, ...]]) -> bool:
    try:
        return bool(groups == seen)
    except RuntimeError:  # a tensor with several elements has no truth value
        return False


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield value
        if isinstance(value, tuple):
            yield from value


def _item(pair: Any, place: int) -> Any:
    # What is no pair is left for `_numbers` to refuse.
    return pair[place] if isinstance(pair, (tuple, list)) and len(pair) == 2 else (pair,)


def _numbers(values: Sequence[Any], key: str) -> list[float]:
    numbers = []
    for model, value in enumerate(values):
        try:
            numbers.append(float(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"model {model}: {key}", received=value, expected="a number") from error
    return numbers
