"""How good the shipped recipes are: trained, painted and measured by the commands a user has, beside what is known.

    python bench/quality.py sofc --minutes 3 --seeds 0 1 2       real fuel-cell anode, case 3 (15 minutes)
    python bench/quality.py phantom --scale 2 4 8 --minutes 10   a phantom of 256³, beside the true volume
    python bench/quality.py separator --minutes 10               real separator, case 2, plane by plane
    python bench/quality.py atypical --minutes 10                the phantom, with slices of another porosity
    python bench/quality.py electrode --minutes 10               real electrode of 256³, beside the true volume

sofc, separator and electrode need HPCRES_DATA, or --data FOLDER. --keep FOLDER keeps everything and goes on where an
earlier call stopped. --steps N trains N steps whatever the clock says, which is what to compare recipes with where
other work runs; --recipe configs/long.yaml puts that recipe on top of the study, --recipe auto lets training choose
one, --set SECTION.KEY=VALUE changes it.
Nothing is chosen by the truth: training keeps the generator with the best score by the images and the low-res volume
(training/evaluation.py). --picture FILE.png shows slices of the first seed; of the electrode also, in
FILE-distributions.png, the numbers of 256 cubes of 64³ as in figure 2 of Dahari 2022.

One Markdown table: each figure, its bar, whether every seed meets it, each seed, mean ± standard deviation of several.
Beside it nearest and trilinear upsampling, and what a quarter of every image is from the whole (mean of the four; for
figures that are differences from the images). For a phantom: how far the first seed's slices are from its truth, which
is what can be known of it, and how far the second seed's truth is from the first's. There is a table for each scale
factor, of atypical slices for each porosity too, and of the electrode one for the whole and one for the half that no
slice was cut from.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import electrode
import numpy as np
import yaml
from scipy import ndimage

from hpcres.geometry import Box
from hpcres.lengths import cubic
from hpcres.old_names import with_new_result_names
from hpcres.study import Study
from hpcres.study.file import load_study
from hpcres.volumes.convert import convert
from hpcres.volumes.formats import open_volume, read_images
from hpcres.volumes.phases import PHASE_COLOURS, PhaseMap
from hpcres.volumes.stores import LabelStore
from hpcres.volumes.volume import array_volume

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SEEDS_PAINTED = 2
STEADY = 0.03
"""Other noise may change no fraction, area or TPB by more than this share of it."""
SPECK_PIXELS, SPECK_VOXELS = 4, 8
"""A cluster of fewer is a speck, in two dimensions and in three."""
SPECK_PLANES = 32
"""Slices of a volume in which specks are counted, evenly spaced along each axis."""
SPECKS_MORE = 5.0
"""Specks of a million pixels that are allowed beyond twice those of the images."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A row of the table: how to get it from what was measured (None where it is not known), and its bar."""

    name: str
    of: Callable[[Result], float | None]
    bar: tuple[float, float] | None = None
    """Least and most that is met."""
    form: str = ".4f"

    def met(self, value: float) -> bool:
        return self.bar is None or self.bar[0] <= value <= self.bar[1]

    @property
    def bar_text(self) -> str:
        if self.bar is None:
            return ""
        least, most = self.bar
        if least == -np.inf:
            return f"≤ {most:{self.form}}"
        return f"≥ {least:{self.form}}" if most == np.inf else f"{least:{self.form}} … {most:{self.form}}"


def below(most: float) -> tuple[float, float]:
    return -np.inf, most


def above(least: float) -> tuple[float, float]:
    return least, np.inf


# ---- what is read of metrics.json, transport.json and the store ---------------------------------------------


def at(tree: Any, *path: str) -> Any:
    for step in path:
        tree = (tree or {}).get(step)
    return tree


def worst_fraction(against: str) -> Callable[[Result], float | None]:
    def of(result: Result) -> float | None:
        ours, theirs = result["volume"]["volume_fraction"], result[against]["volume_fraction"]
        return max(abs(ours[phase] - theirs[phase]) for phase in theirs)

    return of


def worst_area(against: str) -> Callable[[Result], float | None]:
    def of(result: Result) -> float | None:
        ours, theirs = result["volume"]["interphase_area"], result[against]["interphase_area"]
        return max(abs(ours[pair] / wanted - 1) for pair, wanted in theirs.items() if wanted > 1e-3)

    return of


