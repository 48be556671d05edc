"""How far a few cubes are from the whole volume they are cut from, drawn at random or chosen as typical.

    python bench/cubes.py configs/case3-sofc-small.yaml --output FOLDER    a finished run: labels.zarr and its low-res

Generators are judged, and batch-norm statistics taken, on a few cubes (training/data/cubes.LowResCubes.typical). Which,
is decided by the low-res volume alone; here the same cubes are cut from the painted volume, 40 draws of each kind, and
root mean squares of what they are off the whole volume are shown: fractions absolute, areas, of an anisotropic material
by direction, and TPB relative."""

from __future__ import annotations

import argparse
from functools import reduce
from pathlib import Path

import numpy as np

from hpcres.counting.counts import count
from hpcres.counting.totals import Counts, add, finalize
from hpcres.geometry import AXES, Box, triple
from hpcres.study.file import load_study
from hpcres.training.data.cubes import LowResCubes
from hpcres.volumes.formats import open_volume


def fractions_and_areas(found: Counts, names: list[str], isotropic: bool) -> tuple[np.ndarray, dict[str, float]]:
    """Phase fractions; shares of faces between two phases, each direction's of an anisotropic material, and TPB."""
    said = finalize(found, (1, 1, 1), range(len(names)))
    areas = {}
    for (a, b), area in said.interphase_area.items():
        if isotropic:
            areas[f"{names[a]} – {names[b]}"] = area
        else:
            for axis, faces, every in zip(AXES, found.faces[a, b], found.all_faces, strict=True):
                areas[f"{names[a]} – {names[b]} across {axis}"] = faces / every
    if len(names) > 2:
        areas["TPB"] = said.tpb_normalised
    return np.array(list(said.volume_fraction.values())), areas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--output", type=Path, help="of the run; the study's by default")
    parser.add_argument("--draws", type=int, default=40)
    options = parser.parse_args()
    study = load_study(options.study, output=None if options.output is None else str(options.output))
    volume, names, isotropic = open_volume(study.labels_path), list(study.phases), study.high_res.isotropic
    whole, whole_areas = fractions_and_areas(count(volume.read(Box.whole(volume.shape))), names, isotropic)
    low_res, edge = LowResCubes(study), study.training.cube_voxels

    def off(cubes: list[int], kind: int) -> list[float]:
        """Differences of fractions, and relative ones of areas."""
        parts = []
        for cube in cubes:
            corner = [round(at * study.scale_factor) for at in low_res.start(0, kind, cube)[1].tolist()]
            parts.append(count(volume.read(Box(triple(corner), triple([at + edge for at in corner])))))
        fractions, areas = fractions_and_areas(reduce(add, parts), names, isotropic)
        return [*(fractions - whole), *(areas[key] / whole_areas[key] - 1 for key in whole_areas)]

    print("| cubes | chosen | fractions, worst | " + " | ".join(whole_areas) + " |")
    print("|" + "---|" * (3 + len(whole_areas)))
    for cubes in (8, 16, 32, 64):
        for how in ("at random", "typical"):
            found = np.array(
                [
                    off(list(range(cubes)) if how == "at random" else low_res.typical(cubes, kind), kind)
                    for kind in range(1000, 1000 + options.draws)
                ]
            )
            root = np.sqrt(np.square(found).mean(axis=0))
            worst, areas = root[: len(names)].max(), root[len(names) :]
            print(f"| {cubes} | {how} | {worst:.4f} | " + " | ".join(f"{x:.1%}" for x in areas) + " |")


if __name__ == "__main__":
    main()
