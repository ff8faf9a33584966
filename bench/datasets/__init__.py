"""How long the command line takes for whole datasets: see `__main__.py`."""
