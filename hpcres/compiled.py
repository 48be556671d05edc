"""How kernels are compiled: numba's options, where their machine code is kept between runs, and for which registers.

numba keeps machine code in the first of these folders that can be written: $NUMBA_CACHE_DIR, `__pycache__` beside the
source, the user's cache folder. Here a private folder in the system's temporary folder follows, and where that cannot
be written either, each process compiles anew. What is kept is for one CPU name with its features, so machines of
several kinds can share an installation.
"""

from __future__ import annotations

import ast
import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba.core import caching


def compiled(function: Any = None, **options: Any) -> Any:
    """Decorate a function, as numba.njit does, to be compiled at its first call and to run without the GIL.

    `options` are those of numba.njit.
    """
    if function is None:
        return lambda decorated: compiled(decorated, **options)
    dispatcher = numba.njit(nogil=True, **options)(function)
    with suppress(RuntimeError):  # no folder can be written: numba calls it "no locator available"
        dispatcher._cache = _Cache(function)
    return dispatcher


@lru_cache(maxsize=1)
def register_floats() -> int:
    """How many floats a register holds on the CPU that numba compiles for: 16 with AVX-512, else 8 (or less).

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES are followed. LLVM itself is asked, by a sum of 16 floats.
    """
    config: Any = numba.config
    name, features = config.CPU_NAME, config.CPU_FEATURES
    if features is None:
        features = "" if name else llvmlite.binding.get_host_cpu_features().flatten()
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine(
        cpu=name or llvmlite.binding.get_host_cpu_name(), features=features
    )
    vector = "<16 x float>"
    sum_ = f"define {vector} @f({vector} %a) {{ %b = fadd {vector} %a, %a\n ret {vector} %b }}"
    return 16 if "zmm" in machine.emit_assembly(llvmlite.binding.parse_assembly(sum_)) else 8


# ---- the cache ---------------------------------------------------------------------------------------------


class _TemporaryFolder(caching._SourceFileBackedLocatorMixin, caching._CacheLocator):
    """The last place to look: a folder of this user alone, since whoever writes there decides what runs here."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._py_file, self._lineno = py_file, py_func.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(self._own / self.get_suitable_cache_subpath(self._py_file))

    def ensure_cache_path(self) -> None:
        """OSError where the folder cannot be made, or is not this user's alone."""
        own = self._own
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
        ours = stat.S_ISDIR(found.st_mode) and (_USER is None or (found.st_uid == _USER and not found.st_mode & 0o022))
        if not ours:
            raise PermissionError(f"{own} belongs to another user, or others may write to it")
        super().ensure_cache_path()

    @property
    def _own(self) -> Path:
        return Path(tempfile.gettempdir()) / ("hpcres-kernels" if _USER is None else f"hpcres-kernels-{_USER}")


_USER = os.getuid() if hasattr(os, "getuid") else None  # without users' numbers, each has a temporary folder of its own


class _Kept(caching.CompileResultCacheImpl):
    _locator_classes = [*caching.CacheImpl._locator_classes, _TemporaryFolder]  # noqa: RUF012


class _Files(caching.IndexDataCacheFile):
    """The index and the machine code, each piece in a file that is named by what it is for.

    numba numbers the files. Two processes that compile for different CPUs or types at the same time then take the
    same number, and one may later run the other's machine code. Files that a loss of power cut short, or that
    another user alone may read, are as good as none.
    """

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception:  # pickle raises whatever the bytes lead it to
            return {}

    def load(self, key: Any) -> Any:
        try:
            return super().load(key)
        except Exception:
            return None

    def save(self, key: Any, data: Any) -> None:
        overloads = self._load_index()
        overloads[key] = self._data_name(int(hashlib.sha256(repr(key).encode()).hexdigest()[:16], 16))
        self._save_data(overloads[key], data)
        self._save_index(overloads)


class _Cache(caching.FunctionCache):
    """numba's cache of one function, in the places above, forgotten when any source it was compiled from changes.

    numba looks at the function's own file only, but the machine code holds what was imported from others too.
    """

    _impl_class = _Kept

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, sources_digest(function.__module__))

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk or quota: the next process compiles again
            super().save_overload(sig, data)


def sources_digest(module: str) -> str:
    """SHA-256 of the source of a module and of all modules of this package that it imports, directly or not."""
    found: dict[str, bytes] = {}
    left = [module]
    while left:
        name = left.pop()
        if name not in found:
            found[name], imported = _source(name)
            left += imported
    digest = hashlib.sha256()
    for _, one in sorted(found.items()):
        digest.update(one)
    return digest.hexdigest()


@cache
def _source(module: str) -> tuple[bytes, tuple[str, ...]]:
    """Digest of a module's source, and the modules of this package that its top level imports."""
    spec = find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():  # a program given with -c, a notebook
        return b"", ()
    content = Path(spec.origin).read_bytes()
    package = __name__.partition(".")[0]
    imported = []
    for node in ast.parse(content).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == package:
            imported += [node.module, *filter(_is_module, (f"{node.module}.{alias.name}" for alias in node.names))]
    return hashlib.sha256(content).digest(), tuple(imported)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False
