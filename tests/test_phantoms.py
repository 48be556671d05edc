"""Phantoms against the laws they are drawn from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from hpcres.counting.counts import count
from hpcres.counting.totals import finalize
from hpcres.errors import InputError
from hpcres.geometry import Box, blocks
from hpcres.imaging import ImagingOperator, one_hot
from hpcres.phantoms import files
from hpcres.phantoms.chi2 import Chi2Volume, Excursion, correlations_for, pair_probability
from hpcres.phantoms.files import make_phantom
from hpcres.phantoms.fit import fit
from hpcres.phantoms.gaussian import FieldPair, correlation
from hpcres.phantoms.materials import separator, three_phase
from hpcres.study import Study
from hpcres.volumes import convert as converting
from hpcres.volumes.formats import open_volume, read_images


def chi2_pair_probability(porosity: float, correlation: float) -> float:
    """P(both solid) for two voxels whose Gaussians have this correlation: given Y1 = y, Y2/(1 − ρ²) is a noncentral
    χ² of two degrees of freedom with noncentrality ρ² y/(1 − ρ²).
    """
    nu, square = -2 * np.log(1 - porosity), correlation**2

    def density(y: float) -> float:
        return 0.5 * np.exp(-y / 2) * stats.ncx2.sf(nu / (1 - square), 2, square * y / (1 - square))

    return integrate.quad(density, nu, np.inf)[0]


def pairs(solid: np.ndarray, axis: int, lag: int) -> float:
    ahead, behind = [slice(None)] * 3, [slice(None)] * 3
    ahead[axis], behind[axis] = slice(lag, None), slice(None, -lag)
    return float((solid[tuple(ahead)] & solid[tuple(behind)]).mean())


def chi2(shape, seed, share: float, feature: float, covariance: str = "exponential") -> np.ndarray:
    return Chi2Volume(shape, seed, [Excursion(share, feature, covariance)]).read(Box.whole(shape))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_two_point_law_is_that_of_a_noncentral_chi_square(share):
    rho = np.array([0.05, 0.5, 0.9, 0.99])
    exact = [chi2_pair_probability(1 - share, one) for one in rho]
    found = pair_probability(-2 * np.log(share), rho)
    np.testing.assert_allclose(found, exact, rtol=1e-7)
    np.testing.assert_allclose(correlations_for(-2 * np.log(share), found), rho, atol=1e-5)
    assert pair_probability(-2 * np.log(share), np.array([0.0, 1.0])) == pytest.approx([share**2, share])


def test_chi2_field_has_its_porosity_and_its_two_point_law():
    # Forty volumes; the tolerances are four standard errors of their mean.
    gamma_squared, porosity, lags = 1 / 6, 0.35, (1, 2, 5, 12, 40)
    measured = []
    for seed in range(40):
        solid = chi2((48, 72, 60), seed, 1 - porosity, 1 / gamma_squared).astype(bool)
        measured.append([solid.mean(), *(pairs(solid, axis, lag) for lag in lags for axis in range(3))])
    mean = np.mean(measured, axis=0)
    error = 4 * np.std(measured, axis=0, ddof=1) / np.sqrt(len(measured))
    theory = [1 - porosity, *np.repeat([chi2_pair_probability(porosity, np.exp(-gamma_squared * h)) for h in lags], 3)]
    assert error[:-3].max() < 0.012
    np.testing.assert_array_less(np.abs(mean - theory), error)
    # The law bites: the covariance exp(−γ² h²) would be off by more than the tolerance at two voxels.
    other = chi2_pair_probability(porosity, np.exp(-gamma_squared * 2**2))
    assert abs(other - theory[4]) > 2 * error[4]


def test_chi2_covariance_is_isotropic_off_the_axes():
    gamma_squared = 1 / 6
    solid = [chi2((64, 64, 64), (9, s), 0.5, 1 / gamma_squared).astype(bool) for s in range(6)]
    diagonal = np.mean([(s[3:, 4:, :] & s[:-3, :-4, :]).mean() for s in solid])  # a lag of 3, 4, 0: 5 voxels
    assert diagonal == pytest.approx(chi2_pair_probability(0.5, np.exp(-5 * gamma_squared)), abs=0.02)


@pytest.mark.parametrize(("covariance", "bound"), [("exponential", 5e-4), ("gaussian", 1e-5)])
def test_the_kernel_s_cut_changes_the_covariance_little(covariance, bound):
    found = FieldPair((64, 64, 64), 0, 6.0, covariance).achieved()
    z, y, x = np.ogrid[tuple(slice(n) for n in found.shape)]
    assert np.abs(found - correlation(covariance, np.sqrt(z**2 + y**2 + x**2), 6.0)).max() < bound
    assert found[0, 0, 0] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("edge", [(64, 64, 64), (37, 170, 99), (1, 200, 1)])
def test_chi2_labels_do_not_depend_on_what_is_read_together(edge):
    shape, sets = (150, 170, 200), [Excursion(0.5, 10.0, "gaussian"), Excursion(0.4, 6.0, "gaussian")]
    volume = Chi2Volume(shape, 3, sets)
    whole = volume.read(Box.whole(shape))
    found = np.zeros_like(whole)
    pieces = blocks(shape, edge)
    for box in pieces if len(pieces) < 100 else pieces[::997]:
        found[box.slices] = volume.read(box)
        np.testing.assert_array_equal(found[box.slices], whole[box.slices])
    assert np.bincount(whole.ravel(), minlength=3) / whole.size == pytest.approx([0.5, 0.3, 0.2], abs=0.05)


@pytest.mark.parametrize(("covariance", "feature", "share"), [("gaussian", 8.0, 0.4), ("exponential", 6.0, 0.5)])
def test_a_fit_finds_the_model_that_a_volume_is_drawn_from(covariance, feature, share):
    model = Excursion(share, feature, covariance)
    for seed in range(2):
        solid = chi2((128, 128, 128), seed, share, feature, covariance).astype(bool)
        s2 = [solid.mean(), *(np.mean([pairs(solid, axis, lag) for axis in range(3)]) for lag in range(1, 31))]
        best, other = fit(s2)
        assert best.model.covariance == covariance
        assert best.model.gamma == pytest.approx(model.gamma, rel=0.05)
        assert best.model.share == pytest.approx(share, abs=0.03)  # four standard errors
        assert best.s2_misfit < 0.002 < 0.01 < other.s2_misfit
        assert abs(best.face_misfit) < 0.04 < 0.3 < abs(other.face_misfit)


def test_the_surface_of_a_gaussian_excursion_set_is_its_formula():
    model = Excursion(0.4, 12.0, "gaussian")
    solid = chi2((128, 128, 128), 1, 0.4, 12.0, "gaussian")
    faces = sum(int((np.diff(solid.astype(np.int8), axis=axis) != 0).sum()) for axis in range(3))
    assert faces * 2 / 3 / solid.size == pytest.approx(model.surface_per_volume(), rel=0.06)  # Cauchy and Crofton


def mean_chord(labels: np.ndarray, phase: int) -> float:
    """Voxels of the phase per run of it along an axis, over the three axes."""
    inside, voxels, starts = labels == phase, 0, 0
    for axis in range(3):
        here = np.moveaxis(inside, axis, 0)
        starts += int((here[1:] & ~here[:-1]).sum())
        voxels += int(here[1:].sum())
    return voxels / starts


@pytest.mark.parametrize("feature", [8.0, 14.0])
def test_three_phase_has_its_shares_and_its_feature_size(feature):
    labels = three_phase((96, 96, 96), 5, feature_voxels=feature, porosity=0.42)
    shares = np.bincount(labels.ravel()) / labels.size
    np.testing.assert_allclose(shares, [0.42, 0.43, 0.15], atol=2e-6)
    # Rice's formula, on a grid that misses no crossing but the shortest.
    assert mean_chord(labels, 1) == pytest.approx(feature, rel=0.08)


def test_binder_sits_on_particles_and_all_three_phases_meet():
    labels = three_phase((80, 80, 80), 1, feature_voxels=12)
    found = count(labels)
    assert finalize(found, (1.0, 1.0, 1.0)).tpb_normalised > 0.004
    # Strewn over the pore, binder would touch active material as often per voxel as pore does.
    per_voxel = {phase: sum(found.faces[pair]) / found.voxels[phase] for phase, pair in ((0, (0, 1)), (2, (1, 2)))}
    assert per_voxel[2] > 2 * per_voxel[0]


def test_separator_has_lamellae_across_x_and_fibrils_along_it():
    labels = separator((96, 96, 128), 2, feature_voxels=12, porosity=0.45)
    assert labels.mean() == pytest.approx(0.55, abs=2e-6)
    solid = labels.astype(bool)
    changed = [float((np.diff(solid.astype(np.int8), axis=axis) != 0).mean()) for axis in range(3)]
    assert changed[0] == pytest.approx(changed[1], rel=0.15)
    # Layers make the solid share of planes normal to x vary; fibrils keep each of them from being empty.
    by_plane = [solid.mean(axis=tuple({0, 1, 2} - {axis})).std() for axis in range(3)]
    assert by_plane[2] > 2 * max(by_plane[:2])
    assert solid.mean(axis=(0, 1)).min() > 0.05


@pytest.mark.parametrize(
    "make",
    [
        lambda shape, seed: chi2(shape, seed, 0.6, 10),
        lambda shape, seed: three_phase(shape, seed, feature_voxels=8),
        lambda shape, seed: separator(shape, seed, feature_voxels=8),
    ],
)
def test_a_phantom_is_a_function_of_shape_and_seed(make):
    shape = (31, 40, 53)
    one = make(shape, 4)
    assert (one.shape, one.dtype) == (shape, np.uint8)
    np.testing.assert_array_equal(one, make(shape, 4))
    for other in (make(shape, 5), make(shape, (4, 1))):
        assert (one != other).mean() > 0.2
    # The torus is larger than the volume: opposite faces are no neighbours.
    assert (one[0] != one[-1]).mean() > 2 * (one[0] != one[1]).mean()


def test_no_lattice_shows():
    # The share of changed faces does not depend on the position modulo small periods.
    labels = three_phase((128, 96, 96), 8, feature_voxels=10)
    changed = (labels[1:] != labels[:-1]).mean(axis=(1, 2))[:126]
    for period in (2, 3, 6):
        by_phase = changed.reshape(-1, period).mean(axis=0)
        spread = 4 * changed.std() / np.sqrt(len(changed) / period)
        assert np.ptp(by_phase) < spread


# ---- hpcres phantom ----------------------------------------------------------------------------------------


def study(folder: Path, scale: Any = 4, **changes: Any) -> Study:
    made = folder / "phantom"
    settings: dict[str, Any] = {
        "name": "p",
        "seed": 11,
        "output": str(folder),
        "scale_factor": scale,
        "high_res": {
            "phases": {0: "pore", 128: "active", 255: "binder"},
            "voxel_size": "50 nm",
            "images": [{"path": str(made / "slices.tif")}],
        },
        "low_res": {"path": str(made / "low_res.zarr"), "phases": {0: "pore", 1: ["active", "binder"]}},
        "phantom": {"kind": "three-phase", "voxels": [70, 64, 90], "feature_voxels": 8, "slices": 3},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            settings[section] = {**settings.get(section, {}), name: value}
        else:
            settings[section] = value
    return Study.model_validate(settings)


@pytest.mark.parametrize("scale", [4, "8/5", "16/3"])
@pytest.mark.parametrize(
    "imaging",
    # The paper's own kernel stays inside a low-res voxel; the wide one needs the blocks' margin.
    [{}, {"operator": "under-sampled"}, {"kernel_voxels": 13, "sigma_voxels": 3}, {"box": True}],
)
def test_low_res_is_the_whole_truth_through_the_imaging_operator(scale, imaging, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_VOXELS", 32)
    here = study(tmp_path, scale, imaging=imaging)
    paths = make_phantom(here)
    assert [path.name for path in paths] == ["truth.zarr", "low_res.zarr", "slices.tif"]
    truth, low_res = open_volume(paths[0]), open_volume(paths[1])
    assert truth.phases == ("pore", "active", "binder")
    assert low_res.phases == ("pore", "active+binder")
    assert low_res.voxel_size == pytest.approx([50 * float(here.scale_factor)] * 3)
    assert truth.unit == low_res.unit == "nanometer"
    labels = truth.read(Box.whole(truth.shape))
    np.testing.assert_array_equal(labels, three_phase((70, 64, 90), (11, 0), feature_voxels=8))
    operator_of_study = ImagingOperator(here.scale_factor, [[0], [1, 2]], here.imaging)
    expected = operator_of_study(one_hot(torch.from_numpy(labels)[None], 3)).argmax(1)[0].numpy()
    assert low_res.shape == tuple(int(n / here.scale_factor) for n in (70, 64, 90))
    np.testing.assert_array_equal(low_res.read(Box.whole(low_res.shape)), expected)
    if "kernel_voxels" not in imaging:  # a blur as wide as the features moves the shares
        assert low_res.read(Box.whole(low_res.shape)).mean() == pytest.approx((labels > 0).mean(), abs=0.06)


def test_slices_are_labels_of_the_study_from_another_realisation(tmp_path):
    here = study(tmp_path, phantom__slice_voxels=128)
    truth, _, slices = make_phantom(here)
    stack = read_images(slices)
    assert stack.shape == (3, 128, 128)
    assert set(np.unique(stack)) == {0, 128, 255}
    assert stack[stack == 128].size / stack.size == pytest.approx(0.45, abs=0.08)
    labels = open_volume(truth).read(Box((0, 0, 0), (70, 64, 64)))
    same = max((np.array([0, 128, 255])[plane] == stack[k, :64, :64]).mean() for plane in labels for k in range(3))
    assert same < 0.6  # that of independent slices is 0.45² + 0.4² + 0.15² = 0.385
    assert all((stack[k] == stack[k + 1]).mean() < 0.5 for k in range(2))


def test_anisotropic_phantoms_have_a_file_per_plane(tmp_path):
    made = tmp_path / "phantom"
    here = study(
        tmp_path,
        high_res={
            "phases": {0: "pore", 1: "polymer"},
            "voxel_size": "50 nm",
            "isotropic": False,
            "images": [{"path": str(made / f"slices_{p}.tif"), "planes": [p]} for p in ("zy", "zx", "yx")],
        },
        low_res={"path": str(made / "low_res.zarr"), "phases": {0: "pore", 1: "polymer"}},
        phantom={"kind": "separator", "voxels": [64, 72, 80], "feature_voxels": 8, "slices": 2},
    )
    names = [path.name for path in make_phantom(here)]
    assert names[2:] == ["slices_yx.tif", "slices_zx.tif", "slices_zy.tif"]
    shapes = {image.planes[0]: read_images(image.path).shape for image in here.high_res.images}
    assert shapes == {"zy": (2, 64, 72), "zx": (2, 64, 80), "yx": (2, 72, 80)}
    # Columns of a yx slice run along x, so the fibrils make rows alike to their left and right.
    for plane in ("yx", "zx"):
        stack = read_images(made / f"slices_{plane}.tif")
        assert stack.mean(axis=1).std() > stack.mean(axis=2).std()


KIND_STUDIES: dict[str, dict[str, Any]] = {
    "three-phase": {},
    "chi2": {"high_res__phases": {0: "pore", 1: "solid"}, "low_res__phases": {0: "pore", 1: "solid"}},
    "separator": {"low_res__phases": {0: "pore", 1: "polymer"}},
}


@pytest.mark.parametrize("kind", KIND_STUDIES)
def test_slices_have_a_porosity_of_their_own(kind, tmp_path):
    changes = dict(KIND_STUDIES[kind])
    if kind == "separator":
        images = [{"path": str(tmp_path / f"phantom/slices_{p}.tif"), "planes": [p]} for p in ("zy", "zx", "yx")]
        phases = {0: "pore", 1: "polymer"}
        changes["high_res"] = {"phases": phases, "voxel_size": "50 nm", "isotropic": False, "images": images}
    here = study(tmp_path, phantom={"kind": kind, "voxels": [70, 64, 90], "feature_voxels": 8, "slices": 3}, **changes)

    def made(**settings: Any) -> dict[str, bytes]:
        asked = here.model_copy(update={"phantom": here.phantom.model_copy(update=settings)})
        make_phantom(asked, overwrite=True)
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = made()
    assert b"slices_porosity" not in b"".join(before.values())  # as before there was the setting
    after = made(slices_porosity=0.7)
    assert [k for k in before if before[k] != after[k] and "json" not in k] == [k for k in before if k.endswith(".tif")]
    truth = open_volume(tmp_path / "phantom" / "truth.zarr")
    exact = 2e-5 if kind != "chi2" else 0.12  # the field's porosity is its law's, not the volume's
    assert (truth.read(Box.whole(truth.shape)) == 0).mean() == pytest.approx(0.4, abs=exact)
    stacks = [read_images(tmp_path / key) for key in after if key.endswith(".tif")]
    assert len(stacks) == (3 if kind == "separator" else 1)
    # A few slices of a slab that has the share exactly.
    assert np.mean([(stack == 0).mean() for stack in stacks]) == pytest.approx(0.7, abs=0.08)


def test_a_chi2_phantom_is_streamed_and_has_a_phase_for_each_cut(tmp_path, monkeypatch):
    """Its voxels do not depend on how much is written at a time, and nothing asks for the whole volume."""
    cuts = [{"share": 0.3, "feature_voxels": 6, "covariance": "gaussian"}]
    section = {"kind": "chi2", "voxels": [150, 140, 200], "feature_voxels": 9, "covariance": "gaussian", "cuts": cuts}
    here = study(tmp_path, phantom=section | {"slices": 2})
    asked = []
    plain = Chi2Volume.read
    monkeypatch.setattr(Chi2Volume, "read", lambda self, box: asked.append(box.voxels) or plain(self, box))
    monkeypatch.setattr(converting, "_SLAB_BYTES", 1000)
    truth = open_volume(make_phantom(here)[0])
    assert max(asked) < 150 * 140 * 200
    monkeypatch.undo()
    labels = truth.read(Box.whole(truth.shape))
    sets = [Excursion(0.6, 9, "gaussian"), Excursion(0.3, 6, "gaussian")]
    np.testing.assert_array_equal(labels, Chi2Volume(truth.shape, (11, 0), sets).read(Box.whole(truth.shape)))
    assert np.bincount(labels.ravel()) / labels.size == pytest.approx([0.4, 0.42, 0.18], abs=0.06)


def test_settings_of_chi2_are_refused_for_another_kind(tmp_path):
    for key, value in (("covariance", "gaussian"), ("cuts", [{"share": 0.5}])):
        with pytest.raises(InputError, match=rf"phantom.{key}: is of kind chi2, this phantom is three-phase"):
            make_phantom(study(tmp_path, phantom={"kind": "three-phase", "voxels": [64, 64, 64], key: value}))


def test_a_second_run_needs_overwrite_and_a_failed_one_leaves_the_first(tmp_path, monkeypatch):
    here = study(tmp_path)
    make_phantom(here)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="exists already; give `overwrite`"):
        make_phantom(here)
    monkeypatch.setattr(files.Imaged, "read", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        make_phantom(here, overwrite=True)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    make_phantom(here, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before  # the same seed, the same bytes
    assert os.listdir(tmp_path) == ["phantom"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"phantom": None}, "has no phantom section"),
        ({"phantom__kind": "chi2"}, r"chi2 has 2 phases, high_res.phases 3 \(pore, active, binder\); name 2"),
        ({"low_res__phases": {0: "pore", 7: ["active", "binder"]}}, "labels 0, 7, but low_res.zarr .* has 0 … 1"),
        ({"phantom__feature_voxels": 2}, "2.0 is below 4 voxels"),
        ({"phantom__voxels": [64, 3, 64]}, "64x3x64 has no whole low-res voxel"),
        ({"phantom__voxels": [5000, 5000, 5000]}, "5000x5000x5000 needs .* GiB"),
        ({"phantom__porosity": 0.9}, "phantom.porosity: 0.9 leaves no active material"),
        ({"phantom__slices_porosity": 0.84}, "phantom.slices_porosity: 0.84 leaves no active material"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(InputError, match=words):
        make_phantom(study(tmp_path, **changes))
    assert os.listdir(tmp_path) == []


def test_files_that_the_phantom_will_not_make_are_found_early(tmp_path):
    wrong = [{"path": str(tmp_path / "phantom" / "slice.tif")}]
    here = study(tmp_path)
    here = study(tmp_path, high_res={**here.high_res.model_dump(mode="json"), "images": wrong})
    with pytest.raises(InputError, match=r"high_res.images: phantom makes no slice.tif; use one of .*slices.tif"):
        make_phantom(here)
    separate = study(tmp_path, high_res__phases={0: "pore", 1: "polymer"}, low_res__phases={0: "pore", 1: "polymer"})
    with pytest.raises(InputError, match="separator is anisotropic"):
        make_phantom(separate.model_copy(update={"phantom": separate.phantom.model_copy(update={"kind": "separator"})}))
    (tmp_path / "phantom").mkdir()
    (tmp_path / "phantom" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="with a phantom of hpcres only, so `overwrite` will not remove it"):
        make_phantom(study(tmp_path), overwrite=True)
