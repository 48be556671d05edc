"""Images that are not typical of the low-res volume: what both show, and the distributions moved to the volume."""

import re
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from small_training import ALONE, atypical, blobs, counted_patterns, study_of

from hpcres.counting.slices import errors_between, slice_statistics
from hpcres.imaging import ImagingOperator, one_hot
from hpcres.study import Imaging
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.evaluation import Evaluator
from hpcres.training.loop import train
from hpcres.training.losses import block_loss, fraction_differences
from hpcres.training.visible import Correction, beside, patch_weights, tilt
from hpcres.training.wgan import Models

GROUPS = ((0, 2), (1,))
"""The low-res volume does not tell phase 2 from phase 0."""


def merged(tmp_path, volume, image, **training):
    np.save(tmp_path / "merged.npy", image)
    return study_of(
        tmp_path,
        [{"path": str(tmp_path / "merged.npy")}],
        volume=volume,
        low_res={"path": str(tmp_path / "low.npy"), "phases": {0: ["a", "c"], 1: "b"}},
        training=training,
    )


def three(shape, seed, first, second):
    """Blobs of which phase 1 takes the share `first`, and of the rest phase 2 the share `second`."""
    field = blobs(shape, seed, phases=100).astype(float) / 100
    other = blobs(shape, seed + 1, phases=100).astype(float) / 100
    return np.where(field < first, 1, np.where(other < second, 2, 0)).astype(np.uint8)


# ---- tilting ----


