"""Memory, open files and threads of an encoder while image after image comes that it has never seen.

    pytest tests/e2e/test_encode_memory.py --memory-encodes 100000 --device cuda --precision bf16

is the same at its full length; it prints what it saw.
"""

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean

import pytest
from e2e_support import Caller, Service, draw, image_file, metric, png_of_size, refusal, running_service, wait_until
from google.rpc import code_pb2
from grpc import StatusCode
from PIL import Image
from redis_process import RedisProcess

from bench.calls import make_different
from bench.load.watch import resident_mib
from splitsam.v1 import encoder_pb2 as pb

MIB = 2**20
PARTS = 20
MAX_IMAGE_BYTES = 4 * MIB
DECODED_MIB = 3  # an image as the model takes it
SPARE = 8
STREAM_S = 3600.0
# On a busy machine an encode may take longer than these by default, and one that is not stored fails the test.
PATIENCE = ("--stream-window", "2", "--encode-timeout-ms", "240000", "--redis-timeout-ms", "20000")


@dataclass(frozen=True)
class Kind:
    """An image file, of which each is sent with other bytes behind its end.

    Args:
        size: (width, height) pixels of the upright image; None: it is refused.
        limit: words of its refusal.
    """

    file: bytes
    size: tuple[int, int] | None = None
    limit: str = ""


