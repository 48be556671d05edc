"""Transport through phases: relative diffusivity D_rel, tortuosity factor tau, the whole volume at once.

The model is steady diffusion, 7-point finite volumes with harmonic face conductances. The two outer faces along a
direction are at potentials 0 and 1, half a voxel from the first and last voxel centres; sides are insulated or
periodic. With several conducting phases D_rel is relative to conductivity 1, and tau = mean conductivity of the
volume / D_rel; for one phase of conductivity 1 that is volume fraction / D_rel.

transport.json (schema "hpcres transport 2"):

    schema, hpcres, command
    solver                name, method with its boundary, stop, rtol, periodic [axes]
    volume, reference     path, shape, digest (see `results`), crop and voxel_size (null where they differ among the
                          results, crop also for the whole volume), results; reference null without one
    absent_chunks         as in metrics.json
    results               [{phase, labels, conductivity {name: value} or null, direction, settings {rtol, periodic,
                          crop, voxel_size, profile, blocks of an estimate}, state, volume_fraction,
                          percolating_fraction, clusters_left_out, voxels_left_out, D_rel, error, tau,
                          tau_percolating, iterations, seconds, bytes, profile or null}]

state is "converged"; "not percolating" (D_rel 0, tau null, which means infinite); "not converged" (both null); or
"estimate" (of blocks alone: no error, and D_rel 0 does not say that nothing percolates; `estimate` then has their
edge, number, mean_D_rel, and how far off such numbers are).
D_rel is an upper bound, and `error` the estimate of how much it is too high, as a share of it. tau takes the whole
volume fraction, tau_percolating that of the clusters which touch both faces; voxels_left_out is what is in the others.
profile: tau of each layer along the direction (see `voxels.tau_of_layers`), on request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpcres.cores import cores
from hpcres.errors import InputError
from hpcres.geometry import AXES, Box, triple
from hpcres.memory import free_bytes
from hpcres.volumes.volume import Volume

SCHEMA = "hpcres transport 2"
DEFAULT_RTOL = 1e-3
INSULATED = (False, False, False)
BLOCK_VOXELS = 64  # edge of the blocks of an estimate
Report = Callable[[str, int, float, float], None]
"""Called after every iteration with direction, iterations, D_rel so far and its estimated error."""


@dataclass(frozen=True)
class Solution:
    """Transport along one direction; dimensionless."""

    state: Literal["converged", "not percolating", "not converged", "estimate"]
    volume_fraction: float
    percolating_fraction: float | None
    d_rel: float | None
    error: float | None = None
    conductivity: float = 0.0  # mean over the volume, and of what percolates
    percolating_conductivity: float | None = 0.0
    clusters_left_out: int = 0
    voxels_left_out: int = 0
    iterations: int = 0
    seconds: float = 0.0
    bytes: int = 0
    profile: tuple[float, ...] | None = None

    @property
    def percolates(self) -> bool:
        """False where the state is "not percolating"."""
        return self.state != "not percolating"

    @property
    def tau(self) -> float | None:
        """Mean conductivity of the volume / D_rel; inf where D_rel is 0, None where it is not known."""
        return self._tau(self.conductivity)

    @property
    def tau_percolating(self) -> float | None:
        """Mean conductivity of what percolates / D_rel; inf where D_rel is 0, None where it is not known."""
        return self._tau(self.percolating_conductivity)

    def _tau(self, conductivity: float | None) -> float | None:
        if self.d_rel is None or conductivity is None:
            return None
        return conductivity / self.d_rel if self.d_rel > 0 else inf

    def as_json(self) -> dict[str, Any]:
        """Return the entries of a result in transport.json.

        JSON has no infinity: tau is null where the state says "not percolating".
        """
        tau, tau_percolating = (None if t in (None, inf) else t for t in (self.tau, self.tau_percolating))
        return {
            "state": self.state,
            "volume_fraction": self.volume_fraction,
            "percolating_fraction": self.percolating_fraction,
            "clusters_left_out": self.clusters_left_out,
            "voxels_left_out": self.voxels_left_out,
            "D_rel": self.d_rel,
            "error": self.error,
            "tau": tau,
            "tau_percolating": tau_percolating,
            "iterations": self.iterations,
            "seconds": round(self.seconds, 3),
            "bytes": self.bytes,
            "profile": None if self.profile is None else list(self.profile),
        }


def solve_phase(mask: np.ndarray, **settings: Any) -> dict[str, Solution]:
    """Solve transport through a mask (z, y, x), for each direction; settings as of `solve`."""
    return solve(np.asarray(mask, bool).view(np.uint8), {1: 1.0}, **settings)


def solve(
    labels: np.ndarray,
    conductivity: Mapping[int, float],
    *,
    directions: Sequence[str] = AXES,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    periodic: Sequence[bool] = INSULATED,
    rtol: float = DEFAULT_RTOL,
    threads: int | None = None,
    profile: bool = False,
    report: Report | None = None,
    keep: Callable[[str, Any, np.ndarray, Mapping[int, float]], None] | None = None,
    device: Any = None,
) -> dict[str, Solution]:
    """Solve transport through labels, for each direction.

    The result is the same bits for any number of threads.

    Parameters
    ----------
    labels : np.ndarray
        uint8 (z, y, x).
    conductivity : mapping
        Positive conductivities of the labels that conduct.
    directions : sequence of str
        Any of z, y, x.
    spacing : sequence of float
        Voxel edges z, y, x.
    periodic : sequence of bool
        Axes z, y, x whose two sides meet, where they are not the direction's own.
    rtol : float
        Estimated relative error of D_rel at which a solve stops.
    threads : int, optional
        By default all cores.
    profile : bool
        Whether to compute tau of each layer.
    report : callable, optional
        Called after every iteration (see `Report`).
    keep : callable, optional
        keep(direction, system, potential, conductivity) gets what was solved.
    device : torch.device, optional
        Device to solve on, after set-up on the cores.

    Returns
    -------
    dict
        A `Solution` for each direction.

    Raises
    ------
    InputError
        The solve would not fit in memory.
    """
    # Compiled kernels; not needed to read a result.
    from hpcres.transport.percolation import Clusters
    from hpcres.transport.threads import Threads
    from hpcres.transport.voxels import by_label, pack

    assert labels.dtype == np.uint8, labels.dtype
    assert all(k > 0 for k in conductivity.values()), conductivity
    conducts, of_label, resistance, unit = by_label(conductivity)
    uniform = resistance is None
    results = {}
    with Threads(threads or cores()) as pool:
        counted = sum(pool.each(lambda a, b: np.bincount(labels[a:b].reshape(-1), minlength=256), len(labels), 16))
        fraction, mean = float(counted[conducts].sum()) / labels.size, float(counted @ of_label) / labels.size
        found: tuple[tuple[bool, ...], Any] | None = None
        for direction in directions:
            progress = None if report is None else partial(_scaled, report, direction, unit)
            axis, start = AXES.index(direction), time.perf_counter()
            # An axis of one voxel meets itself, which changes nothing.
            sides = tuple(bool(p) and a != axis and labels.shape[a] > 1 for a, p in enumerate(periodic))
            if found is None or found[0] != sides:
                found = sides, Clusters(pack(labels, conducts, pool), labels.shape, sides, pool)
            through = found[1].through(axis)
            left_out: dict[str, Any] = {
                "clusters_left_out": through.clusters_left_out,
                "voxels_left_out": through.voxels_left_out,
            }
            if through.voxels == 0:
                seconds = time.perf_counter() - start
                results[direction] = Solution(
                    "not percolating", fraction, 0.0, 0.0, 0.0, mean, 0.0, **left_out, seconds=seconds
                )
                continue
            if direction == directions[-1]:
                found = None
            share = through.voxels / labels.size
            make = partial(_system, labels, through.bits, share, spacing, axis, sides, pool, resistance, device)
            system = make(in_float64=False)
            solved, potential = system.solve(rtol, report=progress)
            if not solved.converged and system.form.dtype is np.float32:
                del system, potential
                system = make(in_float64=True)
                solved, potential = system.solve(rtol, report=progress)
            kept = share * unit if uniform else system.mean_conductivity(of_label)
            layers = None
            if profile:
                layers = tuple(float(t) for t in system.profile(potential, of_label))
            if keep is not None:
                keep(direction, system, potential, conductivity)
            results[direction] = Solution(
                "converged" if solved.converged else "not converged",
                fraction,
                share,
                solved.d_rel * unit if solved.converged else None,
                solved.error if solved.converged else None,
                mean,
                kept,
                **left_out,
                iterations=solved.iterations,
                seconds=time.perf_counter() - start,
                bytes=solved.bytes + (labels.nbytes if device is None else 0),
                profile=layers,
            )
            del system, potential  # before the next direction's
    return results


def _system(
    labels: np.ndarray,
    bits: np.ndarray,
    share: float,
    spacing: Sequence[float],
    axis: int,
    sides: tuple[bool, ...],
    pool: Any,
    resistance: np.ndarray | None,
    device: Any,
    in_float64: bool,
) -> Any:
    """Make the system of the conducting voxels in `bits`, a `share` of all.

    InputError is raised where the system would not fit in memory.
    """
    from hpcres.transport.form import Form
    from hpcres.transport.multigrid import System
    from hpcres.transport.voxels import pack, unpacked

    odd = [a for a in range(3) if sides[a] and labels.shape[a] % 2]
    form = Form.of(labels.shape, spacing, resistance, in_float64)
    vectors, levels = float(form.bytes_of_vectors), form.bytes_of_levels(labels.shape)
    check_memory(labels.shape, share, odd, held=(vectors if device is None else 0.0, levels))
    if odd:
        # Red and black meet nowhere around an odd number of voxels: twice the volume is the same system.
        mask = unpacked(bits, labels.shape)
        for a in odd:
            mask, labels = (np.concatenate([v, v], axis=a) for v in (mask, labels))
        bits = pack(mask, np.arange(256) > 0, pool)
    make: Any = System
    if device is not None:
        from hpcres.transport.device import DeviceSystem, check_device_memory

        voxels = round(share * labels.size)
        check_device_memory(device, labels.shape, voxels, form.several, vectors + LEFT_OF_SET_UP * levels)
        make = partial(DeviceSystem, device)
    of_voxels = None if resistance is None else labels
    return make(bits, labels.shape, spacing, axis, sides, pool, of_voxels, resistance, in_float64=in_float64)


def _scaled(report: Report, direction: str, unit: float, iterations: int, d_rel: float, error: float) -> None:
    report(direction, iterations, d_rel * unit, error)


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


BYTES_PER_VOXEL = 2.0  # labels, bits, cells
BYTES_OF_CUBIC = (16.0, 19.5)  # of vectors and coarse levels for a conducting voxel, in the plain form
LEFT_OF_SET_UP = 0.68  # share of the coarse levels' bytes that is still held after their set-up


def check_memory(
    shape: Sequence[int],
    conducting: float | None = None,
    doubled: Sequence[int] = (),
    on_node: int = 1,
    held: tuple[float, float] = BYTES_OF_CUBIC,
) -> None:
    """Raise InputError where the solve would not fit in memory, with the numbers and what to do.

    Parameters
    ----------
    shape : sequence of int
        Voxels z, y, x.
    conducting : float, optional
        Share of the voxels that conduct, once it is known, with labels in memory; until then 0.4 is assumed.
    doubled : sequence of int
        Axes along which the volume is solved twice over.
    on_node : int
        Processes that each need as much on this node.
    held : tuple of float
        Bytes of vectors and of coarse levels for a conducting voxel (see `form.Form`).

    Raises
    ------
    InputError
        The solve needs more memory than is free.
    """
    share = 0.4 if conducting is None else conducting
    per_voxel = BYTES_PER_VOXEL + sum(held) * share
    per_voxel *= 2 ** len(doubled)
    need, free = prod(shape) * per_voxel, free_bytes() / on_node
    if need > free:
        edge = int((free / per_voxel) ** (1 / 3)) // 16 * 16
        size = " × ".join(map(str, shape))
        odd = "".join(f", twice over along {AXES[a]} because {shape[a]} is odd and periodic" for a in doubled)
        raise InputError(
            f"volume of {size} voxels: needs {need / 2**30:.1f} GiB of memory ({per_voxel:.0f} bytes a voxel where "
            f"{share:.0%} conduct{odd}), {free / 2**30:.1f} GiB are free; solve it out of core with `memory`, "
            f"or on more nodes with mpirun, or take a part with `crop` 0:{edge},0:{edge},0:{edge}"
        )


def parse_crop(text: str, shape: Sequence[int]) -> Box:
    """Parse `z0:z1,y0:y1,x0:x1` inside `shape`; an empty side (`:`) is the whole axis.

    Parameters
    ----------
    text : str
        The crop as the user writes it.
    shape : sequence of int
        Shape of the volume (z, y, x).

    Returns
    -------
    Box

    Raises
    ------
    InputError
        The text is not three ranges, or a range is empty or not inside the volume.
    """
    parts = text.split(",")
    try:
        sides = [part.split(":") for part in parts]
        ends = [(int(a or 0), int(b or n)) for (a, b), n in zip(sides, shape, strict=True)]
    except ValueError:
        raise InputError(f"`crop` {text}: not three ranges; write for example 0:256,0:256,0:256") from None
    for axis, (a, b), n in zip(AXES, ends, shape, strict=True):
        if not 0 <= a < b <= n:
            raise InputError(f"`crop` {text}: {axis} {a}:{b} is not inside 0:{n}; choose a range inside")
    return Box(triple([a for a, _ in ends]), triple([b for _, b in ends]))


def tortuosity(
    volume: Volume,
    *,
    phases: Sequence[str] | None = None,
    only: Sequence[str] = (),
    conductivity: Mapping[str, float] | None = None,
    directions: Sequence[str] = AXES,
    spacing: Sequence[float] | None = None,
    periodic: Sequence[bool] = INSULATED,
    crop: str | None = None,
    rtol: float = DEFAULT_RTOL,
    threads: int | None = None,
    profile: bool = False,
    report: Callable[[str, str, int, float, float], None] | None = None,
    finished: Callable[[dict[str, Any]], None] | None = None,
    solved: Callable[[Mapping[str, Any]], dict[str, Any] | None] | None = None,
    field: str | None = None,
    overwrite: bool = False,
    comm: Any = None,
    on_node: int = 1,
    memory: int | None = None,
    scratch: Path | None = None,
    say: Callable[[str], None] | None = None,
    estimate: int | None = None,
    device: Any = None,
) -> dict[str, Any]:
    """Solve transport of whole phases of a volume.

    The volume is solved in one of four ways. With `comm` its ranks hold the volume. With `memory` it is solved out of
    core where the process would hold more than so many bytes. With `device`, and neither of these, it is solved on that
    device. Else it is held in memory. With `estimate` blocks are solved alone, which is no solution of the volume (see
    `estimate`).

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    phases : sequence of str, optional
        Names of labels 0, 1, 2, …; by default what the file knows, else the labels as they are found.
    only : sequence of str
        The phases to solve, one by one; by default all.
    conductivity : mapping, optional
        Conductivities by phase. The phases it names conduct together, and nothing else does.
    directions : sequence of str
        Any of z, y, x.
    spacing : sequence of float, optional
        Voxel edges z, y, x; by default what the file says, cubic where it says nothing.
    periodic : sequence of bool
        Axes z, y, x whose two sides meet.
    crop : str, optional
        Part of the volume, as of `parse_crop`.
    rtol : float
        Estimated relative error of D_rel at which a solve stops.
    threads : int, optional
        By default all cores.
    profile : bool
        Whether to compute tau of each layer.
    report : callable, optional
        report(phase, direction, iterations, D_rel, estimated error), called while solving.
    finished : callable, optional
        finished(result), called after each solve.
    solved : callable, optional
        solved(what) returns an earlier result of the same phase, labels, conductivity, direction and settings, which is
        then not solved again, or None. It must return the same on every rank.
    field : str, optional
        A store for potential and flux density (see `fields`).
    overwrite : bool
        Passed on to the store.
    comm : optional
        An mpi4py communicator.
    on_node : int
        Number of ranks of `comm` on this node.
    memory : int, optional
        Bytes of memory that the process may hold.
    scratch : Path, optional
        Folder of the scratch files of a solve out of core.
    say : callable, optional
        say(line), called with what a solve out of core takes.
    estimate : int, optional
        Edge of the blocks in voxels.
    device : torch.device, optional
        Device to solve on.

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
    box = Box.whole(volume.shape) if crop is None else parse_crop(crop, volume.shape)
    threads = threads or cores()
    slabs: Any = None
    if comm is not None or memory is not None or estimate is not None:
        from hpcres.transport.slabwise import SlabVolume

        slabs = SlabVolume(
            volume,
            box,
            comm=comm,
            on_node=on_node,
            memory=memory,
            scratch=scratch or Path(),
            threads=threads,
            whole_chunks=field is not None,
            say=say or (lambda line: None),
        )
        found, solve_one = slabs.found, slabs.solve if estimate is None else partial(slabs.estimate, estimate)
    else:
        check_memory(box.shape, held=BYTES_OF_CUBIC if device is None else (0.0, BYTES_OF_CUBIC[1]))
        labels, found = _small_labels(volume.read(box), volume.path)
        solve_one = partial(solve, labels, threads=threads, device=device)
    names = tuple(phases) if phases is not None else volume.phases
    named = dict(enumerate(names)) if names is not None else {i: str(i) for i in found}
    if unknown := [i for i in found if i not in named]:
        raise InputError(f"{volume.path}: label {unknown[0]} has no phase; the phases are {', '.join(named.values())}")
    for name in (*only, *(conductivity or ())):
        if name not in named.values():
            setting = "phase" if name in only else "conductivity"
            raise InputError(f"{setting} {name}: no such phase; {volume.path} has {', '.join(named.values())}")
    # What is solved: a name, its labels, and the conductivities where they were given.
    systems: list[tuple[str, dict[int, float]]]
    if conductivity:
        conducting = {label: conductivity[name] for label, name in named.items() if conductivity.get(name, 0) > 0}
        systems = [(" + ".join(named[label] for label in conducting), conducting)]
    else:
        systems = [(name, {label: 1.0}) for label, name in named.items() if not only or name in only]
    lengths = tuple(spacing or volume.lengths()[0])
    cut = None if crop is None else [[a, b] for a, b in zip(box.start, box.stop, strict=True)]
    settings = {
        "rtol": rtol,
        "periodic": [axis for axis, meets in zip(AXES, periodic, strict=True) if meets],
        "crop": cut,
        "voxel_size": list(lengths),
        "profile": profile,
        "blocks": estimate,
    }
    results = []
    with ExitStack() as stack:
        fields: Any = None
        if field is not None:
            from hpcres.transport.fields import field_writer

            fields = stack.enter_context(field_writer(field, box.shape, lengths, overwrite, comm))
        for name, conducting in systems:
            present = {found[label]: k for label, k in conducting.items() if label in found}
            given = {named[label]: k for label, k in conducting.items()} if conductivity else None
            for direction in directions:
                what = {
                    "phase": name,
                    "labels": list(conducting),
                    "conductivity": given,
                    "direction": direction,
                    "settings": settings,
                }
                if solved is not None and (known := solved(what)) is not None:
                    results.append(known)
                    if finished is not None:
                        finished(known)
                    continue
                if fields is not None:
                    fields.begin(name, direction)
                solution = solve_one(
                    present,
                    directions=(direction,),
                    spacing=lengths,
                    periodic=periodic,
                    rtol=rtol,
                    profile=profile,
                    report=None if report is None else lambda *now, n=name: report(n, *now),
                    keep=None if fields is None else lambda _, *of: fields.write(*of),
                )[direction]
                results.append({**what, **solution.as_json()})
                if estimate is not None:
                    results[-1]["estimate"] = {"edge": estimate, **slabs.estimated(direction)}
                if finished is not None:
                    finished(results[-1])
    return {
        "path": volume.place,
        "shape": list(volume.shape),
        "crop": cut,
        "voxel_size": list(lengths),
        "results": results,
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
