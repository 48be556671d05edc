"""Slabs one after the other in one process: vectors, level 1 and labels on scratch storage, levels from 2 on in memory.

Files have no name, so that the system removes them with the process, however it ends.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hpcres.errors import InputError
from hpcres.transport.coarse import Level
from hpcres.transport.form import Form
from hpcres.transport.memory_need import BYTES_OF_CUBIC
from hpcres.transport.place import Place
from hpcres.transport.slab import Extent, Slab

_AT_HAND = 3  # levels of slabs: as many as there are stages in a pass
_LEVEL = ("diagonal", "places", "values", "parent")
BYTES_PER_AGGREGATE = 180  # of level 2 and all above: 64 each, a quarter more for those above, and what set-up adds
BYTES_OF_PYTHON = 256 << 20  # interpreter, libraries and compiled kernels, which count as memory used
BYTES_PER_SLAB_VOXEL = 60  # conducting ones of a slab: three of level 1, vectors, set-up


class ScratchPlace(Place):
    """All slabs in one process, with scratch files in `folder`.

    `limit` is the number of bytes of memory besides Python's own. say(line) is called with what a solve will take.
    """

    def __init__(self, folder: Path, limit: int, extents: list[Extent], say: Callable[[str], None]) -> None:
        self.extents, self.here, self.folder, self.limit = extents, range(len(extents)), folder, limit
        self._say = say
        self._around = extents[0].low > 0
        self._levels: OrderedDict[int, Level] = OrderedDict()
        self._stored: dict[int, tuple[_File, list[tuple[int, tuple[int, ...], Any]], Any]] = {}
        self._labels: OrderedDict[int, np.ndarray] = OrderedDict()
        self.read_bytes = self.written_bytes = 0
        self._more = self._wide = 1.0  # memory of a slab and of an aggregate, over that of the plain form

    def run(self, slabs: Sequence[Slab], *stages: Callable[[Slab], None]) -> None:
        """Run each stage on every slab.

        Each stage is one slab behind the stage before it. Where the first and the last slab meet, it begins after the
        stage before it has ended.
        """
        if self._around:
            # The last slab is a neighbour of the first one.
            for stage in stages:
                for slab in slabs:
                    stage(slab)
            return
        # Each stage one slab behind the one before it: what that one wrote is still in the system's memory.
        for s in range(len(slabs) + len(stages) - 1):
            for late, stage in enumerate(stages):
                if 0 <= s - late < len(slabs):
                    stage(slabs[s - late])

    def everyone(self, values: list[Any]) -> list[Any]:
        """Return the values: all slabs are here."""
        return values

    def to_first(self, values: list[Any]) -> list[Any] | None:
        """Return the values: all slabs are here."""
        return values

    def vector(self, slabs: Sequence[Slab], kind: int) -> ScratchVector:
        """Make a vector of zeros."""
        return ScratchVector(self, slabs, kind)

    def hold(self, bits: list[np.ndarray]) -> None:
        """Hold the bits of the own planes."""
        self._bits = bits

    def with_neighbours(self, number: int) -> np.ndarray:
        """Return a slab's bits with those of its neighbours; after the last slab the held bits are dropped."""
        extent, own = self.extents[number], self._bits[number]
        deep = extent.end - extent.begin
        bits = np.zeros((extent.planes + 2, *own.shape[1:]), own.dtype)
        bits[1 + extent.low : 1 + extent.low + deep] = own[1 : 1 + deep]
        if extent.low:
            before = self._bits[number - 1]
            bits[1 : 1 + extent.low] = before[-1 - extent.low : -1]
        if extent.high:
            after = self._bits[(number + 1) % len(self.extents)]
            bits[-1 - extent.high : -1] = after[1 : 1 + extent.high]
        if number == len(self.extents) - 1:
            self._bits = []
        return bits

    def next_planes(self, planes: list[np.ndarray], periodic: bool) -> list[np.ndarray | None]:
        """Return for every slab what the slab before it gave."""
        return [planes[-1] if periodic else None, *planes[:-1]]

    def keep_labels(self, number: int, labels: np.ndarray) -> Callable[[], np.ndarray]:
        """Write labels to a scratch file, and return a function that reads them."""
        file = _File(self, labels.nbytes)
        file.write(0, labels)
        shape = labels.shape

        def read() -> np.ndarray:
            if number not in self._labels:
                while len(self._labels) >= _AT_HAND:
                    self._labels.popitem(last=False)
                self._labels[number] = file.read(0, np.empty(shape, np.uint8))
            self._labels.move_to_end(number)
            return self._labels[number]

        return read

    def keep_level(self, slab: Slab, level: Level) -> None:
        """Write level 1 of a slab to a scratch file."""
        arrays = [*(getattr(level, name) for name in _LEVEL), *level.more]
        arrays += [] if level.to_faces is None else [level.to_faces]
        if level.to_faces is not None:
            arrays.append(level.to_faces)
        file = _File(self, sum(a.nbytes for a in arrays))
        at, places = 0, []
        for array in arrays:
            file.write(at, array)
            places.append((at, array.shape, array.dtype))
            at += array.nbytes
        self._levels.pop(slab.number, None)
        self._labels.clear()
        self._stored[slab.number] = file, places, (level.cells, level.mixed, level.step, level.correction)

    def level(self, slab: Slab) -> Level:
        """Return level 1 of a slab, read again where it is not at hand."""
        if slab.number not in self._levels:
            while len(self._levels) >= _AT_HAND:
                self._levels.popitem(last=False)
            file, places, (cells, mixed, step, correction) = self._stored[slab.number]
            diagonal, neighbours, values, parent, *more = (
                file.read(at, np.empty(shape, kind)) for at, shape, kind in places
            )
            to_faces = more[3] if slab.form.robust else None
            self._levels[slab.number] = Level(
                slab.aggregates,
                cells,
                mixed,
                diagonal,
                neighbours,
                values,
                (more[0], more[1], more[2]),
                to_faces,
                step,
                correction,
                parent,
            )
        self._levels.move_to_end(slab.number)
        return self._levels[slab.number]

    def collect(
        self, vector: ScratchVector, slabs: Sequence[Slab], whole: np.ndarray | None, starts: np.ndarray
    ) -> None:
        """Copy a vector at level 2 to `whole`."""
        assert whole is not None
        whole[:] = vector.memory

    def spread(
        self, whole: np.ndarray | None, vector: ScratchVector, slabs: Sequence[Slab], starts: np.ndarray
    ) -> None:
        """Copy `whole` to a vector at level 2."""
        vector.memory[:] = whole

    def expect(self, kept: int, aggregates: int, labels: int, form: Form, shape: Sequence[int]) -> None:
        """Say how much scratch storage a solve will take, and raise InputError where that is not free."""
        wider = max(e.planes / (e.end - e.begin) for e in self.extents)
        # Level 1 has as many aggregates as cells of 2×2×2 voxels in the plain form, and more in the robust form.
        self._more = max(1.0, form.bytes_of_levels(shape) / BYTES_OF_CUBIC[1])
        self._wide = 1.6 if form.dtype is np.float64 else 1.0
        need = int(form.bytes_of_vectors * kept + aggregates * (8 + 64 * wider) * self._more + labels * wider)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise InputError(
                f"{self.folder}: the solve takes up to {_size(need)} of scratch storage, {_size(free)} "
                f"are free; name a larger disk with `scratch`, or use more `memory`"
            )
        self._say(f"out of core: {len(self.extents)} slabs, up to {_size(need)} of scratch storage in {self.folder}")

    def refuse_coarse(self, aggregates: int, bits: int, voxels: int) -> None:
        """Raise InputError where levels from 2 on, bits, a slab and Python do not fit into the memory limit."""
        widest = max(e.planes for e in self.extents) / self.extents[-1].end
        slab = int(BYTES_PER_SLAB_VOXEL * self._more * voxels * widest)
        coarse = int(BYTES_PER_AGGREGATE * self._wide * aggregates)
        need = coarse + bits + slab
        if need > self.limit:
            raise InputError(
                f"`memory` {_size(self.limit + BYTES_OF_PYTHON)}: levels from 2 on ({aggregates} aggregates) take "
                f"{_size(coarse)}, bits {_size(bits)}, a slab {_size(slab)} and Python "
                f"{_size(BYTES_OF_PYTHON)}, which all stay in memory; give `memory` "
                f"{-(-(need + BYTES_OF_PYTHON) // 2**20)}MiB, or start it under MPI on more nodes"
            )

    def finish(self) -> None:
        """Say how many bytes were read and written."""
        moved = f"{_size(self.read_bytes)} read and {_size(self.written_bytes)} written"
        self._say(f"out of core: {moved} in {self.folder}")

    def bytes(self, slabs: Sequence[Slab]) -> int:
        """Return the bytes of memory that slabs hold."""
        held = sum(s.bits.nbytes + s.cells.nbytes + s.rows.nbytes for s in slabs)
        return held + max(_AT_HAND * max(level.bytes for level in self._levels.values()), 0)


