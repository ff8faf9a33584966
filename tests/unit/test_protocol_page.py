"""What protos/PROTOCOL.md tells authors of clients, held against the code."""

import inspect
import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco

from splitsam.client.bulk import BulkEncode
from splitsam.client.retry import RetryPolicy
from splitsam.common import errors, interceptor
from splitsam.common.keys import EncodingVersion
from splitsam.common.rle import decode_rle
from splitsam.common.status import ERROR_DOMAIN
from splitsam.decoder_service import predictor
from splitsam.decoder_service.masks import encode_rle
from splitsam.decoder_service.settings import DecoderSettings
from splitsam.encoder_service.settings import EncoderSettings

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "protos/PROTOCOL.md").read_text()


def table(title):
    """Rows of a section's table, cells without backticks."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows[2:]]


def all_reasons():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ServiceError)]
    return {kind.reason: kind.code.name for kind in kinds}


def test_every_reason_is_in_the_table_with_its_code_and_what_to_do():
    rows = table("Errors")
    assert {reason: code for reason, code, _ in rows} == all_reasons()
    assert len(rows) == len(all_reasons())
    assert all(advice for *_, advice in rows)
    assert f"domain `{ERROR_DOMAIN}`" in PAGE


def test_the_readme_names_the_same_reasons():
    readme = (ROOT / "README.md").read_text()
    assert {reason for reason in all_reasons() if f"`{reason}`" not in readme} == set()


@pytest.fixture(scope="module")
def example():
    return json.loads(re.search(r"<!-- example -->\n```json\n(.*?)```", PAGE, re.S)[1])


def test_the_example_of_run_lengths_is_right_step_by_step(example):
    mask = np.array([[int(pixel) for pixel in row] for row in example["rows"]], np.uint8)
    assert list(mask.shape) == example["size"]
    pixels = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *ends, len(pixels)]).tolist()
    assert pixels[0] == 0
    assert runs == example["runs"]
    differences = runs[:3] + [run - before for before, run in zip(runs[1:], runs[3:], strict=False)]
    assert differences == example["differences"]
    assert encode_rle(mask) == example["counts"]
    assert coco.encode(np.asfortranarray(mask))["counts"].decode() == example["counts"]
    assert (decode_rle(example["size"], example["counts"]) == mask).all()
    written = "".join(written_as(number) for number in differences)
    assert written == example["counts"]
    assert {number: written_as(int(number)) for number in example["numbers"]} == example["numbers"]


def written_as(number):
    """The page's rule: groups of five bits, the lowest first, as few as keep the sign."""
    groups = 1
    while not -(1 << 5 * groups - 1) <= number < 1 << 5 * groups - 1:
        groups += 1
    bits = [number >> 5 * place & 31 for place in range(groups)]
    return "".join(chr(48 + group + 32 * (place < groups - 1)) for place, group in enumerate(bits))


def test_figures_of_the_page_are_those_of_the_code():
    decoder, encoder = DecoderSettings(), EncoderSettings()
    assert f"`max_reply_bytes`, {decoder.max_reply_bytes:,} by default" in PAGE
    assert f"`PredictMasks` of up to {predictor._CLICK_PROMPTS} prompts" in PAGE
    assert f"`stream_window` images ({encoder.stream_window})" in PAGE
    assert f"({decoder.min_ping_interval_ms // 1000} s)" in PAGE
    assert f"({ {5: 'five'}[RetryPolicy().attempts] } calls in all)" in PAGE
    assert decoder.max_message_bytes - decoder.max_image_bytes == 64 * 2**10
    assert (decoder.refinement_ttl_s, encoder.embedding_ttl_s) == (600, 86_400)
    assert (errors.bounded_retry_s(0), errors.bounded_retry_s(1e9)) == (0.05, 30.0)
    assert "half as many" in PAGE
    assert "half as many" in " ".join(BulkEncode.__doc__.split())
    assert interceptor._read_request_id({"x-request-id": "x" * 65}) == "x" * 64
    assert interceptor._read_request_id({"x-request-id": "a b"}) != "a b"


def test_all_that_decides_a_key_is_named():
    section = PAGE.split("- **What changes it**")[1].split("- **It expires**")[0]
    assert {field.name for field in fields(EncodingVersion) if f"`{field.name}`" not in section} == set()


def test_settings_and_fields_that_the_page_names_exist():
    protos = "".join(path.read_text() for path in (ROOT / "protos/splitsam/v1").glob("*.proto"))
    known = {*DecoderSettings.model_fields, *EncoderSettings.model_fields, *re.findall(r"\w+", protos)}
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", PAGE))
    assert named - known == set()
    assert named


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "protos" / target).exists(), target
