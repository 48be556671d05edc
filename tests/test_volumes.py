"""Volumes of every format against the arrays they were written from, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from small_volumes import SHAPE, labels, mode_by_counting, random_boxes

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.lengths import Length, VoxelEdges, cubic
from hpcres.study import RawHeader
from hpcres.volumes import convert as converting
from hpcres.volumes.convert import convert
from hpcres.volumes.formats import open_volume, read_images
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.tiff import write_images
from hpcres.volumes.volume import Volume, array_volume

# ---- every format in ---------------------------------------------------------------------------------------


def tiff(**options):
    def write(path: Path, array: np.ndarray) -> str:
        tifffile.imwrite(path / "a.tif", array, **options)
        return str(path / "a.tif")

    return write


def tiff_page_by_page(path: Path, array: np.ndarray, **options) -> str:
    with tifffile.TiffWriter(path / "pages.tiff") as file:
        for page in array:
            file.write(page, contiguous=False, **options)
    return str(path / "pages.tiff")


def tiff_plain_pages(path: Path, array: np.ndarray) -> str:
    return tiff_page_by_page(path, array, metadata=None, compression="zlib", rowsperstrip=7)


def npy(path: Path, array: np.ndarray) -> str:
    np.save(path / "a.npy", array)
    return str(path / "a.npy")


def npy_fortran(path: Path, array: np.ndarray) -> str:
    return npy(path, np.asfortranarray(array))


def hdf5(path: Path, array: np.ndarray) -> str:
    with h5py.File(path / "a.h5", "w") as file:
        file.create_dataset("scan/labels", data=array[None], chunks=(1, 8, 16, 16), compression="gzip")
    return f"{path / 'a.h5'}:/scan/labels"


def bare_zarr(path: Path, array: np.ndarray) -> str:
    zarr.create_array(str(path / "a.zarr"), data=array, chunks=(8, 16, 16), zarr_format=2)
    return str(path / "a.zarr")


def ome_zarr(version: str):
    def write(path: Path, array: np.ndarray) -> str:
        units = [{"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"]
        multiscale = {
            "axes": [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}, *units],
            "datasets": [
                {"path": name, "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 2 * f, f, f]}]}
                for name, f in (("full", 0.5), ("half", 1.0))
            ],
        }
        content = {"multiscales": [multiscale | {"version": version}]}
        group = zarr.create_group(
            str(path / "o.zarr"),
            zarr_format=2 if version == "0.4" else 3,
            attributes=content if version == "0.4" else {"ome": content},
        )
        group.create_array("full", data=array[None, None], chunks=(1, 1, 8, 16, 16))
        group.create_array("half", data=array[None, None, ::2, ::2, ::2], chunks=(1, 1, 8, 16, 16))
        return str(path / "o.zarr")

    return write


FORMATS = {
    "tiff": tiff(),
    "tiff-deflate": tiff(compression="zlib"),
    "tiff-tiled-bigtiff": tiff(compression="zlib", tile=(16, 32), bigtiff=True, predictor=True),
    "tiff-tiled-uncompressed": tiff(tile=(16, 32)),
    "tiff-volumetric": tiff(compression="zlib", tile=(16, 16, 32), volumetric=True),
    "tiff-big-endian": tiff(byteorder=">"),
    "tiff-imagej": tiff(imagej=True, metadata={"axes": "ZYX"}),
    "tiff-one-ifd": tiff(truncate=True),
    "tiff-series-a-page": tiff_page_by_page,
    "tiff-pages": tiff_plain_pages,
    "npy": npy,
    "npy-fortran": npy_fortran,
    "hdf5": hdf5,
    "zarr": bare_zarr,
    "ome-zarr-0.4": ome_zarr("0.4"),
    "ome-zarr-0.5": ome_zarr("0.5"),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_box_of_any_format_is_the_array(name, dtype, tmp_path):
    array = labels(dtype=dtype, values=(0, 7, 200))
    volume = open_volume(FORMATS[name](tmp_path, array))
    again = pickle.loads(pickle.dumps(volume))
    assert volume.shape == SHAPE
    assert volume.dtype == dtype
    for box in random_boxes(SHAPE):
        part = volume.read(box)
        assert part.dtype == dtype
        assert part.flags.c_contiguous
        np.testing.assert_array_equal(part, array[box.slices])
        np.testing.assert_array_equal(again.read(box), array[box.slices])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "bool"])
def test_label_types(dtype, tmp_path):
    array = labels(dtype=dtype, values=(0, 1) if dtype == "bool" else (0, 3, 77 if dtype[0] == "u" else -5))
    for place, write in enumerate((npy, hdf5, bare_zarr, tiff(compression="zlib"))):
        folder = tmp_path / str(place)
        folder.mkdir()
        volume = open_volume(write(folder, array))
        assert volume.dtype == (np.uint8 if dtype == "bool" else dtype)
        np.testing.assert_array_equal(volume.read(Box.whole(SHAPE)), array)


@pytest.mark.parametrize("order", ["little", "big"])
def test_raw_with_a_header(order, tmp_path):
    array = labels(dtype=np.int16, values=(-3, 0, 900))
    path = tmp_path / "a.raw"
    path.write_bytes(b"header" + array.astype(">i2" if order == "big" else "<i2").tobytes())
    header = RawHeader(shape=SHAPE, dtype="int16", byte_order=order, offset_bytes=6)
    volume = pickle.loads(pickle.dumps(open_volume(path, header)))
    for box in random_boxes(SHAPE):
        np.testing.assert_array_equal(volume.read(box), array[box.slices])
    with pytest.raises(InputError, match=f"{array.nbytes + 6} bytes.* needs {array.nbytes + 7}"):
        open_volume(path, header.model_copy(update={"offset_bytes": 7}))


def test_voxel_sizes_come_from_the_file_where_it_has_them(tmp_path):
    array = labels()
    imagej = {"axes": "ZYX", "spacing": 0.5, "unit": "um"}
    tifffile.imwrite(tmp_path / "ij.tif", array, imagej=True, resolution=(4, 5), metadata=imagej)
    assert open_volume(tmp_path / "ij.tif").voxel_size == pytest.approx((0.5, 0.2, 0.25))
    ome = {f"PhysicalSize{a}": v for a, v in zip("ZYX", (90.0, 65.0, 60.0), strict=True)}
    ome |= {f"PhysicalSize{a}Unit": "nm" for a in "ZYX"}
    tifffile.imwrite(tmp_path / "a.ome.tif", array, metadata={"axes": "ZYX", **ome})
    volume = open_volume(tmp_path / "a.ome.tif")
    assert (volume.voxel_size, volume.unit) == ((90, 65, 60), "nanometer")
    path = hdf5(tmp_path, array)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["scan/labels"].attrs["element_size_um"] = [3, 2, 1]
    assert open_volume(path).voxel_size == (3, 2, 1)
    volume = open_volume(ome_zarr("0.5")(tmp_path, array))
    assert (volume.voxel_size, volume.unit) == ((1, 0.5, 0.5), "micrometer")
    # Dots per inch say nothing of a sample.
    tifffile.imwrite(tmp_path / "dpi.tif", array, resolution=(300, 300), resolutionunit="INCH")
    assert open_volume(tmp_path / "dpi.tif").voxel_size is None


def test_a_box_of_a_tiled_tiff_reads_only_its_tiles(tmp_path, monkeypatch):
    array = labels((40, 256, 256))
    path = tiff(compression="zlib", tile=(64, 64))(tmp_path, array)
    volume = open_volume(path)
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: read.append(size) or real(fd, size, offset))
    volume.read(Box((10, 70, 70), (14, 100, 140)))  # 4 pages, one row of tiles, two columns
    assert len(read) == 4 * 1 * 2
    assert sum(read) < os.path.getsize(path) / 40


def test_threads_may_share_a_volume(tmp_path):
    array = labels()
    for name in ("tiff-deflate", "hdf5", "zarr"):
        volume = open_volume(FORMATS[name](tmp_path, array))
        boxes = random_boxes(SHAPE, 60)
        with ThreadPoolExecutor(4) as pool:
            for box, part in zip(boxes, pool.map(volume.read, boxes), strict=True):
                np.testing.assert_array_equal(part, array[box.slices])


def test_images_keep_their_slices(tmp_path):
    stack = labels((3, 30, 40), values=(0, 128, 255))
    write_images(tmp_path / "stack.tif", stack)
    np.testing.assert_array_equal(read_images(tmp_path / "stack.tif"), stack)
    np.testing.assert_array_equal(read_images(npy(tmp_path, stack[0])), stack[:1])
    tifffile.imwrite(tmp_path / "one.tif", stack[0])
    np.testing.assert_array_equal(read_images(tmp_path / "one.tif"), stack[:1])
    Image.fromarray(stack[0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_images(tmp_path / "grey.png"), stack[:1])
    indexed = Image.fromarray(stack[0] // 100, "P")
    indexed.putpalette([10, 20, 30, 250, 0, 0, 0, 250, 0])
    indexed.save(tmp_path / "indexed.png")
    np.testing.assert_array_equal(read_images(tmp_path / "indexed.png"), stack[:1] // 100)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(InputError, match="colour image"):
        read_images(tmp_path / "rgb.png")


# ---- what is refused ---------------------------------------------------------------------------------------


def faulty(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Path and the words its refusal must have."""
    array = labels()

    def saved(name: str, content: np.ndarray, **options) -> str:
        tifffile.imwrite(tmp_path / name, content, **options)
        return str(tmp_path / name)

    def written(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    def cut(name: str, share: float, **options) -> str:
        whole = Path(saved(f"whole-{name}", array, **options)).read_bytes()
        return written(name, whole[: int(len(whole) * share)])

    def numpy(name: str, content: np.ndarray) -> str:
        np.save(tmp_path / name, content)
        return str(tmp_path / name)

    with tifffile.TiffWriter(tmp_path / "sizes.tif") as file:
        file.write(array[0])
        file.write(array[0, :9])
    (tmp_path / "folder").mkdir()
    group = zarr.create_group(str(tmp_path / "group.zarr"))
    group.create_array("first", data=array)
    (tmp_path / "broken.zarr").mkdir()
    for name, codec in (("codec2", {"id": "jpegxl"}), ("codec3", {"name": "wavpack", "configuration": {}})):
        coded = tmp_path / f"{name}.zarr"
        zarr.create_array(str(coded), data=array, zarr_format=int(name[-1]))
        described = coded / (".zarray" if name == "codec2" else "zarr.json")
        content = json.loads(described.read_text())
        content |= {"compressor": codec} if name == "codec2" else {"codecs": [*content["codecs"][:-1], codec]}
        described.write_text(json.dumps(content))
    zarr.create_array(str(tmp_path / "text.zarr"), data=np.array([[["a"]]], "S1"), zarr_format=2)
    newer = zarr.create_group(str(tmp_path / "newer.zarr"))
    newer.create_array("0", data=array)
    newer.attrs["ome"] = {"multiscales": [{"coordinateSystems": [], "datasets": [{"path": "0"}]}]}
    written("broken.zarr/zarr.json", b"{ no json")
    swapped = Path(ome_zarr("0.5")(tmp_path, array))
    meta = json.loads((swapped / "zarr.json").read_text())
    meta["attributes"]["ome"]["multiscales"][0]["axes"].reverse()
    (swapped / "zarr.json").write_text(json.dumps(meta))
    corrupt = bytearray(Path(tiff(compression="zlib")(tmp_path, array)).read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as first:
        start = first.pages[0].dataoffsets[0]
    corrupt[start : start + 40] = b"\xff" * 40
    return {
        "missing": (str(tmp_path / "no.tif"), "no such file"),
        "missing h5": (str(tmp_path / "no.h5:/a"), "no such file"),
        "empty": (written("empty.tif", b""), "is empty"),
        "suffix": (written("a.jpg", b"x"), "no volume format"),
        "no TIFF": (written("junk.tif", b"abcd" * 99), "corrupt"),
        "float TIFF": (saved("float.tif", array.astype("f4") / 2), "holds 0.5 at voxel .*float32 grey.*segment it"),
        "float NPY": (numpy("float.npy", array / 3), "float64 grey values.*segment it first"),
        "not a number": (numpy("nan.npy", array * np.nan), "holds nan at voxel z 0, y 0, x 0"),
        "float too large": (numpy("much.npy", array + 1e10), "holds 1e\\+10 at voxel"),
        "complex": (numpy("complex.npy", array * 1j), "not integer labels"),
        "RGB": (saved("rgb.tif", np.zeros((20, 20, 3), "u1"), photometric="rgb"), "colour image"),
        "RGB stack": (saved("rgbs.tif", np.zeros((5, 20, 20, 3), "u1"), photometric="rgb"), "colour image"),
        "2D TIFF": (saved("flat.tif", array[0]), "2D image.*3D volume is due"),
        "one page of Fiji": (saved("page.tif", array[:1], imagej=True), "2D image.*3D volume is due"),
        "one page of OME": (saved("page.ome.tif", array[:1], ome=True, metadata={"axes": "ZYX"}), "2D image"),
        "2D NPY": (numpy("flat.npy", array[0]), "2D image.*3D volume is due"),
        "4D": (numpy("time.npy", np.stack([array, array])), "4 axes"),
        "channels": (saved("c.tif", array[:4], imagej=True, metadata={"axes": "CYX"}), "channels"),
        "no voxels": (numpy("none.npy", array[:0]), "no voxels"),
        "sizes": (str(tmp_path / "sizes.tif"), "different sizes"),
        "no such image": (str(tmp_path / "sizes.tif:2"), "no image 2 in it; it has .*sizes.tif:0 .*sizes.tif:1"),
        "cut plain": (cut("c1.tif", 0.6), "truncated or corrupt"),
        "cut at the end": (cut("c2.tif", 0.97, truncate=True), "truncated or corrupt"),
        "cut deflate": (cut("c3.tif", 0.6, compression="zlib"), "truncated or corrupt"),
        "cut tiles": (cut("c4.tif", 0.9, compression="zlib", tile=(16, 16)), "truncated or corrupt"),
        "bad deflate": (written("bad.tif", bytes(corrupt)), "truncated or corrupt.*page 0"),
        "cut NPY": (written("cut.npy", Path(npy(tmp_path, array)).read_bytes()[:500]), "truncated or corrupt"),
        "pickled NPY": (numpy("object.npy", np.array([{}, 1])), "holds Python objects"),
        "cut HDF5": (written("cut.h5", Path(hdf5(tmp_path, array)[:-13]).read_bytes()[:900]) + ":/a", "truncated"),
        "no dataset": (str(tmp_path / "a.h5"), "names no dataset; it has /scan/labels"),
        "wrong dataset": (str(tmp_path / "a.h5:/scan"), "no dataset /scan in it; it has /scan/labels"),
        "raw": (written("a.raw", b"123"), "raw file has no header"),
        "no zarr": (str(tmp_path / "folder"), "no zarr array or group"),
        "group": (str(tmp_path / "group.zarr"), "without OME multiscales.* of first"),
        "zarr 2 codec": (str(tmp_path / "codec2.zarr"), "codec that is not installed .*jpegxl"),
        "zarr 3 codec": (str(tmp_path / "codec3.zarr"), "codec that is not installed .*wavpack"),
        "zarr of text": (str(tmp_path / "text.zarr"), "holds text"),
        "OME-Zarr 0.6": (str(tmp_path / "newer.zarr"), "has coordinateSystems"),
        "broken zarr": (str(tmp_path / "broken.zarr"), "truncated or corrupt"),
        "axes": (str(swapped), "has axes x, y, z, c, t .* 50 channels"),
    }


def test_each_fault_is_one_line_with_its_place(tmp_path, caplog):
    for name, (path, words) in faulty(tmp_path).items():
        with pytest.raises(InputError, match=words) as caught:
            open_volume(path)
        message = str(caught.value)
        assert message.startswith(path.split(":/")[0]), name
        assert "\n" not in message, name
        assert ";" in message, f"{name}: no remedy in {message}"
        assert not caplog.records, name


def test_damage_found_while_reading_is_said_too(tmp_path):
    array = labels()
    path = tiff(compression="zlib")(tmp_path, array)
    content = bytearray(Path(path).read_bytes())
    with tifffile.TiffFile(path) as file:
        start = file.pages[20].dataoffsets[0]
    content[start : start + 30] = bytes(30)
    Path(path).write_bytes(content)
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.read(Box((0, 0, 0), (20, 50, 67))), array[:20])
    with pytest.raises(InputError, match="page 20"):
        volume.read(Box.whole(SHAPE))
    with pytest.raises(InputError, match="leaves the volume of 21 × 50 × 67"):
        volume.read(Box((0, 0, 0), (22, 50, 67)))


# ---- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"])
def test_phases_are_positions_in_the_list(dtype):
    limits = np.iinfo(dtype)
    values = [7, 0, int(limits.max), int(limits.min) or 3]
    array = labels((9, 8, 7), dtype=dtype, values=values, seed=3)
    truth = np.array([values.index(v) for v in array.ravel().tolist()]).reshape(array.shape)
    got = PhaseMap([*values, 2**40, -(2**40)], "a.tif").index(array)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, truth)


