"""The gateway's room for images: who waits for it, for how long, and who need not."""

import base64
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from e2e_support import DEADLINE_S, draw, image_file, wait_until
from gateway_support import gateway_of
from PIL import Image
from web_server import WebServer

UPLOAD_S = 1.0
ONE = ("--max-images-in-work", "1")
CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="brush" toName="image"><Label value="Coat"/></BrushLabels>
<KeyPointLabels name="point" toName="image"><Label value="Coat"/></KeyPointLabels></View>"""
POINT = {"type": "keypointlabels", "value": {"x": 50, "y": 50, "keypointlabels": ["Coat"]}}


def click_on(address):
    """As Label Studio sends it."""
    params = {"context": {"result": [POINT]}}
    return {"tasks": [{"data": {"image": address}}], "label_config": CONFIG, "params": params}


@contextlib.contextmanager
def trickling_upload(gateway):
    """Holds a slot: half of an image, and the other half never comes."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    lines = ("POST /v1/images HTTP/1.1", f"host: {host}:{port}", "content-length: 1000000", "expect: 100-continue")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as slow:
        slow.sendall("\r\n".join([*lines, "", ""]).encode())
        assert slow.recv(65536).startswith(b"HTTP/1.1 100 ")  # it is being read
        slow.sendall(bytes(500_000))
        yield


@pytest.fixture(scope="module")
def impatient(stack, alpha):
    """A gateway with one slot, for which nobody waits long, in front of a Label Studio with two images."""
    pictures = {f"/{i}.png": (200, {"content-type": "image/png"}, image_file(draw(610 + i))) for i in range(2)}
    with (
        WebServer(pictures) as server,
        gateway_of(stack, alpha.token, *ONE, "--image-wait-ms", "200", "--label-studio-url", server.url) as running,
    ):
        yield running


def test_upload_that_waits_for_its_turn_is_not_slow(stack, alpha):
    is_asked, may_answer = threading.Event(), threading.Event()

    def answer_late(_handler):
        is_asked.set()
        may_answer.wait(DEADLINE_S)

    noise = np.random.default_rng(600).integers(0, 256, (400, 400, 3), np.uint8)
    upload = image_file(Image.fromarray(noise))  # more than is read before it is asked for
    patient = ("--upload-timeout-ms", str(round(1000 * UPLOAD_S)), "--image-wait-ms", "60000")
    with (
        WebServer({"/late.png": answer_late}) as server,
        gateway_of(stack, alpha.token, *ONE, *patient, "--label-studio-url", server.url) as gateway,
        ThreadPoolExecutor(3) as threads,
    ):
        first = threads.submit(gateway.call, "/predict", click_on("/late.png"))
        assert is_asked.wait(DEADLINE_S)
        waiting = [threads.submit(gateway.call, "/v1/images", upload) for _ in range(2)]
        time.sleep(2 * UPLOAD_S)  # longer than an upload may take
        assert not any(each.done() for each in waiting)
        may_answer.set()
        assert [each.result().status for each in waiting] == [200, 200]
        assert first.result().status == 424


def test_upload_that_finds_no_room_is_told_when_to_come_back(impatient, photo):
    with trickling_upload(impatient):
        for upload in (photo, bytes(3_000_000)):
            answer = impatient.call("/v1/images", upload)
            assert (answer.status, answer.error["reason"]) == (503, "QUEUE_FULL")
            assert (answer.headers["retry-after"], answer.error["retry_after_ms"]) == ("1", 1000)
        tools = [("/api/generate", "detail"), ("/sam2/embed_image", "message")]
        for route, field in tools:
            answer = impatient.call(route, bytes(3_000_000), content_type="application/json")
            assert (answer.status, "try again" in answer.json[field]) == (503, True)
    wait_until(lambda: impatient.call("/v1/images", photo).status == 200, "the slot is free again")


def test_click_on_an_image_that_is_known_waits_for_no_upload(impatient, photo):
    assert impatient.call("/predict", click_on("/0.png")).status == 200
    prompts = {"prompts": [{"points": [{"x": 50, "y": 50, "positive": True}]}]}
    by_key = {"image_id": impatient.call("/v1/images", photo).json["key"], "prompts": prompts}
    with trickling_upload(impatient):
        assert impatient.call("/predict", click_on("/0.png")).json["results"]
        assert impatient.call("/sam2/segment_image", by_key).json["predictions"]
        full = impatient.call("/predict", click_on("/1.png"))
        assert (full.status, full.json["reason"]) == (503, "QUEUE_FULL")
        image = {"type": "base64", "value": base64.b64encode(photo).decode()}
        assert impatient.call("/sam2/segment_image", {"image": image, "prompts": prompts}).status == 503
        padded = json.dumps(by_key).encode() + bytes(2**20).replace(b"\0", b" ")
        assert impatient.call("/sam2/segment_image", padded).status == 503  # large enough for an image
