# %% [markdown]
# # Measure an array
# Any array of whole numbers (z, y, x) is a label volume: of NumPy, Dask, Zarr or h5py.

# %%
import numpy as np

import hpcres

labels = np.zeros((64, 64, 64), np.int64)
z, y, x = np.indices(labels.shape) - 31.5
labels[z**2 + y**2 + x**2 < 20**2] = 1  # a ball of radius 20 voxels
labels[:, :, :8] = 2

# %%
found = hpcres.measure(labels, phases=["pore", "particle", "wall"], voxel_size="50 nm")
print(found)

# %% [markdown]
# Every number is an attribute, with the name that it has in metrics.json. `found.to_dict()` is that file's entry,
# `found.to_frame()` a pandas table. A notebook shows `found` itself as a table.

# %%
radius, edge, surface = 20 * 0.05, 64 * 0.05, found.specific_surface_area
fraction, area = 4 / 3 * np.pi * radius**3 / edge**3, 4 * np.pi * radius**2 / edge**3
print(f"{found.volume_fraction['particle']:.4f} of the volume, the ball itself {fraction:.4f}")
print(f"{surface.crofton['particle']:.3f} {surface.unit}, the ball itself {area:.3f}")

# %% [markdown]
# Two-point correlations, chords, clusters and the standard error of each number cost more and are asked for by name.

# %%
more = hpcres.measure(labels, phases=["pore", "particle", "wall"], voxel_size="50 nm", statistics=["connectivity"])
print(more.statistics["connectivity"]["pore"])
