"""HDF5: a dataset as a volume, with the axes and voxel sizes that ilastik, vigra and Fiji write beside it."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from operator import ge
from pathlib import Path
from typing import Any, NoReturn

import h5py

from hpcres.errors import InputError
from hpcres.geometry import AXES
from hpcres.lengths import UNKNOWN, VoxelEdges, edges_of
from hpcres.volumes.axes import Arrangement, arranged, times
from hpcres.volumes.volume import Volume, corrupt, existing, volume_over

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".nxs")


def hdf5_parts(path: str) -> tuple[str, str] | None:
    """Split `file.h5:/dataset` into file and dataset.

    The dataset is empty where the path names none. The result is None where the file has none of SUFFIXES.
    """
    match = re.fullmatch(rf"(.*(?:{'|'.join(map(re.escape, SUFFIXES))}))(?::(.*))?", path, re.IGNORECASE)
    return (match.group(1), (match.group(2) or "").strip("/")) if match else None


def open_hdf5(path: str, flat: bool = False) -> Volume:
    """Open the dataset that a path names, over soft, external and hard links.

    Parameters
    ----------
    path
        `file.h5:/dataset`.
    flat
        Read training images: one image is a stack of one slice.

    Returns
    -------
    Volume
        The dataset.

    Raises
    ------
    InputError
        Where the file or dataset is missing, locked, damaged or not a 3D volume, a filter is lacking, or voxels were
        never written.
    """
    parts = hdf5_parts(path)
    assert parts
    name, dataset = parts
    if existing(name).is_dir():
        raise InputError(f"{name}: is a folder where an HDF5 file is due; check the path")
    array = _dataset(path, name, dataset, _file(name))
    if array.shape is None:
        raise InputError(f"{path}: is an empty dataset, without shape or values; write the volume to it")
    names = _names(path, array)
    place = arranged(path, array.shape, names, flat)
    lacking = ""

    def why(error: Exception) -> NoReturn:
        if lacking:
            raise InputError(
                f"{path}: is compressed with {lacking}, a filter that this HDF5 does not have; pip install hdf5plugin, "
                "or write it again with gzip"
            ) from None
        corrupt(path, error)

    volume = volume_over(path, array, array.chunks, arrangement=place, edges=_edges(path, array, names, place), why=why)
    for of, part in _stored(path, array):
        _refuse_unwritten(path, of, part)
        if missing := _lacking_filters(part):
            lacking = missing
            try:
                part[tuple(part.id.get_chunk_info(0).chunk_offset)]  # writers may leave out an optional filter
            except OSError as error:
                why(error)
    return volume


def unwritten_chunks(path: str) -> tuple[dict[Any, int], int]:
    """Count the chunks of a dataset, or of the sources of a virtual one, that were never written.

    Parameters
    ----------
    path
        `file.h5:/dataset`.

    Returns
    -------
    unwritten : dict
        For each fill value, which HDF5 reads for such voxels, the number of chunks.
    chunks : int
        Number of all chunks; 0 for datasets without chunks.
    """
    unwritten: Counter[Any] = Counter()
    chunks = 0
    name, dataset = hdf5_parts(path) or (path, "")
    with _file(name) as file:
        for _, part in _stored(path, file[dataset]):
            if part.chunks:
                grid = prod(-(-n // edge) for n, edge in zip(part.shape, part.chunks, strict=True))
                unwritten[part.fillvalue.item()] += grid - part.id.get_num_chunks()
                chunks += grid
    return +unwritten, chunks


def _file(name: str) -> Any:
    try:
        return h5py.File(name, "r")
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise InputError(f"{name}: no permission to read it; check its owner and mode") from None
        if "unable to lock file" in str(error) and error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise InputError(
                f"{name}: its file system has no locks; set HDF5_USE_FILE_LOCKING=FALSE, or read a copy"
            ) from None
        if "unable to lock file" in str(error) or error.errno == errno.EAGAIN:
            raise InputError(
                f"{name}: is locked, another program has it open for writing; close it there, or read a copy"
            ) from None
        if "already open for write" in str(error):
            raise InputError(
                f"{name}: is marked as open for writing, by a program that runs or was stopped; close it there, or run "
                f"h5clear -s {name} where none does"
            ) from None
        corrupt(name, error)


def _dataset(path: str, name: str, dataset: str, file: Any) -> Any:
    _refuse_broken_link(path, name, dataset, file)
    found = file.get(dataset) if dataset else None
    if isinstance(found, h5py.Dataset):
        return found
    datasets: list[str] = []
    file.visititems(lambda key, item: datasets.append(key) if isinstance(item, h5py.Dataset) else None)
    candidates = ", ".join(f"/{key}" for key in datasets[:8]) or "none at all"
    what = f"no dataset /{dataset} in it" if dataset else "names no dataset"
    raise InputError(f"{path}: {what}; it has {candidates}; write {name}:{'/' + datasets[0] if datasets else '/NAME'}")


def _refuse_broken_link(path: str, name: str, dataset: str, file: Any) -> None:
    """Raise InputError where a link on the way to the dataset leads nowhere, and say where it leads."""
    place, steps = "", [step for step in dataset.split("/") if step]
    for step in steps:
        group, place = file[place or "/"], f"{place}/{step}"
        if not isinstance(group, h5py.Group):
            return
        link = group.get(step, getlink=True)
        try:
            group[step]
        except (KeyError, OSError) as error:
            if isinstance(link, h5py.ExternalLink):
                raise InputError(
                    f"{path}: {place} is a link to {link.filename}:{link.path}, which is not there or cannot be read "
                    f"({' '.join(str(error).split())[:120]}); put the file beside {name}"
                ) from None
            if isinstance(link, h5py.SoftLink):
                raise InputError(
                    f"{path}: {place} is a link to {link.path}, which is not in it; name the dataset itself"
                ) from None
            return


def _stored(
    path: str, array: Any, of: str = "", shapes: dict[tuple[str, ...], tuple[int, ...]] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield each dataset that holds voxels of `array`, once: the array itself, or the sources of a virtual one in turn.

    Parameters
    ----------
    path
        Path of the volume, for messages.
    array : h5py.Dataset
        Dataset, which may be virtual.
    of
        Name of the array for messages, empty for the array that the path names.
    shapes
        Shapes of the sources that have been opened.

    Yields
    ------
    name : str
        Name of the dataset for messages, empty for the array itself.
    dataset : h5py.Dataset
        Dataset that holds voxels.

    Raises
    ------
    InputError
        Where a source is missing or too small, or where the sources do not cover the virtual dataset: HDF5 reads such
        voxels as the fill value.
    """
    shapes = {} if shapes is None else shapes
    if not array.is_virtual:
        yield of, array
        return
    _refuse_uncovered(path, of, array)
    for source in array.virtual_sources():
        # %b is the number of a block, from 0 on; HDF5 takes as many blocks as there are.
        file, inside = (text.replace("%b", "0").replace("%%", "%") for text in (source.file_name, source.dset_name))
        where, key = f"{file}:/{inside.strip('/')}", (array.file.filename, file, inside)
        if key not in shapes:
            with contextlib.ExitStack() as opened:
                try:
                    parent = array.file
                    parent = parent if file == "." else opened.enter_context(h5py.File(_source_file(array, file), "r"))
                except OSError as error:
                    what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
                    raise InputError(
                        f"{path}: {of}is a virtual dataset whose source {where} {' '.join(what.split())}; put it back, "
                        "or its voxels would be read as the fill value"
                    ) from None
                found = parent.get(inside)
                if not isinstance(found, h5py.Dataset):
                    raise InputError(
                        f"{path}: {of}is a virtual dataset whose source {where} has no such dataset; put it back"
                    )
                shapes[key] = found.shape
                yield from _stored(path, found, f"source {where}: ", shapes)
        if (due := _too_small(source, shapes[key])) is not None:
            raise InputError(
                f"{path}: {of}is a virtual dataset whose source {where} has {times(shapes[key])} voxels where {due} "
                "are due; put the whole source back"
            )


