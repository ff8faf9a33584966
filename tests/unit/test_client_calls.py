"""Retries, replays and errors, seen by both clients, against real gRPC servers that fail as they are told."""
# ruff: noqa: N802 (the names of RPCs)

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from splitsam.client import AsyncClient, Client, SplitsamError
from splitsam.client.retry import RetryPolicy
from splitsam.common import errors
from splitsam.common.messages import to_item_error
from splitsam.common.status import rich_status
from splitsam.v1 import decoder_pb2, decoder_pb2_grpc, encoder_pb2, encoder_pb2_grpc, types_pb2

IMAGE = b"the bytes of an image"
KEY = "a" * 64
SIZE = types_pb2.ImageSize(width=8, height=6)
FOUND = encoder_pb2.LookUpEmbeddingResponse(
    found=True, embedding=encoder_pb2.EmbeddingInfo(embedding_key=KEY, image_size=SIZE, input_size=SIZE)
)
NOT_FOUND = encoder_pb2.LookUpEmbeddingResponse(found=False)
ENCODED = encoder_pb2.EncodeImageResponse(embedding=FOUND.embedding, stored=True)
SOON_S = 0.002
FOUND_MASK = decoder_pb2.GenerateMasksResponse(
    mask=decoder_pb2.PredictedMask(predicted_iou=0.5, bits=b"\x01" + bytes(5)),
    point=decoder_pb2.Point(x=4, y=3),
    image_size=SIZE,
)
ITERATED = ("encode_many", "generate")
GONE = "127.0.0.1:1"


class Scripted:
    """Answers each method with the next entry of its script, the last one again and again; remembers the calls."""

    def __init__(self, **script):
        self.script = {method: list(entries) for method, entries in script.items()}
        self.calls = []

    def next(self, method, request, context):
        self.calls.append((method, request, dict(context.invocation_metadata()), context.time_remaining()))
        entries = self.script[method]
        entry = entries.pop(0) if len(entries) > 1 else entries[0]
        if isinstance(entry, errors.ServiceError):
            abort(context, entry)
        if isinstance(entry, grpc.StatusCode):
            context.abort(entry, entry.value[1])  # as gRPC itself does
        return entry

    def methods(self):
        return [call[0] for call in self.calls]


def abort(context, error):
    trailing = [("grpc-status-details-bin", rich_status(error, "request-1").SerializeToString())]
    if error.retry_delay_s is not None:
        trailing.append(("grpc-retry-pushback-ms", str(round(error.retry_delay_s * 1000))))
    context.set_trailing_metadata(trailing)
    context.abort(error.code, error.message)


class ScriptedEncoder(Scripted, encoder_pb2_grpc.EncoderServiceServicer):
    def __init__(self, **script):
        super().__init__(**{"LookUpEmbedding": [NOT_FOUND], **script})

    def LookUpEmbedding(self, request, context):
        return self.next("LookUpEmbedding", request, context)

    def EncodeImage(self, request, context):
        return self.next("EncodeImage", request, context)

    def EncodeImages(self, requests, context):
        yield from self.next("EncodeImages", None, context)(requests, context)

    def GetModelInfo(self, request, context):
        return encoder_pb2.EncoderServiceGetModelInfoResponse()

    def DownloadEmbedding(self, request, context):
        yield from self.next("DownloadEmbedding", request, context)


class ScriptedDecoder(Scripted, decoder_pb2_grpc.DecoderServiceServicer):
    def PredictMasks(self, request, context):
        self.next("PredictMasks", request, context)
        return answer_to(request)

    def GenerateMasks(self, request, context):
        for _ in range(2):
            yield self.next("GenerateMasks", request, context)

    def PredictMasksStream(self, requests, context):
        yield from self.next("PredictMasksStream", None, context)(requests, context)


def answer_to(request):
    return decoder_pb2.PredictMasksResponse(
        images=[
            decoder_pb2.ImageMasks(
                embedding_key=image.embedding_key,
                image_size=SIZE,
                prompts=[
                    decoder_pb2.PromptMasks(masks=[decoder_pb2.PredictedMask(predicted_iou=0.5)]) for _ in image.prompts
                ],
            )
            for image in request.images
        ]
    )


@pytest.fixture
def serve():
    """Serve a servicer on a free port; returns its address."""
    servers = []

    def start(servicer):
        server = grpc.server(ThreadPoolExecutor(4))
        if isinstance(servicer, ScriptedEncoder):
            encoder_pb2_grpc.add_EncoderServiceServicer_to_server(servicer, server)
        else:
            decoder_pb2_grpc.add_DecoderServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


