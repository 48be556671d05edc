"""No data is lost: refused outputs, merged results, runs that replace another, absent chunks, names of any encoding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from small_training import blobs, history, study_of
from test_bad_input import listing, run

from hpcres.checkpoint import load_checkpoint
from hpcres.errors import Stopped
from hpcres.outputs import LABELS, METRICS, refuse_output
from hpcres.signals import handling_signals
from hpcres.training.folder import RunFolder, recover
from hpcres.training.loop import train
from hpcres.training.wgan import Models
from hpcres.transport import tortuosity
from hpcres.transport.in_memory import solve
from hpcres.volumes.absent import absent_chunks
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import probabilities

VOLUME = blobs((24, 22, 20), 3)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    np.save(tmp_path / "v.npy", VOLUME)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- refused outputs ------------------------------------------------------------------------------------------


def hard_link(folder: Path) -> None:
    os.link(folder / "v.npy", folder / "out")


def soft_link(folder: Path) -> None:
    (folder / "out").symlink_to("v.npy")


def foreign(folder: Path) -> None:
    (folder / "out").write_text("my thesis")


def another_kind(folder: Path) -> None:
    (folder / "out").write_text('{\n "schema": "hpcres transport 2"}')


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "out")


def dangling(folder: Path) -> None:
    (folder / "out").symlink_to("nowhere")


MADE = [hard_link, soft_link, foreign, another_kind, dangling, fifo]


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
@pytest.mark.parametrize("command", ["metrics", "tortuosity", "report", "convert"])
def test_inputs_and_foreign_files_are_refused_as_outputs(command, make, overwrite, here, capfd):
    if command == "report" and overwrite:
        pytest.skip("report has no --overwrite: it always replaces its page")
    if make is another_kind and command == "tortuosity":
        pytest.skip("its own kind")
    make(here)
    before = {} if make is fifo else listing(here)
    assert run([command, "v.npy", "--output", "out", *overwrite]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert make is fifo or listing(here) == before
    assert make is not fifo or (here / "out").is_fifo()


@pytest.mark.parametrize("command", ["metrics", "convert", "tortuosity"])
def test_an_output_in_an_input_and_an_input_in_an_output_are_refused(command, here, capfd):
    assert run(["convert", "v.npy", "--output", "s.zarr"]) == 0
    assert run(["convert", "v.npy", "--output", "t.zarr"]) == 0
    np.save(here / "t.zarr" / "inside.npy", VOLUME)
    (here / "link").symlink_to("s.zarr")
    (here / "deep").symlink_to("s.zarr/0")
    before = listing(here)
    for output in ("s.zarr", "s.zarr/m", "link/m", "deep/m"):
        assert run([command, "s.zarr", "--output", output, "--overwrite"]) == 2
    assert run(["convert", "t.zarr/inside.npy", "--output", "t.zarr", "--overwrite"]) == 2
    assert "holds the input" in capfd.readouterr().err
    assert listing(here) == before


def test_infer_refuses_its_inputs_as_output(study, tmp_path, capfd):
    checkpoint = study.parent / "out" / "checkpoint.pt"
    shutil.copy(study.parent / "low.npy", tmp_path / "low.npy")
    assert run(["convert", str(tmp_path / "low.npy"), "--output", str(tmp_path / "low.zarr")]) == 0
    before = listing(tmp_path)
    given = ["--checkpoint", str(checkpoint), "--low-res", str(tmp_path / "low.zarr"), "--overwrite"]
    assert run(["infer", str(tmp_path / "none.yaml"), *given, "--output", str(tmp_path / "low.zarr")]) == 2
    assert "is the input" in capfd.readouterr().err
    assert listing(tmp_path) == before


def test_metrics_of_another_volume_are_replaced_only_with_overwrite(here, capfd):
    np.save(here / "w.npy", VOLUME[::-1])
    plain = ["--without", "correlations", "--without", "chords", "--without", "spectrum", "--without", "representative"]
    for _ in range(2):
        assert run(["metrics", "v.npy", *plain, "--output", "m.json"]) == 0
    before = (here / "m.json").read_bytes()
    assert run(["metrics", "w.npy", *plain, "--output", "m.json"]) == 2
    assert (here / "m.json").read_bytes() == before
    assert run(["metrics", "w.npy", *plain, "--output", "m.json", "--overwrite"]) == 0
    assert json.loads((here / "m.json").read_text())["volume"]["path"] == str(here / "w.npy")


def test_overwriting_a_link_replaces_its_target_and_keeps_the_link(here):
    (here / "disk").mkdir()
    assert run(["convert", "v.npy", "--output", "disk/s.zarr"]) == 0
    (here / "s.zarr").symlink_to("disk/s.zarr")
    refuse_output(here / "s.zarr", LABELS, overwrite=True)
    assert run(["convert", "v.npy", "--output", "s.zarr", "--overwrite"]) == 0
    assert (here / "s.zarr").is_symlink()
    assert (here / "disk" / "s.zarr").is_dir()


def test_a_study_that_is_read_is_not_overwritten_by_its_copy(template, capfd):
    shutil.copy(template / "study.yaml", template / "results" / "study-metrics.yaml")
    before = (template / "results" / "study-metrics.yaml").read_bytes()
    given = ["--output", str(template / "results")]
    assert run(["metrics", str(template / "results" / "study-metrics.yaml"), *given]) == 2
    assert "is the study that is read" in capfd.readouterr().err
    assert run(["train", str(template / "study.yaml"), "--output", str(template / "results"), "--overwrite"]) == 2
    assert "study-train.yaml: exists already and is not a study that hpcres saved" in capfd.readouterr().err
    assert (template / "results" / "study-metrics.yaml").read_bytes() == before


@pytest.fixture
def template(tmp_path) -> Path:
    import yaml

    phases = {0: "a", 1: "b", 2: "c"}
    np.save(tmp_path / "low.npy", blobs((20, 18, 17), 1))
    np.save(tmp_path / "high.npy", blobs((1, 90, 80), 2))
    study = {
        "name": "t",
        "scale_factor": 4,
        "output": "results",
        "high_res": {"phases": phases, "voxel_size": "65 nm", "images": [{"path": "high.npy"}]},
        "low_res": {"path": "low.npy", "phases": phases},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study-train.yaml").write_text("my own")
    return tmp_path


def test_the_check_creates_nothing(here):
    refuse_output(here / "new" / "m.json", METRICS, inputs=["v.npy", None])
    assert not (here / "new").exists()


# ---- transport.json -------------------------------------------------------------------------------------------


def results_of(file: Path) -> dict[tuple[str, str], float]:
    return {(r["phase"], r["direction"]): r["D_rel"] for r in json.loads(file.read_text())["volume"]["results"]}


def test_results_merge_and_are_solved_once(here, capfd, monkeypatch):
    solved = []
    monkeypatch.setattr(
        "hpcres.transport.in_memory.solve", lambda *a, **k: solved.append(a[2].directions) or solve(*a, **k)
    )
    assert run(["tortuosity", "v.npy", "--phase", "0", "--output", "t.json"]) == 0
    assert len(solved) == 3
    assert run(["tortuosity", "v.npy", "--output", "t.json"]) == 0
    assert len(solved) == 9
    assert capfd.readouterr().out.count("results in this file are not solved again") == 1
    found = results_of(here / "t.json")
    assert found == {(r["phase"], r["direction"]): r["D_rel"] for r in tortuosity(open_volume("v.npy"))["results"]}
    solved.clear()
    assert run(["tortuosity", "v.npy", "--phase", "1", "--output", "t.json"]) == 0
    assert not solved
    assert results_of(here / "t.json") == found
    for settings in (["--crop", "0:12,:,:"], ["--rtol", "0.01"], ["--periodic", "y"]):
        assert run(["tortuosity", "v.npy", "--phase", "1", "--direction", "z", *settings, "--output", "t.json"]) == 0
    content = json.loads((here / "t.json").read_text())["volume"]
    assert len(content["results"]) == 12
    assert len(solved) == 3
    assert run(["report", "v.npy", "--transport", "t.json", "--output", "r.html"]) == 0
    assert "crop z 0:12, y 0:22, x 0:20" in (here / "r.html").read_text()
    assert run(["tortuosity", "v.npy", "--phase", "1", "--direction", "z", "--output", "t.json", "--overwrite"]) == 0
    assert len(results_of(here / "t.json")) == 1


def test_results_of_another_volume_are_not_mixed(here, capfd):
    assert run(["tortuosity", "v.npy", "--phase", "0", "--direction", "z", "--output", "t.json"]) == 0
    before = (here / "t.json").read_bytes()
    np.save(here / "w.npy", VOLUME[::-1])
    assert run(["tortuosity", "w.npy", "--phase", "0", "--output", "t.json"]) == 2
    assert "w.npy is another volume" in capfd.readouterr().err
    np.save(here / "v.npy", VOLUME[::-1])
    assert run(["tortuosity", "v.npy", "--phase", "0", "--output", "t.json"]) == 2
    assert "v.npy has changed since" in capfd.readouterr().err
    assert (here / "t.json").read_bytes() == before


@pytest.mark.parametrize("damage", [lambda t: t[:-40], lambda t: t.replace('"settings"', '"old"')])
def test_a_damaged_file_is_replaced_only_with_overwrite(damage, here, capfd):
    given = ["tortuosity", "v.npy", "--phase", "0", "--direction", "z", "--output", "t.json"]
    assert run(given) == 0
    (here / "t.json").write_text(damage((here / "t.json").read_text()))
    capfd.readouterr()
    assert run(given) == 2
    assert "no result can be added to it" in capfd.readouterr().err
    assert run([*given, "--overwrite"]) == 0


def test_a_stopped_run_saves_its_results_and_a_rerun_solves_the_rest(here, capfd, monkeypatch):
    count = []

    def third_is_stopped(*arguments, **settings):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), 15)
        return solve(*arguments, **settings)

    monkeypatch.setattr("hpcres.transport.in_memory.solve", third_is_stopped)
    assert run(["tortuosity", "v.npy", "--output", "t.json"]) == 75
    said = capfd.readouterr().err.splitlines()[-1]
    assert said == (
        "hpcres: tortuosity: stopped by SIGTERM; finished results are in t.json; run the same command to go on"
    )
    assert len(results_of(here / "t.json")) in (2, 3)
    assert run(["tortuosity", "v.npy", "--output", "t.json"]) == 0
    assert len(results_of(here / "t.json")) == 9
    assert len(count) in (9, 10)


# ---- a run that replaces another ------------------------------------------------------------------------------


def content_of(folder: Path) -> dict[str, bytes]:
    """The files of a run except TensorBoard's, whose names hold times."""
    return {name: data for name, data in listing(folder).items() if data is not None and "events" not in name}


