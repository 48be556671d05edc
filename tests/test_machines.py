"""The same bytes and counts whatever the CPU can do; kernels compiled for the CPU, kept apart by it, and kept fresh."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from small_machine import AVX2
from small_painting import lively, make_study, store_bytes, truncate
from small_training import study_of

from hpcres import cli, compiled
from hpcres.checkpoint import build_generator, save_checkpoint
from hpcres.errors import InputError
from hpcres.metrics.transport.scratch import _File
from hpcres.study_file import load_study, save_study
from hpcres.volumes.stores import LabelStore

TESTS = Path(__file__).parent
CASES = {  # scale factor, low-res shape, boundary z, y, x, smooth noise
    "white": ("4", (7, 5, 6), ["periodic", "mirror", "replicate"], [0.0]),
    "smooth": ("16/3", (6, 6, 3), ["mirror", "replicate", "periodic"], [0.0, 7.3]),
    "fraction": ("8/5", (15, 10, 13), ["replicate", "periodic", "mirror"], [2.1]),
}


def coin_toss_study(folder: Path, case: str) -> None:
    """A study whose network all but ties its phases: each label hangs on the last bits of two logits."""
    scale, shape, boundary, sigmas = CASES[case]
    path = make_study(folder / case, scale, shape)
    content = yaml.safe_load(path.read_text())
    content["network"] |= {"noise_sigma_voxels": sigmas, "width": 4}
    content["inference"] |= {"boundary": dict(zip("zyx", boundary, strict=True))}
    path.write_text(yaml.safe_dump(content))
    study = load_study(path)
    torch.manual_seed(4)
    generator = lively(build_generator(study))
    with torch.no_grad():
        for one in (generator.conv_end.weight, generator.conv_end.bias):
            one[1:] = one[:1]
        generator.conv_end.weight[1:] *= 1 + 1e-7 * torch.randn_like(generator.conv_end.weight[1:])
    save_checkpoint(study.checkpoint_path, generator=generator, study=study, step=1)


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """Folders that this machine and one with AVX2 left, each with what it took itself to be and what it prepared."""
    folder = tmp_path_factory.mktemp("machines")
    for case in CASES:
        coin_toss_study(folder / "studies", case)
    trained = folder / "studies" / "trained"
    trained.mkdir()
    shutil.copy(save_study(study_of(trained, training={"steps": 3}), "mine"), trained / "study.yaml")
    plain = {name: value for name, value in os.environ.items() if name not in AVX2}
    found = {}
    for name, environment in (("here", plain), ("avx2", plain | AVX2)):
        command = [sys.executable, str(TESTS / "small_machine.py"), str(folder / "studies"), str(folder / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        found[name] = {"folder": folder / name, **json.loads(done.stdout.splitlines()[-1])}
    return found


def test_the_manual_says_how_to_be_such_a_machine():
    manual = (TESTS.parent / "docs" / "machines.md").read_text()
    block = next(block for block in manual.split("```")[1::2] if "ONEDNN" in block)
    assert dict(word.split("=", 1) for word in shlex.split(block)) == AVX2


@pytest.mark.machines
def test_the_libraries_take_the_machine_to_have_avx2_only(chains):
    assert chains["avx2"]["machine"] == {
        "torch": "AVX2", "numpy": False, "numba": "haswell", "numba_has_avx512": False,
        "register_floats": 8, "widest": 8,
    }  # fmt: skip


@pytest.mark.machines
@pytest.mark.parametrize("case", CASES)
def test_registers_of_8_and_of_16_floats_paint_the_same_bytes(chains, case):
    if chains["here"]["machine"]["register_floats"] == 8:
        pytest.skip("this machine has no AVX-512 to compare with")
    here, there = (chains[name]["folder"] / case / "labels.zarr" for name in ("here", "avx2"))
    counts = LabelStore.open(here).provenance["measured"]["volume_fraction"]
    assert min(counts.values()) > 0.02  # coins do fall either way
    assert store_bytes(here) == store_bytes(there)
    assert LabelStore.open(there).provenance["measured"] == LabelStore.open(here).provenance["measured"]


@pytest.mark.machines
def test_what_is_computed_before_a_network_runs_is_the_same(chains):
    assert chains["here"]["prepared"] == chains["avx2"]["prepared"]


@pytest.mark.machines
@pytest.mark.parametrize("case", CASES)
def test_counts_are_the_same_and_diffusivities_within_their_error(chains, case):
    here, there = (chains[name]["folder"] / case for name in ("here", "avx2"))
    ours, theirs = (json.loads((folder / "metrics.json").read_text())["volume"] for folder in (here, there))
    for one in (ours, theirs):
        one.pop("provenance")
        one.pop("path")
    spectra = [one["statistics"].pop("spectrum") for one in (ours, theirs)]
    assert ours == theirs
    for axis, spectrum in spectra[0].items():  # by a library's Fourier transform
        for name, values in spectrum.items():
            assert values == pytest.approx(spectra[1][axis][name], rel=1e-10), (axis, name)
    solved = [json.loads((folder / "transport.json").read_text())["volume"]["results"] for folder in (here, there)]
    assert len(solved[0]) == 9
    for one, other in zip(*solved, strict=True):
        for key in ("phase", "direction", "state", "volume_fraction", "percolating_fraction", "voxels_left_out"):
            assert one[key] == other[key]
        assert abs(one["D_rel"] - other["D_rel"]) <= one["error"] + other["error"]


@pytest.mark.machines
def test_a_machine_with_avx2_trains_paints_and_measures(chains):
    folder = chains["avx2"]["folder"] / "trained"
    rows = [[float(word) for word in row.split(",")] for row in (folder / "training.csv").read_text().split()[1:]]
    assert rows[-1][0] == 3
    assert np.isfinite(rows).all()
    fractions = json.loads((folder / "metrics.json").read_text())["volume"]["volume_fraction"]
    assert sum(fractions.values()) == pytest.approx(1)


# ---- compiled kernels --------------------------------------------------------------------------------------


def test_a_cpu_s_registers_are_those_numba_compiles_for(monkeypatch):
    for name, features, floats in (
        ("haswell", None, 8), ("haswell", "", 8), ("haswell", "+avx512f", 16), ("skylake-avx512", None, 16),
        ("znver4", "", 16), ("znver4", "-avx512f", 8), ("generic", "", 8),
    ):  # fmt: skip
        monkeypatch.setattr("numba.config.CPU_NAME", name)
        monkeypatch.setattr("numba.config.CPU_FEATURES", features)
        assert compiled.register_floats.__wrapped__() == floats, (name, features)


def test_two_processes_that_save_at_once_do_not_take_each_other_s_machine_code(tmp_path):
    """On machines of two kinds, both with an empty index in hand: the second saves while the first is about to."""
    first, second = (compiled._Files(str(tmp_path), "kernel", "source") for _ in range(2))
    second._load_index = dict
    save = first._save_data

    def late(name, data):
        second.save("for the second", b"of the second")
        save(name, data)

    first._save_data = late
    first.save("for the first", b"of the first")
    found = {key: compiled._Files(str(tmp_path), "kernel", "source").load(f"for the {key}") for key in ORDINALS}
    assert found["first"] == b"of the first"
    assert found["second"] in (None, b"of the second")


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_machine_code_that_was_cut_short_is_none_and_is_made_again(tmp_path, ending):
    files = compiled._Files(str(tmp_path), "kernel", "source")
    files.save("key", b"code" * 100)
    for file in tmp_path.glob(f"*.{ending}"):
        truncate(file)
    assert files.load("key") is None
    files.save("key", b"code" * 100)
    assert files.load("key") == b"code" * 100


def test_a_full_disk_costs_the_next_process_a_compilation_and_this_one_nothing(tmp_path, monkeypatch):
    def full(self, name, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiled._Files, "_save_data", full)
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    assert compiled.compiled(lambda x: x + 1)(2) == 3


ORDINALS = ("first", "second")
CALL = """
from hpcres import noise
from hpcres.geometry import Box
noise.normals(1, Box((0, 0, 0), (2, 2, 2)))
print(len(noise._fill.stats.cache_misses), len(noise._fill.stats.cache_hits), noise._fill.stats.cache_path)
"""


@pytest.fixture
def installed(tmp_path):
    """A copy of the package as an administrator installs it, and a call of a kernel in it by a user without a home.

    Files stand where folders would be made, which stops root too.
    """
    package = shutil.copytree(TESTS.parent / "hpcres", tmp_path / "site" / "hpcres", ignore=_no_caches)
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (folder / "__pycache__").touch()
    (tmp_path / "tmp").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "NUMBA_", "MPLCONFIG"))}
    environment |= {"HOME": os.devnull, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(package.parent)}

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=environment | more, cwd=tmp_path, capture_output=True, text=True
        )

    return package, run


def _no_caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]


def test_kernels_of_a_read_only_installation_are_kept_in_a_private_temporary_folder(installed, tmp_path):
    """By CPU, and until a source that they were compiled from changes, be it not their own."""
    package, run = installed

    def misses(**more: str) -> int:
        done = run("-c", CALL, **more)
        assert (done.returncode, done.stderr) == (0, "")
        missed, hit, path = done.stdout.split()
        assert path.startswith(f"{tmp_path}/tmp/hpcres-kernels")
        assert int(missed) + int(hit) == 1
        return int(missed)

    assert [misses(), misses()] == [1, 0]
    assert stat.S_IMODE((tmp_path / "tmp" / f"hpcres-kernels-{os.getuid()}").stat().st_mode) == 0o700
    assert [misses(NUMBA_CPU_NAME="haswell"), misses(NUMBA_CPU_NAME="haswell"), misses()] == [1, 0, 0]
    with (package / "geometry.py").open("a") as file:
        file.write("# changed\n")
    assert [misses(), misses()] == [1, 0]


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    shared = tmp_path / f"hpcres-kernels-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    assert compiled._TemporaryFolder.from_function(coin_toss_study, __file__) is None
    shared.rmdir()
    shared.symlink_to(tmp_path, target_is_directory=True)
    assert compiled._TemporaryFolder.from_function(coin_toss_study, __file__) is None
    shared.unlink()
    assert compiled._TemporaryFolder.from_function(coin_toss_study, __file__) is not None


def test_without_any_folder_kernels_are_compiled_and_not_kept(monkeypatch):
    monkeypatch.setattr(compiled._Kept, "_locator_classes", [])
    assert compiled.compiled(lambda x: x + 1)(2) == 3


@pytest.mark.machines
def test_commands_of_a_read_only_installation_work_and_say_nothing_of_it(installed, study, tmp_path):
    _, run = installed
    checkpoint = str(study.parent / "out" / "checkpoint.pt")
    labels = str(tmp_path / "out" / "labels.zarr")
    for arguments in (
        ("infer", str(study), "--output", str(tmp_path / "out"), "--checkpoint", checkpoint),
        ("metrics", labels, "--output", str(tmp_path / "out" / "metrics.json")),
        ("tortuosity", labels, "--output", str(tmp_path / "out" / "transport.json"), "--direction", "z"),
        ("report", labels, "--output", str(tmp_path / "out" / "report.html")),
    ):
        done = run("-m", "hpcres", *arguments)
        assert done.returncode == 0, done.stderr
        assert not re.search(r"warn|writable|cache|matplotlib|Traceback", done.stderr, re.IGNORECASE), done.stderr


# ---- other systems -----------------------------------------------------------------------------------------

ELSEWHERE = """
import json, mmap, os, signal, sys
import distributed, h5py, matplotlib, numba, scipy.ndimage, tifffile, torch, zarr  # these may use what there is
for name in json.loads(sys.argv.pop(1)):
    module, _, attribute = name.partition(".")
    delattr(sys.modules[module], attribute) if attribute else sys.modules.update({module: None})
