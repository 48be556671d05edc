"""HDF5: a dataset as a volume, with the axes and voxel sizes that ilastik, vigra and Fiji write beside it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import h5py

from hpcres.errors import InputError
from hpcres.geometry import AXES
from hpcres.lengths import UNKNOWN, VoxelEdges, edges_of
from hpcres.volumes.axes import Arrangement, arranged
from hpcres.volumes.volume import Volume, corrupt, existing, volume_over

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".nxs")


def hdf5_parts(path: str) -> tuple[str, str] | None:
    """File and dataset of `file.h5:/dataset`; the dataset is empty where the path names none."""
    match = re.fullmatch(rf"(.*(?:{'|'.join(map(re.escape, SUFFIXES))}))(?::(.*))?", path, re.IGNORECASE)
    return (match.group(1), (match.group(2) or "").strip("/")) if match else None


def open_hdf5(path: str, flat: bool = False) -> Volume:
    """The dataset that a path names, over soft, external and hard links; `flat` takes an image for a stack of one."""
    parts = hdf5_parts(path)
    assert parts
    name, dataset = parts
    if existing(name).is_dir():
        raise InputError(f"{name}: is a folder where an HDF5 file is due; check the path")
    array = _dataset(path, name, dataset, _file(name))
    if array.shape is None:
        raise InputError(f"{path}: is an empty dataset, without shape or values; write the volume to it")
    if array.is_virtual:
        _check_sources(path, name, array)
    names = _names(path, array)
    place = arranged(path, array.shape, names, flat)

    def why(error: Exception) -> NoReturn:
        if lacking := _lacking_filters(array):
            raise InputError(
                f"{path}: is compressed with {lacking}, a filter that this HDF5 does not have; pip install hdf5plugin, "
                "or write it again with gzip"
            ) from None
        corrupt(path, error)

    volume = volume_over(
        path, array, array.chunks, arrangement=place, edges=_edges(path, array, names, place), why=why
    )
    if _lacking_filters(array):
        with contextlib.suppress(ImportError):
            import hdf5plugin  # noqa: F401  # its import makes them known to HDF5
    if _lacking_filters(array) and array.id.get_num_chunks():
        try:
            array[tuple(array.id.get_chunk_info(0).chunk_offset)]
        except OSError as error:
            why(error)
    return volume


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
    raise InputError(
        f"{path}: {what}; it has {candidates}; write {name}:{'/' + datasets[0] if datasets else '/NAME'}"
    )


def _refuse_broken_link(path: str, name: str, dataset: str, file: Any) -> None:
    """InputError where a link on the way leads nowhere, with where it leads."""
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


def _check_sources(path: str, name: str, array: Any) -> None:
    """InputError where a virtual dataset would read as its fill value: a source that is missing, or voxels of none."""
    covered = 0
    for source in array.virtual_sources():
        covered += source.vspace.get_select_npoints()
        # %b stands for the number of a block, from 0 on; HDF5 takes as many as there are.
        file, inside = (text.replace("%b", "0").replace("%%", "%") for text in (source.file_name, source.dset_name))
        where = f"{file}:/{inside.strip('/')}"
        try:
            if file == ".":
                there = array.file.get(inside)
            else:
                beside = Path(name).parent / file
                place = beside if beside.exists() or not Path(file).exists() else Path(file)
                prefix = os.environ.get("HDF5_VDS_PREFIX")
                if prefix and not place.exists():
                    place = Path(prefix.replace("${ORIGIN}", str(Path(name).resolve().parent))) / file
                with h5py.File(place, "r") as opened:
                    there = opened.get(inside)
                    there = there if there is None else there.shape
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise InputError(
                f"{path}: is a virtual dataset whose source {where} {' '.join(what.split())}; put it back, or its "
                "voxels would be read as the fill value"
            ) from None
        if there is None:
            raise InputError(f"{path}: is a virtual dataset whose source {where} has no such dataset; put it back")
    if covered != h5py.h5s.UNLIMITED and covered < prod(array.shape):
        raise InputError(
            f"{path}: is a virtual dataset whose sources cover {covered} of {prod(array.shape)} voxels; the others "
            "would be read as the fill value, so map all of them"
        )


def _lacking_filters(array: Any) -> str:
    """The filters of a dataset that HDF5 does not have, by name; empty where it has all."""
    made = array.id.get_create_plist()
    every = [made.get_filter(k) for k in range(made.get_nfilters())]
    return ", ".join(
        f"{name.decode(errors='replace') or 'filter'} ({code})" for code, _, _, name in every
        if not h5py.h5z.filter_avail(code)
    )  # fmt: skip


def _names(path: str, array: Any) -> list[str] | None:
    """Names of the axes: `axistags` of vigra and ilastik, else the labels or scales of the dimensions; None without."""
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
    """Fiji's and BigDataViewer's element_size_um, along z, y, x; ilastik's resolution of an axis with its unit."""
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
