"""What several test files share: where the real images are, and how a command is run as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
