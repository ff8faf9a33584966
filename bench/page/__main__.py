"""Times clicks on the labeling page in a headless Chromium, until their masks are painted.

    python -m bench.page --clicks 200

Starts Redis, both services with vit_t and the gateway, opens the demo's photo in the page, and clicks: once for a new
object, once more to refine it. Rows go to `bench/results/page-<device>.csv`; `python -m bench.page.tables` makes a
table of them. Needs the extra `page` and a Chromium.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.machine import describe_machine, positive
from bench.page.browser import open_page
from bench.page.rows import Row
from bench.page.screenshot import DEMO_SIZE
from bench.row_file import RESULTS, ResultsFile, results_path
from splitsam.client.stack import Stack, StackSettings
from splitsam.client.up import DEMO_PHOTO
from splitsam.common.device import choose_device

_WARM_UP = 10
_STEPS = ("first click", "refining click")
# By click: from its event until its mask was painted, and of that from the answer's last byte on.
_TIMES = """() => {
  const clicks = performance.getEntriesByName("click to mask");
  const answers = performance.getEntriesByType("resource").filter(({ name }) => name.endsWith("/v1/masks"));
  return clicks.map(({ startTime, duration }, at) => [duration, startTime + duration - answers[at].responseEnd]);
}"""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clicks", type=positive, default=200, help="of each kind")
    parser.add_argument("--device", default="auto", help="of the services: auto, cpu, cuda or cuda:N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, machine: dict[str, str]) -> Iterator[Row]:
    device = ("--device", options.device)
    settings = StackSettings(gateway_port=0, encoder_args=device, decoder_args=device)
    width_px, height_px = DEMO_SIZE
    places = np.random.default_rng(0).uniform(2, (width_px - 2, height_px - 2), (_WARM_UP + options.clicks, 2, 2))
    with Stack(settings.on_free_ports()) as stack, open_page(stack.gateway) as page:
        gateway_ms: list[float] = []
        page.page.on("response", lambda said: said.url.endswith("/v1/masks") and gateway_ms.append(said.json()["ms"]))
        page.page.evaluate("(count) => performance.setResourceTimingBufferSize(count)", 100 + places.size)
        page.open(DEMO_PHOTO, DEMO_SIZE)
        page.page.keyboard.press("p")  # no previews between the clicks
        for first, second in places.tolist():
            page.click(*first)
            page.click(*second, label=0)
            page.page.keyboard.press("Delete")
        times = np.array(page.page.evaluate(_TIMES))  # [clicks, 2]
    taken, painting, within = (
        each.reshape(-1, len(_STEPS))[_WARM_UP:] for each in (times[:, 0], times[:, 1], np.array(gateway_ms))
    )
    for at, step in enumerate(_STEPS):
        p50, p99 = np.percentile(taken[:, at], (50, 99)).tolist()
        parts = (float(np.median(each[:, at])) for each in (within, painting))
        yield Row(step, options.clicks, p50, p99, *parts, f"Chromium {page.version}", **machine)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    machine = describe_machine("bench.page", choose_device(options.device), options.commit, arguments)
    path = results_path(options.results, "page", machine["gpu"])
    results = ResultsFile(path, Row)
    for row in measure(options, machine):
        print(f"{row.step}: {row.ms_p50:.1f} ms p50, {row.ms_p99:.1f} ms p99", flush=True)
        results.add(row)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
