"""Entry point of the command `modelbatch`.

Imports the standard library only, so that a missing dependency gives one line instead of a traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

# Import name of each package that the command needs beside those that mb_torch needs, and what pip calls it.
REQUIRED = {"typer": "typer", "rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def main() -> None:
    """Run the command line, or say what to install."""
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"Error: the command modelbatch needs {', '.join(missing)}: pip install 'modelbatch-hybrid[demo]'")
    # Read once, when torch is imported. Where other programs want the processor too, threads that spin while they
    # wait for each other make the training of small models ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    importlib.import_module("cli.app").app(prog_name="modelbatch")


if __name__ == "__main__":
    main()
