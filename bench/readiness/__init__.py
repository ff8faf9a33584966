"""How long the encoder service takes to be ready: see `__main__.py`."""
