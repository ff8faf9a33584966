"""An encoder that stores embeddings in int8, beside one that stores fp16, with one decoder for both."""

import numpy as np
import pytest
from e2e_support import redis_of, running_service

from splitsam.client import Client
from splitsam.common.codecs import CODECS
from splitsam.common.records import EMBEDDING, HEADER_BYTES, SHAPES


@pytest.fixture(scope="module")
def frugal(stack, alpha, encoder_args):
    with (
        running_service(stack, "encoder", *encoder_args, "--codec", "int8") as service,
        Client(service.address, stack.decoder, token=alpha.token, encode_timeout_s=60) as client,
    ):
        yield client


def test_embeddings_in_int8_take_half_the_memory_and_keep_the_masks(frugal, client, photo, stack):
    half, whole = frugal.encode(photo), client.encode(photo)
    assert half.key != whole.key
    assert frugal.info().encoder.codec == "int8"
    values, exact = (each.download_embedding(image) for each, image in ((frugal, half), (client, whole)))
    assert (values.codec, exact.codec) == ("int8", "fp16")
    steps = np.abs(exact.values).max(axis=(1, 2), keepdims=True) / 127
    off = np.abs(values.values - exact.values)
    assert (off <= 0.51 * steps + 2e-3 * np.abs(exact.values)).all()
    with redis_of(stack) as connection:
        sizes = {connection.strlen(name) for name in connection.scan_iter(f"*{half.key}*")}
    assert sizes == {HEADER_BYTES + CODECS["int8"].payload_bytes(SHAPES[EMBEDDING])}
    points = [(150, 100), (40, 30), (60, 90)]
    for point in points:
        [found], [expected] = (each.predict(image, points=[point]) for each, image in ((frugal, half), (client, whole)))
        ours, theirs = found.to_array(), expected.to_array()
        assert (ours & theirs).sum() > 0.95 * (ours | theirs).sum()
