"""Computation of the labels of a list of stages, tile by tile, on CPUs and GPUs."""
