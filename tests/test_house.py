"""What keeps the house in order: imports go one way, every command explains itself, every shipped study is right."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement

from hpcres.cli import commands
from hpcres.errors import InputError
from hpcres.study.file import load_study, save_study
from hpcres.study.values import Section

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hpcres"
ROOMS = {  # docs/design.md: each room may import those listed, and nothing of ours besides
    "errors": set(),
    "kernel_cache": set(),
    "compiled": {"kernel_cache"},
    "cores": set(),
    "memory": set(),
    "signals": {"errors"},
    "outputs": {"errors"},
    "terminal": set(),
    "old_names": {"errors"},
    "progress": set(),
    "pages": {"volumes"},
    "geometry": {"errors"},
    "noise": {"compiled", "geometry"},
    "lengths": {"errors", "geometry"},
    "families": {"errors"},
    "study": {"errors", "families", "geometry", "lengths", "old_names", "study"}
    | {"outputs", "volumes"},  # of the file
    "inputs": {"errors", "lengths", "outputs", "study", "volumes"},
    "simd": {"compiled", "simd"},
    "networks": {"errors", "geometry", "networks"},
    "engines": {"compiled", "engines", "errors", "geometry", "networks", "simd"},
    "conditions": {"errors", "geometry", "study", "volumes"},
    "counting": {"compiled", "counting", "errors", "geometry", "lengths", "simd", "study"},
    "imaging": {"networks", "study"},
    "volumes": {"compiled", "counting", "errors", "geometry", "lengths", "outputs", "signals", "study", "volumes"},
    "checkpoint": {"errors", "families", "networks", "outputs", "study", "volumes"},
    "phantoms": {
        "cores",
        "errors",
        "geometry",
        "imaging",
        "lengths",
        "memory",
        "noise",
        "outputs",
        "phantoms",
        "progress",
        "signals",
        "study",
        "volumes",
    },
    "training": {
        "checkpoint",
        "conditions",
        "cores",
        "counting",
        "errors",
        "families",
        "geometry",
        "imaging",
        "memory",
        "networks",
        "noise",
        "old_names",
        "outputs",
        "pages",
        "progress",
        "signals",
        "study",
        "training",
        "volumes",
    },
    "inference": {
        "conditions",
        "cores",
        "engines",
        "errors",
        "geometry",
        "lengths",
        "networks",
        "study",
        "noise",
        "volumes",
        "checkpoint",
        "inference",
        "memory",
        "signals",
        "outputs",
        "progress",
        "counting",
    },
    "transport": {
        "compiled",
        "cores",
        "counting",
        "errors",
        "geometry",
        "memory",
        "signals",
        "simd",
        "transport",
        "volumes",
    },
    "metrics": {
        "compiled",
        "cores",
        "counting",
        "errors",
        "geometry",
        "imaging",
        "lengths",
        "memory",
        "metrics",
        "progress",
        "signals",
        "study",
        "transport",
        "volumes",
    },
    "result_files": {
        "errors",
        "geometry",
        "inputs",
        "lengths",
        "metrics",
        "outputs",
        "progress",
        "reports",
        "signals",
        "study",
        "transport",
        "volumes",
    },
    "results": {"errors", "metrics", "transport"},
    "schemas": {"study"},
    "arguments": {"errors", "geometry", "inputs", "lengths", "study", "volumes"},
    "label_stores": {"errors", "inference", "inputs", "lengths", "progress", "study", "volumes"},
    "library": {
        "arguments",
        "errors",
        "geometry",
        "inference",
        "inputs",
        "label_stores",
        "metrics",
        "phantoms",
        "result_files",
        "results",
        "study",
        "training",
        "transport",
        "volumes",
    },
    "__init__": {"errors", "library", "results"},
    "reports": {
        "counting",
        "errors",
        "geometry",
        "lengths",
        "metrics",
        "old_names",
        "pages",
        "reports",
        "study",
        "volumes",
    },
}
KEEPERS = {
    "zarr": {"volumes/field_store.py", "volumes/ome_zarr.py", "volumes/stores.py"},
    "tifffile": {"volumes/tiff.py"},
    "h5py": {"volumes/hdf5.py"},
    "mpi4py": {"inference/ranks.py"},
    "torch.distributed": {"training/distributed.py"},
    "dask": {"metrics/"},
    "distributed": {"metrics/", "library.py"},
    "click": {"cli/"},
    "jinja2": {"pages.py"},
    "taufactor": {"transport/second_opinion.py"},
    "numba": {"compiled.py", "kernel_cache.py", "simd/"},
}
COMMANDS = [
    "phantom",
    "convert",
    "train",
    "plan",
    "infer",
    "verify",
    "metrics",
    "tortuosity",
    "report",
    "confidence",
    "schema",
]


def imports(file: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            room = module != "hpcres" and (ROOT / module.replace(".", "/")).is_dir()
            names |= {f"{module}.{alias.name}" for alias in node.names} if room else {module}
    return names


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    place = str(file.relative_to(PACKAGE))
    room = place.split("/")[0].removesuffix(".py")
    for name in imports(file):
        parts = name.split(".")
        if parts[0] == "hpcres" and len(parts) > 1 and room not in ("cli", "__main__"):
            assert parts[1] in ROOMS[room], f"{place} imports {name}"
        for library, keepers in KEEPERS.items():
            if name == library or name.startswith(library + "."):
                assert any(place == k or (k.endswith("/") and place.startswith(k)) for k in keepers), f"{place}: {name}"


def test_no_module_needs_itself():
    """Inside a room imports go one way too, but to a room's front door (__init__)."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    TopologicalSorter({module: imports(file) & set(modules) for module, file in modules.items()}).prepare()


