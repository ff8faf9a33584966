"""How an image's prompts are asked for, against a real gRPC server that limits its replies."""

from pathlib import Path

import pytest
from test_client_calls import KEY, ScriptedDecoder, answer_to, serve  # noqa: F401 (a fixture)

from splitsam.client import Client, SplitsamError
from splitsam.client.export_pass import ExportOptions, predict_image
from splitsam.client.export_plan import Task, TaskImage
from splitsam.client.prompts import Prompt
from splitsam.common import errors


class Terse(ScriptedDecoder):
    """Refuses more than so many prompts in a reply; a mask's score tells whose prompt it answers."""

    def __init__(self, most):
        super().__init__(PredictMasks=[None])
        self.most = most

    def PredictMasks(self, request, context):  # noqa: N802 (the name of an RPC)
        prompts = request.images[0].prompts
        self.script = {"PredictMasks": [errors.ReplyTooLarge("too large") if len(prompts) > self.most else None]}
        self.next("PredictMasks", request, context)
        answer = answer_to(request)
        for asked, answered in zip(prompts, answer.images[0].prompts, strict=True):
            answered.masks[0].predicted_iou = asked.box.x0
        return answer

    def sizes(self):
        return [len(request.images[0].prompts) for _, request, *_ in self.calls]


def predict(decoder, boxes, most):
    prompts = [Prompt(box=(float(number), 0, 100, 100)) for number in range(boxes)]
    tasks = tuple(Task(index, "", prompt) for index, prompt in enumerate(prompts))
    image = TaskImage(1, "a.png", Path("a.png"), (100, 100), tasks)
    with Client(decoder=decoder) as client:
        masks = predict_image(client, KEY, image, ExportOptions(prompts_per_request=most))
    return [mask.score for mask in masks]


@pytest.mark.parametrize(("most", "sizes"), [(64, [5]), (2, [2, 2, 1])])
def test_prompts_are_asked_in_few_requests_that_nobody_waits_for(serve, most, sizes):  # noqa: F811
    decoder = Terse(most=99)
    assert predict(serve(decoder), 5, most) == [0, 1, 2, 3, 4]
    assert decoder.sizes() == sizes
    assert all(request.background for _, request, *_ in decoder.calls)


def test_a_request_whose_reply_would_be_too_large_is_cut_in_two_and_order_is_kept(serve):  # noqa: F811
    decoder = Terse(most=2)
    assert predict(serve(decoder), 7, most=64) == [0, 1, 2, 3, 4, 5, 6]
    assert decoder.sizes() == [7, 3, 1, 2, 4, 2, 2]


def test_a_single_mask_that_is_too_large_is_an_error(serve):  # noqa: F811
    with pytest.raises(SplitsamError) as caught:
        predict(serve(Terse(most=0)), 2, most=64)
    assert caught.value.reason == "REPLY_TOO_LARGE"
