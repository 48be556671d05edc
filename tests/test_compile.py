"""training.compile: the same step, the same names, and what is said where nothing can be compiled."""

import os
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from small_group import as_rank, free_ports
from small_training import ALONE, blobs, study_of
from torch._dynamo.utils import counters

from hpcres.study.file import save_study
from hpcres.training import compilation
from hpcres.training.data.cubes import LowResCubes
from hpcres.training.data.slices import RealSlices
from hpcres.training.distributed import processes
from hpcres.training.wgan import Models

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler, so torch.compile cannot work"
)
TRAINING = {"cubes": 2, "reuse_generated": True, "learning_rate": 1e-30}


@pytest.fixture(autouse=True)
def _own_code(tmp_path, monkeypatch):
    """A cache of its own for each test; its tag is put back, because compiling sets it for the whole process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    config = getattr(torch.compiler, "config", None)
    with nullcontext() if config is None else config.patch(cache_key_tag=""):
        yield


def small_study(folder, **training):
    """At scale factor 2, where the generator has the fewest layers to compile."""
    return study_of(folder, volume=blobs((34, 33, 32), 1), scale_factor=2, training=TRAINING | training)


def step_of(study, group=ALONE):
    """Losses, gradients, batch-norm statistics and names of weights after one step, and the generator to be saved."""
    models, low_res, real = Models(study, group), LowResCubes(study), RealSlices(study, group.device)
    outcome = models.step(0, group.share(study.training.cubes), low_res, real, study.training.learning_rate)
    gradients = [p.grad for module in (models.generator, models.critics) for p in module.parameters()]
    statistics = [b for b in models.generator.buffers() if b.is_floating_point()]
    saved = [list(module.state_dict()) for module in (models.generator, models.recalibrated(low_res, real))]
    parts = [torch.cat([t.flatten() for t in tensors]) for tensors in (gradients, statistics)]
    return group.mean(outcome.losses), parts, saved


def assert_same(ours, theirs):
    (losses, parts, saved), (losses_plain, parts_plain, saved_plain) = ours, theirs
    assert losses.tolist() == pytest.approx(losses_plain.tolist(), rel=1e-4, abs=1e-6)
    for a, b in zip(parts, parts_plain, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()
    assert saved == saved_plain


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_a_compiled_step_is_the_plain_step(tmp_path, monkeypatch, backend):
    """aot_eager runs the graphs of forward and backward without making code of them, which any machine can."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    plain = step_of(small_study(tmp_path))
    counters.clear()
    compiled = step_of(small_study(tmp_path, compile=True))
    assert counters["stats"]["unique_graphs"] == 2  # the trial and the generator, whole
    assert_same(compiled, plain)


def ranked_step(rank, port, study, folder):
    as_rank(rank, 2, port)
    with processes("cpu", 1) as group:
        torch.save(step_of(study, group), folder / f"{rank}.pt")
        assert counters["stats"]["unique_graphs"] == 3


@needs_compiler
@pytest.mark.slow
def test_two_compiled_processes_are_one_plain_one(tmp_path):
    """With gradients and batch norm over both: the collectives stand inside what is compiled. A minute and more."""
    # Without reuse the critics' forward has no gradient, which is a graph of its own.
    study = small_study(tmp_path, compile=True, reuse_generated=False)
    torch.multiprocessing.spawn(ranked_step, (free_ports(1)[0], study, tmp_path), 2)
    plain = step_of(small_study(tmp_path, reuse_generated=False))
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), plain)


@needs_compiler
@pytest.mark.skipif(not hasattr(torch.compiler, "config"), reason="torch 2.6 has no key to add to")
def test_cpus_of_two_kinds_do_not_share_compiled_code(monkeypatch):
    misses = []
    for capability in ("AVX2", "AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        torch.compiler.config.cache_key_tag = ""
        torch.compiler.reset()
        counters.clear()
        compilation.compile_generator(torch.nn.Linear(1, 1), torch.device("cpu"))  # compiles its trial only
        misses.append(counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"] > 0)
    assert misses == [True, False, True]


def test_without_a_compiler_nothing_is_written(tmp_path, hpcres):
    study = study_of(tmp_path, training={"compile": True})
    file = save_study(study, "mine")
    done = hpcres("train", file, env=os.environ | {"CXX": "/bin/false"})
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "training.compile" in done.stderr
    assert "set training.compile=false" in done.stderr
    assert list(study.folder.iterdir()) == [file]
