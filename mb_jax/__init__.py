"""The XLA backend: stacked parameters as flax state, vmapped and compiled by JAX, optimizers in optax."""