def stated() -> set[str]:
    """The packages that pyproject.toml declares."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {canonical(re.split(r"[<>=!~; \[]", each)[0]) for each in content["project"]["dependencies"]}


def optional(file: Path) -> set[str]:
    """Modules whose ImportError the file catches."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        caught = list[ast.expr]()
        if isinstance(node, ast.Try):
            caught = [handler.type for handler in node.handlers if handler.type]
        elif isinstance(node, ast.With):  # suppress(ImportError)
            caught = [item.context_expr for item in node.items]
        if any("ImportError" in ast.unparse(one) for one in caught):
            assert isinstance(node, ast.Try | ast.With)
            for inner in ast.walk(ast.Module(node.body, [])):
                names |= {alias.name for alias in inner.names} if isinstance(inner, ast.Import) else set()
    return names


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def distributions() -> Mapping[str, list[str]]:
    """Distributions that each importable name comes from; every call reads the metadata of all that are installed."""
    return packages_distributions()


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_package_that_is_imported_is_declared(file):
    """Imports inside functions count too, except those whose ImportError is caught."""
    made_by = distributions()
    for name in {one.split(".")[0] for one in imports(file) - optional(file)} - sys.stdlib_module_names - {"hpcres"}:
        assert {canonical(one) for one in made_by.get(name, [])} & stated(), f"{file.name} imports {name}, not declared"


