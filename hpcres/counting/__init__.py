"""Integer kernels on blocks of labels: counts that add, and the numbers derived from them."""
