"""Inputs that nobody would send by accident, for everything that reads what strangers send: see `__main__.py`."""
