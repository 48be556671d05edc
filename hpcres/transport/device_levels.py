"""The coarse levels and their cycle on a torch device."""

from __future__ import annotations

import numpy as np
import torch

from hpcres.transport import coarse
from hpcres.transport.coarse import Level
from hpcres.transport.threads import Threads

MATRIX = 512  # aggregates of a level from which on the cycle is one matrix: one launch instead of hundreds


class _DeviceLevel:
    """A coarse level on the device: six neighbours of every aggregate, the first of all, then the second, and so on."""

    def __init__(self, level: Level, device: torch.device) -> None:
        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.aggregates, self.red, self.mixed, self.correction = (
            level.aggregates,
            level.red,
            level.mixed,
            level.correction,
        )
        self.diagonal = put(level.diagonal)
        self.places, self.values = put(level.places.T), put(level.values.T)
        self.more = tuple(map(put, level.more))
        self.more_from_black = int(np.searchsorted(level.more[0], level.red))
        self.parent = (
            None if level.parent is None else put(level.parent[: level.aggregates if level.mixed else level.red])
        )
        # One element more, for what is in no aggregate.
        self.to_faces = None if level.to_faces is None else put(level.to_faces)
        self.b, self.x = (torch.zeros(level.aggregates + 1, dtype=self.diagonal.dtype, device=device) for _ in range(2))

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        arrays = (self.diagonal, self.places, self.values, *self.more, self.to_faces, self.parent, self.b, self.x)
        return sum(t.nbytes for t in arrays if t is not None)

    def around(self, begin: int, end: int) -> torch.Tensor:
        """Return b + the sum of conductance × x over neighbours, of red aggregates (0 to `red`), black ones or all."""
        s = self.b[begin:end].clone()
        for places, values in zip(self.places, self.values, strict=True):
            s.addcmul_(values[begin:end], self.x.index_select(0, places[begin:end]))
        a = 0 if begin == 0 else self.more_from_black
        b = self.more_from_black if end == self.red else len(self.more[0])
        if b > a:
            of, places, values = (t[a:b] for t in self.more)
            s.index_add_(0, of - begin, values * self.x.index_select(0, places))
        return s

    def residual(self, end: int) -> torch.Tensor:
        """Return the residual of the first `end` aggregates.

        That of a robust level is a sum of currents (see `coarse.restrict`).
        """
        if self.to_faces is None:
            return self.around(0, end).addcmul_(self.diagonal[:end], self.x[:end], value=-1)
        s, own = self.b[:end].addcmul(self.to_faces[:end], self.x[:end], value=-1), self.x[:end]
        for places, values in zip(self.places, self.values, strict=True):
            s.addcmul_(values[:end], self.x.index_select(0, places[:end]).sub_(own))
        more = self.more_from_black if end == self.red else len(self.more[0])
        if more:
            of, places, values = (t[:more] for t in self.more)
            s.index_add_(0, of, values * (self.x.index_select(0, places) - self.x.index_select(0, of)))
        return s

    def sweep(self, begin: int, end: int) -> None:
        """Relax the aggregates begin … end - 1: red ones, black ones or all."""
        if end > begin:
            torch.div(self.around(begin, end), self.diagonal[begin:end], out=self.x[begin:end])


class Cycle:
    """The coarse levels and their W-cycle (`coarse.cycle`), the lowest of them as one matrix."""

    def __init__(self, levels: list[Level], threads: Threads, device: torch.device) -> None:
        """Move the levels to the device; `levels` is emptied."""
        at = next((i for i, level in enumerate(levels) if level.aggregates <= MATRIX), len(levels) - 1)
        lowest = levels[at]
        self._matrix: torch.Tensor | None = None
        self._factors = lowest.factors if lowest.aggregates > MATRIX else None
        if lowest.aggregates <= MATRIX or lowest.inverse is not None:
            matrix = np.empty((lowest.aggregates, lowest.aggregates), lowest.b.dtype)
            for aggregate in range(lowest.aggregates):
                lowest.b[:], lowest.b[aggregate] = 0, 1
                coarse.cycle(levels, at, threads.each)
                matrix[:, aggregate] = lowest.x
            self._matrix = torch.from_numpy(matrix).to(device)
        del levels[at + 1 :]
        self._levels = []
        while levels:
            self._levels.append(_DeviceLevel(levels.pop(0), device))
        self.b, self.x = self._levels[0].b, self._levels[0].x

    @property
    def bytes(self) -> int:
        """Bytes on the device."""
        return sum(level.bytes for level in self._levels) + (0 if self._matrix is None else self._matrix.nbytes)

    def run(self, at: int = 0) -> None:
        """Set x ≈ A⁻¹ b on a level."""
        level = self._levels[at]
        red, aggregates, x, b = level.red, level.aggregates, level.x, level.b
        if at + 1 == len(self._levels):
            if self._factors is not None:
                solved = self._factors.solve(b[:-1].double().cpu().numpy())
                x[:-1] = torch.from_numpy(solved).to(x)
            elif self._matrix is None:
                torch.div(b[:-1], level.diagonal, out=x[:-1])
            else:
                torch.mv(self._matrix, b[:-1], out=x[:-1])
            return
        below, corrected = self._levels[at + 1], aggregates if level.mixed else red
        parent = level.parent
        assert parent is not None
        for visit in range(2):
            if visit == 0:
                x.zero_()
                torch.div(b[:red], level.diagonal[:red], out=x[:red])
            elif level.mixed:
                level.sweep(0, red)
            level.sweep(red, aggregates)
            below.b.zero_()
            below.b.index_add_(0, parent, level.residual(corrected))
            self.run(at + 1)
            x[:corrected].add_(below.x.index_select(0, parent), alpha=level.correction)
            level.sweep(red, aggregates)
            level.sweep(0, red)
