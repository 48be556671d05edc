"""From a window of low-res labels to the high-res labels of a tile, block by block, a thread a block."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import floor, prod
from typing import Protocol

import numpy as np
import torch

from hpcres.errors import InputError
from hpcres.geometry import Box, Tile, TilePlan, blocks, triple
from hpcres.inference.winograd import Memory, WinogradNetwork, reach_low_res
from hpcres.networks.folded import fold
from hpcres.networks.superres import SuperResGenerator
from hpcres.noise import normals
from hpcres.volumes import PhaseMap, read_around

BLOCK_BYTES = 1536 * 2**20
"""What a thread may take for the maps of its block."""
_BLOCK_EDGES = (256, 192, 128, 64)


class Network(Protocol):
    """A generator in a form that labels any high-res box from the low-res window it reads."""

    channels: int
    """Of a window: one-hot labels, the noise, and zeros up to here."""
    weight_bytes: int

    def reads(self, write: Box) -> Box: ...

    def labels(self, window: np.ndarray, place: Box, write: Box, memory: Memory) -> np.ndarray | None: ...

    def block_bytes(self, edge: int) -> int: ...

    def arithmetic(self, block_voxels: int) -> str: ...


class TorchNetwork:
    """The generator as torch runs it, for GPUs."""

    def __init__(self, generator: SuperResGenerator, plan: TilePlan, device: torch.device) -> None:
        # fp32 means fp32: TF32 would flip labels, and cuDNN's search change bytes.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        self._generator, self._plan, self._device = generator.to(device), plan, device
        self.channels = generator.config["low_res_channels"] + 1
        self.weight_bytes = sum(p.nbytes for p in generator.parameters())

    def reads(self, write: Box) -> Box:
        """The box's own low-res voxels and the network's halo; its start is where interpolation weights repeat."""
        p, q = self._plan.scale.numerator, self._plan.scale.denominator
        halo = self._generator.halo_low_res
        axes = []
        for a, b, n, wraps in zip(
            write.start, write.stop, self._plan.low_res_shape, self._plan.periodic, strict=True
        ):
            start, stop = a // p * q - -(-halo // q) * q, -(-b * q // p) + halo
            axes.append((start, stop) if wraps else (max(start, 0), min(stop, n)))
        return Box(triple([start for start, _ in axes]), triple([stop for _, stop in axes]))

    @torch.inference_mode()
    def labels(self, window: np.ndarray, place: Box, write: Box, memory: Memory) -> np.ndarray | None:
        """uint8 labels (z, y, x) of a high-res box from the window of `reads(write)`; None for a NaN or infinity."""
        given = torch.from_numpy(window.transpose(3, 0, 1, 2)[None]).to(self._device)
        scale = self._plan.scale
        crop = write.relative_to([floor(s * scale) for s in place.start])
        # max gives the first of equal values, so ties go to the lowest label; it hands on a NaN.
        best, labels = self._generator(given)[(0, slice(None), *crop.slices)].max(0)
        return labels.to(torch.uint8).cpu().numpy() if best.isfinite().all() else None

    def block_bytes(self, edge: int) -> int:
        """The last upsampling's input and output and a padded copy, fp32."""
        edge += floor(2 * self._generator.halo_low_res * self._plan.scale)
        return int(4 * edge**3 * self._generator.channels_last * 3.5)

    def arithmetic(self, block_voxels: int) -> str:
        """A library's kernels may round differently where blocks lie differently."""
        return f"torch {torch.__version__} {self._device.type} fp32, blocks of {block_voxels}"


def halo_of(generator: SuperResGenerator) -> int:
    """Low-res voxels around a tile that painting it reads: all that its whole cells can depend on."""
    return max(reach_low_res(fold(generator)), generator.halo_low_res + 1)


