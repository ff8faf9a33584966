"""What labeling tools say to the gateway, as they say it; the tools themselves are in tests/tools."""

import base64
import io
import json

import numpy as np
import pytest
from e2e_support import decode_rle, draw, image_file, metric, redis_of, wait_until
from gateway_support import gateway_of, running_gateway
from PIL import Image
from web_server import WebServer

from splitsam.v1 import decoder_pb2

CONFIG = """<View><Image name="image" value="$image"/>
<BrushLabels name="brush" toName="image"><Label value="Coat"/></BrushLabels>
<PolygonLabels name="polygon" toName="image"><Label value="Cup"/></PolygonLabels>
<KeyPointLabels name="point" toName="image"><Label value="Coat"/><Label value="Cup"/></KeyPointLabels></View>"""
KEY_OF_TASK = "label-studio-user-token"
PNG = {"content-type": "image/png"}


def tasks_of(count):
    """Their images, and Label Studio's own answers."""
    tasks = [{"id": number, "data": {"image": f"/data/upload/{number}.png"}} for number in range(count)]
    pictures = {task["data"]["image"]: (200, PNG, image_file(draw(500 + task["id"], (96, 64)))) for task in tasks}
    return tasks, pictures


@pytest.fixture(scope="module")
def studio():
    """A server in Label Studio's place: a project with three tasks."""
    tasks, pictures = tasks_of(3)
    page = json.dumps({"tasks": tasks, "total": 3}).encode()
    with WebServer({"/api/tasks/": (200, {"content-type": "application/json"}, page), **pictures}) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(stack, alpha, studio, tmp_path_factory):
    token = tmp_path_factory.mktemp("tokens") / "label-studio"
    token.write_text(KEY_OF_TASK)
    arguments = ("--label-studio-url", studio.url, "--label-studio-token-file", str(token))
    with gateway_of(stack, alpha.token, *arguments) as running:
        yield running


def asked(*drawn, task=0, config=CONFIG, **data):
    return {
        "tasks": [{"id": task, "data": data or {"image": f"/data/upload/{task}.png"}}],
        "project": "1.1700000000",
        "label_config": config,
        "params": {"login": None, "password": None, "context": {"result": list(drawn)}},
    }


def keypoint(x, y, label="Coat", **more):
    value = {"x": x, "y": y, "width": 0.4, "keypointlabels": [label]}
    return {"type": "keypointlabels", "original_width": 96, "original_height": 64, "value": value, **more}


def test_label_studio_checks_and_sets_up(gateway, model_id):
    health = gateway.call("/health")
    assert (health.status, health.json["status"]) == (200, "UP")
    version = f"splitsam-{model_id[:8]}"
    project = {
        "project": "",
        "schema": CONFIG,
        "hostname": "http://evil.example",
        "access_token": "theirs",
    }
    assert gateway.call("/setup", {**project, "extra_params": None}).json == {"model_version": version}
    assert gateway.call("/versions").json == {"versions": [version]}
    assert gateway.call("/webhook", {"action": "ANNOTATION_CREATED"}).status == 200


def test_images_of_a_project_are_encoded_ahead_once(gateway, studio, alpha):
    images = "splitsam_gateway_encoded_ahead_total"

    def counted(result):
        return metric(gateway.metrics_url, images, result=result)

    done = counted("encoded") + counted("known")
    gateway.call("/setup", {"project": "1.1700000000", "schema": CONFIG})
    wait_until(lambda: counted("encoded") + counted("known") == done + 3, "all tasks were looked at")
    for number in range(3):
        assert alpha.look_up(image_file(draw(500 + number, (96, 64)))).found
    fetched = len(studio.requests)
    assert {headers["authorization"] for _, headers, _ in studio.requests} == {f"Token {KEY_OF_TASK}"}
    done = counted("known")
    gateway.call("/setup", {"project": "1.1700000000", "schema": CONFIG})
    wait_until(lambda: counted("known") == done + 3, "they are known the second time")
    assert len(studio.requests) == fetched + 1  # the list of tasks


