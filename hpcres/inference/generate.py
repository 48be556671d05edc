"""From a window of the low-res volume to the high-res labels of a tile, block by block.

Each thread computes a block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import floor
from typing import Protocol

import numpy as np
import torch

from hpcres.conditions import Conditions, Held
from hpcres.engines.batches import paint_batches
from hpcres.engines.polyphase import Polyphase
from hpcres.engines.staged import Staged
from hpcres.engines.winograd import Memory, WinogradNetwork, reach_low_res
from hpcres.errors import InputError
from hpcres.geometry import Box, Tile, TilePlan, blocks, triple
from hpcres.networks.generator import Generator
from hpcres.networks.stages import supported
from hpcres.noise import NOISE_VOXELS, gaussian_taps, noise_of, normals

BLOCK_BYTES = 1536 * 2**20
"""What a thread may take for the maps of its block."""
_BLOCK_EDGES = (256, 192, 128, 64)
_SAMPLE_VOXELS = 10**6


class Network(Protocol):
    """A generator in a form that labels any high-res box from the low-res window it reads."""

    channels: int
    """Of a window: one-hot labels or probabilities, the noise, and zeros up to here."""
    weight_bytes: int
    together: int
    """How many blocks a thread paints at a time."""
    same_bits: bool
    """Whether a voxel's label does not depend on the block it is painted with."""

    def reads(self, write: Box) -> Box:
        """Return the low-res box that the labels of the high-res box `write` depend on."""
        ...

    def paint(self, parts: Sequence[tuple[np.ndarray, Box, Box]], memory: Memory) -> list[np.ndarray]:
        """Compute the uint8 labels (z, y, x) of `write` for each (window (z, y, x, channel), place, write)."""
        ...

    def memory(self, edge: int) -> Memory:
        """Return the arrays that a thread needs for blocks of up to edge³ high-res voxels."""
        ...

    def block_bytes(self, edge: int) -> int:
        """Return the bytes that a block of edge³ high-res voxels takes while it is computed."""
        ...

    def arithmetic(self, block_voxels: int) -> str:
        """Describe what, besides weights and input, decides the last bit of the labels."""
        ...


