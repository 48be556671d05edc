"""Axes that a file names are put into the order z, y, x or refused; thin volumes; several images in one file."""

from __future__ import annotations

import json
import uuid
from itertools import permutations
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from small_volumes import random_boxes

from hpcres.errors import InputError
from hpcres.volumes.absent import absent_chunks
from hpcres.volumes.axes import arranged
from hpcres.volumes.formats import open_volume, read_images

SHAPE = (5, 9, 7)
LABELS = np.random.default_rng(0).integers(0, 3, SHAPE, np.uint8)


def is_it(path: Path | str, array: np.ndarray) -> None:
    """Every box read from `path` is that of the array (z, y, x)."""
    volume = open_volume(path)
    assert volume.shape == array.shape, path
    for box in random_boxes(array.shape, 6):
        np.testing.assert_array_equal(volume.read(box), array[box.slices], str(path))


def stored(axes: str) -> np.ndarray:
    return LABELS.transpose(["ZYX".index(axis) for axis in axes])


def tags(axes: str) -> str:
    """As vigra.AxisTags.toJSON writes them and ilastik stores them."""
    kinds = {"c": 1, "t": 8}
    every = [{"key": a, "typeFlags": kinds.get(a, 2), "resolution": 0, "description": ""} for a in axes.lower()]
    return json.dumps({"axes": every})


# ---- named axes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["".join(p) for p in permutations("ZYX")])
def test_any_order_of_named_axes_is_the_volume(axes, tmp_path):
    array = stored(axes)
    for compression in (None, "zlib"):
        tifffile.imwrite(tmp_path / "a.tif", array, compression=compression, metadata={"axes": axes})
        is_it(tmp_path / "a.tif", LABELS)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in ("tags", "labels", "scales"):
            file.create_dataset(name, data=array, chunks=(2, 3, 4))
        file["tags"].attrs["axistags"] = tags(axes)
        for number, axis in enumerate(axes.lower()):
            file["labels"].dims[number].label = axis.upper()
            file[axis] = np.arange(array.shape[number])
            file[axis].make_scale()
            file["scales"].dims[number].attach_scale(file[axis])
    for name in ("tags", "labels", "scales"):
        is_it(f"{tmp_path}/a.h5:/{name}", LABELS)
    zarr.create_array(str(tmp_path / "a.zarr"), data=array, chunks=(2, 3, 4), dimension_names=tuple(axes.lower()))
    is_it(tmp_path / "a.zarr", LABELS)
    two = zarr.create_array(str(tmp_path / "two.zarr"), data=array, chunks=(2, 3, 4), zarr_format=2)
    two.attrs["_ARRAY_DIMENSIONS"] = list(axes.lower())  # as xarray does
    is_it(tmp_path / "two.zarr", LABELS)
    two = zarr.create_array(str(tmp_path / "none.zarr"), data=LABELS, dimension_names=("dim_0", "dim_1", "dim_2"))
    is_it(tmp_path / "none.zarr", LABELS)  # what xarray calls axes without names


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_ome_zarr_in_another_order_has_its_sizes_in_ours(version, tmp_path):
    content = {
        "multiscales": [
            {
                "axes": [{"name": "c"}, *({"name": axis, "unit": "nanometer"} for axis in "yxz")],
                "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 2, 1, 30]}]}],
            }
        ]
    }
    group = zarr.create_group(
        str(tmp_path / "a.zarr"),
        zarr_format=2 if version == "0.4" else 3,
        attributes=content if version == "0.4" else {"ome": content},
    )
    group.create_array("0", data=stored("YXZ")[None], chunks=(1, 4, 4, 2))
    is_it(tmp_path / "a.zarr", LABELS)
    volume = open_volume(tmp_path / "a.zarr")
    assert (volume.voxel_size, volume.unit, volume.chunks) == ((30, 2, 1), "nanometer", (2, 4, 4))


