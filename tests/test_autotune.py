"""Settings chosen from timings on this machine: precision, and a network width that fits training.minutes."""

import os
import subprocess
import sys
import time
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
import torch
from small_training import ALONE, history, same, study_of, weights

from hpcres.checkpoint import load_checkpoint
from hpcres.errors import InputError
from hpcres.inference.job import open_job
from hpcres.study.file import save_study
from hpcres.training import autotune, trial
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.distributed import Processes
from hpcres.training.loop import train
from hpcres.training.trial import _extrapolated, _sizes, choose_precision, estimated_seconds, step_seconds

NETWORK = {"width": 4, "critic_width": 5, "padding": "zeros", "last_stage": "transposed", "least_width": 2}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# ---- the trial ----


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 9.0, "fp32"), (1.0, 0.99, "fp32")])
def test_precision_is_the_faster_and_bf16_must_be_worth_it(tmp_path, monkeypatch, fp32, bf16, chosen):
    times = {"fp32": fp32, "bf16": bf16}
    monkeypatch.setattr(trial, "estimated_seconds", lambda study, *_, **__: times[study.training.precision])
    found = choose_precision(study_of(tmp_path), ALONE)
    assert found == (chosen, pytest.approx(fp32 / bf16))


def test_processes_choose_by_the_slowest_of_them(tmp_path, monkeypatch):
    """bf16 is faster on this one and slower on another."""
    mine, theirs = {"fp32": 2.0, "bf16": 1.0}, (2.0, 9.0)
    monkeypatch.setattr(trial, "estimated_seconds", lambda study, *_, **__: mine[study.training.precision])
    monkeypatch.setattr(Processes, "largest", lambda self, *ours: list(map(max, ours, theirs)))
    assert choose_precision(study_of(tmp_path), ALONE)[0] == "fp32"


ON_AVX2 = """
import sys
from hpcres.study.file import load_study
from hpcres.training.distributed import processes
from hpcres.training.trial import choose_precision
with processes("cpu", 1) as group:
    print(*choose_precision(load_study(sys.argv[1]), group))
"""


def test_without_hardware_for_bf16_fp32_is_chosen(tmp_path):
    study = save_study(study_of(tmp_path, network=NETWORK | {"width": 5, "critic_width": 7}), "train")
    without = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", ON_AVX2, study], capture_output=True, text=True, env=os.environ | without, timeout=120
    )
    chosen, ratio = done.stdout.split()
    assert chosen == "fp32"
    assert float(ratio) < 1


def test_parts_are_timed_up_to_the_cubes_and_slices_of_the_study(tmp_path, monkeypatch):
    largest = []
    monkeypatch.setattr(trial, "_extrapolated", lambda seconds_at, sizes, *_: largest.append(sizes[-1]) or 1.0)
    for training in ({}, {"cube_voxels": 128, "slices_per_axis": None}):
        estimated_seconds(study_of(tmp_path, training={"cubes": 2} | training), ALONE)
    assert largest == [16, 2 * 3, 32, 2 * 120]
    models = trial._alone(study_of(tmp_path, training={"cube_voxels": 32, "diagonal_slices": True}), ALONE)
    assert trial._critics_seconds(models, 2, np.array([4, 2, 1])) > 0  # on one patch and one penalty


@pytest.mark.parametrize("constant", [0.0, 0.1])
@pytest.mark.parametrize(("each", "last"), [(1e-6, 16), (5e-5, 16), (1e-3, 4), (1.0, 2)])
def test_long_parts_are_extrapolated_from_smaller_sizes(each, last, constant):
    """A size that would take more than half a second is not timed, but for the second, since a line needs two."""
    measured = []

    def seconds_at(size):
        measured.append(size)
        return constant + each * size**3

    found = _extrapolated(seconds_at, _sizes(16, 2), 3, smallest=False)
    assert measured[-1] == last
    if last > 2:
        assert found == pytest.approx(constant + each * 16**3)
    else:
        assert found == pytest.approx((constant + each * 2**3) * 8**3)  # from one size all time grows


