"""`python -m laws.random_programs --seeds 600`: a table of outcomes; `--seed 7`: one program."""

from __future__ import annotations

import argparse
import sys

from laws.random_programs.compare import outcome, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m laws.random_programs")
    parser.add_argument("--seeds", type=int, default=600, help="how many programs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, nargs="*", help="these programs alone, in full")
    options = parser.parse_args()
    if options.seed is not None:
        for seed in options.seed:
            found = outcome(seed)
            sys.stdout.write(f"{found}\n{found.case.program}\n{sorted(found.case.features)}\n")
        return
    seeds = range(options.first, options.first + options.seeds)
    sys.stdout.write(table(map(outcome, seeds)) + "\n")


if __name__ == "__main__":
    main()
