"""Images decoded by processes: as on a thread, whatever the image, and a process that is lost costs one image."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from splitsam.common.errors import InvalidArgument
from splitsam.encoder_service.decode_process import PIXEL_BYTES
from splitsam.encoder_service.decode_workers import DecodeWorkers
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage, prepare_image

LIMITS = ImageLimits(max_bytes=4 * PIXEL_BYTES, max_pixels=4_000_000)


def encoded(width: int, height: int, image_format: str, seed: int = 0, **options: object) -> bytes:
    rng = np.random.default_rng(seed)
    file = BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(file, image_format, **options)
    return file.getvalue()


def assert_same(one: PreparedImage, other: PreparedImage) -> None:
    assert (one.image_size, one.input_size, one.orientation) == (other.image_size, other.input_size, other.orientation)
    assert one.pixels.dtype == other.pixels.dtype
    assert np.array_equal(one.pixels, other.pixels)


@pytest.fixture
def workers() -> Iterator[DecodeWorkers]:
    with contextlib.closing(DecodeWorkers(2, LIMITS)) as made:
        yield made


def pids(workers: DecodeWorkers) -> list[int]:
    return [worker._process.pid for worker in workers._workers]


def test_images_are_those_of_a_thread(workers):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        encoded(640, 480, "JPEG", exif=exif),
        encoded(1, 1, "PNG"),
        encoded(1500, 1400, "PNG"),  # 6 MB, more than its pixels will take
        encoded(700, 1100, "WEBP"),
        encoded(64, 64, "JPEG"),  # after all of them, a smaller one in the same memory
    ]
    assert len(files[2]) > PIXEL_BYTES
    for data in files:
        assert_same(workers.prepare(data), prepare_image(data, LIMITS))
    crop = (10, 20, 200, 300)
    assert_same(workers.prepare(files[0], crop), prepare_image(files[0], LIMITS, crop))


def test_many_threads_get_each_their_own(workers):
    files = [encoded(50 + seed, 40, "PNG", seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as threads:
        for found, data in zip(threads.map(workers.prepare, files), files, strict=True):
            assert_same(found, prepare_image(data, LIMITS))


REFUSED = {
    "empty": (b"", None),
    "no image": (b"no image", None),
    "too many pixels": (encoded(2100, 2000, "JPEG"), None),
    "cut short": (encoded(64, 64, "PNG")[:-40], None),
    "crop outside": (encoded(64, 64, "PNG"), (0, 0, 65, 64)),
    "too many bytes": (bytes(LIMITS.max_bytes + 1), None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_those_of_a_thread(workers, name):
    data, crop = REFUSED[name]
    with pytest.raises(InvalidArgument) as wanted:
        prepare_image(data, LIMITS, crop)
    with pytest.raises(InvalidArgument) as found:
        workers.prepare(data, crop)
    assert found.value.violations == wanted.value.violations
    assert_same(workers.prepare(encoded(9, 9, "PNG")), prepare_image(encoded(9, 9, "PNG"), LIMITS))


def test_damaged_files_end_no_process(workers):
    before, chance, data = pids(workers), random.Random(0), encoded(100, 80, "JPEG")
    for _ in range(200):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(InvalidArgument):
            workers.prepare(bytes(damaged[: chance.randrange(len(data) + 1)]))
    assert pids(workers) == before


def test_a_process_that_is_killed_is_replaced():
    data = encoded(30, 20, "PNG")
    with contextlib.closing(DecodeWorkers(1, LIMITS)) as workers:
        workers.prepare(data)
        [before] = pids(workers)
        os.kill(before, signal.SIGKILL)
        end_s = time.monotonic() + 30
        while time.monotonic() < end_s:
            with contextlib.suppress(RuntimeError):  # the image on its way when it was killed, if one was
                assert_same(workers.prepare(data), prepare_image(data, LIMITS))
                break
        assert pids(workers) != [before]
        assert_same(workers.prepare(data), prepare_image(data, LIMITS))


def test_one_that_takes_too_long_is_replaced_and_its_image_fails():
    data = encoded(30, 20, "PNG")
    with contextlib.closing(DecodeWorkers(1, LIMITS, longest_s=1.0)) as workers:
        end_s = time.monotonic() + 60
        while time.monotonic() < end_s:  # starting counts as well
            with contextlib.suppress(RuntimeError):
                workers.prepare(data)
                break
        [before] = pids(workers)
        os.kill(before, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match="longer than 1 s"):
            workers.prepare(data)
        workers._workers[0]._longest_s = 60.0
        assert_same(workers.prepare(data), prepare_image(data, LIMITS))
        assert pids(workers) != [before]


def test_closing_ends_the_processes():
    workers = DecodeWorkers(2, LIMITS)
    processes = [worker._process for worker in workers._workers]
    workers.close()
    assert [process.returncode for process in processes] == [0, 0]


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_process_has_little_in_memory():
    with contextlib.closing(DecodeWorkers(1, LIMITS)) as workers:
        workers.prepare(encoded(30, 20, "PNG"))
        maps = Path(f"/proc/{pids(workers)[0]}/maps").read_text()
    assert "libtorch" not in maps