def test_every_module_is_imported_with_only_the_declared_packages():
    """Only the declared packages and their own dependencies can be imported; all others are hidden."""
    needed, waiting = set[str](), stated()
    while waiting:
        needed |= waiting
        found = set()
        for name in waiting:
            with suppress(PackageNotFoundError):
                for each in map(Requirement, requires(name) or []):
                    if each.marker is None or each.marker.evaluate({"extra": ""}):
                        found.add(canonical(each.name))
        waiting = found - needed
    hidden = sorted(
        module
        for module, made in distributions().items()
        if not {canonical(one) for one in made} & needed and module != "hpcres"
    )
    assert "pytest" in hidden
    modules = sorted(".".join(f.relative_to(ROOT).with_suffix("").parts) for f in PACKAGE.rglob("*.py"))
    program = (
        "import importlib, sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name.split('.')[0] in {hidden!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_is_quick_and_imports_nothing_heavy():
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hpcres", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == 0
    loaded = {line.split("|")[-1].strip() for line in out.stderr.splitlines() if line.startswith("import time")}
    assert not loaded & {"torch", "zarr", "dask", "numba", "matplotlib", "jinja2"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example(name):
    shown = CliRunner().invoke(commands, [name, "--help"])
    assert shown.exit_code == 0
    assert f"hpcres {name}" in shown.output
    assert sorted(commands.commands) == sorted(COMMANDS)


RECIPES = ("fast.yaml", "long.yaml", "long-white.yaml")
"""What is added to a study; the other files of configs/ are studies."""


@pytest.mark.parametrize(
    "file", [f for f in sorted((ROOT / "configs").glob("*.yaml")) if f.name not in RECIPES], ids=lambda f: f.stem
)
def test_shipped_studies_are_right(file, monkeypatch, tmp_path):
    monkeypatch.setenv("HPCRES_DATA", "/data")
    study = load_study(file)
    assert study.name == file.stem
    if "small" not in file.stem and file.stem != "demo":
        assert (study.network.width, study.network.critic_width, study.network.padding) == (8, 9, "replicate")
        assert (study.training.critic_steps, study.training.learning_rate) == (5, 1e-4)


def test_recipes_are_added_to_a_study(monkeypatch, tmp_path):
    monkeypatch.setenv("HPCRES_DATA", "/data")
    study = tmp_path / "mine.yaml"
    study.write_text(f"base: [{ROOT}/configs/case3-sofc.yaml, {ROOT}/configs/long.yaml]\nname: mine\n")
    long, small = load_study(study), load_study(ROOT / "configs" / "case3-sofc-small.yaml")
    assert (long.network.width, long.network.residual_blocks) == (6, 2)
    assert long.network.noise_sigma_voxels == (0, 4, 8)
    assert (long.training.context, long.training.pattern_weight, long.training.match_fractions) == (5, 480, True)
    changed = {
        "minutes",
        "least_steps",
        "context",
        "pattern_weight",
        "pattern_tolerance",
        "pattern_spacings",
        "voxel_threshold",
        "ema_growth",
        "match_fractions",
        "recalibration_cubes",
        "quality_steps",
        "quality_cubes",
    }
    assert long.training.model_dump(exclude=changed) == small.training.model_dump(exclude=changed)
    assert long.scale_factor == small.scale_factor == 4
    study.write_text(study.read_text().replace("long.yaml", "long-white.yaml"))
    white = load_study(study)
    assert white.network == long.network.model_copy(update={"noise_sigma_voxels": (0,)})
    changed = {"ema_growth", "match_fractions", "recalibration_cubes", "quality_steps"}
    assert white.training.model_dump(exclude=changed) == long.training.model_dump(exclude=changed)
    assert (white.training.ema_growth, white.training.match_fractions) == (2, False)


def test_cases_are_those_of_the_paper(monkeypatch):
    monkeypatch.setenv("HPCRES_DATA", "/data")
    cases = {f.stem[:5]: load_study(f) for f in (ROOT / "configs").glob("case?-*.yaml") if "small" not in f.stem}
    assert [float(cases[f"case{i}"].scale_factor) for i in (1, 2, 3, 4)] == [4, 4, 4, 8]
    assert cases["case4"].low_res.phases == {0: ("pore", "binder"), 128: "active"}
    assert not cases["case2"].high_res.isotropic
    assert cases["case3"].imaging.operator == "under-sampled"
    assert cases["case3"].reference.published[0].value == 0.01087


def test_resolved_study_is_the_study(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCRES_DATA", "/data")
    study = load_study(ROOT / "configs" / "case2-separator-small.yaml", ["seed=7"], str(tmp_path))
    assert study.seed == 7
    assert load_study(save_study(study, "train")) == study


def test_base_gives_what_a_study_does_not(tmp_path):
    base = {
        "name": "base",
        "scale_factor": 2,
        "training": {"steps": 5, "cubes": 3},
        "high_res": {"phases": {0: "a", 1: "b"}, "voxel_size": "1 um", "images": [{"path": "x.tif"}]},
        "low_res": {"path": "y.tif", "phases": {0: "a", 1: "b"}},
    }
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text(yaml.safe_dump(base))
    over = {"base": "deep/base.yaml", "name": "over", "training": {"cubes": 4}, "low_res": {"phases": {5: "a", 6: "b"}}}
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(over))
    study = load_study(tmp_path / "over.yaml")
    assert (study.name, study.training.steps, study.training.cubes) == ("over", 5, 4)
    assert study.low_res.phases == {5: "a", 6: "b"}
    assert study.low_res.path == str(tmp_path / "deep" / "y.tif")


def test_every_option_of_a_study_has_a_reader():
    """A setting that nothing reads is a dead option."""
    source = "".join(f.read_text() for f in PACKAGE.rglob("*.py"))
    modules = [import_module(f"hpcres.study.{file.stem}") for file in (PACKAGE / "study").glob("[!_]*.py")]
    sections = [one for module in modules for one in vars(module).values() if isinstance(one, type)]
    for section in {one for one in sections if issubclass(one, Section)}:
        for field in section.model_fields:
            read = f".{field}" in source or f'"{field}"' in source  # the report reads JSON
            assert read, f"{section.__name__}.{field}"


def test_only_the_file_of_a_study_needs_what_writes_files():
    """Sections know nothing of volumes, so that volumes can know sections."""
    for file in (PACKAGE / "study").glob("*.py"):
        needed = {name.split(".")[1] for name in imports(file) if name.startswith("hpcres.")}
        assert file.name == "file.py" or not needed & {"outputs", "volumes"}, file.name


def test_unset_variable_names_the_key(monkeypatch):
    monkeypatch.delenv("HPCRES_DATA", raising=False)
    with pytest.raises(InputError, match=r"low_res.path|high_res.images.path"):
        load_study(ROOT / "configs" / "case1-cathode.yaml")
    assert "HPCRES_DATA" not in os.environ


@pytest.mark.parametrize("script", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.name)
def test_what_the_benchmarks_import_is_there(script):
    """They run by hand only, so nothing else would say that a name they use has gone."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hpcres":
            module = import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), alias.name
