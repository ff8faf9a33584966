"""The accuracy experiment: see `__main__.py`."""
