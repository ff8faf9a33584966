"""Several replicas of a service: one that is away is passed over, and nobody notices."""
# ruff: noqa: N802 (the names of RPCs)

from queue import SimpleQueue
from threading import Event

import grpc
import pytest
from test_client_calls import (  # noqa: F401 (fixtures)
    ENCODED,
    FOUND_MASK,
    GONE,
    IMAGE,
    KEY,
    SIZE,
    SOON_S,
    Scripted,
    ScriptedDecoder,
    ScriptedEncoder,
    abort,
    bulk,
    call,
    encoded,
    encoder_with,
    serve,
    willing,
)

from bench.relay import Relay
from splitsam.client import Client, SplitsamError
from splitsam.client.errors import SplitsamError as Error
from splitsam.client.retry import RetryPolicy
from splitsam.common import errors
from splitsam.v1 import decoder_pb2, encoder_pb2

KEYS = [f"{number:064x}" for number in range(12)]
LOADING = errors.NotReady("loading", retry_delay_s=60)
LOST = Error("gone", code=grpc.StatusCode.UNAVAILABLE, reason="UNAVAILABLE")


def count(servicers: list[Scripted], method: str) -> int:
    return sum(servicer.methods().count(method) for servicer in servicers)


def test_decoder_that_is_gone_is_passed_over(call):  # noqa: F811
    alive = willing()
    results = call("predict_batch", [(key, []) for key in KEYS], decoder=[GONE, alive])
    assert [result.key for result in results] == KEYS
    assert len(alive.calls) == 2  # its own images, and those of the other


@pytest.mark.parametrize("others", [0, 1])
def test_call_that_a_server_cancels_as_it_stops_is_made_again(call, others):  # noqa: F811
    stopping = ScriptedDecoder(PredictMasks=[grpc.StatusCode.CANCELLED, None])
    decoders = [stopping, *(willing() for _ in range(others))]
    assert len(call("predict_batch", [(key, []) for key in KEYS], decoder=decoders)) == len(KEYS)
    assert stopping.methods()


def test_decoder_that_loads_is_not_waited_for(call):  # noqa: F811
    loading, alive = ScriptedDecoder(PredictMasks=[LOADING]), willing()
    assert len(call("predict_batch", [(key, []) for key in KEYS], decoder=[loading, alive])) == len(KEYS)
    assert len(loading.calls) == 1


def test_image_goes_to_one_encoder_and_to_the_next_when_that_is_away(call):  # noqa: F811
    encoders = [encoder_with(), encoder_with()]
    assert call("encode", IMAGE, encoder=encoders).key == KEY
    assert sorted(len(encoder.calls) for encoder in encoders) == [0, 2]
    alive = encoder_with()
    assert call("encode", IMAGE, encoder=[GONE, encoder_with(LOADING), alive, GONE]).key == KEY


def test_full_replica_is_waited_for_and_not_left(call):  # noqa: F811
    full = errors.QueueFull("full", retry_delay_s=SOON_S)
    encoders = [encoder_with(full, ENCODED), encoder_with(full, ENCODED)]
    assert call("encode", IMAGE, encoder=encoders).key == KEY
    assert sorted(encoder.methods().count("EncodeImage") for encoder in encoders) == [0, 2]


def test_cache_that_is_down_is_the_same_for_all_replicas(call):  # noqa: F811
    down = errors.CacheUnavailable("down", retry_delay_s=SOON_S)
    decoders = [ScriptedDecoder(PredictMasks=[down, None]) for _ in range(2)]
    assert call("predict", KEY, points=[(1, 2)], decoder=decoders)
    assert sorted(len(decoder.calls) for decoder in decoders) == [0, 2]


def test_replicas_that_are_all_loading_are_asked_again_when_they_say(call):  # noqa: F811
    soon = errors.NotReady("loading", retry_delay_s=SOON_S)
    decoders = [ScriptedDecoder(PredictMasks=[soon, soon, None]) for _ in range(2)]
    assert call("predict", KEY, points=[(1, 2)], decoder=[*decoders, GONE])
    assert count(decoders, "PredictMasks") == 5


def test_replicas_that_are_all_gone_are_said_to_be(call):  # noqa: F811
    with pytest.raises(SplitsamError) as caught:
        call("predict", KEY, points=[(1, 2)], decoder=[GONE, GONE], timeout_s=0.5)
    assert caught.value.reason == "UNAVAILABLE"


def test_everything_is_asked_of_the_next_decoder(call):  # noqa: F811
    alive = ScriptedDecoder(GenerateMasks=[FOUND_MASK])
    for key in KEYS[:4]:
        assert len(call("generate", key, decoder=[GONE, alive])) == 2


class LastCall(ScriptedDecoder):
    """Says that it goes, while new connections lead elsewhere already."""

    relay = None
    next_target = ""

    def PredictMasks(self, request, context):
        self.relay.target = self.next_target
        return super().PredictMasks(request, context)

    def GenerateMasks(self, request, context):
        self.relay.target = self.next_target
        yield from super().GenerateMasks(request, context)


