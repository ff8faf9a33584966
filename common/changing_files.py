"""Files that are read again while in use: a good change is taken up, a bad one is refused and the old one stays."""

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from prometheus_client import Counter

Content = TypeVar("Content")


class BadContent(Exception):
    """The files hold nothing that can be used; the message says why, never what they hold."""


class ChangingFiles(Generic[Content]):
    """What some files hold, looked at again and again. By content: a link that is swapped is seen as an edit is.

    Args:
        used: what they held when the process started.
        read: what they hold now; raises OSError.
        take: judges it and takes it up; raises BadContent and changes nothing where it is bad.
        reloads: counted as `taken` or `refused`.
        what: for the log, which says why one is refused.
    """

    def __init__(
        self,
        used: Content,
        read: Callable[[], Content],
        take: Callable[[Content], None],
        reloads: Counter,
        log: logging.Logger,
        what: str,
    ):
        self._used = used
        self._read = read
        self._take = take
        self._reloads = reloads
        self._log = log
        self._what = what
        self._last_seen: Content | str = used
        self._refused: Content | str | None = None

    def look(self) -> None:
        """Take up what the files hold if it is new and good; a bad one is logged and counted once.

        It is judged when two looks have found the same: files that are replaced one by one, or written bit by bit, are
        not whole in between.
        """
        try:
            seen: Content | str = self._read()
        except OSError as error:
            seen = str(error)
        has_settled, self._last_seen = seen == self._last_seen, seen
        if not has_settled or seen in (self._used, self._refused):
            return
        try:
            if isinstance(seen, str):
                raise BadContent(seen)
            self._take(seen)
        except BadContent as error:
            self._refused = seen
            self._reloads.labels("refused").inc()
            self._log.error(f"a new {self._what} is bad, the old one stays", extra={"problem": str(error)})
            return
        self._used, self._refused = seen, None
        self._reloads.labels("taken").inc()

    async def watch(self, interval_s: float) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            await asyncio.to_thread(self.look)
