"""The XLA backend: stacked parameters as JAX arrays, one compiled program over all models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakSet

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

from bridge.arrays import to_jax
from bridge.autograd import CompiledFunction, Outputs
from bridge.by_value import ByValue
from bridge.dtypes import torch_dtypes
from bridge.keys import surroundings
from mb_jax.compile_log import CompileLog, logger
from mb_jax.convolution import convolution_form
from mb_jax.mirror import MirrorBuffer, MirrorParameter, as_mirrors
from mb_jax.optim import JaxOptimizer, MirrorStack, arrays_of, keep
from mb_jax.options import JaxOptions
from mb_jax.outside import own_forwards, own_generators_kept, read_by, settings
from mb_jax.programs import ModelProgram, over_models, part_of, shared, signature
from mb_jax.rng import Random, random_state
from mb_jax.sharding import EVERYWHERE, ONE_DEVICE, Layout, along, layout_for, placed
from mb_jax.start import announce, installed_versions, prepare, untested_versions, use_cache
from mb_jax.step import FusedStep
from mb_jax.uninterrupted import Uninterrupted
from mb_torch.backend import Backend, BatchSpec, Capabilities, Step, StepSpec, create_backend
from mb_torch.errors import InvalidInput
from mb_torch.stacked.arguments import Arguments
from mb_torch.stacked.definition import Definition
from mb_torch.stacked.optim import make_optimizer
from mb_torch.stacked.parts import Plan, plan_parts

Arrays = list[jax.Array]
Mirror = MirrorParameter | MirrorBuffer

prepare()


class _Forward(NamedTuple):
    """A compiled forward pass of all models.

    Attributes:
        program: The function of one model.
        function: The compiled function of all models.
        layout: Where its arrays live.
        leaves_mapped: For each tensor among the arguments, whether it has a model axis.
        smooth: Positions of the flat inputs that gradients are taken of.
        smooth_results: Positions of the results through which gradients flow.
    """

    program: ModelProgram
    function: CompiledFunction
    layout: Layout
    leaves_mapped: list[bool]
    smooth: list[int]
    smooth_results: list[int]


class JaxBackend:
    """Runs all models of a batch in one program compiled by XLA.

    Args:
        spec: The definition, its stacks and the options.
    """

    name = "jax"
    capabilities = Capabilities(ragged_rows=True, survives_fork=False)

    def __init__(self, spec: BatchSpec) -> None:
        self.spec = spec
        self.options = JaxOptions.of(spec.options)
        self._prepare()

    def _prepare(self) -> None:
        use_cache(self.options.cache_dir)
        announce()
        parameters, _ = as_mirrors(self.spec.state)
        num_numbers = sum(parameter.numel() for parameter in parameters)
        self.layout = layout_for(self.spec.num_models, self.options.devices, num_numbers)
        self.definition = Definition(self.spec.prototype, self.spec.state)
        self.modules = list(self.spec.prototype.modules())
        self.forwards_of_users = own_forwards(self.modules)
        self._forwards: ByValue[_Forward] = ByValue()
        self._steps: WeakSet[FusedStep] = WeakSet()
        self.log = CompileLog()
        self._said_compiled = False
        # Losses of outputs that have come to torch, and optimizers that have no form in JAX.
        self._torch = create_backend("torch", replace(self.spec, options={}))

    def __getstate__(self) -> dict[str, Any]:
        # Compiled programs belong to one object: a copy makes its own.
        return {"spec": self.spec}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.spec = state["spec"]
        self.options = JaxOptions.of(self.spec.options)
        self._prepare()

    def mirrors(self) -> list[Mirror]:
        """All stacks, parameters first, in the order of the definition."""
        parameters, buffers = as_mirrors(self.spec.state)
        return [*parameters, *buffers]

    def example(self) -> list[Tensor]:
        """The tensors of model 0, in the order of `mirrors`."""
        return [mirror.detach()[0].clone().requires_grad_(mirror.requires_grad) for mirror in self.mirrors()]

    def random(self, program: ModelProgram) -> Random | None:
        """Seeds and steps of the models' next draws; None where the program draws nothing."""
        return random_state(self.spec.streams, self.spec.num_models) if program.draws else None

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, per_model: bool) -> Any:
        """Run all models; every tensor leaf has a leading model axis if ``per_model``."""
        with torch_dtypes():
            return self._run_all(args, kwargs, per_model)

    def _run_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], per_model: bool) -> Any:
        trees = (*args, kwargs)
        arguments = Arguments(trees, (per_model,) * len(trees))
        mirrors = self.mirrors()
        plan = plan_parts(self.spec.num_models, None, arguments)
        if plan is None:
            arguments = arguments.plain()
            forward = self._forward(arguments, self.spec.num_models, self.layout)
            results, changed = self._run(
                forward, mirrors, arrays_of(mirrors, self.layout), arguments, self.random(forward.program)
            )
            with Uninterrupted():
                keep([mirrors[position] for position in forward.program.changed], changed, self.layout)
        else:
            forward, results = self._run_parts(plan, mirrors, arguments)
        if forward.program.draws and self.spec.streams is not None:
            self.spec.streams.advance()
        return forward.program.packing.unpack(results)

    def _forward(self, arguments: Arguments, num_models: int, layout: Layout) -> _Forward:
        key = self._key(arguments, num_models, layout)
        known = self._forwards.get(key, arguments.leaves)
        if known is None or not known.program.is_current():
            with own_generators_kept(*self.forwards_of_users):
                program = ModelProgram(
                    [self.definition],
                    _call_model,
                    [self.example()],
                    arguments,
                    len(arguments.leaves),
                    translator=self.options.translator,
                    verify=self.options.verify,
                    tried=self._forwards.places(key),
                )
            known = self._compiled(program, arguments, num_models, layout)
            # Anew: a forward pass may leave something in its module, a counter say, and has run.
            key = self._key(arguments, num_models, layout)
            self._forwards.put(key, program.by_value, arguments.leaves, known)
        return known

    def _key(self, arguments: Arguments, num_models: int, layout: Layout) -> Hashable:
        return signature(arguments), num_models, layout, self.built_in(), surroundings()

    def built_in(self) -> Hashable:
        """What programs have built in of the models: settings, what their methods read, dtypes, who is trained."""
        tensors = [*self.spec.state.parameters.values(), *self.spec.state.buffers.values()]
        # Neither needs values, for which mirrors would look at each access.
        with torch._C.DisableTorchFunctionSubclass():
            kinds = tuple([(tensor.dtype, tensor.requires_grad) for tensor in tensors])
        return settings(self.modules), read_by(*self.forwards_of_users), kinds

    def _compiled(self, program: ModelProgram, arguments: Arguments, num_models: int, layout: Layout) -> _Forward:
        tensors = [
            (leaf, mapped)
            for leaf, mapped in zip(arguments.leaves, arguments.mapped, strict=True)
            if isinstance(leaf, Tensor)
        ]
        mapped = [True] * program.num_tensors + [flag for _, flag in tensors]
        wanted = [mirror.requires_grad for mirror in self.mirrors()] + [leaf.requires_grad for leaf, _ in tensors]
        smooth = [position for position, flag in enumerate(wanted) if flag]
        flows = [program.reached(result) & set(smooth) for result in range(program.num_results)]
        smooth_results = [result for result, reached in enumerate(flows) if reached]
        local = layout.local_models(num_models)
        form = convolution_form(self.options.convolution, local)
        run = over_models(lambda inputs, key: program.run_one(inputs, key, form), mapped, local, self.spec.chunk_size)

        def function(given: Arrays, others: Arrays, random: Random | None) -> Outputs:
            inputs = list(others)
            for position, array in zip(smooth, given, strict=True):
                inputs.insert(position, array)
            results, changed = run(inputs, random)
            rest = [array for index, array in enumerate(results) if index not in smooth_results]
            return Outputs([results[index] for index in smooth_results], (rest, changed))

        places = {position: index for index, position in enumerate(smooth)}
        reached = [{places[position] for position in flows[result]} for result in smooth_results]
        axes = [along() if flag else EVERYWHERE for flag in mapped]
        inputs = ([axes[position] for position in smooth], [a for p, a in enumerate(axes) if p not in smooth], along())
        key = ("forward", program.key, tuple(mapped), tuple(smooth), num_models, self.spec.chunk_size, form, layout)
        compiled = shared(
            key,
            lambda: CompiledFunction(
                layout.spread(function, inputs, along()),
                reached,
                # Nothing flows back from the copies of the last model.
                place=lambda tensor: layout.place(tensor, fill="constant"),
                read=layout.read,
                whole=frozenset(index for index, position in enumerate(smooth) if not mapped[position]),
            ),
        )
        return _Forward(program, compiled, layout, mapped[program.num_tensors :], smooth, smooth_results)

    def _run(
        self,
        forward: _Forward,
        known: Sequence[Tensor],
        state: Arrays,
        arguments: Arguments,
        random: Random | None,
    ) -> tuple[list[Tensor], Arrays]:
        """Results as tensors, and the new arrays of what the pass changed.

        Args:
            forward: What to run.
            known: What autograd knows the state as.
            state: The state of the models.
            arguments: Their arguments.
            random: Seeds and steps.
        """
        leaves = [leaf for leaf in arguments.leaves if isinstance(leaf, Tensor)]
        tensors = [*known, *leaves]
        layout = forward.layout
        inputs = [*state, *placed(leaves, forward.leaves_mapped, layout)]
        if random is not None:
            random = layout.place(random[0]), layout.place(random[1])
        chosen = set(forward.smooth)
        others = [array for position, array in enumerate(inputs) if position not in chosen]
        smooth, (rest, changed) = forward.function(
            [tensors[position] for position in forward.smooth],
            [inputs[position] for position in forward.smooth],
            others,
            random,
            watch=self._watch,
        )
        own, remaining = iter(smooth), iter(rest)
        results = [
            next(own) if index in forward.smooth_results else layout.read(next(remaining))
            for index in range(forward.program.num_results)
        ]
        return results, changed

    def _run_parts(self, plan: Plan, mirrors: Sequence[Mirror], arguments: Arguments) -> tuple[_Forward, list[Tensor]]:
        """Models with equally many rows together, on one device."""
        known = plan.split([mirror.clone() if mirror.requires_grad else mirror.detach() for mirror in mirrors])
        streams = None
        outputs, changes = [], []
        for part, share in enumerate(plan.split_arguments(arguments)):
            forward = self._forward(share, plan.sizes[part], ONE_DEVICE)
            if streams is None and forward.program.draws:
                streams = random_state(self.spec.streams, self.spec.num_models)
            state = [to_jax(tensor) for tensor in known[part]]
            random = None if streams is None else (part_of(plan, streams[0], part), part_of(plan, streams[1], part))
            results, changed = self._run(forward, known[part], state, share, random)
            outputs.append(results)
            changes.append(changed)
        for index, position in enumerate(forward.program.changed):
            mirror = mirrors[position]
            joined = jnp.concatenate([part[index] for part in changes])
            mirror.set_array(joined if plan.order is None else mirror.array().at[to_jax(plan.order)].set(joined))
        return forward, plan.join(outputs)

    def losses(self, loss_fn: Callable[..., Tensor], outputs: Any, targets: Any, *, shared_targets: bool) -> Tensor:
        """Evaluate one loss per model, ``[num_models]``, each on its real rows only; in torch, where outputs are."""
        return self._torch.losses(loss_fn, outputs, targets, shared_targets=shared_targets)

    def make_optimizer(
        self, optimizer_cls: type[torch.optim.Optimizer], configs: Sequence[Mapping[str, Any]]
    ) -> torch.optim.Optimizer:
        """Return an optimizer with one live parameter group per model."""
        return make_optimizer(
            optimizer_cls,
            [dict(config) for config in configs],
            self.spec.state.parameters,
            self.spec.num_models,
            MirrorStack,
            JaxOptimizer,
        )

    def make_step(self, spec: StepSpec, backends: Sequence[Backend]) -> Step:
        """Return a fused training step over the batches of ``backends``."""
        for backend in backends:
            if not isinstance(backend, JaxBackend):
                raise InvalidInput("a joint step", received=f"a batch on {backend.name!r}", expected="one backend")
        step = FusedStep(spec, backends)  # type: ignore[arg-type]
        for backend in step.backends:
            backend._steps.add(step)
        return step

    def enable_compile(self, **kwargs: Any) -> None:
        """Say once that every program is compiled by XLA anyway."""
        if not self._said_compiled:
            self._said_compiled = True
            logger.info("backend='jax' compiles every program with XLA; enable_compile() changes nothing")

    def to_flax(self) -> Any:
        """Return the models as one flax module with copies of the stacks."""
        # Loads flax, which nothing else needs.
        return importlib.import_module("mb_jax.flax_form").to_flax(self)

    def load_flax(self, module: Any) -> None:
        """Copy a flax module's variables into the stacks, all or none."""
        importlib.import_module("mb_jax.flax_form").load_flax(self, module)

    def report(self) -> dict[str, Any]:
        """Say how the models are run, and how each translation compared with PyTorch."""
        return {
            "backend": self.name,
            "platform": jax.default_backend(),
            "devices": self.layout.num_devices,
            "versions": installed_versions(),
            "untested_versions": untested_versions(),
            "runs": "xla",
            "reason": None,
            "one_by_one": {},
            "compiled": True,
            "compiles": self.log.compiles,
            "compile_seconds": self.log.seconds,
            "translations": [forward.program.report() for forward in self._forwards.entries()],
            "steps": [step.report() for step in self._steps],
            "chunk_size": self.spec.chunk_size,
        }

    def _watch(self, what: str) -> AbstractContextManager[None]:
        return self.log.watch(f"{what} of {self.spec.num_models} {type(self.spec.prototype).__name__}")


def _call_model(model: nn.Module, *trees: Any) -> Any:
    *args, kwargs = trees
    return model(*args, **kwargs)
