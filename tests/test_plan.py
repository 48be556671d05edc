"""A plan says what its job will do: files, memory, operations and hours."""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from hpcres.conditions import Conditions
from hpcres.engines.winograd import WinogradNetwork
from hpcres.geometry import Box, plan_tiles
from hpcres.inference import generate, plan
from hpcres.inference.generate import BLOCK_BYTES, Painter
from hpcres.inference.job import open_job
from hpcres.inference.plan import Cost, describe, large_plan
from hpcres.networks.superres import SuperResGenerator
from hpcres.study.file import load_study
from hpcres.volumes.phases import PhaseMap
from hpcres.volumes.stores import LabelStore, Layout
from hpcres.volumes.volume import array_volume


def make_cost(shape: tuple[int, int, int], scale: str, tiles: int, ranks: int) -> Cost:
    """At 10⁶ voxels/s per rank of two threads, with 1045 MiB a rank."""
    plan = plan_tiles(shape, Fraction(scale), (tiles,) * 3, 5, 64)
    return Cost(plan, ranks, 2, 64, 1045 * 2**20, 1e6, 1000.0)


@pytest.mark.parametrize(("shape", "scale"), [((100, 70, 20), "4"), ((200, 3, 61), "8/5"), ((16, 16, 16), "4")])
def test_planned_shards_are_the_files_of_the_store(shape, scale, tmp_path):
    cost = make_cost(shape, scale, 3, 2)
    store = LabelStore.create(
        tmp_path / "s.zarr",
        Layout(cost.plan.shape, cost.plan.tile_voxels, 64),
        voxel_size=1.0,
        unit="voxel",
        phases=("a", "b"),
        provenance={},
    )
    boxes = [box for level in range(len(store.levels)) for box in store.shard_boxes(level)]
    assert cost.shards == len(boxes)
    assert cost.store_bytes == sum(box.voxels for box in boxes)


def test_hours_follow_the_busiest_rank():
    cost = make_cost((96, 96, 96), "4", 2, 3)  # eight tiles of 192³, the busiest rank has three
    assert cost.hours == pytest.approx(3 * 192**3 / 1e6 / 3600)
    assert cost.core_hours == pytest.approx(cost.hours * 3 * 2)


@pytest.mark.parametrize("scale", [Fraction(64, d) for d in (2, 6, 8, 9, 12, 16, 40, 63, 64)])
def test_large_volume_is_8192_voxels_at_every_scale_factor(scale):
    small = make_cost((64, 64, 64), str(scale), 1, 1)
    large = replace(small, plan=large_plan(small.plan), ranks=1024)
    assert large.plan.shape == (8192, 8192, 8192)
    assert (len(large.plan.tiles), large.plan.tile_voxels) == (4096, (512, 512, 512))
    assert large.shards == 4096 + 512 + 64 + 8 + 1 + 1
    assert large.core_hours == pytest.approx(8192**3 / 1e6 / 3600 * 2)


def test_plan_says_all_that_was_asked(study):
    loaded = load_study(study, ["cluster.ranks_per_node=2", "cluster.cores_per_rank=2", "cluster.partition=short"])
    cost = make_cost((96, 96, 96), "4", 2, 3)
    large = replace(cost, plan=large_plan(cost.plan), ranks=1024, rank_bytes=1413 * 2**20)
    text = describe(loaded, cost, large, "study.yaml --set=seed=4")
    for part in (
        r"tiles +2 × 2 × 2 = 8, 192 × 192 × 192 voxels each, in chunks of 64³\n",
        r"halo +5 low-res voxels; 1\.35 × the low-res volume is read\n",  # (2 · 53 / 96)³
        r"store +9 files, about 6\.0[78] MiB \(1/10 of 60\.8 MiB with the pyramid\), 6\.75 MiB a tile before",
        r"memory per rank +1\.02 GiB, 2 blocks of 64³ at a time\n",
        r"time +0\.0059 h on 3 ranks, 0\.0354 core hours\n",
        r"for 8192³ voxels +305 core hours: 0\.15 h on 1024 ranks of 1\.38 GiB at this speed\n",
        r" +4682 files, about 58\.5 GiB .*; 16 × 16 × 16 tiles of 512³, 1\.2\d × the low-res volume is read\n",
        r"sbatch --partition short --nodes 2 --ntasks 3 --ntasks-per-node 2 --cpus-per-task 2 --mem-per-cpu 523M "
        r"--time 0:06:00 slurm/infer\.sh study\.yaml --set=seed=4 --tiles 2x2x2\n",
    ):
        assert re.search(part, text), (part, text)


