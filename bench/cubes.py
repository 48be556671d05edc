"""How far a few cubes are from the whole volume they are cut from, drawn at random or chosen as typical.

    python bench/cubes.py configs/case3-sofc-small.yaml --output FOLDER    a finished run: labels.zarr and its low-res

Generators are judged, and batch-norm statistics taken, on a few cubes (training/samples.LowResCubes.typical). Which, is
decided by the low-res volume alone; here the same cubes are cut from the painted volume, 40 draws of each kind, and
root mean squares of what they are off the whole volume are shown: fractions absolute, areas and TPB relative.
"""

from __future__ import annotations

import argparse
from functools import reduce
from pathlib import Path

import numpy as np

from hpcres.geometry import Box, triple
from hpcres.metrics.counts import Counts, add, count, finalize
from hpcres.study import PATCH_VOXELS
from hpcres.study_file import load_study
from hpcres.training.samples import LowResCubes
from hpcres.volumes.formats import open_volume


def figures(found: Counts, phases: int) -> np.ndarray:
    said = finalize(found, (1, 1, 1), range(phases))
    return np.array([*said.volume_fraction.values(), *said.interphase_area.values(), said.tpb_normalised])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path, help="of the run; the study's by default")
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    study = load_study(options.study, output=None if options.output is None else str(options.output))
    volume, names = open_volume(study.labels_path), list(study.phases)
    phases = len(names)
    whole = figures(count(volume.read(Box.whole(volume.shape))), phases)
    low_res = LowResCubes(study)

    def off(cubes: list[int], kind: int) -> np.ndarray:
        parts = []
        for cube in cubes:
            corner = [round(at * study.scale_factor) for at in low_res.start(0, kind, cube)[1].tolist()]
            parts.append(count(volume.read(Box(triple(corner), triple([at + PATCH_VOXELS for at in corner])))))
        return figures(reduce(add, parts), phases) - whole

    print("| cubes | chosen | fractions, worst | " + " | ".join(
        [f"{a} – {b}" for k, a in enumerate(names) for b in names[k + 1 :]]
    ) + " | TPB |")  # fmt: skip
    print("|" + "---|" * (4 + phases * (phases - 1) // 2))
    for cubes in (8, 16, 32):
        for how in ("at random", "typical"):
            found = np.array([
                off(list(range(cubes)) if how == "at random" else low_res.typical(cubes, kind), kind)
                for kind in range(1000, 1000 + options.draws)
            ])  # fmt: skip
            root = np.sqrt(np.square(found).mean(axis=0))
            relative = root[phases:] / whole[phases:]
            print(f"| {cubes} | {how} | {root[:phases].max():.4f} | " + " | ".join(f"{x:.1%}" for x in relative) + " |")


if __name__ == "__main__":
    main()
