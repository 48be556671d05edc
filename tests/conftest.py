"""What several test files share: where the real images are, how a command is run as a user would, a painted store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_painting import make_study, paint_alone
from small_schemas import validate_files

from hpcres.cli.console import show_log

ROOT = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # torch's threads spin while the other worker has their core
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # in processes that tests start
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # pytest is a background job of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


show_log()  # tests that call the library see its messages where a command would print them


@pytest.fixture(autouse=True)
def _written_files_fit_their_schemas(request):
    """Check every metrics.json and transport.json that a test leaves.

    A file that a test damages is no JSON and is skipped.
    """
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    if folder is not None:
        validate_files(folder)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real microstructures ($HPCRES_DATA); tests that need them are skipped where they are absent."""
    folder = Path(os.environ.get("HPCRES_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "electrode.tiff").exists():
        pytest.skip("HPCRES_DATA does not hold the real images")
    os.environ["HPCRES_DATA"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def hpcres() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `hpcres ARGS` in a process of its own and return it with its output."""

    def run(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hpcres", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def study(tmp_path_factory) -> Path:
    return make_study(tmp_path_factory.mktemp("sofc") / "s", "4", (9, 8, 7), chunk=16)


@pytest.fixture(scope="session")
def painted(study) -> Path:
    return paint_alone(study, study.parent / "whole")


@pytest.fixture
def copy(painted, study, tmp_path) -> Path:
    """The painted store in a folder of its own, with its journal."""
    for name in ("labels.zarr", "labels.zarr.journal"):
        shutil.copytree(painted.parent / name, tmp_path / "out" / name)
    return tmp_path / "out" / "labels.zarr"
