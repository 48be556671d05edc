"""Rows of the tables that the terminal and the report show: each number with its unit and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import floor, log10
from typing import Any

from hpcres.lengths import short_unit as short_length

_SHORT_UNITS = {"1/micrometer": "1/µm", "1/micrometer^2": "1/µm²", "1/voxel": "1/voxel", "1/voxel^2": "1/voxel²"}


@dataclass(frozen=True)
class Row:
    """One metric of one phase, pair or set: our value, the ground truth's, the training images' and published ones."""

    metric: str
    of: str
    unit: str
    value: float
    reference: float | None = None
    images: float | None = None
    cubes: Mapping[str, Any] | None = None
    """{mean, std, values} over the random sub-volumes of ours, and of the reference."""
    reference_cubes: Mapping[str, Any] | None = None
    published: tuple[Mapping[str, Any], ...] = field(default=())
    error: float | None = None
    """Standard error of ours as a value of the material, by the fit over sub-volumes (representative.py)."""

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
    spread = ("statistics", "representative")
    for metric, key, path, cubes, unit in _paths(volume):
        error = _at(volume, (*spread, *cubes, "standard_error")) if cubes else None
        if "crofton" in path:  # 2/3 of the faces, and so is their error
            faces = _at(volume, (*spread, "specific_surface_faces", key, "standard_error"))
            error = None if faces is None else faces * 2 / 3
        reference, images = (_at(other, path) for other in others)
        rows.append(
            Row(
                metric,
                pair_name(key),
                unit,
                _at(volume, path),
                reference,
                images,
                _at(volume.get("subvolumes"), cubes) if cubes else None,
                _at((result.get("reference") or {}).get("subvolumes"), cubes) if cubes else None,
                tuple(p for p in published if p["metric"] == _PUBLISHED.get(metric) and _same(p["of"], key)),
                error,
            )
        )
    return rows


_PUBLISHED = {
    "volume fraction": "volume_fraction",
    "specific surface, faces": "specific_surface_area",
    "interphase area": "interphase_area",
    "TPB density": "tpb_density",
    "TPB, normalised": "normalised_tpb",
}


def _paths(volume: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...] | None, str]]:
    """Yield metric, phase or set, its place in a volume entry, its place among the sub-volumes, and unit."""
    surface, tpb = volume["specific_surface_area"], volume["tpb"]
    for phase in volume["volume_fraction"]:
        yield "volume fraction", phase, ("volume_fraction", phase), ("volume_fraction", phase), ""
    for kind, cubes in (("faces", "specific_surface_faces"), ("crofton", "")):
        for phase in surface[kind]:
            place = (cubes, phase) if cubes else None
            label = f"specific surface, {'faces' if cubes else 'Crofton'}"
            yield label, phase, ("specific_surface_area", kind, phase), place, short_unit(surface["unit"])
    for pair in volume["interphase_area"]:
        yield "interphase area", pair, ("interphase_area", pair), ("interphase_area", pair), ""
    if len(volume["volume_fraction"]) > 2:
        yield "TPB density", "", ("tpb", "density"), ("tpb_density",), short_unit(tpb["unit"])
        yield "TPB, normalised", "", ("tpb", "normalised"), ("tpb_normalised",), ""
    if len(volume["volume_fraction"]) > 3:
        for some in tpb["by_phases"]:
            yield "TPB, normalised", some, ("tpb", "by_phases", some, "normalised"), None, ""


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
    if any(row.error is not None for row in rows):
        columns.append(["± standard error", *("" if row.error is None else f"{row.error:.2g}" for row in rows)])
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
        lines += ["", f"low-res agreement {low_res['agreement']:.4%} of {compared} ({low_res['path']})"]
        if "box_agreement" in low_res:
            lines += [f"box agreement {low_res['box_agreement']:.4%} of them", *_box_lines(low_res)]
        if off := low_res.get("fraction_difference"):
            each = ", ".join(f"{name} {value:.4g}" for name, value in off.items())
            lines.append(f"fractions in low-res voxels differ by {each} in the mean")
        lines.append(f"faces by position in the low-res lattice: {low_res['grid_artefact']:.1%} from flat at most")
    lines += list(_appearance_lines(result))
    for one in result.get("published") or ():
        spread_text = f" ± {one['spread']:g}" if one.get("spread") is not None else ""
        what = f"{one['metric']} {one['of']}".strip()
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


_APPEARANCE = {
    "fraction_error": "fractions",
    "area_error": "areas",
    "tpb_error": "TPB",
    "correlation_error": "correlations",
    "tv1": "tv1",
    "tv4": "tv4",
}


def _appearance_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield how slices of ours and of the reference differ from the images, and the images' quarters from the whole."""
    shown = {name: _at(result.get(entry), ("appearance", "planes")) for name, entry in _SHOWN.items()}
    for plane, image in ((result.get("images") or {}).get("planes") or {}).items():
        errors = {name: planes[plane]["errors"] for name, planes in shown.items() if planes}
        quarters = {key: sum(values) / len(values) for key, values in image["quarters"].items()}
        where = "" if plane == "all" else f" in {plane}"
        for name, one in {**errors, "a quarter of the images": quarters}.items():
            yield f"slices of {name}{where} against the images: " + ", ".join(
                f"{title} {one[key]:.4g}" for key, title in _APPEARANCE.items() if key in one
            )


_SHOWN = {"ours": "volume", "the reference": "reference"}


def _statistics_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if connected := found.get("connectivity"):
        yield ""
        for phase, one in connected.items():
            shares = ", ".join(f"{axis} {share:.2%}" for axis, share in one["percolating_share"].items())
            yield (
                f"{phase}: {one['clusters']} clusters by faces, the largest {one['largest_share']:.2%} of it; "
                f"percolating along {shares}"
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
        f"(percolating fraction {result['percolating_fraction']:.6g}, its tau "
        f"{with_error(result['tau_percolating'], error * result['tau_percolating'])}), "
        f"{result['iterations']} iterations, {result['seconds']:.1f} s, {result['bytes'] / 2**20:.0f} MiB{left_out}"
    )
