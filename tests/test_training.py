"""Training against closed forms and a reference of Algorithm 1 in a few lines."""

from copy import deepcopy
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from small_training import ALONE, anisotropic, blobs, counted_patterns, counted_thin, one_image, study_of
from torch import nn
from torch.nn import functional

from hpcres.checkpoint import load_checkpoint
from hpcres.errors import InputError
from hpcres.geometry import Box
from hpcres.imaging import ImagingOperator, one_hot
from hpcres.inference.job import open_job
from hpcres.inference.ranks import Ranks
from hpcres.inference.run import infer
from hpcres.study import Imaging, LowRes, Training
from hpcres.training.averaging import average_decay
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.diagonals import as_unsharp, diagonal_slices, pick_diagonals
from hpcres.training.distributed import Processes
from hpcres.training.loop import learning_rate, train
from hpcres.training.losses import (
    Critics,
    face_shares,
    gradient_penalty,
    lattice_loss,
    pattern_loss,
    pattern_shares,
    thin_shares,
    volume_slices,
    voxel_loss,
)
from hpcres.training.wgan import Models
from hpcres.volumes.stores import LabelStore


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, for the same sums everywhere."""
    torch.set_num_threads(1)


# ---- the losses ----


def test_gradient_penalty_of_critics_with_known_slope():
    real, fake, mix = torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4), torch.rand(5)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(32, 1))
    weight = linear[1].weight
    penalty = gradient_penalty(linear, real, fake, mix)
    assert penalty.item() == pytest.approx((weight.norm().item() - 1) ** 2, rel=1e-5)
    penalty.backward()
    expected = 2 * (weight.norm() - 1) * weight / weight.norm()
    assert torch.allclose(weight.grad, expected, atol=1e-6)

    class HalfSquare(nn.Module):
        def forward(self, x):
            return 0.5 * x.square().sum(dim=(1, 2, 3))

    between = mix.view(-1, 1, 1, 1) * real + (1 - mix.view(-1, 1, 1, 1)) * fake
    slopes = between.flatten(1).norm(dim=1)
    assert torch.allclose(gradient_penalty(HalfSquare(), real, fake, mix), ((slopes - 1) ** 2).mean())


def test_voxel_loss_is_the_mean_square_over_voxels_and_channels():
    labels = torch.zeros(1, 8, 8, 8, dtype=torch.long)
    operator = ImagingOperator(Fraction(4), [[0], [1]], Imaging(operator="under-sampled"))
    wanted = one_hot(labels[:, ::4, ::4, ::4], 2)
    assert voxel_loss(operator, one_hot(labels, 2), wanted) == 0
    labels[0, 4, 0, 0] = 1  # one of 8 low-res voxels wrong: both its channels are off by one
    assert voxel_loss(operator, one_hot(labels, 2), wanted).item() == pytest.approx(2 / 16)
    assert voxel_loss(operator, torch.full((1, 2, 8, 8, 8), 0.5), wanted).item() == pytest.approx(1 / 4)


@pytest.mark.parametrize(("one_sided", "kept"), [(["a"], [1, 2]), (["a", "c"], [1]), (["c"], [0, 1])])
def test_one_sided_groups_are_asked_for_nothing_against_a_reference(tmp_path, one_sided, kept):
    """Voxel by voxel: of a voxel that shows a kept group, how far the output is off having all of it."""
    phases = {"path": str(tmp_path / "low.npy"), "phases": {0: "a", 1: "b", 2: "c"}, "one_sided": one_sided}
    training = {"critic_steps": 1, "reuse_generated": True}
    study = study_of(tmp_path, low_res=phases, training=training)
    models, low_res, real = Models(study, ALONE), LowResCubes(study), RealSlices(study, ALONE.device)
    with torch.no_grad():
        labels, given = low_res.draw(0, range(2), ALONE.device)
        seen = models.generate(given)[..., ::4, ::4, ::4]
    loss = sum(float(((seen[:, k] - 1) ** 2)[labels == k].sum()) for k in kept) / labels.numel() / len(kept)
    assert models.step(0, range(2), low_res, real, 1e-30).losses[3].item() == pytest.approx(loss, rel=1e-5)


def test_one_sided_loss_leaves_out_what_is_unknown_and_follows_probabilities():
    operator = ImagingOperator(Fraction(1), [[0], [1]], Imaging(operator="under-sampled"))
    painted = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]).T.view(1, 2, 3, 1, 1)
    shown = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).T.view(1, 2, 3, 1, 1)  # material, pore, unknown
    assert voxel_loss(operator, painted, shown, [1]).item() == pytest.approx(0.2**2 / 3)
    shares = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.1, 0.9]]).T.view(1, 2, 3, 1, 1)
    assert voxel_loss(operator, painted, shares, [1]).item() == pytest.approx((0.9 * 0.4) ** 2 / 3)


@pytest.mark.parametrize(
    ("one_sided", "says"),
    [
        (["por"], r"one_sided: 'por' is no phase of low_res \(pore, fibre, binder\); did you mean 'pore'\?"),
        (["pore", "binder"], "one_sided: pore, binder are of all groups, .* leave one out"),
    ],
)
def test_one_sided_phases_that_are_unknown_or_all_are_refused(one_sided, says):
    with pytest.raises(ValueError, match=says):
        LowRes(path="low.npy", phases={0: "pore", 1: ("fibre", "binder")}, one_sided=one_sided)


@pytest.mark.parametrize("chosen", [None, torch.tensor([[3, 0], [1, 4]])])
def test_slices_of_a_numbered_volume(chosen):
    z, y, x = np.meshgrid(*map(np.arange, (5, 5, 5)), indexing="ij")
    numbers = torch.from_numpy(100 * z + 10 * y + x).float()
    volume = torch.stack([torch.stack([numbers, -numbers]), torch.stack([numbers + 1000, numbers])])
    for axis in range(3):
        slices = volume_slices(volume, axis, chosen)
        picks = [range(5)] * 2 if chosen is None else chosen.tolist()
        expected = [volume[cube].select(axis + 1, i) for cube in range(2) for i in picks[cube]]
        assert torch.equal(slices, torch.stack(expected))
    assert volume_slices(volume, 1)[2, 0, 3, 4] == 324  # normal y: rows along z, columns along x


def test_diagonal_slices_of_a_known_function_are_the_function_there():
    """Within the bound of linear interpolation between points h = √2 apart, h² / 8 times the second derivative."""
    edge, waves = 56, ((0.11, 0.05, -0.07), (-0.04, 0.12, 0.06))

    def function(z, y, x):
        return np.stack([np.sin(a * z + b * y + c * x) for a, b, c in waves])

    z, y, x = np.meshgrid(*[np.arange(edge)] * 3, indexing="ij")
    volume = torch.from_numpy(np.stack([function(z, y, x), function(z, y, x + 9)])).float()
    random, along, rows, columns = np.random.default_rng(0), [], np.arange(edge)[:, None], np.arange(edge)
    for axis in range(3):
        chosen = torch.from_numpy(np.stack([pick_diagonals(random, edge, 700)[:40] for _ in range(2)]))
        found = diagonal_slices(volume, axis, chosen).numpy().reshape(2, 40, 2, edge, edge)
        for cube, slices in enumerate(found):
            for one, (first, step) in zip(slices, chosen[cube].tolist(), strict=True):
                sign = step - edge
                where = [first // edge + rows / 2**0.5, first % edge + sign * rows / 2**0.5]
                along.append(sign)
                where.insert(axis, columns)
                for place in where:
                    assert 0 <= place.min() <= place.max() <= edge - 1
                expected = function(where[0], where[1], where[2] + 9 * cube)
                assert np.abs(one - expected).max() < 2 / 8 * (0.17**2) + 1e-5
    assert {-1, 1} == set(along)
    every = pick_diagonals(random, edge, 700)
    assert len(np.unique(every, axis=0)) == len(every) == 2 * 17**2  # 39 voxels from the first to the last, of 56


def test_patches_are_as_unsharp_as_the_diagonal_slices_beside_them():
    """Of spheres, which have no direction, by row: the mean of p (1 − p) over pixels of probability p."""
    edge, random = 56, np.random.default_rng(1)
    where = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"))
    volume = torch.zeros(8, edge, edge, edge, dtype=torch.long)
    for cube in volume:
        for _ in range(40):
            centre = random.uniform(-6, edge + 6, 3)[:, None, None, None]
            cube[torch.from_numpy(((where - centre) ** 2).sum(0) < random.uniform(5, 9) ** 2)] = 1
    cubes, grey = one_hot(volume, 2), []
    for axis in range(3):
        chosen = torch.from_numpy(np.stack([pick_diagonals(random, edge, 56) for _ in range(8)]))
        for kind in (diagonal_slices(cubes, axis, chosen), as_unsharp(volume_slices(cubes, axis))):
            assert kind.sum(1).sub(1).abs().max() < 1e-5
            grey.append((kind[:, 1, 1:-1] * kind[:, 0, 1:-1]).mean(dim=(0, 2)))
    diagonal, unsharp = torch.stack(grey).view(3, 2, -1).mean(0).numpy()
    rows = np.argsort(abs(np.arange(1, edge - 1) / 2**0.5 % 1 - 0.5))  # those midway between two voxels first
    for some, least in ((rows[:18], 0.01), (rows[18:36], 0.007), (rows[36:], 0.003)):
        assert diagonal[some].mean() > least
        assert unsharp[some].mean() == pytest.approx(diagonal[some].mean(), rel=0.1)


@pytest.mark.parametrize("planes_apart", [False, True])
def test_diagonal_slices_have_critics_of_their_own(tmp_path, planes_apart):
    training = {"diagonal_slices": True, "planes_apart": planes_apart, "cubes": 1, "critic_steps": 1}
    study = study_of(tmp_path, training=training)
    models, low_res, real = Models(study, ALONE), LowResCubes(study), RealSlices(study, ALONE.device)
    assert len(models.critics.critics) == (6 if planes_apart else 2)
    draw = real.draw(0, 0, range(1))
    assert [some.shape for some in draw.real] == [(3, 3, 56, 56)] * 6
    assert all(set(some.unique().tolist()) == {0, 1} for some in draw.real[:3])
    assert all(0.5 <= some[:, :, 1].max() and len(some.unique()) > 10 for some in draw.real[3:])
    volume = models.generate(low_res.draw(0, range(1), ALONE.device)[1])
    slices = models.slices(volume, real.choose(0, range(1)))
    inner = volume[:, :, 4:60, 4:60, 4:60]
    assert torch.equal(slices[4], diagonal_slices(inner, 1, real.choose(0, range(1))[4]))
    critics = models.critics.critics
    values = [torch.cat(slices[k : k + 3]) for k in (0, 3)] if not planes_apart else slices
    expected = torch.stack([critic(some).mean() for critic, some in zip(critics, values, strict=True)]).mean()
    assert models.critics.score(slices).item() == pytest.approx(expected.item(), rel=1e-5)
    before = [p.detach().clone() for p in models.critics.parameters()]
    outcome = models.step(0, range(1), low_res, real, 1e-3)
    assert outcome.finite
    assert all(not torch.equal(p, q) for p, q in zip(models.critics.parameters(), before, strict=True) if p.ndim > 1)


def test_diagonal_slices_of_an_anisotropic_material_are_refused(tmp_path):
    with pytest.raises(ValueError, match="diagonal_slices: no image shows a plane at 45° of an anisotropic material"):
        anisotropic(tmp_path, diagonal_slices=True)


def test_each_critic_of_an_anisotropic_material_sees_its_plane(tmp_path):
    models = Models(anisotropic(tmp_path), ALONE)
    assert len(models.critics.critics) == 3
    seen = []

    class Watcher(nn.Module):
        def forward(self, slices):
            seen.append(slices)
            return slices.flatten(1).sum(1)

    models.critics.critics = nn.ModuleList(Watcher() for _ in range(3))
    volume = torch.zeros(1, 3, 64, 64, 64)
    volume[0, 0] = torch.arange(64.0).view(-1, 1, 1)  # varies along z alone
    models.critics.score(models.slices(volume, (None, None, None)))
    normal_z, normal_y, normal_x = seen
    assert normal_z.shape == (56, 3, 56, 56)
    assert torch.equal(normal_z[:, 0, 0, 0], torch.arange(4.0, 60.0))  # four voxels cropped from each face
    assert normal_z.std(dim=(2, 3)).max() == 0
    for slices in (normal_y, normal_x):
        assert torch.equal(slices[0, 0, :, 7], torch.arange(4.0, 60.0))


@pytest.mark.parametrize("around", [0, 2])
def test_one_step_against_a_reference_of_a_few_lines(tmp_path, around):
    """Gradients of critic and generator; the voxel loss counts only above its threshold; of context of `around`
    low-res voxels nothing is asked."""
    slopes = {}
    for threshold in (0.0, 1e9):
        training = {"critic_steps": 1, "voxel_threshold": threshold, "learning_rate": 1e-30, "context": around}
        study = study_of(tmp_path, training=training)
        models, cubes = Models(study, ALONE), range(2)
        generator, critic = models.generator, models.critics.critics[0]
        low_res, real = LowResCubes(study), RealSlices(study, ALONE.device)
        models.step(0, cubes, low_res, real, 1e-30)
        ours = [[p.grad.clone() for p in module.parameters()] for module in (critic, generator)]

        draw = real.draw(0, 0, cubes)
        with torch.no_grad():
            fake_volume = generator(low_res.draw(0, cubes, ALONE.device, 1)[1], around).softmax(1)
            fake_volume = fake_volume[..., 4:60, 4:60, 4:60]
        loss = 0.0
        for axis in range(3):
            for i, (sample, weight) in enumerate(zip(draw.real[axis], draw.mix[axis], strict=True)):
                fake = fake_volume[i // 3].select(axis + 1, int(draw.chosen[axis][i // 3, i % 3]))
                between = (weight * sample + (1 - weight) * fake)[None].requires_grad_()
                (slope,) = torch.autograd.grad(critic(between), between, create_graph=True)
                loss = loss + critic(fake[None]) - critic(sample[None]) + 10 * (slope.norm() - 1) ** 2
        expected = torch.autograd.grad((loss / 18).sum(), list(critic.parameters()))
        for a, b in zip(ours[0], expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-7)

        labels, given = low_res.draw(0, cubes, ALONE.device)
        volume = generator(given, around).softmax(1)
        shown = real.choose(0, cubes)
        scores = [
            critic(volume[c, :, 4:60, 4:60, 4:60].select(axis + 1, int(i))[None])
            for axis in range(3)
            for c in cubes
            for i in shown[axis][c]
        ]
        loss = -torch.stack(scores).mean()
        if threshold == 0:
            squares = [(volume[:, p, ::4, ::4, ::4] - (labels == p).float()) ** 2 for p in range(3)]
            loss = loss + 10 * torch.stack(squares).mean()
        expected = torch.autograd.grad(loss, list(generator.parameters()))
        largest = max(float(b.abs().max()) for b in expected)
        for a, b in zip(ours[1], expected, strict=True):
            assert torch.allclose(a, b, atol=2e-5 * largest)
        slopes[threshold] = expected[0]
    assert not torch.allclose(slopes[0.0], slopes[1e9], rtol=0.1)


@pytest.mark.parametrize("planes_apart", [False, True])
def test_critics_with_fewer_patches_and_penalties_than_slices_against_a_reference(tmp_path, planes_apart):
    """The published code's numbers are 64 of each axis, whatever the number of generated slices."""
    assert (Training().real_patches, Training().penalties) == (64, 64)
    more = {"critic_steps": 1, "real_patches": 5, "penalties": 4, "planes_apart": planes_apart}
    study = study_of(tmp_path, training=more)
    models, low_res, real = Models(study, ALONE), LowResCubes(study), RealSlices(study, ALONE.device)
    models.step(0, range(2), low_res, real, 1e-30)
    draw = real.draw(0, 0, range(2))
    assert [len(some) for some in draw.real] == [5] * 3
    assert [len(some) for some in draw.mix] == [4] * 3
    with torch.no_grad():
        fake = models.slices(models.generate(low_res.draw(0, range(2), ALONE.device, 1)[1]), draw.chosen)
    losses = []
    for axis in range(3):
        critic = models.critics.critics[axis if planes_apart else 0]
        loss = critic(fake[axis]).mean() - critic(draw.real[axis]).mean()
        for (patch, generated), weight in zip(draw.pairs[axis].T.tolist(), draw.mix[axis], strict=True):
            between = (weight * draw.real[axis][patch] + (1 - weight) * fake[axis][generated])[None].requires_grad_()
            (slope,) = torch.autograd.grad(critic(between), between, create_graph=True)
            loss = loss + 10 * (slope.norm() - 1) ** 2 / 4
        losses.append(loss)
    loss = torch.stack(losses)
    expected = torch.autograd.grad(loss.sum() if planes_apart else loss.mean(), list(models.critics.parameters()))
    for ours, theirs in zip(models.critics.parameters(), expected, strict=True):
        assert torch.allclose(ours.grad, theirs, atol=1e-5 * float(theirs.abs().max()) + 1e-6)


