"""Algorithm 1 of Dahari et al. 2022: training of a generator of volumes against a critic of slices.

In each step, the critic first learns to tell patches of the high-res images from slices of generated volumes (WGAN with
gradient penalty, Gulrajani 2017, eq. 3). The generator then learns to make slices that the critic takes for real. It
also learns to give back the low-res cube that is its input: the imaging operator, applied to its output, should return
this cube.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpcres.checkpoint import Checkpoint, build_generator
from hpcres.imaging import ImagingOperator, likeliest, one_hot
from hpcres.networks.resampling import center_crop
from hpcres.networks.superres import SuperResGenerator
from hpcres.study import Study
from hpcres.training.averaging import average_decay
from hpcres.training.compilation import compile_generator
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.diagonals import diagonal_slices
from hpcres.training.distributed import Processes
from hpcres.training.init_from import take_over_weights
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

_NEWEST = 0.1
"""Weight of the newest step in the running means of shares."""
_FIRST_PATTERN_SHARE, _LEAST_PATTERN_SHARE = 0.1, 0.01
"""Share of the weight of patterns after the warm-up, and the minimum of this share, if training.pattern_tolerance is
set."""
_PATTERNS_GROW, _PATTERNS_FALL = 1.03, 0.9
"""Factors by which this share changes in a step: if the mean voxel loss is at most the tolerance, and if it exceeds
it."""
_NEWEST_VOXEL_LOSS = 0.2
"""Weight of the newest step in the running mean of the voxel loss. A smaller weight makes the mean react too late. A
larger weight makes it react to noise."""
_CORRECTED_FRACTIONS = 800.0
"""Value of training.fraction_weight if the study gives none and images that are not typical are corrected."""
_CORRECTED_CUBES = 64
"""Least number of cubes on which phase fractions are matched if the images are not typical. In 32 cubes, half of the
volume, the share of a hidden phase in its group was 8 % off its share in the whole volume."""
_OVERALL = 10.0
"""Weight of the visible fractions over all cubes, relative to the loss of single blocks."""


@dataclass(frozen=True)
class Outcome:
    """Results of one step on this process's share of the cubes.

    Attributes
    ----------
    losses : Tensor
        (4,): Wasserstein distance, gradient penalty, generator loss and voxel loss.
    finite : bool
        Whether all losses are finite.
    probabilities : Tensor
        Phase probabilities that the generator made of its cubes, float32 (cubes, phases, z, y, x).
    labels : Tensor
        What was known of the low-res cubes: labels or probabilities, as LowResCubes.draw returns them.
    """

    losses: Tensor
    finite: bool
    probabilities: Tensor
    labels: Tensor


class Models:
    """The generator, its averaged weights, the critics and their optimizers, on one process of a group."""

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
            compile_generator(self.generator, group.device)
        weights = list(self.generator.parameters())
        self.average = [w.detach().clone() for w in weights] if settings.ema else None
        self.running_means: dict[str, Tensor] = {}
        """Running means, by kind, of the shares of patterns and of thin features in generated slices."""
        self.pattern_share = _FIRST_PATTERN_SHARE if settings.pattern_tolerance else 1.0
        """Share of the weights of patterns and thin features that was applied in the last step."""
        self.mean_voxel_loss: float | None = None
        """Running mean of the batch's voxel loss after the warm-up."""
        self.init_from: dict[str, Any] | None = None
        """Value of Checkpoint.init_from in what is saved."""
        self.operator = ImagingOperator.of(study).to(group.device)
        self._compared = study.low_res.two_sided if study.low_res.one_sided else None
        self._generator = group.parallel(self.generator)
        self._critics = group.parallel(self.critics)
        self.generator_optimizer, self.critic_optimizer = (
            torch.optim.Adam(module.parameters(), lr=settings.learning_rate, betas=settings.adam_betas)
            for module in (self.generator, self.critics)
        )

    def step(self, step: int, cubes: range, low_res: LowResCubes, real: RealSlices, rate: float) -> Outcome:
        """Run all critic steps and the generator step.

        Every random draw depends on the seed, `step` and the cube.

        Parameters
        ----------
        step : int
            Number of the step, from 0.
        cubes : range
            Numbers of this process's cubes.
        low_res : LowResCubes
            The low-res cubes.
        real : RealSlices
            Patches of the high-res images.
        rate : float
            Learning rate of the generator and of the critics.

        Returns
        -------
        Outcome
            Losses of the step, and what the generator made of its cubes.
        """
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
        """Make one step of the critics' optimizer.

        Parameters
        ----------
        real, fake, mix, pairs, shares
            Arguments of `Critics.forward`.

        Returns
        -------
        wasserstein, penalty : Tensor
            What `Critics.forward` returns before the step.
        """
        self.critic_optimizer.zero_grad()
        with self._autocast():
            wasserstein, penalty = self._critics(real, fake, mix, pairs, shares)
        # Each critic has its own loss; their sum, since Adam's ε sees the size of a gradient.
        weight = self.study.training.gradient_penalty
        (len(self.critics.critics) * (weight * penalty - wasserstein)).backward()
        self.critic_optimizer.step()
        return wasserstein, penalty

    def generate(self, given: Tensor, learn: bool = True) -> Tensor:
        """Generate phase probabilities of cubes, with batch norm over the batch.

        Parameters
        ----------
        given : Tensor
            The generator's input: cubes with their context, as LowResCubes.draw returns it.
        learn : bool
            Whether to use the generator whose gradients are averaged over all processes.

        Returns
        -------
        Tensor
            float32 (cubes, phases, z, y, x).
        """
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
        """Return a loss for block fractions that differ from the low-res labels `known`.

        It has a term for single blocks and a term for the mean over all cubes.
        """
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
        """Return how far the labels that these slices show are off the images, weighted by the study's settings."""
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
        """Return the pattern_loss of the recent mean of `shares` of this `kind` in generated slices.

        `images` gives the wanted shares. The mean over recent steps is compared, because a few cubes are not typical of
        the volume. If the cubes of each step had to have the wanted shares, they would be more alike than the parts of
        the volume are.
        """
        now = self.group.mean(shares)
        self.running_means[kind] = self.running_means[kind].lerp(now, _NEWEST) if kind in self.running_means else now
        wanted = images(self.running_means[kind])
        return _loss_at(self.running_means[kind], lambda means: pattern_loss(means, wanted), shares)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.group.device.type, torch.bfloat16, enabled=self.study.training.precision == "bf16")

    def slices(self, probabilities: Tensor, chosen: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the slices of cubes that the critics see.

        Parameters
        ----------
        probabilities : Tensor
            (cubes, phases, z, y, x); the outermost training.crop_voxels are left out.
        chosen : sequence of Tensor or None
            Which slices of each cube, as CriticDraw.chosen; None for all.

        Returns
        -------
        list of Tensor
            (slices, phases, rows, columns) for each plane: slices normal to z, y and x; with training.diagonal_slices
            also slices at 45° that contain z, y and x.
        """
        inner = self._inner(probabilities)
        seen = [volume_slices(inner, axis, chosen[axis]) for axis in range(3)]
        return seen + [diagonal_slices(inner, axis, one) for axis, one in enumerate(chosen[3:]) if one is not None]

    def _inner(self, cubes: Tensor) -> Tensor:
        """Return cubes (…, z, y, x) without the outermost voxels, which no critic sees."""
        return center_crop(cubes, self.study.training.crop_voxels)

    @torch.no_grad()
    def report(self, outcome: Outcome, low_res_channels: int) -> dict[str, float]:
        """Return losses, phase fractions and agreement with the low-res cubes, as means over all processes.

        Parameters
        ----------
        outcome : Outcome
            Results of the last step.
        low_res_channels : int
            Number of groups of phases in the low-res volume.

        Returns
        -------
        dict of str to float
            critic_loss, wasserstein, gradient_penalty, generator_loss and voxel_loss; low_res_agreement, the share of
            known low-res voxels whose label the imaging operator gives back; and, for each phase, its fraction in what
            the critics see.
        """
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
        """Return the generator to save.

        It has the averaged weights, and the batch-norm statistics that these weights have all over the volume. If the
        study asks for it (training.match_fractions), or if the images are not typical and are corrected, the biases of
        the last layer are shifted so that cubes of the volume have the wanted phase fractions.

        Parameters
        ----------
        low_res : LowResCubes
            Cubes on which statistics and biases are found.
        real : RealSlices
            Patches of the images, and the wanted phase fractions.

        Returns
        -------
        SuperResGenerator
            A new generator. Its weights are those of `generator` if there is no average.
        """
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
        """Return all that `restore` needs."""
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
        """Take over the weights of another training, and note them in `init_from` (see `take_over_weights`).

        The averaged weights begin with those of the generator.
        """
        self.init_from = take_over_weights(path, self.generator, self.critics)
        if self.average is not None:
            self.average = [w.detach().clone() for w in self.generator.parameters()]

    def restore(self, before: Checkpoint) -> None:
        """Restore the state of the run that the checkpoint `before` holds."""
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
    """Return `loss_of(means)` with its gradient with respect to this process's `shares`.

    `means` are over all processes. A loss that is no mean over cubes needs its slope at the values of all processes.
    The processes together then follow the gradient that a single process would follow.
    """
    at = means.clone().requires_grad_()
    loss = loss_of(at)
    (slope,) = torch.autograd.grad(loss, at)
    return loss.detach() + (slope * (shares - shares.detach())).sum()