def _size(number: int) -> str:
    return f"{number / 2**30:.1f}GiB" if number >= 2**30 else f"{number / 2**20:.0f}MiB"


class ScratchVector:
    """A vector's planes in a file, in the order of the volume, one colour after the other; at level 2, in memory."""

    def __init__(self, place: ScratchPlace, slabs: Sequence[Slab], kind: int) -> None:
        self._kind, self._count = kind, len(slabs)
        counts = []
        for slab in slabs:
            a, b = slab.own_planes(kind)
            counts.append(np.diff(slab.starts(kind)[:, a : b + 1], axis=1))
        planes = np.concatenate(counts, axis=1)
        self._deep = planes.shape[1]
        ends = np.cumsum(planes.reshape(-1))
        begins = np.concatenate([[0], ends])
        self._begins = np.stack([begins[c * self._deep : (c + 1) * self._deep + 1] for c in range(len(planes))])
        size = int(begins[-1])
        self._real = slabs[0].form.dtype
        self._bytes = np.dtype(self._real).itemsize
        self._file = None if kind == 2 else _File(place, self._bytes * size)
        self.memory = np.zeros(size if kind == 2 else 0, self._real)

    def of(self, slab: Slab, planes: int = 0, colours: Sequence[int] = ()) -> np.ndarray:
        """Read a slab's array, with `planes` planes of its neighbours."""
        starts = slab.starts(self._kind)
        array = np.zeros(int(starts[-1, -1]), self._real)
        a, b = slab.own_planes(self._kind)
        lowest, highest = max(0, a - planes), min(starts.shape[1] - 1, b + planes)
        first = slab.first // slab.planes_per(self._kind)
        for colour, at in enumerate(starts):
            begin, end = lowest, highest
            # Around the periodic axis the neighbours' planes are at the other end of the file.
            while begin < end:
                where = (begin + first) % self._deep
                stop = min(end, begin + self._deep - where)
                self._move(array[at[begin] : at[stop]], self._begins[colour, where], False)
                begin = stop
        return array

    def put(self, slab: Slab, array: np.ndarray) -> None:
        """Write a slab's own part of an array."""
        first = slab.extent.begin // slab.planes_per(self._kind)
        for colour, own in enumerate(slab.own_part(self._kind)):
            self._move(array[own], self._begins[colour, first], True)

    def _move(self, part: np.ndarray, at: int, out: bool) -> None:
        if self._file is None:
            if out:
                self.memory[at : at + len(part)] = part
            else:
                part[:] = self.memory[at : at + len(part)]
        elif out:
            self._file.write(self._bytes * int(at), part)
        else:
            self._file.read(self._bytes * int(at), part)


