from queue import SimpleQueue

from e2e_support import ask, point, prompt

from splitsam.client import AsyncClient
from splitsam.v1 import decoder_pb2 as pb


def position(request_id, key, *prompts):
    return pb.PredictMasksStreamRequest(request_id=request_id, request=ask({key: prompts}))


def test_newer_position_supersedes_those_not_served_yet(alpha, key, on_gpu):
    slow = [prompt(point(x % 100, 100)) for x in range(512 if on_gpu else 24)]
    clicks = {number: prompt(point(10 * number, 50)) for number in range(2, 9)}
    requests = [position(1, key, *slow), *(position(number, key, asked) for number, asked in clicks.items())]
    answers = list(alpha.decoder.PredictMasksStream(iter(requests), **alpha.options()))
    outcomes = {answer.request_id: answer for answer in answers}
    assert sorted(answer.request_id for answer in answers) == list(range(1, 9))
    assert answers[-1].request_id == 8
    [alone] = alpha.click(key, clicks[8])
    assert outcomes[8].result.images[0].prompts[0] == alone
    superseded = {number for number, answer in outcomes.items() if answer.WhichOneof("outcome") == "superseded"}
    assert superseded
    assert all(number < outcomes[number].superseded.by_request_id <= 8 for number in superseded)


def test_bad_position_is_answered_and_stream_goes_on(alpha, key):
    requests = SimpleQueue()
    answers = alpha.decoder.PredictMasksStream(iter(requests.get, None), **alpha.options())
    requests.put(position(1, key, prompt(point(9999, 1))))
    first = next(answers)
    requests.put(position(2, "no key", prompt(point(1, 1))))
    second = next(answers)
    requests.put(position(3, key, prompt(point(1, 1))))
    third = next(answers)
    requests.put(None)
    assert list(answers) == []
    assert (first.request_id, first.error.code, first.error.reason) == (1, 3, "INVALID_ARGUMENT")
    path = "images[0].prompts[0].points[0].x"
    assert [violation.field for violation in first.error.field_violations] == [path]
    assert second.error.field_violations[0].field == "images[0].embedding_key"
    assert third.result.images[0].embedding_key == key


async def test_client_follows_a_pointer(stack, key, alpha):
    async with (
        AsyncClient(stack.encoder, stack.decoder, token=alpha.token) as client,
        client.pointer(key, formats=["rle"]) as pointer,
    ):
        sent = [await pointer.send(points=[(x, 20)]) for x in (10, 20, 30)]
        await pointer.done()
        answers = {answer.request_id: answer async for answer in pointer}
    assert sorted(answers) == sent
    assert answers[sent[-1]].masks[0].rle is not None
    assert all(answer.error is None for answer in answers.values())
