"""What files say of their voxel sizes, against what ImageJ, OME and NGFF mean by it, and what commands make of it."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import ngff_zarr
import numpy as np
import ome_zarr.writer
import pytest
import tifffile
import yaml
import zarr
from click.testing import CliRunner
from PIL import Image
from scipy.ndimage import gaussian_filter
from test_transport import direct

from hpcres.cli import commands
from hpcres.cli.console import with_options
from hpcres.errors import InputError
from hpcres.lengths import MICROMETERS, Length, cubic, edges_of, parse_length, parse_voxel_edges, unit_name
from hpcres.study.file import load_study
from hpcres.volumes.formats import open_images, open_volume
from hpcres.volumes.sizes import compare_sizes

SHAPE = (5, 6, 7)
LABELS = np.random.default_rng(0).integers(0, 3, SHAPE, np.uint8)
UM = "micrometer"


def said(path: Path | str) -> tuple:
    """Edges z, y, x in micrometers, `voxel` ratios as text, None where unknown."""
    return tuple(
        None if e is None else f"{e.length:g}" if e.unit == "voxel" else pytest.approx(e.micrometers, rel=1e-9)
        for e in open_volume(path).edges.each
    )


# ---- lengths -----------------------------------------------------------------------------------------------


def test_every_unit_of_ome_is_the_length_it_is():
    """UnitsLength of the OME schema 2016-06, in meters; and the spellings of users, ImageJ and UDUNITS."""
    ome = {
        "Ym": 1e24,
        "Zm": 1e21,
        "Em": 1e18,
        "Pm": 1e15,
        "Tm": 1e12,
        "Gm": 1e9,
        "Mm": 1e6,
        "km": 1e3,
        "hm": 1e2,
        "dam": 1e1,
        "m": 1.0,
        "dm": 1e-1,
        "cm": 1e-2,
        "mm": 1e-3,
        "µm": 1e-6,
        "nm": 1e-9,
        "pm": 1e-12,
        "fm": 1e-15,
        "am": 1e-18,
        "zm": 1e-21,
        "ym": 1e-24,
        "Å": 1e-10,
        "thou": 2.54e-5,
        "li": 0.0254 / 12,
        "in": 0.0254,
        "ft": 0.3048,
        "yd": 0.9144,
        "mi": 1609.344,
        "ua": 149597870700.0,
        "ly": 9460730472580800.0,
        "pc": 3.0856775814913673e16,
        "pt": 0.0254 / 72,
    }
    for symbol, meters in ome.items():
        name = unit_name(symbol)
        assert name is not None, symbol
        assert MICROMETERS[name] == pytest.approx(meters * 1e6, rel=1e-12), symbol
        assert parse_length(str(Length(2.5, name))) == Length(2.5, name)
    for text in ("um", "\u03bcm", "\u00b5m", r"\u00B5m", "micron", "Microns", "micrometers", "micrometre", " um\0"):
        assert unit_name(text) == UM, text
    for text, name in {
        "\u212b": "angstrom",
        "Ångström": "angstrom",
        "angstroms": "angstrom",
        "inches": "inch",
        "feet": "foot",
        "Nanometres": "nanometer",
        "centimeters": "centimeter",
        "pixels": "voxel",
        "reference frame": "voxel",
        "sec": None,
        "MM": None,
        "": None,
    }.items():
        assert unit_name(text) == name, text


def test_one_or_three_lengths():
    assert parse_voxel_edges("65nm") == cubic(Length(65, "nanometer"))
    three = parse_voxel_edges(" 2um, 0.25 microns,250 nanometres")
    assert three.lengths("a") == ((2, 0.25, 0.25), UM)
    assert parse_voxel_edges("2um,1cm,1Å").each[2] == Length(1, "angstrom")
    assert parse_voxel_edges("4voxel,1voxel,1voxel").lengths("a") == ((4, 1, 1), "unit")
    for text, words in {
        "65": "no length with a unit",
        "1um,2um": "2 lengths",
        "1um,2um,3": "no length with a unit",
        "1um,0um,1um": "positive",
        "1um,1voxel,1um": "mixes",
        "-1um": "positive",
        "1ells": "use one of nm",
        "": "no length",
    }.items():
        with pytest.raises(ValueError, match=words):
            parse_voxel_edges(text)


def test_what_is_partly_known_is_no_length():
    known = edges_of([None, 0.25, 0.25], ["um"] * 3)
    with pytest.raises(InputError, match=r"a.tif: the voxel size along z is not known \(y 0.25 µm, x 0.25 µm\)"):
        known.lengths("a.tif")
    assert edges_of([None] * 3, ["um"] * 3).lengths("a") == ((1, 1, 1), "voxel")
    assert edges_of([4, 1, 1], ["pixel"] * 3).lengths("a") == ((4, 1, 1), "unit")
    assert edges_of([None, 3, 3], [None] * 3).lengths("a") == ((1, 1, 1), "voxel")  # a square says nothing
    assert edges_of([4, 1, 1], ["um", "ells", "ells"]).missing == ["y", "x"]
    assert edges_of([4, 0, float("nan")], ["um"] * 3).missing == ["y", "x"]
    assert edges_of([1, 1, 1], ["um", "mm", "cm"]).lengths("a") == ((1, 1e3, 1e4), UM)


# ---- ImageJ ------------------------------------------------------------------------------------------------

# What ImageJ's FileSaver writes, the resolution (y, x) and its unit (1 none, 2 inch, 3 cm), and the edges in µm.
IMAGEJ = {
    "depth 1": ("unit=um", (4, 4), 1, (1, 0.25, 0.25)),
    "spacing": ("unit=um\nspacing=0.5", (5, 4), 1, (0.5, 0.2, 0.25)),
    "negative spacing": ("unit=um\nspacing=-0.5", (5, 4), 1, (0.5, 0.2, 0.25)),
    "escaped": ("unit=\\u00B5m\nspacing=0.5", (4, 4), 1, (0.5, 0.25, 0.25)),
    "micron": ("unit=micron\nspacing=2.0", (4, 4), 1, (2, 0.25, 0.25)),
    "zunit": ("unit=um\nzunit=nm\nspacing=50.0", (4, 4), 1, (0.05, 0.25, 0.25)),
    "zunit, depth 1": ("unit=nm\nzunit=um", (0.02, 0.02), 1, (1, 0.05, 0.05)),
    "yunit": ("unit=um\nyunit=nm\nspacing=0.5", (0.004, 4), 1, (0.5, 0.25, 0.25)),
    "cm": ("unit=cm\nspacing=0.001", (2000, 4000), 3, (10, 5, 2.5)),
    "cm, depth 1": ("unit=cm", (2, 2), 3, (1e4, 5e3, 5e3)),
    "inch": ("unit=inch\nspacing=0.01", (100, 100), 2, (254, 254, 254)),
    "um, resolution in cm": ("unit=um\nspacing=0.5", (4e4, 4e4), 3, (0.5, 0.25, 0.25)),
    "um, resolution in inch": ("unit=um\nspacing=0.5", (4, 4), 2, (0.5, 0.25, 0.25)),
    "nm": ("unit=nm\nspacing=20.0", (0.1, 0.1), 1, (0.02, 0.01, 0.01)),
    "mm": ("unit=mm\nspacing=0.01", (100, 100), 1, (10, 10, 10)),
    "pixel": ("unit=pixel\nspacing=4.0", (1, 1), 1, ("4", "1", "1")),
    "pixel, depth 1": ("unit=pixel", (1, 1), 1, (None, None, None)),
    "no unit": ("spacing=4.0", (1, 1), 1, ("4", "1", "1")),
    "nothing": ("loop=false", (1, 1), 1, (None, None, None)),
    "zunit unknown": ("unit=um\nzunit=ells\nspacing=2.0", (4, 4), 1, (None, 0.25, 0.25)),
    "spacing 0": ("unit=um\nspacing=0", (4, 4), 1, (None, 0.25, 0.25)),
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", IMAGEJ)
def test_imagej(name, order, tmp_path):
    description, (y, x), unit, due = IMAGEJ[name]
    tifffile.imwrite(
        tmp_path / "a.tif",
        LABELS,
        resolution=(x, y),
        resolutionunit=unit,
        metadata=None,
        software="",
        byteorder=order,
        description=f"ImageJ=1.54f\nimages=5\nslices=5\n{description}\nloop=false\n",
    )
    assert said(tmp_path / "a.tif") == due


def test_imagej_as_tifffile_writes_it(tmp_path):
    for more, due in (({}, 1), ({"spacing": 0.1}, 0.1)):
        tifffile.imwrite(
            tmp_path / "a.tif", LABELS, imagej=True, resolution=(4, 5), metadata={"axes": "ZYX", "unit": "um", **more}
        )
        assert said(tmp_path / "a.tif") == (due, 0.2, 0.25)
    # The same words in tifffile's own description; without a spacing the third edge is not known.
    tifffile.imwrite(tmp_path / "b.tif", LABELS, resolution=(4, 5), metadata={"unit": "um", "spacing": 2})
    assert said(tmp_path / "b.tif") == (2, 0.2, 0.25)
    tifffile.imwrite(tmp_path / "b.tif", LABELS, resolution=(4, 5), metadata={"unit": "um"})
    assert said(tmp_path / "b.tif") == (None, 0.2, 0.25)


def test_resolution_tags_alone(tmp_path):
    """ImageJ takes those of up to 10 µm for the sample's; coarser ones are dots of a print, and say a ratio only."""
    for resolution, unit, due in (
        ((300, 300), 2, (None, None, None)),
        ((4e4, 2e4), 3, (None, 0.5, 0.25)),
        ((254000, 254000), 2, (None, 0.1, 0.1)),
        ((4, 4), 1, (None, None, None)),
        ((300, 150), 2, (None, "0.00666667", "0.00333333")),
    ):
        tifffile.imwrite(tmp_path / "a.tif", LABELS, metadata=None, resolution=resolution, resolutionunit=unit)
        assert said(tmp_path / "a.tif") == due
    assert "print" in open_volume(tmp_path / "a.tif").edges.note
    for dots, due in ((300, (None, None, None)), (254000, (None, 0.1, 0.1))):
        Image.fromarray(LABELS[0]).save(tmp_path / "a.png", dpi=(dots, dots))
        edges = open_images(tmp_path / "a.png").edges
        assert [e and pytest.approx(e.micrometers, rel=1e-3) for e in edges.each] == list(due)


