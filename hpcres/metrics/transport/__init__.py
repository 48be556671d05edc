"""Transport through phases: relative diffusivity D_rel, tortuosity factor tau = volume fraction / D_rel.

One module is one solver; `solve(conducting, spacing, rtol, device, report)` is what each offers.

transport.json (schema "hpcres transport 1"):

    schema, hpcres, command
    solver                name, method with its boundary, stop, rtol, device
    volume, reference     path, shape, crop (or null), voxel_size, voxel_unit, results; reference null without one
    results               [{phase, label, direction, state, volume_fraction, percolating_fraction, D_rel, tau,
                          tau_percolating, iterations, seconds}]

state is "converged"; "not percolating" (D_rel 0, tau null, which means infinite); or "not converged" (both null).
tau takes the phase's whole volume fraction, tau_percolating that of the clusters which touch both faces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, Literal

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, triple
from hpcres.metrics.transport.percolation import Clusters
from hpcres.volumes import Volume

SCHEMA = "hpcres transport 1"
DEFAULT_RTOL = 0.01


@dataclass(frozen=True)
class Solution:
    """Transport through one phase along one direction; dimensionless."""

    state: Literal["converged", "not percolating", "not converged"]
    volume_fraction: float
    percolating_fraction: float
    d_rel: float | None
    iterations: int = 0
    seconds: float = 0.0

    @property
    def percolates(self) -> bool:
        return self.state != "not percolating"

    @property
    def tau(self) -> float | None:
        return self._tau(self.volume_fraction)

    @property
    def tau_percolating(self) -> float | None:
        return self._tau(self.percolating_fraction)

    def _tau(self, fraction: float) -> float | None:
        if self.d_rel is None:
            return None
        return fraction / self.d_rel if self.d_rel > 0 else inf

    def as_json(self) -> dict[str, Any]:
        """JSON has no infinity: tau is null where the state says "not percolating"."""
        tau, tau_percolating = (None if t in (None, inf) else t for t in (self.tau, self.tau_percolating))
        return {
            "state": self.state, "volume_fraction": self.volume_fraction,
            "percolating_fraction": self.percolating_fraction, "D_rel": self.d_rel, "tau": tau,
            "tau_percolating": tau_percolating, "iterations": self.iterations, "seconds": round(self.seconds, 3),
        }  # fmt: skip


def solve_phase(
    mask: np.ndarray, *, directions: Sequence[str] = AXES, spacing: Sequence[float] = (1.0, 1.0, 1.0),
    rtol: float = DEFAULT_RTOL, device: str = "cpu", threads: int | None = None,
    report: Callable[[str, int, float, float], None] | None = None,
) -> dict[str, Solution]:  # fmt: skip
    """Transport through a mask (z, y, x) with voxel edges `spacing`, for each direction of `zyx`."""
    fraction = float(np.count_nonzero(mask)) / mask.size
    clusters = Clusters(mask)
    results = {}
    for direction in directions:
        axis, start = AXES.index(direction), time.perf_counter()
        if mask.shape[axis] < 2:
            raise InputError(f"direction {direction}: the volume is 1 voxel thin there; give a volume, not a slice")
        conducting = clusters.percolating(axis)
        percolating = float(np.count_nonzero(conducting)) / mask.size
        if percolating == 0:
            results[direction] = Solution("not percolating", fraction, 0.0, 0.0)
            continue
        import torch

        from hpcres.metrics.transport.sor import solve

        if threads is not None:
            torch.set_num_threads(threads)
        order = [axis, *(a for a in range(3) if a != axis)]
        d_rel, iterations, converged = solve(
            conducting.transpose(order), [spacing[a] for a in order], rtol=rtol, device=device,
            report=None if report is None else lambda *now, d=direction: report(d, *now),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        results[direction] = Solution(
            "converged" if converged else "not converged", fraction, percolating, d_rel if converged else None,
            iterations, seconds,
        )  # fmt: skip
    return results


def choose_device(device: str) -> str:
    """`auto` is the GPU where there is one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def check_memory(shape: Sequence[int], device: str) -> None:
    """InputError where TauFactor would not fit, with the numbers and what to do."""
    from hpcres.metrics.transport.sor import BYTES_PER_VOXEL

    need = prod(shape) * BYTES_PER_VOXEL
    if device == "cuda":
        import torch

        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil
        from distributed.system import MEMORY_LIMIT

        free = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    if need > free:
        edge = int((free / BYTES_PER_VOXEL) ** (1 / 3)) // 16 * 16
        size = " × ".join(map(str, shape))
        raise InputError(
            f"volume of {size} voxels: needs {need / 2**30:.1f} GiB on the {device} ({BYTES_PER_VOXEL} bytes a voxel), "
            f"{free / 2**30:.1f} GiB are free; take a part with --crop 0:{edge},0:{edge},0:{edge}, or a coarser level "
            f"of the store (…/labels.zarr/1)"
        )


