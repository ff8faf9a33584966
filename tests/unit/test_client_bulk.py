"""How many images of a bulk pass are under way, step by step."""

from splitsam.client.bulk import BulkEncode
from splitsam.client.steps import CloseBulk, Emit, Load, OpenBulk, ReceiveBulk, SendBulk, Wait
from splitsam.common import errors
from splitsam.common.messages import to_item_error
from splitsam.v1 import encoder_pb2

FULL = to_item_error(errors.QueueFull("full", retry_delay_s=0.25))
DONE = encoder_pb2.EncodeImageResponse(stored=True)


def answered_with(value):
    return value
    yield


def run(refuse, images=100, in_flight=8):
    """Answer images in their order; returns how many were under way at each answer, the waits and the results."""
    info = encoder_pb2.EncoderServiceGetModelInfoResponse()
    steps = BulkEncode(
        [b"x"] * images,
        in_flight,
        idle_timeout_s=9,
        stream_timeout_s=99,
        look_up=lambda sha256: answered_with(None),
        probe=lambda: answered_with(("e:1", info)),
    ).steps()
    under_way, counts, waits, results, outcome = [], [], [], [], None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration:
            return counts, waits, results
        outcome = None
        match step:
            case Load():
                outcome = (b"x", b"digest")
            case SendBulk(request):
                under_way.append(request.request_id)
            case ReceiveBulk():
                counts.append(len(under_way))
                number = under_way.pop(0)
                outcome = encoder_pb2.EncodeImagesResponse(request_id=number)
                if refuse(len(counts)):
                    outcome.error.CopyFrom(FULL)
                else:
                    outcome.result.CopyFrom(DONE)
            case Wait(delay_s):
                waits.append(delay_s)
            case Emit(result):
                results.append(result)
            case _:
                assert isinstance(step, OpenBulk | CloseBulk)


def test_as_many_are_under_way_as_asked():
    counts, waits, results = run(lambda answer: False)
    assert set(counts[:90]) == {8}
    assert not waits
    assert len(results) == 100


def test_a_full_queue_halves_what_is_under_way_and_answers_win_it_back():
    counts, waits, results = run(lambda answer: answer == 3)
    assert waits == [0.25]
    assert min(counts[3:40]) == 4
    assert 8 in counts[40:]
    assert max(counts) == 8
    assert all(result.image is not None for result in results)


def test_a_queue_that_stays_full_gets_one_image_at_a_time_and_is_given_up_on():
    counts, waits, results = run(lambda answer: True, images=9)
    assert counts[-1] == 1
    assert len(results) == 9
    assert {result.error.reason for result in results} == {"QUEUE_FULL"}
    assert len(waits) == 9 * 19
