"""What the settings beyond the paper gain or lose, by the commands a user has; the tables are for docs/training.md.

    python bench/beyond.py periodic       the anode and its mirror image, painted with and without a periodic boundary
    python bench/beyond.py scale          a phantom at scale factor 16 beside its truth
    python bench/beyond.py init-from      training that begins with another material's weights
    python bench/beyond.py unknown        damaged low-res voxels, filled in
    python bench/beyond.py probabilities  phase fractions in place of labels as the low-res volume

periodic needs HPCRES_DATA, or --data FOLDER. --keep FOLDER keeps everything and goes on where an earlier call stopped;
init-from and unknown share what they keep. --set SECTION.KEY=VALUE changes the recipe of every training.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from quality import CONFIGS, hpcres, measured, save_panels, tpb_error, worst_area, worst_fraction
from scipy.ndimage import distance_transform_edt

from hpcres.geometry import Box
from hpcres.study import Study
from hpcres.study.file import load_study
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import PhaseMap

ANODE, PHANTOM = CONFIGS / "case3-sofc-small.yaml", CONFIGS / "demo.yaml"
UNKNOWN = 255


def as_options(settings: Sequence[str]) -> list[str]:
    return [f"--set={text}" for text in settings]


def whole(path: str | Path) -> np.ndarray:
    volume = open_volume(path)
    return volume.read(Box.whole(volume.shape))


def by_steps(steps: int) -> list[str]:
    return ["training.minutes=null", f"training.steps={steps}"]


def coarse(study: Study) -> np.ndarray:
    """Low-res channel of every voxel of the study's low-res volume."""
    values = tuple(study.low_res.phases)
    return PhaseMap(values, study.low_res.path, study.low_res.unknown).index(whole(study.low_res.path))


def channels(study: Study, labels: np.ndarray) -> np.ndarray:
    """Low-res channel that each high-res label belongs to."""
    table = np.zeros(len(study.phases), np.uint8)
    for channel, names in enumerate(study.low_res.groups):
        table[[study.phases.index(name) for name in names]] = channel
    return table[labels]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)) + "\n"


# ---- the five measurements ----------------------------------------------------------------------------------


def periodic(keep: Path, options: argparse.Namespace) -> str:
    """Faces that part two phases across the z sides, where the mirror images meet, and at other low-res faces."""
    trained = keep / f"anode-{options.steps}-steps"
    hpcres("train", str(ANODE), f"--output={trained}", *as_options([*by_steps(options.steps), *options.set]))
    study = load_study(ANODE, output=str(trained))
    volume = whole(study.low_res.path)
    np.save(keep / "mirrored.npy", np.concatenate([volume, volume[::-1]]))
    rows = []
    for boundary in ("periodic", "replicate"):
        folder = keep / f"{trained.name}-{boundary}"
        hpcres(
            "infer",
            str(ANODE),
            f"--output={folder}",
            f"--checkpoint={trained / 'checkpoint.pt'}",
            f"--low-res={keep / 'mirrored.npy'}",
            f"--set=inference.boundary={{z: {boundary}}}",
        )
        labels = whole(folder / "labels.zarr")
        changed = (labels[1:] != labels[:-1]).mean(axis=(1, 2))  # of the faces between plane i and i + 1
        scale, middle = int(study.scale_factor), len(labels) // 2
        low_res_faces = [i - 1 for i in range(scale, len(labels), scale) if i != middle]
        values = [(labels[0] != labels[-1]).mean(), changed[middle - 1], changed[low_res_faces].mean()]
        rows.append([boundary, *(f"{value:.1%}" for value in values)])
    return table(["boundary", "across the z sides", "where the mirror images meet", "other low-res faces"], rows)


