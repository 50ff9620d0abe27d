"""`python -m moeweave.launch.compare ep|ep1|models`: `models` measures whole models method by method, the others the
quickstart model round by round.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the comparison that the first argument names; returns the exit code."""
    if sys.argv[1:2] == ["models"]:
        from moeweave.launch.compare import models

        return models.main(sys.argv[2:])
    from moeweave.launch.compare import quickstart

    return quickstart.main(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