def seen(key: str, plane: str = "all") -> Callable[[Result], float | None]:
    """An error of slices of the volume against the images, or of a quarter of these."""

    def of(result: Result) -> float | None:
        if values := at(result, "quarters", plane, key):
            return statistics.mean(values)
        return at(result, "volume", "appearance", "planes", plane, "errors", key)

    return of


def of_volume(*path: str) -> Callable[[Result], float | None]:
    return lambda result: at(result, *path)


def relative_fraction(plane: str) -> Callable[[Result], float | None]:
    def of(result: Result) -> float | None:
        ours = at(result, "volume", "volume_fraction")
        theirs = at(result, "images", "planes", plane, "volume_fraction")
        return max(abs(ours[phase] / theirs[phase] - 1) for phase in theirs) if ours else None

    return of


def plane_area(plane: str) -> Callable[[Result], float | None]:
    """Interphase area that a plane shows, down and across together: the pair of phases that is worst."""

    def of(result: Result) -> float | None:
        ours = at(result, "volume", "appearance", "planes", plane, "interphase_area")
        theirs = at(result, "images", "planes", plane, "interphase_area")
        return max(abs(sum(ours[pair]) / sum(theirs[pair]) - 1) for pair in theirs) if ours else None

    return of


def directions_apart(result: Result) -> float | None:
    """How much interphase areas of the volume differ between z, y and x: the pair of phases that is worst."""
    counted = at(result, "volume", "counts")
    if counted is None:
        return None
    shares = np.array(list(counted["faces"].values())) / counted["all_faces"]
    return float((np.ptp(shares, axis=1) / shares.mean(axis=1)).max())


def tpb_error(result: Result) -> float | None:
    return abs(result["volume"]["tpb"]["normalised"] / result["reference"]["tpb"]["normalised"] - 1)


def d_rel_ratios(result: Result, phase: str) -> list[float]:
    """D_rel of the volume as parts of the truth's, in every direction in which the truth percolates."""
    ours, truth = (
        {
            one["direction"]: one["D_rel"]
            for one in at(result, "transport", volume, "results") or ()
            if one["phase"] == phase
        }
        for volume in ("volume", "reference")
    )
    if at(result, "transport", "volume") is None:
        return []
    return [(ours.get(direction) or 0.0) / true for direction, true in truth.items() if true]


def d_rel_error(phase: str) -> Callable[[Result], float | None]:
    """The direction that is furthest off."""
    return lambda result: max((abs(ratio - 1) for ratio in d_rel_ratios(result, phase)), default=None)


def d_rel_bias(phase: str) -> Callable[[Result], float | None]:
    """All directions together: how a material that is alike in all of them conducts beside its truth."""

    def of(result: Result) -> float | None:
        ratios = d_rel_ratios(result, phase)
        return statistics.mean(ratios) - 1 if ratios else None

    return of


def gratings(labels: np.ndarray) -> float:
    """Checkerboard artefacts: runs of five voxels along an axis, each unlike the last and like the one before, as a
    share of all runs of five, on the worst axis. To faces and 2 × 2 patterns these are interfaces like others."""
    shares = []
    for axis in range(3):
        line = np.moveaxis(labels, axis, 0)
        back = (line[:-2] != line[1:-1]) & (line[:-2] == line[2:])
        shares.append((back[:-2] & back[1:-1] & back[2:]).mean())
    return float(max(shares))


def small_clusters(labels: np.ndarray, phases: int, fewer_than: int) -> np.ndarray:
    """For each phase the number of clusters, joined by faces (of pixels by sides), of fewer voxels than this. Those at
    the border are left out: they may be larger than they seem, and a small image has more of them."""
    found = np.zeros(phases, np.int64)
    for phase in range(phases):
        number, count = ndimage.label(labels == phase)
        size = np.bincount(number.ravel(), minlength=count + 1)
        size[0] = fewer_than
        for axis, n in enumerate(labels.shape):
            size[np.take(number, [0, n - 1], axis)] = fewer_than
        found[phase] = np.count_nonzero(size < fewer_than)
    return found


def specks_of(planes: Iterable[np.ndarray], phases: int) -> np.ndarray:
    """Specks of each phase in a million pixels of 2D label images."""
    found, pixels = np.zeros(phases, np.int64), 0
    for plane in planes:
        found += small_clusters(plane, phases, SPECK_PIXELS)
        pixels += plane.size
    return found / pixels * 1e6


