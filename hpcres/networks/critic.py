"""The critic of Dahari et al. 2022: one number for each 2D slice; no normalisation, as WGAN-GP needs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

_LARGEST_LAST = 6
"""Edge that the last convolution has at most."""


class Critic(nn.Module):
    """Critic (batch, phases, edge, edge) → (batch,): four stride-2 convolutions, then one over what is left.

    Where more than 6 × 6 would be left, as of 120 (4 of 128 cropped), there are more stride-2 convolutions with the
    channels of the first one, as in the published critic of 128².

    Parameters
    ----------
    phases
        Channels of a slice.
    edge_voxels
        Edge of a slice (56 when 4 of 64 are cropped); at least 16.
    width
        Exponent of the last channel count.

    Raises
    ------
    ValueError
        Where `edge_voxels` is below 16.
    """

    def __init__(self, phases: int, edge_voxels: int, width: int = 9) -> None:
        super().__init__()
        more = 0
        while edge_voxels >> (4 + more) > _LARGEST_LAST:
            more += 1
        counts = [phases, *[2 ** (width - 3)] * more, *(2 ** (width - 3 + i) for i in range(4))]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(counts):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
            edge_voxels //= 2
        if edge_voxels < 1:
            raise ValueError("the critic halves a slice four times, so it needs slices of at least 16 voxels")
        layers.append(nn.Conv2d(counts[-1], 1, edge_voxels))
        self.layers = nn.Sequential(*layers)

    def forward(self, slices: Tensor) -> Tensor:
        """Return one number for each slice, float32 (batch,), of slices (batch, phases, edge, edge)."""
        features = self.layers[:-1](slices)
        # Values are tens and their differences tenths, which half precision would round away.
        with torch.autocast(slices.device.type, enabled=False):
            return self.layers[-1](features.float()).flatten()
