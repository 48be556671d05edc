"""From a window of low-res labels to the high-res labels of a tile, block by block.

Every block is computed by one thread with one fixed shape, so that neither the number of ranks nor of threads can
change a rounding; threads work on different blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod

import numpy as np
import torch

from hpcres.errors import InputError
from hpcres.geometry import Box, Tile, TilePlan
from hpcres.networks.superres import SuperResGenerator
from hpcres.noise import normals
from hpcres.volumes import PhaseMap, read_around

BLOCK_BYTES = 2 * 2**30
"""What the activations of one block may take; the block's edge follows from it and the network alone."""


def block_bytes(generator: SuperResGenerator, block_voxels: int) -> int:
    """Estimated peak of one block's activations: the last upsampling's input, output and a padded copy, fp32."""
    p, q = generator.scale.numerator, generator.scale.denominator
    edge = block_voxels + (-(-generator.halo_low_res // q) * q + generator.halo_low_res) * p // q
    channels = generator.channels_last
    return int(4 * edge**3 * channels * 3.5)


def block_edge(generator: SuperResGenerator) -> int:
    """High-res voxels per edge of a compute block: 64, 128 or 192, whatever stays within BLOCK_BYTES."""
    edges = [edge for edge in (192, 128) if block_bytes(generator, edge) <= BLOCK_BYTES]
    return edges[0] if edges else 64


class Painter:
    """Paints tiles with a generator in eval mode on one device. `threads` blocks are computed at a time on a CPU."""

    def __init__(
        self, generator: SuperResGenerator, plan: TilePlan, phase_map: PhaseMap, seed: int, device: torch.device,
        threads: int,
    ) -> None:  # fmt: skip
        self.plan, self.seed, self.device = plan, seed, device
        self._generator = generator.to(device)
        self._phase_map = phase_map
        self._channels: int = generator.config["low_res_channels"]
        self.block_voxels = block_edge(generator)
        workers = threads if device.type == "cpu" else 1
        if device.type == "cuda":  # fp32 means fp32: TF32 would flip labels, and cuDNN's search change bytes
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        self._pool = ThreadPoolExecutor(workers, initializer=_one_thread)
        blocks = len(plan.blocks_of(plan.tiles[0], self.block_voxels))
        self.tiles_in_flight = max(2, -(-workers // blocks))
        """Enough for every thread to have a block, and one tile more being read or compressed."""

    def paint(self, tile: Tile, read: Callable[[Box], np.ndarray]) -> np.ndarray:
        """uint8 labels (z, y, x) of tile.write; `read` gives low-res labels as the file has them."""
        labels = np.empty(tile.write.shape, np.uint8)
        blocks = self.plan.blocks_of(tile, self.block_voxels)
        low_res = read_around(read, tile.read, self.plan.low_res_shape)
        for block, part in zip(blocks, self.paint_blocks(blocks, low_res, tile.read), strict=True):
            labels[block.write.relative_to(tile.write.start).slices] = part
        return labels

    def paint_blocks(self, blocks: list[Tile], low_res: np.ndarray, place: Box) -> list[np.ndarray]:
        """The labels of each block's write box; `low_res` are the labels of the low-res box `place`."""
        window = self._phase_map.index(low_res)
        inner = [window[block.read.relative_to(place.start).slices] for block in blocks]
        return list(self._pool.map(self._generate, inner, blocks))

    @torch.inference_mode()
    def _generate(self, window: np.ndarray, block: Tile) -> np.ndarray:
        given = np.empty((1, self._channels + 1, *window.shape), np.float32)
        for channel in range(self._channels):
            given[0, channel] = window == channel
        given[0, -1] = read_around(partial(normals, self.seed), block.read, self.plan.low_res_shape)
        logits = self._generator(torch.from_numpy(given).to(self.device))
        # max gives the first of equal values, so ties go to the lowest label; it hands on a NaN.
        best, labels = logits[(0, slice(None), *block.crop.slices)].max(0)
        if not best.isfinite().all():
            raise InputError("the network's output is not finite, labels would mean nothing; use an earlier checkpoint")
        return labels.to(torch.uint8).cpu().numpy()

    def close(self) -> None:
        self._pool.shutdown()


def _one_thread() -> None:
    torch.set_num_threads(1)


def cores() -> int:
    return len(os.sched_getaffinity(0))


def operations(generator: SuperResGenerator, box: Box) -> float:
    """Floating-point operations of the convolutions for a low-res box: 2 per multiply-add."""
    total, grid = 0.0, float(box.voxels)
    for module in generator.modules():
        if isinstance(module, torch.nn.ConvTranspose3d):
            grid *= 8
            total += 2 * grid * module.in_channels * module.out_channels * 8
        elif isinstance(module, torch.nn.Conv3d):
            if module is generator.conv_resize:
                grid *= 8
            elif module is generator.conv_last:
                grid *= float(generator.last_scale) ** 3
            total += 2 * grid * module.in_channels * module.out_channels * prod(module.kernel_size)
    return total
