import numpy as np
import pytest
import torch
from e2e_support import ask, metric, point, prompt, read_refusal, write_embedding

from splitsam.v1 import decoder_pb2 as pb

IMAGES, CLICKS = 20, 200
LOGITS = {"formats": [pb.MASK_FORMAT_LOW_RES_LOGITS]}


@pytest.fixture(scope="module")
def keys(stack, model_id):
    """Distinct images of distinct sizes, put into Redis as an encoder would."""
    sizes = [(200 + 10 * number, 400 - 10 * number) for number in range(IMAGES)]
    return [write_embedding(stack, "alpha", model_id, f"crowd {i}", size=size) for i, size in enumerate(sizes)]


def call(caller, key, asked):
    return caller.decoder.PredictMasks.future(ask({key: [asked]}, **LOGITS), **caller.options(120))


def logits(response):
    [image] = response.images
    masks = image.prompts[0].masks
    return np.stack([np.frombuffer(mask.low_res_logits, "<f2").astype(np.float32) for mask in masks])


def test_concurrent_clicks_get_the_answer_of_their_own_image(alpha, stack, keys, on_gpu):
    """What everybody gets is what they get alone, but for the rounding of other batch shapes."""
    prompts = [prompt(point(150, 100), point(5, 5)), prompt(box=(3, 4, 100, 90))]
    alone = {(key, i): logits(call(alpha, key, asked).result()) for key in keys for i, asked in enumerate(prompts)}
    batches = metric(stack.metrics_url("decoder"), "splitsam_batch_fill_count", batcher="decoder")
    wanted = [(keys[number % IMAGES], number // IMAGES % len(prompts)) for number in range(CLICKS)]
    calls = [call(alpha, key, prompts[i]) for key, i in wanted]
    for (key, i), future in zip(wanted, calls, strict=True):
        answer = future.result()
        assert answer.images[0].embedding_key == key
        np.testing.assert_allclose(logits(answer), alone[key, i], atol=1e-4, rtol=2**-10)
    batches = metric(stack.metrics_url("decoder"), "splitsam_batch_fill_count", batcher="decoder") - batches
    # Or nobody had batch-mates; a GPU serves most clicks before one client has sent the next.
    assert batches < (CLICKS if on_gpu else CLICKS / 2)


def test_answers_of_different_images_and_prompts_differ(alpha, keys):
    """What the test above compares can tell one from another."""
    answers = [logits(call(alpha, key, prompt(point(20, 30))).result()) for key in keys[:4]]
    answers += [logits(call(alpha, keys[0], prompt(point(x, 100))).result()) for x in (60, 150)]
    for i, one in enumerate(answers):
        assert all(np.abs(one - other).max() > 0.01 for other in answers[:i])


def test_mates_of_bad_requests_are_answered(alpha, stack, model_id, keys):
    """Bad before the batch (unknown key, coordinates) and inside it (an embedding of NaN, which no encoder stores)."""
    poison = write_embedding(stack, "alpha", model_id, "poison", values=torch.full((256, 64, 64), torch.nan))
    bad = {poison: prompt(point(1, 1)), "0" * 64: prompt(point(1, 1)), keys[0]: prompt(point(1e6, 1))}
    good = prompt(point(20, 30))
    alone = {key: logits(call(alpha, key, good).result()) for key in keys[:9]}
    calls = []
    for key, (bad_key, bad_prompt) in zip(alone, 3 * list(bad.items()), strict=True):
        calls.append((key, call(alpha, key, good), call(alpha, bad_key, bad_prompt)))
    for key, fine, _ in calls:
        np.testing.assert_allclose(logits(fine.result()), alone[key], atol=1e-4, rtol=2**-10)
    reasons = [read_refusal(refused.exception()).reason for _, _, refused in calls if refused.exception()]
    assert reasons.count("EMBEDDING_EXPIRED") == reasons.count("INVALID_ARGUMENT") == 3
