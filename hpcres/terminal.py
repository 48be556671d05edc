"""Output to terminals of any encoding: characters that the encoding lacks are replaced, and no error is raised."""

from __future__ import annotations

import codecs
import sys

_REPLACEMENTS = {
    "×": "x",
    "·": "*",
    "±": "+-",
    "−": "-",
    "–": "-",
    "—": "-",
    "‐": "-",
    "…": "...",
    "→": "->",
    "≤": "<=",
    "≥": ">=",
    "∞": "infinite",
    "≈": "~",
    "²": "^2",
    "³": "^3",
    "⁴": "^4",
    "⁵": "^5",
    "⁻": "^-",
    "¹": "^1",
    "µ": "u",
    "μ": "u",
    "Å": "A",
    "τ": "tau",
    "σ": "sigma",
    "φ": "phi",
    "χ": "chi",
    "°": "deg",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "│": "|",
    "─": "-",
    "━": "-",
    "╸": "-",
    "╺": "-",
    "•": "*",
}


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return a replacement for one character, or the original byte of an undecodable file name.

    This is the error handler of a codec.
    """
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    plain = _REPLACEMENTS.get(character) or character.encode("ascii", "backslashreplace").decode()
    return plain, error.start + 1


def replace_unencodable() -> None:
    """Let stdout and stderr replace the characters that their encoding lacks, such as × by x and µ by u."""
    codecs.register_error("hpcres", _replace)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="hpcres")
