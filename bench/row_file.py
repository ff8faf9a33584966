"""Rows of figures as dataclasses, and the CSV files that keep them. None is an empty field."""

import csv
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
Row = TypeVar("Row")


def columns_of(kind: type[Any]) -> tuple[str, ...]:
    return tuple(column.name for column in fields(kind))


def read_rows(kind: type[Row], path: Path) -> list[Row]:
    """Raises ValueError when the file has other columns than the dataclass."""
    columns = columns_of(kind)
    types_of = typing.get_type_hints(kind)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != columns:
            raise ValueError(f"{path} has not the columns {', '.join(columns)}")
        return [kind(**{name: _parse(types_of[name], record[name]) for name in columns}) for record in reader]


def write_rows(path: Path, kind: type[Row], rows: Sequence[Row]) -> None:
    """Never leaves half a file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns_of(kind), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _format(value) for name, value in asdict(row).items()} for row in rows)  # type: ignore[call-overload]
    os.replace(unfinished, path)


def results_path(folder: Path, benchmark: str, device: str) -> Path:
    """As in `waterfall-nvidia-h100-80gb-hbm3.csv`."""
    slug = "-".join("".join(letter if letter.isalnum() else " " for letter in device.lower()).split())
    return folder / f"{benchmark}-{slug}.csv"


def select_rows(kind: type[Row], rows: Sequence[Row], filters: str) -> list[Row]:
    """Those whose columns have one of the values given, as in `model=vit_b,vit_l batch=1`; spaces are underscores.

    Raises:
        ValueError: a word is not of that form, or names a column that does not exist.
    """
    wanted = {}
    for word in filters.split():
        column, _, values = word.partition("=")
        if column not in columns_of(kind) or not values:
            raise ValueError(f"{word!r} is not column=value with a column of the results")
        wanted[column] = values.split(",")
    return [
        row
        for row in rows
        if all(str(getattr(row, column)).replace(" ", "_") in values for column, values in wanted.items())
    ]


def _format(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _parse(kind: Any, text: str) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if not text and type(None) in options:
        return None
    return options[0](text)
