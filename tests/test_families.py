"""A family of generators that a stranger adds: every stage works with it, on any number of ranks and after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_families
import yaml
from small_painting import MPI, descendants, mpirun, store_bytes, truncate
from test_bad_input import run

from hpcres.checkpoint import load_checkpoint
from hpcres.errors import InputError
from hpcres.families import FAMILIES
from hpcres.study import study_model
from hpcres.study.file import load_study
from hpcres.volumes.stores import LabelStore

TOYS = Path(toy_families.__file__)
HIGH_RES = {"phases": {0: "pore", 1: "binder", 2: "active"}, "voxel_size": "1 um"}


@pytest.fixture(autouse=True)
def _registered():
    toy_families.register_both()
    yield
    for name in ("toy-nearest", "toy-latent"):
        del FAMILIES[name]


def nearest(folder):
    low = np.random.default_rng(0).integers(0, 2, (12, 10, 9)).astype(np.uint8)
    np.save(folder / "low.npy", low)
    return {
        "name": "toy",
        "scale_factor": 4,
        "high_res": HIGH_RES,
        "output": "out",
        "device": "cpu",
        "network": {"family": "toy-nearest"},
        "low_res": {"path": "low.npy", "phases": {0: ["pore", "binder"], 1: "active"}},
        "training": {"steps": 30, "learning_rate": 0.05, "quality_steps": 10, "checkpoint_minutes": 1e-6},
        "inference": {"tiles": "3x2x2", "chunk_voxels": 16},
        "metrics": {"subvolumes": {"count": 0}},
    }


def latent(folder):
    study = nearest(folder)
    del study["low_res"]
    study["network"] = {"family": "toy-latent", "channels": 5}
    study["inference"] |= {"output_voxels": "48x40x36"}
    return study


def written(folder, content):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def toys(capfd):
    """Run a command in this process, which knows both families; returns its status and what it printed."""

    def run_here(*arguments: object, status: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        found = run([str(one) for one in arguments])
        printed = capfd.readouterr()
        assert found == status, printed.err
        return printed.out, printed.err

    return run_here


def killed(command, reached):
    """Run a command slowly, and kill all its processes as soon as `reached()`."""
    process = subprocess.Popen(
        command, env=os.environ | MPI | {"TOY_SLOW": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "never got so far"
        time.sleep(0.01)
    for one in (*descendants(process.pid), process.pid):  # mpirun's ranks are in sessions of their own
        os.kill(one, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("kind", [nearest, latent], ids=["nearest", "latents alone"])
def test_a_new_family_works_in_every_stage(tmp_path, kind, toys):
    (tmp_path / "whole").mkdir()
    study = written(tmp_path, kind(tmp_path))
    checkpoint, store = tmp_path / "out/checkpoint.pt", tmp_path / "out/labels.zarr"
    toys("train", study, "--output", tmp_path / "whole")
    killed([sys.executable, TOYS, "train", study], checkpoint.exists)
    _, resumed = toys("train", study)
    assert "going on from step" in resumed
    assert "this family is a toy" in resumed
    assert "the toy is done after 30 steps" in resumed
    ours, uncut = (load_checkpoint(path) for path in (checkpoint, tmp_path / "whole/checkpoint.pt"))
    assert (ours.sha256, ours.step) == (uncut.sha256, 30)
    assert (tmp_path / "out/best.pt").exists()
    assert (tmp_path / "out/training.csv").read_text().startswith("step,seconds,loss,learning_rate")

    planned, _ = toys("plan", study)
    assert "48 × 40 × 36 voxels" in planned
    toys("infer", study, "--output", tmp_path / "whole")
    shards = tmp_path / "out/labels.zarr.journal"
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [program, "-n", "2", sys.executable, str(TOYS), "infer", str(study)]
    killed(command, lambda: any(f.read_text().count("\n") > 2 for f in shards.glob("*.jsonl")))
    done = mpirun(2, sys.executable, str(TOYS), "infer", str(study))
    assert done.returncode == 0, done.stderr
    assert "of 12 tiles" in done.stderr
    assert store_bytes(store) == store_bytes(tmp_path / "whole/labels.zarr")  # however it is shared among ranks
    toys("verify", store)
    truncate(next(f for f in (tmp_path / "out/labels.zarr/0/c").rglob("*") if f.is_file()))
    toys("verify", store, status=3)
    toys("verify", store, "--repair")
    assert store_bytes(store) == store_bytes(tmp_path / "whole/labels.zarr")
    audited, _ = toys("verify", store, "--audit", "3")
    assert "labels that differ 0 of" in audited

    toys("metrics", study)
    fractions = json.loads((tmp_path / "out/metrics.json").read_text())["volume"]["volume_fraction"]
    if kind is nearest:
        low = np.load(tmp_path / "low.npy")
        assert fractions["active"] == pytest.approx(low.mean(), abs=0.01)
        by_strangers(toys, study, tmp_path / "out/metrics.json")
    else:
        assert max(fractions.values()) < 0.8
    toys("report", study)
    assert "<svg" in (tmp_path / "out/report.html").read_text() or "<img" in (tmp_path / "out/report.html").read_text()


def by_strangers(toys, study, file):
    """Measure on a worker that knows neither of the two families."""
    from distributed import LocalCluster

    alone = json.loads(file.read_text())
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        toys("metrics", study, "--scheduler", cluster.scheduler_address)
    there = json.loads(file.read_text())
    assert [there[key] for key in ("volume", "low_res")] == [alone[key] for key in ("volume", "low_res")]


def test_the_labels_are_the_network_s_own(tmp_path, toys):
    """Of latents alone: what torch computes of the noise that the seed gives each voxel of the lattice."""
    import torch

    from hpcres.geometry import Box
    from hpcres.noise import NOISE_VOXELS, gaussian_taps, noise_of

    study = written(tmp_path, latent(tmp_path))
    toys("train", study)
    toys("infer", study)
    generator = load_checkpoint(tmp_path / "out/checkpoint.pt").generator
    around = Box((-4, -4, -4), (12 + 4, 10 + 4, 9 + 4))
    given = np.stack(
        [
            noise_of(0, channel, gaussian_taps(sigma, generator.scale), around, (NOISE_VOXELS,) * 3)
            for channel, sigma in enumerate(generator.inputs.latents)
        ]
    )
    with torch.no_grad():
        logits = generator(torch.from_numpy(given)[None])[0]
    # Each crop of 2 moves the output by two voxels of its grid less than a crop of 1 leaves: 4·i + k − 2·2 − 3.
    whole = logits.argmax(0).numpy()
    begin = [4 * 4] * 3
    expected = whole[tuple(slice(b, b + n) for b, n in zip(begin, (48, 40, 36), strict=True))]
    found = LabelStore.open(tmp_path / "out/labels.zarr").read(0, Box((0, 0, 0), (48, 40, 36)))
    assert (found != expected).mean() < 1e-4


def test_what_a_family_does_not_need_may_be_missing(tmp_path):
    assert load_study(written(tmp_path, latent(tmp_path))).low_res is None
    content = latent(tmp_path)
    del content["network"]
    with pytest.raises(InputError, match=r"images: is required|low_res: is required"):
        load_study(written(tmp_path, content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": {"family": "dcgann"}}, r"network.family: 'dcgann' is no family of generators; use one of supe"),
        ({"network": {"family": "toy-latent", "chanels": 3}}, r"network.chanels: unknown key; did you mean 'channels'"),
        ({"training": {"cubes": 3}}, r"training.cubes: unknown key"),
        ({"network": {"family": "toy-nearest"}}, r"low_res: is required and not given"),
    ],
)
def test_settings_are_those_of_the_family(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        load_study(written(tmp_path, latent(tmp_path) | change))


def test_an_output_that_the_lattice_cannot_fill_is_refused(tmp_path, toys):
    study = written(tmp_path, latent(tmp_path))
    toys("train", study, "--set", "training.steps=2")
    for setting, words in (
        ("inference.output_voxels=48x40x38", "no whole voxels of the lattice at scale factor 4; use multiples of 4"),
        ("inference.output_voxels=null", "inference.output_voxels: not set, and without low_res"),
    ):
        _, told = toys("infer", study, "--set", setting, status=2)
        assert told.count("\n") == 1
        assert words in told
    # Without the family the checkpoint is refused in words.
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(FAMILIES, "toy-latent")
        checkpoint = tmp_path / "out/checkpoint.pt"
        _, told = toys("infer", "--checkpoint", checkpoint, "--output", tmp_path / "x.zarr", status=2)
    assert "family 'toy-latent', which this hpcres does not know" in told


def test_a_study_of_another_family_than_the_checkpoint_is_refused(tmp_path, toys):
    study = written(tmp_path, nearest(tmp_path))
    toys("train", study, "--set", "training.steps=2")
    content = nearest(tmp_path)
    content["network"] = {"family": "toy-latent"}
    del content["low_res"]
    content["inference"]["output_voxels"] = "48x40x36"
    other = written(tmp_path, content)
    for command in ("infer", "train"):
        _, told = toys(command, other, status=2)
        assert "toy-nearest" in told


def test_the_model_of_a_study_is_its_family_s():
    assert study_model({"network": {"family": "toy-latent"}}).model_fields["training"].annotation.__name__ == (
        "EndlessTraining"
    )
