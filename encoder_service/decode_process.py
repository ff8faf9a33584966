"""The process behind `decode_workers`: decodes one image file after the other until its standard input ends.

Both sides have one piece of memory in common. A request on standard input says how long the file at its beginning is;
the answer on standard output says what was made of it, and then pixels, or a text, stand there instead.
"""

import json
import mmap
import struct
import sys
from enum import IntEnum

import numpy as np

from splitsam.common.errors import InvalidArgument
from splitsam.common.shapes import IMAGE_SIDE_PX
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage, prepare_image

# Bytes of the file; whether it is cropped, and to what.
REQUEST = struct.Struct("<Q?4I")
# Outcome; bytes that stand in the memory; then, of an image, its size, that of its pixels, and its orientation.
ANSWER = struct.Struct("<BQ4IB")
PIXEL_BYTES = 3 * IMAGE_SIDE_PX**2


class Outcome(IntEnum):
    """Of an image: pixels, the field and description of an InvalidArgument, or the text of another exception."""

    DONE, REFUSED, FAILED = range(3)


def answer(memory: mmap.mmap, request: bytes, limits: ImageLimits) -> bytes:
    """Decode the file in the memory and leave there what the answer says."""
    size_bytes, is_cropped, *crop = REQUEST.unpack(request)
    try:
        image = prepare_image(memory[:size_bytes], limits, (crop[0], crop[1], crop[2], crop[3]) if is_cropped else None)
    except InvalidArgument as refusal:
        [violation] = refusal.violations
        return _leave_text(memory, Outcome.REFUSED, json.dumps([violation.field, violation.description]))
    except Exception as failure:  # noqa: BLE001 - the other side raises it again
        return _leave_text(memory, Outcome.FAILED, repr(failure))
    size_bytes = image.pixels.nbytes
    np.frombuffer(memory, np.uint8, size_bytes)[:] = image.pixels.reshape(-1)
    return ANSWER.pack(Outcome.DONE, size_bytes, *image.image_size, *image.input_size, image.orientation)


def read_image(memory: mmap.mmap, size_bytes: int, numbers: tuple[int, ...]) -> PreparedImage:
    """What a DONE answer's bytes and numbers say; its pixels are a copy."""
    image_size, input_size, orientation = (numbers[0], numbers[1]), (numbers[2], numbers[3]), numbers[4]
    pixels = np.frombuffer(memory, np.uint8, size_bytes).reshape(input_size[1], input_size[0], 3).copy()
    return PreparedImage(pixels, image_size, input_size, orientation)


def _leave_text(memory: mmap.mmap, outcome: Outcome, text: str) -> bytes:
    data = text.encode()[: len(memory)]
    memory[: len(data)] = data
    return ANSWER.pack(outcome, len(data), 0, 0, 0, 0, 0)


def main() -> None:
    descriptor, memory_bytes, max_bytes, max_pixels = map(int, sys.argv[1:])
    limits = ImageLimits(max_bytes=max_bytes, max_pixels=max_pixels)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    with mmap.mmap(descriptor, memory_bytes) as memory:
        while len(request := requests.read(REQUEST.size)) == REQUEST.size:
            answers.write(answer(memory, request, limits))
            answers.flush()


if __name__ == "__main__":
    main()
