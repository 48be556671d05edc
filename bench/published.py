"""The published code's own training loop (Dahari 2022), run unchanged from a checkout that the user has, and timed."""

from __future__ import annotations

import contextlib
import importlib
import io
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tifffile


class _Enough(Exception):
    """Ends the loop, which has no end of its own within hours."""


def published_seconds(
    checkout: Path, folder: Path, low_res: Path, image: Path, widths: tuple[int, int], steps: int
) -> np.ndarray:
    """(steps, 2): seconds, and CPU seconds of all threads, of each of `steps` generator steps, with its five critic
    iterations.

    Parameters
    ----------
    checkout : Path
        Of https://github.com/amirDahari1/SuperRes; its `code` is imported from there and nothing is written to it.
    folder : Path
        Where its loop runs.
    low_res, image : Path
        Labels of three phases (.npy), of scale factor 4, isotropic and under-sampled.
    widths : tuple of int
        Of the generator and the critics.
    steps : int

    Notes
    -----
    Its reports are left out: wandb is a stand-in, and so are the metrics and the plot that follow the first step. The
    clock starts after these and stops where a step reports its losses.
    """
    for name, source in (("low", low_res), ("high", image)):
        (folder / "data").mkdir(exist_ok=True)
        tifffile.imwrite(folder / "data" / f"{name}.tif", np.load(source))
    (folder / "progress").mkdir(exist_ok=True)
    reported: list[tuple[float, float]] = []

    def log(values: dict[str, Any]) -> None:
        if "pixel distance" in values:
            reported.append((time.perf_counter(), time.process_time()))
            if len(reported) > steps:
                raise _Enough

    def plotted(*_: Any, **__: Any) -> None:
        if len(reported) == 1:
            reported[0] = time.perf_counter(), time.process_time()

    arguments = ["Architecture.py", "-d", "bench", "-wg", str(widths[0]), "-wd", str(widths[1]), "-sf", "4"]
    arguments += ["-phases_idx", "1", "2", "--super_sampling", "--with_rotation"]
    arguments += ["-g_image_path", "low.tif", "-d_image_path", "high.tif"]
    # Of its 312 iterations one plots again, chosen at random by this state; with 0 it is a late one.
    # The published code draws from numpy's global state, so that only a legacy seed reaches it.
    np.random.seed(0)  # noqa: NPY002
    with _stand_ins(checkout / "code", log), _inside(folder, arguments):
        tools = importlib.import_module("ImageTools")
        for name, stand_in in (
            ("vf_sa_metrics", lambda *_: None),
            ("log_metrics", lambda *_: 1.0),
            ("calc_and_save_eta", lambda *_: None),
            ("plot_fake_difference", plotted),
        ):
            setattr(tools, name, stand_in)
        with contextlib.suppress(_Enough), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(checkout / "code" / "Architecture.py"), run_name="__main__")
    return np.diff(reported, axis=0)


@contextlib.contextmanager
def _stand_ins(code: Path, log: Any) -> Iterator[None]:
    """Its modules can be imported, with stand-ins for what it reports to; afterwards they are forgotten."""
    wandb, taufactor = ModuleType("wandb"), ModuleType("taufactor")
    wandb.__dict__.update(log=log, **dict.fromkeys(("init", "watch", "save"), lambda *_, **__: None))
    taufactor.__dict__["metrics"] = None
    before = dict(sys.modules)
    sys.modules.update(wandb=wandb, taufactor=taufactor)
    sys.path.insert(0, str(code))
    if not hasattr(tifffile, "imsave"):  # the name of imwrite in tifffile before 2022
        tifffile.imsave = tifffile.imwrite
    try:
        yield
    finally:
        sys.path.remove(str(code))
        for name, module in list(sys.modules.items()):
            if module in (wandb, taufactor) or str(getattr(module, "__file__", None) or "").startswith(str(code)):
                sys.modules.pop(name)
        sys.modules.update({name: before[name] for name in ("wandb", "taufactor") if name in before})


@contextlib.contextmanager
def _inside(folder: Path, arguments: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = arguments
    try:
        with contextlib.chdir(folder):
            yield
    finally:
        sys.argv = before
