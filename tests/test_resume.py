"""Runs that are told to stop, killed, or broken: what they leave, and that going on is the uninterrupted run."""

import json
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from small_group import as_rank, free_ports, run_ranks
from small_training import ALONE, atypical, blobs, history, same, study_of, told_to_stop_at, weights

from hpcres.checkpoint import load_checkpoint
from hpcres.errors import InputError, Stopped, Unfinished
from hpcres.study.file import save_study
from hpcres.training import superres
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.loop import train
from hpcres.training.wgan import Models

EVERY_STEP = {"report_seconds": 1e-6, "checkpoint_minutes": 1e-9}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("make", "match_fractions"),
    [(study_of, False), pytest.param(study_of, True, marks=pytest.mark.variant), (atypical, True)],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch, make, match_fractions):
    training = {"steps": 4, "final_learning_rate": 0.1, "report_seconds": 1e-6, "quality_steps": 1, "quality_cubes": 1}
    training |= {"match_fractions": match_fractions, "pattern_weight": 30, "thin_weight": 30, "pattern_tolerance": 0.2}
    study = make(tmp_path, training=training) if make is study_of else make(tmp_path, **training)
    whole, cut = (study.model_copy(update={"output": str(tmp_path / name)}) for name in ("whole", "cut"))
    assert train(whole).step == 4
    with monkeypatch.context() as patched:
        patched.setattr(Models, "step", told_to_stop_at(1))
        with pytest.raises(Stopped, match=r"SIGUSR1.*step 2"):
            train(cut)
    assert load_checkpoint(cut.checkpoint_path).step == 2
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with (cut.folder / "training.csv").open("a") as file:
        file.write("3,9,9,9")  # a row that a kill cut short
    result = train(cut)
    assert (result.step, result.resumed_step) == (4, 2)
    assert same(weights(whole), weights(cut))
    assert history(whole) == history(cut)
    assert len(history(whole)) == 5
    assert history(whole, "quality.csv") == history(cut, "quality.csv")
    assert len(history(whole, "quality.csv")) == 5
    best = [load_checkpoint(study.best_path) for study in (whole, cut)]
    assert best[0].sha256 == best[1].sha256
    again = train(cut)
    assert again.already_finished
    assert again.step == 4


@pytest.mark.parametrize(("scale", "cube"), [("4", 80), ("8/3", 96), pytest.param("4", 128, marks=pytest.mark.variant)])
def test_a_stopped_run_of_larger_cubes_goes_on_bit_for_bit(tmp_path, scale, cube):
    """Trained, judged and settled at another edge than 64, with slices of 72, 88 and 120 voxels."""
    more = {"scale_factor": scale, "network": {"width": 2, "critic_width": 4, "padding": "zeros"}}
    judged = {"quality_steps": 1, "quality_cubes": 1} if cube == 96 else {}
    training = {"cube_voxels": cube, "cubes": 1, "critic_steps": 1, **judged}
    training |= {"recalibration_cubes": 1, "pattern_weight": 1, "slices_per_axis": 2, "diagonal_slices": cube == 96}
    np.save(tmp_path / "wide.npy", blobs((1, 130, 125), 2))
    images = [{"path": str(tmp_path / "wide.npy")}]
    edge = round(cube / Fraction(scale))

    def study(steps, name):
        return study_of(
            tmp_path,
            images,
            volume=blobs((edge, edge + 2, edge), 1),
            output=str(tmp_path / name),
            training=training | {"steps": steps},
            **more,
        )

    whole, cut = study(2, "whole"), study(2, "cut")
    low_res, real = LowResCubes(whole), RealSlices(whole, ALONE.device)
    assert low_res.draw(0, range(1), ALONE.device)[0].shape == (1, edge, edge, edge)
    assert real.draw(0, 0, range(1)).real[0].shape == (2, 3, cube - 8, cube - 8)
    train(whole)
    train(study(1, "cut"))
    with pytest.raises(InputError, match=rf"training.cube_voxels {cube}.*now says"):
        train(cut.model_copy(update={"training": cut.training.model_copy(update={"cube_voxels": 64})}))
    assert train(cut).resumed_step == 1
    assert same(weights(whole), weights(cut))
    assert history(whole)[-1] == history(cut)[-1]
    if judged:
        assert history(whole, "quality.csv") == history(cut, "quality.csv")
        assert len(history(whole, "quality.csv")) == 3


def test_another_training_in_the_same_place_is_refused(tmp_path):
    study = study_of(tmp_path, training={"steps": 1})
    train(study)
    before = study.checkpoint_path.read_bytes()
    changed = study_of(tmp_path, training={"steps": 1, "gradient_penalty": 5.0})
    with pytest.raises(InputError, match=r"training.gradient_penalty 10.0.*5.0.*`overwrite`"):
        train(changed)
    assert study.checkpoint_path.read_bytes() == before
    assert train(changed, overwrite=True).resumed_step == 0
    longer = study_of(tmp_path, training={"steps": 2, "gradient_penalty": 5.0, "report_seconds": 3.0, "threads": 1})
    assert train(longer).resumed_step == 1


