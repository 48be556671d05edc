"""Whether this code trains as an earlier commit does: losses and weights of five steps of each recipe, bit for bit.

    git worktree add ../before COMMIT
    python bench/same_training.py ../before

Both train on the same small data on this machine, in fp32 with one thread. Prints a line for each recipe and exits with
1 where one differs. The published settings are those without a recipe, with small networks.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

HERE = Path(__file__).resolve().parent.parent
RECIPES = {
    "published": {"network": {"width": 4, "critic_width": 5}, "training": {"cubes": 2, "slices_per_axis": 4}},
    "fast": {},
    "long": {},
    "long-white": {},
    "fast, atypical": {},
}
STEPS = 5
DIGEST = """
import hashlib, sys
from hpcres.checkpoint import load_checkpoint
found = hashlib.sha256()
for name, tensor in sorted(load_checkpoint(sys.argv[1]).generator.state_dict().items()):
    found.update(name.encode() + tensor.contiguous().numpy().tobytes())
print(found.hexdigest())
"""


def study_in(folder: Path, recipe: str) -> Path:
    """Blobs of three phases, of which the low-res volume merges two, and a study that trains a few steps on them."""
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(0)
    tilt = 0.2 if "atypical" in recipe else 0.0
    for name, shape, limits in (("low", (24, 24, 24), [0.4]), ("high", (1, 200, 200), [0.25 + tilt, 0.4 + tilt])):
        field = gaussian_filter(random.standard_normal(shape), 2 if name == "low" else 5, mode="wrap")
        labels = np.digitize(field, np.quantile(field, limits)).astype(np.uint8)
        np.save(folder / f"{name}.npy", labels)
    base = recipe.partition(",")[0]
    content = {
        "name": "same",
        "output": "out",
        "scale_factor": 4,
        "device": "cpu",
        "high_res": {"phases": {0: "a", 1: "b", 2: "c"}, "voxel_size": "1 um", "images": [{"path": "high.npy"}]},
        "low_res": {"path": "low.npy", "phases": {0: ["a", "b"], 1: "c"}},
        "imaging": {"operator": "under-resolved"},
        **RECIPES[recipe],
    }
    if base != "published":
        content["base"] = str(HERE / "configs" / f"{base}.yaml")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def trained(package: Path, study: Path, output: Path) -> str:
    """Digest of the rows of training.csv without their seconds, and of the weights that are saved."""
    settings = {
        "steps": STEPS,
        "minutes": "null",
        "threads": 1,
        "precision": "fp32",
        "report_seconds": 1e-6,
        "settling_cubes": 4,  # its name until 2026-11, which is still read
        "quality_cubes": 2,
        "quality_steps": 5,
    }
    command = [sys.executable, "-m", "hpcres", "train", str(study), f"--output={output}"]
    command += [f"--set=training.{key}={value}" for key, value in settings.items()]
    environment = os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, cwd=package, check=True, capture_output=True)
    rows = [line.split(",") for line in (output / "training.csv").read_text().splitlines()]
    kept = [place for place, name in enumerate(rows[0]) if name != "seconds"]
    text = "\n".join(",".join(row[place] for place in kept) for row in rows)
    weights = subprocess.run(
        [sys.executable, "-c", DIGEST, str(output / "checkpoint.pt")],
        env=environment,
        cwd=package,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return hashlib.sha256((text + weights).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the earlier commit")
    options = parser.parse_args()
    differ = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, recipe in enumerate(RECIPES):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            study = study_in(folder, recipe)
            before, now = (
                trained(package.resolve(), study, folder / name)
                for package, name in ((options.before, "before"), (HERE, "now"))
            )
            differ += before != now
            print(f"{recipe}: {'the same bits' if before == now else 'DIFFERS'}", flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
