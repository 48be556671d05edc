"""Transport over MPI and out of core against the solver in memory: the same bits wherever slabs are cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_painting import command, mpirun

from hpcres.errors import InputError
from hpcres.metrics.table import transport_text
from hpcres.transport import Conducting, FieldStore, Means, SolveSettings, tortuosity
from hpcres.transport.in_memory import solve
from hpcres.transport.scratch import BYTES_OF_PYTHON, ScratchPlace
from hpcres.transport.slab import cut
from hpcres.transport.slabs import VolumeInSlabs, solve_in_slabs
from hpcres.transport.threads import Threads
from hpcres.transport.voxels import planes_of_unit
from hpcres.volumes.formats import open_volume

TINY = 16 << 20


@pytest.fixture
def volume(tmp_path) -> Path:
    """130 planes: slabs of whole units are uneven, and the last one ends with a unit that is not whole."""
    path = tmp_path / "a.npy"
    np.save(path, np.random.default_rng(1).integers(0, 3, (130, 20, 33)).astype(np.uint8))
    return path


@pytest.fixture
def solid(tmp_path) -> Path:
    path = tmp_path / "solid.npy"
    np.save(path, np.ones((130, 40, 40), np.uint8))
    return path


def fields(store: Path) -> list[np.ndarray]:
    import zarr

    group = zarr.open_group(store, mode="r")
    return [np.asarray(group[f"{d}/{name}"]) for d in ("0 + 1/z", "0 + 1/x") for name in ("potential", "flux")]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_find_the_bits_of_one_process_fields_and_profile_included(volume, tmp_path, size):
    """Two write fields, in slabs of whole chunks; four have slabs of 32 and 34 planes."""
    with_fields = size == 2
    assert len({e.end - e.begin for e in cut(130, 4, planes_of_unit(130, 4), False)}) > 1
    poor = 1e-6 if size == 4 else 0.1  # the robust form, too
    conductivity, periodic = {"0": 1.0, "1": poor}, (False, True, False)
    alone = tortuosity(
        open_volume(volume),
        conducting=Conducting(conductivity=conductivity),
        settings=SolveSettings(directions="zx", periodic=periodic, profile=True, rtol=1e-4),
        field=FieldStore(str(tmp_path / "alone.zarr")) if with_fields else None,
    )["results"]
    arguments = ["--conductivity", "0=1", "--conductivity", f"1={poor}", "--direction", "z", "--direction", "x"]
    arguments += ["--periodic", "y", "--profile", "--rtol", "1e-4"]
    arguments += ["--field", str(tmp_path / "together.zarr")] if with_fields else []
    done = mpirun(size, *command(volume, "tortuosity", *arguments, "--output", str(tmp_path / "t.json")))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1 + with_fields  # said by one rank
    together = json.loads((tmp_path / "t.json").read_text())["volume"]["results"]
    for one, other in zip(alone, together, strict=True):
        assert one["D_rel"] == pytest.approx(other["D_rel"], rel=1e-9)
        assert one["profile"] == pytest.approx(other["profile"], rel=1e-6)
        for name in ("state", "iterations", "clusters_left_out", "voxels_left_out", "percolating_fraction"):
            assert one[name] == other[name]
    stores = [fields(tmp_path / f"{name}.zarr") for name in ("alone", "together")] if with_fields else [[], []]
    for ours, theirs in zip(*stores, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_rank_that_fails_ends_the_job(volume, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(
        "import os\nfrom hpcres import cli\nfrom hpcres.transport.slab_solver import SlabSolver\n"
        "start = SlabSolver.start\n"
        "def fails(self, x):\n"
        "    if os.environ['OMPI_COMM_WORLD_RANK'] == '1': raise RuntimeError('gone')\n"
        "    return start(self, x)\n"
        "SlabSolver.start = fails\ncli.main()\n"
    )
    begin = time.monotonic()
    target = tmp_path / "x.json"
    done = mpirun(2, sys.executable, str(script), "tortuosity", str(volume), "--phase", "1", "--output", str(target))
    assert done.returncode == 1
    assert "rank 1 failed" in done.stderr
    assert "gone" in done.stderr
    assert time.monotonic() - begin < 60
    kept = json.loads(target.read_text())["volume"]["results"]  # along z nothing percolates, which takes no solve
    assert [(one["direction"], one["state"]) for one in kept] == [("z", "not percolating")]


def test_what_levels_are_made_of_reaches_one_rank_in_any_number_of_messages(tmp_path):
    script = tmp_path / "gather.py"
    script.write_text(
        "import numpy as np\nfrom mpi4py import MPI\nfrom hpcres.transport import ranked\n"
        "from hpcres.transport.slab import Extent\n"
        "ranked._MESSAGE = 1000\nplace = ranked.RankPlace(MPI.COMM_WORLD, [Extent(0, 8, 0, 8), Extent(8, 16, 8, 0)])\n"
        "mine = [np.arange(n) * (1 + place.rank) for n in (0, 1, 125, 126, 4000)], np.eye(3)[:, 1:], place.rank\n"
        "found = place.to_first([mine])\nassert (found is None) == (place.rank == 1)\n"
        "for rank, (arrays, view, number) in enumerate(found or []):\n"
        "    assert number == rank and np.array_equal(view, np.eye(3)[:, 1:])\n"
        "    assert all(np.array_equal(a, np.arange(len(a)) * (1 + rank)) for a in arrays), rank\n"
        "    assert [len(a) for a in arrays] == [0, 1, 125, 126, 4000]\n"
    )
    done = mpirun(2, sys.executable, str(script))
    assert done.returncode == 0, done.stderr


def test_memory_is_refused_on_several_ranks_and_odd_periodic_axes_in_one_line(volume, tmp_path):
    done = mpirun(2, *command(volume, "tortuosity", "--memory", "1GiB"))
    assert done.returncode == 2
    assert done.stderr.count("hpcres: --memory") == 1
    with pytest.raises(InputError, match=r"`periodic` x: .*multiple of 2.*not 33.*`crop`"):
        tortuosity(
            open_volume(volume),
            settings=SolveSettings(periodic=(False, False, True), directions="z"),
            means=Means(memory=1000),
        )


# ---- out of core -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "periodic", "conductivity", "voxel_size"),
    [
        ((66, 20, 33), (False, False, False), {1: 1.0}, (1, 2, 1)),
        ((64, 18, 34), (True, True, True), {1: 1.0}, (1, 2, 1)),  # cells of an odd number across y and x
        ((68, 20, 34), (True, False, True), {1: 1.0, 0: 0.2}, (1, 2, 1)),
        ((97, 20, 34), (False, True, True), {1: 1.0, 0: 0.2}, (1, 2, 1)),
        # The robust form: planes of cells that do not grow along z, parts of a cell apart, and all of it in float64.
        ((66, 20, 33), (False, True, False), {1: 1.0}, (25, 1, 1)),
        ((64, 20, 34), (True, False, False), {1: 1.0, 0: 1e-4}, (1, 1, 1)),
        ((68, 20, 34), (False, False, True), {1: 1.0, 0: 1e-9}, (1, 1, 40)),
    ],
)
def test_slabs_on_scratch_storage_find_the_bits_of_the_solver_in_memory(
    tmp_path, shape, periodic, conductivity, voxel_size
):
    labels = (np.random.default_rng(3).random(shape) < 0.5).astype(np.uint8)
    alone = solve(
        labels, conductivity, SolveSettings(voxel_size=voxel_size, periodic=periodic, rtol=1e-4, profile=True)
    )
    for axis, direction in enumerate("zyx"):
        sides = tuple(p and a != axis for a, p in enumerate(periodic))
        with Threads(2) as threads:
            place = ScratchPlace(tmp_path, TINY, cut(shape[0], 100, 16, sides[0]), lambda line: None)
            volume = VolumeInSlabs(place, lambda a, b: labels[a:b], shape, 16)
            settings = SolveSettings(voxel_size=voxel_size, periodic=sides, rtol=1e-4, profile=True)
            one = solve_in_slabs(volume, conductivity, direction, settings, threads)
        other = alone[direction]
        assert one.D_rel == pytest.approx(other.D_rel, rel=1e-12)
        assert one.profile == pytest.approx(other.profile, rel=1e-9)
        assert one.percolating_conductivity == pytest.approx(other.percolating_conductivity, rel=1e-12)
        assert (one.iterations, one.clusters_left_out, one.voxels_left_out) == (
            other.iterations,
            other.clusters_left_out,
            other.voxels_left_out,
        )
    assert not list(tmp_path.iterdir())


def test_clusters_that_wind_through_slabs_are_counted_once(tmp_path):
    """A hairpin goes through three slabs and back without the far face; a post reaches through; a bead lies in one."""
    mask = np.zeros((64, 8, 12), np.uint8)
    mask[:50, 1, 1] = mask[:50, 1, 3] = mask[49, 1, 1:4] = 1
    mask[:, 6, 6] = 1
    mask[30:34, 4, 9] = 1
    place = ScratchPlace(tmp_path, TINY, cut(64, 100, 16, False), lambda line: None)
    with Threads(1) as threads:
        volume = VolumeInSlabs(place, lambda a, b: mask[a:b], mask.shape, 16)
        one = solve_in_slabs(volume, {1: 1.0}, "z", SolveSettings(), threads)
    assert (one.clusters_left_out, one.voxels_left_out) == (2, 101 + 4)
    assert one.D_rel == pytest.approx(1 / 96, rel=1e-6)


MEASURED = """
import sys
from pathlib import Path
from hpcres.transport import Conducting, Means, SolveSettings, tortuosity
from hpcres.volumes.formats import open_volume
def solved(path, limit):
    means = Means(memory=limit, threads=1, scratch=Path(sys.argv[3]), say=lambda line: print(line, flush=True))
    found = tortuosity(open_volume(path), Conducting(only=("1",)), SolveSettings(directions="z"), means)
    return found["results"][0]["D_rel"]
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
solved(sys.argv[2], 260 << 20)
print(solved(sys.argv[1], int(sys.argv[4])), peak())
"""


def test_memory_well_below_the_vectors_is_enough_and_kept_to(tmp_path):
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(1).random((1536, 80, 80), dtype=np.float32)
    field = gaussian_filter(noise, 4)
    mask = (field < np.quantile(field, 0.8)).astype(np.uint8)
    np.save(tmp_path / "a.npy", mask)
    np.save(tmp_path / "small.npy", mask[:160, :32, :32])
    limit = 42 << 20
    assert 16 * int(mask.sum()) > 2.8 * limit
    limit += BYTES_OF_PYTHON  # the peak is of the whole process
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "a.npy", tmp_path / "small.npy", tmp_path / "scratch", str(limit)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "GiB of scratch storage" in done.stdout or "MiB of scratch storage" in done.stdout
    d_rel, peak = done.stdout.split()[-2:]
    assert float(d_rel) == pytest.approx(solve(mask, {1: 1.0}, SolveSettings(directions="z"))["z"].D_rel, rel=1e-9)
    assert int(peak) < limit


def test_a_full_disk_and_too_little_memory_are_one_line(solid, tmp_path, monkeypatch):

    def solved(memory: int) -> None:
        means = Means(memory=memory, scratch=tmp_path)
        tortuosity(open_volume(solid), Conducting(only=("1",)), SolveSettings(directions="z"), means)

    with pytest.raises(InputError, match=r"`memory` 256MiB: levels from 2 on .* give `memory` 2[0-9]+MiB"):
        solved(100_000)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"no space left for scratch storage.*`scratch`"):
        solved(BYTES_OF_PYTHON + 5_000_000)


def test_a_kill_leaves_no_scratch_files(solid, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    slow = "import time\nfrom hpcres import cli\nfrom hpcres.transport.slab_solver import SlabSolver\n"
    slow += "SlabSolver.start = lambda *_: (print('here', flush=True), time.sleep(60))\ncli.main()\n"
    (tmp_path / "slow.py").write_text(slow)
    arguments = ["tortuosity", str(solid), "--memory", "261MiB", "--scratch", str(scratch)]
    with subprocess.Popen([sys.executable, tmp_path / "slow.py", *arguments], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == "here\n"
        one.send_signal(signal.SIGKILL)
    assert not list(scratch.iterdir())


# ---- the estimate from blocks ------------------------------------------------------------------------------


def test_blocks_as_resistors_are_exact_where_layers_are_blocks_and_say_what_they_are(tmp_path):
    from click.testing import CliRunner

    from hpcres.cli import commands
    from hpcres.cli.console import with_options

    labels = np.zeros((150, 70, 64), np.uint8)  # blocks of 64, 64 and 22 planes
    labels[64:128] = 1
    np.save(tmp_path / "a.npy", labels)
    settings = SolveSettings(directions="zy", voxel_size=(2.0, 1.0, 1.0))
    conducting = Conducting(conductivity={"0": 1.0, "1": 0.1})
    along, across = tortuosity(open_volume(tmp_path / "a.npy"), conducting, settings, estimate=64)["results"]
    shares = (86 / 150, 64 / 150)
    assert along["D_rel"] == pytest.approx(1 / (shares[0] + shares[1] / 0.1), rel=1e-5)
    assert across["D_rel"] == pytest.approx(shares[0] + shares[1] * 0.1, rel=1e-5)
    assert along["estimate"]["mean_D_rel"] == pytest.approx(shares[0] + shares[1] * 0.1, rel=1e-5)
    assert (along["state"], along["error"], along["estimate"]["blocks"]) == ("estimate", None, 6)
    assert "-100 to +9 % off" in along["estimate"]["unreliability"]
    assert "-100 to +9 % off" in transport_text(along)
    for other in (["--profile"], ["--memory", "1GiB"], ["--periodic", "y"], ["--field", "f.zarr"]):
        arguments = ["tortuosity", str(tmp_path / "a.npy"), "--estimate", "blocks", *other]
        found = CliRunner().invoke(commands, arguments)
        assert isinstance(found.exception, InputError)
        assert other[0] in with_options(str(found.exception))


def test_blocks_lose_a_pore_that_winds_between_them(tmp_path):
    mask = np.zeros((70, 70, 4), np.uint8)
    mask[:40, 10] = mask[39, 10:66] = mask[39:, 65] = 1
    np.save(tmp_path / "a.npy", mask)
    exact = tortuosity(
        open_volume(tmp_path / "a.npy"), conducting=Conducting(only=("1",)), settings=SolveSettings(directions="z")
    )["results"][0]
    guess = tortuosity(
        open_volume(tmp_path / "a.npy"),
        conducting=Conducting(only=("1",)),
        settings=SolveSettings(directions="z"),
        estimate=64,
    )["results"][0]
    assert exact["state"] == "converged"
    # That blocks do not percolate is no statement about the volume.
    assert (guess["state"], guess["D_rel"], guess["tau"]) == ("estimate", 0.0, None)
    assert "tau infinite: an estimate" in transport_text(guess)


def test_an_estimate_is_labelled_wherever_it_is_shown_and_never_the_default(tmp_path):
    from click.testing import CliRunner

    from hpcres.cli import commands
    from hpcres.reports.transport import transport_section

    np.save(tmp_path / "a.npy", np.random.default_rng(2).integers(0, 2, (40, 72, 40)).astype(np.uint8))
    arguments = ["tortuosity", str(tmp_path / "a.npy"), "--output", str(tmp_path / "t.json"), "--phase", "1"]
    shown = CliRunner().invoke(commands, [*arguments, "--estimate", "blocks"])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("% off as a network") == 4  # the heading and three directions
    found = json.loads((tmp_path / "t.json").read_text())
    assert "% off as a network" in found["solver"]["method"]
    page = transport_section(found, None, "")
    assert page.count("(estimate of blocks)") == 6
    assert "% off as a network" in page
    assert "upper bound" not in page + shown.output
    CliRunner().invoke(commands, arguments)
    assert {r["state"] for r in json.loads((tmp_path / "t.json").read_text())["volume"]["results"]} == {"converged"}