def _too_small(source: Any, shape: tuple[int, ...]) -> str | None:
    """Return the voxels that a virtual dataset takes from a source of `shape`, or None if the source has them all."""
    space = source.src_space
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        due = source.vspace.get_select_npoints()
        return str(due) if due not in (prod(shape), h5py.h5s.UNLIMITED) else None
    if space.get_select_npoints() == h5py.h5s.UNLIMITED:
        return None
    last = [int(n) for n in space.get_select_bounds()[1]]
    return times([n + 1 for n in last]) if len(last) != len(shape) or any(map(ge, last, shape)) else None


def _source_file(array: Any, file: str) -> Path:
    """Find the file of a virtual dataset's source in HDF5's own search order (H5F_prefix_open_file)."""
    given, beside = Path(file), Path(array.file.filename).parent
    places = [given] if given.is_absolute() else []
    tail = given.name if given.is_absolute() else given
    prefixes = os.environ.get("HDF5_VDS_PREFIX", "").replace("${ORIGIN}", str(beside.resolve())).split(":")
    places += [*(Path(prefix) / tail for prefix in prefixes if prefix), beside / tail, Path(tail)]
    return next((place for place in places if place.exists()), beside.resolve() / tail)


def _refuse_uncovered(path: str, of: str, array: Any) -> None:
    """Raise InputError where a virtual dataset has voxels that are in no source."""
    union = h5py.h5s.create_simple(array.shape)
    union.select_none()
    for source in array.virtual_sources():
        space = source.vspace
        if space.get_select_npoints() == h5py.h5s.UNLIMITED:  # HDF5 sets the shape by the blocks that are there
            return
        if space.get_select_type() == h5py.h5s.SEL_ALL:
            return
        if space.is_regular_hyperslab():
            start, stride, count, block = space.get_regular_hyperslab()
            union.select_hyperslab(start, count, stride, block, op=h5py.h5s.SELECT_OR)
        else:
            for low, high in space.get_select_hyper_blocklist():
                edges = tuple(int(b - a + 1) for a, b in zip(low, high, strict=True))
                union.select_hyperslab(tuple(map(int, low)), (1,) * len(edges), None, edges, op=h5py.h5s.SELECT_OR)
    if (covered := union.get_select_npoints()) < prod(array.shape):
        raise InputError(
            f"{path}: {of}is a virtual dataset whose sources cover {covered} of {prod(array.shape)} voxels; the others "
            "would be read as the fill value, so map all of them"
        )


