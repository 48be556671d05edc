"""Every volume file: of many formats in, OME-Zarr stores in and out. Axes are z, y, x."""
