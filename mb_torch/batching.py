"""torchmb's interface: a batch made from one module, and losses and accuracies per model.

Source of the interface: the README of torchmb (https://github.com/admk/torchmb).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mb_torch.core import ModelBatch
from mb_torch.errors import InvalidInput, InvalidState, Unsupported

BatchFactory = Callable[[Any, int], "AbstractBatchModule"]

_REGISTERED: dict[type[nn.Module], BatchFactory] = {}


def register_module(module_cls: type[nn.Module], factory: BatchFactory) -> None:
    """Use your own batched implementation wherever `BatchModule` meets modules of one class.

    Not needed for a module to work: any module does. It is for implementations that beat the general one.

    Args:
        module_cls: The class; subclasses are not meant.
        factory: ``factory(module, batch)`` returns an `AbstractBatchModule` that does the work of ``batch`` copies.

    Example:
        >>> class Scale(nn.Module):
        ...     def forward(self, inputs): return 2 * inputs
        >>> class BatchScale(AbstractBatchModule):
        ...     def forward(self, batch_inputs): return 2 * batch_inputs
        >>> register_module(Scale, lambda module, batch: BatchScale(batch))
        >>> BatchModule(nn.Sequential(Scale()), batch=3)(torch.ones(3, 5, 1)).mean()
        tensor(2.)
    """
    if not (isinstance(module_cls, type) and issubclass(module_cls, nn.Module)):
        raise InvalidInput("register_module", received=repr(module_cls), expected="a subclass of torch.nn.Module")
    _REGISTERED[module_cls] = factory


class AbstractBatchModule(nn.Module):
    """A module that does the work of ``batch`` independent modules: ``[batch, rows, ...]`` in and out.

    Subclass it for `register_module`: give every parameter and buffer a leading axis of length ``batch``.

    Args:
        batch: How many modules it stands for.

    Attributes:
        batch: As given.

    Example:
        >>> class BatchScale(AbstractBatchModule):
        ...     def __init__(self, batch):
        ...         super().__init__(batch)
        ...         self.factors = nn.Parameter(torch.ones(batch, 1, 1))
        ...     def forward(self, batch_inputs): return self.factors * batch_inputs
        >>> BatchScale(3)(torch.ones(3, 5, 2)).shape
        torch.Size([3, 5, 2])
    """

    def __init__(self, batch: int) -> None:
        super().__init__()
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise InvalidInput("batch", received=repr(batch), expected="a positive integer")
        self.batch = batch

    def forward(self, *batch_inputs: Tensor) -> Any:
        """Run all modules on ``[batch, rows, ...]``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward()")

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """Return one ``state_dict`` per module, copied."""
        state = self.state_dict()
        return [{name: tensor[index].clone() for name, tensor in state.items()} for index in range(self.batch)]

    def load_state_dicts(self, states: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> None:
        """Load one state for all modules, or one for each.

        Args:
            states: A ``state_dict`` of a single module, or a list of ``batch`` such.
        """
        each = self._states_for_each(states)
        self._check_state_dicts(each)
        self.load_state_dict({name: torch.stack([state[name] for state in each]) for name in each[0]})

    def _check_state_dicts(self, states: Sequence[Mapping[str, Tensor]], prefix: str = "") -> None:
        """Raise `InvalidState`, naming module and key, unless every state has the right keys, shapes and dtypes.

        Args:
            states: One ``state_dict`` per module.
            prefix: What the names begin with for the user.
        """
        own = self.state_dict()
        for index, state in enumerate(states):
            if state.keys() != own.keys():
                missing, unknown = [sorted(prefix + key for key in a - b) for a, b in _both_ways(own, state)]
                raise InvalidState(f"state of model {index}: missing keys {missing}, unknown keys {unknown}")
            for name, value in state.items():
                if value.shape != own[name].shape[1:] or value.dtype != own[name].dtype:
                    raise InvalidState(
                        f"state of model {index}, key {prefix + name!r}",
                        received=f"{value.dtype} of shape {tuple(value.shape)}",
                        expected=f"{own[name].dtype} of shape {tuple(own[name].shape[1:])}",
                    )

    def _states_for_each(
        self, states: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]
    ) -> list[Mapping[str, Tensor]]:
        each = [states] * self.batch if isinstance(states, Mapping) else list(states)
        if len(each) != self.batch:
            raise InvalidInput("load_state_dicts", received=f"{len(each)} states", expected=f"one or {self.batch}")
        return each


