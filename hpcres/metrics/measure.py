"""Measure label volumes with Dask and lay the numbers out as metrics.json.

metrics.json (schema "hpcres metrics 2"; lengths in `length_unit`, micrometer wherever the voxel size is known):

    schema, command, versions
    volume                what was measured, as below
    reference             the ground truth, measured alike; null where the study names none
    images                the high-res training images in 2D: fractions, areas, normalised TPB, surface (isotropic),
                          planes (see appearance.py)
    low_res               phase fractions of the low-res volume's groups, and `agreement` with the volume
    published             figures of the literature from the study, as they stand there
    notes                 lines on files whose voxel size is not the study's, where it lets them be
    absent_chunks         [{path, absent, chunks, fill_value}] of the arrays that lack chunks (volumes/absent.py)

    volume: path, provenance (of the store), shape [z, y, x], periodic [axes whose sides meet],
        voxel_size [z, y, x] and voxel_unit, length_unit, phases [{label, name}],
        counts {voxels {phase: n}, faces {"a|b": [z, y, x]}, edges {"a|b|c": [z, y, x]}, all_faces, all_edges},
        volume_fraction {phase: share},
        specific_surface_area {unit, faces {phase: value}, crofton {phase: value}},
        interphase_area {"a|b": share of all interior faces},
        tpb {unit, density, normalised, by_phases {"a|b|c": {density, normalised}}},
        subvolumes (see subvolumes.py), statistics (see statistics.py), appearance (of a study; see appearance.py)

An edge where four phases meet is counted once in `tpb` and stands in `by_phases` under its four names only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcres import __version__
from hpcres.counting import counts, totals
from hpcres.counting.counts import Rim
from hpcres.counting.named import Named, described, summary
from hpcres.counting.slices import slice_statistics
from hpcres.counting.totals import Counts
from hpcres.errors import InputError, Unfinished
from hpcres.geometry import AXES, Box, Periodic, Triple, blocks, following
from hpcres.lengths import VoxelEdges, cubic
from hpcres.metrics.appearance import appearance, appearance_of_images
from hpcres.metrics.schedule import Source, block_shape, block_voxels, follow, slabs, submit_with_neighbours, threads_of
from hpcres.metrics.statistics import measure_statistics
from hpcres.metrics.subvolumes import Distributions, subvolumes
from hpcres.study import HighRes, Metrics, Study, SubVolumes
from hpcres.volumes.formats import open_volume, read_images
from hpcres.volumes.images import images_by_plane
from hpcres.volumes.phases import PhaseMap, open_low_res
from hpcres.volumes.sizes import compare_sizes
from hpcres.volumes.volume import NotALabel, Volume

if TYPE_CHECKING:
    from distributed import Client

SCHEMA = "hpcres metrics 2"
OPEN = (False, False, False)
"""No axis is periodic: the volume's outer faces part nothing."""
_FAN_IN = 32


@dataclass(frozen=True)
class Failure:
    """A block that could not be read, and why."""

    box: Box
    why: str


Part = tuple[Counts, tuple[Failure, ...]]
Leaf = tuple[Counts, Rim] | Failure


class _Unreadable(Exception):
    """Signal that a slab could not be read, past the kernel that asked for it; the message says why."""


def _slabs(volume: Volume, box: Box, read: Callable[[Box], np.ndarray]) -> Iterator[np.ndarray]:
    for slab in slabs(box, volume.chunks, volume.dtype.itemsize):
        try:
            yield read(slab)
        except NotALabel:
            raise  # no block of it can be counted
        except (InputError, OSError, RuntimeError) as error:
            raise _Unreadable(" ".join(str(error).split())) from error


def _count_inner(box: Box, source: Source, labels: tuple[int, ...] | None) -> Leaf:
    volume = source.open()
    try:
        try:
            # What was never written is no phase, so it is looked for only where counting meets an unknown label.
            read = volume.read if labels is None else volume.read_unwritten
            return counts.count_inner(_slabs(volume, box, read), labels)
        except NotALabel:
            raise
        except InputError:
            return counts.count_inner(_slabs(volume, box, volume.read), labels)
    except _Unreadable as error:
        return Failure(box, str(error))
    except NotALabel:
        raise
    except InputError as error:
        raise InputError(f"{volume.path}: {error}") from None


