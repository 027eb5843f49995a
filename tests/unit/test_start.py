"""How the XLA backend starts, each case in a process of its own: what is tested happens once in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mb_jax import start
from mb_torch import InvalidInput, ModelBatch
from tests.sharded.workload import build

_ROOT = Path(__file__).parents[2]
_BATCH = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
import torch
from torch import nn
from mb_torch import ModelBatch
"""


def run(script: str, **variables: str) -> str:
    """What a script prints, in the environment of someone who has set nothing."""
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "MODELBATCH_JAX_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu", **variables}
    done = subprocess.run(
        [sys.executable, "-c", _BATCH + script], cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("missing", ["jax", "optax"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(missing: str) -> None:
    printed = run(f"""
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from mb_torch import Unsupported
try:
    ModelBatch([nn.Linear(1, 1)], backend="jax")
except Unsupported as error:
    print(isinstance(error, ImportError), error)
else:
    print("made")
print(ModelBatch([nn.Linear(1, 1)])(torch.ones(1, 1)).shape)
""")
    assert f"True backend='jax' needs the package {missing}. Run: pip install 'modelbatch-hybrid[jax]'" in printed
    assert "torch.Size([1, 1, 1])" in printed


_DEVICES = """
import jax
ModelBatch([nn.Linear(1, 1)], backend="jax")
print("devices:", jax.device_count())
"""


def test_a_cpu_has_a_device_for_each_core() -> None:
    assert f"devices: {min(start.usable_cores(), 8)}" in run(_DEVICES)


@pytest.mark.parametrize(
    ("before", "variables", "count"),
    [
        ("", {"JAX_NUM_CPU_DEVICES": "3"}, 3),
        ("", {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
        ("import jax; jax.devices()", {}, 1),
        ("import jax; jax.config.update('jax_num_cpu_devices', 3)", {}, 3),
    ],
    ids=["variable", "flag", "used before", "configured before"],
)
def test_the_number_of_host_devices_can_be_chosen(before: str, variables: dict[str, str], count: int) -> None:
    assert f"devices: {count}" in run(before + _DEVICES, **variables)


def test_the_start_says_little_and_says_it_once() -> None:
    printed = run("""
import mb_jax.engine
from jax._src import xla_bridge
print("started", xla_bridge.backends_are_initialized(), os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"])
for _ in range(2):
    ModelBatch([nn.Linear(1, 1)], backend="jax")
""")
    assert "started False false" in printed
    assert printed.count("INFO modelbatch.jax XLA runs on the CPU") == 1
    assert "not the versions" not in printed or start.untested_versions()


def test_the_environment_has_the_last_word_on_memory() -> None:
    script = "import mb_jax.engine; print('memory', os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'])"
    assert "memory true" in run(script, XLA_PYTHON_CLIENT_PREALLOCATE="true")


@pytest.mark.long
@pytest.mark.parametrize("way", ["option", "variable"])
def test_compiled_programs_are_kept(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "programs"
    option = f"{{'cache_dir': {str(folder)!r}}}" if way == "option" else "None"
    printed = run(
        f"""
import jax
jax.jit(lambda x: x * 3)(1.0)  # before there is a folder
mb = ModelBatch([nn.Linear(1, 1) for _ in range(2)], backend="jax", backend_options={option})
mb(torch.ones(1, 1))
ModelBatch([nn.Linear(1, 1)], backend="jax", backend_options={{"cache_dir": {str(folder)!r}}})
try:
    ModelBatch([nn.Linear(1, 1)], backend="jax", backend_options={{"cache_dir": "elsewhere"}})
except ValueError as error:
    print("refused", error)
""",
        **({"MODELBATCH_JAX_CACHE": str(folder)} if way == "variable" else {}),
    )
    assert any(file.name.endswith("-cache") for file in folder.iterdir())
    assert "refused cache_dir: received" in printed
    assert f"expected {folder}, which this process uses already" in printed
    assert not (_ROOT / "elsewhere").exists()


def test_a_bad_folder_is_refused() -> None:
    with pytest.raises(InvalidInput, match="cache_dir"):
        build(1, cache_dir=3)


def test_versions_that_were_not_tested_are_listed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    versions = {**start.TESTED, "torch": f"{start.TESTED['torch']}+cu130"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    assert start.untested_versions() == {}
    versions["optax"] = "99.1"
    assert start.installed_versions() == versions
    assert start.untested_versions() == {"optax": "99.1"}
    with caplog.at_level("INFO", "modelbatch.jax"):
        start.prepare.__wrapped__()
    assert caplog.messages == [f"not the versions this was tested with: optax 99.1 (tested: {start.TESTED['optax']})"]
    mb: ModelBatch = build(1)
    assert mb.backend_report()["untested_versions"] == {"optax": "99.1"}
