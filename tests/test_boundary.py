"""Axes without ends have no face: any tiling of such a volume is the endless one's stretch of it.

Around a periodic axis the output of a shifted input is the shifted output; beyond a mirror labels are its image and
noise is noise.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_painting import lively, make_study, paint_alone

from hpcres.checkpoint import load_checkpoint, save_checkpoint
from hpcres.conditions import Conditions
from hpcres.errors import InputError
from hpcres.geometry import Boundaries, Box, plan_tiles
from hpcres.inference.generate import Painter, halo_of
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.verify import repair_job
from hpcres.networks.superres import SuperResGenerator
from hpcres.noise import normals
from hpcres.study.file import load_study, save_study
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.stores import LabelStore
from hpcres.volumes.volume import array_volume

SEED = 2**40 + 7
WORDS = {"r": "replicate", "p": "periodic", "m": "mirror"}
CASES = {
    "4": ("4", (9, 3, 7), 1),
    "8/5": ("8/5", (20, 15, 10), 1),
    "16/3": ("16/3", (6, 3, 6), 1),
    "odd": ("8/5", (7, 13, 5), 1),
    "far": ("4", (5, 2, 4), 6),
}
"""Scale factor, low-res shape, residual blocks; the halo of the last, 15, wraps seven times around two voxels. The odd
one's first axes end within a high-res voxel."""
_FEWER = ["rpr", "rpp", "prr", "ppp", "rmr", "mmm", "pmr", "mrp"]
WRAPS = {
    "4": ["".join(axes) for axes in product("rp", repeat=3) if "p" in axes] + ["mrr", "rmr", "rrm", "mmm", "mpr"],
    "8/5": _FEWER,
    "16/3": _FEWER,
    "odd": ["mmm", "mrr", "rmp"],
    "far": ["rpr", "rmr"],
}


def boundaries_of(letters: str) -> Boundaries:
    z, y, x = (WORDS[letter] for letter in letters)
    return z, y, x


BEYOND = 80
"""As far as the tests' noise goes on beyond a mirror, in low-res voxels."""


def noise_of(shape: tuple[int, ...], letters: str, channel: int = 0) -> np.ndarray:
    """The seed's noise of a volume, with BEYOND voxels more on each side of mirror axes; index −1 is 2³² − 1."""
    axes = [
        [(2**32 - BEYOND, 2**32), (0, n + BEYOND)] if letter == "m" else [(0, n)]
        for n, letter in zip(shape, letters, strict=True)
    ]
    boxes = [[[Box(*zip(z, y, x, strict=True)) for x in axes[2]] for y in axes[1]] for z in axes[0]]
    return np.block([[[normals(SEED, box, channel) for box in row] for row in plane] for plane in boxes])


def mirrored(field: np.ndarray, letters: str, by: int) -> np.ndarray:
    return np.pad(field, [(by * (letter == "m"),) * 2 for letter in letters], mode="symmetric")


def make_case(name: str, letters: str) -> tuple[SuperResGenerator, np.ndarray, np.ndarray]:
    """Generator, low-res labels, noise."""
    scale, shape, blocks = CASES[name]
    torch.manual_seed(1)
    generator = lively(SuperResGenerator(2, 3, Fraction(scale), 3, blocks))
    labels = np.random.default_rng(5).integers(0, 2, shape, np.uint8)
    return generator, labels, noise_of(shape, letters)


def paint(
    generator: SuperResGenerator,
    labels: np.ndarray,
    noise: np.ndarray,
    letters: str,
    tiles: tuple[int, int, int],
    block_voxels: int,
    monkeypatch,
) -> np.ndarray:
    """The high-res labels, tile by tile, with `noise` in place of the seed's."""

    def given(seed, box, channel=0):
        assert channel == 0
        starts = [(a + BEYOND) % 2**32 if m == "m" else a for a, m in zip(box.start, letters, strict=True)]
        return noise[tuple(slice(a, a + n) for a, n in zip(starts, box.shape, strict=True))]

    monkeypatch.setattr("hpcres.noise.normals", given)
    return paint_seed(generator, labels, letters, tiles, block_voxels)


def paint_seed(
    generator: SuperResGenerator, labels: np.ndarray, letters: str, tiles: tuple[int, int, int], block_voxels: int
) -> np.ndarray:
    plan = plan_tiles(labels.shape, generator.scale, tiles, halo_of(generator), 16, boundaries_of(letters))
    painter = Painter(generator, plan, SEED, torch.device("cpu"), 1)
    painter.block_voxels = block_voxels
    conditions = Conditions(2, labels.shape, array_volume(labels, "x"), PhaseMap((0, 1), "x"))
    out = np.full(plan.shape, 255, np.uint8)
    for tile in plan.tiles:
        out[tile.write.slices] = painter.paint(tile, conditions)
    painter.close()
    assert out.max() < 3
    return out