from hpcres import cli, memory
class Elsewhere:
    platform = sys.argv.pop(1)
    def __getattr__(self, name):
        return getattr(sys, name)
cli.sys = memory.sys = Elsewhere()
cli.main()
"""
ONLY_LINUX = [
    "os.sched_getaffinity", "os.posix_fallocate", "os.posix_fadvise", "os.preadv", "mmap.MADV_HUGEPAGE",
]  # fmt: skip


@pytest.fixture
def elsewhere():
    """A command on a system of another name that lacks what is named."""

    def run(platform: str, absent: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", ELSEWHERE, json.dumps(absent), platform]
        return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)

    return run


def test_macos_paints_and_solves_the_same(elsewhere, study, painted, tmp_path):
    checkpoint = study.parent / "out" / "checkpoint.pt"
    done = elsewhere("darwin", ONLY_LINUX, "infer", study, "--output", tmp_path, "--checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr
    assert store_bytes(tmp_path / "labels.zarr") == store_bytes(painted)
    done = elsewhere("darwin", ONLY_LINUX, "tortuosity", painted, "--direction", "z")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["os.posix_fallocate", "os.preadv"])
def test_a_system_that_cannot_reserve_scratch_storage_says_so(missing, monkeypatch, tmp_path):
    monkeypatch.delattr(missing)
    with pytest.raises(InputError, match=r"cannot reserve scratch storage .*; solve in memory"):
        _File(SimpleNamespace(folder=tmp_path), 10)
    assert list(tmp_path.iterdir()) == []


def test_windows_measures(elsewhere, painted):
    done = elsewhere("win32", [*ONLY_LINUX, "os.pread", "os.pwrite", "fcntl"], "metrics", painted)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["train", "plan", "infer", "verify"])
def test_windows_is_told_in_one_line_where_to_run_the_rest(command, study, monkeypatch):
    monkeypatch.setattr(cli, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(InputError, match=rf"^hpcres {command} needs Linux or macOS: .* WSL 2 .*$"):
        cli.commands([command, str(study)], standalone_mode=False)
