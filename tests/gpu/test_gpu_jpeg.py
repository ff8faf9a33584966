"""JPEGs decoded by nvJPEG: near Pillow's pixels, the same masks, and damaged files cost nothing but themselves."""

import random
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.decoder.scenes import draw_images
from splitsam.common.checkpoints import load_model
from splitsam.common.codecs import to_fp16
from splitsam.encoder_service.jpeg_on_gpu import JpegDecoder
from splitsam.encoder_service.mask_reference import MaskReference
from splitsam.encoder_service.model import EncoderModel
from splitsam.encoder_service.preprocess import ImageLimits, prepare_image

GPU = torch.device("cuda", 0)
LIMITS = ImageLimits()
PHOTO = (Path(__file__).parents[2] / "client/assets/demo.jpg").read_bytes()

pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def decoder() -> JpegDecoder:
    decoder = JpegDecoder(LIMITS, GPU)
    decoder.warm_up()
    return decoder


def as_jpeg(image: Image.Image, **options) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def photo(size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    with Image.open(BytesIO(PHOTO)) as image:
        return as_jpeg(image.convert(mode).resize(size), **{"quality": 90} | options)


def scenes() -> list[bytes]:
    return [PHOTO, *(as_jpeg(Image.fromarray(pixels), quality=90) for pixels in draw_images(4))]


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(1920, 1080), (1024, 683), (641, 479), (100, 80), (17, 1025), (4000, 3000)])
def test_pixels_are_near_pillows(decoder: JpegDecoder, size: tuple[int, int], subsampling: int):
    data = photo(size, subsampling=subsampling)
    found, wanted = decoder.prepare(data), prepare_image(data, LIMITS)
    assert (found.image_size, found.input_size, found.orientation) == (
        wanted.image_size,
        wanted.input_size,
        wanted.orientation,
    )
    difference = np.abs(found.pixels.cpu().numpy().astype(int) - wanted.pixels)
    mean, most = difference.mean(), np.percentile(difference, 99)
    print(f"{size}, {subsampling}: differs by {mean:.3f}, 99 % by at most {most}, the worst by {difference.max()}")
    # Only colour that is stored at half the size is enlarged otherwise, and shows where the image is enlarged, too.
    assert mean < (1.0 if subsampling == 0 or min(size) >= 200 else 4.0)
    assert most <= (1 if subsampling == 0 else 16)


def test_grey_ones_and_those_with_restarts_too(decoder: JpegDecoder):
    for data in (photo((640, 480), "L"), photo((640, 480), restart_marker_blocks=4)):
        found, wanted = decoder.prepare(data), prepare_image(data, LIMITS)
        assert np.abs(found.pixels.cpu().numpy().astype(int) - wanted.pixels).mean() < 1


def test_threads_decode_at_once_beside_other_work(decoder: JpegDecoder):
    wanted = decoder.prepare(PHOTO).pixels
    torch.cuda._sleep(10**9)  # on the common stream, which nobody waits for
    busy = torch.cuda.Event()
    busy.record()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(decoder.prepare, [PHOTO] * 64))
        assert not busy.query()
    assert all(torch.equal(each.pixels, wanted) for each in found)


def test_masks_are_those_of_pillows_pixels(decoder: JpegDecoder):
    sam = load_model(model="vit_t", checkpoint=None, sha256=None, cache_dir=None).sam
    reference = MaskReference(sam, GPU)
    model = EncoderModel(sam.image_encoder, sam.pixel_mean, sam.pixel_std, device=GPU)
    ious = []
    for number, data in enumerate(scenes()):
        pillow, ours = prepare_image(data, LIMITS), decoder.prepare(data)
        [kept], [found] = model.encode([pillow]), model.encode([ours])
        reference.keep(kept, pillow.input_size)
        ious.append(reference.compare(number, to_fp16(found)).ious)
    print(f"masks of nvJPEG's pixels against Pillow's: mean IoU {torch.cat(ious).mean():.5f}")
    assert torch.cat(ious).mean() >= 0.99


def test_damaged_files_are_left_to_pillow_or_decoded_and_harm_nobody(decoder: JpegDecoder):
    chance, left = random.Random(3), list[bytes]()
    data = photo((640, 480))
    wanted = decoder.prepare(data).pixels
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 3, 50))):
            damaged[chance.randrange(2, len(damaged))] = chance.randrange(256)
        if decoder.prepare(bytes(damaged)) is None:
            left.append(bytes(damaged))
    torch.cuda.synchronize()
    assert torch.equal(decoder.prepare(data).pixels, wanted)
    print(f"{len(left)} of 400 damaged files left to Pillow")
    assert 0 < len(left) < 400
    # Also where they are decoded together with others.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(decoder.prepare, [data, *left] * 8))
    assert [each is None for each in found] == [False, *(True for _ in left)] * 8
    assert all(torch.equal(each.pixels, wanted) for each in found if each is not None)