def _refuse_unwritten(path: str, of: str, array: Any) -> None:
    """Raise InputError where nothing was written to a dataset, or where the raw files that it names are too short."""
    if array.id.get_space_status() == h5py.h5d.SPACE_STATUS_NOT_ALLOCATED:
        raise InputError(
            f"{path}: {of}nothing was ever written to this dataset, and all of it would be read as the fill value; "
            "write the volume to it"
        )
    left = array.size * array.dtype.itemsize
    origin = str(Path(array.file.filename).resolve().parent)
    prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", origin)
    for file, offset, size in array.external or ():
        due = offset + min(size, left)
        left -= min(size, left)
        place = Path(prefix) / file
        there = place.stat().st_size if place.is_file() else None
        if there is None or there < due:
            what = "is missing" if there is None else f"has {there} bytes where {due} are due"
            raise InputError(f"{path}: {of}its raw data file {file} {what}; put it back")


def _lacking_filters(array: Any) -> str:
    """Name the filters of a dataset that HDF5 does not have.

    The result is empty where HDF5 has all filters, or hdf5plugin provides them.
    """
    made = array.id.get_create_plist()
    every = [made.get_filter(k) for k in range(made.get_nfilters())]
    if not all(h5py.h5z.filter_avail(code) for code, *_ in every):
        with contextlib.suppress(ImportError):
            importlib.import_module("hdf5plugin")  # registers its filters with HDF5
    return ", ".join(
        f"{name.decode(errors='replace') or 'filter'} ({code})"
        for code, _, _, name in every
        if not h5py.h5z.filter_avail(code)
    )


def _names(path: str, array: Any) -> list[str] | None:
    """Return the names of the axes, or None where the file has none.

    The names are the `axistags` of vigra and ilastik, else the labels or scales of the dimensions.
    """
    if (tags := _axistags(path, array)) is not None:
        return [str(tag.get("key", "")) for tag in tags]
    names = []
    for dimension in array.dims:
        scales = [Path(scale.name or "").name for scale in dimension.values()] if not dimension.label else []
        names.append(dimension.label or next(iter(scales), ""))
    return names if any(names) else None


def _axistags(path: str, array: Any) -> list[dict[str, Any]] | None:
    if "axistags" not in array.attrs:
        return None
    try:
        return list(json.loads(_text(array.attrs["axistags"]))["axes"])
    except (ValueError, KeyError, TypeError) as error:
        corrupt(path, f"attribute axistags: {error!r}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _edges(path: str, array: Any, names: Sequence[str] | None, place: Arrangement) -> VoxelEdges:
    """Read the voxel edges along z, y, x.

    They are element_size_um of Fiji and BigDataViewer, else ilastik's resolution of each axis with its unit.
    """
    size = array.attrs.get("element_size_um")
    if size is not None and len(size) == 3:
        there = [p for p in place.places if p is not None]
        if there != sorted(there) and len(set(map(float, size))) > 1:
            said = ", ".join(names or ())
            raise InputError(
                f"{path}: element_size_um is of z, y, x and its axes are {said}, so which is which is not clear; write "
                "the dataset in the order z, y, x"
            )
        return edges_of(list(size), ["um"] * 3)
    tags = _axistags(path, array)
    if tags is None:
        return UNKNOWN
    try:
        units = json.loads(_text(array.attrs.get("axis_units", "{}")))
    except ValueError as error:
        corrupt(path, f"attribute axis_units: {error!r}")
    resolution = {str(tag.get("key", "")).lower(): tag.get("resolution") for tag in tags}
    return edges_of([resolution.get(axis) for axis in AXES], [units.get(axis) for axis in AXES])
