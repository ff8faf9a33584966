"""Child processes that never outlive their parent, each with a log file; and free ports."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

LOOPBACK = "127.0.0.1"
_KILL_S = 5.0
_LINE_CHARACTERS = 300
_LAUNCHER = str(Path(__file__).with_name("child.py"))


class StackError(Exception):
    """Something could not be started or has died; the message says what to do.

    Args:
        message: one line.
        log_tail: the last lines of the log that tells more; tracebacks show them, too.
    """

    def __init__(self, message: str, log_tail: Sequence[str] = ()):
        super().__init__(message)
        self.log_tail = tuple(log_tail)
        if self.log_tail:
            self.add_note("\n".join(self.log_tail))


class Child:
    """A process in a session of its own, killed by the kernel when its parent dies (on Linux).

    Linux ties that to the thread that starts the child: start children from a thread that stays.

    Args:
        name: for messages.
        command: program by its full path, and arguments.
        log_path: where its output is appended.
        environment: variables on top of this process's own.
        stdin: fed to the process, then closed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log_path: Path,
        environment: Mapping[str, str] | None = None,
        stdin: str = "",
    ):
        self.name = name
        self.log_path = log_path
        self._is_swept = False
        launcher = [sys.executable, "-I", "-S", _LAUNCHER, str(os.getpid()), *command]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                launcher,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        stream = self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                with stream:
                    stream.write(stdin.encode())

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs; negative for the signal that ended it. What it left behind is ended once it is seen."""
        status = self._process.poll()
        if status is not None and not self._is_swept:
            self._is_swept = True
            self.signal(signal.SIGKILL)
        return status

    def check_alive(self, doing: str) -> None:
        """Do nothing while it runs.

        Raises:
            StackError: it has exited; says how and shows the end of its log.
        """
        status = self.exit_status()
        if status is not None:
            how = f"exited with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
            raise StackError(f"the {self.name} {how} while {doing}; log: {self.log_path}", self.log_tail())

    def log_tail(self, lines: int = 12) -> list[str]:
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return [line[:_LINE_CHARACTERS] for line in text.splitlines() if line.strip()][-lines:]

    def signal(self, number: int) -> None:
        """Send a signal to the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False when it still runs."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def stop_all(children: Sequence[Child], timeout_s: float) -> None:
    """Ask all children to stop, wait for them together, and kill what is left of each."""
    running = [child for child in children if child.exit_status() is None]
    for child in running:
        child.signal(signal.SIGTERM)
    deadline_s = time.monotonic() + timeout_s
    for child in running:
        child.wait(max(deadline_s - time.monotonic(), 0.0))
    for child in running:
        if child.exit_status() is None:
            child.signal(signal.SIGKILL)
            child.wait(_KILL_S)


def free_ports(count: int) -> list[int]:
    """Ports on the loopback interface that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


def check_port_free(port: int, remedy: str) -> None:
    """Do nothing if a server could listen on the port.

    Raises:
        StackError: it is in use, or not allowed.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
            probe.listen(1)
        except OSError as error:
            raise StackError(f"port {port} cannot be used ({error.strerror}); {remedy}") from error
