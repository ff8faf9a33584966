"""Triton kernels of the encoder; each file holds the PyTorch reference, the kernel and its registered operator."""