def test_click_becomes_a_brush_and_a_box_polygons(gateway, client):
    [answer] = gateway.call("/predict", asked(keypoint(50, 50, is_positive=True))).json["results"]
    [expected] = client.predict(client.encode(image_file(draw(500, (96, 64)))), points=[(48, 32)])
    [region] = answer["result"]
    assert (region["type"], region["value"]["brushlabels"]) == ("brushlabels", ["Coat"])
    assert answer["score"] == pytest.approx(expected.score)
    assert region["value"]["rle"][:4] == list((96 * 64 * 4).to_bytes(4, "big"))
    box = {
        "type": "rectanglelabels",
        "value": {"x": 10, "y": 10, "width": 70, "height": 70, "rectanglelabels": ["Cup"]},
    }
    [answer] = gateway.call("/predict", asked(box)).json["results"]
    assert {region["type"] for region in answer["result"]} == {"polygonlabels"}
    points = np.array(answer["result"][0]["value"]["points"])
    assert ((points >= 0) & (points <= 100)).all()


def test_image_is_fetched_once_for_many_clicks(gateway, studio):
    place = "/data/upload/1.png"
    gateway.call("/predict", asked(keypoint(20, 20), task=1))
    before = len(studio.headers_of(place))
    for x in (30, 40, 50):
        assert gateway.call("/predict", asked(keypoint(x, 20), task=1)).status == 200
    assert len(studio.headers_of(place)) == before


def test_image_whose_embedding_is_gone_is_fetched_again(open_stack, tmp_path):
    tasks, pictures = tasks_of(2)
    with WebServer(pictures) as server:
        studio = ("--label-studio-url", server.url)
        with running_gateway(open_stack.encoder, open_stack.decoder, tmp_path, *studio) as running:
            for task in (0, 1):  # the decoder has room for one
                assert running.call("/predict", asked(keypoint(20, 20), task=task)).status == 200
            with redis_of(open_stack) as connection:
                connection.flushall()
            assert running.call("/predict", asked(keypoint(20, 20), task=0)).status == 200
    assert [len(server.headers_of(task["data"]["image"])) for task in tasks] == [2, 1]


def test_without_a_prompt_there_is_no_result(gateway):
    without = asked() | {"params": {"context": None}}
    assert gateway.call("/predict", without).json == {"results": []}
    assert gateway.call("/predict", asked({"type": "choices", "value": {"choices": ["a"]}})).json == {"results": []}


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (asked(keypoint(120, 50)), 400, "x is 120 %"),
        (asked(keypoint(50, 50, "Sky")), 400, "'Sky'"),
        (asked(keypoint(50, 50), config="<View/>"), 400, "no Image"),
        (asked(keypoint(50, 50), text="no image"), 400, "no image under 'image'"),
        (asked(keypoint(50, 50), image="/data/upload/none.png"), 424, "status 404"),
        (asked(keypoint(50, 50), image="http://169.254.169.254/latest/meta-data"), 400, "not among the hosts"),
        (asked(keypoint(50, 50), image="//evil.example/x.png"), 400, "not among the hosts"),
        (asked(keypoint(50, 50), image="s3://bucket/x.png"), 400, "http"),
        (asked(keypoint(50, 50), image="http://\ud800/x.png"), 400, "no image under 'image'"),
        (asked(keypoint(50, 50), image="data:image/png;base64,????"), 400, "base64"),
        ({"tasks": "all", "label_config": CONFIG}, 400, "tasks"),
    ],
)
def test_what_cannot_be_done_is_said_to_whoever_labels(gateway, request_, status, said):
    answer = gateway.call("/predict", request_)
    assert (answer.status, answer.json.keys()) == (status, {"error", "reason", "request_id"})
    assert said in answer.json["error"]


