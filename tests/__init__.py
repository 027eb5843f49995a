"""The tests; `tests.zoo`, `tests.compare` and their like are shared by all of them."""
