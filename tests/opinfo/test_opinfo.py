"""PyTorch's own samples mean in the bridge what they mean in PyTorch.

PyTorch's table of operations takes seconds to import, so nothing here needs it before a test runs.
"""

from __future__ import annotations

import pytest

pytest.importorskip("jax")
pytest.importorskip("expecttest", reason="PyTorch's table of operations needs it")

from tests.opinfo.samples import COMPARED, PASSED, check, entries, lists

# PyTorch warns in many of its samples.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

PARTS = 48


@pytest.mark.parametrize("part", range(PARTS))
def test_means_what_it_means_in_torch(part: int) -> None:
    names = [name for name in sorted(entries()) if name not in lists()["excluded"]]
    outcomes = {name: check(name) for name in names[part::PARTS]}
    assert {name: outcome for name, outcome in outcomes.items() if outcome.status not in PASSED} == {}
    whole = [name for name, outcome in outcomes.items() if outcome.status == COMPARED]
    assert set(whole).isdisjoint(lists()["partly"]), "no sample was refused: the entry needs no listing"


def test_the_lists_name_entries_once_and_with_a_reason() -> None:
    listed = [(name, reason) for own in lists().values() for name, reason in own.items()]
    assert {name for name, _ in listed} <= set(entries())
    assert len({name for name, _ in listed}) == len(listed)
    assert all(reason for _, reason in listed)


def test_excluded_entries_do_not_work() -> None:
    assert [name for name in lists()["excluded"] if check(name).status in PASSED] == []
