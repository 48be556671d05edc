"""N processes with a share of the batch each are one process with all of it."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from small_group import as_rank, free_ports, leave, leave_again_and_again, run_ranks
from small_training import ALONE, anisotropic, atypical, study_of

from hpcres.checkpoint import load_checkpoint
from hpcres.study.file import save_study
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.distributed import processes
from hpcres.training.visible import beside
from hpcres.training.wgan import Models


def ranked_step(rank, size, port, study, folder):
    as_rank(rank, size, port)
    with processes("cpu", 1) as group:
        save_step(study, group, folder / f"{size}-{rank}.pt")


def save_step(study, group, path):
    models = Models(study, group)
    cubes, low_res = group.share(study.training.cubes), LowResCubes(study)
    corrects = study.training.atypical_images == "correct"
    real = RealSlices(study, group.device, beside(study, low_res.fractions).correction if corrects else None)
    outcome = models.step(0, cubes, low_res, real, study.training.learning_rate)
    state = {
        "critic": [p.grad for p in models.critics.parameters()],
        "generator": [p.grad for p in models.generator.parameters()],
        "statistics": [b for b in models.generator.buffers() if b.is_floating_point()],
        "report": list(models.report(outcome, len(study.low_res.phases)).values()),
        "names": list(models.generator.state_dict()),
    }
    torch.save(state, path)
    return float(outcome.losses[3])


@pytest.mark.parametrize(
    ("material", "size"), [("isotropic", 2), ("anisotropic", 3), ("planes apart", 2), ("atypical", 2)]
)
def test_processes_with_a_share_of_the_batch_give_the_gradients_of_one_with_all(tmp_path, material, size):
    if material == "atypical":
        # Block fractions have slopes that are alike all over a cube, so that the last convolution's gradient loses
        # digits, as below. tests/test_visible.py tests them.
        study = atypical(tmp_path, cubes=2, reuse_generated=True, critic_steps=1, fraction_weight=0.0)
    elif material != "anisotropic":
        # With a large pattern weight the last convolution's gradient, and no other, is off by more than the bound, 3e-5
        # at 30: its slopes are alike all over a cube, and their sum over all voxels loses digits.
        training = {"cubes": 4, "reuse_generated": True, "critic_steps": 1}
        training |= {"lattice_weight": 300, "pattern_weight": 0.5, "thin_weight": 0.5}
        if material == "planes apart":  # three patches and two penalties on one process, four and three on the other
            training |= {"planes_apart": True, "real_patches": 7, "penalties": 5, "diagonal_slices": True}
        # Of some seeds' 16 million values one is within rounding of a ReLU's kink, which changes 1e-4; not of seed 1's.
        # A threshold between the processes' own voxel losses, just below the batch's, which decides.
        of_batch = save_step(study_of(tmp_path, training=training, seed=1), ALONE, tmp_path / "1-0.pt")
        study = study_of(tmp_path, training=training | {"voxel_threshold": of_batch * 0.9999}, seed=1)
    else:
        study = anisotropic(tmp_path)
    save_step(study, ALONE, tmp_path / "1-0.pt")
    run_ranks(ranked_step, (size, free_ports(1)[0], study, tmp_path), size)
    alone = torch.load(tmp_path / "1-0.pt")
    for rank in range(size):
        shared = torch.load(tmp_path / f"{size}-{rank}.pt")
        assert shared["names"] == alone["names"]
        assert shared["report"] == pytest.approx(alone["report"], rel=1e-4, abs=1e-6)
        for kind in ("critic", "generator", "statistics"):
            ours, theirs = (torch.cat([t.flatten() for t in state[kind]]) for state in (shared, alone))
            assert (ours - theirs).norm() < 1e-5 * theirs.norm(), kind


def test_a_group_can_be_left_while_a_model_still_holds_it():
    """Of twelve times, some hung for ever: gloo's thread and the model's end waited for each other."""
    group = run_ranks(leave_again_and_again, (free_ports(12),), 2, join=False)
    deadline = time.monotonic() + 100
    while not group.join(timeout=5):
        if time.monotonic() > deadline:
            for process in group.processes:
                process.kill()
            pytest.fail("hangs")


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.variant)])
def test_a_process_can_end_as_soon_as_the_group_is_left(times):
    """One of four processes died of SIGABRT: gloo's thread let go of a tensor while Python ended.

    Each is a Python of its own, since a forked one ends without clearing up.
    """
    for port in free_ports(times):
        torch.multiprocessing.spawn(leave, (port,), 2)


def test_torchrun_trains_with_two_processes_and_stops_when_told_to(tmp_path):
    """torchrun hands SIGTERM on, waits for the save, and ends with 1 itself, whatever its processes ended with."""
    study = study_of(tmp_path, training={"steps": 10_000, "report_seconds": 0.2})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    launcher.append(f"--master-port={free_ports(1)[0]}")
    run = subprocess.Popen(
        [*launcher, "-m", "hpcres", "train", str(save_study(study, "mine"))], stderr=subprocess.PIPE, text=True
    )
    rows, deadline = study.folder / "training.csv", time.monotonic() + 120
    while not rows.is_file() or rows.read_text().count("\n") < 3:
        assert run.poll() is None
        assert time.monotonic() < deadline, run.kill()
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[1]
    checkpoint = load_checkpoint(study.checkpoint_path)
    assert run.returncode == 1
    assert "2 processes on cpu" in said
    assert f"stopped by SIGTERM after saving step {checkpoint.step} to" in said
    assert rows.read_text().splitlines()[-1].startswith(f"{checkpoint.step},")
