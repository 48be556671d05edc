"""JSON schemas (draft 2020-12) of the study file and of the files that hpcres writes, with their versions."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal

from hpcres.study import Study


def schema_of(file: Literal["study", "metrics", "transport"] | str) -> dict[str, Any]:
    """Return the JSON schema of a kind of file.

    Parameters
    ----------
    file : str
        study, metrics or transport. The schema of a study is of its own content only: keys that its `base` gives may be
        left out.

    Returns
    -------
    dict
        Its `$id` is the `schema` that metrics.json and transport.json state.

    Examples
    --------
    >>> schema_of("metrics")["$id"]
    'hpcres metrics 2'
    >>> "training" in schema_of("study")["properties"]
    True
    """
    if file != "study":
        content: dict[str, Any] = json.loads(files(__name__).joinpath(f"{file}.json").read_text(encoding="utf-8"))
        return content
    content = Study.model_json_schema()
    content["properties"] |= {
        "base": {
            "description": "Studies whose content this one changes.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        }
    }
    content.pop("required", None)  # a base may say it
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "hpcres study 1", **content}
