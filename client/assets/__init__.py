"""The photograph that the demo sends."""
