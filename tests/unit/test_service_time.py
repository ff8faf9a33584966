"""The estimate of a batch's time: what was measured, smoothed, and nothing assumed beyond it."""

import random

import pytest

from splitsam.common.service_time import ServiceTime


def learned(*batches: tuple[int, float]) -> ServiceTime:
    times = ServiceTime()
    for weight, seconds in batches:
        times.observe(weight, seconds)
    return times


def test_nothing_measured_takes_no_time():
    assert ServiceTime().estimate(7) == 0


def test_the_first_batch_is_the_estimate_of_every_weight():
    times = learned((4, 0.25))
    assert times.estimate(4) == times.estimate(1) == times.estimate(64) == 0.25


def test_a_base_and_a_part_per_unit_are_told_apart():
    chance = random.Random(3)
    weights = [chance.randint(1, 16) for _ in range(100)]
    times = learned(*((weight, 0.01 + 0.02 * weight) for weight in weights))
    assert times.estimate(1) == pytest.approx(0.03)
    assert times.estimate(40) == pytest.approx(0.81)


def test_light_batches_that_were_slow_by_chance_make_no_estimate_negative():
    chance = random.Random(4)
    batches = [(chance.randint(1, 9), chance.random()) for _ in range(200)]
    for end in range(1, len(batches)):
        times = learned(*batches[:end])
        estimates = [times.estimate(weight) for weight in range(1, 20)]
        assert estimates[0] >= 0
        assert estimates == sorted(estimates)


def test_a_machine_that_becomes_slower_is_noticed_and_one_outlier_is_smoothed():
    steady = [(1, 0.1)] * 50
    assert learned(*steady, (1, 1.1)).estimate(1) == pytest.approx(0.2)
    assert learned(*steady, *[(1, 0.5)] * 30).estimate(1) == pytest.approx(0.5, rel=0.05)
