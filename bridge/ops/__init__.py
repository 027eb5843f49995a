"""Lowerings of torch operations to JAX, one file per subject."""

import bridge.ops.activations
import bridge.ops.convolution
import bridge.ops.embeddings
import bridge.ops.functions
import bridge.ops.grids
import bridge.ops.indexing
import bridge.ops.linalg
import bridge.ops.losses
import bridge.ops.matmul
import bridge.ops.normalisation
import bridge.ops.pointwise
import bridge.ops.pooling
import bridge.ops.random
import bridge.ops.recurrent
import bridge.ops.reductions
import bridge.ops.resampling
import bridge.ops.shapes  # noqa: F401