@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_an_unknown_label_is_named_and_counted(dtype):
    array = np.array([[[0, 1, -4, -4, 9]]], dtype)
    with pytest.raises(InputError, match=r"a\.tif: label -4 occurs in 2 voxels \(and 1 other labels, 1 voxels\)"):
        PhaseMap([0, 1], "a.tif").index(array)


# ---- conversion --------------------------------------------------------------------------------------------


def watched(volume: Volume, boxes: list[Box]) -> Volume:
    inner = volume._read
    return Volume(volume.path, volume.shape, volume.dtype, volume.chunks, lambda box: boxes.append(box) or inner(box))


def test_convert_streams_and_maps(tmp_path, monkeypatch):
    array = labels((70, 130, 300), np.int16, (-1, 300, 85))
    read: list[Box] = []
    seen: list[tuple[int, int]] = []
    source = watched(array_volume(array, "scan.tif"), read)
    store = convert(
        source,
        tmp_path / "o.zarr",
        phases={-1: "pore", 85: "active", 300: "binder"},
        voxel_size=cubic(Length(65, "nanometer")),
        chunk_voxels=16,
        progress=lambda *at: seen.append(at),
    )
    truth = np.select([array == 85, array == 300], [1, 2], 0)
    np.testing.assert_array_equal(store.volume.read(Box.whole(array.shape)), truth)
    np.testing.assert_array_equal(store.read(1, Box.whole(store.levels[1].shape)), mode_by_counting(truth))
    assert store.volume.phases == ("pore", "active", "binder")
    assert max(box.voxels for box in read) == 32 * 130 * 300
    assert sum(box.voxels for box in read) == array.size
    monkeypatch.setattr(converting, "_SLAB_BYTES", 1000)
    read.clear()
    again = convert(source, tmp_path / "p.zarr", phases={-1: "p", 85: "a", 300: "b"}, chunk_voxels=16)
    assert max(box.voxels for box in read) == 32 * 32 * 300
    np.testing.assert_array_equal(again.volume.read(Box.whole(array.shape)), truth)
    assert seen[-1] == (len(seen), len(seen))
    assert sorted(os.listdir(tmp_path)) == ["o.zarr", "p.zarr"]


