"""The contract, on the default backend."""

from __future__ import annotations

from tests.contract.suite import BackendContract


class TestTorch(BackendContract):
    backend = "torch"