@pytest.mark.parametrize("method", ["predict", "generate"])
def test_a_connection_whose_server_goes_is_left_for_a_new_one(call, serve, method):  # noqa: F811
    goes = errors.NotReady("draining", retry_delay_s=SOON_S)
    going = LastCall(PredictMasks=[goes], GenerateMasks=[goes])
    alive = ScriptedDecoder(PredictMasks=[None], GenerateMasks=[FOUND_MASK])
    going.next_target = serve(alive)
    with Relay(serve(going)) as relay:
        going.relay = relay
        prompt = {"points": [(1, 1)]} if method == "predict" else {}
        assert call(method, KEYS[0], decoder=relay.address, **prompt)
    assert len(going.calls) == 2
    assert alive.calls


class LastLookUp(ScriptedEncoder):
    """Knows the image, while new connections lead elsewhere already."""

    relay = None
    next_target = ""

    def LookUpEmbedding(self, request, context):
        self.relay.target = self.next_target
        return super().LookUpEmbedding(request, context)


class OnlyOf(ScriptedDecoder):
    """Takes embeddings of its own model alone."""

    def next(self, method, request, context):
        images = [request] if method == "GenerateMasks" else request.images
        if any(image.embedding_key != KEYS[1] for image in images):
            abort(context, errors.ModelMismatch("another model made it"))
        return super().next(method, request, context)


@pytest.mark.parametrize("method", ["predict", "generate"])
def test_a_connection_to_the_encoder_of_the_model_before_is_left(call, serve, method):  # noqa: F811
    before, after = LastLookUp(LookUpEmbedding=[found(KEYS[0])]), encoder_with(found=found(KEYS[1]))
    before.next_target = serve(after)
    decoder = OnlyOf(PredictMasks=[None], GenerateMasks=[FOUND_MASK])
    prompt = {"points": [(1, 1)]} if method == "predict" else {}
    image = call("encode", IMAGE, encoder=encoder_with(found=found(KEYS[0])))
    with Relay(serve(before)) as relay:
        before.relay = relay
        assert call(method, image, encoder=relay.address, decoder=decoder, **prompt)
    assert len(before.calls) > 1
    assert decoder.calls


def found(key):
    info = encoder_pb2.EmbeddingInfo(embedding_key=key, image_size=SIZE, input_size=SIZE)
    return encoder_pb2.LookUpEmbeddingResponse(found=True, embedding=info)


def test_a_prefetch_on_a_connection_that_is_left_ends_in_peace(serve):  # noqa: F811
    is_left, is_alive = Event(), SimpleQueue()

    class Slow(ScriptedDecoder):
        def PrefetchEmbedding(self, request, context):
            is_left.wait(10)
            is_alive.put(context.is_active())
            return decoder_pb2.PrefetchEmbeddingResponse()

    goes = errors.NotReady("draining", retry_delay_s=SOON_S)
    decoder = Slow(PredictMasks=[goes, goes, None])
    with Client(serve(encoder_with()), serve(decoder)) as client:
        image = client.encode(IMAGE)
        assert client.predict(image, points=[(1, 1)])
        is_left.set()
        assert is_alive.get(timeout=10)


def test_a_name_of_several_replicas_is_asked_past_one_that_goes(call, serve):  # noqa: F811
    """As gRPC resolves `dns:///` and the name of a headless Service: one target, several addresses."""
    going = ScriptedDecoder(PredictMasks=[errors.NotReady("draining", retry_delay_s=0.2)])
    alive = [willing(), willing()]
    name = "ipv4:" + ",".join(serve(each) for each in (going, *alive))
    for key in KEYS:
        assert call("predict", key, points=[(1, 1)], decoder=name)
    results = call("predict_batch", [(key, []) for key in KEYS], decoder=name)
    assert [result.key for result in results] == KEYS
    assert count(alive, "PredictMasks") == len(KEYS) + 1


def test_replicas_behind_a_name_are_asked_in_turn(serve):  # noqa: F811
    replicas = [willing(), willing()]
    with Client(encoder=GONE, decoder="ipv4:" + ",".join(map(serve, replicas))) as client:
        for _ in range(1000):  # the first to be connected takes all until the other is
            client.predict(KEY, points=[(1, 1)])
            if all(replica.calls for replica in replicas):
                return
    pytest.fail("one replica was never asked")


def test_encode_many_goes_on_with_the_next_encoder(call):  # noqa: F811
    def one_then_gone(requests, context):
        request = next(requests)
        yield next(bulk(encoded)(iter([request]), context))
        abort(context, errors.NotReady("draining", retry_delay_s=60))

    alive = ScriptedEncoder(EncodeImages=[bulk(encoded)])
    draining = ScriptedEncoder(EncodeImages=[one_then_gone, bulk(encoded)])
    results = call("encode_many", [b"1", b"2", b"3", b"4"], encoder=[GONE, draining, alive], in_flight=3)
    assert sorted(result.position for result in results) == [0, 1, 2, 3]


def test_pauses_between_rounds_double_and_a_single_address_has_none():
    policy = RetryPolicy(attempts=4)
    assert [policy.wait_s(LOST, n, 10, replicas=2) for n in (1, 2, 3, 4)] == [0.1, 0.2, 0.4, None]
    assert policy.wait_s(LOST, 1, 10) is None
