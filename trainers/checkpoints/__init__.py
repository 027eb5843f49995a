"""Checkpoints: what is in one, how files are written and checked, which are kept, and parts of them by models."""
