"""Which images `splitsam encode` is about: files, folders, a list, a COCO file, and one shard of them."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp"))


@dataclass(frozen=True)
class ListedImage:
    """An image and its name: its path within what it was listed in, the same wherever that is mounted."""

    name: str
    path: Path


@dataclass(frozen=True)
class Shard:
    """One of `count` parts, counted from 0. An image's name alone decides its part: other images may come and go."""

    index: int
    count: int

    def holds(self, name: str) -> bool:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % self.count == self.index


def parse_shard(text: str) -> Shard:
    """Parse `I/N`, I from 0 to N-1.

    Raises:
        typer.BadParameter: the text is not of that form.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise typer.BadParameter(f"--shard takes I/N with I from 0 to N-1, not {text!r}")
    return Shard(int(match[1]), int(match[2]))


def select_images(
    paths: Sequence[Path], *, listed: Path | None, coco: Path | None, root: Path | None, shard: Shard
) -> list[ListedImage]:
    """The shard's part of all that is named by any of these; see `find_images`, `read_list` and `read_coco`.

    Raises:
        typer.BadParameter: nothing is named, or `root` without a file that it would be for.
        OSError, ValueError: as `read_list` and `read_coco` raise them.
    """
    if not paths and listed is None and coco is None:
        raise typer.BadParameter("give paths, --list or --coco")
    if root is not None and listed is None and coco is None:
        raise typer.BadParameter("--root goes with --list and --coco")
    images = find_images(paths)
    images += [] if listed is None else read_list(listed, root)
    images += [] if coco is None else read_coco(coco, root)
    return [image for image in images if shard.holds(image.name)]


def find_images(paths: Iterable[Path]) -> list[ListedImage]:
    """Files as they are given, folders searched for images by their suffix; in a stable order, each once."""
    found: dict[Path, ListedImage] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
            listed = [ListedImage(file.relative_to(path).as_posix(), file) for file in inside]
        else:
            listed = [ListedImage(path.as_posix(), path)]
        for image in listed:
            found.setdefault(image.path, image)
    return list(found.values())


def read_list(path: Path, root: Path | None = None) -> list[ListedImage]:
    """The images of a text file, a path on each line, relative to `root` (default: the file's folder).

    Raises:
        OSError: the file cannot be read.
    """
    names = [line.strip() for line in path.read_text().splitlines()]
    return _below(root or path.parent, (name for name in names if name))


def read_coco(path: Path, root: Path | None = None) -> list[ListedImage]:
    """The images of a COCO annotation file, relative to `root` (default: the file's folder).

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a COCO file.
    """
    try:
        names = [str(image["file_name"]) for image in json.loads(path.read_bytes())["images"]]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: not a COCO file with a list `images`, each with a `file_name`") from error
    return _below(root or path.parent, names)


def _below(root: Path, names: Iterable[str]) -> list[ListedImage]:
    return [ListedImage(name, root / name) for name in dict.fromkeys(names)]
