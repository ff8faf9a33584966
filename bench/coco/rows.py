"""The results file of `bench.coco`: a line of settings, then a line for each rung and image as it is done."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.coco.dataset import Id
from bench.coco.scores import Score
from splitsam.client.journal import Journal, JournalError

FORMAT = "splitsam.bench.coco/1"


@dataclass(frozen=True)
class Row:
    """One image with one rung. `left_out` names the objects that could not be used."""

    rung: str
    image: Id
    scores: tuple[Score, ...]
    left_out: tuple[str, ...] = ()


class RowFile:
    """Opens a results file, new or begun; arguments as of `Journal`.

    Raises:
        JournalError: of another format, begun with other settings, damaged, or in use.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], environment: Mapping[str, Any]):
        self._journal = Journal(path, FORMAT, settings, environment)
        self.rows: dict[tuple[str, Id], Row] = {}
        try:
            for number, content in self._journal.read():
                row = self._parse(content, number)
                self.rows[row.rung, row.image] = row
        except JournalError:
            self._journal.__exit__(None, None, None)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, traceback)

    def append(self, row: Row) -> None:
        self._journal.append(dataclasses.asdict(row))
        self.rows[row.rung, row.image] = row

    def _parse(self, content: Any, number: int) -> Row:
        try:
            scores = tuple(Score(**score) for score in content["scores"])
            return Row(content["rung"], content["image"], scores, tuple(content["left_out"]))
        except (TypeError, KeyError) as error:
            raise self._journal.damaged(number) from error
