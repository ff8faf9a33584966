"""Log lines: what is in them, and that each is one line a machine can read."""

import contextvars
import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from splitsam.common.calls import Call, current_call
from splitsam.common.logs import JsonFormatter, TextFormatter

CALL = Call(tenant="acme", request_id="request-1", method="/splitsam.v1.EncoderService/EncodeImage")


def record(message: str = "rpc", *args: object, exc_info: Any = None, **extra: object) -> logging.LogRecord:
    logger = logging.getLogger("splitsam.test")
    return logger.makeRecord(logger.name, logging.INFO, "file.py", 1, message, args, exc_info, extra=extra)


def within_call(formatter: logging.Formatter, event: logging.LogRecord) -> str:
    def format_it() -> str:
        current_call.set(CALL)
        return formatter.format(event)

    return contextvars.copy_context().run(format_it)


def failure() -> Any:
    try:
        raise ValueError("what went wrong")
    except ValueError:
        return sys.exc_info()


def test_a_json_line_holds_message_level_logger_and_what_was_added():
    event = json.loads(JsonFormatter().format(record("%d batches", 3, code="OK", ms=1.5)))
    assert event.pop("time")
    assert event == {"level": "info", "logger": "splitsam.test", "message": "3 batches", "code": "OK", "ms": 1.5}


def test_a_json_lines_time_is_utc_with_milliseconds():
    event = record()
    event.created, event.msecs = 0.25, 250.0
    assert json.loads(JsonFormatter().format(event))["time"] == "1970-01-01T00:00:00.250Z"


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_a_line_within_a_call_holds_its_request_id(formatter: logging.Formatter):
    assert CALL.request_id in within_call(formatter, record())
    assert CALL.request_id not in formatter.format(record())


def test_a_request_id_that_was_added_wins_over_the_calls():
    event = json.loads(within_call(JsonFormatter(), record(request_id="another")))
    assert event["request_id"] == "another"


def test_a_json_line_stays_one_line_whatever_is_in_it():
    line = JsonFormatter().format(record("two\nlines", exc_info=failure(), path=sys, text="\u2028\n"))
    assert len(line.splitlines()) == 1
    assert "what went wrong" in json.loads(line)["traceback"]


def test_a_text_line_ends_with_what_was_added_and_the_traceback():
    lines = TextFormatter().format(record("refused", exc_info=failure(), code="INTERNAL")).splitlines()
    assert lines[0].endswith("refused code=INTERNAL")
    assert lines[-1] == "ValueError: what went wrong"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_configured_logs_go_to_standard_error_from_their_level_on(log_format: str):
    program = (
        "import logging; from splitsam.common.logs import configure_logs;"
        f"configure_logs(log_format={log_format!r}, level='warning');"
        "log = logging.getLogger('splitsam.test'); log.info('quiet'); log.warning('loud', extra={'n': 1})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "loud" in done.stderr
    assert (json.loads(done.stderr)["n"] == 1) if log_format == "json" else done.stderr.endswith("n=1\n")
