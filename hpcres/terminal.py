"""What a terminal cannot show is written in letters that it can: no message ends in a UnicodeEncodeError."""

from __future__ import annotations

import codecs
import sys

_LETTERS = {
    "×": "x", "·": "*", "±": "+-", "−": "-", "–": "-", "—": "-", "‐": "-", "…": "...", "→": "->", "≤": "<=", "≥": ">=",
    "∞": "infinite", "≈": "~", "²": "^2", "³": "^3", "⁴": "^4", "⁵": "^5", "⁻": "^-", "¹": "^1", "µ": "u", "μ": "u",
    "Å": "A", "τ": "tau", "σ": "sigma", "φ": "phi", "χ": "chi", "°": "deg", "’": "'", "‘": "'", "“": '"', "”": '"',
    "│": "|", "─": "-", "━": "-", "╸": "-", "╺": "-", "•": "*",
}  # fmt: skip


def _in_letters(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler: letters that stand for a character; of a file name that is no text, its own bytes."""
    assert isinstance(error, UnicodeEncodeError)
    character = error.object[error.start]
    if 0xDC80 <= ord(character) <= 0xDCFF:
        return bytes([ord(character) - 0xDC00]), error.start + 1
    plain = _LETTERS.get(character) or character.encode("ascii", "backslashreplace").decode()
    return plain, error.start + 1


def speak_what_it_can() -> None:
    """Have stdout and stderr write what their encoding lacks in other letters."""
    codecs.register_error("hpcres", _in_letters)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="hpcres")
