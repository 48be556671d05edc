"""Cache of the machine code of numba kernels, one file per kernel, types and CPU, in a folder that can be written.

The cache of numba itself has these faults, which the classes here correct. It fails where no folder can be written, or
where a disk is full. It numbers its files, so that of two processes that compile at the same time one may later run
the other's code. It unpickles files that were cut short. It keeps code after a change of a source that the kernel's
module imports.

The manual of numba does not describe the classes extended here. `compiled.compiled` works without a cache if a release
of numba has other classes, and tests/test_machines.py then fails.
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
    """The private folder in the system's temporary folder, which is tried last.

    Whoever can write to the folder decides what runs here, so only this user may.
    """

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._py_file, self._lineno = py_file, py_func.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        """Return the path of the folder for the kernel's source file."""
        return str(self._own / self.get_suitable_cache_subpath(self._py_file))

    def ensure_cache_path(self) -> None:
        """Make the folder.

        Raises
        ------
        OSError
            The folder cannot be made, or another user owns it or may write to it.
        """
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
    """The folders that numba tries, with the temporary folder as one more candidate at the end."""

    _locator_classes = [*caching.CacheImpl._locator_classes, TemporaryFolder]  # noqa: RUF012


class Files:
    """Files of machine code, one per key: a SHA-256 of all that the code depends on, then the pickled code.

    A key holds the types of the arguments, the CPU with its features, and a digest of the function's bytecode.

    Parameters
    ----------
    folder : Path
        Folder of the files.
    stem : str
        Start of the names of the files.
    stamp : str
        State of the sources and libraries that the code is made from.
    """

    def __init__(self, folder: Path, stem: str, stamp: str) -> None:
        self._folder, self._stem, self._stamp = folder, stem, stamp

    def load(self, key: Any) -> Any:
        """Return what was saved for `key` with this stamp; None if there is no such file or it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:  # none was saved, or only another user may read it
            return None
        size = hashlib.sha256().digest_size
        if content[:size] != self._checksum(key, content[size:]):
            return None
        return pickle.loads(content[size:])

    def save(self, key: Any, data: Any) -> None:
        """Save the code of a key.

        Raises
        ------
        OSError
            The disk is full or the file cannot be written.
        """
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
    """The machine code of one function.

    Raises
    ------
    RuntimeError
        From numba: no folder can be written.
    """

    _impl_class = Folders

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = f"{numba.__version__} {llvmlite.__version__} {sources_digest(function.__module__)}"
        self._cache_file: Any = Files(Path(self._cache_path), self._impl.filename_base, stamp)

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save the code of one signature; on a full disk nothing is saved, and the next process compiles again."""
        with suppress(OSError):  # a full disk: the next process compiles again
            super().save_overload(sig, data)


def sources_digest(module: str) -> str:
    """Return the SHA-256 of the sources of a module and of all modules of this package that it imports.

    Modules that are imported indirectly count too.
    """
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
    """Return the SHA-256 of a module's source, and the modules of this package that its top level imports."""
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