def planes_of(labels: np.ndarray) -> Iterable[np.ndarray]:
    for axis, n in enumerate(labels.shape):
        for place in np.unique(np.linspace(0, n - 1, SPECK_PLANES).round().astype(int)):
            yield labels.take(place, axis)


def specks(study: Study) -> Result:
    """`specks` in two dimensions and `specks_3d` of the volume, the truth and the images, of a million, by phase."""
    phases, index = len(study.phases), PhaseMap(tuple(study.high_res.phases), "").index
    images = (plane for image in study.high_res.images for plane in index(read_images(image.path)))
    flat, solid = {"images": specks_of(images, phases)}, {}
    for which, path in (("volume", study.labels_path), ("reference", study.reference.volume)):
        labels = whole(path)
        flat[which] = specks_of(planes_of(labels), phases)
        solid[which] = small_clusters(labels, phases, SPECK_VOXELS) / labels.size * 1e6

    def named(found: dict[str, np.ndarray]) -> Result:
        return {which: dict(zip(study.phases, each.tolist(), strict=True)) for which, each in found.items()}

    return {"specks": named(flat), "specks_3d": named(solid)}


def ours_only(key: str) -> Callable[[Result], float | None]:
    return lambda result: result.get(key)


def against_truth(phases: Sequence[str]) -> list[Figure]:
    return [
        Figure("phase fractions, worst difference", worst_fraction("reference"), below(0.01)),
        Figure("interphase areas, worst", worst_area("reference"), below(0.05), ".1%"),
        Figure("normalised TPB, difference", tpb_error, below(0.05), ".1%"),
        *(Figure(f"D_rel of {name}, worst direction", d_rel_error(name), below(0.10), ".1%") for name in phases),
        *(Figure(f"D_rel of {name}, mean of directions", d_rel_bias(name), form=".1%") for name in phases),
        Figure("interphase areas, directions apart", directions_apart, form=".1%"),
    ]


def visible_difference(result: Result) -> float | None:
    """Shares of the groups that the low-res volume tells apart, against that volume: the group that is worst."""
    ours, theirs = at(result, "low_res", "visible_fraction"), at(result, "low_res", "volume_fraction")
    return None if ours is None else max(abs(ours[group] - theirs[group]) for group in theirs)


def hidden_share(of: Result, group: Sequence[str]) -> float:
    """Share of a group's volume that is not its first phase, which is the one that hides the others."""
    fractions = of["volume_fraction"]
    return sum(fractions[name] for name in group[1:]) / sum(fractions[name] for name in group)


def hidden_difference(group: Sequence[str]) -> Callable[[Result], float | None]:
    return lambda result: abs(hidden_share(result["volume"], group) - hidden_share(result["images"], group))


def area_within(pair: tuple[str, str], group: Sequence[str]) -> Callable[[Result], float | None]:
    """Interphase area of two phases of a group per volume of the group, against the slices."""

    def area(of: Result) -> float:
        return of["interphase_area"]["|".join(pair)] / sum(of["volume_fraction"][name] for name in group)

    return lambda result: abs(area(result["volume"]) / area(result["images"]) - 1)


def speck_share(phase: str) -> Callable[[Result], float | None]:
    """Specks as a share of what is allowed."""

    def of(result: Result) -> float | None:
        ours, theirs = (at(result, "specks", which, phase) for which in ("volume", "images"))
        return None if ours is None else ours / (2 * theirs + SPECKS_MORE)

    return of


SPECKS_TEXT = f"""\
Specks are clusters of a phase of fewer than {SPECK_PIXELS} pixels (joined by sides, none at the border), in the images
and in {SPECK_PLANES} slices of the volume along each axis. Allowed of a million pixels are twice as many as in the
images and {SPECKS_MORE:g} more, since images without any would allow none. In 3D they are clusters of fewer than
{SPECK_VOXELS} voxels. Areas inside merged phases are faces per volume of these phases, against the slices. Figures
against the truth have no bar, since the slices mislead."""


