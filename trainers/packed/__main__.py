"""`python -m trainers.packed FOLDER` runs the pack that the folder describes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainers.packed.run import run_pack
from trainers.utils.logging import setup_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a pack; return 0 if it came to its end or was interrupted by a signal, whatever became of the experiments."""
    parser = argparse.ArgumentParser(prog="python -m trainers.packed", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the pack, which holds pack.json")
    parser.add_argument("--packs-at-once", type=int, default=1, help="how many packs share this machine's memory")
    options = parser.parse_args(arguments)
    setup_logging(logging.INFO)
    folder = options.folder.absolute()
    # Only now: our packages are imported, and the project's modules come before all others.
    sys.path.insert(0, os.getcwd())
    run_pack(folder, options.packs_at_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())
