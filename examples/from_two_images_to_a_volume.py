# %% [markdown]
# # From a coarse volume and a sharp slice to a sharp volume
# The same stages as the commands `hpcres phantom`, `train`, `infer`, `report`, on a small phantom. A study file would
# do as well: `hpcres.train("study.yaml")`. The steps are far too few for a good volume; docs/recipes.md says how many
# a material needs.

# %%
import sys
from pathlib import Path

import hpcres

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/example")
made = folder / "phantom"
study = {
    "name": "example",
    "output": str(folder),
    "seed": 1,
    "scale_factor": 4,
    "high_res": {
        "phases": {0: "pore", 1: "active", 2: "binder"},
        "voxel_size": "50 nm",
        "images": [{"path": str(made / "slices.tif")}],
    },
    "low_res": {"path": str(made / "low_res.zarr"), "phases": {0: ["pore", "binder"], 1: "active"}},
    "phantom": {"kind": "three-phase", "voxels": [96, 96, 96], "slice_voxels": 192, "slices": 1},
    "network": {"width": 3, "critic_width": 5, "padding": "zeros", "last_stage": "transposed"},
    "training": {"steps": 20, "cubes": 2, "slices_per_axis": 4, "critic_steps": 1, "recalibration_cubes": 4},
}

# %%
print(hpcres.phantom(study, overwrite=True))
print(hpcres.train(study, overwrite=True))
painted = hpcres.infer(study, tiles="1x1x1", overwrite=True)

# %%
truth = hpcres.measure(made / "truth.zarr")
found = hpcres.measure(painted)
for phase in found.phases:
    print(f"{phase}: {found.volume_fraction[phase]:.3f} painted, {truth.volume_fraction[phase]:.3f} true")
print(hpcres.report(study))
