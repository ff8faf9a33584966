"""The gateway's JSON API and its pointer, in front of real services."""

import base64
import hashlib
import io
import json
import socket
import urllib.request
from functools import partial

import numpy as np
import pytest
from e2e_support import decode_rle, draw, image_file, metric, wait_until
from gateway_support import gateway_of
from PIL import Image, ImageDraw
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from splitsam.v1 import decoder_pb2


@pytest.fixture(scope="module")
def gateway(stack, alpha):
    with gateway_of(stack, alpha.token, "--max-image-bytes", "2000000") as running:
        yield running


@pytest.fixture(scope="module")
def opened(gateway, photo):
    return gateway.call("/v1/images", photo).json


def pixels(rle):
    return decode_rle(decoder_pb2.RunLengthEncoding(**rle))


def follow(gateway, **options):
    return connect(f"{gateway.socket_url}/v1/pointer", proxy=None, **options)


def test_image_is_encoded_once_whoever_opens_it(gateway, stack, alpha):
    image = image_file(draw(71))
    first, second = (gateway.call("/v1/images", image) for _ in range(2))
    assert first.status == second.status == 200
    assert (first.json["cache_hit"], second.json["cache_hit"]) == (False, True)
    assert (first.json["width"], first.json["height"]) == (320, 240)
    assert first.json["stored"]
    assert first.json["timings"]["model"] > 0
    assert alpha.look_up(image).embedding.embedding_key == first.json["key"] == second.json["key"]


def test_image_is_found_by_its_digest_without_being_sent(gateway):
    image = image_file(draw(72))
    digest = hashlib.sha256(image).hexdigest()
    missing = gateway.call(f"/v1/images/{digest}")
    assert (missing.status, missing.error["reason"]) == (404, "NOT_ENCODED")
    opened = gateway.call("/v1/images", image).json
    found = gateway.call(f"/v1/images/{digest}").json
    assert (found["key"], found["width"], found["height"]) == (opened["key"], 320, 240)
    assert found["cache_hit"]
    for name in ("ABC", digest.upper(), digest + "00"):
        assert gateway.call(f"/v1/images/{name}").error["fields"][0]["field"] == "sha256"


def test_masks_are_those_that_the_client_gets(gateway, client, opened):
    prompt = {"points": [[100, 120], [9, 9]], "labels": [1, 0], "box": [20, 30, 200, 180]}
    asked = {"key": opened["key"], **prompt, "selection": "all", "formats": ["rle", "png", "polygons"]}
    answer = gateway.call("/v1/masks", asked)
    assert answer.status == 200
    expected = client.predict(opened["key"], **prompt, selection="all", formats=["rle", "png", "polygons"])
    assert [mask["index"] for mask in answer.json["masks"]] == [1, 2, 3]
    assert (answer.json["width"], answer.json["height"]) == (320, 240)
    for mask, other in zip(answer.json["masks"], expected, strict=True):
        assert (mask["area"], mask["box"], mask["rle"]) == (other.area_px, list(other.box), other.rle)
        assert mask["score"] == pytest.approx(other.score, abs=1e-5)
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"])))) > 127
        assert np.array_equal(picture, pixels(mask["rle"]))
        assert [polygon["outer"] for polygon in mask["polygons"]] == [
            polygon.outer.ravel().tolist() for polygon in other.polygons
        ]
        drawn = Image.new("1", (320, 240))
        for polygon in mask["polygons"]:
            ImageDraw.Draw(drawn).polygon(polygon["outer"], fill=1, outline=1)
        assert (np.asarray(drawn) & picture).sum() > 0.9 * picture.sum()


def everything(answer):
    return [json.loads(line) for line in answer.body.decode().splitlines()]


def test_everything_is_what_the_client_finds_and_says_that_it_is_all(gateway, client, opened):
    grid = {"points_per_side": 3, "predicted_iou_threshold": 0.0, "stability_score_threshold": 0.0}
    answer = gateway.call("/v1/everything", {"key": opened["key"], **grid})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    *masks, end = everything(answer)
    expected = list(client.generate(opened["key"], **grid))
    assert end["done"]["masks"] == len(masks) == len(expected) > 0
    assert [(mask["rle"]["counts"], mask["point"]) for mask in masks] == [
        (each.mask.rle["counts"], list(each.point)) for each in expected
    ]
    polygons = gateway.call("/v1/everything", {"key": opened["key"], "formats": ["polygons"], **grid})
    assert all(set(mask) >= {"polygons", "point"} and "rle" not in mask for mask in everything(polygons)[:-1])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"points_per_side": 33}, "points_per_side"),
        ({"points_per_side": 0}, "points_per_side"),
        ({"predicted_iou_threshold": 1.5}, "predicted_iou_threshold"),
        ({"mask_threshold": 101}, "mask_threshold"),
        ({"key": "12"}, "key"),
        ({"crop_layers": 1}, "crop_layers"),
    ],
)
def test_everything_with_a_bad_field_is_refused_with_a_status(gateway, opened, change, field):
    answer = gateway.call("/v1/everything", {"key": opened["key"], **change})
    assert answer.status in (400, 422)
    assert field in answer.error["fields"][0]["field"]


