import math

import grpc
import numpy as np
import pytest
from e2e_support import (
    BACKGROUND,
    Caller,
    ask,
    logits_in_redis,
    point,
    prompt,
    read_refusal,
    redis_of,
    refusal,
    running_service,
    write_embedding,
)
from grpc import StatusCode

from splitsam.v1 import decoder_pb2 as pb

INVALID = (StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
CLICK = prompt(point(10, 10))
FIRST = "images[0].prompts[0]"


def logits(value):
    array = np.zeros((256, 256), "<f2")
    array[7, 7] = value
    return array.tobytes()


BAD_PROMPTS = {
    "nothing in it": (prompt(), FIRST, "at least 1 point"),
    "label unset": (prompt(pb.Point(x=1, y=1)), f"{FIRST}.points[0].label", "FOREGROUND or BACKGROUND"),
    "label of SAM's own": (prompt(point(1, 1), point(1, 1, 99)), f"{FIRST}.points[1].label", "99"),
    "x not a number": (prompt(point(math.nan, 1)), f"{FIRST}.points[0].x", "finite"),
    "y infinite": (prompt(point(1, -math.inf)), f"{FIRST}.points[0].y", "finite"),
    "x left of the image": (prompt(point(-0.5, 1)), f"{FIRST}.points[0].x", "0 to 320"),
    "x right of the image": (prompt(point(320.5, 1)), f"{FIRST}.points[0].x", "0 to 320"),
    "y below the image": (prompt(point(1, 1), point(1, 241, BACKGROUND)), f"{FIRST}.points[1].y", "0 to 240"),
    "box without width": (prompt(box=(10, 10, 10, 20)), f"{FIRST}.box.x0", "less than x1"),
    "box without height": (prompt(box=(10, 20, 20, 20)), f"{FIRST}.box.y0", "less than y1"),
    "box turned around": (prompt(box=(30, 10, 20, 20)), f"{FIRST}.box.x0", "less than x1"),
    "box not a number": (prompt(box=(1, 1, math.nan, 20)), f"{FIRST}.box.x1", "finite"),
    "box beyond the image": (prompt(box=(1, 1, 20, 240.5)), f"{FIRST}.box.y1", "0 to 240"),
    "logits of another size": (prompt(low_res_logits=bytes(131070)), f"{FIRST}.low_res_logits", "131072"),
    "logits empty": (prompt(low_res_logits=b""), f"{FIRST}.low_res_logits", "131072"),
    "logits infinite": (prompt(low_res_logits=logits(math.inf)), f"{FIRST}.low_res_logits", "finite"),
    "logits not a number": (
        prompt(CLICK.points[0], low_res_logits=logits(math.nan)),
        f"{FIRST}.low_res_logits",
        "finite",
    ),
    "token empty": (prompt(refinement_token=""), f"{FIRST}.refinement_token", "empty"),
    "65 points": (prompt(*[point(1, 1)] * 65), f"{FIRST}.points", "64"),
}
BAD_OUTPUTS = {
    "format unset": ({"formats": [0]}, "output.formats[0]", "RLE"),
    "format unknown": ({"formats": [1, 99]}, "output.formats[1]", "99"),
    "format twice": ({"formats": [1, 2, 1]}, "output.formats[2]", "RLE"),
    "selection unknown": ({"selection": 9}, "output.selection", "SINGLE, BEST or ALL"),
    "tolerance negative": ({"polygon_tolerance_px": -1}, "output.polygon_tolerance_px", "0 to 100"),
    "tolerance not a number": ({"polygon_tolerance_px": math.nan}, "output.polygon_tolerance_px", "0 to 100"),
    "threshold too high": ({"mask_threshold": 101}, "output.mask_threshold", "-100 to 100"),
    "threshold not a number": ({"mask_threshold": math.nan}, "output.mask_threshold", "-100 to 100"),
}


def assert_invalid(refused, field, limit):
    assert (refused.code, refused.reason, refused.domain) == (*INVALID, "splitsam.v1")
    assert refused.fields.keys() == {field}
    assert limit in refused.fields[field]
    assert refused.retry_s is None


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompt_is_refused_with_field_and_limit(alpha, key, case):
    bad, field, limit = BAD_PROMPTS[case]
    assert_invalid(refusal(lambda: alpha.click(key, bad)), field, limit)


def test_field_path_names_image_and_prompt_of_a_larger_request(alpha, stack, model_id, key):
    other = write_embedding(stack, "alpha", model_id, "of another size", size=(50, 40))
    request = ask({key: [CLICK, CLICK], other: [CLICK, prompt(point(60, 10))]})
    assert_invalid(refusal(lambda: alpha.predict(request)), "images[1].prompts[1].points[0].x", "0 to 50")


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_output_option_is_refused_with_field_and_limit(alpha, key, case):
    options, field, limit = BAD_OUTPUTS[case]
    assert_invalid(refusal(lambda: alpha.click(key, CLICK, **options)), field, limit)


def test_request_without_images_is_refused(alpha):
    assert_invalid(refusal(lambda: alpha.predict(ask({}))), "images", "1 to 32")


def test_request_without_prompts_is_refused(alpha, key):
    assert_invalid(refusal(lambda: alpha.click(key)), "images[0].prompts", "at least 1")


def test_too_many_prompts_are_refused(alpha, key):
    assert_invalid(refusal(lambda: alpha.click(key, *[CLICK] * 10_000)), "images[0].prompts", "1024")


def test_too_many_images_are_refused(alpha):
    request = ask({f"{number:064x}": [CLICK] for number in range(33)})
    assert_invalid(refusal(lambda: alpha.predict(request)), "images", "32")


def test_same_image_twice_is_refused(alpha, key):
    request = ask({key: [CLICK]})
    request.images.append(request.images[0])
    assert_invalid(refusal(lambda: alpha.predict(request)), "images[1].embedding_key", "at most once")


@pytest.mark.parametrize("malformed", ["", "12", "G" * 64, "A" * 64, "0" * 65, "é" * 64, "0" * 63 + "\n"])
def test_malformed_key_is_refused(alpha, malformed):
    assert_invalid(refusal(lambda: alpha.click(malformed, CLICK)), "images[0].embedding_key", "64")


def test_unknown_key_is_not_found(alpha):
    refused = refusal(lambda: alpha.click("0" * 64, CLICK))
    assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "EMBEDDING_EXPIRED")
    assert "encode the image again" in refused.message
    assert refused.fields == {}
    assert refused.retry_s is None


