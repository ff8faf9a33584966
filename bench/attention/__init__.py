"""The attention kernels against PyTorch's."""