def test_setup_of_a_project_without_a_place_for_masks_is_refused(gateway):
    answer = gateway.call("/setup", {"project": "1.2", "schema": '<View><Image name="i" value="$i"/></View>'})
    assert (answer.status, "add BrushLabels" in answer.json["error"]) == (400, True)


def test_personal_token_of_label_studio_is_exchanged(stack, alpha, tmp_path):
    """A personal token is good for asking; what is sent along with requests is made of it."""
    _, pictures = tasks_of(1)
    access = (200, {"content-type": "application/json"}, b'{"access": "for-five-minutes"}')
    (tmp_path / "token").write_text("header.payload.signature")
    with WebServer({"/api/token/refresh/": access, **pictures}) as server:
        arguments = ("--label-studio-url", server.url, "--label-studio-token-file", str(tmp_path / "token"))
        with gateway_of(stack, alpha.token, *arguments, "--remember-images-ms", "0") as running:
            for _ in range(2):
                assert running.call("/predict", asked(keypoint(50, 50))).status == 200
    [(_, headers, body)] = [request for request in server.requests if request[0] == "/api/token/refresh/"]
    assert (body, "authorization" in headers) == (b'{"refresh": "header.payload.signature"}', False)
    sent = [headers["authorization"] for headers in server.headers_of("/data/upload/0.png")]
    assert sent == ["Bearer for-five-minutes"] * 2


def in_base64(content):
    return {"type": "base64", "value": base64.b64encode(content).decode()}


def test_roboflow_finds_an_image_that_was_sent_before(gateway, client):
    image = image_file(draw(510, (96, 64)))
    opened = [gateway.call("/sam2/embed_image", {"image": in_base64(image), "api_key": "any"}) for _ in range(2)]
    assert [answer.headers["x-splitsam-cache-hit"] for answer in opened] == ["false", "true"]
    assert opened[0].json["image_id"] == client.encode(image).key
    assert opened[0].json["time"] > opened[1].json["time"] > 0
    named = gateway.call("/sam2/embed_image", {"image": in_base64(image), "image_id": "mine"})
    assert named.json["image_id"] == "mine"


def test_roboflow_gets_a_mask_for_each_prompt_in_its_formats(gateway, client):
    image = image_file(draw(511, (96, 64)))
    prompts = [
        {"points": [{"x": 40, "y": 30, "positive": True}, {"x": 5, "y": 5, "positive": False}]},
        {"box": {"x": 48, "y": 32, "width": 40, "height": 30}},
        {"box": {"x": 90, "y": 60, "width": 40, "height": 30}},
    ]
    request = {"image": in_base64(image), "prompts": {"prompts": prompts}, "multimask_output": True}
    encoded = client.encode(image)
    expected = [
        client.predict(encoded, points=[(40, 30), (5, 5)], labels=[1, 0], selection="best")[0],
        client.predict(encoded, box=(28, 17, 68, 47), selection="best")[0],
        client.predict(encoded, box=(70, 45, 96, 64), selection="best")[0],
    ]
    found = gateway.call("/sam2/segment_image", request | {"format": "rle"}).json["predictions"]
    assert [prediction["masks"] for prediction in found] == [mask.rle for mask in expected]
    assert [prediction["format"] for prediction in found] == ["rle"] * 3
    assert [prediction["confidence"] for prediction in found] == pytest.approx([mask.score for mask in expected])
    outlines = gateway.call("/sam2/segment_image", request).json["predictions"]
    assert [prediction["format"] for prediction in outlines] == ["polygon"] * 3
    assert all(len(point) == 2 for prediction in outlines for ring in prediction["masks"] for point in ring)
    binary = gateway.call("/sam2/segment_image", request | {"format": "binary"})
    arrays = np.load(io.BytesIO(binary.body))
    assert np.array_equal(arrays["masks"], [mask.to_array() for mask in expected])
    assert arrays["low_res_masks"].shape == (3, 256, 256)
    by_key = {"image_id": encoded.key, "prompts": {"prompts": prompts[:1]}, "format": "rle"}
    assert gateway.call("/sam2/segment_image", by_key).json["predictions"][0]["masks"] == expected[0].rle


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": {}}, "prompts"),
        ({"prompts": {"prompts": [{}]}}, "prompts[0]"),
        ({"image": None}, "image"),
        ({"image": {"type": "base64", "value": "no"}}, "base64"),
        ({"image": {"type": "url", "value": "http://127.0.0.1/x.png"}}, "not among the hosts"),
        ({"image": {"type": "numpy", "value": "gASV"}}, "image.type"),
        ({"format": "tiff"}, "format"),
        ({"prompts": {"prompts": [{"points": [{"x": 5, "y": 999, "positive": True}]}]}}, "64"),
    ],
)
def test_roboflow_is_told_in_its_own_form(gateway, photo, change, said):
    good = {"prompts": {"prompts": [{"points": [{"x": 5, "y": 5, "positive": True}]}]}}
    request = {"image": in_base64(image_file(draw(511, (96, 64)))), **good, **change}
    answer = gateway.call("/sam2/segment_image", request)
    assert (answer.status, answer.json.keys()) == (400, {"message", "error_type"})
    assert said in answer.json["message"]


