"""Compare the result of `make demo` with the ground truth: each figure with its bar; exit 1 if one is missed.

python bench/demo.py configs/demo.yaml
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from quality import Figure, above, below, of_volume, tpb_error, worst_area, worst_fraction

from hpcres.study.file import load_study

FIGURES = (
    Figure("phase fractions, worst difference from the truth", worst_fraction("reference"), below(0.02)),
    Figure("interphase areas, worst against the truth", worst_area("reference"), below(0.2), ".1%"),
    Figure("normalised TPB, difference from the truth", tpb_error, below(0.2), ".1%"),
    Figure("low-res agreement", of_volume("low_res", "agreement"), above(0.98), ".2%"),
)


def main() -> None:
    result = json.loads(load_study(Path(sys.argv[1])).metrics_path.read_text(encoding="utf-8"))
    missed = 0
    for figure in FIGURES:
        value = figure.of(result)
        assert value is not None, figure.name
        missed += not figure.met(value)
        verdict = "met" if figure.met(value) else "MISSED"
        print(f"{figure.name:<50} {value:>8{figure.form}}  bar {figure.bar_text:<10} {verdict}")
    if missed:
        sys.exit("a bar is missed: see above whether training ended before step 360, and whether other work slowed it")


if __name__ == "__main__":
    main()
