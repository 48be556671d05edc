"""SIGKILL at any moment: what is trusted after it is whole, and what is made again is the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from small_painting import MPI, both_stores, command, descendants, make_study

from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.journal import agreement_path, missing_shards, open_stores
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inference.verify import find_faults
from hpcres.study.file import load_study
from hpcres.volumes.stores import LabelStore

SEEDS = 2
SETTINGS = [f"inference.ensemble={SEEDS}"]
TILES = "34x2x2"
ENDS_WITHIN_SECONDS = 15.0
"""How long the other ranks of a job may live after one was killed."""


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """136 tiles of two seeds, and two coarser levels of 17 and 9 shards."""
    return make_study(tmp_path_factory.mktemp("kills") / "s", "4", (136, 8, 8))


@pytest.fixture(scope="module")
def whole(study) -> Path:
    job = open_job(
        load_study(study, SETTINGS, str(study.parent / "whole")),
        JobOptions(tiles=TILES, checkpoint=str(study.parent / "out/checkpoint.pt")),
    )
    return infer(job, Ranks()).store


class Job:
    """A run of `hpcres infer` on a store, by itself or under mpirun."""

    def __init__(self, study: Path, labels: Path, ranks: int) -> None:
        checkpoint = str(study.parent / "out/checkpoint.pt")
        run = command(study, "infer", "--output", str(labels.parent), "--checkpoint", checkpoint, "--tiles", TILES)
        run += ["--ensemble", str(SEEDS)]
        environment = {**os.environ, **MPI, "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        self._run = run if ranks == 1 else ["mpirun", "-n", str(ranks), *run]
        self._messages = labels.parent.with_name("messages")
        with self._messages.open("wb") as messages:
            self.process = subprocess.Popen(
                self._run, env=environment, stderr=messages, stdout=subprocess.DEVNULL, start_new_session=True
            )
        self.ranks = ranks

    def ending(self) -> str:
        return f"{self.ranks} ranks ended with {self.process.returncode}:\n{self._messages.read_text()[-4000:]}"

    def rank_processes(self) -> list[int]:
        if self.ranks == 1:
            return [self.process.pid]
        found = []
        for one in descendants(self.process.pid):
            with suppress(OSError):
                if b"\0hpcres\0infer" in Path(f"/proc/{one}/cmdline").read_bytes():
                    found.append(one)
        return found

    def kill(self, whom: str, rng: random.Random) -> bool:
        """SIGKILL of `all`, of `one` rank or of the `launcher` alone; returns when no process of the job lives, and
        whether that ended it: it may have been done a moment before."""
        every, ranks = descendants(self.process.pid), self.rank_processes()
        if whom == "all" or self.ranks == 1 or not ranks:
            doomed = [self.process.pid, *every]
        else:
            doomed = [rng.choice(ranks)] if whom == "one" else [self.process.pid]
        for one in doomed:
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while (alive := [one for one in every if _lives(one)]) or self.process.poll() is None:
            assert time.monotonic() < deadline, f"{whom} killed, but {alive} live on"
            time.sleep(0.01)
        return self.process.returncode != 0


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def shard_files(labels: Path) -> int:
    return sum(p.is_file() and p.name.isdigit() for p in labels.rglob("c/*/*/*"))


def refuse_broken_trust(labels: Path, expected: dict[str, bytes]) -> None:
    """Every shard that a rerun would not make again must be the undisturbed run's, to the byte."""
    if not agreement_path(labels).exists():
        return
    stores = open_stores(labels)
    missing = set(missing_shards(stores, SEEDS))
    for level in range(len(stores[0].levels)):
        for box in stores[0].shard_boxes(level):
            if (level, box) not in missing:
                for store in stores:
                    file = store.shard_path(level, box)
                    assert file.read_bytes() == expected[str(file.relative_to(labels.parent))], file


def kill_and_resume(study: Path, whole: Path, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Run, kill and rerun with one to three ranks; start over where a store is complete. Returns who was killed."""
    expected = relative(whole)
    measured = [LabelStore.open(whole).provenance[key] for key in ("measured", "spread")]
    rng, killed, round_ = random.Random(seed), dict.fromkeys(("one", "all", "launcher"), 0), 0
    while True:
        labels = folder / f"round{round_}" / "labels.zarr"
        last = sum(killed.values()) >= kills
        job = Job(study, labels, rng.choice((1, 2, 3)))
        before, whom = shard_files(labels), rng.choice(("one", "one", "all", "launcher"))
        # Mostly while shards are made; sometimes while the job is only starting.
        more, late = rng.randint(0, 30), rng.random() * 0.05
        until = time.monotonic() + (rng.random() * 3 if rng.random() < 0.2 else 120)
        while job.process.poll() is None and (last or time.monotonic() < until):
            if not last and shard_files(labels) > before + more:
                time.sleep(late)
                break
            time.sleep(0.005)
        if job.process.poll() is None and job.kill(whom, rng):
            killed[whom if job.ranks > 1 else "all"] += 1
            if labels.exists():
                refuse_broken_trust(labels, expected)
            continue
        assert job.process.returncode == 0, job.ending()
        assert relative(labels) == expected
        assert not [p for p in labels.parent.rglob("*") if p.name.endswith(".partial") or p.name.startswith(".")]
        assert find_faults(labels) == []
        assert [LabelStore.open(labels).provenance[key] for key in ("measured", "spread")] == measured
        shutil.rmtree(labels.parent)
        if last:
            return killed
        round_ += 1


def relative(labels: Path) -> dict[str, bytes]:
    return {name.removeprefix(f"{labels.parent}/"): content for name, content in both_stores(labels).items()}


def test_a_job_killed_twice_is_the_same(study, whole, tmp_path):
    killed = kill_and_resume(study, whole, tmp_path, 2, seed=3)
    assert sum(killed.values()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_job_killed_at_any_moment_is_the_same(seed, study, whole, tmp_path):
    killed = kill_and_resume(study, whole, tmp_path, 15, seed)
    print(f"killed: {killed}")
    assert sum(killed.values()) >= 15
    assert killed["one"] > 0
