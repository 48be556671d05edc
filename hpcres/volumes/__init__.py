"""Volume files: reading of many formats, reading and writing of OME-Zarr stores. Axes are z, y, x."""
