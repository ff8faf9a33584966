"""Redis is a cache: what the services do while it hangs, when it is gone, and when it comes back empty."""

import signal
from urllib.parse import urlsplit

import pytest
from e2e_support import Caller, draw, image_file, metric, point, prompt, redis_of, refusal, wait_until, write_embedding
from grpc import RpcError, StatusCode

from splitsam.client import Client, SplitsamError
from splitsam.client.redis_server import start_redis, wait_until_answering
from splitsam.v1 import encoder_pb2

CLICK = prompt(point(10, 10))


@pytest.fixture(scope="module")
def caller(open_stack):
    made = Caller(open_stack.encoder, open_stack.decoder, None)
    yield made
    made.close()


@pytest.fixture
def known(open_stack, caller):
    """The keys of two images, the first of them in the decoder's memory."""
    model_id = caller.encoder.GetModelInfo(encoder_pb2.EncoderServiceGetModelInfoRequest(), timeout=60).model.model_id
    resident, other = (write_embedding(open_stack, "default", model_id, name) for name in ("resident", "other"))
    caller.click(resident, CLICK)
    return resident, other


def restart_redis(stack):
    """Empty, on the same port and with the same password."""
    port = stack.settings.redis_port
    stack.children["redis"] = start_redis(port, urlsplit(stack.redis_url).password, stack.folder)
    wait_until_answering(stack.children["redis"], stack.redis_url, 10)


def until_cache_answers(caller):
    """Both services stay away from a Redis that failed for a second."""

    def answers():
        try:
            caller.look_up(b"anything")
            caller.click("0" * 64, CLICK)
        except RpcError as error:
            return error.code() is StatusCode.NOT_FOUND
        return True

    wait_until(answers, "the services use Redis again")


def assert_outage_is_survived(stack, caller, known, image):
    resident, other = known
    images = {"name": "splitsam_batch_fill_sum", "batcher": "encoder"}
    before = metric(stack.metrics_url("encoder"), **images)
    request = encoder_pb2.EncodeImageRequest(image=image)
    calls = [caller.encoder.EncodeImage.future(request, **caller.options()) for _ in range(4)]
    made, *others = [call.result() for call in calls]
    assert (made.cache_hit, made.stored) == (False, False)
    assert len(made.embedding.embedding_key) == 64
    assert all(other.embedding == made.embedding for other in others)
    assert metric(stack.metrics_url("encoder"), **images) == before + 1
    for use in (
        lambda: caller.click(other, CLICK),
        lambda: caller.click(made.embedding.embedding_key, CLICK),
        lambda: caller.look_up(image),
        lambda: caller.download(resident),
    ):
        refused = refusal(use)
        assert (refused.code, refused.reason) == (StatusCode.UNAVAILABLE, "CACHE_UNAVAILABLE")
        assert refused.retry_s == pytest.approx(refused.pushback_ms / 1000)
        assert refused.retry_s > 0
    [answer] = caller.click(resident, CLICK, refinement_tokens=True)
    assert answer.masks[0].area_px > 0
    # This replica has the logits in memory, whatever becomes of those on their way to Redis.
    token = answer.masks[0].refinement_token
    [refined] = caller.click(resident, prompt(point(10, 10), refinement_token=token))
    assert refined.masks[0].area_px > 0


def test_services_go_on_while_redis_hangs(open_stack, caller, known):
    image = image_file(draw(400))
    open_stack.children["redis"].signal(signal.SIGSTOP)
    try:
        assert_outage_is_survived(open_stack, caller, known, image)
    finally:
        open_stack.children["redis"].signal(signal.SIGCONT)
    until_cache_answers(caller)
    assert caller.click(known[1], CLICK)
    assert caller.encode(image).stored


def test_services_go_on_when_redis_dies_and_use_it_when_it_is_back(open_stack, caller, known):
    image = image_file(draw(401))
    with Client(open_stack.encoder, open_stack.decoder, encode_timeout_s=60, predict_timeout_s=60) as client:
        handle = client.encode(image)
        assert handle.stored
        open_stack.children["redis"].signal(signal.SIGKILL)
        assert open_stack.children["redis"].wait(10)
        assert_outage_is_survived(open_stack, caller, known, image_file(draw(402)))

        restart_redis(open_stack)
        until_cache_answers(caller)
        refused = refusal(lambda: caller.click(handle.key, CLICK))
        assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "EMBEDDING_EXPIRED")
        with pytest.raises(SplitsamError) as caught:
            client.predict(handle.key, points=[(10, 10)])
        assert caught.value.reason == "EMBEDDING_EXPIRED"  # a key alone cannot be encoded again
        [mask] = client.predict(handle, points=[(10, 10)])
        assert mask.area_px > 0
    with redis_of(open_stack) as connection:
        assert len(connection.keys("splitsam:embedding:*")) == 1
    assert caller.look_up(image).embedding.embedding_key == handle.key


def test_redis_that_refuses_writes_costs_no_answer(open_stack, caller):
    with redis_of(open_stack) as connection:
        connection.config_set("maxmemory-policy", "noeviction")
        connection.config_set("maxmemory", "1mb")
        made = caller.encode(image_file(draw(403)))
        connection.config_set("maxmemory", "1gb")
    assert (made.cache_hit, made.stored) == (False, False)
    assert caller.encode(image_file(draw(403))).stored


def test_embedding_that_is_evicted_before_its_click_is_encoded_again(open_stack):
    images = [image_file(draw(seed)) for seed in range(410, 415)]
    with (
        redis_of(open_stack) as connection,
        Client(open_stack.encoder, open_stack.decoder, encode_timeout_s=60, predict_timeout_s=60) as client,
    ):
        connection.flushall()
        empty_bytes = connection.info("memory")["used_memory"]
        connection.config_set("maxmemory-policy", "allkeys-lru")
        connection.config_set("maxmemory", empty_bytes + 8 * 2**20)  # for two embeddings and one on its way
        handles = [client.encode(image) for image in images]
        assert len(connection.keys("splitsam:embedding:*")) < len(images)
        assert all(client.predict(handle, points=[(10, 10)])[0].area_px > 0 for handle in handles)
        connection.config_set("maxmemory", "1gb")
        connection.config_set("maxmemory-policy", "allkeys-lfu")
