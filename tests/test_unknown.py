"""Damaged low-res voxels: nothing is known of them in training, painting and comparing, wherever tiles are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_painting import LABELS, command, make_study, mpirun, paint_alone, store_bytes
from small_training import ALONE, blobs, study_of
from test_metrics import small_study

from hpcres.checkpoint import load_checkpoint, save_checkpoint
from hpcres.cli import commands
from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.imaging import ImagingOperator, one_hot
from hpcres.inference.job import open_job
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inference.verify import audit, repair_job
from hpcres.metrics.agreement import agreement
from hpcres.metrics.schedule import connect
from hpcres.noise import normals
from hpcres.study.file import load_study
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.evaluation import Evaluator
from hpcres.training.loop import train
from hpcres.training.losses import voxel_loss
from hpcres.training.wgan import Models
from hpcres.volumes.formats import open_volume
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.stores import LabelStore

DAMAGED = 200


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "i8"])
def test_unknown_labels_come_after_the_phases(kind):
    array = np.array([[7, 0, 99], [9, 98, 0]], kind)
    assert PhaseMap((9, 0, 7), "x", (98, 99)).index(array).tolist() == [[2, 1, 3], [0, 3, 1]]
    with pytest.raises(InputError, match="x: label 98 occurs in 1 voxels and has no phase; known are 9, 0, 7"):
        PhaseMap((9, 0, 7), "x", (99,)).index(array)


# ---- painting ----


def damaged_study(folder, shape, seed=0):
    """The study of small_painting with a box and scattered voxels of its volume damaged."""
    path = make_study(folder, "4", shape)
    low_res = np.load(folder / "low.npy")
    low_res[2:6, 1:6, 3:7] = DAMAGED
    low_res[np.random.default_rng(seed).random(shape) < 0.1] = DAMAGED
    np.save(folder / "low.npy", low_res)
    path.write_text(path.read_text().replace("low_res:\n", f"low_res:\n  unknown: [{DAMAGED}]\n"))
    study = load_study(path)
    generator = load_checkpoint(study.checkpoint_path).generator
    save_checkpoint(study.checkpoint_path, generator=generator, study=study, step=1)
    return path


def test_tiles_ranks_and_the_network_itself_agree_on_a_damaged_volume(tmp_path):
    shape = (9, 8, 9)
    path = damaged_study(tmp_path / "s", shape)
    study, low_res = load_study(path), np.load(path.parent / "low.npy")
    whole = LabelStore.open(paint_alone(path, tmp_path / "whole", tiles="1x1x1"))
    box = Box.whole(whole.levels[0].shape)
    labels = whole.read(0, box)
    given = np.stack([*(low_res == label for label in LABELS), normals(study.seed, Box.whole(shape))])
    assert not given[:3, low_res == DAMAGED].any()
    with torch.inference_mode():
        logits = load_checkpoint(study.checkpoint_path).generator(torch.from_numpy(given.astype(np.float32))[None])[0]
    best = logits.sort(0).values
    differ = labels != logits.argmax(0).numpy()
    assert differ.mean() <= 1e-4
    assert not differ.any() or (best[-1] - best[-2]).numpy()[differ].max() < 1e-5 * logits.abs().max()
    alone = paint_alone(path, tmp_path / "tiled", tiles="3x2x2")
    assert np.array_equal(LabelStore.open(alone).read(0, box), labels)
    at = ("--output", str(tmp_path / "ranks"), "--checkpoint", str(study.checkpoint_path), "--tiles", "3x2x2")
    done = mpirun(3, *command(path, "infer", *at))
    assert done.returncode == 0, done.stderr
    assert store_bytes(tmp_path / "ranks" / "labels.zarr") == store_bytes(alone)
    # Neighbours of damage feel it; voxels far from it do not.
    low_res[low_res == DAMAGED] = 0
    np.save(path.parent / "low.npy", low_res)
    filled = LabelStore.open(paint_alone(path, tmp_path / "filled")).read(0, box)
    assert 0.01 < (filled != labels).mean()


def test_another_mask_is_another_job(tmp_path):
    path = damaged_study(tmp_path / "s", (9, 8, 7))
    store = paint_alone(path, tmp_path / "out")
    assert infer(repair_job(store), Ranks()).painted == 0
    assert audit(repair_job(store), 2, Ranks()).flips == 0
    low_res = np.load(path.parent / "low.npy")
    low_res[-1, -1, -1] = next(iter(LABELS)) if low_res[-1, -1, -1] == DAMAGED else DAMAGED
    np.save(path.parent / "low.npy", low_res)
    with pytest.raises(InputError, match="input"):
        paint_alone(path, tmp_path / "out")
    with pytest.raises(InputError, match="input"):
        infer(repair_job(store), Ranks())
    with pytest.raises(InputError, match=r"trained with unknown low-res labels \[200\], the study has \[\]"):
        open_job(load_study(path, ["low_res.unknown=[]"]))
    with pytest.raises(InputError, match="unknown: label 7 is given twice, or has a phase as well"):
        load_study(path, ["low_res.unknown=[7]"])


# ---- training ----


def study_with_damage(folder, **training):
    volume = blobs((20, 18, 17), 1)
    volume[:9, :12, :12] = DAMAGED
    low_res = {"path": str(folder / "low.npy"), "phases": {0: "a", 1: "b", 2: "c"}, "unknown": [DAMAGED]}
    return study_of(folder, volume=volume, low_res=low_res, training=training)


def test_a_mask_hides_its_share_and_changes_no_other_draw(tmp_path):
    low_res = LowResCubes(study_of(tmp_path))
    shares = []
    for step in range(150):
        labels, given = low_res.draw(step, range(2), ALONE.device)
        masked, hidden = low_res.draw(step, range(2), ALONE.device, 0, 0.2)
        unknown = masked == 3
        assert torch.equal(masked[~unknown], labels[~unknown])
        assert torch.equal(hidden[:, 3], given[:, 3])
        assert torch.equal(hidden[:, :3], given[:, :3] * ~unknown[:, None])
        shares += unknown.float().mean((1, 2, 3)).tolist()
    assert np.mean(shares) == pytest.approx(0.2, abs=0.03)
    assert max(shares) <= 0.45
    assert min(shares) < 0.05


@pytest.mark.parametrize("operator", ["under-sampled", "under-resolved"])
def test_the_voxel_wise_loss_leaves_unknown_voxels_out(tmp_path, operator):
    study = study_of(tmp_path, imaging={"operator": operator}, scale_factor=4)
    imaging = ImagingOperator(study.scale_factor, [[0], [1], [2]], study.imaging)
    random = torch.Generator().manual_seed(1)
    probabilities = torch.rand(2, 3, 64, 64, 64, generator=random).softmax(1).requires_grad_()
    labels = torch.randint(0, 3, (2, 16, 16, 16), generator=random)
    labels[0, 4:12, 4:12, 4:12] = 3
    target = one_hot(labels, 3)
    loss = voxel_loss(imaging, probabilities, target)
    (slope,) = torch.autograd.grad(loss, probabilities)
    loss = loss.detach()
    squares = ((imaging(probabilities) - target) ** 2).detach()
    known = (labels < 3)[:, None].expand_as(squares)
    assert float(loss) == pytest.approx(float(squares[known].sum() / squares.numel()), rel=1e-5)
    assert slope[0, :, 20:44, 20:44, 20:44].abs().max() == 0  # a low-res voxel inside the damage, or deeper
    assert slope[1, :, 20:44, 20:44, 20:44].abs().max() > 0
    # As the batch of two processes, each with its share, whatever is damaged in either.
    with torch.no_grad():
        parts = [voxel_loss(imaging, probabilities[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert float(loss) == pytest.approx(float(sum(parts)) / 2, rel=1e-6)


def test_training_on_a_damaged_volume_says_so_and_judges_what_is_known(tmp_path, capfd):
    study = study_with_damage(tmp_path, steps=2, masked_fraction=0.2, quality_steps=2, quality_cubes=1, critic_steps=1)
    train(study)
    share = (np.load(tmp_path / "low.npy") == DAMAGED).mean()
    assert f"{share:.2%} of the low-res volume is unknown" in capfd.readouterr().err
    low_res, models = LowResCubes(study), Models(study, ALONE)
    labels = low_res.draw(0, low_res.typical(1, 2**31 + 1), ALONE.device, 2**31 + 1)[0][0].numpy()
    known = labels < 3
    assert 0 < known.mean() < 1

    def right_where_known(wrong):
        """A generator of blocks: right but for `wrong` of the known voxels, anything where nothing is known."""
        low = np.where(known, labels, 0)
        low[tuple(np.argwhere(known)[:wrong].T)] = (low[tuple(np.argwhere(known)[:wrong].T)] + 1) % 3
        full = low.repeat(4, 0).repeat(4, 1).repeat(4, 2)
        return lambda given, _: torch.stack([torch.from_numpy(full == i) for i in range(3)])[None].float()

    judge = Evaluator(study, low_res, models.operator)
    assert judge.evaluate(right_where_known(0), ALONE.device)[0]["disagreement"] == 0
    found = judge.evaluate(right_where_known(7), ALONE.device)[0]
    assert found["disagreement"] == pytest.approx(7 / known.sum())
    outcome = models.step(0, range(2), low_res, RealSlices(study, ALONE.device), 1e-4)
    seen = models.operator(one_hot(outcome.probabilities.argmax(1), 3)).argmax(1)
    told = models.report(outcome, 3)["low_res_agreement"]
    assert told == pytest.approx(float((seen == outcome.labels)[outcome.labels < 3].float().mean()))


def test_a_volume_of_which_nothing_is_known_is_refused(tmp_path):
    study = study_with_damage(tmp_path)
    np.save(tmp_path / "low.npy", np.full((20, 18, 17), DAMAGED, np.uint8))
    with pytest.raises(InputError, match="every voxel is unknown"):
        LowResCubes(study)


# ---- comparing ----


def test_agreement_is_of_the_known_voxels_and_says_how_many_are_not(tmp_path):
    low_res = {"path": str(tmp_path / "low.npy"), "phases": {5: ["pore", "binder"], 9: "solid"}, "unknown": [1, 0]}
    study = small_study(tmp_path, low_res=low_res)
    random = np.random.default_rng(3)
    low = random.choice(np.array([5, 9], np.uint8), (7, 6, 5))
    sharp = (low == 9).repeat(2, 0).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    seen = low.copy()
    low[random.random(low.shape) < 0.1] = 9  # some disagree
    low[1:4, 2:5] = 0
    low[6] = 1
    np.save(tmp_path / "low.npy", low)
    np.save(tmp_path / "sharp.npy", sharp)
    with connect(threads=1) as client:
        found = agreement(
            study, open_volume(tmp_path / "low.npy"), open_volume(tmp_path / "sharp.npy"), client=client, progress=False
        )
    known = low > 1
    assert found["voxels_compared"] == known.sum()
    assert found["unknown"] == pytest.approx(1 - known.mean())
    assert found["agreement"] == pytest.approx((low == seen)[known].mean())
    assert found["volume_fraction"]["solid"] == pytest.approx((low == 9)[known].mean())
    assert found["of_volume"]["solid"] == pytest.approx((seen == 9)[known].mean())


def test_convert_names_what_is_unknown(tmp_path):
    path = damaged_study(tmp_path / "s", (9, 8, 7))
    outcome = CliRunner().invoke(commands, ["convert", str(path)])
    assert outcome.exit_code == 0, outcome.output
    assert open_volume(outcome.output.split()[-1]).phases == ("pore", "nickel", "ceramic", "unknown 200")