def test_osam_gets_the_mask_cut_out_at_its_box(gateway, client):
    image = image_file(draw(512, (96, 64)))
    prompt = {"points": [[40, 30], [20, 10], [80, 60]], "point_labels": [1, 2, 3]}
    answer = gateway.call(
        "/api/generate", {"model": "sam:latest", "image": in_base64(image)["value"], "prompt": prompt}
    )
    assert answer.json.keys() == {"model", "image_embedding", "annotations"}
    [found] = answer.json["annotations"]
    [expected] = client.predict(client.encode(image), points=[(40, 30)], labels=[1], box=(20, 10, 80, 60))
    box = found["bounding_box"]
    assert (box["xmin"], box["ymin"], box["xmax"] + 1, box["ymax"] + 1) == expected.box
    pixels = np.zeros((64, 96), bool)
    cut = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["mask"])))) > 0
    pixels[box["ymin"] : box["ymax"] + 1, box["xmin"] : box["xmax"] + 1] = cut
    assert np.array_equal(pixels, expected.to_array())
    centre = gateway.call("/api/generate", {"model": "sam:latest", "image": in_base64(image)["value"]})
    [expected] = client.predict(client.encode(image), points=[(48, 32)])
    assert centre.json["annotations"][0]["score"] == pytest.approx(expected.score)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": {"texts": ["coat"]}}, "texts"),
        ({"prompt": {"points": [[1, 1]], "point_labels": [1, 0]}}, "1 points and 2"),
        ({"prompt": {"points": [[1, 1]], "point_labels": [2]}}, "labelled 3"),
        ({"prompt": {"points": [[1, 1], [2, 2]], "point_labels": [2, 2]}}, "labelled 3"),
        ({"prompt": {"points": [[1, 1]], "point_labels": [7]}}, "point_labels"),
        ({"image": None}, "image"),
        ({"image": "not base64!"}, "base64"),
        ({"model": None}, "model"),
    ],
)
def test_osam_is_told_in_its_own_form(gateway, photo, change, said):
    good = {"points": [[1, 1]], "point_labels": [1]}
    answer = gateway.call(
        "/api/generate", {"model": "sam", "image": in_base64(photo)["value"], "prompt": good, **change}
    )
    assert (answer.status, answer.json.keys()) == (400, {"detail"})
    assert said in answer.json["detail"]


def test_masks_in_coco_form_decode(gateway):
    request = {"image": in_base64(image_file(draw(511, (96, 64)))), "format": "rle"}
    request["prompts"] = {"prompts": [{"box": {"x": 48, "y": 32, "width": 40, "height": 30}}]}
    [prediction] = gateway.call("/sam2/segment_image", request).json["predictions"]
    assert decode_rle(decoder_pb2.RunLengthEncoding(**prediction["masks"])).shape == (64, 96)
