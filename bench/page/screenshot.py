"""Takes the picture of the labeling page that the gateway's README shows.

    python -m bench.page.screenshot

Starts Redis, both services with vit_t and the gateway, and labels the demo's photo in a headless Chromium.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from bench.commit import ROOT
from bench.page.browser import LabelingPage, open_page
from splitsam.client.stack import Stack, StackSettings
from splitsam.client.up import DEMO_PHOTO

DEMO_SIZE = (1024, 683)


def label_photo(page: LabelingPage) -> None:
    page.open(DEMO_PHOTO, DEMO_SIZE)
    page.label("hen")
    page.page.get_by_label("Remove the label object").click()
    page.click(131, 410)
    page.click(127, 189)
    page.page.keyboard.press("n")
    page.drag(372, 74, 566, 510)
    page.page.keyboard.press("n")
    page.label("hen in front")
    page.click(840, 399)
    page.click(608, 375, label=0)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.page.screenshot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gateway" / "labeling-page.png")
    options = parser.parse_args(arguments)
    device = ("--device", "cpu")
    settings = StackSettings(gateway_port=0, encoder_args=device, decoder_args=device)
    small = {"width": 960, "height": 560}
    with Stack(settings.on_free_ports()) as stack, open_page(stack.gateway, viewport=small) as page:
        label_photo(page)
        picture = Image.open(io.BytesIO(page.page.screenshot()))
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
