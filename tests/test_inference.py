"""Painting is exact and repeatable: any ranks, any tiling, any interruption give the same store."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from small_painting import (
    LABELS,
    MPI,
    command,
    descendants,
    flip,
    make_study,
    mpirun,
    paint_alone,
    store_bytes,
    truncate,
)

from hpcres.checkpoint import load_checkpoint, save_checkpoint
from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box, plan_tiles
from hpcres.inference.generate import BLOCK_BYTES, Painter, operations
from hpcres.inference.journal import Claim, Journal, read_journal
from hpcres.inference.ranks import Ranks, _refuse_singletons, join_ranks, share_of_cores
from hpcres.inference.run import infer, open_job
from hpcres.inference.verify import find_faults, repair_job
from hpcres.metrics import counts
from hpcres.metrics.named import Named, described
from hpcres.networks.superres import SuperResGenerator
from hpcres.noise import normals
from hpcres.study_file import load_study
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.stores import LabelStore


def with_fault(folder: Path, fault: str) -> list[str]:
    """hpcres as a program into which `fault`, lines of Python that see the rank's number, was injected first."""
    script = folder / "faulty.py"
    script.write_text(
        "import errno, os, time\nfrom hpcres import cli\nfrom hpcres.errors import InputError\n"
        "from hpcres.inference import generate, run\nfrom hpcres.volumes.stores import LabelStore\n"
        "rank = int(os.environ.get('OMPI_COMM_WORLD_RANK', 0))\n"
        "paint, write = generate.Painter.paint, LabelStore.write\n" + fault + "\ncli.main()\n"
    )
    return [sys.executable, str(script)]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("sofc") / "s", "4", (9, 8, 7), chunk=16)


@pytest.fixture(scope="module")
def painted(study) -> Path:
    return paint_alone(study, study.parent / "whole")


@pytest.fixture
def copy(painted, study, tmp_path) -> Path:
    """The painted store in a folder of its own, with its journal."""
    for name in ("labels.zarr", "labels.zarr.journal"):
        shutil.copytree(painted.parent / name, tmp_path / "out" / name)
    return tmp_path / "out" / "labels.zarr"


# ---- the same bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "shape", "chunk", "rank_counts"),
    [("4", (9, 8, 7), 16, (1, 3)), ("8/5", (21, 23, 12), 16, (1, 2)), ("16/3", (100, 8, 9), 16, (1, 2)),
     ("16", (5, 4, 3), 16, (1, 2)), ("64/6", (7, 5, 4), 32, (1, 2))],
)
def test_any_number_of_ranks_gives_the_same_store(scale, shape, chunk, rank_counts, tmp_path):
    path = make_study(tmp_path / "s", scale, shape, chunk=chunk)
    stores = []
    for ranks in rank_counts:
        folder = tmp_path / f"ranks{ranks}"
        checkpoint = path.parent / "out" / "checkpoint.pt"
        done = mpirun(ranks, *command(path, "infer", "--output", str(folder), "--checkpoint", str(checkpoint)))
        assert done.returncode == 0, done.stderr
        stores.append(store_bytes(folder / "labels.zarr"))
        assert f"over {ranks} rank" in done.stderr
        refuse_other_numbers(folder / "labels.zarr")
    assert len(stores[0]) > 4
    assert all(store == stores[0] for store in stores)
    store = LabelStore.open(tmp_path / "ranks1" / "labels.zarr")
    assert store.levels[0].shape == tuple(int(n * Fraction(scale)) for n in shape)
    labels = store.read(0, Box.whole(store.levels[0].shape))
    assert len(np.unique(labels)) == 3
    assert labels.max() == 2