def scale(keep: Path, options: argparse.Namespace) -> str:
    """Agreement, fractions, and how many voxels are in the right low-res group, beside copied low-res voxels."""
    folder = keep / f"scale-{options.scale}".replace("/", "-")
    settings = [
        f"scale_factor={options.scale}",
        f"phantom.voxels={'x'.join([str(options.voxels)] * 3)}",
        "phantom.feature_voxels=24",
        "network.width=4",
        "network.critic_width=5",
        "network.noise_sigma_voxels=[0,8,16]",
        "training.context=3",
        "training.warm_up_steps=250",
        *by_steps(options.steps),
        *options.set,
    ]
    if not (folder / "phantom").exists():
        hpcres("phantom", str(PHANTOM), f"--output={folder}", *as_options(settings))
    for stage in ("train", "infer"):
        hpcres(stage, str(PHANTOM), f"--output={folder}", *as_options(settings))
    found = measured(PHANTOM, folder, as_options(settings))
    study = load_study(PHANTOM, settings, str(folder))
    ours, truth = (channels(study, whole(path)) for path in (study.labels_path, folder / "phantom" / "truth.zarr"))
    place = [(np.arange(n) / study.scale_factor).astype(int) for n in truth.shape]
    copied = coarse(study)[np.ix_(*place)]
    heads = ["steps", "low-res agreement", "worst phase fraction", "voxels in the right group", "copied low-res voxels"]
    row = [f"{found['low_res']['agreement']:.1%}", f"{worst_fraction('reference')(found):.3f}"]
    right = [f"{(labels == truth).mean():.1%}" for labels in (ours, copied)]
    return table(heads, [[str(options.steps), *row, *right]])


def init_from(keep: Path, options: argparse.Namespace) -> str:
    """Score by steps from random weights, from another three-phase material and from a two-phase one."""
    rows = []
    for name in ("random weights", "three-phase", "two-phase"):
        begin = [] if name == "random weights" else [f"--init-from={other_material(keep, name, options)}"]
        folder = keep / f"target-from-{name.replace(' ', '-')}-{options.steps}-steps"
        settings = as_options([*small(options), *by_steps(options.steps), "training.cubes=1", *target(keep, options)])
        hpcres("train", str(PHANTOM), f"--output={folder}", *settings, *begin)
        judged = list(csv.DictReader((folder / "quality.csv").open()))
        last = [float(judged[-1][key]) for key in ("fraction_error", "area_error", "tv1", "disagreement")]
        shown = [form.format(value) for form, value in zip(("{:.3f}", "{:.0%}", "{:.3f}", "{:.2%}"), last, strict=True)]
        rows.append([name, *(f"{float(row['score']):.2f}" for row in judged), *shown])
    heads = ["begun from", *(row["step"] for row in judged), "fractions off at the end", "areas", "tv1", "disagreement"]
    return table(heads, rows)


