import pytest
from e2e_support import draw, image_file, png_of_size, point, prompt, refusal
from grpc import RpcError, StatusCode

from splitsam.v1 import encoder_pb2 as pb

MAX_BYTES = 32 * 2**20


def truncated(image_format):
    whole = image_file(draw(200), image_format)
    return whole[: len(whole) // 2]


BAD_IMAGES = {
    "nothing": (b"", "JPEG, PNG or WebP"),
    "text": (b"<html>not found</html>", "JPEG, PNG, WEBP"),
    "zeros": (bytes(1000), "JPEG, PNG, WEBP"),
    "GIF": (image_file(draw(200), "GIF"), "JPEG, PNG, WEBP"),
    "BMP": (image_file(draw(200), "BMP"), "JPEG, PNG, WEBP"),
    "TIFF": (image_file(draw(200), "TIFF"), "JPEG, PNG, WEBP"),
    "half a JPEG": (truncated("JPEG"), "JPEG"),
    "half a PNG": (truncated("PNG"), "PNG"),
    "half a WebP": (truncated("WEBP"), "WEBP"),
    "first bytes of a JPEG": (b"\xff\xd8\xff\xe0", "JPEG"),
    "20,000 x 20,000 pixels": (png_of_size(20_000, 20_000), "64000000"),
    "no pixels": (png_of_size(0, 10), "PNG"),
    "fewer pixels than announced": (png_of_size(100, 100), "PNG"),
    "5,000 x 1 pixels": (image_file(draw(200).resize((5000, 1))), "2048"),
    "a byte too many": (png_of_size(8, 8).ljust(MAX_BYTES + 1, b"\0"), str(MAX_BYTES)),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_image_is_refused_with_field_and_limit(alpha, case):
    image, limit = BAD_IMAGES[case]
    refused = refusal(lambda: alpha.encode(image))
    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
    assert refused.domain == "splitsam.v1"
    assert refused.fields.keys() == {"image"}
    assert limit in refused.fields["image"]
    assert refused.retry_s is None


def test_crop_beyond_the_image_is_refused_with_its_size(alpha, photo):
    request = pb.EncodeImageRequest(image=photo, crop=pb.Crop(x0=0, y0=0, x1=321, y1=240))
    refused = refusal(lambda: alpha.encoder.EncodeImage(request, **alpha.options()))
    assert refused.code is StatusCode.INVALID_ARGUMENT
    assert refused.fields.keys() == {"crop"}
    assert "320,240" in refused.fields["crop"]


def test_image_far_over_the_limit_is_refused_before_it_is_received(alpha):
    with pytest.raises(RpcError) as caught:
        alpha.encode(bytes(MAX_BYTES + 2**20))
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in caught.value.details()


def test_image_far_over_the_limit_does_not_end_bulk_encoding(client, photo, key):
    results = {result.position: result for result in client.encode_many([bytes(MAX_BYTES + 2**20), photo])}
    assert [violation.field for violation in results[0].error.violations] == ["image"]
    assert results[1].image.key == key


def test_digest_of_wrong_length_is_refused(alpha):
    request = pb.LookUpEmbeddingRequest(image_sha256=b"123")
    refused = refusal(lambda: alpha.encoder.LookUpEmbedding(request, **alpha.options()))
    assert refused.code is StatusCode.INVALID_ARGUMENT
    assert "32" in refused.fields["image_sha256"]


@pytest.mark.parametrize("malformed", ["", "12", "G" * 64, "A" * 64, "0" * 65, "é" * 64])
def test_download_of_malformed_key_is_refused(alpha, malformed):
    refused = refusal(lambda: alpha.download(malformed))
    assert refused.code is StatusCode.INVALID_ARGUMENT
    assert "64" in refused.fields["embedding_key"]


def test_download_of_unknown_key_is_not_found(alpha):
    refused = refusal(lambda: alpha.download("0" * 64))
    assert (refused.code, refused.reason) == (StatusCode.NOT_FOUND, "EMBEDDING_EXPIRED")


def test_encoder_answers_after_every_bad_image(alpha, stack):
    for image, _ in BAD_IMAGES.values():
        refusal(lambda image=image: alpha.encode(image))
    fresh = alpha.encode(image_file(draw(201)))
    assert fresh.stored
    assert alpha.click(fresh.embedding.embedding_key, prompt(point(5, 5)))
    assert "rpc failed" not in stack.children["encoder"].log_path.read_text()
