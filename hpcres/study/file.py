"""The study file: read over its bases, overridden, checked before anything starts, and saved beside its results.

Relative paths are relative to the study file. `${NAME}` is an environment variable, and `${output}` is the study's own
output folder. An unknown key is an error that names the file, the key and the nearest known key.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from hpcres.errors import InputError
from hpcres.old_names import RENAMED_SETTINGS, rename_old_settings
from hpcres.outputs import STUDY, STUDY_MARK, refuse_output
from hpcres.study.model import Study, study_model
from hpcres.study.values import Section
from hpcres.volumes.files import atomic_write

log = logging.getLogger("hpcres")
_SHIPPED = "hpcres:"
_RECIPES = Path(__file__).resolve().parents[1] / "recipes"


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses a key given twice, of which plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise InputError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_study(path: str | Path, settings: Sequence[str] = (), output: str | None = None) -> Study:
    """Read a study file, override settings, and check the result.

    A study may name another study, or several, as its `base` and then holds only what differs; later bases take
    precedence. `hpcres:fast`, `hpcres:long` and `hpcres:long-white` are the recipes that hpcres ships.

    Parameters
    ----------
    path : path
        Study file.
    settings : sequence of str
        `section.key=value`; these take precedence over the file.
    output : str, optional
        Folder of results, in place of the study's own.

    Raises
    ------
    InputError
        The file cannot be read or is not valid. The message is one line.
    """
    path = Path(path)
    raw = _read(path, ())
    for setting in settings:
        _override(raw, setting)
    if output is not None:
        raw["output"] = str(Path(output).resolve())
    raw["output"] = _expand(str(raw.get("output", path.resolve().parent / "results")), "output", path, {})
    raw = _over_paths(raw, lambda text, key: _expand(text, key, path, {"output": raw["output"]}))
    return _validated(raw, path)


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """Return the settings of a file over those of its base, with every relative path made absolute."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such study file; give one as argument or write study.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a study file ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: no settings in it; a study file is a list of `key: value` lines")
    folder = path.resolve().parent
    for old, new in rename_old_settings(raw):
        log.warning("%s: %s is now %s; the old name is read all the same", path, old, new)
    raw = _over_paths(raw, lambda text, _: _place(text, folder))
    if "output" in raw:
        raw["output"] = _place(str(raw["output"]), folder)
    merged: dict[str, Any] = {}
    for base in _bases(raw, folder):
        if base in (*below, path.resolve()):
            raise InputError(f"{path}: base {base} leads back to itself; name another file")
        merged = _merged(merged, _read(base, (*below, path.resolve())))
    raw.pop("base", None)
    return _merged(merged, raw)


def _bases(raw: dict[str, Any], folder: Path) -> list[Path]:
    """Return the paths of the studies that a study in `folder` names as its base."""
    names = raw.get("base", [])
    return [_base(str(name), folder) for name in ([names] if isinstance(names, str) else names)]


def _base(name: str, folder: Path) -> Path:
    """Return the path of a base: `hpcres:NAME` is a recipe that hpcres ships, any other name is a path."""
    if not name.startswith(_SHIPPED):
        return Path(_place(name, folder))
    path = _RECIPES / f"{name.removeprefix(_SHIPPED)}.yaml"
    if not path.exists():
        known = ", ".join(sorted(_SHIPPED + file.stem for file in _RECIPES.glob("*.yaml")))
        raise InputError(f"base {name}: hpcres has no such recipe; use one of {known}, or the path of a study file")
    return path


def recipe_settings(name: str) -> dict[str, dict[str, Any]]:
    """Return the `network` and `training` settings of a recipe that hpcres ships.

    Parameters
    ----------
    name : str
        fast, long or long-white.

    Examples
    --------
    >>> recipe_settings("long")["network"]["noise_sigma_voxels"]
    [0, 4, 8]
    """
    settings = _read(_base(_SHIPPED + name, Path()), ())
    return {section: settings[section] for section in ("network", "training")}


