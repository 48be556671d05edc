"""Section of the page with the transport through the volume and through its sub-volumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpcres.geometry import AXES
from hpcres.pages import number, render


def transport_section(transport: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, command: str) -> str:
    """Return the section with the results of transport.json and the transport through the sub-volumes of metrics.json.

    Parameters
    ----------
    transport, metrics : mapping or None
        Content of transport.json and of metrics.json.
    command : str
        Command that makes transport.json, which is named if there is none.

    Returns
    -------
    str
        HTML of the section.
    """
    solved = None if transport is None else _solved_values(transport)
    return render("transport", solved=solved, cubes=_cube_values(metrics), command=command)


def _cube_values(metrics: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the rows of phases and directions, ours and the truth's; None if no sub-volumes were solved."""
    ours, theirs = _cube_transport(metrics, "volume"), _cube_transport(metrics, "reference")
    if not ours:
        return None
    rows = [
        {
            "phase": phase,
            "first": place == 0,
            "direction": direction,
            "ours": one,
            "truth": theirs[phase][direction] if theirs else None,
        }
        for phase, by_direction in ours.items()
        for place, (direction, one) in enumerate(by_direction.items())
    ]
    edge = (metrics or {})["volume"]["subvolumes"]["voxels"]
    return {"edge": edge, "truth": bool(theirs), "rows": rows}


def _cube_transport(metrics: Mapping[str, Any] | None, which: str) -> Mapping[str, Any]:
    return (((metrics or {}).get(which) or {}).get("subvolumes") or {}).get("transport") or {}


def _solved_values(transport: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of what was solved, and what the note below them says."""
    results = transport["volume"]["results"]
    truth = {_key(r): r for r in (transport.get("reference") or {"results": []})["results"]}
    differ = [name for name in ("crop", "periodic", "rtol", "voxel_size", "blocks") if not _same(results, name)]
    published = [p for p in transport.get("published") or [] if p["metric"] in ("tau", "D_rel")]
    by_phase = {phase: [p for p in published if p["of"] == phase] for phase in {r["phase"] for r in results}}
    rows, last = [], None
    for one in results:
        other = truth.get(_key(one))
        first, known = one["phase"] != last, one["state"] != "estimate"
        both = other and one["D_rel"] is not None and other["D_rel"]
        share = (one["percolating_fraction"] or 0.0) / one["volume_fraction"] if one["volume_fraction"] else 0.0
        rows.append(
            {
                "phase": one["phase"],
                "first": first,
                "direction": one["direction"],
                "how": ", ".join(f"{name.replace('_', ' ')} {_setting(one, name)}" for name in differ),
                "D_rel": _state(one, "D_rel"),
                "true_D_rel": _state(other, "D_rel") if other else "",
                "relative": one["D_rel"] / other["D_rel"] - 1 if other and both else None,
                "tau": _state(one, "tau"),
                "true_tau": _state(other, "tau") if other else "",
                "tau_percolating": _state(one, "tau_percolating") if known else "",
                "percolating": share if known else None,
                "published": by_phase[one["phase"]] if first else [],
            }
        )
        last = one["phase"]
    guesses = {one["estimate"]["unreliability"] for one in results if one["state"] == "estimate"}
    crop = (
        ""
        if "crop" in differ or not transport["volume"]["crop"]
        else _setting({"settings": transport["volume"]}, "crop")
    )
    return {
        "truth": bool(truth),
        "published": any(by_phase.values()),
        "rows": rows,
        "solver": transport["solver"],
        "guesses": sorted(text for text in guesses if text not in transport["solver"]["method"]),
        "crop": crop,
    }


def _key(result: Mapping[str, Any]) -> str:
    """Return a key of what was solved, without the size of the volume's own voxels and the part of it."""
    settings = {k: v for k, v in result.get("settings", {}).items() if k in ("periodic", "rtol", "blocks")}
    return json.dumps([result["phase"], result["direction"], result.get("conductivity"), settings], sort_keys=True)


def _same(results: Sequence[Mapping[str, Any]], setting: str) -> bool:
    values = [one.get("settings", {}).get(setting) for one in results]
    return all(value == values[0] for value in values)


def _setting(result: Mapping[str, Any], name: str) -> str:
    value = result.get("settings", {}).get(name)
    if name == "crop" and value is not None:
        return ", ".join(f"{axis} {a}:{b}" for axis, (a, b) in zip(AXES, value, strict=True))
    if isinstance(value, list):
        return " × ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) or "none"
    return "none" if value is None else f"{value:g}"


def _state(result: Mapping[str, Any], key: str) -> str:
    if result["state"] == "not percolating":
        return "0" if key == "D_rel" else "∞ (does not percolate)" if key == "tau" else "∞"
    if result["state"] == "estimate":
        return f"{'∞' if result[key] is None else number(result[key])} (estimate of blocks)"
    if result[key] is None:
        return "not converged"
    # Of D_rel it is what the upper bound may be too high, of tau what it may be too low.
    error = f" {'−' if key == 'D_rel' else '+'} {result['error'] * result[key]:.1g}" if result.get("error") else ""
    return number(result[key]) + error
