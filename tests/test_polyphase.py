"""The folded stages and their polyphase form give what the generator gives, at corners, edges, faces and inside."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional

from hpcres.networks.folded import Folded, fold
from hpcres.networks.resampling import upsample
from hpcres.networks.superres import SuperResGenerator

SCALES = ("1", "8/5", "2", "3", "4", "16/3", "8")
CASES = [
    *((s, padding, "resize", 1) for s in SCALES for padding in ("replicate", "zeros")),
    *((s, padding, "transposed", 1) for s in ("2", "4", "8") for padding in ("replicate", "zeros")),
    ("2", "replicate", "resize", 0), ("4", "replicate", "resize", 2), ("8", "zeros", "transposed", 3),
]  # fmt: skip


def trained(scale: str, padding: str = "replicate", last: str = "resize", blocks: int = 1, width: int = 3):
    """A generator whose every weight and statistic is off its initial value, in double precision."""
    torch.manual_seed(3)
    generator = SuperResGenerator(2, 3, Fraction(scale), width, blocks, padding, last).double().eval()
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1), (module.running_var, 0.5, 2), (module.weight, -1, 2),
                (module.bias, -0.2, 0.2),
            ):  # fmt: skip
                tensor.detach().uniform_(low, high)
    return generator


def window(shape: tuple[int, int, int], batch: int = 1) -> torch.Tensor:
    """One-hot labels and noise, (batch, 3, z, y, x) in double precision."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, (batch, *shape))
    given = np.stack([labels == 0, labels == 1, rng.standard_normal(labels.shape)], 1)
    return torch.from_numpy(given.astype(np.float64))


def naive(folded: Folded, x: torch.Tensor) -> torch.Tensor:
    """The stages as their description reads."""
    outputs: list[torch.Tensor] = []
    for stage in folded.stages:
        weight, bias = torch.from_numpy(stage.weight), torch.from_numpy(stage.bias)
        if stage.kind == "transposed":
            y = functional.conv_transpose3d(x, weight, bias, stride=2, padding=1)
        else:
            if stage.kind == "resized":
                x = upsample(x, stage.scale)
            mode = "replicate" if stage.padding == "replicate" else "constant"
            y = functional.conv3d(functional.pad(x, (1,) * 6, mode=mode), weight, bias)
        if stage.add_before_relu is not None:
            y = y + outputs[stage.add_before_relu]
        if stage.relu:
            y = y.relu()
        if stage.add_after_relu is not None:
            y = y + outputs[stage.add_after_relu]
        outputs.append(y)
        x = y
    return x


@pytest.mark.parametrize(("scale", "padding", "last", "blocks"), CASES)
def test_folded_stages_are_the_generator(scale, padding, last, blocks):
    generator = trained(scale, padding, last, blocks)
    folded = fold(generator)
    assert (folded.in_channels, folded.phases, folded.scale) == (3, 3, generator.scale)
    x = window((4, 5, 6))
    with torch.no_grad():
        expected = generator(x)
    error = (naive(folded, x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-12


def test_folding_does_not_touch_the_generator():
    generator = trained("4")
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    for stage in fold(generator).stages:
        stage.weight[:] = 0
        stage.bias[:] = 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())