@pytest.mark.parametrize("planes_apart", [False, True])
def test_only_a_critic_for_each_plane_sees_what_their_mixture_hides(tmp_path, planes_apart):
    """Images of stripes along rows as often as along columns, against volumes that are layered along y: their slices
    normal to z and to x are those stripes, each in one plane; a third plane has one colour and is the same in both."""
    critics = Critics(study_of(tmp_path, training={"planes_apart": planes_apart}))
    optimizer = torch.optim.Adam(critics.parameters(), 1e-3, (0.5, 0.9))
    layers = (torch.arange(56) // 7 % 2).expand(56, 56)
    across, along, flat = (one_hot(labels[None], 3) for labels in (layers, layers.T, torch.zeros_like(layers)))
    mixed, plain = torch.cat([across, along]), torch.cat([flat, flat])
    real = mixed, plain, mixed
    fake = torch.cat([along, along]), plain, torch.cat([across, across])
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        distance, penalty = critics(real, fake, [torch.rand(2, generator=random) for _ in range(3)])
        optimizer.zero_grad()
        (10 * penalty - distance).backward()
        optimizer.step()
    assert distance > 2 if planes_apart else abs(distance) < 1e-3


def seen_by_the_coarse_instrument(volume):
    """Scale factor 4: blur of 3 voxels with σ 0.8, then the middle of every 4 voxels, phases b and c alike, softmax."""
    taps = [np.exp(-0.5 * (d / 0.8) ** 2) for d in (-1, 0, 1)]
    padded = functional.pad(volume, [1] * 6, mode="replicate")
    n = volume.shape[-1]
    blurred = sum(
        taps[i] * taps[j] * taps[k] / sum(taps) ** 3 * padded[..., i : i + n, j : j + n, k : k + n]
        for i in range(3)
        for j in range(3)
        for k in range(3)
    )
    coarse = sum(blurred[..., i::4, j::4, k::4] / 8 for i in (1, 2) for j in (1, 2) for k in (1, 2))
    return torch.stack([coarse[:, 0], coarse[:, 1] + coarse[:, 2]], dim=1).mul(100).softmax(1)


def test_three_steps_of_the_anisotropic_case_against_a_reference_of_a_few_lines(tmp_path):
    """Three critics with a penalty each, all slices in all planes, blur, temperature, threshold and Adam."""
    rate, threshold = 2e-3, 0.338
    study = anisotropic(tmp_path, critic_steps=2, cubes=1, voxel_threshold=threshold, ema=0)
    models, low_res, real = Models(study, ALONE), LowResCubes(study), RealSlices(study, ALONE.device)
    generator, critics = deepcopy(models.generator), deepcopy(models.critics.critics)
    before = [p.detach().clone() for p in models.generator.parameters()]
    moments: dict = {}

    def adam(parameters, loss):
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            m, v, t = moments.get(p, (0, 0, 0))
            m, v, t = 0.5 * m + 0.5 * g, 0.999 * v + 0.001 * g * g, t + 1
            moments[p] = m, v, t
            p.data -= rate * (m / (1 - 0.5**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    def planes(volume):
        inner = volume[0, :, 4:60, 4:60, 4:60]
        return inner.permute(1, 0, 2, 3), inner.permute(2, 0, 1, 3), inner.permute(3, 0, 1, 2)

    counted = []
    for step in range(3):
        ours = models.step(step, range(1), low_res, real, rate).losses.tolist()
        ours.pop(2)  # the score has no zero point: a critic's last bias has no gradient but rounding
        for critic_step in range(2):
            draw, distances, penalties = real.draw(step, critic_step, range(1)), [], []
            given = low_res.draw(step, range(1), ALONE.device, 1 + critic_step)[1]
            fakes = planes(generator(given).softmax(1).detach())
            for critic, sample, fake, mix in zip(critics, draw.real, fakes, draw.mix, strict=True):
                between = mix[:, None, None, None] * sample + (1 - mix[:, None, None, None]) * fake
                (slope,) = torch.autograd.grad(critic(between.requires_grad_()).sum(), between, create_graph=True)
                penalties.append(((slope.square().sum((1, 2, 3)).sqrt() - 1) ** 2).mean())
                distances.append(critic(sample).mean() - critic(fake).mean())
                adam(list(critic.parameters()), 10 * penalties[-1] - distances[-1])
        labels, given = low_res.draw(step, range(1), ALONE.device)
        volume = generator(given).softmax(1)
        score = sum(critic(slices).mean() for critic, slices in zip(critics, planes(volume), strict=True)) / 3
        squares = (seen_by_the_coarse_instrument(volume) - torch.stack([labels == 0, labels == 1], 1).float()) ** 2
        voxel = squares.mean()
        counted.append(bool(voxel > threshold))
        adam(list(generator.parameters()), -score + 10 * voxel * counted[-1])
        theirs = [sum(distances) / 3, sum(penalties) / 3, voxel]
        assert ours == pytest.approx([float(t.detach()) for t in theirs], rel=2e-3, abs=1e-5)
    assert set(counted) == {True, False}
    moved = apart = 0.0
    for (name, ours), theirs, first in zip(
        models.generator.named_parameters(), generator.parameters(), before, strict=True
    ):
        if not name.startswith("norm") and name.endswith("bias") and name != "conv_end.bias":
            continue  # batch norm takes it out again, so its gradient is rounding too
        moved += float((ours - first).detach().square().sum())
        apart += float((ours - theirs).detach().square().sum())
    assert apart < 0.15**2 * moved  # Adam's first steps are signs, and some gradients are zero but for rounding


def test_warm_up_learns_to_interpolate(tmp_path):
    """The generator's gradient against a loop over voxels; the critics learn as ever; then Algorithm 1 follows."""
    for operator, place in (("under-sampled", 0.0), ("under-resolved", 0.5)):
        more = {"critic_steps": 1, "reuse_generated": True, "cubes": 1, "warm_up_steps": 1}
        study = study_of(tmp_path, training=more, imaging={"operator": operator})
        models, plain = Models(study, ALONE), Models(study, ALONE)
        low_res, real = LowResCubes(study), RealSlices(study, ALONE.device)
        outcome = models.step(0, range(1), low_res, real, 1e-30)
        labels, given = low_res.draw(0, range(1), ALONE.device)
        probabilities = plain.generator(given).softmax(1)
        known = np.stack([labels[0].numpy() == phase for phase in range(3)])
        where = np.meshgrid(*[np.clip((np.arange(64) + place) / 4 - place, 0, 15)] * 3, indexing="ij")
        wanted = np.stack([map_coordinates(phase.astype(float), where, order=1) for phase in known])
        loss = -(torch.from_numpy(wanted)[None] * probabilities.double().log()).sum() / 64**3
        assert outcome.losses[2].item() == pytest.approx(loss.item(), rel=1e-5)
        expected = torch.autograd.grad(loss, list(plain.generator.parameters()))
        largest = max(float(b.abs().max()) for b in expected)
        for ours, b in zip(models.generator.parameters(), expected, strict=True):
            assert torch.allclose(ours.grad, b, atol=1e-4 * largest)
        plain.step(0, range(1), low_res, real, 1e-30)
        for ours, theirs in zip(models.critics.parameters(), plain.critics.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        assert models.step(1, range(1), low_res, real, 1e-30).losses[2] != pytest.approx(loss.item(), rel=0.1)
    models.init_from = {"path": "other"}
    assert models.step(0, range(1), low_res, real, 1e-30).losses[2] != pytest.approx(loss.item(), rel=0.1)


def test_the_first_step_after_the_warm_up_is_of_the_rate(tmp_path):
    """Not of the ratio of the critics' slope to the warm-up's, which is much gentler."""
    more = {"critic_steps": 1, "reuse_generated": True, "cubes": 1, "warm_up_steps": 2, "adam_betas": [0.0, 0.99]}
    study = study_of(tmp_path, training=more)
    models, low_res, real = Models(study, ALONE), LowResCubes(study), RealSlices(study, ALONE.device)
    for step in range(4):
        before = nn.utils.parameters_to_vector(models.generator.parameters()).detach().clone()
        models.step(step, range(1), low_res, real, 1e-3)
        moved = (nn.utils.parameters_to_vector(models.generator.parameters()).detach() - before).abs()
        if step in (0, 2):
            assert moved.max() < 1.001e-3
            assert moved.median() == pytest.approx(1e-3, rel=1e-3)
        else:
            assert moved.max() > 1.01e-3


def test_lattice_loss_of_blocks_of_stripes_and_of_what_knows_no_lattice():
    """Copied low-res voxels have all faces at one position of four; a wave of another period has them everywhere."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 2, (1, 12, 12, 12))
    blocks = one_hot(torch.from_numpy(coarse.repeat(4, 1).repeat(4, 2).repeat(4, 3)), 2)
    shares = face_shares(blocks, 4)
    for axis in range(3):
        faces = np.diff(coarse, axis=axis + 1) != 0
        assert shares[axis].tolist() == pytest.approx([0, 0, 0, faces.mean()], abs=1e-6)
    assert lattice_loss(shares) == pytest.approx((3 * 1 + 9) / 4)
    fine = one_hot(torch.from_numpy(random.integers(0, 2, (4, 49, 49, 49))), 2)
    assert face_shares(fine, 4) == pytest.approx(torch.full((3, 4), 0.5), abs=0.01)
    assert lattice_loss(face_shares(fine, 4)) < 1e-4
    assert face_shares(fine, 64).shape == (3, 48)  # at scale factor 64/7, say
    unsure = torch.full((1, 2, 9, 9, 9), 0.5)  # two draws from it are apart half of the time
    assert face_shares(unsure, 4) == pytest.approx(torch.full((3, 4), 0.5))


@pytest.mark.parametrize(("shape", "period"), [((2, 3, 5, 6, 7), 2), ((1, 2, 4, 4, 4), 8)])
def test_gradients_of_face_shares_are_those_of_finite_differences(shape, period):
    probabilities = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # A view, as the cropped cubes are.
    inner = functional.pad(probabilities, (1,) * 6)[..., 1:-1, 1:-1, 1:-1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: face_shares(p, period), inner)


def test_lattice_loss_joins_the_generators(tmp_path):
    """What the step adds is weight × loss of the cropped cubes, value and gradient."""
    plain, more = (
        study_of(tmp_path, training={"warm_up_steps": 1, "crop_voxels": 8, "lattice_weight": weight})
        for weight in (0, 5e4)
    )
    low_res, real = LowResCubes(plain), RealSlices(plain, ALONE.device)
    found = []
    for study in (plain, more):
        models = Models(study, ALONE)
        outcome = models.step(0, range(2), low_res, real, 1e-30)
        found.append((outcome.losses[2].item(), torch.cat([p.grad.flatten() for p in models.generator.parameters()])))
    inner = models.generate(low_res.draw(0, range(2), ALONE.device)[1])[..., 8:56, 8:56, 8:56]
    loss = 5e4 * lattice_loss(face_shares(inner, 4))
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(models.generator.parameters()))])
    assert found[1][0] - found[0][0] == pytest.approx(loss.item(), rel=1e-4)
    assert (found[1][1] - found[0][1] - slope).norm() < 1e-4 * slope.norm()


@pytest.mark.parametrize(
    ("pixels", "apart", "fast"),
    [(4, 1, False), (4, 3, False), (6, 1, True), (6, 2, True), pytest.param(6, 1, False, marks=pytest.mark.variant)],
)
def test_gradients_of_pattern_shares_are_those_of_finite_differences(pixels, apart, fast):
    """In fast mode, of random linear combinations of the shares; of six pixels there are 4374."""
    volume = torch.rand((1, 3, 5, 6, 7), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def shares(cubes):
        return pattern_shares([volume_slices(cubes, axis) for axis in range(3)], (apart,), pixels)

    assert torch.autograd.gradcheck(shares, volume.requires_grad_(), fast_mode=fast)


@pytest.mark.parametrize("pixels", [4, 6])
def test_pattern_shares_are_those_counted_window_by_window(pixels):
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 9, 10, 11)))
    slices = [volume_slices(one_hot(labels, 3), axis) for axis in range(3)]
    shares = pattern_shares(slices, (1, 4), pixels).reshape(2, 3, -1, 3**pixels)
    for k, spacing in enumerate((1, 4)):
        for axis in range(3):
            counts = sum(counted_patterns(np.moveaxis(cube, axis, 0), spacing, pixels) for cube in labels.numpy())
            assert shares[k, axis].numpy() == pytest.approx(counts / counts.sum(1, keepdims=True), abs=1e-6)
    # Of what is unsure, the mean over draws; of independent pixels the product of their probabilities.
    unsure = torch.tensor([0.5, 0.3, 0.2]).view(1, 3, 1, 1).expand(4, 3, 9, 9)
    p = np.array([0.5, 0.3, 0.2])
    independent = np.prod(np.meshgrid(*[p] * pixels, indexing="ij"), axis=0).ravel()
    assert pattern_shares([unsure], (2,), pixels)[-1].numpy() == pytest.approx(independent, rel=1e-5)


def test_six_pixels_know_a_grating_that_four_take_for_interfaces():
    """Lines of one pixel side by side, and as many interfaces of stripes two wide: to 2 × 2 pixels they are alike."""
    ones = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1]).repeat(6)
    twos = torch.tensor([0, 0, 1, 1]).repeat(18)
    assert (ones[1:] != ones[:-1]).sum() == (twos[1:] != twos[:-1]).sum()
    of_four, of_six = (
        [pattern_shares([one_hot(row.expand(1, 73, 72), 2)], (1,), pixels) for row in (ones, twos)] for pixels in (4, 6)
    )
    assert of_four[0].numpy() == pytest.approx(of_four[1].numpy(), abs=0.02)
    assert (of_six[0] - of_six[1]).abs().max() > 0.1


def test_thin_shares_are_those_counted_pixel_by_pixel():
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (2, 9, 10, 11)))
    shares = thin_shares([volume_slices(one_hot(labels, 3), axis) for axis in range(3)]).reshape(3, 2, 2)
    for axis in range(3):
        counts = sum(counted_thin(np.moveaxis(cube, axis, 0)) for cube in labels.numpy())
        assert shares[axis, :, 0].numpy() == pytest.approx(counts[:, 0] / counts[:, 1], abs=1e-6)
    assert shares.sum(2).numpy() == pytest.approx(1)
    p = np.array([0.5, 0.3, 0.2])
    unsure = torch.tensor(p, dtype=torch.float32).view(1, 3, 1, 1).expand(4, 3, 9, 9)
    assert thin_shares([unsure])[:, 0].numpy() == pytest.approx((p**2 * (1 - p)).sum(), rel=1e-5)
    stripes = torch.arange(9).expand(2, 9, 9) % 2
    assert thin_shares([one_hot(stripes, 3)])[:, 0].tolist() == [0, 1]


def test_pattern_loss_is_nothing_for_equal_shares_and_the_relative_error_counts():
    images = torch.tensor([[0.9, 0.098, 0.002, 0.0]])
    assert pattern_loss(images, images) == 0
    for place, share in enumerate(images[0, :3]):
        off = images.clone()
        off[0, place] *= 1.01
        assert pattern_loss(off, images).item() == pytest.approx(0.01**2 * share.item() / 2.01, rel=1e-3)
    lacked = torch.tensor([[0.0, 0.0, 0.0, 1e-6]], requires_grad=True)
    (slope,) = torch.autograd.grad(pattern_loss(images + lacked, images), lacked)
    assert slope[0].tolist() == pytest.approx([0, 0, 0, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("weight", "shares_of", "images"),
    [
        ("pattern_weight", lambda slices: pattern_shares(slices, (1, 4), 6), "patterns"),
        ("thin_weight", thin_shares, "thin"),
    ],
)
def test_shares_join_the_generators_loss_after_the_warm_up(tmp_path, weight, shares_of, images):
    """What a step adds is weight × loss, its slope taken at the running mean, of the slices that the critics see as
    labels; at half the learning rate it is twice the weight."""
    more = {"critic_steps": 1, "reuse_generated": True, "warm_up_steps": 1, "learning_rate": 2e-30}
    with_it = study_of(tmp_path, training=more | {weight: 1e3, "pattern_spacings": [1, 4], "pattern_pixels": 6})
    low_res, real = LowResCubes(with_it), RealSlices(with_it, ALONE.device)
    theirs = getattr(real, images)
    found = []
    for study in (study_of(tmp_path, training=more), with_it):
        models = Models(study, ALONE)
        losses = [models.step(step, range(2), low_res, real, 1e-30).losses[2].item() for step in range(3)]
        found.append((losses, torch.cat([p.grad.flatten() for p in models.generator.parameters()])))
    assert found[0][0][0] == found[1][0][0]

    def shares(step):
        painted = models.generate(low_res.draw(step, range(2), ALONE.device)[1])
        labels = one_hot(painted.argmax(1), 3) + painted - painted.detach()
        return shares_of(models.slices(labels, real.choose(step, range(2))))

    with torch.no_grad():
        first = shares(1)
    last = shares(2)
    mean = (0.9 * first + 0.1 * last.detach()).requires_grad_()
    assert found[1][0][1] - found[0][0][1] == pytest.approx(2e3 * pattern_loss(first, theirs).item(), rel=1e-4)
    loss = 2e3 * pattern_loss(mean, theirs)
    assert found[1][0][2] - found[0][0][2] == pytest.approx(loss.item(), rel=1e-4)
    (slope,) = torch.autograd.grad(loss, mean)
    added = torch.autograd.grad((slope * last).sum(), list(models.generator.parameters()))
    expected = torch.cat([g.flatten() for g in added])
    assert (found[1][1] - found[0][1] - expected).norm() < 1e-4 * expected.norm()


def test_batch_norm_has_the_plain_layout_and_the_last_convolution_the_fast_one(tmp_path):
    """In fp32 on a CPU: the one loses digits in the fast layout, the other takes twice as long in the plain."""
    models, seen = Models(study_of(tmp_path), ALONE), {}
    for name in ("norm_last", "conv_end"):
        layer = getattr(models.generator, name)
        layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    made = models.generate(LowResCubes(models.study).draw(0, range(2), ALONE.device)[1])
    assert seen["norm_last"].is_contiguous()
    assert seen["conv_end"].is_contiguous(memory_format=torch.channels_last_3d)
    assert made.is_contiguous()


def test_denormals_count_as_zero_in_training_only(tmp_path, monkeypatch):
    """The gradient of a softmax close to 0 and 1 holds denormals, which slow a convolution's gradient down."""

    def smallest() -> float:
        return (torch.tensor([1e-40]) * 1).item()

    seen, plain = [], Models.step
    monkeypatch.setattr(Models, "step", lambda self, *given: seen.append(smallest()) or plain(self, *given))
    study = study_of(tmp_path, training={"steps": 2, "threads": None})
    for flushed in (False, True):
        torch.set_flush_denormal(flushed)
        train(study, overwrite=True)
        assert seen == [0.0, 0.0]
        assert (smallest() == 0) == flushed
        seen.clear()
    torch.set_flush_denormal(False)


def test_the_weight_of_patterns_follows_the_voxel_loss(tmp_path):
    """Their weight falls by a tenth in a step whose voxel loss exceeds the tolerance, and else grows by 3 %."""
    more = {"critic_steps": 1, "reuse_generated": True, "pattern_spacings": [1], "pattern_weight": 1e3}
    study, plain = (study_of(tmp_path, training=more | one) for one in ({}, {"pattern_weight": 0.0}))
    low_res, real = LowResCubes(study), RealSlices(study, ALONE.device)

    def loss_of(study, shares):
        models = Models(study, ALONE)
        for tolerance, share in shares:
            models.study = study_of(tmp_path, training=more | {"pattern_tolerance": tolerance})
            models._adapt_pattern_share(0.5)
            assert models.pattern_share == pytest.approx(share)
        models.study = study
        return models.step(0, range(2), low_res, real, 1e-3).losses[2].item()

    whole = loss_of(study, []) - loss_of(plain, [])
    tolerant = study_of(tmp_path, training=more | {"pattern_tolerance": 1e-9})
    first = loss_of(tolerant, [(0.6, 0.103), (0.6, 0.10609), (0.4, 0.095481)]) - loss_of(plain, [])
    assert first / whole == pytest.approx(0.9 * 0.095481, rel=1e-4)
    models = Models(tolerant, ALONE)
    for newest, late in ((0.5, 0.5), (1.0, 0.6), (0.0, 0.48)):
        models._adapt_pattern_share(newest)
        assert models.mean_voxel_loss == pytest.approx(late)
    for _ in range(99):
        models._adapt_pattern_share(1.0)
    assert models.pattern_share == 0.01
    for _ in range(300):
        models._adapt_pattern_share(0.0)
    assert models.pattern_share == 1.0


@pytest.mark.parametrize("sigmas", [(0.0,), (0.0, 6.0, 3.0)])
def test_noise_gain_multiplies_what_the_noise_says_at_first(sigmas, tmp_path):
    network = {"width": 3, "critic_width": 5, "noise_sigma_voxels": sigmas}
    studies = (study_of(tmp_path, training={"noise_gain": gain}, network=network) for gain in (1, 3))
    plain, loud = (Models(study, ALONE).generator for study in studies)
    low_res, noise = torch.rand(2, 1, 3 + len(sigmas), 8, 8, 8)
    noise[:, :3], low_res[:, 3:] = 0, 0
    first = [[network.conv_first(x) - network.conv_first(x * 0) for x in (low_res, noise)] for network in (plain, loud)]
    assert torch.equal(first[0][0], first[1][0])
    assert torch.allclose(3 * first[0][1], first[1][1], atol=1e-6)


def test_learning_rate_is_constant_then_linear(tmp_path):
    study = study_of(tmp_path, training={"learning_rate": 8e-4, "final_learning_rate": 0.25})
    assert [learning_rate(study, done) for done in (0, 0.5, 0.75, 1)] == pytest.approx([8e-4, 8e-4, 5e-4, 2e-4])


@pytest.mark.parametrize("growth", [0.5, 2, 6])
def test_weights_in_the_average_grow_as_a_power_until_ema_is_reached(growth):
    def weights(ema, steps):
        decays = [average_decay(ema, growth, step) for step in range(steps)]
        return np.array([1 - decay for decay in decays]) * np.append(np.cumprod(decays[::-1])[-2::-1], 1), decays

    found, decays = weights(0.999999, 4000)
    assert found.sum() + np.prod(decays) == pytest.approx(1)
    assert np.prod(decays) < 1e-4  # of the first weights
    for early, late in ((200, 800), (999, 3996)):
        assert found[late] == pytest.approx(4**growth * found[early], rel=0.02 * (1 + growth))
    short, _ = weights(0.99, 4000)
    assert short[-1] == pytest.approx(0.01)
    assert short[-100] == pytest.approx(0.01 * 0.99**99)


# ---- scale factors above the paper's ----


@pytest.mark.parametrize(
    ("scale", "network", "shape"),
    [
        ("64/6", {}, (7, 6, 8)),
        ("16", {"padding": "replicate"}, (4, 5, 4)),
        ("32", {"last_stage": "transposed"}, (2, 3, 2)),
    ],
)
def test_scale_factors_above_8_from_training_to_labels(scale, network, shape, tmp_path):
    study = study_of(
        tmp_path,
        volume=blobs(shape, 1),
        scale_factor=scale,
        imaging={"operator": "under-resolved"},
        network={"width": 2, "critic_width": 4, "padding": "zeros", **network},
        training={"steps": 1, "cubes": 1},
    )
    given = LowResCubes(study).draw(0, range(2), ALONE.device)[1]
    assert given.shape[2:] == (64 // study.scale_factor,) * 3
    trained = load_checkpoint(train(study).checkpoint)
    with torch.no_grad():
        assert trained.generator(given).shape[2:] == (64, 64, 64)
    store = LabelStore.open(infer(open_job(study), Ranks()).store)
    assert store.levels[0].shape == tuple(int(n * study.scale_factor) for n in shape)
    labels = store.read(0, Box.whole(store.levels[0].shape))
    assert labels.max() < 3


# ---- what is refused ----


@pytest.mark.parametrize(
    ("data", "training", "says"),
    [
        ({"images": (1, 90, 50)}, {}, r"one.npy: 90 x 50 pixels.*56 x 56"),
        ({"volume": np.zeros((20, 18, 15), np.uint8)}, {}, "low.npy: 15 voxels along x.*16 at scale factor 4"),
        ({"volume": np.full((20, 18, 17), 7, np.uint8)}, {}, "low.npy: label 7"),
        ({"images": 9}, {}, "one.npy: label 9"),
        ({}, {"slices_per_axis": 57}, "slices_per_axis: 57"),
        ({"device": "cuda"}, {}, "device: cuda"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, data, training, says):
    if isinstance(data.get("images"), tuple):
        data = {"images": [one_image(tmp_path, np.zeros(data["images"], np.uint8))]}
    elif isinstance(data.get("images"), int):
        data = {"images": [one_image(tmp_path, np.full((1, 64, 64), data["images"], np.uint8))]}
    if "device" in data and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=says) as refused:
        train(study_of(tmp_path, training=training, **data))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scale", "cube", "says"),
    [
        ("8/3", 100, r"cube_voxels: 100 .* not 2 or more whole low-res ones at scale factor 8/3; use a multiple of 8"),
        ("4", 66, "at scale factor 4; use a multiple of 4"),
        ("32", 32, "use a multiple of 32"),
    ],
)
def test_cubes_of_no_whole_low_res_voxels_are_refused(tmp_path, scale, cube, says):
    with pytest.raises(ValueError, match=says):
        study_of(tmp_path, scale_factor=scale, training={"cube_voxels": cube})
    with pytest.raises(ValueError, match=r"cube_voxels: 32 less crop_voxels 9 .* slices of 14 voxels, .* needs 16"):
        Training(cube_voxels=32, crop_voxels=9)


def test_patterns_wider_than_what_the_crop_leaves_are_refused():
    with pytest.raises(ValueError, match="pattern_spacings: 8, but 3 pixels so far apart are not within the 16 of"):
        Training(crop_voxels=24, pattern_pixels=6)
    Training(crop_voxels=24, pattern_pixels=6, pattern_spacings=(7,))
    Training(crop_voxels=24, pattern_spacings=(15,))


def test_cubes_that_do_not_divide_are_refused():
    with pytest.raises(InputError, match=r"3 cubes.*2 processes.*multiple of 2"):
        Processes(1, 2, 2, torch.device("cpu")).share(3)
    assert [Processes(r, 3, 3, torch.device("cpu")).share(6) for r in range(3)] == [range(2), range(2, 4), range(4, 6)]