def test_channels_of_one_fall_away_wherever_they_stand(tmp_path):
    for axes in ("CZYX", "ZCYX", "ZYXC", "TCZYX", "TZYXC"):
        array = LABELS.reshape([{"Z": 5, "Y": 9, "X": 7}.get(axis, 1) for axis in axes])
        tifffile.imwrite(tmp_path / "a.tif", array, compression="zlib", metadata={"axes": axes})
        is_it(tmp_path / "a.tif", LABELS)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file["named"] = file["bare"] = array
            file["named"].attrs["axistags"] = tags(axes)
        is_it(f"{tmp_path}/a.h5:/named", LABELS)
        is_it(f"{tmp_path}/a.h5:/bare", LABELS)
        np.save(tmp_path / "a.npy", array)
        is_it(tmp_path / "a.npy", LABELS)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ("TYX", "5 frames"),
        ("CYX", "5 channels"),
        ("TZYX", "2 frames"),
        ("ZCYX", "2 channels"),
        ("YXA", "has axes y, x, a"),
    ],
)
def test_frames_channels_and_other_axes_are_refused(axes, words, tmp_path):
    array = LABELS if len(axes) == 3 else np.stack([LABELS, LABELS], axis=min(axes.find("T") % 3, axes.find("C") % 3))
    tifffile.imwrite(tmp_path / "a.tif", array, metadata={"axes": axes})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = array
        for number, axis in enumerate(axes):
            file["a"].dims[number].label = axis.lower()
    paths = [f"{tmp_path}/a.tif", f"{tmp_path}/a.h5:/a"]
    if "A" not in axes:
        tifffile.imwrite(tmp_path / "ij.tif", array, imagej=True, metadata={"axes": axes})
        tifffile.imwrite(tmp_path / "a.ome.tif", array, ome=True, metadata={"axes": axes})
        paths += [f"{tmp_path}/ij.tif", f"{tmp_path}/a.ome.tif"]
    for path in paths:
        with pytest.raises(InputError, match=words) as caught:
            open_volume(path)
        assert str(caught.value).startswith(path)