class Painter:
    """Paints tiles with a generator in eval mode on one device. `threads` blocks are computed at a time on a CPU."""

    def __init__(
        self, generator: SuperResGenerator, plan: TilePlan, phase_map: PhaseMap, seed: int, device: torch.device,
        threads: int,
    ) -> None:  # fmt: skip
        self.plan, self.seed, self.device = plan, seed, device
        self.network: Network = (
            WinogradNetwork(fold(generator), plan.low_res_shape, plan.periodic)
            if device.type == "cpu"
            else TorchNetwork(generator, plan, device)
        )
        self._phase_map = phase_map
        self._channels: int = generator.config["low_res_channels"]
        self.block_voxels = next(
            (edge for edge in _BLOCK_EDGES if self.network.block_bytes(edge) <= BLOCK_BYTES), _BLOCK_EDGES[-1]
        )
        """Longest edge of a block, but for the one voxel more."""
        self.arithmetic = self.network.arithmetic(self.block_voxels)
        """What, besides weights and input, decides the last bit: part of a store's identity."""
        workers = threads if device.type == "cpu" else 1
        self._pool = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self.tiles_in_flight = max(2, -(-workers // len(self.blocks_of(plan.tiles[0].write))))
        """Enough for every thread to have a block, and one tile more being read or compressed."""
        self.seconds: dict[str, float] = dict.fromkeys(("read", "noise", "network", "write"), 0.0)
        """Spent so far, by all threads together, on each part of a tile."""

    def paint(
        self, tile: Tile, read: Callable[[Box], np.ndarray], *, seed: int | None = None, more: int = 0
    ) -> np.ndarray:
        """uint8 labels (z, y, x) of tile.write, and of `more` voxels (0 or 1) beyond its + sides inside the volume.

        `read` gives low-res labels as the file has them; `seed` is the painter's own by default.
        """
        with self.timed("read"):
            low_res = self._phase_map.index(read_around(read, tile.read, self.plan.low_res_shape))
        box = tile.write.grown(0, more, Box.whole(self.plan.shape))
        labels = np.empty(box.shape, np.uint8)
        chosen = self.seed if seed is None else seed

        def one(block: Box) -> None:
            labels[block.relative_to(box.start).slices] = self._block(block, low_res, tile.read, chosen)

        list(self._pool.map(one, self.blocks_of(box)))
        return labels

    def blocks_of(self, box: Box) -> list[Box]:
        """A high-res box cut into nearly equal blocks, each starting where low-res and high-res voxels do."""
        unit = self.plan.scale.numerator
        unit *= -(-16 // unit)
        edges = []
        for length in box.shape:
            parts = max(1, -(-(length - 1) // self.block_voxels))  # one voxel more makes no block of its own
            edges.append(-(-length // parts // unit) * unit)
        return [
            Box(triple([a + o for a, o in zip(b.start, box.start, strict=True)]),
                triple([a + o for a, o in zip(b.stop, box.start, strict=True)]))
            for b in blocks(box.shape, edges)
        ]  # fmt: skip

    def _block(self, block: Box, low_res: np.ndarray, place: Box, seed: int) -> np.ndarray:
        if not hasattr(self._own, "memory"):
            torch.set_num_threads(1)
            self._own.memory = Memory()
        reads = self.network.reads(block)
        assert reads.clipped(place) == reads, f"{block} reads {reads}, the tile's window is {place}"
        inner = low_res[reads.relative_to(place.start).slices]
        window = np.zeros((*inner.shape, self.network.channels), np.float32)
        for channel in range(self._channels):
            window[..., channel] = inner == channel
        with self.timed("noise"):
            window[..., self._channels] = read_around(partial(normals, seed), reads, self.plan.low_res_shape)
        with self.timed("network"):
            labels = self.network.labels(window, reads, block, self._own.memory)
        if labels is None:
            raise InputError("the network's output is not finite, labels would mean nothing; use an earlier checkpoint")
        return labels

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add what is done inside to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def close(self) -> None:
        self._pool.shutdown()


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
