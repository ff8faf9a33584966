"""A CSV of measured rows, one frozen dataclass each, that a run adds to and later runs replace in part."""

import csv
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args

RESULTS = Path(__file__).parent / "results"


class Measured(Protocol):
    """A dataclass of str, int and float, or of these or None, which is an empty field in the CSV."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def key(self) -> tuple[Any, ...]:
        """What one run measures together and replaces together; rows are sorted by it."""


Row = TypeVar("Row", bound=Measured)


class ResultsFile(Generic[Row]):
    """The CSV of one GPU, rewritten with every row that is added.

    The first row of a key drops what earlier runs have left under that key: ratios compare within one run only.
    """

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self._path, self._kind = path, kind
        self._begun: set[tuple[Any, ...]] = set()

    def add(self, row: Row) -> None:
        kept = read_rows(self._path, self._kind) if self._path.exists() else []
        if row.key not in self._begun:
            kept = [other for other in kept if other.key != row.key]
            self._begun.add(row.key)
        write_rows(self._path, sorted([*kept, row], key=lambda row: row.key), self._kind)


def columns(kind: type[Row]) -> tuple[str, ...]:
    return tuple(column.name for column in fields(kind))


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Raises ValueError when the file has other columns."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns(kind):
            raise ValueError(f"{path} has not the columns {', '.join(columns(kind))}")
        return [
            kind(**{column.name: _parse(record[column.name], column.type) for column in fields(kind)})
            for record in reader
        ]


def write_rows(path: Path, rows: list[Row], kind: type[Row]) -> None:
    """Never leaves half a file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(kind), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _format(value) for name, value in asdict(row).items()} for row in rows)
    os.replace(unfinished, path)


def _format(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _parse(text: str, kind: Any) -> str | int | float | None:
    kinds = get_args(kind) or (kind,)
    if not text and type(None) in kinds:
        return None
    value: str | int | float = kinds[0](text)
    return value
