"""Which commit a figure was measured on."""

import subprocess
from pathlib import Path


def read_commit() -> str:
    """Short hash of this checkout, `-dirty` with changes; "unknown" where there is no git."""
    command = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
