"""When a process exports its traces, by the environment alone, and what it says when it cannot."""

import os
import subprocess
import sys

import pytest
from collector import Collector

from splitsam.encoder_service.__main__ import main

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
# Begins a span and says whether the SDK was imported.
PROGRAM = """
import sys
from splitsam.common import tracing
from splitsam.common.trace_export import exporting
with exporting("a-program"):
    with tracing.ended(tracing.begin("work")):
        pass
print("opentelemetry.sdk" in sys.modules)
"""


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


def run(program=PROGRAM, **environment):
    variables = {**os.environ, "no_proxy": "127.0.0.1", **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "always_on"},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "True"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_the_sdk_is_not_even_imported(environment):
    result = run(**environment)
    assert (result.stdout, result.stderr) == ("False\n", "")


@pytest.mark.parametrize(
    ("environment", "service"),
    [
        ({}, "a-program"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=theirs,deployment.environment.name=test"}, "theirs"),
    ],
)
def test_with_an_endpoint_spans_arrive_before_the_program_ends(environment, service):
    collector = Collector()
    try:
        result = run(**collector.environment, **environment)
    finally:
        collector.stop()
    assert (result.stdout, result.stderr) == ("True\n", "")
    [span] = collector.spans
    assert (span.name, span.service) == ("work", service)


def test_the_sampler_of_the_environment_decides():
    collector = Collector()
    try:
        assert run(**collector.environment, OTEL_TRACES_SAMPLER="always_off").stdout == "True\n"
    finally:
        collector.stop()
    assert collector.spans == []


def test_a_collector_that_is_away_does_not_keep_a_program():
    result = run(**ENDPOINT, OTEL_EXPORTER_OTLP_TIMEOUT="1")
    assert result.returncode == 0
    assert "Failed to export" in result.stderr or "aborting retry" in result.stderr


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
    ],
)
def test_a_service_that_cannot_export_as_asked_says_so_and_ends(environment, named, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    assert f"error: {named}" in capsys.readouterr().err


def test_a_missing_extra_is_named():
    missing = "import sys; sys.modules['opentelemetry.sdk'] = None\n" + PROGRAM
    result = run(missing, **ENDPOINT)
    assert result.returncode == 1
    assert "splitsam[tracing]" in result.stderr.splitlines()[-1]
