"""Encoding from end to end, set against the model alone: see `__main__.py`."""
