"""`import hpcres`: the functions on arrays and files, beside the commands, closed forms and brute force."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from small_training import study_of

import hpcres
from hpcres.errors import InputError
from hpcres.outputs import PAGE, refuse_output
from hpcres.study.file import save_study
from hpcres.volumes.formats import open_volume
from hpcres.volumes.volume import array_volume

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LABELS = np.random.default_rng(0).integers(0, 3, (12, 10, 9))


def shares(labels: np.ndarray) -> dict[str, float]:
    return {str(int(v)): float((labels == v).mean()) for v in np.unique(labels)}


def test_importing_takes_no_time_and_no_heavy_package():
    program = (
        "import sys, time; began = time.perf_counter(); import hpcres; seconds = time.perf_counter() - began; "
        "print(seconds, *(name for name in ('torch', 'numba', 'dask', 'numpy', 'jinja2') if name in sys.modules))"
    )
    seconds, *heavy = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split()
    assert float(seconds) < 0.5
    assert heavy == []


def test_training_imports_neither_dask_nor_other_packages_that_it_does_not_need():
    program = (
        "import sys, hpcres.training.loop; "
        "print(*(name for name in ('dask', 'distributed', 'scipy.ndimage', 'scipy.optimize') if name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split() == []


def test_every_public_name_is_there_and_explains_itself():
    assert set(hpcres.__all__) <= set(dir(hpcres))
    for name in hpcres.__all__:
        assert getattr(hpcres, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'measures'"):
        _ = hpcres.measures


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", ">u2", "int32", "uint32", "int64", "uint64"])
def test_arrays_of_any_type_and_order_are_measured_in_place(dtype):
    labels = (LABELS > 0 if dtype == "bool" else LABELS).astype(dtype)
    expected = shares(labels.astype(int))
    for array in (labels, np.asfortranarray(labels), labels[::-1, :, ::2], np.broadcast_to(labels[:1], labels.shape)):
        array = array.view()
        array.flags.writeable = False
        assert hpcres.measure(array).volume_fraction == shares(array.astype(int))
    assert hpcres.measure(labels).volume_fraction == expected


def test_statistics_may_come_from_a_generator():
    found = hpcres.measure(LABELS, statistics=(name for name in ["connectivity"]))
    assert list(found.statistics) == ["connectivity"]


def test_negative_and_large_labels_keep_their_names():
    labels = np.array([-3, 0, 2**31 - 1], np.int64)[LABELS]
    assert list(hpcres.measure(labels).volume_fraction) == ["-3", "0", str(2**31 - 1)]


def test_dask_zarr_and_hdf5_arrays_give_the_numbers_of_the_array(tmp_path):
    import dask.array
    import h5py
    import zarr

    labels = LABELS.astype(np.uint8)
    expected = hpcres.measure(labels).to_dict()
    store = zarr.create_array(tmp_path / "a.zarr", data=labels, chunks=(5, 4, 3))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("labels", data=labels, chunks=(4, 4, 4))
        for array in (dask.array.from_array(labels, chunks=(5, 3, 4)), store, dataset):
            assert hpcres.measure(array).to_dict() == expected


def test_a_measurement_has_the_numbers_of_the_command_under_the_same_names(tmp_path):
    np.save(tmp_path / "v.npy", LABELS)
    target = tmp_path / "metrics.json"
    given = ["metrics", str(tmp_path / "v.npy"), "--voxel-size", "2um,1um,1um", "--output", str(target)]
    subprocess.run([sys.executable, "-m", "hpcres", *given], check=True, capture_output=True)
    entry = json.loads(target.read_text())["volume"]
    found = hpcres.measure(
        tmp_path / "v.npy",
        voxel_size=("2 um", "1 um", "1 um"),
        statistics=("correlations", "chords", "connectivity", "spectrum", "representative"),
    )
    assert json.loads(json.dumps(found.to_dict())) == {k: v for k, v in entry.items() if k != "subvolumes"}
    assert found.volume_fraction == entry["volume_fraction"]
    assert found.interphase_area == entry["interphase_area"]
    assert found.tpb.density == entry["tpb"]["density"]
    assert found.tpb.unit == entry["tpb"]["unit"] == "1/micrometer^2"
    assert found.specific_surface_area.crofton == entry["specific_surface_area"]["crofton"]
    assert found.voxel_size == (2, 1, 1)
    assert str(found.volume_fraction["1"])[:6] in str(found)


def test_phases_are_names_in_order_or_by_label():
    named = hpcres.measure(LABELS, phases=["pore", "nickel", "ysz"])
    by_label = hpcres.measure(np.array([7, 90, 5])[LABELS], phases={7: "pore", 90: "nickel", 5: "ysz"})
    assert named.phases == by_label.phases == ("pore", "nickel", "ysz")
    assert named.to_dict() == by_label.to_dict()
    with pytest.raises(hpcres.InputError, match="label 5 occurs in"):
        hpcres.measure(np.array([7, 90, 5])[LABELS], phases={7: "pore", 90: "nickel"})


def test_a_client_that_is_passed_in_is_used_and_stays_open():
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        before = client.scheduler_info()["workers"]
        assert hpcres.measure(LABELS, client=client).volume_fraction == shares(LABELS)
        assert client.scheduler_info()["workers"].keys() == before.keys()


def test_workers_of_another_process_cannot_read_an_array_and_the_error_says_so(tmp_path):
    from distributed import Client

    with Client(n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        with pytest.raises(hpcres.InputError, match="memory of another process than this worker; write it to a file"):
            hpcres.measure(LABELS, client=client)
        np.save(tmp_path / "v.npy", LABELS)
        assert hpcres.measure(tmp_path / "v.npy", client=client).volume_fraction == shares(LABELS)


def test_tortuosity_of_a_channel_in_closed_form_by_name_label_and_conductivity():
    labels = np.zeros((8, 6, 4), np.int32)
    labels[:, :2] = 5
    for given in ({"phase": 5}, {"phase": "5"}, {"conductivity": {"5": 1.0}}):
        found = hpcres.tortuosity(labels, **given)
        assert (found.D_rel, found.tau, found.direction) == (pytest.approx(1 / 3), pytest.approx(1), "z")
    assert hpcres.tortuosity(labels == 5).tau == pytest.approx(1)
    assert hpcres.tortuosity(labels, "solid", phases={0: "pore", 5: "solid"}).tau == pytest.approx(1)
    swapped = {5: "solid", 0: "pore"}  # label 0 is the second name
    for phase, fraction in ((5, 1 / 3), (0, 2 / 3), ("pore", 2 / 3)):
        assert hpcres.tortuosity(labels, phase, phases=swapped).D_rel == pytest.approx(fraction)
    assert hpcres.tortuosity(labels == 5, True).D_rel == pytest.approx(1 / 3)
    across = hpcres.tortuosity(labels, 5, direction="y")
    assert (across.D_rel, across.tau, across.tau_percolating) == (0, math.inf, math.inf)
    assert json.loads(json.dumps(across.to_dict()))["tau"] is None


def test_taufactor_is_a_second_opinion_that_agrees(monkeypatch):
    from scipy.ndimage import gaussian_filter

    mask = gaussian_filter(np.random.default_rng(4).random((40, 32, 32)), 2.5) > 0.5
    found = hpcres.tortuosity(mask, direction="y", rtol=1e-5, check="taufactor")
    assert found.check is not None
    assert found.check.D_rel == pytest.approx(found.D_rel, rel=3e-3)
    assert found.check.difference == pytest.approx(found.check.D_rel / found.D_rel - 1)
    assert "TauFactor 1." in str(found)
    monkeypatch.setattr(
        "hpcres.transport.in_memory.solve", lambda *_, **__: pytest.fail("solved before it was refused")
    )
    with pytest.raises(hpcres.InputError, match="'jury' is no solver"):
        hpcres.tortuosity(mask, check="jury")
    with pytest.raises(hpcres.InputError, match="cannot solve with `conductivity`"):
        hpcres.tortuosity(mask, conductivity={"1": 1}, check="taufactor")
    with pytest.raises(hpcres.InputError, match="cubic voxels only"):
        hpcres.tortuosity(mask, voxel_size=("2 um", "1 um", "1 um"), check="taufactor")
    with pytest.raises(hpcres.InputError, match="cannot solve with `periodic`"):
        hpcres.tortuosity(mask, periodic="x", check="taufactor")


def test_the_command_checks_too_and_refuses_what_taufactor_lacks(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((12, 12, 12), np.uint8))
    given = ["-m", "hpcres", "tortuosity", str(tmp_path / "v.npy"), "--direction", "z", "--check", "taufactor"]
    done = subprocess.run([sys.executable, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TauFactor 1." in done.stdout
    done = subprocess.run([sys.executable, *given, "--conductivity", "1=2"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot solve with --conductivity" in done.stderr
    flat = [*given, "--voxel-size", "2um,1um,1um", "--output", str(tmp_path / "t.json")]
    done = subprocess.run([sys.executable, *flat], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cubic voxels only" in done.stderr
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hpcres.measure(3), "int is neither a path nor an array"),
        (lambda: hpcres.measure("none.npy"), "none.npy: no such file"),
        (lambda: hpcres.measure(LABELS, voxel_size="5"), "`voxel_size`: '5' has no length with a unit"),
        (lambda: hpcres.measure(LABELS, periodic="w"), "periodic: 'w' is no axis"),
        (lambda: hpcres.measure(LABELS, statistics=["chord"]), "statistics: 'chord' is none"),
        (lambda: hpcres.measure(LABELS / 2), "grey values where labels are due"),
        (lambda: hpcres.measure(LABELS[None].repeat(2, 0)), "array: "),
        (lambda: hpcres.tortuosity(LABELS), "phase is missing"),
        (lambda: hpcres.tortuosity(LABELS, 1, direction="w"), "direction 'w' is none"),
        (lambda: hpcres.tortuosity(LABELS, 1, conductivity={"1": 1}), "conductivity already names"),
        (lambda: hpcres.tortuosity(LABELS, 9), "no such phase"),
        (lambda: hpcres.train({"name": "x"}), "study: "),
        (lambda: hpcres.train("none.yaml"), "none.yaml"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_without_options(call, said):
    with pytest.raises(hpcres.InputError) as found:
        call()
    assert said in str(found.value)
    assert "\n" not in str(found.value)
    assert "--" not in str(found.value)


def test_calls_print_nothing_and_log_what_overrides_the_file(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hpcres"), "handlers", [])  # conftest.py prints what is logged
    named = {0: "a", 1: "b", 2: "c"}
    stored = hpcres.convert(LABELS.astype(np.uint8), tmp_path / "v.zarr", voxel_size="1 um", phases=named)
    with caplog.at_level(logging.WARNING, "hpcres"):
        found = hpcres.measure(stored, voxel_size="2 um")
    hpcres.tortuosity(stored, "a")
    assert "overrides the file's own, 1 µm" in caplog.text
    assert found.phases == ("a", "b", "c")
    assert found.voxel_size == (2, 2, 2)
    assert capfd.readouterr() == ("", "")


def test_a_volume_slices_like_its_array():
    volume = array_volume(LABELS, "v")
    keys = [slice(None), slice(2, 7), slice(-3, None), slice(None, None, -2), slice(8, 1, -3), slice(5, 5), 3, -1]
    for key in product(keys, keys, keys[:4]):
        assert np.array_equal(volume[key], LABELS[key]), key
    for key in (..., (..., 2), (1, ...), 4, slice(1, 3), (2, slice(None, None, 2))):
        assert np.array_equal(volume[key], LABELS[key]), key
    assert np.array_equal(np.asarray(volume), LABELS)
    with pytest.raises(ValueError, match="ask for a copy"):
        np.asarray(volume, copy=False)
    with pytest.raises(IndexError):
        volume[12]
    with pytest.raises(IndexError):
        volume[0, 0, 0, 0]


def test_tables_for_notebooks():
    found = hpcres.measure(LABELS, phases=["a<b", "c", "d"])
    table = found._repr_html_()
    assert "a&lt;b" in table
    assert table.count("<tr>") == 1 + len(found._rows())
    assert "<td>z</td>" in hpcres.tortuosity(LABELS, 1)._repr_html_()


def test_frames_where_pandas_is_there(monkeypatch):
    found = hpcres.measure(LABELS, phases=["a", "b", "c"])
    frame = found.to_frame()
    fractions = frame[frame.metric == "volume fraction"].set_index("of")["value"]
    assert fractions.to_dict() == found.volume_fraction
    assert hpcres.tortuosity(LABELS, 1).to_frame().loc[0, "direction"] == "z"
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(hpcres.InputError, match="pip install pandas"):
        found.to_frame()


def test_from_a_study_to_a_painted_volume_and_its_page(tmp_path):
    study = study_of(tmp_path, training={"steps": 2})
    file = save_study(study, "whole")
    trained = hpcres.train(file, settings=["training.steps=2"])
    painted = hpcres.infer(file, tiles="1x1x1")
    assert trained.step == 2
    assert painted.shape == tuple(4 * n for n in open_volume(str(study.low_res.paths[0])).shape)
    assert set(np.unique(painted[:8])) <= {0, 1, 2}
    again = hpcres.infer(checkpoint=trained.checkpoint, low_res=str(study.low_res.paths[0]), output=tmp_path / "o.zarr")
    assert np.array_equal(np.asarray(again), np.asarray(painted))
    assert hpcres.report(file).read_text(encoding="utf-8").startswith("<!")
    assert hpcres.measure(painted).phases == study.phases


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_examples_run(example, tmp_path):
    given = [sys.executable, str(example), str(tmp_path / "out")]
    done = subprocess.run(given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2


def test_training_and_painting_print_nothing(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hpcres"), "handlers", [])
    study = study_of(tmp_path, training={"steps": 2})
    with caplog.at_level(logging.INFO, "hpcres"):
        hpcres.train(study)
        hpcres.infer(study)
    assert capfd.readouterr() == ("", "")
    assert {record.name for record in caplog.records} == {"hpcres.train", "hpcres.infer"}


def test_the_command_line_names_options_where_messages_name_arguments(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(InputError, match="write elsewhere with `output`"):
        refuse_output(tmp_path / "report.html", PAGE)
    np.save(tmp_path / "v.npy", LABELS.astype(np.uint8))
    command = [
        sys.executable,
        "-m",
        "hpcres",
        "report",
        str(tmp_path / "v.npy"),
        "--output",
        str(tmp_path / "report.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "write elsewhere with --output" in done.stderr
    assert "`" not in done.stderr