def test_convert_without_phases_keeps_values_and_names(tmp_path):
    array = labels(values=(0, 85, 170))
    source = open_volume(tiff(compression="zlib")(tmp_path, array))
    kept = convert(source, tmp_path / "k.zarr")
    np.testing.assert_array_equal(kept.volume.read(Box.whole(SHAPE)), array)
    colours = json.loads((tmp_path / "k.zarr/zarr.json").read_text())["attributes"]["ome"]["image-label"]["colors"]
    assert [c["label-value"] for c in colours] == [0, 85, 170]
    meters = VoxelEdges(*(Length(edge, "meter") for edge in (1, 2, 3)))
    named = convert(source, tmp_path / "n.zarr", phases={85: "a", 0: "b", 170: "c"}, voxel_size=meters)
    copied = convert(named.volume, tmp_path / "c.zarr").volume
    assert (copied.phases, copied.voxel_size, copied.unit) == (("a", "b", "c"), (1, 2, 3), "meter")


def test_convert_leaves_nothing_behind_when_it_fails(tmp_path):
    array = labels(values=(0, 1))
    array[-1, -1, -1] = 255
    source = array_volume(array, "scan.tif")
    with pytest.raises(InputError, match="label 255 does not fit a store of 0 … 254; map the labels"):
        convert(source, tmp_path / "o.zarr", chunk_voxels=16)
    with pytest.raises(InputError, match="label 255 occurs in 1 voxels and has no phase"):
        convert(source, tmp_path / "o.zarr", phases={0: "a", 1: "b"}, chunk_voxels=16)
    with pytest.raises(InputError, match="label -1 does not fit"):
        convert(array_volume(np.full((2, 2, 2), -1, np.int8), "scan.tif"), tmp_path / "o.zarr")
    assert os.listdir(tmp_path) == []


def test_real_images_where_they_are(tmp_path):
    data = Path(os.environ.get("HPCRES_DATA", "../shared/data"))
    if not data.is_dir():
        pytest.skip("no HPCRES_DATA")
    volume = open_volume(data / "electrode.tiff")
    assert volume.shape == (256, 256, 256)
    store = convert(volume, tmp_path / "e.zarr", phases={0: "pore", 85: "active", 170: "binder"})
    counts = np.bincount(store.volume.read(Box.whole(volume.shape)).ravel(), minlength=3)
    shares = counts / counts.sum()
    np.testing.assert_allclose(shares, [0.449917, 0.400466, 0.149616], atol=5e-7)
    assert read_images(data / "SOFC_hr_input.tif").shape == (1, 1024, 1024)
    assert open_volume(data / "SOFC_hr_input.tif").shape == (1, 1024, 1024)  # it says three axes
    assert open_volume(data / "Separator_lr_input.tif").shape == (156, 75, 75)
