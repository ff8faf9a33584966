"""From what `--checkpoint` names to a verified file on this machine's disk.

A digest is checked before a file is used, and before a downloaded one gets its name in the cache.
"""

import hashlib
import http.client
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.error import HTTPError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from splitsam.common.errors import CheckpointError

log = logging.getLogger("splitsam.checkpoints")

META_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
META_SHA256 = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
FILE_SUFFIXES = (".pth", ".pt", ".safetensors")
MAX_DOWNLOAD_BYTES = 4 * 2**30
DOWNLOAD_TIMEOUT_S = 3600.0
_STALL_TIMEOUT_S = 30.0
_BLOCK_BYTES = 2**20


def locate_checkpoint(checkpoint: str, sha256: str | None, cache_dir: Path) -> Path:
    """Find, or download once, the file a checkpoint setting names, and verify its digest.

    Args:
        checkpoint: a path, a file:// or an https:// URL.
        sha256: the file's digest, 64 hex digits; needed for a URL unless the file's name is one of `META_SHA256`.
        cache_dir: folder for downloads, kept under their digest so that the next start needs no network.

    Raises:
        CheckpointError: no such file, a digest that is missing or differs, or a failed download.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise CheckpointError("--sha256 takes 64 hex digits")
    if "://" not in checkpoint:
        return _verified_local(_expanded(checkpoint), sha256)
    url = _split(checkpoint)
    if url.scheme == "file" and url.netloc in ("", "localhost"):
        return _verified_local(Path(unquote(url.path)), sha256)
    if url.scheme != "https" or not url.hostname or "@" in url.netloc:
        raise CheckpointError(
            f"--checkpoint takes a path, a file:// or an https:// URL without credentials, not {_shown(url)}"
        )
    name = PurePosixPath(unquote(url.path)).name
    digest = sha256 or META_SHA256.get(name)
    if digest is None:
        raise CheckpointError(f"a checkpoint from a URL needs its digest: add --sha256 for {_shown(url)}")
    _check_suffix(name)
    return _cached_download(url, digest.lower(), cache_dir)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"no checkpoint file at {path}: nobody has that home") from error


def _split(url: str) -> SplitResult:
    try:
        split = urlsplit(url)
        _ = split.port  # it is parsed when it is asked for
    except ValueError as error:
        raise CheckpointError("--checkpoint is not a URL that can be read") from error
    return split


def _verified_local(path: Path, sha256: str | None) -> Path:
    try:
        if not path.is_file():
            raise CheckpointError(f"no checkpoint file at {path}")
        _check_suffix(path.name)
        expected = sha256 or META_SHA256.get(path.name)
        if expected is None:
            return path
        found = file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint file: {error}") from error
    if found == expected.lower():
        return path
    hint = "" if sha256 else "; it is cut short or not Meta's: fetch it again, or give it another name"
    raise CheckpointError(f"{path} has SHA-256 {found}, expected {expected.lower()}{hint}")


def _check_suffix(name: str) -> None:
    if not name.endswith(FILE_SUFFIXES):
        raise CheckpointError(f"a checkpoint file ends in {', '.join(FILE_SUFFIXES)}; {name!r} does not")


def _shown(url: SplitResult) -> str:
    """A URL as it may be logged: a query or credentials can be secret."""
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def _cached_download(url: SplitResult, digest: str, cache_dir: Path) -> Path:
    path = cache_dir / "checkpoints" / (digest + PurePosixPath(url.path).suffix)
    try:
        if path.is_file():
            if file_sha256(path) == digest:
                return path
            log.warning("a cached checkpoint is damaged and is downloaded again", extra={"path": str(path)})
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
            try:
                _download(url, part, digest)
                part.flush()
                os.fsync(part.fileno())
                os.replace(part.name, path)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise CheckpointError(f"cannot keep a checkpoint in {path.parent}: {error}") from error
    return path


def _download(url: SplitResult, target: IO[bytes], digest: str) -> None:
    """Stream a URL into a file while hashing it; on any problem nothing has been used yet."""
    log.info("downloading a checkpoint", extra={"url": _shown(url)})
    hasher = hashlib.sha256()
    for block in _blocks(url):
        hasher.update(block)
        target.write(block)
    if hasher.hexdigest() != digest:
        raise CheckpointError(f"{_shown(url)} has SHA-256 {hasher.hexdigest()}, expected {digest}")


def _blocks(url: SplitResult) -> Iterator[bytes]:
    """The body of a URL, within bounds of size and time; every network problem is a CheckpointError."""
    request = Request(url.geturl(), headers={"User-Agent": "splitsam"})  # noqa: S310 (the opener speaks only https)
    deadline_s = time.monotonic() + DOWNLOAD_TIMEOUT_S
    size_bytes = 0
    try:
        with _https_opener().open(request, timeout=_STALL_TIMEOUT_S) as response:
            announced = response.headers.get("Content-Length", "")
            while block := response.read1(_BLOCK_BYTES):
                size_bytes += len(block)
                if size_bytes > MAX_DOWNLOAD_BYTES:
                    raise CheckpointError(f"{_shown(url)} is larger than {MAX_DOWNLOAD_BYTES} bytes")
                if time.monotonic() > deadline_s:
                    raise CheckpointError(f"{_shown(url)} was not downloaded within {DOWNLOAD_TIMEOUT_S:.0f} s")
                yield block
    except HTTPError as error:
        error.close()
        raise CheckpointError(f"{_shown(url)} answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(f"cannot download {_shown(url)}: {getattr(error, 'reason', error)}") from error
    if announced.isdecimal() and size_bytes < int(announced):
        raise CheckpointError(f"{_shown(url)} broke off after {size_bytes} of {announced} bytes: start again")


def _https_opener() -> OpenerDirector:
    """An opener that follows redirects and the system's proxy, and that refuses every scheme but https."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPSHandler(),
        HTTPRedirectHandler(),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
        UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
