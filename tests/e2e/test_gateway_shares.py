"""What one caller of the gateway may take: so many requests at once and a second, and others do not wait for them."""

import json
import random
from contextlib import contextmanager

import pytest
from e2e_support import metric, wait_until
from gateway_support import gateway_of
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

TOKENS = {name: f"{name}-token-0123456789" for name in ("people", "script", "eager", "hover")}
QUOTAS = "script 0 1\neager 0.01 0\nhover 0.01 0\n"  # one at once; one a hundred seconds, which is the first
POSITION = {"id": 1, "points": [[1, 1]]}


@pytest.fixture(scope="module")
def gateway(stack, alpha, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    (folder / "tokens").write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    (folder / "quotas").write_text(QUOTAS)
    flags = ("--tokens-file", str(folder / "tokens"), "--quotas-file", str(folder / "quotas"))
    with gateway_of(stack, alpha.token, *flags, "--caller-requests-in-flight", "8") as running:
        yield running


@pytest.fixture
def click(key):
    return {"key": key, "points": [[1, 1]]}


def of(name):
    return {"authorization": f"Bearer {TOKENS[name]}"}


def inside(key, name):
    """A request of Roboflow's SDK, which has the token in its message."""
    prompts = {"prompts": [{"points": [{"x": 1, "y": 1, "positive": True}]}]}
    return {"image_id": key, "api_key": TOKENS[name], "prompts": prompts}


def refused(gateway, route):
    return metric(gateway.metrics_url, "splitsam_gateway_refusals_total", route=route)


@contextmanager
def pointer(gateway, key, name):
    with connect(f"{gateway.socket_url}/v1/pointer", proxy=None) as socket:
        socket.send(json.dumps({"key": key, "token": TOKENS[name]}))
        yield socket


def answered(socket):
    socket.send(json.dumps(POSITION))
    return json.loads(socket.recv(timeout=60))


def test_caller_with_as_many_in_flight_as_may_be_is_refused_in_each_form_and_nobody_else_is(gateway, key, click):
    routes = ("/v1/masks", "/v1/images/{sha256}", "/predict", "/api/generate", "/sam2/segment_image", "/v1/pointer")
    before = {route: refused(gateway, route) for route in routes}
    with pointer(gateway, key, "script") as held:
        assert answered(held)["masks"]
        own = gateway.call("/v1/masks", click, **of("script"))
        assert (own.status, own.error["reason"]) == (429, "QUOTA_EXCEEDED")
        assert int(own.headers["retry-after"]) >= 1
        assert own.error["retry_after_ms"] >= 50
        tools = [
            (gateway.call("/predict", {"tasks": [], "label_config": ""}, **of("script")), "error"),
            (gateway.call("/api/generate", {"model": "sam"}, **of("script")), "detail"),
            (gateway.call("/sam2/segment_image", inside(key, "script")), "message"),
        ]
        assert [(answer.status, answer.json[field]) for answer, field in tools] == [(429, own.error["message"])] * 3
        assert all(int(answer.headers["retry-after"]) >= 1 for answer, _ in tools)
        assert gateway.call(f"/v1/images/{'ab' * 32}", **of("script")).status == 429
        with pointer(gateway, key, "script") as second:
            assert json.loads(second.recv(timeout=60))["error"]["reason"] == "QUOTA_EXCEEDED"
            with pytest.raises(ConnectionClosed) as closed:
                second.recv(timeout=60)
            assert closed.value.rcvd.code == 1013  # try again later
        assert gateway.call("/v1/masks", click, **of("people")).status == 200
        assert gateway.call("/sam2/segment_image", inside(key, "people")).status == 200
        assert answered(held)["masks"]
    assert {route: refused(gateway, route) - before[route] for route in routes} == dict.fromkeys(routes, 1)
    wait_until(lambda: gateway.call("/v1/masks", click, **of("script")).status == 200, "the share is free again")
    assert gateway.call("/sam2/segment_image", inside(key, "script")).status == 200
    counted = {"route": "/v1/images/{sha256}", "status": "429"}
    assert metric(gateway.metrics_url, "splitsam_gateway_requests_total", **counted) == 1


def test_image_that_is_refused_may_be_sent_to_its_end(gateway, key):
    with pointer(gateway, key, "script") as held:
        assert answered(held)["masks"]
        answer = gateway.call("/v1/images", random.Random(1).randbytes(8 * 2**20), **of("script"))
        assert (answer.status, answer.error["reason"]) == (429, "QUOTA_EXCEEDED")


def test_caller_that_asks_too_often_is_told_when_to_come_again(gateway, click):
    first, second = (gateway.call("/v1/masks", click, **of("eager")) for _ in range(2))
    assert (first.status, second.status) == (200, 429)
    assert second.headers["retry-after"] == "30"
    for path in ("/livez", "/docs"):
        assert gateway.call(path, **of("eager")).status == 200


def test_pointer_is_one_request_however_often_it_moves(gateway, key, click):
    with pointer(gateway, key, "hover") as socket:
        for _ in range(5):
            assert answered(socket)["masks"]
        assert gateway.call("/v1/masks", click, **of("hover")).status == 429
