"""One trace from the command line through both services to Redis, received by a collector over OTLP."""

import contextlib
import hashlib
import json
import os
import subprocess

import grpc
import pytest
from collector import Collector
from e2e_support import COMMAND, Caller, ask, draw, image_file, point, prompt, refusal, wait_until

from splitsam.client.stack import Stack, StackSettings
from splitsam.v1 import decoder_pb2, encoder_pb2

pytestmark = pytest.mark.own_services

TOKEN = "a-token-that-no-span-may-hold"
PHOTO = image_file(draw(7))
ENCODER, DECODER = "splitsam.v1.EncoderService", "splitsam.v1.DecoderService"
STREAM = f"{DECODER}/PredictMasksStream"
# What a person on call follows: each span below its parent, and the process that it is of.
CLIENT, ENCODING, DECODING = "splitsam-client", "splitsam-encoder", "splitsam-decoder"
TREE = {
    ("splitsam segment",): CLIENT,
    ("splitsam segment", "splitsam encode"): CLIENT,
    ("splitsam encode", f"{ENCODER}/LookUpEmbedding"): CLIENT,
    ("splitsam encode", f"{ENCODER}/EncodeImage"): CLIENT,
    (f"{ENCODER}/EncodeImage", f"{ENCODER}/EncodeImage"): ENCODING,
    (f"{ENCODER}/LookUpEmbedding", f"{ENCODER}/LookUpEmbedding"): ENCODING,
    (f"{ENCODER}/LookUpEmbedding", "redis get"): ENCODING,
    (f"{ENCODER}/EncodeImage", "receive request"): ENCODING,
    (f"{ENCODER}/EncodeImage", "redis claim"): ENCODING,
    (f"{ENCODER}/EncodeImage", "prepare image"): ENCODING,
    ("prepare image", "wait for a batch"): ENCODING,
    ("prepare image", "decode image"): ENCODING,
    (f"{ENCODER}/EncodeImage", "wait for a batch"): ENCODING,
    (f"{ENCODER}/EncodeImage", "encoder model"): ENCODING,
    (f"{ENCODER}/EncodeImage", "redis set"): ENCODING,
    ("splitsam encode", f"{DECODER}/PrefetchEmbedding"): DECODING,
    ("splitsam segment", "splitsam predict"): CLIENT,
    ("splitsam predict", f"{DECODER}/PredictMasks"): CLIENT,
    (f"{DECODER}/PredictMasks", f"{DECODER}/PredictMasks"): DECODING,
    (f"{DECODER}/PredictMasks", "find embedding"): DECODING,
    ("find embedding", "redis get"): DECODING,
    ("find embedding", "prepare embedding"): DECODING,
    (f"{DECODER}/PredictMasks", "wait for a batch"): DECODING,
    (f"{DECODER}/PredictMasks", "decoder model"): DECODING,
    (f"{DECODER}/PredictMasks", "write masks"): DECODING,
}


@pytest.fixture(scope="module")
def collector():
    running = Collector()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def traced(collector, weights, device_args, tmp_path_factory):
    """A deployment of one tenant, whose services export their spans."""
    folder = tmp_path_factory.mktemp("traced")
    (folder / "tokens").write_text(f"acme {TOKEN}\n")
    arguments = ("--checkpoint", str(weights), *device_args, "--tokens-file", str(folder / "tokens"))
    settings = StackSettings(encoder_args=arguments, decoder_args=arguments, run_folder=folder / "run")
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in collector.environment.items():
                environment.setenv(name, value)
            stack = running.enter_context(Stack(settings.on_free_ports()))
        yield stack


