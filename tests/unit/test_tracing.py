"""Spans: which are made, below which, what failure leaves on them, and what crosses to another process."""

import asyncio
import contextvars
import threading
import time

import pytest
from opentelemetry import trace
from probe_service import Probe, running

from splitsam.common import tracing
from splitsam.common.batcher import Batcher
from splitsam.common.cache import RecordCache
from splitsam.common.errors import CacheUnavailable, DeviceOutOfMemory, InvalidArgument
from splitsam.common.keys import Address
from splitsam.common.records import EMBEDDING
from splitsam.v1 import encoder_pb2 as pb

PRIVATE = "/home/somebody/photograph.jpg"
CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = "00-{}-{}-01".format(*CALLER)


def ended(recorded):
    return {span.name: span for span in recorded.get_finished_spans()}


def test_a_step_of_nothing_recorded_is_none(recorded):
    with tracing.step("lonely") as span:
        assert not span.is_recording()
    assert recorded.get_finished_spans() == ()
    assert tracing.carrier() == ()


def test_steps_lie_below_the_step_around_them(recorded):
    with tracing.ended(tracing.begin("request")) as request, tracing.within(request):
        with tracing.step("outer"), tracing.step("inner", {"n": 1}):
            tracing.note({"noted": True})
        assert tracing.current() is request
    spans = ended(recorded)
    assert spans["inner"].parent.span_id == spans["outer"].context.span_id
    assert spans["outer"].parent.span_id == spans["request"].context.span_id
    assert dict(spans["inner"].attributes) == {"n": 1, "noted": True}


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (InvalidArgument("image", PRIVATE), "INVALID_ARGUMENT"),
        (OSError(2, PRIVATE), "FileNotFoundError"),
        (UnicodeDecodeError("utf-8", PRIVATE.encode(), 0, 1, PRIVATE), "UnicodeDecodeError"),
        (asyncio.CancelledError(PRIVATE), "CancelledError"),
    ],
)
def test_a_failure_leaves_its_reason_and_not_its_text(recorded, error, name):
    with (
        pytest.raises(type(error)),
        tracing.ended(tracing.begin("request")) as request,
        tracing.within(request),
        tracing.step("step"),
    ):
        raise error
    for span in recorded.get_finished_spans():
        assert not span.status.is_ok
        assert span.attributes["error.type"] == name
        assert PRIVATE not in span.to_json()
    assert len(recorded.get_finished_spans()) == 2


def test_a_batch_leads_from_each_request_to_all_others(recorded):
    first, second, third = (tracing.begin(name) for name in "abc")
    spans = tracing.begin_batch("model", [first, trace.INVALID_SPAN, second, third], {})
    assert [span.is_recording() for span in spans] == [True, False, True, True]
    assert [span.parent.span_id for span in spans if span.is_recording()] == [
        request.get_span_context().span_id for request in (first, second, third)
    ]
    links = [[link.context.span_id for link in span.links] for span in spans if span.is_recording()]
    of_first = spans[0].get_span_context().span_id
    others = [request.get_span_context().span_id for request in (second, third)]
    assert links == [others, [of_first], [of_first]]


@pytest.mark.parametrize(
    ("code", "failed"), [("OK", False), ("INVALID_ARGUMENT", False), ("CANCELLED", False), ("INTERNAL", True)]
)
def test_a_request_has_failed_where_the_server_has(recorded, code, failed):
    def serve():
        span = tracing.begin_request("/splitsam.v1.Some/Method", {"traceparent": TRACEPARENT, "x-bin": b"1"}, {})
        assert tracing.trace_id_of(tracing.current()) == CALLER[0]
        tracing.end_request(span, code, None if code == "OK" else "REASON")

    contextvars.copy_context().run(serve)
    [span] = recorded.get_finished_spans()
    assert (span.name, span.kind) == ("splitsam.v1.Some/Method", trace.SpanKind.SERVER)
    assert f"{span.parent.span_id:016x}" == CALLER[1]
    assert (span.status.status_code is trace.StatusCode.ERROR) == failed
    assert span.attributes["rpc.response.status_code"] == code


def test_a_damaged_traceparent_begins_a_new_trace(recorded):
    def serve():
        tracing.begin_request("/a/b", {"traceparent": "00-" + "z" * 600}, {}).end()

    contextvars.copy_context().run(serve)
    [span] = recorded.get_finished_spans()
    assert span.parent is None


