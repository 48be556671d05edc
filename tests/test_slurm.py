"""The three cluster scripts, as they are, through a real sbatch on two nodes: each does its stage of case 3 small."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STUDY = "configs/case3-sofc-small.yaml"
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def submitted(real_data, tmp_path_factory):
    """Submit a script from the project's folder and wait for it; returns its log."""
    assert "SLURM_CONF" in os.environ, "start a Slurm and export SLURM_CONF"
    logs = tmp_path_factory.mktemp("logs")

    def submit(script: str, *options: str, arguments: list[str]) -> str:
        # sbatch --wait polls with a backoff of up to 40 s, so the queue is asked directly.
        log = logs / f"{Path(script).stem}-{time.monotonic_ns()}.out"
        out = subprocess.run(
            ["sbatch", "--parsable", "--output", str(log), *options, script, STUDY, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        job = out.stdout.strip().split(";")[0]
        deadline = time.monotonic() + 300
        while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip():
            assert time.monotonic() < deadline, f"job {job} hangs:\n{log.read_text() if log.exists() else ''}"
            time.sleep(0.5)
        state = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
        text = log.read_text()
        assert re.search(r"JobState=COMPLETED", state), f"{state}\n{text}"
        return text

    return submit


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("case3")


def test_scripts_are_short():
    for script in (ROOT / "slurm").glob("*.sh"):
        assert len(script.read_text().splitlines()) < 30


def test_train_on_two_nodes(submitted, output):
    submitted(
        "slurm/train.sh",
        "--nodes=2",
        "--cpus-per-task=1",
        arguments=["--output", str(output), "--set", "training.steps=6", "--set", "training.minutes=null"],
    )
    assert (output / "checkpoint.pt").exists()


def test_infer_on_two_nodes(submitted, output):
    ranks = ["--nodes=2", "--ntasks-per-node=2"]
    text = submitted("slurm/infer.sh", *ranks, arguments=["--output", str(output)])
    assert "4 ranks" in text
    again = submitted("slurm/infer.sh", *ranks, arguments=["--output", str(output)])
    assert "nothing" in again.lower() or "already" in again.lower()


def test_infer_refuses_singletons(output):
    """srun without an MPI plugin starts N programs that each think they are alone."""
    out = subprocess.run(
        [
            "srun",
            "--mpi=none",
            "--nodes=2",
            "--ntasks=2",
            "hpcres",
            "infer",
            STUDY,
            "--output",
            str(output),
            "--overwrite",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode != 0
    assert "SLURM_NTASKS" in out.stderr


def test_metrics_on_two_nodes(submitted, output):
    submitted(
        "slurm/metrics.sh",
        "--nodes=2",
        "--ntasks-per-node=1",
        arguments=["--output", str(output), "--set", "metrics.subvolumes={count: 4, transport_count: 0}"],
    )
    measured = json.loads((output / "metrics.json").read_text())
    assert sum(measured["volume"]["volume_fraction"].values()) == pytest.approx(1)
