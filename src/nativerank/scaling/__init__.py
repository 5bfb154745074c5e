"""Compute-optimal scaling laws from a sweep of runs: read the runs, fit the laws, say how sure they are."""
