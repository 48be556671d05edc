"""Rows of the tables that the terminal and the report show: each number with its unit and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import floor, log10
from typing import Any

from hpcres.lengths import short_unit as short_length
from hpcres.metrics.quantities import HEADINGS

_SHORT_UNITS = {"1/micrometer": "1/µm", "1/micrometer^2": "1/µm²", "1/voxel": "1/voxel", "1/voxel^2": "1/voxel²"}


@dataclass(frozen=True)
class Row:
    """One metric of one phase, pair or set: our value, the ground truth's, the training images' and published ones."""

    key: str
    """Of the metric, as in `subvolumes` of metrics.json."""
    of: str
    unit: str
    value: float
    reference: float | None = None
    images: float | None = None
    cubes: Mapping[str, Any] | None = None
    """{mean, std, values} over the random sub-volumes of ours, and of the reference."""
    reference_cubes: Mapping[str, Any] | None = None
    published: tuple[Mapping[str, Any], ...] = field(default=())
    standard_error: float | None = None
    """Of ours as a value of the material, by the fit over sub-volumes (representative.py)."""

    @property
    def metric(self) -> str:
        """The metric in words."""
        return HEADINGS[self.key]

    @property
    def difference(self) -> float | None:
        """Our value − the reference; None without a reference."""
        return None if self.reference is None else self.value - self.reference

    @property
    def relative(self) -> float | None:
        """Difference / reference; None where the reference is zero."""
        return None if not self.reference else self.value / self.reference - 1

    @property
    def name(self) -> str:
        """Metric and what it is of."""
        return f"{self.metric} {self.of}".strip()


def short_unit(unit: str) -> str:
    """Abbreviate a unit for display, for example `1/micrometer` as `1/µm`."""
    return _SHORT_UNITS.get(unit) or short_length(unit)


def pair_name(key: str) -> str:
    """Return the name of a pair for display: `pore|nickel` with a dash."""
    return key.replace("|", " – ")


def metric_rows(result: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a metrics.json (with `volume`) or of its `volume` entry alone."""
    volume = result.get("volume", result)
    others = [result.get("reference"), result.get("images")]
    published = result.get("published") or ()
    rows = []
    for key, of, path, unit in _places(volume):
        reference, images = (_at(other, path) for other in others)
        rows.append(
            Row(
                key,
                pair_name(of),
                unit,
                _at(volume, path),
                reference,
                images,
                _cubes(volume, key, of),
                _cubes(result.get("reference") or {}, key, of),
                tuple(p for p in published if p["metric"] == key and _same(p["of"], of)),
                _standard_error(volume, key, of),
            )
        )
    return rows


