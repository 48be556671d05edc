"""How fast `hpcres tortuosity` solves, beside TauFactor called as its users call it, in one run.

    python bench/transport.py                     electrode.tiff in $HPCRES_DATA, labels 0, 85, 170 (3 minutes)
    python bench/transport.py --grow 128 256 512  iterations, time and memory of growing volumes (10 minutes)
    python bench/transport.py --ranks 1 2 4 --edge 512        over MPI: time, memory of each rank (5 minutes)
    python bench/transport.py --memory 1GiB 2GiB --edge 512   out of core: time, memory, streamed bytes (5 minutes)
    python bench/transport.py --far               flat voxels and conductivities far apart (5 minutes)
    python bench/transport.py --beside CHECKOUT   the same solves by another version of hpcres, by turns (2 minutes);
                                                  commit 903978b or later, since each version runs its own bench
    python bench/transport.py --blocks            how far off and how slow --estimate blocks is (2 minutes)
    python bench/transport.py --grow 256 512 1024 --device cuda    the same on a GPU, with seconds of an iteration there

A time is the least of some whole solves, percolation and set-up included, kernels compiled, labels in memory.
TauFactor's is its seconds per iteration, measured over a few, times the iterations that it needs at its default stop
(measured once: 700, 3600 and 1400). Bytes are the process's peak above what it held before, over the voxels, plus the
labels. With --device they are what torch held there at the most, and percolation and set-up are on all cores. Over MPI
and out of core a time includes reading the store, and a peak is the whole process's, Python included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ITERATIONS = {0: 700, 85: 3600, 170: 1400}


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def solve_alone(settings: dict) -> None:
    """One solve in a process of its own; prints a JSON line."""
    from hpcres.geometry import Box
    from hpcres.transport import SolveSettings
    from hpcres.transport.in_memory import solve
    from hpcres.volumes.formats import open_volume

    edge = settings["edge"]
    conductivity = {int(label): k for label, k in settings["conductivity"].items()}
    if settings["blobs"]:
        labels = repeated_blobs(edge)
    else:
        volume = open_volume(Path(os.environ["HPCRES_DATA"]) / "electrode.tiff")
        labels = np.ascontiguousarray(volume.read(Box((0, 0, 0), (edge,) * 3)))
    asked = SolveSettings(settings["direction"], settings["voxel_size"], rtol=settings["rtol"])
    how = {"device": None}
    if settings["device"] is not None:
        from hpcres.transport.device import find_device

        how |= {"device": find_device(settings["device"])}
    solve(labels[:32, :32, :32].copy(), conductivity, asked, **how)  # compiles
    before, seconds, iterated = status("VmRSS"), {threads: [] for threads in settings["threads"]}, []
    for _ in range(settings["repeats"]):
        for threads in settings["threads"]:  # by turns, because neighbours on the machine come and go
            iterated.clear()
            how |= {"threads": threads, "report": lambda *_: iterated.append(time.perf_counter())}
            started = time.perf_counter()
            one = solve(labels, conductivity, asked, **how)[settings["direction"]]
            seconds[threads].append(time.perf_counter() - started)
    held = status("VmHWM") - before + labels.nbytes if settings["device"] is None else one.bytes
    line = {
        "iteration": (iterated[-1] - iterated[0]) / max(1, len(iterated) - 1),
        "seconds": [min(found) for found in seconds.values()],
        "tau": one.tau,
        "error": one.error,
        "iterations": one.iterations,
        "fraction": one.volume_fraction,
        "bytes": held / labels.size,
        "d_rel": one.D_rel,
    }
    print(json.dumps(line), flush=True)


def measure(label: int = 1, checkout: str | None = None, **settings: object) -> dict:
    """Solves in a process of its own; checkout: a folder with another version of hpcres, whose bench is run."""
    usual = {"edge": 256, "threads": [1], "rtol": 1e-3, "blobs": False, "repeats": 2, "device": None}
    usual |= {"conductivity": {label: 1.0}, "voxel_size": (1, 1, 1), "direction": "z"}
    root = Path(__file__).resolve().parents[1] if checkout is None else Path(checkout).resolve()
    given = {**usual, **settings}
    given["spacing"] = given["voxel_size"]  # its name in checkouts from before December 2026
    command = [sys.executable, str(root / "bench/transport.py"), "--alone", json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def measure_far() -> None:
    """Voxels far from cubic and conductivities far apart, beside cubic voxels of one conductivity."""
    one, three = {0: 1.0}, {0: 1.0, 85: 1e-4, 170: 1e-6}
    systems = [(one, (1, 1, 1), "z"), (one, (25, 1, 1), "z"), (one, (25, 1, 1), "x"), (one, (1, 1, 100), "z")]
    systems += [({170: 1.0}, (50, 1, 1), "x"), (three, (1, 1, 1), "z"), ({**three, 170: 1e-9}, (25, 1, 1), "x")]
    heads = "conductivity by label | voxel edges z, y, x | direction | D_rel | estimated error | iterations"
    print(f"| {heads} | seconds, one core | bytes a voxel |\n|" + "---|" * 8)
    for conductivity, voxel_size, direction in systems:
        found = measure(conductivity=conductivity, voxel_size=voxel_size, direction=direction, repeats=1)
        several = ", ".join(f"{label}: {k:g}" for label, k in conductivity.items())
        print(
            f"| {several} | {', '.join(map(str, voxel_size))} | {direction} | {found['d_rel']:.6g} | "
            f"{found['error']:.1e} | {found['iterations']} | {found['seconds'][0]:.1f} | {found['bytes']:.1f} |",
            flush=True,
        )


def compare_versions(checkout: str, edge: int) -> None:
    """Seconds of cubic voxels by this version and another one, by turns; each the least of all turns."""
    print("| conductivity by label | D_rel, ours | theirs | seconds, ours | theirs | ratio |\n|" + "---|" * 6)
    for conductivity in ({0: 1.0}, {85: 1.0}, {170: 1.0}, {0: 1.0, 85: 0.5}):
        both = (None, checkout)
        settings = {"conductivity": conductivity, "edge": edge, "repeats": 3}
        turns = [[measure(checkout=c, **settings) for c in both] for _ in range(3)]
        ours, theirs = (min(turn[i]["seconds"][0] for turn in turns) for i in (0, 1))
        several = ", ".join(f"{label}: {k:g}" for label, k in conductivity.items())
        print(
            f"| {several} | {turns[0][0]['d_rel']!r} | {turns[0][1]['d_rel']!r} | {ours:.3f} | {theirs:.3f} | "
            f"{ours / theirs:.3f} |",
            flush=True,
        )


def taufactor_seconds(label: int, iterations: int = 20) -> float:
    """Seconds per iteration on one core."""
    code = f"""
