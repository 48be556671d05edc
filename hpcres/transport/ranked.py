"""One slab on each rank; vectors are exchanged plane by plane.

No MPI is imported: a communicator is an argument.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpcres.transport.coarse import Level
from hpcres.transport.form import Form
from hpcres.transport.place import Place
from hpcres.transport.slab import Extent, Slab

_DOWN, _UP = 0, 1  # tags: towards the first plane, towards the last
_MESSAGE = 1 << 30  # bytes; MPI counts with 31 bits


class RankPlace(Place):
    """One slab on each rank of `comm`, an mpi4py communicator."""

    def __init__(self, comm: Any, extents: list[Extent]) -> None:
        assert comm.Get_size() == len(extents)
        self.comm, self.extents, self.rank = comm, extents, comm.Get_rank()
        self.here = (self.rank,)
        self.first = self.rank == 0
        own, size = extents[self.rank], len(extents)
        self.before = (self.rank - 1) % size if own.low else None
        self.after = (self.rank + 1) % size if own.high else None
        self._level: Level | None = None

    def run(self, slabs: Sequence[Slab], *stages: Callable[[Slab], None]) -> None:
        """Run each stage on the slab of this rank."""
        for stage in stages:
            for slab in slabs:
                stage(slab)

    def everyone(self, values: list[Any]) -> list[Any]:
        """Return the values of all ranks."""
        return self.comm.allgather(values[0])

    def to_first(self, values: list[Any]) -> list[Any] | None:
        """Return the values of all ranks on the first one, and None on the others."""
        # A gather of pickles ends at 2 GiB in all, so that arrays go by themselves, rank after rank.
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(values[0], protocol=5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        heads = self.comm.gather((head, [part.nbytes for part in raw]))
        if heads is None:
            for part in raw:
                for at in range(0, part.nbytes, _MESSAGE):
                    self.comm.Send(part[at : at + _MESSAGE], 0)
            return None
        found = [values[0]]
        for rank, (head, sizes) in enumerate(heads[1:], 1):
            whole = [np.empty(size, np.uint8) for size in sizes]
            for array in whole:
                for at in range(0, len(array), _MESSAGE):
                    self.comm.Recv(array[at : at + _MESSAGE], rank)
            found.append(pickle.loads(head, buffers=whole))
        return found

    def vector(self, slabs: Sequence[Slab], kind: int) -> RankVector:
        """Make a vector of zeros."""
        return RankVector(self, slabs[0], kind)

    def hold(self, bits: list[np.ndarray]) -> None:
        """Hold the bits of the own planes."""
        self._bits = bits[0]

    def with_neighbours(self, number: int) -> np.ndarray:
        """Return the slab's bits with those of its neighbours, received from their ranks."""
        extent, own = self.extents[number], self._bits
        bits = np.zeros((extent.planes + 2, *own.shape[1:]), own.dtype)
        deep = extent.end - extent.begin
        bits[1 + extent.low : 1 + extent.low + deep] = own[1 : 1 + deep]
        plane = int(np.prod(own.shape[1:]))
        starts = np.arange(extent.planes + 1) * plane
        self.exchange(bits[1:-1].reshape(-1), starts[None], extent.low, extent.low + deep, 8, (0,))
        return bits

    def next_planes(self, planes: list[np.ndarray], periodic: bool) -> list[np.ndarray | None]:
        """Send the planes to the next rank, and return what the rank before sent."""
        requests = [] if self.after is None else [self.comm.Isend(planes[0], self.after, _UP)]
        got = None
        if self.before is not None:
            got = np.empty_like(planes[0])
            requests.append(self.comm.Irecv(got, self.before, _UP))
        for request in requests:
            request.Wait()
        return [got]

    # Whether a slab fits was settled before any was read (`check_memory`), and nothing outlives the process.

    def expect(self, kept: int, aggregates: int, labels: int, form: Form, shape: Sequence[int]) -> None:
        """Do nothing: whether a slab fits was settled before any was read."""
        return

    def refuse_coarse(self, aggregates: int, bits: int, voxels: int) -> None:
        """Do nothing: whether a slab fits was settled before any was read."""
        return

    def finish(self) -> None:
        """Do nothing: nothing outlives the process."""
        return

    def keep_labels(self, number: int, labels: np.ndarray) -> Callable[[], np.ndarray]:
        """Keep the labels in memory."""
        return lambda: labels

    def keep_level(self, slab: Slab, level: Level) -> None:
        """Keep level 1 in memory."""
        self._level = level

    def level(self, slab: Slab) -> Level:
        """Return the level that was kept."""
        assert self._level is not None
        return self._level

    def exchange(
        self, array: np.ndarray, starts: np.ndarray, begin: int, end: int, planes: int, colours: Sequence[int]
    ) -> None:
        """Fill the planes before `begin` and from `end` on with the neighbours' own."""
        requests = []
        for colour in colours:
            at, tag = starts[colour], 2 * colour
            if self.before is not None:
                requests.append(self.comm.Irecv(array[at[begin - planes] : at[begin]], self.before, tag + _UP))
                requests.append(self.comm.Isend(array[at[begin] : at[begin + planes]], self.before, tag + _DOWN))
            if self.after is not None:
                requests.append(self.comm.Irecv(array[at[end] : at[end + planes]], self.after, tag + _DOWN))
                requests.append(self.comm.Isend(array[at[end - planes] : at[end]], self.after, tag + _UP))
        for request in requests:
            request.Wait()

    def collect(self, vector: RankVector, slabs: Sequence[Slab], whole: np.ndarray | None, starts: np.ndarray) -> None:
        """Gather the own parts of a vector at level 2 in `whole` on the first rank."""
        self._move(vector, slabs[0], whole, starts, False)

    def spread(self, whole: np.ndarray | None, vector: RankVector, slabs: Sequence[Slab], starts: np.ndarray) -> None:
        """Distribute `whole` from the first rank to the own parts of a vector at level 2."""
        self._move(vector, slabs[0], whole, starts, True)

    def _move(self, vector: RankVector, slab: Slab, whole: np.ndarray | None, starts: np.ndarray, out: bool) -> None:
        own, per, requests = slab.own_part(2), slab.planes_per(2), []
        for colour in range(2):
            mine = vector.array[own[colour]]
            requests.append(self.comm.Irecv(mine, 0, colour) if out else self.comm.Isend(mine, 0, colour))
            if whole is not None:
                for rank, extent in enumerate(self.extents):
                    begin, end = extent.begin // per, -(-extent.end // per)
                    part = whole[starts[colour, begin] : starts[colour, end]]
                    requests.append(self.comm.Isend(part, rank, colour) if out else self.comm.Irecv(part, rank, colour))
        for request in requests:
            request.Wait()

    def bytes(self, slabs: Sequence[Slab]) -> int:
        """Return the bytes that this rank holds, vectors included."""
        slab, level = slabs[0], self.level(slabs[0])
        size = np.dtype(slab.form.dtype).itemsize
        vectors = slab.form.bytes_of_vectors * slab.voxels
        vectors += size * (2 * level.aggregates + 2 * int(slab.starts(2)[1, -1]))
        labels = 0 if slab.labels is None else slab.labels.nbytes
        return vectors + level.bytes + labels + slab.bits.nbytes + slab.cells.nbytes + slab.rows.nbytes


class RankVector:
    """Planes of a vector of this rank, and those of its neighbours."""

    def __init__(self, place: RankPlace, slab: Slab, kind: int) -> None:
        self._place, self._starts = place, slab.starts(kind)
        self._own = slab.own_planes(kind)
        self.array = np.zeros(int(self._starts[-1, -1]), slab.form.dtype)

    def of(self, slab: Slab, planes: int = 0, colours: Sequence[int] = (0,)) -> np.ndarray:
        """Return the array, with `planes` planes of the neighbours refreshed."""
        if planes:
            self._place.exchange(self.array, self._starts, *self._own, planes, colours)
        return self.array

    def put(self, slab: Slab, array: np.ndarray) -> None:
        """Keep the own part; the array is the vector's own, so nothing is copied."""
        assert array is self.array