@pytest.fixture(params=["sync", "async"])
def call(request, serve):
    """Serve scripted services and run one method of a client, of either kind."""

    def run(method, *arguments, encoder=None, decoder=None, settings=None, **options):
        where = {"encoder": addresses(encoder or GONE), "decoder": addresses(decoder or willing())}
        if request.param == "sync":
            with Client(**where, **(settings or {})) as client:
                result = getattr(client, method)(*arguments, **options)
                return list(result) if method in ITERATED else result
        return asyncio.run(run_async(where | (settings or {}), method, arguments, options))

    def addresses(given):
        if isinstance(given, list):
            return [addresses(each) for each in given]
        return given if isinstance(given, str) else serve(given)

    async def run_async(where, method, arguments, options):
        async with AsyncClient(**where) as client:
            result = getattr(client, method)(*arguments, **options)
            return [each async for each in result] if method in ITERATED else await result

    return run


def willing():
    return ScriptedDecoder(PredictMasks=[None])


def encoder_with(*encodes, found=NOT_FOUND):
    return ScriptedEncoder(LookUpEmbedding=[found], EncodeImage=list(encodes) or [ENCODED])


def test_encode_asks_for_the_digest_and_uploads_nothing_when_found(call):
    encoder = encoder_with(found=FOUND)
    image = call("encode", IMAGE, encoder=encoder)
    assert encoder.methods() == ["LookUpEmbedding"]
    assert encoder.calls[0][1].image_sha256 == hashlib.sha256(IMAGE).digest()
    assert (image.key, image.cache_hit, image.width_px, image.height_px) == (KEY, True, 8, 6)