@pytest.mark.parametrize("moment", ["before a step", "in a step", "after a save"])
def test_an_interrupted_overwrite_leaves_one_run_or_the_other(moment, tmp_path, monkeypatch):
    old = study_of(tmp_path, training={"steps": 1, "report_seconds": 0.001, "quality_steps": 1, "quality_cubes": 1})
    train(old)
    before = content_of(old.folder)
    of_new = {"steps": 3, "report_seconds": 0.001, "quality_steps": 1, "quality_cubes": 1}
    new = study_of(tmp_path, training=of_new)
    step = Models.step

    def interrupted(self, number, *rest):
        if moment == "in a step" and number == 2:
            raise RuntimeError("power is gone")
        if moment == "after a save" and number == 1:
            os.kill(os.getpid(), 15)
        return step(self, number, *rest)

    monkeypatch.setattr(Models, "step", interrupted)
    if moment == "before a step":
        with handling_signals("train"):
            os.kill(os.getpid(), 2)
            with pytest.raises(Stopped):
                train(new, overwrite=True)
    else:
        with pytest.raises((Stopped, RuntimeError), match=r"power is gone|run it without overwriting to go on"):
            train(new, overwrite=True)
    monkeypatch.undo()
    assert not (old.folder / ".train-new").exists()
    if moment != "after a save":
        assert content_of(old.folder) == before
        return
    assert load_checkpoint(new.checkpoint_path).step == 2
    assert [row[0] for row in history(new)] == ["step", "1", "2"]
    assert [row[0] for row in history(new, "quality.csv")] == ["step", "1", "2"]
    assert train(new).resumed_step == 2
    whole = study_of(tmp_path, training=of_new, output=str(tmp_path / "whole"))
    train(whole)
    assert history(new) == history(whole)


