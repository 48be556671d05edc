"""Checkpoints: one file that holds all that inference needs besides the low-res volume.

A checkpoint holds plain tensors, numbers, strings, lists and dicts. It is read with weights_only=True, so that a file
from a stranger cannot run code. It is written beside its destination and renamed, so that a kill leaves the old file
or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from hpcres import __version__
from hpcres.errors import InputError
from hpcres.families import FAMILIES, family_of
from hpcres.networks.generator import Generator
from hpcres.outputs import CHECKPOINT_MARK
from hpcres.study import Study
from hpcres.volumes.files import atomic_write

_FORMAT = f"{CHECKPOINT_MARK}1"


@dataclass(frozen=True)
class Checkpoint:
    """Generator in eval mode, and what is known about it.

    Attributes
    ----------
    path : str
        File that the checkpoint was read from.
    generator : Generator
        In eval mode, on the CPU.
    study : Study
        Study that the generator was trained for.
    step : int
        Training step at which the checkpoint was saved.
    sha256 : str
        Digest of the generator's configuration and weights; see `weights_sha256`.
    versions : dict of str to str
        Versions of hpcres, torch and Python that wrote the file.
    training_state : dict or None
        What a resumed run needs; inference ignores it.
    """

    path: str
    generator: Generator
    study: Study
    step: int
    sha256: str
    versions: dict[str, str]
    training_state: dict[str, Any] | None = field(repr=False)
    init_from: dict[str, Any] | None = None
    """Where training began, if not from random weights: path, sha256, step and phases of a checkpoint, and `made_anew`,
    the parts that did not fit."""

    @property
    def scale(self) -> Fraction:
        """Output voxels per low-res voxel along an axis."""
        return self.generator.scale

    @property
    def phases(self) -> tuple[str, ...]:
        """Phase names, in the order of the output's labels."""
        return self.study.phases

    @property
    def family(self) -> str:
        """Name of the generator's family, the study's `network.family`."""
        return str(self.generator.config["family"])


def build_generator(study: Study) -> Generator:
    """Build the untrained generator that a study asks for.

    Raises
    ------
    InputError
        The family cannot build a network with these settings.
    """
    try:
        return family_of(study.network.family).build(study)
    except ValueError as error:
        raise InputError(f"network: {error}") from None


def weights_sha256(generator: Generator) -> str:
    """Return the SHA-256 of a generator's configuration and weights, which does not depend on device or file."""
    digest = hashlib.sha256(json.dumps(generator.config, sort_keys=True).encode())
    for name, tensor in sorted(generator.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(
    path: str | Path,
    *,
    generator: Generator,
    study: Study,
    step: int,
    training_state: dict[str, Any] | None = None,
    init_from: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint atomically.

    Parameters
    ----------
    path : path
        File to write. Its folder is made if it does not exist.
    generator : Generator
        Network whose configuration and weights are saved.
    study : Study
        Study of the training run.
    step : int
        Training step that the weights belong to.
    training_state : dict, optional
        What a resumed run needs; inference ignores it.
    init_from : dict, optional
        Where training began; see `Checkpoint.init_from`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "format": _FORMAT,
        "network": generator.config,
        "weights": {name: tensor.detach().cpu() for name, tensor in generator.state_dict().items()},
        "study": study.as_json(),
        "step": step,
        "versions": {"hpcres": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "training": training_state,
        "init_from": init_from,
    }
    for left in path.parent.glob(f".{path.name}.*"):  # by a kill in the middle of what follows
        left.unlink(missing_ok=True)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Parameters
    ----------
    path : path
        File that `save_checkpoint` wrote.

    Returns
    -------
    Checkpoint
        The generator is in eval mode and its parameters need no gradient.

    Raises
    ------
    InputError
        The file is missing, damaged or of another program, its weights are not finite or do not fit the network, or it
        has a family or settings that this version does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; run `hpcres train` first or give `checkpoint`")
    path.open("rb").close()  # what the file system has against it is said in its own words
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds for a damaged or foreign file
        raise InputError(
            f"{path}: not a readable checkpoint (damaged, cut short or of another program); train again or copy it anew"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"{path}: not an hpcres checkpoint ({_FORMAT}); give the checkpoint.pt of `hpcres train`")
    config = dict(content["network"])
    name = config.pop("family", None)
    if name not in FAMILIES:
        raise InputError(
            f"{path}: its network is of the family {name!r}, which this hpcres does not know (it knows "
            f"{', '.join(map(repr, FAMILIES))}); it was written by hpcres {content['versions']['hpcres']}, so paint "
            "with that one"
        )
    try:
        study = Study.of_json(content["study"])
        generator = FAMILIES[name].rebuild(config)
    except (ValidationError, TypeError) as error:  # TypeError names a keyword
        others = error.errors() if isinstance(error, ValidationError) else []
        what = ", ".join(".".join(map(str, one["loc"])) for one in others) or str(error)
        raise InputError(
            f"{path}: written by hpcres {content['versions']['hpcres']} with settings that this one does not know "
            f"({what}); paint with that one, or train again"
        ) from None
    conditions = 0 if study.low_res is None else len(study.low_res.groups)
    if (generator.phases, generator.inputs.conditions) != (len(study.phases), conditions):
        raise InputError(
            f"{path}: the network has {generator.phases} phases and {generator.inputs.conditions} low-res channels, "
            f"its study {len(study.phases)} and {conditions}; the file was changed by hand, train again"
        )
    for name, tensor in content["weights"].items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: weight {name} is not finite, every label would be meaningless; use an earlier checkpoint"
            )
    try:
        generator.load_state_dict(content["weights"])
    except RuntimeError:
        raise InputError(f"{path}: weights do not fit the network it names; use the file as train wrote it") from None
    generator.eval()
    _freeze(generator)
    return Checkpoint(
        str(path),
        generator,
        study,
        content["step"],
        weights_sha256(generator),
        content["versions"],
        content["training"],
        content.get("init_from"),
    )


def _freeze(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
