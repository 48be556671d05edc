"""The recipe of a study that says `recipe: auto`: which of the shipped ones, with what changed, and why.

The rules are the advice of docs/recipes.md. They use what training has before its first step: the images, the scale
factor, the phases that the low-res volume tells apart, the minutes, and a trial of the speed of this machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from hpcres.errors import InputError
from hpcres.study import Study
from hpcres.study.file import recipe_settings
from hpcres.volumes.images import images_by_plane

_MINUTES = 15.0
"""Value of training.minutes if a study gives neither minutes nor steps."""
_WIDE = 2.0
"""Least width of a feature, in low-res voxels, at which smooth noise is a gain (docs/recipes.md, Smooth noise)."""
_MOST_PHASES_OF_SIX_PIXELS = 3
_DOUBLED = {"pattern_weight": 960, "voxel_weight": 40, "lattice_weight": 40}
"""Weights of long-white if images differ by plane (docs/training.md, Separator)."""


@dataclass(frozen=True)
class Choice:
    """A recipe that may suit a study.

    Attributes
    ----------
    name : str
        Name of the shipped recipe.
    changes : dict
        Settings, by section, that differ from the shipped recipe.
    why : str
        Reason of the choice, for the user.
    """

    name: str
    changes: dict[str, dict[str, Any]]
    why: str = ""

    def applied(self, study: Study) -> Study:
        """Return the study with the settings of the recipe, and with no recipe left to choose.

        Settings that the study itself gives take precedence over those of the recipe.

        Parameters
        ----------
        study : Study
            A study that leaves its recipe open.

        Returns
        -------
        Study
            The study with the recipe.

        Raises
        ------
        InputError
            A setting of the study contradicts the recipe.
        """
        settings = study.model_dump(exclude_unset=True) | {"recipe": None}
        recipe = recipe_settings(self.name)
        for section, of_recipe in recipe.items():
            settings[section] = of_recipe | self.changes.get(section, {}) | settings.get(section, {})
        try:
            return Study.model_validate(settings)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(
                f"recipe: auto chose {self.name}, which the study's own settings contradict ({reason}); set another "
                "value, or name a recipe as base"
            ) from None

    @property
    def plain(self) -> dict[str, Any]:
        """Name and changes, which a checkpoint keeps."""
        return {"name": self.name, "changes": self.changes}


def choices(study: Study) -> list[Choice]:
    """Return the recipes that suit the study, the best one first.

    The last recipe suits any number of minutes.

    Parameters
    ----------
    study : Study
        A study whose `recipe` is auto. Its images are read.

    Returns
    -------
    list of Choice
        A long recipe, for as many minutes as its least_steps need, then fast.
    """
    width = feature_pixels(study)
    low_res = width / float(study.scale_factor)
    hidden = [name for group in study.low_res.groups if len(group) > 1 for name in group]
    seen = f"features of the visible phases are {width:.1f} pixels wide in the images, {low_res:.1f} low-res voxels"
    # Steps that the study gives are not to be cut short by a recipe's minutes. Minutes that it gives go before these.
    minutes: dict[str, Any] = {"minutes": None if "steps" in study.training.model_fields_set else _MINUTES}
    network: dict[str, Any] = {"least_width": None}  # with fewer minutes, fast is better than a narrow long
    training = dict(minutes)
    if not study.high_res.isotropic:
        name, training = "long-white", {**training, **_DOUBLED}
        why = "images differ by plane, so noise is white and the weights of patterns, lattice and voxels are doubled"
    elif low_res < _WIDE:
        name = "long-white"
        why = f"{seen}, fewer than {_WIDE:g}, so noise is white"
    else:
        name = "long"
        network["noise_sigma_voxels"] = sigmas = [0.0, round(width / 3, 1), round(2 * width / 3, 1)]
        why = f"{seen}, so noise is smooth as well, with a standard deviation of {sigmas[1]:g} and {sigmas[2]:g} voxels"
        if hidden and len(study.phases) <= _MOST_PHASES_OF_SIX_PIXELS:
            training["pattern_pixels"] = 6
            why += f"; the low-res volume does not tell {', '.join(hidden)} apart, so patterns have six pixels"
    long = Choice(name, {"network": network, "training": training}, why)
    few = "training.minutes are too few on this machine for the least steps of a longer recipe"
    return [long, Choice("fast", {"training": minutes}, few)]


def feature_pixels(study: Study) -> float:
    """Return the mean chord length, in pixels, of the group of visible phases whose chords are shortest in the images.

    Along lines of pixels, a chord of a group has two faces. So the mean chord is twice the group's share of pixels over
    the share of faces that part it from other groups.
    """
    return min(_chords(study))


def _chords(study: Study) -> Iterator[float]:
    groups = np.zeros(len(study.phases), np.int64)
    for number, group in enumerate(study.low_res.groups):
        groups[[study.phases.index(name) for name in group]] = number
    stacks = [groups[stack] for stacks in images_by_plane(study.high_res).values() for stack in stacks]
    for number in range(len(study.low_res.groups)):
        inside = [stack == number for stack in stacks]
        pixels = sum(int(one.sum()) for one in inside)
        parted = all_faces = 0
        for one in inside:
            for axis in (1, 2):
                faces = np.diff(one, axis=axis)
                parted, all_faces = parted + int(faces.sum()), all_faces + faces.size
        if parted:
            yield 2 * pixels / sum(one.size for one in inside) / (parted / all_faces)
        else:
            yield float(min(min(one.shape[1:]) for one in inside))
