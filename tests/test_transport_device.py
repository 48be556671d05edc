"""Transport on a torch device against the solver on the cores: the same iterations, D_rel and fields.

On the CPU device, and on a GPU too where there is one.
"""

from __future__ import annotations

import sys
import weakref

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from small_painting import command, mpirun
from test_transport import direct
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcres.cli import main
from hpcres.errors import InputError
from hpcres.transport import Conducting, FieldStore, Means, SolveSettings, device_levels, tortuosity
from hpcres.transport import device as module
from hpcres.transport.device import DeviceSystem, check_device_memory
from hpcres.transport.device_window import Window
from hpcres.transport.in_memory import solve, solve_phase
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import Medium, pack
from hpcres.volumes.formats import open_volume

DEVICES = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(min(1, torch.cuda.device_count())))]
INSULATED = (False, False, False)


@pytest.fixture(params=DEVICES, ids=str)
def device(request, monkeypatch) -> torch.device:
    """Small volumes in many pieces, and cycles over several levels above the matrix."""
    monkeypatch.setattr(module, "LEAST_PIECE", 1 << 11)
    monkeypatch.setattr(device_levels, "MATRIX", 60)
    return request.param


def blobs(edge: int, share: float, sigma: float = 2.5) -> np.ndarray:
    field = gaussian_filter(np.random.default_rng(1).random((edge,) * 3, np.float32), sigma, mode="wrap")
    return (field < np.quantile(field, share)).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "conductivity", "voxel_size", "periodic"),
    [
        ((40, 42, 44), {1: 1.0}, (1, 1, 1), INSULATED),
        ((41, 33, 27), {1: 1.0, 2: 1.0}, (1, 3, 2), INSULATED),  # odd sizes
        ((30, 22, 26), {1: 1.0, 2: 1.0}, (1, 1, 1), (True, True, True)),  # odd numbers of cells
        ((15, 22, 27), {1: 1.0, 2: 1.0}, (2, 1, 1), (True, False, True)),  # twice over
        ((31, 34, 26), {1: 1.0, 2: 0.1}, (1, 2, 1), (True, False, True)),
        ((18, 24, 33), {0: 0.01, 1: 1.0, 2: 3.0}, (1, 1, 1), INSULATED),
        ((4, 70, 5), {1: 1.0, 2: 1.0}, (1, 1, 1), (False, True, False)),
        ((20, 23, 26), {1: 1.0, 2: 1.0}, (25, 1, 1), (True, False, True)),
        ((20, 22, 26), {1: 1.0, 2: 1e-5}, (1, 1, 1), INSULATED),  # cells with parts apart
        ((20, 22, 27), {0: 1e-9, 1: 1.0, 2: 1e-3}, (1, 30, 1), (True, True, False)),  # in float64
    ],
)
def test_device_takes_the_iterations_of_the_cores_and_finds_their_field(
    device, shape, conductivity, voxel_size, periodic
):
    labels = np.random.default_rng(sum(shape)).choice(3, shape, p=[0.35, 0.6, 0.05]).astype(np.uint8)
    fields: list[list] = [[], []]
    found = [
        solve(
            labels,
            conductivity,
            SolveSettings(voxel_size=voxel_size, periodic=periodic, profile=True, rtol=1e-4),
            device=where,
            keep=lambda direction, system, x, k, to=to: to.append(sum(x) if isinstance(x, tuple) else x),
        )
        for to, where in zip(fields, (None, device), strict=True)
    ]
    for direction in "zyx":
        cores, ours = (one[direction] for one in found)
        assert cores.state == "converged"
        assert ours.iterations == cores.iterations
        assert ours.D_rel == pytest.approx(cores.D_rel, rel=1e-6)
        assert ours.error == pytest.approx(cores.error, rel=0.05)
        assert ours.profile == pytest.approx(cores.profile, rel=1e-3)
    for x, y in zip(*fields, strict=True):
        assert y == pytest.approx(x, abs=2e-4)


@pytest.mark.parametrize("conductivity", [{1: 1.0, 2: 1.0}, {1: 1.0, 2: 0.1}])
def test_device_matches_a_direct_solve(device, conductivity):
    labels = np.random.default_rng(7).integers(0, 3, (13, 14, 17)).astype(np.uint8)
    found = solve(labels, conductivity, SolveSettings(rtol=1e-6, voxel_size=(1, 2, 1)), device=device)
    for axis, direction in enumerate("zyx"):
        assert found[direction].D_rel == pytest.approx(direct(labels, conductivity, axis, (1, 2, 1)), rel=3e-6)