def test_timings_of_a_part_end_after_a_second():
    """Three sizes, each timed twice, take 0.95 s together here, so that a fourth is timed and no fifth."""
    measured = []
    found = _extrapolated(lambda size: measured.append(size) or 0.1 + 0.025 * size, [1, 2, 4, 5, 6, 64], 1, False)
    assert measured == [1, 1, 2, 2, 4, 4, 5, 5]
    assert found == pytest.approx(0.1 + 0.025 * 64)


def test_the_first_comparison_times_the_smallest_size_only():
    measured = []
    assert _extrapolated(lambda size: measured.append(size) or 1e-3 * size, [2, 4, 8], 1, smallest=True) == 8e-3
    assert set(measured) == {2}


def test_sizes_grow_by_at_most_two_to_the_last():
    for most in range(2, 65):
        sizes = _sizes(most, 2)
        assert (sizes[0], sizes[-1]) == (2, most)
        assert all(a < b <= 2 * a for a, b in pairwise(sizes))


def test_a_trial_leaves_no_trace(tmp_path):
    """The networks of a run are the same after a trial as without one."""
    study = study_of(tmp_path, training={"steps": 3})
    train(study)
    alone = weights(study)
    tried = study_of(tmp_path, output=str(tmp_path / "tried"), training={"steps": 3, "minutes": 100})
    train(tried)
    assert same(weights(tried), alone)
    assert history(tried)[-1][:4] == history(study)[-1][:4]


def test_a_step_is_estimated_from_its_parts(tmp_path):
    """Within a factor of six, since other work may slow either."""
    study = study_of(tmp_path, training={"slices_per_axis": 8, "reuse_generated": True})
    low_res, real = LowResCubes(study), RealSlices(study, ALONE.device)
    whole, estimated = step_seconds(study, ALONE, low_res, real), estimated_seconds(study, ALONE)
    assert whole / 6 < estimated < 6 * whole


# ---- choices and messages ----


def test_the_chosen_precision_is_kept_when_a_run_is_resumed(tmp_path, monkeypatch, capfd):
    """Resumed where bf16 is faster, a run begun in fp32 is bit for bit the uninterrupted fp32 run."""
    whole, auto = (
        study_of(tmp_path, output=str(tmp_path / name), training={"steps": 2, "precision": precision})
        for name, precision in (("whole", "fp32"), ("auto", "auto"))
    )
    train(whole)
    begun = auto.model_copy(update={"training": auto.training.model_copy(update={"steps": 1})})
    monkeypatch.setattr(autotune, "choose_precision", lambda *_: ("fp32", 0.25))
    train(begun)
    said = "precision fp32: in a trial on this CPU with 1 thread, bf16 had 0.25 times the speed of fp32"
    assert said in capfd.readouterr().err
    saved = load_checkpoint(auto.checkpoint_path)
    assert saved.study.training.precision == "fp32"
    assert saved.training_state["chosen_settings"] == {"training.precision": {"study": "auto", "chosen": "fp32"}}
    monkeypatch.setattr(autotune, "choose_precision", lambda *_: ("bf16", 4.0))
    train(auto)
    assert "precision fp32, as chosen when this run began" in capfd.readouterr().err
    assert same(weights(auto), weights(whole))
    other = auto.model_copy(update={"training": auto.training.model_copy(update={"steps": 6, "precision": "bf16"})})
    with pytest.raises(InputError, match=r"was trained with training.precision fp32, the study now says bf16"):
        train(other)


def steps_take(monkeypatch, seconds_of_width):
    monkeypatch.setattr(autotune, "step_seconds", lambda study, *_: seconds_of_width.get(study.network.width, 1e9))


