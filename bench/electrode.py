"""The real electrode that `bench/quality.py electrode` trains on: what is cut from it, and how its cubes are spread.

electrode.tiff (HPCRES_DATA, 256³) is the truth. Its finest phase, label 170, is taken for the binder: 15 % of the
volume in features of 2.6 voxels. The low-res volume merges it with the pore, where it lies: 0.084 of all faces part
binder and pore, 0.030 binder and active material. Slices are cut from the first half along z, in all three planes,
evenly spaced. Faces of pore and binder are 0.083, 0.080 and 0.089 of all along z, y and x. The study takes the material
for isotropic, or tells of each image which plane it shows. The file gives no voxel size, so the study says 1 µm.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpcres.counting import counts, totals
from hpcres.counting.named import Named, summary
from hpcres.geometry import Box
from hpcres.lengths import Length, cubic
from hpcres.metrics.measure import Sampling, Work, measure
from hpcres.metrics.schedule import connect
from hpcres.phantoms.files import Imaged
from hpcres.study import Study, SubVolumes
from hpcres.study.file import load_study
from hpcres.volumes.convert import convert
from hpcres.volumes.files import write_json
from hpcres.volumes.formats import open_volume, read_images
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.tiff import write_images
from hpcres.volumes.volume import array_volume

PLANES = ("yx", "zx", "zy")
SLICES = 4
"""In each plane."""
PHASES = {0: "pore", 85: "active", 170: "binder"}
EDGE = 64
"""Of the cubes and squares that are measured one by one."""


def make(folder: Path, scale: str, recipe: Path | None, isotropic: bool) -> Path:
    """Write what is not in `folder` yet: the truth and its second half, the slices, the low-res volume at this scale
    factor and its second half, and the study, whose recipe training chooses where none is given. Returns the study
    file."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["electrode", scale.replace("/", "-"), *([] if recipe else ["auto"]), *([] if isotropic else ["planes"])]
    file = folder / f"{'-'.join(parts)}.yaml"
    low_res = f"low_res-{scale.replace('/', '-')}.zarr"
    study_content = {
        **({"base": str(recipe)} if recipe else {"recipe": "auto"}),
        "name": "electrode",
        "output": "results",
        "scale_factor": scale,
        "high_res": {
            "phases": PHASES,
            "voxel_size": "1 um",
            "isotropic": isotropic,
            "images": [{"path": f"slices-{p}.tif", **({} if isotropic else {"planes": [p]})} for p in PLANES],
        },
        "low_res": {"path": low_res, "phases": {0: ["pore", "binder"], 1: "active"}},
        "imaging": {"operator": "under-resolved"},
        "inference": {"tiles": "2x2x2"},
        "reference": {"volume": "truth.zarr"},
    }
    file.write_text(yaml.safe_dump(study_content, sort_keys=False))
    study = load_study(file)
    source = load_study(file, ["reference.volume=${HPCRES_DATA}/electrode.tiff"]).reference.volume
    volume = open_volume(str(source))
    labels = volume.read(Box.whole(volume.shape))
    truth = PhaseMap(tuple(PHASES), str(source)).index(labels)
    half = labels[: len(labels) // 2]
    if not (folder / f"slices-{PLANES[-1]}.tif").exists():
        for axis, plane in enumerate(PLANES):
            n = half.shape[axis]
            places = ((2 * np.arange(SLICES) + 1) * n) // (2 * SLICES)
            write_images(folder / f"slices-{plane}.tif", np.moveaxis(half.take(places, axis), axis, 0))
    of_high, of_low = dict(enumerate(study.phases)), dict(enumerate("+".join(g) for g in study.low_res.groups))
    halves = half_files(study)
    _written(folder / "truth.zarr", truth, of_high, 1)
    _written(halves["truth"], other_half(truth), of_high, 1)
    if not (folder / low_res).exists() or not halves["low_res"].exists():
        low_res = Imaged(array_volume(truth, "truth"), study)
        coarse = low_res.read(Box.whole(low_res.shape))
        _written(folder / low_res, coarse, of_low, float(study.scale_factor))
        _written(halves["low_res"], other_half(coarse), of_low, float(study.scale_factor))
    return file


def _written(path: Path, labels: np.ndarray, phases: dict[int, str], voxel_size: float) -> None:
    if not path.exists():
        edges = cubic(Length(voxel_size, "micrometer"))
        convert(array_volume(labels, "electrode.tiff"), path, phases=phases, voxel_size=edges)


def other_half(volume: np.ndarray) -> np.ndarray:
    """The half along z that no slice was cut from."""
    return volume[len(volume) // 2 :]


def half_files(study: Study) -> dict[str, Path]:
    """Where the second half of the truth and of the low-res volume are."""
    truth, low_res = Path(str(study.reference.volume)), Path(str(study.low_res.path))
    return {"truth": truth.with_stem("truth-half"), "low_res": low_res.with_stem(f"{low_res.stem}-half")}


# ---- figure 2 of Dahari 2022 --------------------------------------------------------------------------------


def distributions(study: Study, picture: Path, cubes: int) -> None:
    """A PNG of how phase fractions, interphase areas, TPB and D_rel are spread over random cubes of the truth and of
    the super-resolved volume at the same places, and the first three over as many squares of the slices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    truth = Path(str(study.reference.volume))
    shown = {
        "truth": of_cubes(truth, truth.parent / f"truth-{cubes}-cubes.json", study, cubes),
        "super-resolved": of_cubes(study.labels_path, study.folder / f"{cubes}-cubes.json", study, cubes),
        "slices": of_squares(study, cubes),
    }
    first = shown["truth"]
    rows = [(what, key) for what in ("phase fraction", "interphase area", "D_rel") for key in first[what]]
    across = max(len(first[what]) for what in first)
    figure, axes = pyplot.subplots(3, across + 1, figsize=(3 * (across + 1), 8), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    colours = dict(zip(shown, ("0.75", "tab:blue", "tab:orange"), strict=True))
    column: dict[str, int] = {}
    for what, key in [*rows, ("normalised TPB", "")]:
        row = ["phase fraction", "interphase area", "D_rel"].index(what) if key else 0
        place = column.setdefault(what, 0) if key else across
        column[what] = place + 1
        axis = axes[row, place]
        axis.set_axis_on()
        known = {name: found[what][key] for name, found in shown.items() if found.get(what, {}).get(key)}
        boxes = axis.boxplot(
            list(known.values()),
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            widths=0.6,
            medianprops={"color": "black"},
        )
        for box, name in zip(boxes["boxes"], known, strict=True):
            box.set_facecolor(colours[name])
        axis.set_xticks(range(1, len(known) + 1), list(known), fontsize=8)
        axis.set_title(f"{what} {key.replace('|', ' – ')}".strip(), fontsize=9)
    figure.suptitle(
        f"{cubes} cubes of {EDGE}³ voxels, squares of {EDGE}² pixels of the slices; "
        "box: quartiles and median, whiskers: 5 and 95 %",
        fontsize=9,
    )
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def of_cubes(volume: Path, target: Path, study: Study, cubes: int) -> dict[str, dict[str, list[float]]]:
    """Values over cubes by metric and phase, pair or ""; D_rel of every direction together."""
    if not target.exists():
        settings = SubVolumes(count=cubes, voxels=EDGE, transport_count=cubes)
        with connect() as client:
            found = measure(open_volume(str(volume)), Work(client), phases=study.phases, sampling=Sampling(settings))
        write_json(target, found["subvolumes"])
    found = json.loads(target.read_text())
    d_rel = {
        phase: [value for one in by_direction.values() for value in one["D_rel"]["values"]]
        for phase, by_direction in found["transport"].items()
    }
    return {**_shown(found), "D_rel": d_rel}


def of_squares(study: Study, number: int) -> dict[str, dict[str, list[float]]]:
    """The same of random squares of the slices, but for D_rel."""
    index, random = PhaseMap(tuple(study.high_res.phases), "").index, np.random.default_rng(0)
    images = [plane for image in study.high_res.images for plane in index(read_images(image.path))]
    named = Named(dict(enumerate(study.phases)), (1.0, 1.0, 1.0), "voxel")
    values: dict[str, dict[tuple[int, ...], list[float]]] = {}
    pixels = np.array([image.size for image in images])
    for chosen in random.choice(len(images), number, p=pixels / pixels.sum()):
        image = images[chosen]
        first = [int(random.integers(n - EDGE + 1)) for n in image.shape]
        square = image[tuple(slice(a, a + EDGE) for a in first)]
        found = totals.finalize(
            counts.count(square[None], labels=range(len(study.phases))), (1.0, 1.0, 1.0), range(len(study.phases))
        )
        for metric, by_key in totals.by_metric(found).items():
            for key, value in by_key.items():
                values.setdefault(metric, {}).setdefault(key, []).append(value)
    return _shown(named.values({m: {k: summary(v) for k, v in keys.items()} for m, keys in values.items()}))


def _shown(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    def values(by_key: dict[str, Any]) -> dict[str, Sequence[float]]:
        return {key: one["values"] for key, one in by_key.items()}

    return {
        "phase fraction": values(found["volume_fraction"]),
        "interphase area": values(found["interphase_area"]),
        "normalised TPB": {"": found["tpb_normalised"]["values"]},
    }