def test_closed_forms_on_the_device(device):
    for solution in solve_phase(
        np.ones((5, 33, 17), bool), SolveSettings(voxel_size=(1, 5, 2)), device=device
    ).values():
        assert solution.tau == pytest.approx(1.0, abs=1e-6)
    labels = np.zeros((12, 10, 8), np.uint8)
    labels[3:7], labels[7:] = 1, 2
    k = {0: 1.0, 1: 0.1, 2: 5.0}
    found = solve(labels, k, SolveSettings(rtol=1e-6), device=device)
    assert found["z"].D_rel == pytest.approx(1 / (3 / 12 + 4 / 12 / 0.1 + 5 / 12 / 5), rel=3e-6)
    assert found["x"].D_rel == pytest.approx(3 / 12 + 4 / 12 * 0.1 + 5 / 12 * 5, rel=3e-6)
    n = 20  # a slanted strip, three voxels a row: a chain of resistors (see test_transport)
    mask = np.zeros((n, 2 * n, 2), bool)
    for i in range(n):
        mask[i, np.arange(2 * i, 2 * i + 3) % (2 * n)] = True
    one = solve_phase(mask, SolveSettings(directions="z", periodic=(False, True, False), rtol=1e-6), device=device)["z"]
    assert one.tau == pytest.approx(3 * (55 + 2 * 11 / 30) / 20, rel=1e-5)
    mask = np.indices((6, 7, 8)).sum(0) % 2 == 0
    assert solve_phase(mask, SolveSettings(directions="z"), device=device)["z"].state == "not percolating"


def test_the_matrix_may_be_all_of_a_cycle_or_nothing(device, monkeypatch):
    labels = np.random.default_rng(3).integers(0, 2, (14, 16, 18)).astype(np.uint8)
    labels[:, ::2] = 1
    cores = solve(labels, {1: 1.0}, SolveSettings(directions="z"))["z"]
    for parts in (0, 10**4):
        monkeypatch.setattr(device_levels, "MATRIX", parts)
        ours = solve(labels, {1: 1.0}, SolveSettings(directions="z"), device=device)["z"]
        assert (ours.iterations, ours.D_rel) == (cores.iterations, pytest.approx(cores.D_rel, rel=1e-6))
    mask = np.zeros((6, 38, 38), bool)
    mask[:, ::2, ::2] = True  # 361 channels stay apart: the lowest level has no inverse
    for parts in (0, 400):
        monkeypatch.setattr(device_levels, "MATRIX", parts)
        assert solve_phase(mask, SolveSettings(directions="z"), device=device)["z"].D_rel == pytest.approx(
            0.25, rel=1e-6
        )


def test_fields_from_the_device_are_those_of_the_cores(device, tmp_path):
    import zarr

    np.save(tmp_path / "a.npy", np.random.default_rng(10).integers(0, 3, (20, 18, 22)).astype(np.uint8))
    stores = []
    for where in (None, device):
        stores.append(tmp_path / f"{where}.zarr")
        tortuosity(
            open_volume(tmp_path / "a.npy"),
            conducting=Conducting(conductivity={"0": 1.0, "1": 0.2}),
            settings=SolveSettings(directions="y"),
            means=Means(device=where),
            field=FieldStore(str(stores[-1])),
        )
    for name in ("potential", "flux"):
        cores, ours = (np.asarray(zarr.open_array(store / "0 + 1" / "y" / name)) for store in stores)
        assert ours == pytest.approx(cores, abs=1e-4, nan_ok=True)


