"""Painting that is stopped, fails or loses files goes on or says why, and ends with the store it would have been."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from small_painting import (
    MPI,
    command,
    descendants,
    flip,
    make_study,
    mpirun,
    paint_alone,
    refuse_other_numbers,
    store_bytes,
    truncate,
    with_fault,
)
from test_bad_input import run

from hpcres.checkpoint import load_checkpoint, save_checkpoint
from hpcres.conditions import Conditions
from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.journal import Journal, StoreLock, read_journal
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inference.verify import find_faults, repair_job
from hpcres.study.file import load_study
from hpcres.volumes.stores import LabelStore


def test_rerun_paints_what_is_missing_and_nothing_else(study, copy, painted):
    victim = copy / "0/c/1/0/0"
    victim.unlink()
    untouched = copy / "0/c/0/0/0"
    before = untouched.stat().st_mtime_ns
    (copy / "0/c/0/0/1.abc.partial").write_bytes(b"half")
    job = open_job(
        load_study(study, output=str(copy.parent)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
    again = infer(job, Ranks())
    assert again.painted == 1
    assert untouched.stat().st_mtime_ns == before
    assert store_bytes(copy) == store_bytes(painted)
    assert infer(job, Ranks()).painted == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
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
    with pytest.raises(InputError, match=r"another job.*give another `output`"):
        infer(job, Ranks(), overwrite=True)
    with pytest.raises(InputError, match="another job"), StoreLock(store) as store_lock:
        find_faults(store, store_lock=store_lock)
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
    with Journal(tmp_path / "labels.zarr", 1), StoreLock(tmp_path / "labels.zarr") as store_lock:
        with pytest.raises(InputError, match=r"rank-00001\.jsonl is locked.*run this command again"):
            store_lock.take()
    with StoreLock(tmp_path / "labels.zarr") as store_lock, Journal(tmp_path / "labels.zarr", 1):
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
    job = open_job(
        load_study(study, output=str(copy.parent)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
    assert infer(job, Ranks()).painted == 1
    assert store_bytes(copy) == store_bytes(painted)


def test_unreadable_parts_of_the_input_are_listed(study, tmp_path):
    job = open_job(
        load_study(study, output=str(tmp_path)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
    volume, reads = job.conditions.volume, count()

    def read(box: Box) -> np.ndarray:
        if next(reads) == 4:  # of the fourth tile: tiles in hand at once are read in any order
            raise InputError("low.npy: this part cannot be read")
        return volume._read(box)

    failing = replace(volume, _read=read)
    with pytest.raises(Unfinished, match=r"1 of 8 tiles failed: tile [0-7] \(z .*cannot be read"):
        infer(replace(job, conditions=Conditions.of(job.checkpoint.study.low_res, failing)), Ranks())
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
    fault = (
        "from hpcres.inference import job\n"
        "def missing(*a, **k): raise InputError('low.npy: not on this node')\n"
        "if rank == 1: job.open_job = missing"
    )
    more = ["--output", str(tmp_path), "--checkpoint", str(study.parent / "out" / "checkpoint.pt")]
    done = mpirun(3, *with_fault(tmp_path, fault), "infer", str(study), *more)
    assert done.returncode == 2
    assert "rank 1: low.npy: not on this node" in done.stderr


def test_a_signal_to_one_rank_stops_them_all(tmp_path):
    path = make_study(tmp_path / "s", "4", (16, 16, 16))
    fault = (
        "def slowly(self, tile, read, **how):\n"
        "    time.sleep(0.1)\n"
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
    ("ranks", "error", "said"),
    [(2, "ENOSPC", "no space left"), pytest.param(1, "EROFS", "read-only file system", marks=pytest.mark.variant)],
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
    job = open_job(load_study(study, output=str(store.parent)), JobOptions(checkpoint=checkpoint))
    infer(job, Ranks())
    assert store_bytes(store) == store_bytes(painted)


def read_only(folder: Path) -> list[str]:
    """What to put before a command so that it cannot write to `folder`, even as root."""
    mount = f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}" && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no mounts of our own here")
    return prefix


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.variant)])
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
    job = open_job(
        load_study(study, output=str(copy.parent)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
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
    job = open_job(
        load_study(study, output=str(tmp_path)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
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
    job = open_job(
        load_study(study, output=str(copy.parent)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
    assert infer(job, Ranks()).painted == 2
    assert store_bytes(copy) == store_bytes(painted)
    assert len(read_journal(copy)) == 8


def test_a_store_without_its_journal_is_not_painted_anew_unasked(study, copy, painted):
    shutil.rmtree(copy.parent / "labels.zarr.journal")
    job = open_job(
        load_study(study, output=str(copy.parent)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
    with pytest.raises(InputError, match=r"labels.zarr.journal is not beside it"):
        infer(job, Ranks())
    with pytest.raises(InputError, match=r"put it back"), StoreLock(copy) as store_lock:
        find_faults(copy, store_lock=store_lock)
    assert infer(job, Ranks(), overwrite=True).painted == 8
    assert store_bytes(copy) == store_bytes(painted)


def test_output_that_is_not_finite_is_no_labels(study, tmp_path):
    job = open_job(
        load_study(study, output=str(tmp_path)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
    job.checkpoint.generator.conv_end.bias[1] = float("inf")
    with pytest.raises(Unfinished, match=r"8 of 8 tiles failed.*not finite"):
        infer(job, Ranks())


# ---- verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "why", "shard"),
    [(flip, "checksum", "0/c/0/1/0"), (truncate, "checksum", "0/c/1/1/1"), (Path.unlink, "missing", "0/c/0/1/0")],
    ids=["flip", "cut", "delete"],
)
def test_verify_finds_and_repair_mends(spoil, why, shard, copy, painted, capfd):
    assert find_faults(copy) == []
    spoil(copy / shard)
    (fault,) = find_faults(copy)
    assert fault.level == 0
    assert why in fault.why
    assert run(["verify", str(copy)]) == 3
    assert "level 0" in capfd.readouterr().out
    untouched = copy / "0/c/0/0/0"
    before = untouched.stat().st_mtime_ns
    assert run(["verify", str(copy), "--repair"]) == 0
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
