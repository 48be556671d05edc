"""The generator that is saved: on which cubes its statistics and biases are found, and what they then are."""

from itertools import product

import numpy as np
import pytest
import torch
from small_training import ALONE, anisotropic, blobs, content, one_image, study_of

from hpcres.checkpoint import load_checkpoint
from hpcres.engines.winograd import WinogradNetwork
from hpcres.geometry import Box
from hpcres.inference.job import open_job
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.networks.resampling import center_crop
from hpcres.training import recalibration
from hpcres.training.data import draws
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.loop import train
from hpcres.training.recalibration import matching_shifts
from hpcres.training.wgan import Models
from hpcres.volumes.stores import LabelStore


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, for the same sums everywhere."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("around", [0, 4])
def test_typical_cubes_have_the_fractions_and_areas_of_the_volume(tmp_path, around):
    """A volume of which a fifth is of one phase, so that most sets of cubes are off in both; of their context
    nothing is asked."""
    labels = blobs((40, 40, 40), 1)
    labels[:, :, :8] = 2
    low_res = LowResCubes(study_of(tmp_path, volume=labels, training={"context": around}))
    chosen = low_res.typical(4, 7)
    assert len(set(chosen)) == 4
    assert chosen == low_res.typical(4, 7) != low_res.typical(4, 8)

    def off(cubes):
        drawn = [content(cube) for cube in low_res.draw(0, cubes, ALONE.device, 7)[0].numpy()]
        return np.abs(np.mean(drawn, axis=0) / content(labels) - 1).max()

    every = [off(range(4 * k, 4 * k + 4)) for k in range(12)]
    assert off(chosen) < 0.3 * min(every)
    assert off(chosen) < 0.05 < np.median(every)


def test_typical_cubes_of_an_anisotropic_material_have_the_areas_of_each_direction(tmp_path):
    """A quarter of the volume is layers, whose areas are all across z."""
    labels = blobs((40, 40, 40), 1, phases=2)
    labels[:, :10] = np.arange(40).reshape(-1, 1, 1) // 2 % 2
    np.save(tmp_path / "labels.npy", labels)
    study = anisotropic(tmp_path)
    low_res = LowResCubes(
        study.model_copy(update={"low_res": study.low_res.model_copy(update={"path": str(tmp_path / "labels.npy")})})
    )

    def areas(volume):
        return np.array([(np.diff(volume.astype(int), axis=axis) != 0).mean() for axis in range(3)])

    def off(cubes):
        drawn = [areas(cube) for cube in low_res.draw(0, cubes, ALONE.device, 7)[0].numpy()]
        return np.abs(np.mean(drawn, axis=0) / areas(labels) - 1).max()

    every = [off(range(4 * k, 4 * k + 4)) for k in range(12)]
    assert off(low_res.typical(4, 7)) < min(0.05, *every) < 0.1 < np.median(every)


@pytest.mark.parametrize("reach_faces", [False, True])
def test_recalibration_cubes_are_typical_where_they_cannot_hold_every_voxel(tmp_path, reach_faces):
    training = {"context": 2, "reach_faces": reach_faces}
    low_res = LowResCubes(study_of(tmp_path, volume=blobs((40, 33, 16), 1), training=training))
    given = torch.cat(list(low_res.recalibration_inputs(8, 3, ALONE.device)))
    typical = low_res.draw(0, low_res.typical(8, draws.RECALIBRATION), ALONE.device, draws.RECALIBRATION)[1]
    assert torch.equal(given, typical)


@pytest.mark.parametrize("sigmas", [[0], [0, 10]])
def test_recalibration_cubes_are_the_volume_that_will_be_painted_where_they_can_hold_it(tmp_path, monkeypatch, sigmas):
    """What the painter gives the generator, in a grid of 3 × 3 × 1 cubes, and beyond faces the mirror image."""
    labels, seen = blobs((40, 33, 16), 1), []
    study = study_of(
        tmp_path,
        volume=labels,
        training={"context": 2, "steps": 1},
        inference={"boundary": "mirror"},
        network={"width": 3, "critic_width": 5, "noise_sigma_voxels": sigmas},
    )
    grid = torch.cat(list(LowResCubes(study).recalibration_inputs(20, 4, ALONE.device)))
    train(study)
    monkeypatch.setattr(
        WinogradNetwork,
        "paint",
        lambda network, parts, memory: seen.extend(parts) or [np.zeros(write.shape, np.uint8) for _, _, write in parts],
    )
    infer(open_job(study), Ranks())
    whole = np.full((44, 37, 20, 3 + len(sigmas)), np.nan, np.float32)
    for window, reads, _ in seen:
        part = reads.clipped(Box((-2, -2, -2), (42, 35, 18)))
        given = window[part.relative_to(reads.start).slices]
        whole[part.relative_to((-2, -2, -2)).slices] = given[..., : whole.shape[3]]  # of channels filled up to eight
    corners = list(product((0, 12, 24), (0, 8, 17), (0,)))
    assert len(grid) == len(corners) == 9
    for (z, y, x), given in zip(corners, grid.numpy(), strict=True):
        expected = np.moveaxis(whole[z : z + 20, y : y + 20, x : x + 20], 3, 0)
        np.testing.assert_array_equal(given, expected)


