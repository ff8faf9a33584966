"""A headless Chromium with the labeling page in it, used as a person uses it; it needs the extra `page`."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "there is no Chromium: install one, with Debian's `apt-get install chromium` for instance"
PATIENCE_MS = 60_000
_OF_THE_NETWORK = ("Failed to load resource", "WebSocket connection to")


@dataclass
class LabelingPage:
    """The page with an image on it, or none yet.

    Args:
        version: of the browser.
        size: width and height of the image, in pixels.
        problems: what the page's own scripts raised or complained about.
    """

    page: Page
    version: str
    size: tuple[int, int] = (0, 0)
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> Locator:
        return self.page.locator("#status")

    def says(self, text: str, where: str = "#status") -> None:
        """Wait until it says so; an AssertionError if it does not."""
        expect(self.page.locator(where)).to_contain_text(text, timeout=PATIENCE_MS)

    def open(self, path: Path, size: tuple[int, int]) -> None:
        self.size = size
        self.page.set_input_files("#file", path)
        self.says(f"{path.name}, {size[0]} × {size[1]}")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the image is on the screen, while the page shows all of it."""
        box = self.page.locator("#marks").bounding_box()
        if box is None:
            raise RuntimeError("the picture is not shown")
        scale = min(box["width"] / self.size[0], box["height"] / self.size[1])
        left = box["x"] + (box["width"] - scale * self.size[0]) / 2
        top = box["y"] + (box["height"] - scale * self.size[1]) / 2
        return left + scale * x, top + scale * y

    def hover(self, x: float, y: float) -> None:
        self.page.mouse.move(*self.place(x, y))

    def click(self, x: float, y: float, *, label: int = 1) -> None:
        """Click on a pixel and wait for the mask, painted."""
        painted = len(self.clicks_ms())
        self.page.mouse.click(*self.place(x, y), button="left" if label else "right")
        self.wait_painted(painted + 1)

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draw a box and wait for the mask, painted."""
        painted = len(self.clicks_ms())
        self.hover(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move(*self.place(x1, y1), steps=4)
        self.page.mouse.up()
        self.wait_painted(painted + 1)

    def wait_painted(self, count: int) -> None:
        for _ in range(PATIENCE_MS // 5):
            if len(self.clicks_ms()) >= count:
                return
            self.page.wait_for_timeout(5)
        raise AssertionError(f"no mask was painted; the page says: {self.page.inner_text('footer')}")

    def clicks_ms(self) -> list[float]:
        """How long each click took, from the mouse's event until the frame with its mask was drawn."""
        script = "() => performance.getEntriesByName('click to mask').map((each) => each.duration)"
        taken: list[float] = self.page.evaluate(script)
        return taken

    def pixels(self) -> NDArray[np.uint8]:
        """What is to be seen of the picture, [height, width, 3] uint8; the rest of the page is black."""
        seen = np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))
        box = self.page.locator("#stage").bounding_box() or {}
        left, top = round(box["x"]), round(box["y"])
        part = slice(top, top + int(box["height"])), slice(left, left + int(box["width"]))
        alone = np.zeros_like(seen)
        alone[part] = seen[part]
        return alone

    def check_problems(self) -> None:
        """Raises AssertionError where the page's scripts complained; what the network does is not theirs."""
        problems = [each for each in self.problems if not each.startswith(_OF_THE_NETWORK)]
        if problems:
            raise AssertionError(problems)

    def label(self, name: str) -> None:
        self.page.fill("#new-label", name)
        self.page.press("#new-label", "Enter")


@contextmanager
def open_page(url: str, **options: Any) -> Iterator[LabelingPage]:
    """The gateway's page in a browser of its own, of 1280 x 800 pixels unless told otherwise.

    Args:
        options: of the browser's context, e.g. `color_scheme`.

    Raises:
        RuntimeError: there is no Chromium.
    """
    if CHROMIUM is None:
        raise RuntimeError(NO_CHROMIUM)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **options})
        page.set_default_timeout(PATIENCE_MS)
        opened = LabelingPage(page, browser.version)
        page.on("pageerror", lambda error: opened.problems.append(str(error)))
        page.on("console", lambda said: said.type == "error" and opened.problems.append(said.text))
        page.goto(url)
        yield opened
        browser.close()
