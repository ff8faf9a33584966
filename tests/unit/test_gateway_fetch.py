"""Fetching images: real HTTP on loopback; what must not be called is not called."""

import contextlib
import os
import socket
import threading

import httpcore
import pytest
from web_server import WebServer

from splitsam.gateway.errors import GatewayError
from splitsam.gateway.fetch import Fetcher
from splitsam.gateway.metrics import GatewayMetrics
from splitsam.gateway.settings import GatewaySettings

IMAGE = b"\xff\xd8\xff" + bytes(range(256))
JPEG = {"content-type": "image/jpeg"}
TOKEN = "Token of-label-studio"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in os.environ:
        if name.upper().startswith("SPLITSAM_"):
            monkeypatch.delenv(name)


def fetcher(*hosts, private=True, **settings):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    flags += ["--private-images"] if private else []
    return Fetcher(GatewaySettings.load(["--image-hosts", ",".join(hosts), *flags]), GatewayMetrics())


@pytest.fixture
def refused():
    """Fetches what must fail; the reason and the sentence."""

    async def fetch(asked, url, authorization=None):
        with pytest.raises(GatewayError) as caught:
            await asked.image(url, authorization)
        assert caught.value.message.startswith("The image")
        return caught.value.reason, caught.value.message

    return fetch


def leads_to(url, status=302):
    return status, {"location": url}, b""


async def test_image_of_a_listed_host_is_fetched():
    with WebServer({"/a%20photo.jpg": (200, JPEG, IMAGE)}) as server:
        assert await fetcher(server.place).image(f"{server.url}/a photo.jpg?size=large") == IMAGE
    [(path, headers, _)] = server.requests
    assert path == "/a%20photo.jpg?size=large"
    assert headers["host"] == server.place
    assert "authorization" not in headers


async def test_host_that_is_not_listed_is_not_called(refused):
    with WebServer({"/photo.jpg": (200, JPEG, IMAGE)}) as server:
        reason, message = await refused(fetcher("other.example"), f"{server.url}/photo.jpg")
    assert reason == "IMAGE_ADDRESS_REFUSED"
    assert server.place in message
    assert server.requests == []


async def test_no_host_is_listed_by_default(refused):
    with WebServer({"/photo.jpg": (200, JPEG, IMAGE)}) as server:
        await refused(fetcher(), f"{server.url}/photo.jpg")
    assert server.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]"])
async def test_private_address_behind_a_listed_name_is_not_called(host, refused):
    with WebServer({"/photo.jpg": (200, JPEG, IMAGE)}) as server:
        place = f"{host}:{server.place.rpartition(':')[2]}"
        reason, message = await refused(fetcher(place, private=False), f"http://{place}/photo.jpg")
    assert reason == "IMAGE_ADDRESS_REFUSED"
    assert "private network" in message
    assert server.requests == []


async def test_name_is_resolved_once_and_that_address_is_called(monkeypatch, refused):
    """A name that is public when it is looked at, and would be private when it is looked at again."""
    looked, called = [], []

    async def rebinding(_loop, host, port, **_options):
        looked.append(host)
        address = "93.184.216.34" if len(looked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    async def connect(_backend, host, *_options):
        called.append(host)
        raise httpcore.ConnectError("no test calls the internet")

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", rebinding)
    monkeypatch.setattr("httpcore.AnyIOBackend.connect_tcp", connect)
    reason, _ = await refused(fetcher("rebound.example", private=False), "http://rebound.example/photo.jpg")
    assert reason == "IMAGE_NOT_FETCHED"
    assert (looked, called) == (["rebound.example"], ["93.184.216.34"])


async def test_redirect_to_a_listed_host_is_followed():
    with WebServer({"/photo.jpg": (200, JPEG, IMAGE)}) as store, WebServer({}) as front:
        answers = {"/go": leads_to(f"{store.url}/photo.jpg"), "/near": leads_to("/go", 307)}
        with WebServer(answers) as front:
            assert await fetcher(front.place, store.place).image(f"{front.url}/near") == IMAGE
    assert len(front.requests) == 2


async def test_redirect_to_another_host_is_not_followed(refused):
    with (
        WebServer({"/latest/meta-data": (200, JPEG, IMAGE)}) as inner,
        WebServer({"/go": leads_to(f"{inner.url}/latest/meta-data")}) as front,
    ):
        reason, _ = await refused(fetcher(front.place), f"{front.url}/go")
    assert reason == "IMAGE_ADDRESS_REFUSED"
    assert inner.requests == []


async def test_redirect_of_label_studio_to_a_private_address_is_not_followed(refused):
    """Label Studio may be in a private network; where it leads may not, even to a listed name."""
    with WebServer({"/photo.jpg": (200, JPEG, IMAGE)}) as inner:
        port = inner.place.rpartition(":")[2]
        with WebServer({"/go": leads_to(f"http://localhost:{port}/photo.jpg")}) as studio:
            asked = fetcher(f"localhost:{port}", private=False, label_studio_url=studio.url)
            reason, message = await refused(asked, f"{studio.url}/go", TOKEN)
    assert (reason, "private network" in message) == ("IMAGE_ADDRESS_REFUSED", True)
    assert inner.requests == []
    assert len(studio.requests) == 1


async def test_token_goes_to_label_studio_alone_and_never_across_a_redirect():
    with WebServer({"/photo.jpg": (200, JPEG, IMAGE)}) as store:
        answers = {
            "/go": leads_to(f"{store.url}/photo.jpg"),
            "/home": leads_to("/own.jpg"),
            "/own.jpg": (200, JPEG, b"x"),
        }
        with WebServer(answers) as studio:
            asked = fetcher(store.place, label_studio_url=studio.url)
            assert await asked.image(f"{studio.url}/go", TOKEN) == IMAGE
            assert await asked.image(f"{studio.url}/home", TOKEN) == b"x"
            assert await asked.image(f"{store.url}/photo.jpg", TOKEN) == IMAGE
    assert [headers.get("authorization") for _, headers, _ in studio.requests] == [TOKEN, TOKEN, None]
    assert [headers.get("authorization") for _, headers, _ in store.requests] == [None, None]


async def test_redirects_without_end_are_not_followed(refused):
    with WebServer({"/go": leads_to("/go")}) as server:
        reason, _ = await refused(fetcher(server.place), f"{server.url}/go")
    assert reason == "IMAGE_ADDRESS_REFUSED"
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/x", "gopher://h/x", "//h/x", "http:///x", "http://h:x/"]
)
async def test_what_is_no_web_address_is_refused(url, refused):
    reason, _ = await refused(fetcher("h", ""), url)
    assert reason == "IMAGE_ADDRESS_REFUSED"


