"""Noise is a function of seed and place, and it is normal."""

import numpy as np
from scipy import stats

from hpcres.geometry import Box
from hpcres.noise import _philox, normals


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
