"""Run each stage as a process, send it a signal at a random moment, and check how it ends and what it leaves."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from small_painting import MPI, descendants, lively
from small_training import blobs

from hpcres.checkpoint import build_generator, load_checkpoint, save_checkpoint
from hpcres.inference.job import open_job
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.inference.verify import find_faults
from hpcres.study.file import load_study

ENDS_WITHIN_SECONDS = 10.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MPIRUN = ["mpirun", "-n", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@dataclass(frozen=True)
class Stage:
    """A command to run in a folder of its own; `launcher` starts two processes of it."""

    name: str
    arguments: list[str]
    whole: Callable[[Path], object] = lambda folder: None
    """Raises if the results in the folder are damaged."""
    prepare: Callable[[Path], object] = lambda folder: None
    """Changes the copy of the template before the command starts."""
    launcher: list[str] = field(default_factory=list)

    def start(self, folder: Path) -> subprocess.Popen[str]:
        program = ["-m", "hpcres"] if self.launcher[:1] == TORCHRUN[:1] else [sys.executable, "-m", "hpcres"]
        environment = {**os.environ, **MPI, "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        return subprocess.Popen(
            [*self.launcher, *program, *self.arguments],
            cwd=folder,
            env=environment,
            text=True,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=(folder / "stderr.txt").open("w"),
            preexec_fn=default_handlers,
        )


def default_handlers() -> None:
    """Set the default handlers in a new process: background jobs of a shell ignore SIGINT, and so do their children."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def make_template(folder: Path) -> None:
    """Write a study on which every stage takes a second or two, a volume, a checkpoint, and a painted store."""
    folder.mkdir(parents=True)
    np.save(folder / "low.npy", blobs((20, 18, 17), 1))
    np.save(folder / "high.npy", blobs((1, 90, 80), 2))
    np.save(folder / "v.npy", blobs((90, 80, 70), 3))
    phases = {0: "a", 1: "b", 2: "c"}
    study = {
        "name": "t",
        "scale_factor": 4,
        "output": "out",
        "device": "cpu",
        "high_res": {"phases": phases, "voxel_size": "65 nm", "images": [{"path": "high.npy"}]},
        "low_res": {"path": "low.npy", "phases": phases},
        "network": {"width": 3, "critic_width": 5},
        "training": {
            "steps": 6,
            "cubes": 2,
            "slices_per_axis": 3,
            "critic_steps": 1,
            "threads": 1,
            "recalibration_cubes": 2,
            "report_seconds": 0.01,
        },
        "inference": {"tiles": "4x4x4", "chunk_voxels": 16, "threads": 1},
        "metrics": {"statistics": ["correlations", "connectivity"], "subvolumes": {"count": 4}},
        "phantom": {"kind": "three-phase", "voxels": "128x128x128", "slices": 1, "slice_voxels": 64},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    loaded = load_study(folder / "study.yaml")
    save_checkpoint(loaded.checkpoint_path, generator=lively(build_generator(loaded)), study=loaded, step=1)
    infer(open_job(loaded), Ranks())


def _json(path: str) -> Callable[[Path], object]:
    return lambda folder: not (folder / path).exists() or json.loads((folder / path).read_text())


def _phantom(folder: Path) -> None:
    if (folder / "out/phantom").exists():
        assert {p.name for p in (folder / "out/phantom").iterdir()} == {"truth.zarr", "low_res.zarr", "slices.tif"}


def _stored(path: str) -> Callable[[Path], object]:
    def whole(folder: Path) -> None:
        if (folder / path).exists():
            from hpcres.geometry import Box
            from hpcres.volumes.stores import LabelStore

            store = LabelStore.open(folder / path)
            for level in range(len(store.levels)):
                assert (store.read(level, Box.whole(store.levels[level].shape)) != store.unwritten).all()

    return whole


def _painted(folder: Path) -> None:
    """No shard is damaged; some may be missing."""
    if (folder / "out/labels.zarr").exists():
        assert {fault.why for fault in find_faults(folder / "out/labels.zarr")} <= {"missing"}


def _trained(folder: Path) -> None:
    """The checkpoint can be read, and training.csv is of the same run and ends at its step."""
    if not (folder / "out/checkpoint.pt").exists():
        return
    checkpoint, table = load_checkpoint(folder / "out/checkpoint.pt"), folder / "out/training.csv"
    rows = table.read_text().splitlines()[1:] if table.exists() else []
    if checkpoint.training_state is None:
        assert rows == ["the earlier run"]
    else:
        assert int(rows[-1].split(",")[0]) == checkpoint.step


def _earlier_run(folder: Path) -> None:
    (folder / "out/training.csv").write_text("step,seconds,loss\nthe earlier run\n")


def _without(*paths: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in paths:
            (shutil.rmtree if (folder / path).is_dir() else Path.unlink)(folder / path)

    return remove


_REPAINT = _without("out/labels.zarr", "out/labels.zarr.journal")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("phantom", ["phantom"], _phantom),
        Stage("convert", ["convert", "v.npy", "--output", "v.zarr"], _stored("v.zarr")),
        Stage("train", ["train"], _trained, _without("out/checkpoint.pt")),
        Stage("train --overwrite", ["train", "--overwrite"], _trained, _earlier_run),
        Stage("plan", ["plan"]),
        Stage("infer", ["infer"], _painted, _REPAINT),
        Stage("verify", ["verify"], _painted),
        Stage("metrics", ["metrics"], _json("out/metrics.json")),
        Stage("tortuosity", ["tortuosity", "v.npy", "--output", "t.json"], _json("t.json")),
        Stage("report", ["report"]),
        Stage("infer, 2 ranks", ["infer"], _painted, _REPAINT, MPIRUN),
        Stage("tortuosity, 2 ranks", ["tortuosity", "v.npy", "--output", "t.json"], _json("t.json"), launcher=MPIRUN),
        Stage("train, 2 processes", ["train"], _trained, _without("out/checkpoint.pt"), TORCHRUN),
    )
}


