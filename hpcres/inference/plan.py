"""Cost of a job before anything runs: tiles, files, bytes, memory, hours, and the sbatch lines."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np
import torch

from hpcres.conditions import Conditions
from hpcres.cores import cores
from hpcres.engines.winograd import WinogradNetwork
from hpcres.geometry import Box, TilePlan, Triple, high_res_shape, plan_tiles, tiles_of_rank, triple
from hpcres.inference.generate import Painter, halo_of
from hpcres.inference.job import chunk_edge
from hpcres.networks.generator import Generator
from hpcres.signals import end_if_signalled
from hpcres.study import Study
from hpcres.volumes.pyramid import pyramid

COMPRESSION = 10
"""zstd 3 with bitshuffle on label volumes: 9 to 10 times smaller at 1024³ (docs/metrics.md, `store`)."""
LARGE_VOXELS = 8192
"""Edge of the output that every plan also tells the cost of; whole low-res voxels at every scale factor 64/d."""
_LARGE_RANKS, _LARGE_TILE_VOXELS = 1024, 512
_TRIAL_SECONDS = 2.0
"""How long a trial paints, after kernels are compiled; there is one for each of two block sizes."""
_TRIAL_VOXELS = 32
"""Edge of the smallest part of a block that a trial paints."""
_PROCESS_BYTES = 450 * 2**20


@dataclass(frozen=True)
class Cost:
    """Cost of a job on `ranks` ranks.

    Attributes
    ----------
    plan : TilePlan
        Tiles of the job.
    ranks, threads : int
        Number of ranks, and of threads of each.
    block_voxels : int
        Longest edge of a block.
    rank_bytes : int
        Memory of a rank.
    voxels_per_second : float
        Speed of one rank, measured on a trial block with `threads` threads.
    operations_per_voxel : float
        Floating-point operations per output voxel.
    seeds : int
        Number of seeds of an ensemble.
    """

    plan: TilePlan
    ranks: int
    threads: int
    block_voxels: int
    rank_bytes: int
    voxels_per_second: float
    operations_per_voxel: float
    seeds: int = 1
    """Of an ensemble, painted one after the other."""

    @property
    def tiles_of_busiest(self) -> int:
        """Number of tiles of the rank that has most."""
        return len(tiles_of_rank(len(self.plan.tiles), 0, self.ranks))

    @property
    def hours(self) -> float:
        """Hours that the rank with most tiles takes, with every tile as large as the largest."""
        largest = max(tile.write.voxels for tile in self.plan.tiles)
        return self.seeds * self.tiles_of_busiest * largest / self.voxels_per_second / 3600

    @property
    def core_hours(self) -> float:
        """Hours of all cores together."""
        return self.hours * self.ranks * self.threads

    @property
    def store_bytes(self) -> float:
        """Bytes of all levels, before compression; those of the agreement are included."""
        return float(sum(prod(extent) for extent, _ in pyramid(self.plan.shape))) * min(self.seeds, 2)

    @property
    def shards(self) -> int:
        """Number of shards of all levels; each is a file."""
        extents = [extent for extent, _ in pyramid(self.plan.shape)]
        tiles = [[-(-n // e) for n, e in zip(extent, self.plan.tile_voxels, strict=True)] for extent in extents]
        return sum(map(prod, tiles)) * min(self.seeds, 2)


def estimate(study: Study, generator: Generator, low_res_shape: tuple[int, int, int], ranks: int) -> tuple[Cost, Cost]:
    """Estimate the cost of a job, and of LARGE_VOXELS³ voxels with the same settings.

    Blocks of random labels are painted for a few seconds to measure this machine's speed with the block size of each.

    Parameters
    ----------
    study
        Study of the job.
    generator
        Generator in eval mode.
    low_res_shape
        Voxels of the low-res volume along z, y, x.
    ranks
        Number of ranks of the job.

    Returns
    -------
    job, large : Cost
        Cost of the job, and of the large output.
    """
    settings = study.inference
    shape = high_res_shape(low_res_shape, study.scale_factor)
    chunk = chunk_edge(shape, study.scale_factor, settings)
    plan = plan_tiles(
        low_res_shape,
        study.scale_factor,
        settings.tiles,
        halo_of(generator),
        chunk,
        settings.boundary or study.training.boundaries,
    )
    threads = settings.threads or study.cluster.cores_per_rank
    whole = generator.stages().operations(prod(low_res_shape)) / prod(plan.shape)
    job, large = (_cost(study, generator, one, threads) for one in (plan, large_plan(plan)))
    return (
        Cost(plan, ranks, threads, *job, whole, settings.ensemble),
        Cost(large_plan(plan), _LARGE_RANKS, threads, *large, whole, settings.ensemble),
    )


def _cost(study: Study, generator: Generator, plan: TilePlan, threads: int) -> tuple[int, int, float]:
    """Return the longest edge of a block, a rank's bytes, and voxels per second, from a trial."""
    use = min(threads, cores())
    painter = Painter(generator, plan, study.seed, torch.device("cpu"), use)
    try:
        tile_blocks = painter.blocks_of(plan.tiles[0].write)
        edge = max(max(block.shape) for block in tile_blocks)
        volumes = 1 if study.inference.ensemble == 1 else 3  # the first seed's labels, another's, how many agree
        # Labels as bytes, or float32 probabilities as they are read and divided.
        read_bytes = 0 if study.low_res is None else 8 * len(study.low_res.channels) or 1
        labels = max(read_bytes * t.read.voxels + volumes * t.write.voxels for t in plan.tiles)
        in_flight = max(2, -(-threads // len(tile_blocks)))
        # The interpreter with torch, the weights, the blocks in flight, tiles of labels, one shard being compressed.
        in_hand = painter.network.block_bytes(edge) + painter.noise_bytes
        held = painter.network.weight_bytes + threads * in_hand + (in_flight + 1) * labels
        return edge, _PROCESS_BYTES + held, _trial(study, painter, use) * threads / use
    finally:
        painter.close()


def large_plan(plan: TilePlan) -> TilePlan:
    """Plan tiles of 512³ for an output of LARGE_VOXELS per edge, with the scale factor, halo and boundary of `plan`."""
    edge, tiles = int(LARGE_VOXELS / plan.scale), LARGE_VOXELS // _LARGE_TILE_VOXELS
    return plan_tiles((edge,) * 3, plan.scale, (tiles,) * 3, plan.halo_low_res, 128, plan.boundaries)


def _trial(study: Study, painter: Painter, threads: int) -> float:
    """Measure the output voxels per second of painting whole blocks on `threads` threads, one block each.

    The first block is painted repeatedly for _TRIAL_SECONDS. Where one block takes longer, the largest part of it that
    does not is painted, and its time is multiplied by the ratio of multiply-adds.
    """
    network = painter.network
    whole = painter.blocks_of(painter.plan.tiles[0].write)[0]

    def work(part: Box) -> float:
        return network.work(part) if isinstance(network, WinogradNetwork) else float(part.voxels)

    def seconds_of(part: Box) -> float:
        """Return the seconds of painting a part on all threads at once."""
        tile = replace(painter.plan.tiles[0], read=network.reads(part), write=part)
        conditions = _Random(study, tile.read.shape)
        started = time.monotonic()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: painter.paint(tile, conditions), range(threads)))
        return time.monotonic() - started

    parts = _parts_of(whole, painter.plan.scale.numerator)
    part, seconds = parts[0], min(seconds_of(parts[0]) for _ in range(2))  # the first run allocates memory
    for larger in parts[1:]:
        if seconds * work(larger) / work(part) > _TRIAL_SECONDS:
            break
        end_if_signalled()
        part, seconds = larger, seconds_of(larger)
    started, runs = time.monotonic(), [seconds]
    while time.monotonic() - started + seconds < _TRIAL_SECONDS:
        end_if_signalled()
        runs.append(seconds_of(part))
    per_part = sum(runs) / len(runs) * work(whole) / work(part)
    return threads * whole.voxels / per_part


