"""`python -m tests.opinfo` runs every entry and writes the results; with names of entries, it only prints theirs."""

from __future__ import annotations

import sys

from tests.opinfo.every_entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
