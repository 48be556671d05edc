"""Transport through phases: relative diffusivity D_rel, tortuosity factor tau, the whole volume at once.

The model is steady diffusion, 7-point finite volumes with harmonic face conductances. The two outer faces along a
direction are at potentials 0 and 1, half a voxel from the first and last voxel centres; sides are insulated or
periodic. With several conducting phases D_rel is relative to conductivity 1, and tau = mean conductivity of the
volume / D_rel; for one phase of conductivity 1 that is volume fraction / D_rel.

transport.json (schema "hpcres transport 2"):

    schema, hpcres, command
    solver                name, method with its boundary, stop, rtol, periodic [axes]
    volume, reference     path, shape, digest (see `results`), crop and voxel_size (null where they differ among the
                          results, crop also for the whole volume), results; reference null without one
    absent_chunks         as in metrics.json
    results               [{phase, labels, conductivity {name: value} or null, direction, settings {rtol, periodic,
                          crop, voxel_size, profile, blocks of an estimate}, state, volume_fraction,
                          percolating_fraction, clusters_left_out, voxels_left_out, D_rel, error, tau,
                          tau_percolating, iterations, seconds, bytes, profile or null}]

state is "converged"; "not percolating" (D_rel 0, tau null, which means infinite); "not converged" (both null); or
"estimate" (of blocks alone: no error, and D_rel 0 does not say that nothing percolates; `estimate` then has their
edge, number, mean_D_rel, and how far off such numbers are).
D_rel is an upper bound, and `error` the estimate of how much it is too high, as a share of it. tau takes the whole
volume fraction, tau_percolating that of the clusters which touch both faces; voxels_left_out is what is in the others.
profile: tau of each layer along the direction (see `voxels.tau_of_layers`), on request.
"""

from hpcres.transport.memory_need import check_memory
from hpcres.transport.phases import SCHEMA, Conducting, FieldStore, Watch, describe, tortuosity
from hpcres.transport.problem import DEFAULT_RTOL, INSULATED, Means, Solution, SolveSettings, parse_crop

__all__ = [
    "DEFAULT_RTOL",
    "INSULATED",
    "SCHEMA",
    "Conducting",
    "FieldStore",
    "Means",
    "Solution",
    "SolveSettings",
    "Watch",
    "check_memory",
    "describe",
    "parse_crop",
    "tortuosity",
]