def figures_of_atypical(study: Study, minutes: float, scale: str) -> list[Figure]:
    phases = study.phases
    by_group: list[Figure] = []
    for group in study.low_res.groups:
        merged, apart = " + ".join(group), of_volume("low_res", "outside", " + ".join(group))
        if len(group) == 1:
            by_group.append(Figure(f"{merged} in low-res voxels of other phases", apart, below(0.05)))
            continue
        share = f"share of {', '.join(group[1:])} in {merged}"
        by_group += [
            Figure(f"{share}, difference from the slices", hidden_difference(group), below(0.02)),
            Figure(share, lambda result, group=group: hidden_share(result["volume"], group)),
            *(
                Figure(
                    f"area {a} – {b} inside {merged}, against the slices",
                    area_within((a, b), group),
                    below(0.10),
                    ".1%",
                )
                for a, b in combinations(sorted(group, key=phases.index), 2)
            ),
        ]
    known = figures_of("phantom", minutes, scale, phases)
    unbarred = {figure.name for figure in against_truth(phases)}
    return [
        Figure("low-res agreement", of_volume("low_res", "agreement"), above(0.98), ".2%"),
        Figure("box agreement", of_volume("low_res", "box_agreement"), above(0.98), ".2%"),
        Figure("visible fractions, worst difference from the low-res volume", visible_difference, below(0.02)),
        *by_group,
        *(
            Figure(f"specks of {name} in 2D, of what is allowed", speck_share(name), below(1.0), ".2f")
            for name in phases
        ),
        *(
            Figure(f"specks of {name} in 2D, of a million pixels", of_volume("specks", "volume", name), form=".1f")
            for name in phases
        ),
        *(
            Figure(f"specks of {name} in 3D, of a million voxels", of_volume("specks_3d", "volume", name), form=".1f")
            for name in phases
        ),
        *(
            replace(figure, bar=None) if figure.name in unbarred else figure
            for figure in known
            if figure.name != "low-res agreement"
        ),
    ]


def figures_of(case: str, minutes: float, scale: str, phases: Sequence[str]) -> list[Figure]:
    common = [
        Figure("steps trained", ours_only("steps"), form=".0f"),
        Figure("minutes trained", ours_only("minutes"), form=".1f"),
        Figure("best score, of step", ours_only("best_step"), form=".0f"),
    ]
    agreement, artefact = of_volume("low_res", "agreement"), of_volume("low_res", "grid_artefact")
    long = case == "sofc" and minutes >= 30
    noise = [
        Figure("gratings, of a million voxels", ours_only("gratings"), form=".0f"),
        Figure("voxels changed by other noise", ours_only("changed"), above(0.05) if long else None, ".2%"),
        Figure("largest change of a metric by it", ours_only("unsteady"), below(STEADY), ".2%"),
    ]
    if case == "sofc":
        low, high = (0.0090, 0.0115) if long else (0.0080, 0.0115)
        return [
            Figure(
                "phase fractions, worst difference from the slice",
                seen("fraction_error"),
                below(0.01 if long else 0.02),
            ),
            *(Figure(f"phase fraction {name}", of_volume("volume", "volume_fraction", name)) for name in phases),
            Figure(
                "interphase areas, worst against the slice", seen("area_error"), below(0.07 if long else 0.15), ".1%"
            ),
            *(
                Figure(f"interphase area {a} – {b}", of_volume("volume", "interphase_area", f"{a}|{b}"))
                for k, a in enumerate(phases)
                for b in phases[k + 1 :]
            ),
            Figure("interphase areas, directions apart", directions_apart, form=".1%"),
            Figure("normalised TPB", of_volume("volume", "tpb", "normalised"), (low, high), ".5f"),
            Figure("low-res agreement", agreement, None if long else above(0.995), ".2%"),
            Figure("tv1", seen("tv1"), below(0.03 if long else 0.04)),
            Figure("tv4", seen("tv4"), below(0.06 if long else 0.08)),
            Figure("grid artefact", artefact, below(0.10) if long else None, ".1%"),
            *noise,
            *common,
        ]
    if case in ("phantom", "electrode"):
        barred = case == "electrode" or scale == "4"
        return [
            *against_truth(phases),
            Figure("low-res agreement", agreement, above(0.98) if barred else None, ".2%"),
            Figure("tv1 against the slices", seen("tv1")),
            Figure("tv4 against the slices", seen("tv4")),
            Figure("grid artefact", artefact, form=".1%"),
            *noise,
            *common,
        ]
    by_plane = []
    for plane in ("yx", "zx", "zy"):
        by_plane += [
            Figure(f"{plane}: phase fractions, worst, of the fraction", relative_fraction(plane), below(0.05), ".1%"),
            Figure(f"{plane}: interphase areas", plane_area(plane), below(0.05), ".1%"),
            Figure(f"{plane}: … by the worse direction", seen("area_error", plane), below(0.05), ".1%"),
            Figure(f"{plane}: correlations", seen("correlation_error", plane)),
            Figure(f"{plane}: tv1", seen("tv1", plane)),
            Figure(f"{plane}: tv4", seen("tv4", plane)),
        ]
    return [
        *by_plane,
        Figure("low-res agreement (lamellae kept)", agreement, form=".2%"),
        Figure("grid artefact", artefact, form=".1%"),
        *noise,
        *common,
    ]