@pytest.mark.parametrize("after", range(15))
def test_the_next_run_finishes_a_replacement_that_was_killed(after, tmp_path, monkeypatch):
    """Killed after each of the changes to the folder in turn."""
    folder = tmp_path / "out"
    for name, run_name in ((folder, "old"), (folder / ".train-new", "new")):
        (name / "tensorboard").mkdir(parents=True)
        for file in ("checkpoint.pt", "training.csv", "training.html", "tensorboard/events", "study-train.yaml"):
            (name / file).write_text(run_name)
    (folder / "best.pt").write_text("old")
    from hpcres.training import folder as module

    changes = []

    def counted(change):
        def one(*arguments, **options):
            changes.append(1)
            if len(changes) > after:
                raise KeyboardInterrupt
            return change(*arguments, **options)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(module.shutil, "rmtree", counted(shutil.rmtree))
        try:
            module._replace(folder)
        except KeyboardInterrupt:
            runs = {p.read_text() for p in folder.glob("*") if p.is_file()}
            assert len(runs) <= 1 or not (folder / "checkpoint.pt").exists(), "a mixture that could be read"
    module.recover(folder)
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()} == dict.fromkeys(
        ("checkpoint.pt", "training.csv", "training.html", "tensorboard/events", "study-train.yaml"), "new"
    )


