"""Entry point of the command `modelbatch`.

Imports the standard library only, so that a missing dependency gives one line instead of a traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

# Import name of each package that all but `modelbatch doctor` needs beside what mb_torch needs, and what pip calls it.
REQUIRED = {"typer": "typer", "rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def main() -> None:
    """Run the command line, or say what to install."""
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing and sys.argv[1:] == ["doctor"]:
        sys.exit(not importlib.import_module("cli.doctor").doctor())
    if missing:
        sys.exit(f"Error: the command modelbatch needs {', '.join(missing)}: pip install 'modelbatch-hybrid[demo]'")
    importlib.import_module("cli.app").app(prog_name="modelbatch")


if __name__ == "__main__":
    main()
