"""transport.json: results merged by phase, direction and settings; the file is saved whole after each solve.

Results are merged only where they are of the same voxels. A file counts as the same while its size and modification
time are, a zarr store while those of all its chunk files are. Results of another volume, or of this one before it
changed, are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hpcres.errors import InputError
from hpcres.signals import set_saved, signals_received, stopped_by
from hpcres.volumes.files import METADATA_FILES, write_json
from hpcres.volumes.volume import Volume

_IDENTITY = ("phase", "labels", "conductivity", "direction")
_DONE = ("converged", "not percolating", "estimate")
_Result = TypeVar("_Result")


class Ranks(Protocol):
    """The processes of a job; `hpcres.inference.ranks.Ranks` is one."""

    rank: int
    on_node: int
    cores: int

    @property
    def communicator(self) -> Any:
        """The communicator of the processes, for `hpcres.transport.tortuosity`."""
        ...

    def from_first(self, work: Callable[[], _Result]) -> _Result:
        """Return on every rank what `work` gives on the first one."""
        ...

    def everyone(self, value: _Result) -> list[_Result]:
        """Return the values of all ranks."""
        ...


def digest_of(volume: Volume) -> str:
    """Compute a digest of path, size and modification time of a volume's files, and of its shape; read no voxel."""
    file, _, part = volume.path.partition(":/")
    place, digest = Path(file), hashlib.sha256(f"{part} {list(volume.shape)}".encode(errors="backslashreplace"))
    if place.is_dir():
        found = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(place)
            for name in names
            if name not in METADATA_FILES
        )
    else:
        found = [file]
    for one in found:
        status, name = os.stat(one), os.path.relpath(one, place)
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()[:32]


class ResultsFile:
    """The content of a transport.json in memory, and its file where `path` is not None.

    `content` has the header, and `volume` and `reference` as `hpcres.transport` describes them, or null.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**header, "volume": None, "reference": None, "published": []}

    def read(self) -> dict[str, Any]:
        """Return the entries `volume` and `reference` of the file with their results; empty where there is no file.

        Raises
        ------
        InputError
            The file is not valid JSON of this schema, or an earlier hpcres wrote it without what merging needs.
        """
        if self.path is None or not self.path.exists():
            return {}
        remedy = "move it away, name another `output`, or begin anew with `overwrite`"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            entries = {which: found[which] for which in ("volume", "reference")}
            results = [one for entry in entries.values() if entry for one in entry["results"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}: is damaged, so no result can be added to it; {remedy}") from None
        without_digest = any(entry and "digest" not in entry for entry in entries.values())
        if without_digest or any("settings" not in one for one in results):
            raise InputError(
                f"{self.path}: was written by an earlier hpcres, so no result can be added to it; {remedy}"
            )
        return entries

    def resume(self, entries: Mapping[str, Any]) -> None:
        """Continue from the entries that `read` returned on rank 0; every rank calls this with the same ones."""
        self.content.update(entries)

    def digest_for(self, which: str, volume: Volume) -> str:
        """Return `digest_of` the volume.

        Raises
        ------
        InputError
            The results in the file are of another volume, or of this one before it changed.
        """
        digest, before = digest_of(volume), self.content[which]
        path, shape = os.path.abspath(volume.path), list(volume.shape)
        if before is not None and before["digest"] != digest:
            why = "has changed since" if before["path"] == path and before["shape"] == shape else "is another volume"
            raise InputError(
                f"{self.path}: holds results of {before['path']}, and {path} {why}; name another `output`, or "
                "replace them with `overwrite`"
            )
        return digest

    def entry(self, which: str, volume: Volume, digest: str) -> Entry:
        """Return the results of one volume; every rank makes its own from the same digest."""
        about = {"path": os.path.abspath(volume.path), "shape": list(volume.shape), "digest": digest}
        before = self.content[which]
        return Entry(self, which, about, [] if before is None else before["results"])

    def save(self) -> None:
        """Write the file, where there is a path."""
        if self.path is not None:
            write_json(self.path, self.content)

    def solve_missing(
        self,
        which: str,
        volume: Volume,
        solve: Callable[..., Any],
        *,
        ranks: Ranks,
        show: Callable[[dict[str, Any], bool], None],
        resume_with: str,
    ) -> list[str]:
        """Solve the systems of one volume that the file lacks, and save the file after each solve.

        Parameters
        ----------
        which : str
            "volume" or "reference", the entry of the file.
        volume : Volume
            Labels z, y, x.
        solve : callable
            solve(finished=…, solved=…) solves the systems; the two are called as `hpcres.transport.Watch` says.
        ranks : Ranks
            The processes that solve together; rank 0 saves.
        show : callable
            Called on every rank with each result and whether it was in the file before.
        resume_with : str
            How the user resumes after a signal, for the message.

        Returns
        -------
        list of str
            Phase and direction of each solve that did not converge.

        Raises
        ------
        InputError
            The file holds results of another volume.
        Stopped
            A signal came to any rank; after a solve, when its result is saved.
        """
        digest = ranks.from_first(lambda: self.digest_for(which, volume))
        entry, unsolved = self.entry(which, volume, digest), []

        def finished(result: dict[str, Any]) -> None:
            solved_before = entry.solved(result) is result
            if result["state"] == "not converged":
                unsolved.append(f"{result['phase']}, {result['direction']}")
            show(result, solved_before)
            if not solved_before:
                entry.add(result)
                if ranks.rank == 0 and self.path is not None:
                    self.save()
                    set_saved(f"finished results are in {self.path}; {resume_with}")
            if numbers := [number for of_rank in ranks.everyone(signals_received()) for number in of_rank]:
                raise stopped_by(numbers[0])

        solve(finished=finished, solved=entry.solved)
        return unsolved


class Entry:
    """The results of one volume in a file."""

    def __init__(self, file: ResultsFile, which: str, about: Mapping[str, Any], results: list[dict[str, Any]]) -> None:
        self._file, self._which, self._about, self._results = file, which, about, results

    def solved(self, system: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the earlier result of a system (phase, labels, conductivity, direction, settings), or None.

        The result also is None where that solve did not converge, so that it is tried again.
        """
        one = next((one for one in self._results if _identity(one) == _identity(system)), None)
        return one if one is not None and one["state"] in _DONE else None

    def add(self, result: dict[str, Any]) -> None:
        """Replace the earlier result of the same system, or append; `save` writes the file.

        A solution also replaces an estimate of the same system: the estimate has no error bound.
        """
        if result["state"] in ("converged", "not percolating"):
            self._results[:] = [
                one
                for one in self._results
                if one["state"] != "estimate" or _identity(one, of_estimate=False) != _identity(result, False)
            ]
        places = [place for place, one in enumerate(self._results) if _identity(one) == _identity(result)]
        if places:
            self._results[places[0]] = result
        else:
            self._results.append(result)
        shared = {name: common(self._results, name) for name in ("crop", "voxel_size")}
        self._file.content[self._which] = {**self._about, **shared, "results": self._results}


def common(results: list[dict[str, Any]], setting: str) -> Any:
    """Return the value of a setting where all results have the same one, else None."""
    values = [one.get("settings", {}).get(setting) for one in results]
    return values[0] if values and all(value == values[0] for value in values) else None


def _identity(result: Mapping[str, Any], of_estimate: bool = True) -> str:
    """Return a key that is equal for results of the same system.

    Without `of_estimate` a solution and an estimate of a system have the same key.
    """
    settings = {k: v for k, v in result["settings"].items() if of_estimate or k not in ("blocks", "profile")}
    return json.dumps([*(result[name] for name in _IDENTITY), settings], sort_keys=True)
