"""Batch-norm statistics and biases that suit a generator's weights, given to it before it paints.

They are found on cubes that stand for the volume.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hpcres.networks.resampling import center_crop
from hpcres.networks.superres import SuperResGenerator
from hpcres.training.data.cubes import LowResCubes

_AT_ONCE = 8
_EVERY = 7
"""One of this many voxels is used for the biases, because neighbours are much alike."""


@torch.no_grad()
def recalibrate_batch_norm(generator: SuperResGenerator, low_res: LowResCubes, cubes: int, batch: int) -> None:
    """Give each batch norm the statistics that the generator's own weights have on recalibration cubes.

    Running statistics belong to the weights of many steps. For averaged weights they can be far off.

    Parameters
    ----------
    generator : SuperResGenerator
        Changed in place, and left in eval mode.
    low_res : LowResCubes
        The low-res volume.
    cubes : int
        Number of recalibration cubes, at most.
    batch : int
        Number of cubes at a time, as in a training step. At most 8 are used.
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm3d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    generator.train()
    # As many as a step's statistics are of, on however many processes, but no more than one of them can hold.
    batch = min(batch, _AT_ONCE)
    for given in low_res.recalibration_inputs(cubes, batch, generator.conv_end.weight.device):
        generator(given, low_res.context)
    generator.eval()


@torch.no_grad()
def match_fractions(
    generator: SuperResGenerator,
    low_res: LowResCubes,
    cubes: int,
    crop: int,
    fractions: np.ndarray,
    context: int | None = None,
) -> None:
    """Shift the biases of the last layer until the labels of recalibration cubes have these phase fractions.

    Parameters
    ----------
    generator : SuperResGenerator
        Changed in place.
    low_res : LowResCubes
        The low-res volume.
    cubes : int
        Number of recalibration cubes, at most.
    crop : int
        High-res voxels of each side that are left out.
    fractions : ndarray
        (phases,): the wanted phase fractions.
    context : int or None
        Low-res voxels around the cubes, by default training.context.
    """
    device, seen = generator.conv_end.weight.device, []
    context = low_res.context if context is None else context
    for given in low_res.recalibration_inputs(cubes, 1, device, context):
        logits = center_crop(generator(given, context)[0], crop)
        seen.append(logits.flatten(1)[:, ::_EVERY].cpu().numpy())
    shifts = matching_shifts(np.concatenate(seen, axis=1), fractions)
    bias = generator.conv_end.bias
    assert bias is not None
    bias += torch.from_numpy(shifts).to(bias)


def matching_shifts(logits: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Return what to add to `logits` so that each phase is the likeliest in its share of the voxels.

    This holds as far as single voxels allow. The shifts d minimise mean(max(logits + d)) − fractions · d, a convex
    function whose slope is how far the shares are off. This is the dual of the transport of voxels to phases
    (Aurenhammer 1998).

    Parameters
    ----------
    logits : ndarray
        (phases, voxels).
    fractions : ndarray
        (phases,): share of the voxels that each phase should have.

    Returns
    -------
    ndarray
        (phases,): the shifts, whose mean is 0. A phase of share 0 stays as it is.
    """
    from scipy.optimize import minimize  # takes half a second to import, and only some runs need it

    there = fractions > 0
    logits, wanted = logits[there], fractions[there]
    scale = max(1e-9, float(logits.std()))

    def dual(shift: np.ndarray) -> tuple[float, np.ndarray]:
        moved = logits / scale + shift[:, None].astype(logits.dtype)
        shares = np.bincount(moved.argmax(0), minlength=len(wanted)) / logits.shape[1]
        return float(moved.max(0).mean(dtype=np.float64) - wanted @ shift), shares - wanted

    found = minimize(dual, np.zeros(len(wanted)), jac=True, method="BFGS", options={"gtol": 1e-4}).x
    shifts = np.zeros(len(there))
    shifts[there] = (found - found.mean()) * scale
    return shifts
