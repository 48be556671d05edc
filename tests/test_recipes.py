"""`recipe: auto`: which recipe images and minutes give, what goes before it, and that a resumed run keeps it."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from small_training import anisotropic, history, one_image, same, study_of, told_to_stop_at, weights

from hpcres.cli import commands
from hpcres.errors import InputError, Stopped
from hpcres.study.file import load_study, recipe_settings, save_study
from hpcres.training import autotune
from hpcres.training.loop import train
from hpcres.training.recipes import choices, feature_pixels
from hpcres.training.wgan import Models

SMALL = {
    "network": {"width": 3, "critic_width": 5, "residual_blocks": 1},
    "training": {
        "steps": 3,
        "cubes": 2,
        "slices_per_axis": 3,
        "critic_steps": 1,
        "threads": 1,
        "recalibration_cubes": 2,
        "quality_steps": 3,
        "quality_cubes": 1,
        "pattern_spacings": [1],
        "context": 1,
        "precision": "fp32",
    },
}


def auto(folder, pixels=None, network=(), **training):
    """A small study that leaves its recipe open; phase c is merged with a."""
    images = None if pixels is None else [one_image(folder, pixels)]
    study = study_of(
        folder,
        images,
        low_res={"path": str(folder / "low.npy"), "phases": {0: ["a", "c"], 1: "b"}},
        volume=np.arange(20 * 18 * 17, dtype=np.uint8).reshape(20, 18, 17) % 2,
    )
    settings = study.model_dump(exclude={"network", "training"}, exclude_unset=True)
    settings |= {
        "recipe": "auto",
        "network": SMALL["network"] | dict(network),
        "training": SMALL["training"] | training,
    }
    settings["training"] = {key: value for key, value in settings["training"].items() if value is not None}
    return type(study).model_validate(settings)


def stripes(width):
    """Rows of a (with c among it) and b, each `width` wide."""
    rows = np.arange(480) // width % 2
    image = np.repeat(rows[:, None], 480, axis=1).astype(np.uint8)
    image[(image == 0) & (np.arange(480) % 5 == 0)] = 2
    return np.stack([image, image.T])


@pytest.mark.parametrize("width", [6, 12])
def test_features_are_as_wide_as_the_chords_of_visible_phases(tmp_path, width):
    """Lines across stripes have chords of `width`, lines along them none; c within a is not seen by the volume."""
    found = feature_pixels(auto(tmp_path, stripes(width)))
    # Half of all lines lie along stripes and have no face, so faces are half as many, and chords twice as long.
    assert found == pytest.approx(2 * width, rel=0.06)


def test_an_image_of_one_visible_phase_has_features_of_its_own_size(tmp_path):
    assert feature_pixels(auto(tmp_path, np.zeros((1, 90, 80), np.uint8))) == 80


def test_wide_features_have_smooth_noise_and_hidden_phases_six_pixels(tmp_path):
    long, fast = choices(auto(tmp_path, stripes(12)))
    assert (long.name, fast.name) == ("long", "fast")
    width = feature_pixels(auto(tmp_path, stripes(12)))
    assert long.changes["network"]["noise_sigma_voxels"] == [0, round(width / 3, 1), round(2 * width / 3, 1)]
    assert long.changes["training"]["pattern_pixels"] == 6
    assert "does not tell a, c apart" in long.why
    assert f"{width:.1f} pixels wide in the images, {width / 4:.1f} low-res voxels" in long.why
    resolved = long.applied(auto(tmp_path, stripes(12)))
    recipe = recipe_settings("long")
    assert (resolved.training.pattern_weight, resolved.training.ema_growth) == (480, 6)
    assert recipe["training"]["minutes"] == 15
    # The study's own settings go before the recipe's.
    assert (resolved.network.width, resolved.training.context, resolved.training.steps) == (3, 1, 3)
    assert resolved.recipe is None


@pytest.mark.parametrize(
    ("given", "minutes"), [({"steps": None}, 15), ({"steps": 900}, None), ({"minutes": 4.0}, 4), ({}, None)]
)
def test_steps_that_are_given_are_not_cut_short_by_a_recipe(tmp_path, given, minutes):
    study = auto(tmp_path, stripes(12), **given)
    assert [choice.applied(study).training.minutes for choice in choices(study)] == [minutes] * 2


def test_small_features_have_white_noise(tmp_path):
    long, _ = choices(auto(tmp_path, stripes(3)))
    assert (long.name, "pattern_pixels" in long.changes["training"]) == ("long-white", False)
    assert long.applied(auto(tmp_path, stripes(3))).network.noise_sigma_voxels == (0,)


def test_images_that_differ_by_plane_have_doubled_weights(tmp_path):
    long, _ = choices(anisotropic(tmp_path))
    assert long.name == "long-white"
    weights = {key: long.changes["training"][key] for key in ("pattern_weight", "voxel_weight", "lattice_weight")}
    assert weights == {"pattern_weight": 960, "voxel_weight": 40, "lattice_weight": 40}


def test_a_setting_that_contradicts_the_recipe_is_said(tmp_path):
    study = auto(tmp_path, stripes(12), cube_voxels=32, pattern_spacings=None)  # slices of 24, where six pixels take 30
    with pytest.raises(InputError, match=r"recipe: auto chose long, which .* contradict \(pattern_spacings: 15"):
        choices(study)[0].applied(study)


@pytest.mark.parametrize(("minutes", "name"), [(5.0, "fast"), (60.0, "long")])
def test_too_few_minutes_for_a_long_recipe_give_fast(tmp_path, monkeypatch, capfd, minutes, name):
    study = auto(tmp_path, stripes(12), minutes=minutes, steps=1000)
    seconds = {1: 1.0, 2: 1.0}
    monkeypatch.setattr(autotune, "step_seconds", lambda study, *_: seconds[study.network.residual_blocks])
    monkeypatch.setattr(autotune, "choose_precision", lambda *_: ("fp32", 0.5))
    chosen = []

    def models(study, *_):
        chosen.append(study)
        raise KeyError

    monkeypatch.setattr("hpcres.training.superres.Models", models)
    with pytest.raises(KeyError):
        train(study)
    assert chosen[0].training.pattern_weight == (60 if name == "fast" else 480)


def test_a_resumed_run_keeps_its_recipe_bit_for_bit(tmp_path, monkeypatch, capfd):
    whole, cut = (
        auto(tmp_path, stripes(12), cubes=None).model_copy(update={"output": str(tmp_path / name)})
        for name in ("whole", "cut")
    )
    plain, seen = Models.step, []
    monkeypatch.setattr(Models, "step", lambda self, step, *given: seen.append(given[0]) or plain(self, step, *given))
    assert train(whole).step == 3
    assert set(seen) == {range(2)}  # cubes of the recipe; 8 where a study has none
    assert "recipe auto is long: features of the visible phases" in capfd.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(Models, "step", told_to_stop_at(0))
        with pytest.raises(Stopped, match="step 1"):
            train(cut)
    assert train(cut).resumed_step == 1
    assert same(weights(whole)[1], weights(cut)[1])
    assert history(whole)[-1] == history(cut)[-1]
    changed = cut.model_copy(update={"training": cut.training.model_copy(update={"context": 2})})
    with pytest.raises(InputError, match=r"trained with training.context 1, the study now says 2"):
        train(changed)
    # The study that is saved beside the results trains the same without choosing.
    saved = load_study(tmp_path / "whole" / "study-train.yaml")
    assert saved.recipe is None
    assert saved.training.pattern_pixels == 6
    assert train(saved).already_finished


def test_plan_says_which_recipe_it_assumes(tmp_path):
    study = save_study(auto(tmp_path, stripes(12), steps=1), "mine")
    shown = CliRunner().invoke(commands, ["plan", str(study)])
    assert shown.exit_code == 0, shown.output
    assert "recipe auto: long is assumed" in shown.output
    train(load_study(study))
    shown = CliRunner().invoke(commands, ["plan", str(study)])
    assert shown.exit_code == 0, shown.output
    assert "is assumed" not in shown.output
    # A study file that names a recipe as its base has what the recipe sets.
    content = yaml.safe_load(study.read_text()) | {"base": "hpcres:fast"}
    del content["recipe"], content["training"], content["network"]
    study.write_text(yaml.safe_dump(content))
    assert load_study(study).training.pattern_weight == 60
    study.write_text(yaml.safe_dump(content | {"base": "hpcres:slow"}))
    with pytest.raises(InputError, match=r"hpcres has no such recipe; use one of hpcres:fast, hpcres:long, "):
        load_study(study)
