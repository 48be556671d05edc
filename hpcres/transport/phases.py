"""Transport of whole phases of a volume, in memory, on a device, over ranks or out of core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from hpcres.errors import InputError
from hpcres.geometry import AXES, Box
from hpcres.transport.memory_need import BYTES_OF_CUBIC, check_memory
from hpcres.transport.problem import INSULATED, Means, Report, SolveSettings, parse_crop
from hpcres.volumes.volume import Volume

SCHEMA = "hpcres transport 2"
BLOCK_VOXELS = 64  # edge of the blocks of an estimate


@dataclass(frozen=True)
class Conducting:
    """Which phases of a volume conduct.

    Parameters
    ----------
    phases : sequence of str, optional
        Names of labels 0, 1, 2, …; by default what the file knows, else the labels as they are found.
    only : sequence of str
        The phases to solve, one by one; by default all.
    conductivity : mapping, optional
        Conductivities by phase. The phases it names conduct together, and nothing else does.
    """

    phases: Sequence[str] | None = None
    only: Sequence[str] = ()
    conductivity: Mapping[str, float] | None = None

    def systems(self, volume: Volume, found: Mapping[int, int]) -> Iterator[tuple[str, dict[int, float], Any]]:
        """Yield what is solved: a name, its labels with their conductivities, and these by name if they were given.

        Raises
        ------
        InputError
            A label has no phase, or there is no phase of a given name.
        """
        names = tuple(self.phases) if self.phases is not None else volume.phases
        named = dict(enumerate(names)) if names is not None else {i: str(i) for i in found}
        if unknown := [i for i in found if i not in named]:
            raise InputError(
                f"{volume.path}: label {unknown[0]} has no phase; the phases are {', '.join(named.values())}"
            )
        for name in (*self.only, *(self.conductivity or ())):
            if name not in named.values():
                setting = "phase" if name in self.only else "conductivity"
                raise InputError(f"{setting} {name}: no such phase; {volume.path} has {', '.join(named.values())}")
        given = self.conductivity
        if given:
            conducting = {label: given[name] for label, name in named.items() if given.get(name, 0) > 0}
            of_name = {named[label]: k for label, k in conducting.items()}
            yield " + ".join(of_name), conducting, of_name
        else:
            yield from ((name, {i: 1.0}, None) for i, name in named.items() if not self.only or name in self.only)


@dataclass(frozen=True)
class FieldStore:
    """Where potential and flux density are written (see `fields`), and whether a store there is replaced."""

    path: str
    overwrite: bool = False


@dataclass(frozen=True)
class Watch:
    """What is called while phases are solved.

    Parameters
    ----------
    report : callable, optional
        report(phase, direction, iterations, D_rel, estimated error), called while solving.
    finished : callable, optional
        finished(result), called after each solve.
    solved : callable, optional
        solved(what) returns an earlier result of the same phase, labels, conductivity, direction and settings, which is
        then not solved again, or None. It must return the same on every rank.
    """

    report: Callable[[str, str, int, float, float], None] | None = None
    finished: Callable[[dict[str, Any]], None] | None = None
    solved: Callable[[Mapping[str, Any]], dict[str, Any] | None] | None = None

    def of_phase(self, name: str) -> Report | None:
        """Return `report` for one phase."""
        report = self.report
        return None if report is None else lambda *now: report(name, *now)


def tortuosity(
    volume: Volume,
    conducting: Conducting | None = None,
    settings: SolveSettings | None = None,
    means: Means | None = None,
    *,
    crop: str | None = None,
    estimate: int | None = None,
    field: FieldStore | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Solve transport of whole phases of a volume.

    With `estimate` blocks are solved alone, which is no solution of the volume (see `estimate`).

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    conducting : Conducting, optional
        Which phases conduct; by default each of them alone.
    settings : SolveSettings, optional
        Directions, voxel edges, boundaries, exactness; by default all directions, and the voxel edges that the volume
        states, cubic where it states none.
    means : Means, optional
        Processors and memory.
    crop : str, optional
        Part of the volume, as of `parse_crop`.
    estimate : int, optional
        Edge of the blocks in voxels.
    field : FieldStore, optional
        Where potential and flux density are written.
    watch : Watch, optional
        What is called meanwhile.

    Returns
    -------
    dict
        An entry of transport.json.

    Raises
    ------
    InputError
        The crop, a phase or a label is not valid; the file gives some of the voxel edges only; or the solve would not
        fit in memory.
    """
    conducting, means, watch = conducting or Conducting(), means or Means(), watch or Watch()
    settings = settings or SolveSettings()
    lengths = tuple(settings.voxel_size or volume.lengths()[0])
    settings = replace(settings, voxel_size=lengths)
    box = Box.whole(volume.shape) if crop is None else parse_crop(crop, volume.shape)
    solver = _Solver.of(volume, box, means, estimate, whole_chunks=field is not None)
    cut = None if crop is None else [[a, b] for a, b in zip(box.start, box.stop, strict=True)]
    described = {
        "rtol": settings.rtol,
        "periodic": [axis for axis, meets in zip(AXES, settings.periodic, strict=True) if meets],
        "crop": cut,
        "voxel_size": list(lengths),
        "profile": settings.profile,
        "blocks": estimate,
    }
    results = []
    with ExitStack() as stack:
        fields: Any = None
        if field is not None:
            from hpcres.transport.fields import field_writer

            fields = stack.enter_context(field_writer(field.path, box.shape, lengths, field.overwrite, means.comm))
        for name, labels, given in list(conducting.systems(volume, solver.found)):
            for direction in settings.directions:
                what = {
                    "phase": name,
                    "labels": list(labels),
                    "conductivity": given,
                    "direction": direction,
                    "settings": described,
                }
                result = None if watch.solved is None else watch.solved(what)
                if result is None:
                    if fields is not None:
                        fields.begin(name, direction)
                    alone, report = replace(settings, directions=(direction,)), watch.of_phase(name)
                    result = {**what, **solver.solve(labels, alone, report, fields)}
                results.append(result)
                if watch.finished is not None:
                    watch.finished(result)
    return {
        "path": volume.place,
        "shape": list(volume.shape),
        "crop": cut,
        "voxel_size": list(lengths),
        "results": results,
    }


