"""What a long pass says of itself, on a terminal and in a log."""

import io

import pytest

from splitsam.client.progress import Progress, duration


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_now_and_then_and_failures_at_once():
    clock, log = Clock(), io.StringIO()
    with Progress(8, line_every_s=10, stream=log, clock=clock) as progress:
        for number in range(8):
            clock.now_s += 4
            progress.update("bad.jpg: no image" if number == 1 else None)
    assert log.getvalue().splitlines() == [
        "failed: bad.jpg: no image",
        "3 of 8 images (38%), 1 failed, 0.2 img/s, 20 s left",
        "6 of 8 images (75%), 1 failed, 0.2 img/s, 8 s left",
    ]
    assert not set(log.getvalue()) & set("\r\x1b\b")


def test_a_terminal_gets_a_bar():
    terminal = Terminal()
    with Progress(2, stream=terminal) as progress:
        progress.update()
        progress.update("bad.jpg: no image")
    assert "2/2" in terminal.getvalue()
    assert "failed: bad.jpg: no image\n" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (3600 * 30 + 59, "30 h 0 min")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text