@pytest.fixture(scope="module")
def segmented(collector, traced, tmp_path_factory):
    """What `splitsam segment` printed of a photo, and the spans of its trace."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "token").write_text(TOKEN)
    (folder / "secret-name-of-a-photo.png").write_bytes(PHOTO)
    where = "--encoder", traced.encoder, "--decoder", traced.decoder, "--token-file", "token"
    result = subprocess.run(
        [COMMAND, "segment", "secret-name-of-a-photo.png", "--point", "100,120", "--json", *where],
        cwd=folder,
        env={**os.environ, **collector.environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    [root] = [span for span in collector.spans if span.name == "splitsam segment"]  # sent before the program ended

    def received():
        spans = [span for span in collector.spans if span.trace_id == root.trace_id]
        return spans if len(set(TREE) - edges(spans).keys()) == 0 else None

    return json.loads(result.stdout), wait_until(received, "all spans have arrived", 10)


def edges(spans, outside=""):
    """The names of each span and its parent, and the service it is of; a parent elsewhere has no name.

    A span whose parent has not arrived yet is left out.
    """
    names = {span.span_id: (span.name,) for span in spans} | {"": (), outside: ()}
    return {(*names[span.parent_id], span.name): span.service for span in spans if span.parent_id in names}


def test_one_trace_leads_from_the_command_through_both_services_to_redis(segmented):
    _, spans = segmented
    found = edges(spans)
    assert {edge: found[edge] for edge in TREE} == TREE
    assert sum(not span.parent_id for span in spans) == 1
    assert not any(span.is_failed for span in spans)


def test_spans_lie_within_their_parents(segmented):
    _, spans = segmented
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        if span.parent_id:
            parent = by_id[span.parent_id]
            assert parent.start_ns <= span.start_ns <= span.end_ns
            assert span.end_ns <= parent.end_ns or parent.service != span.service  # a server says so after its answer


def test_spans_say_what_was_asked_and_found(segmented):
    _, spans = segmented
    served = {span.name: span.attributes for span in spans if span.service != CLIENT}
    encode, predict = served[f"{ENCODER}/EncodeImage"], served[f"{DECODER}/PredictMasks"]
    assert encode["splitsam.cache_hit"] is False
    assert encode["splitsam.stored"] is True
    assert encode["splitsam.model_id"] == predict["splitsam.model_id"]
    assert (predict["splitsam.images"], predict["splitsam.prompts"]) == (1, 1)
    assert predict["splitsam.tenant"] == "acme"
    assert predict["rpc.response.status_code"] == "OK"
    assert (served["prepare image"]["splitsam.image.width"], served["prepare image"]["splitsam.image.height"]) == (
        320,
        240,
    )
    assert served["decoder model"]["splitsam.batch.weight"] == 1


def test_spans_hold_nothing_private(collector, traced, segmented):
    printed, _ = segmented
    sent = collector.raw
    secret = (traced.folder / "secret").read_text().strip()
    for text in (printed["embedding_key"], TOKEN, secret, "secret-name", str(traced.folder)):
        assert text.encode() not in sent
    for content in (bytes.fromhex(printed["embedding_key"]), hashlib.sha256(PHOTO).digest(), PHOTO[64:96]):
        assert content not in sent
        assert content.hex().encode() not in sent
    assert b"acme" in sent  # so what is looked for above would have been found


def test_log_lines_name_the_trace(traced, segmented):
    _, spans = segmented
    for service, name in (("encoder", f"{ENCODER}/EncodeImage"), ("decoder", f"{DECODER}/PredictMasks")):
        [span] = [span for span in spans if span.name == name and span.service == f"splitsam-{service}"]
        request = span.attributes["splitsam.request_id"]
        log = traced.children[service].log_path.read_text()
        assert f"request_id={request} trace_id={span.trace_id}" in log


def test_a_refusal_is_found_by_its_request_id_below_the_callers_span(collector, traced):
    caller = Caller(traced.encoder, traced.decoder, TOKEN)
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    options = caller.options()
    options["metadata"] += (("traceparent", f"00-{trace_id}-{span_id}-01"),)
    request = encoder_pb2.EncodeImageRequest(image=b"no image")
    refused = refusal(lambda: caller.encoder.EncodeImage(request, **options))
    caller.close()
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT

    def served():
        return [span for span in collector.spans if span.parent_id == span_id]

    [span] = wait_until(served, "the span of the refusal has arrived", 10)
    assert span.trace_id == trace_id
    assert span.attributes["splitsam.request_id"] == refused.metadata["request_id"]
    assert span.attributes["error.type"] == "INVALID_ARGUMENT"
    assert not span.is_failed  # the mistake is the caller's


@pytest.mark.parametrize(("background", "lane"), [(False, "click"), (True, "bulk")])
def test_a_request_that_nobody_waits_for_waits_behind_clicks(collector, traced, background, lane):
    caller = Caller(traced.encoder, traced.decoder, TOKEN)
    key = caller.encode(PHOTO).embedding.embedding_key
    trace_id, span_id = f"{1 + background:032x}", "00f067aa0ba902b7"
    options = caller.options()
    options["metadata"] += (("traceparent", f"00-{trace_id}-{span_id}-01"),)
    request = ask({key: [prompt(point(9, 9))]})
    request.background = background
    caller.decoder.PredictMasks(request, **options)
    caller.close()

    def waited():
        spans = [span for span in collector.spans if span.trace_id == trace_id]
        return [span for span in spans if span.name == "wait for a batch"]

    [span] = wait_until(waited, "the span of the wait has arrived", 10)
    assert span.attributes["splitsam.lane"] == lane


def test_each_image_and_each_position_of_a_stream_has_its_own_span(collector, traced):
    caller = Caller(traced.encoder, traced.decoder, TOKEN)
    key = caller.encode(PHOTO).embedding.embedding_key
    trace_id, span_id = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    options = caller.options()
    options["metadata"] += (("traceparent", f"00-{trace_id}-{span_id}-01"),)
    images = iter([encoder_pb2.EncodeImagesRequest(request_id=number, image=PHOTO) for number in (1, 2)])
    assert len(list(caller.encoder.EncodeImages(images, **options))) == 2
    position = decoder_pb2.PredictMasksStreamRequest(request_id=7, request=ask({key: [prompt(point(9, 9))]}))
    [answer] = caller.decoder.PredictMasksStream(iter([position]), **options)
    assert answer.HasField("result")
    caller.close()

    def served():
        names = [span.name for span in collector.spans if span.trace_id == trace_id]
        return names.count("encode item") == 2 and names.count("pointer position") == 1 and names.count(STREAM) == 1

    wait_until(served, "the spans of both streams have arrived", 10)
    found = edges([span for span in collector.spans if span.trace_id == trace_id], outside=span_id)
    assert found[f"{ENCODER}/EncodeImages", "encode item"] == ENCODING
    assert found["encode item", "redis claim"] == ENCODING
    assert found[STREAM, "pointer position"] == DECODING
    assert found["pointer position", "decoder model"] == DECODING


def test_the_encodes_of_a_search_are_in_its_trace(collector, traced):
    caller = Caller(traced.encoder, traced.decoder, TOKEN)
    trace_id, span_id = "5c9a4d1e8b7f40a2b6d3c0e1f2a3b4c5", "1122334455667788"
    options = caller.options()
    options["metadata"] += (("traceparent", f"00-{trace_id}-{span_id}-01"),)
    request = decoder_pb2.GenerateMasksRequest(image=image_file(draw(8)), points_per_side=1)
    list(caller.decoder.GenerateMasks(request, **options))
    caller.close()
    expected = {
        (f"{DECODER}/GenerateMasks",): DECODING,
        (f"{DECODER}/GenerateMasks", "splitsam encode_crop"): DECODING,
        ("splitsam encode_crop", f"{ENCODER}/EncodeImage"): DECODING,
        (f"{ENCODER}/EncodeImage", f"{ENCODER}/EncodeImage"): ENCODING,
        (f"{ENCODER}/EncodeImage", "encoder model"): ENCODING,
    }

    def received():
        spans = [span for span in collector.spans if span.trace_id == trace_id]
        found = edges(spans, outside=span_id)
        return found if expected.keys() <= found.keys() else None

    found = wait_until(received, "the spans of both services have arrived", 10)
    assert {edge: found[edge] for edge in expected} == expected
