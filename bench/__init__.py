"""Timings and accuracy on a device: see README.md."""
