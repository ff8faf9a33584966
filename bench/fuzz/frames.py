"""HTTP/2 as no gRPC library would send it, from a plain socket."""

import asyncio
import contextlib
import struct
from collections.abc import Sequence
from random import Random

from bench.fuzz.mutate import mutate

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, _RST, SETTINGS, _PING, _WINDOW = 0, 1, 3, 4, 6, 8
END_STREAM, END_HEADERS = 1, 4
ANSWER_S = 0.5
_ODD_HEADERS = (
    *((b"authorization", value) for value in (b"Bearer \xff\xfe", b"Bearer \xc3\xa9", b"\x00", b"Bearer a\nb")),
    *((b"x-request-id", value) for value in (b"\xff\xfe\x80", "é".encode(), b"a\x00b", b"a\r\nb", b"\t", b"x" * 9000)),
    *((b"grpc-timeout", value) for value in (b"", b"1", b"-1S", b"999999999999H", b"0n", b"1x", b"\xff")),
    *((b"grpc-encoding", value) for value in (b"gzip", b"deflate", b"nonsense", b"\xff")),
    *((b"content-type", value) for value in (b"", b"text/html", b"application/grpc+json", b"application/grpc\xff")),
    *((name, b"v") for name in (b"", b":path", b"A-Upper", b"\xff", b"sp ace", b"te", b"x-bin")),
    (b"x-bin", b"!!! not base64"),
    (b"traceparent", b"00-\xff"),
)


def make_connection(random: Random, path: str, token: str | None) -> bytes:
    """All that a caller sends on a connection: noise, or a call with something odd about it."""
    if random.random() < 0.1:
        return random.choice((b"", PREFACE[:9], PREFACE)) + random.randbytes(random.randrange(400))
    odd = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    odd += [random.choice(_ODD_HEADERS) for _ in range(random.choice((0, 1, 1, 2)))]
    data = start_call(path.encode(), odd, random.choice((b"POST", b"POST", b"POST", b"GET", b"PUT", b"\xff")))
    body = random.randbytes(random.randrange(30))
    length = random.choice((len(body), len(body), len(body) + 1, 2**31, 2**32 - 1))
    message = struct.pack(">BI", random.choice((0, 0, 0, 1, 2, 255)), length) + body
    data += frame(DATA, random.choice((END_STREAM, END_STREAM, 0)), random.choice((1, 1, 1, 0, 3)), message)
    for _ in range(random.choice((0, 0, 1, 3))):
        kind = random.choice((DATA, HEADERS, _RST, SETTINGS, _PING, _WINDOW, 200))
        data += frame(kind, random.randrange(256), random.choice((0, 1, 3)), random.randbytes(random.randrange(20)))
    if random.random() < 0.3:
        damaged = PREFACE + mutate(random, data[len(PREFACE) :], [data])
        # A path that is not UTF-8 ends gRPC's server, and the process for it: `common/server.py`.
        if _text(b":path") + _text(path.encode()) in damaged:
            return damaged
    return data


def start_call(path: bytes, odd: Sequence[tuple[bytes, bytes]] = (), method: bytes = b"POST") -> bytes:
    """The beginning of a connection, and of a call on its stream 1.

    Args:
        odd: further headers, of any bytes.
    """
    headers = [
        *((b":method", method), (b":scheme", b"http"), (b":path", path), (b":authority", b"127.0.0.1")),
        *((b"te", b"trailers"), (b"content-type", b"application/grpc"), *odd),
    ]
    block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block)


async def exchange(address: str, data: bytes, until: bytes = b"\0never") -> tuple[bytes, bool]:
    """Send it and read the answer until it holds some bytes, nothing comes for a moment, or the server hangs up.

    Returns:
        What was read, and whether the server hung up.
    """
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    received = b""
    try:
        writer.write(data)
        await writer.drain()
        while until not in received:
            async with asyncio.timeout(ANSWER_S):
                chunk = await reader.read(2**16)
            if not chunk:
                return received, True
            received += chunk
    except TimeoutError:
        return received, False
    except ConnectionError:
        return received, True
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return received, False


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One of HTTP/2's."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _text(data: bytes) -> bytes:
    """A literal of HPACK (RFC 7541, 5.2), without Huffman's code."""
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, length = b"\x7f", len(data) - 127
    while length >= 128:
        rest += bytes([length % 128 + 128])
        length //= 128
    return rest + bytes([length]) + data
