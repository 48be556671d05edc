"""Noise is a function of seed and place, and it is normal."""

from fractions import Fraction

import numpy as np
from scipy import stats

from hpcres.geometry import Box
from hpcres.noise import _QUANTILES, _philox, gaussian_taps, normals, smoothed


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10."""
    zeros = _philox(*[np.uint64(0)] * 6)
    assert [int(w) for w in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = _philox(*[np.uint64(0xFFFFFFFF)] * 6)
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_any_window_sees_the_same_values():
    whole = normals(2**63 + 11, Box((0, 0, 0), (9, 10, 23)))
    for start, stop in [((3, 4, 5), (9, 9, 18)), ((0, 0, 1), (1, 1, 2)), ((8, 9, 20), (9, 10, 23))]:
        box = Box(start, stop)
        assert (normals(2**63 + 11, box) == whole[box.slices]).all()


def test_indices_beyond_32_bit_volumes_differ():
    """A 32-bit linear index would repeat after 4.3e9 voxels; place does not."""
    a = normals(1, Box((0, 0, 0), (4, 4, 64)))
    b = normals(1, Box((2**31, 0, 0), (2**31 + 4, 4, 64)))
    assert (a != b).mean() > 0.99


def test_values_are_standard_normal_and_independent():
    a = normals(7, Box((100, 0, 0), (164, 64, 64)))
    assert stats.kstest(a.ravel()[:200_000], "norm").pvalue > 1e-3
    assert abs(a.var() - 1) < 0.01
    for axis in range(3):
        rolled = np.roll(a, 1, axis)
        assert abs((a * rolled).mean()) < 4 / np.sqrt(a.size)
    other = normals(8, Box((100, 0, 0), (164, 64, 64)))
    assert abs((a * other).mean()) < 4 / np.sqrt(a.size)


def test_smooth_noise_is_normal_and_correlated_as_a_gaussian():
    """A Gaussian of σ convolved with itself has √2 σ: correlation exp(−h² / 4σ²). σ of 10 high-res voxels is 2.5."""
    taps = gaussian_taps(10, Fraction(4))
    field = smoothed(normals(7, Box((0, 0, 0), (160, 160, 160))), taps)
    assert field.shape == (144,) * 3
    assert field.dtype == np.float32
    spread = 5 / np.sqrt(field.size / (2 * np.sqrt(np.pi) * 2.5) ** 3)  # as many independent values
    assert abs(field.mean()) < spread
    assert abs(field.var() - 1) < spread
    for axis in range(3):
        line = np.moveaxis(field, axis, 0)
        for apart in (1, 2, 4, 8):
            assert abs((line[:-apart] * line[apart:]).mean() - np.exp(-(apart**2) / (4 * 2.5**2))) < spread


def test_any_window_sees_the_same_smooth_values_to_the_bit():
    taps, white = gaussian_taps(5.0, Fraction(8, 3)), normals(3, Box((0, 0, 0), (21, 22, 40)))
    whole, reach = smoothed(white, taps), len(taps) // 2
    for start, stop in [((3, 1, 4), (9, 9, 18)), ((0, 0, 1), (1, 1, 2)), ((6, 8, 17), (9, 10, 28))]:
        grown = tuple(slice(a, b + 2 * reach) for a, b in zip(start, stop, strict=True))
        assert (smoothed(white[grown], taps) == whole[Box(start, stop).slices]).all()


def test_noise_of_no_width_is_white_as_it_was():
    white = normals(3, Box((0, 0, 0), (5, 6, 7)))
    assert (smoothed(white, gaussian_taps(0.0, Fraction(4))) == white).all()


def test_the_table_holds_the_normal_quantiles_in_the_middle_of_equal_slices():
    from scipy.special import ndtri

    expected = ndtri((np.arange(65536) + 0.5) / 65536)
    assert np.array_equal(_QUANTILES, (expected / expected.std()).astype(np.float32))
    assert np.array_equal(_QUANTILES, -_QUANTILES[::-1])
