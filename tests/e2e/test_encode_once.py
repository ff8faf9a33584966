import hashlib

import pytest
from e2e_support import Caller, draw, image_file, metric, redis_of, running_service, wait_until
from grpc import StatusCode

from splitsam.common.keys import EncodingVersion, KeyRing
from splitsam.v1 import encoder_pb2

COPIES = 8


@pytest.fixture(scope="module")
def second_encoder(stack, encoder_args):
    with running_service(stack, "encoder", *encoder_args) as service:
        yield service


def encoded_images(*urls):
    return sum(metric(url, "splitsam_batch_fill_sum", batcher="encoder") for url in urls)


def test_image_sent_many_times_at_once_is_computed_once(alpha, stack):
    url = stack.metrics_url("encoder")
    before = encoded_images(url)
    request = encoder_pb2.EncodeImageRequest(image=image_file(draw(500)))
    calls = [alpha.encoder.EncodeImage.future(request, **alpha.options()) for _ in range(COPIES)]
    answers = [call.result() for call in calls]
    assert len({answer.embedding.embedding_key for answer in answers}) == 1
    assert all(answer.stored for answer in answers)
    assert encoded_images(url) == before + 1


def test_image_sent_to_two_encoders_at_once_is_computed_once(alpha, stack, second_encoder):
    urls = stack.metrics_url("encoder"), second_encoder.metrics_url
    before = encoded_images(*urls)
    other = Caller(second_encoder.address, stack.decoder, alpha.token)
    request = encoder_pb2.EncodeImageRequest(image=image_file(draw(501)))
    calls = [
        caller.encoder.EncodeImage.future(request, **caller.options())
        for _ in range(COPIES // 2)
        for caller in (alpha, other)
    ]
    answers = [call.result() for call in calls]
    other.close()
    assert len({answer.embedding.embedding_key for answer in answers}) == 1
    assert encoded_images(*urls) == before + 1
    assert {answer.cache_hit for answer in answers} == {False, True}


def test_encoder_takes_over_when_the_other_gives_its_claim_back(alpha, stack, precision):
    """The claim of a replica is taken and given back by hand: its caller hung up, or the image was bad."""
    image = image_file(draw(502), "JPEG")[:3000]
    info = alpha.encoder.GetModelInfo(encoder_pb2.EncoderServiceGetModelInfoRequest(), **alpha.options()).model
    version = EncodingVersion(info.model_id, info.preprocess_version, precision, codec="fp16")
    keys = KeyRing([(stack.folder / "secret").read_bytes().strip()])
    [address] = keys.embedding_addresses("alpha", hashlib.sha256(image).digest(), version)
    claims = {"name": "splitsam_cache_seconds_count", "operation": "claim"}
    before = metric(stack.metrics_url("encoder"), **claims)
    with redis_of(stack) as connection:
        connection.set(address.redis_name("claim"), b"1", px=60_000)
        call = alpha.encoder.EncodeImage.future(encoder_pb2.EncodeImageRequest(image=image), **alpha.options(5))
        wait_until(lambda: metric(stack.metrics_url("encoder"), **claims) > before, "the claim was refused")
        assert not call.done()
        connection.delete(address.redis_name("claim"))
    assert call.code() is StatusCode.INVALID_ARGUMENT


def test_replica_finds_what_the_other_has_encoded(alpha, stack, second_encoder, photo, encoded):
    other = Caller(second_encoder.address, stack.decoder, alpha.token)
    found = other.encode(photo)
    other.close()
    assert found.cache_hit
    assert found.embedding == encoded.embedding
