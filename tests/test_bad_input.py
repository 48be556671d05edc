"""Whatever is wrong with the input: exit 2, one line that says where and what to do, and nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import torch
import yaml

from hpcres import cli
from hpcres.checkpoint import build_generator, save_checkpoint
from hpcres.study.file import load_study

PHASES = {0: "pore", 1: "nickel", 2: "ceramic"}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A small study with which every command works: images, coarse volume, checkpoint, painted volume."""
    folder = tmp_path_factory.mktemp("good")
    rng = np.random.default_rng(0)
    tifffile.imwrite(folder / "slice.tif", rng.integers(0, 3, (96, 80), np.uint8))
    tifffile.imwrite(folder / "low.tif", rng.integers(0, 3, (20, 18, 17), np.uint8), photometric="minisblack")
    study = {
        "name": "small",
        "scale_factor": 4,
        "output": "results",
        "high_res": {"phases": PHASES, "voxel_size": "65 nm", "images": [{"path": "slice.tif"}]},
        "low_res": {"path": "low.tif", "phases": PHASES},
        "network": {"width": 3, "critic_width": 5},
        "inference": {"tiles": "1x1x1", "chunk_voxels": 16},
        "training": {"steps": 1, "cubes": 1},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    loaded = load_study(folder / "study.yaml")
    torch.manual_seed(0)
    save_checkpoint(folder / "results" / "checkpoint.pt", generator=build_generator(loaded), study=loaded, step=1)
    return folder


@pytest.fixture
def good(template, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HPCRES_UNSET", "")
    monkeypatch.delenv("HPCRES_UNSET")
    return folder


def study_with(folder: Path, change: Callable[[dict], object]) -> None:
    content = yaml.safe_load((folder / "study.yaml").read_text())
    change(content)
    (folder / "study.yaml").write_text(yaml.safe_dump(content))


def rewrite_checkpoint(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "results" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def old_setting(content: dict) -> None:
    study = json.loads(content["study"])
    study["training"]["old"] = 1
    content["study"] = json.dumps(study)


def checkpoint_of(folder: Path, *settings: str) -> None:
    other = load_study(folder / "study.yaml", settings)
    save_checkpoint(folder / "results" / "checkpoint.pt", generator=build_generator(other), study=other, step=1)


def text(path: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_text(content)


def append(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "study.yaml").open("a").write(content)


def image(path: str, array: np.ndarray, **options) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        if path.endswith(".npy"):
            np.save(folder / path, array)
        else:
            tifffile.imwrite(folder / path, array, **options)

    return write


def cut(path: str, share: float) -> Callable[[Path], object]:
    def truncate(folder: Path) -> None:
        whole = (folder / path).read_bytes()
        (folder / path).write_bytes(whole[: int(len(whole) * share)])

    return truncate


def low_res(path: str, **more) -> Callable[[Path], object]:
    return lambda folder: study_with(folder, lambda s: s["low_res"].update(path=path, **more))


def channels(*values: np.ndarray, **more) -> Callable[[Path], object]:
    """Probabilities of pore, nickel and ceramic in place of the labels."""

    def write(folder: Path) -> None:
        names = ("pore", "nickel", "ceramic")
        for name, array in zip(names, values, strict=True):
            np.save(folder / f"{name}.npy", array)
        every = [{"path": f"{name}.npy", "phases": name} for name in names]
        study_with(folder, lambda s: s.update(low_res={"channels": every, **more}))

    return write


def both(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


def hdf5(folder: Path) -> None:
    with h5py.File(folder / "low.h5", "w") as file:
        file["scan/labels"] = np.zeros((20, 20, 20), np.uint8)


def hdf5_of(make: Callable[[h5py.File], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        with h5py.File(folder / "low.h5", "w") as file:
            make(file)

    return write


def two_volumes(folder: Path) -> None:
    with tifffile.TiffWriter(folder / "low.tif") as file:
        for _ in range(2):
            file.write(VOLUME, photometric="minisblack")


def half_virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((20, 18, 17), "u1")
    layout[:] = h5py.VirtualSource("gone.h5", "d", (20, 18, 17))
    file.create_virtual_dataset("v", layout)


def fiji(path: str, edge_nm: float, depth_nm: float | None = None) -> Callable[[Path], object]:
    """The low-res volume, or an image, as Fiji saves one whose pixels it knows."""

    def write(folder: Path) -> None:
        axes = {"axes": "ZYX", "spacing": depth_nm or edge_nm} if path == "low.tif" else {}
        tifffile.imwrite(
            folder / path,
            tifffile.imread(folder / path),
            imagej=True,
            resolution=(1 / edge_nm, 1 / edge_nm),
            metadata={"unit": "nm", **axes},
        )

    return write


def store_of(voxel_size: str) -> Callable[[Path], object]:
    """A store painted when study and checkpoint had another voxel size."""

    def paint(folder: Path) -> None:
        checkpoint_of(folder, f"high_res.voxel_size={voxel_size}")
        assert run(["infer", "--set", f"high_res.voxel_size={voxel_size}"]) == 0
        checkpoint_of(folder)

    return paint


def painted(folder: Path) -> None:
    assert run(["infer"]) == 0


def foreign_folder(path: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / path).mkdir(parents=True), (folder / path / "thesis.tex").write_text("dear"))


def nan_weight(content: dict) -> None:
    next(iter(content["weights"].values())).view(-1)[3] = float("nan")


VOLUME = np.zeros((20, 18, 17), np.uint8)
LATE = VOLUME.astype(np.float32)
LATE[-1, -1, -1] = 0.5
THIRD = np.full((20, 18, 17), 1 / 3)
THIRDS = channels(THIRD, THIRD, THIRD)
RGB = np.zeros((20, 18, 17, 3), np.uint8)
TRAIN, INFER = ["train", "--overwrite"], ["infer", "--overwrite"]

# name: (what is spoilt, the command, words of the one line)
CASES: dict[str, tuple[Callable[[Path], object], list[str], list[str]]] = {
    # the study file
    "no study": (lambda f: (f / "study.yaml").unlink(), TRAIN, ["study.yaml", "no such study file"]),
    "study not YAML": (append("phases: [\n"), TRAIN, ["study.yaml", "not valid YAML"]),
    "study empty": (text("study.yaml", ""), TRAIN, ["study.yaml", "no settings"]),
    "unknown key": (append("trainig: {steps: 3}\n"), TRAIN, ["trainig", "did you mean 'training'?"]),
    "unknown nested key": (lambda f: None, [*TRAIN, "--set", "training.stpes=3"], ["training.stpes", "'steps'"]),
    "set without value": (lambda f: None, [*TRAIN, "--set", "training.steps"], ["--set", "section.key=value"]),
    "wrong type": (lambda f: None, [*TRAIN, "--set", "training.steps=many"], ["training.steps", "'many'"]),
    "label twice": (text("study.yaml", "name: a\nname: b\n"), TRAIN, ["line 2", "'name' is given twice"]),
    "phase twice": (
        lambda f: study_with(f, lambda s: s["high_res"].update(phases={0: "pore", 1: "pore", 2: "ceramic"})),
        TRAIN,
        ["'pore' is named twice"],
    ),
    **{
        f"phase named {name!r}": (
            lambda f, name=name: study_with(f, lambda s: s["high_res"].update(phases={0: name, 1: "b", 2: "c"})),
            TRAIN,
            ["high_res.phases", "phase name", "write letters"],
        )
        for name in ("a|b", "a/b", "a\\b", "..", "a..b", "a\nb", "a\x1bb", " a", "a ", "")
    },
    "phase unknown to high-res": (
        lambda f: study_with(f, lambda s: s["low_res"].update(phases={0: "pore", 1: "nikel", 2: "ceramic"})),
        TRAIN,
        ["'nikel'", "did you mean 'nickel'?"],
    ),
    "phase without place": (
        lambda f: study_with(f, lambda s: s["low_res"].update(phases={0: "pore", 1: "nickel"})),
        TRAIN,
        ["'ceramic' has no place"],
    ),
    "scale factor": (lambda f: None, [*TRAIN, "--set", "scale_factor=5"], ["scale_factor", "the nearest is 64/13"]),
    "scale factor of one low-res voxel a cube": (
        lambda f: None,
        [*TRAIN, "--set", "scale_factor=64"],
        ["scale_factor", "the nearest is 32"],
    ),
    "scale factor of transposed end": (
        lambda f: None,
        [*TRAIN, "--set", "scale_factor=16/3", "--set", "network.last_stage=transposed"],
        ["use resize"],
    ),
    "voxel size without unit": (
        lambda f: None,
        [*TRAIN, "--set", "high_res.voxel_size=65"],
        ["high_res.voxel_size", "for example 65 nm"],
    ),
    "environment variable": (low_res("${HPCRES_UNSET}/low.tif"), TRAIN, ["low_res.path", "export HPCRES_UNSET"]),
    "anisotropic without planes": (
        lambda f: None,
        [*TRAIN, "--set", "high_res.isotropic=false"],
        ["slice.tif", "has no planes"],
    ),
    "base of itself": (append("base: study.yaml\n"), TRAIN, ["leads back to itself"]),
    "unknown option": (lambda f: None, ["train", "--stepz", "3"], ["--stepz", "--help"]),
    # images
    "low-res missing": (lambda f: (f / "low.tif").unlink(), TRAIN, ["low.tif", "no such file"]),
    "low-res float": (image("low.tif", VOLUME + np.float32(0.5)), TRAIN, ["low.tif", "holds 0.5", "float", "segment"]),
    "low-res RGB": (image("low.tif", RGB, photometric="rgb"), TRAIN, ["low.tif", "colour"]),
    "low-res truncated": (cut("low.tif", 0.6), TRAIN, ["low.tif"]),
    "low-res empty file": (text("low.tif", ""), TRAIN, ["low.tif"]),
    "low-res 2D": (image("low.tif", VOLUME[0]), TRAIN, ["low.tif", "3D"]),
    "low-res 4D": (both(image("low.npy", np.zeros((2, 20, 20, 20), np.uint8)), low_res("low.npy")), TRAIN, ["low.npy"]),
    "low-res unknown label": (
        image("low.tif", np.full((20, 18, 17), 7, np.uint8), photometric="minisblack"),
        TRAIN,
        ["low.tif", "7"],
    ),
    "low-res smaller than a patch": (
        image("low.tif", VOLUME[:10], photometric="minisblack"),
        TRAIN,
        ["low.tif", "10", "16"],
    ),
    "low-res suffix": (both(text("low.xyz", "a"), low_res("low.xyz")), TRAIN, ["low.xyz"]),
    "low-res folder that is no zarr": (both(foreign_folder("low.zarr"), low_res("low.zarr")), TRAIN, ["low.zarr"]),
    "HDF5 without dataset": (both(hdf5, low_res("low.h5")), TRAIN, ["low.h5", "scan/labels"]),
    "HDF5 wrong dataset": (both(hdf5, low_res("low.h5:/label")), TRAIN, ["low.h5", "scan/labels"]),
    "raw of another size": (
        both(text("low.raw", "x" * 999), low_res("low.raw", raw={"shape": [10, 10, 10]})),
        TRAIN,
        ["999", "1000"],
    ),
    "no low-res volume": (
        lambda f: study_with(f, lambda s: s.update(low_res={})),
        TRAIN,
        ["low_res", "no volume", "channels"],
    ),
    "labels and probabilities": (
        channels(THIRD, THIRD, THIRD, path="low.tif", phases=PHASES),
        TRAIN,
        ["low_res", "both are given", "keep one"],
    ),
    "unknown labels of probabilities": (
        channels(THIRD, THIRD, THIRD, unknown=[9]),
        TRAIN,
        ["low_res", "unknown is of a label volume", "0 is unknown"],
    ),
    "unknown voxels beside 16 phases": (
        both(
            low_res("low.tif", phases={k: f"p{k}" for k in range(16)}, unknown=[16]),
            lambda f: study_with(f, lambda s: s["high_res"].update(phases={k: f"p{k}" for k in range(16)})),
            image("low.tif", (np.arange(6120).reshape(20, 18, 17) % 17).astype(np.uint8), photometric="minisblack"),
        ),
        TRAIN,
        ["low.tif", "unknown voxels beside 16", "merge two groups in low_res.phases"],
    ),
    "channel without a phase": (
        both(THIRDS, lambda f: study_with(f, lambda s: s["low_res"]["channels"][1].pop("phases"))),
        TRAIN,
        ["low_res.channels.1.phases", "is required"],
    ),
    "channels that miss a phase": (
        both(THIRDS, lambda f: study_with(f, lambda s: s["low_res"]["channels"].pop())),
        TRAIN,
        ["'ceramic' has no place"],
    ),
    "channels of different shapes": (
        channels(THIRD, THIRD, THIRD[1:]),
        TRAIN,
        ["ceramic.npy", "19 × 18 × 17", "20 × 18 × 17", "cut them alike"],
    ),
    "channel missing": (both(THIRDS, lambda f: (f / "nickel.npy").unlink()), TRAIN, ["nickel.npy", "no such file"]),
    "probabilities NaN": (channels(THIRD, THIRD * np.nan, THIRD), TRAIN, ["nickel.npy", "nan", "z 0, y 0, x 0"]),
    "probabilities off": (channels(THIRD, THIRD, THIRD * 2), TRAIN, ["add up to 1.333, not 1", "ceramic.npy"]),
    "probabilities of a network of labels": (THIRDS, INFER, ["checkpoint.pt", "labels", "probabilities", "train anew"]),
    "high-res missing": (lambda f: (f / "slice.tif").unlink(), TRAIN, ["slice.tif", "no such file"]),
    "high-res float": (image("slice.tif", np.full((96, 96), 1.5, "f4")), TRAIN, ["slice.tif", "holds 1.5", "float"]),
    "high-res RGB": (
        image("slice.tif", np.zeros((96, 96, 3), np.uint8), photometric="rgb"),
        TRAIN,
        ["slice.tif", "colour"],
    ),
    "high-res unknown label": (image("slice.tif", np.full((96, 96), 9, np.uint8)), TRAIN, ["slice.tif", "9"]),
    "high-res smaller than a patch": (
        image("slice.tif", np.zeros((40, 96), np.uint8)),
        TRAIN,
        ["slice.tif", "40", "56"],
    ),
    # what the files say of themselves
    "low-res float deep inside": (image("low.tif", LATE), TRAIN, ["low.tif", "holds 0.5 at voxel z 19, y 17, x 16"]),
    "metrics float deep inside": (
        image("late.npy", LATE),
        ["metrics", "late.npy", "--voxel-size", "1um"],
        ["late.npy", "holds 0.5 at voxel z 19"],
    ),
    "two volumes": (two_volumes, TRAIN, ["low.tif", "holds 2 images", "low.tif:0", "low.tif:1"]),
    "image of a file that has none": (both(two_volumes, low_res("low.tif:2")), TRAIN, ["low.tif:2", "no image 2"]),
    "frames": (
        image("low.tif", VOLUME, imagej=True, metadata={"axes": "TYX"}),
        TRAIN,
        ["low.tif", "20 frames", "axes t, z"],
    ),
    "channels": (image("low.tif", VOLUME, metadata={"axes": "ZYC"}), TRAIN, ["low.tif", "17 channels"]),
    "virtual dataset without its source": (
        both(hdf5_of(half_virtual), low_res("low.h5:/v")),
        TRAIN,
        ["low.h5:/v", "gone.h5:/d is missing"],
    ),
    "broken external link": (
        both(hdf5_of(lambda h: h.update(a=h5py.ExternalLink("gone.h5", "/d"))), low_res("low.h5:/a")),
        TRAIN,
        ["low.h5:/a", "gone.h5:/d, which is not there"],
    ),
    "empty dataset": (
        both(hdf5_of(lambda h: h.update(a=h5py.Empty("u1"))), low_res("low.h5:/a")),
        TRAIN,
        ["is an empty dataset"],
    ),
    "objects": (
        both(lambda f: np.save(f / "low.npy", np.array([[[{}]]])), low_res("low.npy")),
        TRAIN,
        ["Python objects"],
    ),
    "two voxel sizes of three": (
        image("a.ome.tif", VOLUME, ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}),
        ["metrics", "a.ome.tif"],
        ["a.ome.tif", "along z is not known", "--voxel-size Z,Y,X"],
    ),
    "two lengths of three": (
        lambda f: None,
        ["tortuosity", "low.tif", "--voxel-size", "1um,2um"],
        ["--voxel-size", "2 lengths", "2um,250nm"],
    ),
    "voxel size of a study by option": (
        lambda f: painted(f),
        ["tortuosity", "--voxel-size", "1um"],
        ["study.yaml", "drop --voxel-size"],
    ),
    **{
        f"low-res voxel size of another study, {command[0]}": (
            fiji("low.tif", 260, 300),
            command,
            ["low.tif: its voxels are 300 nm along z", "260 nm (65 nm × 4)", "allow_voxel_size_mismatch: true"],
        )
        for command in (TRAIN, ["plan"], INFER, ["convert", "study.yaml"])
    },
    "image of another pixel size": (
        fiji("slice.tif", 60),
        TRAIN,
        ["slice.tif: its voxels are 60 nm along y", "high_res.voxel_size is 65 nm"],
    ),
    **{
        f"store of another voxel size, {command}": (
            store_of("80 nm"),
            [command],
            ["labels.zarr: its voxels are 80 nm along z", "is 65 nm"],
        )
        for command in ("infer", "metrics", "tortuosity", "report")
    },
    "checkpoint of another voxel size": (
        lambda f: checkpoint_of(f, "high_res.voxel_size=80 nm"),
        INFER,
        ["checkpoint.pt", "80 nm", "is 65 nm"],
    ),
    # training
    "no GPU": (lambda f: None, [*TRAIN, "--set", "device=cuda"], ["device", "cuda"]),
    "output below a file": (lambda f: None, [*TRAIN, "--output", "slice.tif/results"], ["slice.tif"]),
    "another training in the output": (
        lambda f: None,
        ["train", "--set", "training.learning_rate=0.5"],
        ["checkpoint.pt", "--overwrite"],
    ),
    # inference
    "checkpoint missing": (lambda f: (f / "results/checkpoint.pt").unlink(), INFER, ["checkpoint.pt", "hpcres train"]),
    "checkpoint cut": (cut("results/checkpoint.pt", 0.5), INFER, ["checkpoint.pt", "not a readable checkpoint"]),
    "checkpoint of another program": (
        lambda f: torch.save({"weights": 1}, f / "results/checkpoint.pt"),
        INFER,
        ["not an hpcres checkpoint"],
    ),
    "checkpoint NaN": (lambda f: rewrite_checkpoint(f, nan_weight), INFER, ["checkpoint.pt", "not finite"]),
    "checkpoint of a setting that is no more": (
        lambda f: rewrite_checkpoint(f, old_setting),
        INFER,
        ["checkpoint.pt", "training.old", "train again"],
    ),
    "checkpoint of a network that is no more": (
        lambda f: rewrite_checkpoint(f, lambda content: content["network"].update(old=1)),
        INFER,
        ["checkpoint.pt", "'old'", "train again"],
    ),
    "checkpoint of a family that is not known": (
        lambda f: rewrite_checkpoint(f, lambda content: content["network"].update(family="gan3000")),
        INFER,
        ["checkpoint.pt", "family 'gan3000'", "does not know"],
    ),
    "checkpoint of another phase count": (
        lambda f: checkpoint_of(f, "high_res.phases={0: pore, 1: solid}", "low_res.phases={0: pore, 1: solid}"),
        INFER,
        ["checkpoint.pt", "phases"],
    ),
    "checkpoint of another scale factor": (lambda f: checkpoint_of(f, "scale_factor=2"), INFER, ["scale factor"]),
    "infer unknown label": (
        image("low.tif", np.full((20, 18, 17), 7, np.uint8), photometric="minisblack"),
        INFER,
        ["low.tif", "7"],
    ),
    "tiles 0x1x1": (lambda f: None, [*INFER, "--tiles", "0x1x1"], ["0x1x1", "at least one"]),
    "tiles 2x2": (lambda f: None, [*INFER, "--tiles", "2x2"], ["2x2", "8x8x8"]),
    "store of another seed": (
        lambda f: painted(f),
        ["infer", "--set", "seed=5"],
        ["labels.zarr", "seed", "--overwrite"],
    ),
    "output is a foreign folder": (foreign_folder("results/labels.zarr"), ["infer"], ["labels.zarr"]),
    "overwriting a foreign folder": (foreign_folder("results/labels.zarr"), INFER, ["labels.zarr"]),
    # measuring
    "metrics before infer": (lambda f: None, ["metrics"], ["labels.zarr", "hpcres infer"]),
    "metrics missing volume": (lambda f: None, ["metrics", "nothing.tif"], ["nothing.tif", "no such file"]),
    "metrics of too many labels": (
        image("many.npy", np.arange(8000, dtype=np.uint8).reshape(20, 20, 20) % 40),
        ["metrics", "many.npy"],
        ["16"],
    ),
    "metrics voxel size": (lambda f: None, ["metrics", "low.tif", "--voxel-size", "big"], ["--voxel-size", "65 nm"]),
    "metrics scheduler file": (
        lambda f: None,
        ["metrics", "low.tif", "--scheduler", "none.json"],
        ["none.json", "--scheduler"],
    ),
    **{
        f"scheduler file {name}": (
            text("s.json", content),
            ["metrics", "low.tif", "--scheduler", "s.json"],
            ["--scheduler s.json: ", expected],
        )
        for name, content, expected in (
            *(
                (name, content, "is empty, half-written or not a file of `dask scheduler")
                for name, content in {
                    "empty": "",
                    "half-written": '{"type": "Scheduler", "id": "Sch',
                    "of another program": '{"jobs": [1]}',
                    "that is a list": "[]",
                    "with a null address": '{"address": null}',
                    "that is not JSON": "tcp",
                }.items()
            ),
            ("without a URL", '{"address": "node1"}', "holds no address of a scheduler"),
        )
    },
    "metrics onto its input": (
        lambda f: None,
        ["metrics", "low.tif", "--output", "low.tif", "--overwrite"],
        ["low.tif", "input", "lost"],
    ),
    "metrics onto another file": (
        text("notes.txt", "mine"),
        ["metrics", "low.tif", "--output", "notes.txt"],
        ["notes.txt", "not a metrics file"],
    ),
    "tortuosity onto another file": (
        text("notes.txt", "mine"),
        ["tortuosity", "low.tif", "--output", "notes.txt", "--overwrite"],
        ["notes.txt", "not a transport file"],
    ),
    "fields onto another folder": (
        foreign_folder("f.zarr"),
        ["tortuosity", "low.tif", "--field", "f.zarr", "--overwrite"],
        ["f.zarr", "fields"],
    ),
    "report onto another file": (
        text("notes.html", "<p>mine"),
        ["report", "low.tif", "--output", "notes.html"],
        ["notes.html", "not a page"],
    ),
    "convert onto another folder": (
        foreign_folder("mine"),
        ["convert", "low.tif", "--output", "mine", "--overwrite"],
        ["mine", "not a zarr"],
    ),
    "convert to a phase with a slash": (
        lambda f: None,
        ["convert", "low.tif", "--output", "o.zarr", "--phases", "0=a/b"],
        ["--phases", "'/'"],
    ),
    "train over a table of another program": (
        text("results/training.csv", "time,voltage\n"),
        TRAIN,
        ["training.csv", "not a table of hpcres train"],
    ),
    "train over a checkpoint of another program": (
        text("results/checkpoint.pt", "mine"),
        TRAIN,
        ["checkpoint.pt", "not a checkpoint of hpcres"],
    ),
    "phantom over other files": (
        both(
            append("phantom: {kind: three-phase, voxels: 64x64x64, slice_voxels: 64}\n"),
            foreign_folder("results/phantom"),
        ),
        ["phantom", "--overwrite"],
        ["phantom", "not a folder with a phantom"],
    ),
    "metrics output is a folder": (lambda f: None, ["metrics", "low.tif", "--output", "results"], ["is a folder"]),
    "settings without a study": (lambda f: None, ["metrics", "low.tif", "--set", "a.b=1"], ["not a study"]),
    "tortuosity of no phase": (lambda f: None, ["tortuosity", "low.tif", "--phase", "gold"], ["gold"]),
    "tortuosity crop": (lambda f: None, ["tortuosity", "low.tif", "--crop", "0:5"], ["crop", "0:5"]),
    "report before infer": (lambda f: None, ["report"], ["labels.zarr", "hpcres infer"]),
    # converting and phantoms
    "convert without output": (lambda f: None, ["convert", "low.tif"], ["--output"]),
    "convert onto what exists": (lambda f: None, ["convert", "low.tif", "--output", "results"], ["results", "exists"]),
    "convert large labels": (
        image("large.npy", np.full((8, 8, 8), 999, np.int32)),
        ["convert", "large.npy", "--output", "o.zarr"],
        ["999"],
    ),
    "convert bad phases": (
        lambda f: None,
        ["convert", "low.tif", "--output", "o.zarr", "--phases", "zero"],
        ["--phases", "0=pore"],
    ),
    "phantom not asked for": (lambda f: None, ["phantom"], ["phantom"]),
    "phantom of other phases": (
        append("phantom: {kind: chi2, voxels: 64x64x64}\n"),
        ["phantom", "--overwrite"],
        ["phantom", "phases"],
    ),
}


def run(arguments: list[str]) -> int:
    """The exit status of `hpcres ARGUMENTS`, run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hpcres", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_there_are_at_least_thirty():
    assert len(CASES) >= 30


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(name, good, capfd):
    spoil, command, words = CASES[name]
    spoil(good)
    before = listing(good)
    capfd.readouterr()
    status = run(command)
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert status == 2, said
    assert len(said) == 1, said
    assert "Traceback" not in said[0]
    for word in words:
        assert word in said[0]
    after = listing(good)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name, 0) != after.get(name, 0))
    assert not changed, "something was written, changed or lost"


WRITERS = [["infer"], ["train", "--overwrite"], ["phantom"], ["metrics", "low.tif", "--output", "m.json"]]


@pytest.mark.parametrize("command", WRITERS, ids=lambda command: command[0])
def test_full_disk_is_one_line_and_loses_nothing(command, good, capfd, monkeypatch):
    """Every file that is written in place of another appears by a rename, so that is where the disk fills up."""
    if command == ["phantom"]:
        append("phantom: {kind: three-phase, voxels: 64x64x64, slice_voxels: 64}\n")(good)
    before = listing(good)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "results")

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr("os.rename", full)
    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(Path, "rename", full)
    status = run(command)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hpcres:")]
    assert status == 2, lines
    assert len(lines) == 1
    assert "no space left" in lines[0]
    after = listing(good)
    assert all(after.get(name) == content for name, content in before.items())
    assert not [name for name in after if Path(name).name.startswith(".")], "what was half-made is left"
