"""Integer kernels on blocks of labels: counts that add, and what they say."""