def test_plan_is_that_of_the_job(study, monkeypatch):
    monkeypatch.setattr(plan, "_TRIAL_SECONDS", 0.1)
    loaded = load_study(study, ["inference.boundary={y: periodic}", "inference.tiles=2x1x2"])
    job = open_job(loaded)
    cost, large = plan.estimate(loaded, job.checkpoint.generator, job.conditions.shape, 2)
    assert cost.plan == job.plan
    assert large.plan.boundaries == ("replicate", "periodic", "replicate")
    assert large.threads == cost.threads
    assert large.block_voxels == 256 > cost.block_voxels
    # Three tiles and their windows; the network's maps are those of a block, which is smaller in the small volume.
    tiles = 3 * max(t.read.voxels + t.write.voxels for t in large.plan.tiles)
    assert large.rank_bytes - cost.rank_bytes > 0.9 * tiles


class Clock:
    """A clock that only painting advances, by a second for so many multiply-adds."""

    def __init__(self, monkeypatch, painter, per_second):
        self.now, self.painted = 0.0, []
        monkeypatch.setattr(plan.time, "monotonic", lambda: self.now)

        def paint(tile, conditions):
            assert conditions.read(tile.read).shape[:3] == tile.read.shape
            self.painted.append(tile.write)
            self.now += painter.network.work(tile.write) / per_second

        monkeypatch.setattr(painter, "paint", paint)


@pytest.mark.parametrize(("per_second", "whole"), [(1e12, True), (1e9, False), (2e6, False)])
def test_a_trial_of_seconds_gives_the_speed_of_a_whole_block(study, monkeypatch, per_second, whole):
    """Also on a machine where a block takes minutes: a part of it is painted, and multiply-adds are compared."""
    loaded = load_study(study)
    tiles = plan_tiles((96, 96, 96), Fraction(4), (2, 2, 2), 5, 64)
    painter = Painter(SuperResGenerator(2, 3, Fraction(4), 5).eval(), tiles, 0, torch.device("cpu"), 1)
    block = painter.blocks_of(tiles.tiles[0].write)[0]
    clock = Clock(monkeypatch, painter, per_second)
    found = plan._trial(loaded, painter, 1)
    assert found == pytest.approx(block.voxels * per_second / painter.network.work(block))
    assert (block in clock.painted) == whole
    least = painter.network.work(Box(block.start, tuple(start + 32 for start in block.start))) / per_second
    assert clock.now < 3 * plan._TRIAL_SECONDS + 2 * least
    painter.close()


def test_the_work_of_a_box_is_that_of_its_layers():
    """Far from the faces it grows with the volume; the halo is counted for each box."""
    generator = SuperResGenerator(2, 3, Fraction(4), 4)
    network = Painter(
        generator, plan_tiles((256,) * 3, Fraction(4), (1, 1, 1), 5, 64), 0, torch.device("cpu"), 1
    ).network
    small, large = (network.work(Box((256,) * 3, (256 + edge,) * 3)) for edge in (64, 512))
    assert 0.3 * 512 < large / small < 512
    parts = sum(network.work(Box((256 + z, 256, 256), (256 + z + 64, 320, 320))) for z in (0, 64))
    assert network.work(Box((256,) * 3, (384, 320, 320))) < parts


class Timed(WinogradNetwork):
    """A network by a clock: the first time it paints it compiles for 100 seconds."""

    def __init__(self, clock, seconds, *arguments):
        super().__init__(*arguments)
        self.clock, self.seconds, self.compiled = clock, seconds, False

    def paint(self, parts, memory):
        self.clock[0] += self.seconds if self.compiled else 100
        self.compiled = True
        return [np.zeros(write.shape, np.uint8) for _, _, write in parts]


