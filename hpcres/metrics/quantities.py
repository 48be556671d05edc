"""What tables and pages call the quantities of metrics.json and transport.json (docs/glossary.md, Quantities).

A key is the name of a quantity in the code and in the files alike. The parts of a nested entry, as `tpb` and `density`,
are joined, as in `subvolumes`: tpb_density.
"""

from __future__ import annotations

HEADINGS = {
    "volume_fraction": "volume fraction",
    "specific_surface_faces": "specific surface, faces",
    "specific_surface_crofton": "specific surface, Crofton",
    "interphase_area": "interphase area",
    "tpb_density": "TPB density",
    "tpb_normalised": "TPB, normalised",
    "standard_error": "standard error",
    "agreement": "low-res agreement",
    "box_agreement": "box agreement",
    "visible_fraction": "visible fraction",
    "inside": "inside",
    "outside": "outside",
    "fraction_difference": "fraction difference",
    "grid_artefact": "grid artefact",
    "fraction_error": "fraction error",
    "area_error": "interphase area error",
    "tpb_error": "TPB error",
    "correlation_error": "correlation error",
    "tv1": "tv1",
    "tv4": "tv4",
    "clusters": "clusters",
    "largest_share": "largest share",
    "percolating_share": "percolating share",
    "geodesic_tau": "mean geodesic tortuosity",
    "D_rel": "D_rel",
    "error": "estimated error",
    "tau": "tau",
    "tau_percolating": "tau of the percolating part",
    "percolating_fraction": "percolating fraction",
}
"""Key → words."""
