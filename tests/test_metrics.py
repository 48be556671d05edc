"""`hpcres metrics` by Dask: any chunking equals the whole, workers may die, and a study's own figures are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_volumes import plain_counts

from hpcres.counting.lattice import changed_faces, grid_artefact
from hpcres.counting.slices import errors_between, slice_statistics
from hpcres.errors import InputError, Unfinished
from hpcres.geometry import Box
from hpcres.lengths import cubic
from hpcres.metrics.agreement import agreement
from hpcres.metrics.measure import Sampling, Work, count_volume, measure, measure_study
from hpcres.metrics.schedule import block_shape, connect
from hpcres.metrics.subvolumes import positions
from hpcres.study import Study, SubVolumes
from hpcres.volumes.files import write_json
from hpcres.volumes.formats import open_volume
from hpcres.volumes.images import images_by_plane

DATA = Path(os.environ.get("HPCRES_DATA", "no HPCRES_DATA"))
real = pytest.mark.skipif(not (DATA / "electrode.tiff").exists(), reason="needs $HPCRES_DATA")


@pytest.fixture(scope="module")
def client():
    with connect(threads=2) as local:
        yield local


def test_sides_that_meet_have_faces_and_edges_between_them(client, tmp_path):
    """Two slabs normal to z part once inside and once around; three sectors of a ring meet there in lines."""
    a = np.zeros((4, 6, 8), np.uint8)
    a[2:] = 1
    np.save(tmp_path / "a.npy", a)
    volume = open_volume(tmp_path / "a.npy")
    for block in ((4, 6, 8), (3, 2, 5), (1, 1, 1)):
        found = {
            periodic: measure(volume, Work(client, block=block, progress=False), periodic=periodic)
            for periodic in ((False, False, False), (True, False, False), (False, True, True))
        }
        faces = [one["counts"]["faces"]["0|1"] for one in found.values()]
        assert faces == [[48, 0, 0], [96, 0, 0], [48, 0, 0]]
        assert [one["counts"]["all_faces"] for one in found.values()] == [
            [3 * 48, 5 * 32, 7 * 24],
            [4 * 48, 5 * 32, 7 * 24],
            [3 * 48, 6 * 32, 8 * 24],
        ]
        assert found[False, True, True]["periodic"] == ["y", "x"]


def test_every_voxel_is_read_once(client, tmp_path, monkeypatch):
    from hpcres.metrics import measure as module

    np.save(tmp_path / "a.npy", np.zeros((12, 13, 14), np.uint8))
    reads = np.zeros((12, 13, 14), int)
    inner = module._count_inner

    def counting(box, *rest):
        reads[box.slices] += 1
        return inner(box, *rest)

    monkeypatch.setattr(module, "_count_inner", lambda box, **fixed: counting(box, fixed["source"], fixed["labels"]))
    measure(open_volume(tmp_path / "a.npy"), Work(client, block=(5, 4, 6), progress=False))
    assert (reads == 1).all()


# ---- the Dask schedule -------------------------------------------------------------------------------------


def numbers(result: dict) -> dict:
    return {k: v for k, v in result.items() if k not in ("path", "provenance")}


@real
def test_the_electrode_has_its_published_numbers_for_any_chunking(client):
    volume = open_volume(DATA / "electrode.tiff")
    whole = measure(volume, Work(client, progress=False))
    fractions = [round(v, 6) for v in whole["volume_fraction"].values()]
    assert list(whole["volume_fraction"]) == ["0", "85", "170"]
    surfaces = [round(v, 6) for v in whole["specific_surface_area"]["faces"].values()]
    assert surfaces == [0.306837, 0.146105, 0.342226]
    assert fractions == [0.449917, 0.400466, 0.149616]
    truth = plain_counts(volume.read(Box.whole(volume.shape)))
    assert whole["counts"]["faces"] == {f"{a}|{b}": list(v) for (a, b), v in truth.faces.items()}
    assert whole["counts"]["edges"] == {"0|85|170": list(truth.edges[0, 85, 170])}
    assert whole["interphase_area"]["0|170"] == sum(truth.faces[0, 170]) / sum(truth.all_faces)
    assert whole["tpb"]["normalised"] == sum(truth.edges[0, 85, 170]) / sum(truth.all_edges)
    for block in ((100, 130, 256), (256, 31, 77)):
        assert measure(volume, Work(client, block=block, progress=False)) == whole


def test_units_and_voxel_size_reach_the_numbers(client, tmp_path):
    a = np.zeros((4, 4, 4), np.uint8)
    a[:2] = 1
    np.save(tmp_path / "a.npy", a)
    study = small_study(tmp_path)
    found = measure(
        open_volume(tmp_path / "a.npy"),
        Work(client, progress=False),
        phases=("pore", "solid"),
        voxel_size=cubic(study.high_res.voxel_size),
    )
    assert found["specific_surface_area"]["unit"] == "1/micrometer"
    assert found["specific_surface_area"]["faces"]["pore"] == pytest.approx(1 / (4 * 0.065), rel=1e-12)
    assert found["voxel_size"] == [65.0] * 3
    assert found["voxel_unit"] == "nanometer"


def test_blocks_that_cannot_be_read_are_listed_and_nothing_is_returned(client, tmp_path):
    from hpcres.volumes.stores import LabelStore, Layout

    store = LabelStore.create(
        tmp_path / "half.zarr",
        Layout((32, 16, 16), (16, 16, 16), 16),
        voxel_size=1.0,
        unit="voxel",
        phases=("a", "b"),
        provenance={},
    )
    store.write(0, Box((0, 0, 0), (16, 16, 16)), np.zeros((16, 16, 16), np.uint8))
    with pytest.raises(Unfinished, match=r"z 16:32 y 0:16 x 0:16.*never written"):
        measure(open_volume(tmp_path / "half.zarr"), Work(client, block=(16, 16, 16), progress=False))


def test_an_unknown_label_names_itself(client, tmp_path):
    np.save(tmp_path / "a.npy", np.full((4, 4, 4), 9, np.uint8))
    with pytest.raises(InputError, match="label 9"):
        measure(open_volume(tmp_path / "a.npy"), Work(client, progress=False), phases=("pore", "solid"))


def test_a_scheduler_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such scheduler file"), connect(str(tmp_path / "none.json")):
        pass


def test_a_running_scheduler_gives_the_same_numbers_by_address_and_by_file(client, tmp_path):
    """Worker processes of their own, which open the volume by its path."""
    from distributed import LocalCluster

    a = np.random.default_rng(9).integers(0, 3, (20, 24, 28)).astype(np.uint8)
    np.save(tmp_path / "a.npy", a)
    volume, cubes = open_volume(tmp_path / "a.npy"), SubVolumes(count=3, voxels=8)
    here = measure(volume, Work(client, progress=False), sampling=Sampling(cubes))
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        (tmp_path / "scheduler.json").write_text(json.dumps(cluster.scheduler.identity(), default=str))
        for address in (cluster.scheduler_address, str(tmp_path / "scheduler.json")):
            with connect(address) as remote:
                assert measure(volume, Work(remote, block=(7, 24, 9), progress=False), sampling=Sampling(cubes)) == here


@contextmanager
def dask_cluster(folder: Path, workers: int, *options: str):
    """(scheduler file, processes by name) as a user starts them from a shell; killed on the way out."""
    file = folder / "cluster.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = [sys.executable, "-m", "dask", "scheduler", "--no-dashboard", "--scheduler-file", str(file)]
    worker = [sys.executable, "-m", "dask", "worker", "--no-dashboard", "--scheduler-file", str(file), *options]
    started = {}
    try:
        started["scheduler"] = subprocess.Popen([*scheduler, "--host", "127.0.0.1", "--port", "0"], **quiet)
        for name in (f"w{k}" for k in range(workers)):
            started[name] = subprocess.Popen(
                [*worker, "--name", name, "--no-nanny", "--nthreads", "1", "--local-directory", str(folder)], **quiet
            )
        while not file.exists():
            assert started["scheduler"].poll() is None
            time.sleep(0.05)
        yield file, started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def test_a_worker_killed_in_mid_run_costs_a_retry_and_not_a_digit(client, tmp_path):
    a = np.random.default_rng(11).integers(0, 3, (96, 64, 80)).astype(np.uint8)
    np.save(tmp_path / "a.npy", a)
    volume, killed = open_volume(tmp_path / "a.npy"), []
    with dask_cluster(tmp_path, 2) as (file, started), connect(str(file)) as remote:
        remote.wait_for_workers(2, timeout=60)
        addresses = {worker["name"]: place for place, worker in remote.scheduler_info()["workers"].items()}

        def kill_a_worker_that_holds_results():
            while not remote.has_what([addresses["w0"]])[addresses["w0"]]:
                time.sleep(0.01)
            started["w0"].send_signal(signal.SIGKILL)
            killed.append(remote.processing([addresses["w0"]])[addresses["w0"]])

        killer = threading.Thread(target=kill_a_worker_that_holds_results, daemon=True)
        killer.start()
        found = count_volume(volume, client=remote, block=(12, 8, 16), progress=False)
        killer.join(timeout=10)
        assert started["w0"].wait(timeout=10) == -signal.SIGKILL
        assert killed[0], "the worker had nothing left to do: kill it sooner"
        assert len(remote.scheduler_info()["workers"]) == 1
    assert found == count_volume(volume, client=client, progress=False) == plain_counts(a)


WAITS = "open('counting', 'w'), time.sleep(60)"


@contextmanager
def metrics_whose_workers(act: str, folder: Path, workers: int, monkeypatch, *options: str):
    """(hpcres metrics, scheduler file, processes by name); a worker that counts a block does `act` instead."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (folder / "preload.py").write_text(
        "import os, time\nfrom hpcres.counting import counts\n"
        f"os.chdir({str(folder)!r})\ncounts.count_inner = lambda *_: ({act})\n"
    )
    np.save(folder / "a.npy", np.zeros((8, 8, 8), np.uint8))
    with dask_cluster(folder, workers, "--preload", str(folder / "preload.py")) as (file, started):
        command = [sys.executable, "-m", "hpcres", "metrics", "a.npy", "--scheduler", str(file), "--output", "m.json"]
        yield (
            subprocess.Popen(
                [*command, *options], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ),
            file,
            started,
        )


