"""JPEGs decoded on a GPU by nvJPEG, through torchvision, at a fraction of what they cost a CPU.

The pixels are not Pillow's to the last bit: another inverse transform, and colour that is stored at half the size is
enlarged otherwise. Embeddings made of them have keys of their own.
"""

import importlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.nn import functional as F

from splitsam.common.errors import InvalidArgument
from splitsam.common.settings import SettingsProblem
from splitsam.encoder_service.image_header import JPEG, DamagedImage, find_jpeg_end, identify_format, strip_jpeg
from splitsam.encoder_service.model import DeviceImage
from splitsam.encoder_service.preprocess import DECODER_ERRORS, PREPROCESS_VERSION, ImageLimits, fit_input_size

NVJPEG_VERSION = f"{PREPROCESS_VERSION}-nvjpeg"
# In float32 while it is resized: 12 bytes a pixel.
_MAX_PIXELS = 16_000_000
_MOST_AT_ONCE = 16
_RGB_COMPONENTS = tuple(b"RGB")


class PlainJpeg(NamedTuple):
    """A JPEG that a GPU decodes as Pillow does; see PreparedImage for sizes and orientation, which is upright."""

    file: bytearray
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    orientation: int


def plain_jpeg(data: bytes, limits: ImageLimits) -> PlainJpeg | None:
    """The JPEG without what is around it.

    None for any other file: another format, progressive, not of 8-bit YCbCr or grey, cut short, to be turned, beyond
    the limits, or too large to be worth the GPU's memory.
    """
    if len(data) > limits.max_bytes or identify_format(data) != JPEG or JPEG not in limits.formats:
        return None
    try:
        file, orientation = strip_jpeg(data)
        image = JpegImageFile(BytesIO(file))
        input_size = fit_input_size(*image.size)
    except (DamagedImage, InvalidArgument, *DECODER_ERRORS):
        return None
    end = find_jpeg_end(file)
    width, height = image.size
    if (
        end is None
        or orientation > 1
        or image.mode not in ("RGB", "L")
        or image.info.get("progressive")
        or image.info.get("adobe_transform") == 0
        or tuple(component[0] for component in image.layer) == _RGB_COMPONENTS
        or width * height > min(limits.max_pixels, _MAX_PIXELS)
    ):
        return None
    return PlainJpeg(bytearray(file[:end]), image.size, input_size, orientation)


class JpegDecoder:
    """Decodes what nvJPEG takes, for any thread. Those who come while one decodes are decoded together after it.

    Raises:
        SettingsProblem: there is no GPU, or no torchvision that goes with torch.
    """

    def __init__(self, limits: ImageLimits, device: torch.device):
        if device.type != "cuda":
            raise SettingsProblem("jpeg_decoder: nvjpeg needs a GPU")
        try:
            io: Any = importlib.import_module("torchvision.io")
        except (ImportError, OSError, RuntimeError) as error:  # not there, or made for another torch
            raise SettingsProblem(f"jpeg_decoder: nvjpeg needs torchvision: {error}") from error
        self._decode = io.decode_jpeg
        self._limits = limits
        self._device = device
        # Its own: on the common one it would wait for the batch that is being encoded.
        new_stream: Any = torch.cuda.Stream  # torch's own lack types
        self._stream = new_stream(device, priority=-1)
        self._waiting: deque[_Entry] = deque()
        self._at_work = threading.Lock()

    def warm_up(self) -> None:
        """Decode once, so that no image pays for first-time work.

        Raises:
            SettingsProblem: nothing comes out.
        """
        file = BytesIO()
        Image.new("RGB", (64, 48)).save(file, "JPEG")
        if self.prepare(file.getvalue()) is None:
            raise SettingsProblem("jpeg_decoder: nvjpeg does not decode on this GPU")

    def prepare(self, data: bytes) -> DeviceImage | None:
        """As `prepare_image`, with the pixels on the device; None for what is left to it.

        Raises:
            torch.OutOfMemoryError: the image does not fit on the device.
            RuntimeError: the device failed.
        """
        jpeg = plain_jpeg(data, self._limits)
        if jpeg is None:
            return None
        entry = _Entry(jpeg)
        self._waiting.append(entry)
        while not entry.is_done:
            with self._at_work:
                if not entry.is_done:
                    self._work([self._waiting.popleft() for _ in range(min(_MOST_AT_ONCE, len(self._waiting)))])
        if entry.error is not None:
            raise entry.error
        if entry.pixels is None:
            return None
        return DeviceImage(entry.pixels, jpeg.image_size, jpeg.input_size, jpeg.orientation)

    def _work(self, entries: Sequence["_Entry"]) -> None:
        try:
            with torch.inference_mode(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                for entry, image in zip(entries, self._decode_all([entry.jpeg.file for entry in entries]), strict=True):
                    entry.pixels = None if image is None else _resize(image, entry.jpeg.input_size)
                self._stream.synchronize()
        except RuntimeError as error:
            for entry in entries:
                entry.error = error
        finally:
            for entry in entries:
                entry.is_done = True

    def _decode_all(self, files: Sequence[bytearray]) -> list[Tensor | None]:
        """[3, H, W] uint8 of each; None for what is damaged: Pillow says how, or decodes it all the same."""
        try:
            images: list[Tensor | None] = self._decode(
                [torch.frombuffer(file, dtype=torch.uint8) for file in files], mode="RGB", device=self._device
            )
        except RuntimeError as error:
            self._stream.synchronize()  # raises where it is the device that failed
            if len(files) > 1:
                return [image for file in files for image in self._decode_all([file])]
            if isinstance(error, torch.OutOfMemoryError):
                raise
            return [None]
        return images


@dataclass(eq=False)
class _Entry:
    """An image that waits or is done: with pixels, with an error, or with neither if it is left to Pillow."""

    jpeg: PlainJpeg
    is_done: bool = False
    pixels: Tensor | None = None
    error: RuntimeError | None = None


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, H, W] uint8 to [height, width, 3] uint8 of a (width, height), with the filter of Pillow's bilinear."""
    width, height = size
    wide = image[None].float()
    if wide.shape[-2:] != (height, width):
        wide = F.interpolate(wide, (height, width), mode="bilinear", align_corners=False, antialias=True)
    return wide[0].round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