def parse_crop(text: str, shape: Sequence[int]) -> Box:
    """`z0:z1,y0:y1,x0:x1` inside `shape`; an empty side (`:`) is the whole axis."""
    parts = text.split(",")
    try:
        sides = [part.split(":") for part in parts]
        ends = [(int(a or 0), int(b or n)) for (a, b), n in zip(sides, shape, strict=True)]
    except ValueError:
        raise InputError(f"--crop {text}: not three ranges; write for example --crop 0:256,0:256,0:256") from None
    for axis, (a, b), n in zip(AXES, ends, shape, strict=True):
        if not 0 <= a < b <= n:
            raise InputError(f"--crop {text}: {axis} {a}:{b} is not inside 0:{n}; choose a range inside")
    return Box(triple([a for a, _ in ends]), triple([b for _, b in ends]))


def tortuosity(
    volume: Volume, *, phases: Sequence[str] | None = None, only: Sequence[str] = (), directions: Sequence[str] = AXES,
    spacing: Sequence[float] | None = None, crop: str | None = None, rtol: float = DEFAULT_RTOL, device: str = "cpu",
    report: Callable[[str, str, int, float, float], None] | None = None,
    finished: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Transport of whole phases of a volume, held in memory: an entry of transport.json.

    phases: names of labels 0, 1, 2, …; `only`: those to solve (all by default). report(phase, direction,
    iterations, D_rel, flux spread) while solving, finished(result) after each.
    """
    box = Box.whole(volume.shape) if crop is None else parse_crop(crop, volume.shape)
    check_memory(box.shape, device)
    labels = volume.read(box)
    names = tuple(phases) if phases is not None else volume.phases
    found = [int(v) for v in np.unique(labels)]
    named = dict(enumerate(names)) if names is not None else {i: str(i) for i in found}
    if unknown := [i for i in found if i not in named]:
        raise InputError(f"{volume.path}: label {unknown[0]} has no phase; the phases are {', '.join(named.values())}")
    for name in only:
        if name not in named.values():
            raise InputError(f"--phase {name}: no such phase; {volume.path} has {', '.join(named.values())}")
    results = []
    for label, name in named.items():
        if only and name not in only:
            continue
        for direction in directions:
            solved = solve_phase(
                labels == label, directions=(direction,), spacing=spacing or volume.voxel_size or (1.0, 1.0, 1.0),
                rtol=rtol, device=device,
                report=None if report is None else lambda *now, n=name: report(n, *now),
            )[direction]  # fmt: skip
            results.append({"phase": name, "label": label, "direction": direction, **solved.as_json()})
            if finished is not None:
                finished(results[-1])
    return {
        "path": volume.path,
        "shape": list(volume.shape),
        "crop": None if crop is None else [[a, b] for a, b in zip(box.start, box.stop, strict=True)],
        "voxel_size": list(spacing or volume.voxel_size or (1.0, 1.0, 1.0)),
        "results": results,
    }
