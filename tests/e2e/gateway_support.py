"""What the tests of the gateway share: gateways as processes, and calls of them as a browser or a tool makes them."""

import json
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e_support import DEADLINE_S, assert_no_leak, wait_until

from splitsam.client.processes import LOOPBACK, Child, free_ports, stop_all
from splitsam.client.stack import Stack

PROGRAM = ("-m", "splitsam.gateway")


@dataclass(frozen=True)
class Answer:
    """What a call was answered; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Of the JSON API; fails the test where there is none, or where it tells of the gateway's insides."""
        error: dict[str, Any] = self.json["error"]
        assert self.status >= 400
        assert error["request_id"] == self.headers["x-request-id"]
        assert_no_leak(error["message"], *(each["description"] for each in error["fields"]))
        return error


@dataclass(frozen=True)
class RunningGateway:
    """A gateway's process.

    Args:
        metrics_url: for `metric`.
    """

    url: str
    metrics_url: str
    child: Child
    tls: ssl.SSLContext | None = None

    @property
    def socket_url(self) -> str:
        return self.url.replace("http", "ws", 1)

    def call(self, path: str, body: bytes | dict[str, Any] | None = None, **headers: str) -> Answer:
        """GET, or POST where there is a body; what has no JSON type is sent as it is."""
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        kind = {"content-type": "application/json" if isinstance(body, dict) else "application/octet-stream"}
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, content, (kind if body is not None else {}) | given)  # noqa: S310
        handlers = [urllib.request.ProxyHandler({})]
        if self.tls is not None:
            handlers.append(urllib.request.HTTPSHandler(context=self.tls))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=DEADLINE_S) as response:
                return _answer(response)
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error)


def _answer(response: Any) -> Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Answer(response.status, headers, response.read())


@contextmanager
def running_gateway(
    encoder: str,
    decoder: str,
    folder: Path,
    *arguments: str,
    tls: ssl.SSLContext | None = None,
    program: Sequence[str] = PROGRAM,
) -> Iterator[RunningGateway]:
    """Start a gateway in front of services; stop it in the end."""
    port, metrics_port = free_ports(2)
    flags = {"--port": port, "--metrics-port": metrics_port, "--encoders": encoder, "--decoders": decoder}
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, *program, *words, *arguments]
    child = Child("gateway", command, folder / f"gateway-{port}.log", {"SPLITSAM_GATEWAY_LOG_FORMAT": "text"})
    scheme = "http" if tls is None else "https"
    gateway = RunningGateway(f"{scheme}://{LOOPBACK}:{port}", f"http://{LOOPBACK}:{metrics_port}/metrics", child, tls)

    def is_listening() -> bool:
        child.check_alive("starting")
        try:
            return gateway.call("/livez").status == 200
        except OSError:
            return False

    try:
        wait_until(is_listening, "the gateway listens")
        yield gateway
        assert "Traceback" not in child.log_path.read_text()  # no test met a defect unseen
    finally:
        stop_all([child], DEADLINE_S)


@contextmanager
def gateway_of(stack: Stack, token: str, *arguments: str, **options: Any) -> Iterator[RunningGateway]:
    """A gateway in front of a stack, which calls it with a tenant's token."""
    token_file = stack.folder / "gateway-token"
    token_file.write_text(token + "\n")
    credentials = ("--service-token-file", str(token_file))
    with running_gateway(stack.encoder, stack.decoder, stack.folder, *credentials, *arguments, **options) as gateway:
        yield gateway
