"""Least peers that benchmarks measure against, where none can be installed."""
