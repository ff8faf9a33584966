"""What a connection may do, seen from below gRPC: by hand-written HTTP/2 frames on a socket."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

import grpc
import pytest
from probe_service import Probe, running

from bench.fuzz.frames import PREFACE, frame
from splitsam.v1 import encoder_pb2 as pb

LIMIT_S = 20.0
HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 1, 3, 4, 6, 7
ACK, END_HEADERS = 1, 4
MAX_CONCURRENT_STREAMS = 3
REFUSED_STREAM, ENHANCE_YOUR_CALM = 7, 11
PATH = "/splitsam.v1.EncoderService/EncodeImage"


@pytest.fixture
async def probe() -> Probe:
    return Probe()


class RawConnection:
    """HTTP/2 without a library: frames of (type, flags, payload)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer

    def greet(self) -> None:
        self.writer.write(PREFACE)
        self.send(SETTINGS)

    def send(self, kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> None:
        self.writer.write(frame(kind, flags, stream, payload))

    def call(self, stream: int) -> None:
        """Begin a call and send no request."""
        indexed = bytes([0x83, 0x86])  # POST, http
        path, authority, content = (
            bytes([*name, len(text)]) + text.encode()
            for name, text in (((4,), PATH), ((1,), "localhost"), ((15, 16), "application/grpc"))
        )
        trailers = b"\x00\x02te\x08trailers"
        self.send(HEADERS, indexed + path + authority + content + trailers, flags=END_HEADERS, stream=stream)

    async def receive(self) -> tuple[int, int, bytes]:
        """Kind, flags and payload of the next frame."""
        async with asyncio.timeout(LIMIT_S):
            head = await self.reader.readexactly(9)
            return head[3], head[4], await self.reader.readexactly(int.from_bytes(head[:3]))

    async def until(self, kind: int, *, flags: int = 0) -> bytes:
        """The payload of the next frame of a kind; pings on the way are answered, as callers must."""
        while True:
            got, got_flags, payload = await self.receive()
            if (got, got_flags) == (kind, flags):
                return payload
            if (got, got_flags) == (PING, 0):
                self.send(PING, payload, flags=ACK)

    async def until_closed(self) -> None:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await self.until(-1)


@contextlib.asynccontextmanager
async def connected(address: str) -> AsyncIterator[RawConnection]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()


async def test_callers_are_told_how_many_calls_a_connection_takes(probe, metrics):
    async with running(probe, metrics, "--max-concurrent-streams", "7") as server, connected(server.address) as raw:
        raw.greet()
        settings = dict(struct.iter_unpack(">HI", await raw.until(SETTINGS)))
    assert settings[MAX_CONCURRENT_STREAMS] == 7


async def test_calls_beyond_that_wait_in_the_caller(probe, metrics):
    async with running(probe, metrics, "--max-concurrent-streams", "2") as server:
        calls = [server.stub.EncodeImage(pb.EncodeImageRequest(image=b"wait")) for _ in range(5)]
        await probe.started.wait()
        async with grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as another:
            check = another.unary_unary("/grpc.health.v1.Health/Check")
            await check(b"", timeout=LIMIT_S)  # another connection has room
        assert len(probe.calls) <= 2
        probe.release.set()
        assert all([(await call).cache_hit for call in calls])


async def test_callers_that_do_not_keep_to_it_are_refused(probe, metrics):
    async with running(probe, metrics, "--max-concurrent-streams", "3") as server, connected(server.address) as raw:
        raw.greet()
        await raw.until(SETTINGS)
        raw.send(SETTINGS, flags=ACK)  # understood
        for number in range(10):
            raw.call(2 * number + 1)
        for _ in range(7):
            assert int.from_bytes(await raw.until(RST_STREAM)) == REFUSED_STREAM


@pytest.mark.parametrize("allowed", [True, False])
async def test_pings_more_often_than_allowed_end_the_connection(probe, metrics, allowed):
    interval_ms = "0" if allowed else "10000"
    arguments = ("--min-ping-interval-ms", interval_ms)
    async with running(probe, metrics, *arguments) as server, connected(server.address) as raw:
        raw.greet()
        await raw.until(SETTINGS)
        answered, goaway = 0, None
        while answered < 20 and goaway is None:
            raw.send(PING, answered.to_bytes(8))
            while (frame := await raw.receive())[:2] not in ((PING, ACK), (GOAWAY, 0)):
                pass
            answered += frame[0] == PING
            goaway = frame[2] if frame[0] == GOAWAY else None
        if allowed:
            assert answered == 20
        else:
            assert answered < 5
            assert struct.unpack(">II", goaway[:8])[1] == ENHANCE_YOUR_CALM
            await raw.until_closed()


@pytest.mark.parametrize("said", [b"", PREFACE[:10], b"\x16\x03\x01\x02\x00"], ids=["nothing", "half a preface", "TLS"])
async def test_a_connection_that_never_speaks_is_closed(probe, metrics, said):
    async with running(probe, metrics, "--handshake-timeout-ms", "100") as server, connected(server.address) as raw:
        raw.writer.write(said)
        await raw.until_closed()


async def test_a_caller_that_answers_no_ping_is_pinged_when_silent(probe, metrics):
    async with running(probe, metrics, "--keepalive-ms", "200") as server, connected(server.address) as raw:
        raw.greet()
        await raw.until(PING)


async def test_an_old_connection_takes_no_new_calls_and_ends_none(probe, metrics):
    async with running(probe, metrics, "--max-connection-age-ms", "300") as server, connected(server.address) as raw:
        raw.greet()
        running_call = server.stub.EncodeImage(pb.EncodeImageRequest(image=b"wait"))
        await probe.started.wait()
        _, code = struct.unpack(">II", (await raw.until(GOAWAY))[:8])
        assert code == 0
        await raw.until_closed()
        for _ in range(3):
            assert (await server.stub.EncodeImage(pb.EncodeImageRequest())).cache_hit
        probe.release.set()
        assert (await running_call).cache_hit


async def test_connections_do_not_age_unless_asked_to(probe, metrics):
    async with running(probe, metrics) as server, connected(server.address) as raw:
        raw.greet()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(raw.until(GOAWAY), 1.0)