async def test_user_in_an_address_is_refused(refused):
    with WebServer({}) as server:
        for url in (f"http://a:b@{server.place}/", f"http://listed.example@{server.place}/"):
            reason, _ = await refused(fetcher(server.place, "listed.example"), url)
            assert reason == "IMAGE_ADDRESS_REFUSED"
    assert server.requests == []


async def test_line_break_in_an_address_adds_no_header():
    with WebServer({"/x": (200, JPEG, IMAGE)}) as server, contextlib.suppress(GatewayError):
        await fetcher(server.place).image(f"{server.url}/x?a=1 HTTP/1.1\r\nx-evil: 1\r\n\r\n")
    assert all("x-evil" not in headers for _, headers, _ in server.requests)


async def test_too_large_image_is_refused_by_its_announced_size(refused):
    with WebServer({"/photo.jpg": (200, JPEG, bytes(1001))}) as server:
        reason, message = await refused(fetcher(server.place, max_image_bytes=1000), f"{server.url}/photo.jpg")
    assert (reason, "1000 bytes" in message) == ("TOO_LARGE", True)


async def test_too_large_image_of_unknown_size_is_cut_off(refused):
    written = []

    def endless(handler):
        handler.send_response(200)
        handler.send_header("content-type", "image/png")
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(10_000):
                handler.wfile.write(bytes(2**16))
                written.append(2**16)

    with WebServer({"/photo.png": endless}) as server:
        reason, _ = await refused(fetcher(server.place, max_image_bytes=100_000), f"{server.url}/photo.png")
    assert reason == "TOO_LARGE"
    assert sum(written) < 2**26


async def test_slow_host_is_given_up(refused):
    release = threading.Event()

    def slow(handler):
        handler.send_response(200)
        handler.send_header("content-type", "image/png")
        handler.end_headers()
        handler.wfile.write(b"x")
        handler.wfile.flush()
        release.wait(30)

    with WebServer({"/photo.png": slow}) as server:
        reason, message = await refused(fetcher(server.place, fetch_timeout_ms=300), f"{server.url}/photo.png")
        release.set()
    assert (reason, "within 0.3 s" in message) == ("IMAGE_NOT_FETCHED", True)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {"content-type": "text/html; charset=utf-8"}, b"<html>"), "text/html"),
        ((401, {}, b""), "login"),
        ((403, {}, b""), "login"),
        ((404, {}, b""), "status 404"),
        ((500, {}, b""), "status 500"),
    ],
)
async def test_what_is_no_image_is_refused(answer, said, refused):
    with WebServer({"/photo.jpg": answer}) as server:
        reason, message = await refused(fetcher(server.place), f"{server.url}/photo.jpg")
    assert (reason, said in message) == ("IMAGE_NOT_FETCHED", True)


async def test_host_that_is_away_or_speaks_something_else_is_said(refused):
    with WebServer({}) as server:
        place = server.place
    reason, message = await refused(fetcher(place), f"http://{place}/photo.jpg")
    assert (reason, "cannot be reached" in message) == ("IMAGE_NOT_FETCHED", True)

    def nonsense(handler):
        handler.wfile.write(b"220 mail.example ESMTP\r\n")

    with WebServer({"/photo.jpg": nonsense}) as server:
        reason, message = await refused(fetcher(server.place), f"{server.url}/photo.jpg")
        assert (reason, "web server" in message) == ("IMAGE_NOT_FETCHED", True)
        reason, _ = await refused(fetcher(server.place), f"https://{server.place}/photo.jpg")
        assert reason == "IMAGE_NOT_FETCHED"


async def test_every_fetch_is_counted(refused):
    with WebServer({"/photo.jpg": (200, JPEG, IMAGE)}) as server:
        metrics = GatewayMetrics()
        settings = GatewaySettings.load(["--image-hosts", server.place, "--private-images"])
        asked = Fetcher(settings, metrics)
        await asked.image(f"{server.url}/photo.jpg")
        await refused(asked, f"{server.url}/other.jpg")
    counted = {
        result: metrics.registry.get_sample_value("splitsam_gateway_fetches_total", {"result": result})
        for result in ("OK", "IMAGE_NOT_FETCHED")
    }
    assert counted == {"OK": 1, "IMAGE_NOT_FETCHED": 1}
