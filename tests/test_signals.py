"""SIGINT, SIGTERM and SIGHUP end every stage within ten seconds, with one line and status 75, and no result is lost."""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from distributed import Client
from small_interruptions import STAGES, Outcome, default_handlers, interrupt, make_template, whole_run
from test_metrics import dask_cluster

from hpcres.errors import Stopped
from hpcres.signals import end_if_signalled, handling_signals

FURTHER = ("train --overwrite", "plan")
"""tests/test_outputs.py interrupts `train --overwrite` at the moments that matter, and `plan` writes nothing."""
ALONE = [
    pytest.param(name, marks=pytest.mark.variant) if name in FURTHER else name
    for name, stage in STAGES.items()
    if not stage.launcher
]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions") / "template"
    make_template(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("interrupted")


def interrupted(name: str, times: int, seed: int, template: Path, folder: Path) -> list[Outcome]:
    """Outcomes of runs until `times` signals have come before the end of the stage, of at most four times as many."""
    rng = random.Random(seed)
    duration = whole_run(STAGES[name], template, folder / "whole")
    shutil.rmtree(folder / "whole")
    outcomes: list[Outcome] = []
    while sum(bool(outcome.numbers) for outcome in outcomes) < times and len(outcomes) < 4 * times:
        outcomes.append(interrupt(STAGES[name], template, folder / "interrupted", duration, rng))
        shutil.rmtree(folder / "interrupted")
        if not outcomes[-1].numbers:  # the stage takes less time, since its kernels are now compiled
            duration = outcomes[-1].moment
    return outcomes


@pytest.mark.parametrize("name", ALONE)
def test_a_stage_that_is_interrupted_ends_with_a_line(name, template, tmp_path):
    for outcome in interrupted(name, 1, 1, template, tmp_path):
        assert not outcome.faults, outcome


def test_a_signal_that_comes_in_a_callback_of_the_collector_is_not_lost():
    """Python drops an exception that a handler raises there; `metrics` once ran for two minutes after Ctrl-C."""

    def signalled(phase: str, _: object) -> None:
        if phase == "start":
            os.kill(os.getpid(), signal.SIGINT)

    with handling_signals("metrics") as received:
        gc.callbacks.append(signalled)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(signalled)
        assert received == [signal.SIGINT]
        with pytest.raises(Stopped, match="metrics: stopped by SIGINT; nothing is written: run it again"):
            end_if_signalled()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    end_if_signalled()


def test_a_library_call_can_still_be_interrupted_twice():
    with handling_signals("train"):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handling_signals("train") as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not received
    finally:
        signal.signal(signal.SIGHUP, before)


STUCK = """
import sys, time
from pathlib import Path
from hpcres import signals
signals.PATIENCE_SECONDS = 1.0
signals.guard_process("phantom")
with signals.half_made(Path("half")):
    Path("half").mkdir()
    Path("half/a").touch()
    print("begun", flush=True)
    {work}
"""
BUSY = "while True: pass"  # never checks for signals
COMPILED = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # no Python handler runs meanwhile


@pytest.mark.parametrize("work", [BUSY, COMPILED], ids=["busy", "compiled"])
@pytest.mark.parametrize(
    ("numbers", "status", "line"),
    [
        ([signal.SIGTERM], 75, "phantom: stopped by SIGTERM; nothing is written: run it again"),
        ([signal.SIGHUP, signal.SIGTERM], 75, "phantom: stopped by SIGHUP; nothing is written: run it again"),
        ([signal.SIGINT, signal.SIGINT], 130, "phantom: ended by a second SIGINT; nothing is written: run it again"),
    ],
    ids=["TERM", "HUP", "INT twice"],
)
def test_work_that_does_not_check_for_signals_is_ended(work, numbers, status, line, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(work=work)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=default_handlers,
    )
    assert run.stdout.readline() == "begun\n"
    started = time.monotonic()
    for number in numbers:
        run.send_signal(number)
        time.sleep(0.6)
    assert run.wait(timeout=10) == status
    assert time.monotonic() - started < 5
    assert run.stderr.read() == f"hpcres: {line}\n"
    assert not list(tmp_path.iterdir())


def test_a_long_rename_is_never_cut_off_from_its_half_made_folder(tmp_path):
    """`train --overwrite` has removed the earlier run by then: the half-made folder is the only one."""
    work = """with signals.renaming(): time.sleep(60)"""
    run = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(work=work)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=default_handlers,
    )
    assert run.stdout.readline() == "begun\n"
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=10) == 75
    assert (tmp_path / "half" / "a").exists()


def test_ctrl_c_that_also_ends_dask_s_workers_is_a_stop(tmp_path):
    """Scheduler and worker are in the same process group, receive SIGINT too and end first."""
    np.save(tmp_path / "v.npy", np.random.default_rng(0).integers(0, 3, (320, 320, 320)).astype(np.uint8))
    with dask_cluster(tmp_path, 1) as (file, started), (tmp_path / "said").open("w") as stderr:
        run = subprocess.Popen(
            [sys.executable, "-m", "hpcres", "metrics", "v.npy", "--scheduler", str(file), "--output", "m.json"],
            cwd=tmp_path,
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            preexec_fn=default_handlers,
        )
        began = time.monotonic()
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.clients)) < 3:
                time.sleep(0.1)  # the scheduler itself and this client are two
                assert time.monotonic() - began < 60
        assert run.poll() is None
        for process in (*started.values(), run):
            process.send_signal(signal.SIGINT)
        run.wait(timeout=20)
    said = (tmp_path / "said").read_text()
    assert run.returncode == 75, said
    ours = [line for line in said.splitlines() if line.startswith("hpcres: ")]
    assert ours == ["hpcres: metrics: stopped by SIGINT; nothing is written: run it again"]
    assert "Traceback" not in said
    assert not (tmp_path / "m.json").exists()


@pytest.mark.slow
def test_fifty_interruptions_of_every_stage(template, tmp_path, capsys):
    times = int(os.environ.get("INTERRUPTIONS", "50"))
    lines, wrong = [], []
    for name in STAGES:
        outcomes = interrupted(name, times, 7, template, tmp_path)
        wrong += [(name, outcome) for outcome in outcomes if outcome.faults]
        hit = [outcome for outcome in outcomes if outcome.numbers]
        ends = [sum(outcome.status == status for outcome in outcomes) for status in (75, 130, 0)]
        other = len(outcomes) - sum(ends)
        slowest = max((outcome.seconds for outcome in hit), default=0.0)
        bad = sum(bool(outcome.faults) for outcome in outcomes)
        lines.append(f"| {name} | {len(hit)} | {ends[0]} | {ends[1]} | {ends[2]} | {other} | {slowest:.1f} | {bad} |")
        with capsys.disabled():
            print(lines[-1], flush=True)
    with capsys.disabled():
        print("\n| stage | signals that met it | 75 | 130 | 0 (done before) | other | slowest end, s | faults |")
        print("|---|---|---|---|---|---|---|---|\n" + "\n".join(lines))
    assert not wrong, wrong