def _places(volume: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Yield key, phase or set, the place in a volume entry, and the unit of each number."""
    surface, tpb = volume["specific_surface_area"], volume["tpb"]
    for phase in volume["volume_fraction"]:
        yield "volume_fraction", phase, ("volume_fraction", phase), ""
    for kind in ("faces", "crofton"):
        for phase in surface[kind]:
            place = ("specific_surface_area", kind, phase)
            yield f"specific_surface_{kind}", phase, place, short_unit(surface["unit"])
    for pair in volume["interphase_area"]:
        yield "interphase_area", pair, ("interphase_area", pair), ""
    if len(volume["volume_fraction"]) > 2:
        yield "tpb_density", "", ("tpb", "density"), short_unit(tpb["unit"])
        yield "tpb_normalised", "", ("tpb", "normalised"), ""
    if len(volume["volume_fraction"]) > 3:
        for some in tpb["by_phases"]:
            yield "tpb_normalised", some, ("tpb", "by_phases", some, "normalised"), ""


def _cubes(volume: Mapping[str, Any], key: str, of: str) -> Any:
    """Return {mean, std, values} over the sub-volumes; None for what is not followed over them."""
    return _at(volume.get("subvolumes"), _among_cubes(key, of))


def _standard_error(volume: Mapping[str, Any], key: str, of: str) -> Any:
    if key == "specific_surface_crofton":  # 2/3 of the faces, and so is their error
        faces = _standard_error(volume, "specific_surface_faces", of)
        return None if faces is None else faces * 2 / 3
    return _at(volume, ("statistics", "representative", *_among_cubes(key, of), "standard_error"))


def _among_cubes(key: str, of: str) -> tuple[str, ...]:
    """Return the place of a number in `subvolumes` and `representative`; of sets of phases TPB is not there."""
    return (key, of) if of else (key,)


def _at(tree: Any, path: tuple[str, ...] | None) -> Any:
    for step in path or ():
        if not isinstance(tree, Mapping) or step not in tree:
            return None
        tree = tree[step]
    return tree


def _same(of: str, key: str) -> bool:
    return sorted(of.split("|")) == sorted(key.split("|"))


def metrics_text(result: Mapping[str, Any]) -> str:
    """Format a metrics.json, or its `volume` entry alone, as a table of plain text with further lines below."""
    rows = metric_rows(result)
    volume = result.get("volume", result)
    columns = [["metric", *(row.name for row in rows)], ["value", *(plain(row.value) for row in rows)]]
    if any(row.standard_error is not None for row in rows):
        columns.append(
            [
                f"± {HEADINGS['standard_error']}",
                *("" if row.standard_error is None else f"{row.standard_error:.2g}" for row in rows),
            ]
        )
    columns.append(["unit", *(row.unit for row in rows)])
    for title, values in (
        ("reference", [row.reference for row in rows]),
        ("difference", [row.difference for row in rows]),
        ("training images", [row.images for row in rows]),
    ):
        if any(v is not None for v in values):
            sign = "+" if title == "difference" else ""
            columns.append([title, *("" if v is None else f"{v:{sign}.6f}" for v in values)])
    if any(row.relative is not None for row in rows):
        place = 1 + [column[0] for column in columns].index("difference")
        columns.insert(place, ["relative", *("" if row.relative is None else f"{row.relative:+.2%}" for row in rows)])
    if any(row.cubes for row in rows):
        count, edge = volume["subvolumes"]["count"], volume["subvolumes"]["voxels"]
        spread = [_plus_minus(row.cubes) for row in rows]
        columns.append([f"{count} cubes of {edge}³", *spread])
    widths = [max(map(len, column)) for column in columns]
    lines = [f"{volume['path']}: {size_text(volume)}", ""]
    for cells in zip(*columns, strict=True):
        aligned = [
            cell.ljust(width) if column[0] in ("metric", "unit") else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        lines.append("  ".join(aligned).rstrip())
    lines += list(_statistics_lines(volume.get("statistics") or {}))
    low_res = result.get("low_res")
    if low_res:
        compared = f"{low_res['voxels_compared']} low-res voxels"
        compared += f", {low_res['unknown']:.2%} more unknown" if low_res.get("unknown") else ""
        lines += ["", f"{HEADINGS['agreement']} {low_res['agreement']:.4%} of {compared} ({low_res['path']})"]
        if "box_agreement" in low_res:
            lines += [f"box agreement {low_res['box_agreement']:.4%} of them", *_box_lines(low_res)]
        if off := low_res.get("fraction_difference"):
            each = ", ".join(f"{name} {value:.4g}" for name, value in off.items())
            lines.append(f"fraction difference of low-res voxels, in the mean: {each}")
        lines.append(
            f"grid artefact {low_res['grid_artefact']:.1%}: faces by position in the low-res lattice, from flat"
        )
    lines += list(_appearance_lines(result))
    for one in result.get("published") or ():
        spread_text = f" ± {one['spread']:g}" if one.get("spread") is not None else ""
        what = f"{HEADINGS[one['metric']]} {one['of']}".strip()
        lines.append(f"published {what}: {one['value']:g}{spread_text} ({one['source']})")
    if skipped := (volume.get("subvolumes") or {}).get("skipped"):
        lines.append(f"no sub-volumes: {skipped}")
    return "\n".join(lines)


def _box_lines(low_res: Mapping[str, Any]) -> Iterator[str]:
    """Yield fractions of the visible groups beside the low-res volume's, and away from their boundaries."""
    for name in low_res["phases"]:
        inside, outside = (low_res[kind][name] for kind in ("inside", "outside"))
        yield (
            f"{name}: visible fraction {low_res['visible_fraction'][name]:.5f}, in the low-res volume "
            f"{low_res['volume_fraction'][name]:.5f}; inside {_share(inside)}, outside {_share(outside)}"
        )


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"


_APPEARANCE = ("fraction_error", "area_error", "tpb_error", "correlation_error", "tv1", "tv4")


def _appearance_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield how slices of ours and of the reference differ from the images, and the images' quarters from the whole."""
    shown = {name: _at(result.get(entry), ("appearance", "planes")) for name, entry in _SHOWN.items()}
    for plane, image in ((result.get("images") or {}).get("planes") or {}).items():
        errors = {name: planes[plane]["errors"] for name, planes in shown.items() if planes}
        quarters = {key: sum(values) / len(values) for key, values in image["quarters"].items()}
        where = "" if plane == "all" else f" in {plane}"
        for name, one in {**errors, "a quarter of the images": quarters}.items():
            yield f"slices of {name}{where} against the images: " + ", ".join(
                f"{HEADINGS[key]} {one[key]:.4g}" for key in _APPEARANCE if key in one
            )


_SHOWN = {"ours": "volume", "the reference": "reference"}


def _statistics_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if connected := found.get("connectivity"):
        yield ""
        for phase, one in connected.items():
            shares = ", ".join(f"{axis} {share:.2%}" for axis, share in one["percolating_share"].items())
            yield (
                f"{phase}: {one['clusters']} clusters by faces, largest share {one['largest_share']:.2%}; "
                f"percolating share along {shares}"
            )
    if geodesic := found.get("geodesic"):
        yield ""
        for phase in geodesic["z"]:
            means = ", ".join(
                f"{axis} "
                + (
                    "no path"
                    if geodesic[axis][phase]["inlet"]["tau"] is None
                    else f"{geodesic[axis][phase]['inlet']['tau']:.4f}"
                )
                for axis in "zyx"
            )
            yield f"{phase}: mean geodesic tortuosity from the inlet ({geodesic['neighbours']} neighbours) {means}"


def size_text(volume: Mapping[str, Any]) -> str:
    """Format the shape and the voxel size of a volume."""
    shape = " × ".join(map(str, volume["shape"]))
    sizes = volume["voxel_size"]
    edges = " × ".join(f"{h:g}" for h in (sizes[:1] if len(set(sizes)) == 1 else sizes))
    return f"{shape} voxels of {edges} {short_unit(volume['voxel_unit'])}"


def _plus_minus(summary: Mapping[str, Any] | None) -> str:
    if not summary or summary["mean"] is None:
        return ""
    mean, std = summary["mean"], summary["std"]
    return f"{mean:.6g}" if std is None else f"{with_error(mean, std)} ± {std:.2g}"


def plain(value: float) -> str:
    """Format an exact number: six decimal places, or six significant digits where it is below 1e-3."""
    return f"{value:.6f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.6g}"


def with_error(value: float, error: float) -> str:
    """Format a number to one digit beyond the leading one of its absolute error, at most 15: 0.21663 for ± 2e-4."""
    if not 0 < error < abs(value):
        return f"{value:.6g}"
    digits = floor(log10(abs(value))) - floor(log10(error)) + 2
    return f"{value:#.{min(digits, 15)}g}".rstrip(".")


def transport_text(result: Mapping[str, Any]) -> str:
    """Format a tortuosity result as one line."""
    what = f"{result['phase']}, {result['direction']}: volume fraction {result['volume_fraction']:.6g}, "
    left_out = ""
    if result["voxels_left_out"]:
        left_out = f"; {result['clusters_left_out']} clusters, {result['voxels_left_out']} voxels left out"
    if result["state"] == "not percolating":
        return what + "does not percolate: D_rel 0, tau infinite" + left_out
    if result["state"] == "not converged":
        return what + f"not converged after {result['iterations']} iterations: no number"
    d_rel, error = result["D_rel"], result["error"]
    if result["state"] == "estimate":
        how = result["estimate"]
        tau = "infinite" if result["tau"] is None else f"about {result['tau']:.4g}"
        return what + (
            f"D_rel about {d_rel:.4g} as a network of {how['blocks']} blocks, {how['mean_D_rel']:.4g} as their mean, "
            f"tau {tau}: {how['unreliability']}; {result['seconds']:.1f} s"
        )
    return what + (
        f"D_rel {with_error(d_rel, error * d_rel)} - {error * d_rel:.1g} (upper bound and its estimated error, "
        f"{error:.1e} of it), tau {with_error(result['tau'], error * result['tau'])} + {error * result['tau']:.1g} "
        f"(percolating fraction {result['percolating_fraction']:.6g}, tau of the percolating part "
        f"{with_error(result['tau_percolating'], error * result['tau_percolating'])}), "
        f"{result['iterations']} iterations, {result['seconds']:.1f} s, {result['bytes'] / 2**20:.0f} MiB{left_out}"
    )
