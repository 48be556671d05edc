"""The generator in eval mode as a plain list of stages, batch norm folded into the convolutions, in float64.

Whatever computes labels (CPU engine, polyphase form) is built from this list and needs to know no module of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
from torch import Tensor, nn

from hpcres.networks.superres import Padding, ResidualBlock, SuperResGenerator

Kind = Literal["convolution", "resized", "transposed"]


@dataclass(frozen=True, eq=False)
class Stage:
    """One layer: y = relu(layer(x) + bias + stage[add_before_relu]) + stage[add_after_relu], x the stage before it.

    convolution: 3³, `weight` (out, in, 3, 3, 3). resized: trilinear upsampling by `scale` to ⌊n·scale⌋ voxels, as
    resampling.upsample does it, then such a convolution. Both pad what they convolve by one voxel of `padding`.
    transposed: kernel 4, stride 2, padding 1, no other padding at a face, `weight` (in, out, 4, 4, 4).
    `bias` is (out,); `scale` is output grid over input grid; the added outputs are of the stage's own grid.
    """

    name: str
    kind: Kind
    weight: np.ndarray
    bias: np.ndarray
    relu: bool
    scale: Fraction
    padding: Padding
    add_before_relu: int | None = None
    add_after_relu: int | None = None

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[0 if self.kind == "transposed" else 1])

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[1 if self.kind == "transposed" else 0])


@dataclass(frozen=True, eq=False)
class Folded:
    """The stages in order; the last one's output are the logits. `halo_low_res` and `scale` as the generator's."""

    stages: tuple[Stage, ...]
    scale: Fraction
    halo_low_res: int

    @property
    def in_channels(self) -> int:
        """Low-res channels and the noise."""
        return self.stages[0].in_channels

    @property
    def phases(self) -> int:
        return self.stages[-1].out_channels


def fold(generator: SuperResGenerator) -> Folded:
    """The stages of `generator.eval()`, equal to it up to rounding; running statistics are used whatever its mode."""
    padding: Padding = generator.config["padding"]

    def stage(
        name: str, layer: nn.Module, norm: nn.Module | None, kind: Kind = "convolution", scale: int | Fraction = 1,
        relu: bool = True,
    ) -> Stage:  # fmt: skip
        weight, bias = _folded(layer, norm)
        transposed = kind == "transposed"
        return Stage(name, kind, weight, bias, relu, Fraction(scale), "zeros" if transposed else padding)

    stages = [stage("first", generator.conv_first, generator.norm_first)]
    for index, block in enumerate(generator.blocks):
        assert isinstance(block, ResidualBlock), block
        given = len(stages) - 1
        stages.append(stage(f"block {index} in", block.conv_in, block.norm_in))
        joined = stage(f"block {index} out", block.conv_out, block.norm_out)
        last = index == len(generator.blocks) - 1
        stages.append(replace(joined, add_before_relu=given, add_after_relu=0 if last else None))
    if not generator.blocks:  # first + first, and relu(2 a) is 2 relu(a)
        stages[0] = replace(stages[0], weight=2 * stages[0].weight, bias=2 * stages[0].bias)
    for index, (convolution, norm) in enumerate(generator.resizes):
        stages.append(stage(f"resize {index}", convolution, norm, "resized", 2))
    if generator.conv_transposed is not None:
        stages.append(stage("transposed", generator.conv_transposed, generator.norm_transposed, "transposed", 2))
    if generator.config["last_stage"] == "transposed":
        kind: Kind = "transposed"
    else:
        kind = "convolution" if generator.last_scale == 1 else "resized"
    stages.append(stage("last", generator.conv_last, generator.norm_last, kind, generator.last_scale))
    stages.append(stage("end", generator.conv_end, None, relu=False))
    return Folded(tuple(stages), generator.scale, generator.halo_low_res)


def _folded(layer: nn.Module, norm: nn.Module | None) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of norm(layer(·)) with the running statistics."""
    assert isinstance(layer, nn.Conv3d | nn.ConvTranspose3d), layer
    weight, bias = _float64(layer.weight), _float64(layer.bias)
    if norm is None:
        return weight, bias
    assert isinstance(norm, nn.BatchNorm3d), norm
    gain = _float64(norm.weight) / np.sqrt(_float64(norm.running_var) + norm.eps)
    shape = (1, -1, 1, 1, 1) if isinstance(layer, nn.ConvTranspose3d) else (-1, 1, 1, 1, 1)
    return weight * gain.reshape(shape), (bias - _float64(norm.running_mean)) * gain + _float64(norm.bias)


def _float64(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.detach().cpu().double().numpy().copy()