# ---- the commands -------------------------------------------------------------------------------------------


def whole(path: str | Path) -> np.ndarray:
    volume = open_volume(path)
    return volume.read(Box.whole(volume.shape))


def plain(settings: Sequence[str]) -> list[str]:
    return [text.removeprefix("--set=") for text in settings]


def hpcres(*arguments: str) -> None:
    print("hpcres " + " ".join(arguments), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "hpcres", *arguments], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{Path(sys.argv[0]).name}: hpcres {arguments[0]} ended with {done.returncode}")


def measured(config: Path, folder: Path, settings: Sequence[str]) -> Result:
    """metrics.json of labels.zarr in `folder`, made where it is not there."""
    target = folder / "metrics.json"
    if not target.exists():
        left_out = ["correlations", "chords", "connectivity", "spectrum", "representative"]
        less = ["--set=metrics.subvolumes.count=0", *(f"--without={name}" for name in left_out)]
        hpcres("metrics", str(config), f"--output={folder}", *settings, *less)
    return with_new_result_names(json.loads(target.read_text()), target)


def run_of(config: Path, folder: Path, settings: Sequence[str]) -> Result:
    """Everything of one seed, as far as it is not there yet."""
    study = load_study(config, plain(settings), str(folder))
    place = f"--output={folder}"
    if study.phantom is not None and not (folder / "phantom").exists():
        hpcres("phantom", str(config), place, *settings)
    hpcres("train", str(config), place, *settings)
    hpcres("infer", str(config), place, *settings, f"--ensemble={SEEDS_PAINTED}")
    result = measured(config, folder, settings)
    if study.phantom is not None:
        if not study.transport_path.exists():
            hpcres("tortuosity", str(config), place, *settings)
        result["transport"] = json.loads(study.transport_path.read_text())
    rows = list(csv.DictReader((folder / "training.csv").open()))
    judged = list(csv.DictReader((folder / "quality.csv").open()))
    result["steps"], result["minutes"] = int(rows[-1]["step"]), float(rows[-1]["seconds"]) / 60
    result["best_step"] = int(min(judged, key=lambda row: float(row["score"]))["step"])
    agreement = open_volume(folder / "labels-agreement.zarr")
    shares = agreement.read(Box.whole(agreement.shape)).mean() / 255
    result["gratings"] = gratings(open_volume(study.labels_path).read(Box.whole(agreement.shape))) * 1e6
    result["changed"] = float(1 - shares) * SEEDS_PAINTED / (SEEDS_PAINTED - 1)
    spread = LabelStore.open(study.labels_path).provenance["spread"]
    several = [*spread["volume_fraction"].values(), *spread["interphase_area"].values(), spread["tpb"]["normalised"]]
    result["unsteady"] = max(
        (max(one["values"]) - min(one["values"])) / one["mean"] for one in several if one["mean"] > 1e-3
    )
    return result


def upsampled(config: Path, folder: Path, how: str, settings: Sequence[str]) -> Result:
    """The metrics of the low-res volume made larger without any learning."""
    study = load_study(config, plain(settings), str(folder))
    if not study.labels_path.exists():
        import torch

        from hpcres.imaging import one_hot
        from hpcres.networks.resampling import upsample

        volume = open_volume(study.low_res.path)
        index = PhaseMap(tuple(study.low_res.phases), study.low_res.path).index(volume.read(Box.whole(volume.shape)))
        if how == "nearest":
            place = [np.arange(int(n * study.scale_factor)) / study.scale_factor for n in index.shape]
            labels = index[np.ix_(*(p.astype(int) for p in place))]
        else:
            maps = one_hot(torch.from_numpy(index)[None], len(study.low_res.groups))
            labels = upsample(maps, study.scale_factor)[0].argmax(0).to(torch.uint8).numpy()
        labels = first_of_groups(study)[labels]
        write_labels(study, study.labels_path, labels, how)
    return measured(config, folder, settings)