class Watch(TorchDispatchMode):
    """Bytes of all live tensors at the most, the calls of each operation, kinds of indices, devices of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.most = 0
        self.calls: dict[str, int] = {}
        self.indices: set[torch.dtype] = set()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        if name in ("index", "index_put_"):
            self.indices |= {i.dtype for i in args[1] if i is not None}
        self.devices |= {a.device.type for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if storage.nbytes() and place not in self.live:
                    self.live[place] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, place)
        return out

    def _freed(self, place: int) -> None:
        self.now -= self.live.pop(place)


@pytest.mark.parametrize(("share", "several"), [(0.45, False), (0.4, True)])
def test_device_holds_at_most_16_bytes_a_voxel_and_waits_only_for_scalars(monkeypatch, share, several):
    monkeypatch.setattr(module, "LEAST_PIECE", 1 << 11)
    monkeypatch.setattr(module, "PIECES", 36)  # margins are a larger share of small pieces
    labels = blobs(96, share)
    labels[(labels == 1) & (np.random.default_rng(2).random(labels.shape) < 0.3)] = 2 if several else 1
    held = []
    monkeypatch.setattr(
        DeviceSystem, "bytes", property(lambda self, of=DeviceSystem.bytes.fget: (held.append(self.held), of(self))[1])
    )
    with Watch() as watch:
        k = {1: 1.0, 2: 0.2} if several else {1: 1.0}
        one = solve(labels, k, SolveSettings(directions="z", rtol=0.01), device=torch.device("cpu"))["z"]
    assert one.state == "converged"
    assert held[0] < watch.most <= one.bytes
    assert watch.most <= 16 * labels.size
    assert watch.indices == {torch.int64}
    # r · z and p · A p; the energy, twice; r · z once more for the bound.
    assert watch.calls["_local_scalar_dense"] == 2 * one.iterations + 2 + several
    assert not {"nonzero", "masked_select"} & set(watch.calls)


def test_places_beyond_32_bits():
    seen = []
    mask = np.random.default_rng(4).random((16, 18, 20)) < 0.7
    solve_phase(
        mask,
        SolveSettings(directions="z"),
        device=torch.device("cpu"),
        keep=lambda _, system, x, k: seen.append(system),
    )
    before = Window(seen[0], (4, 12, 6, 18), 3)
    seen[0]._before += 2**33
    after = Window(seen[0], (4, 12, 6, 18), 3)
    assert torch.equal(after.places[after.mask], before.places[before.mask] + 2**33)
    assert (after.places[~after.mask] == seen[0].voxels).all()


@pytest.mark.parametrize("several", [False, True])
def test_passes_use_nothing_of_the_host(monkeypatch, several):
    """On torch's `meta` device, which computes nothing and can hand nothing back."""
    monkeypatch.setattr(module, "LEAST_PIECE", 1 << 11)
    monkeypatch.setattr(device_levels, "MATRIX", 60)
    labels = np.random.default_rng(5).integers(1, 3, (30, 32, 34)).astype(np.uint8)
    resistance = np.array([np.inf, 0.5, 5.0] + [np.inf] * 253, np.float32)
    with Threads(1) as threads:
        bits = pack(labels, np.isfinite(resistance), threads)
        system = DeviceSystem(
            torch.device("meta"),
            bits,
            Medium(labels.shape, (1, 2, 1), 0, (False, True, True), resistance if several else None),
            threads,
            labels if several else None,
        )
        with Watch() as watch:
            x, r, z = (system.vector() for _ in range(3))
            for piece in system._pieces:
                system._subtract_applied(piece, x, 1.0, 1.0, r)
                system._sweep_down(piece, r)
                system._sweep_up(piece, r, z)
                system._heats(piece, x, 1.0)
            system._cycle.run()
    assert len(system._pieces) > 4
    assert watch.devices == {"meta"}


def test_device_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    np.save(tmp_path / "a.npy", np.ones((8, 8, 8), np.uint8))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (
        (["cuda"], "sees 0 CUDA devices"),
        (["cuda:7"], "sees 0 CUDA"),
        (["gpu"], "not a GPU"),
        (["cuda", "--memory", "1GiB"], "drop one"),
    ):
        monkeypatch.setattr(sys, "argv", ["hpcres", "tortuosity", str(tmp_path / "a.npy"), "--device", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        lines = capsys.readouterr().err.strip().splitlines()
        assert (stopped.value.code, len(lines)) == (2, 1)
        assert said in lines[0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 << 30, 10 << 30))
    check_device_memory(torch.device("cuda"), (512,) * 3, 512**3 // 2, False, 29.0)
    with pytest.raises(InputError, match=r"1920 × 1920 × 1920 voxels: needs 9\d.* GiB on cuda, 10.0 GiB are free"):
        check_device_memory(torch.device("cuda"), (1920,) * 3, 1920**3 // 2, False, 29.0)


def test_device_is_refused_on_several_ranks(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((8, 8, 8), np.uint8))
    done = mpirun(2, *command(tmp_path / "a.npy", "tortuosity", "--device", "cuda"))
    assert done.returncode == 2
    assert "--device: is for one process" in done.stderr


def test_running_out_of_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(DeviceSystem, "vector", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(InputError, match=r"cpu: out of memory at .* drop `device`"):
        solve_phase(np.ones((6, 6, 6), bool), device=torch.device("cpu"))
