"""Threads that compute let those that answer callers go first."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from splitsam.common.priority import lower_priority


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_a_thread_and_those_it_starts_give_way_and_others_do_not():
    before = niceness()

    def start_another() -> tuple[int, int]:
        with ThreadPoolExecutor(1) as further:
            return niceness(), further.submit(niceness).result()

    wanted = min(19, before + 7)
    with ThreadPoolExecutor(1, initializer=lower_priority, initargs=(wanted,)) as threads:
        assert threads.submit(start_another).result() == (wanted, wanted)
    assert niceness() == before


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_a_thread_that_gives_way_already_stays_as_it_is():
    def lower_twice() -> int:
        lower_priority(8)
        lower_priority(3)
        return niceness()

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lower_twice).result() == max(8, niceness())
