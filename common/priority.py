"""Which threads go first where there are fewer cores than work."""

import os
import sys
import threading

# Of the threads that compute on a CPU; those that answer callers have 0. Clicks are waited for, encodes less so.
CLICK_NICENESS, ENCODE_NICENESS = 5, 10


def lower_priority(niceness: int) -> None:
    """Let other threads go before the calling one, and before those that it starts; does nothing but on Linux.

    Args:
        niceness: as of nice(1), 0 to 19.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    if niceness > os.getpriority(os.PRIO_PROCESS, thread):  # less than a thread has takes privileges
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
