"""Memory of a decoder while people click through more images than it has room for.

    pytest tests/e2e/test_click_memory.py --memory-clicks 100000 --memory-images 5000

is the same at its full length; it prints what it saw.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from e2e_support import Caller, metric, point, prompt, redis_of, running_service, write_embedding

from bench.load.watch import resident_mib
from splitsam.common.records import EMBEDDING, SHAPES

PREPARED_BYTES = 4 * 4096 * 640  # what the decoder keeps of an embedding in fp32
MIB = 2**20
ANNOTATORS = 4
# What batches take and the allocator does not give back varies so much; all images have ten times the budget.
SLACK_MIB = 256


@pytest.fixture
def numbers(request) -> tuple[int, int, int]:
    """Clicks, images, and how many of those the decoder has room for."""
    clicks, images = (request.config.getoption(f"--memory-{name}") for name in ("clicks", "images"))
    return clicks, images, images // 10


class OpenImages:
    """The images that people work on, twice as many as the decoder has room for; others come, and the first leave.

    Only these lie in Redis, which would need 2.5 MiB for each of all.
    """

    def __init__(self, stack, model_id: str, images: int, room: int):
        self._stack, self._model_id = stack, model_id
        self._images, self._open = images, 2 * room
        self._keys: dict[int, str] = {}
        seeds = (torch.Generator().manual_seed(seed) for seed in range(4))
        self._values = [torch.randn(SHAPES[EMBEDDING], generator=seed) for seed in seeds]

    def keys_at(self, progress: float) -> list[str]:
        """Those open when this share of all clicks is done."""
        first = round(progress * (self._images - self._open))
        with redis_of(self._stack) as connection:
            for number in [number for number in self._keys if number < first]:
                for name in connection.scan_iter(f"splitsam:embedding:*:{self._keys.pop(number)}"):
                    connection.delete(name)
        for number in range(first, first + self._open):
            if number not in self._keys:
                self._keys[number] = write_embedding(
                    self._stack, "alpha", self._model_id, f"memory {number}", values=self._values[number % 4]
                )
        return list(self._keys.values())


def click_through(caller: Caller, images: OpenImages, clicks: int) -> Iterator[None]:
    """Click here and there, a few people at a time; yields twenty times on the way."""
    chance = random.Random(7)
    with ThreadPoolExecutor(ANNOTATORS) as annotators:
        for part in range(20):
            keys = images.keys_at(part / 19)
            asked = [
                (chance.choice(keys), prompt(point(*(chance.random() * 240 for _ in "xy"))))
                for _ in range(clicks // 20)
            ]
            for answer in annotators.map(lambda one: caller.click(*one), asked):
                assert answer[0].masks
            yield


@pytest.fixture
def redis_with_room(stack, numbers):
    """That of all tests, with memory for the images that are open at a time."""
    with redis_of(stack) as connection:
        before = connection.config_get("maxmemory")["maxmemory"]
        connection.config_set("maxmemory", max(int(before), 6 * MIB * numbers[2] + 2**29))
        yield
        connection.config_set("maxmemory", before)


@pytest.mark.usefixtures("redis_with_room")
@pytest.mark.timeout(6 * 3600)  # each click has its own deadline
def test_memory_stays_flat_over_many_clicks_on_many_images(stack, alpha, model_id, service_args, numbers, capsys):
    clicks, images, room = numbers
    arguments = (*service_args, "--memory-bytes", str(room * PREPARED_BYTES))
    with running_service(stack, "decoder", *arguments) as service:
        caller = Caller(stack.encoder, service.address, alpha.token)
        opened = OpenImages(stack, model_id, images, room)
        seen_mib = [resident_mib(service.child.pid) for _ in click_through(caller, opened, clicks)]
        evictions = metric(service.metrics_url, "splitsam_evictions_total", kind="embedding")
        hits = metric(
            service.metrics_url, "splitsam_cache_lookups_total", kind="embedding", tier="memory", result="hit"
        )
        held = metric(service.metrics_url, "splitsam_resident_bytes", kind="embedding")
        caller.close()
    with capsys.disabled():
        print(
            f"\n{clicks} clicks on {images} images with room for {room}: {hits:.0f} found in memory, {evictions:.0f} "
            f"evictions; MiB resident after each twentieth {' '.join(f'{mib:.0f}' for mib in seen_mib)}"
        )
    assert evictions >= images // 2
    assert hits > 0
    assert held == room * PREPARED_BYTES
    assert max(seen_mib) <= seen_mib[0] + room * PREPARED_BYTES / MIB + SLACK_MIB
    # Once it is full, later images take no more than the ones before.
    assert max(seen_mib[15:]) <= max(seen_mib[5:15]) + SLACK_MIB
