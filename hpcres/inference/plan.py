"""What a job would cost, before anything runs: tiles, files, bytes, memory, hours, and the sbatch lines."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np
import torch

from hpcres.geometry import Box, TilePlan, high_res_shape, plan_tiles, tiles_of_rank
from hpcres.inference.generate import Painter, cores, halo_of, operations
from hpcres.inference.run import chunk_edge
from hpcres.networks.superres import SuperResGenerator
from hpcres.study import Study
from hpcres.volumes import PhaseMap

COMPRESSION = 10
"""zstd 3 with bitshuffle on label volumes: about 11 times smaller (512³ electrode, docs/design.md)."""
_TRIAL_SECONDS = 10.0


@dataclass(frozen=True)
class Cost:
    """A job on `ranks` ranks. `voxels_per_second` is one rank's, measured on a trial block with `threads` threads."""

    plan: TilePlan
    ranks: int
    threads: int
    block_voxels: int
    rank_bytes: int
    voxels_per_second: float
    operations_per_voxel: float

    @property
    def tiles_of_busiest(self) -> int:
        return len(tiles_of_rank(len(self.plan.tiles), 0, self.ranks))

    @property
    def hours(self) -> float:
        largest = max(tile.write.voxels for tile in self.plan.tiles)
        return self.tiles_of_busiest * largest / self.voxels_per_second / 3600


def estimate(study: Study, generator: SuperResGenerator, low_res_shape: tuple[int, int, int], ranks: int) -> Cost:
    """Plan the job and paint blocks of noise for up to ten seconds to learn this machine's speed."""
    settings = study.inference
    shape = high_res_shape(low_res_shape, study.scale_factor)
    chunk = chunk_edge(shape, study.scale_factor, settings)
    plan = plan_tiles(
        low_res_shape, study.scale_factor, settings.tiles, halo_of(generator), chunk, settings.periodic
    )
    threads = settings.threads or study.cluster.cores_per_rank
    phase_map = PhaseMap(tuple(study.low_res.phases), "trial")
    use = min(threads, cores())
    painter = Painter(generator, plan, phase_map, study.seed, torch.device("cpu"), use)
    try:
        speed = _trial(study, painter, use) * threads / use
    finally:
        painter.close()
    tile_blocks = painter.blocks_of(plan.tiles[0].write)
    block_bytes = painter.network.block_bytes(max(max(block.shape) for block in tile_blocks))
    labels = max(t.read.voxels + t.write.voxels for t in plan.tiles)
    in_flight = max(2, -(-threads // len(tile_blocks)))
    # The interpreter with torch, the weights, the blocks in flight, tiles of labels, and one shard being compressed.
    rank_bytes = 340 * 2**20 + painter.network.weight_bytes + threads * block_bytes + (in_flight + 1) * labels
    whole = operations(generator, Box.whole(low_res_shape)) / prod(plan.shape)
    return Cost(plan, ranks, threads, painter.block_voxels, rank_bytes, speed, whole)


def _trial(study: Study, painter: Painter, threads: int) -> float:
    """Output voxels per second of painting the first block again and again, on as many threads as a rank would."""
    write = painter.blocks_of(painter.plan.tiles[0].write)[0]
    tile = replace(painter.plan.tiles[0], read=painter.network.reads(write), write=write)
    values = np.array(list(study.low_res.phases))
    rng = np.random.default_rng(0)
    labels = rng.choice(values, tile.read.shape)

    def read(box: Box) -> np.ndarray:
        return labels[Box.whole(box.shape).slices]

    painter.paint(tile, read)  # compiles, and takes its memory
    started, done = time.monotonic(), 0
    with ThreadPoolExecutor(threads) as pool:
        while done == 0 or time.monotonic() - started < _TRIAL_SECONDS:
            for _ in pool.map(lambda _: painter.paint(tile, read), range(threads)):
                done += write.voxels
    return done / (time.monotonic() - started)


def describe(study: Study, cost: Cost, source: str) -> str:
    """The plan in words and numbers, and the sbatch lines that fit."""
    plan, cluster = cost.plan, study.cluster
    total = float(prod(plan.shape))
    pyramid = total * 8 / 7
    nodes = -(-cost.ranks // cluster.ranks_per_node)
    hours = max(0.1, 1.5 * cost.hours)
    partition = f"--partition {cluster.partition} " if cluster.partition else ""
    time_limit = f"{int(hours)}:{ceil(hours % 1 * 60):02d}:00" if hours % 1 * 60 <= 59 else f"{int(hours) + 1}:00:00"
    grid, edge, tiles = _times(plan.grid), _times(plan.tile_voxels), len(plan.tiles)
    idle = max(0, cost.ranks - tiles)
    rows = [
        ("low-res volume", f"{_times(plan.low_res_shape)} voxels, scale factor {plan.scale}"),
        ("output", f"{_times(plan.shape)} voxels of {study.high_res.voxel_size}, {total:.3g} in all"),
        ("tiles", f"{grid} = {tiles}, {edge} voxels each, in chunks of {plan.chunk_voxels}³"),
        ("halo", f"{plan.halo_low_res} low-res voxels; {plan.halo_overhead:.2f} × the low-res volume is read"),
        ("ranks", f"{cost.ranks}, {cost.tiles_of_busiest} tiles on the busiest, {idle} idle"),
        ("store", f"about {_bytes(pyramid / COMPRESSION)} (1/{COMPRESSION} of {_bytes(pyramid)} with the pyramid)"),
        ("memory per rank", f"{_bytes(cost.rank_bytes)}, {cost.threads} blocks of {cost.block_voxels}³ at a time"),
        ("operations", f"{cost.operations_per_voxel * total:.2g} in all, {cost.operations_per_voxel:.3g} per voxel"),
        ("speed of this machine", f"{cost.voxels_per_second:.3g} voxels/s per rank of {cost.threads} cores (trial)"),
        ("time", f"{cost.hours:.2g} h on {cost.ranks} ranks, {cost.hours * cost.ranks * cost.threads:.3g} core hours"),
    ]
    cores = cluster.cores_per_rank
    shared = f"sbatch {partition}--nodes {nodes} --ntasks-per-node {min(cluster.ranks_per_node, cost.ranks)} "
    gpus = f"--gpus-per-node {cluster.gpus_per_node} " if cluster.gpus_per_node else ""
    lines = [f"{name:<22} {text}" for name, text in rows]
    lines += [
        "",
        f"sbatch {partition}--nodes {cluster.train_nodes} {gpus}--time {ceil(cluster.train_hours)}:00:00 "
        f"slurm/train.sh {source}",
        f"{shared}--cpus-per-task {cores} --mem-per-cpu {ceil(cost.rank_bytes / cores / 2**20)}M "
        f"--time {time_limit} slurm/infer.sh {source} --tiles {'x'.join(map(str, study.inference.tiles))}",
        f"{shared}--time 1:00:00 slurm/metrics.sh {source}",
    ]
    return "\n".join(lines)


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"