async def test_a_log_line_names_the_callers_trace_though_nobody_records(metrics, caplog):
    caplog.set_level("INFO", "splitsam.rpc")
    async with running(Probe(), metrics) as server:
        await server.stub.EncodeImage(pb.EncodeImageRequest(image=b"x"), metadata=(("traceparent", TRACEPARENT),))
        await server.stub.EncodeImage(pb.EncodeImageRequest(image=b"x"))
    traced, untraced = (record for record in caplog.records if record.name == "splitsam.rpc")
    assert traced.trace_id == CALLER[0]
    assert not hasattr(untraced, "trace_id")


async def test_the_span_of_a_dropped_stream_ends_as_cancelled(recorded, metrics, caplog):
    probe = Probe()
    async with running(probe, metrics) as server:
        stream = server.stub.DownloadEmbedding(pb.DownloadEmbeddingRequest(embedding_key="flood"))
        await stream.read()
        stream.cancel()
        await probe.finished.wait()
    span = ended(recorded)["splitsam.v1.EncoderService/DownloadEmbedding"]
    assert span.attributes["rpc.response.status_code"] == "CANCELLED"
    assert "detach" not in caplog.text


async def test_requests_of_one_batch_show_their_wait_and_the_model(recorded, metrics):
    started, go = threading.Event(), threading.Event()

    def model(items):
        started.set()
        go.wait()
        return [item if item > 0 else DeviceOutOfMemory("no room") for item in items]

    batcher = Batcher(model, name="test", max_weight=2, max_wait_ms=0, max_queue=9, metrics=metrics)
    batcher.start()

    async def ask(name, item):
        with tracing.ended(tracing.begin(name)) as request, tracing.within(request):
            await batcher.submit(item, deadline_s=time.monotonic() + 3600)

    tasks = [asyncio.create_task(ask(f"request {item}", item)) for item in (1, 2, -3, 4)]
    await asyncio.to_thread(started.wait)  # 1 and 2 are with the model, the others wait
    tasks[3].cancel()
    await asyncio.wait([tasks[3]])
    go.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    await batcher.close()
    spans = recorded.get_finished_spans()
    requests = {span.context.span_id: span.name for span in spans if span.name.startswith("request")}
    of_model = {requests[span.parent.span_id]: span for span in spans if span.name == "test model"}
    waits = {requests[span.parent.span_id]: span for span in spans if span.name == "wait for a batch"}
    assert of_model.keys() == {"request 1", "request 2", "request -3"}
    assert [of_model[f"request {item}"].attributes["splitsam.batch.entries"] for item in (1, 2, -3)] == [2, 2, 1]
    assert of_model["request 2"].links[0].context.span_id == of_model["request 1"].context.span_id
    assert waits.keys() == {"request 1", "request 2", "request -3", "request 4"}
    assert waits["request 1"].end_time <= of_model["request 1"].start_time
    assert waits["request 4"].attributes["error.type"] == "CancelledError"
    assert of_model["request -3"].attributes["error.type"] == "DEVICE_OUT_OF_MEMORY"
    assert of_model["request 1"].status.is_unset


async def test_redis_shows_what_was_found_and_not_where(recorded, metrics, redis_server):
    cache = RecordCache(redis_server.url, timeout_ms=10_000, connections=1, metrics=metrics)
    address = Address(b"t" * 16, b"k" * 32)
    with tracing.ended(tracing.begin("request")) as request, tracing.within(request):
        assert await cache.get(EMBEDDING, [address], ttl_s=60) is None
    await cache.close()
    span = ended(recorded)["redis get"]
    assert dict(span.attributes) == {
        "db.system.name": "redis",
        "db.operation.name": "get",
        "splitsam.found": False,
    }
    assert span.kind is trace.SpanKind.CLIENT


async def test_a_redis_that_is_away_shows(recorded, metrics):
    cache = RecordCache("redis://127.0.0.1:1/0", timeout_ms=10_000, connections=1, metrics=metrics)
    with tracing.ended(tracing.begin("request")) as request, tracing.within(request), pytest.raises(CacheUnavailable):
        await cache.ping()
    await cache.close()
    assert ended(recorded)["redis ping"].attributes["error.type"] == "ConnectionError"
