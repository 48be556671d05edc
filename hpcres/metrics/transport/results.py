"""transport.json: results merged by phase, direction and settings, the file saved whole after each solve.

A result is another one's only where both are of the same voxels: of a file by its size and time of change, of a store
by those of all its chunk files. Results of another volume, or of this one before it changed, are not mixed with new
ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcres.errors import InputError
from hpcres.volumes.files import METADATA_FILES, write_json
from hpcres.volumes.volume import Volume

_KEY = ("phase", "labels", "conductivity", "direction")
_DONE = ("converged", "not percolating", "estimate")


def digest_of(volume: Volume) -> str:
    """What changes when voxels of a volume's file or store may have: no voxel is read."""
    file, _, part = volume.path.partition(":/")
    place, digest = Path(file), hashlib.sha256(f"{part} {list(volume.shape)}".encode(errors="backslashreplace"))
    if place.is_dir():
        found = sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(place) for name in names
            if name not in METADATA_FILES
        )  # fmt: skip
    else:
        found = [file]
    for one in found:
        status, name = os.stat(one), os.path.relpath(one, place)
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="backslashreplace"))
    return digest.hexdigest()[:32]


class ResultsFile:
    """The content of a transport.json, in memory, and the file where there is one to be.

    `content` has `volume` and `reference` as `hpcres.metrics.transport` lays them out, or null.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**header, "volume": None, "reference": None, "published": []}

    def read(self) -> dict[str, Any]:
        """The volume and the reference of the file, with their results; empty where there is no file.

        InputError where it cannot be read, or an earlier hpcres wrote it without what merging needs.
        """
        if self.path is None or not self.path.exists():
            return {}
        anew = "move it away, name another --output, or begin anew with --overwrite"
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            parts = {which: found[which] for which in ("volume", "reference")}
            known = [one for part in parts.values() if part for one in part["results"]]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.path}: is damaged, so no result can be added to it; {anew}") from None
        if any(part and "digest" not in part for part in parts.values()) or any("settings" not in one for one in known):
            raise InputError(f"{self.path}: was written by an earlier hpcres, so no result can be added to it; {anew}")
        return parts

    def begin(self, parts: Mapping[str, Any]) -> None:
        """Go on from what `read` gave, on every rank alike."""
        self.content.update(parts)

    def digest_for(self, which: str, volume: Volume) -> str:
        """That of the volume; InputError where the results that are there already are of another one."""
        digest, before = digest_of(volume), self.content[which]
        path, shape = os.path.abspath(volume.path), list(volume.shape)
        if before is not None and before["digest"] != digest:
            what = "has changed since" if before["path"] == path and before["shape"] == shape else "is another volume"
            raise InputError(
                f"{self.path}: holds results of {before['path']}, and {path} {what}; name another --output, or "
                "replace them with --overwrite"
            )
        return digest

    def part(self, which: str, volume: Volume, digest: str) -> Part:
        """The results of one volume, on every rank alike."""
        about = {"path": os.path.abspath(volume.path), "shape": list(volume.shape), "digest": digest}
        before = self.content[which]
        return Part(self, which, about, [] if before is None else before["results"])

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)


class Part:
    """The results of one volume in a file."""

    def __init__(self, file: ResultsFile, which: str, about: Mapping[str, Any], results: list[dict[str, Any]]) -> None:
        self._file, self._which, self._about, self._results = file, which, about, results

    def solved(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result that is there already of what is to be solved; None where there is none, or no number."""
        one = next((one for one in self._results if _key(one) == _key(what)), None)
        return one if one is not None and one["state"] in _DONE else None

    def add(self, result: dict[str, Any]) -> None:
        """Put a result in the place of an earlier one of the same, or behind the others; `save` writes it.

        A solution also takes the place of an estimate, which has no error to hold against it.
        """
        if result["state"] in ("converged", "not percolating"):
            self._results[:] = [
                one for one in self._results
                if one["state"] != "estimate" or _key(one, of_estimate=False) != _key(result, of_estimate=False)
            ]  # fmt: skip
        places = [place for place, one in enumerate(self._results) if _key(one) == _key(result)]
        if places:
            self._results[places[0]] = result
        else:
            self._results.append(result)
        shared = {name: common(self._results, name) for name in ("crop", "voxel_size")}
        self._file.content[self._which] = {**self._about, **shared, "results": self._results}


def common(results: list[dict[str, Any]], setting: str) -> Any:
    """The setting that all results have; None where they differ."""
    values = [one.get("settings", {}).get(setting) for one in results]
    return values[0] if values and all(value == values[0] for value in values) else None


def _key(result: Mapping[str, Any], of_estimate: bool = True) -> str:
    settings = {k: v for k, v in result["settings"].items() if of_estimate or k not in ("blocks", "profile")}
    return json.dumps([*(result[name] for name in _KEY), settings], sort_keys=True)
