"""What every backend must do: one suite class, which a backend's own file runs by setting a name."""

import pytest

# The suite's files are no test files by name, and its assertions should explain themselves all the same.
for part in ("forward", "isolation", "joint", "routing", "states", "steps", "streams"):
    pytest.register_assert_rewrite(f"tests.contract.{part}")