@pytest.mark.parametrize("order", ["XYZCT", "XYCZT", "XYTZC", "XYZTC", "XYCTZ", "XYTCZ"])
def test_any_order_of_ome_dimensions(order, tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", LABELS, ome=True, metadata={"axes": "ZYX", "DimensionOrder": order})
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        assert f'DimensionOrder="{order}"' in file.ome_metadata
    is_it(tmp_path / "a.ome.tif", LABELS)


def test_axes_without_names_are_read_where_only_one_reading_is_left():
    assert arranged("a", (1, 5, 9, 7, 1)).places == (1, 2, 3)
    assert arranged("a", (5, 1, 9, 7)).places == (0, 2, 3)
    assert arranged("a", (1, 1, 9, 7)).shape == (1, 9, 7)
    assert arranged("a", (5, 9, 1, 1)).shape == (5, 9, 1)
    assert arranged("a", (9, 7, 1), flat=True).shape == (1, 9, 7)
    assert arranged("a", (1, 9, 7, 1), flat=True).shape == (1, 9, 7)
    with pytest.raises(InputError, match=r"4 axes \(1 × 9 × 7 × 1\) without names.* not clear"):
        arranged("a", (1, 9, 7, 1))  # one plane with a channel, or a channel of a column


# ---- thin volumes ------------------------------------------------------------------------------------------

WRITERS = {
    "tifffile": {},
    "axes": {"metadata": {"axes": "ZYX"}},
    "tiles": {"tile": (16, 16)},
    "strips": {"rowsperstrip": 5},
    "big-endian": {"byteorder": ">", "bigtiff": True},
    "ome": {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeZ": 2.0}},
}


@pytest.mark.parametrize("compression", [None, "zlib", "lzw", "zstd", "packbits", "lzma"])
@pytest.mark.parametrize("writer", WRITERS)
def test_volumes_of_one_voxel_along_an_axis_in_every_encoding(writer, compression, tmp_path):
    path = tmp_path / ("a.ome.tif" if writer == "ome" else "a.tif")
    for shape in ((1, 9, 7), (5, 1, 7), (5, 9, 1), (1, 1, 7), (1, 9, 1), (5, 1, 1), SHAPE):
        array = LABELS[tuple(map(slice, shape))]
        tifffile.imwrite(path, array, compression=compression, photometric="minisblack", **WRITERS[writer])
        is_it(path, array)


def test_thin_volumes_in_arrays(tmp_path):
    for number, shape in enumerate(((1, 9, 7), (5, 1, 7), (5, 9, 1), (1, 1, 7), (5, 1, 1))):
        array = LABELS[tuple(map(slice, shape))]
        np.save(tmp_path / "a.npy", array)
        is_it(tmp_path / "a.npy", array)
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("a", data=array, compression="gzip")
        is_it(f"{tmp_path}/a.h5:/a", array)
        zarr.create_array(str(tmp_path / f"{number}.zarr"), data=array)
        is_it(tmp_path / f"{number}.zarr", array)
        if shape[0] > 1:
            tifffile.imwrite(tmp_path / "a.tif", array, metadata=None)  # pages without any description
            is_it(tmp_path / "a.tif", array)


def test_an_imagej_description_of_more_slices_than_there_are_is_refused(tmp_path):
    """tifffile writes so what has one column: twelve slices in the words, one page of twelve rows in the file."""
    tifffile.imwrite(tmp_path / "a.tif", LABELS[:, :, :1], imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(InputError, match="ImageJ series metadata invalid"):
        open_volume(tmp_path / "a.tif")


# ---- several images in one file ----------------------------------------------------------------------------


def test_one_of_two_volumes_in_a_tiff_is_named(tmp_path):
    path = tmp_path / "two.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for array, name, size in ((LABELS, "scan", 1.0), (LABELS[::-1], "mask", 3.0)):
            sizes = {f"PhysicalSize{axis}": size for axis in "XYZ"}
            file.write(array, metadata={"axes": "ZYX", "Name": name, **sizes})
    with pytest.raises(InputError, match=r"holds 2 images; name one of .*:0 \(ZYX 5 × 9 × 7, scan\), .*:1 .* mask\)"):
        open_volume(path)
    is_it(f"{path}:0", LABELS)
    is_it(f"{path}:1", LABELS[::-1])
    is_it(f"{path}:mask", LABELS[::-1])
    assert open_volume(f"{path}:mask").voxel_size == (3, 3, 3)
    with pytest.raises(InputError, match=r"no image 2 in it"):
        open_volume(f"{path}:2")


def test_two_plain_stacks_in_a_tiff_are_not_joined(tmp_path):
    with tifffile.TiffWriter(tmp_path / "two.tif") as file:
        file.write(LABELS, compression="zlib")
        file.write(LABELS[::-1], compression="zlib")
    with pytest.raises(InputError, match="holds 2 images; name one"):
        open_volume(tmp_path / "two.tif")
    is_it(f"{tmp_path}/two.tif:1", LABELS[::-1])
    with tifffile.TiffWriter(tmp_path / "thin.tif") as file:
        file.write(LABELS[:, :, :1], compression="zlib")
        file.write(LABELS[:, :, 1:2], compression="zlib")
    with pytest.raises(InputError, match="holds 2 images; name one"):
        open_volume(tmp_path / "thin.tif")
    is_it(f"{tmp_path}/thin.tif:1", LABELS[:, :, 1:2])
    with tifffile.TiffWriter(tmp_path / "planes.ome.tif", ome=True) as file:
        for plane in LABELS:
            file.write(plane)
    with pytest.raises(InputError, match="holds 5 images"):
        open_volume(tmp_path / "planes.ome.tif")  # OME-XML says that each is an image of its own
    np.testing.assert_array_equal(read_images(tmp_path / "planes.ome.tif"), LABELS)
    np.testing.assert_array_equal(read_images(f"{tmp_path}/planes.ome.tif:2"), LABELS[2:3])


def test_only_volumes_are_offered_of_the_images_in_a_tiff(tmp_path):
    path = tmp_path / "a.ome.tif"
    images = [("ZYX", LABELS, "scan"), ("YX", LABELS[0], "thumbnail"), ("CZYX", np.stack([LABELS] * 2), "two")]
    with tifffile.TiffWriter(path, ome=True) as file:
        for axes, array, name in (*images, ("ZYX", LABELS[::-1], "mask")):
            file.write(array, metadata={"axes": axes, "Name": name})
    with pytest.raises(InputError) as caught:
        open_volume(path)
    assert str(caught.value) == (
        f"{path}: holds 4 images of different sizes or types; name one of {path}:0 (ZYX 5 × 9 × 7, scan), "
        f"{path}:3 (ZYX 5 × 9 × 7, mask); the others are not a volume"
    )
    is_it(f"{path}:0", LABELS)
    is_it(f"{path}:mask", LABELS[::-1])
    with pytest.raises(InputError, match=r"a.ome.tif:2: has axes c, z, y, x of .* 2 channels"):
        open_volume(f"{path}:2")
    with pytest.raises(InputError, match=r"name one of [^;]*:0 [^;]*:1 [^;]*:3 [^;]*; the others are not a stack of"):
        read_images(path)
    np.testing.assert_array_equal(read_images(f"{path}:thumbnail"), LABELS[:1])


def test_a_tiff_of_several_images_without_a_volume_gives_the_reason(tmp_path):
    """tifffile takes planes without axes for channels, as in the OME-TIFFs of many scripts."""
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(LABELS)
        file.write(LABELS[::-1])
    with pytest.raises(InputError, match=r"holds 2 images, none of them a volume; .*a.ome.tif:0: has .* 5 channels"):
        open_volume(path)


def test_one_of_two_images_in_an_ome_zarr_is_named(tmp_path):
    group = zarr.create_group(str(tmp_path / "two.zarr"), zarr_format=3)
    images = []
    for name, array in (("a", LABELS), ("b", LABELS[::-1])):
        group.create_array(name, data=array, chunks=SHAPE)
        images.append({"name": name, "axes": [{"name": x} for x in "zyx"], "datasets": [{"path": name}]})
    group.attrs["ome"] = {"version": "0.5", "multiscales": images}
    with pytest.raises(InputError, match=r"holds 2 images; name one of .*two.zarr:0 \(a\), .*two.zarr:1 \(b\)"):
        open_volume(tmp_path / "two.zarr")
    is_it(f"{tmp_path}/two.zarr:1", LABELS[::-1])
    is_it(f"{tmp_path}/two.zarr:a", LABELS)
    (tmp_path / "two.zarr" / "b" / "c" / "0" / "0" / "0").unlink()
    assert absent_chunks(open_volume(f"{tmp_path}/two.zarr:a")) == []
    assert [(one.absent, one.chunks) for one in absent_chunks(open_volume(f"{tmp_path}/two.zarr:1"))] == [(1, 1)]


def test_an_image_over_several_ome_tiffs(tmp_path):
    names = [f"urn:uuid:{uuid.uuid4()}" for _ in LABELS]
    planes = "".join(
        f'<TiffData IFD="0" FirstZ="{z}" PlaneCount="1"><UUID FileName="s{z}.ome.tif">{name}</UUID></TiffData>'
        for z, name in enumerate(names)
    )
    for z, name in enumerate(names):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{name}"><Image ID="Image:0"><Pixels '
            'ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="7" SizeY="9" SizeZ="5" SizeC="1" SizeT="1" '
            f'PhysicalSizeX="1" PhysicalSizeY="1" PhysicalSizeZ="2">{planes}</Pixels></Image></OME>'
        )
        tifffile.imwrite(tmp_path / f"s{z}.ome.tif", LABELS[z], description=xml, metadata=None)
    is_it(tmp_path / "s0.ome.tif", LABELS)
    (tmp_path / "s3.ome.tif").unlink()
    with pytest.raises(InputError, match=r"the file 's3.ome.tif' that it names is missing"):
        open_volume(tmp_path / "s0.ome.tif")


# ---- images ------------------------------------------------------------------------------------------------


def test_images_in_another_order_and_with_a_channel(tmp_path):
    for axes, array in (("XY", LABELS[0].T), ("YX", LABELS[0]), ("YXC", LABELS[0][..., None]), ("CYX", LABELS[:1])):
        tifffile.imwrite(tmp_path / "a.tif", array, metadata={"axes": axes})
        np.testing.assert_array_equal(read_images(tmp_path / "a.tif"), LABELS[:1])
    tifffile.imwrite(tmp_path / "a.tif", LABELS, imagej=True, metadata={"axes": "TYX"})
    np.testing.assert_array_equal(read_images(tmp_path / "a.tif"), LABELS)  # slices may be frames
    tifffile.imwrite(tmp_path / "a.tif", LABELS, imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(InputError, match="5 channels"):
        read_images(tmp_path / "a.tif")