def turned(size: tuple[int, int]) -> bytes:
    """A JPEG that a camera held upright has left on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return image_file(draw(901, size), "JPEG", exif=exif)


def half(image_format: str) -> bytes:
    whole = image_file(draw(902, (1024, 683)), image_format)
    return whole[: len(whole) // 2]


GOOD = (
    Kind(image_file(draw(903, (1920, 1080)), "JPEG", quality=90), (1920, 1080)),
    Kind(image_file(draw(904, (320, 320)), "JPEG"), (320, 320)),
    Kind(turned((1600, 1400)), (1400, 1600)),
    Kind(image_file(draw(905, (700, 800))), (700, 800)),
    Kind(image_file(draw(906, (1024, 1024)), "WEBP"), (1024, 1024)),
    Kind(image_file(draw(907, (500, 500)).convert("L")), (500, 500)),
)
BAD = (
    Kind(half("JPEG"), limit="JPEG: damaged or cut short"),
    Kind(half("PNG"), limit="PNG: the PNG is cut short"),
    Kind(half("WEBP"), limit="WEBP: damaged or cut short"),
    Kind(image_file(draw(908), "GIF"), limit="is not one of JPEG, PNG, WEBP"),
    Kind(b"<html>not found</html>", limit="is not one of JPEG, PNG, WEBP"),
    Kind(png_of_size(20_000, 20_000), limit="20000 x 20000 pixels, at most 64000000"),
    Kind(b"\xff\xd8\xff" + bytes(MAX_IMAGE_BYTES), limit=f"at most {MAX_IMAGE_BYTES} are accepted"),
)


Share = Sequence[tuple[int, Kind]]  # with the number of the image among all
Answer = tuple[Kind, pb.EncodeImageResponse]


@dataclass(frozen=True)
class Sample:
    """What a service holds while nobody asks it for anything."""

    resident_mib: float
    device_mib: float
    open_files: int
    threads: int


def look_at(service: Service) -> Sample:
    """Fails the test if something goes on as if it were not answered."""
    for name in ("splitsam_requests_in_progress", "splitsam_upload_bytes", "splitsam_queue_length"):
        wait_until(lambda name=name: metric(service.metrics_url, name) == 0, f"{name} is 0")
    process = Path(f"/proc/{service.child.pid}")
    return Sample(
        resident_mib=resident_mib(service.child.pid),
        device_mib=metric(service.metrics_url, "splitsam_device_memory_bytes") / MIB,
        open_files=len(os.listdir(process / "fd")),
        threads=len(os.listdir(process / "task")),
    )


def send_share(caller: Caller, share: Share, on_stream: bool) -> list[str]:
    """The keys of the good images. Fails the test if one is answered otherwise than it should be."""
    return [check(kind, answer) for kind, answer in (stream if on_stream else call)(caller, share)]


def call(caller: Caller, share: Share) -> Iterator[Answer]:
    """Have each image encoded by a call of its own."""
    for number, kind in share:
        image = make_different(kind.file, 0, number)
        if kind.size is not None:
            yield kind, caller.encode(image)
        else:
            refused = refusal(lambda image=image: caller.encode(image))
            assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
            assert kind.limit in refused.fields["image"]


def stream(caller: Caller, share: Share) -> Iterator[Answer]:
    """Have them encoded on one stream."""
    kinds = dict(share)
    requests = (pb.EncodeImagesRequest(request_id=n, image=make_different(kind.file, 0, n)) for n, kind in share)
    for answer in caller.encoder.EncodeImages(requests, **caller.options(STREAM_S)):
        kind = kinds.pop(answer.request_id)
        if kind.size is not None:
            assert not answer.HasField("error"), answer.error
            yield kind, answer.result
        else:
            assert (answer.error.code, answer.error.reason) == (code_pb2.INVALID_ARGUMENT, "INVALID_ARGUMENT")
            [violation] = answer.error.field_violations
            assert kind.limit in violation.description
    assert not kinds


def check(kind: Kind, answer: pb.EncodeImageResponse) -> str:
    """Its key."""
    assert answer.stored
    assert not answer.cache_hit
    size = answer.embedding.image_size
    assert (size.width, size.height) == kind.size
    return answer.embedding.embedding_key


def send_all(callers: list[Caller], images: int, bad_images: int) -> Iterator[list[str]]:
    """Send them a twentieth at a time, on calls and on streams by turns; yields the keys of each."""
    chance = random.Random(7)
    numbers = itertools.count()
    with ThreadPoolExecutor(len(callers)) as clients:
        for part in range(PARTS):
            share = [GOOD[n % len(GOOD)] for n in range(images * part // PARTS, images * (part + 1) // PARTS)]
            share += [BAD[n % len(BAD)] for n in range(bad_images // PARTS)]
            chance.shuffle(share)
            numbered = list(zip(numbers, share, strict=False))
            shares = [numbered[first :: len(callers)] for first in range(len(callers))]
            answered = clients.map(send_share, callers, shares, itertools.repeat(part % 2 == 1))
            yield list(itertools.chain.from_iterable(answered))


@pytest.fixture
def images(request) -> int:
    return request.config.getoption("--memory-encodes")


@pytest.fixture
def redis_that_evicts(start_redis, images) -> RedisProcess:
    """It has room for half the images, or 256 of them."""
    options = "--maxmemory", f"{min(max(images, 16), 512)}mb", "--maxmemory-policy", "allkeys-lfu"
    return start_redis(*options)


@pytest.mark.usefixtures("large_blocks_given_back")
@pytest.mark.timeout(6 * 3600)  # each call has its own deadline
def test_memory_stays_flat_over_many_images(stack, alpha, encoder_args, on_gpu, redis_that_evicts, images, capsys):
    bad_images = PARTS * max(2 * len(BAD), images // 200)
    own = ("--redis-url", redis_that_evicts.url, "--max-image-bytes", str(MAX_IMAGE_BYTES), *PATIENCE)
    own += ("--decode-threads", str(max(2, len(os.sched_getaffinity(0)) // 2)))  # so that a GPU need not wait
    clients, slack_mib = (48, 128) if on_gpu else (4, 40)
    samples, keys = [], set()
    with running_service(stack, "encoder", *encoder_args, *own) as service:
        callers = [Caller(service.address, stack.decoder, alpha.token) for _ in range(clients)]
        for answered in send_all(callers, images, bad_images):
            keys |= set(answered)
            samples.append(look_at(service))
        for caller in callers:
            caller.close()
    with redis_that_evicts.client() as connection:
        kept, evicted = connection.dbsize(), connection.info("stats")["evicted_keys"]
    seen = {field.name: [getattr(sample, field.name) for sample in samples] for field in fields(Sample)}
    with capsys.disabled():
        print(f"\n{images} images and {bad_images} bad ones, {evicted} evictions; after each twentieth")
        for name, values in seen.items():
            print(f"  {name}: {' '.join(f'{value:.0f}' for value in values)}")
    assert "rpc failed" not in service.child.log_path.read_text()
    assert len(keys) == images
    assert kept + evicted >= images
    assert evicted > images // 4
    growth = {name: mean(values[16:]) - mean(values[4:8]) for name, values in seen.items()}
    # Beside what varies from run to run, a decoded image for every thousand.
    allowed_mib = slack_mib + DECODED_MIB * images / 1000
    assert growth["resident_mib"] <= allowed_mib
    assert growth["device_mib"] <= allowed_mib
    # Connections to Redis and threads are opened as they are needed at one time, up to a few.
    assert growth["open_files"] <= SPARE
    assert growth["threads"] <= SPARE
