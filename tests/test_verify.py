"""An audit sees seams where there are some, and none where there are none; a plan says what its job will do."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_painting import make_study, mpirun, paint_alone, store_bytes

from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box, plan_tiles
from hpcres.inference import plan
from hpcres.inference.generate import Painter
from hpcres.inference.plan import Cost, describe, large_plan
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import Journal, infer, open_job
from hpcres.inference.verify import audit, find_faults, repair_job
from hpcres.study_file import load_study
from hpcres.volumes.stores import LabelStore

TILES = "3x3x3"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """48³ voxels in 27 tiles of 16³, so 27 shifted ones, eight of them whole."""
    return make_study(tmp_path_factory.mktemp("audit") / "s", "4", (12, 12, 12))


@pytest.fixture
def store(study, tmp_path) -> Path:
    return paint_alone(study, tmp_path / "out", tiles=TILES)


def spoil(path: Path, box: Box) -> int:
    """Other labels in a box, in shards that are whole and noted in the journal; returns how many."""
    store = LabelStore.open(path)
    with Journal(path, 0) as journal:
        for shard in store.shard_boxes(0):
            part = shard.clipped(box)
            if part.voxels:
                labels = store.read(0, shard)
                inside = part.relative_to(shard.start).slices
                labels[inside] = (labels[inside] + 1) % 3
                store.write(0, shard, labels)
                journal.note([store], 0, shard)
    assert find_faults(path) == []
    return box.voxels


def test_an_honest_store_has_no_seam(store):
    seen = []
    outcome = audit(repair_job(store), 100, Ranks(), lambda done, total: seen.append((done, total)))
    assert (outcome.tiles, outcome.voxels) == (27, 40**3)  # all but the first half tile along each axis
    assert outcome.flips <= 2
    assert 0 < outcome.face_voxels < outcome.voxels
    assert seen == [(n + 1, 27) for n in range(27)]


def test_labels_altered_along_a_tile_plane_are_a_seam(store):
    altered = spoil(store, Box((8, 8, 30), (48, 48, 33)))  # the face at x = 32, two voxels before it and one behind
    outcome = audit(repair_job(store), 27, Ranks())
    assert altered <= outcome.flips <= altered + 2
    assert altered <= outcome.face_flips
    near = np.zeros(48, bool)
    for face in (16, 32):
        near[face - 4 : face + 4] = True
    assert outcome.face_voxels == 40**3 - np.count_nonzero(~near[8:]) ** 3
    with pytest.raises(Unfinished, match="they gather at tile faces, which is a seam"):
        outcome.refuse_seams(store)


def test_labels_altered_elsewhere_are_no_seam(store):
    altered = spoil(store, Box((21, 22, 23), (26, 27, 28)))
    outcome = audit(repair_job(store), 27, Ranks())
    assert altered <= outcome.flips <= altered + 2
    assert outcome.face_flips <= 2
    with pytest.raises(Unfinished, match="they do not gather at tile faces"):
        outcome.refuse_seams(store)


def test_a_halo_that_is_too_short_paints_nothing(study, tmp_path):
    job = open_job(load_study(study, output=str(tmp_path)), checkpoint=str(study.parent / "out/checkpoint.pt"))
    short = plan_tiles(job.plan.low_res_shape, job.plan.scale, (3, 3, 3), 2, 16)
    with pytest.raises(AssertionError, match="reads"):
        infer(replace(job, plan=short, settings=job.settings.model_copy(update={"tiles": (3, 3, 3)})), Ranks())


def test_audit_by_ranks_says_what_one_says(store, hpcres):
    honest = hpcres("verify", store, "--audit", "5")
    assert honest.returncode == 0, honest.stderr
    assert "audit: 5 of 5" in honest.stderr
    spoil(store, Box((8, 8, 30), (48, 48, 33)))
    shared = mpirun(3, *honest.args[:1], "-m", "hpcres", "verify", str(store), "--audit", "5")
    assert shared.returncode == 3
    assert shared.stderr.count("may change; they gather at tile faces, which is a seam") == 1
    outcome = audit(repair_job(store), 5, Ranks())
    assert shared.stdout == f"{store}: every shard is there and whole\n{store}: {outcome}\n"
    assert re.match(r"5 tiles painted again half a tile later, labels that differ \d+ of \d+ \(", str(outcome))


def test_an_audit_spreads_over_the_volume(store, monkeypatch):
    chosen, paint = [], Painter.paint
    monkeypatch.setattr(
        Painter, "paint", lambda self, tile, read, **more: chosen.append(tile.write) or paint(self, tile, read, **more)
    )
    audit(repair_job(store), 3, Ranks())
    assert len({box.start[0] for box in chosen}) == 3
    audit(repair_job(store), 3, Ranks())
    assert chosen[3:] == chosen[:3]


def test_audit_of_another_input_is_refused(study, store, tmp_path):
    labels = np.load(study.parent / "low.npy")
    labels[3, 3, 3] = 7 if labels[3, 3, 3] != 7 else 9
    np.save(tmp_path / "other.npy", labels)
    LabelStore.open(store).set_provenance(low_res=str(tmp_path / "other.npy"))
    with pytest.raises(InputError, match="was painted with input_sha256"):
        audit(repair_job(store), 1, Ranks())


def test_one_device_may_audit_what_another_painted(study, store):
    LabelStore.open(store).set_provenance(arithmetic="torch 9 cuda fp32, blocks of 192")
    assert audit(repair_job(store), 1, Ranks()).flips <= 2
    with pytest.raises(InputError, match="was painted with arithmetic torch 9"):
        infer(repair_job(store), Ranks())


def test_tiles_too_small_to_shift_are_said(tmp_path):
    path = make_study(tmp_path / "s", "16/3", (6, 6, 6))
    with pytest.raises(InputError, match="16 x 16 x 16 voxels are too small to be shifted"):
        audit(repair_job(paint_alone(path, tmp_path / "out")), 1, Ranks())


def test_a_store_from_a_raw_file_can_be_repaired(study, tmp_path):
    """A file without a header: the store's provenance knows what the study said of it."""
    np.load(study.parent / "low.npy").astype(np.uint8).tofile(tmp_path / "low.raw")
    content = yaml.safe_load(study.read_text())
    content["low_res"] |= {"path": str(tmp_path / "low.raw"), "raw": {"shape": [12, 12, 12]}}
    raw = study.with_name("raw.yaml")
    raw.write_text(yaml.safe_dump(content))
    store = paint_alone(raw, tmp_path / "out", tiles=TILES)
    before = store_bytes(store)
    (store / "0/c/1/1/1").unlink()
    infer(repair_job(store), Ranks())
    assert store_bytes(store) == before