def test_a_replacement_that_fails_keeps_the_new_run(tmp_path, monkeypatch):
    folder, files = tmp_path / "out", ("checkpoint.pt", "training.csv")
    folder.mkdir()
    for file in files:
        (folder / file).write_text("old")
    run_folder = RunFolder(folder, anew=True)

    def fails(*_: object) -> None:
        raise PermissionError

    def replace() -> None:
        with run_folder.prepared(True), monkeypatch.context() as patch:
            for file in files:
                (run_folder.path / file).write_text("new")
            patch.setattr(Path, "rename", fails)  # the files of the earlier run are removed by then
            run_folder.take_over()

    with pytest.raises(PermissionError):
        replace()
    assert not (folder / "checkpoint.pt").exists()
    recover(folder)
    assert listing(folder) == {"checkpoint.pt": b"new", "training.csv": b"new"}


# ---- absent chunks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("sharded", [False, True])
def test_absent_chunks_are_counted(form, separator, sharded, here, capfd):
    if sharded and form == 2:
        pytest.skip("Zarr v2 has no shards")
    encoding = {"name": "v2" if form == 2 else "default", "separator": separator}
    array = zarr.create_array(
        "s.zarr",
        shape=(1, 24, 22, 20),
        dtype="uint8",
        chunks=(1, 8, 8, 8),
        zarr_format=form,
        shards=(1, 16, 16, 16) if sharded else None,
        chunk_key_encoding=encoding,
        fill_value=0,
        config={"write_empty_chunks": True},
    )
    array[:] = VOLUME[None]
    metadata = ("zarr.json", ".zarray", ".zattrs")
    files = [p for p in (here / "s.zarr").rglob("*") if p.is_file() and p.name not in metadata]
    assert len(files) == (8 if sharded else 27)
    assert absent_chunks(open_volume("s.zarr")) == []
    for file in sorted(files)[:3]:
        file.unlink()
    (found,) = absent_chunks(open_volume("s.zarr"))
    assert (found.absent, found.chunks, found.fill_value) == (3, len(files), 0)
    plain = ["--without", "correlations", "--without", "chords", "--without", "spectrum", "--without", "representative"]
    assert run(["metrics", "s.zarr", *plain, "--output", "m.json"]) == 0
    warned = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert f"s.zarr: 3 of {len(files)} chunk files are absent" in warned[0]
    assert "read as the fill value 0;" in warned[0]
    assert json.loads((here / "m.json").read_text())["absent_chunks"][0]["absent"] == 3


