"""Files that hpcres writes, against the schemas that it ships."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from jsonschema import Draft202012Validator

from hpcres.schemas import schema_of


@cache
def validator(kind: str) -> Draft202012Validator:
    Draft202012Validator.check_schema(schema_of(kind))
    return Draft202012Validator(schema_of(kind))


def faults(kind: str, content: object) -> list[str]:
    return [f"{list(error.absolute_path)}: {error.message[:200]}" for error in validator(kind).iter_errors(content)]


def validate_files(folder: Path) -> None:
    """AssertionError for a metrics.json or transport.json that its schema refuses."""
    for kind in ("metrics", "transport"):
        for file in folder.rglob(f"*{kind}.json"):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, OSError):
                continue
            if isinstance(content, dict) and content.get("schema") == schema_of(kind)["$id"]:
                assert not (found := faults(kind, content)), f"{file}: {found}"
