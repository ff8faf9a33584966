"""Ten times more requests than there is room for, one tenant's flood, and many idle or slow streams."""

import asyncio
import time
from queue import SimpleQueue

import pytest
from e2e_support import ask, metric, point, prompt, wait_until, write_embedding

from bench.load.annotators import KINDS, Event, Habits, annotators_for, plan_crowd
from bench.load.crowd import OK, Crowd, Place
from bench.load.generators import play
from bench.load.streams import SUPERSEDED
from bench.load.watch import resident_mib, watching
from bench.spread import START_S
from splitsam.client.stack import Stack, StackSettings
from splitsam.v1 import decoder_pb2 as pb

HABITS = Habits()
BOUND_MS = {"encode": 4000, "click": 1000}
# Over the most that the services need when they are merely busy.
GROWTH_MIB = 256
CLICK = prompt(point(10, 10))


@pytest.fixture
def small_stack(device_args, large_blocks_given_back, tmp_path):
    """The shipped model behind short queues."""
    settings = StackSettings(
        encoder_args=(*device_args, "--max-queue-ms", str(BOUND_MS["encode"])),
        decoder_args=(*device_args, "--max-queue-ms", str(BOUND_MS["click"])),
        run_folder=tmp_path / "stack",
        stop_timeout_s=30.0,
    )
    with Stack(settings.on_free_ports()) as running:
        yield running


@pytest.mark.needs_slow_model
@pytest.mark.own_services
async def test_overload_is_refused_with_pushback_and_leaves_nothing_behind(small_stack, photo):
    services = {"encode": "encoder", "click": "decoder"}
    async with Crowd(Place((small_stack.encoder,), (small_stack.decoder,), photo)) as crowd:
        async with watching(small_stack) as busy:
            capacity = await crowd.measure_capacity(HABITS, seconds=6.0)
        events = plan_crowd(annotators_for(10 * capacity, HABITS), HABITS, 20.0, "overload")
        async with watching(small_stack) as watched:
            outcomes = await crowd.run(events)
        for service in services.values():
            url = small_stack.metrics_url(service)
            await asyncio.to_thread(wait_until, lambda url=url: metric(url, "splitsam_queue_length") == 0, "empty")
        after = await crowd.run([Event(0.0, "encode", 0, 0)]) + await crowd.run([Event(0.0, "click", 0, 0)])
    assert [outcome.reason for outcome in after] == [OK, OK]
    assert len(outcomes) == len(events)
    refused = [outcome for outcome in outcomes if outcome.reason != OK]
    assert {outcome.reason for outcome in refused} <= {"QUEUE_FULL", "DEADLINE_TOO_SHORT"}
    assert all(outcome.retry_s for outcome in refused)
    assert len(refused) > len(events) / 4
    for kind in KINDS:
        answered = [outcome for outcome in outcomes if outcome.kind == kind and outcome.reason == OK]
        assert answered
        assert max(outcome.stages_ms["queue"] for outcome in answered) <= BOUND_MS[kind] + 1
        assert watched[kind].rss_mib - busy[kind].rss_mib < GROWTH_MIB
    for service in services.values():
        assert "rpc failed" not in small_stack.children[service].log_path.read_text()


async def test_clicks_on_a_stream_are_answered_or_superseded_by_a_newer_one(open_stack, photo):
    place = Place((open_stack.encoder,), (open_stack.decoder,), photo, streams=True)
    clicks = [Event(0.0, "click", annotator, 0, number) for annotator in range(3) for number in range(4)]
    outcomes = await play(place, clicks, generators=2, start_s=time.monotonic() + START_S)
    by_share = [outcomes[:8], outcomes[8:]]  # annotators 0 and 2, annotator 1
    assert {outcome.reason for outcome in outcomes} <= {OK, SUPERSEDED}
    assert [sum(outcome.reason == OK for outcome in share) > 0 for share in by_share] == [True, True]
    assert all(outcome.latency_ms > 0 for outcome in outcomes)
    assert outcomes[-1].reason == OK  # nobody supersedes the last


@pytest.mark.needs_slow_model
def test_a_tenant_does_not_wait_for_anothers_flood(alpha, beta, stack, model_id, key):
    """Without turns beta's first click would be served when all of alpha's are."""
    own = write_embedding(stack, "beta", model_id, "beside a flood")
    flood = [alpha.decoder.PredictMasks.future(ask({key: [CLICK]}), **alpha.options()) for _ in range(400)]
    wait_until(lambda: metric(stack.metrics_url("decoder"), "splitsam_queue_length") >= 200, "a queue full of alpha's")
    try:
        for _ in range(3):
            assert beta.click(own, CLICK)
        assert sum(not call.done() for call in flood) > 20
    finally:
        for call in flood:
            call.cancel()
    assert {call.exception() and call.code().name for call in flood if not call.cancelled()} <= {
        None,
        "RESOURCE_EXHAUSTED",
    }


def test_idle_streams_cost_little(alpha, stack, key):
    """Each of them a place in memory for a request, no thread and no buffer."""
    pid = stack.children["decoder"].pid
    alpha.click(key, CLICK)
    before = resident_mib(pid)
    requests = [SimpleQueue() for _ in range(400)]
    started = metric(stack.metrics_url("decoder"), "splitsam_requests_in_progress")
    streams = [alpha.decoder.PredictMasksStream(iter(queue.get, None), **alpha.options()) for queue in requests]
    url = stack.metrics_url("decoder")
    wait_until(lambda: metric(url, "splitsam_requests_in_progress") >= started + len(streams), "all streams are open")
    assert alpha.click(key, CLICK)
    assert (resident_mib(pid) - before) / len(streams) < 0.25
    for queue in requests:
        queue.put(None)
    assert all(list(stream) == [] for stream in streams)


@pytest.mark.needs_slow_model
def test_stream_whose_answers_are_not_read_is_not_served_further(alpha, stack, model_id):
    """Answers of 4 MB each; what gRPC takes off the server's hands is a few of them at the most."""
    large = write_embedding(stack, "alpha", model_id, "large", size=(8000, 4000))
    url = stack.metrics_url("decoder")
    requests = SimpleQueue()
    answers = alpha.decoder.PredictMasksStream(iter(requests.get, None), **alpha.options())
    served = metric(url, "splitsam_batch_fill_count")

    def served_more() -> bool:
        return metric(url, "splitsam_batch_fill_count") - served >= number

    for number in range(1, 7):
        asked = ask({large: [CLICK]}, formats=[pb.MASK_FORMAT_BITS])
        requests.put(pb.PredictMasksStreamRequest(request_id=number, request=asked))
        try:
            wait_until(served_more, "it is served", deadline_s=5.0)
        except AssertionError:
            break
    else:
        pytest.fail("all were served, and none was read")
    requests.put(None)
    assert [answer.request_id for answer in answers] == list(range(1, number + 1))