def test_everything_in_an_image_that_is_gone_is_not_found(gateway):
    assert gateway.call("/v1/everything", {"key": "ab" * 32}).error["reason"] == "EMBEDDING_EXPIRED"


def test_a_search_ends_when_its_caller_hangs_up(gateway, stack, opened):
    body = json.dumps({"key": opened["key"], "points_per_side": 32, "predicted_iou_threshold": 0.0}).encode()
    head = f"POST /v1/everything HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    host, port = gateway.url.removeprefix("http://").split(":")
    searches = partial(metric, stack.metrics_url("decoder"), "splitsam_requests_in_progress")
    with socket.create_connection((host, int(port)), timeout=30) as caller:
        caller.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        wait_until(lambda: searches() == 1, "the search has begun")
    wait_until(lambda: searches() == 0, "the search has ended")
    assert metric(gateway.metrics_url, "splitsam_gateway_requests_in_progress") == 0


def test_formats_that_were_not_asked_for_are_left_out(gateway, opened):
    [mask] = gateway.call("/v1/masks", {"key": opened["key"], "points": [[100, 120]]}).json["masks"]
    assert mask.keys() == {"index", "score", "stability", "area", "box", "rle"}


def test_mask_is_refined_by_its_token(gateway, client, opened):
    point = {"key": opened["key"], "points": [[100, 120]]}
    [first] = gateway.call("/v1/masks", point | {"refinement_tokens": True}).json["masks"]
    clicks = {"points": [[100, 120], [30, 30]], "labels": [1, 0]}
    refined = gateway.call("/v1/masks", point | clicks | {"refinement_token": first["refinement_token"]})
    [expected] = client.predict(opened["key"], **clicks, mask_input=first["refinement_token"])
    assert refined.json["masks"][0]["rle"] == expected.rle
    lost = {"key": opened["key"], "refinement_token": "0" * 32}
    answer = gateway.call("/v1/masks", lost)
    assert (answer.status, answer.error["reason"]) == (404, "REFINEMENT_EXPIRED")
    [without] = gateway.call("/v1/masks", point).json["masks"]
    assert gateway.call("/v1/masks", lost | point).json["masks"][0]["rle"] == without["rle"]


def test_limits_and_model_are_told(gateway, model_id):
    info = gateway.call("/v1/info").json
    assert [service["model_id"] for service in info["services"]] == [model_id] * 2
    assert info["max_image_bytes"] == 2_000_000
    assert "address" not in json.dumps(info)


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"points": [[100, 9999]]}, "points[0].y", "240"),
        ({"points": [[-1, 5]]}, "points[0].x", "320"),
        ({"points": []}, "points", "click at least once"),
        ({"labels": [1, 0]}, "labels", "1 points"),
        ({"labels": [2]}, "labels[0]", ""),
        ({"points": [["left", 3]]}, "points[0][0]", "number"),
        ({"points": [[1, 2, 3]]}, "points[0]", ""),
        ({"box": [50, 50, 40, 60]}, "box.x0", ""),
        ({"box": [1, 2, 3]}, "box[3]", "required"),
        ({"formats": []}, "formats", ""),
        ({"formats": ["tiff"]}, "formats[0]", ""),
        ({"polygon_tolerance_px": 1000, "formats": ["polygons"]}, "polygon_tolerance_px", "100"),
        ({"key": "short"}, "key", "64"),
        ({"clicks": 3}, "clicks", "not known"),
    ],
)
def test_bad_field_is_named(gateway, opened, change, field, said):
    answer = gateway.call("/v1/masks", {"key": opened["key"], "points": [[100, 120]], **change})
    assert (answer.status, answer.error["reason"]) == (400, "INVALID_ARGUMENT")
    assert field in [each["field"] for each in answer.error["fields"]]
    assert said in answer.error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"key": NaN}', b"\xff\xfe", b"null"])
def test_what_is_no_message_is_refused(gateway, body):
    answer = gateway.call("/v1/masks", body, content_type="application/json")
    assert (answer.status, answer.error["reason"]) == (400, "INVALID_ARGUMENT")


