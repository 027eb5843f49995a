"""Batches over several devices and several processes, each in processes of their own: JAX counts its devices once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mb_torch import InvalidInput, Unsupported
from mb_torch.backend import init_distributed
from tests.compare import assert_close
from tests.sharded.workload import build, train

_ROOT = Path(__file__).parents[2]
# Compiling is most of the time, and the programs are small.
_XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"


def _environment(**variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**own, "XLA_FLAGS": _XLA_FLAGS, "PYTHONPATH": f"{_ROOT}{os.pathsep}{_ROOT / 'compat'}", **variables}


@pytest.mark.long
def test_eight_devices() -> None:
    flags = f"{_XLA_FLAGS} --xla_force_host_platform_device_count=8"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "tests/sharded/cases.py",
    ]
    command += ["-o", "addopts=--import-mode=importlib", "--show-capture=no"]
    done = subprocess.run(
        command, cwd=_ROOT, env=_environment(XLA_FLAGS=flags), capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@pytest.mark.long
def test_two_processes(tmp_path: Path) -> None:
    address = f"localhost:{_free_port()}"
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sharded.process", address, str(file)],
            cwd=_ROOT,
            env=_environment(SLURM_PROCID=str(rank), SLURM_NTASKS="2", JAX_NUM_CPU_DEVICES="2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, file in enumerate(files)
    ]
    try:
        texts = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        # One that waits for the other would wait for ever.
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)[-4000:]
    expected = {**train(build(4))._asdict(), "devices": 4, "devices by default": 2}
    for file in files:
        assert_close(torch.load(file, weights_only=True), expected, atol=1e-6, rtol=1e-6)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, str]]:
    """What a connector was called with; nothing is in Slurm's variables."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    calls: list[tuple[int, int, str]] = []
    monkeypatch.setattr("mb_jax.sharding.init_distributed", lambda *given: calls.append(given))
    monkeypatch.setattr("mb_torch.backend._rank", 0)
    return calls


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("one", "one"),
        ("one,two", "one"),
        ("gpu[03-04,7],other", "gpu03"),
        ("gpu[3,5-7]", "gpu3"),
        ("rack[1-2]-node[08-9].net,x", "rack1-node08.net"),
    ],
)
def test_slurm_says_who_takes_part(
    connections: list[Any], monkeypatch: pytest.MonkeyPatch, hosts: str, first: str
) -> None:
    for name, value in {"PROCID": "3", "NTASKS": "8", "JOB_ID": "4097", "JOB_NODELIST": hosts}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    init_distributed("jax")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "own[2-3]")
    init_distributed("jax", rank=1)
    init_distributed("jax", rank=0, size=2, address="here:5")
    assert connections == [(3, 8, f"{first}:61441"), (1, 8, "own2:61441"), (0, 2, "here:5")]


@pytest.mark.parametrize(
    ("missing", "argument"),
    [
        ("SLURM_PROCID", "rank"),
        ("SLURM_NTASKS", "size"),
        ("SLURM_JOB_ID", "address"),
        ("SLURM_JOB_NODELIST", "address"),
    ],
)
def test_what_slurm_does_not_say_is_named(
    connections: list[Any], monkeypatch: pytest.MonkeyPatch, missing: str, argument: str
) -> None:
    for name in ("PROCID", "NTASKS", "JOB_ID", "JOB_NODELIST"):
        monkeypatch.setenv(f"SLURM_{name}", "7" if name == "NTASKS" else "1")
    monkeypatch.delenv(missing)
    with pytest.raises(InvalidInput, match=rf"{argument} is not given.*\${missing}.*srun"):
        init_distributed("jax")
    assert not connections


def test_bad_ranks_and_backends(connections: list[Any]) -> None:
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InvalidInput, match=f"rank {rank} of {size}"):
            init_distributed("jax", rank, size, "here:5")
    with pytest.raises(Unsupported, match=r"backend='torch' runs in one process.*jax"):
        init_distributed("torch", 0, 2, "here:5")
    with pytest.raises(InvalidInput, match="nothing_like_it"):
        init_distributed("nothing_like_it")
    assert not connections


def test_connecting_after_the_first_batch_is_refused() -> None:
    build(2)
    with pytest.raises(Unsupported, match=r"before the first ModelBatch"):
        init_distributed("jax", 0, 2, "localhost:1")
