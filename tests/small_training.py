"""Studies that train in a second or two, for the tests of training."""

from __future__ import annotations

import os
import signal
from itertools import combinations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from hpcres.checkpoint import load_checkpoint
from hpcres.study import Study
from hpcres.training.distributed import Processes
from hpcres.training.wgan import Models

ALONE = Processes(0, 1, 1, torch.device("cpu"))


def blobs(shape, seed, phases=3):
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2, mode="wrap")
    return np.digitize(field, np.quantile(field, np.arange(1, phases) / phases)).astype(np.uint8)


def study_of(folder, images=None, high_res=None, volume=None, **more):
    """A study of small random data; `training` and other sections override the tiny defaults."""
    np.save(folder / "low.npy", blobs((20, 18, 17), 1) if volume is None else volume)
    if images is None:
        np.save(folder / "high.npy", blobs((1, 90, 80), 2))
        images = [{"path": str(folder / "high.npy")}]
    training = {"steps": 4, "cubes": 2, "slices_per_axis": 3, "critic_steps": 2, "ema": 0.9, "threads": 1}
    training |= {"recalibration_cubes": 2, "real_patches": "slices", "penalties": "slices"}
    training |= more.pop("training", {})
    return Study.model_validate(
        {
            "name": "t",
            "seed": 2**63 + 5,
            "output": str(folder / "out"),
            "scale_factor": 4,
            "high_res": {
                "phases": {0: "a", 1: "b", 2: "c"},
                "voxel_size": "65 nm",
                "images": images,
                **(high_res or {}),
            },
            "low_res": {"path": str(folder / "low.npy"), "phases": {0: "a", 1: "b", 2: "c"}},
            "network": {"width": 3, "critic_width": 5, "padding": "zeros", "last_stage": "transposed"},
            "training": training,
            "device": "cpu",
            "imaging": {"operator": "under-sampled"},
        }
        | more
    )


def one_image(folder, pixels, **image):
    np.save(folder / "one.npy", pixels)
    return {"path": str(folder / "one.npy"), **image}


def content(labels, phases=3):
    """Phase fractions of what is known, and interphase areas as shares of as much of all faces, by brute force."""
    known = labels < phases
    sides = [(labels.take(range(1, n), axis), labels.take(range(n - 1), axis)) for axis, n in enumerate(labels.shape)]
    faces = np.concatenate([np.sort(np.stack([a.ravel(), b.ravel()]), axis=0) for a, b in sides], axis=1)
    areas = [((faces[0] == a) & (faces[1] == b)).mean() / known.mean() for a, b in combinations(range(phases), 2)]
    return np.array([*((labels[known] == phase).mean() for phase in range(phases)), *areas])


def counted_patterns(stack, spacing, pixels=4, phases=3):
    """How often each pattern of 2 × 2 pixels, or of 2 × 3 and of 3 × 2 read column by column, is in slices (slice, row,
    column), window by window: (shape, phases ** pixels)."""
    shapes = ((2, 2),) if pixels == 4 else ((2, 3), (3, 2))
    found = np.zeros((len(shapes), *[phases] * pixels))
    for which, (height, width) in enumerate(shapes):
        down, across = (height - 1) * spacing, (width - 1) * spacing
        for image in stack:
            for row, column in np.ndindex(image.shape[0] - down, image.shape[1] - across):
                window = image[row : row + down + 1 : spacing, column : column + across + 1 : spacing]
                found[which][tuple((window.T if height == 3 else window).ravel())] += 1
    return found.reshape(len(shapes), -1)


def counted_thin(stack):
    """How many pixels of slices (slice, row, column) differ from two neighbours that are alike, down a column and along
    a row, and how many have two neighbours so."""
    found = np.zeros((2, 2), int)
    for direction, lines in enumerate((stack.swapaxes(1, 2), stack)):
        for line in lines.reshape(-1, lines.shape[2]):
            for before, here, after in zip(line, line[1:], line[2:], strict=False):
                found[direction] += (before == after != here, 1)
    return found


def atypical(folder, **training):
    """A low-res volume with half of phase b, and an image with 70 % of it; phase c is merged with a."""
    tenths = blobs((1, 90, 80), 2, 10)
    np.save(folder / "other.npy", np.array([2, 0, 0, *[1] * 7], np.uint8)[tenths])
    return study_of(
        folder,
        [{"path": str(folder / "other.npy")}],
        volume=blobs((20, 18, 17), 1, 2),
        low_res={"path": str(folder / "low.npy"), "phases": {0: ["a", "c"], 1: "b"}},
        training={"atypical_images": "correct", "pattern_weight": 0.5} | training,
    )


def anisotropic(folder, **training):
    np.save(folder / "side.npy", blobs((2, 60, 70), 3))
    np.save(folder / "top.npy", blobs((1, 64, 64), 4))
    images = [
        {"path": str(folder / "side.npy"), "planes": ["zy", "xz"]},
        {"path": str(folder / "top.npy"), "planes": ["yx"], "augment": True},
    ]
    return study_of(
        folder,
        images,
        {"isotropic": False},
        np.minimum(blobs((20, 18, 17), 1), 1),
        low_res={"path": str(folder / "low.npy"), "phases": {0: "a", 1: ["b", "c"]}},
        imaging={"operator": "under-resolved"},
        training={"slices_per_axis": None, "critic_steps": 1, "cubes": 3} | training,
    )


def told_to_stop_at(step):
    """Models.step that sends its own process SIGUSR1 before it makes the step of this number."""
    plain = Models.step

    def signalled(self, number, *rest):
        if number == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain(self, number, *rest)

    return signalled


def weights(study):
    checkpoint = load_checkpoint(study.checkpoint_path)
    state = checkpoint.training_state
    return checkpoint.sha256, state["generator"], state["critics"], state["average"], state["critic_optimizer"]["state"]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def history(study, name="training.csv"):
    """Rows of a CSV file without their seconds, which no two runs share."""
    rows = [row.rstrip().split(",") for row in (study.folder / name).open()]
    return [row[:1] + row[2:] for row in rows]
