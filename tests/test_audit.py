"""An audit sees seams where there are some, and none where there are none, and knows what arithmetic painted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_painting import make_study, mpirun, paint_alone, store_bytes

from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box, plan_tiles
from hpcres.inference.generate import Painter
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import Journal, infer
from hpcres.inference.verify import audit, find_faults, repair_job
from hpcres.study.file import load_study
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
    job = open_job(
        load_study(study, output=str(tmp_path)), JobOptions(checkpoint=str(study.parent / "out/checkpoint.pt"))
    )
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


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_says_what_it_changes_and_stays_what_it_is(precision, study, store, tmp_path, capfd):
    checkpoint = str(study.parent / "out/checkpoint.pt")
    loaded = load_study(study, [f"inference.precision={precision}"], str(tmp_path / "half"))
    half = infer(open_job(loaded, JobOptions(checkpoint=checkpoint, tiles="3x3x3")), Ranks()).store
    share = LabelStore.open(half).provenance["flips"]["share"]
    assert "measured" not in LabelStore.open(half).provenance  # its margins may differ by rounding
    assert 0 < share < 0.05
    assert f"{precision} changes {share:.2%} of" in capfd.readouterr().err
    whole = Box.whole(LabelStore.open(half).levels[0].shape)
    differ = LabelStore.open(half).read(0, whole) != LabelStore.open(store).read(0, whole)
    assert 0 < differ.mean() < 0.05
    with pytest.raises(InputError, match=rf"was painted with arithmetic torch .*{precision}"):
        infer(
            open_job(
                load_study(study, output=str(tmp_path / "half")), JobOptions(checkpoint=checkpoint, tiles="3x3x3")
            ),
            Ranks(),
        )
    before = half / "0/c/1/1/1"
    content = before.read_bytes()
    before.unlink()
    assert infer(repair_job(half), Ranks()).painted == 1
    assert before.read_bytes() == content
    audit(repair_job(half), 4, Ranks()).refuse_seams(half)
