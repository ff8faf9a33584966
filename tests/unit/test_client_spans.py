"""What both clients show of an operation: each call that it takes, and the trace that its servers are told of."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry import trace

from splitsam.client import AsyncClient, Client
from splitsam.common import tracing
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc, types_pb2

KEY = "a" * 64
GONE = "127.0.0.1:1"
SIZE = types_pb2.ImageSize(width=8, height=6)


class Decoder(decoder_pb2_grpc.DecoderServiceServicer):
    """Answers without masks, or with two found ones; remembers the metadata of calls."""

    def __init__(self):
        self.told = []

    def PredictMasks(self, request, context):  # noqa: N802 - gRPC's name
        self.told.append(dict(context.invocation_metadata()))
        masks = [decoder_pb2.PromptMasks(masks=[decoder_pb2.PredictedMask(predicted_iou=0.5)])]
        image = decoder_pb2.ImageMasks(embedding_key=KEY, image_size=SIZE, prompts=masks)
        return decoder_pb2.PredictMasksResponse(images=[image])

    def GenerateMasks(self, request, context):  # noqa: N802 - gRPC's name
        self.told.append(dict(context.invocation_metadata()))
        mask = decoder_pb2.PredictedMask(predicted_iou=0.5, bits=b"\x01" + bytes(5))
        for _ in range(2):
            yield decoder_pb2.GenerateMasksResponse(mask=mask, image_size=SIZE)


@pytest.fixture
def decoder():
    return Decoder()


@pytest.fixture
def address(decoder):
    server = grpc.server(ThreadPoolExecutor(2))
    decoder_pb2_grpc.add_DecoderServiceServicer_to_server(decoder, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def predict(address):
    with Client(GONE, address, token="a-token") as sam:
        sam.predict(KEY, points=[(1, 1)])


def predict_awaited(address):
    async def run():
        async with AsyncClient(GONE, address, token="a-token") as sam:
            await sam.predict(KEY, points=[(1, 1)])

    asyncio.run(run())


@pytest.mark.parametrize("call", [predict, predict_awaited])
def test_servers_are_told_of_the_call_in_an_operation(recorded, decoder, address, call):
    call(address)
    rpc, operation = recorded.get_finished_spans()
    assert (operation.name, operation.kind) == ("splitsam predict", trace.SpanKind.INTERNAL)
    assert (rpc.name, rpc.kind) == ("splitsam.v1.DecoderService/PredictMasks", trace.SpanKind.CLIENT)
    assert rpc.parent.span_id == operation.context.span_id
    assert rpc.attributes["server.port"] == int(address.rpartition(":")[2])
    [told] = decoder.told
    assert told["traceparent"].startswith(f"00-{rpc.context.trace_id:032x}-{rpc.context.span_id:016x}-")
    assert told["authorization"] == "Bearer a-token"


@pytest.mark.parametrize("call", [predict, predict_awaited])
def test_servers_are_told_nothing_while_nobody_records(decoder, address, call):
    call(address)
    [told] = decoder.told
    assert not {"traceparent", "tracestate"} & told.keys()


@pytest.mark.parametrize("call", [predict, predict_awaited])
def test_a_replica_that_is_away_shows_as_a_call_of_its_own(recorded, address, call, monkeypatch):
    monkeypatch.setattr("splitsam.client.replicas.rendezvous", lambda addresses, key: addresses)
    call([GONE, address])
    away, rpc, operation = recorded.get_finished_spans()
    assert (away.attributes["error.type"], away.attributes["server.port"]) == ("UNAVAILABLE", 1)
    assert rpc.attributes["rpc.response.status_code"] == "OK"
    assert operation.status.is_unset


def test_the_program_around_a_client_has_the_operation_in_its_own_trace(recorded, address):
    with tracing.ended(tracing.begin("program")) as program, tracing.within(program):
        predict(address)
    assert len({span.context.trace_id for span in recorded.get_finished_spans()}) == 1


def test_results_on_a_stream_leave_the_programs_span_the_current_one(recorded, decoder, address):
    with Client(GONE, address) as sam:
        for _ in sam.generate(KEY):
            assert not tracing.current().get_span_context().is_valid
            break
        masks = sam.generate(KEY)
        next(masks)
        masks.close()
    operations = recorded.get_finished_spans()
    assert [span.name for span in operations] == ["splitsam generate"] * 2
    assert all(span.status.is_unset for span in operations)
    sent = [told["traceparent"].split("-")[2] for told in decoder.told]
    assert sent == [f"{span.context.span_id:016x}" for span in operations]


async def test_awaited_results_on_a_stream_leave_the_programs_span_the_current_one(recorded, decoder, address):
    async with AsyncClient(GONE, address) as sam:
        async for _ in sam.generate(KEY):
            assert not tracing.current().get_span_context().is_valid
    [operation] = recorded.get_finished_spans()
    assert decoder.told[0]["traceparent"].split("-")[2] == f"{operation.context.span_id:016x}"