def _count_rim(own: Leaf, beyond: Mapping[Triple, Leaf], path: str, labels: tuple[int, ...] | None) -> Part:
    if isinstance(own, Failure):
        return Counts(), (own,)
    inner, rim = own
    rims = {place: leaf[1] for place, leaf in beyond.items() if not isinstance(leaf, Failure)}
    if len(rims) < len(beyond):
        return inner, ()
    try:
        return totals.add(inner, counts.count_rim(rim, rims, labels)), ()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _add_parts(parts: Sequence[Part]) -> Part:
    return totals.add_all([c for c, _ in parts]), tuple(f for _, failures in parts for f in failures)


def count_volume(
    volume: Volume,
    *,
    client: Client,
    labels: Sequence[int] | None = None,
    periodic: Periodic = OPEN,
    block: Triple | None = None,
    progress: bool = True,
) -> Counts:
    """Count a whole volume.

    Each block is read once, and the counts are added up in a tree. The result is the same for any `block`.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    client : Client
        Dask client.
    labels : sequence of int, optional
        Labels that may occur; by default those that are found.
    periodic : tuple of bool
        Axes z, y, x whose two sides meet. Along such an axis the faces and edges between the last plane and the first
        count too.
    block : Triple, optional
        Shape of a block; by default one that follows from chunks and threads.
    progress : bool
        Whether to show progress.

    Returns
    -------
    Counts

    Raises
    ------
    Unfinished
        Some blocks could not be read; the message names them.
    InputError
        A label is not among `labels`, or there are too many labels.
    """
    limit = block_voxels(volume.shape, volume.dtype.itemsize, threads_of(client))
    boxes = blocks(volume.shape, block or block_shape(volume.shape, volume.chunks, limit))
    known = None if labels is None else tuple(labels)
    leaves = submit_with_neighbours(
        client,
        _count_inner,
        _count_rim,
        boxes,
        following(boxes, volume.shape, periodic),
        {"source": Source.of(volume), "labels": known},
        {"path": volume.path, "labels": known},
    )
    level = leaves
    while len(level) > 1:
        groups = [level[i : i + _FAN_IN] for i in range(0, len(level), _FAN_IN)]
        level = [client.submit(_add_parts, group, pure=False) for group in groups]
    follow(leaves, f"counting {Path(volume.path).name}", progress)
    total, failures = level[0].result()
    if failures:
        listed = ", ".join(str(f.box) for f in failures[:8]) + (", …" if len(failures) > 8 else "")
        raise Unfinished(
            f"{volume.path}: {len(failures)} of {len(boxes)} blocks could not be read ({listed}): {failures[0].why}"
        )
    return total


@dataclass(frozen=True)
class Work:
    """What does the measuring, and how.

    Parameters
    ----------
    client : Client
        Dask client.
    block : Triple, optional
        Shape of a block; by default one that follows from chunks and threads.
    scratch : Path, optional
        A folder for the statistics that all workers see.
    progress : bool
        Whether to show progress.
    """

    client: Client
    block: Triple | None = None
    scratch: Path | None = None
    progress: bool = True


@dataclass(frozen=True)
class Sampling:
    """Random places at which a volume is measured again.

    Parameters
    ----------
    subvolumes : SubVolumes, optional
        The random sub-volumes; None for none.
    seed : int
        Seed of the sub-volumes and of the representative-volume curve.
    within : sequence of int, optional
        Draw the sub-volumes inside this shape, so that two volumes are compared at the same places.
    """

    subvolumes: SubVolumes | None = None
    seed: int = 0
    within: Sequence[int] | None = None


