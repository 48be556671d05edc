# %% [markdown]
# # Tortuosity, with its error and a second opinion
# `tortuosity` solves steady diffusion through a phase and says how far its number may be off.

# %%
import numpy as np
from scipy.ndimage import gaussian_filter

import hpcres

field = gaussian_filter(np.random.default_rng(0).standard_normal((64, 64, 64)), 3, mode="wrap")
pore = field > np.quantile(field, 0.55)  # True conducts

# %%
for direction in "zyx":
    found = hpcres.tortuosity(pore, direction=direction)
    print(f"{direction}: D_rel {found.D_rel:.5f}, at most {found.error:.0e} of it too high, tau {found.tau:.4f}")

# %% [markdown]
# TauFactor solves the same equations. It stops by another criterion, so its number differs by a little.

# %%
found = hpcres.tortuosity(pore, rtol=1e-5, check="taufactor")
print(found.check)

# %% [markdown]
# Sides may meet (`periodic`), and several phases may conduct together.

# %%
labels = np.digitize(field, np.quantile(field, [0.3, 0.6]))
both = hpcres.tortuosity(labels, phases=["solid", "gel", "pore"], conductivity={"pore": 1, "gel": 0.1}, periodic="yx")
print(f"pore and gel: D_rel {both.D_rel:.5f}")