import os, time, numpy as np, tifffile, torch, taufactor
torch.set_num_threads(1)
image = (tifffile.imread(os.environ["HPCRES_DATA"] + "/electrode.tiff") == {label}).astype(np.uint8)
solver = taufactor.Solver(image, device="cpu")
started = time.perf_counter()
solver.solve(iter_limit={iterations}, verbose=False)
print((time.perf_counter() - started) / {iterations})
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def solve_store(settings: dict) -> None:
    """One solve of a store, as `hpcres tortuosity` does it; each rank prints a JSON line."""
    from hpcres.inference.ranks import join_ranks
    from hpcres.transport import Conducting, Means, SolveSettings, tortuosity
    from hpcres.volumes.formats import open_volume

    volume, said = open_volume(settings["store"]), []
    with join_ranks() as ranks:
        means = Means(
            settings["threads"],
            comm=ranks.communicator,
            on_node=ranks.on_node,
            memory=settings["limit"],
            scratch=Path(settings["scratch"]),
            say=said.append,
        )
        asked = Conducting(only=("1",)), SolveSettings("z")
        small = replace(means, memory=settings["limit"] and 280 << 20, say=lambda line: None)
        tortuosity(volume, *asked, small, crop="0:64,0:32,0:32")  # compiles
        before, started = status("VmRSS"), time.perf_counter()
        one = tortuosity(volume, *asked, means)["results"][0]
        line = {
            "rank": ranks.rank,
            "seconds": time.perf_counter() - started,
            "D_rel": one["D_rel"],
            "iterations": one["iterations"],
            "before": before,
            "peak": status("VmHWM"),
            "said": said,
        }
        print(json.dumps(line), flush=True)


