"""Two decoders behind one name, as behind a headless Service: each image has one, which holds it by the first click."""

import socket
import sys
from contextlib import ExitStack

import named_hosts
import pytest
from e2e_support import DEADLINE_S, START_DEADLINE_S, TOKENS, draw, image_file, metric, wait_until
from gateway_support import running_gateway
from named_hosts import IPS, NAME

from splitsam.client import Client
from splitsam.client.processes import Child, free_ports, stop_all
from splitsam.client.stack import is_serving

IMAGES = [image_file(draw(number)) for number in range(520, 534)]


class Decoders:
    """Those of IPS, on one port.

    Args:
        ports: of gRPC, metrics and health.
    """

    def __init__(self, stack, arguments, ports):
        port, metrics, health = map(str, ports)
        self.address = f"{NAME}:{port}"
        self._urls = [f"http://{ip}:{metrics}/metrics" for ip in IPS]
        own = ["--port", port, "--metrics-port", metrics, "--health-port", health]
        own += ["--secret-file", str(stack.folder / "secret"), "--redis-url-file", str(stack.folder / "redis-url")]
        self.children = [
            Child(
                f"decoder at {ip}",
                [sys.executable, "-m", "splitsam.decoder_service", "--host", ip, *own, *arguments],
                stack.folder / f"decoder-{ip}.log",
            )
            for ip in IPS
        ]
        self._health = [f"{ip}:{health}" for ip in IPS]

    def wait_until_ready(self):
        for child, health in zip(self.children, self._health, strict=True):

            def is_up(child=child, health=health):
                child.check_alive("starting")
                return is_serving(health, "splitsam.v1.DecoderService")

            wait_until(is_up, f"{child.name} serves", START_DEADLINE_S)

    def count(self, name, **labels):
        """Of each that runs."""
        running = [url for url, child in zip(self._urls, self.children, strict=True) if child.exit_status() is None]
        return [metric(url, name, **labels) for url in running]

    def looked_up(self, tier, result):
        return sum(self.count("splitsam_cache_lookups_total", kind="embedding", tier=tier, result=result))

    def prefetched(self):
        return sum(self.count("splitsam_prefetches_total", result="fetched"))


@pytest.fixture
def decoders(stack, service_args, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", named_hosts.getaddrinfo)
    started = Decoders(stack, service_args, free_ports(3))
    try:
        started.wait_until_ready()
        yield started
    finally:
        stop_all(started.children, DEADLINE_S)


def test_each_image_is_fetched_by_one_decoder_and_clicked_on_there(stack, decoders, tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text(TOKENS["alpha"])
    times = {"encode_timeout_s": DEADLINE_S, "predict_timeout_s": DEADLINE_S}
    with ExitStack() as open_:
        client = open_.enter_context(Client(stack.encoder, decoders.address, token=TOKENS["alpha"], **times))
        images = [client.encode(image) for image in IMAGES]
        wait_until(lambda: decoders.prefetched() == len(IMAGES), "they have been fetched")
        for image in images:
            assert client.predict(image, points=[(5, 5)])
        assert (decoders.looked_up("memory", "hit"), decoders.looked_up("memory", "miss")) == (len(IMAGES), 0)
        assert all(decoders.count("splitsam_prefetches_total", result="fetched"))

        credentials = ("--service-token-file", str(token_file))
        gateway = open_.enter_context(
            running_gateway(stack.encoder, decoders.address, tmp_path, *credentials, program=(named_hosts.__file__,))
        )
        for image in images:
            answer = gateway.call("/v1/masks", {"key": image.key, "points": [[5, 5]], "labels": [1]})
            assert answer.status == 200
        assert (decoders.looked_up("memory", "hit"), decoders.looked_up("memory", "miss")) == (2 * len(IMAGES), 0)
        assert gateway.call("/readyz").status == 200

        decoders.children[0].signal(9)
        assert decoders.children[0].wait(DEADLINE_S)
        for image in images:
            assert client.predict(image, points=[(5, 5)])
            assert gateway.call("/v1/masks", {"key": image.key, "points": [[5, 5]], "labels": [1]}).status == 200
        assert gateway.call("/readyz").status == 200
        assert decoders.prefetched() < len(IMAGES)
        [held] = decoders.count("splitsam_cache_lookups_total", kind="embedding", tier="memory", result="miss")
        assert held + decoders.prefetched() == len(IMAGES)  # each is now held by the one that is left
