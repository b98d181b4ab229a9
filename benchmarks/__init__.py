"""Ratios against peers and floors, each measured in one run. `python -m benchmarks.NAME`, or all by `make bench`."""