def first_of_groups(study: Study) -> np.ndarray:
    """The phase that the low-res volume shows, by its group: of several that it cannot tell apart the first."""
    return np.array([study.phases.index(group[0]) for group in study.low_res.groups], np.uint8)


def write_labels(study: Study, path: Path, labels: np.ndarray, what: str) -> None:
    size = study.high_res.voxel_size
    path.parent.mkdir(parents=True, exist_ok=True)
    convert(array_volume(labels, what), path, phases=dict(enumerate(study.phases)), voxel_size=cubic(size))


def transport_of(volume: Path, target: Path) -> Result:
    """The `volume` entry of a transport.json; what it holds already is not solved again."""
    hpcres("tortuosity", str(volume), f"--output={target}")
    return json.loads(target.read_text())["volume"]


def beside_the_electrode(config: Path, folder: Path, settings: Sequence[str], result: Result) -> tuple[Result, Result]:
    """`result` of labels.zarr in `folder` with its transport, and what is measured in the half without slices."""
    study = load_study(config, plain(settings), str(folder))
    truth, half = Path(str(study.reference.volume)), folder / "half"
    of_half = electrode.half_files(study)
    if not (half / "labels.zarr").exists():
        write_labels(study, half / "labels.zarr", electrode.other_half(whole(study.labels_path)), "half")
    there = [f"--set=low_res.path={of_half['low_res']}", f"--set=reference.volume={of_half['truth']}"]
    both = result, measured(config, half, [*settings, *there])
    for one, place, true in ((both[0], folder, truth), (both[1], half, of_half["truth"])):
        one["transport"] = {
            "volume": transport_of(place / "labels.zarr", place / "transport.json"),
            "reference": transport_of(true, true.with_suffix(".transport.json")),
        }
    return both


# ---- what is shown ------------------------------------------------------------------------------------------


def table(
    title: str, figures: Sequence[Figure], runs: dict[str, Result], beside: dict[str, Result], note: str = ""
) -> str:
    several = len(runs) > 1
    heads = ["figure", "bar", "met", *runs, *(["mean ± std"] if several else []), *beside]
    lines = [f"### {title}", "", *([note, ""] if note else [])]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for figure in figures:
        values = [figure.of(result) for result in runs.values()]
        if any(value is None for value in values):
            continue
        text = [f"{value:{figure.form}}" for value in values]
        if several:
            text.append(f"{statistics.mean(values):{figure.form}} ± {statistics.stdev(values):{figure.form}}")
        met = "" if figure.bar is None else "yes" if all(map(figure.met, values)) else "**no**"
        others = [figure.of(result) for result in beside.values()]
        others_text = ["" if value is None else f"{value:{figure.form}}" for value in others]
        lines.append("| " + " | ".join([figure.name, figure.bar_text, met, *text, *others_text]) + " |")
    return "\n".join(lines)


def picture(path: Path, study: Study, edge: int = 200) -> None:
    """Slices side by side, the low-res volume, ours, and the truth or the images; a row for each plane."""
    ours, low_res = open_volume(study.labels_path), open_volume(study.low_res.path)
    truth = None if study.reference.volume is None else open_volume(study.reference.volume)
    phase_map, high_map = PhaseMap(tuple(study.low_res.phases), ""), PhaseMap(tuple(study.high_res.phases), "")
    first = first_of_groups(study)
    rows = []
    for axis, plane in enumerate(("yx", "zx", "zy")[: 1 if study.high_res.isotropic else 3]):
        start, stop = [0, 0, 0], [min(edge, n) for n in ours.shape]
        start[axis], stop[axis] = ours.shape[axis] // 2, ours.shape[axis] // 2 + 1
        box = Box(tuple(start), tuple(stop))
        sharp = ours.read(box).squeeze(axis)
        place = [(np.arange(a, b) / study.scale_factor).astype(int) for a, b in zip(start, stop, strict=True)]
        coarse = first[phase_map.index(low_res.read(Box.whole(low_res.shape)))][np.ix_(*place)].squeeze(axis)
        if truth is not None:
            beside = truth.read(box).squeeze(axis)
        else:
            image = next(
                i for i in study.high_res.images if study.high_res.isotropic or {plane, plane[::-1]} & set(i.planes)
            )
            beside = high_map.index(read_images(image.path))[0]
            if plane not in image.planes and plane[::-1] in image.planes:
                beside = beside.T
        rows.append(
            [
                np.pad(part[:edge, :edge], [(0, edge - n) for n in part[:edge, :edge].shape], constant_values=255)
                for part in (coarse, sharp, beside)
            ]
        )
    save_panels(path, rows)


