"""A file of JSON lines that a long run leaves behind as it goes, so that the same command goes on where one stopped."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class JournalError(ValueError):
    """A journal cannot be gone on with; the message is one line that names it."""


class Journal:
    """A line of settings, then a line for each piece of work as it is done.

    A run that was interrupted goes on after the last whole line, and only with the settings of the first one. The file
    is held against other processes until it is closed.

    Args:
        path: new or begun.
        format_name: what kind of journal it is.
        settings: what the work depends on; must equal those that the file was begun with.
        environment: written beside them for the record.

    Raises:
        JournalError: of another format, begun with other settings, or in use.
    """

    def __init__(
        self, path: Path, format_name: str, settings: Mapping[str, Any], environment: Mapping[str, Any] | None = None
    ):
        self.path = path
        self._format = format_name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise JournalError(f"{path}: {error.strerror or error}") from error
        try:
            self._lock()
            if os.fstat(self._file.fileno()).st_size:
                self._check(settings)
            else:
                self.append({"format": format_name, "settings": dict(settings), "environment": dict(environment or {})})
            self._first = self._file.tell()
        except JournalError:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()

    def read(self) -> Iterator[tuple[int, Any]]:
        """Number and content of every line but the first; at the end, what is left of an unfinished one is cut off.

        Raises:
            JournalError: a line is no JSON.
        """
        self._file.seek(self._first)
        end = self._first
        for number, line in enumerate(self._file, start=2):
            # A line without its end was being written when the run stopped.
            if not line.endswith(b"\n"):
                break
            try:
                content = json.loads(line)
            except ValueError as error:
                raise self.damaged(number) from error
            yield number, content
            end += len(line)
        self._file.truncate(end)

    def damaged(self, number: int) -> JournalError:
        """What to raise where a line is not one of this journal's."""
        return JournalError(f"{self.path}: line {number} is damaged: delete the line, or the file")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"{self.path}: another run is writing it") from error

    def _check(self, settings: Mapping[str, Any]) -> None:
        self._file.seek(0)
        try:
            header = json.loads(self._file.readline())
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("format") != self._format:
            raise JournalError(f"{self.path}: is not a file of {self._format}: give another name, or delete it")
        for name in {**header["settings"], **settings}:
            then, now = header["settings"].get(name), settings.get(name)
            if then != now:
                raise JournalError(
                    f"{self.path}: was begun with another {name} ({then!r} then, {now!r} now): "
                    "give another name, or delete this file to begin again"
                )
