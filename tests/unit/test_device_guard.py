"""Memory that runs out and devices that are lost, with torch's own exceptions."""

import asyncio
import gc
import weakref

import pytest
import torch

from splitsam.common.batcher import Batcher
from splitsam.common.device_guard import OUT_OF_MEMORY_LIMIT, DeviceGuard
from splitsam.common.errors import DeviceOutOfMemory, InvalidArgument, NotReady

CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 25.00 MiB.")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")


def errors_of(metrics, kind):
    return metrics.registry.get_sample_value("splitsam_device_errors_total", {"kind": kind}) or 0


def raising(error):
    def run(items):
        raise error

    return run


def raise_lost():
    raise LOST


@pytest.fixture
def guard(metrics):
    return DeviceGuard(CPU, metrics)


async def serve(guard, metrics, model, items):
    """What becomes of items that are in one batch."""
    batcher = Batcher(
        guard.guarded(model), name="test", max_weight=len(items), max_wait_ms=10_000, max_queue=99, metrics=metrics
    )
    batcher.start()
    deadline_s = asyncio.get_running_loop().time() + 60
    waits = [batcher.submit(item, deadline_s=deadline_s) for item in items]
    answers = await asyncio.gather(*waits, return_exceptions=True)
    await batcher.close()
    return [answer if isinstance(answer, Exception) else answer.value for answer in answers]


async def test_batch_that_does_not_fit_is_served_in_parts(guard, metrics):
    sizes = []

    def at_most_two(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise FULL
        return items

    assert await serve(guard, metrics, at_most_two, list(range(8))) == list(range(8))
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert not guard.is_lost


async def test_item_that_does_not_fit_is_told_to_come_again_and_the_others_are_served(guard, metrics):
    def refuse_seven(items):
        if 7 in items:
            raise FULL
        return items

    *served, refused = await serve(guard, metrics, refuse_seven, list(range(8)))
    assert served == list(range(7))
    assert isinstance(refused, DeviceOutOfMemory)
    assert (refused.code.name, refused.retry_delay_s) == ("RESOURCE_EXHAUSTED", 1.0)


def test_memory_that_runs_out_again_and_again_is_a_lost_device(guard, metrics):
    run = guard.guarded(raising(FULL))
    for _ in range(OUT_OF_MEMORY_LIMIT):
        assert not guard.is_lost
        with pytest.raises(DeviceOutOfMemory):
            run([1])
    assert guard.is_lost
    assert errors_of(metrics, "lost") == 1


def test_a_success_in_between_starts_the_count_again(guard):
    for _ in range(OUT_OF_MEMORY_LIMIT):
        with pytest.raises(DeviceOutOfMemory):
            guard.guarded(raising(FULL))([1])
        guard.guarded(list)([1])
    assert not guard.is_lost


async def test_sticky_error_loses_the_device_and_everybody_is_sent_away(metrics):
    guard = DeviceGuard(CPU, metrics, raise_lost)
    answers = await serve(guard, metrics, raising(LOST), list(range(4)))
    assert [type(answer) for answer in answers] == [NotReady] * 4
    assert await guard.lost() == "CUDA error: an illegal memory access was encountered"
    with pytest.raises(NotReady):
        guard.guarded(list)([1])
    assert errors_of(metrics, "lost") == 1


async def test_any_error_that_leaves_the_device_silent_is_sticky(metrics):
    """Triton and cuBLAS raise RuntimeErrors of their own."""
    guard = DeviceGuard(CPU, metrics, raise_lost)
    with pytest.raises(NotReady):
        guard.guarded(raising(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")))([1])
    assert guard.is_lost


async def test_a_model_on_the_event_loop_is_judged_as_well(metrics):
    guard = DeviceGuard(CPU, metrics, raise_lost)

    async def run(items):
        await asyncio.sleep(0)
        if not all(items):
            raise FULL if items[1:] else LOST
        return items

    call = guard.guarded_on_loop(run)
    assert await call([1, 2]) == [1, 2]
    with pytest.raises(DeviceOutOfMemory):
        await call([1, 0])
    with pytest.raises(NotReady):
        await call([0])
    assert guard.is_lost


async def test_a_success_on_the_event_loop_starts_the_count_again(guard):
    async def run(items):
        if not all(items):
            raise FULL
        return items

    call = guard.guarded_on_loop(run)
    for _ in range(OUT_OF_MEMORY_LIMIT):
        with pytest.raises(DeviceOutOfMemory):
            await call([0])
        await call([1])
    assert not guard.is_lost


def test_what_was_in_work_on_a_lost_device_is_never_freed(metrics):
    def probe():
        raise RuntimeError("CUDA error")

    guard = DeviceGuard(CPU, metrics, probe)
    buffers = []

    def run(items):
        buffer = torch.zeros(4)
        buffers.append(weakref.ref(buffer))
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(NotReady):
        guard.guarded(run)([1])
    gc.collect()
    assert buffers[0]() is not None


@pytest.mark.parametrize("error", [LOST, ValueError("a shape")])
def test_error_of_one_call_is_no_lost_device(guard, error):
    with pytest.raises(type(error)):
        guard.guarded(raising(error))([1])
    assert not guard.is_lost


def test_an_answer_that_is_an_error_does_not_make_the_device_wait(metrics):
    guard = DeviceGuard(CPU, metrics, raise_lost)
    with pytest.raises(InvalidArgument):
        guard.guarded(raising(InvalidArgument("points", "lies outside")))([1])
    assert not guard.is_lost


async def test_whoever_waits_for_the_loss_may_leave(guard):
    waiting = asyncio.ensure_future(guard.lost())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not guard.is_lost
    with pytest.raises(DeviceOutOfMemory):
        guard.guarded(raising(FULL))([1])
