"""Optimizers, and the rate of each step."""
