"""The ladder, rung by rung: see `__main__.py`."""