def reference(generator: SuperResGenerator, labels: np.ndarray, *noises: np.ndarray, letters: str) -> np.ndarray:
    """The logits (phase, z, y, x) of the whole volume in one piece, repeated by numpy beyond faces that are no end."""
    p, q = generator.scale.numerator, generator.scale.denominator
    beyond = -(-(generator.halo_low_res + 2) // q) * q
    pad = [(beyond * (letter != "r"),) * 2 for letter in letters]
    cut = [
        slice(BEYOND - beyond, BEYOND + n + beyond) if letter == "m" else slice(n)
        for n, letter in zip(labels.shape, letters, strict=True)
    ]
    channels = [mirrored(labels == 0, letters, beyond), mirrored(labels == 1, letters, beyond)]
    channels += [noise[tuple(cut)] for noise in noises]
    around = [(beyond * (letter == "p"),) * 2 for letter in letters]
    channels = [np.pad(channel, around, mode="wrap") for channel in channels]
    with torch.inference_mode():
        logits = generator(torch.from_numpy(np.stack(channels).astype(np.float32))[None])[0].numpy()
    inside = [
        slice(before // q * p, before // q * p + int(n * generator.scale))
        for (before, _), n in zip(pad, labels.shape, strict=True)
    ]
    return logits[(slice(None), *inside)]


def assert_same(painted: np.ndarray, logits: np.ndarray) -> None:
    """Equal labels, but for near ties."""
    differ = painted != logits.argmax(0)
    best = np.sort(logits, 0)
    assert differ.mean() <= 1e-4
    assert not differ.any() or (best[-1] - best[-2])[differ].max() < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize(("name", "letters"), [(name, letters) for name in WRAPS for letters in WRAPS[name]])
def test_any_tiling_is_the_endless_volume_and_moves_with_its_input(name, letters, monkeypatch):
    generator, labels, noise = make_case(name, letters)
    p, q = generator.scale.numerator, generator.scale.denominator
    logits = reference(generator, labels, noise, letters=letters)
    faces = reference(generator, labels, noise_of(labels.shape, "rrr"), letters="rrr")
    assert (logits.argmax(0) != faces.argmax(0)).mean() > 1e-3  # the boundary matters here
    for tiles, block_voxels in (((1, 1, 1), 64), ((3, 3, 3), 16)):
        assert_same(paint(generator, labels, noise, letters, tiles, block_voxels, monkeypatch), logits)
    # Shifts by whole high-res voxels, so by q low-res ones, another number of them on each periodic axis.
    steps = [(axis + 1) * (letter == "p") for axis, letter in enumerate(letters)]
    moved = [np.roll(field, [q * n for n in steps], (0, 1, 2)) for field in (labels, noise)]
    shifted = paint(generator, *moved, letters, (1, 2, 3), 32, monkeypatch)
    assert_same(shifted, np.roll(logits, [p * n for n in steps], (1, 2, 3)))


@pytest.mark.parametrize(("name", "letters"), [("4", "mmm"), ("8/5", "mrm"), ("16/3", "pmr"), ("far", "rmr")])
def test_a_mirrored_volume_is_half_of_one_periodic_with_its_image(name, letters, monkeypatch):
    """Of noise that is mirrored, too."""
    generator, *fields = make_case(name, "rrr")
    noise = mirrored(fields[1], letters, BEYOND)
    half = paint(generator, fields[0], noise, letters, (2, 1, 2), 16, monkeypatch)
    for axis in (axis for axis, letter in enumerate(letters) if letter == "m"):
        fields = [np.concatenate([field, np.flip(field, axis)], axis) for field in fields]
    whole = paint(generator, *fields, letters.replace("m", "p"), (1, 2, 2), 32, monkeypatch)
    assert (whole[tuple(slice(n) for n in half.shape)] == half).all()


@pytest.mark.parametrize("letters", ["ppp", "mmm", "rmp"])
def test_noise_beyond_a_face_is_that_of_the_voxel_it_stands_for_or_its_own(letters, monkeypatch):
    """The seed's own noise, unpatched."""
    generator, labels, noise = make_case("4", letters)
    expected = paint(generator, labels, noise, letters, (2, 2, 2), 16, monkeypatch)
    monkeypatch.undo()
    assert (paint_seed(generator, labels, letters, (2, 2, 2), 16) == expected).all()


def smoothed_by_hand(shape: tuple[int, ...], letters: str, channel: int, sigma: float) -> np.ndarray:
    """The noise that `reference` takes, by a Gaussian of `sigma` low-res voxels cut off at three."""
    field = noise_of(shape, letters.replace("r", "m"), channel).astype(float)
    place = np.arange(-np.ceil(3 * sigma), np.ceil(3 * sigma) + 1)
    weights = np.exp(-(place**2) / (2 * sigma**2))
    weights /= np.linalg.norm(weights)
    for axis, letter in enumerate(letters):
        around = [(len(place) // 2 * (letter == "p" and a == axis),) * 2 for a in range(3)]
        mode = "valid" if letter == "p" else "same"
        field = np.apply_along_axis(np.convolve, axis, np.pad(field, around, mode="wrap"), weights, mode)
    return field[tuple(slice(BEYOND, -BEYOND) if letter == "r" else slice(None) for letter in letters)]


@pytest.mark.parametrize("letters", ["rrr", "mmm", "rmp", "ppp"])
def test_smooth_noise_is_one_field_whatever_the_tiling(letters):
    scale, shape, blocks = CASES["4"]
    generator = lively(SuperResGenerator(2, 3, Fraction(scale), 3, blocks, noise_sigma_voxels=(0.0, 6.0)))
    labels = np.random.default_rng(5).integers(0, 2, shape, np.uint8)
    white, smooth = noise_of(shape, letters), smoothed_by_hand(shape, letters, 1, 1.5)
    logits = reference(generator, labels, white, smooth, letters=letters)
    other = reference(generator, labels, white, noise_of(shape, letters, 1), letters=letters)
    assert (logits.argmax(0) != other.argmax(0)).mean() > 1e-2  # smoothness matters here
    for tiles, block_voxels in (((1, 1, 1), 64), ((3, 3, 3), 16)):
        assert_same(paint_seed(generator, labels, letters, tiles, block_voxels), logits)


# ---- the setting -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("periodic") / "s", "16/3", (9, 7, 6))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("periodic", "ppp"),
        ("replicate", "rrr"),
        ("mirror", "mmm"),
        ("{z: periodic}", "prr"),
        ("{x: periodic, y: mirror}", "rmp"),
        ("[replicate, periodic, periodic]", "rpp"),
    ],
)
def test_boundary_is_a_word_or_one_an_axis(given, expected, study, tmp_path):
    loaded = load_study(study, [f"inference.boundary={given}"], str(tmp_path))
    assert loaded.inference.boundary == boundaries_of(expected)
    assert load_study(save_study(loaded, "infer")) == loaded


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("wall", "'wall' is no boundary; use one of replicate, periodic, mirror"),
        ("{w: periodic}", "'w' is no axis"),
        ("[periodic, periodic]", "neither one word nor one an axis"),
        ("{z: 3}", "3 is no boundary"),
        ("1", "1 is nei"),
    ],
)
def test_other_boundaries_are_refused_in_words(given, words, study):
    with pytest.raises(InputError, match=rf"inference\.boundary: .*{words}"):
        load_study(study, [f"inference.boundary={given}"])


