"""How long a step of a training takes on this machine, in which precision and with how many threads, before it begins.

Everything here computes on throwaway networks, one process by itself, and leaves no trace in the run: every draw of a
step is a function of (seed, step, cube). Processes measure at the same time, and the slowest one counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hpcres.study import PATCH_VOXELS, Study
from hpcres.training.adversarial import Models
from hpcres.training.distributed import Processes
from hpcres.training.samples import LowResCubes, RealSlices

_PART_SECONDS = 0.5
"""A part of a step is not measured at a size at which it would take longer, but extrapolated from a smaller one."""
_STEP_SECONDS, _LONG_STEP_SECONDS = 2.0, 6.0
"""Three whole steps are measured where one takes less than the first, one where it takes less than the second."""
_LEAST_EDGE = 2
"""Low-res voxels along the smallest cube of which batch norm can take statistics."""
_SMALL_WIDTHS = {"width": 5, "critic_width": 7}
"""The widest networks of the first comparison of precisions: without hardware for bf16 a small part of a step of these
takes a tenth of a second or two, of the paper's minutes."""
_CLEARLY = 3.0
"""A precision so many times faster in the first comparison is chosen without another."""
_WORTH = 1.05
"""bf16 rounds more, so it must be so many times faster than fp32."""


def with_settings(study: Study, network: dict[str, Any] | None = None, **training: Any) -> Study:
    """The study with other settings of its network and its training."""
    return study.model_copy(
        update={
            "network": study.network.model_copy(update=network or {}),
            "training": study.training.model_copy(update=training),
        }
    )


@dataclass(frozen=True)
class Precision:
    """The faster one, how many times faster bf16 is than fp32, and, where it was estimated, a step's seconds."""

    name: str
    ratio: float
    seconds: float | None


def choose_precision(study: Study, group: Processes) -> Precision:
    """fp32 or bf16, whichever makes a step of `study` faster here. The same on every process.

    Parts of a step are measured in both, first of a small network on little data, which shows whether there is hardware
    for bf16, then of the study's own.
    """
    widths = {key: min(most, getattr(study.network, key)) for key, most in _SMALL_WIDTHS.items()}
    fp32, bf16 = _in_both(with_settings(study, widths), group, smallest=True)
    clear = not 1 / _CLEARLY < fp32 / bf16 < _CLEARLY
    if not clear:
        fp32, bf16 = _in_both(study, group, smallest=False)
    name, seconds = ("bf16", bf16) if fp32 > _WORTH * bf16 else ("fp32", fp32)
    return Precision(name, fp32 / bf16, None if clear else seconds)


def _in_both(study: Study, group: Processes, smallest: bool) -> list[float]:
    return group.largest(
        *(estimated_seconds(with_settings(study, precision=name), group, smallest) for name in ("fp32", "bf16"))
    )


def step_seconds(
    study: Study, group: Processes, low_res: LowResCubes, real: RealSlices, estimate: float | None = None
) -> float:
    """Seconds of a generator step with all its critic steps: measured, or the estimate where a step takes seconds.

    The same on every process. Reports, judgements and checkpoints are not in it.
    """
    if estimate is None:
        (estimate,) = group.largest(estimated_seconds(study, group))
    if estimate > _LONG_STEP_SECONDS:
        return estimate
    models, cubes = _alone(study, group), range(_share(study, group))
    step = study.training.warm_up_steps  # of the steps after the warm-up, which cost more
    rate = study.training.learning_rate
    whole = [
        seconds_of(lambda: models.step(step, cubes, low_res, real, rate), group.device)
        for _ in range(3 if estimate < _STEP_SECONDS else 1)
    ]
    return group.largest(min(whole[-2:]))[0]


