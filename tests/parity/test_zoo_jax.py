"""The zoo on the XLA backend: every module ends where the loop ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mb_torch import ModelBatch, Unsupported
from tests.parity.test_zoo import (
    ALWAYS_RANDOM,
    batches_of,
    check,
    double_precision,  # noqa: F401  (a fixture)
    models_of,
    train_eagerly,
    train_fused,
)
from tests.zoo import CASES, Case, by_name

# torch says it once per process, in the loop.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

# What cannot be traced, and what the error must name.
REFUSED = {
    "branch_on_value": "BranchOnValue",
    "boolean_selection": "BooleanSelection",
    "records_item": "RecordsItem",
}

deterministic = [case for case in CASES if not case.random and case.name not in REFUSED]
trained = [case for case in deterministic if case.name != "buffers_only"]
in_evaluation = [replace(case, training=False) for case in CASES if case.random and case.name not in ALWAYS_RANDOM]


def plain(case: Case) -> Case:
    """The case without the warning that only the torch backend gives."""
    return replace(case, loops=None)


@pytest.mark.long
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("case", deterministic, ids=repr)
def test_eager_training_equals_the_loop(case: Case) -> None:
    check(plain(case), train_eagerly, backend="jax")


@pytest.mark.long
@pytest.mark.parametrize("case", trained, ids=repr)
def test_fused_training_equals_the_loop(case: Case) -> None:
    check(plain(case), train_fused, backend="jax")


@pytest.mark.long
@pytest.mark.parametrize("case", in_evaluation, ids=repr)
def test_a_random_module_in_evaluation_equals_the_loop(case: Case) -> None:
    check(plain(case), train_fused, backend="jax")


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_values_is_refused(name: str) -> None:
    case = by_name[name]
    mb = ModelBatch(models_of(case), backend="jax")
    args, kwargs = batches_of(case)[0]
    with pytest.raises(Unsupported, match=REFUSED[name]):
        mb(*args, **kwargs)
