"""Loaders that go on within an epoch: with the samples that were left, in processes that end when asked."""
