"""HTML pages from the templates in hpcres/templates, and the filters that write numbers as text there.

The templates hold the words and the tags. The modules that render them compute the values. All values are escaped. A
value that a template uses and that was not given is an error.
"""

from __future__ import annotations

from functools import cache
from math import floor, log10
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hpcres.volumes.files import atomic_write


def render(template: str, **values: Any) -> str:
    """Return the HTML of a template.

    Parameters
    ----------
    template : str
        Name of the template in hpcres/templates, without the ending `.html.j2`.
    **values : object
        Values that the template uses.

    Returns
    -------
    str
        HTML, in which all values are escaped.
    """
    return _environment().get_template(f"{template}.html.j2").render(values)


def write_page(target: Path, template: str, **values: Any) -> Path:
    """Write a page atomically, and return `target`.

    Parameters
    ----------
    target : Path
        File to write. Its folder is made if it does not exist.
    template : str
        Name of the template in hpcres/templates, without the ending `.html.j2`.
    **values : object
        Values that the template uses.

    Returns
    -------
    Path
        `target`.
    """
    html = render(template, **values)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    return target


def number(value: float | None) -> str:
    """Return a number as text; empty for None.

    The text has five decimals if the magnitude is from 0.001 to below 10, else five significant digits.
    """
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.5f}" if 1e-3 <= abs(value) < 10 else f"{value:.5g}"


def signed(value: float | None) -> str:
    """Return a number as text with its sign; empty for None."""
    return "" if value is None else "0" if value == 0 else f"{value:+.2g}" if abs(value) < 1e-3 else f"{value:+.5f}"


def with_error(value: float | None, error: float | None) -> str:
    """Return a value and its error as text, both to two digits of the error; without an error, the value alone."""
    if value is None or not error:
        return number(value) or "–"
    decimals = max(0, 1 - floor(log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hpcres", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # `formatted` takes a format specification of Python, as `.2%`.
    environment.filters |= {"number": number, "signed": signed, "with_error": with_error, "formatted": format}
    return environment
