"""The default backend: ``torch.func`` vmap over stacked parameters."""
