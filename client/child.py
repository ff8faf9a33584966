"""Becomes the command it is given, after asking Linux to kill it when its parent dies; run as a script.

A child that asks for itself needs no code between fork and exec in the parent, which is unsafe beside threads.
It imports only what is quick: this runs before every service starts.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent_pid:
        sys.exit("the parent process is gone")
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
