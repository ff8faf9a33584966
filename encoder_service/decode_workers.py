"""Image files decoded by processes, for a GPU that wants more of them than one interpreter hands over.

A thread that decodes an image gives the interpreter up and takes it back some sixty times. With as many threads as a
GPU's images want, all of them, and the event loop, spend their time on waiting for it. A process costs the thread that
waits for it one message there and one back; file and pixels lie in memory that both see. What a damaged file does to
the decoder is that process's end, not the service's.
"""

import json
import mmap
import os
import queue
import select
import subprocess
import sys
import tempfile
from typing import IO, cast

from splitsam.common.errors import InvalidArgument
from splitsam.common.keys import Crop
from splitsam.encoder_service.decode_process import ANSWER, PIXEL_BYTES, REQUEST, Outcome, read_image
from splitsam.encoder_service.preprocess import ImageLimits, PreparedImage

# The largest image that a service accepts by default takes two seconds.
_LONGEST_S = 60.0
_STOP_S = 5.0
# glibc gives freed memory back at once, and getting it again is 4,000 page faults for an image of 1920 x 1080: a third
# of the time that it takes. With this a process keeps up to 64 MiB.
_MALLOC = {"MALLOC_TRIM_THRESHOLD_": str(2**26), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


class DecodeWorkers:
    """Processes that stay; one that has ended is replaced when its turn comes.

    Args:
        count: of processes, for as many threads.
        longest_s: that one image may take.
    """

    def __init__(self, count: int, limits: ImageLimits, longest_s: float = _LONGEST_S):
        self._limits = limits
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(limits, longest_s) for _ in range(count)]
        for worker in self._workers:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes; no image may be in work."""
        for worker in self._workers:
            worker.stop()

    def prepare(self, data: bytes, crop: Crop | None = None) -> PreparedImage:
        """As `prepare_image`; blocking, while another process is not idle.

        Raises:
            InvalidArgument: as `prepare_image` does.
            RuntimeError: the process failed, ended, or took too long.
        """
        if len(data) > self._limits.max_bytes:
            raise InvalidArgument("image", f"has {len(data)} bytes, at most {self._limits.max_bytes} are accepted")
        worker = self._idle.get()
        try:
            return worker.prepare(data, crop)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process and the memory that it shares with this one."""

    def __init__(self, limits: ImageLimits, longest_s: float):
        self._limits = limits
        self._longest_s = longest_s
        self._memory_bytes = max(limits.max_bytes, PIXEL_BYTES)
        self._descriptor = _open_memory(self._memory_bytes)
        self._memory = mmap.mmap(self._descriptor, self._memory_bytes)
        self._process = self._start()

    def stop(self) -> None:
        self._end(_STOP_S)
        self._memory.close()
        os.close(self._descriptor)

    def prepare(self, data: bytes, crop: Crop | None) -> PreparedImage:
        if self._process.poll() is not None:
            self._end(0.0)
            self._process = self._start()
        self._memory[: len(data)] = data
        request = REQUEST.pack(len(data), crop is not None, *(crop or (0, 0, 0, 0)))
        outcome, size_bytes, *about = ANSWER.unpack(self._ask(request))
        if len(data) > PIXEL_BYTES and sys.platform == "linux":
            self._memory.madvise(mmap.MADV_REMOVE, PIXEL_BYTES)  # few files are as large: their room is given back
        if outcome == Outcome.DONE:
            return read_image(self._memory, size_bytes, tuple(about))
        text = self._memory[:size_bytes].decode()
        if outcome == Outcome.REFUSED:
            field, description = json.loads(text)
            raise InvalidArgument(field, description)
        raise RuntimeError(f"decoding an image failed: {text}")

    def _ask(self, request: bytes) -> bytes:
        requests, answers = (cast("IO[bytes]", pipe) for pipe in (self._process.stdin, self._process.stdout))
        try:
            requests.write(request)
        except BrokenPipeError:
            raise self._failed() from None
        waiting = select.poll()
        waiting.register(answers, select.POLLIN)
        if not waiting.poll(1000 * self._longest_s):
            self._process.kill()
            self._process.wait(_STOP_S)
            raise RuntimeError(f"decoding an image took longer than {self._longest_s:g} s")
        answer: bytes = answers.read(ANSWER.size)
        if len(answer) < ANSWER.size:
            raise self._failed()
        return answer

    def _failed(self) -> RuntimeError:
        status = self._process.wait(_STOP_S)
        return RuntimeError(f"the process that decoded an image has ended with status {status}")

    def _start(self) -> "subprocess.Popen[bytes]":
        module = "splitsam.encoder_service.decode_process"
        numbers = (self._descriptor, self._memory_bytes, self._limits.max_bytes, self._limits.max_pixels)
        # In a session of its own: what ends this process from a terminal leaves images in work their time.
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, numbers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(self._descriptor,),
            env=_MALLOC | os.environ,
            start_new_session=True,
        )

    def _end(self, longest_s: float) -> None:
        """It ends by itself when its input does."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(longest_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)


def _open_memory(size_bytes: int) -> int:
    """The descriptor of a file without a name, in memory where that can be had; what nobody wrote takes no room."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("splitsam-image")  # /dev/shm would be 64 MiB in a container
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.truncate(descriptor, size_bytes)
    return descriptor
