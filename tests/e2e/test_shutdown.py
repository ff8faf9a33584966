"""Starting, and SIGTERM: while at work, whatever was accepted is answered, then the process ends with 0."""

import itertools
import re
import signal
import threading
from dataclasses import dataclass
from queue import SimpleQueue

import grpc
import pytest
from e2e_support import (
    Caller,
    ask,
    draw,
    image_file,
    is_serving,
    metric,
    point,
    prompt,
    read_refusal,
    running_service,
    wait_until,
)
from grpc_status import rpc_status

from splitsam.v1 import decoder_pb2, encoder_pb2

CLICK = prompt(point(10, 10))


@pytest.fixture
def decoder(stack, service_args):
    with running_service(stack, "decoder", *service_args) as service:
        yield service


@pytest.fixture
def encoder(stack, encoder_args):
    with running_service(stack, "encoder", *encoder_args) as service:
        yield service


def test_starting_service_says_when_to_come_again_and_can_be_stopped(stack, alpha, encoder_args):
    with running_service(stack, "encoder", *encoder_args, until_ready=False) as service:

        def refused_by_the_server():
            service.child.check_alive("starting")
            caller = Caller(service.address, stack.decoder, alpha.token)
            try:
                caller.encoder.GetModelInfo(encoder_pb2.EncoderServiceGetModelInfoRequest(), **caller.options())
            except grpc.RpcError as error:
                return read_refusal(error) if rpc_status.from_call(error) else None
            finally:
                caller.close()
            raise AssertionError("the service was ready before a call met it")

        refused = wait_until(refused_by_the_server, "the port is open")
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "NOT_READY")
        assert refused.retry_s == pytest.approx(refused.pushback_ms / 1000)
        assert refused.retry_s > 0
        assert not is_serving(service.address)
        service.child.signal(signal.SIGTERM)
        assert service.child.wait(60)
        assert service.child.exit_status() == 0


def test_terminated_decoder_answers_what_it_accepted(stack, alpha, decoder, key, on_gpu):
    caller = Caller(stack.encoder, decoder.address, alpha.token)
    # Enough to keep it busy until the signal arrives; a GPU answers the first while it reads the last.
    prompts, sent, enough = (128, 32, 8) if on_gpu else (4, 16, 15)
    request = ask({key: [CLICK] * prompts})
    calls = [caller.decoder.PredictMasks.future(request, **caller.options()) for _ in range(sent)]

    def queue_length():
        length = metric(decoder.metrics_url, "splitsam_queue_length", batcher="decoder")
        return length if length >= enough else None

    accepted = wait_until(queue_length, "requests have been accepted and wait")
    decoder.child.signal(signal.SIGTERM)
    wait_until(lambda: not is_serving(decoder.address), "new calls are turned away")
    assert not all(call.done() for call in calls)
    answered = [call for call in calls if call.code() is grpc.StatusCode.OK]
    assert len(answered) >= accepted
    assert all(len(call.result().images[0].prompts) == prompts for call in answered)
    assert {read_refusal(call).reason for call in calls if call not in answered} <= {"NOT_READY"}
    assert decoder.child.wait(60)
    assert decoder.child.exit_status() == 0
    caller.close()


def test_terminated_encoder_answers_what_it_accepted(stack, alpha, encoder, on_gpu):
    caller = Caller(encoder.address, stack.decoder, alpha.token)
    seeds = range(600, 648 if on_gpu else 603)
    requests = [encoder_pb2.EncodeImageRequest(image=image_file(draw(seed))) for seed in seeds]
    calls = [caller.encoder.EncodeImage.future(request, **caller.options()) for request in requests]
    length = {"name": "splitsam_queue_length", "batcher": "encoder"}
    wait_until(lambda: metric(encoder.metrics_url, **length) >= 2, "all images have been accepted")
    encoder.child.signal(signal.SIGTERM)
    answers = [call.result() for call in calls]
    assert all(answer.stored for answer in answers)
    assert encoder.child.wait(60)
    assert encoder.child.exit_status() == 0
    caller.close()


@dataclass(frozen=True)
class Aftermath:
    """What became of many users' calls around a SIGTERM.

    Args:
        answered: request ids.
        refused: each user's last call, which was not answered, by its request id.
        log: of the decoder.
    """

    answered: list[str]
    refused: dict[str, grpc.RpcError]
    log: str


@pytest.fixture(scope="module")
def aftermath(stack, alpha, service_args, key):
    """A decoder is terminated while 16 users call it one request after the other, every second of them in vain."""
    answered, refused = [], {}
    requests = ask({key: [CLICK]}), ask({"0" * 64: [CLICK]})

    def call_until_turned_away(user):
        caller = Caller(stack.encoder, decoder.address, alpha.token)
        for number in itertools.count():
            request_id = f"user{user}-{number}"
            metadata = (*caller.options()["metadata"], ("x-request-id", request_id))
            try:
                caller.decoder.PredictMasks(requests[user % 2], timeout=60, metadata=metadata)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    refused[request_id] = error
                    break
            answered.append(request_id)
        caller.close()

    with running_service(stack, "decoder", *service_args) as decoder:
        threads = [threading.Thread(target=call_until_turned_away, args=(user,)) for user in range(16)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(answered) >= 64, "everybody is calling")
        decoder.child.signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert decoder.child.wait(60)
        assert decoder.child.exit_status() == 0
        yield Aftermath(answered, refused, decoder.child.log_path.read_text())


def test_terminated_decoder_loses_no_call_that_it_accepted(aftermath):
    """By its own log, it has answered every call that reached it, and those it turned away did not run."""
    codes = dict(re.findall(r"request_id=(\S+) method=\S+ code=(\S+)", aftermath.log))
    assert {codes[request_id] for request_id in aftermath.answered} == {"OK", "NOT_FOUND"}
    assert len(aftermath.refused) == 16
    assert {codes.get(request_id, "UNAVAILABLE") for request_id in aftermath.refused} == {"UNAVAILABLE"}


def test_terminated_decoder_turns_callers_away_with_unavailable(aftermath):
    assert {error.code() for error in aftermath.refused.values()} == {grpc.StatusCode.UNAVAILABLE}


def test_idle_stream_does_not_hold_up_the_end(stack, alpha, service_args, key):
    with running_service(stack, "decoder", *service_args, "--grace-ms", "600000") as service:
        caller = Caller(stack.encoder, service.address, alpha.token)
        requests = SimpleQueue()
        answers = caller.decoder.PredictMasksStream(iter(requests.get, None), **caller.options())
        requests.put(decoder_pb2.PredictMasksStreamRequest(request_id=1, request=ask({key: [CLICK]})))
        assert next(answers).request_id == 1
        service.child.signal(signal.SIGTERM)
        assert list(answers) == []
        assert service.child.wait(60)  # a tenth of the grace
        assert service.child.exit_status() == 0
        requests.put(None)
        caller.close()
