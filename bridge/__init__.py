"""PyTorch and JAX in one program: arrays, gradients and translated functions. Knows nothing of model batches."""
