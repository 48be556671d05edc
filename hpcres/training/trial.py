"""The time of a training step on this machine, and the faster precision, before a run begins.

Everything here computes on throwaway networks and changes nothing in the run: every random draw of a step is a function
of (seed, step, cube). Each process times its own share of the cubes without communication, all at the same time, and
the slowest process counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hpcres.study import Study
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.draws import critic_counts
from hpcres.training.data.slices import RealSlices
from hpcres.training.distributed import Processes
from hpcres.training.wgan import Models

_PART_SECONDS = 0.5
"""Longest part of a step that is timed, in seconds. A longer part is extrapolated from smaller inputs."""
_PART_BUDGET_SECONDS = 1.0
"""A part whose timings have taken this many seconds together is not timed at a larger size."""
_THRICE_SECONDS = 0.1
"""Longest part that is timed three times at a size, in seconds."""
_STEP_SECONDS, _LONG_STEP_SECONDS = 2.0, 6.0
"""Three whole steps are timed if one takes less than the first, one if it takes less than the second, else none."""
_LEAST_EDGE = 2
"""Low-res voxels along the edge of the smallest cube that batch norm can normalise."""
_SMALL_WIDTHS = {"width": 5, "critic_width": 7}
"""Largest widths in the first comparison of precisions. Without hardware for bf16, a small part of a step takes a tenth
or two of a second with these widths, and minutes with the paper's."""
_CLEARLY = 3.0
"""A precision that is faster by this factor in the first comparison is chosen without the second."""
_BF16_SPEED = 1.05
"""Speed of bf16 relative to fp32 above which bf16, which rounds more, is chosen."""


def with_settings(study: Study, network: dict[str, Any] | None = None, **training: Any) -> Study:
    """Return the study with other settings of its network and its training.

    Parameters
    ----------
    study : Study
        The study, which is not changed.
    network : dict or None
        Settings of the network by name.
    **training
        Settings of the training by name.

    Returns
    -------
    Study
        A copy with these settings.
    """
    return study.model_copy(
        update={
            "network": study.network.model_copy(update=network or {}),
            "training": study.training.model_copy(update=training),
        }
    )


def choose_precision(study: Study, group: Processes) -> tuple[str, float]:
    """Choose the precision, fp32 or bf16, that makes a training step faster on this machine.

    Collective. Parts of a step are timed in both precisions. The first comparison is of a small network on small
    inputs, and shows whether the hardware computes in bf16. If the result is not clear, the second comparison is of the
    study's network.

    Parameters
    ----------
    study : Study
        The study.
    group : Processes
        The processes of the run.

    Returns
    -------
    precision : {"fp32", "bf16"}
        The faster precision.
    speed : float
        Speed of bf16 relative to fp32.
    """
    small = with_settings(study, {key: min(width, getattr(study.network, key)) for key, width in _SMALL_WIDTHS.items()})
    # The first step of a process takes a second longer, because it initialises torch.
    estimated_seconds(with_settings(small, precision="fp32"), group, smallest=True)
    speed = _bf16_speed(small, group, smallest=True)
    if 1 / _CLEARLY < speed < _CLEARLY:
        speed = _bf16_speed(study, group, smallest=False)
    return "bf16" if speed > _BF16_SPEED else "fp32", speed


def _bf16_speed(study: Study, group: Processes, smallest: bool) -> float:
    fp32, bf16 = group.largest(
        *(estimated_seconds(with_settings(study, precision=name), group, smallest) for name in ("fp32", "bf16"))
    )
    return fp32 / bf16


def step_seconds(study: Study, group: Processes, low_res: LowResCubes, real: RealSlices) -> float:
    """Return the seconds of a generator step with all its critic steps, on the slowest process.

    Collective. The step is timed, or estimated from parts if it takes several seconds. Reports, judgements and
    checkpoints are not included.

    Parameters
    ----------
    study : Study
        A study whose precision is chosen.
    group : Processes
        The processes of the run.
    low_res, real : LowResCubes, RealSlices
        Data of the timed steps.

    Returns
    -------
    float
        Seconds per step.
    """
    (estimate,) = group.largest(estimated_seconds(study, group))
    if estimate > _LONG_STEP_SECONDS:
        return estimate
    models, cubes = _alone(study, group), range(_share(study, group))
    step = study.training.warm_up_steps  # steps after the warm-up cost more
    rate = study.training.learning_rate
    seconds = [
        seconds_of(lambda: models.step(step, cubes, low_res, real, rate), group.device)
        for _ in range(3 if estimate < _STEP_SECONDS else 1)
    ]
    return group.largest(min(seconds[-2:]))[0]


