"""An address that hands its connections on to another, which may be changed, as a Service of Kubernetes does."""

import asyncio
import contextlib
import threading


class Relay:
    """As a context manager; on a thread of its own.

    Args:
        target: host:port that new connections go to; those that are open stay where they are.

    Attributes:
        sent_bytes: from callers to targets, of all connections.
    """

    def __init__(self, target: str):
        self.target = target
        self.sent_bytes = 0
        self._tasks = set()

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname()[:2])
        return self

    def __exit__(self, *_):
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _stop(self):
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        host, _, port = self.target.rpartition(":")
        with contextlib.suppress(OSError, asyncio.CancelledError):
            upstream, downstream = await asyncio.open_connection(host, int(port))
            there = asyncio.create_task(self._copy(reader, downstream, is_sent=True))
            back = asyncio.create_task(self._copy(upstream, writer, is_sent=False))
            try:
                await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
                downstream.close()
        writer.close()

    async def _copy(self, reader, writer, *, is_sent):
        while chunk := await reader.read(2**16):
            self.sent_bytes += len(chunk) if is_sent else 0
            writer.write(chunk)
            await writer.drain()