class _File:
    """Scratch storage of so many bytes, reserved at once and zero at first."""

    def __init__(self, place: ScratchPlace, size: int) -> None:
        self._place = place
        if not (hasattr(os, "posix_fallocate") and hasattr(os, "preadv")):
            raise InputError(
                f"{place.folder}: {platform.system()} cannot reserve scratch storage for a solve (posix_fallocate); "
                "solve in memory, without a limit, or on Linux"
            )
        self._file = tempfile.TemporaryFile(dir=place.folder, buffering=0)
        if size:
            self._checked(lambda: os.posix_fallocate(self._file.fileno(), 0, size))

    def read(self, at: int, array: np.ndarray) -> np.ndarray:
        """Fill an array from place `at`, in bytes, and return it."""
        self._place.read_bytes += array.nbytes
        view = memoryview(array.data).cast("B") if array.size else memoryview(b"")
        done = 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], at + done)
            assert got > 0, "scratch file ends early"
            done += got
        return array

    def write(self, at: int, array: np.ndarray) -> None:
        """Write an array to place `at`, in bytes."""
        self._place.written_bytes += array.nbytes
        view = memoryview(np.ascontiguousarray(array).data).cast("B") if array.size else memoryview(b"")
        done = 0
        while done < len(view):
            done += self._checked(partial(os.pwrite, self._file.fileno(), view[done:], at + done))

    def _checked(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise InputError(
                f"{self._place.folder}: no space left for scratch storage; free some, or name another disk "
                f"with `scratch`"
            ) from None
