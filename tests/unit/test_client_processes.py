"""Child processes stop when asked, when they will not, and when their parent is killed."""

import os
import select
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from splitsam.client.processes import Child, StackError, check_port_free, free_ports, stop_all

DEADLINE_S = 20.0


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.fixture
def start(tmp_path):
    started = []

    def run(code, **options):
        child = Child("child", python(code), tmp_path / f"{len(started)}.log", **options)
        started.append(child)
        return child

    yield run
    stop_all(started, timeout_s=0.0)


@pytest.fixture
def bell(tmp_path):
    """A pipe with a name: what a child writes there, `wait` sees."""
    path = tmp_path / "bell"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)
    yield Bell(path, descriptor)
    os.close(descriptor)


class Bell:
    def __init__(self, path, descriptor):
        self.ring = f"open('{path}', 'w').write('up')"
        self._descriptor = descriptor

    def wait(self):
        assert select.select([self._descriptor], [], [], DEADLINE_S)[0], "the child never came up"


def wait_until_gone(pid):
    descriptor = os.pidfd_open(pid)
    try:
        assert select.select([descriptor], [], [], DEADLINE_S)[0], f"process {pid} still runs"
    finally:
        os.close(descriptor)


def test_child_runs_the_command_with_environment_and_stdin(start):
    child = start("import os, sys; print(os.environ['X'], sys.stdin.read())", environment={"X": "1"}, stdin="in")
    assert child.wait(DEADLINE_S)
    assert child.exit_status() == 0
    assert child.log_tail() == ["1 in"]


def test_child_leads_its_own_session(start):
    child = start("import os; print(os.getsid(0) == os.getpid())")
    assert child.wait(DEADLINE_S)
    assert child.log_tail() == ["True"]


def test_dead_child_is_reported_with_its_status_and_last_lines(start):
    child = start("import sys; print('one'); sys.exit('error: no weights')")
    assert child.wait(DEADLINE_S)
    with pytest.raises(StackError, match="exited with status 1 while starting") as caught:
        child.check_alive("starting")
    assert caught.value.log_tail[-1] == "error: no weights"
    assert caught.value.__notes__[0].endswith("error: no weights")


def test_child_ended_by_a_signal_is_reported_by_its_name(start):
    child = start("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert child.wait(DEADLINE_S)
    with pytest.raises(StackError, match="ended by SIGSEGV"):
        child.check_alive("running")


def test_stop_all_lets_a_child_finish(start, bell):
    child = start(
        f"""
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        {bell.ring}
        signal.sigwait([signal.SIGTERM])
        print('drained')
        """
    )
    bell.wait()
    stop_all([child], DEADLINE_S)
    assert child.log_tail() == ["drained"]


def test_stop_all_kills_what_does_not_stop(start, bell):
    child = start(
        f"""
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        {bell.ring}
        signal.pause()
        """
    )
    bell.wait()
    stop_all([child], timeout_s=0.05)
    assert child.exit_status() == -signal.SIGKILL


def test_what_a_child_started_goes_with_it(start):
    child = start(
        """
        import subprocess, sys, os
        worker = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])
        print(worker.pid, flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    assert child.wait(DEADLINE_S)
    worker = int(child.log_tail()[0])
    descriptor = os.pidfd_open(worker)
    assert child.exit_status() == -signal.SIGKILL
    assert select.select([descriptor], [], [], DEADLINE_S)[0]
    os.close(descriptor)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_child_dies_with_a_parent_that_is_killed(tmp_path, bell):
    code = f"""
        from pathlib import Path
        from splitsam.client.processes import Child
        program = "import signal; {bell.ring}; signal.pause()"
        child = Child("child", ["{sys.executable}", "-c", program], Path("{tmp_path}/log"))
        print(child.pid, flush=True)
        input()
        """
    with subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        bell.wait()
        parent.kill()
        wait_until_gone(pid)


def test_free_ports_are_different_and_free():
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        check_port_free(port, "never said")


def test_port_in_use_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=rf"port {port} cannot be used .*in use.*; choose another"):
            check_port_free(port, "choose another")
