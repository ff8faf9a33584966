"""Times clicks made through the HTTP gateway against the same clicks made by the client.

    python -m bench.gateway --clicks 500

Starts Redis, both services with vit_t and the gateway, opens a photograph, and clicks on it in every way in turn, so
that whatever else the machine does meets all ways alike. The masks have to be the same. Rows go to
`bench/results/gateway-<device>.csv`; `python -m bench.gateway.tables` makes a table of them.
"""

import argparse
import http.client
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.client import connect

from bench.gateway.rows import Row
from bench.machine import describe_machine, positive
from bench.row_file import RESULTS, ResultsFile, results_path
from splitsam.client import Client
from splitsam.client.stack import Stack, StackSettings
from splitsam.client.up import DEMO_PHOTO
from splitsam.common.device import choose_device

# x and y of a click, to its mask.
Way = Callable[[float, float], Any]
_WARM_UP = 20


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clicks", type=positive, default=500, help="in each way")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--commit", default="", help="what the CSV names, where there is no git")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, machine: dict[str, str]) -> Iterator[Row]:
    device = ("--device", options.device)
    settings = StackSettings(gateway_port=0, encoder_args=device, decoder_args=device)
    with ExitStack() as stack:
        running = stack.enter_context(Stack(settings.on_free_ports()))
        client = stack.enter_context(Client(running.encoder, running.decoder))
        image = client.encode(DEMO_PHOTO)
        place = running.gateway.removeprefix("http://")
        ways: dict[str, Way] = {
            "client": lambda x, y: client.predict(image.key, points=[(x, y)])[0].rle,
            "gateway": _asking(stack.enter_context(closing(http.client.HTTPConnection(place))), image.key),
            "pointer": _hovering(stack.enter_context(connect(f"ws://{place}/v1/pointer", proxy=None)), image.key),
        }
        times = _time_ms(ways, options.clicks, image.width_px, image.height_px)
    for way, taken in times.items():
        p50, p99 = np.percentile(taken, (50, 99)).tolist()
        added = float(np.median(taken - times["client"]))
        yield Row(way, options.clicks, p50, p99, added, **machine)


def _asking(connection: http.client.HTTPConnection, key: str) -> Way:
    def click(x: float, y: float) -> Any:
        body = json.dumps({"key": key, "points": [[x, y]]})
        connection.request("POST", "/v1/masks", body, {"content-type": "application/json"})
        return json.loads(connection.getresponse().read())["masks"][0]["rle"]

    return click


def _hovering(socket: Any, key: str) -> Way:
    socket.send(json.dumps({"key": key}))

    def hover(x: float, y: float) -> Any:
        socket.send(json.dumps({"id": 0, "points": [[x, y]]}))
        return json.loads(socket.recv())["masks"][0]["rle"]

    return hover


def _time_ms(ways: dict[str, Way], clicks: int, width_px: int, height_px: int) -> dict[str, Any]:
    """By way, one after the other for each click; [clicks] milliseconds each."""
    positions = np.random.default_rng(0).random((_WARM_UP + clicks, 2)) * (width_px - 1, height_px - 1)
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for x, y in positions.tolist():
        masks = []
        for way, click in ways.items():
            start_s = time.perf_counter()
            masks.append(click(x, y))
            taken[way].append(1000 * (time.perf_counter() - start_s))
        if any(mask != masks[0] for mask in masks):
            raise RuntimeError(f"the ways do not agree on the mask at {x:.1f}, {y:.1f}")
    return {way: np.array(ms[_WARM_UP:]) for way, ms in taken.items()}


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    machine = describe_machine("bench.gateway", choose_device(options.device), options.commit, arguments)
    path = results_path(options.results, "gateway", machine["gpu"])
    results = ResultsFile(path, Row)
    for row in measure(options, machine):
        print(
            f"{row.way}: {row.ms_p50:.1f} ms p50, {row.ms_p99:.1f} ms p99, adds {row.added_ms_p50:.2f} ms", flush=True
        )
        results.add(row)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
