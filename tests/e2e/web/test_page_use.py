"""The page by keyboard, at any zoom, for everybody; and when something is missing or away."""

import json

import numpy as np
import pytest
from e2e_support import redis_of
from gateway_support import running_gateway

from splitsam.client.up import DEMO_PHOTO


def test_object_is_labeled_with_keys_alone(opened):
    page = opened.page
    asked = []
    page.on("request", lambda sent: sent.url.endswith("/v1/masks") and asked.append(json.loads(sent.post_data)))
    page.focus("#marks")
    for key in ("Shift+ArrowLeft", "Shift+ArrowUp", "ArrowRight", "Space"):
        page.keyboard.press(key)
    opened.wait_painted(1)
    scale = page.locator("#marks").bounding_box()["width"] / 1024
    expected = np.array((1024, 683)) / 2 + np.array((-22, -24)) / scale
    assert np.abs(np.array(asked[0]["points"][0]) - expected).max() < 0.1
    page.keyboard.press("x")
    opened.wait_painted(2)
    assert asked[1]["labels"] == [1, 0]
    page.keyboard.press("Enter")
    for key in ("b", "Shift+ArrowRight", "Shift+ArrowDown", "b"):
        page.keyboard.press(key)
    opened.wait_painted(3)
    x0, y0, x1, y1 = asked[2]["box"]
    assert (x1 - x0, y1 - y0) == pytest.approx((24 / scale, 24 / scale), abs=0.1)
    assert page.locator("#objects li").count() == 2
    page.keyboard.press(",")
    assert page.locator("#objects [aria-current=true]").inner_text() == "1. object"
    page.keyboard.press("Delete")
    assert page.locator("#objects li").count() == 1
    page.keyboard.press("Control+z")
    assert page.locator("#objects li").count() == 2


def test_every_control_is_reached_by_tab_and_seen_to_be(opened):
    reached = set()
    for _ in range(40):
        opened.page.keyboard.press("Tab")
        reached.add(opened.page.evaluate("() => document.activeElement.id || document.activeElement.type"))
    assert {"open", "zoom-in", "fit", "preview", "help", "marks", "radio", "new-label"} <= reached
    opened.page.focus("#open")
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_keys_do_nothing_while_somebody_types(opened):
    opened.click(131, 410)
    opened.page.focus("#new-label")
    opened.page.keyboard.type("n1, zebra")
    assert opened.page.input_value("#new-label") == "n1, zebra"
    assert opened.page.locator("#objects [aria-current=true]").count() == 1


def test_help_names_the_keys_and_closes(opened):
    opened.page.keyboard.press("?")
    dialog = opened.page.locator("#help-dialog")
    assert dialog.is_visible()
    assert "Left click" in dialog.inner_text()
    opened.page.keyboard.press("Escape")
    assert dialog.is_hidden()
    opened.page.click("#help")
    assert dialog.is_visible()


def test_click_goes_where_the_picture_was_moved_to(opened):
    asked = []
    opened.page.on("request", lambda sent: sent.url.endswith("/v1/masks") and asked.append(json.loads(sent.post_data)))
    x, y = opened.place(131, 410)
    opened.hover(131, 410)
    opened.page.mouse.wheel(0, -1000)
    opened.page.keyboard.down("Shift")
    opened.page.mouse.down()
    opened.page.mouse.move(x + 60, y - 40, steps=5)
    opened.page.mouse.up()
    opened.page.keyboard.up("Shift")
    opened.page.mouse.click(x + 60, y - 40)
    opened.wait_painted(1)
    assert asked[0]["points"] == [pytest.approx((131, 410), abs=0.5)]
    opened.page.keyboard.press("n")
    opened.page.keyboard.press("0")
    opened.click(840, 399)
    assert asked[1]["points"] == [pytest.approx((840, 399), abs=1)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_for_everybody(browser, page_stack, photo_size, scheme):
    """By the rules of axe: names and roles of everything, contrast, headings, focus."""
    from axe_playwright_python.sync_playwright import Axe

    with browser.open_page(page_stack.gateway, color_scheme=scheme) as page:
        found = [Axe().run(page.page)]
        page.open(DEMO_PHOTO, photo_size)
        page.label("hen")
        page.click(131, 410)
        found.append(Axe().run(page.page))
        page.page.keyboard.press("?")
        found.append(Axe().run(page.page))
    for results in found:
        assert results.violations_count == 0, results.generate_report()


def test_gateway_that_is_away_is_said_and_asked_again(opened):
    opened.page.context.set_offline(True)
    opened.page.mouse.click(*opened.place(131, 410))
    opened.says("The gateway cannot be reached", "#problem")
    opened.page.context.set_offline(False)
    opened.page.click("#retry")
    opened.wait_painted(1)
    assert opened.page.inner_text("#problem") == ""


def test_image_that_was_forgotten_is_opened_again(opened, page_stack, services, other_image):
    opened.click(131, 410)
    said = opened.status.inner_text()
    with redis_of(page_stack) as connection:
        connection.flushall()
    services.predict(services.encode(other_image), points=[(5, 5)])  # the decoder has room for one
    opened.page.keyboard.press("n")
    opened.click(131, 410)
    assert opened.status.inner_text() == said.replace("Object 1", "Object 2")


def test_token_is_asked_for_until_it_is_known(browser, page_stack, photo_size, tmp_path):
    (tmp_path / "tokens").write_text("anna anna-token-0123456789\n")
    arguments = ("--tokens-file", str(tmp_path / "tokens"))
    with (
        running_gateway(page_stack.encoder, page_stack.decoder, tmp_path, *arguments) as gateway,
        browser.open_page(gateway.url) as page,
    ):
        page.size = photo_size
        page.page.set_input_files("#file", DEMO_PHOTO)
        page.says("A token is needed here", "#token-text")
        page.page.fill("#token", "wrong")
        page.page.keyboard.press("Enter")
        page.says("This token is not known here", "#token-text")
        page.page.fill("#token", "anna-token-0123456789")
        page.page.keyboard.press("Enter")
        page.says("demo.jpg, ")
        page.hover(100, 300)
        page.hover(131, 410)
        page.says("Preview", "#timing")
        page.click(131, 410)
        page.check_problems()