class BatchModule(AbstractBatchModule):
    """``batch`` independent models that start as copies of one module.

    Works for any module. Every model is isolated from the others under every optimizer that works element by element
    (SGD, Adam, AdamW, RMSprop, ... over ``parameters()``) and under every optimizer of `OptimizerFactory`.

    Args:
        module: The module to copy; it is not changed.
        batch: How many copies.

    Attributes:
        models: The `ModelBatch` that does the work.
        registered: Modules made by `register_module` factories, by the name they have in ``module`` (dots as ``/``).

    Example:
        >>> batch_model = BatchModule(nn.Linear(4, 2), batch=100)
        >>> batch_model(torch.randn(100, 8, 4)).shape
        torch.Size([100, 8, 2])
    """

    def __init__(self, module: nn.Module, batch: int = 1) -> None:
        super().__init__(batch)
        if not isinstance(module, nn.Module):
            raise InvalidInput("module", received=type(module).__name__, expected="a torch.nn.Module")
        root = nn.ModuleDict({"module": copy.deepcopy(module)})
        self.registered: nn.ModuleDict = nn.ModuleDict()
        self._replace_registered(root, batch)
        self.models = ModelBatch([root["module"]] * batch, shared_input=False)
        self._connect()

    def _replace_registered(self, root: nn.ModuleDict, batch: int) -> None:
        """Put stand-ins where modules of registered classes are; one that occurs twice stays one."""
        stand_ins: dict[int, _RegisteredCall] = {}
        done: list[str] = []
        for name, submodule in list(root.named_modules(remove_duplicate=False)):
            if type(submodule) not in _REGISTERED or any(name.startswith(f"{parent}.") for parent in done):
                continue
            if id(submodule) not in stand_ins:
                key = name.replace(".", "/")
                self.registered[key] = _REGISTERED[type(submodule)](submodule, batch)
                stand_ins[id(submodule)] = _RegisteredCall(key)
            root.set_submodule(name, stand_ins[id(submodule)])
            done.append(name)

    def _connect(self) -> None:
        for stand_in in self.models.prototype.modules():
            if isinstance(stand_in, _RegisteredCall):
                # A tuple keeps it from being a submodule of the single model.
                stand_in.batched = (self.registered[stand_in.key],)  # type: ignore[assignment]

    def forward(self, *batch_inputs: Any, **keywords: Any) -> Any:
        """Run all models.

        Args:
            *batch_inputs: What one model takes, every tensor ``[batch, rows, ...]``.
            **keywords: The same for keyword arguments.

        Returns:
            What one model returns, every tensor ``[batch, rows, ...]``.
        """
        return self.models(*batch_inputs, **keywords)

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """Return one ``state_dict`` per model, with the names it has in a single model, copied."""
        states = self.models.get_model_states()
        for name, batched in self.registered.items():
            prefix = _prefix(name)
            for state, own in zip(states, batched.state_dicts(), strict=True):  # type: ignore[operator]
                state.update({prefix + key: value for key, value in own.items()})
        return states

    def load_state_dicts(self, states: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> None:
        """Load one state for all models, or one for each, with the names of a single model.

        Raises:
            InvalidState: A key is missing or unknown, or a tensor does not fit.
        """
        each = [dict(state) for state in self._states_for_each(states)]
        parts: list[tuple[AbstractBatchModule, list[dict[str, Tensor]]]] = []
        for name, batched in self.registered.items():
            assert isinstance(batched, AbstractBatchModule)
            prefix = _prefix(name)
            own = [
                {k.removeprefix(prefix): state.pop(k) for k in list(state) if k.startswith(prefix)} for state in each
            ]
            batched._check_state_dicts(own, prefix)
            parts.append((batched, own))
        self.models.load_model_states(each)
        for batched, own in parts:
            batched.load_state_dicts(own)


def _both_ways(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[set[str], set[str]]]:
    return [(set(a), set(b)), (set(b), set(a))]


def _prefix(name: str) -> str:
    path = name.replace("/", ".").removeprefix("module").removeprefix(".")
    return f"{path}." if path else ""


class _RegisteredCall(nn.Module):
    """Stands in a single model for one of the modules that a registered batch module does at once."""

    batched: tuple[AbstractBatchModule, ...] = ()

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, *inputs: Any) -> Any:
        (module,) = self.batched
        if module.batch > 1:
            return _LeaveVmap.apply(module, *inputs)
        outputs = module(*(value.unsqueeze(0) if isinstance(value, Tensor) else value for value in inputs))
        return outputs[0] if isinstance(outputs, Tensor) else tuple(output[0] for output in outputs)