# ---- OME-TIFF ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "due"),
    [
        ({"Z": (1.0, "µm"), "Y": (250.0, "nm"), "X": (250.0, "nm")}, (1, 0.25, 0.25)),
        ({"Z": (2e-4, "cm"), "Y": (1e-5, "dm"), "X": (1e-6, "m")}, (2, 1, 1)),
        ({"Z": (20.0, "Å"), "Y": (1.0, "thou"), "X": (1.0, "pm")}, (0.002, 25.4, 1e-6)),
        ({"Z": (3.0, None), "Y": (2.0, None), "X": (1.0, None)}, (3, 2, 1)),  # µm where the unit is left out
        ({"Y": (250.0, "nm"), "X": (0.25, None)}, (None, 0.25, 0.25)),
        ({"Z": (1.0, "pixel"), "Y": (0.5, "pixel"), "X": (0.5, "pixel")}, ("1", "0.5", "0.5")),
        ({"Z": (1.0, "reference frame"), "Y": (0.5, "µm"), "X": (0.5, "µm")}, (None, 0.5, 0.5)),
        ({}, (None, None, None)),
    ],
)
def test_ome_tiff(sizes, due, tmp_path):
    metadata = {"axes": "ZYX"}
    for axis, (size, unit) in sizes.items():
        metadata |= {f"PhysicalSize{axis}": size} | ({f"PhysicalSize{axis}Unit": unit} if unit else {})
    tifffile.imwrite(tmp_path / "a.ome.tif", LABELS, ome=True, metadata=metadata)
    assert said(tmp_path / "a.ome.tif") == due