# ---- plan ------------------------------------------------------------------------------------------------------


def make_cost(shape: tuple[int, int, int], scale: str, tiles: int, ranks: int) -> Cost:
    """At 10⁶ voxels/s per rank of two threads, with 1045 MiB a rank."""
    plan = plan_tiles(shape, Fraction(scale), (tiles,) * 3, 5, 64)
    return Cost(plan, ranks, 2, 64, 1045 * 2**20, 1e6, 1000.0)


@pytest.mark.parametrize(("shape", "scale"), [((100, 70, 20), "4"), ((200, 3, 61), "8/5"), ((16, 16, 16), "4")])
def test_planned_shards_are_the_files_of_the_store(shape, scale, tmp_path):
    cost = make_cost(shape, scale, 3, 2)
    store = LabelStore.create(
        tmp_path / "s.zarr", cost.plan.shape, shard=cost.plan.tile_voxels, chunk_voxels=64, voxel_size=1.0,
        unit="voxel", phases=("a", "b"), provenance={},
    )  # fmt: skip
    boxes = [box for level in range(len(store.levels)) for box in store.shard_boxes(level)]
    assert cost.shards == len(boxes)
    assert cost.store_bytes == sum(box.voxels for box in boxes)


def test_hours_follow_the_busiest_rank():
    cost = make_cost((96, 96, 96), "4", 2, 3)  # eight tiles of 192³, the busiest rank has three
    assert cost.hours == pytest.approx(3 * 192**3 / 1e6 / 3600)
    assert cost.core_hours == pytest.approx(cost.hours * 3 * 2)


