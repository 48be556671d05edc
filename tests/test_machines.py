"""The same labels and counts with AVX2 and with AVX-512; the cache of compiled kernels; systems other than Linux."""

from __future__ import annotations

import errno
import json
import os
import platform
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

from hpcres import cli, compiled, kernel_cache
from hpcres.checkpoint import build_generator, save_checkpoint
from hpcres.errors import InputError
from hpcres.study.file import load_study, save_study
from hpcres.transport.scratch import _File
from hpcres.volumes.stores import LabelStore

TESTS = Path(__file__).parent
CASES = {  # scale factor, low-res shape, boundary z, y, x, smooth noise
    "white": ("4", (7, 5, 6), ["periodic", "mirror", "replicate"], [0.0]),
    "smooth": ("16/3", (6, 6, 3), ["mirror", "replicate", "periodic"], [0.0, 7.3]),
    "fraction": ("8/5", (15, 10, 13), ["replicate", "periodic", "mirror"], [2.1]),
}


needs_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="AVX is of x86-64")


def tied_study(folder: Path, case: str) -> None:
    """A study whose network gives all phases nearly the same logits, so that their last bits decide each label."""
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
    """Results of all stages from this machine and from one held to AVX2; `machine` and `prepared` of each."""
    folder = tmp_path_factory.mktemp("machines")
    for case in CASES:
        tied_study(folder / "studies", case)
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


def test_the_manual_has_the_variables_of_this_test():
    manual = (TESTS.parent / "docs" / "machines.md").read_text()
    block = next(block for block in manual.split("```")[1::2] if "ONEDNN" in block)
    assert dict(word.split("=", 1) for word in shlex.split(block)) == AVX2


@needs_x86
@pytest.mark.machines
def test_with_these_variables_all_libraries_use_avx2_only(chains):
    assert chains["avx2"]["machine"] == {
        "torch": "AVX2",
        "numpy": False,
        "numba": "haswell",
        "numba_has_avx512": False,
        "register_floats": 8,
        "widest": 8,
    }


@needs_x86
@pytest.mark.machines
@pytest.mark.parametrize("case", CASES)
def test_registers_of_8_and_of_16_floats_give_the_same_labels(chains, case):
    if chains["here"]["machine"]["register_floats"] == 8:
        pytest.skip("this machine has no AVX-512 to compare with")
    here, there = (chains[name]["folder"] / case / "labels.zarr" for name in ("here", "avx2"))
    counts = LabelStore.open(here).provenance["measured"]["volume_fraction"]
    assert min(counts.values()) > 0.02  # every phase occurs, or the comparison would show nothing
    assert store_bytes(here) == store_bytes(there)
    assert LabelStore.open(there).provenance["measured"] == LabelStore.open(here).provenance["measured"]


@needs_x86
@pytest.mark.machines
def test_weights_of_noise_interpolation_and_layers_have_the_same_bits(chains):
    assert chains["here"]["prepared"] == chains["avx2"]["prepared"]


@needs_x86
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
    for axis, spectrum in spectra[0].items():  # from a library's Fourier transform, which rounds differently by CPU
        for name, values in spectrum.items():
            assert values == pytest.approx(spectra[1][axis][name], rel=1e-10), (axis, name)
    solved = [json.loads((folder / "transport.json").read_text())["volume"]["results"] for folder in (here, there)]
    assert len(solved[0]) == 9
    for one, other in zip(*solved, strict=True):
        for key in ("phase", "direction", "state", "volume_fraction", "percolating_fraction", "voxels_left_out"):
            assert one[key] == other[key]
        assert abs(one["D_rel"] - other["D_rel"]) <= one["error"] + other["error"]


@needs_x86
@pytest.mark.machines
def test_training_inference_and_metrics_work_with_avx2_only(chains):
    folder = chains["avx2"]["folder"] / "trained"
    rows = [[float(word) for word in row.split(",")] for row in (folder / "training.csv").read_text().split()[1:]]
    assert rows[-1][0] == 3
    assert np.isfinite(rows).all()
    fractions = json.loads((folder / "metrics.json").read_text())["volume"]["volume_fraction"]
    assert sum(fractions.values()) == pytest.approx(1)


# ---- compiled kernels --------------------------------------------------------------------------------------


@needs_x86
def test_a_cpu_s_registers_are_those_numba_compiles_for(monkeypatch):
    for name, features, floats in (
        ("haswell", None, 8),
        ("haswell", "", 8),
        ("haswell", "+avx512f", 16),
        ("skylake-avx512", None, 16),
        ("znver4", "", 16),
        ("znver4", "-avx512f", 8),
        ("generic", "", 8),
    ):
        monkeypatch.setattr("numba.config.CPU_NAME", name)
        monkeypatch.setattr("numba.config.CPU_FEATURES", features)
        assert compiled.register_floats.__wrapped__() == floats, (name, features)


