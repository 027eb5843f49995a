"""Every module of the zoo trained by a compiled step ends where the loop ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from mb_torch import ModelBatch
from tests.compare import assert_close
from tests.parity.loop import as_tree, train_alone
from tests.parity.test_zoo import batches_of, deterministic, loss_of, models_of, train_fused
from tests.zoo import Case

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")]


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# "aot_eager" traces forward, backward and update as the default compiler does, without generating code.
@pytest.mark.parametrize("case", [case for case in deterministic if case.name != "buffers_only"], ids=repr)
def test_compiled_training_equals_the_loop(case: Case) -> None:
    models, batches = models_of(case), batches_of(case)
    mb = ModelBatch(models)
    mb.enable_compile(backend="aot_eager")
    with warnings.catch_warnings():
        # Some run as a loop or without the compiler, and say so.
        warnings.simplefilter("ignore")
        received = train_fused(mb, batches)
    assert_close(as_tree(received), as_tree(train_alone(models, batches, loss_of)))
