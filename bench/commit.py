"""Which commit a figure was measured on."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read_commit() -> str:
    """Short hash of this checkout, `-dirty` with changes but to results; "unknown" where there is no git."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(*words: str) -> str:
    command = ("git", "-C", str(ROOT), *words)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