def measure(
    volume: Volume,
    work: Work,
    *,
    phases: Sequence[str] | None = None,
    voxel_size: VoxelEdges | None = None,
    periodic: Periodic = OPEN,
    sampling: Sampling | None = None,
    statistics: Metrics | None = None,
) -> dict[str, Any]:
    """Measure one volume: everything that metrics.json holds in its `volume` entry.

    Parameters
    ----------
    volume : Volume
        Labels (z, y, x).
    work : Work
        Dask client, blocks, scratch folder, progress.
    phases : sequence of str, optional
        Names of labels 0, 1, 2, …; by default what the file knows, else the labels as they are found.
    voxel_size : VoxelEdges, optional
        By default what the file says, else one voxel.
    periodic : tuple of bool
        Axes z, y, x whose two sides meet. Sub-volumes and statistics stay inside the volume in any case.
    sampling : Sampling, optional
        Sub-volumes and their seed; by default there are none, and the seed is 0.
    statistics : Metrics, optional
        Which statistics to compute, and how; None for none.

    Returns
    -------
    dict
        The `volume` entry.

    Raises
    ------
    InputError
        The voxel size has only some of the edges, or a label has no phase.
    Unfinished
        Some blocks could not be read.
    """
    size, unit = (voxel_size or volume.edges).lengths(volume.path)
    names = tuple(phases) if phases is not None else volume.phases
    known = None if names is None else tuple(range(len(names)))
    client, block, progress = work.client, work.block, work.progress
    total = count_volume(volume, client=client, labels=known, periodic=periodic, block=block, progress=progress)
    named = Named(dict(enumerate(names)) if names is not None else {i: str(i) for i in total.labels}, size, unit)
    result = {
        "path": volume.place,
        "provenance": volume.provenance,
        "shape": list(volume.shape),
        "periodic": [axis for axis, wraps in zip(AXES, periodic, strict=True) if wraps],
        **described(total, named),
    }
    sampling = sampling or Sampling()
    settings = sampling.subvolumes
    if settings is not None and settings.count:
        spread = subvolumes(
            volume,
            client=client,
            labels=tuple(named.phases),
            settings=settings,
            seed=sampling.seed,
            within=sampling.within,
            lengths=named.lengths,
            progress=progress,
        )
        result["subvolumes"] = _named_distributions(spread, named)
    if statistics is not None:
        result["statistics"] = measure_statistics(
            volume,
            named,
            statistics,
            client=client,
            seed=sampling.seed,
            block=block,
            scratch=work.scratch,
            progress=progress,
        )
    return result


def _named_distributions(spread: Distributions, named: Named) -> dict[str, Any]:
    if spread.skipped:
        return {"skipped": spread.skipped}
    result: dict[str, Any] = {
        "voxels": spread.edge,
        "count": len(spread.starts),
        "seed": spread.seed,
        "starts": [list(s) for s in spread.starts],
    }
    result |= named.values({m: {k: summary(v) for k, v in keys.items()} for m, keys in spread.values.items()})
    if spread.transport:
        result["transport"] = {
            named.phases[label]: {
                direction: {
                    "D_rel": summary([s.D_rel for s in solutions if s.D_rel is not None]),
                    # Only where the phase percolates; tau of the other cubes is infinite.
                    "tau": summary([s.tau for s in solutions if s.percolates and s.tau is not None]),
                    "percolating": sum(s.percolates for s in solutions),
                    "count": len(solutions),
                }
                for direction, solutions in by_direction.items()
            }
            for label, by_direction in spread.transport.items()
        }
    return result


