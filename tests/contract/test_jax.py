"""The contract, on the XLA backend."""

from __future__ import annotations

import torch
from torch import nn

from tests.compare import assert_different, assert_equal
from tests.contract.base import features
from tests.contract.streams import Permutes
from tests.contract.suite import BackendContract


class TestJax(BackendContract):
    backend = "jax"

    def test_what_has_no_stream_is_refused(self) -> None:
        """Every random operation has a stream here."""
        results = []
        for seeds in ([1, 2], [2, 3]):
            mb = self.batch([nn.Sequential(nn.Identity(), Permutes()) for _ in range(2)], seeds=seeds)
            results.append(mb(features()))
        assert_equal(results[0][1], results[1][0])
        assert_different(results[0][0], results[0][1])
        assert_equal(results[0][0].sort(dim=0).values, torch.sort(features(), dim=0).values)
