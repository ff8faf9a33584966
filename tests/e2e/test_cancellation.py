import pytest
from e2e_support import ask, draw, image_file, metric, point, prompt, read_refusal, redis_of, wait_until
from grpc import RpcError, StatusCode

from splitsam.v1 import decoder_pb2, encoder_pb2

CLICK = prompt(point(10, 10))


@pytest.fixture
def decoder_metric(stack):
    return lambda name, **labels: metric(stack.metrics_url("decoder"), name, batcher="decoder", **labels)


@pytest.fixture
def encoder_metric(stack):
    return lambda name, **labels: metric(stack.metrics_url("encoder"), name, batcher="encoder", **labels)


@pytest.fixture
def busy_decoder(alpha, key, decoder_metric):
    """A request that keeps the decoder's one model thread at work for seconds."""
    batches = decoder_metric("splitsam_batch_fill_count")
    call = alpha.decoder.PredictMasks.future(ask({key: [CLICK] * 200}), **alpha.options())
    wait_until(lambda: decoder_metric("splitsam_batch_fill_count") > batches, "the decoder works")
    yield call
    call.cancel()


@pytest.mark.needs_slow_model
def test_cancelled_clicks_leave_the_queue_and_the_next_is_served(alpha, key, decoder_metric, busy_decoder):
    dropped = decoder_metric("splitsam_dropped_total")
    calls = [alpha.decoder.PredictMasks.future(ask({key: [CLICK] * 8}), **alpha.options()) for _ in range(6)]
    wait_until(lambda: decoder_metric("splitsam_queue_length") >= 5, "clicks wait")
    busy_decoder.cancel()
    for call in calls:
        call.cancel()
    wait_until(lambda: decoder_metric("splitsam_queue_length") == 0, "the queue is empty")
    assert decoder_metric("splitsam_dropped_total") > dropped
    [answer] = alpha.click(key, CLICK)
    assert answer.masks


@pytest.mark.needs_slow_model
def test_clicks_that_the_queue_leaves_no_time_for_are_refused_and_the_next_is_served(alpha, key, busy_decoder):
    """Without a wait: a deadline of half a second is too short for eight prompts behind others."""
    calls = [alpha.decoder.PredictMasks.future(ask({key: [CLICK] * 8}), **alpha.options(0.5)) for _ in range(40)]
    codes = {call.code() for call in calls}
    assert codes <= {StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED, StatusCode.OK}
    refused = [read_refusal(call.exception()) for call in calls if call.code() is StatusCode.RESOURCE_EXHAUSTED]
    assert refused
    for each in refused:
        assert each.reason == "DEADLINE_TOO_SHORT"
        assert each.pushback_ms == pytest.approx(1000 * each.retry_s, abs=1)
        assert each.pushback_ms > 0
    busy_decoder.cancel()
    [answer] = alpha.click(key, CLICK)
    assert answer.masks


def test_cancelled_stream_leaves_nothing_behind(alpha, key, stack, decoder_metric):
    request = decoder_pb2.PredictMasksStreamRequest(request_id=1, request=ask({key: [CLICK] * 100}))
    batches = decoder_metric("splitsam_batch_fill_count")
    call = alpha.decoder.PredictMasksStream(iter([request]), **alpha.options())
    wait_until(lambda: decoder_metric("splitsam_batch_fill_count") > batches, "the decoder works")
    cancelled = metric(stack.metrics_url("decoder"), "splitsam_requests_total", code="CANCELLED")
    call.cancel()
    url = stack.metrics_url("decoder")
    wait_until(lambda: metric(url, "splitsam_requests_total", code="CANCELLED") > cancelled, "the stream has ended")
    wait_until(lambda: decoder_metric("splitsam_queue_length") == 0, "the queue is empty")
    [answer] = alpha.click(key, CLICK)
    assert answer.masks


@pytest.mark.needs_slow_model
def test_cancelled_encodes_leave_queue_and_claims_and_the_next_is_served(alpha, stack, encoder_metric):
    dropped = encoder_metric("splitsam_dropped_total", why="cancelled")
    images = [image_file(draw(seed)) for seed in range(300, 304)]
    requests = [encoder_pb2.EncodeImageRequest(image=image) for image in images]
    calls = [alpha.encoder.EncodeImage.future(request, **alpha.options()) for request in requests]
    wait_until(lambda: encoder_metric("splitsam_queue_length") >= 2, "images wait")
    for call in calls:
        call.cancel()
    with redis_of(stack) as connection:
        wait_until(lambda: not connection.keys("splitsam:claim:*"), "the claims are given back")
    made = alpha.encode(images[-1])
    assert made.stored
    assert not made.cache_hit
    wait_until(lambda: encoder_metric("splitsam_queue_length") == 0, "the queue is empty")
    assert encoder_metric("splitsam_dropped_total", why="cancelled") > dropped


def test_image_that_another_caller_waits_for_survives_a_cancel(alpha, encoder_metric):
    request = encoder_pb2.EncodeImageRequest(image=image_file(draw(310)))
    images = encoder_metric("splitsam_batch_fill_count")
    first, second = (alpha.encoder.EncodeImage.future(request, **alpha.options()) for _ in range(2))
    wait_until(lambda: encoder_metric("splitsam_batch_fill_count") > images, "the image is in work")
    first.cancel()
    assert second.result().stored
    assert encoder_metric("splitsam_batch_fill_count") == images + 1


def test_call_whose_deadline_is_hopeless_is_refused(alpha, key):
    with pytest.raises(RpcError) as caught:
        alpha.decoder.PredictMasks(ask({key: [CLICK]}), **alpha.options(0.000001))
    if caught.value.code() is StatusCode.RESOURCE_EXHAUSTED:  # the server was faster to see it than the client
        assert read_refusal(caught.value).reason == "DEADLINE_TOO_SHORT"
    else:
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