def unknown(keep: Path, options: argparse.Namespace) -> str:
    """What four damaged boxes, a quarter of an edge each, are filled with, beside the truth in them."""
    truth_study = load_study(PHANTOM, [*small(options), *target(keep, options)])
    damaged, truth = whole(truth_study.low_res.path), whole(keep / "target" / "phantom" / "truth.zarr")
    at = [(damaged.shape[0] * k // 8, damaged.shape[0] * (k + 2) // 8) for k in (1, 5)]
    boxes = np.zeros(damaged.shape, bool)
    for z, y, x in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)):
        boxes[slice(*at[z]), slice(*at[y]), slice(*at[x])] = True
    np.save(keep / "damaged.npy", np.where(boxes, UNKNOWN, damaged).astype(np.uint8))
    place = np.ix_(*(((np.arange(n)) / truth_study.scale_factor).astype(int) for n in truth.shape))
    inside = boxes[place]
    nearest = coarse(truth_study)[tuple(distance_transform_edt(boxes, return_distances=False, return_indices=True))]

    def row(name: str, labels: np.ndarray, score: str) -> list[str]:
        own, true = labels[inside], truth[inside]
        shares = np.bincount(own, minlength=len(truth_study.phases)) / own.size
        right = (channels(truth_study, own) == channels(truth_study, true)).mean()
        fractions = " / ".join(f"{share:.3f}" for share in shares)
        return [name, fractions, f"{(own == true).mean():.0%}", f"{right:.0%}", score]

    right = (nearest[place][inside] == channels(truth_study, truth[inside])).mean()
    rows = [row("truth", truth, ""), ["nearest known low-res label", "", "", f"{right:.0%}", ""]]
    begin = other_material(keep, "three-phase", options)
    first = np.array([truth_study.phases.index(group[0]) for group in truth_study.low_res.groups], np.uint8)
    shown = [np.where(boxes, UNKNOWN, first[coarse(truth_study)])[place]]
    for share in (0, 0.15):
        folder = keep / f"damaged-{share}-{options.steps}-steps"
        settings = as_options(
            [
                *small(options),
                *by_steps(options.steps),
                "training.cubes=1",
                *target(keep, options),
                f"low_res.path={keep / 'damaged.npy'}",
                f"low_res.unknown=[{UNKNOWN}]",
                f"training.masked_fraction={share}",
            ]
        )
        hpcres("train", str(PHANTOM), f"--output={folder}", *settings, f"--init-from={begin}")
        hpcres("infer", str(PHANTOM), f"--output={folder}", *settings)
        score = list(csv.DictReader((folder / "quality.csv").open()))[-1]["score"]
        shown.append(whole(folder / "labels.zarr"))
        rows.append(row(f"masked_fraction: {share}", shown[-1], f"{float(score):.2f}"))
    if options.picture:  # through the middle of two boxes
        save_panels(options.picture, [[labels[len(truth) // 4] for labels in (*shown, truth)]])
    phases = " / ".join(truth_study.phases)
    return table(["inside the boxes", phases, "labels as in the truth", "low-res groups", "last score"], rows)


def probabilities(keep: Path, options: argparse.Namespace) -> str:
    """A phantom with all phases told apart, given by its likeliest phases and by its fractions (box means)."""
    phases = load_study(PHANTOM).phases
    labels = ", ".join(f"{label}: {name}" for label, name in enumerate(phases))
    by_labels = f"{{path: '${{output}}/phantom/low_res.zarr', phases: {{{labels}}}}}"
    files = (f"{{path: '${{output}}/phantom/low_res_{k}.tif', phases: {name}}}" for k, name in enumerate(phases))
    by_fractions = f"{{channels: [{', '.join(files)}]}}"
    firmer = ["training.voxel_weight=50", "training.voxel_threshold=0.0005"]
    rows = []
    for name, low_res, more in (
        ("labels", by_labels, []),
        ("probabilities", by_fractions, []),
        ("probabilities, voxel_weight 50, voxel_threshold 0.0005", by_fractions, firmer),
    ):
        folder = keep / f"from-{name.split(',')[0]}{'-firmer' if more else ''}-{options.steps}-steps"
        settings = [f"low_res={low_res}", "imaging.box=true", *small(options), *by_steps(options.steps), *more]
        if not (folder / "phantom").exists():
            hpcres("phantom", str(PHANTOM), f"--output={folder}", *as_options(settings))
        for stage in ("train", "infer"):
            hpcres(stage, str(PHANTOM), f"--output={folder}", *as_options(settings))
        found = measured(PHANTOM, folder, as_options(settings))
        ours, truth = (whole(path) for path in (folder / "labels.zarr", folder / "phantom" / "truth.zarr"))
        of_ours, of_truth = (block_fractions(labels, len(phases)) for labels in (ours, truth))
        off = " / ".join(f"{value:.3f}" for value in np.abs(of_ours - of_truth).mean(axis=(1, 2, 3)))
        same = (of_ours.argmax(0) == of_truth.argmax(0)).mean()
        errors = [worst_area("reference")(found), tpb_error(found), found["low_res"]["grid_artefact"]]
        rows.append(
            [
                name,
                f"{same:.1%}",
                off,
                f"{(ours == truth).mean():.1%}",
                f"{worst_fraction('reference')(found):.3f}",
                *(f"{error:.1%}" for error in errors),
            ]
        )
    heads = [
        "from",
        "likeliest phases agree",
        f"fractions of low-res voxels off, {' / '.join(phases)}",
        "accuracy",
        "phase fractions",
        "areas",
        "TPB",
        "grid artefact",
    ]
    return table(heads, rows)


def block_fractions(labels: np.ndarray, phases: int, edge: int = 4) -> np.ndarray:
    """(phase, z, y, x): shares of blocks of edge³ voxels."""
    shape = [part for n in labels.shape for part in (n // edge, edge)]
    return np.stack([(labels == phase).reshape(shape).mean(axis=(1, 3, 5)) for phase in range(phases)])


# ---- what three of them share ---------------------------------------------------------------------------------


def small(options: argparse.Namespace) -> list[str]:
    judged = max(1, options.steps // 4)
    return [
        f"phantom.voxels={'x'.join([str(options.voxels)] * 3)}",
        "network.width=4",
        "network.critic_width=6",
        "training.quality_cubes=4",
        f"training.quality_steps={judged}",
        *options.set,
    ]


def target(keep: Path, options: argparse.Namespace) -> list[str]:
    """Settings that name the images and the low-res volume of the target's phantom, made where it is not there."""
    folder = keep / "target"
    if not (folder / "phantom").exists():
        hpcres("phantom", str(PHANTOM), f"--output={folder}", *as_options(small(options)))
    made = folder / "phantom"
    return [f"low_res.path={made / 'low_res.zarr'}", f"high_res.images=[{{path: {made / 'slices.tif'}}}]"]


def other_material(keep: Path, kind: str, options: argparse.Namespace) -> Path:
    """The checkpoint of a material with smaller features and less pore, or of one with two phases."""
    folder = keep / f"other-{kind}-{options.other_steps}-steps"
    settings = [*small(options), *by_steps(options.other_steps), "phantom.feature_voxels=8", "phantom.porosity=0.25"]
    if kind == "two-phase":
        two = "{0: pore, 1: active}"
        settings += ["phantom.kind=chi2", f"high_res.phases={two}", f"low_res.phases={two}"]
    if not (folder / "phantom").exists():
        hpcres("phantom", str(PHANTOM), f"--output={folder}", *as_options(settings))
    hpcres("train", str(PHANTOM), f"--output={folder}", *as_options(settings))
    return folder / "checkpoint.pt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--keep", type=Path, help="folder for everything that is made; a temporary one by default")
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe; repeatable")
    cases = parser.add_subparsers(dest="case", required=True)
    one = cases.add_parser("periodic", parents=[common])
    one.add_argument("--data", help="folder of the real images; HPCRES_DATA by default")
    one.add_argument("--steps", type=int, default=800)
    one = cases.add_parser("scale", parents=[common])
    one.add_argument("--scale", default="16")
    one.add_argument("--voxels", type=int, default=192, help="edge of the phantom")
    one.add_argument("--steps", type=int, default=1000)
    for name in ("init-from", "unknown", "probabilities"):
        one = cases.add_parser(name, parents=[common])
        one.add_argument("--voxels", type=int, default=128, help="edge of the phantoms")
        steps = {"init-from": 480, "unknown": 600, "probabilities": 400}[name]
        one.add_argument("--steps", type=int, default=steps, help="of the target")
        if name != "probabilities":
            one.add_argument("--other-steps", type=int, default=600, help="of what it begins from")
        if name == "unknown":
            one.add_argument("--picture", type=Path, metavar="FILE.png", help="low-res, both fills and the truth")
    options = parser.parse_args()
    if getattr(options, "data", None):
        os.environ["HPCRES_DATA"] = options.data
    run = {
        "periodic": periodic,
        "scale": scale,
        "init-from": init_from,
        "unknown": unknown,
        "probabilities": probabilities,
    }[options.case]
    with tempfile.TemporaryDirectory(prefix="hpcres-beyond-") as temporary:
        keep = (options.keep or Path(temporary)).resolve()
        keep.mkdir(parents=True, exist_ok=True)
        print(run(keep, options), flush=True)


if __name__ == "__main__":
    main()
