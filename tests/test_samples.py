"""What training draws: patches of the images and their patterns, and cubes of the low-res volume."""

import numpy as np
import pytest
import torch
from small_training import ALONE, blobs, counted_patterns, counted_thin, one_image, study_of

from hpcres.training.data import slices as images_module
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, for the same sums everywhere."""
    torch.set_num_threads(1)


def patches(study, draws=60, axis=0):
    """Distinct patches as label bytes, and all of them."""
    real = RealSlices(study, ALONE.device)
    cut = [real.draw(step, 0, range(2)).real[axis].argmax(1).numpy().astype(np.uint8) for step in range(draws)]
    return {patch.tobytes() for patch in np.concatenate(cut)}, np.concatenate(cut)


def test_augmentation_gives_the_eight_mirrors_and_rotations(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 3, (1, 56, 56), np.uint8)
    turned = [np.rot90(p, k) for p in (pixels[0], pixels[0].T) for k in range(4)]
    expected = {np.ascontiguousarray(p).tobytes() for p in turned}
    assert len(expected) == 8
    assert patches(study_of(tmp_path, [one_image(tmp_path, pixels)]))[0] == expected
    assert patches(study_of(tmp_path, [one_image(tmp_path, pixels, augment=False)]))[0] == {pixels[0].tobytes()}
    mirrors = {np.ascontiguousarray(pixels[0][::i, ::j]).tobytes() for i in (1, -1) for j in (1, -1)}
    assert patches(study_of(tmp_path, [one_image(tmp_path, pixels, augment="mirrors")]))[0] == mirrors


def test_planes_of_one_image_can_allow_different_turns(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 3, (1, 56, 56), np.uint8)
    image = one_image(tmp_path, pixels)
    images = [
        image | {"planes": ["zy"], "augment": True},
        image | {"planes": ["zx"], "augment": "mirrors"},
        image | {"planes": ["yx"]},
    ]
    study = study_of(tmp_path, images, {"isotropic": False})
    assert [len(patches(study, 30, axis)[0]) for axis in (2, 1, 0)] == [8, 4, 1]


def test_patches_are_whole_windows_of_their_image(tmp_path):
    pixels = blobs((2, 60, 75), 5)
    windows = {
        np.ascontiguousarray(image[r : r + 56, c : c + 56]).tobytes()
        for image in pixels
        for r in range(5)
        for c in range(20)
    }
    found, _ = patches(study_of(tmp_path, [one_image(tmp_path, pixels, augment=False)]), draws=300)
    assert found <= windows
    assert len(found) > 0.99 * len(windows)


def test_images_are_drawn_in_proportion_to_their_area(tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((1, 60, 60), np.uint8))
    np.save(tmp_path / "large.npy", np.ones((3, 60, 120), np.uint8))
    images = [{"path": str(tmp_path / name)} for name in ("small.npy", "large.npy")]
    _, found = patches(study_of(tmp_path, images), draws=200)
    share = float((found[:, 0, 0] == 1).mean())
    assert share == pytest.approx(6 / 7, abs=4 * (6 / 49 / len(found)) ** 0.5)


@pytest.mark.parametrize(
    ("plane", "axis", "varies"), [("zy", 2, 0), ("yz", 2, 1), ("zx", 1, 0), ("xz", 1, 1), ("yx", 0, 0), ("xy", 0, 1)]
)
def test_an_image_goes_to_the_critic_of_its_normal_with_rows_and_columns_in_order(tmp_path, plane, axis, varies):
    """The image varies along its rows; in the patch that is the direction of its first letter."""
    rows = np.broadcast_to(np.arange(60)[:, None] // 20, (1, 60, 64)).astype(np.uint8)
    np.save(tmp_path / "flat.npy", np.zeros((1, 64, 64), np.uint8))
    others = [p for p in ("yx", "zx", "zy") if set(p) != set(plane)]
    images = [one_image(tmp_path, rows, planes=[plane]), {"path": str(tmp_path / "flat.npy"), "planes": others}]
    study = study_of(tmp_path, images, {"isotropic": False})
    for normal in range(3):
        found = patches(study, 3, normal)[1]
        assert (found.std(axis=1 + varies).min() > 0) == (normal == axis)
        assert found.std(axis=2 - varies).max() == 0


@pytest.mark.parametrize(
    ("numbers", "slices"),
    [
        ({}, 3),
        ({"real_patches": 7, "penalties": 5}, 3),
        ({"real_patches": 2, "penalties": "slices"}, None),
        ({"diagonal_slices": True}, 3),
    ],
)
def test_any_sharing_of_the_cubes_draws_the_same_samples(tmp_path, numbers, slices):
    study = study_of(tmp_path, training={"cubes": 4, "slices_per_axis": slices} | numbers)
    low_res, real = LowResCubes(study), RealSlices(study, ALONE.device)
    whole = low_res.draw(7, range(4), ALONE.device)
    parts = [low_res.draw(7, share, ALONE.device) for share in (range(2), range(2, 4))]
    assert all(torch.equal(w, torch.cat(p)) for w, p in zip(whole, zip(*parts, strict=True), strict=True))
    slices = real.draw(7, 1, range(4))
    parts = [real.draw(7, 1, share) for share in (range(2), range(2, 4))]
    number, planes = numbers.get("real_patches", 12), 6 if "diagonal_slices" in numbers else 3
    assert len(slices.real) == planes
    shown = [real.choose(7, share) for share in (range(4), range(2), range(2, 4))]
    for axis in range(planes):
        if shown[0][axis] is not None:
            assert torch.equal(shown[0][axis], torch.cat([shown[1][axis], shown[2][axis]]))
        assert len(slices.real[axis]) == max(4, number)
        for name in ("chosen", "real", "mix"):
            if getattr(slices, name)[axis] is not None:
                cut = torch.cat([getattr(part, name)[axis] for part in parts])
                assert torch.equal(getattr(slices, name)[axis], cut)
        if number != 12:
            fakes = 2 * (study.training.slices_per_axis or 56)
            first, second = (part.pairs[axis] for part in parts)
            after = torch.tensor([[len(parts[0].real[axis])], [fakes]])
            assert torch.equal(slices.pairs[axis], torch.cat([first, second + after], dim=1))
            for numbers_of_pairs in slices.pairs[axis]:
                assert len(numbers_of_pairs.unique()) == len(slices.mix[axis])
    if number == 12:
        assert slices.pairs is None
        assert all(part.shares == (1, 1) for part in parts)
    for share, counts in enumerate(zip(*([len(p.real[0]), len(p.mix[0])] for p in parts), strict=True)):
        assert [part.shares[share] for part in parts] == pytest.approx([2 * n / sum(counts) for n in counts])
    assert not torch.equal(whole[1], low_res.draw(8, range(4), ALONE.device)[1])
    assert not torch.equal(slices.mix[0], real.draw(7, 0, range(4)).mix[0])


@pytest.mark.parametrize("around", [0, 2])
def test_cubes_are_windows_of_the_volume_even_when_it_is_not_held(tmp_path, monkeypatch, around):
    """The generator sees `around` voxels more on each side than are known, beyond the volume its mirror image."""
    volume, edge = blobs((20, 16, 21), 1), 16 + 2 * around
    study = study_of(tmp_path, volume=volume, training={"context": around})
    held = LowResCubes(study).draw(0, range(8), ALONE.device)
    assert held[0].shape == (8, 16, 16, 16)
    assert held[1].shape == (8, 4, edge, edge, edge)
    beyond = np.pad(volume, around, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(beyond, (edge, edge, edge)).reshape(-1, edge**3)
    seen = held[1][:, :3].argmax(1)
    for cube in seen.numpy().reshape(8, -1):
        assert (windows == cube).all(axis=1).any()
    inner = slice(around, around + 16)
    assert torch.equal(seen[:, inner, inner, inner], held[0].long())
    assert abs(float(held[1][:, 3].std()) - 1) < 0.05
    monkeypatch.setattr("hpcres.training.data.cubes._HELD_BYTES", 100)
    lazy = LowResCubes(study)
    assert lazy._held is None
    assert torch.equal(lazy.draw(0, range(8), ALONE.device)[1], held[1])


@pytest.mark.parametrize(("reach", "outermost", "inner"), [(False, 1 / 49, 16 / 49), (True, 16 / 79, 16 / 79)])
def test_cubes_reach_the_faces_of_the_volume_where_asked(tmp_path, reach, outermost, inner):
    """Of the 49 places of a cube of 16 in 64 voxels one holds the outermost, 16 an inner one; of the 79 where a cube
    holds some voxel, 16 hold any; moved inside, one is in 16 to 31."""
    study = study_of(tmp_path, volume=blobs((64, 16, 64), 1), training={"reach_faces": reach})
    cubes = LowResCubes(study)
    starts = np.array([cubes.start(step, 0, cube)[1] for step in range(1000) for cube in range(4)])
    assert (starts[:, 1] == 0).all()
    for axis in (0, 2):
        held = np.array([np.mean((starts[:, axis] <= v) & (v < starts[:, axis] + 16)) for v in range(64)])
        assert np.allclose(held[[0, 63]], outermost, atol=0.02)
        assert np.allclose(held[20:44], inner, atol=0.025)
        if reach:
            assert held.max() < 2 * inner + 0.025
            assert held.min() > inner - 0.025


def test_noise_channels_are_white_or_as_smooth_as_asked(tmp_path):
    """σ of 8 high-res voxels is 2 low-res ones: correlation exp(−h² / 16). The white one is what it is alone."""
    studies = [
        study_of(tmp_path, network={"width": 3, "critic_width": 5} | more)
        for more in ({}, {"noise_sigma_voxels": (0.0, 8.0)})
    ]
    alone, both = (LowResCubes(study).draw(3, range(1000), ALONE.device)[1] for study in studies)
    assert both.shape == (1000, 5, 16, 16, 16)
    assert torch.equal(both[:, :4], alone)
    for channel, sigma in ((3, 0.0), (4, 2.0)):
        noise = both[:, channel].numpy()
        for axis in (1, 2, 3):
            line = np.moveaxis(noise, axis, 0)
            for apart in (1, 2, 4):
                expected = np.exp(-(apart**2) / (4 * sigma**2)) if sigma else 0.0
                assert abs((line[:-apart] * line[apart:]).mean() - expected) < 0.03
        assert abs(noise.var() - 1) < 0.03
    assert not (both[:, 3] * both[:, 4]).mean().abs() > 0.03


def test_surroundings_of_no_whole_high_res_voxels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"context: 3 low-res .* at scale factor 64/25; use a multiple of 25"):
        study_of(tmp_path, training={"context": 3}, scale_factor="64/25")


@pytest.mark.parametrize("pixels", [4, 6])
@pytest.mark.parametrize("augment", [True, "mirrors", False])
def test_patterns_of_the_images_are_those_of_all_that_patches_may_show(tmp_path, monkeypatch, augment, pixels):
    """Two images of different sizes, one for two planes with its rows along z, so that it is turned over for zx."""
    side, top = blobs((2, 60, 71), 3), blobs((1, 66, 64), 4)
    np.save(tmp_path / "side.npy", side)
    np.save(tmp_path / "top.npy", top)
    images = [
        {"path": str(tmp_path / "side.npy"), "planes": ["zy", "xz"], "augment": augment},
        {"path": str(tmp_path / "top.npy"), "planes": ["yx", "xz"], "augment": augment},
    ]
    training = {"pattern_spacings": [3, 1], "pattern_pixels": pixels}
    study = study_of(tmp_path, images, {"isotropic": False}, training=training)
    monkeypatch.setattr(images_module, "_BAND_PIXELS", 700)
    ways = {True: range(8), "mirrors": (0, 2, 4, 6), False: (0,)}[augment]

    def seen(stack, spacing, turned):
        found = 0
        for way in ways:
            one = np.rot90(stack, way // 2 if augment is True else (way // 4) * 2, (1, 2))
            one = one[:, :, ::-1] if way % (2 if augment is True else 4) else one
            found = found + counted_patterns(one.swapaxes(1, 2) if turned else one, spacing, pixels)
        return found

    def shares(counts):
        return counts / counts.sum(1, keepdims=True)

    each = (3, 1 if pixels == 4 else 2, 3**pixels)  # axes, shapes, patterns
    patterns = RealSlices(study, ALONE.device).patterns.numpy().reshape(2, *each)
    for k, spacing in enumerate((3, 1)):
        zx = seen(side, spacing, True) + seen(top, spacing, True)
        for axis, counts in enumerate((seen(top, spacing, False), zx, seen(side, spacing, False))):
            assert patterns[k, axis] == pytest.approx(shares(counts), abs=1e-6)
    images, training = [{"path": str(tmp_path / "top.npy"), "augment": augment}], {"pattern_pixels": pixels}
    patterns = RealSlices(study_of(tmp_path, images, training=training), ALONE.device).patterns.numpy()
    expected = shares(seen(top, 8, False))
    for axis in range(3):
        assert patterns.reshape(4, *each)[3, axis] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("augment", [True, "mirrors", False])
def test_thin_shares_of_the_images_are_those_of_all_that_patches_may_show(tmp_path, monkeypatch, augment):
    """As above; mirrors change none, and rotations make those down columns and along rows one."""
    random = np.random.default_rng(2)
    side, top = (random.choice(3, shape, p=[0.5, 0.3, 0.2]) for shape in ((2, 60, 71), (1, 66, 64)))
    np.save(tmp_path / "side.npy", side)
    np.save(tmp_path / "top.npy", top)
    images = [
        {"path": str(tmp_path / "side.npy"), "planes": ["zy", "xz"], "augment": augment},
        {"path": str(tmp_path / "top.npy"), "planes": ["yx", "xz"], "augment": augment},
    ]
    monkeypatch.setattr(images_module, "_BAND_PIXELS", 700)
    thin = RealSlices(study_of(tmp_path, images, {"isotropic": False}), ALONE.device).thin.numpy().reshape(3, 2, 2)

    def seen(*stacks):
        counts = sum(counted_thin(stack) for stack in stacks)
        counts = counts + counts[::-1] if augment is True else counts
        return counts[:, 0] / counts[:, 1]

    zx = seen(side.swapaxes(1, 2), top.swapaxes(1, 2))
    for axis, expected in enumerate((seen(top), zx, seen(side))):
        assert thin[axis, :, 0] == pytest.approx(expected, abs=1e-6)
    assert thin.sum(2) == pytest.approx(1)
