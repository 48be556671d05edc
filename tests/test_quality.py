"""Judging a generator: what is counted against brute force, what is kept, and the files that tell of it."""

import base64
import csv
import io
import re
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from small_training import ALONE, anisotropic, blobs, content, study_of

from hpcres import progress
from hpcres.checkpoint import load_checkpoint
from hpcres.counting.slices import errors_between, slice_statistics
from hpcres.errors import InputError
from hpcres.imaging import ImagingOperator
from hpcres.study.file import load_study, save_study
from hpcres.training import journal
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.evaluation import GOOD, Evaluator
from hpcres.training.events import Events
from hpcres.training.folder import RunFolder
from hpcres.training.loop import train
from hpcres.training.page import write_page
from hpcres.training.superres import SuperResTrainer
from hpcres.training.wgan import Models
from hpcres.volumes.images import images_by_plane
from hpcres.volumes.phases import open_low_res


def test_what_is_seen_of_stacks_is_what_brute_force_counts():
    stacks = [np.random.default_rng(i).integers(0, 3, s, np.uint8) for i, s in enumerate([(2, 9, 11), (1, 8, 7)])]
    seen = slice_statistics(stacks, 3)
    everything = np.concatenate([s.ravel() for s in stacks])
    assert seen.volume_fraction == pytest.approx([(everything == i).mean() for i in range(3)])
    for direction in range(2):
        turned = [np.moveaxis(s, 1 + direction, 0) for s in stacks]
        steps = [(int(a), int(b)) for s in turned for a, b in zip(s[1:].ravel(), s[:-1].ravel(), strict=True)]
        for k, pair in enumerate([(0, 1), (0, 2), (1, 2)]):
            share = sum(tuple(sorted(step)) == pair for step in steps) / len(steps)
            assert seen.interphase_area[direction, k] == pytest.approx(share)
        for phase, lag in ((0, 1), (1, 4), (2, 7)):
            both = np.concatenate([((s[lag:] == phase) & (s[:-lag] == phase)).ravel() for s in turned])
            assert seen.correlations[direction, phase, lag - 1] == pytest.approx(both.mean())
    windows = [np.lib.stride_tricks.sliding_window_view(s, (1, 2, 2)).reshape(-1, 4) for s in stacks]
    assert seen.tpb == pytest.approx(np.mean([len(set(w)) == 3 for w in np.concatenate(windows).tolist()]))
    squares = [np.lib.stride_tricks.sliding_window_view(s, (1, 3, 3)).reshape(-1, 9) for s in stacks]
    codes = np.concatenate(squares) @ (3 ** np.arange(8, -1, -1))
    assert seen.patterns[1] == pytest.approx(np.bincount(codes, minlength=3**9) / len(codes))
    assert seen.patterns[4].sum() == pytest.approx(1)  # the one window of 9 rows that fits


def test_errors_are_zero_of_the_same_and_grow_with_what_differs():
    image = blobs((1, 200, 200), 0)
    same = errors_between(slice_statistics([image], 3), slice_statistics([image], 3), True)
    assert set(same.values()) == {0.0}
    assert set(same) | {"disagreement", "grid_artefact"} == set(GOOD)
    turned = errors_between(slice_statistics([image.transpose(0, 2, 1)], 3), slice_statistics([image], 3), True)
    assert turned["area_error"] == pytest.approx(0)
    whole, halved = slice_statistics([image], 3), image[:, ::2, ::2].repeat(2, 1).repeat(2, 2)
    coarse = errors_between(slice_statistics([halved], 3), whole, True)
    other = errors_between(slice_statistics([blobs((1, 200, 200), 1)], 3), slice_statistics([image], 3), True)
    assert coarse["tv1"] > 3 * other["tv1"]
    assert coarse["area_error"] > 3 * other["area_error"]
    for turn in (np.rot90(image, 1, (1, 2)), image[:, :, ::-1], image.transpose(0, 2, 1)):
        turned = errors_between(slice_statistics([turn], 3), slice_statistics([image], 3), True)
        assert max(turned.values()) == pytest.approx(0, abs=1e-12)
        assert errors_between(slice_statistics([turn], 3), slice_statistics([image], 3), False)["tv4"] > 0.1
    along = np.broadcast_to(image[:, :1], image.shape)  # rods: seen from another side, areas differ by direction
    rods = slice_statistics([along], 3)
    assert errors_between(rods, slice_statistics([along.transpose(0, 2, 1)], 3), True)["area_error"] == pytest.approx(0)
    assert errors_between(rods, slice_statistics([along.transpose(0, 2, 1)], 3), False)["area_error"] == 1


