"""Super-resolve segmented 3D images of porous materials on a cluster, and measure them."""

__version__ = "0.1.0"
