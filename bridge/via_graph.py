"""The translator of our own: PyTorch records the function as core operations, each of which has a lowering."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from torch import Tensor, nn

from bridge.arrays import to_jax
from bridge.lowering import check_lowerable, run
from bridge.trace import trace
from bridge.translation import TensorFunction, Translation


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
        check_lowerable(traced)
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
