"""`python -m benchmarks` runs every benchmark there is."""

from __future__ import annotations

import sys

from benchmarks.mlp_step import main

if __name__ == "__main__":
    sys.exit(main())
