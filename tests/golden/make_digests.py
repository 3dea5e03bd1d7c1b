# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The kvzip authors
"""Make the golden set of ``kvzip verify`` (kvzip/data/golden.json). Run by hand, once for a new case.

    python tests/golden/make_digests.py

It never changes an entry that exists: one that no longer agrees means that the format or the arithmetic changed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from kvzip import selfcheck

FILE = Path(__file__).parents[2] / "kvzip" / "data" / "golden.json"


def main() -> int:
    """Add what is missing; refuse to change what exists."""
    known = selfcheck.golden() if FILE.exists() else {}
    for case in selfcheck.cases():
        made = selfcheck.store_and_load(case)[0]
        if known.setdefault(case.name, made) != made:
            print(f"{case.name} would change: nothing was written; a new format needs a new version")
            return 1
    FILE.write_text(json.dumps({name: asdict(digests) for name, digests in known.items()}, indent=1) + "\n")
    print(f"{len(known)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
