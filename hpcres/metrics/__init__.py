"""Measurement of label volumes: integer counts that add, scheduled with Dask, and transport."""
