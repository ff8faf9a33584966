"""The bill of materials that the Dockerfile has made, by the same command, of the environment that runs the tests."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest
from manifests import DEPLOY, PROGRAMS, ROOT


@pytest.fixture(scope="module")
def bill(tmp_path_factory):
    dockerfile = (DEPLOY / "docker" / "Dockerfile").read_text()
    words = re.search(r"/opt/bill/bin/(cyclonedx-py .*)", dockerfile.replace("\\\n", " "))[1].split()
    path = tmp_path_factory.mktemp("bill") / "sbom.cdx.json"
    here = {"/opt/splitsam/sbom.cdx.json": path, "/opt/splitsam/bin/python": sys.executable}
    command = [PROGRAMS / words[0], *(here.get(word, word) for word in words[1:])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


def test_every_installed_distribution_is_on_the_bill_with_its_version(bill):
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "splitsam"
    listed = {(normal(item["name"]), item["version"]) for item in bill["components"]}
    installed = {(normal(item.name), item.version) for item in metadata.distributions()}
    assert installed - {("splitsam", metadata.version("splitsam"))} <= listed
    assert all(item["purl"].startswith("pkg:pypi/") for item in bill["components"])


def test_what_the_image_is_built_with_is_pinned():
    pinned = {normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "cyclonedx-bom" in pinned
    needed = {
        normal(re.match(r"[\w.-]+", text)[0]) for text in metadata.requires("cyclonedx-python-lib") if ";" not in text
    }
    assert needed <= pinned


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()