def test_number_that_is_none_is_refused(gateway, opened):
    body = b'{"key": "%s", "points": [[NaN, Infinity]]}' % opened["key"].encode()
    assert gateway.call("/v1/masks", body, content_type="application/json").error["reason"] == "INVALID_ARGUMENT"


def test_unknown_image_is_to_be_opened_again(gateway):
    answer = gateway.call("/v1/masks", {"key": "ab" * 32, "points": [[1, 1]]})
    assert (answer.status, answer.error["reason"]) == (404, "EMBEDDING_EXPIRED")
    assert "open it again" in answer.error["message"]


def test_key_of_another_tenant_is_unknown(gateway, beta):
    key = beta.encode(image_file(draw(710))).embedding.embedding_key
    answer = gateway.call("/v1/masks", {"key": key, "points": [[1, 1]]})
    assert answer.error["reason"] == "EMBEDDING_EXPIRED"


@pytest.mark.parametrize(("body", "said"), [(b"", "empty"), (b"GIF89a" + bytes(50), "JPEG"), (b"hello", "JPEG")])
def test_file_that_is_no_image_is_refused(gateway, body, said):
    answer = gateway.call("/v1/images", body)
    assert (answer.status, answer.error["fields"][0]["field"]) == (400, "image")
    assert said in answer.error["message"]


def test_upload_over_the_limit_is_refused(gateway):
    answer = gateway.call("/v1/images", bytes(2_000_001))
    assert (answer.status, answer.error["reason"]) == (413, "TOO_LARGE")
    assert "2000000" in answer.error["message"]


def test_upload_of_unknown_size_is_cut_off(gateway):
    request = urllib.request.Request(gateway.url + "/v1/images", iter([bytes(2**20)] * 3), method="POST")  # noqa: S310
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(request, timeout=60)
    with caught.value:
        assert caught.value.code == 413


def test_unknown_route_and_method_are_said(gateway):
    assert (gateway.call("/v2/images").status, gateway.call("/v1/masks").status) == (404, 405)
    assert gateway.call("/v2/images").error["reason"] == "NO_SUCH_ROUTE"
    assert gateway.call("/v1/masks").error["reason"] == "METHOD_NOT_ALLOWED"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GARBAGE\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n", 400),
        (b"GET /%ff%00%0a12:00:00%20forged HTTP/1.1\r\n", 404),
        (b"GET /v1/images/%00 HTTP/1.1\r\n", 400),
        (b"GET /livez HTTP/1.1\r\norigin: http://[::1\r\n", 403),
        (b"GET /livez HTTP/1.1\r\norigin: \xff\r\n", 403),
        (b"GET /v1/info HTTP/1.1\r\nauthorization: Basic \xff\xff\r\n", 200),
        (b"GET /v1/info?api_key=%ff HTTP/1.1\r\n", 200),
        (b"POST /v1/images HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n", 413),
        (b"POST /v1/masks HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: -5\r\n", 400),
    ],
)
def test_odd_request_is_answered_and_is_no_defect(gateway, request_, status):
    """A defect would leave its trace in the log, which is looked at when the gateway stops."""
    host, _, port = gateway.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as caller:
        caller.sendall(request_ + f"host: {host}:{port}\r\n\r\n".encode())
        answer = caller.recv(65536)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert "\n12:00:00 forged" not in gateway.child.log_path.read_text()


def test_request_id_is_the_callers_where_it_may_be(gateway, stack):
    assert gateway.call("/livez", x_request_id="click-7").headers["x-request-id"] == "click-7"
    assert gateway.call("/livez", x_request_id="two words").headers["x-request-id"] != "two words"
    answer = gateway.call("/v1/masks", {"key": "ab" * 32, "points": [[1, 1]]}, x_request_id="click-8")
    assert answer.error["request_id"] == "click-8"
    for child in (gateway.child, stack.children["decoder"]):
        wait_until(lambda log=child.log_path: "request_id=click-8" in log.read_text(), "the log names it")


def test_documents_describe_every_route_and_load_nothing(gateway):
    document = gateway.call("/openapi.json").json
    routes = {"/v1/images", "/v1/masks", "/v1/info", "/setup", "/predict", "/sam2/segment_image", "/api/generate"}
    assert routes <= document["paths"].keys()
    fields = document["components"]["schemas"]["MasksRequest"]["properties"]
    assert {"key", "points", "labels", "box", "refinement_token", "selection", "formats"} <= fields.keys()
    page = gateway.call("/docs")
    text = page.body.decode()
    assert all(f"{route}</code>" in text for route in routes)
    assert "superseded_by" in text
    assert not any(word in text for word in ("<script", "src=", "http://", "https://", "@import", "url("))
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_page_of_another_site_may_not_call(gateway, photo, opened):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        answer = gateway.call("/v1/images", photo, origin=origin)
        assert (answer.status, answer.error["reason"]) == (403, "ORIGIN_NOT_ALLOWED")
        with pytest.raises(InvalidStatus), follow(gateway, origin=origin):
            pass
    assert gateway.call("/v1/images", photo, origin=gateway.url).status == 200
    with follow(gateway, origin=gateway.url) as hover:
        hover.send(json.dumps({"key": opened["key"]}))


