"""Triton kernels of both services; each file holds the kernel, its arithmetic in PyTorch and a checked way in."""
