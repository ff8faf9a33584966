"""EncoderService without a model: does what a request says, inside the real server, for tests of what is around it."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitsam.common.calls import Call, current_call
from splitsam.common.metrics import Metrics
from splitsam.common.server import serve
from splitsam.encoder_service.settings import EncoderSettings
from splitsam.v1 import encoder_pb2 as pb
from splitsam.v1 import encoder_pb2_grpc

log = logging.getLogger("splitsam.probe")

SERVICE = "splitsam.v1.EncoderService"


class Probe(encoder_pb2_grpc.EncoderServiceServicer):
    """Fails as `failures` says for the request's text, space around it aside; `wait` waits to be let go; `flood` sends
    without end."""

    full_name = SERVICE
    large_requests = frozenset({"EncodeImage", "EncodeImages"})

    def __init__(self) -> None:
        self.failures: dict[str, Exception] = {}
        self.calls: list[Call] = []
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.finished = asyncio.Event()
        self.loaded = asyncio.Event()
        self.loaded.set()
        self.load_failure: Exception | None = None
        self.load_ended = False
        self.room_failure: Exception | None = None
        self.closed_after_calls: list[bool] = []
        self.loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def register(self, server: grpc.aio.Server) -> None:
        encoder_pb2_grpc.add_EncoderServiceServicer_to_server(self, server)

    def check_room(self, method: str, tenant: str) -> None:
        if self.room_failure is not None:
            raise self.room_failure

    async def open(self) -> None:
        try:
            await self.loaded.wait()
        finally:
            self.load_ended = True
        if self.load_failure is not None:
            raise self.load_failure

    async def lost(self) -> str:
        return await asyncio.shield(self.loss)

    async def close(self) -> None:
        self.closed_after_calls.append(self.finished.is_set() or not self.started.is_set())

    async def EncodeImage(self, request, context):  # noqa: N802 - gRPC's name
        await self._do(request.image.decode().strip())
        return pb.EncodeImageResponse(cache_hit=True)

    async def GetModelInfo(self, request, context):  # noqa: N802 - gRPC's name
        return pb.EncoderServiceGetModelInfoResponse()

    async def DownloadEmbedding(self, request, context):  # noqa: N802 - gRPC's name
        yield pb.DownloadEmbeddingResponse(chunk=b"first")
        if request.embedding_key == "flood":
            try:
                while True:
                    yield pb.DownloadEmbeddingResponse(chunk=bytes(2**16))
            finally:
                log.info("flood ended")
                self.finished.set()
        await self._do(request.embedding_key)
        yield pb.DownloadEmbeddingResponse(chunk=b"last")

    async def EncodeImages(self, requests, context):  # noqa: N802 - gRPC's name
        async for request in requests:
            await self._do(request.image.decode().strip())
            yield pb.EncodeImagesResponse(request_id=request.request_id)

    async def _do(self, what: str) -> None:
        self.calls.append(current_call.get())
        if what in self.failures:
            raise self.failures[what]
        if what == "wait":
            self.started.set()
            try:
                await self.release.wait()
            finally:
                self.finished.set()


class _Announcement(logging.Handler):
    """The address in the server's log line that it listens."""

    def __init__(self) -> None:
        super().__init__()
        self.address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def emit(self, record: logging.LogRecord) -> None:
        if record.message == "listening":
            self.address.set_result(record.address)

    def handle(self, record: logging.LogRecord) -> bool:
        record.message = record.getMessage()
        return super().handle(record)


class Running:
    """A server in this process, to be called over its socket and stopped by a signal."""

    def __init__(self, task: "asyncio.Task[None]", address: str, credentials: grpc.ChannelCredentials | None = None):
        self.task = task
        self.address = address
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials)
        self.stub = encoder_pb2_grpc.EncoderServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def health_of(self, service: str) -> str:
        reply = await self.health.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    async def until_health_is(self, status: str, service: str = SERVICE) -> None:
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=service))
        async for update in watch:
            if health_pb2.HealthCheckResponse.ServingStatus.Name(update.status) == status:
                break
        watch.cancel()

    def ask_to_stop(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    async def begin_drain(self) -> None:
        """Ask to stop, and return when clients are told."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        await watch.read()
        self.ask_to_stop()
        await watch.read()
        watch.cancel()

    async def stop(self) -> None:
        """Returns when every call has ended and the server is gone."""
        if not self.task.done():
            self.ask_to_stop()
        await asyncio.wait([self.task])


async def start_server(probe: Probe, metrics: Metrics, *arguments: str) -> tuple["asyncio.Task[None]", str]:
    """Serve on a free port; the task, and the address once it listens or "" when it never did."""
    settings = EncoderSettings.load(["--port", "0", *arguments])
    announcement, logger = _Announcement(), logging.getLogger("splitsam.server")
    logger.addHandler(announcement)
    level = logger.level
    logger.setLevel(logging.INFO)
    task = asyncio.create_task(serve(settings, probe, metrics))
    try:
        await asyncio.wait([task, announcement.address], return_when=asyncio.FIRST_COMPLETED)
    finally:
        logger.removeHandler(announcement)
        logger.setLevel(level)
    return task, announcement.address.result() if announcement.address.done() else ""


@contextlib.asynccontextmanager
async def running(
    probe: Probe, metrics: Metrics, *arguments: str, credentials: grpc.ChannelCredentials | None = None
) -> AsyncIterator[Running]:
    """A server that is ready unless the probe still loads; stopped and its task awaited at the end."""
    task, address = await start_server(probe, metrics, *arguments)
    if not address:
        await task
    server = Running(task, address, credentials)
    try:
        if probe.loaded.is_set() and probe.load_failure is None:
            await server.until_health_is("SERVING")
        yield server
    finally:
        probe.release.set()
        await server.stop()
        await server.channel.close()
    await task