def lacking(name: str, array: np.ndarray) -> None:
    """A zarr array of another program without its first chunk file."""
    made = zarr.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(8, 8, 8), zarr_format=2)
    made[:] = array
    Path(name, "0.0.0").unlink()


def test_absent_chunks_of_each_channel_are_counted(here):
    for name in ("p.zarr", "q.zarr"):
        lacking(name, np.full((16, 16, 16), 0.5, np.float32))
    low_res = probabilities([open_volume("p.zarr", grey=True), open_volume("q.zarr", grey=True)])
    assert [(found.path, found.absent, found.chunks) for found in absent_chunks(low_res)] == [
        ("p.zarr", 1, 8),
        ("q.zarr", 1, 8),
    ]


def test_tortuosity_counts_the_absent_chunks_of_the_reference(template, monkeypatch, capfd):
    (template / "results" / "study-train.yaml").unlink()
    monkeypatch.chdir(template)
    np.save("v.npy", VOLUME)
    lacking("truth.zarr", VOLUME + 0)
    assert run(["convert", "v.npy", "--output", "results/labels.zarr", "--phases", "0=a,1=b,2=c"]) == 0
    given = ["--set", "reference.volume=truth.zarr", "--phase", "a", "--direction", "z"]
    assert run(["tortuosity", *given]) == 0
    assert "truth.zarr: 1 of 27 chunk files are absent" in capfd.readouterr().err
    found = json.loads((template / "results" / "transport.json").read_text())
    assert [(one["absent"], one["chunks"]) for one in found["absent_chunks"]] == [(1, 27)]
    assert found["reference"]["results"]


# ---- terminals and names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp437"},
        {"LC_ALL": "C", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["latin-1", "cp437", "C", "ascii"],
)
def test_terminals_and_file_names_of_any_encoding(environment, here):
    name = b"caf\xe9 \xb5"
    os.mkdir(name)
    os.rename("v.npy", os.path.join(name, b"v\xe9.npy"))
    volume = os.path.join(name, b"v\xe9.npy")
    every = (
        ["metrics", volume, "--output", os.path.join(name, b"m.json"), "--without", "spectrum"],
        ["metrics", os.path.join(name, b"none.npy")],
        ["tortuosity", volume, "--direction", "z", "--phase", "0", "--output", os.path.join(name, b"t.json")],
        ["report", volume, "--output", os.path.join(name, b"r.html")],
    )
    # All commands print through one place: those that take long only under the encoding with the fewest characters.
    for arguments in every if "PYTHONCOERCECLOCALE" in environment else every[:2]:
        done = subprocess.run(
            [sys.executable, "-m", "hpcres", *arguments], env={**os.environ, **environment}, capture_output=True
        )
        assert done.returncode == (2 if arguments[1].endswith(b"none.npy") else 0), done.stderr
        assert b"Traceback" not in done.stderr
        assert name in done.stdout + done.stderr  # the bytes of the file system
    found = json.loads(Path(os.fsdecode(name), "m.json").read_text())
    assert found["volume"]["path"] == str(here / os.fsdecode(volume))


def test_characters_that_an_encoding_lacks_are_replaced():
    from hpcres import terminal

    terminal.replace_unencodable()
    assert "2 × 65 µm – τ ± 1 …".encode("ascii", "hpcres") == b"2 x 65 um - tau +- 1 ..."
    assert "2 × 65 µm³ τ".encode("latin-1", "hpcres") == "2 × 65 µm³ tau".encode("latin-1")
    assert "v\udce9 \u4e2d".encode("ascii", "hpcres") == b"v\xe9 \\u4e2d"


def test_hpcres_alone_prints_its_help():
    done = subprocess.run([sys.executable, "-m", "hpcres"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: hpcres [OPTIONS] [COMMAND]")
    assert "tortuosity" in done.stdout
