"""What a job would cost, before anything runs: tiles, files, bytes, memory, hours, and the sbatch lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
import torch

from hpcres.geometry import Box, TilePlan, high_res_shape, plan_tiles, tiles_of_rank
from hpcres.inference.generate import Painter, block_bytes, block_edge, cores, operations
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
        low_res_shape, study.scale_factor, settings.tiles, generator.halo_low_res, chunk, settings.periodic
    )
    threads = settings.threads or study.cluster.cores_per_rank
    edge = block_edge(generator)
    tile = max(plan.tiles, key=lambda t: t.read.voxels)
    window = plan.blocks_of(tile, edge)[0]
    done, seconds = _trial(study, generator, plan, edge, threads)
    window_operations = operations(generator, window.read) / window.write.voxels
    labels = max(t.read.voxels + t.write.voxels for t in plan.tiles)
    in_flight = max(2, -(-threads // len(plan.blocks_of(plan.tiles[0], edge))))
    # The interpreter with torch, the blocks in flight, tiles of labels, and one shard being compressed.
    rank_bytes = 340 * 2**20 + threads * block_bytes(generator, edge) + (in_flight + 1) * labels
    return Cost(plan, ranks, threads, edge, rank_bytes, done / seconds, window_operations)


def _trial(
    study: Study, generator: SuperResGenerator, plan: TilePlan, edge: int, threads: int
) -> tuple[int, float]:
    """Output voxels and seconds of painting one tile's worth of blocks, as many at a time as a rank would."""
    use = min(threads, cores())
    low = edge // study.scale_factor.numerator * study.scale_factor.denominator
    side = min(2 * low + 2 * plan.halo_low_res, min(plan.low_res_shape))
    trial = plan_tiles((side,) * 3, study.scale_factor, (1, 1, 1), plan.halo_low_res, plan.chunk_voxels)
    painter = Painter(
        generator, trial, PhaseMap(tuple(study.low_res.phases), "trial"), study.seed, torch.device("cpu"), use
    )
    values = np.array(list(study.low_res.phases))
    labels = np.random.default_rng(0).choice(values, trial.low_res_shape)
    blocks = trial.blocks_of(trial.tiles[0], edge)
    done, started = 0, time.monotonic()
    try:
        while done == 0 or time.monotonic() - started < _TRIAL_SECONDS:
            for first in range(0, len(blocks), use):
                part = blocks[first : first + use]
                painter.paint_blocks(part, labels, Box.whole(trial.low_res_shape))
                done += sum(block.write.voxels for block in part)
                if time.monotonic() - started > _TRIAL_SECONDS:
                    break
    finally:
        painter.close()
    # A rank with more threads than this machine has cores would be that much faster.
    return ceil(done * threads / use), time.monotonic() - started


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
