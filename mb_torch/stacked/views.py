"""Optimizers with one parameter group per model, and the one that works through views of single models."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mb_torch.amp import finite_models
from mb_torch.configs import call_with_config
from mb_torch.errors import InvalidInput, InvalidState, Unsupported
from mb_torch.stacked.model_view import Stack
from mb_torch.stacked.optimizer_state import check_shape, split_state


class PerModelOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` over stacks, with one live parameter group per model.

    ``param_groups[i]["params"]`` are model i's own views. `step` uses the gradients of the stacks, `update`
    those it is given. A ``torch.amp.GradScaler`` skips only the models whose gradients are not finite.

    Args:
        stacks: Trainable parameters by name, each ``[num_models, ...]``.
        num_models: How many models there are.
        groups: One parameter group per model.
        defaults: The optimizer's default options.

    Attributes:
        class_name: Name of the class that each model alone would be trained with.
        num_models: How many models there are.
        updates_done: Counts the updates.
    """

    class_name: str
    # A stock GradScaler then leaves unscaling and skipping to `step`, through `grad_scale` and `found_inf`.
    _step_supports_amp_scaling = True

    def __init__(
        self, stacks: Sequence[Stack], num_models: int, groups: list[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        self.num_models = num_models
        self.updates_done = 0
        self._stacks = list(stacks)
        self._complete = False
        self._storage = self._current_storage()
        super().__init__(groups, defaults)
        self._complete = True

    @property
    def stacks(self) -> dict[str, nn.Parameter]:
        """The trainable stacked parameters by name, in the order `update` takes their gradients."""
        return {stack.name: stack.parameter for stack in self._stacks}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise `Unsupported`: the groups are the models."""
        if self._complete:
            raise Unsupported(
                "add_param_group: this optimizer has exactly one parameter group per model",
                fix="Make a new optimizer for the batch to add parameters to it.",
            )
        self.param_groups.append(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all models.

        Args:
            set_to_none: Set them to None, or else to zero.
        """
        self.follow_stacks()
        for stack in self._stacks:
            stack.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every model with its own hyper-parameters, as its own optimizer would.

        Args:
            closure: Evaluates the models again and returns the loss.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [stack.parameter.grad for stack in self._stacks]
        active = self._unscaled(grads)
        if not any(stack.has_cleared for stack in self._stacks):
            self.update(grads, active)
            return loss
        cleared = [stack.cleared() for stack in self._stacks]
        for without in sorted(set(cleared), key=sorted):
            part = [grad if own == without else None for grad, own in zip(grads, cleared, strict=True)]
            self.update(part, self._without(active, without))
        return loss

    def _without(self, active: Tensor | None, models: frozenset[int]) -> Tensor | None:
        if not models:
            return active
        device = self._stacks[0].parameter.device
        chosen = torch.tensor([model not in models for model in range(self.num_models)], device=device)
        return chosen if active is None else active & chosen

    def _unscaled(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """Undo a gradient scaler's scale, in place; return which models have finite gradients.

        A stock scaler sets ``found_inf`` to one number for all models, ours to one per model.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return None
        present = [grad for grad in grads if grad is not None]
        if not present:
            return None
        device = present[0].device
        found_inf = torch.as_tensor(found_inf, device=device)
        scale = getattr(self, "grad_scale", None)
        with torch.no_grad():
            if scale is not None:
                inverse = scale.double().reciprocal().float().to(device)
                for grad in present:
                    grad.mul_(inverse)
            if found_inf.dim():
                return found_inf == 0
            finite = finite_models(present)
            # If clipping has hidden where the overflow was, every model skips the step, as with plain torch.
            return finite & ((found_inf == 0) | ~finite.all())

    def update(self, grads: Sequence[Tensor | None], active: Tensor | None = None) -> None:
        """Update with the given gradients instead of those of the stacks.

        Args:
            grads: One per entry of `stacks`, ``[num_models, ...]`` each; a None is skipped as torch does.
            active: Which models to update, bool ``[num_models]``. The others keep parameters, state and step
                count, and get no decay, bit for bit and whatever their gradients are. Default: all.

        Raises:
            InvalidInput: Gradients or `active` do not fit the stacks.
        """
        self.follow_stacks()
        self._check_grads(grads)
        if active is not None:
            if active.dtype != torch.bool or active.shape != (self.num_models,):
                raise InvalidInput(
                    "active",
                    received=f"{active.dtype} of shape {list(active.shape)}",
                    expected=f"bool of shape [{self.num_models}]",
                )
            # A mask on an accelerator is not looked at: that would wait for the device.
            if active.device.type == "cpu" and bool(active.all()):
                active = None
        self.count_updates(1)
        with torch.no_grad():
            self._update(list(grads), active)

    def check_groups(self) -> None:
        """Raise if an update would refuse the parameter groups as they are; nothing changes.

        Raises:
            InvalidInput: Names the model and the option.
        """

    def count_updates(self, count: int) -> None:
        """Count updates, which a training step makes without a call of `step`, for schedulers to know of them."""
        self.updates_done += count
        # What torch's own schedulers look at before they warn about the order of steps.
        self._opt_called = True

    def _check_grads(self, grads: Sequence[Tensor | None]) -> None:
        if len(grads) != len(self._stacks):
            raise InvalidInput(
                "gradients",
                received=f"{len(grads)}",
                expected=f"{len(self._stacks)}, one for each of {[*self.stacks]}",
            )
        for stack, grad in zip(self._stacks, grads, strict=True):
            if grad is None:
                continue
            parameter = stack.parameter
            if grad.layout is not torch.strided:
                raise Unsupported(f"gradient of {stack.name!r} is sparse", fix="Use dense gradients (sparse=False).")
            if grad.shape != parameter.shape or grad.dtype != parameter.dtype or grad.device != parameter.device:
                raise InvalidInput(
                    f"gradient of {stack.name!r}",
                    received=f"{grad.dtype} {list(grad.shape)} on {grad.device}",
                    expected=f"{parameter.dtype} {list(parameter.shape)} on {parameter.device}",
                )

    @abstractmethod
    def _update(self, grads: list[Tensor | None], active: Tensor | None) -> None:
        """Update the active models, without autograd."""

    def follow_stacks(self) -> None:
        """Let views and state follow stacks that moved to another device, dtype or storage."""
        storage = self._current_storage()
        if storage != self._storage:
            self._storage = storage
            for group in self.param_groups:
                for view in group["params"]:
                    view.refresh()
            self._move_state()

    def _current_storage(self) -> list[tuple[int, torch.dtype, torch.device]]:
        parameters = [stack.parameter for stack in self._stacks]
        return [(parameter.data_ptr(), parameter.dtype, parameter.device) for parameter in parameters]

    @abstractmethod
    def _move_state(self) -> None:
        """Bring the state to the device and dtype of the stacks."""

    def _checked_model(self, model: int) -> int:
        if isinstance(model, bool) or not isinstance(model, int) or not 0 <= model < self.num_models:
            raise InvalidInput("model index", received=model, expected=f"an integer from 0 to {self.num_models - 1}")
        return model

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("step", "state", "grad_scale", "found_inf")
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in hidden and not (key.startswith("_optimizer_") and key.endswith("_hooks"))
        }


class ViewOptimizer(PerModelOptimizer):
    """Any optimizer class for every model of a batch: one instance of it per model, over that model's views.

    Exact by construction and as slow as N optimizers; `StackedOptimizer` serves the classes it has a rule
    for. With an `active` mask this waits for the device.

    Args:
        optimizer_cls: A class derived from ``torch.optim.Optimizer``.
        configs: Its keyword arguments, one dict per model.
        stacks: Trainable parameters, each ``[num_models, ...]``.
        num_models: How many models there are.

    Raises:
        InvalidInput: A configuration is refused; names the model.
        Unsupported: ``differentiable=True``, or a class that makes more than one parameter group.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 3))
        >>> configs = [{"lr": 0.1}, {"lr": 0.2}]
        >>> optimizer = ViewOptimizer(torch.optim.Rprop, configs, [Stack("weight", weight)], 2)
        >>> weight.grad = torch.ones(2, 3)
        >>> optimizer.step()
        >>> weight[:, 0].tolist()
        [0.8999999761581421, 0.800000011920929]
    """

    def __init__(
        self,
        optimizer_cls: type[torch.optim.Optimizer],
        configs: Sequence[Mapping[str, Any]],
        stacks: Sequence[Stack],
        num_models: int,
    ) -> None:
        self.optimizer_cls, self.class_name = optimizer_cls, optimizer_cls.__name__
        self._configs = [dict(config) for config in configs]
        self.optimizers = [
            call_with_config(f"model {i}", optimizer_cls, ([stack.view(i) for stack in stacks],), config)
            for i, config in enumerate(configs)
        ]
        for model, optimizer in enumerate(self.optimizers):
            refuse_unsupported_groups(f"model {model}: {optimizer_cls.__name__}", optimizer)
        super().__init__(stacks, num_models, self._groups(), self.optimizers[0].defaults)

    def _groups(self) -> list[dict[str, Any]]:
        return [optimizer.param_groups[0] for optimizer in self.optimizers]

    def _update(self, grads: list[Tensor | None], active: Tensor | None) -> None:
        chosen = [True] * self.num_models if active is None else active.tolist()
        own_grads = [stack.parameter.grad for stack in self._stacks]
        try:
            for stack, grad in zip(self._stacks, grads, strict=True):
                if grad is not stack.parameter.grad:
                    stack.parameter.grad = grad
            for optimizer, does_step in zip(self.optimizers, chosen, strict=True):
                if does_step:
                    optimizer.step()
        finally:
            for stack, grad in zip(self._stacks, own_grads, strict=True):
                if grad is not stack.parameter.grad:
                    stack.parameter.grad = grad

    def _move_state(self) -> None:
        for model in range(self.num_models):
            self._load(model, self.model_state_dict(model))

    def state_dict(self) -> dict[str, Any]:
        """Return a snapshot in the structure of a plain optimizer with one group per model."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        result: dict[str, Any] = {"state": {}, "param_groups": []}
        for model in range(self.num_models):
            own, first = self.model_state_dict(model), model * len(self._stacks)
            for key, value in own["state"].items():
                if not isinstance(key, int):
                    raise Unsupported(
                        f"state_dict: {self.optimizer_cls.__name__} has state {key!r} of no parameter",
                        fix="Save model_state_dict(i) of every model instead.",
                    )
                result["state"][first + key] = value
            for group in own["param_groups"]:
                result["param_groups"].append({**group, "params": [first + index for index in group["params"]]})
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, result) or result
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with one group per model.

        Args:
            state_dict: From `state_dict`, or from a plain optimizer of this class with one group per model.

        Raises:
            InvalidState: It does not fit; nothing was changed.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        before = [self.model_state_dict(model) for model in range(self.num_models)]
        try:
            for model, own in enumerate(split_state(state_dict, self.num_models, len(self._stacks))):
                self._load(model, own)
        except Exception:
            for model, own in enumerate(before):
                self._load(model, own)
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def model_state_dict(self, model: int) -> dict[str, Any]:
        """Return model i's state as its own plain optimizer would, as a snapshot."""
        return copy.deepcopy(self.optimizers[self._checked_model(model)].state_dict())

    def load_model_state_dict(self, model: int, state_dict: dict[str, Any]) -> None:
        """Load the state of a plain optimizer of this class over model i's parameters.

        Raises:
            InvalidState: It does not fit; nothing was changed.
        """
        before = self.model_state_dict(model)
        try:
            self._load(model, state_dict)
        except Exception:
            self._load(model, before)
            raise

    def _load(self, model: int, state_dict: dict[str, Any]) -> None:
        optimizer = self.optimizers[model]
        (own,) = split_state(state_dict, 1, len(self._stacks), first_model=model)
        for (position, name), shape in self._shapes_of_state().items():
            value = own["state"].get(position, {}).get(name)
            if isinstance(value, Tensor):
                parameter = self._stacks[position].name
                check_shape(f"model {model}: {name!r} of parameter {parameter!r}", value, shape)
        own = copy.deepcopy(own)
        try:
            optimizer.load_state_dict(own)
        except Exception as error:
            raise InvalidState(
                f"model {model}: {self.optimizer_cls.__name__} refuses the state",
                fix=f"It says: {type(error).__name__}: {error}",
            ) from error
        for position, parameter in enumerate(optimizer.param_groups[0]["params"]):
            for name, value in own["state"].get(position, {}).items():
                # torch casts all floating point state to the parameter's dtype; counters lose or gain digits by it.
                if isinstance(value, Tensor) and value.dim() == 0:
                    optimizer.state[parameter][name] = value.to(optimizer.state[parameter][name].device)
        self.param_groups = self._groups()

    def _shapes_of_state(self) -> dict[tuple[int, str], torch.Size]:
        """What shapes the class's state tensors have, seen at a trial step of a copy of model 0.

        torch takes a state as it comes and fails at the next step.
        """
        copies = [nn.Parameter(view.detach().clone()) for view in self.param_groups[0]["params"]]
        devices = {parameter.device for parameter in copies if parameter.device.type != "cpu"}
        try:
            with torch.random.fork_rng(devices):
                trial = self.optimizer_cls(copies, **self._configs[0])
                for parameter in copies:
                    parameter.grad = torch.ones_like(parameter)
                trial.step()
        except Exception:
            return {}  # a class that needs more than gradients
        return {
            (position, name): value.shape
            for position, parameter in enumerate(copies)
            for name, value in trial.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }


def refuse_unsupported_groups(where: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise `Unsupported` for options that per-model updates cannot serve."""
    if len(optimizer.param_groups) != 1:
        raise Unsupported(f"{where} makes {len(optimizer.param_groups)} parameter groups for one model")
    if optimizer.param_groups[0].get("differentiable"):
        raise Unsupported(
            f"{where}: differentiable=True",
            fix="Differentiate through updates with torch.func on a single model.",
        )