def test_tilted_shares_have_the_wanted_means_and_are_nearest_to_the_base():
    random = np.random.default_rng(0)
    base, features = random.random((1, 6)), random.random((6, 2))
    base /= base.sum()
    wanted = np.array([0.3, 0.7, 0.1, 0.2, 0.4, 0.3]) / 2 @ features
    shares = tilt(*(torch.from_numpy(a) for a in (base, features, wanted[None])))
    assert shares.numpy()[0] @ features == pytest.approx(wanted, abs=1e-6)
    constraints = {"type": "eq", "fun": lambda t: np.r_[t @ features - wanted, t.sum() - 1]}
    nearest = minimize(
        lambda t: np.sum(t * np.log(t / base[0])),
        base[0],
        constraints=constraints,
        bounds=[(1e-9, 1)] * 6,
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert shares.numpy()[0] == pytest.approx(nearest.x, abs=1e-5)


def test_what_never_occurs_stays_so():
    base = torch.tensor([[0.5, 0.5, 0.0]]).double()
    features = torch.tensor([[1.0], [0.0], [0.0]]).double()
    shares = tilt(base, features, torch.tensor([[0.9]]).double())
    assert shares[0].tolist() == pytest.approx([0.9, 0.1, 0.0])


# ---- what both show ----


def test_images_beside_the_volume_through_the_imaging_operator(tmp_path):
    """Stripes of 12 and 4 pixels at scale factor 4, of which an under-sampled view has three quarters and one."""
    stripes = np.broadcast_to((np.arange(96) % 16 >= 12).astype(np.uint8), (1, 96, 96))
    volume = np.zeros((20, 20, 20), np.uint8)
    volume[:, :, ::4] = 1
    study = merged(tmp_path, volume, stripes)
    both = beside(study, LowResCubes(study).fractions)
    assert both.images.tolist() == pytest.approx([0.75, 0.25])
    assert both.volume.tolist() == pytest.approx([0.75, 0.25])
    assert both.typical
    half = merged(tmp_path, (np.indices((20, 20, 20)).sum(0) % 2).astype(np.uint8), stripes)
    other = beside(half, LowResCubes(half).fractions)
    assert not other.typical

    def told(**settings):
        """`half` with other settings of training, or of low_res."""
        low_res = {k: settings.pop(k) for k in ("one_sided",) if k in settings}
        return half.model_copy(
            update={
                "training": half.training.model_copy(update=settings),
                "low_res": half.low_res.model_copy(update=low_res),
            }
        )

    corrects, follows = told(atypical_images="correct"), told(atypical_images="follow")
    said = list(other.messages(corrects, 0.5))
    assert "a + c 50.0% and 75.0%, b 50.0% and 25.0%" in said[0]
    assert "The volume decides the fractions" in said[1]
    assert "50% of the way" in said[1]
    assert other.corrected(corrects) is not None
    assert "set training.atypical_images=correct" in list(other.messages(follows))[1]
    assert other.corrected(follows) is None
    assert len(list(both.messages(corrects))) == 1
    assert both.corrected(corrects) is None
    one_sided = told(atypical_images="correct", one_sided=("a",))
    said = list(other.messages(one_sided))[1]
    assert "shows too much of a (low_res.one_sided); the images decide all fractions" in said
    assert other.corrected(one_sided) is None


def test_chance_in_small_images_is_no_difference(tmp_path):
    """Two halves of an image, one of them nearly empty: the mean of few parts may be far off."""
    image = np.zeros((1, 64, 128), np.uint8)
    image[:, :, :64] = 1
    volume = np.zeros((20, 20, 20), np.uint8)
    volume[:6] = 1
    study = merged(tmp_path, volume, image)
    both = beside(study, LowResCubes(study).fractions)
    assert abs(both.volume - both.images).max() == pytest.approx(0.2)
    assert both.chance == pytest.approx(np.std([0, 0, 0, 0, 1, 1, 1, 1], ddof=1) / np.sqrt(8))
    assert both.typical


# ---- the correction ----


def test_wanted_fractions_are_the_volume_s_split_as_in_the_images():
    correction = Correction(GROUPS, np.array([0.3, 0.6, 0.1]), np.array([0.6, 0.4]))
    assert correction.fractions == pytest.approx([0.45, 0.4, 0.15])


@pytest.mark.parametrize("pixels", [4, 6])
def test_patterns_moved_to_a_volume(pixels):
    """Fractions as wanted, visible neighbours as in our slices, hidden ones as in the images."""
    image, ours = three((1, 200, 200), 1, 0.6, 0.4), three((1, 200, 200), 5, 0.35, 0.2)
    shares = [torch.from_numpy(counted_patterns(s, 1, pixels)).double() for s in (image, ours)]
    theirs, mine = (share / share.sum(1, keepdim=True) for share in shares)
    correction = Correction(GROUPS, np.bincount(image.ravel()) / image.size, np.array([0.65, 0.35]))
    moved = correction.patterns(pixels, pixels // 2).moved(theirs, mine, [1])
    for found, before, slices in zip(moved, theirs, mine, strict=True):
        table, images_, ours_ = (t.reshape([3] * pixels).numpy() for t in (found, before, slices))

        def pair(t, a, b, first, second):
            every = np.moveaxis(t, (first, second), (0, 1)).reshape(3, 3, -1).sum(2)
            return every[a, b] + every[b, a]

        one = [np.mean([table.sum(tuple(set(range(pixels)) - {k}))[p] for k in range(pixels)]) for p in range(3)]
        assert one == pytest.approx(correction.fractions, abs=1e-5)
        across = pixels // 2
        sides = {
            "across": [(k, k + 1) for k in range(pixels) if (k + 1) % across],
            "down": [(k, k + across) for k in range(pixels - across)],
        }
        for places in sides.values():
            visible = [
                sum(pair(t, a, 1, *place) for a in (0, 2) for place in places) / len(places) for t in (table, ours_)
            ]
            assert visible[0] == pytest.approx(visible[1], abs=1e-5)
            hidden = [np.mean([pair(t, 0, 2, *place) for place in places]) for t in (table, images_)]
            grown = 0.65 / (1 - np.mean(image == 1))
            assert hidden[0] == pytest.approx(grown * hidden[1], abs=1e-5)


def test_a_typical_image_stays_as_it_is():
    image = three((1, 150, 150), 3, 0.5, 0.3)
    share = torch.from_numpy(counted_patterns(image, 2)).double()
    share /= share.sum()
    fractions = np.bincount(image.ravel()) / image.size
    # The mean over pixels of the patterns is not quite the image's own: its rim is in fewer patterns.
    of_patterns = share.reshape([3] * 4).numpy()
    seen = np.mean([of_patterns.sum(tuple(set(range(4)) - {k})) for k in range(4)], axis=0)
    correction = Correction(GROUPS, seen, np.array([seen[0] + seen[2], seen[1]]))
    assert correction.growth == pytest.approx(1)
    moved = correction.patterns(4, 2).moved(share, share, [2])
    assert moved.numpy() == pytest.approx(share.numpy(), abs=1e-6)
    images = slice_statistics([image], 3)
    same = Correction(GROUPS, fractions, np.array([fractions[0] + fractions[2], fractions[1]]))
    errors = errors_between(images, same.seen(images, images), True)
    # Windows of 3 × 3 know the image's rim less than its middle, and are moved to the whole image's fractions.
    assert max(errors.pop("tv1"), errors.pop("tv4")) < 0.02
    assert max(errors.values()) < 1e-9


def test_judged_areas_are_the_images_within_a_group_and_ours_between_groups():
    images = slice_statistics([three((1, 200, 200), 1, 0.6, 0.4)], 3)
    ours = slice_statistics([three((1, 200, 200), 5, 0.35, 0.2)], 3)
    correction = Correction(GROUPS, images.volume_fraction, np.array([0.65, 0.35]))
    seen = correction.seen(images, ours)
    assert seen.volume_fraction == pytest.approx(correction.fractions)
    pairs = list(combinations(range(3), 2))
    assert seen.interphase_area[:, pairs.index((0, 2))] == pytest.approx(
        images.interphase_area[:, pairs.index((0, 2))] * 0.65 / (1 - images.volume_fraction[1])
    )
    between = [pairs.index((0, 1)), pairs.index((1, 2))]
    assert seen.interphase_area[:, between].sum(1) == pytest.approx(ours.interphase_area[:, between].sum(1))
    split = images.interphase_area[:, between].sum(0)
    assert seen.interphase_area[:, between].sum(0) / ours.interphase_area[:, between].sum() == pytest.approx(
        split / split.sum()
    )
    more = ours.interphase_area[:, between].sum() / images.interphase_area[:, between].sum()
    assert seen.tpb == pytest.approx(images.tpb * more)


def test_patches_are_tilted_as_far_as_there_are_enough():
    random = np.random.default_rng(0)
    first = random.normal(0.4, 0.1, 4000).clip(0.01, 0.99)
    fractions = np.stack([first, 1 - first], axis=1)
    weights, reached = patch_weights(fractions, np.array([0.5, 0.5]), 4000)
    assert reached == 1
    assert weights @ fractions == pytest.approx([0.5, 0.5], abs=1e-3)
    # A normal density tilted by one deviation has the effective number exp(-1) of its own.
    assert 1 / np.square(weights).sum() / 4000 == pytest.approx(np.exp(-1), rel=0.1)
    few, reached = patch_weights(fractions, np.array([0.5, 0.5]), 20)
    assert 0 < reached < 1
    assert 20 / np.square(few).sum() / 4000 >= 16
    assert 0.4 < few @ fractions[:, 0] < 0.5


def test_critics_see_patches_by_these_weights(tmp_path):
    """An image of 200 rows whose phase 1 grows from left to right, and a volume with more of it than the image."""
    random = np.random.default_rng(0)
    image = (random.random((1, 200, 400)) < np.linspace(0.0, 0.6, 400)).astype(np.uint8)
    image[(image == 0) & (random.random(image.shape) < 0.3)] = 2
    study = merged(tmp_path, blobs((20, 20, 20), 1, 2), image)
    low_res = LowResCubes(study)
    both = beside(study, low_res.fractions)
    assert not both.typical
    real = RealSlices(study, ALONE.device, both.correction)
    drawn = torch.cat([real.draw(step, 0, range(4)).real[0] for step in range(40)])
    plain = torch.cat([RealSlices(study, ALONE.device).draw(step, 0, range(4)).real[0] for step in range(40)])
    share, before = (float(patches[:, 1].mean()) for patches in (drawn, plain))
    aim = before + real.reached * (low_res.fractions[1] - before)
    assert share == pytest.approx(aim, abs=0.02)
    assert share > before + 0.03
    assert real.fractions()[1] == pytest.approx(low_res.fractions[1])


# ---- the fractions of whole blocks ----


def test_block_fractions_and_their_loss_by_brute_force():
    random = np.random.default_rng(0)
    operator = ImagingOperator(Fraction(4), [[0, 2], [1]], Imaging())
    around = blobs((6, 6, 6), 3, 2)
    around[0, 3, 3] = 2  # unknown, outside
    around[3, 3, 3] = 2  # unknown, inside
    given = one_hot(torch.from_numpy(around.astype(np.int64))[None], 2)
    probabilities = torch.from_numpy(random.dirichlet([1, 1, 1], (16, 16, 16)).transpose(3, 0, 1, 2)[None]).float()
    found = operator.block_fractions(probabilities)
    own = probabilities[0].numpy()
    lost, means, labels = 0.0, np.zeros(2), np.zeros(2)
    for place in np.ndindex(4, 4, 4):
        block = own[(slice(None), *(slice(4 * i, 4 * i + 4) for i in place))].mean((1, 2, 3))
        seen = np.array([block[0] + block[2], block[1]])
        assert found[(0, slice(None), *place)].numpy() == pytest.approx(seen, abs=1e-6)
        at = tuple(i + 1 for i in place)
        label = around[at]
        if label == 2:
            continue
        means += seen / 64
        labels[label] += 1 / 64
        sides = [around[tuple(np.add(at, step))] for step in [*np.eye(3, dtype=int), *-np.eye(3, dtype=int)]]
        least, weight = (0.98, 4) if all(side == label for side in sides) else (0.55, 1)
        lost += weight * max(0.0, least - seen[label]) ** 2 / 64
    assert block_loss(found, given, labels=True).item() == pytest.approx(lost, rel=1e-4)
    assert fraction_differences(found, given[:, :, 1:-1, 1:-1, 1:-1]).numpy() == pytest.approx(means - labels, abs=1e-6)


def test_block_loss_is_nothing_where_the_blocks_are_as_labelled():
    labels = torch.zeros(1, 6, 6, 6, dtype=torch.long)
    labels[:, :, :, 3:] = 1
    given = one_hot(labels, 2)
    assert block_loss(given[:, :, 1:-1, 1:-1, 1:-1], given, labels=True).item() == 0
    parts = torch.full((1, 2, 6, 6, 6), 0.5)
    assert block_loss(parts[:, :, 1:-1, 1:-1, 1:-1], parts, labels=False).item() == 0  # of probabilities


# ---- a run ----


def test_corrected_fractions_are_those_of_64_cubes_at_least(tmp_path, monkeypatch):
    """In 32 cubes the share of a hidden phase was 8 % off."""
    cubes = []
    monkeypatch.setattr("hpcres.training.wgan.match_fractions", lambda *given: cubes.append(given[2]))
    for asked in (2, 80):
        study = atypical(tmp_path, recalibration_cubes=asked)
        low_res = LowResCubes(study)
        real = RealSlices(study, ALONE.device, beside(study, low_res.fractions).correction)
        Models(study, ALONE).recalibrated(low_res, real)
    assert cubes == [64, 80]


def test_the_saved_generator_has_the_wanted_fractions_inside_the_volume(tmp_path):
    """Of cubes with their context, of which the recalibration cubes are all."""
    study = atypical(tmp_path, recalibration_cubes=8)
    low_res = LowResCubes(study)
    both = beside(study, low_res.fractions)
    real, models = RealSlices(study, ALONE.device, both.correction), Models(study, ALONE)
    for step in range(2):
        models.step(step, range(2), low_res, real, 1e-3)
    context, found = low_res.whole_context, []
    generator = models.recalibrated(low_res, real)
    for given in low_res.recalibration_inputs(8, 1, ALONE.device, context):
        found.append(generator(given, context).argmax(1).numpy().ravel())
    shares = np.bincount(np.concatenate(found), minlength=3) / np.concatenate(found).size
    assert shares == pytest.approx(both.correction.fractions, abs=0.01)
    assert abs(shares - both.phases).max() > 0.1  # which are not the images' own


def test_blocks_are_held_to_labels_only_where_images_are_corrected_or_it_is_asked(tmp_path):
    losses = {}
    for name, weight, corrected in (("none", None, False), ("own", None, True), ("800", 800.0, True), ("0", 0.0, True)):
        study = atypical(tmp_path, fraction_weight=weight, pattern_weight=0.0)
        low_res = LowResCubes(study)
        real = RealSlices(study, ALONE.device, beside(study, low_res.fractions).correction if corrected else None)
        losses[name] = float(Models(study, ALONE).step(0, range(2), low_res, real, 1e-3).losses[2])
    assert losses["own"] == losses["800"]
    assert losses["own"] > losses["0"] + 1


def test_fractions_over_all_cubes_are_those_of_all_processes(tmp_path):
    """The slope is taken at the mean over the processes, here a mean that another process has moved."""
    study = atypical(tmp_path)
    models, low_res = Models(study, ALONE), LowResCubes(study)
    moved = torch.tensor([0.25, -0.5])

    class Others:
        def mean(self, value):
            return value.detach() + moved

    models.group = Others()
    given = low_res.around(0, range(2), ALONE.device)
    known = given[:, :, 1:-1, 1:-1, 1:-1].clone()
    probabilities = torch.rand(2, 3, 64, 64, 64).softmax(1).requires_grad_()
    blocks = models.operator.block_fractions(probabilities)
    off = fraction_differences(blocks, known)
    expected = block_loss(blocks, given, labels=True) + 10 * (2 * (off.detach() + moved) * off).sum()
    (wanted,) = torch.autograd.grad(expected, probabilities)
    (slope,) = torch.autograd.grad(models._off_labels(probabilities, known, given), probabilities)
    assert torch.allclose(slope, wanted, rtol=1e-4, atol=1e-12)


def test_what_is_hidden_from_the_generator_asks_nothing_of_a_block(tmp_path):
    study = atypical(tmp_path)
    models, low_res = Models(study, ALONE), LowResCubes(study)
    given = low_res.around(0, range(2), ALONE.device)
    known = given[:, :, 1:-1, 1:-1, 1:-1].clone()
    known[:, :, 4:8, 4:8, 4:8] = 0
    probabilities = torch.rand(2, 3, 64, 64, 64).softmax(1)
    before = models._off_labels(probabilities, known, given.clone())
    probabilities[:, :, 16:32, 16:32, 16:32] = probabilities[:, :, 16:32, 16:32, 16:32].roll(1, 1)
    assert models._off_labels(probabilities, known, given.clone()) == before
    probabilities[:, :, :16] = probabilities[:, :, :16].roll(1, 1)
    assert models._off_labels(probabilities, known, given.clone()) != before


def test_a_corrected_run_has_moved_patterns_and_is_judged_and_painted_with_context(tmp_path):
    study = atypical(tmp_path, pattern_weight=1.0, quality_cubes=2)
    low_res = LowResCubes(study)
    correction = beside(study, low_res.fractions).correction
    real = RealSlices(study, ALONE.device, correction)
    plain = RealSlices(study, ALONE.device)
    assert torch.equal(plain.wanted_patterns(real.patterns), plain.patterns)
    moved = real.wanted_patterns(real.patterns).reshape(-1, 3, 3, 3, 3)
    first = (moved.sum((2, 3, 4)) + moved.sum((1, 2, 3))) / 2  # of the first and the last pixel
    assert first.mean(0).numpy() == pytest.approx(correction.fractions, abs=1e-3)
    asked = []

    def generator(given, context):
        asked.append((given.shape[2], context))
        return torch.rand(1, 3, 64, 64, 64)

    Evaluator(study, low_res, ImagingOperator.of(study), correction).evaluate(generator, ALONE.device)
    assert set(asked) == {(16 + 2 * 5, 5)}
    asked.clear()
    Evaluator(study, low_res, ImagingOperator.of(study)).evaluate(generator, ALONE.device)
    assert set(asked) == {(16, 0)}
    assert study.training.boundaries == ("mirror",) * 3
    assert study_of(tmp_path).training.boundaries == ("replicate",) * 3


def test_training_says_how_far_images_are_from_the_volume_and_what_it_does(tmp_path, capfd):
    study = atypical(tmp_path, quality_steps=2, quality_cubes=2, steps=2)
    train(study)
    said = capfd.readouterr().err
    assert re.search(r"a \+ c 50\.0% and (29|30|31)\.\d%, b 50\.0% and (69|70|71)\.\d%", said)
    assert "The volume decides the fractions" in said
    table = (study.folder / "quality.csv").read_text().splitlines()
    assert "correlation_error" not in table[0]
    assert "visible_fraction_error" in table[0]
