"""How often the intervals of `hpcres confidence` hold the truth: phantoms that training never sees, several runs each.

    python bench/confidence.py --truths 20 --runs 3 --keep FOLDER

Every truth is a three-phase phantom of its own, with its low-res volume and its slice; every run trains, paints and
measures it with another seed, by the commands a user has. --keep goes on where an earlier call stopped. --share 0/2
and --share 1/2 make two processes run one half each, of which the last to finish prints the table of all.

One Markdown table: for each number how many truths its interval holds, and half its width as a share of the number.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from hpcres.metrics.confidence import LEVEL, Interval, intervals

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FIRST_SEED = 1000
"""Of the phantoms; no run has it."""
HELD = 0.8
"""Of the truths, what a 90 % interval must hold at least: 16 of 20, which chance alone misses in 4 % of trials."""


def hpcres(*arguments: str) -> None:
    print("hpcres " + " ".join(arguments), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "hpcres", *arguments], stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"confidence.py: hpcres {arguments[0]} ended with {done.returncode}")


def study_of(truth: Path, seed: int, voxels: int, steps: int, recipe: str) -> Path:
    """The phantom of a truth, and the study that trains on it."""
    phantom = truth / "phantom.yaml"
    if not phantom.exists():
        truth.mkdir(parents=True, exist_ok=True)
        size = {"voxels": "x".join([str(voxels)] * 3), "slice_voxels": 768}
        content = {"base": str(CONFIGS / "demo.yaml"), "output": "made", "seed": seed, "phantom": size}
        phantom.write_text(yaml.safe_dump(content))
    if not (truth / "made" / "phantom" / "slices.tif").exists():
        hpcres("phantom", str(phantom), "--overwrite")
    study, made = truth / "study.yaml", truth / "made" / "phantom"
    content = {
        "base": [str(CONFIGS / "demo.yaml"), f"hpcres:{recipe}"],
        "high_res": {"images": [{"path": str(made / "slices.tif")}]},
        "low_res": {"path": str(made / "low_res.zarr")},
        "reference": {"volume": str(made / "truth.zarr")},
        "training": {"steps": steps, "minutes": None},
        "metrics": {"subvolumes": {"count": 0}, "statistics": []},
        "inference": {"tiles": "1x1x1"},
    }
    study.write_text(yaml.safe_dump(content))
    return study


def run(study: Path, folder: Path, seed: int) -> Path:
    given = [str(study), f"--output={folder}", f"--set=seed={seed}"]
    hpcres("train", *given)
    hpcres("infer", *given)
    if not (folder / "metrics.json").exists():
        hpcres("metrics", *given)
    hpcres("tortuosity", *given)
    return folder


def table(found: list[list[Interval]], runs: int, steps: int) -> str:
    lines = [
        f"{len(found)} truths, {runs} runs of {steps} steps each, {LEVEL:.0%} intervals\n",
        "| number | bar | met | truths held | of | half width, median |",
        "|---|---|---|---|---|---|",
    ]
    for rows in zip(*found, strict=True):
        known = [one for one in rows if one.holds_reference is not None]
        if not known:
            continue
        held = sum(bool(one.holds_reference) for one in known)
        half = statistics.median((one.high - one.low) / 2 / one.mean for one in known if one.mean)
        bar = f"≥ {HELD * len(known):.0f}" if rows[0].metric == "D_rel" else ""
        met = "" if not bar else "yes" if held >= HELD * len(known) else "**no**"
        lines.append(f"| {rows[0].metric} {rows[0].of} | {bar} | {met} | {held} | {len(known)} | {half:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truths", type=int, default=20)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--voxels", type=int, default=128, help="edge of the truths")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--recipe", default="fast", help="fast, long or long-white")
    parser.add_argument("--keep", type=Path, help="folder for everything that is made; a temporary one by default")
    parser.add_argument("--share", default="0/1", metavar="I/N", help="make only every n-th truth from the i-th on")
    options = parser.parse_args()
    part, parts = map(int, options.share.split("/"))
    with tempfile.TemporaryDirectory(prefix="hpcres-confidence-") as temporary:
        keep = (options.keep or Path(temporary)).resolve()
        every = [
            [keep / f"truth-{truth}" / f"run-{seed}" for seed in range(options.runs)] for truth in range(options.truths)
        ]
        for truth in range(part, options.truths, parts):
            place = keep / f"truth-{truth}"
            study = study_of(place, FIRST_SEED + truth, options.voxels, options.steps, options.recipe)
            for seed, folder in enumerate(every[truth]):
                run(study, folder, seed)
        done = [folders for folders in every if all((folder / "transport.json").exists() for folder in folders)]
        if done:
            print(table([intervals(folders) for folders in done], options.runs, options.steps))


if __name__ == "__main__":
    main()
