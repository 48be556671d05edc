"""The list of stages, and the engine in torch that computes any of them, against torch's own layers."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from test_polyphase import Held, trained
from torch import nn
from torch.nn import functional

from hpcres.engines.staged import Staged
from hpcres.geometry import Box
from hpcres.networks.stages import Stage, Stages


def random_stage(name, kind, inputs, outputs, kernel=3, seed=0, **more):
    rng = np.random.default_rng([seed, inputs, outputs])
    if kind == "shuffle":
        return Stage(name, kind, inputs, outputs, 1, "none", **more)
    channels = (inputs, outputs) if kind == "transposed" else (outputs, inputs)
    weight = rng.standard_normal((*channels, kernel, kernel, kernel)) / kernel
    return Stage(name, kind, inputs, outputs, kernel, weight=weight, bias=rng.standard_normal(outputs), **more)


def plain(stages, x):
    """The stages by torch's layers, over a whole window."""
    outputs = []
    for stage in stages.stages:
        weight, bias, slope = (torch.from_numpy(values) for values in (stage.weight, stage.bias, stage.slope))
        if stage.kind == "shuffle":
            batch, _, z, y, x_ = x.shape
            edge = int(stage.scale)
            out = torch.empty(batch, stage.outputs, z * edge, y * edge, x_ * edge, dtype=x.dtype)
            for c, dz, dy, dx in product(range(stage.outputs), *[range(edge)] * 3):
                out[:, c, dz::edge, dy::edge, dx::edge] = x[:, ((c * edge + dz) * edge + dy) * edge + dx]
            x = out
        elif stage.kind == "transposed":
            x = functional.conv_transpose3d(x, weight, bias, stride=int(stage.scale), padding=stage.crop)
        else:
            if stage.kind == "resized":
                mode = {"linear": "trilinear", "nearest": "nearest"}[stage.interpolation]
                align = {"align_corners": False} if mode == "trilinear" else {}
                x = functional.interpolate(x, scale_factor=float(stage.scale), mode=mode, **align)
            pad = "replicate" if stage.padding == "replicate" else "constant"
            x = functional.conv3d(functional.pad(x, (stage.kernel // 2,) * 6, mode=pad), weight, bias)
        if stage.add_before is not None:
            x = x + outputs[stage.add_before]
        activations = {"relu": functional.relu, "leaky": nn.LeakyReLU(*slope.tolist()[:1])}
        if stage.activation == "prelu":
            x = functional.prelu(x, slope)
        else:
            x = activations.get(stage.activation, lambda y: y)(x)
        if stage.add_after is not None:
            x = x + outputs[stage.add_after]
        outputs.append(x)
    return x


LISTS = {
    "every activation, kernels of 1, 3 and 5": Stages(
        (
            random_stage("a", "convolution", 2, 4, 5, activation="leaky", slope=np.array([0.1]), padding="replicate"),
            random_stage("b", "convolution", 4, 4, 1, activation="prelu", slope=np.linspace(0.1, 0.4, 4)),
            random_stage("c", "convolution", 4, 4, 3, activation="none", add_before=0, add_after=1),
            random_stage("d", "convolution", 4, 3, 3, activation="softmax", padding="replicate"),
        ),
        Fraction(1),
    ),
    "nearest by 2, linear by 5/2": Stages(
        (
            random_stage("a", "resized", 2, 4, scale=Fraction(2), interpolation="nearest"),
            random_stage("b", "resized", 4, 3, scale=Fraction(5, 2), padding="replicate"),
            random_stage("c", "convolution", 3, 2, activation="none"),
        ),
        Fraction(5),
    ),
    "convolution and shuffle, twice (SRResNet)": Stages(
        (
            random_stage("a", "convolution", 2, 4),
            random_stage("b", "convolution", 4, 24, activation="none", padding="replicate"),
            random_stage("c", "shuffle", 24, 3, scale=Fraction(2)),
            random_stage("d", "convolution", 3, 16),
            random_stage("e", "shuffle", 16, 2, scale=Fraction(2)),
            random_stage("f", "convolution", 2, 1, activation="sigmoid"),
        ),
        Fraction(4),
    ),
}
LATENT = Stages(
    (
        random_stage("a", "transposed", 3, 4, 4, scale=Fraction(1), crop=2, activation="leaky", slope=np.array([0.2])),
        random_stage("b", "transposed", 4, 4, 4, scale=Fraction(2), crop=2),
        random_stage("c", "transposed", 4, 4, 4, scale=Fraction(2), crop=3),
        random_stage("d", "transposed", 4, 3, 4, scale=Fraction(2), crop=1, activation="softmax"),
    ),
    Fraction(8),
)
"""As of a network without padding: faces have no meaning, since every crop only moves the grid."""


def window(stages, shape, seed=3):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((2, stages.inputs, *shape)))


@pytest.mark.parametrize("stages", [*LISTS.values(), LATENT], ids=[*LISTS, "transposed of every crop"])
def test_the_engine_computes_what_torch_s_layers_do(stages):
    x = window(stages, (6, 8, 4) if stages is not LATENT else (7, 8, 6))
    with torch.no_grad():
        expected = plain(stages, x)
    engine = Staged(stages, dtype=torch.float64)
    torch.testing.assert_close(engine.logits(x), expected, rtol=1e-12, atol=1e-12)
    labels = (expected[:, 0] > 0) if expected.shape[1] == 1 else expected.argmax(1)
    assert torch.equal(engine.labels(x), labels.to(torch.uint8))


@pytest.mark.parametrize("stages", LISTS.values(), ids=LISTS)
def test_any_crop_is_a_part_of_the_whole(stages):
    x, engine = window(stages, (6, 8, 4)), Staged(stages, dtype=torch.float64)
    whole = engine.logits(x)
    for start, stop in (((0, 0, 0), (1, 1, 1)), ((3, 1, 2), (6, 8, 4)), ((5, 0, 1), tuple(whole.shape[2:]))):
        crop = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        torch.testing.assert_close(engine.logits(x, crop), whole[(..., *crop)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("stages", [*LISTS.values(), LATENT], ids=[*LISTS, "transposed of every crop"])
def test_the_halo_is_what_outputs_depend_on_and_no_more(stages):
    """A window that holds the halo gives the whole's values; changing a voxel beyond it changes nothing."""
    engine, halo, q = Staged(stages, dtype=torch.float64), stages.halo_low_res, stages.scale.denominator
    p, n = stages.scale.numerator, 4 * halo + 4
    x = window(stages, (n, 1 + 2 * halo, 1 + 2 * halo))[:1]
    middle = n // 2 // q * q
    first = middle // q * p
    crop = (slice(first, first + p), *(slice(halo // q * p, halo // q * p + 1),) * 2)
    wanted = engine.logits(x, crop)
    begin = -(-halo // q) * q  # where weights repeat
    part = (slice(begin // q * p, begin // q * p + p), *crop[1:])
    torch.testing.assert_close(engine.logits(x[:, :, middle - begin :], part), wanted, rtol=0, atol=1e-12)
    reached = []
    for beyond in range(1, halo + 2):
        seen = []
        for place in (middle - beyond, middle + q - 1 + beyond):
            other = x.clone()
            other[:, :, place] += 1
            seen.append(bool((engine.logits(other, crop) != wanted).any()))
        reached.append(any(seen))
    assert reached[halo] is False
    assert reached[halo - 1] is True


def test_operations_are_counted():
    stages = LISTS["convolution and shuffle, twice (SRResNet)"]
    by_hand = 2 * (2 * 4 * 27 + 4 * 24 * 27 + 8 * 3 * 16 * 27 + 64 * 2 * 27)
    assert stages.operations(10) == 10 * by_hand


def test_grids_parts_and_values_of_a_box_are_counted():
    stages = LISTS["convolution and shuffle, twice (SRResNet)"]
    assert [grid.shape[0] for grid in stages.grids((5, 6, 7))] == [5, 5, 5, 10, 10, 20, 20]
    window, box = (8, 8, 8), Box((0, 8, 8), (4, 12, 12))
    parts = stages.parts(box, window)
    along_y = [(-1, 6), (0, 5), (1, 4), (2, 8), (3, 7), (7, 13), (8, 12)]  # from the output back: one more, or half
    assert [(part.start[1], part.stop[1]) for part in stages.parts(box)] == along_y
    assert [(part.start[0], part.stop[0]) for part in parts] == [(0, 4), (0, 3), (0, 2), (0, 4), (0, 3), (0, 5), (0, 4)]
    assert stages.values(parts)[-1] == 4 * 4 * 4
    assert stages.values(parts)[2] == 24 * parts[2].voxels == 24 * 2 * 3 * 3


def test_whole_cells_need_what_their_outputs_do():
    """The outputs asked for stay as they are; those of the stages before are in whole cells of four."""
    stages = LISTS["nearest by 2, linear by 5/2"]
    needed = stages.needed(17, 18, cell=4)
    assert needed[-1] == (17, 18)
    for (first, last), stage, (out_first, out_last) in zip(needed, stages.stages, needed[1:], strict=False):
        read_first, read_last = stage.reads(out_first, out_last)
        if stage is not stages.stages[0]:
            assert (first % 4, last % 4) == (0, 3)
            assert (first // 4, last // 4) == (read_first // 4, read_last // 4)
        else:
            assert (first, last) == (read_first, read_last)
    assert stages.needed(17, 18) == stages.needed(17, 18, cell=1)


def test_outputs_that_later_stages_add_are_held():
    stages = LISTS["every activation, kernels of 1, 3 and 5"]  # the third adds the outputs of the first two
    assert [stages.added_from(number) for number in range(4)] == [set(), {0}, {0, 1}, set()]
    values = [1, 10, 100, 1000, 10000]
    assert stages.most_held(values, [7, 0, 0, 0]) == 1000  # at the last stage its input
    assert stages.most_held(values, [0, 2000, 0, 0]) == 10 + 2000  # the input is the output that is added later
    assert stages.most_held(values, [0, 0, 2000, 0]) == 10 + 100 + 2000
    assert stages.most_held(values, [5000]) == 1 + 5000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "stages",
    [
        *LISTS.values(),
        LATENT,
        *(trained(s, last=last, width=5).stages() for s, last in (("8/5", "resize"), ("8", "transposed"))),
    ],
    ids=[*LISTS, "transposed of every crop", "8/5", "8, transposed"],
)
def test_memory_is_as_foretold(stages, dtype):
    """What torch takes inside one operation is not measured: masks of a quarter of the logits in fp32."""
    engine = Staged(stages, dtype=dtype)
    window_shape = (8, 8, 8) if stages.scale >= 8 else (12, 16, 12) if stages.scale > 2 else (40, 40, 40)
    shape = stages.grids(window_shape)[-1].shape
    x = window(stages, window_shape).float()
    for crop in (None, tuple(slice(n // 4, 3 * n // 4) for n in shape), tuple(slice(n // 3, n) for n in shape)):
        with Held() as held:
            engine.labels(x.clone(), crop)
        foretold = engine.batch_bytes(window_shape, len(x), crop)
        assert 0.7 * foretold < held.peak_bytes < 1.03 * foretold
    assert engine.batch_bytes(window_shape, 3) == 3 * engine.batch_bytes(window_shape)
