"""How fast `hpcres metrics` counts on one core, beside this core's rate of decoding the same store, and TauFactor.

    python bench/metrics.py                         volumes of 256³ and 1024³, TauFactor on 256³ (2 minutes)
    python bench/metrics.py --sizes 256 1920        10 minutes, 1.5 GB of scratch disk
    python bench/metrics.py --volume FILE           the structure of a file of labels instead of a phantom's
    python bench/metrics.py --phases 8              a phantom of as many phases
    python bench/metrics.py --statistics            correlations (64 lags), chords and clusters in place of the counts

Everything runs on one core, and times are processor seconds of the whole process, so that neighbours on the machine
do not count. `decoding` reads the same boxes of the same store with zarr and drops them; `counting` is the whole
pass as the command makes it, Dask included. They take turns; the best of three each. The structure is mirrored to the
size asked for; the phantom's is of 256³. Peak memory is that of a process which opens the store and counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHUNK = 128
COUNT = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from hpcres.metrics.measure import count_volume
from hpcres.metrics.schedule import connect
from hpcres.volumes.formats import open_volume
with connect(threads=1) as client:
    volume = open_volume(sys.argv[1])
    count_volume(volume, client=client, labels=range(len(volume.phases)), progress=False)
# Not ru_maxrss, which a process inherits from the one that started it.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


STATISTICS = """
import os, sys, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from hpcres.metrics.schedule import connect
from hpcres.metrics.statistics import statistics
from hpcres.volumes.formats import open_volume
with connect(threads=1) as client:
    for path in (sys.argv[1], sys.argv[1], sys.argv[2]):  # the first one small: compiled, and the rest imported
        volume, began = open_volume(path), time.process_time()
        statistics(
            volume, client=client, labels=range(len(volume.phases)), lags=64, progress=False,
            which=("correlations", "chords", "connectivity"),
        )
