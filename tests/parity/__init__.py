"""The loop written out in plain PyTorch, and the library held against it."""
