"""Interface of every generator to training, checkpoints and inference, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

from torch import nn

from hpcres.networks.stages import Inputs, Stages


class Generator(nn.Module, ABC):
    """A network that turns what is given at low-res voxels into logits of phases at output voxels.

    `forward` takes float32 (batch, inputs.channels, z, y, x). It gives logits (batch, phases, z·scale, y·scale,
    x·scale), or what its trainer makes of them. Inference reads `stages` alone.

    Attributes
    ----------
    config : dict
        Plain values, saved in checkpoints, from which the family builds the same network again; `family` is one of
        them.
    scale : Fraction
        Output voxels per low-res voxel along an axis.
    """

    config: dict[str, Any]
    scale: Fraction

    @property
    @abstractmethod
    def phases(self) -> int:
        """Number of labels of the output."""

    @property
    @abstractmethod
    def inputs(self) -> Inputs:
        """What the generator is given at each low-res voxel."""

    @abstractmethod
    def stages(self) -> Stages:
        """Return the network in eval mode as a list of stages, with its weights."""
