"""HDF5 files as other programs leave them: links, virtual datasets, filters, locks, and what holds no numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_bad_input import good, run, template  # noqa: F401

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.study.file import load_study
from hpcres.volumes.absent import absent_chunks, absent_chunks_of_study
from hpcres.volumes.formats import open_volume
from hpcres.volumes.hdf5 import unwritten_chunks

SHAPE = (6, 9, 7)
LABELS = np.random.default_rng(0).integers(0, 3, SHAPE, np.uint8)


@pytest.fixture
def source(tmp_path) -> Path:
    with h5py.File(tmp_path / "source.h5", "w") as file:
        file["deep/labels"] = LABELS
    return tmp_path / "source.h5"


def is_it(path: str) -> None:
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.read(Box.whole(volume.shape)), LABELS)


def test_hard_soft_and_external_links_are_followed(source, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["first/labels"] = LABELS
        file["second/labels"] = file["first/labels"]
        file["soft"] = h5py.SoftLink("/first/labels")
        file["folder"] = h5py.SoftLink("/first")
        file["far"] = h5py.ExternalLink("source.h5", "/deep/labels")
        file["far folder"] = h5py.ExternalLink("source.h5", "/deep")
        file["chain"] = h5py.SoftLink("/far")
    for name in ("first/labels", "second/labels", "soft", "folder/labels", "far", "far folder/labels", "chain"):
        is_it(f"{tmp_path}/a.h5:/{name}")


def test_links_that_lead_nowhere_say_where(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["labels"] = LABELS
        file["soft"] = h5py.SoftLink("/gone")
        file["far"] = h5py.ExternalLink("gone.h5", "/labels")
    with pytest.raises(InputError, match=r"a.h5:/soft: /soft is a link to /gone, which is not in it"):
        open_volume(f"{tmp_path}/a.h5:/soft")
    with pytest.raises(InputError, match=r"a.h5:/far: /far is a link to gone.h5:/labels, which is not there"):
        open_volume(f"{tmp_path}/a.h5:/far")
    with pytest.raises(InputError, match=r"a.h5:/other: no dataset /other in it; it has /labels"):
        open_volume(f"{tmp_path}/a.h5:/other")


def virtual(path: Path, parts: list[tuple[str, str]], shape=(12, 9, 7), fill: int = 0) -> str:
    layout = h5py.VirtualLayout(shape, "u1")
    for place, (file, name) in enumerate(parts):
        layout[6 * place : 6 * place + 6] = h5py.VirtualSource(file, name, SHAPE)
    with h5py.File(path, "a") as file:
        file["own"] = LABELS
        file.create_virtual_dataset("v", layout, fillvalue=fill)
    return f"{path}:/v"


def test_a_virtual_dataset_is_read_where_all_its_sources_are_there(source, tmp_path, monkeypatch):
    path = virtual(tmp_path / "v.h5", [("source.h5", "deep/labels"), (".", "own")])
    monkeypatch.chdir("/")
    volume = open_volume(path)
    np.testing.assert_array_equal(volume.read(Box.whole(volume.shape)), np.concatenate([LABELS, LABELS]))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([("source.h5", "deep/labels"), ("gone.h5", "d")], r"whose source gone.h5:/d is missing"),
        ([("gone/gone.h5", "d"), ("source.h5", "deep/labels")], r"whose source gone/gone.h5:/d is missing"),
        ([("source.h5", "deep/labels"), ("source.h5", "d")], r"source source.h5:/d has no such dataset"),
        ([("source.h5", "deep/labels"), (".", "d")], r"source .:/d has no such dataset"),
        ([("source.h5", "deep/labels")], r"sources cover 378 of 756 voxels"),
    ],
)
def test_a_virtual_dataset_that_would_read_as_its_fill_value_is_refused(parts, words, source, tmp_path):
    path = virtual(tmp_path / "v.h5", parts)
    with h5py.File(tmp_path / "v.h5") as file:
        assert not file["v"][6:].any() or not file["v"][:6].any()  # what HDF5 itself makes of it
    with pytest.raises(InputError, match=words) as caught:
        open_volume(path)
    assert str(caught.value).startswith(path)


def mapped(file: h5py.File, *parts: tuple[slice, h5py.VirtualSource], name: str = "v") -> None:
    layout = h5py.VirtualLayout(SHAPE, "u1")
    for planes, source in parts:
        layout[planes] = source
    file.create_virtual_dataset(name, layout, fillvalue=7)


def shrunk(file: h5py.File) -> None:
    """A source that has become smaller: HDF5 2.0 reads planes that it still has as 0."""
    source = file.create_dataset("source", data=np.ones(SHAPE, "u1"), maxshape=SHAPE, chunks=(2, 9, 7))
    mapped(file, *((part, h5py.VirtualSource(source)[part]) for part in (slice(3), slice(3, 6))))
    source.resize((5, 9, 7))


def overlapping(file: h5py.File) -> None:
    """Planes 0:3 and 2:5 of six, as many voxels as there are; the last plane is in no source."""
    source = h5py.VirtualSource(file.create_dataset("source", data=np.ones((3, 9, 7), "u1")))
    mapped(file, (slice(3), source), (slice(2, 5), source))


def nested(file: h5py.File) -> None:
    mapped(file, (slice(6), h5py.VirtualSource("gone.h5", "d", SHAPE)), name="inner")
    mapped(file, (slice(6), h5py.VirtualSource(".", "inner", SHAPE)))


def source_without_data(file: h5py.File) -> None:
    mapped(file, (slice(6), h5py.VirtualSource(file.create_dataset("source", SHAPE, "u1", chunks=True))))


def dataset(**how: object) -> Callable[[h5py.File], object]:
    return lambda file: file.create_dataset("v", SHAPE, "u1", **how)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (shrunk, "source .:/source has 5 × 9 × 7 voxels where 6 × 9 × 7 are due"),
        (overlapping, "sources cover 315 of 378 voxels"),
        (nested, "source .:/inner: is a virtual dataset whose source gone.h5:/d is missing"),
        (source_without_data, "source .:/source: nothing was ever written"),
        (dataset(), "v: nothing was ever written"),
        (dataset(chunks=True, compression="gzip"), "v: nothing was ever written"),
        (dataset(external=[("gone.raw", 0, 378)]), "raw data file gone.raw is missing"),
        (
            dataset(external=[("a.raw", 8, 100), ("b.raw", 0, h5py.h5f.UNLIMITED)]),
            "b.raw has 277 bytes where 278 are due",
        ),
    ],
)
def test_voxels_that_no_file_holds_are_refused(make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.raw", 108), ("b.raw", 277)):
        Path(name).write_bytes(b"\1" * size)
    with h5py.File("a.h5", "w") as file:
        make(file)
    with pytest.raises(InputError, match=words):
        open_volume("a.h5:/v")


def test_a_virtual_dataset_that_was_moved_with_its_sources_is_read(tmp_path, monkeypatch):
    """HDF5 takes a file beside the virtual dataset's where the absolute path is gone; and those under its prefix."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    with h5py.File(first / "source.h5", "w") as file:
        file["d"] = LABELS
    layout = h5py.VirtualLayout(SHAPE, "u1")
    layout[:] = h5py.VirtualSource(first / "source.h5", "d", SHAPE)
    with h5py.File(first / "v.h5", "w") as file:
        file.create_virtual_dataset("v", layout)
    first.rename(second)
    is_it(f"{second}/v.h5:/v")
    (tmp_path / "far").mkdir()
    (second / "source.h5").rename(tmp_path / "far" / "source.h5")
    with pytest.raises(InputError, match=r"first/source.h5:/d is missing"):
        open_volume(f"{second}/v.h5:/v")
    monkeypatch.setenv("HDF5_VDS_PREFIX", f"{tmp_path}/nowhere:{tmp_path}/far")
    is_it(f"{second}/v.h5:/v")


