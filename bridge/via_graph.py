"""The translator of our own: PyTorch records the function as core operations, each of which has a lowering."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from torch import Tensor, nn

from bridge.arrays import to_jax
from bridge.lowering import missing, run
from bridge.trace import trace
from bridge.translation import TensorFunction, Translation
from bridge.where import callers
from mb_torch.errors import Unsupported


class GraphTranslator:
    """Translates by recording; see `bridge.trace`."""

    name = "graph"

    def translate(
        self, function: TensorFunction, inputs: Sequence[Tensor], modules: Sequence[nn.Module] = ()
    ) -> Translation:
        """Record a function and check that every operation has a lowering.

        Raises:
            Unsupported: The function looks at values, or operations lack lowerings; the error lists them all.
        """
        traced = trace(function, inputs, modules)
        without = missing(traced)
        if without:
            found = callers(lambda: function([tensor.detach().clone() for tensor in inputs]), modules, without)
            names = [
                f"{operation} in {found[operation]}" if operation in found else f"{operation}" for operation in without
            ]
            raise Unsupported(
                f"no lowering to JAX for {', '.join(names)}",
                fix="Write these parts of the model with other operations, or use backend='torch'.",
            )
        constants = {name: to_jax(tensor) for name, tensor in traced.constants.items()}

        def computed(arrays: Sequence[jax.Array], key: jax.Array | None, convolution: str) -> list[jax.Array]:
            return run(traced, arrays, key, constants=constants, convolution=convolution)

        return Translation(
            self.name,
            computed,
            tuple(traced.dtypes),
            traced.draws,
            tuple(traced.unchanged),
            tuple(traced.reached),
            traced.text,
        )
