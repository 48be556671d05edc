"""The critic of Dahari et al. 2022: 2D slices in, one number each out; no normalisation, as WGAN-GP needs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

_LARGEST_LAST = 6
"""Edge that the last convolution has at most."""


class Critic(nn.Module):
    """(batch, phases, edge, edge) → (batch,). Four stride-2 convolutions, then one over what is left.

    `width` is the exponent of the last channel count; `edge_voxels` the slice edge (56 when 4 of 64 are cropped). Where
    more than 6 × 6 would be left, as of 120 (4 of 128 cropped), there are more stride-2 convolutions of the first
    one's channels, as in the published critic of 128².
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
        features = self.layers[:-1](slices)
        # Values are tens and their differences tenths, which half precision would round away.
        with torch.autocast(slices.device.type, enabled=False):
            return self.layers[-1](features.float()).flatten()
