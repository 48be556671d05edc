"""Periodic axes have no face: output shifted around such an axis is the output of the shifted input."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_inference import lively, make_study, paint_alone

from hpcres.checkpoint import load_checkpoint, save_checkpoint
from hpcres.errors import InputError
from hpcres.geometry import Box, plan_tiles
from hpcres.inference import generate
from hpcres.inference.generate import Painter, halo_of
from hpcres.inference.run import open_job
from hpcres.inference.verify import repair_job
from hpcres.networks.superres import SuperResGenerator
from hpcres.noise import normals
from hpcres.study import load_study, save_study
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.stores import LabelStore

SEED = 2**40 + 7
AXES = [axes for axes in product((False, True), repeat=3) if any(axes)]
CASES = {
    "4": ("4", (9, 3, 7), 1), "8/5": ("8/5", (20, 15, 10), 1), "16/3": ("16/3", (6, 3, 6), 1),
    "far": ("4", (5, 2, 4), 6),
}  # fmt: skip
"""Scale factor, low-res shape, residual blocks; the halo of the last, 15, wraps seven times around two voxels."""
_FEWER = [(False, True, False), (False, True, True), (True, False, False), (True, True, True)]
WRAPS = {"4": AXES, "8/5": _FEWER, "16/3": _FEWER, "far": _FEWER[:1]}


def make_case(name: str) -> tuple[SuperResGenerator, np.ndarray, np.ndarray]:
    """Generator, low-res labels, noise."""
    scale, shape, blocks = CASES[name]
    torch.manual_seed(1)
    generator = lively(SuperResGenerator(2, 3, Fraction(scale), 3, blocks))
    labels = np.random.default_rng(5).integers(0, 2, shape, np.uint8)
    return generator, labels, normals(SEED, Box.whole(shape))


def paint(
    generator: SuperResGenerator, labels: np.ndarray, noise: np.ndarray, periodic: tuple[bool, bool, bool],
    tiles: tuple[int, int, int], block_voxels: int, monkeypatch,
) -> np.ndarray:  # fmt: skip
    """The high-res labels, tile by tile, with `noise` in place of the seed's."""
    monkeypatch.setattr(generate, "normals", lambda seed, box: noise[box.slices])
    plan = plan_tiles(labels.shape, generator.scale, tiles, halo_of(generator), 16, periodic)
    painter = Painter(generator, plan, PhaseMap((0, 1), "x"), SEED, torch.device("cpu"), 1)
    painter.block_voxels = block_voxels
    out = np.full(plan.shape, 255, np.uint8)
    for tile in plan.tiles:
        out[tile.write.slices] = painter.paint(tile, lambda box: labels[box.slices])
    painter.close()
    assert out.max() < 3
    return out


def reference(
    generator: SuperResGenerator, labels: np.ndarray, noise: np.ndarray, periodic: tuple[bool, bool, bool]
) -> np.ndarray:
    """The logits (phase, z, y, x) of the whole volume in one piece, repeated by numpy beyond its periodic faces."""
    p, q = generator.scale.numerator, generator.scale.denominator
    beyond = -(-(generator.halo_low_res + 2) // q) * q
    pad = [(beyond * wraps,) * 2 for wraps in periodic]
    channels = [np.pad(field, pad, mode="wrap") for field in (labels == 0, labels == 1, noise)]
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


@pytest.mark.parametrize(
    ("name", "periodic"), [(name, axes) for name, all_axes in WRAPS.items() for axes in all_axes],
    ids=lambda v: v if isinstance(v, str) else "".join("-p"[wraps] for wraps in v),
)  # fmt: skip
def test_any_tiling_is_the_endless_volume_and_moves_with_its_input(name, periodic, monkeypatch):
    generator, labels, noise = make_case(name)
    p, q = generator.scale.numerator, generator.scale.denominator
    logits = reference(generator, labels, noise, periodic)
    faces = reference(generator, labels, noise, (False,) * 3)
    assert (logits.argmax(0) != faces.argmax(0)).mean() > 1e-3  # the boundary matters here
    for tiles, block_voxels in (((1, 1, 1), 64), ((3, 3, 3), 16)):
        assert_same(paint(generator, labels, noise, periodic, tiles, block_voxels, monkeypatch), logits)
    # Shifts by whole high-res voxels, so by q low-res ones, another number of them on each axis.
    steps = [(axis + 1) * wraps for axis, wraps in enumerate(periodic)]
    moved = [np.roll(field, [q * n for n in steps], (0, 1, 2)) for field in (labels, noise)]
    shifted = paint(generator, *moved, periodic, (1, 2, 3), 32, monkeypatch)
    assert_same(shifted, np.roll(logits, [p * n for n in steps], (1, 2, 3)))


def test_noise_beyond_a_periodic_face_is_that_of_the_voxel_it_stands_for(monkeypatch):
    """The seed's own noise, unpatched: the low-res index modulo the axis."""
    generator, labels, noise = make_case("4")
    expected = paint(generator, labels, noise, (True,) * 3, (2, 2, 2), 16, monkeypatch)
    monkeypatch.undo()
    plan = plan_tiles(labels.shape, generator.scale, (2, 2, 2), halo_of(generator), 16, (True,) * 3)
    painter = Painter(generator, plan, PhaseMap((0, 1), "x"), SEED, torch.device("cpu"), 1)
    painter.block_voxels = 16
    for tile in plan.tiles:
        assert (painter.paint(tile, lambda box: labels[box.slices]) == expected[tile.write.slices]).all()
    painter.close()


# ---- the setting -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("periodic") / "s", "16/3", (9, 7, 6))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("periodic", (True, True, True)), ("replicate", (False, False, False)), ("{z: periodic}", (True, False, False)),
        ("{x: periodic, y: replicate}", (False, False, True)), ("[replicate, periodic, periodic]", (False, True, True)),
    ],
)  # fmt: skip
def test_boundary_is_a_word_or_one_an_axis(given, expected, study, tmp_path):
    loaded = load_study(study, [f"inference.boundary={given}"], str(tmp_path))
    assert loaded.inference.periodic == expected
    assert load_study(save_study(loaded, "infer")) == loaded


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("mirror", "'mirror' is no boundary; use replicate or periodic"), ("{w: periodic}", "'w' is no axis"),
        ("[periodic, periodic]", "neither one word nor one an axis"), ("{z: 3}", "3 is no boundary"), ("1", "1 is nei"),
    ],
)  # fmt: skip
def test_other_boundaries_are_refused_in_words(given, words, study):
    with pytest.raises(InputError, match=rf"inference\.boundary: .*{words}"):
        load_study(study, [f"inference.boundary={given}"])


def test_a_periodic_axis_must_end_with_a_high_res_voxel(study):
    with pytest.raises(InputError, match=r"periodic along y with 7 low-res voxels.*multiple of 3, or use replicate"):
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
    with pytest.raises(InputError, match=r"was painted with boundary .*periodic.* this job has .*--overwrite"):
        paint_alone(study, tmp_path / "open")
    (store / "0/c/0/0/1").unlink()
    assert repair_job(store).plan.periodic == (True, False, True)
    assert hpcres("verify", store, "--repair").returncode == 0
    assert (LabelStore.open(store).read(0, whole) == labels).all()
    loaded = load_checkpoint(study.parent / "out/checkpoint.pt")
    taught = tmp_path / "checkpoint.pt"
    save_checkpoint(taught, generator=loaded.generator, study=load_study(periodic), step=1)
    alone = open_job(None, checkpoint=str(taught), low_res=str(study.parent / "low.npy"), output=str(tmp_path / "x"))
    assert alone.plan.periodic == (True, False, True)
