"""How much of the queue bound is given away, by how well the estimates have held."""

import math
import time

import pytest

from splitsam.common.admission import Admission
from splitsam.common.errors import QueueFull
from splitsam.common.fair_queue import FairQueue, Lane

BOUND_MS = 1000.0


@pytest.fixture
def queue() -> FairQueue[int]:
    return FairQueue()


@pytest.fixture
def admission(queue: FairQueue[int]) -> Admission[int]:
    """Batches of one that take 10 ms, the worker idle."""
    made = Admission(queue, max_weight=1, max_queue=1000, max_queue_ms={Lane.CLICK: BOUND_MS})
    for _ in range(5):
        made.begin_batch(1)
        made.end_batch(1, 0.01)
    return made


def admit_all(queue: FairQueue[int], admission: Admission[int], running_s: float = 0.0) -> int:
    """Fill the queue until it refuses, and say how many wait behind what is running."""
    while True:
        place = queue.make_place(0, Lane.CLICK, "", 1)
        refusal = admission.find_refusal(place, math.inf, 0, 0)
        if refusal is not None:
            assert isinstance(refusal, QueueFull)
            assert refusal.retry_delay_s == pytest.approx(running_s + len(queue) * 0.01, rel=0.1)
            return len(queue)
        queue.add(place)


def drain(queue: FairQueue[int]) -> None:
    while queue.first(Lane.CLICK):
        queue.take_first(Lane.CLICK)


def test_less_is_given_away_after_lateness_more_after_punctuality_and_an_empty_queue_begins_anew(queue, admission):
    first = admit_all(queue, admission)
    assert 0.6 * BOUND_MS <= first * 10 <= BOUND_MS
    for _ in range(3):
        assert isinstance(admission.find_lateness(Lane.CLICK, 0.0, math.inf), QueueFull)
    drain(queue)
    fewer = admit_all(queue, admission)
    assert fewer < 0.8 * first
    for _ in range(100):
        assert admission.find_lateness(Lane.CLICK, math.inf, math.inf) is None
    drain(queue)
    assert fewer < admit_all(queue, admission) < first
    drain(queue)
    admission.begin_batch(1)
    admission.end_batch(1, 0.01)
    assert admit_all(queue, admission) == first


def test_batches_begun_behind_others_are_waited_for_too(queue, admission):
    first = admit_all(queue, admission)
    drain(queue)
    for _ in range(20):
        admission.begin_batch(1)
    assert admit_all(queue, admission, running_s=0.2) == pytest.approx(first - 20, abs=3)
    drain(queue)
    for _ in range(19):
        admission.end_batch(1, 0.01)
    assert admit_all(queue, admission, running_s=0.2) < first - 10
    drain(queue)
    admission.end_batch(1, 0.01)
    assert admit_all(queue, admission) == first


def test_however_late_all_are_some_are_admitted(queue, admission):
    for _ in range(1000):
        admission.find_lateness(Lane.CLICK, 0.0, math.inf)
    assert admit_all(queue, admission) * 10 >= 0.25 * BOUND_MS


def test_a_lane_without_a_bound_refuses_no_wait(queue, admission):
    for _ in range(500):
        queue.add(queue.make_place(0, Lane.CLICK, "", 1))
    assert admission.find_refusal(queue.make_place(0, Lane.BULK, "", 1), math.inf, 0, 0) is None


def test_a_queue_in_front_of_several_workers_moves_as_much_faster(queue):
    admission = Admission(queue, max_weight=1, max_queue=1000, max_queue_ms={Lane.CLICK: BOUND_MS}, workers=4)
    for _ in range(5):
        admission.begin_batch(1)
        admission.end_batch(1, 0.04)
    for _ in range(3):
        admission.begin_batch(1)
    assert admission.find_refusal(queue.make_place(0, Lane.CLICK, "", 1), 0.0, 0, 0) is None, "one worker is free"
    admission.begin_batch(1)
    place = queue.make_place(0, Lane.CLICK, "", 1)
    late = admission.find_refusal(place, time.monotonic(), 0, 0)
    assert late.retry_delay_s == pytest.approx(4 * 0.01 + 0.04, abs=0.02)  # its own work is not shared among them
    admit_all(queue, admission, running_s=0.04)
    assert 0.6 * BOUND_MS <= len(queue) * 10 <= BOUND_MS


@pytest.mark.parametrize("seen", [(13,), (1, 13, 5)])
def test_an_entry_of_several_units_that_is_a_batch_alone_takes_as_many_times_as_long(queue, seen: tuple[int, ...]):
    admission = Admission(queue, max_weight=1, max_queue=1000, max_queue_ms={})
    for weight in seen * 5:
        admission.begin_batch(weight)
        admission.end_batch(weight, weight * 0.01)
    for weight in (13, 13, 4):
        queue.add(queue.make_place(0, Lane.CLICK, "", weight))
    assert admission.retry_s() == pytest.approx(0.3)
    admission.begin_batch(7)
    late = admission.find_refusal(queue.make_place(0, Lane.CLICK, "", 20), time.monotonic(), 0, 0)
    assert late.retry_delay_s == pytest.approx(0.07 + 0.3 + 0.2, abs=0.02)
