"""`splitsam encode`: many images over one stream, with a progress bar and a list of what failed."""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from splitsam.client.client import Client
from splitsam.client.errors import SplitsamError

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
_STREAM_TIMEOUT_S = 24 * 3600.0


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as they are given, folders searched for images by their suffix; in a stable order, each once."""
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
            found.update(dict.fromkeys(inside))
        else:
            found[path] = None
    return list(found)


def run_bulk_encode(client: Client, paths: Iterable[Path], in_flight: int) -> int:
    """Encode all images; the exit status: 0 when every one is encoded and stored, else 1."""
    files = find_images(paths)
    started_s = time.perf_counter()
    encoded, hits, failures = _encode(client, files, in_flight)
    elapsed_s = time.perf_counter() - started_s
    rate = f"{elapsed_s:.1f} s, {encoded / elapsed_s:.1f} img/s"
    print(f"{encoded} of {len(files)} images are encoded ({rate}), {hits} of them were before")
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def _encode(client: Client, files: Sequence[Path], in_flight: int) -> tuple[int, int, list[str]]:
    """Images encoded and stored, those among them that were before, and a line for each failure."""
    encoded = hits = 0
    failures: list[str] = []
    with tqdm(total=len(files), unit="img", disable=None, file=sys.stderr, dynamic_ncols=True) as progress:
        try:
            for result in client.encode_many(files, in_flight=in_flight, stream_timeout_s=_STREAM_TIMEOUT_S):
                progress.update()
                if result.image is None:
                    failures.append(f"{result.source!s}: {_reason(result.error)}")
                elif not result.image.stored:
                    failures.append(f"{result.source!s}: encoded, but the cache did not take it")
                else:
                    encoded += 1
                    hits += result.image.cache_hit
        except SplitsamError as error:
            unanswered = len(files) - encoded - len(failures)
            failures.append(f"{unanswered} images, because the stream broke: {error}")
    return encoded, hits, failures


def _reason(error: Exception | None) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
