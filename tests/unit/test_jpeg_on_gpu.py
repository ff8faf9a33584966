"""Which JPEGs a GPU may decode: those of which it makes what Pillow makes. The rest is left to Pillow."""

import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.image_header import find_jpeg_end
from splitsam.encoder_service.jpeg_on_gpu import JpegDecoder, plain_jpeg
from splitsam.encoder_service.preprocess import ImageLimits
from splitsam.encoder_service.settings import EncoderSettings

LIMITS = ImageLimits()
END, SCAN = b"\xff\xd9", b"\xff\xda"


def jpeg(width: int = 64, height: int = 48, mode: str = "RGB", image_format: str = "JPEG", **options) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, image_format, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(exif=exif)


@pytest.mark.parametrize(
    "data",
    [jpeg(), jpeg(mode="L"), jpeg(subsampling=0), jpeg(restart_marker_blocks=2), turned(1), jpeg(comment=END + SCAN)],
)
def test_plain_ones_are_taken(data: bytes):
    taken = plain_jpeg(data, LIMITS)
    assert (taken.image_size, taken.input_size) == ((64, 48), (1024, 768))
    assert taken.file.endswith(END)
    with Image.open(BytesIO(data)) as wanted, Image.open(BytesIO(taken.file)) as found:
        assert np.array_equal(np.asarray(found), np.asarray(wanted))


def test_what_follows_the_end_is_cut_off():
    data = jpeg()
    assert plain_jpeg(data + b"more" + END, LIMITS).file == plain_jpeg(data, LIMITS).file


@pytest.mark.parametrize(
    "data",
    [
        b"",
        jpeg(image_format="PNG"),
        jpeg(progressive=True),
        jpeg(mode="CMYK"),
        jpeg(keep_rgb=True),
        turned(6),
        jpeg()[:-2],
        jpeg()[:200],
        jpeg(1, 3000),
        jpeg(4001, 4000, quality=1),
    ],
    ids=["empty", "PNG", "progressive", "CMYK", "RGB", "turned", "no end", "cut", "too narrow", "large"],
)
def test_others_are_left_to_pillow(data: bytes):
    assert plain_jpeg(data, LIMITS) is None


def test_limits_are_kept():
    data = jpeg()
    assert plain_jpeg(data, ImageLimits(max_pixels=64 * 48 - 1)) is None
    assert plain_jpeg(data, ImageLimits(max_bytes=len(data) - 1)) is None
    assert plain_jpeg(data, ImageLimits(formats=("PNG",))) is None


def test_end_of_a_jpeg_of_several_scans_is_not_told():
    assert find_jpeg_end(jpeg(progressive=True)) is None
    assert find_jpeg_end(b"\xff\xd8\xff") is None
    data = jpeg()
    assert find_jpeg_end(data) == len(data)


def test_without_torchvision_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(SettingsProblem, match="jpeg_decoder: nvjpeg needs torchvision: "):
        JpegDecoder(LIMITS, torch.device("cuda", 0))


def test_without_a_gpu_it_is_refused_in_one_line():
    assert EncoderSettings.load(["--jpeg-decoder", "nvjpeg"]).jpeg_decoder == "nvjpeg"
    with pytest.raises(SettingsProblem, match="jpeg_decoder: nvjpeg needs a GPU"):
        JpegDecoder(LIMITS, torch.device("cpu"))
