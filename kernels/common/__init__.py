"""What all operations share: version guards, the choice of an implementation, and launches of Triton kernels."""