def test_a_run_of_an_earlier_version_goes_on_as_it_was(tmp_path):
    """It knew nothing of other cubes than 64³, of slices at 45° and of one-sided phases, and had as many patches and
    penalties as slices. A study that says nothing of these now asks for 64, and is refused."""
    whole, cut = (study_of(tmp_path, training={"steps": 2}, output=str(tmp_path / name)) for name in ("whole", "cut"))
    train(whole)
    train(study_of(tmp_path, training={"steps": 1}, output=str(tmp_path / "cut")))
    content = torch.load(cut.checkpoint_path)
    settings = json.loads(content["study"])
    for name in ("real_patches", "penalties"):
        assert settings["training"].pop(name) == "slices"
    del settings["training"]["cube_voxels"], settings["training"]["diagonal_slices"], settings["low_res"]["one_sided"]
    torch.save(content | {"study": json.dumps(settings)}, cut.checkpoint_path)
    assert load_checkpoint(cut.checkpoint_path).study.training.penalties == "slices"
    changed = study_of(tmp_path, training={"steps": 2, "real_patches": 64}, output=str(tmp_path / "cut"))
    with pytest.raises(InputError, match=r"training.real_patches slices.*now says 64.*`overwrite`"):
        train(changed)
    assert train(cut).resumed_step == 1
    assert same(weights(whole), weights(cut))


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    study = study_of(tmp_path, training={"steps": 1})
    train(study)
    before = study.checkpoint_path.read_bytes()
    monkeypatch.setattr("hpcres.training.loop.learning_rate", lambda *_: float("inf"))
    # The step after the one that spoiled the weights has the first loss that shows it; neither may be saved.
    with pytest.raises(Unfinished, match=r"step [23]\b"):
        train(study_of(tmp_path, training={"steps": 4, "checkpoint_minutes": 1e-9}))
    assert study.checkpoint_path.read_bytes() == before


# ---- real kills ----


def started(study, after_step):
    """`hpcres train` as a process of its own, seen to have written the row of a step."""
    command = [sys.executable, "-m", "hpcres", "train", str(save_study(study, "mine"))]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (rows := study.folder / "training.csv").is_file() or rows.read_text().count("\n") <= after_step:
        assert run.poll() is None
        assert time.monotonic() < deadline, run.kill()
        time.sleep(0.01)
    return run


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    training = {"steps": 6, "final_learning_rate": 0.1, "cubes": 1, "slices_per_axis": 2, **EVERY_STEP}
    whole = study_of(tmp_path, training=training, output=str(tmp_path / "whole"))
    train(whole)
    for how in (signal.SIGKILL, signal.SIGTERM):
        cut = study_of(tmp_path, training=training, output=str(tmp_path / how.name))
        run = started(cut, 2)
        run.send_signal(how)
        said = run.communicate(timeout=60)[1]
        assert run.returncode == (75 if how == signal.SIGTERM else -signal.SIGKILL)
        reached = load_checkpoint(cut.checkpoint_path).step
        assert 1 <= reached < 6
        if how == signal.SIGTERM:
            assert f"stopped by SIGTERM after saving step {reached} to {cut.checkpoint_path}" in said.splitlines()[-1]
        else:  # as a kill in the middle of writing would leave it
            (cut.folder / ".checkpoint.pt.1.partial").write_bytes(cut.checkpoint_path.read_bytes()[:1000])
        assert train(cut).resumed_step == reached
        assert same(weights(whole), weights(cut))
        assert history(whole) == history(cut)
        assert not list(cut.folder.glob(".*"))


def cut_and_whole(rank, ports, whole, cut, other):
    """On two processes: the whole run; one whose second process alone is told to stop; that one gone on with."""
    torch.set_num_threads(1)
    as_rank(rank, 2, ports[0])
    train(whole)
    plain = Models.step
    as_rank(rank, 2, ports[1])
    if rank == 1:
        Models.step = told_to_stop_at(1)
    with pytest.raises(Stopped, match="after saving step 2"):
        train(cut)
    Models.step = plain
    if rank == 0:
        shutil.copytree(cut.folder, other.folder)
    as_rank(rank, 2, ports[2])
    train(cut)


def test_two_processes_go_on_bit_for_bit_and_one_goes_on_from_two(tmp_path, capfd):
    training = {"steps": 4, "cubes": 2, "pattern_weight": 30, "thin_weight": 30, **EVERY_STEP}
    whole, cut, other = (
        study_of(tmp_path, training=training, output=str(tmp_path / name)) for name in ("whole", "cut", "other")
    )
    ports = free_ports(3)
    run_ranks(cut_and_whole, (ports, whole, cut, other), 2)
    assert load_checkpoint(cut.checkpoint_path).step == 4
    assert same(weights(whole), weights(cut))
    assert history(whole) == history(cut)
    capfd.readouterr()
    assert train(other).resumed_step == 2
    assert "it ran on 2 processes before, now on 1: the same samples, sums rounded otherwise" in capfd.readouterr().err
    last, expected = ([float(v) for v in history(study)[-1]] for study in (other, whole))
    assert last == pytest.approx(expected, rel=0.01, abs=1e-4)


@pytest.mark.parametrize(("warm_up", "warned"), [(1, False), (2, True), (9, True)])
def test_a_run_that_ends_with_its_warm_up_says_so(tmp_path, capfd, warm_up, warned):
    train(study_of(tmp_path, training={"steps": 3, "warm_up_steps": warm_up}))
    assert (f"only 3 steps, {min(warm_up, 3)} of them warm-up" in capfd.readouterr().err) == warned


@pytest.mark.parametrize("most", [0.0, 1.0])
def test_a_run_that_never_finds_the_low_res_volume_says_so(tmp_path, monkeypatch, capfd, most):
    monkeypatch.setattr(superres, "_ASTRAY", most)
    study = study_of(tmp_path, training={"steps": 2, "quality_steps": 1, "quality_cubes": 1})
    train(study)
    best = load_checkpoint(study.checkpoint_path).training_state["best"]
    said = f"of step {best['step']}, disagrees with the low-res volume in {best['disagreement']:.0%} of its voxels"
    assert (said in capfd.readouterr().err) == (most == 0.0)
