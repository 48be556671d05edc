"""TauFactor's over-relaxation solver (Kench, Squires & Cooper 2023, JOSS 8, 5358) behind our conventions.

Dirichlet on the two outer faces, half a voxel from the first and last voxel centres; insulated sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from taufactor import AnisotropicSolver, Solver

from hpcres.memory import keep_freed_memory

BYTES_PER_VOXEL = 70
MAX_ITERATIONS = 10_000  # TauFactor's own
Report = Callable[[int, float, float], None]
"""Called every 100 iterations with iterations, D_rel so far, and the spread of the flux over the layers."""


def describe(rtol: float, device: str) -> dict[str, Any]:
    return {
        "name": f"TauFactor {version('taufactor')}",
        "method": "successive over-relaxation, 7-point, Dirichlet on the outer faces, insulated sides, "
        "whole volume in memory, float32",
        "stop": f"flux spread over the layers below {rtol:g}, tau steady to 0.002; this bounds no error of tau",
        "rtol": rtol,
        "device": device,
    }


class _Embedded:
    """TauFactor without its prints, its sort of the whole image, and with our progress."""

    report: Report | None = None

    @staticmethod
    def _check_binary_labels(img: np.ndarray) -> None:
        assert img.dtype == np.uint8, img.dtype

    def _end_simulation(self, *_: Any) -> None:
        pass

    def check_convergence(self, *settings: Any) -> bool:
        done = super().check_convergence(*settings)  # type: ignore[misc]
        if self.report is not None:
            flux: Any = self.flux_1d[0]  # type: ignore[attr-defined]
            self.report(self.iter, float(self.D_rel[0]), float(np.ptp(flux) / flux.max()))  # type: ignore[attr-defined]
        return bool(done)


class _Cubic(_Embedded, Solver):
    pass


class _Stretched(_Embedded, AnisotropicSolver):
    def vertical_flux(self) -> torch.Tensor:
        # The inherited test for insulating voxels (factor > 8) also hits conducting ones where voxels are flat.
        flux = self.field[:, 2:-1, 1:-1, 1:-1] - self.field[:, 1:-2, 1:-1, 1:-1]
        insulating = torch.isinf(self.factor)
        flux[insulating[:, :-1] | insulating[:, 1:]] = 0
        return flux


def solve(
    conducting: np.ndarray, spacing: Sequence[float], *, rtol: float, device: str, report: Report | None = None
) -> tuple[float, int, bool]:
    """(D_rel, iterations, converged) along axis 0 of a mask (axis 0, 1, 2) whose every cluster percolates."""
    if device == "cpu":
        keep_freed_memory()
    image = np.ascontiguousarray(conducting, np.uint8)
    if max(spacing) - min(spacing) < 1e-9 * max(spacing):
        solver: Any = _Cubic(image, device=device)
    else:
        solver = _Stretched(image, tuple(float(h) for h in spacing), device=device)
    solver.report = report
    solver.solve(iter_limit=MAX_ITERATIONS, verbose=False, conv_crit=rtol)
    return float(solver.D_rel[0]), int(solver.iter), bool(solver.converged)