@pytest.mark.parametrize("scale", [Fraction(64, d) for d in (2, 6, 8, 9, 12, 16, 40, 63, 64)])
def test_large_volume_is_8192_voxels_at_every_scale_factor(scale):
    small = make_cost((64, 64, 64), str(scale), 1, 1)
    large = replace(small, plan=large_plan(small.plan), ranks=1024)
    assert large.plan.shape == (8192, 8192, 8192)
    assert (len(large.plan.tiles), large.plan.tile_voxels) == (4096, (512, 512, 512))
    assert large.shards == 4096 + 512 + 64 + 8 + 1 + 1
    assert large.core_hours == pytest.approx(8192**3 / 1e6 / 3600 * 2)


def test_plan_says_all_that_was_asked(study):
    loaded = load_study(study, ["cluster.ranks_per_node=2", "cluster.cores_per_rank=2", "cluster.partition=short"])
    cost = make_cost((96, 96, 96), "4", 2, 3)
    large = replace(cost, plan=large_plan(cost.plan), ranks=1024, rank_bytes=1413 * 2**20)
    text = describe(loaded, cost, large, "study.yaml --set=seed=4")
    for part in (
        r"tiles +2 × 2 × 2 = 8, 192 × 192 × 192 voxels each, in chunks of 64³\n",
        r"halo +5 low-res voxels; 1\.35 × the low-res volume is read\n",  # (2 · 53 / 96)³
        r"store +9 files, about 6\.0[78] MiB \(1/10 of 60\.8 MiB with the pyramid\), 6\.75 MiB a tile before",
        r"memory per rank +1\.02 GiB, 2 blocks of 64³ at a time\n",
        r"time +0\.0059 h on 3 ranks, 0\.0354 core hours\n",
        r"for 8192³ voxels +305 core hours: 0\.15 h on 1024 ranks of 1\.38 GiB at this speed\n",
        r" +4682 files, about 58\.5 GiB .*; 16 × 16 × 16 tiles of 512³, 1\.2\d × the low-res volume is read\n",
        r"sbatch --partition short --nodes 2 --ntasks 3 --ntasks-per-node 2 --cpus-per-task 2 --mem-per-cpu 523M "
        r"--time 0:06:00 slurm/infer\.sh study\.yaml --set=seed=4 --tiles 2x2x2\n",
    ):
        assert re.search(part, text), (part, text)


def test_plan_is_that_of_the_job(study, monkeypatch):
    monkeypatch.setattr(plan, "_TRIAL_SECONDS", 0.1)
    loaded = load_study(study, ["inference.boundary={y: periodic}", "inference.tiles=2x1x2"])
    job = open_job(loaded)
    cost, large = plan.estimate(loaded, job.checkpoint.generator, job.low_res.shape, 2)
    assert cost.plan == job.plan
    assert large.plan.boundaries == ("replicate", "periodic", "replicate")
    assert large.threads == cost.threads
    assert large.block_voxels == 256 > cost.block_voxels
    # Three tiles and their windows; the network's maps are those of a block, which is smaller in the small volume.
    tiles = 3 * max(t.read.voxels + t.write.voxels for t in large.plan.tiles)
    assert large.rank_bytes - cost.rank_bytes > 0.9 * tiles


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_says_what_it_changes_and_stays_what_it_is(precision, study, store, tmp_path, capfd):
    checkpoint = str(study.parent / "out/checkpoint.pt")
    loaded = load_study(study, [f"inference.precision={precision}"], str(tmp_path / "half"))
    half = infer(open_job(loaded, checkpoint=checkpoint, tiles="3x3x3"), Ranks()).store
    share = LabelStore.open(half).provenance["flips"]["share"]
    assert "measured" not in LabelStore.open(half).provenance  # its margins may differ by rounding
    assert 0 < share < 0.05
    assert f"{precision} changes {share:.2%} of" in capfd.readouterr().err
    whole = Box.whole(LabelStore.open(half).levels[0].shape)
    differ = LabelStore.open(half).read(0, whole) != LabelStore.open(store).read(0, whole)
    assert 0 < differ.mean() < 0.05
    with pytest.raises(InputError, match=rf"was painted with arithmetic torch .*{precision}"):
        infer(open_job(load_study(study, output=str(tmp_path / "half")), checkpoint=checkpoint, tiles="3x3x3"), Ranks())
    before = half / "0/c/1/1/1"
    content = before.read_bytes()
    before.unlink()
    assert infer(repair_job(half), Ranks()).painted == 1
    assert before.read_bytes() == content
    audit(repair_job(half), 4, Ranks()).refuse_seams(half)