@pytest.mark.parametrize("around", [0, 2])
def test_a_generator_that_gives_back_the_images_is_judged_by_its_plane(tmp_path, around):
    """Cubes of side.npy's patches pass in the planes it shows; agreement is that of the imaging operator."""
    study = anisotropic(tmp_path, quality_steps=1, quality_cubes=1, context=around)
    judge = Evaluator(study, LowResCubes(study), Models(study, ALONE).operator)
    shapes = {plane: [s.shape for s in stacks] for plane, stacks in images_by_plane(study.high_res).items()}
    assert shapes == {"yx": [(1, 64, 64)], "zx": [(2, 70, 60)], "zy": [(2, 60, 70)]}

    def painted(volume):
        def generator(given, context):
            assert given.shape[2:] == (16 + 2 * context,) * 3
            return torch.stack([torch.from_numpy(volume == i) for i in range(3)])[None].float()

        return generator

    smooth, slice_ = judge.evaluate(painted(blobs((64, 64, 64), 8)), ALONE.device)
    rough, _ = judge.evaluate(painted(np.random.default_rng(0).integers(0, 3, (64, 64, 64))), ALONE.device)
    assert list(smooth) == judge.columns
    assert slice_.shape == (64, 64)
    assert smooth["score"] < 0.5 * rough["score"]
    assert rough["score"] == pytest.approx(np.mean([rough[key] / good for key, good in GOOD.items() if key in rough]))
    steps = blobs((16, 16, 16), 2).repeat(4, 0).repeat(4, 1).repeat(4, 2)  # faces at one position in four only
    assert judge.evaluate(painted(steps), ALONE.device)[0]["grid_artefact"] == pytest.approx(3)
    assert max(smooth["grid_artefact"], rough["grid_artefact"]) < 0.5


@pytest.mark.parametrize("scale", ["4", "8", "16/3"])
def test_judging_finds_what_the_imaging_operator_hardly_sees(tmp_path, scale):
    """Brute force, in the blocks of the judged cubes: which group has the most voxels, and how much of each."""
    scale = Fraction(scale)
    p, q, edge = scale.numerator, scale.denominator, int(64 / scale)
    volume = np.minimum(blobs((24, 18, 17), 1), 1)
    volume[np.random.default_rng(3).random(volume.shape) < 0.05] = 9
    low_res = {"path": str(tmp_path / "low.npy"), "phases": {0: "a", 1: ["b", "c"]}, "unknown": [9]}
    study = study_of(
        tmp_path,
        volume=volume,
        low_res=low_res,
        scale_factor=str(scale),
        imaging={"operator": "under-resolved"},
        training={"quality_steps": 1, "quality_cubes": 2},
    )
    cubes = LowResCubes(study)
    judge = Evaluator(study, cubes, ImagingOperator.of(study))
    chosen = cubes.typical(2, 2**31 + 1)
    given = [cubes.draw(0, [cube], ALONE.device, 2**31 + 1)[0][0].numpy() for cube in chosen]
    assert 0 < np.mean([labels == 2 for labels in given]) < 1

    def judged(volumes):
        remaining = iter(volumes)

        def generator(*_):
            painted = next(remaining)
            return torch.stack([torch.from_numpy(painted == i) for i in range(3)])[None].float()

        return judge.evaluate(generator, ALONE.device)[0]

    right, known, painted_voxels, given_voxels = 0, 0, np.zeros(2), np.zeros(2)
    noise = [np.random.default_rng(i).integers(0, 3, (64, 64, 64)) for i in range(2)]
    for labels, painted in zip(given, noise, strict=True):
        fine = painted.repeat(q, 0).repeat(q, 1).repeat(q, 2)
        for place in np.ndindex(edge, edge, edge):
            if labels[place] < 2:
                block = fine[tuple(slice(i * p, i * p + p) for i in place)]
                held = np.array([(block == 0).sum(), (block > 0).sum()])
                right += held[labels[place]] == held.max()
                known += 1
                painted_voxels += held / p**3
                given_voxels[labels[place]] += 1
    found = judged(noise)
    assert found["box_disagreement"] == pytest.approx(1 - right / known)
    assert found["visible_fraction_error"] == pytest.approx(np.abs(painted_voxels - given_voxels).max() / known)
    assert found["score"] == pytest.approx(np.mean([found[key] / GOOD[key] for key in GOOD if key in found]))
    assert not {"box_disagreement", "visible_fraction_error"} & set(GOOD)
    if scale == 8:
        copied = [np.where(labels == 2, 0, labels).repeat(8, 0).repeat(8, 1).repeat(8, 2) for labels in given]
        within = np.indices((64, 64, 64)) % 8
        shell = ((within == 0) | (within == 7)).any(0)  # 58 % of a block, of which the operator sees 8 %
        alike = judged(copied)
        hidden = judged([np.where(shell, 1, one) for one in copied])
        assert (alike["disagreement"], alike["box_disagreement"], alike["visible_fraction_error"]) == (0, 0, 0)
        share = given_voxels[0] / known
        assert hidden["disagreement"] == 0
        assert hidden["box_disagreement"] == pytest.approx(share)
        assert hidden["visible_fraction_error"] == pytest.approx(share * (1 - 6**3 / 8**3))