def save_panels(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """A PNG of rows of label images of one size, side by side; 255 is white."""
    from PIL import Image

    across = np.full((rows[0][0].shape[0], 6), 255, np.uint8)
    lines = [np.concatenate([part for image in row for part in (across, image)][1:], axis=1) for row in rows]
    down = np.full((6, lines[0].shape[1]), 255, np.uint8)
    shown = Image.fromarray(np.concatenate([part for line in lines for part in (down, line)][1:]), "P")
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(PHASE_COLOURS)] = PHASE_COLOURS
    shown.putpalette(palette.ravel().tolist())
    shown.save(path, optimize=True)


def _name(*words: str) -> str:
    return "-".join(re.sub(r"[^\w.-]+", "-", word) for word in words)


CASES = {
    "sofc": "case3-sofc-small",
    "phantom": "demo",
    "separator": "case2-separator-small",
    "atypical": "demo",
    "electrode": "",
}
"""Case → its study in configs/; the electrode's is written beside the files that are cut from it."""
SCALES = {"phantom": ["4"], "atypical": ["4", "8"], "electrode": ["2", "4", "8"]}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=tuple(CASES))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, help="train so many, whatever time they take; --minutes says which bars")
    parser.add_argument("--seeds", type=int, nargs="+", help="0, of atypical 0 1 2 by default")
    parser.add_argument("--scale", nargs="+", help="of phantom (4), atypical (4 8) and electrode (2 4 8)")
    parser.add_argument("--slices-porosity", nargs="+", default=["0.25", "0.55"], help="of atypical")
    parser.add_argument("--data", help="folder of the real images; HPCRES_DATA by default")
    parser.add_argument("--keep", type=Path, help="folder for everything that is made; a temporary one by default")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="on top of the study: configs/long.yaml; auto "
        "takes the study without its recipe, and lets training choose one",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe; repeatable")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("--by-plane", action="store_true", help="each slice of the electrode says which plane it shows")
    parser.add_argument("--cubes", type=int, default=256, help="in the picture of the electrode's distributions")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0, 1, 2] if options.case == "atypical" else [0])
    options.scale = options.scale or SCALES.get(options.case, [""])
    if options.data:
        os.environ["HPCRES_DATA"] = options.data
    return options


def without_recipe(config: Path, target: Path) -> Path:
    """The study of `config` whose recipe training chooses, written to `target`. Returns that path."""
    content = yaml.safe_load(config.read_text())
    bases = [content["base"]] if isinstance(content["base"], str) else content["base"]
    content["base"] = [str(config.parent / base) for base in bases if base != "fast.yaml"]
    content.pop("training", None)
    target.write_text(yaml.safe_dump(content | {"recipe": "auto"}))
    return target