class _Random(Conditions):
    """Random labels or probabilities of any box of one shape, for a trial."""

    def __init__(self, study: Study, shape: Triple) -> None:
        self.channels, self.shape = 0 if study.low_res is None else len(study.low_res.groups), shape
        rng = np.random.default_rng(0)
        if study.low_res is None or study.low_res.channels:
            self._drawn = rng.random((*shape, self.channels), np.float32)
        else:
            self._drawn = rng.integers(0, self.channels, shape, np.uint8)

    def values(self, box: Box) -> np.ndarray:
        return self._drawn[Box.whole(box.shape).slices]


def _parts_of(block: Box, unit: int) -> list[Box]:
    """Return parts of a block from small to large.

    They are cubes of whole low-res voxels, cut at the faces of the block; the last is the block.
    """
    parts, edge = [], -(-_TRIAL_VOXELS // unit) * unit
    while edge < max(block.shape):
        ends = [min(start + edge, stop) for start, stop in zip(block.start, block.stop, strict=True)]
        parts.append(Box(block.start, triple(ends)))
        edge *= 2
    return [*parts, block]


def describe(study: Study, cost: Cost, large: Cost, source: str) -> str:
    """Describe the plan in words and numbers, with the sbatch lines that fit.

    Parameters
    ----------
    study
        Study of the job.
    cost
        Cost of the job.
    large
        Cost of the large output.
    source
        The study and options as given on the command line.

    Returns
    -------
    str
        Lines of text.
    """
    plan, cluster = cost.plan, study.cluster
    total = float(prod(plan.shape))
    nodes = -(-cost.ranks // cluster.ranks_per_node)
    hours = max(0.1, 1.5 * cost.hours)
    partition = f"--partition {cluster.partition} " if cluster.partition else ""
    time_limit = f"{int(hours)}:{ceil(hours % 1 * 60):02d}:00" if hours % 1 * 60 <= 59 else f"{int(hours) + 1}:00:00"
    blocks, cores = _count(cost.threads, "block"), _count(cost.threads, "core")
    grid, edge, tiles = _times(plan.grid), _times(plan.tile_voxels), len(plan.tiles)
    idle = max(0, cost.ranks - tiles)
    given = "lattice" if study.low_res is None else "low-res volume"
    rows = [
        (given, f"{_times(plan.low_res_shape)} voxels, scale factor {plan.scale}"),
        ("output", f"{_times(plan.shape)} voxels of {study.high_res.voxel_size}, {total:.3g} in all"),
        ("tiles", f"{grid} = {tiles}, {edge} voxels each, in chunks of {plan.chunk_voxels}³"),
        ("halo", f"{plan.halo_low_res} low-res voxels; {plan.halo_overhead:.2f} × the low-res volume is read"),
        ("ranks", f"{cost.ranks}, {cost.tiles_of_busiest} tiles on the busiest, {idle} idle"),
        ("store", f"{_store(cost)}, {_bytes(prod(plan.tile_voxels))} a tile before compression"),
        ("memory per rank", f"{_bytes(cost.rank_bytes)}, {blocks} of {cost.block_voxels}³ at a time"),
        ("operations", f"{cost.operations_per_voxel * total:.2g} in all, {cost.operations_per_voxel:.3g} per voxel"),
        ("speed of this machine", f"{cost.voxels_per_second:.3g} voxels/s per rank of {cores} (trial)"),
        ("time", f"{cost.hours:.2g} h on {_count(cost.ranks, 'rank')}, {cost.core_hours:.3g} core hours"),
        (
            f"for {LARGE_VOXELS}³ voxels",
            f"{large.core_hours:.3g} core hours: {large.hours:.2g} h on "
            f"{_count(large.ranks, 'rank')} of {_bytes(large.rank_bytes)} at this speed",
        ),
        (
            "",
            f"{_store(large)}; {_times(large.plan.grid)} tiles of {_LARGE_TILE_VOXELS}³, "
            f"{large.plan.halo_overhead:.2f} × the low-res volume is read",
        ),
    ]
    per_rank = cluster.cores_per_rank
    per_node = min(cluster.ranks_per_node, cost.ranks)
    tasks = f"--ntasks {cost.ranks} " * (nodes * per_node != cost.ranks)
    shared = f"sbatch {partition}--nodes {nodes} {tasks}--ntasks-per-node {per_node} "
    gpus = f"--gpus-per-node {cluster.gpus_per_node} " if cluster.gpus_per_node else ""
    lines = [f"{name:<22} {text}" for name, text in rows]
    lines += [
        "",
        f"sbatch {partition}--nodes {cluster.train_nodes} {gpus}--time {ceil(cluster.train_hours)}:00:00 "
        f"slurm/train.sh {source}",
        f"{shared}--cpus-per-task {per_rank} --mem-per-cpu {ceil(cost.rank_bytes / per_rank / 2**20)}M "
        f"--time {time_limit} slurm/infer.sh {source} --tiles {'x'.join(map(str, study.inference.tiles))}",
        f"{shared}--time 1:00:00 slurm/metrics.sh {source}",
    ]
    return "\n".join(lines)


def _store(cost: Cost) -> str:
    stored, whole = _bytes(cost.store_bytes / COMPRESSION), _bytes(cost.store_bytes)
    return f"{_count(cost.shards, 'file')}, about {stored} (1/{COMPRESSION} of {whole} with the pyramid)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"
