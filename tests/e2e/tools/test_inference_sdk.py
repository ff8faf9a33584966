"""The unmodified inference-sdk against the gateway."""

import json
import subprocess
from pathlib import Path

import pytest
from e2e_support import draw, image_file, metric
from gateway_support import gateway_of

TOKEN = "annotators-token-0123456789"


def test_sdk_gets_masks_and_sends_no_image_to_be_encoded_twice(program, stack, alpha, client, tmp_path):
    image = image_file(draw(601))
    (tmp_path / "photo.png").write_bytes(image)
    (tmp_path / "tokens").write_text(f"annotators {TOKEN}\n")

    def encodes():
        return metric(stack.metrics_url("encoder"), "splitsam_requests_total", method="EncodeImage")

    before = encodes()
    with gateway_of(stack, alpha.token, "--tokens-file", str(tmp_path / "tokens")) as gateway:
        script = Path(__file__).with_name("use_inference_sdk.py")
        command = [program("inference-sdk", "python"), script, gateway.url, TOKEN, tmp_path / "photo.png"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    assert encodes() == before + 1
    encoded = client.encode(image)
    expected = [
        client.predict(encoded, points=[(100, 120), (9, 9)], labels=[1, 0], selection="best")[0],
        client.predict(encoded, box=(20, 30, 200, 180), selection="best")[0],
    ]
    found = answers["rle"]["predictions"]
    assert [each["confidence"] for each in found] == pytest.approx([mask.score for mask in expected], abs=1e-4)
    assert [len(each["masks"]) for each in answers["json"]["predictions"]] == [
        len(client.predict(encoded, **prompt, selection="best", formats=["polygons"])[0].polygons)
        for prompt in ({"points": [(100, 120), (9, 9)], "labels": [1, 0]}, {"box": (20, 30, 200, 180)})
    ]
    status, message = answers["refusal"]
    assert status == 400
    assert "320" in message