def test_chunks_of_zeros_that_were_written_are_voxels(tmp_path):
    """h5py and HDF5 write every chunk that is assigned to, whatever it holds."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=np.zeros(SHAPE, "u1"), chunks=(2, 3, 4), compression="gzip")
    assert not open_volume(f"{tmp_path}/a.h5:/a").read(Box.whole(SHAPE)).any()
    assert unwritten_chunks(f"{tmp_path}/a.h5:/a") == ({}, 18)


def test_chunks_that_were_never_written_are_counted(source, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        part = file.create_dataset("part", SHAPE, "u1", chunks=(2, 3, 4), fillvalue=3)
        part[:2] = LABELS[:2]
        layout = h5py.VirtualLayout((12, 9, 7), "u1")
        layout[:6], layout[6:] = h5py.VirtualSource(part), h5py.VirtualSource("source.h5", "deep/labels", SHAPE)
        file.create_virtual_dataset("v", layout)
    assert unwritten_chunks(f"{tmp_path}/a.h5:/part") == ({3: 12}, 18)
    assert unwritten_chunks(f"{tmp_path}/a.h5:/v") == ({3: 12}, 18)
    assert unwritten_chunks(f"{source}:/deep/labels") == ({}, 0)
    labels = open_volume(f"{tmp_path}/a.h5:/part").read(Box.whole(SHAPE))
    np.testing.assert_array_equal(labels[:2], LABELS[:2])
    assert (labels[2:] == 3).all()


WARNING = (
    "warning: low.h5:/v: 12 of 18 chunks were never written, and their voxels are read as the fill value 2; if its "
    "writer does not leave out such chunks, write the dataset again"
)


@pytest.mark.usefixtures("good")
def test_each_command_counts_unwritten_chunks_before_it_reads_them(monkeypatch, capfd):
    """Planes 14 to 20 of the coarse volume were written, as by a program that was stopped."""
    with h5py.File("low.h5", "w") as file:
        file.create_dataset("v", (20, 18, 17), "u1", chunks=(7, 9, 6), fillvalue=2)[14:] = 0

    def reads(*_: object, **__: object) -> None:
        raise InputError("the volume is read")

    monkeypatch.setattr("hpcres.training.loop.train", reads)
    monkeypatch.setattr("hpcres.label_stores.infer", reads)
    study = ["study.yaml", "--set", "low_res.path=low.h5:/v"]
    left_out = ("correlations", "chords", "connectivity", "spectrum", "representative")
    for arguments, last in (
        (["train", *study], "hpcres: the volume is read"),
        (["infer", *study], "hpcres: the volume is read"),
        (["convert", "low.h5:/v", "--output", "low.zarr"], ""),
        (["tortuosity", "low.h5:/v", "--phase", "2", "--direction", "x", "--output", "t.json"], ""),
        (["metrics", "low.h5:/v", *(f"--without={name}" for name in left_out), "--output", "m.json"], ""),
    ):
        assert run(arguments) == (2 if last else 0), arguments
        lines = capfd.readouterr().err.splitlines()
        assert lines.count(WARNING) == 1, arguments
        assert not last or lines == [WARNING, last]
    for file in ("m.json", "t.json"):
        assert json.loads(Path(file).read_text())["absent_chunks"] == [
            {"path": "low.h5:/v", "absent": 12, "chunks": 18, "fill_value": 2}
        ]


@pytest.mark.usefixtures("good")
def test_absent_chunks_of_an_hdf5_volume_that_is_whole_or_gone(source):
    assert absent_chunks(open_volume(f"{source}:/deep/labels")) == []
    loaded = load_study("study.yaml", ["low_res.path=gone.h5:/v", f"reference.volume={source}:/deep/labels"])
    assert absent_chunks_of_study(loaded) == []


def test_datasets_without_numbers_have_lines_of_their_own(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["empty"] = h5py.Empty("u1")
        file["text"] = np.array([[[b"ab"]]])
        file["strings"] = np.array([[["ab"]]], dtype=h5py.string_dtype())
        file.create_dataset("ragged", (1, 1, 1), h5py.vlen_dtype("u1"))
        file["records"] = np.zeros((2, 2, 2), [("label", "u1"), ("grey", "f4")])
        file["complex"] = np.zeros((2, 2, 2), "c8")
        file["scalar"] = 3
        file["none"] = np.zeros((0, 3, 3), "u1")
    for name, words in {
        "empty": "is an empty dataset",
        "text": "holds text",
        "strings": "holds Python objects or strings",
        "ragged": "holds Python objects or strings",
        "records": "holds records of several fields",
        "complex": "holds complex64, not integer labels",
        "scalar": "is a 0D array",
        "none": "has no voxels",
    }.items():
        with pytest.raises(InputError, match=words) as caught:
            open_volume(f"{tmp_path}/a.h5:/{name}")
        assert ";" in str(caught.value), name


def test_a_filter_that_is_not_there_is_named(tmp_path):
    """32099 is a number that the HDF Group has given nobody's filter here."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk((6, 9, 7))
        made.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, ())
        space, kind = h5py.h5s.create_simple(SHAPE), h5py.h5t.NATIVE_UINT8
        for name, skipped in ((b"filtered", 0), (b"skipped", 1)):
            dataset = h5py.h5d.create(file.id, name, kind, space, made)
            dataset.write_direct_chunk((0, 0, 0), LABELS.tobytes(), filter_mask=skipped)
    with pytest.raises(InputError, match=r"a.h5:/filtered: is compressed with .*32099.*pip install hdf5plugin"):
        open_volume(f"{tmp_path}/a.h5:/filtered")
    is_it(f"{tmp_path}/a.h5:/skipped")  # written where the filter was missing too


_WRITER = """
import sys, h5py
file = h5py.File(sys.argv[1], "w", libver="latest")
file["a"] = [[[1]]]
if sys.argv[2] == "swmr":
    file.swmr_mode = True
file.flush()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("how", "words"), [("plain", "is locked, another program"), ("swmr", "marked as open")])
def test_a_file_that_another_program_writes_is_said_to_be_locked(how, words, tmp_path):
    path = tmp_path / "a.h5"
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(InputError, match=words):
            open_volume(f"{path}:/a")
    assert open_volume(f"{path}:/a").shape == (1, 1, 1)
