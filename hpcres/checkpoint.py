"""The self-describing checkpoint: all that inference needs besides the low-res volume.

One file: plain tensors, numbers, strings, lists and dicts, read with weights_only=True so that a file from a
stranger cannot run code. Written beside and renamed, so that a kill leaves the old one or the new one.
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
    """A generator in eval mode and what is known about it. `sha256` covers its configuration and weights."""

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
        return self.generator.scale

    @property
    def phases(self) -> tuple[str, ...]:
        return self.study.phases

    @property
    def family(self) -> str:
        return str(self.generator.config["family"])


def build_generator(study: Study) -> Generator:
    """The untrained generator that a study asks for."""
    try:
        return family_of(study.network.family).build(study)
    except ValueError as error:
        raise InputError(f"network: {error}") from None


def weights_sha256(generator: Generator) -> str:
    """Digest of configuration and weights, independent of device and file."""
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
    """Write atomically; `training_state` holds what a resumed run needs and inference ignores."""
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
    """Read a checkpoint onto the CPU; InputError for a file that is missing, foreign, damaged or not finite."""
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