@dataclass(frozen=True)
class _Solver:
    """A way to solve systems of a volume, and the number (uint8) of each label in it."""

    found: Mapping[int, int]
    solve_one: Callable[..., Any]
    slabs: Any
    estimate: int | None

    @classmethod
    def of(cls, volume: Volume, box: Box, means: Means, estimate: int | None, *, whole_chunks: bool) -> _Solver:
        if means.comm is not None or means.memory is not None or estimate is not None:
            from hpcres.transport.slabwise import SlabVolume

            slabs = SlabVolume(volume, box, means, whole_chunks=whole_chunks)
            solve_one = slabs.solve if estimate is None else partial(slabs.estimate, estimate)
            return cls(slabs.found, solve_one, slabs, estimate)
        check_memory(box.shape, held=BYTES_OF_CUBIC if means.device is None else (0.0, BYTES_OF_CUBIC[1]))
        labels, found = _small_labels(volume.read(box), volume.path)
        from hpcres.transport import in_memory  # compiled kernels; not needed to read a result

        solve_one = partial(in_memory.solve, labels, threads=means.threads, device=means.device)
        return cls(found, solve_one, None, None)

    def solve(
        self, labels: Mapping[int, float], settings: SolveSettings, report: Report | None, fields: Any
    ) -> dict[str, Any]:
        """Solve along one direction; return the entries of the result."""
        (direction,) = settings.directions
        present = {self.found[label]: k for label, k in labels.items() if label in self.found}
        keep = None if fields is None else lambda _, *of: fields.write(*of)
        result: dict[str, Any] = self.solve_one(present, settings, report=report, keep=keep)[direction].as_json()
        if self.estimate is not None:
            result["estimate"] = {"edge": self.estimate, **self.slabs.estimated(direction)}
        return result


def describe(rtol: float, periodic: Sequence[bool] = INSULATED, estimate: int | None = None) -> dict[str, Any]:
    """Describe the solver, as the entry `solver` of transport.json.

    Parameters
    ----------
    rtol : float
        Estimated relative error of D_rel at which a solve stops.
    periodic : sequence of bool
        Axes z, y, x whose two sides meet.
    estimate : int, optional
        Edge of the blocks that are solved alone; None for a solution of the volume.

    Returns
    -------
    dict
        name, method, stop, rtol and periodic.
    """
    if estimate is not None:
        from hpcres.transport.estimate import UNRELIABILITY

        return {
            "name": "hpcres",
            "method": f"no solution of the volume: blocks of {estimate}³ voxels solved alone, then as resistors; "
            f"{UNRELIABILITY}",
            "stop": f"estimated error of each block's D_rel below {rtol:g}",
            "rtol": rtol,
            "periodic": [],
        }
    axes = [axis for axis, meets in zip(AXES, periodic, strict=True) if meets]
    sides = f"periodic across {' and '.join(axes)}, else insulated" if axes else "insulated"
    return {
        "name": "hpcres",
        "method": "conjugate gradients with multigrid over aggregates, 7-point, Dirichlet on the outer faces, sides "
        f"{sides}; D_rel from the energy, an upper bound",
        "stop": f"estimated error of D_rel below {rtol:g}",
        "rtol": rtol,
        "periodic": axes,
    }


def _small_labels(labels: np.ndarray, path: str) -> tuple[np.ndarray, dict[int, int]]:
    """Return labels as uint8, and the number that each label has there."""
    if labels.dtype == np.uint8:
        return labels, {int(v): int(v) for v in np.flatnonzero(np.bincount(labels.reshape(-1), minlength=256))}
    values = np.unique(labels)
    if len(values) > 256:
        raise InputError(f"{path}: has {len(values)} different labels; transport is through at most 256 phases")
    small = np.searchsorted(values, labels).astype(np.uint8)
    return small, {int(v): place for place, v in enumerate(values)}
