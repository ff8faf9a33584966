import pytest
from e2e_support import (
    Caller,
    ask,
    draw,
    image_file,
    point,
    prompt,
    redis_of,
    refusal,
    running_service,
    write_embedding,
)
from grpc import StatusCode

from splitsam.client import Client, SplitsamError
from splitsam.v1 import decoder_pb2, encoder_pb2

CLICK = prompt(point(10, 10))
CALLS = {
    "EncodeImage": lambda caller: caller.encode(b"\xff\xd8\xff"),
    "EncodeImages": lambda caller: list(caller.encoder.EncodeImages(iter(()), **caller.options())),
    "LookUpEmbedding": lambda caller: caller.look_up(b""),
    "DownloadEmbedding": lambda caller: caller.download("0" * 64),
    "encoder's GetModelInfo": lambda caller: caller.encoder.GetModelInfo(
        encoder_pb2.EncoderServiceGetModelInfoRequest(), **caller.options()
    ),
    "PredictMasks": lambda caller: caller.click("0" * 64, CLICK),
    "PredictMasksStream": lambda caller: list(caller.decoder.PredictMasksStream(iter(()), **caller.options())),
    "GenerateMasks": lambda caller: list(
        caller.decoder.GenerateMasks(decoder_pb2.GenerateMasksRequest(), **caller.options())
    ),
    "decoder's GetModelInfo": lambda caller: caller.decoder.GetModelInfo(
        decoder_pb2.DecoderServiceGetModelInfoRequest(), **caller.options()
    ),
}


@pytest.fixture(scope="module", params=[None, "wrong-token-0123456789"], ids=["no token", "wrong token"])
def stranger(stack, request):
    caller = Caller(stack.encoder, stack.decoder, request.param)
    yield caller
    caller.close()


@pytest.mark.parametrize("call", CALLS)
def test_call_without_known_token_is_unauthenticated(stranger, call):
    refused = refusal(lambda: CALLS[call](stranger))
    assert (refused.code, refused.reason) == (StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert refused.domain == "splitsam.v1"
    assert "authorization" in refused.message


def test_key_of_another_tenant_is_not_found(alpha, beta, photo, key):
    assert alpha.click(key, CLICK)
    for use in (lambda: beta.click(key, CLICK), lambda: beta.download(key)):
        refused = refusal(use)
        assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "EMBEDDING_EXPIRED")
    assert not beta.look_up(photo).found


def test_same_image_gives_each_tenant_a_key_of_its_own(alpha, beta, photo, key):
    made = beta.encode(photo)
    assert not made.cache_hit
    assert made.embedding.embedding_key != key
    assert beta.click(made.embedding.embedding_key, CLICK)[0] == alpha.click(key, CLICK)[0]


def test_stolen_refinement_token_is_not_found(alpha, beta, stack, model_id, key):
    token = alpha.click(key, CLICK, refinement_tokens=True)[0].masks[0].refinement_token
    stolen = prompt(refinement_token=token)
    assert alpha.click(key, stolen)
    own = write_embedding(stack, "beta", model_id, "beta's own")
    copied = write_embedding(stack, "beta", model_id, "under alpha's key", key=bytes.fromhex(key))
    other = write_embedding(stack, "alpha", model_id, "another image of alpha's")
    for caller, used_key in ((beta, own), (beta, copied), (alpha, other)):
        refused = refusal(lambda caller=caller, used_key=used_key: caller.click(used_key, stolen))
        assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "REFINEMENT_EXPIRED")


def test_record_copied_between_tenants_is_not_served(alpha, beta, stack, model_id):
    """Whoever can write to Redis still cannot pass one tenant's record off as another's."""
    mine = write_embedding(stack, "alpha", model_id, "copied")
    other = write_embedding(stack, "beta", model_id, "beside it")
    with redis_of(stack) as connection:
        [source] = connection.keys(f"splitsam:embedding:*:{mine}")
        [beside] = connection.keys(f"splitsam:embedding:*:{other}")
        forged = beside.decode().replace(other, mine)
        connection.set(forged, connection.get(source))
    refused = refusal(lambda: beta.click(mine, CLICK))
    assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "EMBEDDING_EXPIRED")
    assert alpha.click(mine, CLICK)


def test_keys_and_tokens_outlive_a_change_of_the_secret(alpha, stack, service_args, tmp_path, key):
    token = alpha.click(key, CLICK, refinement_tokens=True)[0].masks[0].refinement_token
    (tmp_path / "secret").write_text("the secret of tomorrow")
    arguments = (*service_args, "--previous-secret-file", str(stack.folder / "secret"))
    with running_service(stack, "decoder", *arguments, secret_file=tmp_path / "secret") as rotated:
        caller = Caller(stack.encoder, rotated.address, alpha.token)
        for asked in (CLICK, prompt(refinement_token=token)):
            assert caller.click(key, asked) == alpha.click(key, asked)
        renewed = caller.click(key, CLICK, refinement_tokens=True)[0].masks[0].refinement_token
        assert caller.click(key, prompt(refinement_token=renewed))
        caller.close()
    refused = refusal(lambda: alpha.click(key, prompt(refinement_token=renewed)))
    assert refused.reason == "REFINEMENT_EXPIRED"  # this decoder does not know the new secret


def test_clicks_succeed_while_a_change_of_the_secret_is_rolled_out(stack, service_args, encoder_args, tmp_path, alpha):
    """What an encoder stores under the new secret, a decoder finds that still stores under the old one."""
    old, new = stack.folder / "secret", tmp_path / "secret"
    new.write_text("the secret of tomorrow")
    ahead = (*encoder_args, "--previous-secret-file", str(old))
    behind = (*service_args, "--previous-secret-file", str(new))
    with (
        running_service(stack, "encoder", *ahead, secret_file=new) as encoder,
        running_service(stack, "decoder", *behind) as decoder,
        Client(encoder.address, decoder.address, token=alpha.token) as client,
    ):
        image = client.encode(image_file(draw(74)))
        assert client.predict(image, points=[(10, 10)])
    refused = refusal(lambda: alpha.click(image.key, CLICK))
    assert refused.reason == "EMBEDDING_EXPIRED"  # this decoder has not heard of the new secret


def test_client_library_reports_missing_token(stack, photo):
    with Client(stack.encoder, stack.decoder) as client, pytest.raises(SplitsamError) as caught:
        client.encode(photo)
    assert caught.value.reason == "UNAUTHENTICATED"


def test_metadata_of_many_kinds_is_survived(alpha, key):
    options = alpha.options()
    metadata = (*options["metadata"], ("x-request-id", "i" * 2000), ("some-bin", b"\xff\x00"))
    request = ask({key: [CLICK]})
    answer, call = alpha.decoder.PredictMasks.with_call(request, timeout=60, metadata=metadata)
    assert answer.images
    assert dict(call.trailing_metadata())["x-request-id"] == "i" * 64
