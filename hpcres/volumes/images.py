"""High-res images of a study, grouped by the plane that they show."""

from __future__ import annotations

import numpy as np

from hpcres.counting.slices import planes_of
from hpcres.study import HighRes
from hpcres.volumes.formats import read_images
from hpcres.volumes.phases import PhaseMap


def images_by_plane(high_res: HighRes) -> dict[str, list[np.ndarray]]:
    """Read the high-res images of a study, grouped by the plane that they show.

    Parameters
    ----------
    high_res
        High-res part of the study.

    Returns
    -------
    dict
        For each plane, the stacks (slice, row, column) of the images, as uint8 positions in the list of phases. The
        plane is `all` where the material is isotropic, else yx, zx or zy, with rows along the axis named first.

    Raises
    ------
    InputError
        Where an image cannot be read, or has a label without a phase.
    """
    phase_map = PhaseMap(tuple(high_res.phases), "")
    found: dict[str, list[np.ndarray]] = {plane: [] for plane in planes_of(high_res)}
    for image in high_res.images:
        phase_map.where = image.path
        stack = phase_map.index(read_images(image.path))
        for plane in ("all",) if high_res.isotropic else dict.fromkeys(image.planes):
            turned = plane != "all" and plane not in found
            found[plane[::-1] if turned else plane].append(stack.transpose(0, 2, 1) if turned else stack)
    return found
