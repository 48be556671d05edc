"""Shortest paths inside a phase, within one block: the steps, their lengths, and the kernels of Dijkstra's method."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import sqrt

import numpy as np

from hpcres.compiled import compiled
from hpcres.geometry import Triple, triple

UNIT = 4096
"""Integer length of the shortest voxel edge."""
UNREACHED = np.uint32(2**32 - 1)
"""Distance of a voxel without a path."""
OUTSIDE = np.uint8(255)
"""Label of the margin around a block."""
AROUND = [step for step in product((-1, 0, 1), repeat=3) if any(step)]
"""The 26 neighbours."""
_NEVER = np.int64(2**62)


def lengths_of_steps(neighbours: int, voxel_size: Sequence[float]) -> tuple[tuple[Triple, ...], tuple[int, ...]]:
    """Return the steps to the neighbours, and their lengths.

    Parameters
    ----------
    neighbours : int
        6 or 26.
    voxel_size : sequence of float
        Voxel edges z, y, x.

    Returns
    -------
    steps : tuple of Triple
        Steps z, y, x of -1, 0 or 1 voxel.
    weights : tuple of int
        Their lengths in units of the shortest voxel edge / UNIT.
    """
    steps = [s for s in AROUND if neighbours == 26 or sum(map(abs, s)) == 1]
    shortest = min(voxel_size)
    weights = [
        round(UNIT * sqrt(sum((k * h / shortest) ** 2 for k, h in zip(s, voxel_size, strict=True)))) for s in steps
    ]
    return tuple(triple(s) for s in steps), tuple(weights)


@compiled
def _enter(halo_label, halo_distance, label, distance, places, offsets, weights):
    """Take the steps from halo voxels (`places`) into the block that shorten a path; return the voxels they reach."""
    reached = np.empty(max(places.size, 16), np.int64)
    count = 0
    for place in places:
        for k in range(offsets.size):
            to = place + offsets[k]
            if 0 <= to < label.size and label[to] == halo_label[place]:
                length = np.int64(halo_distance[place]) + weights[k]
                if length < distance[to]:
                    distance[to] = length
                    if count == reached.size:
                        more = np.empty(2 * count, np.int64)
                        more[:count] = reached
                        reached = more
                    reached[count] = to
                    count += 1
    return reached[:count]


@compiled
def _spread(label, distance, seeds, offsets, weights, queue_of, queues, onward):
    """Run Dijkstra's method from `seeds` inside each phase, and return the length of the longest path.

    `seeds` are places in the order of their distance. There is one first-in-first-out queue for each length of step.
    What enters a queue is never shorter than what entered it before, so the nearest voxel is at the head of some queue.
    `onward` is the table of `_onward`.
    """
    # An entry is a place × 32 + the step that led there.
    size, last, first = 1024, np.int64(31), np.int64(offsets.size)
    entry, length = np.empty((queues, size), np.int64), np.empty((queues, size), np.int64)
    head, tail, nearest = np.zeros(queues, np.int64), np.zeros(queues, np.int64), np.full(queues, _NEVER)
    seed, longest = 0, np.int64(0)
    while True:
        at, best, own, came = np.int64(-1), _NEVER, -1, first
        if seed < seeds.size:
            at, best = seeds[seed], np.int64(distance[seeds[seed]])
        for q in range(queues):
            if nearest[q] < best:
                best, own = nearest[q], q
        if own >= 0:
            both = entry[own, head[own] & (size - 1)]
            at, came = both >> 5, both & last
            head[own] += 1
            nearest[own] = length[own, head[own] & (size - 1)] if head[own] < tail[own] else _NEVER
        elif at >= 0:
            seed += 1
        else:
            return longest
        if distance[at] != best:  # a shorter path has come since
            continue
        longest = best
        phase = label[at]
        for i in range(1, onward[came, 0] + 1):
            k = onward[came, i]
            # Places are never negative; numba need not look for such as count from the end.
            to = np.uint64(at + offsets[k])
            further = best + weights[k]
            if further < np.int64(distance[to]) and label[to] == phase:
                distance[to] = further
                q = queue_of[k]
                if tail[q] - head[q] == size:
                    more_entry = np.empty((queues, 2 * size), np.int64)
                    more_length = np.empty((queues, 2 * size), np.int64)
                    for p in range(queues):
                        for j in range(head[p], tail[p]):
                            more_entry[p, j & (2 * size - 1)] = entry[p, j & (size - 1)]
                            more_length[p, j & (2 * size - 1)] = length[p, j & (size - 1)]
                    entry, length, size = more_entry, more_length, 2 * size
                entry[q, tail[q] & (size - 1)] = (np.int64(to) << 5) | k
                length[q, tail[q] & (size - 1)] = further
                tail[q] += 1
                if nearest[q] == _NEVER:
                    nearest[q] = further


def _onward(steps: Sequence[Triple], weights: Sequence[int]) -> np.ndarray:
    """Tabulate how many steps are worth trying from a voxel, and which, by the step that led to it.

    The last row is for voxels that no step led to. A step is left out where the voxel before can reach its end in one
    step that is no longer than both together.
    """
    length = dict(zip(steps, weights, strict=True))
    table = np.zeros((len(steps) + 1, len(steps) + 1), np.int64)
    for row, (came, before) in enumerate([*length.items(), ((0, 0, 0), 0)]):
        found = []
        for k, (step, own) in enumerate(length.items()):
            direct = triple([a + b for a, b in zip(came, step, strict=True)])
            reached = direct == (0, 0, 0) or length.get(direct, before + own + 1) <= before + own
            if not any(came) or not reached:
                found.append(k)
        table[row, : len(found) + 1] = len(found), *found
    return table


def sweep(
    label: np.ndarray,
    distance: np.ndarray,
    halo_label: np.ndarray,
    halo_distance: np.ndarray,
    seeds: np.ndarray,
    steps: Sequence[Triple],
    weights: Sequence[int],
) -> None:
    """Shorten `distance` inside a block until no step from within it or its halo shortens it further.

    All arrays have a margin of one voxel.

    Parameters
    ----------
    label : np.ndarray
        Labels of the block; 255 in the margin.
    distance : np.ndarray
        uint32, changed in place.
    halo_label, halo_distance : np.ndarray
        What is known of the margin, and nothing within.
    seeds : np.ndarray
        Places (flat) whose distance was set by the caller.
    steps : sequence of Triple
        Steps to the neighbours.
    weights : sequence of int
        Their lengths.
    """
    strides = np.array([label.shape[1] * label.shape[2], label.shape[2], 1])
    offsets, lengths = np.array(steps, np.int64) @ strides, np.array(weights, np.int64)
    outer = np.flatnonzero(halo_distance != UNREACHED)
    flat = label.ravel(), distance.ravel()
    reached = _enter(halo_label.ravel(), halo_distance.ravel(), *flat, outer, offsets, lengths)
    seeds = np.unique(np.concatenate([seeds, reached]))
    seeds = seeds[np.argsort(flat[1][seeds], kind="stable")]
    known, queue_of = np.unique(lengths, return_inverse=True)
    longest = _spread(*flat, seeds, offsets, lengths, queue_of, len(known), _onward(steps, weights))
    assert longest + int(lengths.max()) < int(UNREACHED), "a path of more than a million voxel edges"