def test_embedding_of_another_model_is_refused(alpha, stack, other_weights, device_args, tenant_args, photo, model_id):
    arguments = ("--checkpoint", str(other_weights), *device_args, *tenant_args)
    with running_service(stack, "encoder", *arguments) as other:
        caller = Caller(other.address, stack.decoder, alpha.token)
        made = caller.encode(photo)
        caller.close()
    assert not made.cache_hit
    refused = refusal(lambda: alpha.click(made.embedding.embedding_key, CLICK))
    assert (refused.code, refused.reason) == (StatusCode.FAILED_PRECONDITION, "MODEL_MISMATCH")
    assert refused.metadata["embedding_model"] == made.embedding.model_id != model_id
    assert refused.metadata["decoder_model"] == model_id


@pytest.fixture(scope="module")
def forgetful(stack, alpha, service_args):
    """A decoder that keeps nothing in memory, takes one waiting entry and two seconds for a request."""
    limits = ("--memory-bytes", "0", "--logits-memory-bytes", "0", "--max-queue", "1", "--predict-timeout-ms", "2000")
    with running_service(stack, "decoder", *service_args, *limits) as service:
        caller = Caller(stack.encoder, service.address, alpha.token)
        yield caller
        caller.close()


def test_refinement_token_of_another_replica_is_accepted(alpha, forgetful, stack, key):
    token = alpha.click(key, CLICK, refinement_tokens=True)[0].masks[0].refinement_token
    logits_in_redis(stack, token)
    assert forgetful.click(key, prompt(refinement_token=token)) == alpha.click(key, prompt(refinement_token=token))


def test_expired_refinement_token_is_not_found(alpha, forgetful, stack, key):
    token = alpha.click(key, CLICK, refinement_tokens=True)[0].masks[0].refinement_token
    name = logits_in_redis(stack, token)
    with redis_of(stack) as connection:
        assert connection.delete(name) == 1
    refused = refusal(lambda: forgetful.click(key, prompt(refinement_token=token)))
    assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "REFINEMENT_EXPIRED")
    assert "send the prompts without it" in refused.message


@pytest.mark.parametrize("token", ["0" * 64, "x", "é" * 64, "A" * 64, "0" * 100_000])
def test_made_up_refinement_token_is_not_found(alpha, key, token):
    refused = refusal(lambda: alpha.click(key, prompt(refinement_token=token)))
    assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "REFINEMENT_EXPIRED")


def test_full_queue_is_refused_with_pushback(forgetful, key):
    heavy = [prompt(point(x, 9)) for x in range(8)]
    calls = [forgetful.decoder.PredictMasks.future(ask({key: heavy}), **forgetful.options()) for _ in range(12)]
    failures = [error for call in calls if (error := call.exception()) is not None]
    answered = [call.result() for call in calls if call.exception() is None]
    assert answered
    assert failures
    for error in failures:
        refused = read_refusal(error)
        assert refused.code is StatusCode.RESOURCE_EXHAUSTED
        assert refused.reason in ("QUEUE_FULL", "DEADLINE_TOO_SHORT")
        assert refused.retry_s > 0
        assert refused.pushback_ms == pytest.approx(1000 * refused.retry_s, abs=1)


@pytest.mark.needs_slow_model
def test_request_that_outlasts_its_time_is_refused_with_pushback(forgetful, key):
    refused = refusal(lambda: forgetful.click(key, *[CLICK] * 1000))
    assert (refused.code, refused.reason) == (StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_TOO_SHORT")
    assert refused.retry_s > 0
    assert refused.pushback_ms > 0


def test_damaged_record_is_a_miss_and_is_deleted(forgetful, stack, model_id):
    damaged = write_embedding(stack, "alpha", model_id, "damaged")
    with redis_of(stack) as connection:
        [name] = connection.keys(f"splitsam:embedding:*:{damaged}")
        connection.setrange(name, 1_000_000, b"\xff\xfe\xfd")
        refused = refusal(lambda: forgetful.click(damaged, CLICK))
        assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "EMBEDDING_EXPIRED")
        assert not connection.exists(name)


def test_bytes_that_are_no_message_are_refused(alpha, stack):
    with grpc.insecure_channel(stack.decoder) as channel:
        method = channel.unary_unary("/splitsam.v1.DecoderService/PredictMasks")
        refused = refusal(lambda: method(b"\xff\xff\xff", **alpha.options()))
    assert (refused.code, refused.reason) == INVALID


def test_decoder_answers_after_every_bad_request(alpha, stack, key):
    for bad, *_ in BAD_PROMPTS.values():
        refusal(lambda bad=bad: alpha.click(key, bad))
    [answer] = alpha.click(key, CLICK)
    assert answer.masks
    assert "rpc failed" not in stack.children["decoder"].log_path.read_text()
