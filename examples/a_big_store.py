# %% [markdown]
# # A store that does not fit in memory
# A store is opened, not read: its blocks are read when they are counted, here by threads of this process. With a Dask
# client of a cluster, `measure(..., client=client)` counts the same blocks there. This store is small; the code is the
# same for 2000³ voxels.

# %%
import sys
from pathlib import Path

import dask.array as da

import hpcres

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/example-store")
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# Any array is written as a sharded OME-Zarr store, shard row by shard row. This one is made block by block by Dask.

# %%
random = da.random.default_rng(0).integers(0, 2, (160, 128, 128), dtype="uint8", chunks=64)
store = hpcres.convert(random, folder / "big.zarr", phases={0: "pore", 1: "solid"}, voxel_size="65 nm", overwrite=True)
print(store.shape, store.phases, store.edges)

# %%
print(hpcres.measure(store).volume_fraction)

# %% [markdown]
# A store slices like an array, and only the box asked for is read. `hpcres tortuosity --memory 4GiB` solves out of core
# what is larger than memory.

# %%
part = store[32:96, 32:96, 32:96]
print(hpcres.tortuosity(part, 0).tau)
