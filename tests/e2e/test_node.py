"""A second language: @grpc/grpc-js with nothing but the .proto files."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from e2e_support import decode_rle, draw, image_file, point, prompt

HERE = Path(__file__).parent
PROTOS = HERE.parents[1] / "protos"
OFFLINE = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH")


def run(command, folder, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The Node files with their dependencies as the lock file pins them, a photo and the .proto files."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: no second language to call the services from")
    folder = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(HERE / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copytree(PROTOS / "splitsam", folder / "protos" / "splitsam", ignore=shutil.ignore_patterns("*.py*"))
    (folder / "photo.jpg").write_bytes(image_file(draw(700, (640, 480)), "JPEG"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode and any(sign in installed.stderr for sign in OFFLINE):
        pytest.skip("npm cannot reach its registry: no dependencies for the Node client")
    assert installed.returncode == 0, installed.stderr
    return folder


def test_lock_file_pins_what_it_names_and_no_registry():
    package, lock = (json.loads((HERE / "node" / name).read_text()) for name in ("package.json", "package-lock.json"))
    packages = lock["packages"]
    for name, version in package["dependencies"].items():
        assert packages[f"node_modules/{name}"]["version"] == version
    assert not any("resolved" in entry for entry in packages.values())
    assert all(entry["integrity"].startswith("sha512-") for path, entry in packages.items() if path)


def test_node_encodes_clicks_and_reads_an_error(alpha, stack, folder, photo, key):
    (folder / "photo.png").write_bytes(photo)
    command = ["node", "click.mjs", stack.encoder, stack.decoder, "protos", "photo.png", "100", "120"]
    result = run(command, folder, SPLITSAM_TOKEN=alpha.token)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    [answer] = alpha.click(key, prompt(point(100, 120)))
    [mask] = answer.masks
    assert printed["image"] == {"width": 320, "height": 240}
    assert printed["cacheHit"]
    assert printed["index"] == mask.mask_index
    assert printed["score"] == pytest.approx(mask.predicted_iou, abs=1e-6)
    assert printed["area"] == mask.area_px == decode_rle(mask.rle).sum()
    assert printed["box"] == {side: getattr(mask.box, side) for side in ("x0", "y0", "x1", "y1")}
    assert printed["rle"] == {"size": [240, 320], "bytes": len(mask.rle.counts)}
    assert (printed["error"]["code"], printed["error"]["name"]) == (3, "INVALID_ARGUMENT")
    assert printed["error"]["details"].startswith("images[0].prompts[0].points[0].label: ")


def test_example_of_the_readme_prints_a_mask(open_stack, folder):
    text = (folder / "readme_example.mjs").read_text()
    for default, actual in (("127.0.0.1:50051", open_stack.encoder), ("127.0.0.1:50052", open_stack.decoder)):
        assert default in text
        text = text.replace(default, actual)
    (folder / "example.mjs").write_text(text)
    result = run(["node", "example.mjs"], folder)
    assert result.returncode == 0, result.stderr
    assert "predictedIou: " in result.stdout
    assert "size: [ 480, 640 ]" in result.stdout
