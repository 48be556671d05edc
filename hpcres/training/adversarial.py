"""Algorithm 1 of Dahari et al. 2022: a generator of volumes against a critic of slices.

Each step the critic learns to tell patches of the high-res images from slices of generated volumes (WGAN with
gradient penalty, Gulrajani 2017, eq. 3), then the generator learns to be taken for real, and to give back the
low-res cube it was given when the imaging operator looks at its output.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcres.checkpoint import Checkpoint, build_generator, load_checkpoint
from hpcres.errors import InputError
from hpcres.imaging import ImagingOperator, likeliest, one_hot
from hpcres.networks.resampling import center_crop
from hpcres.networks.superres import SuperResGenerator
from hpcres.study import Study
from hpcres.training.diagonals import diagonal_slices
from hpcres.training.distributed import Processes
from hpcres.training.losses import (
    Critics,
    as_labels,
    block_loss,
    face_shares,
    fraction_differences,
    interpolation_loss,
    lattice_loss,
    pattern_loss,
    pattern_shares,
    thin_shares,
    volume_slices,
    voxel_loss,
)
from hpcres.training.recalibration import match_fractions, recalibrate_batch_norm
from hpcres.training.samples import LowResCubes, RealSlices

_NEWEST = 0.1
"""Weight of the newest step in the running means of shares."""
_FIRST_PATTERN_SHARE, _LEAST_PATTERN_SHARE = 0.1, 0.01
"""Share of the weight of patterns after the warm-up, and its minimum, if training.pattern_tolerance is set."""
_PATTERNS_GROW, _PATTERNS_FALL = 1.03, 0.9
"""Factor of this share in a step if the mean voxel loss is at most the tolerance, and if it exceeds it."""
_NEWEST_VOXEL_LOSS = 0.2
"""Weight of the newest step in the running mean of the voxel loss. A smaller one reacts too late, a larger one to
noise."""
_CORRECTED_FRACTIONS = 800.0
"""training.fraction_weight where images are not typical and none is given."""
_CORRECTED_CUBES = 64
"""Fewest cubes that give the phases their fractions where images are not typical. In 32 cubes, half of the volume, the
share of a hidden phase in its group was 8 % off that in the whole."""
_OVERALL = 10.0
"""Weight of the visible fractions over all cubes beside those of single blocks."""
_MUST_FIT = {
    name: name.replace("_", " ") for name in ("scale", "width", "residual_blocks", "last_stage", "noise_sigma_voxels")
}
"""Of a generator's configuration, what must be the same to begin from its weights."""


def average_decay(ema: float, growth: float, step: int) -> float:
    """What the averaged generator keeps of itself at `step`, from 0.

    Until `ema` is reached a step's weight in the average grows as its number to the power of `growth` (Karras 2024).
    A shorter average has teeth of single voxels, which come and go with the game; a longer one still holds the first
    weights.
    """
    return min(ema, (1 + step) / (2 + growth + step))


@dataclass(frozen=True)
class Outcome:
    """One step of this process's share: Wasserstein distance, gradient penalty, generator loss and voxel loss in
    `losses`, and what the generator made of its cubes, of which `labels`, or probabilities, were known."""

    losses: Tensor
    finite: bool
    probabilities: Tensor
    labels: Tensor


