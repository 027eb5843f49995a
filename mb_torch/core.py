"""`ModelBatch`: many independent models of one architecture, run and trained at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mb_torch.advice import Advice, advise
from mb_torch.backend import Backend, BatchSpec, create_backend, resolve_backend_name
from mb_torch.clipping import clip_gradients_
from mb_torch.errors import InvalidInput, InvalidState
from mb_torch.files import load_states, save_states
from mb_torch.random_streams import RandomStreams
from mb_torch.routed import RoutedTensor, routed_leaves, rows_from_weights
from mb_torch.state import (
    ModelState,
    StackBuilder,
    StackedState,
    load_model_states,
    materialise,
    meta_copy,
    model_states,
    select_models,
)
from mb_torch.targets import (
    WithArguments,
    batch_length,
    check_per_model,
    check_targets_may_be_shared,
    for_each_model,
    loss_accepts,
    of_first_model,
    targets_are_shared,
)
from mb_torch.train_step import PlainLoss, TrainStep, make_joint_step
from mb_torch.trees import leaves_of, path_of_leaf

_LEFT_OUT: Any = object()


class ModelBatch(nn.Module):
    """Many independent models of one architecture that run and train at once.

    Model *i* of a batch ends where it would have ended alone: outputs, gradients, buffers and optimizer state are
    those of plain PyTorch, and nothing one model does touches another. The source models are copied, not kept:
    memory is one stacked copy.

    Args:
        models: Models of one class tree, with equal shapes, dtypes, ``requires_grad`` and settings. Their values may
            differ. Tied parameters stay tied, frozen ones stay frozen.
        shared_input: Whether all models get the same inputs ``[batch, ...]``. Otherwise every tensor given to
            `forward` is ``[num_models, batch, ...]``.
        backend: ``"torch"``, or the name of another registered backend. Default: ``$MODELBATCH_BACKEND``, else
            ``"torch"``.
        seeds: One integer per model. The randomness of model *i* then depends on ``seeds[i]`` and on how often it
            has drawn, and not on the models beside it. Covers the dropout family, ``rand``, ``randn``, ``bernoulli``,
            ``multinomial`` and their ``_like`` forms; any other random operation raises. Default: torch's global
            generator, with draws that differ between models.
        chunk_size: Run at most this many models at a time. In `make_train_step` and without gradients this bounds
            the memory for activations. Default: all at once.
        device: Where to put the stacks. Default: where the models are.
        ignore: Names of settings that may differ between the models; model 0's is used for all.
        backend_options: Options of the backend itself. ``"torch"`` has none; those of ``"jax"`` are described at
            `mb_jax.options.JaxOptions`.

    Attributes:
        num_models: How many models there are.
        shared_input: As given.
        stack: The module tree that holds the stacked tensors under the models' own names.
        prototype: The definition of the models, on the meta device. Changes to its settings (and ``train()`` or
            ``eval()`` of its submodules) act on all models.
        streams: Seeds and steps of the models' random streams; None without ``seeds``.
        latest_losses: Losses of the last `compute_loss` or training step, ``[num_models]``, detached; None before the
            first.

    Raises:
        InvalidInput: No models, or arguments of the wrong kind.
        IncompatibleModels: Names the model and the first difference to model 0.

    Example:
        >>> models = [nn.Linear(4, 2) for _ in range(3)]
        >>> mb = ModelBatch(models)
        >>> outputs = mb(torch.randn(8, 4))
        >>> outputs.shape
        torch.Size([3, 8, 2])
        >>> loss = mb.compute_loss(outputs, torch.zeros(8, 2), nn.functional.mse_loss, reduction="sum")
        >>> loss.backward()
        >>> mb.stacked_params["weight"].grad.shape
        torch.Size([3, 2, 4])
    """

    stack: nn.Module
    streams: RandomStreams | None

    def __init__(
        self,
        models: Sequence[nn.Module],
        shared_input: bool = True,
        *,
        backend: str | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        ignore: Collection[str] = (),
        backend_options: Mapping[str, Any] | None = None,
    ) -> None:
        name = resolve_backend_name(backend)
        models = list(models)
        if not models:
            raise InvalidInput("ModelBatch", received="no models", expected="at least one")
        builder = StackBuilder(models[0], len(models), device=device, ignore=ignore)
        for model in models:
            builder.add(model)
        streams = None if seeds is None else RandomStreams(seeds, len(models))
        options = dict(backend_options or {})
        self._set_up(name, *builder.finish(), len(models), shared_input, chunk_size, streams, options)

    def _set_up(
        self,
        backend: str,
        prototype: nn.Module,
        state: StackedState,
        num_models: int,
        shared_input: bool,
        chunk_size: int | None,
        streams: RandomStreams | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise InvalidInput("chunk_size", received=repr(chunk_size), expected="a positive integer or None")
        self.num_models = num_models
        self.shared_input = shared_input
        self.stack = state.tree
        self.streams = streams
        self.training = prototype.training
        self.latest_losses: Tensor | None = None
        # Not a submodule: it would show up in parameters() and state_dict().
        self._spec = BatchSpec(prototype, state, num_models, chunk_size, streams, options)
        self.backend: Backend = create_backend(backend, self._spec)

    @classmethod
    def from_factory(
        cls,
        factory: Callable[[], nn.Module],
        seeds: Sequence[int],
        shared_input: bool = True,
        *,
        own_streams: bool = True,
        backend: str | None = None,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        ignore: Collection[str] = (),
        backend_options: Mapping[str, Any] | None = None,
    ) -> ModelBatch:
        """Build a batch model by model, so that no more than one model exists beside the stacks.

        Args:
            factory: Makes one model. It is called once per seed, after ``torch.manual_seed(seed)``; the global
                generator is put back afterwards.
            seeds: One integer per model, for its initial weights.
            shared_input: As in the constructor.
            own_streams: Whether the seeds also become the models' random streams (``seeds=`` of the constructor).
                Otherwise models draw from torch's global generator.
            backend: As in the constructor.
            chunk_size: As in the constructor.
            device: As in the constructor.
            ignore: As in the constructor.
            backend_options: As in the constructor.

        Returns:
            A batch of ``len(seeds)`` models.

        Example:
            >>> ModelBatch.from_factory(lambda: nn.Linear(4, 2), seeds=range(100)).num_models
            100
        """
        seeds = list(seeds)
        if not seeds:
            raise InvalidInput("from_factory", received="no seeds", expected="at least one")
        name = resolve_backend_name(backend)
        streams = RandomStreams(seeds, len(seeds))
        builder: StackBuilder | None = None
        with torch.random.fork_rng():
            for seed in seeds:
                torch.manual_seed(seed)
                model = factory()
                builder = builder or StackBuilder(model, len(seeds), device=device, ignore=ignore)
                builder.add(model)
        assert builder is not None
        batch = cls.__new__(cls)
        own = streams if own_streams else None
        options = dict(backend_options or {})
        batch._set_up(name, *builder.finish(), len(seeds), shared_input, chunk_size, own, options)
        return batch

    @property
    def prototype(self) -> nn.Module:
        """The definition of the models, on the meta device."""
        return self._spec.prototype

    @property
    def stacked_params(self) -> dict[str, nn.Parameter]:
        """Each parameter once, by its (first) name in a model: ``[num_models, ...]``."""
        return self._spec.state.parameters

    @property
    def stacked_buffers(self) -> dict[str, Tensor]:
        """Each buffer once, by its (first) name in a model: ``[num_models, ...]``."""
        return self._spec.state.buffers

    def forward(self, inputs: Any = _LEFT_OUT, *args: Any, **kwargs: Any) -> Any:
        """Run all models.

        Args:
            inputs: The models' first argument, a tensor or a pytree of tensors: ``[batch, ...]`` if
                ``shared_input``, else ``[num_models, batch, ...]``. Leave it out for models that take keywords only.
            *args: More positional arguments of the models; tensors as for ``inputs``.
            **kwargs: Keyword arguments of the models; tensors as for ``inputs``.

        Returns:
            What a model returns, every tensor with a leading model axis: ``[num_models, batch, ...]``. Outputs of
            routed inputs are padded like them and know their real rows.

        Raises:
            InvalidInput: A per-model input lacks the leading model axis.

        Example:
            >>> ModelBatch([nn.Linear(4, 2), nn.Linear(4, 2)])(torch.randn(8, 4)).shape
            torch.Size([2, 8, 2])
        """
        positional = args if inputs is _LEFT_OUT else (inputs, *args)
        self.check_inputs((positional, kwargs))
        return self.backend.forward(positional, kwargs, per_model=not self.shared_input)

    def check_inputs(self, inputs: Any) -> None:
        """Raise `InvalidInput` unless the inputs agree with ``shared_input``."""
        if self.shared_input:
            if routed_leaves(inputs):
                raise InvalidInput(
                    "routed inputs have one set of rows per model, but this batch has shared_input=True",
                    fix="Build it with ModelBatch(models, shared_input=False).",
                )
            return
        for index, leaf in enumerate(leaves_of(inputs)):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.shape[0] != self.num_models):
                raise InvalidInput(
                    f"input {path_of_leaf(inputs, index)} with shared_input=False",
                    received=f"shape {tuple(leaf.shape)}",
                    expected=f"[{self.num_models}, batch, ...]",
                    fix="Give every model its own: for a shared tensor t, t.expand(num_models, *t.shape).",
                )

    def compute_loss(
        self,
        outputs: Any,
        targets: Any,
        loss_fn: Callable[..., Tensor],
        reduction: Literal["mean", "sum", "none"] = "mean",
        *,
        shared_targets: bool | None = None,
        weights: Tensor | None = None,
        loss_args: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Evaluate ``loss_fn`` for every model.

        With ``reduction="mean"`` the result is a true mean, so each model's gradient is ``1 / num_models`` of what it
        would get alone. Use ``"sum"`` to train every model exactly as if alone.

        Args:
            outputs: What `forward` returned: ``[num_models, batch, ...]``.
            targets: ``[batch, ...]`` for all models, or ``[num_models, batch, ...]``; told apart by shape and, where
                both fit, by what the loss accepts.
            loss_fn: ``loss_fn(outputs_i, targets_i)`` for one model; returns one number. Padded rows of routed
                tensors are never given to it; a model without any real row has loss 0.
            reduction: ``"mean"`` or ``"sum"`` over the models, or ``"none"``.
            shared_targets: Says which of the two the targets are; default: decided by shape.
            weights: ``[num_models, batch]``, 1 for real rows and 0 for padding, as `DataRouter.route_batch` returns
                them. Not needed where outputs or targets are routed tensors.
            loss_args: Further arguments of the loss by name, ``[num_models, ...]``: ``loss_fn(outputs_i, targets_i,
                **loss_args_i)``.

        Returns:
            0-dim, or ``[num_models]`` with ``reduction="none"``.

        Raises:
            InvalidInput: The targets fit no shape or both, the loss does not return one value per model, or the
                reduction is unknown.

        Example:
            >>> mb = ModelBatch([nn.Linear(4, 3) for _ in range(5)])
            >>> outputs, labels = mb(torch.randn(8, 4)), torch.randint(0, 3, (8,))
            >>> mb.compute_loss(outputs, labels, nn.functional.cross_entropy, reduction="none").shape
            torch.Size([5])
        """
        if reduction not in ("mean", "sum", "none"):
            raise InvalidInput("reduction", received=repr(reduction), expected="'mean', 'sum' or 'none'")
        if weights is not None:
            outputs, targets = self._with_rows((outputs, targets), weights)
        for name, values in (loss_args or {}).items():
            check_per_model(f"loss_args[{name!r}]", values, self.num_models)
        if shared_targets is None:
            loss_of_first = partial(loss_fn, **of_first_model(loss_args or {}))
            shared_targets = targets_are_shared(
                targets,
                num_models=self.num_models,
                batch=batch_length(outputs, model_axis=True),
                loss_fits=lambda given: loss_accepts(loss_of_first, of_first_model(outputs))(given),
            )
        if shared_targets:
            check_targets_may_be_shared(outputs)
        if loss_args:
            own_targets = for_each_model(targets, self.num_models) if shared_targets else targets
            loss_fn, targets, shared_targets = WithArguments(loss_fn), (own_targets, dict(loss_args)), False
        losses = self.backend.losses(loss_fn, outputs, targets, shared_targets=shared_targets)
        self.latest_losses = losses.detach()
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()

    def _with_rows(self, trees: Any, weights: Tensor) -> Any:
        batch = batch_length(trees[0], model_axis=True)
        if weights.shape != (self.num_models, batch):
            raise InvalidInput(
                "weights", received=f"shape {tuple(weights.shape)}", expected=f"[{self.num_models}, {batch}]"
            )
        rows = rows_from_weights(weights)
        if rows is None:
            return trees

        def with_rows(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.dim() >= 2 and leaf.shape[:2] == weights.shape:
                return RoutedTensor.wrap(leaf, rows)
            return leaf

        return pytree.tree_map(with_rows, trees)

    def make_train_step(
        self,
        loss_fn: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        loss_args: Mapping[str, Tensor] | None = None,
        shared_args: Mapping[str, Any] | None = None,
        clip_norm: float | Tensor | None = None,
        accumulate: int = 1,
        active: Tensor | None = None,
        scaler: Any = None,
        aux: bool = False,
        shared_targets: bool | None = None,
    ) -> TrainStep:
        """Return ``step(inputs, targets) -> losses``: forward, loss, backward, clipping and update in one go.

        Model *i* is trained on ``loss_fn(outputs_i, targets_i, **loss_args_i, **shared_args)``, exactly as if alone.
        The arguments, and what the step can do besides, are described at `mb_torch.make_joint_step`.

        Example:
            >>> mb = ModelBatch([nn.Linear(4, 1) for _ in range(3)])
            >>> optimizer = torch.optim.SGD(mb.parameters(), lr=0.1)
            >>> step = mb.make_train_step(nn.functional.mse_loss, optimizer)
            >>> step(torch.randn(8, 4), torch.zeros(8, 1)).shape
            torch.Size([3])
        """
        return make_joint_step(
            [self],
            PlainLoss(loss_fn),
            [optimizer],
            loss_args=loss_args,
            shared_args=shared_args,
            clip_norm=clip_norm,
            accumulate=accumulate,
            active=active,
            scaler=scaler,
            aux=aux,
            shared_targets=shared_targets,
        )

    def advise(
        self,
        inputs: Any,
        targets: Any,
        loss_fn: Callable[..., Tensor],
        *,
        optimizer_cls: type[torch.optim.Optimizer] = torch.optim.Adam,
        backends: Sequence[str] | None = None,
        compiled: bool = False,
        seconds: float = 1.0,
        shared_targets: bool | None = None,
    ) -> Advice:
        """Train copies of the models for a moment in every way there is, and say which one to take.

        Plain PyTorch, one model after another; fused steps on every backend; and with the fastest of them, chunks of
        a quarter and of a sixteenth of the models. Batching does not always pay: large layers fill the machine with
        one model. Nothing else should run meanwhile. The batch, its random streams and gradients stay as they are;
        the trial needs memory for two more copies of the models and their optimizer state.

        Args:
            inputs: A batch of real data, as for `forward`.
            targets: Its targets, as for `make_train_step`.
            loss_fn: Takes one model's outputs and targets and returns a 0-dim tensor.
            optimizer_cls: What the models are to be trained with.
            backends: Names of the backends to try. Default: all; those that lack a package are listed with the
                command that installs it.
            compiled: Try ``enable_compile()`` too, which takes ten seconds and more.
            seconds: How long to measure each way, after its first two steps.
            shared_targets: As for `make_train_step`.

        Returns:
            What was measured and what was not tried, to be printed, and the arguments of `ModelBatch` that follow from
            it (``.options``).

        Raises:
            InvalidInput: Arguments that do not fit. Errors of the model and of the loss are raised as they are.

        Example:
            >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
            >>> advice = mb.advise(
            ...     torch.randn(8, 4), torch.zeros(8, 2), nn.functional.mse_loss, backends=["torch"], seconds=0.01
            ... )
            >>> sorted(str(trial) for trial in advice.trials)
            ["backend='torch'", 'one by one, plain PyTorch']
        """
        return advise(
            self,
            inputs,
            targets,
            loss_fn,
            optimizer_cls=optimizer_cls,
            backends=backends,
            compiled=compiled,
            seconds=seconds,
            shared_targets=shared_targets,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters.

        Args:
            set_to_none: Drop the gradient tensors; otherwise fill them with zeros.

        Example:
            >>> mb = ModelBatch([nn.Linear(1, 1) for _ in range(2)])
            >>> mb(torch.ones(1, 1)).sum().backward()
            >>> mb.zero_grad()
            >>> mb.stacked_params["weight"].grad is None
            True
        """
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        # Without the walk over the tree of modules.
        for parameter in self.stacked_params.values():
            parameter.grad = None

    def clip_grad_norm_(
        self,
        max_norm: float | Tensor,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Clip each model's gradient by its own norm, in place.

        (``torch.nn.utils.clip_grad_norm_(mb.parameters(), ...)`` would mix the models: one exploding gradient would
        shrink all others.)

        Args:
            max_norm: Largest norm, one for all models or ``[num_models]``.
            norm_type: Order of the norm; ``inf`` for the largest absolute value.
            error_if_nonfinite: Raise instead of scaling if a model's norm is NaN or infinite.

        Returns:
            The norms before clipping, ``[num_models]``.

        Raises:
            InvalidInput: ``error_if_nonfinite`` and a norm is not finite; names the models.

        Example:
            >>> mb = ModelBatch([nn.Linear(1, 1, bias=False) for _ in range(2)])
            >>> mb.stacked_params["weight"].grad = torch.tensor([[[8.0]], [[0.5]]])
            >>> mb.clip_grad_norm_(1.0)
            tensor([8.0000, 0.5000])
        """
        grads = [p.grad for p in self.stacked_params.values() if p.grad is not None]
        if not grads:
            return torch.zeros(self.num_models)
        if error_if_nonfinite:
            finite = torch.stack([torch.isfinite(g).reshape(len(g), -1).all(1) for g in grads]).all(0)
            if not finite.all():
                bad = (~finite).nonzero().flatten().tolist()
                raise InvalidInput(f"the gradient norm of models {bad} is not finite")
        return clip_gradients_(grads, max_norm, norm_type)

    def model(self, index: int) -> nn.Module:
        """Return a plain module with a copy of one model's weights and buffers.

        Args:
            index: Which model; negative numbers count from the end.

        Example:
            >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
            >>> type(mb.model(1)).__name__
            'Linear'
        """
        tensors = self._spec.state.model_tensors(self._index(index))
        return materialise(self.prototype, {name: tensor.clone() for name, tensor in tensors.items()})

    def select(self, indices: Sequence[int] | Tensor) -> ModelBatch:
        """Return a new batch with copies of some models, in the given order.

        Args:
            indices: Which models; a list of integers, an integer tensor or a ``[num_models]`` bool mask.

        Returns:
            A batch of ``len(indices)`` models with the same options; random streams go along.

        Example:
            >>> ModelBatch([nn.Linear(4, 2) for _ in range(3)]).select([2, 0]).num_models
            2
        """
        given = torch.as_tensor(indices)
        if given.dtype == torch.bool and given.shape == (self.num_models,):
            given = given.nonzero().flatten()
        if given.dtype == torch.bool or given.is_floating_point() or given.dim() != 1 or not len(given):
            raise InvalidInput(
                "select",
                received=repr(indices),
                expected=f"model numbers or a bool mask of length {self.num_models}",
            )
        chosen = torch.tensor([self._index(i) for i in given.tolist()])
        prototype = meta_copy(self.prototype)
        batch = type(self).__new__(type(self))
        streams = None if self.streams is None else self.streams.select(chosen)
        state = select_models(self._spec.state, self.prototype, chosen)
        batch._set_up(
            self.backend.name,
            prototype,
            state,
            len(chosen),
            self.shared_input,
            self._spec.chunk_size,
            streams,
            self._spec.options,
        )
        batch.training = self.training
        return batch

    def copy_model(self, source: int, destination: int) -> None:
        """Overwrite one model's weights and buffers with another's, as in population based training.

        Optimizer state stays; to copy it too, see ``optimizer.model_state_dict``. Random streams stay each model's own.

        Args:
            source: The model to copy.
            destination: The model to overwrite.

        Raises:
            InvalidInput: There is no such model.

        Example:
            >>> mb = ModelBatch([nn.Linear(1, 1) for _ in range(3)])
            >>> mb.copy_model(0, 2)
            >>> torch.equal(mb.stacked_params["weight"][0], mb.stacked_params["weight"][2])
            True
        """
        source, destination = self._index(source), self._index(destination)
        with torch.no_grad():
            for tensor in self._spec.state.tensors.values():
                tensor[destination].copy_(tensor[source])

    def _index(self, index: int) -> int:
        if type(index) is not int or not -self.num_models <= index < self.num_models:
            raise InvalidInput("model number", received=repr(index), expected=f"0 to {self.num_models - 1}")
        return index % self.num_models

    def get_model_states(self) -> list[ModelState]:
        """Return each model's ``state_dict``, copied: a list of ``num_models``.

        Example:
            >>> ModelBatch([nn.Linear(4, 2) for _ in range(3)]).get_model_states()[0].keys()
            dict_keys(['weight', 'bias'])
        """
        return model_states(self.prototype, self._spec.state, self.num_models)

    def load_model_states(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Load states as `get_model_states` returns them, all or none.

        Args:
            states: One ``state_dict`` per model, with exactly the model's keys, shapes and dtypes.

        Raises:
            InvalidState: Names the model and the key; the batch is unchanged.

        Example:
            >>> mb = ModelBatch([nn.Linear(1, 1) for _ in range(2)])
            >>> mb.load_model_states(list(reversed(mb.get_model_states())))
        """
        if len(states) != self.num_models:
            raise InvalidState(
                "load_model_states",
                received=f"{len(states)} states",
                expected=f"{self.num_models}, one per model",
            )
        load_model_states(self.prototype, self._spec.state, states)

    def save_all(self, path: str | os.PathLike[str]) -> None:
        """Write each model's state to ``path/model_{i}.pt``, each file whole or not at all.

        The files hold plain CPU tensors; ``torch.load(file, weights_only=True)`` opens them.

        Args:
            path: A folder; made if it does not exist.

        Example:
            >>> import tempfile
            >>> mb = ModelBatch([nn.Linear(1, 1) for _ in range(2)])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     mb.save_all(folder)
            ...     sorted(os.listdir(folder))
            ...     mb.load_all(folder)
            ['model_0.pt', 'model_1.pt']
        """
        save_states(self.get_model_states(), path)

    def load_all(self, path: str | os.PathLike[str]) -> None:
        """Load states written by `save_all`, all or none.

        Args:
            path: The folder.

        Raises:
            MissingState: A file is missing (also a ``FileNotFoundError``).
            InvalidState: A file is damaged or does not fit; the batch is unchanged.
        """
        self.load_model_states(load_states(path, self.num_models))

    def to_flax(self) -> Any:
        """Return the models as one ``flax.nnx`` module whose variables have the stacks' names and values.

        The variables are copies with a leading model axis: neither side sees what the other does later. In
        ``bridge.TorchModule`` is described what the module can do.

        Returns:
            A ``bridge.TorchModule`` with ``num_models``.

        Raises:
            Unsupported: The batch is not on the ``"jax"`` backend.

        Example:
            >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)], backend="jax")
            >>> module = mb.to_flax()
            >>> module["weight"].shape
            (3, 2, 4)
            >>> mb.load_flax(module)
        """
        return self.backend.to_flax()

    def load_flax(self, module: Any) -> None:
        """Copy the variables of a flax module into the stacks, all or none.

        Args:
            module: A module as from `to_flax`, its ``nnx.State``, or a flat dict of JAX arrays by name, every one
                ``[num_models, ...]``.

        Raises:
            InvalidState: Names the variable; the batch is unchanged.
            Unsupported: The batch is not on the ``"jax"`` backend.

        Example:
            >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)], backend="jax")
            >>> state = mb.to_flax().arrays()
            >>> mb.load_flax({name: 2 * array for name, array in state.items()})
        """
        self.backend.load_flax(module)

    def enable_compile(self, **kwargs: Any) -> None:
        """Compile the vectorised models, and the steps of `make_train_step`, with ``torch.compile``.

        The first call then takes ten seconds or more, and so does the first call with inputs of another shape: keep
        batches at one size (``drop_last=True`` in a DataLoader, say), and do not compile where models get varying
        numbers of rows. Learning rates, ``loss_args`` and ``active`` may change without compiling again.

        Args:
            **kwargs: Passed to ``torch.compile``.

        Raises:
            Unsupported: Later, by the first call, if the compiler fails.

        Example:
            >>> mb = ModelBatch([nn.Linear(4, 2) for _ in range(3)])
            >>> mb.enable_compile(backend="eager")  # traces without generating code; leave it out for speed
            >>> mb(torch.randn(8, 4)).shape
            torch.Size([3, 8, 2])
        """
        self.backend.enable_compile(**kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do the same as `enable_compile`, by the name that every ``nn.Module`` has for it."""
        self.enable_compile(*args, **kwargs)

    def metrics(self) -> dict[str, float]:
        """Return the losses of the last `compute_loss` or training step: ``{"loss_model_0": 0.1, ...}``.

        Empty before the first.

        Example:
            >>> mb = ModelBatch([nn.Linear(1, 1) for _ in range(2)])
            >>> loss = mb.compute_loss(torch.ones(2, 3), torch.zeros(3), nn.functional.mse_loss)
            >>> mb.metrics()
            {'loss_model_0': 1.0, 'loss_model_1': 1.0}
        """
        if self.latest_losses is None:
            return {}
        return {f"loss_model_{i}": loss for i, loss in enumerate(self.latest_losses.tolist())}

    def backend_report(self) -> dict[str, Any]:
        """Say how the models are run: backend, whether vectorised or one by one and why, compiled or not.

        ``"runs"`` and ``"reason"`` are about the present mode, training or evaluation; ``"one_by_one"`` has the reason
        for each mode (``"train"``, ``"eval"``) in which a call ran the models one after another. Training steps are
        listed apart, under ``"steps"``: what `forward` can vectorise their loss may not.

        Example:
            >>> report = ModelBatch([nn.Linear(4, 2) for _ in range(3)]).backend_report()
            >>> report["backend"], report["runs"], report["steps"]
            ('torch', 'vmap', [])
        """
        return self.backend.report()

    def train(self, mode: bool = True) -> ModelBatch:
        """Put all models into training mode (or evaluation mode); returns the batch."""
        super().train(mode)
        self.prototype.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModelBatch:
        super()._apply(fn, recurse)
        self._spec.state.retie_buffers()
        return self

    def __repr__(self) -> str:
        # In one line: the tree of stacks has none of the models' classes. `print(mb.prototype)` shows these.
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Say how many models of which class there are, and how they run.

        Example:
            >>> ModelBatch([nn.Linear(4, 2) for _ in range(3)], chunk_size=2)
            ModelBatch(3 x Linear, 10 parameters each, dtype=float32, backend='torch', device=cpu, shared_input=True,
                chunk_size=2, has_seeds=False)
        """
        stacks = [*self.stacked_params.values()]
        # Stacks that are mirrors of arrays are on the host, wherever the arrays are.
        device = self.backend.report().get("platform", ", ".join(dict.fromkeys(str(stack.device) for stack in stacks)))
        dtype = ", ".join(dict.fromkeys(str(stack.dtype).removeprefix("torch.") for stack in stacks))
        size = sum(stack.numel() for stack in stacks) // self.num_models
        return (
            f"{self.num_models} x {type(self.prototype).__name__}, {size:,} parameters each, dtype={dtype or None}, "
            f"backend={self.backend.name!r}, device={device or None}, shared_input={self.shared_input}, "
            f"chunk_size={self._spec.chunk_size}, has_seeds={self.streams is not None}"
        )
