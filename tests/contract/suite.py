"""Everything a backend must fulfil, as one class: a backend's test file derives from it and sets `backend`."""

from __future__ import annotations

from tests.contract.forward import ForwardContract
from tests.contract.isolation import IsolationContract
from tests.contract.joint import JointContract
from tests.contract.routing import RoutingContract
from tests.contract.states import StatesContract
from tests.contract.steps import StepsContract
from tests.contract.streams import StreamsContract


class BackendContract(
    ForwardContract,
    StatesContract,
    StreamsContract,
    StepsContract,
    JointContract,
    RoutingContract,
    IsolationContract,
):
    """All parts of the contract."""
