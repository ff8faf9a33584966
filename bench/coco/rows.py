"""The results file of `bench.coco`: a line of settings, then a line for each rung and image as it is done.

A run that was interrupted goes on after its last whole line, and only with the settings of the first line.
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.coco.dataset import Id
from bench.coco.scores import Score

FORMAT = "splitsam.bench.coco/1"


class ResultsError(Exception):
    """The results file cannot be gone on with; the message is one line that names it."""


@dataclass(frozen=True)
class Row:
    """One image with one rung. `left_out` names the objects that could not be used."""

    rung: str
    image: Id
    scores: tuple[Score, ...]
    left_out: tuple[str, ...] = ()


class RowFile:
    """Opens a results file, new or begun, and holds it against other processes until it is closed.

    Args:
        settings: what figures depend on; must equal those that the file was begun with.
        environment: written beside them for the record.

    Raises:
        ResultsError: of another format, begun with other settings, damaged, or in use.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], environment: Mapping[str, Any]):
        self.path = path
        self.rows: dict[tuple[str, Id], Row] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror or error}") from error
        try:
            self._lock()
            if os.fstat(self._file.fileno()).st_size:
                self._read(settings)
            else:
                self._write({"format": FORMAT, "settings": dict(settings), "environment": dict(environment)})
        except ResultsError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, row: Row) -> None:
        self._write(dataclasses.asdict(row))
        self.rows[row.rung, row.image] = row

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResultsError(f"{self.path}: another run is writing it") from error

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()

    def _read(self, settings: Mapping[str, Any]) -> None:
        self._file.seek(0)
        header = self._read_header()
        for name in {**header, **settings}:
            then, now = header.get(name), settings.get(name)
            if then != now:
                raise ResultsError(
                    f"{self.path}: was begun with another {name} ({then!r} then, {now!r} now): "
                    "give another --results, or delete this file to begin again"
                )
        end = self._file.tell()
        for number, line in enumerate(self._file, start=2):
            # A line without its end was being written when the run stopped.
            if not line.endswith(b"\n"):
                break
            row = self._parse(line, number)
            self.rows[row.rung, row.image] = row
            end += len(line)
        self._file.truncate(end)

    def _read_header(self) -> dict[str, Any]:
        try:
            header = json.loads(self._file.readline())
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ResultsError(f"{self.path}: is not a results file of this bench.coco: give another --results")
        settings: dict[str, Any] = header["settings"]
        return settings

    def _parse(self, line: bytes, number: int) -> Row:
        try:
            content = json.loads(line)
            scores = tuple(Score(**score) for score in content["scores"])
            return Row(content["rung"], content["image"], scores, tuple(content["left_out"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ResultsError(f"{self.path}: line {number} is damaged: delete the line, or the file") from error
