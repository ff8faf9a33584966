"""What is raised around the model, not by it: every caller is answered, and the batcher goes on."""

import asyncio
import time
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

from splitsam.common import tracing
from splitsam.common.batcher import Batcher, Served
from splitsam.common.errors import InternalError
from splitsam.common.metrics import Metrics

ITEMS = [1, 2, 3]


class Broken(SpanProcessor):
    """Raises wherever a span of that name begins or ends, as an exporter with a defect does."""

    def __init__(self, begins: str = "", ends: str = "") -> None:
        self._begins, self._ends = begins, ends

    def on_start(self, span: Span, parent_context: object = None) -> None:
        if span.name == self._begins:
            raise RuntimeError("tracing is broken")

    def on_end(self, span: Span) -> None:
        if span.name == self._ends:
            raise RuntimeError("tracing is broken")


@pytest.fixture
def trace_with(monkeypatch: pytest.MonkeyPatch):
    def install(processor: SpanProcessor) -> None:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(processor)
        monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("test"))

    return install


async def serve_twice(metrics: Metrics, request: str = "request") -> tuple[list[object], list[object]]:
    """What becomes of two batches, one after the other, each of callers that have spans."""

    async def call(item: int) -> Served[int]:
        with tracing.within(tracing.begin(request)):
            return await batcher.submit(item, deadline_s=time.monotonic() + 3600)

    def run(items: Sequence[int]) -> Sequence[int]:
        return [2 * item for item in items]

    batcher = Batcher(run, name="test", max_weight=len(ITEMS), max_wait_ms=10_000, max_queue=9, metrics=metrics)
    batcher.start()
    async with asyncio.timeout(20):
        first = await asyncio.gather(*map(call, ITEMS), return_exceptions=True)
        second = await asyncio.gather(*map(call, ITEMS), return_exceptions=True)
        await batcher.close()
    return first, second


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The texts of what was raised, as the log has them."""
    assert not [record for record in caplog.records if record.name == "asyncio"]
    return [str(record.exc_info[1]) for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("name", ["queue_seconds", "batch_fill"])
async def test_a_metric_that_fails_before_the_model_is_everybodys_internal_error(metrics, caplog, name):
    setattr(metrics, name, metrics.seconds("splitsam_other", "Another", ["batcher", "another label"]))
    for batch in await serve_twice(metrics):
        assert [type(outcome) for outcome in batch] == [InternalError] * 3
    assert logged(caplog) == ["Incorrect label count"] * 2


async def test_a_metric_that_fails_behind_the_model_costs_nobody_the_result(metrics, caplog):
    metrics.model_seconds = metrics.seconds("splitsam_other", "Another", ["batcher", "another label"])
    for batch in await serve_twice(metrics):
        assert [outcome.value for outcome in batch] == [2, 4, 6]
    assert logged(caplog) == ["Incorrect label count"] * 2


@pytest.mark.parametrize("deadline_s", [None, -1.0], ids=["no number", "passed, and that is not counted"])
async def test_an_entry_that_fails_when_its_turn_comes_is_answered_and_the_next_is_served(metrics, caplog, deadline_s):
    metrics.dropped = metrics.seconds("splitsam_other", "Another", ["batcher"])
    batcher = Batcher(list, name="test", max_weight=1, max_wait_ms=0, max_queue=9, metrics=metrics)
    batcher.start()
    async with asyncio.timeout(20):
        with pytest.raises(InternalError):
            await batcher.submit(1, deadline_s=deadline_s)
        assert (await batcher.submit(2, deadline_s=time.monotonic() + 3600)).value == 2
        await batcher.close()
    assert len(logged(caplog)) == 1


async def test_tracing_that_fails_before_the_model_is_everybodys_internal_error(metrics, caplog, trace_with):
    trace_with(Broken(begins="test model"))
    for batch in await serve_twice(metrics):
        assert [type(outcome) for outcome in batch] == [InternalError] * 3
    assert logged(caplog) == ["tracing is broken"] * 2


async def test_tracing_that_fails_behind_the_model_costs_nobody_the_result(metrics, caplog, trace_with):
    trace_with(Broken(ends="test model"))
    for batch in await serve_twice(metrics):
        assert [outcome.value for outcome in batch] == [2, 4, 6]
    assert logged(caplog) == ["tracing is broken"] * 2


async def test_a_model_that_awaits_what_others_cancel_is_everybodys_internal_error(metrics, caplog):
    async def run(items: Sequence[int]) -> Sequence[int]:
        if 1 in items:
            elsewhere = asyncio.get_running_loop().create_future()
            elsewhere.cancel()
            await elsewhere
        return items

    batcher = Batcher(run, name="test", max_weight=1, max_wait_ms=0, max_queue=9, metrics=metrics)
    batcher.start()
    async with asyncio.timeout(20):
        with pytest.raises(InternalError):
            await batcher.submit(1, deadline_s=time.monotonic() + 3600)
        assert (await batcher.submit(2, deadline_s=time.monotonic() + 3600)).value == 2
        await batcher.close()
    assert len(logged(caplog)) == 1