seconds = time.process_time() - began
print(seconds, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def mirrored(part: np.ndarray, edge: int):
    """A volume that repeats `part` with its mirror images, read without being held."""
    from hpcres.volumes.volume import Volume

    both = part
    for axis in range(3):
        both = np.concatenate([both, np.flip(both, axis)], axis)

    def read(box) -> np.ndarray:
        place = [np.arange(a, b) % n for a, b, n in zip(box.start, box.stop, both.shape, strict=True)]
        return both[np.ix_(*place)]

    return Volume("phantom", (edge,) * 3, both.dtype, (CHUNK,) * 3, read)


def phantom(phases: int) -> np.ndarray:
    """Labels of 256³: three connected phases, or grains of as many as asked for."""
    from scipy.ndimage import gaussian_filter

    from hpcres.phantoms.materials import three_phase

    if phases == 3:
        return three_phase((256,) * 3, 1, feature_voxels=12)
    noise = np.random.default_rng(1).standard_normal
    best, labels = np.full((256,) * 3, -np.inf, np.float32), np.zeros((256,) * 3, np.uint8)
    for phase in range(phases):
        field = gaussian_filter(noise(labels.shape, np.float32), 6, mode="wrap")
        labels[field > best] = phase
        np.maximum(best, field, out=best)
    return labels


def rates(path: Path) -> tuple[float, float]:
    """Voxels per processor second of decoding a store and of counting it."""
    import zarr

    from hpcres.geometry import blocks
    from hpcres.metrics.measure import count_volume
    from hpcres.metrics.schedule import block_shape, block_voxels, connect, slabs
    from hpcres.volumes.formats import open_volume

    volume, array = open_volume(path), zarr.open_array(path / "0", mode="r")
    parts = blocks(volume.shape, block_shape(volume.shape, volume.chunks, block_voxels(volume.shape, 1, 1)))
    boxes = [box for part in parts for box in slabs(part, volume.chunks, 1)]
    labels = range(len(volume.phases or ()))
    seconds: dict[str, list[float]] = {"decoding": [], "counting": []}
    with connect(threads=1) as client:
        # Compiled, and the file in the page cache.
        count_volume(volume, client=client, labels=labels, progress=False)
        for _ in range(3):
            began = time.process_time()
            for box in boxes:
                array[box.slices]
            seconds["decoding"].append(time.process_time() - began)
            began = time.process_time()
            count_volume(volume, client=client, labels=labels, progress=False)
            seconds["counting"].append(time.process_time() - began)
    voxels = float(np.prod(volume.shape))
    return voxels / min(seconds["decoding"]), voxels / min(seconds["counting"])


def taufactor_seconds(labels: np.ndarray) -> dict[str, float]:
    """Processor seconds of the three functions of TauFactor on an array, as its users call them."""
    import torch
    from taufactor import metrics

    torch.set_num_threads(1)
    # Its triple_phase_boundary pads with -1, which an unsigned type cannot hold.
    signed = labels.astype(np.int8)
    calls = {
        "volume_fraction": lambda: metrics.volume_fraction(labels),
        "interfacial_areas": lambda: metrics.interfacial_areas(labels, device="cpu"),
        "triple_phase_boundary": lambda: metrics.triple_phase_boundary(signed),
    }
    seconds = {}
    for name, call in calls.items():
        began = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            call()
        seconds[name] = time.process_time() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], metavar="VOXELS")
    parser.add_argument("--taufactor", type=int, default=256, metavar="VOXELS", help="edge of its crop, 0 for none")
    parser.add_argument("--volume", help="a volume of labels, any of the formats hpcres reads")
    parser.add_argument("--phases", type=int, default=3, help="of the phantom")
    parser.add_argument("--statistics", action="store_true", help="time these, not the counts")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    from hpcres.counting import counts, totals
    from hpcres.geometry import Box
    from hpcres.volumes.convert import convert
    from hpcres.volumes.formats import open_volume

    if arguments.volume:
        given = open_volume(arguments.volume)
        part = np.unique(given.read(Box.whole(given.shape)), return_inverse=True)[1].astype(np.uint8)
    else:
        part = phantom(arguments.phases)
    labels = range(int(part.max()) + 1)
    what = "statistics" if arguments.statistics else "  counting"
    print(f"volume    decoding {what}   ratio   peak memory   store")
    print("          Mvoxel/s   Mvoxel/s                MiB     MiB")
    with tempfile.TemporaryDirectory(prefix="hpcres-bench-") as name:
        for edge in arguments.sizes:
            path = Path(name) / f"{edge}.zarr"
            convert(mirrored(part, edge), path, phases={i: f"phase{i}" for i in labels}, chunk_voxels=CHUNK)
            decoding, counting = rates(path)
            script = [STATISTICS, str(Path(name) / f"{arguments.sizes[0]}.zarr")] if arguments.statistics else [COUNT]
            command = [sys.executable, "-c", *script, str(path)]
            shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            if arguments.statistics:
                print(f"      (counting {counting / 1e6:.0f} Mvoxel/s)")
                counting = float(edge) ** 3 / float(shown[0])
            stored = sum(file.stat().st_size for file in (path / "0").rglob("*") if file.is_file())
            print(
                f"{edge:5}³ {decoding / 1e6:11.0f} {counting / 1e6:10.0f} {counting / decoding:7.2f} "
                f"{int(shown[-1]) / 1024:13.0f} {stored / 2**20:7.0f}"
            )
    if arguments.taufactor and len(labels) == 3 and not arguments.statistics:  # its TPB takes no other number
        crop = np.ascontiguousarray(part[(slice(arguments.taufactor),) * 3])
        counts.count(crop, labels=labels)
        times = []
        for _ in range(5):
            began = time.process_time()
            totals.finalize(counts.count(crop, labels=labels), (1, 1, 1))
            times.append(time.process_time() - began)
        theirs = taufactor_seconds(crop)
        print(f"\nan array of {arguments.taufactor}³ in memory, seconds")
        for what, seconds in theirs.items():
            print(f"  taufactor.metrics.{what:22} {seconds:9.3f}")
        print(f"  the three together               {sum(theirs.values()):16.3f}")
        print(f"  hpcres, all in one pass          {min(times):16.4f}")
        print(f"  ratio                            {sum(theirs.values()) / min(times):16.0f}")


if __name__ == "__main__":
    main()
