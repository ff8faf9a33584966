"""Another time of day for processes that are started with its environment; the monotonic clock is left alone."""

import importlib.util
from pathlib import Path

_LIBRARY = "vendor/libfaketime/src/libfaketime.so.1"


def find_libfaketime() -> Path | None:
    """The library in the package `libfaketime`, which a pip install compiles; None without it."""
    package = importlib.util.find_spec("libfaketime")
    folders = (package and package.submodule_search_locations) or ()
    return next((path for folder in folders if (path := Path(folder) / _LIBRARY).is_file()), None)


class WallClock:
    """Raises FileNotFoundError without libfaketime."""

    def __init__(self, path: Path):
        library = find_libfaketime()
        if library is None:
            raise FileNotFoundError("libfaketime is needed: pip install libfaketime")
        self._path = path
        self.shift(0)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def shift(self, seconds: int) -> None:
        """From now on it is so much later, or earlier."""
        unfinished = self._path.with_suffix(".next")
        unfinished.write_text(f"{seconds:+d}\n")
        unfinished.replace(self._path)
