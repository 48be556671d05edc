"""Structures that are drawn from known laws: the χ² model, a three-phase electrode, a separator, and their files."""
