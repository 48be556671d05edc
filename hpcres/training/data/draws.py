"""Random draws of a training: a generator for each kind and step, and what the critics are given.

Every draw is a function of (seed, step, cube), and not of the process that makes it. So any number of processes trains
on the same samples, and a resumed run continues them without any stored random state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from hpcres.study import Training

CUBE, CRITIC, CHOICE = range(3)
RECALIBRATION = 2**31
"""Kind of draw of the cubes before a generator is saved. Training uses the kinds up to its critic steps."""


def generator(seed: int, step: int, what: int, *which: int) -> np.random.Generator:
    """Return the generator of random numbers for a step and what is drawn in it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(step, what, *which))))


@dataclass(frozen=True)
class CriticDraw:
    """What one critic step draws.

    Tuples are per axis z, y, x. With training.diagonal_slices they also have entries for slices at 45° that contain z,
    y, x. `shares` is not per axis.

    Attributes
    ----------
    chosen : tuple of Tensor or None
        (cubes, slices): which slices of each cube; None for all. For slices at 45° (cubes, slices, 2), as
        pick_diagonals returns them.
    real : tuple of Tensor
        Patches of the images, one-hot (patches, phases, edge, edge). Patches beside slices at 45° are as unsharp as
        these.
    mix : tuple of Tensor
        (penalties,): weight of the patch in each mixture whose gradient is penalised.
    pairs : tuple of Tensor, or None
        (2, penalties): the patch and the generated slice of each mixture. None pairs the first with the first, and so
        on.
    shares : tuple of float
        Numbers of patches and of penalties of these cubes, each divided by the mean number of as many cubes. Means over
        the processes of (share × mean) are means over all.
    """

    chosen: tuple[Tensor | None, ...]
    real: tuple[Tensor, ...]
    mix: tuple[Tensor, ...]
    pairs: tuple[Tensor, ...] | None
    shares: tuple[float, float]


def critic_counts(settings: Training, cube: int) -> tuple[int, int, int]:
    """Return the numbers of generated slices, patches and penalties of a cube, for each axis and critic step.

    A number that the study gives for all cubes is divided among them, so that a cube has the same with any number of
    processes.

    Parameters
    ----------
    settings : Training
        Training settings of the study.
    cube : int
        Number of the cube.

    Returns
    -------
    slices, patches, penalties : int
        Generated slices, patches of the images, and mixtures whose gradient is penalised.
    """
    slices = settings.slices_per_axis or settings.slice_voxels

    def part(number: int | str) -> int:
        if isinstance(number, str):
            return slices
        number = max(number, settings.cubes)
        return (cube + 1) * number // settings.cubes - cube * number // settings.cubes

    patches = part(settings.real_patches)
    return slices, patches, min(slices, patches, part(settings.penalties))
