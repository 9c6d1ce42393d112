"""Benchmarks of kernels and of whole training steps, and the result files that the documentation is made from."""