def test_bad_input_under_mpirun_is_said_once(study, tmp_path):
    done = mpirun(2, *command(study, "infer", "--output", str(tmp_path), "--checkpoint", "none.pt"))
    assert done.returncode == 2
    assert done.stderr.count("no such checkpoint") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_store(threads, study, painted, tmp_path):
    settings = [f"inference.threads={threads}"]
    job = open_job(load_study(study, settings, str(tmp_path)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    assert store_bytes(infer(job, Ranks()).store) == store_bytes(painted)


@pytest.mark.parametrize(
    ("scale", "shape", "blocks"),
    [
        ("4", (9, 8, 17), 1), ("8/5", (21, 23, 31), 1), ("16/3", (7, 13, 9), 1), ("4", (9, 8, 17), 6),
        ("16", (5, 3, 4), 1), ("64/6", (7, 4, 5), 1),
    ],
)
def test_tiled_is_whole_but_for_near_ties(scale, shape, blocks, tmp_path):
    """At the true faces too, and where the halo (15 low-res voxels with six blocks) reaches beyond the next tile."""
    path = make_study(tmp_path / "s", scale, shape, blocks, chunk=32 if scale == "64/6" else 16)
    study = load_study(path)
    job = open_job(study)
    generator = job.checkpoint.generator
    given = np.stack([np.load(path.parent / "low.npy") == value for value in LABELS]).astype(np.float32)
    given = np.concatenate([given, normals(study.seed, Box.whole(shape))[None]])[None]
    with torch.inference_mode():
        logits = generator(torch.from_numpy(given))[0].double().numpy()
    whole = logits.argmax(0)
    labels = np.empty(whole.shape, np.uint8)
    painter = Painter(generator, job.plan, PhaseMap(tuple(LABELS), "x"), study.seed, torch.device("cpu"), 1)
    painter.block_voxels = 16 if scale != "8/5" else 24
    assert len(job.plan.tiles) > 1
    for tile in job.plan.tiles:
        labels[tile.write.slices] = painter.paint(tile, job.low_res.read)
    painter.close()
    differ = labels != whole
    best = np.sort(logits, 0)
    gap = best[-1] - best[-2]
    assert differ.mean() <= 1e-4  # a volume of 10⁵ voxels: a few near ties at most
    assert not differ.any() or gap[differ].max() < 1e-5 * np.abs(logits).max()


def test_labels_follow_seed_and_place(study, painted, tmp_path):
    other = LabelStore.open(paint_alone(study, tmp_path, seed=1))
    ours = LabelStore.open(painted)
    box = Box.whole(ours.levels[0].shape)
    assert 0.001 < (other.read(0, box) != ours.read(0, box)).mean() < 0.9


# ---- interruption ----------------------------------------------------------------------------------------------


def test_rerun_paints_what_is_missing_and_nothing_else(study, copy, painted):
    victim = copy / "0/c/1/0/0"
    victim.unlink()
    untouched = copy / "0/c/0/0/0"
    before = untouched.stat().st_mtime_ns
    (copy / "0/c/0/0/1.abc.partial").write_bytes(b"half")
    job = open_job(load_study(study, output=str(copy.parent)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    again = infer(job, Ranks())
    assert again.painted == 1
    assert untouched.stat().st_mtime_ns == before
    assert store_bytes(copy) == store_bytes(painted)
    assert infer(job, Ranks()).painted == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_tile_in_hand(number, tmp_path):
    path = make_study(tmp_path / "s", "4", (16, 16, 16))
    arguments = command(path, "infer", "--tiles", "4x4x4")
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    first = path.parent / "out/labels.zarr/0/c/0/0"
    deadline = time.monotonic() + 60
    while not (first.exists() and len(list(first.iterdir())) > 1) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "run the same command to go on" in said
    store = path.parent / "out/labels.zarr"
    shards = [p for p in (store / "0/c").rglob("*") if p.is_file()]
    assert 0 < len(shards) < 64
    assert not list(store.rglob("*.partial"))
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert store_bytes(store) == store_bytes(paint_alone(path, tmp_path / "f", tiles="4x4x4"))


def test_two_jobs_on_one_store_the_second_refuses(painted, tmp_path, monkeypatch):
    """Until the first is killed as nothing but SIGKILL can: its lock is gone with it."""
    path = make_study(tmp_path / "s", "4", (9, 8, 7))
    slowly = (
        "def slowly(self, tile, read, **how):\n"
        "    if tile.index > 1: time.sleep(600)\n"
        "    return paint(self, tile, read, **how)\n"
        "generate.Painter.paint = slowly"
    )
    environment = {**os.environ, **MPI, "SLURM_JOB_ID": "4711"}
    arguments = ["mpirun", "-n", "2", *with_fault(tmp_path, slowly), "infer", str(path)]
    said = tmp_path / "stderr"
    with said.open("w") as stderr:
        first = subprocess.Popen(arguments, env=environment, stderr=stderr)
    store = path.parent / "out/labels.zarr"
    deadline = time.monotonic() + 120
    while len(read_journal(store)) < 2 and time.monotonic() < deadline:
        assert first.poll() is None, said.read_text()
        time.sleep(0.02)
    assert len(read_journal(store)) == 2, said.read_text()
    before, ours = store_bytes(store), descendants(first.pid)
    second = mpirun(2, *command(path, "infer"))
    assert second.returncode == 2, second.stderr
    assert second.stderr.count("another job is painting it") == 1, second.stderr
    told = re.search(r"\(job 4711, process (\d+) on (\S+) since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\)", second.stderr)
    assert told
    assert int(told.group(1)) in ours
    assert told.group(2) == socket.gethostname()
    job = open_job(load_study(path))
    monkeypatch.setattr("hpcres.inference.journal._DYING_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"another job.*give another --output"):
        infer(job, Ranks(), overwrite=True)
    with pytest.raises(InputError, match="another job"), Claim(store) as claim:
        find_faults(store, claim=claim)
    assert store_bytes(store) == before
    for one in (first.pid, *ours):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    first.wait()
    monkeypatch.undo()
    infer(job, Ranks())
    assert store_bytes(store) == store_bytes(painted)


def test_a_rank_that_outlives_its_job_is_waited_for(tmp_path, monkeypatch):
    """Rank 0 and its lock are gone, another rank still writes."""
    monkeypatch.setattr("hpcres.inference.journal._LEFT_OVER_SECONDS", 0.2)
    with Journal(tmp_path / "labels.zarr", 1), Claim(tmp_path / "labels.zarr") as claim:
        with pytest.raises(InputError, match=r"rank-00001\.jsonl is locked.*run this command again"):
            claim.take()
    with Claim(tmp_path / "labels.zarr") as claim, Journal(tmp_path / "labels.zarr", 1):
        pass


def test_without_locks_it_says_so_and_goes_on(study, painted, tmp_path, monkeypatch, capfd):
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    assert store_bytes(paint_alone(study, tmp_path)) == store_bytes(painted)
    assert capfd.readouterr().err.count("has no locks") == 1


@pytest.mark.parametrize("size", [0, 100, 20000])
def test_a_shard_that_a_loss_of_power_cut_short_is_painted_again(size, study, copy, painted):
    """Renamed into place and noted, but its bytes never reached the disk, or others did."""
    os.truncate(copy / "0/c/1/0/0", size)
    job = open_job(load_study(study, output=str(copy.parent)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    assert infer(job, Ranks()).painted == 1
    assert store_bytes(copy) == store_bytes(painted)


def test_unreadable_parts_of_the_input_are_listed(study, tmp_path):
    job = open_job(load_study(study, output=str(tmp_path)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    volume, reads = job.low_res, count()

    def read(box: Box) -> np.ndarray:
        if next(reads) == 4:  # of the fourth tile: tiles in hand at once are read in any order
            raise InputError("low.npy: this part cannot be read")
        return volume._read(box)

    with pytest.raises(Unfinished, match=r"1 of 8 tiles failed: tile [0-7] \(z .*cannot be read"):
        infer(replace(job, low_res=replace(volume, _read=read)), Ranks())
    assert infer(job, Ranks()).painted == 1


def test_a_failing_rank_ends_the_job_and_says_where(tmp_path):
    """An exception in one rank must not leave the others waiting."""
    path = make_study(tmp_path / "s", "4", (9, 8, 7))
    fault = (
        "def failing(self, tile, read, **how):\n"
        "    if rank == 1: raise RuntimeError('out of luck')\n"
        "    time.sleep(0.5)\n"
        "    return paint(self, tile, read, **how)\n"
        "generate.Painter.paint = failing"
    )
    started = time.monotonic()
    done = mpirun(2, *with_fault(tmp_path, fault), "infer", str(path))
    assert done.returncode not in (0, 2, 3, 75)
    assert re.search(r"rank 1, tile \d \(z .*out of luck", done.stderr)
    assert time.monotonic() - started < 60


def test_an_error_of_one_rank_alone_does_not_hang_the_others(study, tmp_path):
    fault = "def missing(*a, **k): raise InputError('low.npy: not on this node')\nif rank == 1: run.open_job = missing"
    more = ["--output", str(tmp_path), "--checkpoint", str(study.parent / "out" / "checkpoint.pt")]
    done = mpirun(3, *with_fault(tmp_path, fault), "infer", str(study), *more)
    assert done.returncode == 2
    assert "rank 1: low.npy: not on this node" in done.stderr


def test_a_signal_to_one_rank_stops_them_all(tmp_path):
    path = make_study(tmp_path / "s", "4", (16, 16, 16))
    fault = (
        "def slowly(self, tile, read, **how):\n"
        "    time.sleep(0.5)\n"
        "    if tile.index == 33: os.kill(os.getpid(), 15)\n"
        "    return paint(self, tile, read, **how)\n"
        "generate.Painter.paint = slowly"
    )
    done = mpirun(2, *with_fault(tmp_path, fault), "infer", str(path), "--tiles", "4x4x4")
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("stopped by SIGTERM") == 1
    painted = [int(p.parent.parent.name) for p in (path.parent / "out/labels.zarr/0/c").rglob("*") if p.is_file()]
    assert 2 < len(painted) < 45  # both ranks had begun, and neither went on


@pytest.mark.parametrize(
    ("ranks", "error", "said"), [(2, "ENOSPC", "no space left"), (1, "EROFS", "read-only file system")]
)
def test_a_disk_that_takes_no_more_stops_every_rank_and_loses_nothing(ranks, error, said, study, painted, tmp_path):
    fault = (
        "def full(self, level, box, labels):\n"
        f"    if box.start == (32, 0, 16): raise OSError(errno.{error}, os.strerror(errno.{error}), 'shard')\n"
        "    write(self, level, box, labels)\n"
        "LabelStore.write = full"
    )
    checkpoint = str(study.parent / "out" / "checkpoint.pt")
    arguments = ["infer", str(study), "--output", str(tmp_path / "o"), "--checkpoint", checkpoint]
    done = mpirun(ranks, *with_fault(tmp_path, fault), *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(said) == 1
    assert "Traceback" not in done.stderr
    store = tmp_path / "o/labels.zarr"
    assert not list(store.rglob("*.partial"))
    assert 0 < len([p for p in (store / "0/c").rglob("*") if p.is_file()]) < 8
    job = open_job(load_study(study, output=str(store.parent)), checkpoint=checkpoint)
    infer(job, Ranks())
    assert store_bytes(store) == store_bytes(painted)


def read_only(folder: Path) -> list[str]:
    """What to put before a command so that it cannot write to `folder`, even as root."""
    mount = f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}" && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mounts of our own here")
    return prefix


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_read_only_store_is_said_in_one_line(ranks, study, copy, painted):
    prefix = read_only(copy.parent)
    (copy / "0/c/1/0/0").unlink()
    before = store_bytes(copy)
    arguments = command(study, "infer", "--output", str(copy.parent))
    arguments += ["--checkpoint", str(study.parent / "out" / "checkpoint.pt")]
    done = mpirun(ranks, *prefix, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("read-only file system") == 1
    assert "Traceback" not in done.stderr
    assert store_bytes(copy) == before
    job = open_job(load_study(study, output=str(copy.parent)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    infer(job, Ranks())
    assert store_bytes(copy) == store_bytes(painted)


@pytest.mark.parametrize(
    ("ranks", "harm", "said"),
    [(2, "os.rename(LOW, LOW + '.away')", "has gone while"), (1, "os.utime(LOW)", "was written to while")],
)
def test_an_input_that_vanishes_or_changes_stops_every_rank_and_loses_nothing(ranks, harm, said, painted, tmp_path):
    path = make_study(tmp_path / "s", "4", (9, 8, 7))
    low_res = path.parent / "low.npy"
    kept = low_res.read_bytes()
    fault = (
        f"LOW = {str(low_res)!r}\n"
        "def losing(self, tile, read, **how):\n"
        f"    if tile.index == 4: time.sleep(1); {harm}\n"
        "    return paint(self, tile, read, **how)\n"
        "generate.Painter.paint = losing"
    )
    done = mpirun(ranks, *with_fault(tmp_path, fault), "infer", str(path))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(f"low.npy: {said}") == 1
    assert "Traceback" not in done.stderr
    low_res.write_bytes(kept)
    assert 0 < infer(open_job(load_study(path)), Ranks()).painted < 8
    assert store_bytes(path.parent / "out/labels.zarr") == store_bytes(painted)


def test_a_tile_that_cannot_be_written_is_listed(study, painted, tmp_path, monkeypatch):
    write, failing = LabelStore.write, [True]

    def unlucky(self, level, box, labels):
        if box.start == (32, 0, 16) and failing:
            raise OSError(errno.EIO, "Input/output error")
        write(self, level, box, labels)

    monkeypatch.setattr(LabelStore, "write", unlucky)
    job = open_job(load_study(study, output=str(tmp_path)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    with pytest.raises(Unfinished, match=r"1 of 8 tiles failed: tile 5 \(z 32:36 y 0:16 x 16:28\).*Input/output"):
        infer(job, Ranks())
    assert not LabelStore.open(job.output).provenance["complete"]
    failing.clear()
    assert infer(job, Ranks()).painted == 1
    assert store_bytes(job.output) == store_bytes(painted)
    assert LabelStore.open(job.output).provenance["complete"]


def test_a_shard_that_no_journal_knows_is_painted_again(study, copy, painted):
    """A kill between the shard and its journal line; one of the two did not reach the disk whole."""
    journal = next((copy.parent / "labels.zarr.journal").glob("*.jsonl"))
    lines = journal.read_text().splitlines(keepends=True)
    known = [line for line in lines if json.loads(line)["start"] not in ([0, 0, 16], [32, 0, 0])]
    journal.write_text("".join(known) + lines[0][:20])
    truncate(copy / "0/c/1/0/0")
    job = open_job(load_study(study, output=str(copy.parent)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    assert infer(job, Ranks()).painted == 2
    assert store_bytes(copy) == store_bytes(painted)
    assert len(read_journal(copy)) == 8


def test_a_store_without_its_journal_is_not_painted_anew_unasked(study, copy, painted):
    shutil.rmtree(copy.parent / "labels.zarr.journal")
    job = open_job(load_study(study, output=str(copy.parent)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    with pytest.raises(InputError, match=r"labels.zarr.journal is not beside it"):
        infer(job, Ranks())
    with pytest.raises(InputError, match=r"put it back"), Claim(copy) as claim:
        find_faults(copy, claim=claim)
    assert infer(job, Ranks(), overwrite=True).painted == 8
    assert store_bytes(copy) == store_bytes(painted)


def test_output_that_is_not_finite_is_no_labels(study, tmp_path):
    job = open_job(load_study(study, output=str(tmp_path)), checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    job.checkpoint.generator.conv_end.bias[1] = float("inf")
    with pytest.raises(Unfinished, match=r"8 of 8 tiles failed.*not finite"):
        infer(job, Ranks())


# ---- measured as it is made --------------------------------------------------------------------------------------


def refuse_other_numbers(store: Path) -> None:
    """The store's own numbers must be those of its labels, counted in one piece, to the last digit."""
    opened = LabelStore.open(store)
    whole = counts.count(opened.read(0, Box.whole(opened.levels[0].shape)), labels=range(3))
    size = opened.levels[0].voxel_size
    assert opened.provenance["measured"] == described(whole, Named(dict(enumerate(LABELS.values())), size, "nanometer"))


@pytest.mark.parametrize(
    ("scale", "shape", "tiles"),
    [
        ("4", (9, 8, 7), "1x1x1"), ("4", (9, 8, 7), "3x2x2"), ("8/5", (20, 20, 10), "2x3x2"),
        ("16/3", (6, 9, 9), "3x3x3"),
    ],
)
@pytest.mark.parametrize("boundary", ["replicate", "periodic", "mirror"])
def test_the_store_knows_its_numbers_when_the_last_tile_lands(scale, shape, tiles, boundary, tmp_path):
    path = make_study(tmp_path / "s", scale, shape)
    job = open_job(load_study(path, [f"inference.boundary={boundary}"]), tiles=tiles)
    assert len(job.plan.tiles) > 1 or tiles == "1x1x1"
    refuse_other_numbers(infer(job, Ranks()).store)
    before = LabelStore.open(job.output).provenance["measured"]
    (job.output / "0/c/0/0/0").unlink()
    LabelStore.open(job.output).set_provenance(complete=False, measured={})
    infer(job, Ranks())
    assert LabelStore.open(job.output).provenance["measured"] == before


def test_the_numbers_are_those_of_hpcres_metrics(painted, hpcres, tmp_path):
    done = hpcres("metrics", painted, "--output", tmp_path / "m.json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "m.json").read_text())["volume"]
    measured = LabelStore.open(painted).provenance["measured"]
    assert measured.items() <= metrics.items()
    assert {"counts", "volume_fraction", "specific_surface_area", "interphase_area", "tpb"} <= set(measured)
    assert "measured" not in metrics["provenance"]


# ---- who makes what ----------------------------------------------------------------------------------------------


PACED = (  # how long a tile takes on each rank, by its number; and what a rank spent while it made shards
    "import numba\n"
    "@numba.njit(nogil=True)\n"
    "def busy(n):\n"
    "    s = 0.0\n"
    "    for i in range(n): s += i ** 0.5\n"
    "    return s\n"
    "def paced(self, tile, read, **how):\n"
    "    until = time.monotonic() + pace[rank]\n"
    "    if rank == 0 and compute:\n"
    "        while time.monotonic() < until: busy(100000)\n"
    "    else: time.sleep(pace[rank])\n"
    "    return paint(self, tile, read, **how)\n"
    "generate.Painter.paint = paced\n"
    "make = run._make\n"
    "def measured(*a):\n"
    "    busy(1)\n"
    "    used, began = time.process_time(), time.monotonic()\n"
    "    try: return make(*a)\n"
    "    finally: print('MADE', rank, time.process_time() - used, began, time.monotonic(), flush=True)\n"
    "run._make = measured\n"
)


def made_by(done: subprocess.CompletedProcess[str]) -> list[tuple[float, float, float]]:
    """Of every rank's making: CPU seconds, begin and end in seconds of the one clock that all processes share."""
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"MADE \d (\S+) (\S+) (\S+)", done.stdout)
    assert len(lines) == 3
    return [(float(used), float(began), float(ended)) for used, began, ended in lines]


def test_a_slow_rank_does_not_hold_the_rest_and_the_pyramid_grows_meanwhile(tmp_path):
    """Rank 1 takes ten times as long as rank 2, while rank 0 computes without a pause and answers all the same."""
    path = make_study(tmp_path / "s", "4", (136, 8, 8))
    fault = "pace, compute = [0.05, 0.5, 0.05], True\n" + PACED
    spent = made_by(mpirun(3, *with_fault(tmp_path, fault), "infer", str(path), "--tiles", "34x2x2"))
    store = path.parent / "out/labels.zarr"
    noted = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(store.with_name("labels.zarr.journal").glob("*.jsonl"))
    ]
    tiles, times = [sum(one["level"] == 0 for one in lines) for lines in noted], sorted(
        (one["time"], one["level"]) for lines in noted for one in lines
    )  # fmt: skip
    assert sum(tiles) == 136
    assert tiles[1] < 20  # of an even split it would have had 45, for 11 s with two in hand
    assert min(tiles[0], tiles[2]) > 30
    # 1.6 s of pacing on idle cores; an even split would take 11 s, however idle they are.
    assert max(ended - began for _, began, ended in spent) < 136 / 3 / (2 / 0.5) / 2
    levels = [level for _, level in times]
    assert Counter(levels) == {0: 136, 1: 17, 2: 9}
    assert levels.index(1) < 60
    assert levels.index(2) < 90
    assert store_bytes(store) == store_bytes(paint_alone(path, tmp_path / "f", tiles="34x2x2"))


def test_waiting_costs_no_core_and_more_ranks_than_tiles_are_no_harm(tmp_path):
    path = make_study(tmp_path / "s", "4", (9, 8, 7))
    fault = "pace, compute = [2.0] * 3, False\n" + PACED
    done = mpirun(3, *with_fault(tmp_path, fault), "infer", str(path), "--tiles", "1x1x1")
    assert "2 ranks have no tile" in done.stderr
    spent = made_by(done)
    assert min(ended for _, _, ended in spent) - min(began for _, began, _ in spent) > 2  # none leaves before the tile
    assert sorted(used for used, _, _ in spent)[1] < 0.4  # the third loads its kernels and paints


# ---- verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "why"),
    [(flip, "checksum"), (truncate, "checksum"), (Path.unlink, "missing")],
    ids=["flip", "cut", "delete"],
)
@pytest.mark.parametrize("shard", ["0/c/0/1/0", "0/c/1/1/1"])
def test_verify_finds_and_repair_mends(spoil, why, shard, copy, painted, hpcres):
    assert find_faults(copy) == []
    spoil(copy / shard)
    (fault,) = find_faults(copy)
    assert fault.level == 0
    assert why in fault.why
    found = hpcres("verify", copy)
    assert found.returncode == 3, found.stderr
    assert "level 0" in found.stdout
    untouched = copy / "0/c/0/0/0"
    before = untouched.stat().st_mtime_ns
    mended = hpcres("verify", copy, "--repair")
    assert mended.returncode == 0, mended.stderr
    assert untouched.stat().st_mtime_ns == before
    assert store_bytes(copy) == store_bytes(painted)
    assert find_faults(copy) == []
    refuse_other_numbers(copy)


def test_damage_is_found_without_a_journal_where_it_shows(copy):
    shutil.rmtree(copy.parent / "labels.zarr.journal")
    assert find_faults(copy) == []
    truncate(copy / "0/c/1/0/1")
    assert [fault.box.start for fault in find_faults(copy)] == [(32, 0, 16)]


def test_journal_survives_a_line_cut_short(copy):
    whole = read_journal(copy)
    file = next((copy.parent / "labels.zarr.journal").glob("*.jsonl"))
    with file.open("a") as journal:
        journal.write('{"level": 0, "start": [0, 0')
    assert read_journal(copy) == whole


def test_repair_with_another_checkpoint_is_refused_before_anything_is_removed(study, copy, tmp_path):
    other = tmp_path / "other.pt"
    loaded = load_checkpoint(study.parent / "out/checkpoint.pt")
    loaded.generator.conv_end.bias[0] += 1
    save_checkpoint(other, generator=loaded.generator, study=loaded.study, step=2)
    LabelStore.open(copy).set_provenance(checkpoint=str(other))
    with pytest.raises(InputError, match="has other weights"):
        repair_job(copy)


# ---- ranks and plan ------------------------------------------------------------------------------------------------


def test_tasks_without_mpi_are_refused(monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MPI_LOCALNRANKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("SLURM_NTASKS", "4"), ("SLURM_PROCID", "1"), ("SLURM_STEP_ID", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="SLURM_NTASKS is 4"), join_ranks():
        pass


def test_mpirun_counts_where_it_reached_another_node_by_a_step_of_its_own(monkeypatch):
    step = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in {**step, "OMPI_COMM_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    _refuse_singletons(4)
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_SIZE is 4 but MPI knows of 1"):
        _refuse_singletons(1)


def test_cores_are_shared_only_where_ranks_are_not_bound():
    bound = [frozenset(range(4 * rank, 4 * rank + 4)) for rank in range(4)]
    assert [share_of_cores(one, bound) for one in bound] == [4, 4, 4, 4]
    free = frozenset(range(8))
    assert share_of_cores(free, [free, free]) == 4
    assert share_of_cores(frozenset({0, 1}), [frozenset({0, 1})] * 3) == 1


def test_no_study_is_needed(study, painted, tmp_path, monkeypatch, hpcres):
    done = hpcres(
        "infer", "--checkpoint", study.parent / "out/checkpoint.pt", "--low-res", study.parent / "low.npy",
        "--output", tmp_path / "alone.zarr", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert store_bytes(tmp_path / "alone.zarr") == store_bytes(painted)


def test_plan_prints_what_infer_does(study, hpcres):
    done = hpcres("plan", study, "--tiles", "2x2x2", "--ranks", "3")
    assert done.returncode == 0, done.stderr
    assert "2 × 2 × 2 = 8, 32 × 16 × 16 voxels each, in chunks of 16³" in done.stdout
    assert "3, 3 tiles on the busiest, 0 idle" in done.stdout
    assert re.search(r"sbatch .*slurm/infer.sh .*--tiles 2x2x2", done.stdout)


def test_operations_match_the_published_counts():
    """Per output voxel at width 8: 684 k at scale factor 8, 630 k at 4; at width 5: 11.8 k and 11.1 k."""
    for scale, width, expected in ((8, 8, 684e3), (4, 8, 630e3), (8, 5, 11.8e3), (4, 5, 11.1e3)):
        generator = SuperResGenerator(1, 3, Fraction(scale), width)
        box = Box.whole((8, 8, 8))
        assert operations(generator, box) / (box.voxels * scale**3) == pytest.approx(expected, rel=0.02)


def test_smoothing_noise_takes_what_is_planned_for_it():
    plan = plan_tiles((96, 96, 96), Fraction(2), (1, 1, 1), 7, 64)
    generator = SuperResGenerator(2, 3, Fraction(2), 2, 2, noise_sigma_voxels=(0.0, 24.0, 3.0))
    painter = Painter(generator, plan, PhaseMap((0, 1), "x"), 0, torch.device("cpu"), 1)
    painter.block_voxels = 64
    reads = painter.network.reads(Box((64,) * 3, (128,) * 3))
    tracemalloc.start()
    noise = painter._noise(0, 1, reads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert noise.shape == reads.shape
    assert painter.noise_bytes == pytest.approx(peak, rel=0.1)
    painter.close()
    plain = Painter(SuperResGenerator(2, 3, Fraction(2), 2), plan, PhaseMap((0, 1), "x"), 0, torch.device("cpu"), 1)
    assert plain.noise_bytes == 0
    plain.close()


def test_blocks_keep_their_bound():
    plan = plan_tiles((144, 80, 64), Fraction(4), (1, 1, 1), 13, 64)
    for width in (3, 5, 8):
        painter = Painter(
            SuperResGenerator(2, 3, Fraction(4), width), plan, PhaseMap((0, 1), "x"), 0, torch.device("cpu"), 1
        )
        edge = painter.block_voxels
        assert edge == 64 or painter.network.block_bytes(edge) <= BLOCK_BYTES
        seen = np.zeros(plan.shape, np.uint8)
        for block in painter.blocks_of(plan.tiles[0].write):
            assert max(block.shape) <= edge
            seen[block.slices] += 1
        assert (seen == 1).all()
        assert len(painter.blocks_of(Box((0, 0, 0), (edge + 1,) * 3))) == 1
        painter.close()