class TorchNetwork:
    """Stages in torch.

    This form is for GPUs, for float formats that the Winograd form would round too much, and for kinds of stages that
    the Winograd form does not have.

    Parameters
    ----------
    generator
        Generator in eval mode.
    plan
        Tiles of the volume.
    device
        Device of torch.
    precision
        Name of a float format: a key of PRECISIONS.
    """

    def __init__(self, generator: Generator, plan: TilePlan, device: torch.device, precision: str) -> None:
        # fp32 means fp32: TF32 would flip labels, and cuDNN's search change bytes.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        stages = generator.stages()
        engine = Polyphase if supported(stages.stages) else Staged
        self._network, self._plan = engine(stages, device, PRECISIONS[precision]), plan
        self._halo, self._precision = stages.halo_low_res, precision
        self.channels = stages.inputs
        self.weight_bytes = sum(p.nbytes for p in generator.parameters())
        self.together, self.same_bits = 1, False
        if device.type == "cuda":  # as many as fill it; other ranks on the same one may halve that
            memory = torch.cuda.get_device_properties(device).total_memory * 6 // 10
            self.together = max(1, memory // self.block_bytes(_BLOCK_EDGES[0]))

    def reads(self, write: Box) -> Box:
        """Return the low-res box of a high-res box: its own low-res voxels and the network's halo.

        The low-res box begins where interpolation weights repeat. It reaches beyond axes without ends and is clipped at
        others.
        """
        p, q = self._plan.scale.numerator, self._plan.scale.denominator
        axes = []
        for a, b, n, endless in zip(write.start, write.stop, self._plan.low_res_shape, self._plan.endless, strict=True):
            start, stop = a // p * q - -(-self._halo // q) * q, -(-b * q // p) + self._halo
            axes.append((start, stop) if endless else (max(start, 0), min(stop, n)))
        return Box(triple([start for start, _ in axes]), triple([stop for _, stop in axes]))

    def paint(self, parts: Sequence[tuple[np.ndarray, Box, Box]], memory: Memory) -> list[np.ndarray]:
        """Compute the labels of several blocks.

        Parameters
        ----------
        parts
            For each block (window, place, write): float32 (z, y, x, channel) of the low-res box `place`, and the
            high-res box to label.
        memory
            Not used: torch has its own.

        Returns
        -------
        list of numpy.ndarray
            uint8 labels (z, y, x) of each block.

        Raises
        ------
        InputError
            Where a logit is not finite, or memory does not suffice for one block.
        """
        windows = [window.transpose(3, 0, 1, 2) for window, _, _ in parts]
        crops = [
            write.relative_to([floor(s * self._plan.scale) for s in place.start]).slices for _, place, write in parts
        ]
        labels, self.together = paint_batches(self._network, windows, crops, self.together)
        return labels

    def memory(self, edge: int) -> Memory:
        """Return an empty Memory, because torch has its own."""
        return Memory()

    def block_bytes(self, edge: int) -> int:
        """Return the bytes that a block away from the faces takes while it is computed."""
        p, q = self._plan.scale.numerator, self._plan.scale.denominator
        before = -(-self._halo // q) * q
        window, start = (-(-edge * q // p) + before + self._halo,) * 3, before // q * p
        return self._network.batch_bytes(window, 1, (slice(start, start + edge),) * 3)

    def arithmetic(self, block_voxels: int) -> str:
        """Name the version of torch, the device, the float format and the blocks computed at a time.

        A library's kernels may round differently where blocks lie differently.
        """
        version = str(torch.__version__).split("+")[0]
        return f"torch {version} {self._network.device.type} {self._precision}, {self.together} × {block_voxels}³"


@dataclass(frozen=True)
class PrecisionSample:
    """A sample of labels painted in half precision and in fp32.

    Attributes
    ----------
    labels, differ : int
        How many labels are compared, and how many of them differ.
    speed : float
        Speed in half precision relative to fp32.
    """

    labels: int
    differ: int
    speed: float

    @property
    def share(self) -> float:
        """Share of the labels that differ."""
        return self.differ / self.labels


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def network_of(generator: Generator, plan: TilePlan, device: torch.device, precision: str = "fp32") -> Network:
    """Return the form of a generator that suits its stages, a device and a float format.

    Parameters
    ----------
    generator
        Generator in eval mode.
    plan
        Tiles of the volume.
    device
        Device of torch.
    precision
        Name of a float format: a key of PRECISIONS.

    Returns
    -------
    Network
        The Winograd form in fp32 on a CPU where it has all stages, else torch.
    """
    stages = generator.stages()
    if device.type == "cpu" and precision == "fp32" and supported(stages.stages):
        return WinogradNetwork(stages, plan.low_res_shape, plan.endless)
    return TorchNetwork(generator, plan, device, precision)


def halo_of(generator: Generator) -> int:
    """Return the low-res voxels around a tile that painting it reads.

    These are all voxels that the tile's whole cells can depend on.
    """
    stages = generator.stages()
    by_cells = reach_low_res(stages) if supported(stages.stages) else 0
    return max(by_cells, stages.halo_low_res + 1)


class Painter:
    """Paints tiles with a generator in eval mode on one device.

    Parameters
    ----------
    generator
        Generator in eval mode.
    plan
        Tiles of the volume.
    seed
        Seed of the noise.
    device
        Device of torch.
    threads
        Number of blocks that are computed at a time on a CPU. Torch computes one block with all these threads.
    precision
        Name of a float format: a key of PRECISIONS.
    """

    def __init__(
        self,
        generator: Generator,
        plan: TilePlan,
        seed: int,
        device: torch.device,
        threads: int,
        precision: str = "fp32",
    ) -> None:
        self.plan, self.seed, self.device = plan, seed, device
        self.network = network_of(generator, plan, device, precision)
        self._channels = generator.inputs.conditions
        self._noise_taps = [gaussian_taps(sigma, plan.scale) for sigma in generator.inputs.latents]
        self.block_voxels = next(
            (edge for edge in _BLOCK_EDGES if self.network.block_bytes(edge) <= BLOCK_BYTES), _BLOCK_EDGES[-1]
        )
        """Longest edge of a block, but for the one voxel more."""
        self.arithmetic = self.network.arithmetic(self.block_voxels)
        """What, besides weights and input, decides the last bit: part of a store's identity."""
        own_threads = isinstance(self.network, TorchNetwork)  # torch spreads one block over the cores by itself
        workers = 1 if own_threads else threads
        self._torch_threads = threads if own_threads else 1
        self._pool = ThreadPoolExecutor(workers)
        self._own = threading.local()
        self.tiles_in_flight = max(2, -(-workers // len(self.blocks_of(plan.tiles[0].write))))
        """Enough for every thread to have a block, and one tile more being read or compressed."""
        self._largest_edge = 1 + max(max(block.shape) for block in self.blocks_of(plan.tiles[0].write))
        """Of a block with the one voxel more."""
        self._warm_up(self.network)
        self.seconds: dict[str, float] = dict.fromkeys(("read", "noise", "network", "count", "write"), 0.0)
        """Spent so far, by all threads together, on each part of a tile."""

    def paint(self, tile: Tile, conditions: Conditions, *, seed: int | None = None, more: int = 0) -> np.ndarray:
        """Compute the labels of a tile.

        Parameters
        ----------
        tile
            Tile of the plan.
        conditions
            What a file says of the voxels of the lattice.
        seed
            Seed of the noise; by default the painter's own.
        more
            Voxels (0 or 1) beyond the tile's + sides, inside the volume, to compute as well.

        Returns
        -------
        numpy.ndarray
            uint8 labels (z, y, x) of tile.write, and of the `more` voxels.
        """
        with self.timed("read"):
            held = conditions.hold(tile.read, self.plan.boundaries)
        box = tile.write.grown(0, more, Box.whole(self.plan.shape))
        labels = np.empty(box.shape, np.uint8)
        chosen = self.seed if seed is None else seed

        def some(part: list[Box]) -> None:
            for block, painted in zip(part, self._paint(part, held, chosen), strict=True):
                labels[block.relative_to(box.start).slices] = painted

        cut, together = self.blocks_of(box), self.network.together
        list(self._pool.map(some, [cut[i : i + together] for i in range(0, len(cut), together)]))
        return labels

    def compare_with_fp32(self, generator: Generator, conditions: Conditions) -> PrecisionSample:
        """Paint a sample in this precision and in fp32, and compare the labels and the speed.

        The sample is about a million labels from the middle of the volume.

        Parameters
        ----------
        generator
            Generator in eval mode.
        conditions
            What a file says of the voxels of the lattice.

        Returns
        -------
        PrecisionSample
            Numbers of labels, and the relative speed.
        """
        exact = network_of(generator, self.plan, self.device)
        self._warm_up(exact)
        memory = exact.memory(self._largest_edge)
        # Torch computes a block with all threads of the painter, the CPU's own network a block with each.
        exact_blocks = 1 if isinstance(exact, TorchNetwork) else self._torch_threads
        labels = differ = 0
        seconds = exact_seconds = 0.0
        for block, held in self._sample(conditions):
            started = time.perf_counter()
            (ours,) = self._paint([block], held, self.seed)
            between = time.perf_counter()
            (theirs,) = exact.paint([self._window(block, held, self.seed, exact)], memory)
            seconds += between - started
            exact_seconds += (time.perf_counter() - between) / exact_blocks
            labels += ours.size
            differ += int(np.count_nonzero(ours != theirs))
        return PrecisionSample(labels, differ, exact_seconds / seconds)

    def _sample(self, conditions: Conditions) -> Iterator[tuple[Box, Held]]:
        """Yield blocks from the middle of the volume on, and the conditions of each one's tile.

        The blocks have _SAMPLE_VOXELS together.
        """
        voxels, middle = 0, len(self.plan.tiles) // 2
        for tile in (*self.plan.tiles[middle:], *self.plan.tiles[:middle]):
            held = conditions.hold(tile.read, self.plan.boundaries)
            for block in self.blocks_of(tile.write):
                yield block, held
                voxels += block.voxels
                if voxels >= _SAMPLE_VOXELS:
                    return

    def _noise(self, seed: int, channel: int, box: Box) -> np.ndarray:
        """Return the noise of the voxels that a box stands for, one channel of it.

        Beyond a periodic face it is the noise of the voxels there. Beyond a mirror it is noise of its own. Mirrored
        noise would make the structure symmetric about the face, and at the face coarser than the material is anywhere.
        """
        ends = [
            n if boundary == "periodic" else NOISE_VOXELS
            for n, boundary in zip(self.plan.low_res_shape, self.plan.boundaries, strict=True)
        ]
        return noise_of(seed, channel, self._noise_taps[channel], box, triple(ends))

    @property
    def noise_bytes(self) -> int:
        """Bytes that smoothing a block's noise takes: the widest field, before an axis and after."""
        reach = max((len(taps) // 2 for taps in self._noise_taps), default=0)
        middle = self.plan.tiles[len(self.plan.tiles) // 2].write
        reads = [self.network.reads(block).grown(reach, reach) for block in self.blocks_of(middle)]
        return 2 * 4 * max(box.voxels for box in reads) if reach else 0

    def _warm_up(self, network: Network) -> None:
        """Compile the network's kernels, or load them from numba's cache, before anything is timed."""
        block = Box((0, 0, 0), triple([min(n, self.plan.scale.numerator) for n in self.plan.shape]))
        reads = network.reads(block)
        normals(self.seed, Box.whole((1, 1, 1)))
        with suppress(InputError):  # what is not finite here will be said of the tiles
            network.paint([(np.zeros((*reads.shape, network.channels), np.float32), reads, block)], Memory())

    def blocks_of(self, box: Box) -> list[Box]:
        """Cut a high-res box into nearly equal blocks.

        Each block begins where a low-res and a high-res voxel begin.

        Parameters
        ----------
        box
            High-res box.

        Returns
        -------
        list of Box
            High-res blocks of at most `block_voxels` along an axis, but for one voxel and for rounding to whole low-res
            voxels.
        """
        unit = self.plan.scale.numerator
        unit *= -(-16 // unit)
        edges = []
        for length in box.shape:
            parts = max(1, -(-(length - 1) // self.block_voxels))  # one voxel more makes no block of its own
            edges.append(-(-length // parts // unit) * unit)
        return [
            Box(
                triple([a + o for a, o in zip(b.start, box.start, strict=True)]),
                triple([a + o for a, o in zip(b.stop, box.start, strict=True)]),
            )
            for b in blocks(box.shape, edges)
        ]

    def _paint(self, blocks: list[Box], held: Held, seed: int) -> list[np.ndarray]:
        if not hasattr(self._own, "memory"):
            torch.set_num_threads(self._torch_threads)
            self._own.memory = self.network.memory(self._largest_edge)
        parts = [self._window(block, held, seed, self.network) for block in blocks]
        with self.timed("network"):
            return self.network.paint(parts, self._own.memory)

    def _window(self, block: Box, held: Held, seed: int, network: Network) -> tuple[np.ndarray, Box, Box]:
        """Return what a network is given for a block: float32 (z, y, x, channel), its low-res place, and the block."""
        reads = network.reads(block)
        window = np.zeros((*reads.shape, network.channels), np.float32)
        held.read(reads, window)
        with self.timed("noise"):
            for channel in range(len(self._noise_taps)):
                window[..., self._channels + channel] = self._noise(seed, channel, reads)
        return window, reads, block

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of what is done inside the block of `with` to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
