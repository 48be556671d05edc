"""The folded stages and their polyphase form give what the generator gives, at corners, edges, faces and inside."""

from __future__ import annotations

import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcres.engines import polyphase, polyphase_cells
from hpcres.engines.batches import paint_batches
from hpcres.engines.polyphase import Polyphase
from hpcres.errors import InputError
from hpcres.geometry import plan_tiles
from hpcres.networks.resampling import upsample
from hpcres.networks.stages import Stages
from hpcres.networks.superres import SuperResGenerator

SCALES = ("1", "8/5", "2", "3", "4", "16/3", "8")
CASES = [
    *((s, padding, "resize", 1) for s in SCALES for padding in ("replicate", "zeros")),
    *((s, padding, "transposed", 1) for s in ("2", "4", "8") for padding in ("replicate", "zeros")),
    ("2", "replicate", "resize", 0),
    ("4", "replicate", "resize", 2),
    ("8", "zeros", "transposed", 3),
    ("64/6", "replicate", "resize", 1),
    ("16", "zeros", "transposed", 1),
]


def trained(scale: str, padding: str = "replicate", last: str = "resize", blocks: int = 1, width: int = 3):
    """A generator whose every weight and statistic is off its initial value, in double precision."""
    torch.manual_seed(3)
    width += Fraction(scale) > 8  # or too few channels are left that a ReLU does not silence
    generator = SuperResGenerator(2, 3, Fraction(scale), width, blocks, padding, last).double().eval()
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            for tensor, low, high in (
                (module.running_mean, -0.1, 0.1),
                (module.running_var, 0.5, 2),
                (module.weight, -1, 2),
                (module.bias, -0.2, 0.2),
            ):
                tensor.detach().uniform_(low, high)
    with torch.no_grad():  # every phase about as likely, so that labels tell something
        generator.conv_end.bias -= generator(window((6, 6, 6))).mean((0, 2, 3, 4))
    return generator