def test_name_that_was_made_to_lead_here_may_not_call(gateway, photo):
    """A page whose own name an attacker lets stand for 127.0.0.1, so that its browser sees no other site."""
    for name, status in (("evil.example:80", 403), ("localhost:80", 200)):
        assert gateway.call("/v1/images", photo, origin=f"http://{name}", host=name).status == status


def test_listed_page_of_another_site_may_call(stack, alpha, photo):
    page = "https://tool.example"
    with gateway_of(stack, alpha.token, "--allowed-origins", f"{page},https://other.example") as listing:
        answer = listing.call("/v1/images", photo, origin=page)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, page)
        assert listing.call("/v1/images", photo, origin="https://third.example").status == 403


def test_pointer_answers_every_position_and_the_newest_wins(gateway, client, opened):
    with follow(gateway) as hover:
        hover.send(json.dumps({"key": opened["key"], "formats": ["rle"]}))
        for number in range(30):
            hover.send(json.dumps({"id": number, "points": [[10 * number % 320, 50]]}))
        answers = [json.loads(hover.recv(timeout=60)) for _ in range(30)]
    assert sorted(answer["id"] for answer in answers) == list(range(30))
    masks = {answer["id"]: answer["masks"] for answer in answers if "masks" in answer}
    superseded = {answer["id"]: answer["superseded_by"] for answer in answers if "superseded_by" in answer}
    assert masks.keys() | superseded.keys() == set(range(30))
    assert all(newer is None or number < newer < 30 for number, newer in superseded.items())
    [expected] = client.predict(opened["key"], points=[(290, 50)])
    assert masks[29][0]["rle"] == expected.rle
    assert metric(gateway.metrics_url, "splitsam_gateway_positions_total", result="answered") >= 1


def test_bad_position_is_answered_and_the_pointer_goes_on(gateway, opened):
    with follow(gateway) as hover:
        hover.send(json.dumps({"key": opened["key"]}))
        for bad, number in (({"points": [[9999, 1]]}, 1), ({"points": []}, 2), ({"points": [["x", 1]]}, None)):
            hover.send(json.dumps({"id": number or 3, **bad}))
            answer = json.loads(hover.recv(timeout=60))
            assert (answer["id"], answer["error"]["reason"]) == (number, "INVALID_ARGUMENT")
        hover.send("{")
        assert json.loads(hover.recv(timeout=60))["error"]["message"] == "request: is not JSON"
        hover.send(json.dumps({"id": 4, "points": [[100, 120]]}))
        assert json.loads(hover.recv(timeout=60))["masks"]


def test_bad_start_ends_the_pointer_with_a_reason(gateway):
    for start in ({}, {"key": "x", "colour": 1}, []):
        with follow(gateway) as hover:
            hover.send(json.dumps(start))
            assert json.loads(hover.recv(timeout=60))["error"]["reason"] == "INVALID_ARGUMENT"
            with pytest.raises(ConnectionClosedError):
                hover.recv(timeout=60)


def test_pointer_on_an_unknown_image_says_so_at_each_position(gateway):
    with follow(gateway) as hover:
        hover.send(json.dumps({"key": hashlib.sha256(b"unknown").hexdigest()}))
        hover.send(json.dumps({"id": 7, "points": [[1, 1]]}))
        answer = json.loads(hover.recv(timeout=60))
    assert (answer["id"], answer["error"]["reason"]) == (7, "EMBEDDING_EXPIRED")


def test_requests_are_counted_by_route(gateway, opened):
    before = metric(gateway.metrics_url, "splitsam_gateway_requests_total", route="/v1/masks", status="200")
    gateway.call("/v1/masks", {"key": opened["key"], "points": [[1, 1]]})
    gateway.call("/some/path/that/nobody/knows")
    after = metric(gateway.metrics_url, "splitsam_gateway_requests_total", route="/v1/masks", status="200")
    assert after == before + 1
    assert metric(gateway.metrics_url, "splitsam_gateway_requests_total", route="unknown", status="404") >= 1
    assert metric(gateway.metrics_url, "splitsam_gateway_requests_total", route="/some/path/that/nobody/knows") == 0
