"""How far a long pass has come: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

from tqdm import tqdm


class Progress:
    """Counts what is done and shows it; failures are shown as they come, a pass may be cut short.

    Args:
        total: what is to be done.
        line_every_s: between lines where there is no terminal; the first one comes after as long.
        stream: where it is shown; default: stderr.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        line_every_s: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._line_every_s = line_every_s
        self._stream = stream or sys.stderr
        self._clock = clock
        self._started_s = self._last_line_s = clock()
        self._done = self._failed = 0
        self._bar: tqdm[Any] | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, unit="img", file=self._stream, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started_s

    def update(self, failure: str | None = None) -> None:
        """One more is done, well or not."""
        self._done += 1
        if failure is not None:
            self._failed += 1
            self.say(f"failed: {failure}")
        if self._bar is not None:
            self._bar.update()
        elif self._clock() - self._last_line_s >= self._line_every_s:
            self._last_line_s = self._clock()
            self.say(self._line())

    def say(self, line: str) -> None:
        """Show a line above the bar, if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def _line(self) -> str:
        per_s = self._done / max(self.elapsed_s, 1e-9)
        left_s = (self._total - self._done) / per_s
        done = f"{self._done} of {self._total} images ({self._done / self._total:.0%}), {self._failed} failed"
        return f"{done}, {per_s:.1f} img/s, {duration(left_s)} left"


def duration(seconds: float) -> str:
    """The two largest units, e.g. "1 h 20 min" or "45 s"."""
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole_s} s" if minutes else f"{whole_s} s"
