"""HDF5 files as other programs leave them: links, virtual datasets, filters, locks, and what holds no numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.volumes.formats import open_volume

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


@pytest.mark.parametrize(("parts", "words"), [
    ([("source.h5", "deep/labels"), ("gone.h5", "d")], r"whose source gone.h5:/d is missing"),
    ([("gone/gone.h5", "d"), ("source.h5", "deep/labels")], r"whose source gone/gone.h5:/d is missing"),
    ([("source.h5", "deep/labels"), ("source.h5", "d")], r"source source.h5:/d has no such dataset"),
    ([("source.h5", "deep/labels"), (".", "d")], r"source .:/d has no such dataset"),
    ([("source.h5", "deep/labels")], r"sources cover 378 of 756 voxels"),
])  # fmt: skip
def test_a_virtual_dataset_that_would_read_as_its_fill_value_is_refused(parts, words, source, tmp_path):
    path = virtual(tmp_path / "v.h5", parts)
    with h5py.File(tmp_path / "v.h5") as file:
        assert not file["v"][6:].any() or not file["v"][:6].any()  # what HDF5 itself makes of it
    with pytest.raises(InputError, match=words) as caught:
        open_volume(path)
    assert str(caught.value).startswith(path)


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
        "empty": "is an empty dataset", "text": "holds text", "strings": "holds Python objects or strings",
        "ragged": "holds Python objects or strings", "records": "holds records of several fields",
        "complex": "holds complex64, not integer labels", "scalar": "is a 0D array", "none": "has no voxels",
    }.items():  # fmt: skip
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