# ---- OME-Zarr, HDF5 ----------------------------------------------------------------------------------------


def ome(path: Path, units: list, scales: list[list[float]], version: str = "0.5", over: list | None = None) -> Path:
    """An image of `scales` by level; `over` is the scale of the whole."""
    axes = [{"name": axis, **({"unit": unit} if unit else {})} for axis, unit in zip("zyx", units, strict=True)]
    placed = [
        {
            "path": str(n),
            "coordinateTransformations": [
                {"type": "scale", "scale": scale},
                {"type": "translation", "translation": [9, 9, 9]},
            ],
        }
        for n, scale in enumerate(scales)
    ]
    image = {"axes": axes, "datasets": placed, "version": version}
    image |= {"coordinateTransformations": [{"type": "scale", "scale": over}]} if over else {}
    content = {"multiscales": [image]}
    group = zarr.create_group(
        str(path),
        zarr_format=2 if version == "0.4" else 3,
        overwrite=True,
        attributes=content if version == "0.4" else {"ome": content},
    )
    for n in range(len(scales)):
        group.create_array(str(n), data=LABELS[:: n + 1, :: n + 1, :: n + 1], chunks=SHAPE)
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr(version, tmp_path):
    path = tmp_path / "a.zarr"
    assert said(ome(path, [UM, "nanometer", "nanometer"], [[1, 250, 250]], version)) == (1, 0.25, 0.25)
    assert said(ome(path, ["um", "micron", "µm"], [[1, 0.25, 0.25]], version)) == (1, 0.25, 0.25)
    assert said(ome(path, [UM] * 3, [[2, 0.5, 0.5], [4, 1, 1]], version, [0.5] * 3)) == (1, 0.25, 0.25)
    assert said(path / "1") == (2, 0.5, 0.5)  # a level of the image by its name
    assert said(ome(path, [None] * 3, [[2, 1, 1]], version)) == ("2", "1", "1")
    assert said(ome(path, [UM, None, None], [[2, 1, 1]], version)) == (2, None, None)
    assert said(ome(path, ["second", UM, UM], [[2, 1, 1]], version)) == (None, 1, 1)
    ome(path, [UM] * 3, [[1, 1]], version)
    with pytest.raises(InputError, match="scale has 2 numbers for 3 axes"):
        open_volume(path)