def files_of(path: str | Path) -> list[str]:
    """Return the paths of a study file and of its bases; the bases of a file that cannot be read are left out."""
    found, waiting = list[str](), [Path(path)]
    while waiting:
        file = waiting.pop()
        found.append(str(file))
        try:
            raw = yaml.load(file.read_text(encoding="utf-8"), _Loader)
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(raw, dict):
            waiting += [base for base in _bases(raw, file.resolve().parent) if str(base) not in found]
    return found


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return the settings `base` with the settings `over` put over them.

    Sections are merged key by key. Maps of labels to phases are not merged, because their entries belong together. A
    low-res volume of labels replaces one of probabilities, and the reverse.
    """
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict) and key != "phases":
            before = base[key]
            if key == "low_res" and "channels" in value:
                before = {}
            elif key == "low_res" and "path" in value:
                before = {name: item for name, item in before.items() if name != "channels"}
            value = _merged(before, value)
        merged[key] = value
    return merged


def _validated(raw: dict[str, Any], path: Path) -> Study:
    try:
        return study_model(raw).model_validate(raw)
    except ValidationError as error:
        first, *others = error.errors()
        place = [str(part) for part in first["loc"] if str(part) not in ("str",)]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            known = _known_keys(study_model(raw), first["loc"][:-1])
            near = difflib.get_close_matches(place[-1], known, 1, 0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            message = f"unknown key; {remedy}"
        elif first["type"] == "missing":
            message = "is required and not given"
        elif not first["type"].startswith("value_error"):
            message = f"{message[:1].lower()}{message[1:]}, not {first['input']!r}"
        more = f" (and {len(others)} more)" if others else ""
        key = ".".join(place)
        raise InputError(f"{path}: {key + ': ' if key else ''}{message}{more}") from None


def _known_keys(model: type[Section], place: Sequence[str | int]) -> list[str]:
    for part in place:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            sections = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
            model = next((a for a in sections if issubclass(a, Section)), model)
    return list(model.model_fields)


def _override(raw: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals or not key:
        raise InputError(f"`set` {setting}: no value; write section.key=value")
    *sections, last = key.strip().split(".")
    if len(sections) == 1 and last in (renamed := RENAMED_SETTINGS.get(sections[0], {})):
        log.warning("`set` %s: it is now %s.%s; the old name is read all the same", key, sections[0], renamed[last])
        last = renamed[last]
    place: Any = raw
    for part in sections:
        place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if place is None:
            raise InputError(f"`set` {setting}: {part!r} is not a section of the study")
    if not isinstance(place, dict):
        raise InputError(f"`set` {setting}: {sections[-1]!r} is not a section of the study")
    try:
        place[last] = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise InputError(f"`set` {setting}: the value is not valid YAML; quote it") from None


_PATH_KEYS = {
    ("low_res", "path"),
    ("low_res", "channels", "path"),
    ("high_res", "images", "path"),
    ("reference", "volume"),
    ("training", "init_from"),
}


def _over_paths(value: Any, change: Callable[[str, str], str], place: tuple[str, ...] = ()) -> Any:
    """Return the same settings with `change(text, key)` applied to every path that names an input."""
    if isinstance(value, dict):
        return {k: _over_paths(v, change, (*place, str(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [_over_paths(v, change, place) for v in value]
    return change(value, ".".join(place)) if place in _PATH_KEYS and isinstance(value, str) else value


def _expand(text: str, key: str, file: Path, extra: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in extra and name not in os.environ:
            raise InputError(f"{file}: {key}: ${{{name}}} is not set; export {name} or write the path itself")
        return extra.get(name) or os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _place(path: str, folder: Path) -> str:
    """Return an absolute path; a path that starts with a variable is left for _expand."""
    expanded = Path(path).expanduser()
    if expanded.is_absolute() or path.startswith("${"):
        return str(expanded)
    return os.path.normpath(folder / expanded)


def saved_study(study: Study, stage: str, folder: Path | None = None) -> Path:
    """Return the path that `save_study` writes to."""
    return (folder or study.folder) / f"study-{stage}.yaml"


def save_study(study: Study, stage: str, folder: Path | None = None) -> Path:
    """Write the resolved study beside the results of `stage`, as `study-<stage>.yaml`, or into `folder`.

    Parameters
    ----------
    study : Study
        Study to write.
    stage : str
        Name of the command.
    folder : Path, optional
        Folder to write into, by default the study's folder of results.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InputError
        The file exists and is not a study that hpcres saved, or the folder cannot be written.
    """
    path = saved_study(study, stage, folder)
    refuse_output(path, STUDY, renewed=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = study.plain(exclude_none=True)
    text = f"{STUDY_MARK}: the study of its last {stage}\n"
    text += yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
