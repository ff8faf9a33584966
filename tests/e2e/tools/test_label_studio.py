"""Label Studio itself: its own server calls the gateway, and stores what it answers."""

import io
import json
import time
import urllib.request
import uuid

import numpy as np
import pytest
from e2e_support import DEADLINE_S, draw, image_file, metric, wait_until
from gateway_support import gateway_of
from PIL import Image

from splitsam.client.processes import LOOPBACK, Child, free_ports, stop_all

CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="brush" toName="image"><Label value="Coat"/></BrushLabels>
<PolygonLabels name="polygon" toName="image"><Label value="Cup"/></PolygonLabels>
<KeyPointLabels name="point" toName="image" smart="true"><Label value="Coat"/><Label value="Cup"/></KeyPointLabels>
<RectangleLabels name="box" toName="image" smart="true"><Label value="Coat"/><Label value="Cup"/></RectangleLabels>
</View>"""
TOKEN = uuid.uuid4().hex
START_S = 600.0
SIZE = {"original_width": 320, "original_height": 240, "image_rotation": 0, "to_name": "image"}


class LabelStudio:
    """Its HTTP API, as the user whom it was started with."""

    def __init__(self, url, child):
        self.url, self.child = url, child

    def call(self, path, body=None, kind="application/json"):
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"authorization": f"Token {TOKEN}"} | ({"content-type": kind} if content is not None else {})
        request = urllib.request.Request(self.url + path, content, headers)  # noqa: S310
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=DEADLINE_S) as response:
            return response.read()

    def json(self, path, body=None, **options):
        return json.loads(self.call(path, body, **options))

    def upload(self, project, name, content):
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        return self.json(f"/api/projects/{project}/import", body, kind=f"multipart/form-data; boundary={boundary}")


@pytest.fixture(scope="module")
def studio(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("label-studio")
    (port,) = free_ports(1)
    url = f"http://{LOOPBACK}:{port}"
    environment = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_USERNAME": "annotator@example.com",
        "LABEL_STUDIO_PASSWORD": "a password of some length",
        "LABEL_STUDIO_USER_TOKEN": TOKEN,
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "ML_BLOCK_LOCAL_IP": "false",  # the gateway is on this machine
        "SSRF_PROTECTION_ENABLED": "false",
    }
    options = ["--host", url, "--internal-host", LOOPBACK, "-p", str(port), "--no-browser"]
    command = [program("label-studio", "label-studio"), "start", *options]
    child = Child("Label Studio", command, folder / "log", environment)
    studio = LabelStudio(url, child)

    def is_up():
        child.check_alive("starting")
        time.sleep(1)
        try:
            return studio.call("/health")
        except OSError:
            return False

    try:
        wait_until(is_up, "Label Studio is up, after its migrations", START_S)
        yield studio
    finally:
        stop_all([child], DEADLINE_S)


@pytest.fixture(scope="module")
def gateway(stack, alpha, studio, tmp_path_factory):
    token = tmp_path_factory.mktemp("token") / "label-studio"
    token.write_text(TOKEN)
    arguments = ("--label-studio-url", studio.url, "--label-studio-token-file", str(token))
    with gateway_of(stack, alpha.token, *arguments) as running:
        yield running


@pytest.fixture(scope="module")
def photograph():
    return image_file(draw(603))


@pytest.fixture(scope="module")
def project(studio, photograph):
    created = studio.json("/api/projects", {"title": "Coats and cups", "label_config": CONFIG})
    studio.upload(created["id"], "photo.png", photograph)
    return created["id"]


@pytest.fixture(scope="module")
def task(studio, project):
    [task] = studio.json(f"/api/tasks?project={project}")["tasks"]
    return task["id"]


@pytest.fixture(scope="module")
def backend(studio, gateway, project):
    return studio.json("/api/ml", {"url": gateway.url, "project": project, "title": "splitsam", "is_interactive": True})


def ask(studio, backend, task, *drawn):
    return studio.json(f"/api/ml/{backend['id']}/interactive-annotating", {"task": task, "context": {"result": drawn}})


def keypoint(x, y):
    value = {"x": x, "y": y, "width": 0.5, "keypointlabels": ["Coat"]}
    return {"id": "a", "from_name": "point", "type": "keypointlabels", "is_positive": True, "value": value, **SIZE}


def rectangle(x, y, width, height):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": 0, "rectanglelabels": ["Cup"]}
    return {"id": "b", "from_name": "box", "type": "rectanglelabels", "value": value, **SIZE}


def test_project_is_connected_and_its_images_are_encoded_ahead(studio, backend, gateway, alpha, photograph):
    assert (backend["readable_state"], backend["error_message"]) == ("Connected", None)
    assert backend["model_version"].startswith("splitsam-")
    ahead = "splitsam_gateway_encoded_ahead_total"
    wait_until(lambda: metric(gateway.metrics_url, ahead, result="encoded") >= 1, "the image is encoded ahead")
    assert alpha.look_up(photograph).found


def test_click_becomes_a_brush_that_label_studio_stores_and_exports(studio, backend, project, task, client, photograph):
    answer = ask(studio, backend, task, keypoint(31.25, 50))
    data = answer["data"]
    stored = studio.json("/api/predictions", {"task": task, **data})
    assert stored["result"][0]["value"]["brushlabels"] == ["Coat"]
    studio.json(f"/api/tasks/{task}/annotations", {"result": data["result"]})
    picture = studio.call(f"/api/projects/{project}/export?exportType=BRUSH_TO_PNG")
    exported = np.asarray(Image.open(io.BytesIO(picture))) > 0
    [expected] = client.predict(client.encode(photograph), points=[(100, 120)])
    assert np.array_equal(exported, expected.to_array())


def test_rectangle_becomes_polygons_that_label_studio_stores(studio, backend, task, client, photograph):
    data = ask(studio, backend, task, rectangle(6.25, 12.5, 56.25, 62.5))["data"]
    stored = studio.json("/api/predictions", {"task": task, **data})
    assert {region["type"] for region in stored["result"]} == {"polygonlabels"}
    [expected] = client.predict(client.encode(photograph), box=(20, 30, 200, 180), formats=["polygons"])
    outlines = [polygon.outer for polygon in expected.polygons if len(polygon.outer) > 2]
    assert len(stored["result"]) == len(outlines)
    points = np.array(stored["result"][0]["value"]["points"]) * (3.2, 2.4) - 0.5
    assert np.allclose(points, outlines[0], atol=1e-3)


def test_personal_token_opens_what_label_studio_keeps(studio, stack, alpha, task, tmp_path):
    """Without a token its images are not to be had; a personal one is exchanged for what is sent along."""
    studio.json("/api/jwt/settings", {"api_tokens_enabled": True, "legacy_api_tokens_enabled": True})
    request = {
        "tasks": [studio.json(f"/api/tasks/{task}")],
        "label_config": CONFIG,
        "params": {"context": {"result": [keypoint(31.25, 50)]}},
    }
    (tmp_path / "token").write_text(studio.json("/api/token", {})["token"])
    with_token = ("--label-studio-token-file", str(tmp_path / "token"))
    for options, status in (((), 424), (with_token, 200)):
        with gateway_of(stack, alpha.token, "--label-studio-url", studio.url, *options) as gateway:
            answer = gateway.call("/predict", request)
            assert answer.status == status, answer.body


def test_what_cannot_be_done_reaches_label_studio_as_an_error(studio, backend, task):
    answer = ask(studio, backend, task, keypoint(131, 50))
    assert "400" in answer["errors"][0]


def test_label_studio_is_told_when_a_backend_cannot_hold_masks(studio, gateway):
    config = '<View><Image name="i" value="$image"/><Choices name="c" toName="i"><Choice value="a"/></Choices></View>'
    other = studio.json("/api/projects", {"title": "Choices", "label_config": config})
    with pytest.raises(urllib.error.HTTPError):
        studio.json("/api/ml", {"url": gateway.url, "project": other["id"], "title": "splitsam"})
