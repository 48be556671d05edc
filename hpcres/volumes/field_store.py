"""Stores of float fields, such as potential and flux density, which several processes write together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import zarr
import zarr.codecs
import zarr.storage

from hpcres.geometry import AXES, Triple
from hpcres.outputs import FIELDS, refuse_output
from hpcres.signals import half_made
from hpcres.volumes.files import move_into_place, temporary_beside


class FieldStore:
    """float32 fields of one volume in a plain Zarr v3 group, (z, y, x) or (component, z, y, x).

    Voxels without a value are NaN. The store appears at `path` when the block of `with` ends without an error. Several
    processes may write it.

    Parameters
    ----------
    path
        Folder of the store.
    shape
        Voxels along z, y, x.
    attributes
        Attributes of the group: voxel size and what the fields are.
    overwrite
        Replace a store that exists at `path`.
    shared
        shared(make) returns, on every process, what `make` returns on the first of them. By default there is one
        process.
    """

    def __init__(
        self,
        path: str | Path,
        shape: Triple,
        attributes: Mapping[str, Any],
        overwrite: bool = False,
        shared: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> None:
        refuse_output(path, FIELDS, overwrite=overwrite)
        self.path, self.shape = Path(path), shape
        self._shared = shared or (lambda make: make())
        self._attributes = dict(attributes)

    def __enter__(self) -> Self:
        """Make the group under a temporary name beside `path`."""

        def make() -> Path:
            temporary = temporary_beside(self.path)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            zarr.create_group(zarr.storage.LocalStore(temporary), zarr_format=3, attributes=self._attributes)
            return temporary

        self._temporary: Path = self._shared(make)
        self._ending = ExitStack()
        self._ending.enter_context(half_made(self._temporary))
        self._group = zarr.open_group(zarr.storage.LocalStore(self._temporary), mode="r+")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Rename the group to `path` when all processes have written, or remove it after an error."""

        def finish() -> None:
            move_into_place(self._temporary, self.path)

        try:
            if kind is None:
                self._shared(lambda: None)  # when all have written
                self._shared(finish)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._ending.close()

    def add(self, name: str, components: int | None = None) -> zarr.Array[Any]:
        """Create an array of the group, which is to be written in slabs of whole 64 planes.

        Parameters
        ----------
        name
            Name of the array.
        components
            Length of the first axis of an array (component, z, y, x); None for an array (z, y, x).

        Returns
        -------
        zarr.Array
            float32 array.
        """
        self._shared(lambda: self._create(name, components) and None)
        array = self._group[name]
        assert isinstance(array, zarr.Array)
        return array

    def _create(self, name: str, components: int | None) -> zarr.Array[Any]:
        first: tuple[int, ...] = () if components is None else (components,)
        chunks = (*((1,) * len(first)), *(min(64, n) for n in self.shape))
        return self._group.create_array(
            name,
            shape=(*first, *self.shape),
            dtype="float32",
            chunks=chunks,
            fill_value=float("nan"),
            compressors=zarr.codecs.BloscCodec(typesize=4, cname="zstd", clevel=1, shuffle="shuffle"),
            dimension_names=(*(("component",) * len(first)), *AXES),
        )
