"""Painting is exact: any ranks, threads and tiling give the same store, with the numbers of its labels."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from small_painting import (
    LABELS,
    command,
    make_study,
    mpirun,
    paint_alone,
    refuse_other_numbers,
    store_bytes,
    with_fault,
)

from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.inference.generate import Painter
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.ranks import Ranks, _refuse_singletons, join_ranks, share_of_cores
from hpcres.inference.run import infer
from hpcres.noise import normals
from hpcres.study.file import load_study
from hpcres.volumes.stores import LabelStore

# ---- the same bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "shape", "chunk", "ranks"),
    [
        ("4", (9, 8, 7), 16, 3),
        ("8/5", (21, 23, 12), 16, 2),
        ("16/3", (100, 8, 9), 16, 2),
        ("64/6", (7, 5, 4), 32, 2),
        pytest.param("16", (5, 4, 3), 16, 2, marks=pytest.mark.variant),
        pytest.param("4", (9, 8, 7), 16, 1, marks=pytest.mark.variant),
    ],
)
def test_any_number_of_ranks_gives_the_same_store(scale, shape, chunk, ranks, tmp_path):
    path = make_study(tmp_path / "s", scale, shape, chunk=chunk)
    alone = paint_alone(path, tmp_path / "alone")
    refuse_other_numbers(alone)
    assert len(store_bytes(alone)) > 4
    folder, checkpoint = tmp_path / "shared", path.parent / "out" / "checkpoint.pt"
    done = mpirun(ranks, *command(path, "infer", "--output", str(folder), "--checkpoint", str(checkpoint)))
    assert done.returncode == 0, done.stderr
    assert store_bytes(folder / "labels.zarr") == store_bytes(alone)
    assert f"over {ranks} rank" in done.stderr
    refuse_other_numbers(folder / "labels.zarr")
    store = LabelStore.open(alone)
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
    job = open_job(
        load_study(study, settings, str(tmp_path)), JobOptions(checkpoint=str(study.parent / "out" / "checkpoint.pt"))
    )
    assert store_bytes(infer(job, Ranks()).store) == store_bytes(painted)


@pytest.mark.parametrize(
    ("scale", "shape", "blocks"),
    [
        ("4", (9, 8, 17), 1),
        ("8/5", (21, 23, 31), 1),
        ("16/3", (7, 13, 9), 1),
        ("4", (9, 8, 17), 6),
        ("16", (5, 3, 4), 1),
        ("64/6", (7, 4, 5), 1),
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
    painter = Painter(generator, job.plan, study.seed, torch.device("cpu"), 1)
    painter.block_voxels = 16 if scale != "8/5" else 24
    assert len(job.plan.tiles) > 1
    for tile in job.plan.tiles:
        labels[tile.write.slices] = painter.paint(tile, job.conditions)
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


# ---- measured as it is made --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "shape", "tiles"),
    [
        ("4", (9, 8, 7), "1x1x1"),
        ("4", (9, 8, 7), "3x2x2"),
        ("8/5", (20, 20, 10), "2x3x2"),
        ("16/3", (6, 9, 9), "3x3x3"),
    ],
)
@pytest.mark.parametrize("boundary", ["replicate", "periodic", "mirror"])
def test_the_store_knows_its_numbers_when_the_last_tile_lands(scale, shape, tiles, boundary, tmp_path):
    path = make_study(tmp_path / "s", scale, shape)
    job = open_job(load_study(path, [f"inference.boundary={boundary}"]), JobOptions(tiles=tiles))
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
    tiles, times = (
        [sum(one["level"] == 0 for one in lines) for lines in noted],
        sorted((one["time"], one["level"]) for lines in noted for one in lines),
    )
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


# ---- ranks and study ----------------------------------------------------------------------------------------


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
        "infer",
        "--checkpoint",
        study.parent / "out/checkpoint.pt",
        "--low-res",
        study.parent / "low.npy",
        "--output",
        tmp_path / "alone.zarr",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert store_bytes(tmp_path / "alone.zarr") == store_bytes(painted)
