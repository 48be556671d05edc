"""The imaging operator against brute force: blur, linear interpolation, binning, nearest, softmax, merged phases."""

from fractions import Fraction
from math import ceil, exp, floor

import numpy as np
import pytest
import torch

from hpcres.imaging import ImagingOperator, gaussian_kernel, one_hot
from hpcres.study import Imaging

SCALES = ["2", "3", "4", "8", "8/5", "16/3", "64/6", "16"]


@pytest.mark.parametrize(
    ("scale", "size", "sigma"),
    [
        ("4", 3, 0.8),
        ("8", 7, 1.4),
        ("3", 3, 0.8),
        ("16/3", 5, 1.1),
        ("8/5", 1, 0.5),
        ("7", 7, 1.4),
        ("2", 1, 0.5),
        ("64/6", 11, 2.0),
        ("16", 15, 2.6),
    ],
)
def test_blur_kernel_of_the_paper(scale, size, sigma):
    """k = ⌈s⌉ where odd, else ⌈s⌉ − 1, and σ = 0.3((k − 1)/2 − 1) + 0.8, worked out by hand."""
    weights = [exp(-0.5 * ((i - size // 2) / sigma) ** 2) for i in range(size)]
    expected = torch.tensor(weights) / sum(weights)
    assert torch.allclose(gaussian_kernel(Fraction(scale), Imaging()), expected)


def blurred(volume, kernel):
    half = len(kernel) // 2
    for axis in range(3):
        total = np.zeros_like(volume)
        for tap, weight in enumerate(kernel):
            place = np.clip(np.arange(volume.shape[axis]) + tap - half, 0, volume.shape[axis] - 1)
            total += weight * np.take(volume, place, axis)
        volume = total
    return volume


def linear_at(volume, scale):
    for axis in range(3):
        size = volume.shape[axis]
        place = np.clip((np.arange(floor(size / scale)) + 0.5) * float(scale) - 0.5, 0, size - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, size - 1)
        shape = [1, 1, 1]
        shape[axis] = -1
        weight = (place - low).reshape(shape)
        volume = np.take(volume, low, axis) * (1 - weight) + np.take(volume, high, axis) * weight
    return volume


def binned(volume, scale):
    """Exact mean over each low-res voxel's extent, through the integral of the piecewise constant volume."""
    for axis in range(3):
        size = volume.shape[axis]
        moved = np.moveaxis(volume, axis, 0)
        integral = np.concatenate([np.zeros_like(moved[:1]), np.cumsum(moved, 0)])
        edges = [Fraction(i) * scale for i in range(floor(size / scale) + 1)]
        at = [integral[floor(e)] + float(e - floor(e)) * (integral[ceil(e)] - integral[floor(e)]) for e in edges]
        volume = np.moveaxis(np.diff(np.array(at), axis=0) / float(scale), 0, axis)
    return volume


def softmax(channels, temperature):
    powers = np.exp(temperature * (channels - channels.max(0)))
    return powers / powers.sum(0)


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_under_resolved_is_blur_or_binning_then_softmax(scale, box, with_gradient):
    scale = Fraction(scale)
    shape = (2 * scale.numerator, 3 * scale.numerator + 1, 17)
    probabilities = torch.rand(1, 3, *shape, dtype=torch.float64).softmax(1)
    settings = Imaging(box=box, temperature=7.0)
    operator = ImagingOperator(scale, [[0, 2], [1]], settings).double()
    merged = [probabilities[0, 0] + probabilities[0, 2], probabilities[0, 1]]
    coarse = [
        binned(p.numpy(), scale) if box else linear_at(blurred(p.numpy(), operator.kernel.numpy()), scale)
        for p in merged
    ]
    result = operator(probabilities.requires_grad_(with_gradient))[0].detach().numpy()
    assert result.shape[1:] == tuple(floor(n / scale) for n in shape)
    np.testing.assert_allclose(result, softmax(np.array(coarse), 7.0), atol=1e-6)


def test_softmax_at_the_default_temperature_is_near_one_hot():
    labels = (torch.rand(1, 16, 16, 16) > 0.3).long()
    seen = ImagingOperator(Fraction(4), [[0], [1]], Imaging())(one_hot(labels, 2))
    assert (seen.max(1).values > 0.99).float().mean() > 0.9


@pytest.mark.parametrize("scale", SCALES)
def test_under_sampled_takes_one_voxel_unblurred(scale):
    scale = Fraction(scale)
    labels = torch.randint(0, 3, (2, 32, 33, 34))
    operator = ImagingOperator(scale, [[0], [1], [2]], Imaging(operator="under-sampled"))
    place = [[floor(i * scale) for i in range(floor(n / scale))] for n in labels.shape[1:]]
    expected = labels.numpy()[:, place[0]][:, :, place[1]][:, :, :, place[2]]
    for with_gradient in (False, True):
        found = operator(one_hot(labels, 3).requires_grad_(with_gradient))
        assert np.array_equal(found.argmax(1).numpy(), expected)


@pytest.mark.parametrize("scale", SCALES)
def test_block_fractions_are_means_over_blocks(scale):
    scale = Fraction(scale)
    probabilities = torch.rand(1, 3, 2 * scale.numerator, 3 * scale.numerator + 1, 17).softmax(1)
    operator = ImagingOperator(scale, [[0, 2], [1]], Imaging())
    merged = probabilities[0, 0] + probabilities[0, 2], probabilities[0, 1]
    expected = np.array([binned(p.double().numpy(), scale) for p in merged])
    for with_gradient in (False, True):
        found = operator.block_fractions(probabilities.requires_grad_(with_gradient))
        np.testing.assert_allclose(found[0].detach().numpy(), expected, atol=1e-6)


def test_a_window_with_its_margin_gives_the_values_of_the_whole():
    whole = torch.rand(1, 2, 64, 24, 24).softmax(1)
    operator = ImagingOperator(Fraction(4), [[0], [1]], Imaging(kernel_voxels=7))
    assert operator.margin_voxels == 4  # one low-res voxel
    part = operator(whole[:, :, 16:])
    assert torch.allclose(part[:, :, 1:], operator(whole)[:, :, 5:], atol=1e-5)
    assert not torch.allclose(part[:, :, :1], operator(whole)[:, :, 4:5], atol=1e-3)


@pytest.mark.parametrize("scale", ["2", "4", "8"])
def test_under_sampling_gives_back_what_was_interpolated(scale):
    operator = ImagingOperator(Fraction(scale), [[0], [1], [2]], Imaging(operator="under-sampled"))
    low_res = one_hot(torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 5, 4, 6))), 3)
    interpolated = operator.interpolated(low_res)
    assert torch.equal(operator(interpolated), low_res)
    assert torch.allclose(interpolated.sum(1), torch.ones(()))
