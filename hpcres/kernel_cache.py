"""A cache of the machine code of numba kernels: in a folder that can be written, one file per kernel, types and CPU.

numba's own cache is extended where it falls short: it fails where no folder can be written, or where a disk is full;
it numbers its files, so that of two processes that compile at the same time one may later run the other's code; it
unpickles files that were cut short; and it keeps code after a change of a source that the kernel's module imports.

The manual of numba does not describe the classes extended here. `compiled.compiled` works without a cache where a
release of numba has others, and tests/test_machines.py then fails.
"""

from __future__ import annotations

import ast
import hashlib
import os
import pickle
import secrets
import stat
import tempfile
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching
from numba.core.serialize import dumps

_USER = os.getuid() if hasattr(os, "getuid") else None
"""None on Windows, where each user has a temporary folder of their own."""


class TemporaryFolder(caching._SourceFileBackedLocatorMixin, caching._CacheLocator):
    """The last folder that is tried. Whoever can write to it decides what runs here, so only this user may."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._py_file, self._lineno = py_file, py_func.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        return str(self._own / self.get_suitable_cache_subpath(self._py_file))

    def ensure_cache_path(self) -> None:
        """Make the folder; OSError where it cannot be made, or another user owns it or may write to it."""
        own = self._own
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
        private = _USER is None or (found.st_uid == _USER and not found.st_mode & 0o022)
        if not (stat.S_ISDIR(found.st_mode) and private):
            raise PermissionError(f"{own} is no folder that only this user can write to")
        super().ensure_cache_path()

    @property
    def _own(self) -> Path:
        return Path(tempfile.gettempdir()) / ("hpcres-kernels" if _USER is None else f"hpcres-kernels-{_USER}")


class Folders(caching.CompileResultCacheImpl):
    """numba's choice of a folder, with one more candidate at its end."""

    _locator_classes = [*caching.CacheImpl._locator_classes, TemporaryFolder]  # noqa: RUF012


class Files:
    """One file of machine code per key: a SHA-256 of all that it depends on, then the pickled code.

    `stem` begins the names of the files, `stamp` is the state of the sources and libraries that code is made from. A
    key holds the types of the arguments, the CPU with its features, and a digest of the function's bytecode.
    """

    def __init__(self, folder: Path, stem: str, stamp: str) -> None:
        self._folder, self._stem, self._stamp = folder, stem, stamp

    def load(self, key: Any) -> Any:
        """What was saved for `key` with this stamp; None where there is no such file, or it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:  # none was saved, or only another user may read it
            return None
        size = hashlib.sha256().digest_size
        if content[:size] != self._checksum(key, content[size:]):
            return None
        return pickle.loads(content[size:])

    def save(self, key: Any, data: Any) -> None:
        """OSError where the disk is full or the file cannot be written."""
        code, path = dumps(data), self._path(key)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            temporary.write_bytes(self._checksum(key, code) + code)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _path(self, key: Any) -> Path:
        return self._folder / f"{self._stem}.{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.nbc"

    def _checksum(self, key: Any, code: bytes) -> bytes:
        return hashlib.sha256(f"{self._stamp} {key!r} ".encode() + code).digest()


class KernelCache(caching.FunctionCache):
    """The machine code of one function; RuntimeError (numba's) where no folder can be written."""

    _impl_class = Folders

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = f"{numba.__version__} {llvmlite.__version__} {sources_digest(function.__module__)}"
        self._cache_file: Any = Files(Path(self._cache_path), self._impl.filename_base, stamp)

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):  # a full disk: the next process compiles again
            super().save_overload(sig, data)


def sources_digest(module: str) -> str:
    """SHA-256 of the sources of a module and of all modules of this package that it imports, directly or not."""
    digests: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in digests:
            digests[name], imported = _source(name)
            waiting += imported
    total = hashlib.sha256()
    for _, digest in sorted(digests.items()):
        total.update(digest)
    return total.hexdigest()


@cache
def _source(module: str) -> tuple[bytes, tuple[str, ...]]:
    """SHA-256 of a module's source, and the modules of this package that its top level imports."""
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
