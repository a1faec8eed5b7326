"""`python -m benchmarks.power_law --lines 200000 > clicks.csv`: who clicked on what, made up, for the recipe `Clicks`.

Users and items are as frequent as words are (Zipf): few have most of the clicks. A user has one of some tastes, and
clicks on items to that taste but for one time in five.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

NUM_TASTES = 50
EXPONENT = 1.2
AT_RANDOM = 0.2
MOST = 1 << 22
"""Users and, of each taste, items."""


def lines(count: int, *, seed: int = 0) -> list[bytes]:
    """`user,item`."""
    chance = np.random.default_rng(seed)
    users = chance.zipf(EXPONENT, count) % MOST
    items = chance.zipf(EXPONENT, count) % MOST
    tastes = np.where(chance.random(count) < AT_RANDOM, chance.integers(NUM_TASTES, size=count), users % NUM_TASTES)
    return [b"u%d,i%d.%d" % line for line in zip(users.tolist(), tastes.tolist(), items.tolist(), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.stdout.buffer.writelines(line + b"\n" for line in lines(arguments.lines, seed=arguments.seed))


if __name__ == "__main__":
    main()