def variants(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Scale factor ("" for the study's own) and settings of each table."""
    if options.case not in SCALES:
        return [("", [])]
    by_scale = [(scale, [f"scale_factor={scale}"]) for scale in options.scale]
    if options.case != "atypical":
        return by_scale
    shares = [f"phantom.slices_porosity={share}" for share in options.slices_porosity]
    return [(scale, [*own, share]) for share, (scale, own) in product(shares, by_scale)]


def tables(options: argparse.Namespace, keep: Path, temporary: Path, scale: str, variant: Sequence[str]) -> list[str]:
    """Train, paint and measure one variant of a case for every seed; the Markdown tables of it."""
    case, own = options.case, [*options.set, *variant]
    auto = options.recipe == Path("auto")
    config = CONFIGS / f"{CASES[case]}.yaml"
    if case == "electrode":
        config = electrode.make(
            keep / "electrode-data", scale, None if auto else CONFIGS / "fast.yaml", not options.by_plane
        )
    elif auto:
        config = without_recipe(config, temporary / config.name)
    if options.recipe and not auto:
        recipe = [str(config), str(options.recipe.resolve())]
        config = temporary / config.name
        config.write_text(yaml.safe_dump({"base": recipe}))
    budget = [f"training.minutes={options.minutes:g}", "training.steps=100000"]
    if options.steps:
        budget = ["training.minutes=null", f"training.steps={options.steps}"]
    length = f"{options.steps}-steps" if options.steps else f"{options.minutes:g}-minutes"
    how = [*([options.recipe.stem] if options.recipe else []), *(["by-plane"] if options.by_plane else [])]
    title = _name(case, *how, length, *own)
    shown = options.picture
    if shown and len(variants(options)) > 1:
        shown = shown.with_stem(_name(shown.stem, *(text.partition("=")[2] for text in variant)))
    runs: dict[str, Result] = {}
    halves: dict[str, Result] = {}
    study: Study | None = None
    for seed in options.seeds:
        settings, folder = [f"--set={text}" for text in (*budget, *own, f"seed={seed}")], keep / f"{title}-seed{seed}"
        result = run_of(config, folder, settings)
        its_study = load_study(config, plain(settings), str(folder))
        if case == "atypical":
            result |= specks(its_study)
        if case == "electrode":
            result, halves[f"seed {seed}"] = beside_the_electrode(config, folder, settings, result)
        runs[f"seed {seed}"] = result
        if shown and study is None:
            picture(shown, its_study)
            if case == "electrode":
                electrode.distributions(its_study, shown.with_stem(f"{shown.stem}-distributions"), options.cubes)
        study = study or its_study
    assert study
    one = next(iter(runs.values()))
    phases = list(one["volume"]["volume_fraction"])
    figures = figures_of(case, options.minutes, scale, phases)
    beside: dict[str, Result] = {}
    beside_half: dict[str, Result] = {}
    data = [text for text in own if not text.startswith(("training.", "network."))]
    if case in ("sofc", "separator", "electrode"):
        for how in ("nearest", "trilinear"):
            settings, folder = [f"--set={text}" for text in data], keep / _name(case, how, *data)
            beside[how] = upsampled(config, folder, how, settings)
            if case == "electrode":
                beside[how], beside_half[how] = beside_the_electrode(config, folder, settings, beside[how])
    if case in ("sofc", "separator"):
        beside["a quarter"] = {"quarters": {k: entry["quarters"] for k, entry in one["images"]["planes"].items()}}
        return [table(title, figures, runs, beside)]
    truth = one["reference"]
    images = one["images"] | {"appearance": truth["appearance"]}
    slices = {"volume": images, "reference": truth}
    if case == "electrode":
        compared = against_truth(phases)
        columns = {"the slices": slices, "the truth": {"volume": truth, "reference": truth}}
        true_half = next(iter(halves.values()))["reference"]
        columns_half = {
            "the slices": {"volume": images, "reference": true_half},
            "the truth": {"volume": true_half, "reference": true_half},
        }
        return [
            table(f"{title}, whole", figures, runs, beside | columns),
            table(f"{title}, half without slices", compared, halves, beside_half | columns_half),
        ]
    if case == "atypical":
        columns = as_columns(study, one, slices)
        return [table(title, figures_of_atypical(study, options.minutes, scale), runs, columns, SPECKS_TEXT)]
    beside["the slices"] = slices
    for other in list(runs.values())[1:2]:
        transport = {"volume": other["transport"]["reference"], "reference": one["transport"]["reference"]}
        beside["another truth"] = {"volume": other["reference"], "reference": truth, "transport": transport}
    return [table(title, figures, runs, beside)]


def as_columns(study: Study, one: Result, slices: Result) -> dict[str, Result]:
    """The first seed's slices and truth, in place of a volume."""

    def column(volume: Result, which: str) -> Result:
        shares = {
            " + ".join(group): sum(volume["volume_fraction"][name] for name in group) for group in study.low_res.groups
        }
        counted = {
            key: {"volume": one[key].get(which), "images": one[key].get("images")} for key in ("specks", "specks_3d")
        }
        low_res = {"visible_fraction": shares, "volume_fraction": one["low_res"]["volume_fraction"]}
        return {"volume": volume, "images": one["images"], "reference": one["reference"], "low_res": low_res, **counted}

    return {"the slices": column(slices["volume"], "images"), "the truth": column(one["reference"], "reference")}


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="hpcres-quality-") as temporary:
        keep = (options.keep or Path(temporary)).resolve()
        for scale, variant in variants(options):
            for text in tables(options, keep, Path(temporary), scale, variant):
                print(text, end="\n\n", flush=True)


if __name__ == "__main__":
    main()
