"""Nine optimizers of ``torch.optim`` as optax transformations of one model, to be mapped over models by `jax.vmap`.

`transform_for` gives an update whose coefficients are arguments; they come from the rules in
`mb_torch.stacked.update_rules`. `torch_optimizer` counts steps itself and is complete.
"""

from mb_jax.transforms.optimizers import CountedState, torch_optimizer, transform_for

__all__ = ["CountedState", "torch_optimizer", "transform_for"]