@pytest.mark.parametrize("around", [0, 2])
def test_saved_statistics_are_those_of_the_saved_weights(tmp_path, around):
    """With one recalibration batch of all cubes, evaluation must give what training mode gives on that batch."""
    study = study_of(tmp_path, training={"cubes": 8, "recalibration_cubes": 8, "context": around})
    models, low_res = Models(study, ALONE), LowResCubes(study)
    real = RealSlices(study, ALONE.device)
    for step in range(2):
        models.step(step, range(2), low_res, real, 0.02)
    saved = models.recalibrated(low_res, real)
    for ours, theirs in zip(saved.parameters(), models.average, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(next(saved.parameters()), next(models.generator.parameters()))
    (given,) = low_res.recalibration_inputs(8, 8, ALONE.device)
    with torch.no_grad():
        assert not saved.training
        evaluated, trained = saved(given, around), saved.train()(given, around)
        stale = models.generator.eval()(given, around)
    assert (evaluated - trained).abs().max() < 1e-3 * trained.std()
    assert (stale - trained).abs().max() > 0.1 * trained.std()  # running statistics of other weights would not do


def test_recalibration_a_large_batch_takes_no_more_memory_than_one_process_has(tmp_path, monkeypatch):
    study = study_of(tmp_path, training={"cubes": 64, "recalibration_cubes": 20})
    models, low_res, at_once = Models(study, ALONE), LowResCubes(study), []
    given, real = low_res._given, RealSlices(study, ALONE.device)
    monkeypatch.setattr(low_res, "_given", lambda drawn, device: at_once.append(len(drawn)) or given(drawn, device))
    models.recalibrated(low_res, real)
    assert at_once == [8]  # of 64 and 20; eight hold every voxel


@pytest.mark.parametrize("wanted", [(0.3, 0.7), (0.4, 0.45, 0.15), (0.97, 0.02, 0.01), (0.1, 0.2, 0.3, 0.25, 0.15)])
def test_shifts_give_each_phase_its_share(wanted):
    logits = np.random.default_rng(1).normal(size=(len(wanted), 100_000)).astype(np.float32)
    logits = 20 * logits + 30 * np.arange(len(wanted), dtype=np.float32)[:, None]
    wanted = np.array(wanted)
    shifts = matching_shifts(logits, wanted)
    found = np.bincount((logits + shifts[:, None]).argmax(0), minlength=len(wanted)) / logits.shape[1]
    assert np.abs(found - wanted).max() < 2e-4
    assert abs(shifts.mean()) < 1e-6
    if len(wanted) == 2:  # of two phases one is likeliest where it is ahead by more than the other's shift
        ahead = np.quantile(logits[0] - logits[1], 1 - wanted[0])
        assert shifts[1] - shifts[0] == pytest.approx(ahead, abs=0.1)
    right = np.bincount(logits.argmax(0), minlength=len(wanted)) / logits.shape[1]
    if right.all():
        assert np.abs(matching_shifts(logits, right)).max() < 0.1


def test_a_phase_that_no_image_shows_is_not_called_for():
    logits = np.random.default_rng(1).normal(size=(3, 100_000)).astype(np.float32)
    logits[1] -= 30
    shifts = matching_shifts(logits, np.array([0.8, 0.0, 0.2]))
    assert shifts[1] == 0
    assert (logits + shifts[:, None].astype(np.float32)).argmax(0).mean() == pytest.approx(2 * 0.2, abs=1e-3)


@pytest.mark.parametrize(("around", "padded_voxels"), [(0, 4), (3, 0)])
def test_what_is_saved_has_the_fractions_of_the_images_where_asked(around, padded_voxels, tmp_path, monkeypatch):
    """On the recalibration cubes but what padding may have changed; all but the last biases as without."""
    images = one_image(tmp_path, np.random.default_rng(3).choice(3, (1, 90, 80), p=(0.2, 0.1, 0.7)).astype(np.uint8))
    saved, off, looked_at = [], [], []

    def noted(logits, wanted):
        looked_at.append(logits.shape)
        return matching_shifts(logits, wanted)

    monkeypatch.setattr(recalibration, "matching_shifts", noted)
    for match in (False, True):
        folder = tmp_path / str(match)
        folder.mkdir()
        training = {"steps": 2, "match_fractions": match, "context": around}
        study = study_of(folder, images=[images], training=training)
        train(study)
        low_res, generator = LowResCubes(study), load_checkpoint(study.checkpoint_path).generator
        (given,) = low_res.recalibration_inputs(2, 2, ALONE.device)
        with torch.no_grad():
            labels = center_crop(generator(given, around), padded_voxels).argmax(1)
        found = np.bincount(labels.numpy().ravel(), minlength=3) / labels.numel()
        off.append(np.abs(found - RealSlices(study, ALONE.device).fractions()).max())
        saved.append({name: value for name, value in generator.state_dict().items() if name != "conv_end.bias"})
    assert off[0] > 0.1
    assert off[1] < 0.01  # one voxel in seven is looked at
    assert looked_at == [(3, 2 * -(-((64 - 2 * padded_voxels) ** 3) // 7))]
    for name, value in saved[0].items():
        assert torch.equal(value, saved[1][name])


def test_what_is_painted_has_the_fractions_of_the_images_where_asked(tmp_path):
    """With faces and tiles where the recalibration cubes had none."""
    volume = blobs((48, 16, 17), 1)
    volume[32:] = 2
    images = one_image(tmp_path, np.random.default_rng(3).choice(3, (1, 90, 80), p=(0.2, 0.1, 0.7)).astype(np.uint8))
    training = {"steps": 2, "match_fractions": True, "context": 4, "recalibration_cubes": 8}
    study = study_of(tmp_path, images=[images], volume=volume, training=training)
    train(study)
    store = LabelStore.open(infer(open_job(study), Ranks()).store)
    labels = store.read(0, Box.whole(store.levels[0].shape))
    assert labels.shape == (192, 64, 68)
    found = np.bincount(labels.ravel(), minlength=3) / labels.size
    assert np.abs(found - RealSlices(study, ALONE.device).fractions()).max() < 0.002