def estimated_seconds(study: Study, group: Processes, smallest: bool = False) -> float:
    """Of a step on this process alone, from its parts on cubes and slices as large as take little."""
    settings, share = study.training, _share(study, group)
    edge, slices = int(PATCH_VOXELS / study.scale_factor), settings.slices_per_axis or _slice_edge(study)
    models = _alone(with_settings(study, surroundings=0), group)
    cube = _extrapolated(lambda n: _generator_seconds(models, n), _sizes(edge, _LEAST_EDGE), 3, smallest)
    # Low-res maps are larger by the surroundings, high-res ones are not: as docs/recipes.md measured it.
    cube *= 1 + settings.surroundings / edge
    critics = _extrapolated(lambda n: _critics_seconds(models, n), _sizes(slices * share, 1), 1, smallest)
    forwards = 0 if settings.reuse_generated else settings.critic_steps
    # A forward is a third of forward and backward; the critics' values of the generator's slices likewise.
    return share * cube * (1 + forwards / 3) + critics * (settings.critic_steps + 1 / 3)


def short_trial(study: Study, group: Processes) -> Callable[[], float]:
    """What measures, in half a second, the mean seconds of a small part of a step on this process."""
    models = _alone(with_settings(study, surroundings=0), group)

    def mean_seconds() -> float:
        runs = [_generator_seconds(models, _LEAST_EDGE) + _critics_seconds(models, 1)]  # fetches memory
        while sum(runs) < _PART_SECONDS:
            runs.append(_generator_seconds(models, _LEAST_EDGE) + _critics_seconds(models, 1))
        return sum(runs[1:] or runs) / max(1, len(runs) - 1)

    return mean_seconds


def _sizes(most: int, least: int) -> list[int]:
    """Growing sizes up to `most`, each about twice the one before."""
    sizes = [most]
    while sizes[0] > least:
        sizes.insert(0, max(least, -(-sizes[0] // 2)))
    return sizes


def _extrapolated(seconds_at: Callable[[int], float], sizes: list[int], power: int, smallest: bool) -> float:
    """Seconds at the last of `sizes`, from sizes at which a part takes little.

    A part takes a constant time, for its weights, and one that grows as the size to the `power`, both found from the
    two largest sizes measured.
    """

    def least_at(size: int) -> tuple[int, float]:
        # The first run of a size fetches memory and compiles kernels; it counts only where it takes long anyway.
        first = seconds_at(size)
        return size**power, first if first > _PART_SECONDS else min(seconds_at(size), seconds_at(size))

    def expected_at(size: int) -> float:
        if len(found) == 1:
            return found[0][1] * size**power / found[0][0]
        (small, before), (large, after) = found[-2:]
        return after + max(0.0, after - before) / (large - small) * (size**power - large)

    found = [least_at(sizes[0])]
    for size in [] if smallest else sizes[1:]:
        if (found[0][1] if len(found) == 1 else expected_at(size)) > _PART_SECONDS:
            break
        found.append(least_at(size))
    return expected_at(sizes[-1])


def _alone(study: Study, group: Processes) -> Models:
    """Throwaway networks of one process by itself."""
    return Models(with_settings(study, compile=False), Processes(0, 1, group.local_size, group.device))


def _share(study: Study, group: Processes) -> int:
    return len(group.share(study.training.cubes))


def _slice_edge(study: Study) -> int:
    return PATCH_VOXELS - 2 * study.training.crop_voxels


def _generator_seconds(models: Models, edge: int) -> float:
    """Forward and backward of one cube of edge³ low-res voxels."""
    channels = models.generator.conv_first.in_channels
    given = torch.rand(1, channels, edge, edge, edge, device=models.group.device)

    def part() -> None:
        models.generator_optimizer.zero_grad()
        models.generate(given).square().mean().backward()

    return seconds_of(part, models.group.device)


def _critics_seconds(models: Models, slices: int) -> float:
    """A critic step on so many slices normal to each axis."""
    edge, phases, device = _slice_edge(models.study), len(models.study.phases), models.group.device
    real = [torch.rand(slices, phases, edge, edge, device=device) for _ in range(3)]
    mix = [torch.rand(slices, device=device) for _ in range(3)]
    return seconds_of(lambda: models.criticise(real, real, mix), device)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """How long an action takes, with what it leaves in the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