def test_the_best_is_kept_and_told_of(tmp_path, monkeypatch, capfd):
    scores = iter([3.0, 1.0, 2.0])
    plain = Evaluator.evaluate

    def judged(self, generator, device):
        found, labels = plain(self, generator, device)
        return found | {"score": next(scores)}, labels

    monkeypatch.setattr(Evaluator, "evaluate", judged)
    training = {"steps": 3, "quality_steps": 1, "quality_cubes": 1, "keep": "best", "learning_rate": 0.01}
    study = study_of(tmp_path, training=training)
    train(study)
    best, last = load_checkpoint(study.best_path), load_checkpoint(study.checkpoint_path)
    assert best.step == 2
    assert (last.step, last.sha256) == (3, best.sha256)
    with (study.folder / "quality.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = {"step": 2, "score": 1.0, "disagreement": pytest.approx(float(rows[1]["disagreement"]), rel=1e-5)}
    assert {key: last.training_state["best"][key] for key in kept} == kept
    assert [(row["step"], float(row["score"])) for row in rows] == [("1", 3), ("2", 1), ("3", 2)]
    page = (study.folder / "training.html").read_text()
    assert page.count("<figure>") == 3
    assert "Best score 1.00 at step 2" in page
    assert "<th>box disagreement</th><th>visible fraction error</th>" in page
    assert f"box disagreement {float(rows[2]['box_disagreement']):.2%}  visible fractions off" in capfd.readouterr().err
    assert ("quality/score", 2, 1.0) in scalars(study.folder / "tensorboard")


@pytest.mark.parametrize("judging", [True, False])
def test_the_live_table_shows_the_last_judgement_where_there_is_one(tmp_path, monkeypatch, judging):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=200)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    row = {"step": 2, "seconds": 1.0, "wasserstein": 0.1, "voxel_loss": 0.2, "low_res_agreement": 0.93, "fraction_a": 1}
    judged = {
        "step": 1,
        "seconds": 1.0,
        "score": 3.25,
        "fraction_error": 0.1,
        "area_error": 0.2,
        "disagreement": 0.3,
        "box_disagreement": 0.0712,
        "visible_fraction_error": 0.0341,
    }
    live = journal.Journal(
        RunFolder(tmp_path), list(row), list(judged) if judging else [], 0, SuperResTrainer.shown, live=True
    )
    if judging:
        live.judged(judged, np.zeros((4, 4), np.uint8), True)
    live.report(0.5, row)
    live.close()
    for text in ("box disagreement", "visible fractions off", "7.12%", "0.034", "3.25 best"):
        assert (text in shown.getvalue()) == judging, text
    assert "93.00%" in shown.getvalue()


@pytest.mark.parametrize("rows", [1, 2])
def test_curves_show_something_however_few_the_judgements(tmp_path, rows):
    lines = [f"{step},{60 * step},{1 / step}" for step in range(1, rows + 1)]
    (tmp_path / "quality.csv").write_text("\n".join(["step,seconds,score", *lines]) + "\n")
    page = write_page(tmp_path, "few").read_text()
    (drawn,) = re.findall(r"data:image/png;base64,([^']+)'", page)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn))).convert("RGB")).astype(int)
    assert (np.ptp(pixels, axis=2) > 50).any(), "nothing but axes"


def scalars(folder):
    """(tag, step, value) of the event files in a folder, read by TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return [(tag, one.step, one.value) for tag in read.Tags()["scalars"] for one in read.Scalars(tag)]


def test_tensorboard_reads_what_a_run_and_its_resumption_wrote(tmp_path):
    for resume, steps in ((0, (100, 200, 300)), (200, (250,))):
        events = Events(tmp_path, resume)
        for step in steps:
            events.add(step, {"quality/score": step / 1000})
        events.close()
    found = scalars(tmp_path)
    assert [(tag, step, pytest.approx(step / 1000)) for tag, step, _ in found] == found
    assert [step for _, step, _ in found] == [100, 200, 250]  # 300 was after the checkpoint that the run went on from


def test_without_tensorboard_there_are_no_events(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    events = Events(tmp_path / "events", 0)
    events.add(1, {"quality/score": 1.0})
    events.close()
    assert not (tmp_path / "events").exists()


def test_keeping_the_best_needs_judging(tmp_path):
    file = save_study(study_of(tmp_path), "mine")
    with pytest.raises(InputError, match="quality_steps"):
        load_study(file, ["training.keep=best"])


@pytest.mark.parametrize("planes", [1, 7, 40])
def test_what_cubes_are_compared_with_is_the_volume_however_it_is_read(tmp_path, monkeypatch, planes):
    labels = blobs((40, 20, 19), 3)
    labels[5:9, 3:, 8:] = 9
    given = {"path": str(tmp_path / "low.npy"), "phases": {0: "a", 1: "b", 2: "c"}, "unknown": [9]}
    study = study_of(tmp_path, volume=labels, low_res=given)
    monkeypatch.setattr(
        "hpcres.conditions.open_low_res", lambda asked: replace(open_low_res(asked), chunks=(planes, 20, 19))
    )
    low_res = LowResCubes(study)
    labels[labels == 9] = 3
    assert low_res._content == pytest.approx(content(labels))
    assert low_res.unknown_share == pytest.approx((labels == 3).mean())
