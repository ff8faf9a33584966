import io

import numpy as np
import pytest
from e2e_support import ask, draw, image_file, point, prompt, refusal
from PIL import Image, ImageOps
from safetensors.torch import load_file

from splitsam.common.checkpoints import compute_model_id
from splitsam.v1 import decoder_pb2, encoder_pb2, types_pb2

EXIF_ORIENTATION = 0x0112


def test_encode_misses_then_hits_for_same_image(alpha):
    image = image_file(draw(100))
    first, second = alpha.encode(image), alpha.encode(image)
    assert (first.cache_hit, first.stored) == (False, True)
    assert (second.cache_hit, second.stored) == (True, True)
    assert first.embedding == second.embedding
    assert len(first.embedding.embedding_key) == 64
    size = first.embedding.image_size, first.embedding.input_size
    assert [(side.width, side.height) for side in size] == [(320, 240), (1024, 768)]
    assert first.embedding.orientation == types_pb2.ORIENTATION_UNSPECIFIED
    assert first.timings.model_ms > 0
    assert second.timings.model_ms == 0


def test_look_up_finds_by_digest_only_what_is_encoded(alpha, photo, encoded):
    found = alpha.look_up(photo)
    assert found.found
    assert found.embedding == encoded.embedding
    missing = alpha.look_up(image_file(draw(101)))
    assert not missing.found
    assert not missing.HasField("embedding")


def test_crop_is_an_image_of_its_own(alpha):
    whole, corners = draw(103), (40, 30, 200, 240)
    crop = encoder_pb2.Crop(**dict(zip(("x0", "y0", "x1", "y1"), corners, strict=True)))
    image = image_file(whole)
    request = encoder_pb2.EncodeImageRequest(image=image, crop=crop, background=True)
    made, again = (alpha.encoder.EncodeImage(request, **alpha.options()) for _ in range(2))
    assert (made.cache_hit, again.cache_hit) == (False, True)
    assert (made.embedding.image_size.width, made.embedding.image_size.height) == (160, 210)
    assert made.embedding == again.embedding == alpha.look_up(image, crop).embedding
    assert not alpha.look_up(image).found
    keys = [made.embedding.embedding_key, alpha.encode(image_file(whole.crop(corners))).embedding.embedding_key]
    of_crop, of_file = (b"".join(message.chunk for message in alpha.download(key)) for key in keys)
    assert of_crop == of_file


def test_download_equals_embedding_of_client(alpha, client, encoded, key):
    messages = alpha.download(key)
    header = messages[0].header
    content = b"".join(message.chunk for message in messages)
    assert header.embedding == encoded.embedding
    assert header.codec == types_pb2.EMBEDDING_CODEC_FP16
    assert tuple(header.shape) == (256, 64, 64)
    assert header.size_bytes == len(content) == 2 * 256 * 64 * 64
    assert all(len(message.chunk) <= 2**20 for message in messages)
    assert not any(message.HasField("header") for message in messages[1:])
    downloaded = client.download_embedding(key)
    np.testing.assert_array_equal(downloaded.values, np.frombuffer(content, "<f2").reshape(256, 64, 64))


def test_orientation_in_exif_is_undone_before_coordinates_are_read(alpha):
    upright = draw(102, (240, 320))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # stored lying on its side, 320 x 240
    turned = image_file(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    as_seen = image_file(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))
    info, reference = alpha.encode(turned).embedding, alpha.encode(as_seen).embedding
    assert (info.image_size.width, info.image_size.height) == (240, 320)
    assert info.orientation == types_pb2.ORIENTATION_ROTATED_90
    formats = [decoder_pb2.MASK_FORMAT_LOW_RES_LOGITS, decoder_pb2.MASK_FORMAT_RLE]
    low = prompt(point(200, 300))
    answer = alpha.predict(ask({info.embedding_key: [low]}, formats=formats)).images[0]
    [masks] = alpha.click(reference.embedding_key, low, formats=formats)
    assert list(answer.prompts[0].masks) == list(masks.masks)
    assert list(answer.prompts[0].masks[0].rle.size) == [320, 240]
    assert answer.orientation == types_pb2.ORIENTATION_ROTATED_90
    beyond = refusal(lambda: alpha.click(info.embedding_key, prompt(point(300, 200))))
    assert "240" in beyond.fields["images[0].prompts[0].points[0].x"]


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_encode_accepts_format(alpha, image_format):
    image = image_file(draw(103), image_format)
    assert alpha.encode(image).stored


def test_encode_images_goes_on_past_bad_image(alpha, photo, encoded):
    images = {7: photo, 3: b"no image at all", 9: image_file(draw(104))}
    requests = [encoder_pb2.EncodeImagesRequest(request_id=number, image=image) for number, image in images.items()]
    answers = {answer.request_id: answer for answer in alpha.encoder.EncodeImages(iter(requests), **alpha.options())}
    assert answers.keys() == images.keys()
    assert answers[7].result.cache_hit
    assert answers[7].result.embedding == encoded.embedding
    assert answers[9].result.stored
    error = answers[3].error
    assert (error.code, error.reason, error.retry_delay_ms) == (3, "INVALID_ARGUMENT", 0)
    assert [violation.field for violation in error.field_violations] == ["image"]
    assert "JPEG, PNG, WEBP" in error.field_violations[0].description


def test_model_info_names_same_model_in_both_services(alpha, weights, model_name, precision):
    of_encoder = alpha.encoder.GetModelInfo(encoder_pb2.EncoderServiceGetModelInfoRequest(), **alpha.options())
    of_decoder = alpha.decoder.GetModelInfo(decoder_pb2.DecoderServiceGetModelInfoRequest(), **alpha.options())
    model_id = compute_model_id(load_file(weights))
    assert types_pb2.Precision.Name(of_encoder.model.precision) == f"PRECISION_{precision.upper()}"
    assert of_decoder.model.precision == types_pb2.PRECISION_FP32
    for info in (of_encoder, of_decoder):
        assert info.model.model_id == model_id
        assert info.model.name == model_name
        assert info.model.device
        assert info.limits.max_image_bytes == 32 * 2**20
        assert info.limits.max_image_pixels == 64_000_000
        assert info.limits.max_reply_bytes == 4 * 2**20
        assert list(info.limits.image_formats) == ["JPEG", "PNG", "WEBP"]
    assert of_encoder.model.codec == types_pb2.EMBEDDING_CODEC_FP16
    assert of_encoder.model.preprocess_version
