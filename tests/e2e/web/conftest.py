"""The labeling page in a headless Chromium, in front of services with the shipped vit_t; `make test-page`."""

from pathlib import Path

import pytest
from e2e_support import draw, image_file

from splitsam.client import Client
from splitsam.client.overlay import open_upright
from splitsam.client.stack import Stack, StackSettings
from splitsam.client.up import DEMO_PHOTO


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.page)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def browser():
    """How to drive one; skips where there is none."""
    reason = "there is no playwright to drive a browser with: make test-page installs it"
    pytest.importorskip("playwright", reason=reason)
    from bench.page import browser

    if browser.CHROMIUM is None:
        pytest.skip(browser.NO_CHROMIUM)
    return browser


@pytest.fixture(scope="session")
def page_stack(browser, device_args, tmp_path_factory):
    """Its decoder keeps one embedding in memory."""
    settings = StackSettings(
        encoder_args=(*device_args, "--max-queue-ms", "120000"),
        decoder_args=(*device_args, "--memory-bytes", str(4 * 4096 * 640), "--max-queue-ms", "120000"),
        gateway_port=0,
        run_folder=tmp_path_factory.mktemp("page-stack"),
        stop_timeout_s=30.0,
    )
    with Stack(settings.on_free_ports()) as running:
        yield running


@pytest.fixture(scope="session")
def services(page_stack):
    """What the masks on the page are held against."""
    with Client(page_stack.encoder, page_stack.decoder, encode_timeout_s=60, predict_timeout_s=60) as client:
        yield client


@pytest.fixture(scope="session")
def photo_size():
    return open_upright(DEMO_PHOTO).size


@pytest.fixture
def opened(browser, page_stack, photo_size):
    """The page with the demo's photo; its scripts must not have complained by the end."""
    with browser.open_page(page_stack.gateway) as page:
        page.open(DEMO_PHOTO, photo_size)
        yield page
        page.check_problems()


@pytest.fixture
def other_image(tmp_path):
    """A file that is an image, and nobody has seen yet."""
    path = tmp_path / "other.png"
    path.write_bytes(image_file(draw(int.from_bytes(str(tmp_path).encode()) % 2**31)))
    return path
