"""The weights that a training begins from, if not from random ones: training.init_from."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from hpcres.checkpoint import load_checkpoint
from hpcres.errors import InputError
from hpcres.networks.superres import SuperResGenerator

_MUST_FIT = {
    name: name.replace("_", " ") for name in ("scale", "width", "residual_blocks", "last_stage", "noise_sigma_voxels")
}
"""Settings of a generator that must be the same to begin from its weights, with their names in messages."""


def take_over_weights(path: str, generator: SuperResGenerator, critics: nn.Module) -> dict[str, Any]:
    """Take over the weights of another training.

    Layers whose number of phases differs keep their own new weights. The weights of the critics are taken if the file
    has them (a best.pt has none) and if all but their first layers fit.

    Parameters
    ----------
    path : str
        Checkpoint of the other training.
    generator, critics : Module
        The networks of this training.

    Returns
    -------
    dict
        Where the weights are from: path, sha256, step, phases, and the layers that were made anew.

    Raises
    ------
    InputError
        There is no such file, or the generators differ in more than the number of phases.
    """
    if not os.path.isfile(path):
        raise InputError(f"training.init_from: {path}: no such file; give the checkpoint.pt of another training")
    other = load_checkpoint(path)
    theirs, mine = other.generator.config, generator.config
    if unlike := [key for key in _MUST_FIT if theirs[key] != mine[key]]:
        differences = " and ".join(f"{_MUST_FIT[key]} {theirs[key]}, not {mine[key]}" for key in unlike)
        raise InputError(
            f"training.init_from: {path}: its generator has {differences} as this study, so its weights do not "
            "fit; give the study the same, or begin from another checkpoint"
        )
    anew = []
    misfits = _take_over(generator, other.generator.state_dict())
    for layer, name in (("conv_first.weight", "first"), ("conv_end.weight", "last")):
        if layer in misfits:
            anew.append(f"the generator's {name} layer")
    ours, given = critics.state_dict(), (other.training_state or {}).get("critics", {})
    fits = given.keys() == ours.keys() and all(
        given[name].shape == ours[name].shape for name in ours if not name.endswith("layers.0.weight")
    )
    if not fits:
        anew.append("the critics")
    elif _take_over(critics, given):
        anew.append("the critics' first layer")
    return {
        "path": os.path.abspath(path),
        "sha256": other.sha256,
        "step": other.step,
        "phases": list(other.phases),
        "made_anew": anew,
    }


def _take_over(module: nn.Module, state: dict[str, Tensor]) -> set[str]:
    """Load every tensor of `state` that has the shape of the module's own, and return the names of the others."""
    misfits = {name for name, own in module.state_dict().items() if state[name].shape != own.shape}
    module.load_state_dict({name: state[name] for name in state if name not in misfits}, strict=False)
    return misfits