def test_machine_code_is_loaded_for_its_own_key_and_sources_only(tmp_path):
    """Also where two processes save at the same time: no file and no index is common to two keys."""
    files = kernel_cache.Files(tmp_path, "kernel", "sources")
    files.save("avx512", b"zmm")
    (saved,) = tmp_path.iterdir()
    assert files.load("avx2") is None
    shutil.copy(saved, files._path("avx2"))
    assert files.load("avx2") is None
    files.save("avx2", b"ymm")
    assert (files.load("avx512"), files.load("avx2")) == (b"zmm", b"ymm")
    assert kernel_cache.Files(tmp_path, "kernel", "changed sources").load("avx512") is None


def test_machine_code_that_was_cut_short_is_made_again(tmp_path):
    files = kernel_cache.Files(tmp_path, "kernel", "sources")
    for cut in (truncate, lambda file: file.write_bytes(b"")):
        files.save("key", b"code" * 100)
        assert files.load("key") == b"code" * 100
        for file in tmp_path.iterdir():
            cut(file)
        assert files.load("key") is None


def test_a_full_disk_costs_the_next_process_a_compilation_and_this_one_nothing(tmp_path, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    kernel = compiled.compiled(lambda x: x + 1)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert kernel(2) == 3
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "name", ["FunctionCache", "CompileResultCacheImpl", "CacheImpl", "_CacheLocator", "_SourceFileBackedLocatorMixin"]
)
def test_with_a_numba_whose_cache_has_other_classes_kernels_are_compiled_without_one(name, monkeypatch):
    monkeypatch.delattr(f"numba.core.caching.{name}")
    monkeypatch.delitem(sys.modules, "hpcres.kernel_cache")
    assert compiled.compiled(lambda x: x + 1)(2) == 3


CALL = """
from hpcres import noise
from hpcres.geometry import Box
noise.normals(1, Box((0, 0, 0), (2, 2, 2)))
print(len(noise._fill.stats.cache_misses), len(noise._fill.stats.cache_hits), noise._fill.stats.cache_path)
"""


@pytest.fixture
def installed(tmp_path):
    """A read-only copy of the package, and a function that runs Python with it for a user without a home folder.

    Each `__pycache__` is a file, so that root cannot make that folder either.
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


def test_kernels_of_a_read_only_installation_are_cached_in_a_private_temporary_folder(installed, tmp_path):
    """One entry per CPU, valid until a source changes that the kernel's module imports.

    A release of numba that changes the classes which kernel_cache extends fails here.
    """
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
    assert kernel_cache.TemporaryFolder.from_function(tied_study, __file__) is None
    shared.rmdir()
    shared.symlink_to(tmp_path, target_is_directory=True)
    assert kernel_cache.TemporaryFolder.from_function(tied_study, __file__) is None
    shared.unlink()
    assert kernel_cache.TemporaryFolder.from_function(tied_study, __file__) is not None


def test_without_any_folder_kernels_are_compiled_and_not_cached(monkeypatch):
    monkeypatch.setattr(kernel_cache.Folders, "_locator_classes", [])
    assert compiled.compiled(lambda x: x + 1)(2) == 3


@pytest.mark.machines
def test_commands_of_a_read_only_installation_work_without_a_warning(installed, study, tmp_path):
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
import distributed, h5py, matplotlib, numba, scipy.ndimage, tifffile, torch, zarr  # before anything is taken away
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
ONLY_LINUX = ["os.sched_getaffinity", "os.posix_fallocate", "os.posix_fadvise", "os.preadv", "mmap.MADV_HUGEPAGE"]


@pytest.fixture
def elsewhere():
    """A function that runs a command as on another system: by its name, and without the attributes in `absent`."""

    def run(platform: str, absent: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", ELSEWHERE, json.dumps(absent), platform]
        return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True)

    return run


def test_labels_on_macos_are_those_on_linux_and_transport_is_solved(elsewhere, study, painted, tmp_path):
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


def test_metrics_works_on_windows(elsewhere, painted):
    done = elsewhere("win32", [*ONLY_LINUX, "os.pread", "os.pwrite", "fcntl"], "metrics", painted)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["train", "plan", "infer", "verify"])
def test_on_windows_the_other_commands_name_wsl_in_one_line(command, study, monkeypatch):
    monkeypatch.setattr(cli, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(InputError, match=rf"^hpcres {command} needs Linux or macOS: .* WSL 2 .*$"):
        cli.commands([command, str(study)], standalone_mode=False)