def test_encode_uploads_when_not_found(call, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(IMAGE)
    encoder = encoder_with()
    image = call("encode", path, encoder=encoder)
    assert encoder.methods() == ["LookUpEmbedding", "EncodeImage"]
    assert encoder.calls[1][1].image == IMAGE
    assert not image.cache_hit


def test_encode_uploads_when_the_cache_cannot_be_asked(call):
    down = errors.CacheUnavailable("redis is down", retry_delay_s=SOON_S)
    encoder = ScriptedEncoder(LookUpEmbedding=[down], EncodeImage=[ENCODED])
    assert call("encode", IMAGE, encoder=encoder).key == KEY
    assert encoder.methods() == ["LookUpEmbedding", "EncodeImage"]


def test_encode_of_a_missing_file_raises_its_os_error(call, tmp_path):
    with pytest.raises(FileNotFoundError):
        call("encode", tmp_path / "none.jpg", encoder=encoder_with())


def test_full_queue_is_retried_as_the_server_asks(call):
    full = errors.QueueFull("the queue is full", retry_delay_s=SOON_S)
    encoder = encoder_with(full, full, ENCODED)
    assert call("encode", IMAGE, encoder=encoder).key == KEY
    assert encoder.methods().count("EncodeImage") == 3


def test_full_queue_without_a_delay_is_not_retried(call):
    encoder = encoder_with(errors.DeadlineTooShort("no time"))
    with pytest.raises(SplitsamError, match="no time") as caught:
        call("encode", IMAGE, encoder=encoder)
    assert caught.value.reason == "DEADLINE_TOO_SHORT"
    assert encoder.methods().count("EncodeImage") == 1


def test_retries_are_bounded(call):
    encoder = encoder_with(errors.NotReady("loading", retry_delay_s=SOON_S))
    with pytest.raises(SplitsamError) as caught:
        call("encode", IMAGE, encoder=encoder)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert encoder.methods().count("EncodeImage") == RetryPolicy().attempts


def test_a_delay_beyond_the_deadline_is_not_waited_for(call):
    encoder = encoder_with(errors.NotReady("loading", retry_delay_s=60))
    with pytest.raises(SplitsamError) as caught:
        call("encode", IMAGE, encoder=encoder)
    assert caught.value.retry_delay_s == 60
    assert encoder.methods().count("EncodeImage") == 1


def test_refused_input_carries_its_fields_and_request_id(call):
    encoder = encoder_with(errors.InvalidArgument("image", "must be a JPEG"))
    with pytest.raises(SplitsamError) as caught:
        call("encode", IMAGE, encoder=encoder)
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    assert [(violation.field, violation.description) for violation in error.violations] == [("image", "must be a JPEG")]
    assert error.request_id == "request-1"


def test_a_defect_names_its_request(call):
    with pytest.raises(SplitsamError, match="request request-1"):
        call("encode", IMAGE, encoder=encoder_with(errors.InternalError("internal error")))


def test_unreachable_service_names_its_address(call):
    with pytest.raises(SplitsamError, match=r"127\.0\.0\.1:1") as caught:
        call("encode", IMAGE)
    assert (caught.value.reason, caught.value.retry_delay_s) == ("UNAVAILABLE", None)


def test_calls_carry_token_and_deadline(call):
    encoder = encoder_with()
    call("encode", IMAGE, encoder=encoder, settings={"token": "secret"})
    for _, _, metadata, remaining_s in encoder.calls:
        assert metadata["authorization"] == "Bearer secret"
        assert 0 < remaining_s < 31


def test_per_call_timeout_shortens_the_deadline(call):
    encoder = encoder_with()
    call("encode", IMAGE, encoder=encoder, timeout_s=5)
    assert all(remaining_s < 6 for _, _, _, remaining_s in encoder.calls)


def test_expired_embedding_is_encoded_again_once(call):
    encoder = encoder_with(found=FOUND)
    image = call("encode", IMAGE, encoder=encoder)
    encoder.script["LookUpEmbedding"] = [NOT_FOUND]
    decoder = ScriptedDecoder(PredictMasks=[errors.EmbeddingExpired("gone"), None])
    masks = call("predict", image, points=[(1, 2)], encoder=encoder, decoder=decoder)
    assert masks[0].score == 0.5
    assert encoder.methods() == ["LookUpEmbedding", "LookUpEmbedding", "EncodeImage"]
    assert len(decoder.calls) == 2


def test_embedding_that_stays_expired_is_given_up(call):
    encoder = encoder_with()
    image = call("encode", IMAGE, encoder=encoder)
    decoder = ScriptedDecoder(PredictMasks=[errors.EmbeddingExpired("gone")])
    with pytest.raises(SplitsamError) as caught:
        call("predict", image, points=[(1, 2)], encoder=encoder, decoder=decoder)
    assert caught.value.reason == "EMBEDDING_EXPIRED"
    assert len(decoder.calls) == 2


def test_embedding_of_the_model_before_is_encoded_again_until_both_services_have_followed(call):
    other = errors.ModelMismatch("another model made it")
    image = call("encode", IMAGE, encoder=encoder_with())
    decoder = ScriptedDecoder(PredictMasks=[other, other, other, None])
    encoder = encoder_with()
    assert call("predict", image, points=[(1, 1)], encoder=encoder, decoder=decoder)[0].score == 0.5
    assert encoder.methods().count("LookUpEmbedding") == 3
    decoder = ScriptedDecoder(GenerateMasks=[other, other, FOUND_MASK])
    assert len(call("generate", image, encoder=encoder_with(), decoder=decoder)) == 2


def test_services_that_stay_of_two_models_are_an_error(call):
    decoder = ScriptedDecoder(PredictMasks=[errors.ModelMismatch("another model made it")])
    image = call("encode", IMAGE, encoder=encoder_with())
    with pytest.raises(SplitsamError) as caught:
        call("predict", image, points=[(1, 1)], timeout_s=0.25, encoder=encoder_with(), decoder=decoder)
    assert caught.value.reason == "MODEL_MISMATCH"
    assert 2 <= len(decoder.calls) <= 4
    bare = ScriptedDecoder(PredictMasks=[errors.ModelMismatch("another model made it")])
    with pytest.raises(SplitsamError):
        call("predict", KEY, points=[(1, 1)], encoder=encoder_with(), decoder=bare)
    assert len(bare.calls) == 1


def test_expired_embedding_of_a_bare_key_is_an_error(call):
    decoder = ScriptedDecoder(PredictMasks=[errors.EmbeddingExpired("gone")])
    with pytest.raises(SplitsamError) as caught:
        call("predict", KEY, points=[(1, 2)], decoder=decoder)
    assert caught.value.reason == "EMBEDDING_EXPIRED"
    assert len(decoder.calls) == 1


def test_file_that_changed_is_not_encoded_in_the_place_of_the_old(call, tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(IMAGE)
    encoder = encoder_with()
    image = call("encode", path, encoder=encoder)
    path.write_bytes(b"another image")
    decoder = ScriptedDecoder(PredictMasks=[errors.EmbeddingExpired("gone")])
    with pytest.raises(SplitsamError) as caught:
        call("predict", image, points=[(1, 2)], encoder=encoder, decoder=decoder)
    assert caught.value.reason == "EMBEDDING_EXPIRED"
    assert encoder.methods() == ["LookUpEmbedding", "EncodeImage"]


def test_expired_refinement_is_replayed_without_its_token(call):
    decoder = ScriptedDecoder(PredictMasks=[errors.RefinementExpired("gone"), None])
    call("predict", KEY, points=[(1, 2), (3, 4)], mask_input="token", decoder=decoder)
    first, second = (request.images[0].prompts[0] for _, request, _, _ in decoder.calls)
    assert first.refinement_token == "token"
    assert second.WhichOneof("mask_input") is None
    assert first.points == second.points


def test_expired_refinement_alone_cannot_be_replayed(call):
    decoder = ScriptedDecoder(PredictMasks=[errors.RefinementExpired("gone")])
    with pytest.raises(SplitsamError) as caught:
        call("predict", KEY, mask_input="token", decoder=decoder)
    assert caught.value.reason == "REFINEMENT_EXPIRED"
    assert len(decoder.calls) == 1


def test_embedding_and_refinement_may_both_have_expired(call):
    encoder = encoder_with()
    image = call("encode", IMAGE, encoder=encoder)
    failures = [errors.EmbeddingExpired("gone"), errors.RefinementExpired("gone"), None]
    decoder = ScriptedDecoder(PredictMasks=failures)
    assert call("predict", image, points=[(1, 2)], mask_input="token", encoder=encoder, decoder=decoder)
    assert len(decoder.calls) == 3


def test_batch_over_several_decoders_comes_back_in_order(call):
    decoders = [willing() for _ in range(3)]
    keys = [f"{number:064x}" for number in range(30)]
    results = call("predict_batch", [(key, []) for key in keys], decoder=decoders)
    assert [result.key for result in results] == keys
    assert all(len(decoder.calls) == 1 for decoder in decoders)
    assert sum(len(decoder.calls[0][1].images) for decoder in decoders) == len(keys)


def test_in_the_background_a_full_queue_is_waited_for_longer(call):
    full = errors.QueueFull("the queue is full", retry_delay_s=SOON_S)
    decoder = ScriptedDecoder(PredictMasks=[*[full] * RetryPolicy().attempts, None])
    with pytest.raises(SplitsamError, match="full"):
        call("predict_batch", [(KEY, [])], decoder=ScriptedDecoder(PredictMasks=decoder.script["PredictMasks"]))
    [result] = call("predict_batch", [(KEY, [])], decoder=decoder, background=True)
    assert result.key == KEY
    assert all(request.background for _, request, *_ in decoder.calls)


def bulk(reply):
    """An EncodeImages handler that answers every request with what `reply(request)` returns."""

    def handle(requests, context):
        for request in requests:
            yield encoder_pb2.EncodeImagesResponse(request_id=request.request_id, **reply(request))

    return handle


def encoded(_request):
    return {"result": ENCODED}


def test_encode_many_answers_every_image(call, tmp_path):
    sources = [IMAGE, tmp_path / "missing.jpg", b"two", b"three"]
    encoder = ScriptedEncoder(EncodeImages=[bulk(encoded)])
    results = {result.position: result for result in call("encode_many", sources, encoder=encoder, in_flight=2)}
    assert sorted(results) == [0, 1, 2, 3]
    assert isinstance(results[1].error, FileNotFoundError)
    assert results[2].image.key == KEY
    assert results[2].source == b"two"


def test_encode_many_of_nothing_is_nothing(call):
    assert call("encode_many", [], encoder=ScriptedEncoder(EncodeImages=[bulk(encoded)])) == []


def test_encode_many_sends_no_more_than_asked(call):
    most = 0

    def hold_back(requests, context):
        nonlocal most
        for waiting in iter(lambda: take(requests, 3), []):
            most = max(most, len(waiting))
            for request in waiting:
                yield encoder_pb2.EncodeImagesResponse(request_id=request.request_id, result=ENCODED)

    results = call("encode_many", [b"x"] * 9, encoder=ScriptedEncoder(EncodeImages=[hold_back]), in_flight=3)
    assert len(results) == 9
    assert most == 3


def test_encode_many_sends_nothing_that_is_stored(call):
    sent = []
    encoder = ScriptedEncoder(
        LookUpEmbedding=[FOUND, NOT_FOUND, FOUND],
        EncodeImages=[bulk(lambda request: sent.append(request.image) or encoded(request))],
    )
    results = {r.position: r.image for r in call("encode_many", [b"1", b"2", b"3"], encoder=encoder)}
    assert sent == [b"2"]
    assert [results[position].cache_hit for position in range(3)] == [True, False, True]
    assert all(image.stored and image.key == KEY for image in results.values())
    digests = [request.image_sha256 for method, request, *_ in encoder.calls if method == "LookUpEmbedding"]
    assert digests == [hashlib.sha256(image).digest() for image in (b"1", b"2", b"3")]


def test_encode_many_sends_what_cannot_be_looked_up(call):
    encoder = ScriptedEncoder(
        LookUpEmbedding=[errors.CacheUnavailable("no cache", retry_delay_s=60)], EncodeImages=[bulk(encoded)]
    )
    results = call("encode_many", [b"1", b"2"], encoder=encoder)
    assert [result.image.cache_hit for result in results] == [False, False]


def take(requests, count):
    taken = []
    for request in requests:
        taken.append(request)
        if len(taken) == count:
            break
    return taken


def test_encode_many_reports_a_bad_image_and_goes_on(call):
    bad = to_item_error(errors.InvalidArgument("image", "must be a JPEG"))
    encoder = ScriptedEncoder(EncodeImages=[bulk(lambda r: {"error": bad} if r.image == b"bad" else encoded(r))])
    results = {r.position: r for r in call("encode_many", [b"good", b"bad", b"good"], encoder=encoder)}
    assert results[1].error.reason == "INVALID_ARGUMENT"
    assert results[1].error.violations[0].field == "image"
    assert results[0].image is not None
    assert results[2].image is not None


def test_encode_many_sends_an_image_again_when_asked(call):
    refused = set()

    def full_once(request):
        if request.image in refused:
            return encoded(request)
        refused.add(request.image)
        return {"error": to_item_error(errors.QueueFull("full", retry_delay_s=SOON_S))}

    results = call("encode_many", [b"1", b"2", b"3"], encoder=ScriptedEncoder(EncodeImages=[bulk(full_once)]))
    assert all(result.image is not None for result in results)


def test_encode_many_opens_the_stream_again_when_asked(call):
    def one_then_drain(requests, context):
        request = next(requests)
        yield encoder_pb2.EncodeImagesResponse(request_id=request.request_id, result=ENCODED)
        abort(context, errors.NotReady("draining", retry_delay_s=SOON_S))

    encoder = ScriptedEncoder(EncodeImages=[one_then_drain, bulk(encoded)])
    results = call("encode_many", [b"1", b"2", b"3", b"4"], encoder=encoder, in_flight=3)
    assert sorted(result.position for result in results) == [0, 1, 2, 3]
    assert encoder.methods().count("EncodeImages") == 2


def test_encode_many_raises_when_the_stream_fails(call):
    def fail(requests, context):
        abort(context, errors.InternalError("internal error"))

    with pytest.raises(SplitsamError) as caught:
        call("encode_many", [b"1"], encoder=ScriptedEncoder(EncodeImages=[lambda r, c: iter(fail(r, c) or ())]))
    assert caught.value.reason in ("INTERNAL", "STREAM_LOST")


def test_encode_many_gives_up_on_a_silent_server(call):
    def never(requests, context):
        for _ in requests:
            pass
        yield from ()

    encoder = ScriptedEncoder(EncodeImages=[never])
    with pytest.raises(SplitsamError, match="no answer on the stream") as caught:
        call("encode_many", [b"1"], encoder=encoder, settings={"encode_timeout_s": 0.05})
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_encode_many_refuses_a_stream_that_ends_early(call):
    encoder = ScriptedEncoder(EncodeImages=[lambda requests, context: iter(())])
    with pytest.raises(SplitsamError) as caught:
        call("encode_many", [b"1", b"2"], encoder=encoder)
    assert caught.value.reason in ("STREAM_ENDED", "STREAM_LOST")


def test_generate_hands_out_masks_and_sends_what_was_asked(call):
    decoder = ScriptedDecoder(GenerateMasks=[FOUND_MASK])
    output = {"formats": ["bits"]}
    found = call("generate", KEY, decoder=decoder, output=output, point_grid=[(0.5, 0.25)], box_nms_threshold=0.5)
    assert [one.point for one in found] == [(4, 3)] * 2
    assert found[0].mask.to_array().sum() == 1
    request = decoder.calls[0][1]
    assert (request.embedding_key, list(request.point_grid)) == (KEY, [0.5, 0.25])
    assert request.box_nms_threshold == 0.5
    assert list(request.output.formats) == [decoder_pb2.MASK_FORMAT_BITS]
    assert not request.HasField("points_per_side")
    assert decoder.calls[0][3] > 60


def test_generate_waits_as_the_server_asks(call):
    full = errors.QueueFull("the queue is full", retry_delay_s=SOON_S)
    decoder = ScriptedDecoder(GenerateMasks=[full, FOUND_MASK])
    assert len(call("generate", KEY, decoder=decoder)) == 2


def test_generate_encodes_again_once_when_the_embedding_has_expired(call):
    expired = errors.EmbeddingExpired("gone")
    decoder = ScriptedDecoder(GenerateMasks=[expired, FOUND_MASK])
    encoder = encoder_with()
    image = call("encode", IMAGE, encoder=encoder)
    assert len(call("generate", image, encoder=encoder, decoder=decoder)) == 2
    assert encoder.methods().count("EncodeImage") == 2
    for bare in (KEY, image):
        with pytest.raises(SplitsamError, match="gone"):
            call("generate", bare, encoder=encoder, decoder=ScriptedDecoder(GenerateMasks=[expired]))


def test_generate_does_not_begin_again_after_its_first_mask(call):
    full = errors.QueueFull("the queue is full", retry_delay_s=SOON_S)
    decoder = ScriptedDecoder(GenerateMasks=[FOUND_MASK, full, FOUND_MASK])
    with pytest.raises(SplitsamError, match="full"):
        call("generate", KEY, decoder=decoder)
    assert len(decoder.calls) == 2


@pytest.mark.parametrize("codec", ["FP16", "BF16", "INT8"])
def test_download_joins_chunks_and_widens(call, codec):
    import numpy as np

    values = np.arange(24, dtype=np.float32) / 4
    scales = np.array([0.25, 0.25], "<f4")
    content = {
        "FP16": values.astype("<f2").tobytes(),
        "BF16": (values.view(np.uint32) >> 16).astype("<u2").tobytes(),
        "INT8": scales.tobytes() + (4 * values).astype(np.int8).tobytes(),
    }[codec]
    header = encoder_pb2.DownloadEmbeddingHeader(
        embedding=FOUND.embedding,
        codec=types_pb2.EmbeddingCodec.Value(f"EMBEDDING_CODEC_{codec}"),
        shape=[2, 3, 4],
        size_bytes=len(content),
    )
    chunks = [
        encoder_pb2.DownloadEmbeddingResponse(header=header, chunk=content[:7]),
        encoder_pb2.DownloadEmbeddingResponse(chunk=content[7:]),
    ]
    embedding = call("download_embedding", KEY, encoder=ScriptedEncoder(DownloadEmbedding=[chunks]))
    np.testing.assert_array_equal(embedding.values, values.reshape(2, 3, 4))
    assert embedding.codec == codec.lower()


async def test_pointer_hands_out_masks_errors_and_superseded(serve):
    def follow(requests, context):
        first, second, third = next(requests), next(requests), next(requests)
        superseded = decoder_pb2.Superseded(by_request_id=second.request_id)
        yield decoder_pb2.PredictMasksStreamResponse(request_id=first.request_id, superseded=superseded)
        yield decoder_pb2.PredictMasksStreamResponse(request_id=second.request_id, result=answer_to(second.request))
        error = to_item_error(errors.EmbeddingExpired("gone"))
        yield decoder_pb2.PredictMasksStreamResponse(request_id=third.request_id, error=error)

    decoder = ScriptedDecoder(PredictMasksStream=[follow])
    async with AsyncClient(decoder=serve(decoder)) as client, client.pointer(KEY) as pointer:
        sent = [await pointer.send(points=[(x, 1)]) for x in range(3)]
        await pointer.done()
        answers = [answer async for answer in pointer]
    assert [answer.request_id for answer in answers] == sent == [1, 2, 3]
    assert answers[0].superseded_by == 2
    assert answers[1].masks[0].score == 0.5
    assert answers[2].error.reason == "EMBEDDING_EXPIRED"


async def test_pointer_raises_when_the_stream_fails(serve):
    def fail(requests, context):
        abort(context, errors.NotReady("draining", retry_delay_s=1.0))

    decoder = ScriptedDecoder(PredictMasksStream=[lambda r, c: iter(fail(r, c) or ())])
    async with AsyncClient(decoder=serve(decoder)) as client, client.pointer(KEY) as pointer:
        with pytest.raises(SplitsamError, match="draining"):
            await anext(pointer)
        with pytest.raises(SplitsamError, match="draining"):
            await pointer.send(points=[(1, 1)])
