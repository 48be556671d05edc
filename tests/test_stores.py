"""The store against its own rules, and as three other readers see it."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr
from small_volumes import labels, mode_by_counting, random_boxes

from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import UNWRITTEN
from hpcres.volumes.pyramid import coarsen_by_mode
from hpcres.volumes.stores import AgreementStore, LabelStore, Layout


@pytest.mark.parametrize("shape", [(8, 6, 4), (7, 5, 9), (1, 4, 3), (2, 1, 1)])
def test_the_pyramid_is_the_mode_with_ties_to_the_lowest(shape):
    for seed in range(4):
        array = labels(shape, values=(0, 1, 2, 3, 254)[: 2 + seed], seed=seed)
        np.testing.assert_array_equal(coarsen_by_mode(array), mode_by_counting(array))


# ---- the store ---------------------------------------------------------------------------------------------


def store_at(path: Path, shape=(70, 96, 150), shard=(32, 64, 64), chunk_voxels=16, codec="zstd", **options):
    given = {
        "voxel_size": (3.0, 2.0, 2.0),
        "unit": "nanometer",
        "phases": ["pore", "active", "binder"],
        "provenance": {"seed": 7},
    }
    return LabelStore.create(path, Layout(shape, shard, chunk_voxels, codec), **(given | options))


def fill(store: LabelStore, array: np.ndarray) -> None:
    for level in range(len(store.levels)):
        for box in store.shard_boxes(level):
            if level:
                store.write_coarser(level, box)
            else:
                store.write(0, box, array[box.slices])


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_shard_is_one_file_and_nothing_else_is_left(tmp_path):
    array = labels((70, 96, 150))
    store = store_at(tmp_path / "s.zarr")
    assert files(tmp_path) == {"s.zarr/zarr.json", "s.zarr/0/zarr.json"}
    assert len(store.shard_boxes(0)) == 3 * 2 * 3
    for number, box in enumerate(store.shard_boxes(0)):
        assert not store.is_written(0, box)
        store.write(0, box, array[box.slices])
        assert store.is_written(0, box)
        assert store.shard_path(0, box).is_file()
        assert len(files(tmp_path)) == 2 + number + 1
    expected = {f"s.zarr/0/c/{z}/{y}/{x}" for z in range(3) for y in range(2) for x in range(3)}
    assert files(tmp_path) == {"s.zarr/zarr.json", "s.zarr/0/zarr.json"} | expected
    np.testing.assert_array_equal(store.read(0, Box.whole(store.levels[0].shape)), array)
    volume = store.volume
    assert (volume.phases, volume.unit, volume.voxel_size) == (("pore", "active", "binder"), "nanometer", (3, 2, 2))
    for box in random_boxes(volume.shape, 4):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read(0, box), array[box.slices])


def test_bytes_depend_on_labels_alone_and_phase_0_is_written(tmp_path):
    array = labels((70, 96, 150))
    array[:32, :64, :64] = 0
    one, other = store_at(tmp_path / "a.zarr"), store_at(tmp_path / "b.zarr")
    boxes = one.shard_boxes(0)
    for box in boxes:
        one.write(0, box, array[box.slices])
    for box in reversed(boxes):
        other.write(0, box, np.ones(box.shape, np.uint8))  # written again, as a repair does
        other.shard_path(0, box).write_bytes(b"damaged")
        other.write(0, box, array[box.slices])
    for box in boxes:
        assert one.shard_path(0, box).read_bytes() == other.shard_path(0, box).read_bytes()
    assert one.is_written(0, boxes[0])


def test_the_layout_is_the_one_of_the_design(tmp_path):
    store_at(tmp_path / "s.zarr", codec="lz4")
    level = json.loads((tmp_path / "s.zarr/0/zarr.json").read_text())
    assert (level["zarr_format"], level["data_type"], level["fill_value"]) == (3, "uint8", 255)
    assert level["dimension_names"] == ["z", "y", "x"]
    assert level["chunk_grid"]["configuration"]["chunk_shape"] == [32, 64, 64]
    (sharding,) = level["codecs"]
    assert sharding["name"] == "sharding_indexed"
    inner = sharding["configuration"]
    assert inner["chunk_shape"] == [16, 16, 16]
    assert [c["name"] for c in inner["codecs"]] == ["bytes", "blosc"]
    assert inner["codecs"][1]["configuration"]["cname"] == "lz4"
    assert inner["codecs"][1]["configuration"]["shuffle"] == "bitshuffle"
    assert [c["name"] for c in inner["index_codecs"]] == ["bytes", "crc32c"]


@pytest.mark.parametrize(
    ("start", "stop", "words"),
    [
        ((16, 0, 0), (48, 64, 64), "writes z 16:48, which cuts shard 0:32"),
        ((0, 0, 0), (32, 64, 63), "writes x 0:63, which cuts shard 0:64"),
        ((0, 0, 0), (32, 80, 64), "writes y 0:80, which cuts shard 64:96"),
        ((64, 0, 0), (71, 64, 64), "writes z 64:71, which cuts shard 64:70"),
    ],
)
def test_a_misaligned_write_is_refused_with_the_numbers(start, stop, words, tmp_path):
    store = store_at(tmp_path / "s.zarr")
    before = files(tmp_path)
    with pytest.raises(InputError, match=words):
        store.write(0, Box(start, stop), np.zeros(Box(start, stop).shape, np.uint8))
    assert files(tmp_path) == before
    whole = Box((32, 0, 64), (70, 96, 150))  # several whole shards, up to the volume's odd end
    store.write(0, whole, np.zeros(whole.shape, np.uint8))
    assert len(files(tmp_path)) == len(before) + 2 * 2 * 2


def test_the_unwritten_reads_as_255_and_is_not_measured(tmp_path):
    store = store_at(tmp_path / "s.zarr")
    first = store.shard_boxes(0)[0]
    store.write(0, first, np.zeros(first.shape, np.uint8))
    box = Box((0, 0, 0), (32, 64, 65))
    assert (store.read(0, box)[..., :64] == 0).all()
    assert (store.read(0, box)[..., 64] == UNWRITTEN).all()
    assert (store.volume.read(first) == 0).all()
    with pytest.raises(InputError, match=f"{32 * 64} voxels of .* never written; run hpcres verify"):
        store.volume.read(box)


def test_pyramid_levels_shard_by_shard_are_the_pyramid_of_the_whole(tmp_path):
    array = labels((33, 70, 600), values=(0, 1))
    array[:, :, 300:] = 2
    store = store_at(tmp_path / "s.zarr", array.shape)
    assert [level.shape for level in store.levels] == [(33, 70, 600), (17, 35, 300), (9, 18, 150)]
    assert [level.voxel_size for level in store.levels] == [(3, 2, 2), (6, 4, 4), (12, 8, 8)]
    coarse_first = store.shard_boxes(1)[0]
    with pytest.raises(Unfinished, match="shards of level 0 are missing, the first is z 0:32"):
        store.write_coarser(1, coarse_first)
    fill(store, array)
    expected = array
    for level in range(3):
        np.testing.assert_array_equal(store.read(level, Box.whole(expected.shape)), expected)
        expected = mode_by_counting(expected)
    metadata = json.loads((tmp_path / "s.zarr/zarr.json").read_text())["attributes"]["ome"]
    # Voxel centres: coarse voxel 0 of level 2 covers fine voxels 0 … 3, so its centre is 1.5 voxels in.
    assert metadata["multiscales"][0]["datasets"][2]["coordinateTransformations"] == [
        {"type": "scale", "scale": [12.0, 8.0, 8.0]},
        {"type": "translation", "translation": [4.5, 3.0, 3.0]},
    ]


def test_create_is_atomic_and_overwrites_only_on_request(tmp_path, monkeypatch):
    path = tmp_path / "s.zarr"
    fill(store_at(path, (32, 64, 64)), labels((32, 64, 64)))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(InputError, match="exists already"):
        store_at(path)
    with pytest.raises(InputError, match="not whole chunks"):
        store_at(path, shard=(30, 64, 64), overwrite=True)
    monkeypatch.setattr(zarr.Group, "create_array", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        store_at(path, overwrite=True)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    monkeypatch.undo()
    store_at(path, overwrite=True)
    assert files(tmp_path) == {"s.zarr/zarr.json", "s.zarr/0/zarr.json"}
    assert os.listdir(tmp_path) == ["s.zarr"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a zarr"):
        store_at(tmp_path / "mine", overwrite=True)
    with pytest.raises(InputError, match="file is a file"):
        store_at(tmp_path / "file" / "s.zarr")
    zarr.create_array(str(tmp_path / "bare.zarr"), data=labels(), chunks=(8, 16, 16), zarr_format=2)
    with pytest.raises(InputError, match="no label store of hpcres"):
        LabelStore.open(tmp_path / "bare.zarr")
    with pytest.raises(InputError, match="no zarr array or group"):
        LabelStore.open(tmp_path / "mine")


def test_provenance_is_added_to(tmp_path):
    store = store_at(tmp_path / "s.zarr")
    store.set_provenance(weights="abc", failed=[1, 2])
    assert LabelStore.open(store.path).provenance == {"seed": 7, "weights": "abc", "failed": [1, 2]}
    assert store.volume.provenance == store.provenance
    assert len(LabelStore.open(store.path).levels) == 1


# ---- other readers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path, array = tmp_path_factory.mktemp("readers") / "labels.zarr", labels((40, 70, 300))
    fill(store_at(path, array.shape), array)
    return path, array


def test_ome_zarr_reads_it_as_labels(pyramid):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Label, Reader

    path, array = pyramid
    (node,) = Reader(parse_url(str(path)))()
    assert any(isinstance(spec, Label) for spec in node.specs)
    np.testing.assert_array_equal(np.asarray(node.data[0]), array)
    np.testing.assert_array_equal(np.asarray(node.data[1]), coarsen_by_mode(array))
    assert [node.metadata["properties"][i]["name"] for i in range(3)] == ["pore", "active", "binder"]


def test_ngff_zarr_validates_it(pyramid):
    import ngff_zarr

    path, array = pyramid
    images = ngff_zarr.from_ngff_zarr(str(path), validate=True).images
    np.testing.assert_array_equal(np.asarray(images[0].data), array)
    assert images[0].scale == {"z": 3.0, "y": 2.0, "x": 2.0}
    assert images[1].translation == {"z": 1.5, "y": 1.0, "x": 1.0}
    assert set(images[0].axes_units.values()) == {"nanometer"}


def test_shares_are_an_intensity_image_with_a_pyramid_by_mean(tmp_path):
    import ngff_zarr

    shares = np.random.default_rng(2).integers(1, 256, (301, 37, 50)).astype(np.uint8)
    path = tmp_path / "agreement.zarr"
    store = AgreementStore.create(
        path,
        Layout(shares.shape, (32, 64, 64), 16),
        voxel_size=2.0,
        unit="nanometer",
        phases=(),
        provenance={"seed": 7},
    )
    with pytest.raises(InputError, match="never written"):
        open_volume(path).read(Box.whole(shares.shape))
    fill(store, shares)
    padded = np.pad(shares.astype(float), [(0, n % 2) for n in shares.shape], constant_values=np.nan)
    mean = np.nanmean(padded.reshape(151, 2, 19, 2, 25, 2), (1, 3, 5))
    np.testing.assert_array_equal(store.read(1, Box.whole(mean.shape)), np.floor(mean + 0.5))
    np.testing.assert_array_equal(open_volume(path).read(Box.whole(shares.shape)), shares)
    images = ngff_zarr.from_ngff_zarr(str(path), validate=True).images
    np.testing.assert_array_equal(np.asarray(images[0].data), shares)
    assert type(pickle.loads(pickle.dumps(AgreementStore.open(path)))) is AgreementStore
    with pytest.raises(InputError, match="holds agreement where labels are due"):
        LabelStore.open(path)
    assert "image-label" not in json.loads((path / "zarr.json").read_text())["attributes"]["ome"]


def test_napari_shows_labels(pyramid):
    from napari_ome_zarr import napari_get_reader

    path, array = pyramid
    reader = napari_get_reader(str(path))
    assert reader
    ((levels, options, kind),) = reader(str(path))
    assert kind == "labels"
    np.testing.assert_array_equal(np.asarray(levels[0]), array)
    assert options["properties"]["name"] == ["pore", "active", "binder"]
    assert list(options["scale"]) == [3.0, 2.0, 2.0]