def estimated_seconds(study: Study, group: Processes, smallest: bool = False) -> float:
    """Estimate the seconds of a step on this process from its parts.

    Parameters
    ----------
    study : Study
        A study whose precision is chosen.
    group : Processes
        The processes of the run.
    smallest : bool
        Whether to time the parts at the smallest inputs only.

    Returns
    -------
    float
        Seconds per step.
    """
    settings, share = study.training, _share(study, group)
    edge = int(settings.cube_voxels / study.scale_factor)
    models = _alone(with_settings(study, context=0), group)
    cube = _extrapolated(lambda n: _generator_seconds(models, n), _sizes(edge, _LEAST_EDGE), 3, smallest)
    # The context widens low-res feature maps but not high-res ones, which docs/recipes.md measured to cost this much.
    cube *= 1 + settings.context / edge
    counts = np.sum([critic_counts(settings, cube) for cube in range(share)], axis=0)
    critics = _extrapolated(lambda n: _critics_seconds(models, n, counts), _sizes(int(counts[0]), 1), 1, smallest)
    forwards = 0 if settings.reuse_generated else settings.critic_steps
    # A forward pass is a third of forward and backward; so is the critics' score of the generator's slices.
    return share * cube * (1 + forwards / 3) + critics * (settings.critic_steps + 1 / 3)


def short_trial(study: Study, group: Processes) -> Callable[[], float]:
    """Return a function that times a small part of a step.

    The function times the part again and again for half a second, and returns the mean seconds on this process.
    """
    models = _alone(with_settings(study, context=0), group)

    def part_seconds() -> float:
        return _generator_seconds(models, _LEAST_EDGE) + _critics_seconds(models, 1, np.ones(3))

    def mean_seconds() -> float:
        runs = [part_seconds()]  # allocates memory, so it counts only where it is the only one
        while sum(runs) < _PART_SECONDS:
            runs.append(part_seconds())
        return sum(runs[1:] or runs) / max(1, len(runs) - 1)

    return mean_seconds


def _sizes(largest: int, smallest: int) -> list[int]:
    """Return sizes from the smallest to the largest, each about twice the one before."""
    sizes = [largest]
    while sizes[0] > smallest:
        sizes.insert(0, max(smallest, -(-sizes[0] // 2)))
    return sizes


def _extrapolated(seconds_at: Callable[[int], float], sizes: list[int], power: int, smallest: bool) -> float:
    """Return the seconds at the last of `sizes`, from timings at smaller ones.

    With `smallest`, only the first size is timed. Else sizes are timed in turn, as long as a run is expected to take at
    most _PART_SECONDS and all runs so far have taken less than _PART_BUDGET_SECONDS.

    The time of a part is the sum of a constant, for its weights, and a term that grows as size ** power. Both are found
    from the two largest sizes timed. From one size alone, all time is taken to grow.
    """

    def fastest_at(size: int) -> tuple[int, float]:
        # The first run of a size allocates memory and compiles kernels; it counts only where it takes long anyway.
        first = seconds_at(size)
        more = 0 if first > _PART_SECONDS else 1 if first > _THRICE_SECONDS else 2
        runs = [seconds_at(size) for _ in range(more)]
        spent.extend([first, *runs])
        return size**power, min(runs, default=first)

    def expected_at(size: int) -> float:
        if len(timed) == 1:
            return timed[0][1] * size**power / timed[0][0]
        (small, seconds_small), (large, seconds_large) = timed[-2:]
        return seconds_large + max(0.0, seconds_large - seconds_small) / (large - small) * (size**power - large)

    spent: list[float] = []
    timed = [fastest_at(sizes[0])]
    for size in [] if smallest else sizes[1:]:
        expected = timed[0][1] if len(timed) == 1 else expected_at(size)
        if expected > _PART_SECONDS or sum(spent) >= _PART_BUDGET_SECONDS:
            break
        timed.append(fastest_at(size))
    return expected_at(sizes[-1])


def _alone(study: Study, group: Processes) -> Models:
    """Return throwaway networks of this process without the others."""
    return Models(with_settings(study, compile=False), Processes(0, 1, group.local_size, group.device))


def _share(study: Study, group: Processes) -> int:
    return len(group.share(study.training.cubes))


def _generator_seconds(models: Models, edge: int) -> float:
    """Return the seconds of forward and backward of one cube of edge³ low-res voxels."""
    channels = models.generator.conv_first.in_channels
    given = torch.rand(1, channels, edge, edge, edge, device=models.group.device)

    def part() -> None:
        models.generator_optimizer.zero_grad()
        models.generate(given).square().mean().backward()

    return seconds_of(part, models.group.device)


def _critics_seconds(models: Models, slices: int, counts: np.ndarray) -> float:
    """Return the seconds of a critic step on `slices` slices of each plane.

    The numbers of patches and of penalties relative to slices are as in `counts`.
    """
    edge, phases, device = models.study.training.slice_voxels, len(models.study.phases), models.group.device
    planes = models.critics.planes
    patches, penalties = (max(1, round(slices * count / counts[0])) for count in counts[1:])
    fake, real = ([torch.rand(n, phases, edge, edge, device=device) for _ in range(planes)] for n in (slices, patches))
    mix = [torch.rand(penalties, device=device) for _ in range(planes)]
    pair = torch.arange(penalties, device=device)
    pairs = [torch.stack([pair % patches, pair % slices])] * planes
    return seconds_of(lambda: models.update_critics(real, fake, mix, pairs), device)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Return the wall-clock seconds of an action, including kernels that it leaves in the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
