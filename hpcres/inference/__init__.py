"""Painting of the high-res volume: plan → read → generate → write, tile by tile over MPI ranks."""
