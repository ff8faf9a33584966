"""The gateway as a process: who may call it, services that are away, TLS, its end."""

import base64
import json
import signal
import socket
import ssl
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from certificates import SecretVolume, flags, server_files
from e2e_support import DEADLINE_S, draw, image_file, metric, running_service, wait_until
from gateway_support import RunningGateway, gateway_of, running_gateway
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from splitsam.client.processes import free_ports

TOKEN = "annotators-token-0123456789"


@pytest.fixture(scope="module")
def guarded(stack, alpha, tmp_path_factory):
    """A gateway that asks for tokens."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"annotators {TOKEN}\n")
    with gateway_of(stack, alpha.token, "--tokens-file", str(tokens), "--upload-timeout-ms", "3000") as running:
        yield running


def basic(password):
    return "Basic " + base64.b64encode(f"label-studio:{password}".encode()).decode()


def test_token_is_needed_and_may_come_in_every_way_that_tools_have(guarded, photo):
    opened = guarded.call("/v1/images", photo, authorization=f"Bearer {TOKEN}")
    assert opened.status == 200
    key = opened.json["key"]
    click = {"key": key, "points": [[1, 1]]}
    assert guarded.call("/v1/masks", click, authorization=basic(TOKEN)).status == 200
    assert guarded.call(f"/v1/masks?api_key={TOKEN}", click).status == 200
    inside = {
        "image_id": key,
        "api_key": TOKEN,
        "prompts": {"prompts": [{"points": [{"x": 1, "y": 1, "positive": True}]}]},
    }
    assert guarded.call("/sam2/segment_image", inside).status == 200
    with connect(f"{guarded.socket_url}/v1/pointer", proxy=None) as socket:
        socket.send(json.dumps({"key": key, "token": TOKEN}))
        socket.send(json.dumps({"id": 1, "points": [[1, 1]]}))
        assert json.loads(socket.recv(timeout=60))["masks"]
    assert TOKEN not in guarded.child.log_path.read_text()


def test_call_without_a_known_token_is_refused_in_the_tools_own_form(guarded, photo, key):
    for given in ({}, {"authorization": "Bearer no-such-token-0123456789"}, {"authorization": basic("wrong")}):
        answer = guarded.call("/v1/images", photo, **given)
        assert (answer.status, answer.error["reason"]) == (401, "UNAUTHENTICATED")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "ask whoever runs" in guarded.call("/api/generate", {}, **given).json["detail"]
        assert "ask whoever runs" in guarded.call("/predict", {}, **given).json["error"]
        assert "ask whoever runs" in guarded.call("/sam2/segment_image", {"image_id": key}, **given).json["message"]
    with connect(f"{guarded.socket_url}/v1/pointer", proxy=None) as socket:
        socket.send(json.dumps({"key": key}))
        assert json.loads(socket.recv(timeout=60))["error"]["reason"] == "UNAUTHENTICATED"


def test_tokens_are_added_and_revoked_while_it_runs(stack, alpha, key, tmp_path):
    volume = SecretVolume(tmp_path / "gateway", {"tokens": f"annotators {TOKEN}\n".encode()})
    flags = ("--tokens-file", str(volume / "tokens"), "--tokens-reload-ms", "20")
    new_token, click = "scripts-token-0123456789", {"key": key, "points": [[1, 1]]}
    with gateway_of(stack, alpha.token, *flags) as running, follow(running, key, TOKEN) as old:
        assert running.call("/v1/masks", click, authorization=f"Bearer {TOKEN}").status == 200
        volume.put({"tokens": b"annotators short"})
        reloads = "splitsam_token_reloads_total"
        wait_until(lambda: metric(running.metrics_url, reloads, result="refused") == 1, "the bad file is refused")
        assert running.call("/v1/masks", click, authorization=f"Bearer {TOKEN}").status == 200
        volume.put({"tokens": f"scripts {new_token}\n".encode()})
        wait_until(lambda: metric(running.metrics_url, reloads, result="taken") == 1, "the new tokens are in use")
        assert running.call("/v1/masks", click, authorization=f"Bearer {new_token}").status == 200
        assert running.call("/v1/masks", click, authorization=f"Bearer {TOKEN}").status == 401
        old.send(json.dumps({"id": 2, "points": [[1, 1]]}))
        assert json.loads(old.recv(timeout=60))["error"]["reason"] == "UNAUTHENTICATED"
        with pytest.raises(ConnectionClosed):
            old.recv(timeout=60)
    written = running.child.log_path.read_text()
    assert "the old one stays" in written
    assert not any(token in written for token in (TOKEN, new_token))


@contextmanager
def follow(gateway, key, token):
    """A pointer that has been answered once."""
    with connect(f"{gateway.socket_url}/v1/pointer", proxy=None) as socket:
        socket.send(json.dumps({"key": key, "token": token}))
        socket.send(json.dumps({"id": 1, "points": [[1, 1]]}))
        assert json.loads(socket.recv(timeout=60))["masks"]
        yield socket


def half_an_image(guarded):
    """A connection on which half of an upload has been sent."""
    host, _, port = guarded.url.removeprefix("http://").partition(":")
    lines = (
        "POST /v1/images HTTP/1.1",
        f"host: {host}:{port}",
        f"authorization: Bearer {TOKEN}",
        "content-length: 100",
    )
    connection = socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    connection.sendall("\r\n".join([*lines, "", "half of it"]).encode())
    return connection


def test_image_that_does_not_arrive_is_not_waited_for(guarded):
    with half_an_image(guarded) as slow:
        answer = slow.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_caller_that_hangs_up_in_the_middle_of_an_image_is_no_defect(guarded):
    """One would leave its trace in the log, which is looked at when the gateway stops."""
    with half_an_image(guarded):
        pass
    requests = "splitsam_gateway_requests_total"
    wait_until(lambda: metric(guarded.metrics_url, requests, route="/v1/images", status="499") == 1, "it has ended")


def test_health_and_documents_need_no_token(guarded):
    for path in ("/livez", "/readyz", "/health", "/docs", "/openapi.json"):
        assert guarded.call(path).status == 200


def test_token_that_the_services_do_not_know_is_the_operators_problem(stack, photo):
    with gateway_of(stack, "no-such-token-0123456789") as running:
        answer = running.call("/v1/images", photo)
        assert answer.status == 502
        assert "credentials" in answer.error["message"]


def test_services_that_are_away_are_said_in_every_form(tmp_path, photo):
    encoder, decoder = (f"127.0.0.1:{port}" for port in free_ports(2))
    image = {"type": "base64", "value": base64.b64encode(photo).decode()}
    with running_gateway(encoder, decoder, tmp_path) as running:
        assert running.call("/livez").status == 200
        answers = [running.call("/v1/images", photo), running.call("/v1/masks", {"key": "ab" * 32, "points": [[1, 1]]})]
        assert [answer.status for answer in answers] == [503, 503]
        said = [answer.error["message"] for answer in answers]
        tools = [
            (running.call("/health"), "error"),
            (running.call("/setup", {"project": "1.2", "schema": ""}), "error"),
            (running.call("/sam2/embed_image", {"image": image}), "message"),
            (running.call("/api/generate", {"model": "sam", "image": image["value"]}), "detail"),
        ]
        assert [answer.status for answer, _ in tools] == [503] * len(tools)
        said += [answer.json[field] for answer, field in tools]
    assert set(said) == {"The segmentation service cannot be reached; try again in a moment."}


def test_gateway_is_ready_while_one_of_several_decoders_is(stack, alpha, photo):
    (gone,) = free_ports(1)
    folder = stack.folder
    (folder / "token").write_text(alpha.token)
    decoders = f"127.0.0.1:{gone},{stack.decoder}"
    with running_gateway(stack.encoder, decoders, folder, "--service-token-file", str(folder / "token")) as running:
        assert running.call("/readyz").status == 200
        assert len(running.call("/v1/info").json["services"]) == 2
        for seed in range(2):
            opened = running.call("/v1/images", image_file(draw(seed + 80, (64, 48)))).json
            assert running.call("/v1/masks", {"key": opened["key"], "points": [[9, 9]]}).status == 200


def test_any_replica_answers_for_any_other(stack, alpha, photo):
    with gateway_of(stack, alpha.token) as one, gateway_of(stack, alpha.token) as other:
        key = one.call("/v1/images", photo).json["key"]
        click = {"key": key, "points": [[100, 120]], "refinement_tokens": True}
        [mask] = other.call("/v1/masks", click).json["masks"]
        refined = one.call("/v1/masks", click | {"refinement_token": mask["refinement_token"]})
        assert refined.status == 200
        assert refined.json["masks"][0]["rle"] != mask["rle"]


def test_gateway_drains_when_it_is_told_to_stop(stack, alpha):
    image = image_file(draw(90, (1024, 768)))
    answers = []
    with gateway_of(stack, alpha.token, "--drain-delay-ms", "1500") as running:
        opening = threading.Thread(target=lambda: answers.append(running.call("/v1/images", image)))
        opening.start()
        wait_until(lambda: metric(running.metrics_url, "splitsam_gateway_requests_in_progress") >= 1, "it has begun")
        running.child.signal(signal.SIGTERM)
        wait_until(lambda: running.call("/readyz").status == 503, "it says that it drains")
        assert running.call("/livez").status == 200
        opening.join(DEADLINE_S)
        assert [answer.status for answer in answers] == [200]
        assert running.child.wait(DEADLINE_S)
        assert running.child.exit_status() == 0


def test_pointer_ends_when_the_gateway_does(stack, alpha, key):
    with gateway_of(stack, alpha.token) as running:
        with connect(f"{running.socket_url}/v1/pointer", proxy=None) as socket:
            socket.send(json.dumps({"key": key}))
            socket.send(json.dumps({"id": 1, "points": [[1, 1]]}))
            socket.recv(timeout=60)
            running.child.signal(signal.SIGTERM)
            assert running.child.wait(DEADLINE_S)
        assert running.child.exit_status() == 0


def test_pointer_says_why_when_the_decoder_goes(stack, alpha, key):
    (stack.folder / "gateway-token").write_text(alpha.token)
    credentials = ("--service-token-file", str(stack.folder / "gateway-token"))
    with (
        running_service(stack, "decoder") as decoder,
        running_gateway(stack.encoder, decoder.address, stack.folder, *credentials) as running,
    ):
        with connect(f"{running.socket_url}/v1/pointer", proxy=None) as socket:
            socket.send(json.dumps({"key": key}))
            socket.send(json.dumps({"id": 1, "points": [[1, 1]]}))
            socket.recv(timeout=60)
            decoder.child.signal(signal.SIGTERM)
            ended = json.loads(socket.recv(timeout=60))
        assert "id" not in ended
        assert ended["error"]["retry_after_ms"] is not None


def test_gateway_speaks_tls_and_takes_up_a_new_certificate(stack, alpha, authority, volume, photo):
    trusting = ssl.create_default_context(cadata=authority.cert_pem.decode())
    with gateway_of(stack, alpha.token, *flags(volume), tls=trusting) as running:
        assert running.call("/v1/images", photo).status == 200
        before = shown(running, trusting)
        volume.put(server_files(authority.issue("the next one"), authority))
        wait_until(lambda: shown(running, trusting) != before, "the new certificate is shown")
        volume.put({"tls.crt": b"not one", "tls.key": b"at all", "ca.crt": b""})
        reloads = "splitsam_certificate_reloads_total"
        wait_until(lambda: metric(running.metrics_url, reloads, result="refused") == 1, "the bad one is refused")
        assert running.call("/livez").status == 200
        assert metric(running.metrics_url, reloads, result="taken") == 1


def test_callers_need_a_certificate_where_that_is_asked_for(stack, alpha, authority, volume, caller_pair, tmp_path):
    (tmp_path / "caller.pem").write_bytes(caller_pair.cert_pem + caller_pair.key_pem)
    with_pair, without = (ssl.create_default_context(cadata=authority.cert_pem.decode()) for _ in range(2))
    with_pair.load_cert_chain(tmp_path / "caller.pem")
    with gateway_of(stack, alpha.token, *flags(volume, mutual=True), tls=with_pair) as running:
        assert running.call("/livez").status == 200
        with pytest.raises(OSError, match=r"(?i)ssl|reset|certificate|closed connection"):
            replace(running, tls=without).call("/livez")


def shown(running, trusting):
    host, _, port = running.url.removeprefix("https://").partition(":")
    with socket.create_connection((host, int(port))) as plain, trusting.wrap_socket(plain, server_hostname=host) as tls:
        return tls.getpeercert(binary_form=True)


def test_stack_starts_a_gateway_beside_the_services(open_stack):
    gateway = RunningGateway(open_stack.gateway, "", open_stack.children["gateway"])
    assert gateway.call("/livez").status == 200
    assert "splitsam gateway" in gateway.call("/docs").body.decode()
