"""`python -m bench.day`: the figures of a day in the life, simulated (tests/support/day.py says how)."""

from __future__ import annotations

from tests.support.day import main

if __name__ == "__main__":
    main()
