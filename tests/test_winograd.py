"""The Winograd form against the generator in double precision, and its bits against themselves in other blocks."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from small_painting import lively

from hpcres.engines import winograd
from hpcres.engines.winograd import Memory, WinogradNetwork, reach_low_res
from hpcres.geometry import Box
from hpcres.networks.superres import SuperResGenerator
from hpcres.simd.registers import EIGHT

CASES = {  # scale, width, blocks, padding, last stage, low-res shape
    "4": ("4", 3, 1, "replicate", "resize", (9, 8, 17)),
    "8": ("8", 3, 1, "replicate", "resize", (5, 6, 7)),
    "2": ("2", 4, 1, "replicate", "resize", (13, 12, 17)),
    "8/5": ("8/5", 3, 1, "replicate", "resize", (21, 23, 31)),
    "16/3": ("16/3", 3, 1, "replicate", "resize", (7, 8, 9)),
    "64/63": ("64/63", 4, 1, "replicate", "resize", (31, 33, 40)),
    "1": ("1", 4, 1, "replicate", "resize", (30, 31, 29)),
    "16": ("16", 3, 1, "replicate", "resize", (3, 4, 5)),
    "64/6": ("64/6", 3, 1, "replicate", "resize", (4, 5, 7)),
    "32, transposed": ("32", 2, 1, "zeros", "transposed", (3, 2, 2)),
    "zeros": ("4", 3, 1, "zeros", "resize", (9, 8, 11)),
    "zeros 8/5": ("8/5", 3, 1, "zeros", "resize", (21, 23, 31)),
    "zeros, transposed": ("4", 5, 1, "zeros", "transposed", (9, 8, 11)),
    "8, transposed": ("8", 3, 1, "replicate", "transposed", (5, 6, 7)),
    "two blocks": ("4", 5, 2, "replicate", "resize", (9, 8, 7)),
    "one low-res voxel": ("4", 3, 1, "replicate", "resize", (1, 2, 5)),
}


def network_of(name: str) -> tuple[SuperResGenerator, np.ndarray, WinogradNetwork]:
    """A generator, a window (z, y, x, channel) of its inputs, and its Winograd form."""
    scale, width, blocks, padding, last, shape = CASES[name]
    generator = lively(SuperResGenerator(3, 3, Fraction(scale), width, blocks, padding, last))
    rng = np.random.default_rng(3)
    network = WinogradNetwork(generator.stages(), shape)
    window = np.zeros((*shape, network.channels), np.float32)
    window[..., :3] = rng.integers(0, 3, shape)[..., None] == np.arange(3)
    window[..., 3] = rng.standard_normal(shape)
    return generator, window, network


def logits_of(generator: SuperResGenerator, window: np.ndarray) -> np.ndarray:
    """(phase, z, y, x), by the module in double precision."""
    given = torch.from_numpy(window[..., :4].transpose(3, 0, 1, 2)[None]).double()
    with torch.inference_mode():
        return generator.double()(given)[0].numpy()


def labels_of(network: WinogradNetwork, window: np.ndarray, write: Box, memory: Memory) -> np.ndarray:
    place = network.reads(write)
    found = network.labels(np.ascontiguousarray(window[place.slices]), place, write, memory)
    assert found is not None
    return found


@pytest.mark.parametrize("name", CASES)
def test_labels_are_the_module_s(name):
    """Faces, edges, corners and interior; where labels differ, two phases are within rounding of each other."""
    generator, window, network = network_of(name)
    logits = logits_of(generator, window)
    whole = Box.whole(logits.shape[1:])
    labels = labels_of(network, window, whole, Memory())
    differ = labels != logits.argmax(0)
    best = np.sort(logits, 0)
    assert len(np.unique(labels)) >= 2
    assert differ.mean() <= 1e-4
    assert not differ.any() or (best[-1] - best[-2])[differ].max() < 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize("name", CASES)
def test_every_block_gives_the_bits_of_the_whole(name, monkeypatch):
    """Bit for bit: the logits are compared through labels of a network whose phases are all but tied."""
    generator, window, _ = network_of(name)
    with torch.no_grad():
        # Phases that differ by rounding alone make each label a coin toss that any change of a bit may turn.
        generator.conv_end.weight[1:] = generator.conv_end.weight[:1]
        generator.conv_end.bias[1:] = generator.conv_end.bias[:1]
        generator.conv_end.weight[1:] *= 1 + 1e-7 * torch.randn_like(generator.conv_end.weight[1:])
    network = WinogradNetwork(generator.stages(), window.shape[:3])
    p = generator.scale.numerator
    whole = Box.whole([int(n * generator.scale) for n in window.shape[:3]])
    labels = labels_of(network, window, whole, Memory())
    assert len(np.unique(labels)) == 3
    memory, rng = Memory(), np.random.default_rng(1)
    for _ in range(12):
        start = [int(rng.integers(0, -(-n // p))) * p for n in whole.shape]
        stop = [min(n, a + int(rng.integers(1, 70))) for a, n in zip(start, whole.shape, strict=True)]
        block = Box(tuple(start), tuple(stop))
        assert (labels_of(network, window, block, memory) == labels[block.slices]).all(), block
    monkeypatch.setattr(winograd, "WIDEST", EIGHT)  # the registers of another machine
    assert (labels_of(network, window, whole, Memory()) == labels).all()
    monkeypatch.setattr(winograd, "_CACHE_BYTES", 2**15)  # the cache of another machine
    assert (labels_of(network, window, whole, Memory()) == labels).all()


@pytest.mark.parametrize("d", range(2, 65))
def test_every_scale_factor(d):
    """64/d: the labels of the module, and of a block that begins inside."""
    scale = Fraction(64, d)
    generator = lively(SuperResGenerator(2, 3, scale, 2 if scale <= 8 else 3))
    n = scale.denominator + 5 if scale > 2 else scale.denominator + 12
    shape = (n, 5, 6) if scale <= 8 else (scale.denominator + 2, 2, 3)
    network, rng = WinogradNetwork(generator.stages(), shape), np.random.default_rng(d)
    window = np.zeros((*shape, network.channels), np.float32)
    window[..., :2] = rng.integers(0, 2, shape)[..., None] == np.arange(2)
    window[..., 2] = rng.standard_normal(shape)
    given = torch.from_numpy(window[..., :3].transpose(3, 0, 1, 2)[None]).double()
    with torch.inference_mode():
        logits = generator.double()(given)[0].numpy()
    labels = labels_of(network, window, Box.whole(logits.shape[1:]), Memory())
    best = np.sort(logits, 0)
    differ = labels != logits.argmax(0)
    assert not differ.any() or (best[-1] - best[-2])[differ].max() < 1e-5 * np.abs(logits).max()
    p = scale.numerator
    block = Box((p, 0, 0), labels.shape) if labels.shape[0] > p else Box.whole(labels.shape)
    assert (labels_of(network, window, block, Memory()) == labels[block.slices]).all()


def test_ties_go_to_the_lowest_label():
    generator, window, _ = network_of("4")
    with torch.no_grad():
        generator.conv_end.weight[:] = generator.conv_end.weight[:1].clone()
        generator.conv_end.bias[:] = torch.tensor([-1.0, 2.0, 2.0])
    network = WinogradNetwork(generator.stages(), window.shape[:3])
    assert (labels_of(network, window, Box.whole([4 * n for n in window.shape[:3]]), Memory()) == 1).all()


def test_reach_is_what_blocks_read():
    for name in ("4", "8", "8/5", "16/3", "64/6", "two blocks"):
        scale, width, blocks, padding, last, _ = CASES[name]
        folded = SuperResGenerator(3, 3, Fraction(scale), width, blocks, padding, last).stages()
        network, reach = WinogradNetwork(folded, (10**6,) * 3), reach_low_res(folded)
        p, q = Fraction(scale).numerator, Fraction(scale).denominator
        worst = 0
        for first in range(400 * q, 408 * q, q):
            for length in (1, 2, 5, 64):
                for more in (0, 1):
                    start, stop = first * p // q, (first + length * q) * p // q + more
                    read = network.reads(Box((start,) * 3, (stop,) * 3))
                    worst = max(worst, first - read.start[0], read.stop[0] - (first + length * q))
        assert reach - 1 <= worst <= reach


def test_what_is_not_finite_is_no_label():
    _, window, network = network_of("4")
    whole = Box.whole([4 * n for n in window.shape[:3]])
    for poison in (np.inf, np.nan):
        window[4, 4, 4, 3] = poison
        assert network.labels(window, Box.whole(window.shape[:3]), whole, Memory()) is None


def test_blocks_take_what_the_list_of_stages_says():
    """The voxels of each grid that memory is counted from are those that are computed, in whole cells of four."""
    for name, (scale, width, blocks, padding, last, _) in CASES.items():
        folded = SuperResGenerator(3, 3, Fraction(scale), width, blocks, padding, last).stages()
        network = WinogradNetwork(folded, (10**6,) * 3)
        for start, stop in ((6400, 6464), (6400, 6529), (6437, 6438)):
            axes = network._axes(0, start, stop)
            needed = folded.needed(start, stop - 1, cell=4)
            assert needed[0] == (axes[0].reads.start, axes[0].reads.stop - 1), name
            assert needed[1:-1] == [(axis.start, axis.stop - 1) for axis in axes], name


def test_block_bytes_are_what_a_block_takes():
    for name, edge in (("4", 64), ("8", 64), ("16/3", 64), ("16", 64), ("zeros, transposed", 128)):
        generator, _, _ = network_of(name)
        network = WinogradNetwork(generator.stages(), (200,) * 3)
        block = Box((4 * edge,) * 3, (5 * edge,) * 3)
        read = network.reads(block)
        memory = Memory()
        network.labels(np.zeros((*read.shape, network.channels), np.float32), read, block, memory)
        held = memory.bytes + 4 * read.voxels * network.channels + edge**3
        assert held == pytest.approx(network.block_bytes(edge), rel=0.05)


def test_kernels_come_from_the_cache(tmp_path):
    """A thousand ranks must not compile what one has compiled."""
    program = (
        "import time, sys; sys.path.insert(0, sys.argv[1]); import test_winograd as t\n"
        "from hpcres.engines.winograd_kernels import convolve\n"
        "_, window, network = t.network_of('4')\n"
        "t.labels_of(network, window, t.Box((0, 0, 0), (16, 16, 16)), t.Memory())\n"
        "print(sum(convolve.stats.cache_misses.values()), sum(convolve.stats.cache_hits.values()))"
    )
    tests = str(Path(__file__).parent)
    found = [
        subprocess.run([sys.executable, "-c", program, tests], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert int(found[1].split()[0]) == 0
    assert int(found[1].split()[1]) > 0
