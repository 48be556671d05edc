"""Generators and critics. Pure torch: no files, no study, no ranks."""