def test_ome_zarr_as_others_write_it(tmp_path):
    units, scale = {"z": UM, "y": "nanometer", "x": "nanometer"}, {"z": 1.0, "y": 250.0, "x": 250.0}
    ome_zarr.writer.write_image(
        LABELS, str(tmp_path / "a.zarr"), axes="zyx", scale_factors=[], scale=scale, axes_units=units
    )
    assert said(tmp_path / "a.zarr") == (1, 0.25, 0.25)
    image = ngff_zarr.to_ngff_image(LABELS, dims=("z", "y", "x"), scale=scale, axes_units=units)
    ngff_zarr.to_ngff_zarr(str(tmp_path / "b.zarr"), ngff_zarr.to_multiscales(image, scale_factors=[]), version="0.4")
    assert said(tmp_path / "b.zarr") == (1, 0.25, 0.25)


def test_hdf5(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("fiji", "ilastik", "other"):
            file[name] = LABELS
        file["turned"] = LABELS.transpose(2, 1, 0)
        file["fiji"].attrs["element_size_um"] = [3.0, 2.0, 1.0]
        resolution = {"z": 30.0, "y": 20.0, "x": 0.01}
        tags = {"axes": [{"key": axis, "typeFlags": 2, "resolution": resolution[axis]} for axis in "zyx"]}
        file["ilastik"].attrs["axistags"] = json.dumps(tags)
        file["ilastik"].attrs["axis_units"] = json.dumps({"z": "nm", "y": "nm", "x": "um"})
        file["turned"].attrs["axistags"] = json.dumps({"axes": tags["axes"][::-1]})
        file["turned"].attrs["element_size_um"] = [3.0, 2.0, 1.0]
    assert said(f"{tmp_path}/a.h5:/fiji") == (3, 2, 1)
    assert said(f"{tmp_path}/a.h5:/ilastik") == (0.03, 0.02, 0.01)
    assert said(f"{tmp_path}/a.h5:/other") == (None, None, None)
    with pytest.raises(InputError, match="element_size_um is of z, y, x and its axes are x, y, z"):
        open_volume(f"{tmp_path}/a.h5:/turned")


# ---- commands ----------------------------------------------------------------------------------------------

EDGES = (1.0, 0.25, 0.25)


@pytest.fixture(scope="module")
def blobs() -> np.ndarray:
    rng = np.random.default_rng(3)
    a, b = (gaussian_filter(rng.standard_normal((8, 14, 12)), (0.8, 1.5, 1.5)) for _ in range(2))
    return np.where(a > 0, 1, np.where(b > 0.1, 2, 0)).astype(np.uint8)


def hpcres(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, or the InputError as 2, and the output and error of a command in this process."""
    result = CliRunner().invoke(commands, [str(a) for a in arguments])
    if isinstance(result.exception, InputError):
        return 2, result.stdout, with_options(str(result.exception))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_tortuosity_takes_the_edge_of_each_axis(blobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("fiji.tif", blobs, imagej=True, resolution=(4, 4), metadata={"axes": "ZYX", "unit": "um"})
    np.save("bare.npy", blobs)
    tifffile.imwrite("pixel.tif", blobs, metadata=None, description="ImageJ=1.54f\nslices=8\nimages=8\nspacing=4.0\n")
    due = [direct(blobs, {1: 1.0}, axis, EDGES) for axis in range(3)]
    cube = [direct(blobs, {1: 1.0}, axis) for axis in range(3)]
    for arguments, right, line in (
        (["fiji.tif"], due, ""),
        (["fiji.tif", "--voxel-size", "65nm"], cube, "fiji.tif: --voxel-size 65 nm overrides the file's own, 1 "),
        (["fiji.tif", "--voxel-size", "1 um,250nm,0.25microns"], due, ""),
        (["bare.npy"], cube, "bare.npy: gives no voxel size; lengths are in voxels"),
        (["bare.npy", "--voxel-size", "4um,1um,1um"], due, ""),
        (["pixel.tif"], due, "pixel.tif: gives only the ratio of the voxel edges"),
        (["pixel.tif", "--voxel-size", "65nm"], cube, "pixel.tif: --voxel-size 65 nm overrides the file's own, 4 "),
        (["pixel.tif", "--voxel-size", "40nm,10nm,10nm"], due, ""),
    ):
        written = ("--phase", "1", "--rtol", "1e-6", "--output", "t.json", "--overwrite")
        status, _, said = hpcres("tortuosity", *arguments, *written)
        assert status == 0
        assert said.startswith(line) if line else "voxel" not in said, said
        found = [each["D_rel"] for each in json.loads(Path("t.json").read_text())["volume"]["results"]]
        assert found == pytest.approx(right, rel=2e-6), arguments


def test_metrics_take_the_edge_of_each_axis(blobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite(
        "a.ome.tif",
        blobs,
        ome=True,
        metadata={
            "axes": "ZYX",
            "PhysicalSizeX": 250.0,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 250.0,
            "PhysicalSizeYUnit": "nm",
            "PhysicalSizeZ": 1.0,
            "PhysicalSizeZUnit": "µm",
        },
    )
    np.save("bare.npy", blobs)
    four = np.stack([blobs[:, a : 13 + a, b : 11 + b] for a in (0, 1) for b in (0, 1)])
    edges = [np.count_nonzero([len(np.unique(c)) > 2 for c in four.reshape(4, -1).T])]  # along z
    for axis in (1, 2):
        v = np.moveaxis(blobs, axis, 0)
        four = np.stack([v[:, a : v.shape[1] - 1 + a, b : v.shape[2] - 1 + b] for a in (0, 1) for b in (0, 1)])
        edges.append(np.count_nonzero([len(np.unique(c)) > 2 for c in four.reshape(4, -1).T]))
    tpb = sum(n * h for n, h in zip(edges, EDGES, strict=True)) / (blobs.size * np.prod(EDGES))
    for source, more in (("a.ome.tif", []), ("bare.npy", ["--voxel-size", "1um,250nm,0.00025mm"])):
        without = [
            x
            for s in ("correlations", "chords", "connectivity", "spectrum", "representative")
            for x in ("--without", s)
        ]
        status, out, _ = hpcres("metrics", source, *more, *without, "--json")
        found = json.loads(out)["volume"]
        assert status == 0
        assert found["tpb"]["density"] == pytest.approx(tpb, rel=1e-12)
        assert (found["voxel_size"], found["voxel_unit"]) == ([1, 0.25, 0.25], UM)


@pytest.mark.parametrize("command", ["metrics", "tortuosity", "convert", "report"])
def test_lengths_of_a_volume_partly_known_are_refused(command, blobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    tifffile.imwrite("a.ome.tif", blobs, ome=True, metadata=sizes)
    output = ["--output", "o.zarr"] if command == "convert" else []
    status, _, said = hpcres(command, "a.ome.tif", *output)
    assert status == 2
    assert said.startswith("a.ome.tif: the voxel size along z is not known (y 0.25 µm, x 0.25 µm)")
    assert "--voxel-size" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ome.tif"]


def test_convert_keeps_edges_that_differ(blobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("fiji.tif", blobs, imagej=True, resolution=(4, 4), metadata={"axes": "ZYX", "unit": "um"})
    assert hpcres("convert", "fiji.tif", "--output", "a.zarr")[0] == 0
    assert said("a.zarr") == EDGES
    assert hpcres("convert", "fiji.tif", "--output", "b.zarr", "--voxel-size", "2um,1um,0.5um")[0] == 0
    assert said("b.zarr") == (2, 1, 0.5)
    tifffile.imwrite("pixel.tif", blobs, metadata=None, description="ImageJ=1.54f\nslices=8\nimages=8\nspacing=4.0\n")
    assert hpcres("convert", "pixel.tif", "--output", "c.zarr")[0] == 0
    assert said("c.zarr") == ("4", "1", "1")


# ---- beside the study --------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path) -> Path:
    """Voxels of 65 nm, low-res 260 nm; the files say so, each in its way."""
    fine, coarse = {"unit": "nm"}, {"unit": "nm", "spacing": 260.0}
    tifffile.imwrite(
        tmp_path / "slice.tif", np.zeros((80, 80), "u1"), imagej=True, resolution=(1 / 65, 1 / 65), metadata=fine
    )
    tifffile.imwrite(
        tmp_path / "low.tif",
        np.zeros((20, 20, 20), "u1"),
        imagej=True,
        resolution=(1 / 260, 1 / 260),
        metadata={"axes": "ZYX", **coarse},
    )
    tifffile.imwrite(
        tmp_path / "truth.ome.tif",
        np.zeros((20, 20, 20), "u1"),
        ome=True,
        metadata={"axes": "ZYX", **{f"PhysicalSize{axis}": 0.065 for axis in "XYZ"}},
    )
    phases = {0: "pore", 1: "solid"}
    content = {
        "name": "s",
        "scale_factor": 4,
        "low_res": {"path": "low.tif", "phases": phases},
        "high_res": {"phases": phases, "voxel_size": "65 nm", "images": [{"path": "slice.tif"}]},
        "reference": {"volume": "truth.ome.tif"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "study.yaml"


def compared(study: Path, *settings: str) -> list[str]:
    loaded = load_study(study, settings)
    assert loaded.low_res.path
    return compare_sizes(loaded, low_res=open_volume(loaded.low_res.path), images=True, reference=True)


def test_what_agrees_within_two_percent_goes_on(study):
    assert compared(study) == []
    assert compared(study, "high_res.voxel_size=66.2 nm") == []
    with pytest.raises(InputError, match="its voxels are 260 nm along z"):
        compared(study, "high_res.voxel_size=66.4 nm")


def test_each_file_that_says_another_size_is_named_with_both_numbers(study):
    with pytest.raises(
        InputError,
        match=r"low.tif: its voxels are 260 nm along z, but in the study high_res.voxel_size"
        r" × scale_factor is 520 nm \(65 nm × 8\); .* allow_voxel_size_mismatch: true",
    ):
        compared(study, "scale_factor=8")
    folder = study.parent
    with pytest.raises(InputError, match=r"slice.tif: its voxels are 65 nm along y, .* is 0.13 µm; correct"):
        compared(study, "high_res.voxel_size=0.13 um", "scale_factor=2")
    lines = compared(study, "high_res.voxel_size=0.13 um", "scale_factor=2", "allow_voxel_size_mismatch=true")
    assert [line.split(":")[0].split("/")[-1] for line in lines] == ["slice.tif", "truth.ome.tif"]
    tifffile.imwrite(
        folder / "low.tif",
        np.zeros((20, 20, 20), "u1"),
        metadata=None,
        description="ImageJ=1.54f\nslices=20\nimages=20\nunit=pixel\nspacing=2.0\n",
    )
    with pytest.raises(InputError, match=r"low.tif: its voxels are not cubes \(2 × 1 × 1 voxel\)"):
        compared(study)
    np.save(folder / "low.npy", np.zeros((20, 20, 20), "u1"))
    assert compared(study, f"low_res.path={folder}/low.npy") == []  # says nothing


def test_slices_of_a_report_have_the_aspect_and_the_scale_of_their_axes(blobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("fiji.tif", blobs, imagej=True, resolution=(4, 2), metadata={"axes": "ZYX", "unit": "um"})
    without = [
        x for s in ("correlations", "chords", "connectivity", "spectrum", "representative") for x in ("--without", s)
    ]
    assert hpcres("metrics", "fiji.tif", *without, "--output", "metrics.json")[0] == 0
    assert hpcres("report", "fiji.tif")[0] == 0
    page = Path("report.html").read_text(encoding="utf-8")
    # 8 × 14 × 12 voxels of 1 × 0.5 × 0.25 µm: planes yx, zx, zy as wide and high as they are.
    for wide, high in ((3, 7), (3, 8), (7, 8)):
        assert f"aspect-ratio:{wide}/{high}" in page
    assert page.count("1 µm</div>") == 2  # at most a third of the image's width: of 3, 3 and 7 µm
    assert page.count("2 µm</div>") == 1