def window(shape: tuple[int, int, int], batch: int = 1) -> torch.Tensor:
    """One-hot labels and noise, (batch, 3, z, y, x) in double precision."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, (batch, *shape))
    given = np.stack([labels == 0, labels == 1, rng.standard_normal(labels.shape)], 1)
    return torch.from_numpy(given.astype(np.float64))


def naive(folded: Stages, x: torch.Tensor) -> torch.Tensor:
    """The stages as their description reads."""
    outputs: list[torch.Tensor] = []
    for stage in folded.stages:
        weight, bias = torch.from_numpy(stage.weight), torch.from_numpy(stage.bias)
        if stage.kind == "transposed":
            y = functional.conv_transpose3d(x, weight, bias, stride=2, padding=1)
        else:
            if stage.kind == "resized":
                x = upsample(x, stage.scale)
            mode = "replicate" if stage.padding == "replicate" else "constant"
            y = functional.conv3d(functional.pad(x, (1,) * 6, mode=mode), weight, bias)
        if stage.add_before is not None:
            y = y + outputs[stage.add_before]
        if stage.relu:
            y = y.relu()
        if stage.add_after is not None:
            y = y + outputs[stage.add_after]
        outputs.append(y)
        x = y
    return x


@pytest.mark.parametrize(("scale", "padding", "last", "blocks"), CASES)
def test_folded_stages_are_the_generator(scale, padding, last, blocks):
    generator = trained(scale, padding, last, blocks)
    folded = generator.stages()
    assert (folded.inputs, folded.phases, folded.scale) == (3, 3, generator.scale)
    x = window((4, 5, 6) if generator.scale <= 8 else (2, 3, 2))
    with torch.no_grad():
        expected = generator(x)
    error = (naive(folded, x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-12


def test_folding_does_not_touch_the_generator():
    generator = trained("4")
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    for stage in generator.stages().stages:
        stage.weight[:] = 0
        stage.bias[:] = 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())


@pytest.fixture
def small_slabs(monkeypatch):
    monkeypatch.setitem(polyphase.SLAB_BYTES, "cpu", 1)
    monkeypatch.setattr(polyphase, "_THINNEST_SLAB", 1)


@pytest.mark.parametrize(("scale", "padding", "last", "blocks"), CASES)
@pytest.mark.parametrize("slabs", ["whole", "thin"])
def test_polyphase_is_the_generator_everywhere(scale, padding, last, blocks, slabs, request):
    """Corners, edges, faces and interior of a window: all of it, in double precision."""
    if slabs == "thin":
        request.getfixturevalue("small_slabs")
    generator = trained(scale, padding, last, blocks)
    network = Polyphase(generator.stages(), dtype=torch.float64)
    x = window((4, 5, 6) if generator.scale <= 8 else (2, 3, 2), 2)
    with torch.no_grad():
        expected = generator(x)
    logits = network.logits(x)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 1e-10 * expected.abs().max()
    assert torch.equal(network.labels(x), expected.argmax(1))


@pytest.mark.parametrize(("scale", "padding", "last"), [("8", "zeros", "resize"), ("4", "replicate", "transposed")])
def test_the_layout_for_fp32_on_gpus_gives_the_same(scale, padding, last, monkeypatch):
    monkeypatch.setattr(polyphase_cells, "_layout", lambda device, dtype: torch.contiguous_format)
    generator, x = trained(scale, padding, last), window((3, 5, 4), 2)
    with torch.no_grad():
        expected = generator(x)
    network = Polyphase(generator.stages(), dtype=torch.float64)
    assert (network.logits(x) - expected).abs().max() < 1e-10 * expected.abs().max()
    assert torch.equal(network.labels(x), expected.argmax(1))


@pytest.mark.parametrize("padding", ["replicate", "zeros"])
def test_axes_of_one_voxel(padding):
    """First and last voxel of an axis are one: both faces meet in it."""
    for shape in ((1, 1, 1), (1, 3, 2), (2, 1, 1)):
        generator = trained("8", padding)
        x = window(shape)
        with torch.no_grad():
            expected = generator(x)
        assert (Polyphase(generator.stages(), dtype=torch.float64).logits(x) - expected).abs().max() < 1e-10


@pytest.mark.parametrize(("scale", "padding", "last", "blocks"), CASES)
def test_tiles_with_their_halo_are_the_whole(scale, padding, last, blocks):
    """A crop is computed from no more than the generator's halo, at faces and inside."""
    generator = trained(scale, padding, last, blocks, width=2)
    network = Polyphase(generator.stages(), dtype=torch.float64)
    x = window((9, 12, 16) if generator.scale <= 8 else (1, 2, 9))
    p = generator.scale.numerator
    plan = plan_tiles(x.shape[2:], generator.scale, (1, 2, 3), generator.halo_low_res, p * max(1, 8 // p))
    with torch.no_grad():
        whole = generator(x)
    assert len(plan.tiles) > 1
    for tile in plan.tiles:
        crop = tile.write.relative_to([int(start * generator.scale) for start in tile.read.start])
        part = network.logits(x[(..., *tile.read.slices)], crop.slices)
        assert (part - whole[(..., *tile.write.slices)]).abs().max() < 1e-10


@pytest.mark.parametrize(("scale", "last"), [("4", "resize"), ("8", "transposed"), ("8/5", "resize")])
def test_what_lies_beyond_the_halo_has_no_effect(scale, last):
    """Not even a NaN: it is not read."""
    generator = trained(scale, last=last)
    halo, n = generator.halo_low_res, 10
    x = window((2 * halo + n,) * 3)
    crop = tuple(slice(int((halo + 5) * generator.scale), int((halo + n - 1) * generator.scale)) for _ in range(3))
    network = Polyphase(generator.stages(), dtype=torch.float64)
    expected = network.labels(x, crop)
    x[:, :, :5] = x[..., :5, :] = x[..., :5] = x[:, :, -1:] = x[..., -1:, :] = x[..., -1:] = torch.nan
    assert torch.equal(network.labels(x, crop), expected)


@pytest.mark.parametrize(("scale", "padding", "last"), [("8", "replicate", "resize"), ("4", "zeros", "transposed")])
def test_fp32_labels_flip_as_rarely_as_rounding_makes_them(scale, padding, last):
    generator = trained(scale, padding, last)
    x = window((128 // int(scale),) * 3).float()
    network = Polyphase(generator.stages())
    with torch.no_grad():
        expected = generator.float()(x).argmax(1)
    assert torch.bincount(expected.flatten()).min() > 0.05 * expected.numel()
    assert (network.labels(x) != expected).double().mean() <= 4e-6


def test_ties_go_to_the_lowest_label():
    generator = trained("4")
    with torch.no_grad():
        generator.conv_end.weight[2] = generator.conv_end.weight[1]
        generator.conv_end.bias[2] = generator.conv_end.bias[1]
    labels = Polyphase(generator.stages()).labels(window((5, 5, 5)))
    assert labels.unique().tolist() == [0, 1]


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, torch.inf), (torch.float16, 1e6)])
def test_logits_that_are_not_finite_are_refused(dtype, factor):
    generator = trained("2")
    with torch.no_grad():
        generator.conv_end.bias += factor
    with pytest.raises(InputError, match=f"not finite in {str(dtype)[6:]}.*checkpoint"):
        Polyphase(generator.stages(), dtype=dtype).labels(window((3, 3, 3)))


def test_a_lone_value_that_is_not_finite_is_found(small_slabs):
    x = window((6, 6, 6), 2)
    x[0, 2, 0, 3, 3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        Polyphase(trained("2").stages()).labels(x)


class Held(TorchDispatchMode):
    """The most bytes of tensors alive at a time, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak_bytes = self.largest_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place not in self.alive:
                    self.alive[place] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, place, None)
                    self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
                    self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "last"), [("2", "resize"), ("3", "resize"), ("8", "resize"), ("8", "transposed")])
def test_memory_is_as_foretold(scale, last, dtype, monkeypatch):
    generator = trained(scale, last=last, width=5)
    network = Polyphase(generator.stages(), dtype=dtype)
    edge = int(64 / generator.scale)
    for slab_bytes, batch in ((2**28, 1), (2**28, 3), (2**20, 2)):
        monkeypatch.setitem(polyphase.SLAB_BYTES, "cpu", slab_bytes)
        for crop in (None, (slice(16, 48), slice(16, 40), slice(8, 64))):
            x = window((edge,) * 3, batch)
            with Held() as held:
                network.labels(x, crop)
            foretold = network.batch_bytes(x.shape[2:], batch, crop)
            assert 0.75 * foretold < held.peak_bytes < 1.05 * foretold


def test_no_feature_map_is_of_high_res(monkeypatch):
    """The plain module's widest tensor has the last upsampling's channels in high-res; none here is a sixth of it."""
    monkeypatch.setitem(polyphase.SLAB_BYTES, "cpu", 2**21)
    generator = trained("8", width=5)
    with Held() as held:
        Polyphase(generator.stages()).labels(window((12, 12, 12)))
    assert held.largest_bytes <= 4 * generator.channels_last * 96**3 / 6


def test_largest_batch_fills_the_memory():
    network = Polyphase(trained("4").stages())
    assert network.largest_batch((20, 20, 20), 0) == 1
    for memory in (10**8, 10**9):
        batch = network.largest_batch((20, 20, 20), memory)
        assert network.batch_bytes((20, 20, 20), batch) <= memory < network.batch_bytes((20, 20, 20), batch + 1)


def mixed_windows(count: int):
    """Windows of two shapes and two crops in turn."""
    windows = [x.numpy() for x in window((4, 5, 6), count)]
    windows = [w[:, : 3 + i % 2] for i, w in enumerate(windows)]
    return windows, [(slice(i % 3, 12), slice(4, 8), slice(24)) for i in range(count)]


def test_batches_come_back_in_order():
    network = Polyphase(trained("4").stages())
    windows, crops = mixed_windows(11)
    painted, batch = paint_batches(network, windows, crops, batch=2)
    assert batch == 2
    for one, crop, labels in zip(windows, crops, painted, strict=True):
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, network.labels(torch.from_numpy(one[None]))[0].numpy()[crop])


def torch_out_of_memory() -> RuntimeError:
    """What torch's CPU allocator says itself."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize(
    "shortage",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        torch_out_of_memory(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_out_of_memory_halves_the_batch(shortage, monkeypatch):
    network = Polyphase(trained("4").stages())
    windows, crops = [x.numpy() for x in window((3, 3, 3), 13)], [(slice(12),) * 3] * 13
    expected, _ = paint_batches(network, windows, crops, 13)
    tried, room, labels = [], 3, network.labels

    def short(given, crop):
        tried.append(len(given))
        if len(given) > room:
            raise shortage
        return labels(given, crop)

    monkeypatch.setattr(network, "labels", short)
    painted, batch = paint_batches(network, windows, crops, 13)
    assert (batch, tried) == (3, [13, 6, 3, 3, 3, 3, 1])
    assert all(np.array_equal(a, b) for a, b in zip(painted, expected, strict=True))
    room = 0
    with pytest.raises(InputError, match=r"window of 3x3x3 low-res voxels needs about .* GB in float32, which cpu"):
        paint_batches(network, windows, crops, 2)


def test_other_failures_are_not_taken_for_a_shortage(monkeypatch):
    network = Polyphase(trained("4").stages())

    def broken(given, crop):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(network, "labels", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        paint_batches(network, *mixed_windows(2), batch=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("last", ["resize", "transposed"])
def test_a_gpu_paints_what_the_cpu_paints(last, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folded = trained("8", last=last).stages()
    x = window((16, 16, 16)).float()
    differ = Polyphase(folded, "cuda").labels(x).cpu() != Polyphase(folded).labels(x)
    assert differ.double().mean() <= 4e-6
    for dtype in (torch.bfloat16, torch.float16):
        assert (Polyphase(folded, "cuda", dtype).labels(x).cpu() != Polyphase(folded).labels(x)).double().mean() < 0.05