def wait_until_counting(run: subprocess.Popen, folder: Path) -> None:
    while not (folder / "counting").exists():
        assert run.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("dies", ["worker", "scheduler"])
def test_workers_that_keep_dying_and_a_lost_scheduler_end_the_command_with_one_line(tmp_path, monkeypatch, dies):
    """Every worker that counts a block is killed in the act; or it waits there until the scheduler is killed."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "1")
    act = "os.kill(os.getpid(), 9)" if dies == "worker" else WAITS
    with metrics_whose_workers(act, tmp_path, 2, monkeypatch) as (run, _, started):
        if dies == "scheduler":
            wait_until_counting(run, tmp_path)
            started["scheduler"].kill()
        said = run.communicate(timeout=100)
    assert (run.returncode, said[0], said[1].count("\n")) == (3, "", 1), said
    assert ("killed 2 workers" if dies == "worker" else "scheduler is lost") in said[1]
    assert not list(tmp_path.glob("*m.json*"))


def test_a_run_whose_workers_are_all_gone_says_so_and_ends(tmp_path, monkeypatch):
    """The only worker is killed while it counts, and nothing starts another: a line, then the end after 4 seconds."""
    with metrics_whose_workers(WAITS, tmp_path, 1, monkeypatch, "--worker-wait", "4") as (run, file, started):
        wait_until_counting(run, tmp_path)
        started["w0"].kill()
        first, last = run.communicate(timeout=60)[1].splitlines()
    assert "no worker is left, waited " in first
    assert f"dask worker --scheduler-file {file}" in first
    assert run.returncode == 3
    assert "no worker for 4 s; nothing is written: start some" in last
    assert not list(tmp_path.glob("*m.json*"))


def test_blocks_are_whole_chunks_of_bounded_size():
    assert block_shape((2000, 2000, 2000), (128, 128, 128), 2**26) == (512, 512, 256)
    assert block_shape((256, 256, 256), (1, 256, 256), 2**21) == (32, 256, 256)
    assert block_shape((10, 10, 10), (64, 64, 64), 2**26) == (10, 10, 10)
    assert np.prod(block_shape((3000, 3000, 3000), (3000, 3000, 3000), 2**26)) <= 2**26


def test_subvolumes_measure_the_cubes_they_name(client, tmp_path):
    a = np.random.default_rng(3).integers(0, 3, (40, 30, 50)).astype(np.uint8)
    np.save(tmp_path / "a.npy", a)
    cubes = SubVolumes(count=12, voxels=16)
    volume = open_volume(tmp_path / "a.npy")
    found = measure(volume, Work(client, progress=False), sampling=Sampling(cubes, 5))["subvolumes"]
    assert found["starts"] == [list(p) for p in positions(5, a.shape, 12, 16)]
    assert len({tuple(s) for s in found["starts"]}) > 6
    for place, (z, y, x) in enumerate(found["starts"]):
        cube = a[z : z + 16, y : y + 16, x : x + 16]
        assert cube.shape == (16, 16, 16)
        truth = plain_counts(cube)
        assert found["volume_fraction"]["1"]["values"][place] == np.mean(cube == 1)
        assert found["tpb_normalised"]["values"][place] == sum(truth.edges[0, 1, 2]) / sum(truth.all_edges)
        assert found["interphase_area"]["0|2"]["values"][place] == sum(truth.faces[0, 2]) / sum(truth.all_faces)
    values = found["volume_fraction"]["1"]
    assert values["mean"] == pytest.approx(np.mean(values["values"]))
    assert values["std"] == pytest.approx(np.std(values["values"], ddof=1))
    small = measure(volume, Work(client, progress=False), sampling=Sampling(SubVolumes(count=2, voxels=64)))
    assert "do not fit" in small["subvolumes"]["skipped"]


def test_subvolume_transport_has_zero_diffusivity_where_nothing_percolates(client, tmp_path):
    a = np.zeros((16, 16, 16), np.uint8)
    a[:, :, 8] = 1  # a wall normal to x
    np.save(tmp_path / "a.npy", a)
    found = measure(
        open_volume(tmp_path / "a.npy"),
        Work(client, progress=False),
        sampling=Sampling(SubVolumes(count=1, voxels=16, transport_count=1)),
    )["subvolumes"]["transport"]
    assert found["0"]["x"]["D_rel"]["values"] == [0.0]
    assert found["0"]["x"]["percolating"] == 0
    assert found["0"]["x"]["tau"]["mean"] is None
    assert found["0"]["z"]["tau"]["mean"] == pytest.approx(1.0, abs=1e-3)
    assert found["1"]["y"]["D_rel"]["mean"] == pytest.approx(1 / 16, rel=1e-3)


# ---- a study: reference, images, low-res agreement ---------------------------------------------------------


def small_study(folder: Path, **more) -> Study:
    return Study.model_validate(
        {
            "name": "t",
            "scale_factor": more.pop("scale", 2),
            "output": str(folder / "out"),
            "high_res": {
                "phases": {0: "pore", 128: "solid", 255: "binder"},
                "voxel_size": "65 nm",
                "images": [{"path": str(folder / "slice.npy")}],
            },
            "low_res": {"path": str(folder / "low.npy"), "phases": {5: ["pore", "binder"], 9: "solid"}},
            "imaging": {"operator": "under-sampled"},
            **more,
        }
    )


@pytest.mark.parametrize("scale", ["2", "8/5", "16/3"])
@pytest.mark.parametrize(
    "imaging",
    [
        {"operator": "under-sampled"},
        # A wide kernel: with the default one a low-res voxel hardly sees beyond its own extent.
        {"operator": "under-resolved", "kernel_voxels": 9, "sigma_voxels": 3.0},
    ],
)
def test_agreement_by_blocks_is_that_of_the_whole_volume(client, tmp_path, monkeypatch, scale, imaging):
    from hpcres.geometry import high_res_shape
    from hpcres.imaging import ImagingOperator, one_hot
    from hpcres.metrics import agreement as module

    monkeypatch.setattr(module, "_BLOCK_HIGH_RES", 16)  # many blocks in a small volume
    study = small_study(tmp_path, scale=scale, imaging=imaging)
    rng = np.random.default_rng(2)
    low = rng.choice(np.array([5, 9], np.uint8), (13, 12, 9))
    # Blobs rather than white noise: the answer must not hang on rounding.
    coarse = rng.integers(0, 3, tuple(-(-n // 4) for n in high_res_shape(low.shape, study.scale_factor)))
    sharp = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    sharp = sharp[tuple(slice(n) for n in high_res_shape(low.shape, study.scale_factor))]
    np.save(tmp_path / "low.npy", low)
    np.save(tmp_path / "sharp.npy", sharp)
    imaged = ImagingOperator(study.scale_factor, [[0, 2], [1]], study.imaging)(
        one_hot(torch.from_numpy(sharp.astype(np.int64))[None], 3)
    )[0].argmax(0)
    given = (low == 9)[tuple(slice(n) for n in imaged.shape)]
    found = agreement(
        study, open_volume(tmp_path / "low.npy"), open_volume(tmp_path / "sharp.npy"), client=client, progress=False
    )
    assert found["agreement"] == np.mean(imaged.numpy() == given)
    assert found["voxels_compared"] == imaged.numel()
    assert found["phases"] == ["pore + binder", "solid"]
    assert found["of_volume"]["solid"] == imaged.float().mean().item() or found["of_volume"]["solid"] == np.mean(
        imaged.numpy()
    )
    p = study.scale_factor.numerator
    compared = sharp[tuple(slice(int(n * study.scale_factor) + 1) for n in imaged.shape)]
    for axis, name in enumerate("zyx"):
        inside = [slice(int(n * study.scale_factor)) for n in imaged.shape]
        inside[axis] = slice(None)
        turned = np.moveaxis(compared[tuple(inside)], axis, 0)
        shares = [
            np.mean([np.mean(turned[i - 1] != turned[i]) for i in range(1, len(turned)) if i % p == k])
            for k in range(p)
        ]
        assert found["changed_faces"][name] == pytest.approx(shares)


def test_what_the_low_res_lattice_leaves_in_a_volume(client, tmp_path):
    """Copied low-res voxels change at their own borders only; a volume that knows no lattice is flat."""
    study = small_study(tmp_path, scale=4)
    low = np.random.default_rng(0).choice(np.array([5, 9], np.uint8), (12, 12, 12))
    np.save(tmp_path / "low.npy", low)
    copied = (low == 9).astype(np.uint8).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    free = np.random.default_rng(1).integers(0, 3, copied.shape, np.uint8)
    found = []
    for name, sharp in (("copied", copied), ("free", free)):
        np.save(tmp_path / f"{name}.npy", sharp)
        volumes = open_volume(tmp_path / "low.npy"), open_volume(tmp_path / f"{name}.npy")
        found.append(agreement(study, *volumes, client=client, progress=False))
    assert found[0]["agreement"] == 1
    for axis, name in enumerate("zyx"):
        differ = np.mean(np.diff(low.astype(int), axis=axis) != 0)
        assert found[0]["changed_faces"][name] == pytest.approx([differ, 0, 0, 0])
        assert found[1]["changed_faces"][name] == pytest.approx([2 / 3] * 4, abs=0.02)
    assert found[0]["grid_artefact"] == pytest.approx(3)
    assert found[1]["grid_artefact"] < 0.02
    # Three faces for a period of 16: nothing is said of positions that have none. One voxel has no face at all.
    every_other = np.indices((4, 4, 4)).sum(0) % 2
    for volume in (every_other, every_other[:1, :1, :1], np.zeros((4, 4, 4))):
        assert grid_artefact(*changed_faces(volume, Box.whole(volume.shape), 16)) == 0


@pytest.mark.parametrize("isotropic", [True, False])
def test_appearance_is_that_of_all_slices_of_the_cubes(client, tmp_path, monkeypatch, isotropic):
    from hpcres.metrics import appearance as module

    monkeypatch.setattr(module, "_EDGE", 20)
    monkeypatch.setattr(module, "_CUBES", 3)
    image = np.random.default_rng(0).integers(0, 3, (2, 64, 70), np.uint8)
    image[:, 1:] = np.where(np.random.default_rng(1).random(image[:, 1:].shape) < 0.7, image[:, :-1], image[:, 1:])
    np.save(tmp_path / "slice.npy", np.array([0, 128, 255], np.uint8)[image])
    images = [{"path": str(tmp_path / "slice.npy"), "planes": ["zx", "yx", "yz"]}]
    base = small_study(tmp_path).high_res
    high_res = base.model_validate(base.model_dump() | {"images": images, "isotropic": isotropic})
    labels = np.random.default_rng(2).integers(0, 3, (20, 40, 80), np.uint8)
    np.save(tmp_path / "volume.npy", labels)
    by_plane = images_by_plane(high_res)
    assert {p: [s.shape for s in stacks] for p, stacks in by_plane.items()} == (
        {"all": [(2, 64, 70)]} if isotropic else {"yx": [(2, 64, 70)], "zx": [(2, 64, 70)], "zy": [(2, 70, 64)]}
    )
    seen = {plane: slice_statistics(stacks, 3) for plane, stacks in by_plane.items()}
    found = module.appearance(open_volume(tmp_path / "volume.npy"), high_res, seen, client=client, progress=False)
    assert (found["cubes"], found["edge"]) == (3, 20)
    cubes = [labels[:, y : y + 20, x : x + 20] for y, x in ((0, 20), (20, 0), (20, 40))]  # 1, 4 and 6 of 8
    for plane, entry in found["planes"].items():
        axes = range(3) if isotropic else ["yx zx zy".split().index(plane)]
        whole = slice_statistics([np.moveaxis(cube, axis, 0) for cube in cubes for axis in axes], 3)
        assert entry["errors"] == errors_between(whole, seen[plane], isotropic)
        assert entry["volume_fraction"]["binder"] == np.mean([cube == 2 for cube in cubes])
    shown = module.appearance_of_images(high_res)
    assert all(len(v) == 4 and min(v) >= 0 for v in shown[plane]["quarters"].values())
    assert shown[plane]["volume_fraction"]["pore"] == np.mean(image == 0)
    down = np.mean(np.sort([image[:, 1:].ravel(), image[:, :-1].ravel()], 0).T == [0, 1], axis=1)
    assert shown["all" if isotropic else "yx"]["interphase_area"]["pore|solid"][0] == np.mean(down == 1)
    quarters = [image[:, a : a + 32, b : b + 35] for a in (0, 32) for b in (0, 35)]
    one, whole = (np.bincount(part.ravel()) / part.size for part in (quarters[0], image))
    assert shown[plane]["quarters"]["fraction_error"][0] == pytest.approx(np.abs(one - whole).max())


def test_a_study_measures_volume_reference_images_and_agreement(client, tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (24, 24, 24)).astype(np.uint8)
    sharp = truth.copy()
    sharp[0, 0, :5] = (sharp[0, 0, :5] + 1) % 3
    np.save(tmp_path / "truth.npy", truth)
    np.save(tmp_path / "sharp.npy", sharp)
    np.save(tmp_path / "low.npy", np.where(truth[::2, ::2, ::2] == 1, 9, 5).astype(np.uint8))
    image = rng.integers(0, 3, (2, 64, 70))
    np.save(tmp_path / "slice.npy", np.array([0, 128, 255], np.uint8)[image])
    study = small_study(
        tmp_path,
        reference={
            "volume": str(tmp_path / "truth.npy"),
            "published": [{"metric": "tpb_normalised", "value": 0.01, "source": "someone"}],
        },
        metrics={"subvolumes": {"count": 3, "voxels": 8}},
    )
    found = measure_study(study, open_volume(tmp_path / "sharp.npy"), client=client, progress=False)
    assert found["volume"]["volume_fraction"]["pore"] == np.mean(sharp == 0)
    assert found["reference"]["volume_fraction"]["pore"] == np.mean(truth == 0)
    assert found["reference"]["subvolumes"]["starts"] == found["volume"]["subvolumes"]["starts"]
    assert found["published"][0]["value"] == 0.01
    wrong = np.count_nonzero((sharp[::2, ::2, ::2] == 1) != (truth[::2, ::2, ::2] == 1))
    assert wrong > 0
    assert found["low_res"]["agreement"] == 1 - wrong / 12**3
    slices = [plain_counts(one[None]) for one in image]
    assert found["images"]["volume_fraction"]["solid"] == np.mean(image == 1)
    assert found["images"]["interphase_area"]["pore|binder"] == sum(sum(c.faces[0, 2]) for c in slices) / sum(
        sum(c.all_faces) for c in slices
    )
    # An isotropic volume has three families of faces where its slice shows two.
    boundary = sum(sum(n) for c in slices for pair, n in c.faces.items() if 2 in pair)
    surface = found["images"]["specific_surface_area"]["faces"]["binder"]
    assert surface == pytest.approx(1.5 * boundary / image.size / 0.065, rel=1e-12)
    assert found["images"]["tpb"]["normalised"] == sum(sum(c.edges[0, 1, 2]) for c in slices) / (2 * 63 * 69)
    write_json(tmp_path / "metrics.json", found)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(found))


def test_a_volume_of_another_size_than_the_low_res_makes_is_refused(client, tmp_path):
    np.save(tmp_path / "sharp.npy", np.zeros((20, 20, 21), np.uint8))
    np.save(tmp_path / "low.npy", np.full((10, 10, 10), 5, np.uint8))
    study = small_study(tmp_path)
    with pytest.raises(InputError, match="makes"):
        agreement(
            study, open_volume(tmp_path / "low.npy"), open_volume(tmp_path / "sharp.npy"), client=client, progress=False
        )


def test_the_threads_of_a_local_client_are_not_profiled(monkeypatch):
    """CPython 3.11 can wait for itself in sys._current_frames, which Dask's profiler calls every ten milliseconds."""
    from hpcres.metrics.schedule import local_client

    called = []
    plain = sys._current_frames
    monkeypatch.setattr(sys, "_current_frames", lambda: called.append(1) or plain())
    with local_client(1) as client:
        client.submit(time.sleep, 0.3).result()
    assert not called
