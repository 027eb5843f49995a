"""One of several processes that train a batch together: ``python -m tests.sharded.process RANK SIZE ADDRESS FILE``."""

from __future__ import annotations

import os
import sys

import torch

from mb_torch.backend import init_distributed
from tests.sharded.workload import build, train


def main() -> None:
    address, file = sys.argv[1:]
    # Rank and size come from Slurm's environment.
    init_distributed("jax", address=address)
    mb = build(4, devices="all")
    trained = train(mb)
    devices = {"devices": mb.backend_report()["devices"], "devices by default": build(4).backend_report()["devices"]}
    torch.save({**trained._asdict(), **devices}, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    assert os.environ["SLURM_NTASKS"] == "2"
