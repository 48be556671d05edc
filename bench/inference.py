"""How fast `hpcres infer` paints, beside what a direct convolution could reach on the same core in the same run.

    python bench/inference.py                       widths 5 and 8 at scale factor 8, one rank and two (7 minutes)
    python bench/inference.py --sizes 512 1024 1920 the small network on growing volumes (half an hour)
    python bench/inference.py --forms               each form of the network beside the plain module (2 minutes)
    python bench/inference.py --forms configs/demo.yaml     the same of a trained network and its low-res volume

The network is the paper's with random weights, the input a chi² phantom, the store real. The direct bound is the rate
at which one core multiplies fp32 matrices of 2048² (torch), measured before and after, over the operations that the
layers' convolutions take per output voxel. Forms paint one window on one core, in memory; a time is the lesser of two,
in processor seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def prepare(folder: Path, scale: int, width: int, edge: int, tile: int) -> Path:
    """A study with its phantom and checkpoint."""
    import torch
    import yaml

    from hpcres.checkpoint import build_generator, save_checkpoint
    from hpcres.geometry import Box
    from hpcres.phantoms.chi2 import Chi2Volume, Excursion
    from hpcres.study.file import load_study

    low = edge // scale
    # Repeated, because a phantom of a big volume takes longer than painting it.
    part = min(low, 96)
    block = Chi2Volume((part,) * 3, 1, [Excursion(0.6, 50)]).read(Box.whole((part,) * 3))
    np.save(folder / "low.npy", np.tile(block, (-(-low // part),) * 3)[:low, :low, :low])
    tiles = -(-edge // tile)
    content = {
        "name": "bench",
        "scale_factor": scale,
        "output": str(folder / "out"),
        "seed": 1,
        "device": "cpu",
        "high_res": {
            "phases": {0: "pore", 1: "active", 2: "binder"},
            "voxel_size": "50 nm",
            "images": [{"path": "none.tif"}],
        },
        "low_res": {"path": str(folder / "low.npy"), "phases": {0: ["pore", "binder"], 1: "active"}},
        "network": {"width": width},
        "inference": {"tiles": [tiles] * 3, "threads": 1, "chunk_voxels": 64 if tile % 128 else 128},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    study = load_study(path)
    torch.manual_seed(0)
    save_checkpoint(study.checkpoint_path, generator=build_generator(study).eval(), study=study, step=0)
    return path


def rank(study: str) -> None:
    """One rank, on a core of its own; prints a JSON line."""
    number = int(os.environ.get("OMPI_COMM_WORLD_RANK", 0))
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1 - number % len(cores)]})
    from hpcres.inference.job import open_job
    from hpcres.inference.ranks import join_ranks
    from hpcres.inference.run import infer
    from hpcres.study.file import load_study

    with join_ranks() as ranks:
        before = matrix_rate()
        painted = infer(open_job(load_study(study)), ranks)
        peak = peak_bytes()
        after = matrix_rate()
        line = {"seconds": painted.seconds, "parts": painted.parts, "peak": peak, "rate": max(before, after)}
        for other in ranks.everyone(json.dumps(line)):
            if ranks.rank == 0:
                print(other, flush=True)


def peak_bytes() -> int:
    """Of this process; its maximal resident size by getrusage would be that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def matrix_rate() -> float:
    """fp32 operations per second of one core: the best of some products of 2048² matrices."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def compress_seconds(store: Path) -> float:
    """Seconds to compress one voxel as the store does, measured on its own first tile."""
    import numcodecs

    from hpcres.geometry import Box
    from hpcres.volumes.stores import LabelStore

    labels = LabelStore.open(store).read(0, Box.whole((64, 64, 64)))
    codec = numcodecs.Blosc("zstd", 3, numcodecs.Blosc.BITSHUFFLE)
    codec.encode(labels)
    started = time.perf_counter()
    for _ in range(5):
        codec.encode(labels)
    return (time.perf_counter() - started) / 5 / labels.size


def measure(scale: int, width: int, edge: int, tile: int, ranks: int) -> dict[str, float]:
    from hpcres.checkpoint import load_checkpoint
    from hpcres.geometry import Box
    from hpcres.study.file import load_study

    folder = Path(tempfile.mkdtemp(prefix="hpcres-bench-"))
    try:
        path = prepare(folder, scale, width, edge, tile)
        program = [sys.executable, __file__, "--rank", str(path)]
        launcher = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "mpirun"
        command = program if ranks == 1 else [launcher, "-n", str(ranks), *program]
        done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        study = load_study(path)
        generator = load_checkpoint(study.checkpoint_path).generator
        low = Box.whole((edge // scale,) * 3)
        per_voxel = generator.stages().operations(low.voxels) / (low.voxels * float(Fraction(scale)) ** 3)
        seconds, parts = lines[0]["seconds"], lines[0]["parts"]
        compress = compress_seconds(study.labels_path) * edge**3 * 8 / 7
        rate = sum(line["rate"] for line in lines) / len(lines)
        return {
            "voxels/s": edge**3 / seconds,
            "bound": rate / per_voxel,
            "rate": rate,
            "peak": max(line["peak"] for line in lines),
            "compress": compress / (seconds * ranks),
            **{part: spent / (seconds * ranks) for part, spent in parts.items()},
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def forms(path: str | Path, most: int) -> Iterator[str]:
    """A row for each form that labels a corner of a study's volume, `most`³ voxels where there are, on one core."""
    import torch

    from hpcres.checkpoint import load_checkpoint
    from hpcres.engines.polyphase import Polyphase
    from hpcres.engines.winograd import Memory, WinogradNetwork
    from hpcres.geometry import Box
    from hpcres.memory import keep_freed_memory
    from hpcres.noise import normals
    from hpcres.study.file import load_study
    from hpcres.volumes.formats import open_volume
    from hpcres.volumes.phases import PhaseMap

    torch.set_num_threads(1)
    keep_freed_memory()  # for all of them: otherwise page faults are what is compared
    study = load_study(path)
    volume, generator = open_volume(study.low_res.path), load_checkpoint(study.checkpoint_path).generator
    q = study.scale_factor.denominator
    low = Box.whole([min(int(most / study.scale_factor), n) // q * q for n in volume.shape])
    whole = Box.whole([int(n * study.scale_factor) for n in low.shape])
    index = PhaseMap.of(study.low_res, study.low_res.path).index(volume.read(low))
    winograd, memory = WinogradNetwork(generator.stages(), low.shape), Memory()
    fp32, bf16 = (Polyphase(generator.stages(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    window, channels = np.zeros((*low.shape, winograd.channels), np.float32), len(study.low_res.labels)
    window[..., :channels] = index[..., None] == np.arange(channels)
    window[..., channels] = normals(study.seed, low)
    maps = torch.from_numpy(window[..., : channels + 1].transpose(3, 0, 1, 2)[None].copy())
    ways: dict[str, Callable[[], np.ndarray]] = {
        "module": lambda: generator(maps).argmax(1)[0].numpy(),
        "polyphase, fp32": lambda: fp32.labels(maps)[0].numpy(),
        "polyphase, bf16": lambda: bf16.labels(maps)[0].numpy(),
        "Winograd, fp32": lambda: winograd.labels(window, low, whole, memory),
    }
    slowest = 0.0
    with torch.inference_mode():
        exact = copy.deepcopy(generator).double()(maps.double()).argmax(1)[0].numpy()
        for name, way in ways.items():
            spent = []
            for _ in range(2):
                began = time.process_time()
                labels = way()
                spent.append(time.process_time() - began)
            slowest = slowest or min(spent)
            differ = f"{np.mean(labels != exact):.2g}" if np.ptp(exact) else "there is one label only"
            yield f"| {name} | {exact.size / min(spent) / 1e6:.3g} M | {slowest / min(spent):.1f} | {differ} |"


def row(scale: int, width: int, edge: int, ranks: int, found: dict[str, float], more: str) -> str:
    write = max(0.0, found["write"] - found["compress"])
    shares = [found["read"], found["noise"], found["network"], found["count"], found["compress"], write]
    cells = [
        f"{width}",
        f"{scale}",
        f"{edge}³",
        f"{ranks}",
        f"{found['voxels/s'] / 1e6:.3g} M",
        f"{found['bound'] * ranks / 1e6:.3g} M",
        f"{found['voxels/s'] / found['bound'] / ranks:.2f}",
        f"{found['rate'] / 1e9:.0f}",
        *(f"{share:.1%}" for share in shares),
        f"{found['peak'] / 2**20:.0f} MiB",
        more,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="*", help="edges of output volumes for the small network")
    parser.add_argument("--scale", type=int, default=8, choices=(2, 4, 8))
    parser.add_argument("--widths", type=int, nargs="*", default=[5, 8])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--forms", nargs="?", const="", metavar="STUDY", help="of a trained study, else random weights")
    options = parser.parse_args()
    if options.rank:
        rank(options.rank)
        return
    if options.forms is not None:
        heads = "form | voxels/s | × the module | share of labels that are not the module's in double precision"
        for width in options.widths[: 1 if options.forms else None]:
            edge = 128 if width <= 6 else 64
            with tempfile.TemporaryDirectory(prefix="hpcres-bench-") as folder:
                path = options.forms or prepare(Path(folder), options.scale, width, edge, edge)
                print(f"\n{options.forms or f'width {width}'}\n\n| {heads} |\n|" + "---|" * 4, flush=True)
                for line in forms(path, 160):
                    print(line, flush=True)
        return
    heads = [
        "width",
        "scale",
        "output",
        "ranks",
        "voxels/s",
        "direct bound",
        "ratio",
        "GFLOP/s a core",
        "read",
        "noise",
        "network",
        "count",
        "compress",
        "write",
        "peak a rank",
        "",
    ]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    measure(options.scale, 5, 64, 64, 1)  # compiles, which takes memory
    if options.sizes:
        first: dict[str, float] = {}
        for edge in options.sizes:
            found = measure(options.scale, 5, edge, 256, options.ranks[-1])
            first = first or found
            more = (
                f"{found['voxels/s'] / first['voxels/s']:.3f} × the speed, {found['peak'] / first['peak']:.3f} × the "
                f"memory of {options.sizes[0]}³"
            )
            print(row(options.scale, 5, edge, options.ranks[-1], found, more), flush=True)
        return
    for width in options.widths:
        alone = 0.0
        for ranks in options.ranks:
            edge = 768 if width <= 6 else 480  # 64 tiles, or 27 of which 19 are smaller
            found = measure(options.scale, width, edge, 192, ranks)
            more = f"{found['voxels/s'] / alone:.2f} × one rank" if alone else ""
            alone = alone or found["voxels/s"]
            print(row(options.scale, width, edge, ranks, found, more), flush=True)


if __name__ == "__main__":
    main()
