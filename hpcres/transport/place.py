"""Where the slabs of a volume are, and how what they share gets from one to another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpcres.transport.coarse import Level
from hpcres.transport.form import Form
from hpcres.transport.slab import Extent, Slab


class Place(ABC):
    """Where the slabs of a volume are: which are worked on here, and how vectors and sums get to others."""

    extents: list[Extent]
    here: Sequence[int]  # slabs that are worked on here
    first = True  # this is where levels from 2 on are, and what speaks

    @abstractmethod
    def run(self, slabs: Sequence[Slab], *stages: Callable[[Slab], None]) -> None:
        """Run each stage on every slab; a stage sees what the one before it did to a slab and its neighbours."""

    @abstractmethod
    def everyone(self, values: list[Any]) -> list[Any]:
        """Return a value of every slab, given those of the slabs here, from everywhere and in the order of slabs."""

    @abstractmethod
    def to_first(self, values: list[Any]) -> list[Any] | None:
        """Return as `everyone`, only where `first`; None elsewhere."""

    @abstractmethod
    def vector(self, slabs: Sequence[Slab], kind: int) -> Any:
        """Make a vector of zeros, at voxels (kind 0) or at aggregates of level 1 or 2.

        of(slab, planes, colours) of the vector is a slab's array with the planes of its neighbours refreshed. put(slab,
        array) keeps the slab's own part.
        """

    @abstractmethod
    def hold(self, bits: list[np.ndarray]) -> None:
        """Hold the bits of the own planes of the slabs here, for `with_neighbours`."""

    @abstractmethod
    def with_neighbours(self, number: int) -> np.ndarray:
        """Return a slab's bits with those of its neighbours, and empty planes outside."""

    @abstractmethod
    def next_planes(self, planes: list[np.ndarray], periodic: bool) -> list[np.ndarray | None]:
        """Return for every slab here what the slab before it gave as `planes`.

        Around a periodic axis the last slab is before the first. At the volume's face the result is None.
        """

    @abstractmethod
    def keep_labels(self, number: int, labels: np.ndarray) -> Callable[[], np.ndarray]:
        """Keep the labels of a slab and its neighbours, and return a function that reads them again."""

    @abstractmethod
    def expect(self, kept: int, aggregates: int, labels: int, form: Form, shape: Sequence[int]) -> None:
        """Prepare for a solve.

        Parameters
        ----------
        kept : int
            Conducting voxels.
        aggregates : int
            Aggregates in cells of 2×2×2 voxels.
        labels : int
            Voxels whose labels are needed.
        form : Form
            The form of the system.
        shape : sequence of int
            Voxels of the whole volume z, y, x.
        """

    @abstractmethod
    def refuse_coarse(self, aggregates: int, bits: int, voxels: int) -> None:
        """Raise InputError where so many aggregates of level 2, in the whole volume, and bytes of bits are too much."""

    @abstractmethod
    def finish(self) -> None:
        """End the work, when all is done."""

    @abstractmethod
    def keep_level(self, slab: Slab, level: Level) -> None:
        """Keep level 1 of a slab, for `level`."""

    @abstractmethod
    def level(self, slab: Slab) -> Level:
        """Return what `keep_level` kept of a slab."""

    @abstractmethod
    def collect(self, vector: Any, slabs: Sequence[Slab], whole: np.ndarray | None, starts: np.ndarray) -> None:
        """Gather the own parts of a vector at level 2, from everywhere into `whole` where `first`."""

    @abstractmethod
    def spread(self, whole: np.ndarray | None, vector: Any, slabs: Sequence[Slab], starts: np.ndarray) -> None:
        """Distribute `whole`, where `first`, to the own parts of a vector at level 2 everywhere."""

    @abstractmethod
    def bytes(self, slabs: Sequence[Slab]) -> int:
        """Return the bytes that slabs hold here, vectors included."""


class TwoFloatVector:
    """A vector that is the sum of two float32 vectors; its arrays are pairs."""

    def __init__(self, high: Any, low: Any) -> None:
        self._parts = high, low

    def of(self, slab: Slab, planes: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return a slab's pair of arrays, with `planes` planes of its neighbours refreshed."""
        high, low = (part.of(slab, planes) for part in self._parts)
        return high, low

    def put(self, slab: Slab, arrays: tuple[np.ndarray, np.ndarray]) -> None:
        """Keep a slab's own part of a pair of arrays."""
        for part, array in zip(self._parts, arrays, strict=True):
            part.put(slab, array)
