"""What the ways to make a training step have in common: the batches, their programs, and who draws random numbers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bridge.by_value import ByValue
from bridge.keys import surroundings
from mb_jax.convolution import convolution_form
from mb_jax.outside import own_generators_kept, read_by
from mb_jax.programs import ModelProgram, signature
from mb_jax.rng import Random, random_state
from mb_jax.sharding import common_layout
from mb_jax.step_program import Places, StepProgram
from mb_torch.backend import StepSpec
from mb_torch.errors import InvalidInput
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.packing import check_loss
from mb_torch.trees import leaves_of

if TYPE_CHECKING:
    from mb_jax.engine import JaxBackend

Presence = tuple[list[list[bool]], tuple[tuple[int, ...], ...]]


@dataclass(eq=False)
class KnownProgram:
    """A step's program for arguments of one form, and what is derived from it.

    Attributes:
        steps: The program.
        trainers: The compiled steps whose update is part of the program.
        presence: For each batch which stacks of its optimizer are trained, and which of the trained tensors are its
            own; None before it is needed.
    """

    steps: StepProgram
    trainers: dict[Hashable, Callable[..., Any]] = field(default_factory=dict)
    presence: Presence | None = None

    @property
    def model(self) -> ModelProgram:
        """The loss of one model."""
        return self.steps.program


class StepContext:
    """The batches of a training step and its programs.

    Args:
        spec: The step.
        backends: Of the batches, in order. They share one layout from now on.

    Attributes:
        layout: Where the arrays live.
    """

    def __init__(self, spec: StepSpec, backends: Sequence[JaxBackend]) -> None:
        self.spec = spec
        self.backends = list(backends)
        self.num_models = backends[0].spec.num_models
        self._programs: ByValue[KnownProgram] = ByValue()
        self._share_layout()

    def __getstate__(self) -> dict[str, Any]:
        # Compiled programs belong to one object: a copy makes its own.
        return {**self.__dict__, "_programs": ByValue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_layout()

    def _share_layout(self) -> None:
        layouts = [backend.layout for backend in self.backends]
        chosen = [backend.options.devices is not None for backend in self.backends]
        self.layout = common_layout(layouts, chosen)
        for backend in self.backends:
            backend.layout = self.layout

    def trained(self) -> list[list[Tensor]]:
        """The stacks to differentiate, per batch."""
        return [
            [p for p in backend.spec.state.parameters.values() if p.requires_grad] if optimizer is not None else []
            for backend, optimizer in zip(self.backends, self.spec.optimizers, strict=True)
        ]

    def mirrors(self) -> list[Any]:
        """All stacks of all batches."""
        return [mirror for backend in self.backends for mirror in backend.mirrors()]

    def program(self, arguments: Arguments) -> KnownProgram:
        """Return the program for arguments of this form; it is translated at first use."""
        key = self._key(arguments)
        known = self._programs.get(key, arguments.leaves)
        if known is None or not known.model.is_current():
            forwards = [forward for backend in self.backends for forward in backend.forwards_of_users]
            with own_generators_kept(self.spec.loss_fn, *forwards):
                known = KnownProgram(self._translated(arguments, self._programs.places(key)))
            # Anew: models and loss may leave something behind, a counter say, and have run.
            self._programs.put(self._key(arguments), known.model.by_value, arguments.leaves, known)
        return known

    def _key(self, arguments: Arguments) -> Hashable:
        models = tuple([backend.built_in() for backend in self.backends])
        return signature(arguments), models, read_by(self.spec.loss_fn), surroundings()

    def reports(self) -> list[dict[str, Any]]:
        """Which translators were used, and how they compared with PyTorch."""
        return [known.model.report() for known in self._programs.entries()]

    def _translated(self, arguments: Arguments, tried: Sequence[int] | None) -> StepProgram:
        options = self.backends[0].options
        program = ModelProgram(
            [backend.definition for backend in self.backends],
            self._loss_of_one_model,
            [backend.example() for backend in self.backends],
            arguments,
            len(leaves_of(arguments.trees[0])),
            translator=options.translator,
            verify=options.verify,
            tried=tried,
        )
        wanted = {id(parameter) for own in self.trained() for parameter in own}
        reached = program.reached(0)
        trained = [p for p, mirror in enumerate(self.mirrors()) if id(mirror) in wanted and p in reached]
        if not trained:
            raise InvalidInput("the loss does not depend on any parameter that is to be trained")
        leaves = zip(arguments.leaves, arguments.mapped, strict=True)
        mapped = [True] * program.num_tensors + [flag for leaf, flag in leaves if isinstance(leaf, Tensor)]
        sizes = [backend.spec.chunk_size for backend in self.backends if backend.spec.chunk_size is not None]
        return StepProgram(
            program,
            Places.of(program, trained),
            tuple(mapped),
            min(sizes, default=None),
            convolution_form(options.convolution, self.layout.local_models(self.num_models)),
        )

    def _loss_of_one_model(self, *args: Any) -> Any:
        *models, inputs, targets, loss_args, shared_args, rows = args
        if rows is not None:
            inputs, targets = pytree.tree_map_only(Tensor, lambda data: data.index_select(0, rows), (inputs, targets))
        result = self.spec.loss_fn(*models, inputs, targets, **loss_args, **shared_args)
        if not self.spec.aux:
            return check_loss(result)
        if not isinstance(result, tuple) or len(result) != 2:
            raise InvalidInput("loss_fn with aux=True", received=type(result).__name__, expected="(loss, aux)")
        return check_loss(result[0]), result[1]

    def random(self, program: ModelProgram) -> Random | None:
        """Seeds and steps of the models' next draws; None where the program draws nothing."""
        if not program.draws:
            return None
        streams = next((b.spec.streams for b in self.backends if b.spec.streams is not None), None)
        return random_state(streams, self.num_models)

    def advance_streams(self, active: Tensor | None, count: int) -> None:
        """Let the random streams of active models take some steps."""
        for backend in self.backends:
            if backend.spec.streams is not None:
                for _ in range(count):
                    backend.spec.streams.advance(active)

    def watch(self, what: str) -> AbstractContextManager[None]:
        """Within the block, note what is compiled."""
        names = [type(backend.spec.prototype).__name__ for backend in self.backends]
        return self.backends[0].log.watch(f"{what} of {self.num_models} {' + '.join(names)}")