def test_half_precision_is_compared_with_fp32_on_a_sample(monkeypatch):
    """One block is sample enough here, so one tile is read. Time for compiling is not counted."""
    clock = [0.0]
    monkeypatch.setattr(generate.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(generate, "_SAMPLE_VOXELS", 1)

    def network_of(generator, plan, device, precision="fp32"):
        return Timed(clock, {"fp32": 1.0, "bf16": 4.0}[precision], generator.stages(), plan.low_res_shape)

    monkeypatch.setattr(generate, "network_of", network_of)
    generator = SuperResGenerator(2, 3, Fraction(4), 2).eval()
    tiles = plan_tiles((32, 32, 32), Fraction(4), (2, 2, 2), generate.halo_of(generator), 64)
    painter = Painter(generator, tiles, 0, torch.device("cpu"), 1, "bf16")
    read, volume = [], array_volume(np.zeros((32, 32, 32), np.uint8), "x")
    counting = replace(volume, _read=lambda box: read.append(box) or np.zeros(box.shape, np.uint8))
    conditions = Conditions(2, volume.shape, counting, PhaseMap((0, 1), "x"))
    sample = painter.compare_with_fp32(generator, conditions)
    assert (sample.labels, sample.differ, sample.speed) == (64**3, 0, 0.25)
    assert len(read) == 1
    painter.close()


def test_plan_prints_what_infer_does(study, hpcres):
    done = hpcres("plan", study, "--tiles", "2x2x2", "--ranks", "3")
    assert done.returncode == 0, done.stderr
    assert "2 × 2 × 2 = 8, 32 × 16 × 16 voxels each, in chunks of 16³" in done.stdout
    assert "3, 3 tiles on the busiest, 0 idle" in done.stdout
    assert re.search(r"sbatch .*slurm/infer.sh .*--tiles 2x2x2", done.stdout)


def test_operations_match_the_published_counts():
    """Per output voxel at width 8: 684 k at scale factor 8, 630 k at 4; at width 5: 11.8 k and 11.1 k."""
    for scale, width, expected in ((8, 8, 684e3), (4, 8, 630e3), (8, 5, 11.8e3), (4, 5, 11.1e3)):
        generator = SuperResGenerator(1, 3, Fraction(scale), width)
        assert generator.stages().operations(512) / (512 * scale**3) == pytest.approx(expected, rel=0.02)


def test_smoothing_noise_takes_what_is_planned_for_it():
    plan = plan_tiles((96, 96, 96), Fraction(2), (1, 1, 1), 7, 64)
    generator = SuperResGenerator(2, 3, Fraction(2), 2, 2, noise_sigma_voxels=(0.0, 24.0, 3.0))
    painter = Painter(generator, plan, 0, torch.device("cpu"), 1)
    painter.block_voxels = 64
    reads = painter.network.reads(Box((64,) * 3, (128,) * 3))
    tracemalloc.start()
    noise = painter._noise(0, 1, reads)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert noise.shape == reads.shape
    assert painter.noise_bytes == pytest.approx(peak, rel=0.1)
    painter.close()
    plain = Painter(SuperResGenerator(2, 3, Fraction(2), 2), plan, 0, torch.device("cpu"), 1)
    assert plain.noise_bytes == 0
    plain.close()


def test_blocks_keep_their_bound():
    plan = plan_tiles((144, 80, 64), Fraction(4), (1, 1, 1), 13, 64)
    for width in (3, 5, 8):
        painter = Painter(SuperResGenerator(2, 3, Fraction(4), width), plan, 0, torch.device("cpu"), 1)
        edge = painter.block_voxels
        assert edge == 64 or painter.network.block_bytes(edge) <= BLOCK_BYTES
        seen = np.zeros(plan.shape, np.uint8)
        for block in painter.blocks_of(plan.tiles[0].write):
            assert max(block.shape) <= edge
            seen[block.slices] += 1
        assert (seen == 1).all()
        assert len(painter.blocks_of(Box((0, 0, 0), (edge + 1,) * 3))) == 1
        painter.close()
