"""Disjoint sets (union-find) in an array: `parent[i]` is a member of the set of i with a number not above i.

The root of a set, which is its own parent, is its member of the smallest number.
"""

from __future__ import annotations

from hpcres.compiled import compiled


@compiled
def root(parent, i):
    """Find the root of the set of i, and shorten the path to it."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@compiled
def merge(parent, i, j):
    """Unite the sets of i and j."""
    i, j = root(parent, i), root(parent, j)
    if i < j:
        parent[j] = i
    elif j < i:
        parent[i] = j