class Models:
    """Generator, its average, critics and their optimizers, on one process of a group."""

    def __init__(self, study: Study, group: Processes) -> None:
        assert study.training.precision != "auto", "autotune chooses one"
        self.study, self.group = study, group
        settings = study.training
        torch.manual_seed(study.seed % 2**63)  # the same first weights in every process
        self.generator = _untrained(study)
        with torch.no_grad():
            self.generator.conv_first.weight[:, len(study.low_res.groups) :] *= settings.noise_gain
        self.critics = Critics(study).to(group.device)
        group.synchronise_batch_norm(self.generator)
        self.generator.to(group.device)
        if settings.compile:
            _compile(self.generator, group.device)
        weights = list(self.generator.parameters())
        self.average = [w.detach().clone() for w in weights] if settings.ema else None
        self.running_means: dict[str, Tensor] = {}
        """Running means of the shares of patterns, and of thin features, in generated slices."""
        self.pattern_share = _FIRST_PATTERN_SHARE if settings.pattern_tolerance else 1.0
        """Share of the weights of patterns and thin features in the last step."""
        self.mean_voxel_loss: float | None = None
        """Running mean of the batch's voxel loss after the warm-up."""
        self.init_from: dict[str, Any] | None = None
        """Checkpoint.init_from of what is saved."""
        self.operator = ImagingOperator.of(study).to(group.device)
        self._compared = study.low_res.two_sided if study.low_res.one_sided else None
        self._generator = group.parallel(self.generator)
        self._critics = group.parallel(self.critics)
        self.generator_optimizer, self.critic_optimizer = (
            torch.optim.Adam(module.parameters(), lr=settings.learning_rate, betas=settings.adam_betas)
            for module in (self.generator, self.critics)
        )

    def step(self, step: int, cubes: range, low_res: LowResCubes, real: RealSlices, rate: float) -> Outcome:
        """All critic steps and the generator step; every random draw depends on the seed, `step` and the cube."""
        settings = self.study.training
        for optimizer in (self.generator_optimizer, self.critic_optimizer):
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
        labels, given = low_res.draw(step, cubes, self.group.device, 0, settings.masked_fraction)
        probabilities = self.generate(given) if settings.reuse_generated else None
        for critic_step in range(settings.critic_steps):
            if probabilities is not None:
                seen = probabilities.detach()
            else:
                with torch.no_grad():
                    kind = 1 + critic_step
                    other = low_res.draw(step, cubes, self.group.device, kind, settings.masked_fraction)[1]
                    seen = self.generate(other, learn=False)
            draw = real.draw(step, critic_step, cubes)
            fake = self.slices(seen, draw.chosen)
            wasserstein, penalty = self.update_critics(draw.real, fake, draw.mix, draw.pairs, draw.shares)
        if probabilities is None:
            probabilities = self.generate(given)
        warm_up_steps = settings.warm_up_steps if self.init_from is None else 0
        if step == warm_up_steps:
            # The critics' slope is far steeper than the warm-up's. Divided by the size of that one, Adam's first steps
            # could be 1 / √(1 − β₂) times the rate, and some runs never come back from where these lead.
            self.generator_optimizer.state.clear()
        self.generator_optimizer.zero_grad()
        known = one_hot(labels, low_res.channels)
        voxel = voxel_loss(self.operator, probabilities, known, self._compared)
        if step < warm_up_steps:
            loss = interpolation_loss(self.operator, probabilities, known)
        else:
            slices = self.slices(probabilities, real.choose(step, cubes))
            with self._autocast():
                loss = -self.critics.score(slices)
            # At a high rate the generator of a step has more small features than its average, which is what will
            # paint; as the rate falls they become one, and then it should have the patterns of the images.
            # Share and threshold depend on the loss of the whole batch, or processes would minimise different losses.
            of_batch = self.group.mean(voxel)
            self._adapt_pattern_share(float(of_batch))
            weight = self.pattern_share * settings.learning_rate / rate
            loss = loss + weight * self._off_images(slices[:3], real)
            if of_batch > settings.voxel_threshold:
                loss = loss + settings.voxel_weight * voxel
        if weight := self._fraction_weight(real):
            loss = loss + weight * self._off_labels(probabilities, known, low_res.around(step, cubes, known.device))
        if settings.lattice_weight:
            loss = loss + settings.lattice_weight * self._lattice(probabilities)
        # Only the gradient at the generator's output is wanted of the critic, not that of its weights.
        (slope,) = torch.autograd.grad(loss, probabilities)
        probabilities.backward(slope)
        self.generator_optimizer.step()
        if self.average is not None:
            decay = average_decay(settings.ema, settings.ema_growth, step)
            with torch.no_grad():
                torch._foreach_lerp_(self.average, list(self.generator.parameters()), 1 - decay)
        losses = torch.stack([wasserstein, penalty, loss, voxel]).detach()
        return Outcome(losses, bool(losses.isfinite().all()), probabilities.detach(), labels)

    def update_critics(
        self,
        real: Sequence[Tensor],
        fake: Sequence[Tensor],
        mix: Sequence[Tensor],
        pairs: Sequence[Tensor] | None = None,
        shares: Sequence[float] = (1.0, 1.0),
    ) -> tuple[Tensor, Tensor]:
        """One step of the critics' optimizer. Arguments and returned values, which are those before the step, are those
        of Critics.forward."""
        self.critic_optimizer.zero_grad()
        with self._autocast():
            wasserstein, penalty = self._critics(real, fake, mix, pairs, shares)
        # Each critic has its own loss; their sum, since Adam's ε sees the size of a gradient.
        weight = self.study.training.gradient_penalty
        (len(self.critics.critics) * (weight * penalty - wasserstein)).backward()
        self.critic_optimizer.step()
        return wasserstein, penalty

    def generate(self, given: Tensor, learn: bool = True) -> Tensor:
        """Phase probabilities, float32 (cubes, phases, z, y, x), of cubes `given` with their context, by batch
        norm over the batch."""
        if self.study.training.precision == "bf16":
            # Faster so; in fp32 the CPU's batch norm would lose digits in this layout (1e-3 of a gradient).
            given = given.contiguous(memory_format=torch.channels_last_3d)
        with self._autocast():
            logits = (self._generator if learn else self.generator)(given, self.study.training.context)
        return functional.softmax(logits.float(), dim=1)

    def _lattice(self, probabilities: Tensor) -> Tensor:
        shares = face_shares(self._inner(probabilities), self.study.scale_factor.numerator)
        return _loss_at(self.group.mean(shares), lattice_loss, shares)

    def _fraction_weight(self, real: RealSlices) -> float:
        weight = self.study.training.fraction_weight
        return (_CORRECTED_FRACTIONS if real.correction else 0.0) if weight is None else weight

    def _off_labels(self, probabilities: Tensor, known: Tensor, around: Tensor) -> Tensor:
        """How far block fractions are off the low-res labels `known`, one by one and in the mean over all cubes."""
        around[:, :, 1:-1, 1:-1, 1:-1] = known  # without what masked_fraction hides
        blocks = self.operator.block_fractions(probabilities)
        off = fraction_differences(blocks, known)
        overall = _loss_at(self.group.mean(off), lambda means: means.square().sum(), off)
        return block_loss(blocks, around, not self.study.low_res.channels) + _OVERALL * overall

    def _adapt_pattern_share(self, voxel_loss: float) -> None:
        """Raise `pattern_share` if the mean voxel loss is at most training.pattern_tolerance, else lower it.

        With a large weight of patterns from the start, some generators do not come to agree with the low-res volume
        (docs/recipes.md, The weight of patterns follows the voxel loss).
        """
        if tolerance := self.study.training.pattern_tolerance:
            before = voxel_loss if self.mean_voxel_loss is None else self.mean_voxel_loss
            self.mean_voxel_loss = before + _NEWEST_VOXEL_LOSS * (voxel_loss - before)
            factor = _PATTERNS_GROW if self.mean_voxel_loss <= tolerance else _PATTERNS_FALL
            self.pattern_share = min(1.0, max(_LEAST_PATTERN_SHARE, self.pattern_share * factor))

    def _off_images(self, slices: Sequence[Tensor], real: RealSlices) -> Tensor | float:
        """How far what these slices show as labels is off the images, by the weights of the study."""
        settings = self.study.training
        off: Tensor | float = 0.0
        if settings.pattern_weight or settings.thin_weight:
            slices = [as_labels(some) for some in slices]
        if settings.pattern_weight:
            shares = pattern_shares(slices, real.pattern_spacings, real.pattern_pixels)
            off = off + settings.pattern_weight * self._off_running_mean("patterns", shares, real.wanted_patterns)
        if settings.thin_weight:
            off = off + settings.thin_weight * self._off_running_mean("thin", thin_shares(slices), lambda _: real.thin)
        return off

    def _off_running_mean(self, kind: str, shares: Tensor, images: Callable[[Tensor], Tensor]) -> Tensor:
        """pattern_loss of the `shares` of this `kind` in the slices of late; `images` gives what these should be.

        Of late, since a few cubes are not typical: made to look so step by step, they would be more alike than the
        parts of the volume are.
        """
        now = self.group.mean(shares)
        self.running_means[kind] = self.running_means[kind].lerp(now, _NEWEST) if kind in self.running_means else now
        wanted = images(self.running_means[kind])
        return _loss_at(self.running_means[kind], lambda means: pattern_loss(means, wanted), shares)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.study.training.precision == "bf16")

    def slices(self, probabilities: Tensor, chosen: Sequence[Tensor | None]) -> list[Tensor]:
        """What the critics see of cubes, by normal axis: the cropped cubes' slices, all or the chosen ones; then, with
        diagonal_slices, by the axis that they contain, those at 45°."""
        inner = self._inner(probabilities)
        seen = [volume_slices(inner, axis, chosen[axis]) for axis in range(3)]
        return seen + [diagonal_slices(inner, axis, one) for axis, one in enumerate(chosen[3:]) if one is not None]

    def _inner(self, cubes: Tensor) -> Tensor:
        """(…, z, y, x) without the outermost voxels, which no critic sees."""
        return center_crop(cubes, self.study.training.crop_voxels)

    @torch.no_grad()
    def report(self, outcome: Outcome, low_res_channels: int) -> dict[str, float]:
        """Means over all processes of the losses, phase fractions (of what the critics see) and agreement with the
        low-res cubes."""
        settings = self.study.training
        phases = len(self.study.phases)
        painted = outcome.probabilities.argmax(1)
        seen = self.operator(one_hot(painted, phases)).argmax(1)
        labels = likeliest(outcome.labels)
        known = (labels < low_res_channels).float().mean().clamp(min=1e-9)
        values = self.group.mean(
            torch.stack(
                [
                    *outcome.losses,
                    (seen == labels).float().mean() / known,
                    *((self._inner(painted) == phase).float().mean() for phase in range(phases)),
                ]
            )
        ).tolist()
        wasserstein, penalty, generator_loss, voxel, agreement, *fractions = values
        return {
            "critic_loss": settings.gradient_penalty * penalty - wasserstein,
            "wasserstein": wasserstein,
            "gradient_penalty": penalty,
            "generator_loss": generator_loss,
            "voxel_loss": voxel,
            "low_res_agreement": agreement,
            **{f"fraction_{name}": share for name, share in zip(self.study.phases, fractions, strict=True)},
        }

    @torch.no_grad()
    def recalibrated(self, low_res: LowResCubes, real: RealSlices) -> SuperResGenerator:
        """The generator to save: averaged weights, the batch-norm statistics that these have all over the volume, and,
        where the study asks for it or images are not typical, last biases that give these cubes the fractions that are
        wanted."""
        generator = _untrained(self.study).to(self.group.device)
        generator.load_state_dict(self.generator.state_dict())
        for ours, theirs in zip(generator.parameters(), self.average or generator.parameters(), strict=True):
            ours.copy_(theirs)
        settings = self.study.training
        recalibrate_batch_norm(generator, low_res, settings.recalibration_cubes, settings.cubes)
        if real.correction is not None:
            # Cubes as they are inside the painted volume: padding at a cube's faces moves fractions by points.
            cubes = max(settings.recalibration_cubes, _CORRECTED_CUBES)
            match_fractions(generator, low_res, cubes, 0, real.fractions(), low_res.whole_context)
        elif settings.match_fractions:
            match_fractions(generator, low_res, settings.recalibration_cubes, settings.padded_voxels, real.fractions())
        return generator

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "generator": self.generator.state_dict(),
            "critics": self.critics.state_dict(),
            "average": self.average,
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "running_means": self.running_means,
            "pattern_share": self.pattern_share,
            "mean_voxel_loss": self.mean_voxel_loss,
        }

    def begin_from(self, path: str) -> None:
        """Take over the weights of another training; layers of another number of phases stay as they are, new.

        InputError where the networks differ in more than that. The critics are taken where their file has them (a
        best.pt has none) and all but their first layer fits; the average begins with the generator.
        """
        if not os.path.isfile(path):
            raise InputError(f"training.init_from: {path}: no such file; give the checkpoint.pt of another training")
        other = load_checkpoint(path)
        theirs, mine = other.generator.config, self.generator.config
        if unlike := [key for key in _MUST_FIT if theirs[key] != mine[key]]:
            differences = " and ".join(f"{_MUST_FIT[key]} {theirs[key]}, not {mine[key]}" for key in unlike)
            raise InputError(
                f"training.init_from: {path}: its generator has {differences} as this study, so its weights do not "
                "fit; give the study the same, or begin from another checkpoint"
            )
        anew = []
        misfits = _take_over(self.generator, other.generator.state_dict())
        for layer, name in (("conv_first.weight", "first"), ("conv_end.weight", "last")):
            if layer in misfits:
                anew.append(f"the generator's {name} layer")
        ours, critics = self.critics.state_dict(), (other.training_state or {}).get("critics", {})
        fits = critics.keys() == ours.keys() and all(
            critics[name].shape == ours[name].shape for name in ours if not name.endswith("layers.0.weight")
        )
        if not fits:
            anew.append("the critics")
        elif _take_over(self.critics, critics):
            anew.append("the critics' first layer")
        if self.average is not None:
            self.average = [w.detach().clone() for w in self.generator.parameters()]
        self.init_from = {
            "path": os.path.abspath(path),
            "sha256": other.sha256,
            "step": other.step,
            "phases": list(other.phases),
            "made_anew": anew,
        }

    def restore(self, before: Checkpoint) -> None:
        state = before.training_state
        assert state is not None
        self.init_from = before.init_from
        self.generator.load_state_dict(state["generator"])
        self.critics.load_state_dict(state["critics"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        # A run of an earlier version has none, and begins them anew.
        means = state.get("running_means", state.get("of_late", {}))  # the latter was its name until 2026-11
        self.running_means = {kind: shares.to(self.group.device) for kind, shares in means.items()}
        self.pattern_share = state.get("pattern_share", self.pattern_share)
        self.mean_voxel_loss = state.get("mean_voxel_loss", state.get("voxel_loss_of_late"))  # its name until 8d388d7
        if self.average is not None:
            for ours, theirs in zip(self.average, state["average"], strict=True):
                ours.copy_(theirs)


def _untrained(study: Study) -> SuperResGenerator:
    generator = build_generator(study)
    assert isinstance(generator, SuperResGenerator), generator
    return generator


def _loss_at(means: Tensor, loss_of: Callable[[Tensor], Tensor], shares: Tensor) -> Tensor:
    """`loss_of(means)`, with the gradient of this process's `shares`, of which `means` are over all processes.

    A loss that is no mean over cubes has its slope taken at what all processes have, so that together they follow the
    gradient that one would.
    """
    at = means.clone().requires_grad_()
    loss = loss_of(at)
    (slope,) = torch.autograd.grad(loss, at)
    return loss.detach() + (slope * (shares - shares.detach())).sum()


def _compile(generator: SuperResGenerator, device: torch.device) -> None:
    """Have its forward compiled when it first runs; weights and their names stay as they are.

    Only the generator's: torch.compile refuses a double backward (2.13: "does not currently support double backward"),
    which a critic's gradient penalty is. InputError where nothing can be compiled, found out by a trial.
    """
    _add_cpu_to_cache_key()
    try:
        torch.compile(lambda x: x * x + 1)(torch.ones(8, device=device))
    except Exception as error:  # the tool chain's own, of many kinds
        reason = str(error).strip().splitlines()
        raise InputError(
            f"training.compile: torch.compile does not work on this machine "
            f"({reason[0] if reason else type(error).__name__}); install a C++ compiler (g++, or name one in CXX), or "
            "set training.compile=false"
        ) from None
    generator.compile(dynamic=False)


def _add_cpu_to_cache_key() -> None:
    """Make torch's cache of compiled code depend on the CPU's vector registers (from torch 2.7 on).

    Its key holds the GPU but not the CPU. A CPU without AVX-512 that shares the cache folder with one that has it would
    run code made for registers of 16 floats: torch 2.13 then returns wrong values or crashes. A tag that the user has
    set in TORCH_COMPILE_CACHE_KEY_TAG stays.
    """
    config = getattr(torch.compiler, "config", None)
    if config is not None and not config.cache_key_tag:
        config.cache_key_tag = torch.backends.cpu.get_cpu_capability()


def _take_over(module: nn.Module, state: dict[str, Tensor]) -> set[str]:
    """Load every tensor of `state` that has the shape of the module's own; the names of the others."""
    misfits = {name for name, own in module.state_dict().items() if state[name].shape != own.shape}
    module.load_state_dict({name: state[name] for name in state if name not in misfits}, strict=False)
    return misfits
