"""Beginning from another material's checkpoint: what is taken over, what is made anew, and what is refused."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_training import ALONE, blobs, same, study_of, weights

from hpcres.checkpoint import load_checkpoint
from hpcres.cli import commands
from hpcres.errors import InputError
from hpcres.study.file import save_study
from hpcres.training.loop import train
from hpcres.training.wgan import Models

TWO = {"phases": {0: "hole", 7: "solid"}}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def taught(folder, **more):
    """A trained study, whose checkpoint has weights that no seed gives."""
    folder.mkdir()
    study = study_of(folder, training={"steps": 1}, seed=77, **more)
    train(study)
    return load_checkpoint(study.checkpoint_path)


def beginning(folder, checkpoint, training=(), **more):
    return study_of(folder, training={"init_from": checkpoint.path, "steps": 1} | dict(training), **more)


def test_weights_are_taken_over_and_all_else_begins_anew(tmp_path, capfd):
    other = taught(tmp_path / "other")
    study = beginning(tmp_path, other)
    models = Models(study, ALONE)
    models.begin_from(other.path)
    assert same(dict(models.generator.state_dict()), dict(other.generator.state_dict()))
    assert same(dict(models.critics.state_dict()), dict(other.training_state["critics"]))
    assert same(models.average, [w.detach() for w in other.generator.parameters()])
    assert not models.generator_optimizer.state
    assert not models.critic_optimizer.state
    assert all(w.requires_grad for w in models.generator.parameters())
    assert train(study).resumed_step == 0
    said = capfd.readouterr().err
    assert f"beginning from step 1 of {other.path} (weights {other.sha256[:12]}…)" in said
    assert "made anew: nothing" in said
    found = load_checkpoint(study.checkpoint_path)
    assert found.init_from == {
        "path": other.path,
        "sha256": other.sha256,
        "step": 1,
        "phases": ["a", "b", "c"],
        "made_anew": [],
    }
    # One Adam step moves no weight by more than the learning rate; random first weights are far from these.
    for name, theirs in other.generator.named_parameters():
        assert (found.training_state["generator"][name] - theirs).abs().max() < 2e-4
    without = study_of(tmp_path, training={"steps": 1}, output=str(tmp_path / "without"))
    train(without)
    assert load_checkpoint(without.checkpoint_path).init_from is None
    assert load_checkpoint(without.checkpoint_path).sha256 != found.sha256


def test_the_runs_own_checkpoint_wins_and_it_is_said(tmp_path, capfd):
    other, third = taught(tmp_path / "other"), taught(tmp_path / "third", imaging={"operator": "under-resolved"})
    whole = beginning(tmp_path, other, {"steps": 2}, output=str(tmp_path / "whole"))
    train(whole)
    for name, asked in (("same", other.path), ("third", third.path)):
        cut = {"quality_steps": 1, "quality_cubes": 1} if name == "same" else {}
        train(beginning(tmp_path, other, cut, output=str(tmp_path / name)))
        capfd.readouterr()
        study = study_of(tmp_path, training={"steps": 2, "init_from": asked} | cut, output=str(tmp_path / name))
        assert train(study).resumed_step == 1
        said = capfd.readouterr().err
        lost = f"this run began from {other.path}, so training.init_from {asked} is not read; --overwrite begins from"
        assert (lost in said) == (name == "third")
        assert "beginning from" not in said
        assert same(weights(study), weights(whole))
        assert load_checkpoint(study.checkpoint_path).init_from["sha256"] == other.sha256
    assert load_checkpoint(tmp_path / "same" / "best.pt").init_from["sha256"] == other.sha256


def test_other_phases_make_the_outer_layers_anew(tmp_path, capfd):
    other = taught(tmp_path / "other")
    np.save(tmp_path / "two.npy", 7 * blobs((1, 90, 80), 2, 2))
    images = [{"path": str(tmp_path / "two.npy")}]
    low_res = {"path": str(tmp_path / "low.npy"), **TWO}
    volume = 7 * blobs((20, 18, 17), 1, 2)
    study = beginning(tmp_path, other, images=images, high_res=TWO, volume=volume, low_res=low_res)
    fresh, models = Models(study, ALONE), Models(study, ALONE)
    models.begin_from(other.path)
    before, theirs = fresh.generator.state_dict(), other.generator.state_dict()
    for name, tensor in models.generator.state_dict().items():
        anew = name in ("conv_first.weight", "conv_end.weight", "conv_end.bias")
        assert torch.equal(tensor, (before if anew else theirs)[name]), name
    for name, tensor in models.critics.state_dict().items():
        source = fresh.critics.state_dict() if name.endswith("layers.0.weight") else other.training_state["critics"]
        assert torch.equal(tensor, source[name]), name
    train(study)
    said = capfd.readouterr().err
    assert "phases a, b, c there for hole, solid here" in said
    assert "made anew: the generator's first layer, the generator's last layer, the critics' first layer\n" in said
    assert len(load_checkpoint(study.checkpoint_path).init_from["made_anew"]) == 3


def test_a_file_without_critics_or_with_wider_ones_gives_the_generator(tmp_path):
    other = taught(tmp_path / "other")
    plain = torch.load(other.path, weights_only=True)
    torch.save(plain | {"training": None}, tmp_path / "best.pt")
    wider = {"network": {"width": 3, "critic_width": 6, "last_stage": "transposed"}}
    for path, network in ((tmp_path / "best.pt", {}), (other.path, wider)):
        study = study_of(tmp_path, **network)
        fresh, models = Models(study, ALONE), Models(study, ALONE)
        models.begin_from(str(path))
        assert models.init_from["made_anew"] == ["the critics"]
        assert same(dict(models.critics.state_dict()), dict(fresh.critics.state_dict()))
        assert same(dict(models.generator.state_dict()), dict(other.generator.state_dict()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"scale_factor": 8}, "scale 4, not 8"),
        ({"network": {"width": 4, "critic_width": 5, "last_stage": "transposed"}}, "width 3, not 4"),
        (
            {"network": {"width": 3, "critic_width": 5, "last_stage": "transposed", "noise_sigma_voxels": (5.0,)}},
            r"noise sigma voxels \[0.0\], not \[5.0\]",  # as many channels, but what they say is something else
        ),
        (
            {"network": {"width": 3, "critic_width": 5, "residual_blocks": 2}},
            "residual blocks 1, not 2 and last stage transposed, not resize",
        ),
    ],
)
def test_another_network_is_refused_before_anything_is_written(tmp_path, change, named):
    other = taught(tmp_path / "other")
    study = beginning(tmp_path, other, volume=blobs((20, 18, 17), 1), **change)
    with pytest.raises(InputError, match=f"training.init_from: {other.path}: its generator has {named} as") as raised:
        train(study)
    assert "\n" not in str(raised.value)
    assert not study.folder.exists()


def test_the_option_is_relative_to_here_and_the_setting_to_the_study(tmp_path, monkeypatch):
    other = taught(tmp_path / "the: other")
    study = study_of(tmp_path, training={"steps": 1})
    file = save_study(study, "mine")
    monkeypatch.chdir(tmp_path / "the: other")
    outcome = CliRunner().invoke(commands, ["train", str(file), "--init-from", "out/checkpoint.pt"])
    assert outcome.exit_code == 0, outcome.output
    assert load_checkpoint(study.checkpoint_path).init_from["path"] == other.path
    content = json.dumps({"base": str(file), "training": {"init_from": "../the: other/out/checkpoint.pt"}})
    (study.folder / "study.yaml").write_text(content)
    outcome = CliRunner().invoke(commands, ["train", str(study.folder / "study.yaml"), "--overwrite"])
    assert outcome.exit_code == 0, outcome.output
    assert load_checkpoint(study.checkpoint_path).init_from["path"] == other.path
    outcome = CliRunner().invoke(commands, ["train", str(file), "--overwrite", "--init-from", "none.pt"])
    assert isinstance(outcome.exception, InputError)
    assert "training.init_from" in str(outcome.exception)
    assert "no such file" in str(outcome.exception)