def compare_stores(edge: int, ranks: list[int], limits: list[str], threads: int, scratch: str | None) -> None:
    """Over MPI and out of core beside one process in memory, in one run."""
    import tempfile

    from hpcres.cli.options import parse_bytes

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        np.save(f"{folder}/a.npy", repeated_blobs(edge))
        convert = ["convert", f"{folder}/a.npy", "--output", f"{folder}/a.zarr", "--voxel-size", "1um"]
        subprocess.run([sys.executable, "-m", "hpcres", *convert], stdout=subprocess.DEVNULL, check=True)
        heads = "blobs | how | seconds | × the first | D_rel | iterations | peak GiB of each rank | streamed"
        print(f"| {heads} |\n|" + "---|" * 8)
        first: float | None = None
        hows = [(f"{n} ranks" if n > 1 else "in memory", n, None) for n in ranks]
        hows += [(f"--memory {limit}", 1, parse_bytes("--memory", limit)) for limit in limits]
        for name, number, limit in hows:
            settings = {"store": f"{folder}/a.zarr", "limit": limit, "threads": threads, "scratch": folder}
            command = [sys.executable, __file__, "--store", json.dumps(settings)]
            start = ["mpirun", "-n", str(number)] if number > 1 else []
            done = subprocess.run([*start, *command], stdout=subprocess.PIPE, text=True, check=True)
            lines = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda line: line["rank"])
            one = lines[0]
            first = first or one["seconds"]
            peaks = ", ".join(f"{line['peak'] / 2**30:.2f}" for line in lines)
            print(
                f"| {edge}³ | {name}, {threads} threads each | {one['seconds']:.1f} | {one['seconds'] / first:.2f} | "
                f"{one['D_rel']!r} | {one['iterations']} | {peaks} (Python before: {one['before'] / 2**30:.2f}) | "
                f"{'; '.join(one['said'])} |",
                flush=True,
            )


def blobs(edge: int, sigma: float | tuple[float, ...], fraction: float, seed: int) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(np.random.default_rng(seed).random((edge,) * 3, np.float32), sigma, mode="wrap")
    return (field < np.quantile(field, fraction)).astype(np.uint8)