def test_a_periodic_axis_must_end_with_a_high_res_voxel(study):
    with pytest.raises(InputError, match=r"periodic along y with 7 low-res voxels.*multiple of 3, or use mirror or"):
        open_job(load_study(study, ["inference.boundary=periodic"]))


def test_boundary_belongs_to_the_store(study, tmp_path, hpcres):
    """It is in the provenance, a rerun with another is refused, a repair keeps it, a checkpoint brings it along."""
    walls = paint_alone(study, tmp_path / "walls")
    content = yaml.safe_load(study.read_text())
    content["inference"]["boundary"] = {"z": "periodic", "x": "periodic"}
    periodic = study.with_name("periodic.yaml")
    periodic.write_text(yaml.safe_dump(content))
    store = paint_alone(periodic, tmp_path / "open")
    assert LabelStore.open(store).provenance["boundary"] == {"z": "periodic", "y": "replicate", "x": "periodic"}
    whole = Box.whole(LabelStore.open(store).levels[0].shape)
    labels = LabelStore.open(store).read(0, whole)
    assert (labels != LabelStore.open(walls).read(0, whole)).mean() > 1e-3
    with pytest.raises(InputError, match=r"was painted with boundary .*periodic.* this job has .*`overwrite`"):
        paint_alone(study, tmp_path / "open")
    (store / "0/c/0/0/1").unlink()
    assert repair_job(store).plan.boundaries == ("periodic", "replicate", "periodic")
    assert hpcres("verify", store, "--repair").returncode == 0
    assert (LabelStore.open(store).read(0, whole) == labels).all()
    loaded = load_checkpoint(study.parent / "out/checkpoint.pt")
    taught = tmp_path / "checkpoint.pt"
    save_checkpoint(taught, generator=loaded.generator, study=load_study(periodic), step=1)
    alone = open_job(
        None, JobOptions(checkpoint=str(taught), low_res=str(study.parent / "low.npy"), output=str(tmp_path / "x"))
    )
    assert alone.plan.boundaries == ("periodic", "replicate", "periodic")


def test_a_network_trained_with_surroundings_paints_with_a_mirror_unless_told_otherwise(study, tmp_path):
    loaded, low_res = load_checkpoint(study.parent / "out/checkpoint.pt"), str(study.parent / "low.npy")
    for around, boundary, expected in ((0, None, "rrr"), (3, None, "mmm"), (3, "{z: periodic}", "prr")):
        settings = [f"training.context={around}", *([f"inference.boundary={boundary}"] if boundary else [])]
        taught, used = tmp_path / f"{around}.pt", load_study(study, settings)
        save_checkpoint(taught, generator=loaded.generator, study=used, step=1)
        alone = open_job(None, JobOptions(checkpoint=str(taught), low_res=low_res, output=str(tmp_path / "x")))
        # A study that does not say leaves it to the checkpoint, whatever it would train.
        by_study = open_job(load_study(study, settings[1:]), JobOptions(checkpoint=str(taught)))
        assert alone.plan.boundaries == by_study.plan.boundaries == boundaries_of(expected)
