"""osam's own server with the model of examples/osam, and the gateway in its place."""

import base64
from pathlib import Path

import pytest
from e2e_support import DEADLINE_S, draw, image_file, wait_until
from gateway_support import RunningGateway, gateway_of

from splitsam.client.processes import LOOPBACK, Child, free_ports, stop_all


@pytest.fixture
def osam(program, stack, alpha, tmp_path):
    (tmp_path / ".cache" / "osam").mkdir(parents=True)  # its server logs there
    (port,) = free_ports(1)
    script = str(Path(__file__).with_name("osam_server.py"))
    arguments = [str(port), stack.encoder, stack.decoder, alpha.token]
    command = [program("osam", "python"), script, *arguments]
    child = Child("osam", command, tmp_path / "osam.log", {"HOME": str(tmp_path)})
    server = RunningGateway(f"http://{LOOPBACK}:{port}", "", child)

    def is_listening():
        child.check_alive("starting")
        try:
            return server.call("/").status == 200
        except OSError:
            return False

    try:
        wait_until(is_listening, "osam's server listens", 300)
        yield server
    finally:
        stop_all([child], DEADLINE_S)


@pytest.mark.parametrize(
    "prompt",
    [
        {"points": [[100, 120]], "point_labels": [1]},
        {"points": [[100, 120], [9, 9]], "point_labels": [1, 0]},
        {"points": [[20, 30], [200, 180]], "point_labels": [2, 3]},
        None,
    ],
)
def test_osam_with_our_model_and_the_gateway_answer_alike(osam, stack, alpha, prompt):
    image = base64.b64encode(image_file(draw(602))).decode()
    request = {"model": "splitsam", "image": image, "prompt": prompt}
    theirs = osam.call("/api/generate", request)
    assert theirs.status == 200, theirs.body
    with gateway_of(stack, alpha.token) as gateway:
        ours = gateway.call("/api/generate", request)
    assert ours.json.keys() == theirs.json.keys()
    for one, other in zip(ours.json["annotations"], theirs.json["annotations"], strict=True):
        assert one["bounding_box"] == other["bounding_box"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one.keys() == other.keys()
    embedding = theirs.json["image_embedding"]
    again = osam.call("/api/generate", {"model": "splitsam", "image_embedding": embedding, "prompt": prompt})
    assert again.json["annotations"] == theirs.json["annotations"]


def test_what_osam_refuses_the_gateway_does(osam, stack, alpha):
    image = base64.b64encode(image_file(draw(602))).decode()
    with gateway_of(stack, alpha.token) as gateway:
        for prompt in ({"texts": ["a coat"]}, {"points": [[1, 1]], "point_labels": [2]}):
            request = {"model": "splitsam", "image": image, "prompt": prompt}
            for server in (osam, gateway):
                answer = server.call("/api/generate", request)
                assert (answer.status, answer.json.keys()) == (400, {"detail"})