@dataclass
class Outcome:
    """How a process ended: exit status, seconds from the signal to the end, and the faults found."""

    status: int
    seconds: float
    moment: float
    numbers: list[str]
    stderr: str
    faults: list[str]
    receiver: str


def whole_run(stage: Stage, template: Path, folder: Path) -> float:
    """Seconds that the stage takes after its signal handlers are set, without a signal."""
    shutil.copytree(template, folder)
    stage.prepare(folder)
    process = stage.start(folder)
    _wait_for_handlers(process, stage)
    started = time.monotonic()
    assert process.wait(timeout=300) == 0, (folder / "stderr.txt").read_text()
    return time.monotonic() - started


def interrupt(stage: Stage, template: Path, folder: Path, duration: float, rng: random.Random) -> Outcome:
    """Start the stage, send it a signal at a random moment of its `duration`, and check its end."""
    shutil.copytree(template, folder)
    stage.prepare(folder)
    inputs = {name: (folder / name).read_bytes() for name in ("low.npy", "high.npy", "v.npy", "study.yaml")}
    process = stage.start(folder)
    programs = _wait_for_handlers(process, stage)
    if stage.launcher and rng.random() < 0.5:
        programs = [process.pid]  # the launcher alone; else every process that it started, as srun does
    moment, first = rng.random() * duration, rng.choice(SIGNALS)
    twice = first == signal.SIGINT and not stage.launcher and rng.random() < 0.5
    try:
        process.wait(timeout=moment)
    except subprocess.TimeoutExpired:
        pass
    sent = time.monotonic()
    alive = process.poll() is None
    if alive:
        for one in programs:
            with suppress(ProcessLookupError):
                os.kill(one, first)
        if twice:
            time.sleep(0.6)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            else:
                twice = False
    try:
        status = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    seconds = time.monotonic() - sent
    names = [first.name] * (1 + twice) if alive else []
    stderr = (folder / "stderr.txt").read_text(errors="replace")
    receiver = "launcher" if stage.launcher and programs == [process.pid] else "program"
    outcome = Outcome(status, seconds, moment, names, stderr, [], receiver)
    outcome.faults += _faults(stage, folder, outcome, inputs)
    return outcome


def _faults(stage: Stage, folder: Path, outcome: Outcome, inputs: dict[str, bytes]) -> list[str]:
    faults = []
    if outcome.seconds > ENDS_WITHIN_SECONDS:
        faults.append(f"ended after {outcome.seconds:.1f} s")
    # A command that is done a moment before the signal ends with 0. torchrun always ends with 1. mpirun ends with 1 if
    # it received the signal itself, and then does not forward the output of its processes.
    due = {0, 75, 130} if len(outcome.numbers) > 1 else {0, 75}
    due |= {1} if stage.launcher == TORCHRUN or outcome.receiver == "launcher" else set()
    if outcome.status not in due:
        faults.append(f"status {outcome.status}")
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("hpcres: ")]
    if stage.launcher != TORCHRUN and outcome.receiver == "program":
        if re.search(r"Traceback|Exception ignored|Error\b", outcome.stderr):
            faults.append("a traceback or an error beside the line")
        if len(lines) != (outcome.status != 0) and not (stage.launcher and len(lines) <= 1):
            faults.append(f"{len(lines)} lines")
        if outcome.status and any(not re.search(r"(stopped by|ended by a second) SIG", line) for line in lines):
            faults.append("the line does not name the signal")
    left = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith((".", "hpcres-geodesic"))]
    if left:
        faults.append(f"left behind: {left}")
    if any((folder / name).read_bytes() != content for name, content in inputs.items()):
        faults.append("an input changed")
    try:
        stage.whole(folder)
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    return faults


def _wait_for_handlers(process: subprocess.Popen[str], stage: Stage) -> list[int]:
    """Wait until every process of the command has set its signal handlers; their ids. Before, Python is starting."""
    deadline, due = time.monotonic() + 60, 2 if stage.launcher else 1
    while time.monotonic() < deadline and process.poll() is None:
        programs = [one for one in descendants(process.pid) if _runs(one, stage)] if stage.launcher else [process.pid]
        if len(programs) == due and all(map(_handles_signals, programs)):
            return programs
        time.sleep(0.005)
    return [process.pid]


def _runs(process: int, stage: Stage) -> bool:
    with suppress(OSError):
        return f"\0hpcres\0{stage.arguments[0]}".encode() in Path(f"/proc/{process}/cmdline").read_bytes()
    return False


def _handles_signals(process: int) -> bool:
    with suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
        return caught is not None and all(int(caught.group(1), 16) >> (number - 1) & 1 for number in SIGNALS)
    return False
