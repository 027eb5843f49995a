"""What is said where packages of the extra `jax` are not installed."""

from __future__ import annotations

import pytest

from tests.arch.repository import run_python

ASKING = """
import sys
sys.modules[{package!r}] = None
import torch
import bridge
from mb_torch import MissingPackage, ModelBatch
try:
    {code}
except MissingPackage as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "code", "what"),
    [
        ("jax", "bridge.translate(torch.sin, torch.ones(2))", "bridge.translate"),
        ("flax", "from bridge import TorchModule", "bridge.TorchModule"),
        ("jax", "ModelBatch([torch.nn.Linear(2, 2)], backend='jax')", "backend='jax'"),
        ("flax", "ModelBatch([torch.nn.Linear(2, 2)], backend='jax').to_flax()", "bridge.TorchModule"),
    ],
)
def test_the_package_and_the_command_are_named(package: str, code: str, what: str) -> None:
    said = run_python(ASKING.format(package=package, code=code)).stdout
    assert said == f"{what} needs the package {package}. Run: pip install 'modelbatch-hybrid[jax]'\n"