def measure_study(
    study: Study, volume: Volume, *, client: Client, periodic: Periodic = OPEN, progress: bool = True, command: str = ""
) -> dict[str, Any]:
    """Measure a study: the volume, its reference, the training images and the low-res agreement.

    Parameters
    ----------
    study : Study
        The study.
    volume : Volume
        The volume that was made with the study.
    client : Client
        Dask client.
    periodic : tuple of bool
        Axes z, y, x of the volume whose two sides meet.
    progress : bool
        Whether to show progress.
    command : str
        The command line, for the header.

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    InputError
        The phases of the volume are not those of the study.
    """
    reference = None if study.reference.volume is None else open_volume(study.reference.volume)
    low_res = None if study.low_res is None else open_low_res(study.low_res)
    within = None
    if reference is not None:
        within = [min(a, b) for a, b in zip(volume.shape, reference.shape, strict=True)]
    size = cubic(study.high_res.voxel_size)
    if volume.phases is not None and volume.phases != study.phases:
        raise InputError(
            f"{volume.path}: has phases {', '.join(volume.phases)}, the study {', '.join(study.phases)}; "
            f"measure it with the study that made it"
        )

    notes = compare_sizes(study, low_res=low_res, high_res=[volume], images=True, reference=True)

    def measured(one: Volume, periodic: Periodic = OPEN) -> dict[str, Any]:
        return measure(
            one,
            Work(client, scratch=study.folder, progress=progress),
            phases=study.phases,
            voxel_size=size,
            periodic=periodic,
            sampling=Sampling(study.metrics.subvolumes, study.seed, within),
            statistics=study.metrics,
        )

    from hpcres.metrics.agreement import agreement  # torch; measuring a bare volume does without

    images = bool(study.high_res.images)
    planes = images_by_plane(study.high_res) if images else {}
    seen = {plane: slice_statistics(stacks, len(study.phases)) for plane, stacks in planes.items()}

    def compared(one: Volume, periodic: Periodic = OPEN) -> dict[str, Any]:
        found = measured(one, periodic)
        if images:
            found["appearance"] = appearance(one, study.high_res, seen, client=client, progress=progress)
        return found

    return {
        **header(command),
        "study": study.name,
        "volume": compared(volume, periodic),
        "reference": None if reference is None else compared(reference),
        "images": (
            {**measure_images(study.high_res), "planes": appearance_of_images(study.high_res)} if images else None
        ),
        "low_res": (None if low_res is None else agreement(study, low_res, volume, client=client, progress=progress)),
        "published": [p.model_dump(mode="json") for p in study.reference.published],
        **({"notes": notes} if notes else {}),
    }


def measure_images(high_res: HighRes) -> dict[str, Any]:
    """Measure the training images with the same kernels, slice by slice, in 2D.

    Interphase areas and normalised TPB are shares of the in-plane faces and of the edges normal to the plane. For an
    isotropic material they are those of the volume, and so is 3/2 of the in-plane surface.

    Parameters
    ----------
    high_res : HighRes
        The study's high-res images and their phases.

    Returns
    -------
    dict
        The `images` entry of metrics.json without `planes`.
    """
    names = tuple(high_res.phases.values())
    phase_map = PhaseMap(tuple(high_res.phases), "")
    total = Counts()
    for image in high_res.images:
        phase_map.where = image.path
        for one in read_images(image.path):
            total = totals.add(total, counts.count(phase_map.index(one[None]), labels=range(len(names))))
    named = Named(dict(enumerate(names)), *cubic(high_res.voxel_size).lengths("high_res"))
    found = described(total, named)
    keep = ("voxel_size", "voxel_unit", "length_unit", "volume_fraction", "interphase_area")
    surface = found["specific_surface_area"]
    return {
        "paths": [os.path.abspath(image.path) for image in high_res.images],
        "pixels": sum(total.voxels.values()),
        "isotropic": high_res.isotropic,
        **{key: found[key] for key in keep},
        "specific_surface_area": {
            "unit": surface["unit"],
            **{kind: {k: 1.5 * v for k, v in surface[kind].items()} for kind in ("faces", "crofton")},
        },
        "tpb": {"normalised": found["tpb"]["normalised"]},
    }


def header(command: str = "") -> dict[str, Any]:
    """Return the head of a metrics.json: schema, version of hpcres and command."""
    return {"schema": SCHEMA, "hpcres": __version__, "command": command}


def is_of(file: Path, volume: Volume) -> bool:
    """Tell whether a metrics.json is of this volume, by its path; False for a file that cannot be read."""
    if not file.is_file():  # to read from a pipe would be to wait
        return False
    try:
        return json.loads(file.read_text(encoding="utf-8"))["volume"]["path"] == os.path.abspath(volume.path)
    except (OSError, ValueError, KeyError, TypeError):
        return False