class _LeaveVmap(torch.autograd.Function):
    """Calls a module on all models' inputs from within the vectorised function of one model.

    Under vmap only the static method ``vmap`` runs, outside of the vectorised function, so ordinary autograd sees
    (and differentiates) what the module does.
    """

    generate_vmap_rule = False

    @staticmethod
    def forward(module: nn.Module, *inputs: Any) -> Any:
        """Refuse to run outside of vmap: there is no single model to run."""
        raise Unsupported(f"{type(module).__name__} is registered for whole batches; its models cannot run one by one")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], module: nn.Module, *inputs: Any) -> tuple[Any, Any]:
        """Run the batch module on ``[batch, rows, ...]``."""
        moved = [
            value
            if not isinstance(value, Tensor)
            else value.unsqueeze(0).expand(info.batch_size, *value.shape)
            if dim is None
            else value.movedim(dim, 0)
            for value, dim in zip(inputs, in_dims[1:], strict=True)
        ]
        outputs = module(*moved)
        return outputs, 0 if isinstance(outputs, Tensor) else tuple(0 for _ in outputs)


def batch_loss(
    batch_inputs: Tensor,
    batch_targets: Tensor,
    batch: int,
    loss_func: Callable[..., Tensor] = functional.cross_entropy,
    reduction: Literal["mean", "sum", "none"] = "mean",
    **kwargs: Any,
) -> Tensor:
    """Evaluate a loss for every model.

    Args:
        batch_inputs: ``[batch, rows, ...]``, the models' outputs.
        batch_targets: ``[batch, rows, ...]``.
        batch: How many models there are.
        loss_func: A loss of ``torch.nn.functional``, or any function that takes ``reduction=``.
        reduction: ``"mean"`` or ``"sum"`` over a model's rows, or ``"none"``.
        **kwargs: Passed to ``loss_func``.

    Returns:
        ``[batch]``, or ``[batch, rows]`` with ``reduction="none"``. ``.sum().backward()`` gives every model the
        gradients it would have alone.

    Example:
        >>> batch_loss(torch.zeros(3, 8, 10), torch.zeros(3, 8, dtype=torch.long), 3)
        tensor([2.3026, 2.3026, 2.3026])
    """
    _check_batch(batch_inputs, batch_targets, batch)
    if reduction not in ("mean", "sum", "none"):
        raise InvalidInput("reduction", received=repr(reduction), expected="'mean', 'sum' or 'none'")

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_func(inputs, targets, reduction=reduction, **kwargs)

    try:
        return torch.vmap(loss, randomness="different")(batch_inputs, batch_targets)
    except (
        RuntimeError,
        NotImplementedError,
    ):  # no batching rule: an error of the loss itself comes again here
        return torch.stack([loss(i, t) for i, t in zip(batch_inputs, batch_targets, strict=True)])


def batch_topk(
    batch_inputs: Tensor, batch_targets: Tensor, batch: int, k: Sequence[int] = (1,), count: bool = False
) -> Tensor:
    """Top-k accuracies of every model.

    Args:
        batch_inputs: ``[batch, rows, classes]`` scores.
        batch_targets: ``[batch, rows]`` class numbers.
        batch: How many models there are.
        k: For each k, a row counts as right if its class is among the k highest scores.
        count: Return numbers of right rows instead of fractions.

    Returns:
        ``[len(k), batch]``; fractions in [0, 1], or integer counts.

    Example:
        >>> scores = torch.tensor([[[0.1, 0.9, 0.5]], [[0.7, 0.2, 0.1]]])
        >>> batch_topk(scores, torch.tensor([[2], [0]]), 2, (1, 2))
        tensor([[0., 1.],
                [1., 1.]])
    """
    _check_batch(batch_inputs, batch_targets, batch)
    classes = batch_inputs.shape[-1]
    if batch_inputs.dim() != 3 or batch_targets.shape != batch_inputs.shape[:2]:
        raise InvalidInput(
            "batch_topk",
            received=f"scores {tuple(batch_inputs.shape)} and targets {tuple(batch_targets.shape)}",
            expected="[batch, rows, classes] and [batch, rows]",
        )
    if not k or min(k) < 1 or max(k) > classes:
        raise InvalidInput("k", received=tuple(k), expected=f"numbers from 1 to {classes}, the number of classes")
    best = batch_inputs.topk(max(k), dim=-1).indices
    right = (best == batch_targets.unsqueeze(-1)).cumsum(-1)
    counts = torch.stack([right[..., size - 1].sum(-1) for size in k])
    return counts if count else counts / batch_inputs.shape[1]


batch_accuracy = batch_topk


def _check_batch(batch_inputs: Tensor, batch_targets: Tensor, batch: int) -> None:
    for name, tensor in (("batch_inputs", batch_inputs), ("batch_targets", batch_targets)):
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            raise InvalidInput(name, received=f"shape {tuple(tensor.shape)}", expected=f"[{batch}, rows, ...]")
