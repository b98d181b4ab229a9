"""Benchmarks that need a GPU, and beside it only torch, triton, transformers and peft."""
