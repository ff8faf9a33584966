"""Whatever is read, a right result or one of the project's own refusals comes of it: a few hundred inputs a target.

`make fuzz` runs a million through the same targets; `--hypothesis-profile=thorough` runs some thousands here.
"""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.fuzz.target import Target, judge
from bench.fuzz.targets import TARGETS

# Of the profile's number of examples, for what takes milliseconds.
SLOW = {"images": 2, "settings": 4}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_input_ends_in_a_result_or_a_refusal(target: Target):
    examples = 2 * settings().max_examples // SLOW.get(target.name, 1)

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.randoms(use_true_random=True), st.randoms(use_true_random=False)))
    def check(random: Random) -> None:
        judge(target, target.make(random))

    check()
