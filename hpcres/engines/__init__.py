"""How the labels of a list of stages are computed, tile by tile, on CPUs and GPUs."""