def test_the_network_is_narrowed_to_fit_the_minutes_and_stays_so_when_resumed(tmp_path, monkeypatch, capfd):
    """For two steps in a minute, widths of 100 and 40 s a step are too slow, one of 20 s is not."""
    steps_take(monkeypatch, {4: 100.0, 3: 40.0, 2: 20.0})
    study = study_of(tmp_path, network=NETWORK, training={"steps": 2, "minutes": 1, "least_steps": 2})
    train(study)
    said = capfd.readouterr().err
    assert (
        "training.minutes: 1 allows fewer than 2 steps (training.least_steps) of a generator of width 4 on this "
        "machine; its width is now 2 and critic_width 4"
    ) in said
    assert "about 2 steps in 40 s" in said
    saved = load_checkpoint(study.checkpoint_path)
    assert saved.generator.config["width"] == saved.study.network.width == 2
    assert saved.study.network.critic_width == 4
    steps_take(monkeypatch, {4: 1e-3})
    more = study.model_copy(update={"training": study.training.model_copy(update={"steps": 3})})
    assert train(more).resumed_step == 2
    assert "generator width 2, as chosen when this run began" in capfd.readouterr().err
    assert load_checkpoint(study.checkpoint_path).generator.config["width"] == 2
    assert open_job(more).checkpoint.generator.config["width"] == 2
    wider = more.model_copy(update={"network": more.network.model_copy(update={"width": 5})})
    with pytest.raises(InputError, match=r"was trained with network.width 2, the study now says 5"):
        train(wider)


@pytest.mark.parametrize("least_width", [None, 3])
def test_minutes_that_are_too_few_are_refused_before_anything_is_written(tmp_path, monkeypatch, least_width):
    steps_take(monkeypatch, {4: 12.0, 3: 7.0})
    network = NETWORK | {"least_width": least_width}
    study = study_of(tmp_path, network=network, training={"steps": 1000, "minutes": 1})
    needed = ceil(100 * (12.0 if least_width is None else 7.0) / 60)
    with pytest.raises(InputError, match=rf"1 allows about.*set training.minutes to {needed} or more") as refused:
        train(study)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
    enough = study.model_copy(update={"training": study.training.model_copy(update={"minutes": needed})})
    assert not autotune._too_few(enough, 12.0 if least_width is None else 7.0)


@pytest.mark.parametrize("more", [{"minutes": None}, {"steps": 5}, {"least_steps": 5}, {"init_from": "x.pt"}])
def test_a_run_is_not_refused_without_minutes_or_with_few_steps_or_trained_weights(tmp_path, more):
    study = study_of(tmp_path, training={"steps": 1000, "minutes": 1} | more)
    assert not autotune._too_few(study, 12.0)
    assert autotune._too_few(study_of(tmp_path, training={"steps": 1000, "minutes": 1}), 12.0)


def test_the_message_says_how_long_a_run_takes(tmp_path):
    by_steps = study_of(tmp_path, training={"steps": 300})
    assert autotune._outlook(by_steps, 2.0) == "a step takes about 2 s: about 300 steps in 10 minutes"
    assert "a step took about 2 s: about 100 more steps in 3.33 minutes" in autotune._outlook(by_steps, 2.0, 200, 500.0)
    by_time = study_of(tmp_path, training={"steps": 300, "minutes": 5})
    assert "about 150 steps in 5 minutes" in autotune._outlook(by_time, 2.0)
    assert "about 50 more steps in 100 s" in autotune._outlook(by_time, 2.0, 100, 200.0)
    paper = study_of(tmp_path, training={"steps": 100_000})
    assert "100000 steps in 162 days, longer than cluster.train_hours 12" in autotune._outlook(paper, 140.0)


def test_one_minute_for_the_papers_network_on_a_cpu_is_refused_in_ten_seconds(tmp_path):
    """A study without a recipe; ten seconds of one core, all timings included."""
    study = study_of(
        tmp_path,
        network={},
        training={
            "steps": 100_000,
            "minutes": 1,
            "cubes": 8,
            "slices_per_axis": None,
            "critic_steps": 5,
            "precision": "auto",
        },
    )
    began = time.process_time()
    with pytest.raises(InputError, match=r"steps of a generator of width 8 at .* add the recipe for few cores"):
        train(study)
    assert time.process_time() - began < 10
    assert not (tmp_path / "out").exists()
