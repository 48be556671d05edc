"""A bench of an earlier checkout and of this one by turns, and each of its figures before and after.

    python bench/before_after.py OLD_CHECKOUT bench/inference.py --widths 5 --ranks 1
    python bench/before_after.py --turns 5 OLD_CHECKOUT bench/metrics.py --taufactor 0

Each checkout runs its own bench with its own package, with the same Python. A figure is the median over the turns; the
least and the greatest show how much it varies. Numbers that are the same in every run, such as settings, are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*\.?\d*(?:e[+-]?\d+)?(?![\w])")


def output(checkout: Path, command: list[str]) -> list[str]:
    """Lines that a bench prints when a checkout's package runs it."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    run = [sys.executable, *command]
    done = subprocess.run(run, cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(command)} ended with exit status {done.returncode}")
    print(f"--- {checkout.name}\n{done.stdout}", file=sys.stderr, flush=True)
    return done.stdout.splitlines()


def figures(lines: list[str]) -> dict[tuple[int, str, int], float]:
    """Number of each line that has some, by the line's place, its words and the number's place."""
    found = {}
    for at, line in enumerate(line for line in lines if NUMBER.search(line)):
        words = " ".join(NUMBER.sub("#", line).replace("|", " ").split())
        for place, number in enumerate(NUMBER.findall(line)):
            found[at, words, place] = float(number.replace(",", ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="checkout of the earlier commit")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("bench", nargs=argparse.REMAINDER, help="the bench, and its arguments")
    arguments = parser.parse_args()
    ours = Path(__file__).resolve().parent.parent
    before, after = list[dict[tuple[int, str, int], float]](), list[dict[tuple[int, str, int], float]]()
    for turn in range(arguments.turns):
        pair = [(before, arguments.old.resolve()), (after, ours)]
        for runs, checkout in pair if turn % 2 == 0 else reversed(pair):
            runs.append(figures(output(checkout, arguments.bench)))
    print("| line, # is a number | number | before | after | after / before |\n|---|---|---|---|---|")
    for key in before[0]:
        if any(key not in run for run in [*before, *after]):
            continue
        old, new = [run[key] for run in before], [run[key] for run in after]
        if len({*old, *new}) == 1:
            continue
        ratio = f"{median(new) / median(old):.3f}" if median(old) else ""
        shown = [f"{median(x):.4g} ({min(x):.4g} to {max(x):.4g})" for x in (old, new)]
        print(f"| {key[1]} | {key[2] + 1} | {' | '.join(shown)} | {ratio} |")


if __name__ == "__main__":
    main()
