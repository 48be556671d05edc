"""The generator's halo is exact, at every face and scale factor, and no larger than it must be."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from hpcres.geometry import plan_tiles
from hpcres.networks.critic import Critic
from hpcres.networks.generator import Generator
from hpcres.networks.resampling import upsample
from hpcres.networks.superres import SuperResGenerator

CASES = [
    *((s, "replicate", "resize") for s in ("1", "8/5", "2", "64/23", "4", "16/3", "64/9", "8", "64/6", "16")),
    *((s, "zeros", "transposed") for s in ("2", "4", "8", "16")),
]


def random_generator(scale: str, padding: str = "replicate", last: str = "resize", blocks: int = 1):
    torch.manual_seed(1)
    generator = SuperResGenerator(2, 3, Fraction(scale), 3, blocks, padding, last).double().eval()
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.bias, 0.5, 1)  # few ReLUs that hide what they are given
    return generator


def tiled_error(generator: SuperResGenerator, halo: int) -> float:
    """Largest difference between tiled and whole logits for a volume whose axes do not divide."""
    shape = (11, 13, 18) if generator.scale <= 4 else (4, 5, 18) if generator.scale <= 8 else (11, 2, 3)
    x = torch.randn(1, 3, *shape, dtype=torch.float64)
    p = generator.scale.numerator
    plan = plan_tiles(x.shape[2:], generator.scale, (2, 2, 2), halo, p * max(1, 8 // p))
    with torch.no_grad():
        whole = generator(x)
        assert tuple(whole.shape[2:]) == plan.shape
        worst = 0.0
        for tile in plan.tiles:
            crop = tile.write.relative_to([int(start * generator.scale) for start in tile.read.start])
            part = generator(x[(..., *tile.read.slices)])[(..., *crop.slices)]
            worst = max(worst, float((part - whole[(..., *tile.write.slices)]).abs().max()))
    return worst


@pytest.mark.parametrize(("scale", "padding", "last"), CASES)
def test_tiled_with_the_derived_halo_is_whole(scale, padding, last):
    generator = random_generator(scale, padding, last)
    assert tiled_error(generator, generator.halo_low_res) < 1e-12


# 64/23 is left out: its windows start at multiples of 23 low-res voxels, far beyond any halo.
@pytest.mark.parametrize(("scale", "padding", "last"), [case for case in CASES if case[0] != "64/23"])
def test_one_voxel_less_is_not(scale, padding, last):
    generator = random_generator(scale, padding, last)
    assert tiled_error(generator, generator.halo_low_res - 1) > 1e-9


@pytest.mark.parametrize(("scale", "padding", "last"), [case for case in CASES if Fraction(case[0]).denominator < 6])
def test_surroundings_are_cut_off_early_as_if_it_were_at_the_end(scale, padding, last):
    generator = random_generator(scale, padding, last)
    p, q = generator.scale.numerator, generator.scale.denominator
    seen = []
    generator.conv_end.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[2:]))
    around_all = (q, 2 * q, 6) if q == 1 else (q, 2 * q)
    for around in around_all if generator.scale <= 8 else around_all[:1]:  # maps of high resolution take long
        inner = [n * q for n in (2, 1, 3)]
        x = torch.randn(1, 3, *(n + 2 * around for n in inner), dtype=torch.float64)
        margin = around // q * p
        with torch.no_grad():
            whole, cut = generator(x)[(..., *[slice(margin, -margin)] * 3)], generator(x, around)
        assert cut.shape[2:] == tuple(n // q * p for n in inner)
        assert (cut - whole).abs().max() < 1e-12
        # An interpolation reads a voxel more, and by fractions cuts are of whole voxels of both grids.
        most = 2 * (2 if last == "transposed" else 4 if q == 1 else 4 + 2 * p)
        assert all(a <= n // q * p + most for a, n in zip(seen[-1], inner, strict=True))


def test_low_res_maps_lose_a_voxel_a_convolution_where_there_are_surroundings_enough():
    generator = random_generator("4", "zeros", "transposed", blocks=3)
    edges = []
    for name, module in generator.named_modules():
        if name.startswith(("norm_first", "blocks")) and isinstance(module, torch.nn.BatchNorm3d):
            module.register_forward_hook(lambda module, given, out: edges.append(out.shape[2]))
    x = torch.randn(1, 3, 18, 18, 18, dtype=torch.float64)
    with torch.no_grad():
        whole, cut = generator(x)[..., 28:-28, 28:-28, 28:-28], generator(x, 7)
    assert (cut - whole).abs().max() < 1e-12
    # The last upsamplings read one voxel around the inner 4; each of the six convolutions before one more.
    assert edges[:7] == [18] * 7
    assert edges[7:] == [18, 16, 14, 12, 10, 8, 6]


def test_default_halo_is_five_low_res_voxels_and_grows_with_blocks():
    for scale in ("2", "4", "8", "8/5", "16/3"):
        assert random_generator(scale).halo_low_res == 5
    assert random_generator("4", blocks=3).halo_low_res == 9


def test_rational_upsampling_matches_torch_where_torch_is_exact():
    x = torch.randn(1, 2, 8, 12, 20, dtype=torch.float64)
    for scale in (Fraction(8, 5), Fraction(4, 3), Fraction(64, 37)):
        expected = (
            torch.nn.functional.interpolate(
                x, size=[int(n * scale) for n in x.shape[2:]], scale_factor=None, mode="trilinear"
            )
            if all((n * scale).denominator == 1 for n in x.shape[2:])
            else torch.nn.functional.interpolate(
                x, scale_factor=float(scale), mode="trilinear", recompute_scale_factor=False
            )
        )
        assert torch.allclose(upsample(x, scale), expected, atol=1e-12)


def test_a_generator_has_phases_inputs_and_stages():
    class Without(Generator):
        pass

    with pytest.raises(TypeError, match="inputs, phases, stages"):
        Without()


def test_transposed_end_needs_a_doubling():
    with pytest.raises(ValueError, match="use resize"):
        SuperResGenerator(2, 3, Fraction(8, 5), last_stage="transposed")


@pytest.mark.parametrize(
    ("edge", "convolutions", "last"), [(16, 4, 1), (56, 4, 3), (64, 4, 4), (88, 4, 5), (120, 5, 3), (248, 6, 3)]
)
def test_critic_gives_one_number_a_slice(edge, convolutions, last):
    """Slices of twice the edge pass one convolution more, of the first one's channels."""
    critic = Critic(3, edge, 5)
    assert critic(torch.zeros(7, 3, edge, edge)).shape == (7,)
    halving = [layer for layer in critic.layers if isinstance(layer, nn.Conv2d)][:-1]
    assert [layer.out_channels for layer in halving] == [4] * (convolutions - 4) + [4, 8, 16, 32]
    assert critic.layers[-1].kernel_size == (last, last)


def test_paper_widths():
    """Channels of the published network at width 8: 512 → 256 → 128 → 64 at scale factor 8."""
    generator = SuperResGenerator(2, 3, Fraction(8))
    assert [generator.conv_first.out_channels, generator.conv_resize.out_channels] == [512, 256]
    assert [generator.conv_transposed.out_channels, generator.conv_last.out_channels] == [128, 64]


def test_critic_values_keep_their_digits_in_half_precision():
    """Values of tens whose differences, tenths, are the loss: bf16 would round them to quarters."""
    torch.manual_seed(0)
    critic = Critic(3, 56, 7)
    with torch.no_grad():
        critic.layers[-1].bias += 40
    slices = torch.rand(48, 3, 56, 56)
    exact = critic(slices)
    with torch.autocast("cpu", torch.bfloat16):
        ours = critic(slices)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 0.1 * (exact - 40).abs().max()
    assert ours.bfloat16().float().unique().numel() < ours.unique().numel()
