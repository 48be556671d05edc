"""A piece of a volume with its margin on a torch device, and the arithmetic of the voxels on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Piece = tuple[int, int, int, int]
RED = (0, 3, 5, 6)  # places of a cell of 2×2×2, 4 dz + 2 dy + dx, with even z + y + x


def inner(t: torch.Tensor) -> torch.Tensor:
    """Return t without its outermost planes and rows."""
    return t[1:-1, 1:-1]


def total(t: torch.Tensor) -> torch.Tensor:
    """Sum rows in float32, and their sums in float64: all in float64 would need a copy of t."""
    return t.sum(-1).sum(dtype=torch.float64)


def of_cell(i: int, step: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices z, y, x of the voxels at place i of every cell."""
    return slice(i >> 2, None, step[0]), slice(i >> 1 & 1, None, step[1]), slice(i & 1, None, step[2])


class Window:
    """A piece with `margin` planes and rows around it, dense (z, y, x); x is padded to an even number.

    Arrays on it, or on less of its margin, are told apart by their shapes.
    """

    def __init__(self, system: Any, piece: Piece, margin: int) -> None:
        self._system, self._piece, self._margin = system, piece, margin
        planes, rows = system.geometry[:2]
        (z0, z1), (y0, y1) = ((a - margin, b + margin) for a, b in (piece[:2], piece[2:]))
        self._z, z_in = self._wrapped(z0, z1, planes, system.geometry[4])
        self._y, y_in = self._wrapped(y0, y1, rows, system.geometry[5])
        words = system._bits.index_select(0, self._z).index_select(1, self._y)
        for axis, inside in enumerate((z_in, y_in)):
            words.narrow(axis, 0, inside.start).zero_()
            words.narrow(axis, inside.stop, words.shape[axis] - inside.stop).zero_()
        bit = torch.arange(8, dtype=torch.uint8, device=system.device)
        spread = (words.unsqueeze(-1) >> bit).bitwise_and_(1).flatten(2)[..., : system._width]
        if spread.shape[2] < system._width:
            spread = torch.nn.functional.pad(spread, (0, system._width - spread.shape[2]))
        self.mask = spread.bool()
        del words, spread
        places = self.mask.cumsum(2, dtype=torch.int64)
        places.add_(system._before.index_select(0, self._z).index_select(1, self._y).unsqueeze(-1))
        self.places = places.masked_fill_(~self.mask, system.voxels)
        self._between: tuple[torch.Tensor, ...] | None = None
        if system._labels is not None:
            assert system._resistance is not None
            labels = system._labels
            labels = labels.index_select(0, self._z.clamp(max=labels.shape[0] - 1))
            labels = labels.index_select(1, self._y.clamp(max=labels.shape[1] - 1)).int()
            if labels.shape[2] < system._width:
                labels = torch.nn.functional.pad(labels, (0, system._width - labels.shape[2]))
            half = system._resistance.index_select(0, labels.view(-1)).view(labels.shape)
            self._half = half.masked_fill_(~self.mask, torch.inf)
            gz, gy, gx = map(float, system.g)
            self._between = (
                (half[1:] + half[:-1]).reciprocal_().mul_(gz),
                (half[:, 1:] + half[:, :-1]).reciprocal_().mul_(gy),
                (half[..., 1:] + half[..., :-1]).reciprocal_().mul_(gx),
                (half[..., 0] + half[..., -1]).reciprocal_().mul_(gx),
            )

    def _wrapped(self, begin: int, end: int, number: int, periodic: int) -> tuple[torch.Tensor, slice]:
        """Return the indices that stand for begin … end - 1, and which of them stand for themselves or wrap."""
        at = torch.arange(begin, end, device=self._system.device)
        if periodic:
            return at.remainder_(number), slice(0, end - begin)
        return at.clamp_(0, number - 1), slice(max(0, -begin), min(end, number) - begin)

    def inner(self, t: torch.Tensor, by: int) -> torch.Tensor:
        """Return t without `by` planes and rows of its margin."""
        return t[by : t.shape[0] - by, by : t.shape[1] - by]

    def red(self, like: torch.Tensor) -> torch.Tensor:
        """Mark the voxels with even z + y + x; a window's z and y begin both even or both odd."""
        z, y, x = (torch.arange(n, device=self._system.device) & 1 for n in like.shape)
        return (z[:, None] ^ y).unsqueeze(-1) == x

    def around(self, v: torch.Tensor) -> torch.Tensor:
        """Sum conductance × v over the six neighbours; the result has one plane and row of margin less."""
        system, own = self._system, inner(v)
        if self._between is None:
            gz, gy, gx = map(float, system.g)
            s = (v[:-2, 1:-1] + v[2:, 1:-1]).mul_(gz)
            s.add_(v[1:-1, :-2], alpha=gy).add_(v[1:-1, 2:], alpha=gy)
            s[..., 1:].add_(own[..., :-1], alpha=gx)
            s[..., :-1].add_(own[..., 1:], alpha=gx)
            if system.periodic[2]:
                s[..., 0].add_(own[..., -1], alpha=gx)
                s[..., -1].add_(own[..., 0], alpha=gx)
            return s
        less = (len(self.mask) - len(v)) // 2
        cz, cy, cx, wrap = (self.inner(c, less) for c in self._between)
        s = cz[:-1, 1:-1] * v[:-2, 1:-1]
        s.addcmul_(cz[1:, 1:-1], v[2:, 1:-1])
        s.addcmul_(cy[1:-1, :-1], v[1:-1, :-2]).addcmul_(cy[1:-1, 1:], v[1:-1, 2:])
        s[..., 1:].addcmul_(inner(cx), own[..., :-1])
        s[..., :-1].addcmul_(inner(cx), own[..., 1:])
        if system.periodic[2]:
            s[..., 0].addcmul_(inner(wrap), own[..., -1])
            s[..., -1].addcmul_(inner(wrap), own[..., 0])
        return s

    def outflow(self, v: torch.Tensor) -> torch.Tensor:
        """Sum the currents to the six neighbours; the result has one plane and row of margin less."""
        system, own, less = self._system, inner(v), (len(self.mask) - len(v)) // 2
        mask = self.inner(self.mask, less)
        s, here = torch.zeros_like(own), slice(1, -1)
        every: list[Any] = [((slice(-2), here), 0, slice(-1)), ((slice(2, None), here), 0, slice(1, None))]
        every += [((here, slice(-2)), 1, slice(-1)), ((here, slice(2, None)), 1, slice(1, None))]
        for place, axis, face in every:
            drop = (own - v[place]).mul_(mask[place])
            if self._between is None:
                s.add_(drop, alpha=float(system.g[axis]))
            else:
                between = self.inner(self._between[axis], less)
                s.addcmul_(drop, between[face, here] if axis == 0 else between[here, face])
        drop = own[..., 1:] - own[..., :-1]
        drop.mul_(inner(mask)[..., 1:]).mul_(inner(mask)[..., :-1])
        drop.mul_(float(system.g[2]) if self._between is None else inner(self.inner(self._between[2], less)))
        s[..., 1:].add_(drop)
        s[..., :-1].sub_(drop)
        if system.periodic[2]:
            drop = (own[..., 0] - own[..., -1]).mul_(inner(mask)[..., 0]).mul_(inner(mask)[..., -1])
            drop.mul_(float(system.g[2]) if self._between is None else inner(self.inner(self._between[3], less)))
            s[..., 0].add_(drop)
            s[..., -1].sub_(drop)
        return s

    def diagonal(self) -> torch.Tensor:
        """Sum the conductances of each voxel, those to the faces included.

        The values where nothing conducts have no meaning.
        """
        d = self.around(self.mask.to(self._system.dtype))
        for place, conductance, _ in self.faces(1, 0.0):
            d[place] += conductance
        return d

    def inverse_diagonal(self) -> torch.Tensor:
        """Return 1 / `diagonal`, 0 where nothing conducts."""
        return self.diagonal().reciprocal_().masked_fill_(~inner(self.mask), 0.0)

    def faces(self, cut: int, end: float) -> list[tuple[Any, Any, float]]:
        """Find the two outer faces in the window less `cut` of its margin.

        Returns, for each face that is there, the place of its voxels, the conductance to them, and its potential, 0 or
        `end`.
        """
        system, found = self._system, []
        axis, g = system.geometry[7], float(system.g[system.geometry[7]])
        begin = self._piece[2 * axis] - self._margin + cut if axis < 2 else 0
        extent = self.mask.shape[axis] - 2 * cut if axis < 2 else self.mask.shape[2]
        for at, potential in ((system.geometry[8], 0.0), (system.geometry[9], end)):
            if 0 <= at - begin < extent:
                place: tuple[Any, ...] = (*(slice(None),) * axis, at - begin)
                half = 0.5 if self._between is None else self.inner(self._half, cut)[place]
                found.append((place, g / half, potential))
        return found

    def heat(self, v: torch.Tensor, voxels: Any, neighbours: Any, axis: int) -> torch.Tensor:
        """Return the energy dissipated over the faces between some voxels and their neighbours along an axis.

        Axis 3 stands for the faces across the sides along x.
        """
        drop = (v[neighbours] - v[voxels]).mul_(self.mask[neighbours]).mul_(self.mask[voxels]).square_()
        if self._between is None:
            return total(drop).mul_(float(self._system.g[min(axis, 2)]))
        own, beyond = slice(1, -1), slice(1, None)
        between = self._between[axis][beyond if axis == 0 else own, beyond if axis == 1 else own]
        return total(drop.mul_(between.view(drop.shape) if axis == 3 else between))

    def aggregates_of_places(self, margin: int) -> torch.Tensor:
        """Return the aggregate of each voxel at the system's places, (place, z, y, x of cells).

        The values where nothing conducts have no meaning. `margin` must be even.
        """
        system, by, step = self._system, self._margin - margin, self._system.step
        mask = self.inner(self.mask, by)
        shape = [n // s for n, s in zip(mask.shape, step, strict=True)]
        z, y = (at[by : len(at) - by : s] // s for at, s in ((self._z, step[0]), (self._y, step[1])))
        if system._cells is None:
            cell = torch.zeros(shape, dtype=torch.uint8, device=system.device)
            for i in range(8):
                if all((i >> 2 - a & 1) < n for a, n in enumerate(step)):
                    cell.bitwise_or_(mask[of_cell(i, step)].to(torch.uint8) << i)
        else:
            cell = system._cells.index_select(0, z).index_select(1, y)
        cell = cell.int().view(-1)
        number = system._numbers.index_select(0, cell).view(shape)
        row = z[:, None] * (system.geometry[1] // step[1]) + y[None, :]
        start = torch.empty(shape, dtype=system._aggregates.dtype, device=system.device)
        for odd in (0, 1):
            some = number[..., odd::2]
            # The aggregates of one colour of cells are counted along a row.
            begin = system._aggregates[z[:, None] + y[None, :] + odd & 1, row].unsqueeze(-1)
            start[..., odd::2] = some.cumsum(2, dtype=start.dtype).sub_(some).add_(begin)
        aggregate = system._aggregate_of_place.index_select(1, cell).view(-1, *shape)
        return aggregate + start