def repeated_blobs(edge: int) -> np.ndarray:
    """40 % conduct; made once for 256³, which is quick."""
    part = min(edge, 256)
    return np.tile(blobs(part, 3, 0.4, 1), (-(-edge // part),) * 3)[:edge, :edge, :edge].copy()


def compare_blocks() -> None:
    """Each chunk alone against the whole volume."""
    import tempfile

    import tifffile

    from hpcres.transport import Conducting, Means, SolveSettings, tortuosity
    from hpcres.volumes.formats import open_volume

    electrode = tifffile.imread(Path(os.environ["HPCRES_DATA"]) / "electrode.tiff")
    volumes = [("electrode.tiff", electrode, ("0", "85", "170"))]
    settings = [(2, 0.4, 1), (6, 0.4, 2), (6, 0.25, 3), (0, 0.35, 4), (12, 0.2, 5), ((2, 8, 8), 0.3, 6)]
    volumes += [(f"blobs 192³, sigma {s}, φ {f}", blobs(192, s, f, seed), ("1",)) for s, f, seed in settings]
    print("| volume | | D_rel, exact | blocks as a network | their mean | blocks / exact, time |\n|" + "---|" * 6)
    with tempfile.TemporaryDirectory() as folder:
        for name, labels, only in volumes:
            np.save(f"{folder}/a.npy", labels)
            volume = open_volume(f"{folder}/a.npy")
            for estimate in (None, 64):  # compiles
                tortuosity(
                    volume,
                    conducting=Conducting(only=only),
                    settings=SolveSettings(directions="z"),
                    crop="0:16,0:16,0:16",
                    estimate=estimate,
                )
            exact, guesses = (
                tortuosity(volume, conducting=Conducting(only=only), means=Means(threads=1), estimate=e)["results"]
                for e in (None, 64)
            )
            for i, (one, guess) in enumerate(zip(exact, guesses, strict=True)):
                whole, mean = one["D_rel"], guess["estimate"]["mean_D_rel"]
                # Blocks are solved once for all three directions.
                ratio = "" if i % 3 else f"{guess['seconds'] / sum(e['seconds'] for e in exact[i : i + 3]):.1f}"
                print(
                    f"| {name} | {one['phase']}, {one['direction']} | {whole:.5f} | "
                    f"{guess['D_rel'] / whole - 1:+.1%} | {mean / whole - 1:+.1%} | {ratio} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--grow", type=int, nargs="*", help="edges of volumes of blobs, 40 %% conducting")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="*", default=[], help="over MPI; 1 is one process in memory")
    parser.add_argument("--memory", nargs="*", default=[], metavar="SIZE", help="out of core")
    parser.add_argument("--edge", type=int, help="of the volume: 512 for --ranks and --memory, 256 for --beside")
    parser.add_argument("--threads", type=int, default=1, help="of each process, for --ranks and --memory")
    parser.add_argument("--scratch", metavar="DIR", help="for --memory")
    parser.add_argument("--blocks", action="store_true", help="the estimate from blocks against the whole volume")
    parser.add_argument("--far", action="store_true", help="flat voxels and conductivities far apart")
    parser.add_argument("--beside", metavar="CHECKOUT", help="another version of hpcres")
    parser.add_argument("--labels", type=int, nargs="*", default=[0, 85, 170])
    parser.add_argument("--device", help="with --grow: a GPU, such as cuda")
    options = parser.parse_args()
    if options.device and not options.grow:
        parser.error("--device is for --grow")
    if options.alone:
        solve_alone(json.loads(options.alone))
        return
    if options.store:
        solve_store(json.loads(options.store))
        return
    if options.ranks or options.memory:
        compare_stores(options.edge or 512, options.ranks, options.memory, options.threads, options.scratch)
        return
    if options.blocks or options.far or options.beside:
        if options.blocks:
            compare_blocks()
        elif options.far:
            measure_far()
        else:
            compare_versions(options.beside, options.edge or 256)
        return
    if options.grow:
        where = options.device or "one core"
        heads = f"volume | conducting | seconds, {where} | an iteration | iterations | estimated error | bytes a voxel"
        print(f"| {heads} |\n|" + "---|" * 7)
        for edge in options.grow:
            threads = [None if options.device else 1]
            one = measure(edge=edge, blobs=True, repeats=1, threads=threads, device=options.device)
            print(
                f"| {edge}³ | {one['fraction']:.2f} | {one['seconds'][0]:.1f} | {one['iteration']:.3f} | "
                f"{one['iterations']} | {one['error']:.1e} | {one['bytes']:.1f} |",
                flush=True,
            )
        return
    heads = "label | τ | estimated error | iterations | one core | two | ratio | bytes a voxel | TauFactor | × faster"
    print(f"| {heads} |\n|" + "---|" * 10)
    for label in options.labels:
        found = measure(label=label, threads=[1, 2], repeats=5)
        one, two = found["seconds"]
        peer = taufactor_seconds(label) * ITERATIONS[label]
        print(
            f"| {label} | {found['tau']:.5f} | {found['error']:.1e} | {found['iterations']} | {one:.2f} s | "
            f"{two:.2f} s | {one / two:.2f} | {found['bytes']:.1f} | {peer:.0f} s | {peer / one:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
